package server

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/metadata"

	adminv1 "countersign.io/countersign/api/admin/v1"
	"countersign.io/countersign/identity"
)

// This file decides what a remote admin may do. The power is looked up at each call, by the SPIFFE ID, in what this member knows
// now: an entry that is deleted ends it, whatever SVIDs are still valid. What a method needs is in ruleFor; what a message adds to
// that is in demand.

// powerLook is how often a stream looks whether its admin still has the power that it needs.
const powerLook = time.Second

// power is the role that a remote admin's SVID gives now, by an entry or by this member's configuration; empty: none.
func (s *Server) power(c caller) identity.AdminRole {
	role, now := s.cfg.AdminRoles[c.id], s.cfg.Now()
	for _, e := range s.cfg.State.AdminEntries(c.id.String()) {
		if !e.Expired(now) && e.Empowers(c.issued.Add(backdate)) {
			role = role.Higher(e.Power())
		}
	}
	// The roots of an upstream are in the bundle: whoever else signs below them could sign an admin's name.
	if role != "" && !s.issuedHere(c) {
		return ""
	}
	return role
}

// IsAdmin reports whether an identity has any role now, for ListenConfig.Admin.
func (s *Server) IsAdmin(id spiffeid.ID) bool {
	return s.cfg.AdminRoles[id] != "" || s.entryPower(id) != ""
}

// entryPower is the role that entries give to an identity now.
func (s *Server) entryPower(id spiffeid.ID) (role identity.AdminRole) {
	now := s.cfg.Now()
	for _, e := range s.cfg.State.AdminEntries(id.String()) {
		if !e.Expired(now) {
			role = role.Higher(e.Power())
		}
	}
	return role
}

// remoteAdmin says why an SVID on a connection for admins may not do what needs a role; nil if it may.
func (s *Server) remoteAdmin(who caller, method string, need identity.AdminRole) error {
	if now := s.cfg.Now(); !now.Before(who.expires) {
		return fmt.Errorf("%w: the SVID that this connection was made with expired at %s: connect anew with a renewed one", identity.ErrUnauthenticated, who.expires.UTC().Format(time.RFC3339))
	}
	// A member that is cut off may not have heard that somebody is an admin no longer.
	if stale := s.cfg.Cluster.Staleness(); stale > s.cfg.MaxStaleness {
		return fmt.Errorf("%w: this member has not heard from a leader for longer than max_staleness (%v), so it cannot tell who is an admin: ask another member, or this one by its admin socket", identity.ErrUnavailable, s.cfg.MaxStaleness)
	}
	have := s.power(who)
	switch {
	case have == "" && s.IsAdmin(who.id) && !s.issuedHere(who):
		return fmt.Errorf("%w: the certificate of %s was not issued by a member of this cluster under an authority that it vouches for", identity.ErrDenied, who.id)
	case have == "" && s.entryPower(who.id) != "":
		return fmt.Errorf("%w: the SVID that this connection was made with is of %s, from before %s was made an admin: get a new one", identity.ErrDenied, who.issued.Add(backdate).UTC().Format(time.RFC3339), who.id)
	case have == "":
		return fmt.Errorf("%w: %s is no admin: no entry gives it a role (countersign entry create --admin-role ... --id %s), nor does admin.ids of this member", identity.ErrDenied, who.id, who.id)
	case !have.Includes(need):
		return fmt.Errorf("%w: %s needs the role %s, and %s has the role %s", identity.ErrDenied, method, need, who.id, have)
	}
	return nil
}

// demand is the second half of authorize for a remote admin, once the message is known: what it asks for may need more than its
// method does, and a change needs the power as of now on any member, not as of when this one last heard.
func (s *Server) demand(ctx context.Context, a *audited, method string, req any) error {
	c := callOf(ctx)
	if c.kind != remote {
		return nil
	}
	if m := a.rule.mode; m == auditChange || m == auditWalk {
		if err := s.cfg.Cluster.ReadBarrier(ctx); err != nil {
			return fmt.Errorf("asking the leader who is an admin: %w", err)
		}
	}
	need, why := c.rule.role, ""
	if more, reason := s.demandOf(req); more != "" {
		need, why = need.Higher(more), reason
	}
	err := s.remoteAdmin(c.caller, method, need)
	if err != nil && why != "" {
		a.about(req)
		return fmt.Errorf("%w (%s)", err, why)
	}
	return err
}

// about tells of a refused change what it was about, as attempt would have.
func (a *audited) about(req any) {
	if a.rule.on != nil && req != nil {
		a.subjects = a.rule.on(req)
	}
	if a.rule.with != nil && req != nil {
		a.details = a.rule.with(req)
	}
}

// demandOf is the role that a message needs beyond its method's, and why: else who decides which workload gets which identity
// could give himself one that decides more.
func (s *Server) demandOf(req any) (need identity.AdminRole, why string) {
	switch r := req.(type) {
	case *adminv1.CreateTokenRequest:
		if r.Purpose != identity.JoinAgent {
			return identity.AdminSecurity, "the token admits a member, which can open the seal"
		}
	case *adminv1.Entry:
		if r.Admin || r.AdminRole != "" || r.Downstream {
			return identity.AdminSecurity, "the entry makes an admin, or an authority"
		}
		if s.guarded(r.SpiffeId) {
			return identity.AdminSecurity, r.SpiffeId + " is the ID of an admin, or of a cluster below"
		}
		if e, ok := s.cfg.State.Entry(r.Id); ok && powerful(e) {
			return identity.AdminSecurity, "the entry makes an admin, or an authority"
		}
	case *adminv1.NameRequest: // of whatever it is the name: no entry has a kube cluster's, an agent's or a member's
		if e, ok := s.cfg.State.Entry(r.Name); ok && powerful(e) {
			return identity.AdminSecurity, "the entry makes an admin, or an authority"
		}
	case *adminv1.MintX509Request:
		if s.guarded(r.SpiffeId) {
			return identity.AdminSecurity, r.SpiffeId + " is the ID of an admin, or of a cluster below"
		}
	case *adminv1.MintJWTRequest:
		if s.guarded(r.SpiffeId) {
			return identity.AdminSecurity, r.SpiffeId + " is the ID of an admin, or of a cluster below"
		}
	}
	return "", ""
}

func powerful(e *identity.Entry) bool { return e.Power() != "" || e.Downstream }

// guarded reports whether somebody with this ID may do more than a workload. An expired entry guards its ID until it is swept.
func (s *Server) guarded(raw string) bool {
	id, err := spiffeid.FromString(raw)
	if err != nil {
		return false // a template, which gives no such ID (see mayGive), or nonsense, which is refused
	}
	if s.cfg.AdminRoles[id] != "" || len(s.cfg.State.AdminEntries(id.String())) > 0 {
		return true
	}
	if s.cfg.Outside == nil {
		return false
	}
	_, ok := s.cfg.Outside.Downstream(id.String())
	return ok
}

// mayGive refuses an entry that would give an admin's ID without being meant to: no template leads there, and no entry of less power.
func (s *Server) mayGive(e *identity.Entry, id spiffeid.ID) error {
	if role := s.entryPower(id); role != "" && !e.Power().Includes(role) {
		return fmt.Errorf("%w: %s is the ID of an admin (%s), which only an admin entry of that role gives", identity.ErrDenied, id, role)
	}
	if s.cfg.AdminRoles[id] != "" && e.ManagedBy != "" {
		return fmt.Errorf("%w: %s is in admin.ids of this member, and no managed entry (%s) gives it", identity.ErrDenied, id, e.ManagedBy)
	}
	if s.cfg.AdminRoles[id] != "" && e.SPIFFEID != id.String() {
		return fmt.Errorf("%w: %s is in admin.ids of this member: only an entry that spells it out gives it, and no template", identity.ErrDenied, id)
	}
	return nil
}

// whilePowerful runs a stream of a remote admin and ends it once the SVID, or the power, has ended.
func (s *Server) whilePowerful(ctx context.Context, who caller, method string, run func(context.Context) error) error {
	ctx, end := context.WithCancelCause(ctx)
	defer end(nil)
	need := callOf(ctx).rule.role
	go func() {
		tick := time.NewTicker(powerLook)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			if err := s.remoteAdmin(who, method, need); err != nil {
				end(err)
				return
			}
		}
	}()
	err := run(ctx)
	// A Send that waits for the client's window ends with the connection, at the latest by its keepalive.
	if cause := context.Cause(ctx); err != nil && cause != nil && cause != ctx.Err() {
		return cause
	}
	return err
}

// checkAdmins wants IDs that can be workloads'.
func (c *Config) checkAdmins() error {
	for id, role := range c.AdminRoles {
		if _, err := identity.ParseWorkloadID(c.TrustDomain, id.String()); err != nil {
			return fmt.Errorf("an admin by configuration: %w", err)
		}
		if _, err := identity.ParseAdminRole(string(role)); err != nil {
			return fmt.Errorf("admin %s: %w", id, err)
		}
	}
	return nil
}

// adminsHashBytes is how long an AdminsHash is.
const adminsHashBytes = 32

// AdminsHash tells configured admins from others, and nothing else about them; empty for none.
func AdminsHash(roles map[spiffeid.ID]identity.AdminRole) string {
	if len(roles) == 0 {
		return ""
	}
	var all []string
	for id, role := range roles {
		all = append(all, id.String()+" "+string(role)+"\n")
	}
	slices.Sort(all)
	sum := sha256.Sum256([]byte(strings.Join(all, "")))
	return hex.EncodeToString(sum[:adminsHashBytes/2])
}

// wantsStale reports whether the caller asked for what this member knows, without a leader.
func wantsStale(ctx context.Context) bool {
	md, ok := metadata.FromIncomingContext(ctx)
	if !ok {
		return false
	}
	v := md.Get(MetadataStale)
	return len(v) == 1 && v[0] == "true"
}
