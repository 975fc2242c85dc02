package main

import (
	"context"
	"net"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc"

	adminv1 "countersign.io/countersign/api/admin/v1"
	"countersign.io/countersign/cmd/internal/cli"
)

// naming is a member that has one of each thing.
type naming struct {
	adminv1.UnimplementedAdminServer
}

func (naming) ListEntries(context.Context, *adminv1.ListRequest) (*adminv1.ListEntriesResponse, error) {
	return &adminv1.ListEntriesResponse{Entries: []*adminv1.Entry{{Id: "ENTRY1", SpiffeId: "spiffe://example.org/web"}}}, nil
}

func (naming) ListAgents(context.Context, *adminv1.ListRequest) (*adminv1.ListAgentsResponse, error) {
	return &adminv1.ListAgentsResponse{Agents: []*adminv1.Agent{{Id: "spiffe://example.org/countersign/agent/join/a1"}}}, nil
}

func (naming) ListKubeClusters(context.Context, *adminv1.ListRequest) (*adminv1.ListKubeClustersResponse, error) {
	return &adminv1.ListKubeClustersResponse{KubeClusters: []*adminv1.KubeCluster{{Name: "prod"}}}, nil
}

func (naming) Status(context.Context, *adminv1.Empty) (*adminv1.StatusResponse, error) {
	return &adminv1.StatusResponse{Members: []*adminv1.StatusResponse_MemberStatus{{Id: "ca-1", Voter: true}}}, nil
}

// The shell offers what the live cluster has.
func TestCompletionAsksTheCluster(t *testing.T) {
	sock := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	adminv1.RegisterAdminServer(s, naming{})
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	defer func() {
		s.Stop()
		<-done
	}()
	for line, want := range map[string]string{
		"entry show": "ENTRY1\tspiffe://example.org/web", "entry update": "ENTRY1", "entry delete": "ENTRY1",
		"agent show": "agent/join/a1", "agent ban": "agent/join/a1", "agent evict": "agent/join/a1",
		"kube delete": "prod", "kube add": "prod", "cluster remove": "ca-1\tfollower", "cluster transfer-leader": "ca-1",
	} {
		args := append([]string{"__complete"}, strings.Fields(line)...)
		code, out, _ := command(append(args, "--socket", sock, "")...)
		if code != cli.ExitOK || !strings.Contains(out, want) {
			t.Errorf("%s: exit code %d: %q is not in %q", line, code, want, out)
		}
		// One name is all it takes.
		if code, out, _ := command(append(args, "--socket", sock, "x", "")...); code != cli.ExitOK || strings.Contains(out, want) {
			t.Errorf("%s x: exit code %d: %q", line, code, out)
		}
	}
}

// Nobody at the prompt waits for a member that does not answer, or reads an error.
func TestCompletionDoesNotWait(t *testing.T) {
	sock := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for _, path := range []string{sock, sock + ".none"} {
		code, out, _ := command("__complete", "entry", "show", "--timeout", "10m", "--socket", path, "")
		if code != cli.ExitOK || strings.TrimSpace(out) != ":4" {
			t.Errorf("exit code %d: %q", code, out)
		}
	}
}
