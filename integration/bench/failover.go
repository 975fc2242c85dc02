package main

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	adminv1 "countersign.io/countersign/api/admin/v1"
	workloadv1 "countersign.io/countersign/api/workload/v1"
)

// failover kills the leader again and again.
func (b *bench) failover(ctx context.Context, s *stage) error {
	tokens, err := s.pods(2000)
	if err != nil {
		return err
	}
	load, err := newIssueLoad(tokens)
	if err != nil {
		return err
	}
	var gaps []float64
	var issued, failed int64
	for range b.n(6, 2) {
		o, err := s.killLeader(ctx, load)
		if err != nil {
			return err
		}
		b.sample("LeaderKilledToCommit", 1, o.gap.Seconds(), "s", float64(o.failed), "failed-issuances", float64(o.issued), "issuances")
		gaps, issued, failed = append(gaps, o.gap.Seconds()), issued+o.issued, failed+o.failed
		if o.why != nil {
			b.result("failover-issue").note("refused: %v", o.why)
		}
	}
	g := spreadOf(gaps)
	b.result("failover-write").add(check{got: g.max, bar: 2.5, moonshot: 0.5}, "p50 %.2f s, slowest %.2f s of %d", g.p50, g.max, len(gaps))
	// A bar of nothing at all: half a failure is over it.
	b.result("failover-issue").add(check{got: float64(failed), bar: 0.5, moonshot: 0.5}, "%d failed of %d", failed, issued)
	return nil
}

type outage struct {
	gap            time.Duration
	issued, failed int64
	why            error // the first failure's
}

// killLeader is one round: both other members are asked for SVIDs without pause, and for a write until one succeeds.
func (s *stage) killLeader(ctx context.Context, load *issueLoad) (o outage, err error) {
	leader, err := s.leader(ctx)
	if err != nil {
		return o, err
	}
	var admins []adminv1.AdminClient
	var issuers []workloadv1.WorkloadClient
	for i, m := range s.c.Members {
		if i == leader {
			continue
		}
		conn, stop, err := m.AdminConn()
		if err != nil {
			return o, err
		}
		defer stop()
		admins = append(admins, conn)
		conns, stop, err := s.callers(ctx, i, 2)
		if err != nil {
			return o, err
		}
		defer stop()
		issuers = append(issuers, conns...)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var issued, failed atomic.Int64
	var why atomic.Pointer[error]
	var wg sync.WaitGroup
	done := make(chan struct{})
	for _, c := range issuers {
		wg.Go(func() {
			for {
				if err := load.x509(ctx, c, 1); err != nil {
					failed.Add(1)
					why.CompareAndSwap(nil, &err)
				} else {
					issued.Add(1)
				}
				select {
				case <-done:
					return
				case <-time.After(2 * time.Millisecond):
				}
			}
		})
	}
	pause(ctx, 300*time.Millisecond)
	s.c.Members[leader].Kill()
	killed := time.Now()
	o.gap, err = firstWrite(ctx, admins, killed)
	pause(ctx, 500*time.Millisecond)
	close(done)
	wg.Wait()
	o.issued, o.failed = issued.Load(), failed.Load()
	if p := why.Load(); p != nil {
		o.why = *p
	}
	if err != nil {
		return o, err
	}
	if err := s.c.RestartMember(ctx, s.c.Members[leader]); err != nil {
		return o, err
	}
	pause(ctx, time.Second) // to catch up, so that the next round has three again
	return o, nil
}

// firstWrite tries at every member at once, and again on an error, until one write is acknowledged.
func firstWrite(ctx context.Context, admins []adminv1.AdminClient, since time.Time) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	first := make(chan time.Duration, len(admins))
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	for i, c := range admins {
		wg.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				_, err := c.CreateEntry(ctx, &adminv1.Entry{Selectors: []string{"k8s:ns:failover"}, SpiffeId: fmt.Sprintf("spiffe://%s/failover/%d/%d/%d", trustDomain, since.UnixNano(), i, n)})
				if err == nil {
					first <- time.Since(since)
					return
				}
				pause(ctx, 5*time.Millisecond)
			}
		})
	}
	select {
	case d := <-first:
		return d, nil
	case <-ctx.Done():
		return 0, errors.New("no write succeeded within 30 s after the leader was killed")
	}
}
