package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	adminv1 "countersign.io/countersign/api/admin/v1"
	workloadv1 "countersign.io/countersign/api/workload/v1"
)

const writers = 64

// load creates entries until there are n more, or for d if that is not zero, through the members given. numbers keeps
// entries apart.
func (s *stage) load(ctx context.Context, members []int, n int, d time.Duration, numbers *atomic.Int64) (rate float64, err error) {
	var conns []adminv1.AdminClient
	for i := range 9 { // a connection carries 64 calls at the most
		c, stop, err := s.c.Members[members[i%len(members)]].AdminConn()
		if err != nil {
			return 0, err
		}
		defer stop()
		conns = append(conns, c)
	}
	begin := time.Now()
	var left, done atomic.Int64
	left.Store(int64(n))
	var failed atomic.Pointer[error]
	var wg sync.WaitGroup
	for i := range writers {
		wg.Go(func() {
			for failed.Load() == nil && (d != 0 && time.Since(begin) < d || d == 0 && left.Add(-1) >= 0) {
				x := numbers.Add(1)
				_, err := conns[i%len(conns)].CreateEntry(ctx, &adminv1.Entry{
					SpiffeId:  fmt.Sprintf("spiffe://%s/load/%d", trustDomain, x),
					Selectors: []string{"k8s:cluster:" + kubeCluster, fmt.Sprintf("k8s:ns:ns-%d", x%97), fmt.Sprintf("k8s:sa:sa-%d", x)},
				})
				if err != nil {
					failed.CompareAndSwap(nil, &err)
					return
				}
				done.Add(1)
			}
		})
	}
	wg.Wait()
	if p := failed.Load(); p != nil {
		return 0, *p
	}
	return float64(done.Load()) / time.Since(begin).Seconds(), nil
}

// commits measures writes that are on a majority's disks, through the leader and through all members.
func (b *bench) commits(ctx context.Context, s *stage) error {
	leader, err := s.leader(ctx)
	if err != nil {
		return err
	}
	var numbers atomic.Int64
	numbers.Store(1 << 40) // apart from what flat loads
	r := b.result("commits")
	for _, way := range []struct {
		name, text string
		members    []int
	}{{"RaftCommitsLeader", "%.0f/s by the leader", []int{leader}}, {"RaftCommitsAllMembers", "%.0f/s by all three", []int{0, 1, 2}}} {
		var rates []float64
		for range b.n(3, 1) {
			before, err := cpu(s.memberPIDs()...)
			if err != nil {
				return err
			}
			d := 2 * time.Second
			rate, err := s.load(ctx, way.members, 0, d, &numbers)
			if err != nil {
				return fmt.Errorf("%s: %w", way.name, err)
			}
			after, err := cpu(s.memberPIDs()...)
			if err != nil {
				return err
			}
			cost := us(after-before) / (rate * d.Seconds())
			b.sample(way.name, int(rate*d.Seconds()), rate, "op/s", cost, "members-cpu-us/op")
			rates = append(rates, rate)
		}
		rate := spreadOf(rates)
		r.add(check{got: rate.p50, bar: 3000, moonshot: 6000, floor: true}, way.text, rate.p50)
		r.note(way.text+" at the slowest of %d, %.0f at the fastest", rate.min, len(rates), rate.max)
	}
	syncs, err := fsyncs(s.c.Dir)
	if err != nil {
		return err
	}
	r.note("one process that appends 4 KiB and syncs, on the same disk: %.0f/s", syncs)
	return nil
}

// fsyncs is how often a second the disk takes a small append durably.
func fsyncs(dir string) (float64, error) {
	f, err := os.Create(filepath.Join(dir, "fsync"))
	if err != nil {
		return 0, fmt.Errorf("measuring the disk: %w", err)
	}
	defer f.Close()
	page := make([]byte, 4096)
	begin, n := time.Now(), 0
	for time.Since(begin) < time.Second {
		if _, err := f.Write(page); err != nil {
			return 0, fmt.Errorf("measuring the disk: %w", err)
		}
		if err := f.Sync(); err != nil {
			return 0, fmt.Errorf("measuring the disk: %w", err)
		}
		n++
	}
	return float64(n) / time.Since(begin).Seconds(), nil
}

// flat measures the same operations with ever more entries that do not concern them.
func (b *bench) flat(ctx context.Context, s *stage) error {
	leader, err := s.leader(ctx)
	if err != nil {
		return err
	}
	if _, err := s.create(ctx, leader, "/flat/web", "k8s:ns:shop", "k8s:sa:web"); err != nil {
		return err
	}
	tokens, err := s.pods(b.n(20000, 4000))
	if err != nil {
		return err
	}
	load, err := newIssueLoad(tokens)
	if err != nil {
		return err
	}
	conns, stop, err := s.callers(ctx, leader, callers)
	if err != nil {
		return err
	}
	defer stop()
	w, stop, err := s.openStream(ctx, "/flat/stream")
	if err != nil {
		return err
	}
	defer stop()
	var numbers atomic.Int64
	var costs, ratios, pushes []float64
	sizes := []int{1000, 10000, 100000}[:b.n(3, 2)]
	r := b.result("flat")
	for _, size := range sizes {
		rate, err := s.load(ctx, []int{leader}, size-int(numbers.Load()), 0, &numbers)
		if err != nil {
			return fmt.Errorf("loading %d entries: %w", size, err)
		}
		if err := s.settle(ctx); err != nil {
			return err
		}
		cost, ratio, push, err := s.atSize(ctx, leader, conns, load, w)
		if err != nil {
			return fmt.Errorf("with %d entries: %w", size, err)
		}
		m, err := memoryOf(s.c.Members[leader].PID())
		if err != nil {
			return err
		}
		b.sample(fmt.Sprintf("Entries%d", size), 1, cost, "cpu-us/svid", ratio, "signatures/svid", push, "push-p50-ms", rate, "loaded/s", m.rss, "leader-rss-MiB")
		r.note("%d entries: member CPU per SVID %.0f us, as much as %.1f signatures, entry -> stream p50 %.1f ms, the leader's memory %.0f MiB; loaded at %.0f/s", size, cost, ratio, push, m.rss, rate)
		costs, ratios, pushes = append(costs, cost), append(ratios, ratio), append(pushes, push)
	}
	// Minutes lie between the sizes, in which the machine may have become slower: so the growth is that in signatures.
	r.add(check{got: growth(ratios), bar: 0.20, moonshot: 0.05}, "CPU %s us, in signatures %s (%+.0f %%)", list(costs), list(ratios), 100*growth(ratios))
	r.add(check{got: growth(pushes), bar: 0.20, moonshot: 0.05}, "push %s ms (%+.0f %%)", list(pushes), 100*growth(pushes))
	return nil
}

// atSize is what an SVID costs the member, and how long a change takes to a stream.
func (s *stage) atSize(ctx context.Context, member int, conns []workloadv1.WorkloadClient, load *issueLoad, w *watcher) (cost, ratio, push float64, err error) {
	var costs, ratios []float64
	for i := range s.n(6, 3) {
		x, err := perOp(ctx, s.c.Members[member].PID(), time.Second, conns, batch, func(ctx context.Context, c workloadv1.WorkloadClient) error { return load.x509(ctx, c, batch) })
		if err != nil {
			return 0, 0, 0, err
		}
		if i > 0 {
			costs, ratios = append(costs, x.cost), append(ratios, x.ratio())
		}
	}
	created, _, err := s.pushes(ctx, w, s.n(120, 30))
	return spreadOf(costs).p50, spreadOf(ratios).p50, spreadOf(created.stream).p50, err
}

// settle waits until the members have done what a load left behind, such as snapshots.
func (s *stage) settle(ctx context.Context) error {
	for range 60 {
		before, err := cpu(s.memberPIDs()...)
		if err != nil {
			return err
		}
		pause(ctx, 500*time.Millisecond)
		after, err := cpu(s.memberPIDs()...)
		if err != nil {
			return err
		}
		if after-before <= 50*time.Millisecond {
			return nil
		}
	}
	return nil
}

// growth is by how much the worst figure exceeds the first.
func growth(values []float64) float64 {
	if len(values) == 0 || values[0] == 0 {
		return 0
	}
	return max(0, spreadOf(values).max/values[0]-1)
}

func list(values []float64) string {
	var out []string
	for _, v := range values {
		out = append(out, fmt.Sprintf("%.3g", v))
	}
	return strings.Join(out, " / ")
}
