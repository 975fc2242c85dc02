// Package ca signs: X.509-SVIDs with this member's own issuer, and JWT-SVIDs with the trust domain's shared key.
//
// The trust domain has one x509 authority, a self-signed root or, below an upstream, an intermediate of that. Every member makes itself an intermediate under it,
// its issuer: a P-256 key that is born in memory and dies there, in a certificate of path length 0 that is
// constrained to the trust domain's URIs. So a member signs without the leader, and the root's key is opened only
// for the moment in which an issuer is made.
//
// What is signed was linted, and nothing else can be: PrepareX509 and PrepareJWT check the request and the very
// bytes to be signed, without a key, and return a token that signs those bytes, once.
//
// The package knows no entries, no files and no leadership: who may have an identity is decided before.
package ca

import (
	"context"
	"crypto"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"countersign.io/countersign/identity"
)

const (
	// DefaultIssuerTTL is how long a member's issuer lives. It is renewed at half of it, so that a leaf of the
	// longest TTL (identity.MaxX509TTL) always fits under it.
	DefaultIssuerTTL = 48 * time.Hour

	// backdate is how far before now everything starts to be valid, for clocks that are behind ours.
	backdate = 10 * time.Second

	minRetry = time.Second
	maxRetry = 30 * time.Second
	// maxSleep bounds Run's timer, which a suspended machine stops: the wall clock decides, and is looked at this often.
	maxSleep = time.Minute
)

// Config is what a CA is made of. Zero values stand for the defaults.
type Config struct {
	TrustDomain spiffeid.TrustDomain
	MemberName  string           // a path segment, see identity.MemberID
	Now         func() time.Time // default time.Now
	X509TTL     time.Duration    // of leaves that ask for none, and of the member's own; default identity.DefaultX509TTL
	JWTTTL      time.Duration    // of tokens that ask for none; default identity.DefaultJWTTL
	JWTIssuer   string           // iss of tokens, an https URL; empty: they have none
	IssuerTTL   time.Duration    // at least twice X509TTL; default DefaultIssuerTTL
	Log         *slog.Logger     // default: none
}

// CA signs for one member. It is safe for concurrent use.
type CA struct {
	cfg    Config
	member spiffeid.ID
	state  atomic.Pointer[state] // what signs now; never nil
	wake   chan struct{}         // tells Run that state changed

	mu       sync.Mutex // held while state is remade
	want     wanted     // guarded by mu
	failures int        // of remaking in a row; guarded by mu

	endpoint endpoint
}

// wanted is what SetAuthorities was last told.
type wanted struct {
	x509    *identity.Authority // the active one, or nil
	jwt     *identity.Authority
	vouched map[string]bool // IDs of the authorities that what was prepared a moment ago may still be signed by
	open    func(identity.Authority) (crypto.Signer, error)
	fault   error // of the list itself
}

// state is everything that signs. It never changes once published; a change publishes another.
type state struct {
	issuer  *issuer     // nil: no X.509
	member  *memberCert // nil if and only if issuer is
	jwt     *jwtSigner  // nil: no JWT
	vouched map[string]bool
	problem error     // why the last remaking failed, in part or whole
	next    time.Time // when something is to be remade; zero: nothing is
}

// New checks the configuration. The CA cannot sign before SetAuthorities.
func New(cfg Config) (*CA, error) {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	setDefault(&cfg.X509TTL, identity.DefaultX509TTL)
	setDefault(&cfg.JWTTTL, identity.DefaultJWTTL)
	setDefault(&cfg.IssuerTTL, max(DefaultIssuerTTL, 2*cfg.X509TTL))
	errs := []error{checkTrustDomain(cfg.TrustDomain)}
	if cfg.X509TTL < identity.MinTTL || cfg.X509TTL > identity.MaxX509TTL {
		errs = append(errs, fmt.Errorf("%w: X.509 TTL %v: it must be from %v to %v", identity.ErrInvalid, cfg.X509TTL, identity.MinTTL, identity.MaxX509TTL))
	}
	if cfg.JWTTTL < identity.MinTTL || cfg.JWTTTL > identity.MaxJWTTL {
		errs = append(errs, fmt.Errorf("%w: JWT TTL %v: it must be from %v to %v", identity.ErrInvalid, cfg.JWTTTL, identity.MinTTL, identity.MaxJWTTL))
	}
	if cfg.JWTIssuer != "" {
		if err := identity.CheckIssuer(cfg.JWTIssuer); err != nil {
			errs = append(errs, fmt.Errorf("JWT issuer: %w", err))
		}
	}
	if cfg.IssuerTTL < 2*cfg.X509TTL {
		errs = append(errs, fmt.Errorf("%w: issuer TTL %v: it must be at least twice the X.509 TTL of %v, or leaves would be cut short", identity.ErrInvalid, cfg.IssuerTTL, cfg.X509TTL))
	}
	if err := errors.Join(errs...); err != nil {
		return nil, fmt.Errorf("configuring the CA: %w", err)
	}
	member, err := identity.MemberID(cfg.TrustDomain, cfg.MemberName)
	if err != nil {
		return nil, fmt.Errorf("configuring the CA: %w: member name %q: %v", identity.ErrInvalid, cfg.MemberName, err)
	}
	c := &CA{cfg: cfg, member: member, wake: make(chan struct{}, 1)}
	c.state.Store(&state{})
	return c, nil
}

func setDefault(d *time.Duration, v time.Duration) {
	if *d == 0 {
		*d = v
	}
}

// SetAuthorities tells the CA which authorities there are, as replicated: at the most one of each kind is active,
// and only that one signs from now on. (Two are a fault that the error tells; the first signs.) open yields the signer of one of them; it is called for the active ones
// only, now and each time that an issuer is renewed, and what it returns for x509 is dropped after one signature.
//
// The swap is atomic: a call of Issue signs under the old authority or the new one. An error says what cannot sign
// (Ready says so as well), Run tries again, and what the list no longer makes active has stopped signing even so.
func (c *CA) SetAuthorities(authorities []identity.Authority, open func(identity.Authority) (crypto.Signer, error)) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.want = wanted{vouched: make(map[string]bool), open: open}
	for _, a := range authorities {
		// Not a tainted one: what it signs now would have to be replaced at once.
		c.want.vouched[a.ID] = a.State.Vouched() && a.State != identity.AuthorityTainted
		if a.State != identity.AuthorityActive {
			continue
		}
		var slot **identity.Authority
		switch a.Kind {
		case identity.AuthorityX509:
			slot = &c.want.x509
		case identity.AuthorityJWT:
			slot = &c.want.jwt
		default: // a kind of a later version: not ours to sign with
			continue
		}
		if *slot != nil {
			c.want.fault = errors.Join(c.want.fault, fmt.Errorf("%w: two active %s authorities, %s and %s", identity.ErrInvalid, a.Kind, (*slot).ID, a.ID))
			continue
		}
		*slot = &a
	}
	err := c.refresh()
	select {
	case c.wake <- struct{}{}:
	default:
	}
	return err
}

// refresh makes what is missing, of another authority, or past its half-life, and publishes the outcome. What it
// cannot make anew it keeps, as long as that authority is the active one. The caller holds mu.
func (c *CA) refresh() error {
	now, old := c.cfg.Now(), c.state.Load()
	next := &state{vouched: c.want.vouched}
	var err1, err2 error
	next.issuer, next.member, err1 = c.refreshX509(now, old)
	next.jwt, err2 = c.refreshJWT(old)
	next.problem = errors.Join(c.want.fault, err1, err2)
	switch {
	case next.problem != nil:
		next.next = now.Add(min(minRetry<<min(c.failures, 10), maxRetry))
		c.failures++
	default:
		c.failures = 0
		next.next = earliest(next.issuer.due(), next.member.due())
	}
	c.state.Store(next)
	if next.problem != nil {
		return fmt.Errorf("loading authorities: %w", next.problem)
	}
	return nil
}

func (c *CA) refreshX509(now time.Time, old *state) (*issuer, *memberCert, error) {
	want := c.want.x509
	if want == nil {
		return nil, nil, nil
	}
	is, member := old.issuer, old.member
	if is != nil && !is.authority.is(want) {
		is, member = nil, nil
	}
	var failed error
	if is == nil || !now.Before(is.renewAt) {
		fresh, freshMember, err := c.makeX509(now, want)
		if err == nil {
			return fresh, freshMember, nil
		}
		failed = err
	}
	// The issuer stays, while it lasts, and so do the certificates under it.
	if is != nil && !now.Before(member.renewAt) && now.Add(identity.MinTTL).Before(is.cert.NotAfter) {
		fresh, err := c.makeMember(now, is)
		if err != nil {
			return is, member, errors.Join(failed, fmt.Errorf("renewing this member's certificate: %w", err))
		}
		member = fresh
	}
	return is, member, failed
}

// makeX509 makes an issuer and the member's certificate under it: one that cannot make this one is not to make others.
func (c *CA) makeX509(now time.Time, a *identity.Authority) (*issuer, *memberCert, error) {
	is, err := c.makeIssuer(now, a)
	if err != nil {
		return nil, nil, fmt.Errorf("making this member's issuer under authority %s: %w", a.ID, err)
	}
	member, err := c.makeMember(now, is)
	if err != nil {
		return nil, nil, fmt.Errorf("making this member's certificate under authority %s: %w", a.ID, err)
	}
	c.cfg.Log.Info("issuer made", "authority", a.ID, "not_after", is.cert.NotAfter)
	return is, member, nil
}

func (c *CA) refreshJWT(old *state) (*jwtSigner, error) {
	want := c.want.jwt
	if want == nil {
		return nil, nil
	}
	if old.jwt.is(want) {
		return old.jwt, nil
	}
	signer, err := newJWTSigner(want, c.want.open)
	if err != nil {
		return nil, fmt.Errorf("loading JWT authority %s: %w", want.ID, err)
	}
	return signer, nil
}

// earliest of the times that are not zero.
func earliest(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}

// Run renews the issuer and the member's certificate at half-life, and tries again what failed. It returns nil when
// ctx ends.
func (c *CA) Run(ctx context.Context) error {
	for {
		wait := maxSleep
		if next := c.state.Load().next; !next.IsZero() {
			wait = max(0, min(wait, next.Sub(c.cfg.Now())))
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-c.wake:
			timer.Stop()
			continue
		case <-timer.C:
		}
		if err := c.renew(); err != nil {
			c.cfg.Log.Error("renewing what signs failed", "error", err)
		}
	}
}

func (c *CA) renew() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if next := c.state.Load().next; next.IsZero() || c.cfg.Now().Before(next) {
		return nil
	}
	return c.refresh()
}

// Ready is nil when this member can sign X.509-SVIDs and JWT-SVIDs and show its own certificate. Otherwise the error
// wraps identity.ErrUnavailable and gives every reason.
func (c *CA) Ready() error {
	st, now := c.state.Load(), c.cfg.Now()
	_, err1 := st.x509(now)
	_, err2 := st.jwtAt(now)
	_, err3 := st.memberAt(now)
	if err1 != nil {
		err3 = nil // the same reason
	}
	return errors.Join(err1, err2, err3)
}

// Signs is the ID of the authority of the kind that this member signs under now; empty: it cannot sign.
func (c *CA) Signs(kind identity.AuthorityKind) string {
	st := c.state.Load()
	switch {
	case kind == identity.AuthorityX509 && st.issuer != nil:
		return st.issuer.authority.id
	case kind == identity.AuthorityJWT && st.jwt != nil:
		return st.jwt.kid
	}
	return ""
}

// IssuerChain is this member's issuer certificate and all above it, up to a root, DER. It is nil while there is none.
func (c *CA) IssuerChain() [][]byte {
	if is := c.state.Load().issuer; is != nil {
		return append(is.chain(nil)[1:], is.authority.root.Raw)
	}
	return nil
}

// MemberCertificate is what this member shows in TLS: its X.509-SVID, its issuer, what leads from there to the roots
// and, so that a client that holds nothing but the hash of the root's key can verify at first contact, that root. It is renewed by Run, so
// ask for each handshake. The error wraps identity.ErrUnavailable. The value is shared: do not modify it.
func (c *CA) MemberCertificate() (*tls.Certificate, error) {
	return c.state.Load().memberAt(c.cfg.Now())
}

// unavailable says why something cannot sign.
func (s *state) unavailable(what, why string) error {
	if s.problem != nil {
		return fmt.Errorf("%w: this member cannot sign %s: %s: %v", identity.ErrUnavailable, what, why, s.problem)
	}
	return fmt.Errorf("%w: this member cannot sign %s: %s", identity.ErrUnavailable, what, why)
}

func (s *state) x509(now time.Time) (*issuer, error) {
	const what = "X.509-SVIDs"
	switch {
	case s.issuer == nil:
		return nil, s.unavailable(what, "it has no active x509 authority")
	case now.Before(s.issuer.cert.NotBefore):
		return nil, s.unavailable(what, "its issuer is not valid before "+s.issuer.cert.NotBefore.String()+": check the clock")
	case now.Add(identity.MinTTL).After(s.issuer.cert.NotAfter):
		return nil, s.unavailable(what, "its issuer ended, or is about to, at "+s.issuer.cert.NotAfter.String())
	}
	return s.issuer, nil
}

func (s *state) jwtAt(now time.Time) (*jwtSigner, error) {
	const what = "JWT-SVIDs"
	switch {
	case s.jwt == nil:
		return nil, s.unavailable(what, "it has no active jwt authority")
	case now.Before(s.jwt.notBefore):
		return nil, s.unavailable(what, "the jwt authority is not valid before "+s.jwt.notBefore.String()+": check the clock")
	case now.Add(identity.MinTTL).After(s.jwt.notAfter):
		return nil, s.unavailable(what, "the jwt authority ended, or is about to, at "+s.jwt.notAfter.String())
	}
	return s.jwt, nil
}

func (s *state) memberAt(now time.Time) (*tls.Certificate, error) {
	switch {
	case s.member == nil:
		return nil, s.unavailable("its own certificate", "it has no active x509 authority")
	case !now.Before(s.member.tls.Leaf.NotAfter):
		return nil, s.unavailable("its own certificate", "the last one ended at "+s.member.tls.Leaf.NotAfter.String())
	}
	return s.member.tls, nil
}
