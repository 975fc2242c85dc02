package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"google.golang.org/grpc"

	adminv1 "countersign.io/countersign/api/admin/v1"
	workloadv1 "countersign.io/countersign/api/workload/v1"
	"countersign.io/countersign/integration/cluster"
	"countersign.io/countersign/integration/issuer"
)

const (
	trustDomain = "bench.test"
	kubeCluster = "bench"
	// agentAccount is whose pods may be node agents, in the fleet.
	agentNamespace, agentAccount = "kube-system", "countersign-agent"
)

// stage is a cluster of three members with a made-up kube cluster registered, and what is kept for more than one measurement.
type stage struct {
	*bench
	c      *cluster.Cluster
	iss    *issuer.Issuer
	agent  *cluster.Agent        // see nodeAgent
	admins []adminv1.AdminClient // of each member, in order
	undo   []func()
}

func newStage(ctx context.Context, b *bench, yaml string) (_ *stage, err error) {
	dir := filepath.Join(b.dir, fmt.Sprint(b.stages))
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, fmt.Errorf("making a folder: %w", err)
	}
	s := &stage{bench: b, c: &cluster.Cluster{Dir: dir, Bin: b.bin, TrustDomain: trustDomain, ServerYAML: yaml}}
	defer func() {
		if err != nil {
			s.logs()
			s.close()
		}
	}()
	for range 3 {
		m, err := s.c.StartMember(ctx)
		if err != nil {
			return nil, err
		}
		conn, stop, err := m.AdminConn()
		if err != nil {
			return nil, err
		}
		s.admins, s.undo = append(s.admins, conn), append(s.undo, stop)
	}
	if err := s.c.AllVote(ctx); err != nil {
		return nil, err
	}
	if s.iss, err = issuer.New(dir); err != nil {
		return nil, err
	}
	_, err = s.c.Admin(ctx, "kube", "add", kubeCluster, "--issuer", s.iss.URL, "--jwks-file", s.iss.JWKSFile, "--agent-account", agentNamespace+"/"+agentAccount)
	return s, err
}

func (s *stage) close() {
	for _, f := range s.undo {
		f()
	}
	s.c.Close()
}

// logs shows the end of every log, for a measurement that failed.
func (s *stage) logs() {
	files, _ := filepath.Glob(filepath.Join(s.c.Dir, "*", "log"))
	for _, f := range files {
		data, err := os.ReadFile(f)
		if err != nil || len(data) == 0 {
			continue
		}
		lines := strings.Split(strings.TrimSpace(string(data)), "\n")
		fmt.Fprintf(s.stderr, "--- %s\n%s\n", f, strings.Join(lines[max(0, len(lines)-8):], "\n"))
	}
}

// leader is the index of the leader among the members.
func (s *stage) leader(ctx context.Context) (int, error) {
	l := s.c.Leader(ctx)
	for i, m := range s.c.Members {
		if m == l {
			return i, nil
		}
	}
	return 0, errors.New("the cluster has no leader")
}

// nodeAgent is one real node agent, which lets processes play pods.
func (s *stage) nodeAgent(ctx context.Context) (*cluster.Agent, error) {
	if s.agent != nil {
		return s.agent, nil
	}
	var err error
	s.agent, err = s.c.StartAgent(ctx, kubeCluster+"/node-1", "--insecure-dev-pods", s.iss.Tokens)
	return s.agent, err
}

// ownSelectors are selectors of this process on any agent that joined by token.
func ownSelectors() []string {
	return []string{fmt.Sprintf("unix:uid:%d", os.Getuid()), "agent:kind:join_token"}
}

// create makes an entry at a member and returns its ID.
func (s *stage) create(ctx context.Context, member int, path string, selectors ...string) (string, error) {
	e, err := s.admins[member].CreateEntry(ctx, &adminv1.Entry{Selectors: selectors, SpiffeId: "spiffe://" + trustDomain + path})
	if err != nil {
		return "", fmt.Errorf("creating an entry at %s: %w", s.c.Members[member].Name, err)
	}
	return e.Id, nil
}

func (s *stage) remove(ctx context.Context, member int, id string) error {
	if _, err := s.admins[member].DeleteEntry(ctx, &adminv1.NameRequest{Name: id}); err != nil {
		return fmt.Errorf("deleting an entry at %s: %w", s.c.Members[member].Name, err)
	}
	return nil
}

// pods makes up n pods of node-1 and returns their tokens.
func (s *stage) pods(n int) ([]string, error) {
	out := make([]string, n)
	for i := range out {
		var err error
		if out[i], err = s.iss.Token("shop", "web", "node-1"); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// callers are n connections to one member as agents of node-1, each its own: what one agent may ask for is limited.
func (s *stage) callers(ctx context.Context, member, n int) ([]workloadv1.WorkloadClient, func(), error) {
	var conns []*grpc.ClientConn
	stop := func() {
		for _, c := range conns {
			c.Close()
		}
	}
	var out []workloadv1.WorkloadClient
	for range n {
		cl, err := s.c.NewClient(ctx, kubeCluster+"/node-1")
		if err != nil {
			stop()
			return nil, nil, err
		}
		conn, err := cl.Dial(s.c.Members[member].Address)
		if err != nil {
			stop()
			return nil, nil, err
		}
		conns = append(conns, conn)
		out = append(out, workloadv1.NewWorkloadClient(conn))
	}
	return out, stop, nil
}

func (s *stage) memberPIDs() []int {
	var out []int
	for _, m := range s.c.Members {
		out = append(out, m.PID())
	}
	return out
}
