package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	adminv1 "countersign.io/countersign/api/admin/v1"
)

// taint measures what it takes until nothing is under a compromised authority any more: 5,000 callers of one agent hold an SVID
// that would last an hour, each with an open stream.
func (b *bench) taint(ctx context.Context, s *stage) error {
	tokens, err := s.podTokens()
	if err != nil {
		return err
	}
	_, p, done, err := s.runNode(ctx, tokens, "tainted")
	if err != nil {
		return err
	}
	defer done()
	conn, stop, err := s.c.Members[0].Trust()
	if err != nil {
		return err
	}
	defer stop()
	auths, err := s.admins[0].ListAuthorities(ctx, &adminv1.Empty{})
	if err != nil {
		return fmt.Errorf("listing the authorities: %w", err)
	}
	req := &adminv1.RotateRequest{Kind: "x509"}
	for _, a := range auths.Authorities {
		if a.Kind == "x509" && a.State == "active" {
			req.Compromised = a.Id
		}
	}
	before, err := cpu(p.PID())
	if err != nil {
		return err
	}
	began := time.Now()
	if _, err := conn.Rotate(ctx, req); err != nil {
		return fmt.Errorf("beginning: %w", err)
	}
	stream, err := conn.WatchRotation(ctx, &adminv1.RotationRequest{Kind: "x509"})
	if err != nil {
		return fmt.Errorf("watching: %w", err)
	}
	var signs, most time.Duration
	var svids uint64
	for {
		r, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fmt.Errorf("watching: %w", err)
		}
		if r.Phase == "revoke" && signs == 0 {
			signs = time.Since(began)
		}
		svids = max(svids, r.Gate.GetSvids())
		most = time.Since(began)
	}
	if svids < identities/2 { // it is looked at once a second, and the first are replaced by then
		return fmt.Errorf("only %d SVIDs were ever seen under the old authority", svids)
	}
	after, err := cpu(p.PID())
	if err != nil {
		return err
	}
	b.sample("TaintNow5000", identities, most.Seconds(), "s", (most - signs).Seconds(), "replace-s")
	r := b.result("taint")
	r.add(check{got: most.Seconds(), bar: 60, moonshot: 10}, "%.1f s until the old authority is revoked", most.Seconds())
	r.note("the new authority signs after %.1f s, of which 5 are for programs to read the bundle; then %d SVIDs are replaced and the old one is revoked in %.1f s, %.0f a second; the agent took %.1f s of CPU for it, its callers included",
		signs.Seconds(), identities, (most - signs).Seconds(), identities/(most-signs).Seconds(), (after - before).Seconds())
	return nil
}
