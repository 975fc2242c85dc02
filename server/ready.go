package server

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc/health"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"

	"countersign.io/countersign/identity"
)

// Ready says why this member cannot issue now; nil if it can. Every issuing call asks it first.
func (s *Server) Ready() error {
	select {
	case <-s.cfg.Cluster.Removed:
		return fmt.Errorf("%w: this member was removed from the cluster: stop it; to take part again, empty data_dir and join with a new token", identity.ErrUnavailable)
	default:
	}
	if err := s.cfg.CA.Ready(); err != nil {
		if why := s.noAuthority(); why != nil {
			return why
		}
		return fmt.Errorf("%w: this member cannot sign yet: %v", identity.ErrUnavailable, err)
	}
	if err := s.cfg.Audit.Ready(); err != nil {
		return err
	}
	if err := s.unclaimed(); err != nil {
		return err
	}
	if stale := s.cfg.Cluster.Staleness(); stale > s.cfg.MaxStaleness {
		since := "since it started"
		if stale < 365*24*time.Hour {
			since = "for " + stale.Round(time.Second).String()
		}
		return fmt.Errorf("%w: this member has not heard from a leader %s, longer than max_staleness (%v): it may have missed a ban; ask another member", identity.ErrUnavailable, since, s.cfg.MaxStaleness)
	}
	// At a start only: the state is fresh a moment before its watchers have taken up what it holds.
	if !s.caughtUp.Load() {
		if !s.verifierCurrent() {
			return fmt.Errorf("%w: this member is taking up the kube clusters: try again, or another member", identity.ErrUnavailable)
		}
		s.caughtUp.Store(true)
	}
	return nil
}

// noLeader reports whether a write failed for want of somebody to decide.
func noLeader(err error) bool {
	return errors.Is(err, identity.ErrUnavailable) || errors.Is(err, context.DeadlineExceeded)
}

// healthService is the standard gRPC health service; serving means that this member can issue.
type healthService struct {
	*health.Server
	refresh func()
}

// Check answers with the state of this moment.
func (h healthService) Check(ctx context.Context, req *healthv1.HealthCheckRequest) (*healthv1.HealthCheckResponse, error) {
	h.refresh()
	return h.Server.Check(ctx, req)
}

func (s *Server) refreshHealth() {
	st := healthv1.HealthCheckResponse_SERVING
	if s.Ready() != nil {
		st = healthv1.HealthCheckResponse_NOT_SERVING
	}
	s.health.SetServingStatus("", st)
}

// watchReady keeps the health service's watchers informed, and sends the agents elsewhere when this member can no
// longer tell them what changes.
func (s *Server) watchReady(ctx context.Context) error {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	var was error
	for first := true; ; first = false {
		s.refreshHealth()
		err := s.Ready()
		switch {
		case err != nil && (was == nil || first):
			s.cfg.Log.Warn("this member does not issue", "error", err)
		case err == nil && (was != nil || first):
			s.cfg.Log.Info("this member issues")
		}
		if err != nil { // every time: streams may have come in while this was not looking
			s.hub.endAll(err, false)
		}
		was = err
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}
