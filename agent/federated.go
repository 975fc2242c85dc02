package agent

import (
	"fmt"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"countersign.io/countersign/api"
	workloadv1 "countersign.io/countersign/api/workload/v1"
	"countersign.io/countersign/identity"
)

// notSpokenOf are the bundles of other trust domains that are held, that workloads need, and that a member's push says nothing
// of: on a new stream the member has yet to be told of the workloads. What it says there is no bundle of is not among them.
func (a *Agent) notSpokenOf(old *trust, pushed []*identity.Bundle, spokenOf []string) (kept []*identity.Bundle) {
	var needed map[spiffeid.TrustDomain]bool
	for _, b := range old.federated() {
		if slices.Contains(spokenOf, b.TrustDomain.Name()) || slices.ContainsFunc(pushed, func(p *identity.Bundle) bool { return p.TrustDomain == b.TrustDomain }) {
			continue
		}
		if needed == nil {
			needed = a.cache.federatesWith()
		}
		if needed[b.TrustDomain] {
			kept = append(kept, b)
		}
	}
	return kept
}

// addFederated takes up bundles that came with SVIDs, before the stream has them: those that the agent has already stay as they
// are, for the stream's word is newer or will be.
func (a *Agent) addFederated(more []*workloadv1.Bundle) error {
	if len(more) == 0 {
		return nil
	}
	a.trustMu.Lock()
	defer a.trustMu.Unlock()
	old := a.trust.Load()
	all := old.federated()
	for _, w := range more {
		b, err := api.BundleFromWire(w)
		if err != nil {
			return fmt.Errorf("%w: %w", errAnswer, err)
		}
		if old.all[b.TrustDomain] == nil {
			all = append(all, b)
		}
	}
	t, err := newTrust(old, old.td, old.own, all)
	if err != nil {
		return fmt.Errorf("%w: %w", errAnswer, err)
	}
	a.setTrust(t)
	return nil
}

// federatesWith are the trust domains that an SVID which is held federates with.
func (c *cache) federatesWith() map[spiffeid.TrustDomain]bool {
	out := map[spiffeid.TrustDomain]bool{}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, w := range c.byKey {
		for i := range w.svids {
			for _, td := range w.svids[i].FederatesWith {
				out[td] = true
			}
		}
	}
	return out
}
