package server

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"countersign.io/countersign/audit"
	"countersign.io/countersign/ca"
	"countersign.io/countersign/identity"
)

const (
	sweepEvery = time.Minute
	careEvery  = 2 * time.Second
	retryFirst = 100 * time.Millisecond
	retryMost  = 5 * time.Second
)

// RunLeader does what one member does for all, until ctx ends. It is to be called while this member leads; two
// that run it for a moment do no harm.
func (s *Server) RunLeader(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { s.care(ctx) })
	if s.cfg.Sealing.on() {
		wg.Go(func() { s.leadSeal(ctx) })
	}
	if s.cfg.Federation.on() {
		wg.Go(func() { s.leadFederation(ctx) })
	}
	if s.cfg.Home.API != nil {
		wg.Go(func() { s.leadHome(ctx) })
	}
	wg.Go(func() { _ = s.runUpstream(ctx) }) // it has no errors of its own
	wg.Go(func() { s.leadRotations(ctx) })
	for wait := retryFirst; ; wait = min(2*wait, retryMost) {
		err := s.ensureAuthorities(ctx)
		if err == nil {
			break
		}
		if ctx.Err() != nil {
			return nil
		}
		s.cfg.Log.Warn("cannot make the trust domain's authorities: trying again", "error", err)
		if !sleep(ctx, wait) {
			return nil
		}
	}
	for {
		if err := s.cfg.Writes.Sweep(ctx, s.cfg.Now()); err != nil && ctx.Err() == nil {
			s.cfg.Log.Warn("cannot sweep what has expired: trying again", "error", err)
		}
		if !sleep(ctx, sweepEvery) {
			return nil
		}
	}
}

// care keeps what the members share about themselves true.
func (s *Server) care(ctx context.Context) {
	for {
		s.registerMembers(ctx)
		s.endKeysBelow(ctx)
		if err := s.raiseLevel(ctx); err != nil && ctx.Err() == nil {
			s.cfg.Log.Warn("cannot raise the cluster's level: trying again", "error", err)
		}
		if !sleep(ctx, careEvery) {
			return
		}
	}
}

// registerMembers tells the agents where the members are: the first one, which nobody admitted, one that moved, and one whose
// admission broke off in the middle; and who is a member no longer.
func (s *Server) registerMembers(ctx context.Context) {
	known := map[string]string{}
	for _, m := range s.cfg.State.Members() {
		known[m.ID] = m.Address
	}
	for _, m := range s.cfg.Cluster.Members() {
		if known[m.ID] == m.Address {
			continue
		}
		if err := s.cfg.Writes.PutMember(ctx, identity.Member{ID: m.ID, Address: m.Address}); err != nil && ctx.Err() == nil {
			s.cfg.Log.Warn("cannot register a member: trying again", "member", m.ID, "error", err)
		}
	}
	// Asked for only now: who joins is one of the members before it is on the list.
	members := s.cfg.Cluster.Members()
	for id := range known {
		if len(members) == 0 || slices.ContainsFunc(members, func(m MemberStatus) bool { return m.ID == id }) {
			continue
		}
		if err := s.forgetMember(ctx, id); err != nil && ctx.Err() == nil {
			s.cfg.Log.Warn("cannot take a removed member off the list: trying again", "member", id, "error", err)
		}
	}
}

// endKeysBelow gives the JWT keys of a cluster whose downstream entry is gone no more time than a token has that was signed before:
// an operator who deletes the entry does not mean to trust it for a year.
func (s *Server) endKeysBelow(ctx context.Context) {
	if s.cfg.Outside == nil || s.cfg.Authorities == nil {
		return
	}
	now := s.cfg.Now()
	end := now.Add(identity.MaxJWTTL).UTC().Truncate(time.Second)
	for _, f := range s.cfg.Outside.Foreign() {
		e, ok := s.cfg.Outside.Downstream(f.Source)
		if f.Source == identity.SourceUpstream || ok && !e.Expired(now) {
			continue
		}
		short := identity.Foreign{Source: f.Source, JWT: slices.Clone(f.JWT)}
		late := false
		for i := range short.JWT {
			if k := &short.JWT[i]; k.NotAfter.After(end) {
				k.NotAfter, late = end, true
			}
		}
		if !late {
			continue
		}
		if err := s.cfg.Authorities.PutForeign(ctx, short); err == nil {
			s.cfg.Log.Info("no entry marks a cluster as downstream any longer: its JWT keys leave the bundle soon", "cluster", f.Source, "not_after", end)
		} else if ctx.Err() == nil {
			s.cfg.Log.Warn("cannot end the JWT keys of a cluster below: trying again", "cluster", f.Source, "error", err)
		}
	}
}

// raiseLevel lets the members propose what all of them know. It never goes down again: what is in the log cannot be taken back.
func (s *Server) raiseLevel(ctx context.Context) error {
	if s.cfg.State.Level() >= s.cfg.Level {
		return nil
	}
	all, err := s.cfg.Cluster.Health(ctx)
	if err != nil {
		return err
	}
	level := s.cfg.Level
	for _, h := range all {
		info, err := ParseMemberInfo(h.Info)
		if err != nil || !h.Reachable {
			return nil // nobody knows what it knows
		}
		level = min(level, info.Level)
	}
	// Who joined while the others were asked was not asked; who joins from here on is told no by Join, which looks twice.
	unasked := func(m MemberStatus) bool {
		return !slices.ContainsFunc(all, func(h MemberHealth) bool { return h.ID == m.ID })
	}
	if level <= s.cfg.State.Level() || slices.ContainsFunc(s.cfg.Cluster.Members(), unasked) {
		return nil
	}
	if err := s.cfg.Writes.SetLevel(ctx, level); err != nil {
		return err
	}
	s.cfg.Log.Info("every member knows what this version does: older versions can no longer join", "level", level)
	return nil
}

// ensureAuthorities makes the first authority of each kind. A crash, or the loss of leadership, between making and
// proposing leaves nothing: the key was in memory only. One that was proposed twice exists once: the state
// keeps the first.
func (s *Server) ensureAuthorities(ctx context.Context) error {
	for _, kind := range []identity.AuthorityKind{identity.AuthorityX509, identity.AuthorityJWT} {
		if s.hasActive(kind) || kind == identity.AuthorityX509 && s.cfg.Upstream != nil {
			continue // one below an upstream is runUpstream's
		}
		a, err := s.makeAuthority(ctx, kind)
		if err != nil {
			return fmt.Errorf("making the %s authority: %w", kind, err)
		}
		// The outcome is recorded by every member, as a change of the bundle.
		if err := s.audit(ctx, audit.Event{
			Action: audit.AuthorityCreate, Outcome: audit.Attempted, Subjects: []string{string(kind) + " " + a.ID}, NotAfter: a.NotAfter,
		}); err != nil {
			return fmt.Errorf("recording the %s authority: %w", kind, err)
		}
		kept, err := s.cfg.Writes.CreateAuthority(ctx, a)
		if err != nil {
			return fmt.Errorf("proposing the %s authority: %w", kind, err)
		}
		if kept.ID == a.ID {
			s.cfg.Log.Info("made an authority", "kind", kind, "authority", a.ID, "not_after", a.NotAfter)
		}
	}
	return nil
}

func (s *Server) hasActive(kind identity.AuthorityKind) bool {
	for _, a := range s.cfg.State.Authorities() {
		if a.Kind == kind && a.State == identity.AuthorityActive {
			return true
		}
	}
	return false
}

// makeAuthority returns an authority whose key leaves this function sealed only, or is in a KMS or HSM and has never been here.
func (s *Server) makeAuthority(ctx context.Context, kind identity.AuthorityKind) (identity.Authority, error) {
	var a identity.Authority
	var key []byte
	var err error
	if kind == identity.AuthorityX509 && s.cfg.X509Key != nil {
		signer, uri, err := s.cfg.X509Key(ctx)
		if err != nil {
			return identity.Authority{}, err
		}
		return ca.NewX509AuthorityAt(s.cfg.TrustDomain, signer, uri, s.cfg.AuthorityTTL, s.cfg.Now())
	}
	if kind == identity.AuthorityX509 {
		a, key, err = ca.NewX509Authority(s.cfg.TrustDomain, s.cfg.AuthorityTTL, s.cfg.Now())
	} else {
		a, key, err = ca.NewJWTAuthority(s.cfg.JWTAlgorithm, s.cfg.AuthorityTTL, s.cfg.Now())
	}
	if err != nil {
		return identity.Authority{}, err
	}
	defer clear(key)
	a.SealedKey, err = s.cfg.Seal(key, identity.AuthorityAD(s.cfg.TrustDomain, a.Kind, a.ID))
	if err != nil {
		return identity.Authority{}, fmt.Errorf("sealing its key: %w", err)
	}
	return a, nil
}

// sleep reports whether ctx lasted.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
