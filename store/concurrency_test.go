package store

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"

	"countersign.io/countersign/identity"
)

// Reads go on while a batch is being applied and a transaction is open: the test would hang otherwise.
func TestReadsDoNotWaitForWrites(t *testing.T) {
	s := filled(t)
	s.applying.Lock()
	defer s.applying.Unlock()
	tx, err := s.db.Begin(true)
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback()
	s.Match(sel("k8s:ns:n-1", "k8s:sa:s-1"))
	s.Entries("", 0)
	s.Agents("", 0)
	s.Agent("x")
	s.KubeClusters()
	s.Bundle()
	s.Members()
	s.Level()
	s.SealTerms()
	s.Foreign()
	s.Downstream("spiffe://example.org/w-1")
	s.JoinToken(hashOf("t-1"))
	s.Authorities()
	if s.Revision() == 0 || len(snapshotOf(t, s)) == 0 {
		t.Error("nothing there")
	}
	ctx, cancel := context.WithCancel(t.Context())
	s.Watch(ctx, func([]identity.Change) { cancel() })
}

// For the race detector: everything at once.
func TestEverythingAtOnce(t *testing.T) {
	s := openAt(t, stateDir(t))
	log := randomCommands(rand.New(rand.NewPCG(11, 1)), 1500)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() { s.Watch(ctx, func([]identity.Change) {}) })
		wg.Go(func() {
			for ctx.Err() == nil {
				for _, e := range s.Match(sel("k8s:ns:n-1", "k8s:ns:n-2", "k8s:sa:s-1", "k8s:sa:s-2")) {
					if got, ok := s.Entry(e.ID); ok && got.ID != e.ID {
						t.Error("another entry")
					}
				}
				s.Entries("e-1", 5)
				s.Agents("", 5)
				s.Bundle()
				s.KubeClusters()
				s.Authorities()
				s.Members()
				s.Level()
				s.SealTerms()
				s.Foreign()
				s.Downstream("spiffe://example.org/w-1")
				s.JoinToken(hashOf("t-1"))
			}
		})
	}
	for i := 0; i < len(log); i += 15 {
		s.ApplyBatch(log[i:min(i+15, len(log))])
		if i%300 == 0 {
			if err := s.Restore(bytes.NewReader(snapshotOf(t, s))); err != nil {
				t.Error(err)
			}
		}
	}
	cancel()
	wg.Wait()
	checkConsistent(t, s)
}

// commits/s of one member's state machine, alone: raft's own work comes on top.
func BenchmarkApply(b *testing.B) {
	for _, batch := range []int{1, 16, 64} {
		for _, entries := range []int{1_000, 100_000} {
			b.Run(fmt.Sprintf("batch=%d/entries=%d", batch, entries), func(b *testing.B) {
				s := openAt(b, stateDir(b))
				s.ApplyBatch(entryLog(b, 1, entries))
				next := uint64(entries + 1)
				commits := 0
				b.ReportAllocs()
				for b.Loop() {
					b.StopTimer()
					log := entryLog(b, next, batch)
					b.StartTimer()
					if res := s.ApplyBatch(log); len(res) != batch {
						b.Fatal(s.Err())
					}
					next += uint64(batch)
					commits += batch
				}
				b.ReportMetric(float64(commits)/b.Elapsed().Seconds(), "commits/s")
			})
		}
	}
}

func BenchmarkSnapshotAndRestore(b *testing.B) {
	s := openAt(b, stateDir(b))
	s.ApplyBatch(entryLog(b, 1, 100_000))
	snap := snapshotOf(b, s)
	b.Run("snapshot", func(b *testing.B) {
		b.SetBytes(int64(len(snap)))
		for b.Loop() {
			snapshotOf(b, s)
		}
	})
	b.Run("restore", func(b *testing.B) {
		b.SetBytes(int64(len(snap)))
		for b.Loop() {
			if err := s.Restore(bytes.NewReader(snap)); err != nil {
				b.Fatal(err)
			}
		}
	})
}
