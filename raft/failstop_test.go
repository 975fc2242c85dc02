package raft

import (
	"context"
	"errors"
	"path/filepath"
	"testing"
	"time"

	hraft "github.com/hashicorp/raft"
)

// TestFailStop: after a write that failed there is no other, and what raft would panic on ends its goroutine alone.
func TestFailStop(t *testing.T) {
	logs, err := openLogStore(filepath.Join(t.TempDir(), "log.db"), "m1")
	if err != nil {
		t.Fatal(err)
	}
	var failures []error
	s := &failStop{logStore: logs, fail: func(err error) { failures = append(failures, err) }}
	if err := errors.Join(s.SetUint64([]byte("CurrentTerm"), 3), s.StoreLog(&hraft.Log{Index: 1, Term: 3})); err != nil {
		t.Fatal(err)
	}
	if err := logs.Close(); err != nil {
		t.Fatal(err)
	}
	if err := s.StoreLog(&hraft.Log{Index: 2, Term: 3}); err == nil || errors.Is(err, errLogBroken) {
		t.Errorf("the first failure: %v", err)
	}
	for name, err := range map[string]error{
		"StoreLogs":   s.StoreLogs([]*hraft.Log{{Index: 3, Term: 3}}),
		"DeleteRange": s.DeleteRange(1, 1),
		"Set":         s.Set([]byte("k"), []byte("v")),
		"SetUint64":   s.SetUint64([]byte("k"), 1),
	} {
		if !errors.Is(err, errLogBroken) {
			t.Errorf("%s after a failure: %v", name, err)
		}
	}
	if len(failures) != 1 || !contains(failures[0], "see to its disk") {
		t.Errorf("failures: %v", failures)
	}
	s.running.Store(true)
	for _, set := range []func() error{
		func() error { return s.Set([]byte("k"), []byte("v")) },
		func() error { return s.SetUint64([]byte("k"), 1) },
	} {
		returned := make(chan bool, 1)
		go func() {
			ended := false
			defer func() { returned <- ended }()
			_ = set()
			ended = true
		}()
		if <-returned {
			t.Error("raft would panic now")
		}
	}
}

// TestFailStopMember: a member whose log cannot be written stops and says why, as leader and as follower; the others go on.
func TestFailStopMember(t *testing.T) {
	t.Parallel()
	for _, leads := range []bool{true, false} {
		c := newCluster(t, 3, nil)
		m := c.leader()
		if !leads {
			m = c.follower()
		}
		others := c.others(m)
		c.propose(m, "before")
		if err := m.logs.db.Close(); err != nil {
			t.Fatal(err)
		}
		failed := make(chan error, 1)
		go func() { failed <- m.Run(context.Background()) }()
		eventually(t, "the others go on", func() bool {
			ctx, cancel := context.WithTimeout(within(t), time.Second)
			defer cancel()
			_, err := others[0].Propose(ctx, []byte("after"))
			return err == nil
		})
		select {
		case err := <-failed:
			if !contains(err, "see to its disk") {
				t.Errorf("leader %v: %v", leads, err)
			}
		case <-within(t).Done():
			t.Fatalf("leader %v: it does not stop", leads)
		}
		closed := make(chan struct{})
		go func() { defer close(closed); m.Close() }()
		select {
		case <-closed:
		case <-within(t).Done():
			t.Fatalf("leader %v: it does not close", leads)
		}
	}
}
