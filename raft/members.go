package raft

import (
	"bytes"
	"context"
	"fmt"
	"slices"

	hraft "github.com/hashicorp/raft"
)

// Member is one member of the cluster.
type Member struct {
	ID, Address string
	// Voter is false until a new member has caught up.
	Voter  bool
	Leader bool
}

// Members is the cluster's membership as far as this member knows, in the order of joining. A change appears
// here a moment before a quorum has agreed to it.
func (n *Node) Members() []Member {
	f := n.raft.GetConfiguration()
	if f.Error() != nil {
		return nil
	}
	_, leader := n.raft.LeaderWithID()
	servers := f.Configuration().Servers
	out := make([]Member, 0, len(servers))
	for _, s := range servers {
		out = append(out, Member{
			ID: string(s.ID), Address: string(s.Address),
			Voter: s.Suffrage == hraft.Voter, Leader: s.ID == leader,
		})
	}
	return out
}

// AddMember adds a member, or changes the address of one. A new member has no vote at first: the leader
// gives it one when it answers and has caught up, so adding a member that is not up yet, or never comes up,
// costs the cluster nothing. It can be called on any member; errors are those of Propose and ErrRefused.
func (n *Node) AddMember(ctx context.Context, id, address string) error {
	if id == "" || address == "" || bytes.IndexByte([]byte(id), 0) >= 0 || len(id)+len(address) > 1024 {
		return fmt.Errorf("adding member %q at %q: id and address are needed, at most 1 KiB together: %w", id, address, ErrRefused)
	}
	if _, err := n.ask(ctx, request{kindAdd, []byte(id + "\x00" + address)}); err != nil {
		return fmt.Errorf("adding member %s: %w", id, err)
	}
	return nil
}

// RemoveMember removes a member, be it up or not. Removing one that is not there is no error; removing the
// last voter is refused. It can be called on any member; errors are those of Propose and ErrRefused.
//
// The removed member is not stopped: it hears no more of the cluster, and its staleness grows.
func (n *Node) RemoveMember(ctx context.Context, id string) error {
	if id == "" || len(id) > 1024 {
		return fmt.Errorf("removing member %q: an id of at most 1 KiB is needed: %w", id, ErrRefused)
	}
	if _, err := n.ask(ctx, request{kindRemove, []byte(id)}); err != nil {
		return fmt.Errorf("removing member %s: %w", id, err)
	}
	return nil
}

// addNow is AddMember on the leader.
func (n *Node) addNow(payload []byte) (answer, error) {
	id, address, ok := bytes.Cut(payload, []byte{0})
	if !ok || len(id) == 0 || len(address) == 0 {
		return answer{}, fmt.Errorf("%w: malformed request", ErrRefused)
	}
	n.changing.Lock()
	defer n.changing.Unlock()
	for _, m := range n.Members() {
		if m.ID == string(id) && m.Address == string(address) {
			return answer{}, nil // asked again after an unknown outcome
		}
	}
	// For a voter this changes the address and leaves the vote.
	f := n.raft.AddNonvoter(hraft.ServerID(id), hraft.ServerAddress(address), 0, n.cfg.LeaderWait)
	return answer{}, classifyChange(f.Error())
}

// giveVote makes a member a voter if it is still one of the cluster: without the second look, a member that
// was removed while it was asked how far it is would come back.
func (n *Node) giveVote(m Member) error {
	n.changing.Lock()
	defer n.changing.Unlock()
	if !slices.Contains(n.Members(), m) {
		return nil
	}
	f := n.raft.AddVoter(hraft.ServerID(m.ID), hraft.ServerAddress(m.Address), 0, n.cfg.RPCTimeout)
	if err := n.await(f); err != nil {
		return fmt.Errorf("giving member %s its vote: %w", m.ID, err)
	}
	n.log.Info("member has caught up and votes now", "member", m.ID, "address", m.Address)
	return nil
}

// removeNow is RemoveMember on the leader.
func (n *Node) removeNow(payload []byte) (answer, error) {
	n.changing.Lock()
	defer n.changing.Unlock()
	return answer{}, classifyChange(n.raft.RemoveServer(hraft.ServerID(payload), 0, n.cfg.LeaderWait).Error())
}
