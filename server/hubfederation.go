package server

import (
	"maps"
	"slices"
	"time"

	"countersign.io/countersign/identity"
)

// An agent gets the bundles of exactly those trust domains that an entry of one of its workloads federates with. A change of one
// of them costs something for the streams that have it, and nothing for all others.

// grantedFor is how long a stream keeps a bundle for an SVID that was just issued and that its agent has yet to tell of: it asked
// by another call.
const grantedFor = time.Minute

// federate takes up with which trust domains a workload's entries federate, and sends its agent the bundles if that makes a
// difference to all that the agent has. The caller holds h.mu.
func (h *hub) federate(w *watch, entries []*identity.Entry) {
	var now []string
	for _, e := range entries {
		now = append(now, e.FederatesWith...)
	}
	slices.Sort(now)
	now = slices.Compact(now)
	if slices.Equal(now, w.federates) {
		return
	}
	s, changed := w.session, false
	for _, td := range now {
		if s.federates[td]++; s.federates[td] == 1 {
			if h.federating[td] == nil {
				h.federating[td] = map[*session]struct{}{}
			}
			h.federating[td][s] = struct{}{}
			changed = true
		}
	}
	for _, td := range w.federates {
		if s.federates[td]--; s.federates[td] > 0 {
			continue
		}
		delete(s.federates, td)
		delete(h.federating[td], s)
		if len(h.federating[td]) == 0 {
			delete(h.federating, td)
		}
		changed = true
	}
	w.federates = now
	if changed {
		s.refresh(true, false)
	}
}

// federatedWith are the trust domains whose bundles a stream gets.
func (h *hub) federatedWith(s *session) []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	now := h.now()
	out := slices.Collect(maps.Keys(s.federates))
	for td, until := range s.granted {
		switch {
		case now.After(until):
			delete(s.granted, td)
		case s.federates[td] == 0:
			out = append(out, td)
		}
	}
	slices.Sort(out)
	return out
}

// lacking notes that the agent is being given SVIDs that federate with the trust domains, and returns those whose bundles not all
// of its streams have been sent: the answer must bring them, or a workload's first sight of its identity is without.
func (h *hub) lacking(agentID string, tds []string) []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	streams := h.byAgent[agentID]
	until := h.now().Add(grantedFor)
	for _, s := range streams {
		for _, td := range tds {
			s.granted[td] = until
		}
	}
	return slices.DeleteFunc(slices.Clone(tds), func(td string) bool {
		return len(streams) > 0 && !slices.ContainsFunc(streams, func(s *session) bool { return !s.wasSent(td) })
	})
}
