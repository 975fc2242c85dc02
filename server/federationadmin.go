package server

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strconv"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/types/known/durationpb"

	"countersign.io/countersign/api"
	adminv1 "countersign.io/countersign/api/admin/v1"
	memberv1 "countersign.io/countersign/api/member/v1"
	"countersign.io/countersign/audit"
	"countersign.io/countersign/identity"
)

// federationService serves operators. Whoever reaches it is one: see rules.go.
type federationService struct {
	adminv1.UnimplementedFederationServer
	*Server
}

// CreateFederation makes a relationship.
func (s federationService) CreateFederation(ctx context.Context, req *adminv1.PutFederationRequest) (*adminv1.FederationRelationship, error) {
	if req.Revision != 0 {
		return nil, fmt.Errorf("%w: a revision is for an update", identity.ErrInvalid)
	}
	return s.put(ctx, req, false)
}

// UpdateFederation replaces all that a relationship says; its bundle only where another one is given.
func (s federationService) UpdateFederation(ctx context.Context, req *adminv1.PutFederationRequest) (*adminv1.FederationRelationship, error) {
	return s.put(ctx, req, true)
}

func (s federationService) put(ctx context.Context, req *adminv1.PutFederationRequest, replace bool) (*adminv1.FederationRelationship, error) {
	c := &s.cfg.Federation
	if !c.on() {
		return nil, errNoFederation
	}
	f, err := s.relationship(req)
	if err != nil {
		return nil, err
	}
	old, there := s.find(f.TrustDomain)
	switch {
	case there && !replace:
		return nil, fmt.Errorf("%w: federation with %q: update it, or delete it first", identity.ErrExists, f.TrustDomain)
	case !there && replace:
		return nil, fmt.Errorf("%w: no federation with %q", identity.ErrNotFound, f.TrustDomain)
	case there && req.Revision != 0 && req.Revision != old.Revision:
		return nil, fmt.Errorf("%w: the federation with %q is at revision %d, not %d: somebody changed it meanwhile; read it again", identity.ErrPrecondition, f.TrustDomain, old.Revision, req.Revision)
	case f.Profile == identity.ProfileSPIFFE && f.Bundle == nil && (old.Bundle == nil || len(old.Bundle.X509) == 0):
		return nil, fmt.Errorf("%w: profile %s needs the partner's bundle as it is now, to know its endpoint by: pin it (--bundle-file), or use its invite (countersign federation accept)", identity.ErrInvalid, identity.ProfileSPIFFE)
	}
	f.ManagedBy = cmp.Or(f.ManagedBy, old.ManagedBy) // who does not say by whom it is managed does not mean that it is no longer
	if req.DryRun {
		if f.Bundle == nil {
			f.Bundle = old.Bundle
		} else {
			b := *f.Bundle
			b.Pinned, b.TakenAt = true, s.cfg.Now()
			f.Bundle = &b
		}
		f.CreatedAt, f.Revision = old.CreatedAt, old.Revision
		return s.relationshipToWire(&f, true), nil
	}
	kept, err := c.Writes.PutFederation(ctx, s.cfg.Now(), f, replace, req.Revision)
	if err != nil {
		return nil, fmt.Errorf("federating with %q: %w", f.TrustDomain, err)
	}
	s.cfg.Log.Info("federation put", "trust_domain", kept.TrustDomain, "url", identity.RedactURL(kept.URL), "profile", kept.Profile, "endpoint_id", kept.EndpointID, "pinned", f.Bundle != nil)
	return s.relationshipToWire(&kept, true), nil
}

// relationship checks what is asked for.
func (s *Server) relationship(req *adminv1.PutFederationRequest) (identity.Federation, error) {
	f := identity.Federation{TrustDomain: req.TrustDomain, URL: req.Url, Profile: req.Profile, EndpointID: req.EndpointId, ManagedBy: req.ManagedBy}
	if err := identity.CheckFederation(s.cfg.TrustDomain, &f); err != nil {
		return f, err
	}
	if req.Bundle == nil {
		return f, nil
	}
	b, err := api.BundleFromWire(req.Bundle)
	if err != nil {
		return f, err
	}
	if b.TrustDomain.Name() != f.TrustDomain {
		return f, fmt.Errorf("%w: the bundle is of trust domain %q, not %q: bundles of different trust domains are never mixed", identity.ErrInvalid, b.TrustDomain.Name(), f.TrustDomain)
	}
	if len(b.X509) == 0 && f.Profile == identity.ProfileSPIFFE {
		return f, fmt.Errorf("%w: the bundle has no X.509 authority to know the endpoint by", identity.ErrInvalid)
	}
	f.Bundle = &identity.FederatedBundle{Sequence: b.Sequence, RefreshHint: b.RefreshHint, X509: b.X509, JWT: b.JWT}
	return f, s.checkNobodyElses(f.TrustDomain, f.Bundle)
}

func (s *Server) find(td string) (identity.Federation, bool) {
	all := s.cfg.Federation.Federations()
	i := slices.IndexFunc(all, func(f identity.Federation) bool { return f.TrustDomain == td })
	if i < 0 {
		return identity.Federation{}, false
	}
	return all[i], true
}

// DeleteFederation ends a relationship: its bundle is gone from every agent at once.
func (s federationService) DeleteFederation(ctx context.Context, req *adminv1.DeleteFederationRequest) (*adminv1.DeleteFederationResponse, error) {
	c := &s.cfg.Federation
	if !c.on() {
		return nil, errNoFederation
	}
	if _, ok := s.find(req.TrustDomain); !ok {
		return nil, fmt.Errorf("%w: no federation with %q", identity.ErrNotFound, req.TrustDomain)
	}
	resp := &adminv1.DeleteFederationResponse{Entries: s.entriesWith(req.TrustDomain)}
	if req.DryRun {
		return resp, nil
	}
	if err := c.Writes.DeleteFederation(ctx, req.TrustDomain); err != nil {
		return nil, fmt.Errorf("ending the federation with %q: %w", req.TrustDomain, err)
	}
	s.cfg.Log.Info("federation deleted", "trust_domain", req.TrustDomain, "entries", resp.Entries)
	return resp, nil
}

// entriesWith counts the entries that federate with a trust domain.
func (s *Server) entriesWith(td string) (n uint32) {
	for after := ""; ; {
		var page []*identity.Entry
		page, after = s.cfg.State.Entries(after, maxPage)
		for _, e := range page {
			if slices.Contains(e.FederatesWith, td) {
				n++
			}
		}
		if after == "" {
			return n
		}
	}
}

// ListFederations lists all: there are few.
func (s federationService) ListFederations(ctx context.Context, _ *adminv1.Empty) (*adminv1.ListFederationsResponse, error) {
	if !s.cfg.Federation.on() {
		return nil, errNoFederation
	}
	known, err := s.refreshStates(ctx)
	resp := &adminv1.ListFederationsResponse{}
	for _, f := range s.cfg.Federation.Federations() {
		r := s.relationshipToWire(&f, false)
		withStatus(r, known, err)
		resp.Federations = append(resp.Federations, r)
	}
	return resp, nil
}

// GetFederation tells all of one.
func (s federationService) GetFederation(ctx context.Context, req *adminv1.NameRequest) (*adminv1.FederationRelationship, error) {
	if !s.cfg.Federation.on() {
		return nil, errNoFederation
	}
	f, ok := s.find(req.Name)
	if !ok {
		return nil, fmt.Errorf("%w: no federation with %q", identity.ErrNotFound, req.Name)
	}
	r := s.relationshipToWire(&f, true)
	r.Entries = s.entriesWith(f.TrustDomain)
	known, err := s.refreshStates(ctx)
	withStatus(r, known, err)
	return r, nil
}

func withStatus(r *adminv1.FederationRelationship, known map[string]*adminv1.RefreshStatus, err error) {
	switch st := known[r.TrustDomain]; {
	case err != nil:
		r.StatusUnknownBecause = "asking the member that leads: " + infoText(err.Error())
	case st != nil:
		r.Status = st
	default:
		r.StatusUnknownBecause = "the member that leads has not asked it yet"
	}
}

// RefreshFederation has the member that leads ask the partner now.
func (s federationService) RefreshFederation(ctx context.Context, req *adminv1.NameRequest) (*adminv1.FederationRelationship, error) {
	c := &s.cfg.Federation
	if !c.on() {
		return nil, errNoFederation
	}
	if _, ok := s.find(req.Name); !ok {
		return nil, fmt.Errorf("%w: no federation with %q", identity.ErrNotFound, req.Name)
	}
	m, self, err := s.leader()
	if err != nil {
		return nil, err
	}
	if self {
		err = c.Refresher.Refresh(ctx, req.Name, c.Federations, s.takeFederated)
	} else {
		err = s.askLeader(ctx, m, func(c memberv1.RefreshingClient) error {
			_, err := c.Refresh(ctx, &memberv1.RefreshRequest{TrustDomain: req.Name})
			return err
		})
	}
	if err != nil {
		return nil, fmt.Errorf("refreshing the bundle of %q: %w", req.Name, err)
	}
	// What the leader wrote is to be seen here.
	if err := s.cfg.Cluster.ReadBarrier(ctx); err != nil {
		return nil, err
	}
	return s.GetFederation(ctx, req)
}

// DescribeEndpoint says what a partner needs to know of us.
func (s federationService) DescribeEndpoint(_ context.Context, req *adminv1.DescribeEndpointRequest) (*adminv1.BundleEndpoint, error) {
	profile := req.Profile
	all := s.cfg.Federation.Endpoints
	for _, p := range []string{identity.ProfileSPIFFE, identity.ProfileWeb} {
		if profile == "" && slices.ContainsFunc(all, func(e Endpoint) bool { return e.Profile == p }) {
			profile = p
		}
	}
	i := slices.IndexFunc(all, func(e Endpoint) bool { return e.Profile == profile })
	switch {
	case len(all) == 0:
		return nil, fmt.Errorf("%w: this member does not serve the bundle: set public.listen and public.url on every member", identity.ErrPrecondition)
	case i < 0:
		return nil, fmt.Errorf("%w: this member does not serve the bundle by profile %q: it serves %s", identity.ErrPrecondition, infoText(profile), all[0].Profile)
	}
	b := s.cfg.State.Bundle()
	if b.Sequence == 0 {
		return nil, fmt.Errorf("%w: the trust domain has no bundle yet: try again in a moment", identity.ErrUnavailable)
	}
	out := &adminv1.BundleEndpoint{TrustDomain: s.cfg.TrustDomain.Name(), Url: all[i].URL, Profile: profile, Bundle: api.BundleToWire(b)}
	out.Bundle.RefreshHintSeconds = int64(s.cfg.Federation.RefreshHint.Seconds())
	if profile == identity.ProfileSPIFFE {
		id, err := identity.BundleEndpointID(s.cfg.TrustDomain)
		if err != nil {
			return nil, err
		}
		out.EndpointId = id.String()
	}
	return out, nil
}

func (s *Server) relationshipToWire(f *identity.Federation, whole bool) *adminv1.FederationRelationship {
	out := &adminv1.FederationRelationship{
		TrustDomain: f.TrustDomain, Url: f.URL, Profile: f.Profile, EndpointId: f.EndpointID, CreatedAt: api.TimeToWire(f.CreatedAt), Revision: f.Revision, ManagedBy: f.ManagedBy,
	}
	b := f.Bundle
	if b == nil {
		return out
	}
	out.Sequence, out.X509Authorities, out.JwtAuthorities = b.Sequence, uint32(len(b.X509)), uint32(len(b.JWT))
	out.TakenAt, out.Pinned = api.TimeToWire(b.TakenAt), b.Pinned
	if b.RefreshHint > 0 {
		out.RefreshHint = durationpb.New(b.RefreshHint)
	}
	if td, err := spiffeid.TrustDomainFromString(f.TrustDomain); whole && err == nil {
		out.Bundle = api.BundleToWire(b.Bundle(td))
	}
	return out
}

func federationSubject(req any) []string {
	r := req.(interface{ GetTrustDomain() string })
	if td := r.GetTrustDomain(); td != "" {
		return []string{infoText(td)}
	}
	return nil
}

// federationDetails name whom the partner's names will be believed from.
func federationDetails(req any) audit.Details {
	r := req.(*adminv1.PutFederationRequest)
	d := audit.Details{{Key: "url", Value: identity.RedactURL(infoText(r.Url))}, {Key: "profile", Value: infoText(r.Profile)}, {Key: "dry_run", Value: strconv.FormatBool(r.DryRun)}}
	if r.EndpointId != "" {
		d = append(d, audit.Detail{Key: "endpoint_id", Value: infoText(r.EndpointId)})
	}
	if b := r.Bundle; b != nil && len(b.X509Authorities) <= identity.MaxFederatedX509 && len(b.JwtAuthorities) <= identity.MaxFederatedJWT {
		pinned := identity.FederatedBundle{Sequence: b.Sequence, X509: b.X509Authorities, JWT: map[string][]byte{}}
		for _, k := range b.JwtAuthorities {
			pinned.JWT[k.GetKid()] = nil
		}
		d = append(d, bundleDetails(&pinned)...)
	}
	return d
}
