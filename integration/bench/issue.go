package main

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	workloadv1 "countersign.io/countersign/api/workload/v1"
	"countersign.io/countersign/integration/cluster"
)

const (
	callers  = 8
	audience = "bench"
	batch    = 50
	// freshPods take turns showing their tokens: so many that a member has forgotten each when it comes again. knownPods are so few
	// that it has not.
	freshPods, knownPods = 30000, 1000
)

// issueLoad is what callers ask a member for. Its methods may be called from any goroutine.
type issueLoad struct {
	tokens []string
	keys   [][]byte
	next   atomic.Int64
}

func newIssueLoad(tokens []string) (*issueLoad, error) {
	l := &issueLoad{tokens: tokens}
	for range 64 {
		_, public, err := cluster.NewKey()
		if err != nil {
			return nil, err
		}
		l.keys = append(l.keys, public)
	}
	return l, nil
}

func (l *issueLoad) evidence() *workloadv1.Evidence {
	i := int(l.next.Add(1)) % len(l.tokens)
	return &workloadv1.Evidence{Token: l.tokens[i], Selectors: []string{"unix:gid:1000", "unix:path:/usr/local/bin/web", "unix:uid:1000"}}
}

// x509 asks for n SVIDs in one call.
func (l *issueLoad) x509(ctx context.Context, c workloadv1.WorkloadClient, n int) error {
	req := &workloadv1.IssueX509Request{Requests: make([]*workloadv1.X509Request, n)}
	for i := range req.Requests {
		req.Requests[i] = &workloadv1.X509Request{Evidence: l.evidence(), PublicKey: l.keys[i%len(l.keys)]}
	}
	res, err := c.IssueX509(ctx, req)
	if err != nil {
		return err
	}
	if len(res.Results) != n {
		return fmt.Errorf("%d results for %d requests", len(res.Results), n)
	}
	for _, r := range res.Results {
		if r.Error != nil || len(r.Svids) == 0 {
			return fmt.Errorf("no SVID: %s", r.Error.GetMessage())
		}
	}
	return nil
}

func (l *issueLoad) jwt(ctx context.Context, c workloadv1.WorkloadClient) error {
	res, err := c.IssueJWT(ctx, &workloadv1.IssueJWTRequest{Evidence: l.evidence(), Audience: []string{audience}})
	if err == nil && len(res.Svids) != 1 {
		err = fmt.Errorf("%d JWT-SVIDs", len(res.Svids))
	}
	return err
}

// work is what perOp found: how many operations were done, the CPU time of each and of a P-256 signature meanwhile in
// microseconds, and operations per second.
type work struct {
	n                     int
	cost, signature, rate float64
}

// perOp lets every connection call f, which does ops operations, for a while.
func perOp[T any](ctx context.Context, pid int, d time.Duration, conns []T, ops int, f func(context.Context, T) error) (w work, err error) {
	before, err := cpu(pid)
	if err != nil {
		return w, err
	}
	m := startMeter()
	start := time.Now()
	var done atomic.Int64
	var first atomic.Pointer[error]
	var wg sync.WaitGroup
	for _, c := range conns {
		wg.Go(func() {
			for time.Since(start) < d && first.Load() == nil {
				if err := f(ctx, c); err != nil {
					first.CompareAndSwap(nil, &err)
					return
				}
				done.Add(int64(ops))
			}
		})
	}
	wg.Wait()
	took := time.Since(start)
	w.signature = m.signature()
	if p := first.Load(); p != nil {
		return w, *p
	}
	after, err := cpu(pid)
	if err != nil {
		return w, err
	}
	if w.n = int(done.Load()); w.n == 0 {
		return w, errors.New("nothing was done in time")
	}
	w.cost, w.rate = us(after-before)/float64(w.n), float64(w.n)/took.Seconds()
	return w, nil
}

// ratio is the cost in signatures.
func (w work) ratio() float64 {
	if w.signature == 0 {
		return 0
	}
	return w.cost / w.signature
}

// issuance measures what an SVID costs the leader.
func (b *bench) issuance(ctx context.Context, s *stage) error {
	leader, err := s.leader(ctx)
	if err != nil {
		return err
	}
	tokens, err := s.pods(freshPods)
	if err != nil {
		return err
	}
	fresh, err := newIssueLoad(tokens)
	if err != nil {
		return err
	}
	known, err := newIssueLoad(tokens[:knownPods])
	if err != nil {
		return err
	}
	conns, stop, err := s.callers(ctx, leader, callers)
	if err != nil {
		return err
	}
	defer stop()
	batched := func(ctx context.Context, c workloadv1.WorkloadClient, l *issueLoad) error {
		return l.x509(ctx, c, batch)
	}
	single := func(ctx context.Context, c workloadv1.WorkloadClient, l *issueLoad) error { return l.x509(ctx, c, 1) }
	jwt := func(ctx context.Context, c workloadv1.WorkloadClient, l *issueLoad) error { return l.jwt(ctx, c) }
	for _, row := range []struct {
		key, name   string
		ops         int
		bar, moon   float64
		f           func(context.Context, workloadv1.WorkloadClient, *issueLoad) error
		load, other *issueLoad
		otherwise   string
	}{
		{"x509-batch", "MemberX509Batch50", batch, 250, 120, batched, fresh, known, "with tokens that the member has seen before, as at a renewal"},
		{"x509-single", "MemberX509Single", 1, 400, 250, single, fresh, known, "with tokens that the member has seen before, as at a renewal"},
		{"jwt", "MemberJWT", 1, 250, 130, jwt, known, fresh, "with tokens that the member has not seen before"},
	} {
		if !b.only.MatchString(row.key) {
			continue
		}
		costs, ratios, rates, err := b.issueCost(ctx, s.c.Members[leader].PID(), row.name, conns, row.ops, b.n(6, 3), func(ctx context.Context, c workloadv1.WorkloadClient) error { return row.f(ctx, c, row.load) })
		if err != nil {
			return fmt.Errorf("%s: %w", row.key, err)
		}
		others, _, _, err := b.issueCost(ctx, s.c.Members[leader].PID(), row.name+"Otherwise", conns, row.ops, b.n(3, 2), func(ctx context.Context, c workloadv1.WorkloadClient) error { return row.f(ctx, c, row.other) })
		if err != nil {
			return fmt.Errorf("%s: %w", row.key, err)
		}
		r := b.result(row.key)
		r.add(check{got: costs.p50, bar: row.bar, moonshot: row.moon}, "%.0f us", costs.p50)
		r.note("%.0f to %.0f us, as much as %.1f P-256 signatures on the same cores at the same time; %.0f a second from one member; %s %.0f us", costs.min, costs.max, ratios.p50, rates.p50, row.otherwise, others.p50)
	}
	return nil
}

// issueCost takes samples of perOp; in the first, connections, caches and the heap's size settle.
func (b *bench) issueCost(ctx context.Context, pid int, name string, conns []workloadv1.WorkloadClient, ops, samples int, f func(context.Context, workloadv1.WorkloadClient) error) (cost, ratio, rate spread, err error) {
	var costs, ratios, rates []float64
	for i := range samples {
		w, err := perOp(ctx, pid, 1500*time.Millisecond, conns, ops, f)
		if err != nil {
			return cost, ratio, rate, err
		}
		if i == 0 {
			continue
		}
		b.sample(name, w.n, w.cost, "cpu-us/op", w.ratio(), "signatures/op", w.rate, "op/s")
		costs, ratios, rates = append(costs, w.cost), append(ratios, w.ratio()), append(rates, w.rate)
	}
	return spreadOf(costs), spreadOf(ratios), spreadOf(rates), nil
}
