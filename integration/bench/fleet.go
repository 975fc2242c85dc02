package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"countersign.io/countersign/agent"
	"countersign.io/countersign/attestor/node"
	"countersign.io/countersign/identity"
	"countersign.io/countersign/integration/bench/caller"
)

const (
	fleetAgents, fleetWorkloads = 5000, 2 // workloads of each
	// fleetYAML makes every SVID, the agents' too, live a thirtieth of its default time.
	fleetYAML  = "x509_ttl: 2m\n"
	fleetSpeed = 30
)

// fleet is many agents in this process. Its counters may be used from any goroutine.
type fleet struct {
	s       *stage
	pin     string
	servers []string

	live    atomic.Int64 // workloads with an SVID
	updates atomic.Int64 // received after the first of each
	lost    atomic.Int64 // streams that ended once there were SVIDs on them
	why     atomic.Pointer[error]
	expired atomic.Int64 // workloads that were given nothing newer in time
}

// fleet measures what many small nodes cost the members: connections, streams and renewals.
func (b *bench) fleet(ctx context.Context, s *stage) error {
	raw, err := s.c.Admin(ctx, "token", "create", "--agent")
	if err != nil {
		return err
	}
	t, err := node.ParseToken(strings.TrimSpace(raw))
	if err != nil {
		return err
	}
	f := &fleet{s: s, pin: t.Pin}
	for _, m := range s.c.Members {
		f.servers = append(f.servers, m.Address)
	}
	agents := b.n(fleetAgents, 200)
	ctx, stop := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer stop()
	begin := time.Now()
	if err := f.start(ctx, &wg, agents); err != nil {
		return err
	}
	ramp := time.Since(begin)
	b.say("%d workloads on %d agents are live after %.0f s", f.live.Load(), agents, ramp.Seconds())
	pids := s.memberPIDs()
	before, err := cpu(pids...)
	if err != nil {
		return err
	}
	own, err := cpu(os.Getpid())
	if err != nil {
		return err
	}
	from, updates := time.Now(), f.updates.Load()
	pause(ctx, time.Duration(b.n(66, 10))*time.Second) // over every renewal once: half-life and its jitter
	window := time.Since(from)
	after, err := cpu(pids...)
	if err != nil {
		return err
	}
	ownAfter, err := cpu(os.Getpid())
	if err != nil {
		return err
	}
	cores, agentCores := (after-before).Seconds()/window.Seconds(), (ownAfter-own).Seconds()/window.Seconds()
	r := b.result("fleet")
	var total float64
	for _, m := range s.c.Members {
		x, err := memoryOf(m.PID())
		if err != nil {
			return err
		}
		total += x.rss
		r.note("%s: %.0f MiB, peak %.0f MiB", m.Name, x.rss, x.peak)
	}
	renewals := f.updates.Load() - updates
	b.sample("Fleet", int(f.live.Load()), cores, "members-cpu-cores", agentCores, "agents-cpu-cores", total, "members-rss-MiB", float64(renewals)/window.Seconds(), "renewals/s", ramp.Seconds(), "start-s", float64(f.lost.Load()), "lost")
	r.add(check{got: cores, bar: 1}, "%d workloads on %d agents, renewing %d times as often as by default: all members together %.0f %% of one core, %.0f MiB", f.live.Load(), agents, fleetSpeed, 100*cores, total)
	r.add(check{got: float64(f.lost.Load() + f.expired.Load()), bar: 0.5}, "%d identities lost", f.lost.Load()+f.expired.Load())
	if want := f.live.Load() * 9 / 10; !b.quick && renewals < want {
		r.err = fmt.Errorf("only %d of %d renewals came in %.0f s: the machine was too busy for the agents (%.1f cores)", renewals, f.live.Load(), window.Seconds(), agentCores)
	}
	r.note("attested, connected and issued within %.0f s, the agents on the same cores; then %d renewals in %.0f s, not counting each agent's own SVID and its new connection; the agents took %.0f %% of a core", ramp.Seconds(), renewals, window.Seconds(), 100*agentCores)
	if p := f.why.Load(); p != nil {
		r.note("the first loss: %v", *p)
	}
	return nil
}

// start brings the agents up, some at a time, and returns when every workload is live.
func (f *fleet) start(ctx context.Context, wg *sync.WaitGroup, n int) error {
	slots := make(chan struct{}, 48)
	deadline := time.After(90 * time.Second)
	failed := make(chan error, 1)
	for i := range n {
		select {
		case slots <- struct{}{}:
		case err := <-failed:
			return err
		case <-deadline:
			return fmt.Errorf("only %d workloads were live after 90 s", f.live.Load())
		case <-ctx.Done():
			return ctx.Err()
		}
		wg.Go(func() {
			if err := f.run(ctx, i, func() { <-slots }); err != nil {
				select {
				case failed <- err:
				default:
				}
			}
		})
	}
	for range cap(slots) { // the last are live too
		select {
		case slots <- struct{}{}:
		case err := <-failed:
			return err
		case <-deadline:
			return fmt.Errorf("only %d workloads were live after 90 s", f.live.Load())
		}
	}
	return nil
}

// run is one agent on a node of its own until ctx ends. live is called once all its workloads have SVIDs.
func (f *fleet) run(ctx context.Context, i int, live func()) error {
	name := fmt.Sprintf("node-%d", i)
	own, err := f.s.iss.Token(agentNamespace, agentAccount, name)
	if err != nil {
		return err
	}
	// A node has an address of its own, and members limit strangers by address.
	d := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 1, byte(i>>8), byte(i))}}
	a, err := agent.New(agent.Config{
		Servers: f.servers, Pin: f.pin, Credential: agent.KubeToken(kubeCluster, func() ([]byte, error) { return []byte(own), nil }),
		Dial: func(ctx context.Context, addr string) (net.Conn, error) { return d.DialContext(ctx, "tcp", addr) },
	})
	if err != nil {
		return err
	}
	var first sync.WaitGroup
	var all sync.WaitGroup
	for k := range fleetWorkloads {
		token, err := f.s.iss.Token("shop", fmt.Sprintf("app-%d", k), name)
		if err != nil {
			return err
		}
		first.Add(1)
		all.Go(func() { f.workload(ctx, a, fmt.Sprintf("%s/%d", name, k), token, first.Done) })
	}
	all.Go(func() { first.Wait(); live() })
	err = a.Run(ctx)
	all.Wait()
	return err
}

// workload holds a stream at the agent, and opens it anew when it ends.
func (f *fleet) workload(ctx context.Context, a *agent.Agent, name, token string, live func()) {
	attest := caller.Pod(name, func() ([]byte, error) { return []byte(token), nil })
	had := false
	var expires time.Time
	for ctx.Err() == nil {
		err := a.Updates(ctx, attest, func(u *identity.Update) error {
			if had {
				f.updates.Add(1)
				if time.Now().After(expires) {
					f.expired.Add(1)
				}
			} else {
				had = true
				f.live.Add(1)
				live()
			}
			expires = u.SVIDs[0].NotAfter
			return nil
		})
		if ctx.Err() != nil {
			break
		}
		if had {
			f.lost.Add(1)
			f.why.CompareAndSwap(nil, &err)
		}
		pause(ctx, 100*time.Millisecond)
	}
	if !had {
		live()
	}
}
