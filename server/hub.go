package server

import (
	"cmp"
	"maps"
	"slices"
	"sync"
	"time"

	"countersign.io/countersign/identity"
)

// hub knows which connected agent serves which workload, and finds the workloads that a change concerns: by an
// index from each selector to the workloads that have it, so that the work grows with what is concerned and not with
// what is there. It decides nothing: an agent that is told asks again, with evidence.
type hub struct {
	// matching are the entries that a workload with these selectors would be issued by; false: it cannot be told now.
	matching func(sel []identity.Selector) ([]*identity.Entry, bool)
	now      func() time.Time

	mu       sync.Mutex
	sessions map[*session]struct{}
	byAgent  map[string][]*session // the oldest first
	postings map[identity.Selector]*posting
	holders  map[string]map[*watch]struct{} // by the ID of an entry that their SVIDs were issued by
	expiries map[string]*expiry             // by the ID of an entry that will expire and is held
	seen     map[string]time.Time           // when an agent was connected last that is not now, as far back as goneAfter
	// federating are the streams that get the bundle of a trust domain, see watch.federates
	federating map[string]map[*session]struct{}
	pods       int   // how many sessions are of pods without an agent
	ended      error // set: no new session
}

// posting is the workloads that have a selector. Each selector's text is kept once, here.
type posting struct {
	sel     identity.Selector
	watches map[*watch]struct{}
}

// watch is one workload that an agent serves.
type watch struct {
	session  *session
	handle   uint64
	weight   int        // see weigh
	postings []*posting // sorted by selector
	held     []held     // sorted by ID
	// federates are the trust domains that the matching entries federate with, sorted
	federates []string
	told      int // how often in a row the agent was told and came back with something else than what matches
	retry     *time.Timer
}

// held is an entry, at a revision, that a workload's SVID was issued by.
type held struct {
	id       string
	revision uint64
}

type expiry struct {
	at    time.Time
	timer *time.Timer
}

const (
	// maxWatches bounds one agent. The kubelet's own bound is in the hundreds.
	maxWatches = 20000
	// maxWeight bounds what the workloads of one stream cost, in bytes or so: maxWatches usual ones are below it.
	maxWeight = 32 << 20
	// maxWatchSelectors is more than issuance ever answers: what an agent asserts, and what is proven.
	maxWatchSelectors = 2 * identity.MaxSelectors
	// maxSessions is how many streams one agent may have: a new one while a dead one is not noticed yet.
	maxSessions = 4
	// recheckChunk is how many workloads are compared in one go, so that others are not kept waiting.
	recheckChunk = 256
)

func newHub(matching func([]identity.Selector) ([]*identity.Entry, bool), now func() time.Time) *hub {
	return &hub{
		matching: matching, now: now,
		sessions: map[*session]struct{}{}, byAgent: map[string][]*session{}, postings: map[identity.Selector]*posting{},
		holders: map[string]map[*watch]struct{}{}, expiries: map[string]*expiry{}, federating: map[string]map[*session]struct{}{}, seen: map[string]time.Time{},
	}
}

func (h *hub) open(agentID, version string) (*session, error) {
	return h.take(newSession(agentID, version))
}

// take opens a session.
func (h *hub) take(s *session) (*session, error) {
	agentID := s.agentID
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.ended != nil {
		return nil, h.ended
	}
	if s.proven != nil {
		if h.pods >= maxPodSessions {
			return nil, errTooManyPods
		}
		h.pods++
	}
	same := h.byAgent[agentID]
	if len(same) >= maxSessions {
		same[0].end(errReplaced)
		h.removeLocked(same[0])
		same = h.byAgent[agentID]
	}
	h.sessions[s] = struct{}{}
	delete(h.seen, agentID)
	h.byAgent[agentID] = append(same, s)
	return s, nil
}

func (h *hub) remove(s *session) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.removeLocked(s)
}

func (h *hub) removeLocked(s *session) {
	if _, ok := h.sessions[s]; !ok {
		return
	}
	for _, w := range s.watches {
		h.drop(w)
	}
	delete(h.sessions, s)
	if s.proven != nil {
		h.pods--
	}
	rest := slices.DeleteFunc(h.byAgent[s.agentID], func(o *session) bool { return o == s })
	if len(rest) == 0 {
		delete(h.byAgent, s.agentID)
		now := h.now()
		if s.proven == nil {
			h.seen[s.agentID] = now
		}
		if len(h.seen) > 2*len(h.byAgent)+1000 {
			maps.DeleteFunc(h.seen, func(_ string, at time.Time) bool { return now.Sub(at) > goneAfter })
		}
	} else {
		h.byAgent[s.agentID] = rest
	}
}

// set takes up a workload, or replaces what was known of it, and tells the agent if what it holds is not what
// matches now. sel must be sorted and without facts: those are for this member to know.
func (h *hub) set(s *session, handle uint64, sel []identity.Selector, holds []held) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if _, ok := h.sessions[s]; !ok {
		return nil // it is ending
	}
	w := &watch{session: s, handle: handle, held: holds, weight: weigh(sel, holds)}
	slices.SortFunc(w.held, func(a, b held) int { return cmp.Compare(a.id, b.id) })
	w.held = slices.Compact(w.held)
	if old := s.watches[handle]; old != nil {
		w.told = old.told
		w.federates, old.federates = old.federates, nil // no bundle is sent again for a workload that was issued anew
		h.drop(old)
	}
	if s.proven != nil && len(s.watches) >= maxPodWatches {
		return errTooManyOfPod
	}
	if len(s.watches) >= maxWatches || s.weight+w.weight > maxWeight {
		return errTooManyWatches
	}
	s.watches[handle] = w
	s.weight += w.weight
	w.postings = make([]*posting, len(sel))
	for i, x := range sel {
		p := h.postings[x]
		if p == nil {
			p = &posting{sel: x, watches: map[*watch]struct{}{}}
			h.postings[x] = p
		}
		p.watches[w] = struct{}{}
		w.postings[i] = p
	}
	for _, e := range w.held {
		if h.holders[e.id] == nil {
			h.holders[e.id] = map[*watch]struct{}{}
		}
		h.holders[e.id][w] = struct{}{}
	}
	if h.settled(w) {
		w.told = 0
		return nil
	}
	// An agent that was told and came back with the same may have asked a member that is behind: it is told again,
	// but ever more slowly.
	if w.told == 0 {
		s.tell(handle)
	} else {
		w.retry = time.AfterFunc(min(time.Second<<min(w.told-1, 6), time.Minute), func() { h.recheck([]*watch{w}) })
	}
	w.told++
	return nil
}

// weigh counts what a workload's texts cost, and what it costs to find them.
func weigh(sel []identity.Selector, holds []held) int {
	const each = 64
	n := each
	for _, x := range sel {
		n += each + len(x)
	}
	for _, e := range holds {
		n += each + len(e.id)
	}
	return n
}

func (h *hub) unset(s *session, handle uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if w := s.watches[handle]; w != nil {
		h.drop(w)
		s.untell(handle)
	}
}

func (h *hub) drop(w *watch) {
	delete(w.session.watches, w.handle)
	w.session.weight -= w.weight
	for _, p := range w.postings {
		delete(p.watches, w)
		if len(p.watches) == 0 {
			delete(h.postings, p.sel)
		}
	}
	for _, e := range w.held {
		delete(h.holders[e.id], w)
		if len(h.holders[e.id]) == 0 {
			delete(h.holders, e.id)
			if x := h.expiries[e.id]; x != nil {
				x.timer.Stop()
				delete(h.expiries, e.id)
			}
		}
	}
	if w.retry != nil {
		w.retry.Stop()
	}
	h.federate(w, nil)
}

// settled reports whether a workload holds exactly what matches now, or it cannot be told what does, and arranges for a second look when one of
// the entries expires.
func (h *hub) settled(w *watch) bool {
	sel := make([]identity.Selector, len(w.postings))
	for i, p := range w.postings {
		sel[i] = p.sel
	}
	entries, decided := h.matching(sel)
	if !decided {
		return true
	}
	h.federate(w, entries)
	same := len(entries) == len(w.held)
	for _, e := range entries {
		i, ok := slices.BinarySearchFunc(w.held, e.ID, func(x held, id string) int { return cmp.Compare(x.id, id) })
		same = same && ok && w.held[i].revision == e.Revision
		if ok && !e.ExpiresAt.IsZero() {
			h.expect(e)
		}
	}
	return same
}

func (h *hub) expect(e *identity.Entry) {
	x := h.expiries[e.ID]
	if x != nil && x.at.Equal(e.ExpiresAt) {
		return
	}
	if x != nil {
		x.timer.Stop()
	}
	id := e.ID
	h.expiries[id] = &expiry{at: e.ExpiresAt, timer: time.AfterFunc(e.ExpiresAt.Sub(h.now()), func() {
		h.mu.Lock()
		delete(h.expiries, id)
		concerned := keys(h.holders[id])
		h.mu.Unlock()
		h.recheck(concerned)
	})}
}

// recheck tells the agents of those workloads that no longer hold what matches.
func (h *hub) recheck(concerned []*watch) {
	for chunk := range slices.Chunk(concerned, recheckChunk) {
		h.mu.Lock()
		for _, w := range chunk {
			if w.session.watches[w.handle] == w && !h.settled(w) {
				w.session.tell(w.handle)
			}
		}
		h.mu.Unlock()
	}
}

// apply passes on changes of the state, which must be visible to matching already.
func (h *hub) apply(changes []identity.Change) {
	concerned := map[*watch]struct{}{}
	h.mu.Lock()
	for _, c := range changes {
		if c.Reset || c.Bundle || c.Members {
			for s := range h.sessions {
				s.refresh(c.Reset || c.Bundle, c.Reset || c.Members)
			}
		}
		for s := range h.federating[c.Federation] {
			s.refresh(true, false)
		}
		switch {
		case c.Reset:
			for s := range h.sessions {
				for _, w := range s.watches {
					concerned[w] = struct{}{}
				}
			}
		case c.AgentGone && c.Agent != nil:
			for _, s := range slices.Clone(h.byAgent[c.Agent.ID]) {
				s.end(goneError(c.Agent))
				h.removeLocked(s)
			}
		case c.KubeCluster != "":
			h.having([]identity.Selector{identity.Selector("k8s:cluster:" + c.KubeCluster)}, concerned)
		case c.OldEntry != nil || c.NewEntry != nil:
			if c.OldEntry != nil {
				for w := range h.holders[c.OldEntry.ID] {
					concerned[w] = struct{}{}
				}
			}
			if c.NewEntry != nil {
				h.having(identity.WithoutFacts(c.NewEntry.Selectors), concerned)
			}
		}
	}
	h.mu.Unlock()
	h.recheck(keys(concerned))
}

// podGone ends the workload of a pod, at every agent that serves it.
func (h *hub) podGone(cluster, podUID string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	concerned := map[*watch]struct{}{}
	h.having([]identity.Selector{identity.Selector("k8s:cluster:" + cluster), identity.Selector("k8s:pod-uid:" + podUID)}, concerned)
	for w := range concerned {
		w.session.tellEnded(w.handle)
	}
}

// having adds the workloads that have all of the selectors to into, starting from the rarest.
func (h *hub) having(sel []identity.Selector, into map[*watch]struct{}) {
	var rarest *posting
	all := make([]*posting, len(sel))
	for i, x := range sel {
		if all[i] = h.postings[x]; all[i] == nil {
			return
		}
		if rarest == nil || len(all[i].watches) < len(rarest.watches) {
			rarest = all[i]
		}
	}
	if rarest == nil {
		return
	}
next:
	for w := range rarest.watches {
		for _, p := range all {
			if _, ok := p.watches[w]; !ok {
				continue next
			}
		}
		into[w] = struct{}{}
	}
}

// endAll ends every session; for good if closing is set.
func (h *hub) endAll(err error, closing bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if closing {
		h.ended = err
	}
	for s := range h.sessions {
		s.end(err)
		h.removeLocked(s)
	}
}

// endIf ends the sessions of the agents for which why returns an error.
func (h *hub) endIf(why func(agentID string) error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for s := range h.sessions {
		if err := why(s.agentID); err != nil {
			s.end(err)
			h.removeLocked(s)
		}
	}
}

// agentStatus is what the hub knows of a connected agent.
type agentStatus struct {
	connected     bool
	version       string
	revision, seq uint64 // acknowledged
	workloads     int
}

func (h *hub) status(agentID string) agentStatus {
	h.mu.Lock()
	defer h.mu.Unlock()
	all := h.byAgent[agentID]
	if len(all) == 0 {
		return agentStatus{}
	}
	s := all[len(all)-1]
	st := agentStatus{connected: true, version: s.version, workloads: len(s.watches)}
	st.revision, st.seq = s.acked()
	return st
}

// agents is how many agents are connected.
func (h *hub) agents() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	n := 0
	for id := range h.byAgent {
		if !isPodID(id) {
			n++
		}
	}
	return n
}

func keys[K comparable](m map[K]struct{}) []K {
	out := make([]K, 0, len(m))
	for k := range m {
		out = append(out, k)
	}
	return out
}
