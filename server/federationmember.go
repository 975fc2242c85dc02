package server

import (
	"context"
	"fmt"
	"time"

	"countersign.io/countersign/api"
	adminv1 "countersign.io/countersign/api/admin/v1"
	memberv1 "countersign.io/countersign/api/member/v1"
	"countersign.io/countersign/identity"
)

// refreshingService tells the other members what the leader alone knows.
type refreshingService struct {
	memberv1.UnimplementedRefreshingServer
	*Server
}

// statesWait is how long a listing waits for the leader's word, before it goes without.
const statesWait = 2 * time.Second

func (s refreshingService) mayAsk(ctx context.Context) error {
	if _, err := s.currentMember(ctx, callOf(ctx).caller); err != nil {
		return err
	}
	if !s.cfg.Federation.on() {
		return errNoFederation
	}
	if _, self, err := s.leader(); err != nil || !self {
		return fmt.Errorf("%w: this member does not lead", identity.ErrUnavailable)
	}
	return nil
}

// State tells all.
func (s refreshingService) State(ctx context.Context, _ *memberv1.RefreshStateRequest) (*memberv1.RefreshStateResponse, error) {
	if err := s.mayAsk(ctx); err != nil {
		return nil, err
	}
	resp := &memberv1.RefreshStateResponse{}
	for _, f := range s.cfg.Federation.Federations() {
		st, ok := s.cfg.Federation.Refresher.Status(f.TrustDomain)
		if !ok {
			continue
		}
		resp.Relationships = append(resp.Relationships, &memberv1.RefreshStateResponse_Relationship{
			TrustDomain: f.TrustDomain, LastAttempt: api.TimeToWire(st.LastAttempt), LastSuccess: api.TimeToWire(st.LastSuccess), NextRefresh: api.TimeToWire(st.NextRefresh),
			Failures: uint32(st.Failures), LastError: st.LastError, Warning: st.Warning,
		})
	}
	return resp, nil
}

// Refresh asks one partner now.
func (s refreshingService) Refresh(ctx context.Context, req *memberv1.RefreshRequest) (*memberv1.RefreshStateResponse, error) {
	if err := s.mayAsk(ctx); err != nil {
		return nil, err
	}
	f := &s.cfg.Federation
	if err := f.Refresher.Refresh(ctx, req.TrustDomain, f.Federations, s.takeFederated); err != nil {
		return nil, err
	}
	return &memberv1.RefreshStateResponse{}, nil
}

// askLeader calls the member that leads, which is another.
func (s *Server) askLeader(ctx context.Context, m MemberStatus, f func(memberv1.RefreshingClient) error) error {
	conn, err := s.cfg.Federation.DialMember(ctx, identity.Member{ID: m.ID, Address: m.Address})
	if err != nil {
		return fmt.Errorf("%w: connecting to member %s: %w", identity.ErrUnavailable, m.ID, err)
	}
	defer conn.Close()
	return api.FromStatus(f(memberv1.NewRefreshingClient(conn)))
}

// refreshStates are by trust domain, from this member if it leads, or from the one that does.
func (s *Server) refreshStates(ctx context.Context) (map[string]*adminv1.RefreshStatus, error) {
	out := map[string]*adminv1.RefreshStatus{}
	m, self, err := s.leader()
	if err != nil {
		return nil, err
	}
	if self {
		for _, f := range s.cfg.Federation.Federations() {
			if st, ok := s.cfg.Federation.Refresher.Status(f.TrustDomain); ok {
				out[f.TrustDomain] = &adminv1.RefreshStatus{
					LastAttempt: api.TimeToWire(st.LastAttempt), LastSuccess: api.TimeToWire(st.LastSuccess), NextRefresh: api.TimeToWire(st.NextRefresh),
					Failures: uint32(st.Failures), LastError: st.LastError, Warning: st.Warning,
				}
			}
		}
		return out, nil
	}
	ctx, cancel := context.WithTimeout(ctx, statesWait)
	defer cancel()
	err = s.askLeader(ctx, m, func(c memberv1.RefreshingClient) error {
		resp, err := c.State(ctx, &memberv1.RefreshStateRequest{})
		for _, r := range resp.GetRelationships() {
			out[r.TrustDomain] = &adminv1.RefreshStatus{
				LastAttempt: r.LastAttempt, LastSuccess: r.LastSuccess, NextRefresh: r.NextRefresh, Failures: r.Failures,
				LastError: r.LastError, Warning: r.Warning,
			}
		}
		return err
	})
	return out, err
}
