package raft

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	hraft "github.com/hashicorp/raft"
)

// Entry is one committed command.
type Entry struct {
	// Index is the command's place in the log: growing, with gaps (the log also holds raft's own entries).
	Index uint64
	// Term is the election term in which it was proposed.
	Term uint64
	// Data is what was proposed. It is shared: it MUST NOT be changed, and not be kept without a copy.
	Data []byte
}

// StateMachine is what the log drives. All methods but the returned Snapshot's are called one at a time.
type StateMachine interface {
	// ApplyBatch applies committed entries in order and answers each.
	//
	// It MUST be deterministic: the same entries give the same state and the same answers on every member;
	// so no clock, no randomness, no map order. It MUST make the index of the last entry part of the state
	// in the same write. A command that is refused is an answer, not a failure.
	//
	// A machine that cannot go on (a command of a version it does not know, a full disk) MUST return fewer
	// answers than entries: those of the entries before the one it stopped at. The node then gives it no
	// further entry, takes no further snapshot, and its Run returns an error.
	ApplyBatch([]Entry) [][]byte

	// Snapshot captures the state at this moment. It MUST return without waiting for disk or network:
	// ApplyBatch waits for it, and is called again while the snapshot is still being written out.
	Snapshot() (Snapshot, error)

	// Restore replaces the whole state with what a Snapshot wrote. It MUST change nothing when the bytes are
	// truncated or damaged, and MUST leave AppliedIndex as it was when that snapshot was captured.
	Restore(io.Reader) error

	// AppliedIndex is the index of the last entry in the state, 0 when the state is empty. At start it MUST
	// be that of a state known to be whole: a machine that was not closed cleanly answers 0 and is rebuilt
	// from snapshot and log.
	AppliedIndex() (uint64, error)
}

// Snapshot is a state captured by a StateMachine.
type Snapshot interface {
	// WriteTo streams the state. The same state MUST give the same bytes on every member.
	WriteTo(w io.Writer) (int64, error)
	// Release frees what the snapshot holds. It is called once, whether WriteTo was called or not.
	Release()
}

// errStopped is what entries get once the state machine cannot go on.
var errStopped = errors.New("the state machine stopped applying")

// fsm lets hashicorp/raft drive a StateMachine, and knows how far it got.
type fsm struct {
	machine StateMachine
	fail    func(error)

	// onApplied, if set, is told the last entry of each applied batch. Set before raft starts.
	onApplied func(index, term uint64)
	// onConfigured, if set, is told each committed configuration. Set before raft starts.
	onConfigured func(term uint64, data []byte)

	mu         sync.Mutex
	applied    uint64        // last entry in the state machine
	advanced   chan struct{} // closed and replaced when applied grows
	stopped    bool          // the machine refused an entry
	restoreErr error         // of the last Restore
}

var _ hraft.BatchingFSM = (*fsm)(nil)

func newFSM(m StateMachine, fail func(error)) *fsm {
	return &fsm{machine: m, fail: fail, advanced: make(chan struct{})}
}

// ApplyBatch implements hraft.BatchingFSM. An answer is the machine's []byte, or errStopped.
func (f *fsm) ApplyBatch(logs []*hraft.Log) []any {
	answers := make([]any, len(logs))
	entries := make([]Entry, 0, len(logs))
	at := make([]int, 0, len(logs)) // entries[i] is logs[at[i]]
	applied, stopped := f.state()
	for i, l := range logs {
		if l.Type == hraft.LogConfiguration && f.onConfigured != nil {
			f.onConfigured(l.Term, l.Data)
		}
		// A machine whose state outlived a restart gets the log again from the snapshot on: what it has, it keeps.
		if l.Type != hraft.LogCommand || l.Index <= applied {
			continue
		}
		entries = append(entries, Entry{Index: l.Index, Term: l.Term, Data: l.Data})
		at = append(at, i)
	}
	if len(entries) == 0 {
		return answers
	}
	var results [][]byte
	if !stopped {
		results = f.machine.ApplyBatch(entries)
	}
	done := min(len(results), len(entries))
	for i, where := range at {
		if i < done {
			answers[where] = results[i]
		} else {
			answers[where] = errStopped
		}
	}
	if done > 0 {
		f.advance(entries[done-1].Index)
		if f.onApplied != nil {
			f.onApplied(entries[done-1].Index, entries[done-1].Term)
		}
	}
	if done < len(entries) && !stopped {
		f.mu.Lock()
		f.stopped = true
		f.mu.Unlock()
		f.fail(fmt.Errorf("applying entry %d: %w; update this member or see the state machine's own error", entries[done].Index, errStopped))
	}
	return answers
}

// Apply implements hraft.FSM; raft calls ApplyBatch instead.
func (f *fsm) Apply(l *hraft.Log) any { return f.ApplyBatch([]*hraft.Log{l})[0] }

func (f *fsm) state() (applied uint64, stopped bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.applied, f.stopped
}

func (f *fsm) appliedIndex() uint64 {
	applied, _ := f.state()
	return applied
}

func (f *fsm) advance(index uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.applied = index
	close(f.advanced)
	f.advanced = make(chan struct{})
}

// wait tells whether the entry at index was applied before ctx ended or the node closed.
func (f *fsm) wait(ctx context.Context, closed <-chan struct{}, index uint64) bool {
	for {
		f.mu.Lock()
		ok, advanced := f.applied >= index, f.advanced
		f.mu.Unlock()
		if ok {
			return true
		}
		select {
		case <-advanced:
		case <-ctx.Done():
			return false
		case <-closed:
			return false
		}
	}
}

// Snapshot implements hraft.FSM.
func (f *fsm) Snapshot() (hraft.FSMSnapshot, error) {
	applied, stopped := f.state()
	if stopped {
		return nil, errStopped
	}
	// A snapshot lets the log forget. A machine that kept less than it answered for would then have lost it.
	has, err := f.machine.AppliedIndex()
	if err != nil {
		return nil, fmt.Errorf("reading the state machine's index: %w", err)
	}
	if has < applied {
		return nil, fmt.Errorf("the state machine is at entry %d but has answered entry %d; keeping the log", has, applied)
	}
	s, err := f.machine.Snapshot()
	if err != nil {
		return nil, err
	}
	return snapshot{s}, nil
}

// Restore implements hraft.FSM.
func (f *fsm) Restore(r io.ReadCloser) error {
	defer r.Close()
	index, err := uint64(0), f.machine.Restore(r)
	if err == nil {
		index, err = f.machine.AppliedIndex()
	}
	f.mu.Lock()
	f.restoreErr = err
	f.mu.Unlock()
	if err != nil {
		return fmt.Errorf("restoring the state machine: %w", err)
	}
	f.advance(index)
	return nil
}

func (f *fsm) restoreFailure() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.restoreErr
}

// snapshot lets raft store a Snapshot.
type snapshot struct{ s Snapshot }

func (s snapshot) Persist(sink hraft.SnapshotSink) error {
	if _, err := s.s.WriteTo(sink); err != nil {
		sink.Cancel()
		return fmt.Errorf("writing snapshot: %w", err)
	}
	return sink.Close()
}

func (s snapshot) Release() { s.s.Release() }
