package raft

import (
	"context"
	"errors"
	"fmt"
	"time"

	hraft "github.com/hashicorp/raft"
)

// TransferLeader gives the lead to the voter with this id, or to the most advanced one if id is empty, and
// returns once another leads (that one, unless an election came between). It can be called on any member.
// Handing over to the leader itself changes nothing. Errors are those of Propose; ErrRefused also when there is
// nobody to hand over to, when the next leader does not answer in time, or when the leader's program is too old.
func (n *Node) TransferLeader(ctx context.Context, id string) error {
	if len(id) > 1024 {
		return fmt.Errorf("handing over leadership: an id of %d bytes: %w", len(id), ErrRefused)
	}
	former, _ := n.Leader()
	if former != "" && former == id {
		return nil
	}
	_, err := n.ask(ctx, request{kindTransfer, []byte(id)})
	if errors.Is(err, errOld) {
		err = fmt.Errorf("%w: the leader %s runs an older program; stop that member, and it hands over by itself", ErrRefused, former)
	}
	if err != nil {
		return fmt.Errorf("handing over leadership: %w", err)
	}
	wait, cancel := context.WithTimeout(ctx, n.cfg.LeaderWait)
	defer cancel()
	for {
		seen := n.lead.whenSeen()
		if now, _ := n.Leader(); now != "" && now != former {
			return nil
		}
		select {
		case <-seen:
		case <-time.After(retryPause): // raft forgets to tell of some changes
		case <-wait.Done():
			return fmt.Errorf("handing over leadership: %w", n.noLeader(ctx, nil))
		}
	}
}

// transferNow is TransferLeader on the leader.
func (n *Node) transferNow(id string) (answer, error) {
	if n.raft.State() != hraft.Leader {
		return answer{}, fmt.Errorf("%w: %w", errNotExecuted, hraft.ErrNotLeader)
	}
	if id == n.cfg.ID {
		return answer{}, nil
	}
	voters, address, known := 0, "", false
	for _, m := range n.Members() {
		if m.Voter && m.ID != n.cfg.ID {
			voters++
			if m.ID == id {
				address, known = m.Address, true
			}
		}
	}
	switch {
	case voters == 0:
		return answer{}, fmt.Errorf("%w: no other member has a vote", ErrRefused)
	case id != "" && !known:
		return answer{}, fmt.Errorf("%w: %q is not a member with a vote", ErrRefused, id)
	}
	f := n.raft.LeadershipTransfer()
	if id != "" {
		f = n.raft.LeadershipTransferToServer(hraft.ServerID(id), hraft.ServerAddress(address))
	}
	err := n.await(f)
	switch {
	case err == nil:
		return answer{}, nil
	case errors.Is(err, hraft.ErrNotLeader), errors.Is(err, hraft.ErrEnqueueTimeout),
		errors.Is(err, hraft.ErrLeadershipTransferInProgress): // it ends within an election timeout
		return answer{}, fmt.Errorf("%w: %w", errNotExecuted, err)
	default: // the next leader cannot be reached; nothing has changed
		return answer{}, fmt.Errorf("%w: %w", ErrRefused, err)
	}
}
