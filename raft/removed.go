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

// Removed is closed when this member learns that it is no longer one: from the log, or, if it was down at the
// time, from the leader, which it asks while it does not hear from it. From then on it asks for no vote.
// Joining again takes an empty folder, or at least a restart.
func (n *Node) Removed() <-chan struct{} { return n.gone.done }

func (n *Node) removed(how string) {
	n.gone.once.Do(func() {
		n.log.Warn("this member was removed from the cluster; end it, and give it an empty data folder to join again", "learned_from", how)
		close(n.gone.done)
	})
}

// ownConfig is the index of the newest configuration this member has if it is part of it, else 0: a member that
// was not yet added is not one that was removed.
func (n *Node) ownConfig() uint64 {
	f := n.raft.GetConfiguration()
	if f.Error() != nil {
		return 0
	}
	for _, s := range f.Configuration().Servers {
		if s.ID == n.self {
			return f.Index()
		}
	}
	return 0
}

// lacks tells, on the leader only, whether a quorum has agreed on a configuration without the member, and on
// which. A leader that is one no longer might not know that the member was added again: so it makes sure.
func (n *Node) lacks(ctx context.Context, id string) (config uint64, lacks bool) {
	if !n.IsLeader() {
		return 0, false
	}
	term := n.raft.CurrentTerm()
	f := n.raft.GetConfiguration()
	if f.Error() != nil || f.Index() > n.raft.CommitIndex() {
		return 0, false
	}
	for _, s := range f.Configuration().Servers {
		if string(s.ID) == id {
			return 0, false
		}
	}
	confirmed, _ := n.confirm(ctx, term)
	return f.Index(), confirmed && n.raft.CurrentTerm() == term
}

// hear takes another member's word on whether this one is still a member.
func (n *Node) hear(w word) {
	if own := n.ownConfig(); w.Gone && own > 0 && w.Config > own {
		n.removed(w.ID)
	}
}

// checkRemoved looks into the log: the removal itself may have come by.
func (n *Node) checkRemoved(was bool) (is bool) {
	f := n.raft.GetConfiguration()
	if f.Error() != nil || f.Index() == 0 || f.Index() > n.raft.CommitIndex() {
		return was
	}
	is = slices.ContainsFunc(n.Members(), func(m Member) bool { return m.ID == n.cfg.ID })
	if was && !is {
		n.removed("the log")
	}
	return is
}
