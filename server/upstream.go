package server

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"countersign.io/countersign/audit"
	"countersign.io/countersign/ca"
	"countersign.io/countersign/identity"
)

// Upstream is the authority above the trust domain's: what signs, and what vouches for what it signed.
type Upstream interface {
	ca.Upstream
	// Follow must call tell with what the upstream vouches for, its roots and, of another Countersign, its JWT keys: at
	// once, whenever that changes, and after an error as soon as it can be had again. With an error it must be called
	// whenever it cannot be had. It returns when ctx ends, or with an error to be called again after a while. keys yields
	// all the JWT keys that this cluster signs with, at first and whenever they change; an upstream that has no use
	// for them need not read it.
	Follow(ctx context.Context, keys <-chan identity.Below, tell func(*identity.Above, error)) error
}

// Outside is what the state knows of the clusters above and below ours.
type Outside interface {
	Foreign() []identity.Foreign
	// DownstreamIDs are the SPIFFE IDs of the entries that are marked downstream.
	DownstreamIDs() []string
	// Downstream returns the entry that is marked downstream and has exactly this SPIFFE ID.
	Downstream(id string) (*identity.Entry, bool)
}

// AuthorityWriter changes the authorities after the first, and what other clusters publish.
type AuthorityWriter interface {
	PrepareAuthority(ctx context.Context, now time.Time, a identity.Authority) (identity.Authority, error)
	// ActivateAuthority must make the active one of the kind a retiring one in the same step. With back, the one to activate must
	// be one that signed before and is not revoked, else a prepared one.
	ActivateAuthority(ctx context.Context, now time.Time, kind identity.AuthorityKind, id string, back bool) error
	DropAuthority(ctx context.Context, now time.Time, kind identity.AuthorityKind, id string) error
	// PutForeign must forget the source where nothing is in it.
	PutForeign(ctx context.Context, f identity.Foreign) error
}

const (
	upstreamRetryFirst = time.Second
	upstreamRetryMost  = time.Minute
	upstreamLook       = 15 * time.Second // at the least; changes of the state wake the loop
	// upstreamKeyLife is how long the JWT keys of the cluster above are good for when it is not heard any longer.
	upstreamKeyLife = 30 * 24 * time.Hour
	// hastyMost is how far apart renewals get that age is not the reason for.
	hastyMost = time.Hour
	// lastMoment before the active authority's end the next one signs, whoever may not know its root yet.
	lastMoment = time.Minute
)

// upstreamHealth is what the leader knows of the upstream; on the others it is empty.
type upstreamHealth struct {
	mu             sync.Mutex
	follow, sign   error
	followed, tell time.Time // when the errors began
}

func (h *upstreamHealth) setFollow(err error, now time.Time) (began bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	began = err != nil && h.follow == nil
	if began {
		h.followed = now
	}
	h.follow = err
	return began
}

func (h *upstreamHealth) setSign(err error, now time.Time) (began bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	began = err != nil && h.sign == nil
	if began {
		h.tell = now
	}
	h.sign = err
	return began
}

// say is what is wrong, for people; nothing if nothing is.
func (h *upstreamHealth) say() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	var out []string
	if h.sign != nil {
		out = append(out, fmt.Sprintf("the upstream has not signed an authority since %s: %v", h.tell.UTC().Format(time.RFC3339), h.sign))
	}
	if h.follow != nil {
		out = append(out, fmt.Sprintf("the upstream has not told its roots since %s: %v", h.followed.UTC().Format(time.RFC3339), h.follow))
	}
	return out
}

// Degraded says what will stop this member from issuing unless somebody sees to it, the most urgent first, and what else of it
// is not as configured. Issuance goes
// on meanwhile: Ready says whether it does.
func (s *Server) Degraded() []string {
	out := s.upstream.say()
	now := s.cfg.Now()
	for _, a := range s.cfg.State.Authorities() {
		if a.State != identity.AuthorityActive {
			continue
		}
		life, left := a.NotAfter.Sub(a.NotBefore), a.NotAfter.Sub(now)
		switch {
		case a.Upstream != "" && left < life/3:
			out = append(out, fmt.Sprintf("the %s authority %s under %s ends at %s and has not been renewed: the leader's log and status say why", a.Kind, a.ID, a.Upstream, a.NotAfter.UTC().Format(time.RFC3339)))
		case a.Upstream == "" && left < life/10:
			out = append(out, fmt.Sprintf("the %s authority %s ends at %s", a.Kind, a.ID, a.NotAfter.UTC().Format(time.RFC3339)))
		}
	}
	out = append(out, s.waitsLong()...)
	out = append(out, s.home.say()...)
	if s.cfg.Degraded != nil {
		out = append(out, s.cfg.Degraded()...)
	}
	return out
}

// upstreamWhy is why the upstream has signed nothing yet, if that is known.
func (s *Server) upstreamWhy() error {
	if said := s.upstream.say(); len(said) > 0 {
		return fmt.Errorf("%w: %s", identity.ErrUnavailable, said[0])
	}
	return nil
}

// noAuthority is why there is nothing to sign with yet, where that is the upstream's matter.
func (s *Server) noAuthority() error {
	if s.cfg.Upstream == nil || s.hasActive(identity.AuthorityX509) {
		return nil
	}
	if said := s.upstream.say(); len(said) > 0 {
		return fmt.Errorf("%w: there is no x509 authority yet: %s", identity.ErrUnavailable, said[0])
	}
	return fmt.Errorf("%w: there is no x509 authority yet: the leader is asking %s to sign one", identity.ErrUnavailable, s.cfg.Upstream)
}

// upstreamLoop is the leader's care for the authority below an upstream. It is born and dies with the leadership: what
// it remembers, another leader finds out anew.
type upstreamLoop struct {
	*Server
	up   Upstream
	made *identity.Authority // signed and not stored yet

	// since is when each root, DER, was first seen in the bundle by this leader. What is below the active authority's
	// roots when it begins is trusted by everyone; of the rest it cannot tell for how long they were there.
	since    map[string]time.Time
	failures int
	hasty    int // renewals before half the life was over
	retryAt  time.Time
	keys     chan identity.Below // of the Follow that runs
	sent     *identity.Below

	acked               uint64 // sequence of the bundle above that everyone here has
	awaited, awaitedOwn uint64 // that they are to have, and the sequence of our own that holds it

	mu   sync.Mutex
	told *identity.Above // by the upstream, not taken up yet; guarded by mu
	now  *identity.Above // what it vouches for, as last told; guarded by mu
}

// runUpstream keeps an x509 authority below the upstream alive, and the bundle as the upstream has it, until ctx ends.
func (s *Server) runUpstream(ctx context.Context) error {
	if s.cfg.Authorities == nil || s.cfg.Outside == nil {
		return nil
	}
	u := &upstreamLoop{Server: s, up: s.cfg.Upstream, since: map[string]time.Time{}}
	if u.up == nil {
		u.forgetUpstream(ctx)
		return nil
	}
	defer func() {
		s.upstream.setFollow(nil, time.Time{})
		s.upstream.setSign(nil, time.Time{})
	}()
	g, ctx := errgroup.WithContext(ctx)
	follow := make(chan chan identity.Below, 1)
	g.Go(func() error { u.follow(ctx, follow); return nil })
	g.Go(func() error {
		for wait := time.Duration(0); ; {
			timer := time.NewTimer(wait)
			select {
			case <-ctx.Done():
				timer.Stop()
				return nil
			case u.keys = <-follow:
				u.sent = nil
			case <-s.upstreamWake:
			case <-timer.C:
			}
			timer.Stop()
			wait = u.step(ctx)
		}
	})
	return g.Wait()
}

// follow calls Follow again and again. Each gets a channel of its own: what the last one did not read is of no use.
func (u *upstreamLoop) follow(ctx context.Context, started chan<- chan identity.Below) {
	for wait := upstreamRetryFirst; ; wait = min(2*wait, upstreamRetryMost) {
		keys := make(chan identity.Below, 1)
		select {
		case started <- keys:
		case <-ctx.Done():
			return
		}
		begun := u.cfg.Now()
		err := u.up.Follow(ctx, keys, u.tell)
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			err = errors.New("it ended by itself")
		}
		u.tell(nil, err)
		if u.cfg.Now().Sub(begun) > upstreamRetryMost {
			wait = upstreamRetryFirst
		}
		if !sleep(ctx, wait) {
			return
		}
	}
}

func (u *upstreamLoop) tell(f *identity.Above, err error) {
	if u.upstream.setFollow(err, u.cfg.Now()) {
		u.cfg.Log.Warn("the upstream does not tell its roots: issuance goes on", "upstream", u.up.String(), "error", err)
	}
	if err != nil || f == nil {
		return
	}
	u.mu.Lock()
	u.told, u.now = f, f
	u.mu.Unlock()
	u.wakeUpstream()
}

func (s *Server) wakeUpstream() {
	select {
	case s.upstreamWake <- struct{}{}:
	default:
	}
}

// step does what is due, and returns the time until something may be due again.
func (u *upstreamLoop) step(ctx context.Context) time.Duration {
	u.takeTold(ctx)
	waits := u.acknowledge(ctx)
	u.tellAbove()
	wait := u.stepOn(ctx)
	if waits {
		wait = min(wait, rotateLook)
	}
	return wait
}

func (u *upstreamLoop) stepOn(ctx context.Context) time.Duration {
	now := u.cfg.Now()
	var active, prepared *identity.Authority
	for _, a := range u.cfg.State.Authorities() {
		switch {
		case a.Kind != identity.AuthorityX509:
		case a.State == identity.AuthorityActive:
			active = &a
		case a.State == identity.AuthorityPrepared:
			prepared = &a
		}
	}
	u.noteRoots(active, now)
	if prepared != nil {
		return u.advance(ctx, active, prepared, now)
	}
	if err := u.followEnd(ctx, active, now); err != nil && ctx.Err() == nil {
		u.cfg.Log.Warn("cannot begin a rotation: trying again", "error", err)
	}
	wanted := false
	if r, ok := u.rotation(identity.AuthorityX509); ok && r.Phase == identity.RotationPrepare {
		wanted = active != nil && active.ID == r.Old
	}
	if active != nil && !wanted && !u.due(active, now) {
		return upstreamLook
	}
	if now.Before(u.retryAt) {
		return min(u.retryAt.Sub(now), upstreamLook)
	}
	if err := u.renew(ctx, active); err != nil {
		if ctx.Err() != nil {
			return upstreamLook
		}
		wait := min(upstreamRetryFirst<<min(u.failures, 10), upstreamRetryMost)
		u.failures++
		u.retryAt = u.cfg.Now().Add(wait)
		if u.upstream.setSign(err, now) {
			u.cfg.Log.Warn("the upstream did not sign an authority: trying again", "upstream", u.up.String(), "error", err)
		}
		return min(wait, upstreamLook)
	}
	u.failures, u.retryAt = 0, time.Time{}
	if active != nil && now.Before(halfLife(active)) {
		// Not its age was the reason. An upstream that signs below another root than it vouches for gives that reason at once again.
		u.hasty++
		u.retryAt = now.Add(min(upstreamRetryFirst<<min(u.hasty, 12), hastyMost))
	}
	u.upstream.setSign(nil, now)
	return 0
}

func halfLife(a *identity.Authority) time.Time {
	return a.NotBefore.Add(a.NotAfter.Sub(a.NotBefore) / 2)
}

// due reports whether the active authority is to be replaced: at half its life, or at once if it is not the
// configured upstream's, or of a root that the upstream has given up.
func (u *upstreamLoop) due(active *identity.Authority, now time.Time) bool {
	if active.Upstream != u.up.String() {
		return true
	}
	u.mu.Lock()
	vouched := u.now
	u.mu.Unlock()
	if vouched != nil && len(vouched.X509) > 0 && !contains(vouched.X509, anchor(active)) {
		return true
	}
	return !now.Before(halfLife(active))
}

// anchor is the root that an authority's chain ends at.
func anchor(a *identity.Authority) []byte {
	if len(a.Roots) > 0 {
		return a.Roots[0]
	}
	return a.Cert
}

func contains(certs [][]byte, der []byte) bool {
	return slices.ContainsFunc(certs, func(c []byte) bool { return bytes.Equal(c, der) })
}

// renew has the upstream sign a new authority, and stores it: the first one as active, the others as prepared. What was
// signed and could not be stored, for want of a majority or of the cluster's level, is kept for the next time.
func (u *upstreamLoop) renew(ctx context.Context, active *identity.Authority) error {
	if u.made != nil && (u.made.NotAfter.Sub(u.cfg.Now()) < u.made.NotAfter.Sub(u.made.NotBefore)/2) {
		u.made = nil
	}
	if u.made == nil {
		ctx, cancel := context.WithTimeout(ctx, attestTime)
		defer cancel()
		a, key, err := ca.NewX509AuthorityUnder(ctx, u.cfg.TrustDomain, u.up, u.cfg.AuthorityTTL, u.cfg.Now)
		if err != nil {
			return err
		}
		defer clear(key)
		if a.SealedKey, err = u.cfg.Seal(key, identity.AuthorityAD(u.cfg.TrustDomain, a.Kind, a.ID)); err != nil {
			return fmt.Errorf("sealing its key: %w", err)
		}
		u.made = &a
	}
	a := *u.made
	// The outcome is recorded by every member, as a change of the bundle.
	err := u.audit(ctx, audit.Event{
		Action: audit.AuthorityCreate, Outcome: audit.Attempted, Subjects: []string{string(a.Kind) + " " + a.ID}, NotAfter: a.NotAfter,
		Details: audit.Details{{Key: "upstream", Value: a.Upstream}},
	})
	if err != nil {
		return fmt.Errorf("recording it: %w", err)
	}
	if active == nil {
		a.State = identity.AuthorityActive
		a, err = u.cfg.Writes.CreateAuthority(ctx, a)
	} else {
		a.State = identity.AuthorityPrepared
		a, err = u.cfg.Authorities.PrepareAuthority(ctx, u.cfg.Now(), a)
	}
	if err != nil {
		return fmt.Errorf("storing what it signed: %w", err)
	}
	u.made = nil
	u.cfg.Log.Info("made an authority under the upstream", "upstream", u.up.String(), "authority", a.ID, "state", a.State, "not_after", a.NotAfter)
	return nil
}

// advance activates the prepared authority once everyone who must trust its root had the time to learn it.
func (u *upstreamLoop) advance(ctx context.Context, active, prepared *identity.Authority, now time.Time) time.Duration {
	if prepared.Upstream != u.up.String() || now.After(prepared.NotAfter) {
		if err := u.cfg.Authorities.DropAuthority(ctx, now, prepared.Kind, prepared.ID); err != nil && ctx.Err() == nil {
			u.cfg.Log.Warn("cannot drop a prepared authority that is of no use any longer: trying again", "authority", prepared.ID, "error", err)
		}
		return upstreamRetryFirst
	}
	if u.rotating(identity.AuthorityX509) {
		return upstreamLook // leadRotations activates it
	}
	root := anchor(prepared)
	since, seen := u.since[string(root)]
	if at := prepared.PreparedAt; !at.IsZero() && (!seen || at.Before(since)) {
		since, seen = at, true // it has been in the bundle since then at the least, whatever this leader has looked at
	}
	left := u.settle() - now.Sub(since)
	switch {
	case seen && (since.IsZero() || left <= 0):
		if g := u.ackGate(ctx, prepared); !g.open() && u.rotates() && active != nil && active.NotAfter.Sub(now) >= lastMoment && now.Sub(prepared.PreparedAt) < defaultAckDeadline {
			u.cfg.Log.Debug("the prepared authority waits", "authority", prepared.ID, "for", g.names())
			return upstreamRetryFirst
		}
	case active == nil || active.NotAfter.Sub(now) < lastMoment:
		u.cfg.Log.Warn("the active authority is at its end: the next one signs, though not everyone may know its root yet", "authority", prepared.ID)
	case !seen:
		return upstreamRetryFirst // our own state is behind
	default:
		return min(left, upstreamLook)
	}
	err := u.changeState(ctx, prepared, identity.AuthorityActive, func() error {
		return u.cfg.Authorities.ActivateAuthority(ctx, u.cfg.Now(), prepared.Kind, prepared.ID, false)
	})
	if err != nil {
		if ctx.Err() == nil {
			u.cfg.Log.Warn("cannot activate the prepared authority: trying again", "authority", prepared.ID, "error", err)
		}
		return upstreamRetryFirst
	}
	u.cfg.Log.Info("activated an authority under the upstream", "authority", prepared.ID, "not_after", prepared.NotAfter)
	return 0
}

// settle is how long a root must have been in the bundle before anything is signed below it.
func (u *upstreamLoop) settle() time.Duration {
	if u.cfg.RootSettle != 0 {
		return u.cfg.RootSettle
	}
	return 2 * max(u.cfg.State.Bundle().RefreshHint, time.Minute)
}

func (u *upstreamLoop) noteRoots(active *identity.Authority, now time.Time) {
	bundle := u.cfg.State.Bundle().X509
	if active != nil {
		u.since[string(anchor(active))] = time.Time{}
	}
	for _, der := range bundle {
		if _, ok := u.since[string(der)]; !ok {
			u.since[string(der)] = now
		}
	}
	maps.DeleteFunc(u.since, func(der string, _ time.Time) bool { return !contains(bundle, []byte(der)) })
}

// takeTold puts what the upstream vouches for into the bundle. What was told and could not be stored is tried again.
func (u *upstreamLoop) takeTold(ctx context.Context) {
	u.mu.Lock()
	told := u.told
	u.mu.Unlock()
	if told == nil {
		return
	}
	f := u.normal(told)
	err := error(nil)
	if !u.sameForeign(f) {
		err = u.cfg.Authorities.PutForeign(ctx, f)
	}
	switch {
	case err == nil:
		if told.Sequence > u.awaited {
			u.awaited, u.awaitedOwn = told.Sequence, u.cfg.State.Bundle().Sequence
		}
		u.mu.Lock()
		if u.told == told {
			u.told = nil
		}
		u.mu.Unlock()
	case ctx.Err() == nil:
		u.upstream.setFollow(fmt.Errorf("storing what it vouches for: %w", err), u.cfg.Now())
	}
}

// normal is what the upstream told without what is ours anyway, and with an end of its keys where it told none.
func (u *upstreamLoop) normal(told *identity.Above) identity.Foreign {
	f := identity.Foreign{Source: identity.SourceUpstream, X509: told.X509}
	now := u.cfg.Now()
	own := map[string]bool{}
	for _, a := range u.cfg.State.Authorities() {
		own[a.ID] = a.Kind == identity.AuthorityJWT
	}
	for _, k := range told.JWT {
		if own[k.ID] {
			continue
		}
		if k.NotAfter.IsZero() {
			k.NotAfter = now.Add(upstreamKeyLife).UTC().Truncate(time.Hour)
		}
		f.JWT = append(f.JWT, k)
	}
	return f
}

// sameForeign reports whether the state says the same of the upstream. Ends that we made up need not be the same, as long
// as they are far off.
func (u *upstreamLoop) sameForeign(f identity.Foreign) bool {
	var old identity.Foreign
	for _, x := range u.cfg.Outside.Foreign() {
		if x.Source == identity.SourceUpstream {
			old = x
		}
	}
	if len(old.X509) != len(f.X509) || len(old.JWT) != len(f.JWT) {
		return false
	}
	for _, der := range f.X509 {
		if !contains(old.X509, der) {
			return false
		}
	}
	soon := u.cfg.Now().Add(upstreamKeyLife / 2)
	for _, k := range f.JWT {
		if !slices.ContainsFunc(old.JWT, func(o identity.JWTKey) bool {
			return o.ID == k.ID && bytes.Equal(o.PublicKey, k.PublicKey) && (o.NotAfter.Equal(k.NotAfter) || o.NotAfter.After(soon) && k.NotAfter.After(soon))
		}) {
			return false
		}
	}
	return true
}

// forgetUpstream takes what an upstream vouched for out of the bundle, once none is configured any longer. The
// roots of authorities that still sign stay: those have them.
func (u *upstreamLoop) forgetUpstream(ctx context.Context) {
	for wait := retryFirst; ; wait = min(2*wait, upstreamRetryMost) {
		if !slices.ContainsFunc(u.cfg.Outside.Foreign(), func(f identity.Foreign) bool { return f.Source == identity.SourceUpstream }) {
			return
		}
		if err := u.cfg.Authorities.PutForeign(ctx, identity.Foreign{Source: identity.SourceUpstream}); err == nil {
			u.cfg.Log.Info("no upstream is configured any longer: what it vouched for is out of the bundle")
			return
		}
		if !sleep(ctx, wait) {
			return
		}
	}
}

// anchorKey is the public key of the root that members' certificates end at, for the CA pin.
func anchorKey(a *identity.Authority) ([]byte, error) {
	root, err := x509.ParseCertificate(anchor(a))
	if err != nil {
		return nil, fmt.Errorf("parsing the root of authority %s: %w", a.ID, err)
	}
	return root.RawSubjectPublicKeyInfo, nil
}
