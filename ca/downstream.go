package ca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.step.sm/crypto/x509util"

	"countersign.io/countersign/identity"
)

// How long an authority of a cluster below ours lasts: what it gets when it asks for nothing, and at the most.
const (
	DefaultDownstreamTTL = 7 * 24 * time.Hour
	MaxDownstreamTTL     = 30 * 24 * time.Hour
)

// SignDownstream signs the authority of a cluster below ours, directly under the active x509 authority: path length 1
// and constrained to the URIs of the trust domain. The key must be P-256 or P-384. A TTL of zero is
// DefaultDownstreamTTL; a longer one than MaxDownstreamTTL, or than the authority has left, is cut short. The subject has
// the mark of the downstream identity id, by which members tell what it signs from what they do. The chain
// leads to the roots, without them. Errors wrap identity.ErrInvalid, ErrPrecondition (there is no room below our own
// authority) or ErrUnavailable.
func (c *CA) SignDownstream(id spiffeid.ID, pub crypto.PublicKey, ttl time.Duration) (cert []byte, chain [][]byte, err error) {
	cert, chain, err = c.signDownstream(id, pub, ttl)
	if err != nil {
		return nil, nil, fmt.Errorf("signing an authority below: %w", err)
	}
	return cert, chain, nil
}

func (c *CA) signDownstream(id spiffeid.ID, pub crypto.PublicKey, ttl time.Duration) ([]byte, [][]byte, error) {
	if !isEC(pub) {
		return nil, nil, fmt.Errorf("%w: a key that is not P-256 or P-384", identity.ErrInvalid)
	}
	switch {
	case ttl == 0:
		ttl = DefaultDownstreamTTL
	case ttl < minAuthorityLife:
		return nil, nil, fmt.Errorf("%w: TTL %v: at least %v", identity.ErrInvalid, ttl, minAuthorityLife)
	}
	ttl = min(ttl, MaxDownstreamTTL)
	c.mu.Lock()
	want, open := c.want.x509, c.want.open
	c.mu.Unlock()
	if want == nil {
		return nil, nil, fmt.Errorf("%w: this member has no active x509 authority", identity.ErrUnavailable)
	}
	now := c.cfg.Now()
	above, err := parseAuthority(c.cfg.TrustDomain, want, now)
	if err != nil {
		return nil, nil, fmt.Errorf("using authority %s: %w", want.ID, err)
	}
	if above.end.Sub(now) < minAuthorityLife {
		return nil, nil, fmt.Errorf("%w: authority %s is about to end, at %v", identity.ErrUnavailable, want.ID, above.end)
	}
	if n := above.cert.MaxPathLen; n >= 0 && n < 2 && (n > 0 || above.cert.MaxPathLenZero) {
		return nil, nil, fmt.Errorf("%w: this cluster's own authority has a path length of %d, and one below it with its issuers needs 2: put the cluster below under the same upstream instead", identity.ErrPrecondition, n)
	}
	// As for an issuer: a rehearsal under a key that nobody trusts, before the authority's is opened.
	stand, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("rehearsing: %w", err)
	}
	shadow := *above.cert
	shadow.PublicKey = stand.Public()
	tmpl, err := c.downstreamTemplate(id, pub, now, ttl, above)
	if err != nil {
		return nil, nil, err
	}
	if _, err := c.signBelow(tmpl, &shadow, pub, stand); err != nil {
		return nil, nil, fmt.Errorf("rehearsing: %w", err)
	}
	signer, err := openSigner(want, above.cert.PublicKey, open)
	if err != nil {
		return nil, nil, err
	}
	cert, err := c.signBelow(tmpl, above.cert, pub, signer)
	if err != nil {
		return nil, nil, err
	}
	c.cfg.Log.Info("signed an authority below", "authority", want.ID, "serial", cert.SerialNumber.Text(16), "not_after", cert.NotAfter)
	return cert.Raw, append([][]byte(nil), above.between...), nil
}

func (c *CA) downstreamTemplate(id spiffeid.ID, pub crypto.PublicKey, now time.Time, ttl time.Duration, above *authority) (*x509.Certificate, error) {
	td := c.cfg.TrustDomain
	tmpl := caTemplate(td, td.Name(), later(now.Add(-backdate), above.cert.NotBefore), earlier(now.Add(ttl), above.end))
	tmpl.MaxPathLen = 1
	tmpl.Subject.OrganizationalUnit = []string{identity.BelowMark(id)}
	tmpl.PermittedURIDomains = []string{td.Name()}
	tmpl.PermittedDNSDomainsCritical = true // Go's name for the criticality of all name constraints
	var err error
	if tmpl.SubjectKeyId, err = x509util.GenerateSubjectKeyID(pub); err != nil {
		return nil, fmt.Errorf("%w: identifying the key: %v", identity.ErrInvalid, err)
	}
	return tmpl, nil
}

func (c *CA) signBelow(tmpl, parent *x509.Certificate, pub crypto.PublicKey, signer crypto.Signer) (*x509.Certificate, error) {
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, pub, signer)
	if err != nil {
		return nil, fmt.Errorf("signing: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("parsing what was signed: %w", err)
	}
	if err := asError(append(Lint(c.cfg.TrustDomain, cert, KindAuthority), lintDownstream(c.cfg.TrustDomain, cert)...)); err != nil {
		return nil, err
	}
	if err := checkUnder(cert, parent); err != nil {
		return nil, err
	}
	return cert, nil
}
