package server

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"countersign.io/countersign/audit"
	"countersign.io/countersign/ca"
	"countersign.io/countersign/identity"
)

// Rotating is how authorities are replaced, as far as it is replicated; nil parts: they are not.
type Rotating struct {
	// Rotations returns the one of each kind that is under way, or was the last.
	Rotations func() []identity.Rotation
	Writes    RotationWriter
	// Manual: nothing is rotated by itself.
	Manual bool
}

// RotationWriter changes authorities that sign no longer, and rotations. See Writes. Only from level 2 on.
type RotationWriter interface {
	// TaintAuthority must forget what vouches for other authorities if this one is compromised.
	TaintAuthority(ctx context.Context, now time.Time, kind identity.AuthorityKind, id string, spread time.Duration, compromised bool) error
	// RevokeAuthority must refuse with identity.ErrPrecondition for an authority that signs.
	RevokeAuthority(ctx context.Context, now time.Time, kind identity.AuthorityKind, id string) error
	// PutRotation must refuse with identity.ErrPrecondition unless the kind's rotation has the revision ifRevision or, for 0, none
	// is under way.
	PutRotation(ctx context.Context, now time.Time, r identity.Rotation, ifRevision uint64) (identity.Rotation, error)
}

const (
	rotateLook = time.Second // while one is under way; changes of the state wake the loop
	rotateIdle = time.Minute // else: whether one is due
	// What a rotation waits for acknowledgements, unless it is told.
	defaultAckDeadline = 24 * time.Hour
	// The same where the old authority is compromised: whoever is connected answers at once.
	hastyAckDeadline = 10 * time.Second
	// How long what a compromised authority signed is trusted, unless it is told.
	hastyUseDeadline = time.Hour
	// A scheduled rotation prepares at half of the authority's life and activates at five sixths.
	dueNumerator, dueDenominator = 5, 6
	// pauseAfter is the part of an authority's life for which none is scheduled after one has ended.
	pauseAfter = 12
	// replaceRate is how many SVIDs a second each member is to replace, of those that a tainted authority signed.
	replaceRate = 300
	maxSpread   = 10 * time.Minute
)

// rotations is what the leader remembers: why the next step failed.
type rotations struct {
	wake chan struct{} // has an element when the leader's loop is to look

	mu      sync.Mutex
	problem map[identity.AuthorityKind]string
	waits   map[identity.AuthorityKind]string // for whom, in words; empty: for nobody
	whole   map[identity.AuthorityKind]whole
}

// whole is since when everyone has acknowledged an authority, as far as this member looked.
type whole struct {
	authority string
	since     time.Time
}

// complete notes whether everyone has acknowledged an authority, and says since when they have.
func (r *rotations) complete(a *identity.Authority, all bool, now time.Time) time.Time {
	r.mu.Lock()
	defer r.mu.Unlock()
	was := r.whole[a.Kind]
	switch {
	case !all:
		delete(r.whole, a.Kind)
		return time.Time{}
	case was.authority == a.ID && !was.since.After(now):
		return was.since
	}
	r.whole[a.Kind] = whole{a.ID, now}
	return now
}

func (r *rotations) poke() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// say notes what keeps a rotation from its next step, empty if nothing does; it reports whether that was not known before.
func (r *rotations) say(kind identity.AuthorityKind, problem string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	was := r.problem[kind]
	r.problem[kind] = problem
	return problem != "" && was != problem
}

func (r *rotations) said(kind identity.AuthorityKind) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.problem[kind]
}

// wait notes whom a rotation waits for.
func (r *rotations) wait(kind identity.AuthorityKind, g gate) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.waits[kind] = ""
	if !g.open() {
		first := g.waiting[0]
		r.waits[kind] = fmt.Sprintf("%d of %d, such as %s (%s)", len(g.waiting), g.total, first.name, first.because)
	}
}

// longWait, and the longest life of what an authority signs, is how long a phase may take before somebody should look at it.
const longWait = 2 * time.Hour

// waitsLong says, on the leader, which rotations have waited for long, and for whom.
func (s *Server) waitsLong() []string {
	if !s.rotates() {
		return nil
	}
	var out []string
	now := s.cfg.Now()
	s.rotations.mu.Lock()
	defer s.rotations.mu.Unlock()
	for _, r := range s.cfg.Rotating.Rotations() {
		since := r.PhaseAt
		if r.NotBefore.After(since) {
			since = r.NotBefore
		}
		if waits := s.rotations.waits[r.Kind]; !r.Ended() && waits != "" && now.Sub(since) > longWait+s.longestTTL(r.Kind) {
			out = append(out, fmt.Sprintf("the rotation of the %s authority has waited in phase %s since %s for %s: countersign bundle status names them, countersign bundle change --ignore goes on without one",
				r.Kind, r.Phase, since.UTC().Format(time.RFC3339), waits))
		}
	}
	return out
}

func (s *Server) rotates() bool {
	return s.cfg.Rotating.Rotations != nil && s.cfg.Rotating.Writes != nil && s.cfg.Authorities != nil
}

// rotation returns the kind's that is under way, or was the last.
func (s *Server) rotation(kind identity.AuthorityKind) (identity.Rotation, bool) {
	if !s.rotates() {
		return identity.Rotation{}, false
	}
	for _, r := range s.cfg.Rotating.Rotations() {
		if r.Kind == kind {
			return r, true
		}
	}
	return identity.Rotation{}, false
}

// rotating reports whether a rotation of the kind is under way.
func (s *Server) rotating(kind identity.AuthorityKind) bool {
	r, ok := s.rotation(kind)
	return ok && !r.Ended()
}

// authority returns one by kind and ID, or, for an empty ID, the only one in the state.
func (s *Server) authority(kind identity.AuthorityKind, id string, state identity.AuthorityState) (*identity.Authority, bool) {
	for _, a := range s.cfg.State.Authorities() {
		if a.Kind == kind && (id == "" && a.State == state || id != "" && a.ID == id) {
			return &a, true
		}
	}
	return nil, false
}

// leadRotations takes rotations on to their end, whoever began them, until ctx ends: this member leads. Each step looks at the
// replicated state alone and may be done twice, so that a leader may die after any of them.
func (s *Server) leadRotations(ctx context.Context) {
	if !s.rotates() {
		return
	}
	defer func() { // what keeps the next leader is not this one's to say
		s.rotations.say(identity.AuthorityX509, "")
		s.rotations.say(identity.AuthorityJWT, "")
		s.rotations.wait(identity.AuthorityX509, gate{})
		s.rotations.wait(identity.AuthorityJWT, gate{})
	}()
	for {
		wait := rotateIdle
		for _, kind := range []identity.AuthorityKind{identity.AuthorityX509, identity.AuthorityJWT} {
			next, err := s.leadRotation(ctx, kind)
			problem := ""
			if err != nil {
				if ctx.Err() != nil {
					return
				}
				next, problem = rotateLook, err.Error()
			}
			if s.rotations.say(kind, problem) {
				s.cfg.Log.Warn("a rotation waits: trying again", "kind", kind, "error", err)
			}
			wait = min(wait, next)
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-s.rotations.wake:
			timer.Stop()
		case <-timer.C:
		}
	}
}

// leadRotation does the next thing, and says when to look again.
func (s *Server) leadRotation(ctx context.Context, kind identity.AuthorityKind) (time.Duration, error) {
	if s.cfg.State.Level() < levelSeal { // what is needed came with it
		return rotateIdle, nil
	}
	r, ok := s.rotation(kind)
	if !ok || r.Ended() {
		return rotateIdle, s.scheduleRotation(ctx, kind)
	}
	// A gate that is open by the state of yesterday is none: this member may have been cut off, and lead no longer.
	if err := s.cfg.Cluster.ReadBarrier(ctx); err != nil {
		return rotateLook, fmt.Errorf("making sure that this member leads: %w", err)
	}
	switch r.Phase {
	case identity.RotationPrepare:
		return rotateLook, s.rotatePrepare(ctx, r)
	case identity.RotationActivate:
		return rotateLook, s.rotateActivate(ctx, r)
	case identity.RotationRevoke:
		return rotateLook, s.rotateRevoke(ctx, r)
	}
	return rotateIdle, nil
}

// scheduleRotation begins a rotation at half of the active authority's life.
func (s *Server) scheduleRotation(ctx context.Context, kind identity.AuthorityKind) error {
	active, ok := s.authority(kind, "", identity.AuthorityActive)
	if !ok || s.cfg.Rotating.Manual || kind == identity.AuthorityX509 && (s.cfg.Upstream != nil || s.cfg.X509Key != nil) {
		return nil // of an upstream, the upstream's loop renews it; in an HSM, an operator has to make room for another key
	}
	life, now := active.NotAfter.Sub(active.NotBefore), s.cfg.Now()
	if now.Before(active.NotBefore.Add(life / 2)) {
		return nil
	}
	// Whoever has just rolled one back had a reason.
	if last, ok := s.rotation(kind); ok && now.Before(last.PhaseAt.Add(life/pauseAfter)) && now.Before(active.NotAfter.Add(-life/10)) {
		return nil
	}
	r := identity.Rotation{
		Kind: kind, Old: active.ID, Phase: identity.RotationPrepare, StartedAt: now, PhaseAt: now,
		Why:       "half of the life of authority " + active.ID + " is over",
		NotBefore: active.NotBefore.Add(life / dueDenominator * dueNumerator),
		// Better not everyone than nobody.
		AckDeadline: max(time.Second, active.NotAfter.Sub(now)-life/20),
	}
	if _, err := s.putRotation(ctx, r, 0); err != nil {
		return fmt.Errorf("beginning the scheduled rotation: %w", err)
	}
	s.rotations.poke()
	return nil
}

// putRotation records and replicates a step.
func (s *Server) putRotation(ctx context.Context, r identity.Rotation, ifRevision uint64) (identity.Rotation, error) {
	if err := s.audit(ctx, rotationEvent(&r)); err != nil {
		return r, err
	}
	r, err := s.cfg.Rotating.Writes.PutRotation(ctx, s.cfg.Now(), r, ifRevision)
	if err == nil {
		s.cfg.Log.Info("rotation", "kind", r.Kind, "phase", r.Phase, "new", r.New, "old", r.Old, "why", r.Why)
	}
	return r, err
}

func rotationEvent(r *identity.Rotation, more ...audit.Detail) audit.Event {
	e := audit.Event{Action: audit.RotationChange, Outcome: audit.Attempted, Subjects: []string{string(r.Kind)}, Details: audit.Details{
		{Key: "phase", Value: string(r.Phase)}, {Key: "new", Value: r.New}, {Key: "old", Value: r.Old}, {Key: "why", Value: r.Why},
	}}
	e.Details = append(e.Details, more...)
	if len(r.Ignore) > 0 {
		e.Details = append(e.Details, audit.Detail{Key: "ignored", Value: strings.Join(r.Ignore[:min(len(r.Ignore), maxNamed)], " ")})
	}
	return e
}

// next moves a rotation on.
func (s *Server) next(ctx context.Context, r identity.Rotation, phase identity.RotationPhase) error {
	rev := r.Revision
	r.Phase, r.PhaseAt = phase, s.cfg.Now()
	_, err := s.putRotation(ctx, r, rev)
	s.rotations.poke()
	return err
}

func (s *Server) rotatePrepare(ctx context.Context, r identity.Rotation) error {
	active, ok := s.authority(r.Kind, "", identity.AuthorityActive)
	if !ok {
		return fmt.Errorf("%w: there is no active %s authority to replace", identity.ErrPrecondition, r.Kind)
	}
	prepared, ok := s.authority(r.Kind, "", identity.AuthorityPrepared)
	if !ok && r.Kind == identity.AuthorityX509 && s.cfg.Upstream != nil {
		s.wakeUpstream() // it sees that one is wanted
		return s.upstreamWhy()
	}
	if !ok {
		if err := s.mayPrepare(r.Kind); err != nil { // whoever began it may have asked a member with another configuration
			return err
		}
		a, err := s.prepareNew(ctx, r.Kind, r.Compromised)
		if err != nil {
			return err
		}
		prepared = &a
	}
	r.New, r.Old = prepared.ID, active.ID
	return s.next(ctx, r, identity.RotationActivate)
}

// prepareNew makes an authority that signs nothing yet. A crash before it is stored leaves nothing: its key was in memory only.
// The active one vouches for it, unless that is compromised.
func (s *Server) prepareNew(ctx context.Context, kind identity.AuthorityKind, compromised bool) (identity.Authority, error) {
	a, err := s.makeAuthority(ctx, kind)
	if err != nil {
		return a, fmt.Errorf("making the %s authority: %w", kind, err)
	}
	a.State = identity.AuthorityPrepared
	if active, ok := s.authority(kind, "", identity.AuthorityActive); ok && kind == identity.AuthorityX509 && len(active.Roots) == 0 && !compromised {
		key, err := s.cfg.Open(*active)
		if err != nil {
			return a, fmt.Errorf("opening the key of authority %s, which is to vouch for the next: %w", active.ID, err)
		}
		if a.Vouched, err = ca.Vouch(active, key, &a, s.cfg.Now()); err != nil {
			return a, err
		}
	}
	// The outcome is recorded by every member, as a change of the bundle.
	if err := s.audit(ctx, audit.Event{
		Action: audit.AuthorityCreate, Outcome: audit.Attempted, Subjects: []string{string(kind) + " " + a.ID}, NotAfter: a.NotAfter,
		Details: audit.Details{{Key: "state", Value: string(a.State)}},
	}); err != nil {
		return a, fmt.Errorf("recording the %s authority: %w", kind, err)
	}
	if a, err = s.cfg.Authorities.PrepareAuthority(ctx, s.cfg.Now(), a); err != nil {
		return a, fmt.Errorf("storing the %s authority: %w", kind, err)
	}
	s.cfg.Log.Info("prepared an authority", "kind", kind, "authority", a.ID, "not_after", a.NotAfter)
	return a, nil
}

// overdue reports whether the phase is past its deadline.
func (s *Server) overdue(r *identity.Rotation, deadline time.Duration) bool {
	return deadline > 0 && !s.cfg.Now().Before(r.PhaseAt.Add(deadline))
}

// pass decides whether a rotation may go on: the gate is open, or it is past its deadline. Who is left behind is on record.
func (s *Server) pass(ctx context.Context, r *identity.Rotation, g gate, deadline time.Duration) (bool, error) {
	left := g.ignoring(r.Ignore)
	s.rotations.wait(r.Kind, left)
	if left.open() && len(left.waiting) == len(g.waiting) {
		return true, nil
	}
	why := "told to ignore them"
	if !left.open() {
		if !s.overdue(r, deadline) {
			return false, nil
		}
		why = fmt.Sprintf("the deadline of %v is past", deadline)
	}
	e := rotationEvent(r, audit.Detail{Key: "without", Value: strings.Join(g.names(), " ")}, audit.Detail{Key: "because", Value: why})
	if err := s.audit(ctx, e); err != nil {
		return false, err
	}
	s.cfg.Log.Warn("a rotation goes on without everyone", "kind", r.Kind, "phase", r.Phase, "without", g.names(), "because", why)
	return true, nil
}

func (s *Server) rotateActivate(ctx context.Context, r identity.Rotation) error {
	fresh, ok := s.authority(r.Kind, r.New, "")
	switch {
	case !ok, fresh.State == identity.AuthorityRevoked:
		return s.next(ctx, r, identity.RotationRolledBack) // by hand, or it ended before it signed
	case fresh.State == identity.AuthorityPrepared:
		if s.cfg.Now().Before(r.NotBefore) {
			return nil
		}
		if ok, err := s.pass(ctx, &r, s.ackGate(ctx, fresh), r.AckDeadline); !ok || err != nil {
			return err
		}
		if err := s.changeState(ctx, fresh, identity.AuthorityActive, func() error {
			return s.cfg.Authorities.ActivateAuthority(ctx, s.cfg.Now(), r.Kind, r.New, false)
		}); err != nil {
			return err
		}
	}
	return s.next(ctx, r, identity.RotationRevoke)
}

// changeState records a step of an authority before it is taken.
func (s *Server) changeState(ctx context.Context, a *identity.Authority, to identity.AuthorityState, write func() error) error {
	err := s.audit(ctx, audit.Event{
		Action: audit.AuthorityChange, Outcome: audit.Attempted, Subjects: []string{string(a.Kind) + " " + a.ID},
		Details: audit.Details{{Key: "from", Value: string(a.State)}, {Key: "to", Value: string(to)}},
	})
	if err == nil {
		err = write()
	}
	if err != nil {
		return fmt.Errorf("making %s authority %s %s: %w", a.Kind, a.ID, to, err)
	}
	s.cfg.Log.Info("authority", "kind", a.Kind, "authority", a.ID, "state", to)
	return nil
}

func (s *Server) rotateRevoke(ctx context.Context, r identity.Rotation) error {
	old, ok := s.authority(r.Kind, r.Old, "")
	switch {
	case !ok, old.State == identity.AuthorityRevoked: // or swept, since it ended by itself
		return s.next(ctx, r, identity.RotationDone)
	case old.State != identity.AuthorityRetiring && old.State != identity.AuthorityTainted:
		return fmt.Errorf("%w: authority %s is to be revoked and is %s: roll back, or activate another", identity.ErrPrecondition, old.ID, old.State)
	}
	g := s.useGate(ctx, old)
	if r.Taint && old.State == identity.AuthorityRetiring {
		spread := s.spreadOf(g)
		if err := s.changeState(ctx, old, identity.AuthorityTainted, func() error {
			return s.cfg.Rotating.Writes.TaintAuthority(ctx, s.cfg.Now(), r.Kind, r.Old, spread, r.Compromised)
		}); err != nil {
			return err
		}
		s.rotations.poke()
		return nil
	}
	if ok, err := s.pass(ctx, &r, g, r.UseDeadline); !ok || err != nil {
		return err
	}
	if err := s.changeState(ctx, old, identity.AuthorityRevoked, func() error {
		return s.cfg.Rotating.Writes.RevokeAuthority(ctx, s.cfg.Now(), r.Kind, r.Old)
	}); err != nil {
		return err
	}
	return s.next(ctx, r, identity.RotationDone)
}

// spreadOf is how long the replacing of so many SVIDs is to take.
func (s *Server) spreadOf(g gate) time.Duration {
	members := max(1, len(s.cfg.State.Members()))
	d := time.Duration(float64(g.svids) / float64(replaceRate*members) * float64(time.Second))
	return min(max(d, time.Second), maxSpread).Round(time.Millisecond)
}

// merged is a set of names, sorted.
func merged(a, b []string) []string {
	out := append(slices.Clone(a), b...)
	slices.Sort(out)
	return slices.Compact(out)
}
