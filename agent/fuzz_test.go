package agent

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	workloadv1 "countersign.io/countersign/api/workload/v1"
)

// The seeds are files that an agent wrote at this time, under the bundle in testdata/trust.json.
var seedTime = time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)

func seedTrust(t testing.TB) *trust {
	t.Helper()
	tr, _, _, err := parseTrust(must(os.ReadFile("testdata/trust.json")))
	if err != nil {
		t.Fatal(err)
	}
	return tr
}

// seeds fails if a fuzzer's seeds are not where go test looks for them.
func seeds(f *testing.F) {
	f.Helper()
	if found, err := filepath.Glob(filepath.Join("testdata", "fuzz", f.Name(), "*")); err != nil || len(found) < 2 {
		f.Fatalf("found %d seeds (%v)", len(found), err)
	}
}

func FuzzOwnFile(f *testing.F) {
	seeds(f)
	tr, good := seedTrust(f), must(os.ReadFile("testdata/agent.json"))
	if _, err := parseOwn(good, tr, seedTime); err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		o, err := parseOwn(data, tr, seedTime)
		if err != nil {
			return
		}
		one := must(encodeOwn(o))
		if two := must(encodeOwn(must(parseOwn(one, tr, seedTime)))); !bytes.Equal(one, two) {
			t.Errorf("%s became %s", one, two)
		}
	})
}

func FuzzTrustFile(f *testing.F) {
	seeds(f)
	f.Fuzz(func(t *testing.T, data []byte) {
		tr, anchor, members, err := parseTrust(data)
		if err != nil {
			return
		}
		if len(tr.own.X509) == 0 || tr.roots == nil || tr.jwt == nil {
			t.Error("taken without an authority")
		}
		one := must(encodeTrust(tr, anchor, members))
		tr2, anchor2, members2, err := parseTrust(one)
		if err != nil || !sameBundle(tr.own, tr2.own) || len(tr.all) != len(tr2.all) || anchor2 != anchor || len(members2) != len(members) {
			t.Errorf("%s is not read back: %v", one, err)
		}
	})
}

func FuzzWorkloadFile(f *testing.F) {
	seeds(f)
	tr := seedTrust(f)
	if _, err := parseWorkload(must(os.ReadFile("testdata/svid.json")), tr, seedTime); err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		w, err := parseWorkload(data, tr, seedTime)
		if err != nil {
			return
		}
		for _, s := range w.svids {
			if s.ID.TrustDomain() != td || !seedTime.Before(s.NotAfter) || len(s.Key) == 0 {
				t.Errorf("taken: %+v", s)
			}
		}
		one := must(encodeWorkload(w))
		if two := must(encodeWorkload(must(parseWorkload(one, tr, seedTime)))); !bytes.Equal(one, two) {
			t.Errorf("%s became %s", one, two)
		}
	})
}

// FuzzAnswer feeds a member's answers: none is for the key that was just made, so none may be taken.
func FuzzAnswer(f *testing.F) {
	seeds(f)
	tr, key := seedTrust(f), must(KeyP256.makePair())
	f.Fuzz(func(t *testing.T, data []byte) {
		var resp workloadv1.IssueX509Response
		if proto.Unmarshal(data, &resp) != nil {
			return
		}
		for _, r := range append(resp.Results, nil) {
			res, err := takeResult(tr, r, resp.IssuerChain, resp.Revision, key, seedTime)
			if err == nil && res.err == nil {
				t.Errorf("taken: %+v", res)
			}
		}
	})
}
