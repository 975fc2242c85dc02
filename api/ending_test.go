package api

import (
	"fmt"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	workloadv1 "countersign.io/countersign/api/workload/v1"
	"countersign.io/countersign/identity"
)

// What ends is bounded in what is taken; so nothing longer is sent, and the tainted ones first.
func TestManyEnding(t *testing.T) {
	b := &identity.Bundle{TrustDomain: spiffeid.RequireTrustDomainFromString("example.org"), JWT: map[string][]byte{}}
	for i := range 70 {
		b.Ending = append(b.Ending, identity.Ending{ID: fmt.Sprintf("%02d", i), Tainted: i >= 60, Spread: time.Second})
	}
	got, err := BundleFromWire(BundleToWire(b))
	if err != nil {
		t.Fatal(err)
	}
	if len(got.Ending) != 64 || got.Ending[0].ID != "60" || got.Ending[10].ID != "00" || len(b.Ending) != 70 || b.Ending[0].ID != "00" {
		t.Errorf("%+v", got.Ending)
	}
	wire := BundleToWire(b)
	wire.Ending = append(wire.Ending, &workloadv1.Bundle_Ending{Id: "one too many"})
	if _, err := BundleFromWire(wire); err == nil {
		t.Error("taken")
	}
	wire.Ending = []*workloadv1.Bundle_Ending{{Id: "x", Tainted: true, SpreadMs: 1 << 62}, {Id: "y", SpreadMs: -5}}
	if got, err := BundleFromWire(wire); err != nil || got.Ending[0].Spread != time.Hour || got.Ending[1].Spread != 0 {
		t.Errorf("%+v, %v", got, err)
	}
}
