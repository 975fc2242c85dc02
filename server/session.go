package server

import (
	"fmt"
	"slices"
	"sync"
	"time"

	"countersign.io/countersign/identity"
)

var (
	errReplaced       = fmt.Errorf("%w: the agent has too many streams: newer ones have replaced this one", identity.ErrExhausted)
	errTooManyWatches = fmt.Errorf("%w: an agent may serve at the most %d workloads, with %d MiB of selectors", identity.ErrExhausted, maxWatches, maxWeight>>20)
)

func goneError(a *identity.Agent) error {
	if a.Banned {
		return fmt.Errorf("%w: agent %s is banned", identity.ErrDenied, a.ID)
	}
	return fmt.Errorf("%w: agent %s was evicted: it must attest again", identity.ErrDenied, a.ID)
}

// session is the member's end of one Sync stream: a mailbox in which what is not yet sent is merged, so that an
// agent that does not read costs no more memory than one number per workload, and nobody waits for it.
type session struct {
	agentID, version string
	// proven are the selectors of the one pod that this is the stream of, see Follow; nil: it is an agent's.
	proven  []identity.Selector
	watches map[uint64]*watch // guarded by hub.mu
	weight  int               // of watches; guarded by hub.mu
	// federates counts the workloads that federate with a trust domain; granted is until when one counts that was issued an SVID
	// and is not among watches yet. Guarded by hub.mu.
	federates map[string]int
	granted   map[string]time.Time
	wake      chan struct{} // has an element while there is mail
	done      chan struct{} // closed by end

	mu        sync.Mutex // guards what follows; never held over I/O; taken after hub.mu
	mail      mail
	err       error // why it was ended
	ackedRev  uint64
	ackedSeq  uint64
	uses      uses
	sent      []string // the trust domains whose bundles were sent last, sorted
	doneClose sync.Once
}

// mail is what is to be sent next.
type mail struct {
	bundles, members bool
	changed, ended   map[uint64]struct{}
}

func newSession(agentID, version string) *session {
	s := &session{agentID: agentID, version: version, watches: map[uint64]*watch{}, federates: map[string]int{}, granted: map[string]time.Time{}, wake: make(chan struct{}, 1), done: make(chan struct{})}
	s.refresh(true, true) // the first message is the full state
	return s
}

func (s *session) post(f func(*mail)) {
	s.mu.Lock()
	f(&s.mail)
	s.mu.Unlock()
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// take empties the mailbox.
func (s *session) take() (m mail) {
	s.mu.Lock()
	defer s.mu.Unlock()
	m, s.mail = s.mail, mail{}
	return m
}

func (s *session) refresh(bundles, members bool) {
	s.post(func(m *mail) { m.bundles, m.members = m.bundles || bundles, m.members || members })
}

func (s *session) tell(handle uint64) {
	s.post(func(m *mail) {
		if m.changed == nil {
			m.changed = map[uint64]struct{}{}
		}
		m.changed[handle] = struct{}{}
	})
}

func (s *session) tellEnded(handle uint64) {
	s.post(func(m *mail) {
		if m.ended == nil {
			m.ended = map[uint64]struct{}{}
		}
		m.ended[handle] = struct{}{}
	})
}

// untell forgets a handle that the agent gave up, and may use for another workload next.
func (s *session) untell(handle uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.mail.changed, handle)
	delete(s.mail.ended, handle)
}

// end makes the stream end with the error; the first call counts.
func (s *session) end(err error) {
	s.doneClose.Do(func() {
		s.mu.Lock()
		s.err = err
		s.mu.Unlock()
		close(s.done)
	})
}

func (s *session) endError() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

func (s *session) ack(revision, seq uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ackedRev, s.ackedSeq = max(s.ackedRev, revision), max(s.ackedSeq, seq)
}

func (s *session) acked() (revision, seq uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ackedRev, s.ackedSeq
}

// nowSent notes whose bundles the stream has, apart from the own.
func (s *session) nowSent(tds []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sent = tds
}

func (s *session) wasSent(td string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Contains(s.sent, td)
}

// handles lists a set of handles in order.
func handles(set map[uint64]struct{}) []uint64 {
	out := keys(set)
	slices.Sort(out)
	return out
}
