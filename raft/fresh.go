package raft

import (
	"math"
	"sync"
	"time"

	hraft "github.com/hashicorp/raft"
)

// Never is the staleness of a member that has not caught up with any leader since it started.
const Never = time.Duration(math.MaxInt64)

// freshness knows when this member last had all that a leader had committed. A heartbeat says nothing of
// that: a member whose disk hangs, or that replays an hour of log, is in touch and an hour behind; a ban in
// that hour is one it does not know. So what counts is the time at which a leader named its commit index,
// once the state machine has got there.
type freshness struct {
	raft *hraft.Raft
	fsm  *fsm
	logs *logStore

	mu       sync.Mutex
	fresh    time.Time // zero: never
	heardAt  time.Time // the leader's word that is not yet reached; zero: none
	commit   uint64    // what it said
	leadTerm uint64    // the term in which this member leads and has applied all of its log; 0: none
}

func newFreshness(r *hraft.Raft, f *fsm, l *logStore) *freshness {
	return &freshness{raft: r, fsm: f, logs: l}
}

// heard takes the commit index that a leader of the given term named just now.
func (f *freshness) heard(term, commit uint64) {
	if commit == 0 || term < f.raft.CurrentTerm() {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	// While an older word is not reached, it stays: under steady writes the newest never is at once.
	if f.settleLocked() || f.heardAt.IsZero() {
		f.heardAt, f.commit = time.Now(), commit
	}
}

// settleLocked moves fresh forward if the leader's last word is reached, and says whether it did.
func (f *freshness) settleLocked() bool {
	if f.heardAt.IsZero() {
		return false
	}
	// Our own commit index reaches the leader's only when our log matches the leader's up to there. Of that
	// stretch, the last command must be applied; raft's own entries never come to the state machine.
	if f.raft.CommitIndex() < f.commit || f.fsm.appliedIndex() < min(f.commit, f.logs.lastCommand()) {
		return false
	}
	if f.heardAt.After(f.fresh) {
		f.fresh = f.heardAt
	}
	f.heardAt = time.Time{}
	return true
}

// leads notes that this member leads in the term and has applied everything before it.
func (f *freshness) leads(term uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.leadTerm = term
}

// ledUntil notes that leadership ended, and until when it was certain.
func (f *freshness) ledUntil(t time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.leadTerm != 0 && t.After(f.fresh) {
		f.fresh = t
	}
	f.leadTerm = 0
}

func (f *freshness) staleness() time.Duration {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.leadTerm != 0 && f.raft.State() == hraft.Leader && f.raft.CurrentTerm() == f.leadTerm {
		return 0
	}
	f.settleLocked()
	if f.fresh.IsZero() {
		return Never
	}
	return since(f.fresh, time.Now())
}

// since is the longer of what the monotonic clock and the wall clock say: the first stands still while a machine is suspended,
// and a member that slept through a ban must not think itself fresh.
func since(t, now time.Time) time.Duration {
	return max(now.Sub(t), now.Round(0).Sub(t.Round(0)), 0)
}

// Staleness is how old this member's state may be: 0 on a leader, the time since this member had everything
// a leader had committed elsewhere, Never when it has not caught up since it started. In a connected cluster
// it stays below a few tenths of a second; without a leader it grows.
func (n *Node) Staleness() time.Duration { return n.fresh.staleness() }
