package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"

	"countersign.io/countersign/api"
	adminv1 "countersign.io/countersign/api/admin/v1"
	"countersign.io/countersign/controller"
	"countersign.io/countersign/identity"
)

// controlStart is all that a controller has to ask before it works. What is to be asked next fails with the first of its faults.
type controlStart struct {
	adminv1.AdminClient
	faults map[string][]error
	asked  []string
}

func (s *controlStart) ask(what string) error {
	s.asked = append(s.asked, what)
	if left := s.faults[what]; len(left) > 0 {
		s.faults[what] = left[1:]
		return left[0]
	}
	return nil
}

func (s *controlStart) Status(context.Context, *adminv1.Empty, ...grpc.CallOption) (*adminv1.StatusResponse, error) {
	return &adminv1.StatusResponse{TrustDomain: "example.org"}, api.ToStatus(s.ask("status"))
}

func (s *controlStart) ListKubeClusters(_ context.Context, req *adminv1.ListRequest, _ ...grpc.CallOption) (*adminv1.ListKubeClustersResponse, error) {
	if req.PageToken == "" {
		return &adminv1.ListKubeClustersResponse{KubeClusters: []*adminv1.KubeCluster{{Name: "main"}}, NextPageToken: "more"}, api.ToStatus(s.ask("list"))
	}
	return &adminv1.ListKubeClustersResponse{KubeClusters: []*adminv1.KubeCluster{{Name: "edge", Issuer: "https://edge"}}}, nil
}

func (s *controlStart) start(ctx context.Context, cluster string) (log string, err error) {
	var out bytes.Buffer
	cfg := controller.Config{Cluster: cluster, Admin: s, Log: slog.New(slog.NewTextHandler(&out, nil))}
	err = startController(ctx, cfg, func(_ context.Context, k identity.KubeCluster) error {
		if k.Issuer != "https://edge" {
			return fmt.Errorf("%w: it is %v", identity.ErrPrecondition, k)
		}
		return s.ask("same")
	}, func(_ context.Context, cfg controller.Config) error {
		if cfg.TrustDomain.Name() != "example.org" {
			return fmt.Errorf("%w: trust domain %s", identity.ErrInvalid, cfg.TrustDomain)
		}
		return s.ask("run")
	})
	return out.String(), err
}

// TestControllerWaits: whoever cannot be asked at the start is asked again, with a growing pause, and what is waited for is said once. What
// waiting does not mend ends it.
func TestControllerWaits(t *testing.T) {
	away, other := fmt.Errorf("%w: nobody is there", identity.ErrUnavailable), fmt.Errorf("%w: no leader", identity.ErrUnavailable)
	for what, says := range map[string]string{"status": "no member can be asked", "list": "whether this is the API server", "same": "whether this is the API server", "run": "the API server cannot be asked"} {
		t.Run(what, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				began := time.Now()
				s := &controlStart{faults: map[string][]error{what: {away, away, away, other, other}}}
				log, err := s.start(t.Context(), "edge")
				if err != nil || s.asked[len(s.asked)-1] != "run" || len(s.faults[what]) != 0 {
					t.Errorf("asked for %q: %v", s.asked, err)
				}
				if took := time.Since(began); took != (1+2+4+8+16)*controlRetryFirst {
					t.Errorf("it waited for %v", took)
				}
				if n := strings.Count(log, "level=WARN"); n != 2 || strings.Count(log, "nobody is there") != 1 || strings.Count(log, "no leader") != 1 || !strings.Contains(log, says) {
					t.Errorf("%d warnings:\n%s", n, log)
				}
				for _, end := range []error{identity.ErrDenied, identity.ErrUnauthenticated, identity.ErrPrecondition, identity.ErrInvalid} {
					s := &controlStart{faults: map[string][]error{what: {away, end}}}
					if _, err := s.start(t.Context(), "edge"); !errors.Is(err, end) {
						t.Errorf("%v: %v", end, err)
					}
				}
				// Told to end while it waits.
				ctx, cancel := context.WithTimeout(t.Context(), 90*time.Second)
				defer cancel()
				s = &controlStart{faults: map[string][]error{what: {away, away, away, away, away, away, away, away, away, away}}}
				if _, err := s.start(ctx, "edge"); err != nil || ctx.Err() == nil {
					t.Errorf("told to end: %v", err)
				}
			})
		})
	}
	s := &controlStart{}
	if _, err := s.start(t.Context(), "west"); !errors.Is(err, identity.ErrNotFound) || !strings.Contains(err.Error(), "edge, main") {
		t.Errorf("a cluster that nobody knows: %v", err)
	}
}
