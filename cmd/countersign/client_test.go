package main

import (
	"context"
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"countersign.io/countersign/api"
	adminv1 "countersign.io/countersign/api/admin/v1"
	"countersign.io/countersign/identity"
	"countersign.io/countersign/server"
)

// refusing is a member that numbers calls and refuses them.
type refusing struct {
	adminv1.UnimplementedAdminServer
}

func (refusing) GetEntry(ctx context.Context, r *adminv1.NameRequest) (*adminv1.Entry, error) {
	_ = grpc.SetTrailer(ctx, metadata.Pairs(server.RequestIDKey, "abc-7"))
	if r.Name == "there" {
		return &adminv1.Entry{Id: r.Name}, nil
	}
	return nil, api.ToStatus(fmt.Errorf("%w: entry %q", identity.ErrNotFound, r.Name))
}

func (refusing) QueryAudit(_ *adminv1.AuditQuery, s grpc.ServerStreamingServer[adminv1.AuditRecords]) error {
	s.SetTrailer(metadata.Pairs(server.RequestIDKey, "abc-8"))
	return api.ToStatus(fmt.Errorf("%w: the log is away", identity.ErrUnavailable))
}

// What failed can be found in the audit log.
func TestErrorsNameTheRequest(t *testing.T) {
	sock := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	adminv1.RegisterAdminServer(s, refusing{})
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	defer func() {
		s.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	t.Setenv("COUNTERSIGN_ADMIN_SOCKET", sock)
	if code, _, errOut := command("entry", "show", "absent"); code == 0 || !strings.HasSuffix(strings.TrimSpace(errOut), "(request ID abc-7)") || !strings.Contains(errOut, "absent") {
		t.Errorf("exit code %d: %s", code, errOut)
	}
	if code, _, errOut := command("entry", "show", "there"); code != 0 || strings.Contains(errOut, "request ID") {
		t.Errorf("exit code %d: %s", code, errOut)
	}
	if code, _, errOut := command("audit", "tail"); code == 0 || !strings.Contains(errOut, "(request ID abc-8)") || !strings.Contains(errOut, "the log is away") {
		t.Errorf("exit code %d: %s", code, errOut)
	}
	s.Stop()
	if code, _, errOut := command("entry", "show", "there"); code == 0 || strings.Contains(errOut, "request ID") {
		t.Errorf("without a member: exit code %d: %s", code, errOut)
	}
}
