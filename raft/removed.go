package raft

import (
	"context"
	"errors"
	"slices"
	"sync"
)

var errRemoved = errors.New("this member was removed from the cluster")

// removal is whether this member was removed.
type removal struct {
	once sync.Once
	done chan struct{}
}

func (r *removal) init() { r.done = make(chan struct{}) }

func (r *removal) is() bool {
	select {
	case <-r.done:
		return true
	default:
		return false
	}
}

// Removed is closed when this member learns that it is no longer one: from the leader, which it asks when it hears
// no more of it. From then on it asks for no vote. Joining again takes an empty folder, or at least a restart.
func (n *Node) Removed() <-chan struct{} { return n.gone.done }

func (n *Node) removed(by string) {
	n.gone.once.Do(func() {
		n.log.Warn("this member was removed from the cluster; end it, and give it an empty data folder to join again", "learned_from", by)
		close(n.gone.done)
	})
}

// lacks tells, on the leader only, whether a quorum has agreed that this is none of the members.
func (n *Node) lacks(ctx context.Context, id string) bool {
	if !n.IsLeader() || !n.changing.TryLock() {
		return false
	}
	// No change is under way, and what earlier leaders left is committed: so this is what was agreed on.
	term, members := n.raft.CurrentTerm(), n.Members()
	n.changing.Unlock()
	if len(members) == 0 || slices.ContainsFunc(members, func(m Member) bool { return m.ID == id }) {
		return false
	}
	// It might have been added again by a later leader that this one does not know of.
	confirmed, _ := n.confirm(ctx, term)
	return confirmed && n.raft.CurrentTerm() == term
}

// hear takes another member's word on whether this one is still a member. It counts for a member that was one (one
// that has a configuration: a leader sent it) and only from one of its own cluster: a hint may lead to another. A
// member that is the only one with a vote is told by nobody.
func (n *Node) hear(peer string, w word) {
	if !w.Gone {
		return
	}
	known, sole := false, true
	for _, m := range n.Members() {
		known = known || m.ID == peer
		sole = sole && (m.ID == n.cfg.ID) == m.Voter
	}
	if known && !sole {
		n.removed(peer)
	}
}
