package server

import (
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	nodev1 "countersign.io/countersign/api/node/v1"
	workloadv1 "countersign.io/countersign/api/workload/v1"
	"countersign.io/countersign/identity"
)

func TestFuzzSeedsExist(t *testing.T) {
	for _, name := range []string{"FuzzHub", "FuzzSyncRequest", "FuzzEvidence", "FuzzDownstreamKeys"} {
		if seeds, _ := filepath.Glob(filepath.Join("testdata", "fuzz", name, "*")); len(seeds) == 0 {
			t.Errorf("%s has no seeds: is testdata there?", name)
		}
	}
}

// FuzzHub does at random what agents and operators do, and checks after each step that no workload is left holding something
// else than what matches without its agent having been told; and at the end that the index is empty again.
func FuzzHub(f *testing.F) {
	f.Fuzz(func(t *testing.T, ops []byte) {
		m := newHubModel(t)
		for len(ops) >= 3 && len(ops) < 3*300 {
			m.step(ops[0], ops[1], ops[2])
			m.check()
			ops = ops[3:]
		}
		for _, s := range m.sessions {
			m.h.remove(s)
		}
		if n := len(m.h.postings) + len(m.h.holders) + len(m.h.expiries) + len(m.h.sessions) + len(m.h.byAgent); n != 0 {
			t.Fatalf("%d things are left in the index", n)
		}
	})
}

type hubModel struct {
	t        *testing.T
	h        *hub
	entries  map[string]*identity.Entry
	revision uint64
	sessions []*session
}

func newHubModel(t *testing.T) *hubModel {
	m := &hubModel{t: t, entries: map[string]*identity.Entry{}}
	m.h = newHub(func(sel []identity.Selector) ([]*identity.Entry, bool) { return m.matching(sel), true }, time.Now)
	for i := range 3 {
		s, err := m.h.open(fmt.Sprint("agent-", i), "")
		if err != nil {
			t.Fatal(err)
		}
		m.sessions = append(m.sessions, s)
	}
	return m
}

func (m *hubModel) matching(sel []identity.Selector) []*identity.Entry {
	var out []*identity.Entry
	for _, e := range m.entries {
		if identity.Subset(e.Selectors, sel) {
			out = append(out, e)
		}
	}
	return out
}

// bits turns a byte into some of eight selectors.
func bits(b byte) []identity.Selector {
	var out []identity.Selector
	for i := range 8 {
		if b&(1<<i) != 0 {
			out = append(out, identity.Selector(fmt.Sprintf("k8s:ns:%d", i)))
		}
	}
	return identity.SortSelectors(out)
}

func (m *hubModel) step(op, a, b byte) {
	m.revision++
	s := m.sessions[int(a)%len(m.sessions)]
	handle := uint64(a / 16)
	id := fmt.Sprint("e", a%8)
	old := m.entries[id]
	switch op % 6 {
	case 0: // a workload, with what it would have been issued
		var holds []held
		for _, e := range m.matching(bits(b)) {
			holds = append(holds, held{e.ID, e.Revision})
		}
		m.set(s, handle, bits(b), holds)
	case 1: // a workload with something old
		m.set(s, handle, bits(b), []held{{id, uint64(b)}})
	case 2:
		m.h.unset(s, handle)
	case 3: // create or update
		e := &identity.Entry{ID: id, Selectors: bits(b | 1), Revision: m.revision}
		if b%4 == 0 {
			e.ExpiresAt = time.Now().Add(time.Hour)
		}
		m.entries[id] = e
		m.h.apply([]identity.Change{{OldEntry: old, NewEntry: e}})
	case 4:
		if old != nil {
			delete(m.entries, id)
			m.h.apply([]identity.Change{{OldEntry: old}})
		}
	case 5: // the agent has read its mail
		s.take()
		for handle, w := range maps.Clone(s.watches) { // and has asked, as it was told to
			var holds []held
			sel := selectorsOf(w)
			for _, e := range m.matching(sel) {
				holds = append(holds, held{e.ID, e.Revision})
			}
			m.set(s, handle, sel, holds)
		}
	}
}

func (m *hubModel) set(s *session, handle uint64, sel []identity.Selector, holds []held) {
	if err := m.h.set(s, handle, sel, holds); err != nil {
		m.t.Fatal(err)
	}
}

func selectorsOf(w *watch) []identity.Selector {
	var sel []identity.Selector
	for _, p := range w.postings {
		sel = append(sel, p.sel)
	}
	return sel
}

func (m *hubModel) check() {
	m.h.mu.Lock() // timers may run
	defer m.h.mu.Unlock()
	for _, s := range m.sessions {
		for handle, w := range s.watches {
			_, told := s.mail.changed[handle]
			if !told && w.retry == nil && !m.h.settled(w) {
				m.t.Fatalf("workload %v holds %v, and nobody was told", selectorsOf(w), w.held)
			}
		}
	}
}

// FuzzSyncRequest takes any message as an agent's.
func FuzzSyncRequest(f *testing.F) {
	f.Fuzz(func(t *testing.T, raw []byte) {
		var req nodev1.SyncRequest
		if proto.Unmarshal(raw, &req) != nil || req.GetWatch() == nil {
			return
		}
		m := newHubModel(t)
		s := &Server{hub: m.h}
		err := s.watch(m.sessions[0], req.GetWatch())
		for _, w := range m.sessions[0].watches {
			sel := selectorsOf(w)
			if !slices.IsSorted(sel) || len(sel) > maxWatchSelectors || len(w.held) > maxIdentities {
				t.Fatalf("taken: %v (error %v)", sel, err)
			}
		}
		m.h.remove(m.sessions[0])
		if len(m.h.postings)+len(m.h.holders) != 0 {
			t.Fatal("something is left in the index")
		}
	})
}

// FuzzEvidence takes any message as evidence: without a token, an agent can say nothing that it would have to prove.
func FuzzEvidence(f *testing.F) {
	f.Fuzz(func(t *testing.T, raw []byte) {
		var ev workloadv1.Evidence
		if proto.Unmarshal(raw, &ev) != nil {
			return
		}
		ev.Token = ""
		sel, err := (&Server{}).prove(t.Context(), call{caller: caller{kind: agent}, agent: &identity.Agent{Selectors: []identity.Selector{"agent:kind:kube"}}}, &ev)
		for _, s := range sel {
			if err != nil || s.Proven() && s != "agent:kind:kube" {
				t.Fatalf("proven: %v (error %v)", sel, err)
			}
		}
		if _, err := (&Server{}).prove(t.Context(), call{caller: caller{kind: guest}}, &ev); err == nil {
			t.Fatal("a guest has proved something without a token")
		}
	})
}
