// Command demo shows the product's main job in half a minute: three CA members, a node agent and two pods as separate
// processes; the pods get SVIDs from the agent's socket and talk mutual TLS; the root of trust is replaced; the leader is killed;
// nothing stops.
//
//	go run ./integration/demo            runs and cleans up
//	KEEP=1 go run ./integration/demo     leaves everything running and prints what to try
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"countersign.io/countersign/integration/cluster"
	"countersign.io/countersign/integration/issuer"
)

const (
	trustDomain = "demo.test"
	kubeNode    = "demo/node-1"
	talk        = 3 * time.Second  // of handshakes before the root is replaced
	show        = 14 * time.Second // and after the leader's death
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	err := run(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "\nthe demo failed:", err)
		os.Exit(1)
	}
}

// stage is the demo's state, all of it on one goroutine but the pods' reports.
type stage struct {
	start time.Time
	c     *cluster.Cluster
	pods  []*pod
}

func (s *stage) say(what, format string, args ...any) {
	fmt.Printf("%6.1fs  %-18s %s\n", time.Since(s.start).Seconds(), what, fmt.Sprintf(format, args...))
}

func run(ctx context.Context) error {
	root, err := moduleRoot()
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "cs-demo-")
	if err != nil {
		return fmt.Errorf("making a folder: %w", err)
	}
	defer os.RemoveAll(dir)
	bin := filepath.Join(root, "bin")
	fmt.Println("Countersign demo: three CA members, one node agent, two pods, all on this machine.")
	fmt.Println("Building (the first time takes a minute) ...")
	if err := cluster.Build(ctx, root, bin, false); err != nil {
		return err
	}
	s := &stage{start: time.Now(), c: &cluster.Cluster{
		Dir: dir, Bin: bin, TrustDomain: trustDomain,
		// Ten seconds, so that rotations can be seen. An hour is the default.
		ServerYAML: "x509_ttl: 10s\nmax_staleness: 1m\nlog: {level: warn}\n", AgentYAML: "log: {level: warn}\n",
	}}
	defer s.c.Close()
	if err := s.play(ctx); err != nil {
		s.logs()
		return err
	}
	if os.Getenv("KEEP") != "" {
		s.keep(ctx)
	}
	return nil
}

// play is the demo, in order.
func (s *stage) play(ctx context.Context) error {
	for i := range 3 {
		m, err := s.c.StartMember(ctx)
		if err != nil {
			return err
		}
		how := "joined with a one-time token"
		if i == 0 {
			how = "bootstrapped trust domain " + trustDomain
		}
		s.say("member "+m.Name, "%s (pid %d, %s)", how, m.PID(), m.Address)
	}
	iss, err := issuer.New(s.c.Dir)
	if err != nil {
		return err
	}
	if _, err := s.c.Admin(ctx, "kube", "add", "demo", "--issuer", iss.URL, "--jwks-file", iss.JWKSFile); err != nil {
		return err
	}
	s.say("token issuer", "DEVELOPMENT ONLY: stands in for a kube API server; its keys are registered as kube cluster \"demo\"")
	a, err := s.c.StartAgent(ctx, kubeNode, "--insecure-dev-pods", iss.Tokens)
	if err != nil {
		return err
	}
	s.say("node agent", "attested with a one-time token for node %s; serves %s", kubeNode, a.Socket)
	if err := s.startPods(ctx, iss, a); err != nil {
		return err
	}
	if err := s.until(ctx, talk, "talking"); err != nil {
		return err
	}
	if err := s.c.AllVote(ctx); err != nil { // a newcomer has none before it has been stable for two seconds
		return err
	}
	if err := s.rotateRoot(ctx); err != nil {
		return err
	}
	failover, err := s.killLeader(ctx)
	if err != nil {
		return err
	}
	if err := s.until(ctx, show, "talking"); err != nil {
		return err
	}
	return s.sum(failover)
}

func (s *stage) startPods(ctx context.Context, iss *issuer.Issuer, a *cluster.Agent) error {
	addr, err := cluster.FreeAddress()
	if err != nil {
		return err
	}
	id := func(sa string) string { return "spiffe://" + trustDomain + "/ns/shop/sa/" + sa }
	for _, p := range []struct {
		name string
		args []string
	}{
		{"backend", []string{"-listen", addr, "-peer", id("frontend")}},
		{"frontend", []string{"-dial", addr, "-peer", id("backend")}},
	} {
		token, err := iss.Pod("shop", p.name, "node-1")
		if err != nil {
			return err
		}
		pod := newPod(s, p.name)
		argv := append([]string{filepath.Join(s.c.Bin, "workload")}, p.args...)
		if pod.Process, err = s.c.Start(p.name, []string{"SPIFFE_ENDPOINT_SOCKET=" + a.Endpoint(), "COUNTERSIGN_DEV_POD=" + token}, pod, argv...); err != nil {
			return err
		}
		s.pods = append(s.pods, pod)
		if err := pod.wait(ctx, func() bool { return pod.rotations() >= 0 }); err != nil {
			return err
		}
	}
	client := s.pods[1]
	if err := client.wait(ctx, func() bool { return client.handshakes() > 0 }); err != nil {
		return err
	}
	s.say("mutual TLS", "frontend -> backend: each has proved its name to the other; now 20 handshakes a second")
	return nil
}

// rotateRoot replaces the key that everybody trusts, under load.
func (s *stage) rotateRoot(ctx context.Context) error {
	s.say("bundle rotate", "a new root of trust: published, acknowledged by everyone, then it signs; what the old one signed is replaced")
	began, before := time.Now(), s.pods[1].handshakes()
	if _, err := s.c.Admin(ctx, "bundle", "rotate", "--taint", "--watch"); err != nil {
		return err
	}
	s.say("old root revoked", "after %.1f s, nothing was left under it; %d handshakes in the meantime", time.Since(began).Seconds(), s.pods[1].handshakes()-before)
	return nil
}

// killLeader is the worst that can happen to a cluster of three, and returns how long there was no leader.
func (s *stage) killLeader(ctx context.Context) (time.Duration, error) {
	leader := s.c.Leader(ctx)
	if leader == nil {
		return 0, errors.New("the cluster has no leader")
	}
	before := s.pods[1].handshakes()
	leader.Kill()
	killed := time.Now()
	s.say("kill -9", "the leader, %s (pid %d)", leader.Name, leader.PID())
	for {
		if next := s.c.Leader(ctx); next != nil && next != leader {
			took := time.Since(killed)
			s.say("new leader", "%s, seen after %.1f s; %d handshakes in the meantime", next.Name, took.Seconds(), s.pods[1].handshakes()-before)
			return took, nil
		}
		if time.Since(killed) > 20*time.Second {
			return 0, errors.New("no new leader within 20 s")
		}
		select {
		case <-ctx.Done():
			return 0, ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// until lets the pods talk for a while and fails as soon as one of the processes ends.
func (s *stage) until(ctx context.Context, d time.Duration, what string) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-s.pods[0].Done():
		return fmt.Errorf("%s: the backend ended", what)
	case <-s.pods[1].Done():
		return fmt.Errorf("%s: the frontend ended", what)
	case <-s.c.Agents[0].Done():
		return fmt.Errorf("%s: the agent ended", what)
	case <-t.C:
		return nil
	}
}

func (s *stage) sum(failover time.Duration) error {
	ok, failed := s.pods[1].handshakes(), s.pods[1].failures()
	fmt.Printf("\n  handshakes          %d, failed %d\n", ok, failed)
	for _, p := range s.pods {
		fmt.Printf("  rotations           %s: %d, each with a new key\n", p.name, p.rotations())
	}
	fmt.Printf("  leader lost         new one seen after %.1f s\n", failover.Seconds())
	switch {
	case failed > 0:
		return fmt.Errorf("%d handshakes failed, none should", failed)
	case ok < 100:
		return fmt.Errorf("only %d handshakes", ok)
	case s.pods[0].rotations() < 2 || s.pods[1].rotations() < 2:
		return errors.New("fewer than two rotations were seen")
	}
	fmt.Println("\nAll well: no handshake failed, through every rotation, a new root of trust, and the leader's death.")
	return nil
}

// keep leaves the stage standing until the person has seen enough.
func (s *stage) keep(ctx context.Context) {
	live := s.c.Members[0]
	for _, m := range s.c.Members {
		if !m.Exited() {
			live = m
			break
		}
	}
	bin := s.c.Bin
	fmt.Printf(`
Everything is still running (KEEP=1). In another terminal:

  export COUNTERSIGN_ADMIN_SOCKET=%s
  %s/countersign status
  %s/countersign agent list
  %s/countersign entry create -s k8s:sa:frontend --id spiffe://%s/web --dns web.shop.svc

  export SPIFFE_ENDPOINT_SOCKET=%s COUNTERSIGN_DEV_POD=%s
  %s/countersign-agent fetch x509
  %s/countersign-agent watch

Interrupt (Ctrl-C) to end it all and clean up.
`, live.Socket, bin, bin, bin, trustDomain, s.c.Agents[0].Endpoint(), filepath.Join(s.c.Dir, "tokens", "frontend"), bin, bin)
	<-ctx.Done()
}

// logs prints the end of every log when the demo failed.
func (s *stage) logs() {
	files, _ := filepath.Glob(filepath.Join(s.c.Dir, "*", "log"))
	for _, f := range files {
		data, err := os.ReadFile(f)
		if err != nil {
			continue
		}
		lines := strings.Split(strings.TrimSpace(string(data)), "\n")
		fmt.Fprintf(os.Stderr, "\n--- %s\n%s\n", f, strings.Join(lines[max(0, len(lines)-15):], "\n"))
	}
}

func moduleRoot() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", fmt.Errorf("finding the project: %w", err)
	}
	for ; dir != "/"; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
	}
	return "", errors.New("run the demo inside the project's folder")
}
