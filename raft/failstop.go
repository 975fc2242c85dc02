package raft

import (
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"

	hraft "github.com/hashicorp/raft"
)

// errLogBroken is what raft gets once a write has failed.
var errLogBroken = errors.New("the log takes no more writes")

// failStop is the log as a running raft writes it: after the first write that failed it takes none, and the node stops. To go on
// would not be safe. bbolt may have the failed transaction in its file, where raft, which believes that it is not there, would
// put other entries in front of its end; and a kernel that could not write a page once says of the next fsync that all is well.
// What the file holds is looked at anew when the member starts again.
type failStop struct {
	*logStore
	fail    func(error)
	running atomic.Bool // raft has its goroutines

	mu     sync.Mutex
	broken bool
}

func (s *failStop) isBroken() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.broken
}

func (s *failStop) write(f func() error) error {
	if s.isBroken() {
		return errLogBroken
	}
	err := f()
	if err != nil {
		s.mu.Lock()
		s.broken = true
		s.mu.Unlock()
		s.fail(fmt.Errorf("writing the log: %w: this member stops, the others go on; see to its disk and start it again", err))
	}
	return err
}

// StoreLog implements hraft.LogStore.
func (s *failStop) StoreLog(l *hraft.Log) error { return s.StoreLogs([]*hraft.Log{l}) }

// StoreLogs implements hraft.LogStore.
func (s *failStop) StoreLogs(logs []*hraft.Log) error {
	return s.write(func() error { return s.logStore.StoreLogs(logs) })
}

// DeleteRange implements hraft.LogStore.
func (s *failStop) DeleteRange(from, to uint64) error {
	return s.write(func() error { return s.logStore.DeleteRange(from, to) })
}

// Set implements hraft.StableStore. Raft panics when its term or vote cannot be kept: its goroutine ends here instead, with
// whatever it has deferred, and Run tells why.
func (s *failStop) Set(key, val []byte) error {
	err := s.write(func() error { return s.logStore.Set(key, val) })
	if err != nil && s.running.Load() {
		runtime.Goexit()
	}
	return err
}

// SetUint64 implements hraft.StableStore, like Set.
func (s *failStop) SetUint64(key []byte, val uint64) error {
	err := s.write(func() error { return s.logStore.SetUint64(key, val) })
	if err != nil && s.running.Load() {
		runtime.Goexit()
	}
	return err
}
