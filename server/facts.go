package server

import (
	"context"
	"slices"

	"countersign.io/countersign/attestor/kube"
	"countersign.io/countersign/identity"
)

// This file is what entries can name of a pod beyond its token: its labels, those of its namespace, its owner. They are the API
// server's word, taken by the member itself; what an agent says of them is refused (prove), or left out (plain).
//
// Where an entry could match a pod if they were known, and they cannot be told, the pod gets nothing, not even what other entries or
// the kube cluster's default would give: a workload that is for a moment another than it is would be let in, or kept out, wrongly, and
// nobody would know why. It keeps what it has until that expires, and is told why it got nothing new. Where no entry could match,
// nobody is asked, and no API server that is down keeps anything from its identity.

func namesFacts(e *identity.Entry) bool {
	return e != nil && slices.ContainsFunc(e.Selectors, identity.Selector.Fact)
}

// withFacts adds the facts of a pod to what its token proves, if an entry could match by them. sel must be sorted; so is what it
// returns.
func (s *Server) withFacts(ctx context.Context, who call, pod *kube.Claims, sel []identity.Selector) ([]identity.Selector, error) {
	if !s.cfg.State.FactsMatter(sel) {
		return sel, nil
	}
	facts, err := s.cfg.Pods.Facts(ctx, pod)
	if err != nil && who.kind != agent {
		err = &withheld{err, "an entry for labels or owners could match the pod, and this member cannot tell them now: ask its operators"}
	}
	if err != nil {
		return nil, err
	}
	return identity.SortSelectors(append(slices.Clone(sel), facts...)), nil
}

// matching is entitled for the hub: the entries that would be issued by; false where this member cannot tell by what it knows. What is
// missing then comes from a watch, which has the hub look again (podChanged).
func (s *Server) matching(sel []identity.Selector) (entries []*identity.Entry, decided bool) {
	if s.cfg.State.FactsMatter(sel) {
		var cluster, namespace, uid string
		for _, x := range sel {
			switch x.Name() {
			case "k8s:cluster":
				cluster = x.Value()
			case "k8s:ns":
				namespace = x.Value()
			case "k8s:pod-uid":
				uid = x.Value()
			}
		}
		facts, ok := s.cfg.Pods.KnownFacts(cluster, namespace, uid)
		if !ok {
			return nil, false
		}
		sel = identity.SortSelectors(append(slices.Clone(sel), facts...))
	}
	grants, _, err := s.entitled(sel, s.cfg.Now())
	if err != nil {
		return nil, true
	}
	out := make([]*identity.Entry, len(grants))
	for i, g := range grants {
		out[i] = g.entry
	}
	return out, true
}

// podChanged has the hub look again at the workload of a pod, or at those of a namespace where podUID is empty.
func (h *hub) podChanged(cluster, namespace, podUID string) {
	concerned := map[*watch]struct{}{}
	which := identity.Selector("k8s:pod-uid:" + podUID)
	if podUID == "" {
		which = identity.Selector("k8s:ns:" + namespace)
	}
	h.mu.Lock()
	h.having([]identity.Selector{identity.Selector("k8s:cluster:" + cluster), which}, concerned)
	h.mu.Unlock()
	h.recheck(keys(concerned))
}
