//go:build integration

package integration

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"countersign.io/countersign/integration/cluster"
	"countersign.io/countersign/integration/issuer"
)

// balancer is what stands before the members' public ports where there are several: it gives a connection to the first that
// takes it, beginning with another one each time.
type balancer struct {
	l     net.Listener
	mu    sync.Mutex
	ports []string
	next  atomic.Uint64
}

func newBalancer(t *testing.T) *balancer {
	t.Helper()
	l, err := net.Listen("tcp", freeAddress(t))
	if err != nil {
		t.Fatal(err)
	}
	b := &balancer{l: l}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go b.forward(c)
		}
	}()
	return b
}

func (b *balancer) forward(c net.Conn) {
	defer c.Close()
	b.mu.Lock()
	ports := b.ports
	b.mu.Unlock()
	first := int(b.next.Add(1))
	for i := range ports {
		to, err := net.DialTimeout("tcp", ports[(first+i)%len(ports)], time.Second)
		if err != nil {
			continue
		}
		defer to.Close()
		go func() {
			_, _ = io.Copy(to, c)
			to.Close()
		}()
		_, _ = io.Copy(c, to)
		return
	}
}

// domain is a trust domain of three members behind a balancer, with an agent.
type domain struct {
	*world
	agent *cluster.Agent
}

func newDomain(t *testing.T, ctx context.Context, name string) *domain {
	t.Helper()
	dir, err := os.MkdirTemp("", "cs-") // short: sockets live in it
	if err != nil {
		t.Fatal(err)
	}
	b := newBalancer(t)
	d := &domain{world: &world{t: t, ctx: ctx, Cluster: &cluster.Cluster{Dir: dir, Bin: bin, TrustDomain: name}}}
	t.Cleanup(func() {
		d.Close()
		if t.Failed() {
			d.logs()
		}
		os.RemoveAll(dir)
	})
	for range 3 {
		port := freeAddress(t)
		d.ServerYAML = fmt.Sprintf("x509_ttl: 24s\njwt_ttl: 8s\nmax_staleness: 1m\npublic: {listen: %q, url: %q}\nfederation: {refresh_hint: 1s}\noidc: {off: true}\n", port, "https://"+b.l.Addr().String())
		if _, err := d.StartMember(ctx); err != nil {
			t.Fatal(err)
		}
		b.mu.Lock()
		b.ports = append(b.ports, port)
		b.mu.Unlock()
	}
	if err := d.AllVote(ctx); err != nil {
		t.Fatal(err)
	}
	if d.iss, err = issuer.New(dir); err != nil {
		t.Fatal(err)
	}
	d.admin("kube", "add", "test", "--issuer", d.iss.URL, "--jwks-file", d.iss.JWKSFile)
	d.agent = d.world.agent()
	return d
}

// relationship is what `federation show` tells.
type relationship struct {
	Sequence        string
	X509Authorities int `json:"x509_authorities"`
	Status          *struct {
		LastSuccess time.Time `json:"last_success"`
		LastError   string    `json:"last_error"`
		Failures    int
	}
}

// partner asks how the relationship with another stands, until ok.
func (d *domain) partner(other *domain, what string, ok func(relationship) error) {
	d.t.Helper()
	d.eventually(d.TrustDomain+": "+what, func() error {
		out, err := d.Admin(d.ctx, "federation", "show", other.TrustDomain, "-o", "json")
		if err != nil {
			return err
		}
		var r relationship
		parseJSON(d.t, out, &r)
		if r.Status == nil {
			return errors.New("the status is not known: " + out)
		}
		return ok(r)
	})
}

func refreshedSince(at time.Time) func(relationship) error {
	return func(r relationship) error {
		if !r.Status.LastSuccess.After(at) || r.Status.LastError != "" {
			return fmt.Errorf("%+v", *r.Status)
		}
		return nil
	}
}

// workload starts a pod's program that federates with the other trust domain.
func (d *domain) workload(other *domain, name, peer string, args ...string) *eventLog {
	d.t.Helper()
	d.createEntry("-s", "k8s:ns:shop", "-s", "k8s:sa:"+name, "--id", "spiffe://"+d.TrustDomain+"/"+name, "--federates-with", other.TrustDomain)
	token, err := d.iss.Pod("shop", name, "node-1")
	if err != nil {
		d.t.Fatal(err)
	}
	log := newEventLog()
	argv := append([]string{filepath.Join(bin, "workload"), "-peer", "spiffe://" + other.TrustDomain + "/" + peer}, args...)
	if _, err := d.Start(name, []string{"SPIFFE_ENDPOINT_SOCKET=" + d.agent.Endpoint(), "COUNTERSIGN_DEV_POD=" + token}, log, argv...); err != nil {
		d.t.Fatal(err)
	}
	log.wait(d.t, d.ctx, "the SVID of "+name, func(e *eventLog) bool { return e.svids >= 1 })
	return log
}

// exchange has a workload of each side verify JWT-SVIDs of the other's, until stop is called.
func exchange(t *testing.T, ctx context.Context, a, b *domain) (stop func() int) {
	t.Helper()
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	n := 0
	sides := []*domain{a, b}
	var clients []*workloadapi.Client
	for _, d := range sides {
		c, err := workloadapi.New(ctx, workloadapi.WithAddr(d.agent.Endpoint()))
		if err != nil {
			t.Fatal(err)
		}
		clients = append(clients, c)
	}
	once := func(n int) error {
		from, to := clients[n%2], clients[1-n%2]
		svid, err := from.FetchJWTSVID(ctx, jwtsvid.Params{Audience: "audience-" + strconv.Itoa(n/20)})
		if err == nil {
			_, err = to.ValidateJWTSVID(ctx, svid.Marshal(), svid.Audience[0])
		}
		return err
	}
	for n := range sides {
		sides[n].eventually("a JWT-SVID is had, and verified on the other side", func() error { return once(n) })
	}
	wg.Go(func() {
		for ; pause(ctx, 50*time.Millisecond); n++ {
			if err := once(n); err != nil && ctx.Err() == nil {
				t.Errorf("exchanging JWT-SVID %d: %v", n, err)
				return
			}
		}
	})
	return func() int {
		cancel()
		wg.Wait()
		for _, c := range clients {
			c.Close()
		}
		return n
	}
}

// TestFederation: two trust domains of three members each, set up by one string each way. Workloads of each talk to those of the
// other by mutual TLS, and verify each other's JWT-SVIDs, while both replace their authorities, one's members are away for a
// time, and the other's leader dies. No handshake fails, and no token.
func TestFederation(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(context.Background(), 6*time.Minute)
	t.Cleanup(cancel)
	a, b := newDomain(t, ctx, "left.test"), newDomain(t, ctx, "right.test")
	toA, err := b.Admin(ctx, "federation", "accept", a.admin("federation", "invite"))
	if err != nil {
		t.Fatal(err)
	}
	a.admin("federation", "accept", "--no-token", toA)
	start := time.Now()
	a.partner(b, "the partner's bundle is refreshed", refreshedSince(start))
	b.partner(a, "the partner's bundle is refreshed", refreshedSince(start))

	var callers []*eventLog
	for _, x := range []struct{ from, to *domain }{{a, b}, {b, a}} {
		addr := freeAddress(t)
		x.to.workload(x.from, "backend", "frontend", "-listen", addr)
		callers = append(callers, x.from.workload(x.to, "frontend", "backend", "-dial", addr, "-interval", "40ms"))
	}
	shaken := func(when string) {
		t.Helper()
		for _, c := range callers {
			ok, _ := c.seen()
			c.wait(t, ctx, "handshakes "+when, func(e *eventLog) bool { return e.ok > ok+20 })
			if c.failures() > 0 {
				t.Fatalf("%s, %d handshakes failed: %v", when, c.failures(), c.errors())
			}
		}
	}
	shaken("at first")
	for i, d := range []*domain{a, b} {
		d.createEntry(append(uidSelectors(), "--id", "spiffe://"+d.TrustDomain+"/me", "--federates-with", []*domain{b, a}[i].TrustDomain)...)
	}
	stop := exchange(t, ctx, a, b)

	// Both rotate their roots, and their JWT keys, at the same time.
	for _, kind := range []string{"x509", "jwt"} {
		var wg sync.WaitGroup
		for _, d := range []*domain{a, b} {
			wg.Go(func() {
				if out, err := d.Admin(ctx, "bundle", "rotate", "--kind", kind, "--watch", "--timeout", "3m"); err != nil {
					t.Errorf("%s: rotating %s: %v: %s", d.TrustDomain, kind, err, out)
				}
			})
		}
		wg.Wait()
		shaken("after both rotated " + kind)
	}

	t.Logf("%d JWT-SVIDs exchanged", stop()) // nobody mints new ones without a member

	// All of one's members are away: the other keeps its last good bundle and says what is wrong.
	for _, m := range b.Members {
		m.Kill()
	}
	a.partner(b, "an error is shown, and the last good bundle kept", func(r relationship) error {
		if r.Status.LastError == "" || r.Status.Failures < 2 || r.X509Authorities == 0 {
			return fmt.Errorf("%+v: %+v", r, *r.Status)
		}
		return nil
	})
	shaken("while one's members are away")
	for _, m := range b.Members {
		if err := b.LaunchMember(m); err != nil {
			t.Fatal(err)
		}
	}
	for _, m := range b.Members {
		if err := b.WaitReady(ctx, m); err != nil {
			t.Fatal(err)
		}
	}
	back := time.Now()
	a.partner(b, "the partner that is back is refreshed", refreshedSince(back))
	b.partner(a, "who was away refreshes, too", refreshedSince(back))
	shaken("after they came back")
	stop = exchange(t, ctx, a, b)

	// The leader dies: another one refreshes.
	if leader := a.Leader(ctx); leader == nil {
		t.Error("no leader")
	} else {
		leader.Kill()
		died := time.Now()
		a.partner(b, "another leader refreshes", refreshedSince(died))
		if err := a.RestartMember(ctx, leader); err != nil {
			t.Fatal(err)
		}
	}
	shaken("under another leader")
	t.Logf("%d more JWT-SVIDs exchanged", stop())

	// Trust ends when the relationship does, at once.
	a.admin("federation", "delete", b.TrustDomain)
	for i, c := range callers {
		before := c.failures()
		c.wait(t, ctx, "the end of caller "+strconv.Itoa(i), func(e *eventLog) bool { return e.bad > before+3 })
	}
}
