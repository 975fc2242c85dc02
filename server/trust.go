package server

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"countersign.io/countersign/api"
	adminv1 "countersign.io/countersign/api/admin/v1"
	"countersign.io/countersign/audit"
	"countersign.io/countersign/identity"
)

// trustService is what operators do with authorities. What it begins, the leader carries out: rotate.go.
type trustService struct {
	adminv1.UnimplementedTrustServer
	*Server
}

func kindOf(name string) (identity.AuthorityKind, error) {
	switch kind := identity.AuthorityKind(name); kind {
	case identity.AuthorityX509, identity.AuthorityJWT:
		return kind, nil
	}
	return "", fmt.Errorf("%w: kind %q: want %s or %s", identity.ErrInvalid, infoText(name), identity.AuthorityX509, identity.AuthorityJWT)
}

// ready says why this member changes no authorities.
func (s trustService) ready(ctx context.Context) error {
	if !s.rotates() {
		return fmt.Errorf("%w: this member changes no authorities", identity.ErrPrecondition)
	}
	if s.cfg.State.Level() < levelSeal {
		return fmt.Errorf("%w: authorities cannot be changed until every member runs this version: countersign cluster status shows versions", identity.ErrPrecondition)
	}
	// What is decided here is decided on all that was acknowledged.
	if err := s.cfg.Cluster.ReadBarrier(ctx); err != nil {
		return fmt.Errorf("asking the leader whether this member knows all: %w", err)
	}
	return nil
}

func checkIgnore(names []string) error {
	if len(names) > identity.MaxIgnored {
		return fmt.Errorf("%w: %d names to ignore: at the most %d", identity.ErrInvalid, len(names), identity.MaxIgnored)
	}
	for _, n := range names {
		if n == "" || len(n) > 2048 {
			return fmt.Errorf("%w: a name to ignore of %d bytes: want the SPIFFE ID of an agent or of a cluster below, or a member's name", identity.ErrInvalid, len(n))
		}
	}
	return nil
}

// deadlineOr is what was asked for, or the default where nothing was.
func deadlineOr(asked *durationpb.Duration, otherwise time.Duration) (time.Duration, error) {
	if asked == nil {
		return otherwise, nil
	}
	if err := asked.CheckValid(); err != nil || asked.AsDuration() < 0 {
		return 0, fmt.Errorf("%w: a deadline of %v: want 0, which is none, or more", identity.ErrInvalid, asked.AsDuration())
	}
	return asked.AsDuration(), nil
}

// Rotate begins a rotation.
func (s trustService) Rotate(ctx context.Context, req *adminv1.RotateRequest) (*adminv1.Rotation, error) {
	kind, err := kindOf(req.Kind)
	if err != nil {
		return nil, err
	}
	r := identity.Rotation{Kind: kind, Phase: identity.RotationPrepare, Taint: req.Taint || req.Compromised != "", Compromised: req.Compromised != "", Ignore: merged(req.Ignore, nil), Why: "by " + callOf(ctx).name()}
	ack, use := defaultAckDeadline, time.Duration(0)
	if req.Compromised != "" {
		ack, use = hastyAckDeadline, hastyUseDeadline
		r.Why = "authority " + req.Compromised + " is compromised, says " + callOf(ctx).name()
	}
	var err1, err2 error
	r.AckDeadline, err1 = deadlineOr(req.AckDeadline, ack)
	r.UseDeadline, err2 = deadlineOr(req.UseDeadline, use)
	if err := errors.Join(err1, err2, checkIgnore(req.Ignore), s.ready(ctx)); err != nil {
		return nil, err
	}
	active, ok := s.authority(kind, "", identity.AuthorityActive)
	if !ok {
		return nil, fmt.Errorf("%w: there is no active %s authority to replace yet: try again", identity.ErrUnavailable, kind)
	}
	r.Old = active.ID
	if req.Compromised != "" && req.Compromised != active.ID {
		return nil, fmt.Errorf("%w: the active %s authority is %s and not %s: of one that signs no longer, countersign authority taint is enough", identity.ErrPrecondition, kind, active.ID, req.Compromised)
	}
	if old, ok := s.rotation(kind); ok && !old.Ended() {
		if req.Compromised != "" && old.Phase == identity.RotationRevoke {
			// What signs is compromised, and nobody waits for those who still use the one before: that one stays trusted, and retiring.
			if err := s.mayPrepare(kind); err != nil {
				return nil, err
			}
			r.StartedAt, r.PhaseAt = s.cfg.Now(), s.cfg.Now()
			r.Why += "; authority " + old.Old + ", which was being replaced, is left to be revoked by hand (countersign bundle revoke)"
			return s.begin(ctx, r, old.Revision, req.DryRun)
		}
		if req.Compromised == "" {
			return nil, fmt.Errorf("%w: a rotation of the %s authority is under way since %s (phase %s): countersign bundle status shows it", identity.ErrPrecondition, kind, old.StartedAt.UTC().Format(time.RFC3339), old.Phase)
		}
		// It is hurried: what it has prepared is as good as what another one would prepare.
		hurried := old
		hurried.Compromised = true
		hurried.Why, hurried.Taint, hurried.AckDeadline, hurried.UseDeadline, hurried.NotBefore = r.Why, true, r.AckDeadline, r.UseDeadline, time.Time{}
		hurried.Ignore, hurried.PhaseAt = merged(old.Ignore, r.Ignore), s.cfg.Now()
		return s.begin(ctx, hurried, old.Revision, req.DryRun)
	}
	if err := s.mayPrepare(kind); err != nil {
		return nil, err
	}
	now := s.cfg.Now()
	r.StartedAt, r.PhaseAt = now, now
	return s.begin(ctx, r, 0, req.DryRun)
}

// mayPrepare says why no other authority can be made.
func (s *Server) mayPrepare(kind identity.AuthorityKind) error {
	if kind != identity.AuthorityX509 || s.cfg.X509Key == nil || s.cfg.Upstream != nil {
		return nil
	}
	active, ok := s.authority(kind, "", identity.AuthorityActive)
	if ok && s.cfg.NewX509Key != nil && s.cfg.NewX509Key(active.KeyURI) {
		return nil
	}
	return fmt.Errorf("%w: the authority's key is at ca.key, and another needs another key: on every member, move what ca.key names to ca.old_keys, name a new key in ca.key, and restart it; then rotate", identity.ErrPrecondition)
}

func (s trustService) begin(ctx context.Context, r identity.Rotation, ifRevision uint64, dry bool) (*adminv1.Rotation, error) {
	if err := r.Check(); err != nil {
		return nil, err
	}
	if dry {
		out := s.rotationToWire(ctx, r)
		out.DryRun = true
		return out, nil
	}
	r, err := s.putRotation(ctx, r, ifRevision)
	if err != nil {
		return nil, err
	}
	return s.rotationToWire(ctx, r), nil
}

// rotationToWire says how a rotation stands, and whom it waits for.
func (s *Server) rotationToWire(ctx context.Context, r identity.Rotation) *adminv1.Rotation {
	out := &adminv1.Rotation{
		Kind: string(r.Kind), Phase: string(r.Phase), NewAuthority: r.New, OldAuthority: r.Old, Why: r.Why, StartedAt: api.TimeToWire(r.StartedAt),
		PhaseAt: api.TimeToWire(r.PhaseAt), NotBefore: api.TimeToWire(r.NotBefore), Ignore: r.Ignore, Taint: r.Taint, Problem: s.rotations.said(r.Kind),
	}
	var d time.Duration
	switch r.Phase {
	case identity.RotationActivate:
		d = r.AckDeadline
		if a, ok := s.authority(r.Kind, r.New, ""); ok && a.State == identity.AuthorityPrepared {
			out.Gate = s.shown.of(&r, func() gate { return s.ackGate(ctx, a) })
		}
	case identity.RotationRevoke:
		d = r.UseDeadline
		if a, ok := s.authority(r.Kind, r.Old, ""); ok && (a.State == identity.AuthorityRetiring || a.State == identity.AuthorityTainted) {
			out.Gate = s.shown.of(&r, func() gate { return s.useGate(ctx, a) })
		}
	}
	if d > 0 {
		out.Deadline = api.TimeToWire(r.PhaseAt.Add(d))
	}
	return out
}

// shown is the last gate of each kind that was shown: however many watch, the members are asked once a second.
type shown struct {
	mu   sync.Mutex
	last map[identity.AuthorityKind]shownGate
}

type shownGate struct {
	of string // rotation
	at time.Time
	g  *adminv1.Gate
}

func (s *shown) of(r *identity.Rotation, look func() gate) *adminv1.Gate {
	key := fmt.Sprint(r.Revision, r.Phase, r.Ignore)
	s.mu.Lock()
	defer s.mu.Unlock()
	if last := s.last[r.Kind]; last.of == key && time.Since(last.at) < rotateLook {
		return last.g
	}
	g := look().ignoring(r.Ignore)
	if s.last == nil {
		s.last = map[identity.AuthorityKind]shownGate{}
	}
	s.last[r.Kind] = shownGate{key, time.Now(), g.toWire()}
	return s.last[r.Kind].g
}

func (s trustService) chosen(kind string) ([]identity.Rotation, error) {
	if !s.rotates() {
		return nil, fmt.Errorf("%w: this member changes no authorities", identity.ErrPrecondition)
	}
	all := s.cfg.Rotating.Rotations()
	if kind == "" {
		return all, nil
	}
	k, err := kindOf(kind)
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(slices.Clone(all), func(r identity.Rotation) bool { return r.Kind != k }), nil
}

// GetRotation tells how rotations stand.
func (s trustService) GetRotation(ctx context.Context, req *adminv1.RotationRequest) (*adminv1.RotationList, error) {
	all, err := s.chosen(req.Kind)
	if err != nil {
		return nil, err
	}
	out := &adminv1.RotationList{}
	for _, r := range all {
		out.Rotations = append(out.Rotations, s.rotationToWire(ctx, r))
	}
	return out, nil
}

// WatchRotation tells how a rotation stands until it has ended.
func (s trustService) WatchRotation(req *adminv1.RotationRequest, stream grpc.ServerStreamingServer[adminv1.Rotation]) error {
	ctx := stream.Context()
	if _, err := kindOf(req.Kind); err != nil {
		return err
	}
	var sent *adminv1.Rotation
	for {
		all, err := s.chosen(req.Kind)
		if err != nil {
			return err
		}
		if len(all) == 0 {
			return fmt.Errorf("%w: the %s authority was never rotated", identity.ErrNotFound, req.Kind)
		}
		if now := s.rotationToWire(ctx, all[0]); !proto.Equal(now, sent) {
			if err := stream.Send(now); err != nil {
				return err
			}
			sent = now
		}
		if all[0].Ended() {
			return nil
		}
		select {
		case <-s.stopping:
			return fmt.Errorf("%w: this member is stopping: watch at another", identity.ErrUnavailable)
		default:
		}
		if !sleep(ctx, rotateLook) {
			return ctx.Err()
		}
	}
}

// ChangeRotation sets whom a rotation does not wait for, and until when it waits.
func (s trustService) ChangeRotation(ctx context.Context, req *adminv1.ChangeRotationRequest) (*adminv1.Rotation, error) {
	kind, err := kindOf(req.Kind)
	if err := errors.Join(err, checkIgnore(req.Ignore)); err != nil {
		return nil, err
	}
	if err := s.ready(ctx); err != nil {
		return nil, err
	}
	r, ok := s.rotation(kind)
	if !ok || r.Ended() {
		return nil, fmt.Errorf("%w: no rotation of the %s authority is under way", identity.ErrPrecondition, kind)
	}
	var err1, err2 error
	r.Ignore = merged(r.Ignore, req.Ignore)
	r.AckDeadline, err1 = deadlineOr(req.AckDeadline, r.AckDeadline)
	r.UseDeadline, err2 = deadlineOr(req.UseDeadline, r.UseDeadline)
	if err := errors.Join(err1, err2); err != nil {
		return nil, err
	}
	return s.begin(ctx, r, r.Revision, false)
}

// Rollback undoes a rotation. Before the new authority signs, it is dropped; after that the old one signs again, and the
// new one is revoked as any other that signs no longer.
func (s trustService) Rollback(ctx context.Context, req *adminv1.RollbackRequest) (*adminv1.Rotation, error) {
	kind, err := kindOf(req.Kind)
	if err != nil {
		return nil, err
	}
	if err := s.ready(ctx); err != nil {
		return nil, err
	}
	r, ok := s.rotation(kind)
	if !ok || r.Ended() {
		return nil, fmt.Errorf("%w: no rotation of the %s authority is under way: what is revoked cannot come back, rotate anew instead", identity.ErrPrecondition, kind)
	}
	why := "rolled back by " + callOf(ctx).name()
	fresh, made := s.authority(kind, r.New, "")
	now := s.cfg.Now()
	if r.New == "" || !made || fresh.State == identity.AuthorityPrepared {
		// The authority first: of dropping and activating it only one can be. The leader ends a rotation whose authority is gone.
		if !req.DryRun && made && r.New != "" {
			if err := s.drop(ctx, fresh); err != nil {
				return nil, fmt.Errorf("%w; if it signs by now, roll back again", err)
			}
		}
		back := r
		back.Phase, back.PhaseAt, back.Why = identity.RotationRolledBack, now, why
		out, err := s.begin(ctx, back, r.Revision, req.DryRun)
		if err == nil || s.cfg.Cluster.ReadBarrier(ctx) != nil {
			return out, err
		}
		if now, ok := s.rotation(kind); ok && now.StartedAt.Equal(r.StartedAt) && now.Phase == identity.RotationRolledBack {
			return s.rotationToWire(ctx, now), nil
		}
		return out, err
	}
	old, ok := s.authority(kind, r.Old, "")
	switch {
	case !ok || old.State == identity.AuthorityRevoked:
		return nil, fmt.Errorf("%w: authority %s is revoked: it cannot come back", identity.ErrPrecondition, r.Old)
	case old.State == identity.AuthorityTainted && !req.Force:
		return nil, fmt.Errorf("%w: authority %s is tainted: if it is not compromised, go back to it by --force", identity.ErrPrecondition, r.Old)
	}
	back := identity.Rotation{
		Kind: kind, New: r.Old, Old: r.New, Phase: identity.RotationRevoke, Why: why, StartedAt: now, PhaseAt: now,
		AckDeadline: r.AckDeadline, UseDeadline: r.UseDeadline, Ignore: r.Ignore,
	}
	if req.DryRun {
		return s.begin(ctx, back, r.Revision, true)
	}
	// First the one that signs: should the second write not happen, the leader says that there is nothing to revoke, and rolling
	// back again completes it.
	if old.State != identity.AuthorityActive {
		if err := s.changeState(ctx, old, identity.AuthorityActive, func() error {
			return s.cfg.Authorities.ActivateAuthority(ctx, s.cfg.Now(), kind, r.Old, true)
		}); err != nil {
			return nil, err
		}
	}
	return s.begin(ctx, back, r.Revision, false)
}

func (s *Server) drop(ctx context.Context, a *identity.Authority) error {
	return s.changeState(ctx, a, identity.AuthorityRevoked, func() error {
		return s.cfg.Authorities.DropAuthority(ctx, s.cfg.Now(), a.Kind, a.ID)
	})
}

// name is who calls, for people.
func (c call) name() string {
	if !c.id.IsZero() {
		return c.id.String()
	}
	if c.kind == local {
		return fmt.Sprintf("uid %d", c.uid)
	}
	return c.kind.String()
}

// byHand finds the authority that a step is about, and refuses while a rotation takes care of it.
func (s trustService) byHand(ctx context.Context, req *adminv1.AuthorityRequest, states ...identity.AuthorityState) (*identity.Authority, error) {
	kind, err := kindOf(req.Kind)
	if err := errors.Join(err, checkIgnore(req.Ignore)); err != nil {
		return nil, err
	}
	if len(req.Id) > maxKeyID {
		return nil, fmt.Errorf("%w: an authority's ID of %d bytes", identity.ErrInvalid, len(req.Id))
	}
	if err := s.ready(ctx); err != nil {
		return nil, err
	}
	if s.rotating(kind) {
		return nil, fmt.Errorf("%w: a rotation of the %s authority is under way and takes care of it: wait, or roll it back (countersign bundle rollback --kind %s)", identity.ErrPrecondition, kind, kind)
	}
	var found []identity.Authority
	var known []string
	for _, a := range s.cfg.State.Authorities() {
		if a.Kind != kind {
			continue
		}
		known = append(known, a.ID+" ("+string(a.State)+")")
		if req.Id == a.ID || req.Id == "" && slices.Contains(states, a.State) {
			found = append(found, a)
		}
	}
	switch {
	case len(states) == 0:
		return nil, nil
	case len(found) == 0:
		return nil, fmt.Errorf("%w: no such %s authority to do that with: there are %s", identity.ErrNotFound, kind, strings.Join(known, ", "))
	case len(found) > 1:
		return nil, fmt.Errorf("%w: there are several: name one of %s", identity.ErrInvalid, strings.Join(known, ", "))
	case !slices.Contains(states, found[0].State):
		return nil, fmt.Errorf("%w: authority %s is %s", identity.ErrPrecondition, found[0].ID, found[0].State)
	}
	return &found[0], nil
}

// gated refuses a step while anybody is waited for.
func (s trustService) gated(ctx context.Context, req *adminv1.AuthorityRequest, a *identity.Authority, g gate) error {
	left := g.ignoring(req.Ignore)
	if len(g.waiting) == 0 {
		return nil
	}
	if !left.open() && !req.Force {
		var why []string
		for _, w := range left.waiting[:min(len(left.waiting), 5)] {
			why = append(why, w.name+": "+w.because)
		}
		return fmt.Errorf("%w: authority %s waits for %d of %d: %s; --ignore NAME goes on without one, --force without all", identity.ErrPrecondition, a.ID, len(left.waiting), left.total, strings.Join(why, "; "))
	}
	about(ctx, "", audit.Detail{Key: "without", Value: strings.Join(g.names(), " ")})
	s.cfg.Log.Warn("an authority is changed without everyone", "authority", a.ID, "without", g.names())
	return nil
}

func answer(a *identity.Authority, to identity.AuthorityState, g gate, dry bool) *adminv1.AuthorityResponse {
	return &adminv1.AuthorityResponse{Kind: string(a.Kind), Id: a.ID, State: string(to), Gate: g.toWire(), DryRun: dry}
}

// PrepareAuthority makes an authority that is in the bundle and signs nothing.
func (s trustService) PrepareAuthority(ctx context.Context, req *adminv1.AuthorityRequest) (*adminv1.AuthorityResponse, error) {
	if _, err := s.byHand(ctx, req); err != nil {
		return nil, err
	}
	kind := identity.AuthorityKind(req.Kind)
	if a, ok := s.authority(kind, "", identity.AuthorityPrepared); ok {
		return nil, fmt.Errorf("%w: authority %s is prepared already: activate it, or revoke it first", identity.ErrExists, a.ID)
	}
	if kind == identity.AuthorityX509 && s.cfg.Upstream != nil {
		return nil, fmt.Errorf("%w: the authority is below %s: rotate it (countersign bundle rotate), and the leader asks for another", identity.ErrPrecondition, s.cfg.Upstream)
	}
	if err := s.mayPrepare(kind); err != nil {
		return nil, err
	}
	if req.DryRun {
		return answer(&identity.Authority{Kind: kind}, identity.AuthorityPrepared, gate{}, true), nil
	}
	a, err := s.prepareNew(ctx, kind, false)
	if err != nil {
		return nil, err
	}
	about(ctx, string(kind)+" "+a.ID)
	return answer(&a, identity.AuthorityPrepared, s.ackGate(ctx, &a), false), nil
}

// ActivateAuthority lets a prepared authority sign, once everyone has it.
func (s trustService) ActivateAuthority(ctx context.Context, req *adminv1.AuthorityRequest) (*adminv1.AuthorityResponse, error) {
	a, err := s.byHand(ctx, req, identity.AuthorityPrepared)
	if err != nil {
		return nil, err
	}
	g := s.ackGate(ctx, a)
	if req.DryRun {
		return answer(a, identity.AuthorityActive, g, true), nil
	}
	if err := s.gated(ctx, req, a, g); err != nil {
		return nil, err
	}
	err = s.changeState(ctx, a, identity.AuthorityActive, func() error {
		return s.cfg.Authorities.ActivateAuthority(ctx, s.cfg.Now(), a.Kind, a.ID, false)
	})
	return answer(a, identity.AuthorityActive, gate{}, false), err
}

// TaintAuthority has everything replaced that an authority signed which signs no longer.
func (s trustService) TaintAuthority(ctx context.Context, req *adminv1.AuthorityRequest) (*adminv1.AuthorityResponse, error) {
	kind, err := kindOf(req.Kind)
	if err != nil {
		return nil, err
	}
	// A rotation that waits for what the old one signed may be hurried.
	if r, ok := s.rotation(kind); ok && r.Phase == identity.RotationRevoke && (req.Id == "" || req.Id == r.Old) && !req.DryRun {
		if err := s.ready(ctx); err != nil {
			return nil, err
		}
		hurried := r
		hurried.Taint = true
		if _, err := s.putRotation(ctx, hurried, r.Revision); err != nil {
			return nil, err
		}
		return &adminv1.AuthorityResponse{Kind: req.Kind, Id: r.Old, State: string(identity.AuthorityTainted)}, nil
	}
	a, err := s.byHand(ctx, req, identity.AuthorityRetiring)
	if err != nil {
		return nil, err
	}
	g := s.useGate(ctx, a)
	if req.DryRun {
		return answer(a, identity.AuthorityTainted, g, true), nil
	}
	err = s.changeState(ctx, a, identity.AuthorityTainted, func() error {
		return s.cfg.Rotating.Writes.TaintAuthority(ctx, s.cfg.Now(), a.Kind, a.ID, s.spreadOf(g), false)
	})
	return answer(a, identity.AuthorityTainted, g, false), err
}

// RevokeAuthority takes an authority out of the bundle, once nothing live is under it.
func (s trustService) RevokeAuthority(ctx context.Context, req *adminv1.AuthorityRequest) (*adminv1.AuthorityResponse, error) {
	states := []identity.AuthorityState{identity.AuthorityRetiring, identity.AuthorityTainted}
	if req.Id != "" {
		states = append(states, identity.AuthorityPrepared)
	}
	a, err := s.byHand(ctx, req, states...)
	if err != nil {
		return nil, err
	}
	if a.State == identity.AuthorityPrepared {
		if req.DryRun {
			return answer(a, identity.AuthorityRevoked, gate{}, true), nil
		}
		return answer(a, identity.AuthorityRevoked, gate{}, false), s.drop(ctx, a)
	}
	g := s.useGate(ctx, a)
	if req.DryRun {
		return answer(a, identity.AuthorityRevoked, g, true), nil
	}
	if err := s.gated(ctx, req, a, g); err != nil {
		return nil, err
	}
	err = s.changeState(ctx, a, identity.AuthorityRevoked, func() error {
		return s.cfg.Rotating.Writes.RevokeAuthority(ctx, s.cfg.Now(), a.Kind, a.ID)
	})
	return answer(a, identity.AuthorityRevoked, gate{}, false), err
}
