package raft

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	hraft "github.com/hashicorp/raft"
)

// healthWait bounds how long Health waits for one member.
const healthWait = 2 * time.Second

// MemberHealth is how a member does, as seen from the member that was asked.
type MemberHealth struct {
	Member
	// Reachable tells whether it answered just now; if not, Problem says why.
	Reachable bool
	Problem   string
	// LastContact is how long ago it heard of the leader: 0 on the leader, Never if not since it started, or if
	// its program is too old to say.
	LastContact time.Duration
	// Applied is the last entry in its state machine; Last and Commit are the ends of its log and of what it
	// knows to be committed, which also count raft's own entries. A program too old to say has Commit 0.
	Applied, Last, Commit uint64
	// Info is its Config.Info; nil also if its program is too old to say.
	Info []byte
}

// Health asks every member, all at once, and waits at most 2 s for each. It can be called on any member and
// needs no leader: who does not answer is in the list all the same, in the order of Members. It fails only when
// ctx ends or the node is closed.
func (n *Node) Health(ctx context.Context) ([]MemberHealth, error) {
	if n.closing.Load() {
		return nil, fmt.Errorf("asking the members: %w", ErrClosed)
	}
	members := n.Members()
	out := make([]MemberHealth, len(members))
	var wg sync.WaitGroup
	for i, m := range members {
		wg.Go(func() { out[i] = n.healthOf(ctx, m) })
	}
	wg.Wait()
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("asking the members: %w", err)
	}
	return out, nil
}

func (n *Node) healthOf(ctx context.Context, m Member) MemberHealth {
	h := MemberHealth{Member: m, LastContact: Never}
	w := word{}
	if m.ID == n.cfg.ID {
		w = n.word()
	} else {
		ctx, cancel := context.WithTimeout(ctx, healthWait)
		defer cancel()
		var err error
		if w, err = n.askWord(ctx, m); err != nil {
			h.Problem = err.Error()
			if errors.Is(err, context.DeadlineExceeded) {
				h.Problem = fmt.Sprintf("no answer within %v: %v", healthWait, err)
			}
			return h
		}
		if at := n.book.where(m.ID, m.Address); at != m.Address {
			h.Address = at
		}
	}
	h.Reachable, h.LastContact, h.Info = true, w.Contact, w.Info
	h.Applied, h.Last, h.Commit = w.Applied, w.Last, w.Commit
	return h
}

// FailureTolerance is how many more voters may fail, of those in the list that answer, before there is no
// quorum; negative when there is none already.
func FailureTolerance(members []MemberHealth) int {
	voters, up := 0, 0
	for _, m := range members {
		if m.Voter {
			voters++
			if m.Reachable {
				up++
			}
		}
	}
	return up - (voters/2 + 1)
}

// ReadBarrier returns once this member has applied every write that was acknowledged anywhere before the call,
// as Barrier does, without an entry in the log: the leader makes sure that a quorum knows none but it. So a read
// of this member's state after it is linearizable. Errors are those of Propose but ErrUnknownOutcome.
func (n *Node) ReadBarrier(ctx context.Context) error {
	a, err := n.ask(ctx, request{kind: kindReadIndex})
	if errors.Is(err, errOld) {
		a, err = n.ask(ctx, request{kind: kindBarrier})
	}
	if err != nil {
		// Nothing was to be done, so nothing is in doubt.
		if errors.Is(err, ErrUnknownOutcome) {
			err = fmt.Errorf("%w: %v", ErrNoLeader, err)
			if ctx.Err() != nil {
				err = fmt.Errorf("%w: %w", err, ctx.Err())
			}
		}
		return fmt.Errorf("making sure that a read is up to date: %w", err)
	}
	return n.WaitApplied(ctx, a.index)
}

// readIndex is ReadBarrier on the leader: an index that, once applied, has all that was acknowledged before now.
//
// hraft's VerifyLeader does not do: it counts non-voters, and answers to what was asked before it was called, so
// that a leader that was stopped for a minute believes what lies in its buffers. Here each voter is asked anew.
func (n *Node) readIndex() (answer, error) {
	if !n.IsLeader() { // then an entry of this term is committed, and the commit index knows all earlier ones
		return answer{}, fmt.Errorf("%w: %w", errNotExecuted, hraft.ErrNotLeader)
	}
	term := n.raft.CurrentTerm()
	commit := n.raft.CommitIndex()
	confirmed, old := n.confirm(n.ctx, term)
	if !confirmed && old {
		return n.execute(request{kind: kindBarrier})
	}
	if !confirmed {
		return answer{}, fmt.Errorf("%w: a quorum did not confirm that this member leads", errNotExecuted)
	}
	if n.raft.State() != hraft.Leader || n.raft.CurrentTerm() != term {
		return answer{}, fmt.Errorf("%w: %w", errNotExecuted, hraft.ErrNotLeader)
	}
	// Only commands come to the state machine, so that is what a member can wait for.
	index, err := n.logs.commandUpTo(commit)
	if err != nil {
		return answer{}, fmt.Errorf("%w: %w", errNotExecuted, err)
	}
	if index == 0 { // all commands up to there are in a snapshot, and so in the state
		index = n.fsm.appliedIndex()
	}
	return answer{index: index}, nil
}

// confirm asks the voters for their term and tells whether a quorum knows none above the given one; old tells
// that there are voters whose program cannot say. A voter of a later leader has its term: if a quorum answers
// after now, no later leader was elected before now.
func (n *Node) confirm(ctx context.Context, term uint64) (confirmed, old bool) {
	ctx, cancel := context.WithTimeout(ctx, min(n.cfg.RPCTimeout, healthWait))
	defer cancel()
	type reply struct{ yes, old bool }
	voters := 0
	replies := make(chan reply, maxBook)
	yes, asked := 0, 0
	for _, m := range n.Members() {
		switch {
		case !m.Voter:
		case m.ID == n.cfg.ID:
			voters, yes = voters+1, yes+1
		default:
			voters, asked = voters+1, asked+1
			n.spawn(func() {
				a, err := n.askMember(ctx, m, request{kind: kindTerm})
				select {
				case replies <- reply{err == nil && a.index <= term, errors.Is(err, errOld)}:
				case <-ctx.Done():
				}
			})
		}
	}
	for yes < voters/2+1 && asked > 0 {
		select {
		case r := <-replies:
			asked--
			if r.yes {
				yes++
			}
			old = old || r.old
		case <-ctx.Done():
			return false, old
		}
	}
	return yes >= voters/2+1, old
}
