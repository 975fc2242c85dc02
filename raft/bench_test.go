package raft

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// production leaves the timing at its defaults.
func production(c *Config) { c.HeartbeatTimeout, c.LeaseTimeout, c.LeaderWait = 0, 0, 0 }

// BenchmarkCommit is writes committed and applied on three members on one disk, 64 writers at once, on the
// leader or on all members (then two thirds are forwarded).
func BenchmarkCommit(b *testing.B) {
	for _, where := range []string{"leader", "all"} {
		b.Run(where, func(b *testing.B) {
			c := newCluster(b, 3, production)
			leader := c.leader()
			cmd := make([]byte, 512)
			var left, failed atomic.Int64
			left.Store(int64(b.N))
			b.ResetTimer()
			var wg sync.WaitGroup
			for i := range 64 {
				m := leader
				if where == "all" {
					m = c.members[i%3]
				}
				wg.Go(func() {
					for left.Add(-1) >= 0 {
						if _, err := m.Propose(within(b), cmd); err != nil {
							failed.Add(1)
						}
					}
				})
			}
			wg.Wait()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "commits/s")
			b.ReportMetric(float64(failed.Load()), "failed")
		})
	}
}

// BenchmarkWrite is one writer, on the leader or on another member; the latter waits until the write is
// applied where it was made.
func BenchmarkWrite(b *testing.B) {
	for _, where := range []string{"leader", "follower"} {
		b.Run(where, func(b *testing.B) {
			c := newCluster(b, 3, production)
			m := c.leader()
			if where == "follower" {
				m = c.follower()
			}
			cmd := make([]byte, 512)
			failed := 0
			b.ResetTimer()
			for range b.N {
				if _, err := m.Propose(within(b), cmd); err != nil {
					failed++
				}
			}
			b.ReportMetric(float64(failed), "failed")
		})
	}
}

// BenchmarkFailover is the time from the leader's crash to the first committed write on another member.
func BenchmarkFailover(b *testing.B) {
	c := newCluster(b, 3, production)
	var took []time.Duration
	for i := range b.N {
		old := c.leader()
		rest := c.others(old)
		c.propose(rest[0], fmt.Sprint("warm", i))
		start := time.Now()
		old.crash()
		for {
			_, err := rest[0].Propose(within(b), []byte("x"))
			if err == nil {
				break
			}
			if !errors.Is(err, ErrUnknownOutcome) {
				b.Fatal(err)
			}
		}
		took = append(took, time.Since(start))
		b.StopTimer()
		old.machine = &machine{}
		c.start(old, false)
		old.settled(within(b))
		b.StartTimer()
	}
	slices.Sort(took)
	b.ReportMetric(took[len(took)/2].Seconds()*1000, "p50-ms")
	b.ReportMetric(took[len(took)-1].Seconds()*1000, "max-ms")
}
