//go:build integration

package integration

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"countersign.io/countersign/integration/cluster"
)

// sequence is that of a trust domain's own bundle, and the bundle.
func (w *world) sequence() (n int64, bundle string) {
	w.t.Helper()
	bundle = w.admin("bundle", "show", "--format", "spiffe")
	var b struct {
		Sequence int64 `json:"spiffe_sequence"`
	}
	if err := json.Unmarshal([]byte(bundle), &b); err != nil || b.Sequence == 0 {
		w.t.Fatalf("%v: %s", err, bundle)
	}
	return b.Sequence, bundle
}

// TestFederatedTrustDomain: a resource that names a real trust domain is Ready, its status follows that one's bundle, says why when nobody answers
// there, and the last good bundle stays.
func TestFederatedTrustDomain(t *testing.T) {
	w := newResources(t)
	k := w.k
	listen := freeAddress(t)
	partner := newWorldOf(t, bin, 1, fmt.Sprintf("public: {listen: %q, url: %q}\nfederation: {refresh_hint: 1s}\noidc: {off: true}\n", listen, "https://"+listen),
		func(c *cluster.Cluster) { c.TrustDomain = "partner.test" })
	sequence, bundle := partner.sequence()
	spec := object{
		"trustDomain": "partner.test", "bundleEndpointURL": "https://" + listen + "/bundle", "profile": "https_spiffe",
		"endpointSPIFFEID": "spiffe://partner.test/countersign/bundle-endpoint", "initialBundle": bundle,
	}
	put := func(s object) {
		t.Helper()
		if err := k.resource("federatedtrustdomains", "partner", s); err != nil {
			t.Fatal(err)
		}
	}
	at := func(o object) (int64, time.Time) {
		n, _ := o.at("status", "sequence").(float64)
		last, _ := time.Parse(time.RFC3339, fmt.Sprint(o.at("status", "lastRefresh")))
		return int64(n), last
	}
	began := time.Now()
	put(spec)
	follows := func(what string, want int64) {
		t.Helper()
		w.eventually(what, func() error {
			var o object
			if err := k.do("GET", resourcesAPI+"federatedtrustdomains/partner", nil, &o); err != nil {
				return err
			}
			n, last := at(o)
			if s, r, m := o.ready(); s != "True" || r != "Ready" || !strings.Contains(m, "partner.test") || n != want || last.Before(began.Add(-time.Second)) {
				return fmt.Errorf("Ready=%s, %s: %s; sequence %d, want %d; refreshed at %v", s, r, m, n, want, last)
			}
			return nil
		})
	}
	follows("the resource is ready", sequence)

	// The partner's bundle moves, and its authority is replaced by the one that was announced.
	partner.admin("bundle", "prepare")
	next, _ := partner.sequence()
	if next <= sequence {
		t.Fatalf("the partner's bundle stays at %d", next)
	}
	follows("the status follows the partner's bundle", next)

	// The partner is away: what is wrong is said, and the last good bundle stays.
	partner.Members[0].Kill()
	o := w.becomes(k, "federatedtrustdomains", "partner", "False", "Failed", "could not be refreshed since", listen)
	if n, _ := at(o); n != next {
		t.Errorf("the status tells sequence %d, want %d", n, next)
	}
	kept := func(when string) {
		t.Helper()
		var r relationship
		parseJSON(t, w.admin("federation", "show", "partner.test", "-o", "json"), &r)
		if r.Sequence != fmt.Sprint(next) || r.X509Authorities != 2 {
			t.Errorf("%s, the members have sequence %s with %d authorities, want %d with 2", when, r.Sequence, r.X509Authorities, next)
		}
	}
	kept("while the partner is away")
	if err := partner.RestartMember(w.ctx, partner.Members[0]); err != nil {
		t.Fatal(err)
	}
	follows("the partner is back", next)

	// A bundle that is none is refused, and what was there before stays.
	bad := object{}
	for key, v := range spec {
		bad[key] = v
	}
	bad["initialBundle"] = strings.Replace(bundle, `"keys"`, `"locks"`, 1)
	put(bad)
	w.becomes(k, "federatedtrustdomains", "partner", "False", "Refused", "initialBundle")
	kept("after a bundle that is none")
	put(spec)
	w.becomes(k, "federatedtrustdomains", "partner", "True", "Ready")
	kept("after the first bundle was pinned again")
}
