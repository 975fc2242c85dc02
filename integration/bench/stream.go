package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
)

// workloadAPI is a connection to an agent's socket, as any client makes one.
func workloadAPI(endpoint string) (*grpc.ClientConn, workload.SpiffeWorkloadAPIClient, error) {
	conn, err := grpc.NewClient(endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, nil, err
	}
	return conn, workload.NewSpiffeWorkloadAPIClient(conn), nil
}

// asWorkload is the header that the Workload API asks for.
func asWorkload(ctx context.Context) context.Context {
	return metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
}

// watcher holds one FetchX509SVID stream open and says when each message came.
type watcher struct {
	updates chan update
	failed  chan error
}

type update struct {
	at  time.Time
	ids []string
}

func watch(ctx context.Context, c workload.SpiffeWorkloadAPIClient) (*watcher, error) {
	stream, err := c.FetchX509SVID(asWorkload(ctx), &workload.X509SVIDRequest{})
	if err != nil {
		return nil, err
	}
	w := &watcher{updates: make(chan update, 64), failed: make(chan error, 1)}
	go func() {
		for {
			m, err := stream.Recv()
			if err != nil {
				w.failed <- err
				return
			}
			u := update{at: time.Now()}
			for _, s := range m.Svids {
				u.ids = append(u.ids, s.SpiffeId)
			}
			select {
			case w.updates <- u:
			case <-ctx.Done():
				return
			}
		}
	}()
	return w, nil
}

// until waits for a message that has the ID, or has it no more, and returns when it came.
func (w *watcher) until(ctx context.Context, id string, there bool) (time.Time, error) {
	timeout := time.NewTimer(20 * time.Second)
	defer timeout.Stop()
	for {
		select {
		case u := <-w.updates:
			if slices.Contains(u.ids, id) == there {
				return u.at, nil
			}
		case err := <-w.failed:
			return time.Time{}, fmt.Errorf("the stream ended: %w", err)
		case <-timeout.C:
			return time.Time{}, errors.New("nothing came on the stream for 20 s")
		case <-ctx.Done():
			return time.Time{}, ctx.Err()
		}
	}
}

// openStream gives this process an identity and holds a stream for it.
func (s *stage) openStream(ctx context.Context, path string) (_ *watcher, stop func(), err error) {
	a, err := s.nodeAgent(ctx)
	if err != nil {
		return nil, nil, err
	}
	id, err := s.create(ctx, 0, path, ownSelectors()...)
	if err != nil {
		return nil, nil, err
	}
	conn, client, err := workloadAPI(a.Endpoint())
	if err != nil {
		return nil, nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	stop = func() { cancel(); conn.Close(); _ = s.remove(context.WithoutCancel(ctx), 0, id) }
	// The agent may be connected to a member that does not know the entry yet: then it is asked again.
	for range 50 {
		var w *watcher
		if w, err = watch(ctx, client); err == nil {
			if _, err = w.until(ctx, "spiffe://"+trustDomain+path, true); err == nil {
				return w, stop, nil
			}
		}
		time.Sleep(20 * time.Millisecond)
	}
	stop()
	return nil, nil, fmt.Errorf("opening a stream: %w", err)
}

// pushTimes are milliseconds from before an operator's call until its answer, and until the message on the stream.
type pushTimes struct{ call, stream []float64 }

// pushes creates and deletes an entry n times.
func (s *stage) pushes(ctx context.Context, w *watcher, n int) (created, deleted pushTimes, err error) {
	for i := range n {
		path := fmt.Sprintf("/pushed/%d/%d", time.Now().UnixNano(), i)
		member := i % len(s.admins)
		begin := time.Now()
		id, err := s.create(ctx, member, path, ownSelectors()...)
		if err != nil {
			return created, deleted, err
		}
		created.call = append(created.call, ms(time.Since(begin)))
		at, err := w.until(ctx, "spiffe://"+trustDomain+path, true)
		if err != nil {
			return created, deleted, fmt.Errorf("after creating an entry: %w", err)
		}
		created.stream = append(created.stream, ms(at.Sub(begin)))
		begin = time.Now()
		if err := s.remove(ctx, member, id); err != nil {
			return created, deleted, err
		}
		deleted.call = append(deleted.call, ms(time.Since(begin)))
		if at, err = w.until(ctx, "spiffe://"+trustDomain+path, false); err != nil {
			return created, deleted, fmt.Errorf("after deleting an entry: %w", err)
		}
		deleted.stream = append(deleted.stream, ms(at.Sub(begin)))
	}
	return created, deleted, nil
}

// push measures from an operator's call to a workload's open stream.
func (b *bench) push(ctx context.Context, s *stage) error {
	w, stop, err := s.openStream(ctx, "/push")
	if err != nil {
		return err
	}
	defer stop()
	if _, _, err := s.pushes(ctx, w, 5); err != nil {
		return err
	}
	n := b.n(200, 50)
	created, deleted, err := s.pushes(ctx, w, n)
	if err != nil {
		return err
	}
	for _, row := range []struct {
		key, name string
		times     pushTimes
	}{{"entry-created", "EntryCreatedToStream", created}, {"entry-deleted", "EntryDeletedToStream", deleted}} {
		p, c := spreadOf(row.times.stream), spreadOf(row.times.call)
		b.sample(row.name, n, p.p50, "p50-ms", p.p99, "p99-ms", p.max, "max-ms", c.p50, "call-p50-ms", c.max, "call-max-ms")
		r := b.result(row.key)
		r.add(check{got: p.p50, bar: 20, moonshot: 5}, "p50 %.1f ms", p.p50)
		r.add(check{got: p.p99, bar: 100}, "p99 %.1f ms", p.p99)
		r.note("fastest %.1f ms, slowest %.1f ms of %d; the operator has the answer after p50 %.1f ms, p99 %.1f ms", p.min, p.max, n, c.p50, c.p99)
	}
	return nil
}

// cached measures what an agent serves from what it holds, and its memory with that one identity.
func (b *bench) cached(ctx context.Context, s *stage) error {
	_, stop, err := s.openStream(ctx, "/cached")
	if err != nil {
		return err
	}
	defer stop()
	if b.only.MatchString("agent-memory") {
		// Before it has served thousands of calls: an agent of a small node at rest.
		pause(ctx, time.Duration(b.n(8, 3))*time.Second)
		m, err := memoryOf(s.agent.PID())
		if err != nil {
			return err
		}
		b.sample("AgentMemory1Identity", 1, m.rss, "rss-MiB", m.anon, "anon-MiB", m.peak, "peak-MiB")
		r := b.result("agent-memory")
		r.add(check{got: m.rss, bar: 30, moonshot: 20}, "1: %.0f MiB", m.rss)
		r.note("1 identity: %.1f MiB, of which %.1f are its own and the rest mapped files; peak %.1f MiB", m.rss, m.anon, m.peak)
	}
	conn, client, err := workloadAPI(s.agent.Endpoint())
	if err != nil {
		return err
	}
	defer conn.Close()
	for _, row := range []struct {
		key, name      string
		p50, bar, moon float64
		f              func(context.Context) error
	}{
		{"cached-x509", "CachedX509", 0.4, 250, 100, func(ctx context.Context) error { return fetchX509(ctx, client) }},
		{"cached-jwt", "CachedJWT", 0, 200, 100, func(ctx context.Context) error {
			_, err := client.FetchJWTSVID(asWorkload(ctx), &workload.JWTSVIDRequest{Audience: []string{audience}})
			return err
		}},
	} {
		if !b.only.MatchString(row.key) {
			continue
		}
		var costs, latencies []float64
		for i := range b.n(6, 3) {
			var took []float64
			w, err := perOp(ctx, s.agent.PID(), 1200*time.Millisecond, []int{0}, 1, func(ctx context.Context, _ int) error {
				begin := time.Now()
				err := row.f(ctx)
				took = append(took, ms(time.Since(begin)))
				return err
			})
			if err != nil {
				return fmt.Errorf("%s: %w", row.key, err)
			}
			if i == 0 {
				continue
			}
			p := spreadOf(took)
			b.sample(row.name, w.n, p.p50, "p50-ms", p.p99, "p99-ms", w.cost, "cpu-us/op", w.ratio(), "signatures/op")
			costs, latencies = append(costs, w.cost), append(latencies, p.p50)
		}
		c, l, r := spreadOf(costs), spreadOf(latencies), b.result(row.key)
		r.add(check{got: l.p50, bar: row.p50}, "p50 %.2f ms", l.p50)
		r.add(check{got: c.p50, bar: row.bar, moonshot: row.moon}, "agent CPU %.0f us", c.p50)
	}
	return nil
}

func fetchX509(ctx context.Context, c workload.SpiffeWorkloadAPIClient) error {
	ctx, cancel := context.WithCancel(asWorkload(ctx))
	defer cancel()
	stream, err := c.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
	if err != nil {
		return err
	}
	m, err := stream.Recv()
	if err == nil && len(m.Svids) == 0 {
		err = errors.New("no SVID in the answer")
	}
	return err
}

// pause lets processes come to rest.
func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
