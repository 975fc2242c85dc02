package server

import (
	"context"
	"fmt"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"countersign.io/countersign/api"
	adminv1 "countersign.io/countersign/api/admin/v1"
	"countersign.io/countersign/audit"
	"countersign.io/countersign/ca"
	"countersign.io/countersign/identity"
)

// mintService makes SVIDs because an operator says so. It walks as issuance does (issue.go), but for the evidence: prepare, which
// lints; record; sign.
type mintService struct {
	adminv1.UnimplementedMintServer
	*Server
}

// MintX509 signs an X.509-SVID for a key of the caller's.
func (s mintService) MintX509(ctx context.Context, req *adminv1.MintX509Request) (*adminv1.MintX509Response, error) {
	if err := s.Ready(); err != nil {
		return nil, err
	}
	id, err := identity.ParseWorkloadID(s.cfg.TrustDomain, req.SpiffeId)
	if err != nil {
		return nil, err
	}
	if err := checkMintTTL(req.Ttl.AsDuration(), identity.MaxX509TTL); err != nil {
		return nil, err
	}
	key, err := ca.ParsePublicKey(req.PublicKey)
	if err != nil {
		return nil, err
	}
	bundle := s.cfg.State.Bundle() // before the signature: it holds the root of what signs
	p, err := s.cfg.CA.PrepareX509(identity.Issuance{ID: id, PublicKey: key, DNSNames: req.DnsNames, TTL: req.Ttl.AsDuration()})
	if err != nil {
		return nil, err
	}
	e := s.event(ctx, audit.MintX509, audit.OK)
	e.Subjects, e.Revision, e.Serial, e.NotAfter = []string{id.String()}, s.cfg.State.Revision(), p.Serial(), p.NotAfter()
	if len(req.DnsNames) > 0 {
		e.Details = audit.Details{{Key: "dns_names", Value: strings.Join(req.DnsNames, " ")}}
	}
	if err := s.issued.note(p.Authority(), p.NotAfter(), s.cfg.Now()); err != nil {
		return nil, err
	}
	if err := s.cfg.Audit.Record(ctx, e); err != nil {
		return nil, err
	}
	svid, err := p.Issue()
	if err != nil {
		s.failed(e, err)
		return nil, err
	}
	return &adminv1.MintX509Response{Chain: svid.Chain, Bundle: api.BundleToWire(bundle), Serial: p.Serial(), NotAfter: timestamppb.New(svid.NotAfter)}, nil
}

// MintJWT signs a JWT-SVID.
func (s mintService) MintJWT(ctx context.Context, req *adminv1.MintJWTRequest) (*adminv1.MintJWTResponse, error) {
	if err := s.Ready(); err != nil {
		return nil, err
	}
	id, err := identity.ParseWorkloadID(s.cfg.TrustDomain, req.SpiffeId)
	if err != nil {
		return nil, err
	}
	if err := checkAudience(req.Audience); err != nil {
		return nil, err
	}
	if err := checkMintTTL(req.Ttl.AsDuration(), identity.MaxJWTTL); err != nil {
		return nil, err
	}
	p, err := s.cfg.CA.PrepareJWT(id, req.Audience, req.Ttl.AsDuration())
	if err != nil {
		return nil, err
	}
	e := s.event(ctx, audit.MintJWT, audit.OK)
	e.Subjects, e.Revision, e.Audience, e.NotAfter = []string{id.String()}, s.cfg.State.Revision(), req.Audience, p.ExpiresAt()
	e.Details = audit.Details{{Key: "kid", Value: p.KeyID()}}
	if err := s.issued.note(p.KeyID(), p.ExpiresAt(), s.cfg.Now()); err != nil {
		return nil, err
	}
	if err := s.cfg.Audit.Record(ctx, e); err != nil {
		return nil, err
	}
	svid, err := p.Issue()
	if err != nil {
		s.failed(e, err)
		return nil, err
	}
	return &adminv1.MintJWTResponse{Token: svid.Token, ExpiresAt: timestamppb.New(svid.ExpiresAt), KeyId: p.KeyID()}, nil
}

func checkMintTTL(ttl, most time.Duration) error {
	if ttl != 0 && (ttl < identity.MinTTL || ttl > most) {
		return fmt.Errorf("%w: TTL %v: want from %v to %v", identity.ErrInvalid, ttl, identity.MinTTL, most)
	}
	return nil
}
