package raft

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	hraft "github.com/hashicorp/raft"
)

// errNotExecuted: nothing was done, and another attempt, perhaps at another leader, is safe.
var errNotExecuted = errors.New("not executed")

// retryPause is the wait between attempts when there seems to be a leader, but it did not take the request.
const retryPause = 20 * time.Millisecond

// request is what only a leader can do.
type request struct {
	kind    frameKind
	payload []byte
}

// gauge counts what Close waits for.
type gauge struct {
	mu   sync.Mutex
	n    int
	idle chan struct{} // closed while n is 0
}

func (g *gauge) init() {
	g.idle = make(chan struct{})
	close(g.idle)
}

func (g *gauge) add() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.n == 0 {
		g.idle = make(chan struct{})
	}
	g.n++
}

func (g *gauge) done() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.n--; g.n == 0 {
		close(g.idle)
	}
}

// drain waits until nothing is left, or for as long as limit.
func (g *gauge) drain(limit time.Duration) {
	g.mu.Lock()
	idle := g.idle
	g.mu.Unlock()
	select {
	case <-idle:
	case <-time.After(limit):
	}
}

// Propose puts a command into the log and returns what the state machine answered. It can be called on any
// member: another than the leader forwards. When it returns nil, the command is applied on this member too,
// so a read here sees the write.
//
// The command is carried out at most once. Errors wrap ErrNoLeader (nothing was done; it waited for a leader
// until ctx ended or for Config.LeaderWait), ErrUnknownOutcome (sent, answer lost), ErrRefused (Config.Check on
// the leader did not let it pass), ErrTooLarge or ErrClosed.
// ErrNoLeader and ErrUnknownOutcome also wrap ctx's error where that was the reason.
func (n *Node) Propose(ctx context.Context, cmd []byte) ([]byte, error) {
	if len(cmd) > MaxCommand {
		return nil, fmt.Errorf("proposing a command of %d bytes, the limit is %d: %w", len(cmd), MaxCommand, ErrTooLarge)
	}
	a, err := n.ask(ctx, request{kind: kindPropose, payload: cmd})
	if err != nil {
		return nil, fmt.Errorf("proposing: %w", err)
	}
	if !n.fsm.wait(ctx, n.ctx.Done(), a.index) {
		return nil, fmt.Errorf("proposing: entry %d is committed but not yet applied here: %w", a.index, n.unknown(ctx))
	}
	return a.result, nil
}

// Barrier returns once this member has applied every write that was acknowledged anywhere before the call.
// Errors are those of Propose; it changes nothing.
func (n *Node) Barrier(ctx context.Context) error {
	a, err := n.ask(ctx, request{kind: kindBarrier})
	if err != nil {
		return fmt.Errorf("catching up with the leader: %w", err)
	}
	return n.WaitApplied(ctx, a.index)
}

// WaitApplied returns once the entry at index is applied on this member; index is that of an Entry.
func (n *Node) WaitApplied(ctx context.Context, index uint64) error {
	if n.fsm.wait(ctx, n.ctx.Done(), index) {
		return nil
	}
	if n.ctx.Err() != nil {
		return fmt.Errorf("waiting for entry %d: %w", index, ErrClosed)
	}
	return fmt.Errorf("waiting for entry %d: %w", index, ctx.Err())
}

// AppliedIndex is the index of the last entry that the state machine has applied.
func (n *Node) AppliedIndex() uint64 { return n.fsm.appliedIndex() }

// unknown is ErrUnknownOutcome with the reason why nobody waited for the answer.
func (n *Node) unknown(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("%w: %w", ErrUnknownOutcome, err)
	}
	return fmt.Errorf("%w: %w", ErrUnknownOutcome, ErrClosed)
}

// ask has the leader carry out a request, wherever that is, and tries again where that is safe.
func (n *Node) ask(ctx context.Context, req request) (answer, error) {
	wait, cancel := context.WithTimeout(ctx, n.cfg.LeaderWait)
	defer cancel()
	var last error
	for {
		if n.closing.Load() {
			return answer{}, ErrClosed
		}
		seen := n.lead.whenSeen() // before looking, so that no change is missed
		address, id := n.raft.LeaderWithID()
		var a answer
		var err error
		switch id {
		case "":
			err = errNotExecuted
		case n.self:
			a, err = n.carryOut(ctx, req)
		default:
			a, err = n.out.ask(ctx, wait, peerAddress{string(id), string(address)}, req)
		}
		if !errors.Is(err, errNotExecuted) {
			return a, err
		}
		if id != "" {
			last = err
		}
		var pause <-chan time.Time // also without a leader: raft forgets to tell of some changes
		if id == "" {
			pause = time.After(5 * retryPause)
		} else {
			pause = time.After(retryPause)
		}
		select {
		case <-seen:
		case <-pause:
		case <-wait.Done():
			return answer{}, n.noLeader(ctx, last)
		}
	}
}

func (n *Node) noLeader(ctx context.Context, last error) error {
	err := fmt.Errorf("no member led within the wait; a quorum of members must be up and connected: %w", ErrNoLeader)
	if last != nil {
		err = fmt.Errorf("%w (last attempt: %v)", err, last)
	}
	if ctx.Err() != nil {
		err = fmt.Errorf("%w: %w", err, ctx.Err())
	}
	return err
}

// carryOut gives a request to this member's raft. When ctx ends first the request goes on by itself.
func (n *Node) carryOut(ctx context.Context, req request) (answer, error) {
	if ctx.Err() != nil {
		return answer{}, fmt.Errorf("%w: %w", errNotExecuted, ctx.Err())
	}
	type outcome struct {
		a   answer
		err error
	}
	done := make(chan outcome, 1)
	n.inflight.add()
	go func() { // ends with raft's answer, at the latest when raft shuts down
		defer n.inflight.done()
		a, err := n.execute(req)
		done <- outcome{a, err}
	}()
	select {
	case o := <-done:
		return o.a, o.err
	case <-ctx.Done():
	case <-n.ctx.Done():
	}
	return answer{}, n.unknown(ctx)
}

func (n *Node) execute(req request) (answer, error) {
	switch req.kind {
	case kindPropose:
		if check := n.cfg.Check; check != nil {
			if err := check(req.payload); err != nil {
				return answer{}, fmt.Errorf("%w: %w", ErrRefused, err)
			}
		}
		f := n.raft.Apply(req.payload, n.cfg.LeaderWait)
		if err := f.Error(); err != nil {
			return answer{}, classify(err)
		}
		result, ok := f.Response().([]byte)
		if err, stopped := f.Response().(error); !ok && stopped {
			return answer{}, fmt.Errorf("%w: the command is in the log, but %w", ErrUnknownOutcome, err)
		}
		return answer{index: f.Index(), result: result}, nil
	case kindBarrier:
		if err := n.raft.Barrier(n.cfg.LeaderWait).Error(); err != nil {
			return answer{}, classify(err)
		}
		return answer{index: n.fsm.appliedIndex()}, nil
	case kindReadIndex:
		return n.readIndex()
	case kindTransfer:
		return n.transferNow(string(req.payload))
	case kindAdd:
		return n.addNow(req.payload)
	case kindRemove:
		return n.removeNow(req.payload)
	default:
		return answer{}, fmt.Errorf("%w: no such request: %d", ErrRefused, req.kind)
	}
}

// classify says what an error of raft's means for the request.
func classify(err error) error {
	switch {
	case errors.Is(err, hraft.ErrNotLeader),
		errors.Is(err, hraft.ErrLeadershipTransferInProgress),
		errors.Is(err, hraft.ErrEnqueueTimeout):
		return fmt.Errorf("%w: %w", errNotExecuted, err)
	default: // leadership lost on the way, disk full, shut down: the entry may be in some member's log
		return fmt.Errorf("%w: %w", ErrUnknownOutcome, err)
	}
}

// classifyChange is classify for changes of the membership, which raft may also refuse.
func classifyChange(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, hraft.ErrNotLeader), errors.Is(err, hraft.ErrLeadershipTransferInProgress),
		errors.Is(err, hraft.ErrEnqueueTimeout), errors.Is(err, hraft.ErrLeadershipLost), errors.Is(err, hraft.ErrRaftShutdown):
		return classify(err)
	default:
		return fmt.Errorf("%w: %w", ErrRefused, err)
	}
}
