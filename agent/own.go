package agent

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"countersign.io/countersign/api"
	nodev1 "countersign.io/countersign/api/node/v1"
	"countersign.io/countersign/identity"
)

// ownSVID is the agent's own identity; immutable.
type ownSVID struct {
	id           spiffeid.ID
	chain        [][]byte
	key          []byte // PKCS #8 DER
	reattestable bool
	notAfter     time.Time
	renewAt      time.Time
	authority    string // that it is under
	tls          *tls.Certificate
}

// newOwnSVID checks what a member answered, or what the state dir holds.
func newOwnSVID(t *trust, id string, chain [][]byte, key keyPair, reattestable bool, now time.Time) (*ownSVID, error) {
	svid, err := t.verifySVID(chain, key.public, now)
	if err != nil {
		return nil, fmt.Errorf("checking the agent's SVID: %w", err)
	}
	got, leaf := svid.id, svid.leaf
	if got.String() != id || identity.RoleOf(got) != identity.RoleAgent {
		return nil, fmt.Errorf("checking the agent's SVID: %w: it is for %s, announced as %q: want an agent's ID", errAnswer, got, id)
	}
	signer, err := x509.ParsePKCS8PrivateKey(key.private)
	if err != nil {
		return nil, fmt.Errorf("checking the agent's SVID: parsing its key: %w", err)
	}
	return &ownSVID{
		id: got, chain: chain, key: key.private, reattestable: reattestable, notAfter: leaf.NotAfter,
		renewAt: halfLife(now, leaf.NotAfter), authority: svid.authority,
		tls: &tls.Certificate{Certificate: chain, PrivateKey: signer, Leaf: leaf},
	}, nil
}

// halfLife is when to renew what is live from now to notAfter: in the middle, give or take 10 %.
func halfLife(now, notAfter time.Time) time.Time {
	half := notAfter.Sub(now) / 2
	return now.Add(half - half/10 + spread(half/5))
}

// spread is a random part of d.
func spread(d time.Duration) time.Duration {
	if d <= 0 {
		return 0
	}
	return rand.N(d)
}

// live reports whether the agent can show an SVID now.
func (a *Agent) live() bool {
	if a.cfg.Pod != nil { // what it shows is its token
		return true
	}
	o := a.own.Load()
	return o != nil && time.Now().Before(o.notAfter)
}

// attest proves the node to one member after the other until one gives an SVID. The error is a definite refusal if any
// member refused (wrapping identity.ErrDenied, ErrUnauthenticated, ErrPrecondition or ErrInvalid), else ErrUnavailable.
func (a *Agent) attest(ctx context.Context, patience time.Duration) error {
	// The same key at every member: a repeated attestation is then recognisably the same one.
	key, err := KeyP256.makePair()
	if err != nil {
		return err
	}
	var errs []error
	for _, addr := range a.addresses() {
		err := a.attestAt(ctx, addr, key, patience)
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		a.link.blame(addr)
		errs = append(errs, fmt.Errorf("member %s: %w", addr, err))
	}
	for _, err := range errs {
		if !transient(err) {
			return fmt.Errorf("attesting this node with its %s: %w", a.cfg.Credential, err)
		}
	}
	return fmt.Errorf("attesting this node with its %s: %w: %w", a.cfg.Credential, identity.ErrUnavailable, errors.Join(errs...))
}

func (a *Agent) attestAt(ctx context.Context, addr string, key keyPair, patience time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, attestNodeTimeout)
	defer cancel()
	begin, prove, err := a.cfg.Credential.begin()
	if err != nil {
		return err
	}
	begin.PublicKey = key.public
	seen := make(memberSeen, 1)
	var reached atomic.Bool
	conn, err := a.dial(addr, clientTLS(a.firstContact, nil, seen), patience, &reached)
	if err != nil {
		return err
	}
	defer conn.Close()
	// A member that does not even shake hands is left sooner: nothing has been spent there. One by one the members are asked, so a host
	// that is not there must not hold up the others for long.
	defer time.AfterFunc(patience, func() {
		if len(seen) == 0 {
			cancel()
		}
	}).Stop()
	defer time.AfterFunc(min(patience, 2*attemptTimeout), func() {
		if !reached.Load() {
			cancel()
		}
	}).Stop()
	stream, err := nodev1.NewNodeClient(conn).Attest(ctx)
	if err != nil {
		return api.FromStatus(err)
	}
	// A failed Send says nothing: Recv has the reason.
	_ = stream.Send(&nodev1.AttestRequest{Step: &nodev1.AttestRequest_Begin_{Begin: begin}})
	answer, err := stream.Recv()
	if err == nil && answer.GetSvid() == nil && prove != nil {
		var proof []byte
		if proof, err = prove(answer.GetChallenge(), key.public); err != nil {
			return err
		}
		_ = stream.Send(&nodev1.AttestRequest{Step: &nodev1.AttestRequest_Proof{Proof: proof}})
		answer, err = stream.Recv()
	}
	if err != nil {
		return api.FromStatus(err)
	}
	return a.takeOwn(answer.GetSvid(), key, seen.trustDomain(), true)
}

// firstContact is what verifies a member while the agent shows no SVID.
func (a *Agent) firstContact() contact {
	return contact{td: a.trustDomain(), trust: a.trust.Load(), pin: a.cfg.Pin, roots: a.cfg.Roots}
}

// trustDomain is the configured one, or the one learnt; zero before that.
func (a *Agent) trustDomain() spiffeid.TrustDomain {
	if t := a.trust.Load(); t != nil {
		return t.td
	}
	return a.cfg.TrustDomain
}

// takeOwn checks an answer that holds the agent's own SVID and puts it in place. afresh: the bundle stands for itself, as
// at first contact; otherwise it may not be older than the one held.
func (a *Agent) takeOwn(s *nodev1.AgentSVID, key keyPair, td spiffeid.TrustDomain, afresh bool) error {
	if s == nil {
		return fmt.Errorf("%w: no SVID in it", errAnswer)
	}
	a.trustMu.Lock()
	defer a.trustMu.Unlock()
	old := a.trust.Load()
	t := old
	if s.Bundle != nil || old == nil {
		b, err := api.BundleFromWire(s.Bundle)
		if err != nil {
			return fmt.Errorf("%w: %w", errAnswer, err)
		}
		base := old
		if old != nil && (afresh && !sharesAuthority(old.own, b)) {
			base = nil // another root, vouched for by the pin: the cluster was made anew
		}
		var federated []*identity.Bundle
		if base != nil {
			federated = base.federated()
		}
		if t, err = newTrust(base, td, b, federated); err != nil {
			return fmt.Errorf("%w: %w", errAnswer, err)
		}
	}
	o, err := newOwnSVID(t, s.SpiffeId, s.Chain, key, s.Reattestable, time.Now())
	if err != nil {
		return err
	}
	if t.ending[o.authority].Tainted { // the member that answered does not know yet
		o.renewAt = time.Now().Add(lagging)
	}
	a.own.Store(o)
	a.setTrust(t)
	a.cache.ownChanged()
	if a.state != nil {
		a.cache.markOwn()
	}
	a.log.Info("agent has an SVID", "id", o.id, "expires", o.notAfter, "credential", a.cfg.Credential.String())
	return nil
}

func sharesAuthority(a, b *identity.Bundle) bool {
	for _, x := range a.X509 {
		for _, y := range b.X509 {
			if bytes.Equal(x, y) {
				return true
			}
		}
	}
	return false
}

// setTrust makes t what the agent believes and tells every stream. The caller holds trustMu.
func (a *Agent) setTrust(t *trust) {
	if a.trust.Load() == t {
		return
	}
	a.trust.Store(t)
	a.cache.bundlesChanged()
	a.giveUp(t)
}

// giveUp replaces what the bundle gives up: SVIDs, the agent's own, and what is left of tokens.
func (a *Agent) giveUp(t *trust) {
	now := time.Now()
	a.cache.giveUp(t, now)
	for id, e := range t.ending {
		if _, jwt := t.own.JWT[id]; jwt && e.Tainted {
			a.jwts.Purge() // the cheapest way to hand out none of its tokens
		}
	}
	o := a.own.Load()
	if o == nil {
		return
	}
	g := &given{t: t, now: now, known: map[*byte]bool{}}
	if up, within := g.anyUp([]identity.X509SVID{{Chain: o.chain, Authority: o.authority}}); up {
		sooner := *o
		if at := now.Add(spread(within)); at.Before(o.renewAt) {
			sooner.renewAt = at
			if a.own.CompareAndSwap(o, &sooner) {
				wake(a.ownSooner)
			}
		}
	}
}

// takeBundles is a member's push of bundles. It reports whether they were older than what is held: then those of other trust
// domains are not taken either.
func (a *Agent) takeBundles(m *nodev1.State_Bundles) (stale bool, err error) {
	b, err := api.BundleFromWire(m.Own)
	if err != nil {
		return false, err
	}
	others := make([]*identity.Bundle, len(m.Federated))
	for i, f := range m.Federated {
		if others[i], err = api.BundleFromWire(f); err != nil {
			return false, err
		}
	}
	a.trustMu.Lock()
	defer a.trustMu.Unlock()
	old := a.trust.Load()
	if a.cfg.Pod != nil && old != nil && a.anew.Load() && !sharesAuthority(old.own, b) {
		old = nil // another root, vouched for by what is configured: the cluster was made anew
	}
	switch {
	case old == nil: // of a pod, at first contact
	case b.Sequence < old.own.Sequence:
		others = old.federated()
	default:
		others = append(others, a.notSpokenOf(old, others, m.FederatesWith)...)
	}
	t, err := newTrust(old, a.cfgDomain(old), b, others)
	if err != nil {
		return false, err
	}
	a.setTrust(t)
	return b.Sequence < t.own.Sequence, nil
}

func (a *Agent) cfgDomain(t *trust) spiffeid.TrustDomain {
	if t != nil {
		return t.td
	}
	return a.cfg.TrustDomain
}

// renewOwn gets a new SVID for the agent's own ID over the session.
func (a *Agent) renewOwn(ctx context.Context, s *session) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	key, err := KeyP256.makePair()
	if err != nil {
		return err
	}
	answer, err := nodev1.NewNodeClient(s.conn).Renew(ctx, &nodev1.RenewRequest{PublicKey: key.public})
	if err != nil {
		return fmt.Errorf("renewing the agent's SVID: %w", api.FromStatus(err))
	}
	old := a.own.Load()
	if answer.SpiffeId != old.id.String() {
		return fmt.Errorf("renewing the agent's SVID: %w: it is for %q, not for %s", errAnswer, answer.SpiffeId, old.id)
	}
	return a.takeOwn(answer, key, a.trustDomain(), false)
}
