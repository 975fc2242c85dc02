package workloadapi

import (
	"testing"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
)

func TestFetch(t *testing.T) {
	f := start(t)
	svid, err := f.spiffe().FetchX509SVID(f.ctx())
	if err != nil {
		t.Fatal(err)
	}
	if svid.ID.String() != "spiffe://example.org/web" {
		t.Fatalf("got %s", svid.ID)
	}
	r, err := f.client("web").FetchJWTSVID(f.ctx(), &workload.JWTSVIDRequest{Audience: []string{"a"}})
	if err != nil || len(r.Svids) != 1 {
		t.Fatalf("%v %v", r, err)
	}
}
