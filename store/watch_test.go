package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"

	"countersign.io/countersign/identity"
	"countersign.io/countersign/raft"
)

// startWatch runs a watch whose batches are handed over one by one.
func startWatch(t *testing.T, s *Store) (next func() []identity.Change, end func() error) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	batches, done := make(chan []identity.Change), make(chan error, 1)
	go func() {
		done <- s.Watch(ctx, func(c []identity.Change) {
			select {
			case batches <- c:
			case <-ctx.Done():
			}
		})
	}()
	end = sync.OnceValue(func() error { cancel(); return <-done })
	t.Cleanup(func() { end() })
	return func() []identity.Change { return <-batches }, end
}

func TestWatchTellsWhatChanged(t *testing.T) {
	s, w, _ := newStore(t)
	ctx := t.Context()
	next, end := startWatch(t, s)
	if first := next(); len(first) != 1 || !first[0].Reset {
		t.Fatalf("the first batch is %+v", first)
	}
	check := func(what string, ok func(identity.Change) bool) {
		t.Helper()
		got := next()
		if len(got) != 1 || got[0].Revision != s.Revision() || got[0].Reset || !ok(got[0]) {
			t.Errorf("%s: %+v", what, got)
		}
	}
	e := must[identity.Entry](t)(w.CreateEntry(ctx, now, entryFor("e", "/e", "k8s:ns:x")))
	check("created", func(c identity.Change) bool { return c.OldEntry == nil && c.NewEntry.Revision == e.Revision })
	e.Hint = "h"
	must[identity.Entry](t)(w.UpdateEntry(ctx, now, e, 0))
	check("updated", func(c identity.Change) bool { return c.OldEntry.Hint == "" && c.NewEntry.Hint == "h" })
	must[identity.Entry](t)(w.UpdateEntry(ctx, now, e, 0)) // nothing changes: nothing is told
	if err := w.DeleteEntry(ctx, "e"); err != nil {
		t.Fatal(err)
	}
	check("deleted", func(c identity.Change) bool { return c.OldEntry.Hint == "h" && c.NewEntry == nil })
	must[identity.Agent](t)(w.PutAgent(ctx, agent("a")))
	check("agent", func(c identity.Change) bool { return c.Agent.ID == agent("a").ID && !c.AgentGone })
	w.EvictAgent(ctx, agent("a").ID)
	check("evicted", func(c identity.Change) bool { return c.Agent.ID == agent("a").ID && c.AgentGone && !c.Agent.Banned })
	must[identity.Agent](t)(w.PutAgent(ctx, agent("a")))
	next()
	w.BanAgent(ctx, agent("a").ID)
	check("banned", func(c identity.Change) bool { return c.AgentGone && c.Agent.Banned })
	must[identity.KubeCluster](t)(w.PutKubeCluster(ctx, cluster("k"), false))
	check("kube cluster", func(c identity.Change) bool { return c.KubeCluster == "k" })
	w.DeleteKubeCluster(ctx, "k")
	check("kube cluster gone", func(c identity.Change) bool { return c.KubeCluster == "k" })
	must[identity.Authority](t)(w.CreateAuthority(ctx, authority(identity.AuthorityJWT, "j")))
	check("authority", func(c identity.Change) bool { return c.Bundle && !c.Members })
	w.PutMember(ctx, identity.Member{ID: "m", Address: "h:1"})
	check("member", func(c identity.Change) bool { return c.Members && !c.Bundle })
	w.PutMember(ctx, identity.Member{ID: "m", Address: "h:1"}) // nothing changes
	w.RemoveMember(ctx, "m")
	check("member gone", func(c identity.Change) bool { return c.Members })
	if err := s.Restore(bytes.NewReader(snapshotOf(t, s))); err != nil {
		t.Fatal(err)
	}
	if got := next(); len(got) != 1 || !got[0].Reset {
		t.Errorf("restored: %+v", got)
	}
	if err := end(); !errors.Is(err, context.Canceled) {
		t.Errorf("the watch ended with %v", err)
	}
	if len(s.watchers) != 0 {
		t.Error("the watcher is still registered")
	}
}

// entryLog makes create commands from index on.
func entryLog(t testing.TB, index uint64, n int) []raft.Entry {
	t.Helper()
	out := make([]raft.Entry, n)
	for i := range out {
		at := index + uint64(i)
		cmd, err := encodeCommand(createEntry, now, entryFor(fmt.Sprint("e", at), fmt.Sprint("/", at), "k8s:ns:prod", fmt.Sprint("k8s:sa:", at)))
		if err != nil {
			t.Fatal(err)
		}
		out[i] = raft.Entry{Index: at, Data: cmd}
	}
	return out
}

// What a watcher was busy for comes as one batch, in order, and a watcher that is too far behind gets one Reset.
func TestWatchSlowConsumer(t *testing.T) {
	s := openAt(t, stateDir(t))
	slow, _ := startWatch(t, s)
	slow() // registered; from now on it does not take anything
	s.ApplyBatch(entryLog(t, 1, 1))
	s.ApplyBatch(entryLog(t, 2, 10))
	var got []identity.Change
	for len(got) < 11 {
		got = append(got, slow()...)
	}
	for i, c := range got {
		if c.Revision != uint64(i+1) || c.NewEntry == nil {
			t.Fatalf("change %d is %+v", i, c)
		}
	}

	index := uint64(12)
	for index < 3*maxPending {
		s.ApplyBatch(entryLog(t, index, 500))
		index += 500
		s.mu.RLock()
		for w := range s.watchers {
			if len(w.pending) > maxPending {
				t.Fatalf("%d changes wait", len(w.pending))
			}
		}
		s.mu.RUnlock()
	}
	last, resets := uint64(11), 0
	for last < s.Revision() {
		for _, c := range slow() {
			if c.Revision <= last {
				t.Fatalf("revision %d after %d", c.Revision, last)
			}
			if c.Revision != last+1 && !c.Reset {
				t.Fatalf("changes between %d and %d are missing, without a Reset", last, c.Revision)
			}
			if c.Reset {
				resets++
			}
			last = c.Revision
		}
	}
	if resets == 0 {
		t.Error("it was told everything, without bound")
	}
}

// Whoever reads when told, reads no older state.
func TestWatchersConverge(t *testing.T) {
	s := openAt(t, stateDir(t))
	const total = 2000
	var wg sync.WaitGroup
	for range 4 {
		ctx, cancel := context.WithCancel(t.Context())
		wg.Go(func() {
			seen := map[string]bool{}
			err := s.Watch(ctx, func(changes []identity.Change) {
				for _, c := range changes {
					if c.Reset {
						clear(seen)
						page, _ := s.Entries("", total)
						for _, e := range page {
							seen[e.ID] = true
						}
						continue
					}
					if _, ok := s.Entry(c.NewEntry.ID); !ok {
						t.Errorf("told of %s before it can be read", c.NewEntry.ID)
					}
					seen[c.NewEntry.ID] = true
				}
				if len(seen) == total {
					cancel()
				}
			})
			if !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
		})
	}
	for i := 1; i <= total; i += 20 {
		s.ApplyBatch(entryLog(t, uint64(i), 20))
	}
	wg.Wait()
}

func TestWatchEndsWithStore(t *testing.T) {
	s := openAt(t, stateDir(t))
	next, _ := startWatch(t, s)
	next()
	done := make(chan error, 1)
	go func() { done <- s.Watch(t.Context(), func([]identity.Change) {}) }()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	wantErr(t, <-done, identity.ErrUnavailable, "closed")
}
