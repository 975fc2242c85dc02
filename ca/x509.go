package ca

import (
	"bytes"
	"crypto/x509"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.step.sm/crypto/x509util"

	"countersign.io/countersign/identity"
)

// PreparedX509 is an X.509-SVID that was checked and linted, byte by byte as it will be signed, and is not signed
// yet. It is good for one Issue.
type PreparedX509 struct {
	ca     *CA
	issuer *issuer
	tbs    []byte // DER TBSCertificate
	svid   identity.X509SVID
	serial *big.Int
	used   atomic.Bool
}

// PrepareX509 checks a request and lints the certificate that it would give, without touching a key. The ID is one of
// the trust domain's with a path, and not a member's; what else it may be was decided before. The public key is as
// CheckPublicKey takes it. A TTL of zero is the default; the certificate never outlives the issuer. Errors wrap
// identity.ErrInvalid, identity.ErrDenied (a member's ID) or identity.ErrUnavailable (this member cannot sign now).
func (c *CA) PrepareX509(iss identity.Issuance) (*PreparedX509, error) {
	if identity.RoleOf(iss.ID) == identity.RoleMember {
		return nil, fmt.Errorf("preparing X.509-SVID for %s: %w: members make their own", iss.ID, identity.ErrDenied)
	}
	now := c.cfg.Now()
	is, err := c.state.Load().x509(now)
	if err != nil {
		return nil, err
	}
	return c.prepareX509(now, is, iss)
}

func (c *CA) prepareX509(now time.Time, is *issuer, iss identity.Issuance) (*PreparedX509, error) {
	fail := func(err error) (*PreparedX509, error) {
		return nil, fmt.Errorf("preparing X.509-SVID for %.200q: %w", iss.ID, err)
	}
	if err := c.checkID(iss.ID); err != nil {
		return fail(err)
	}
	ttl, err := checkTTL(iss.TTL, c.cfg.X509TTL, identity.MaxX509TTL)
	if err != nil {
		return fail(err)
	}
	names, err := checkDNSNames(iss.DNSNames)
	if err != nil {
		return fail(err)
	}
	if err := CheckPublicKey(iss.PublicKey); err != nil {
		return fail(err)
	}
	l := leaf{
		serial:    newSerial(),
		notBefore: later(now.Add(-backdate), is.cert.NotBefore).UTC().Truncate(time.Second),
		notAfter:  earlier(now.Add(ttl), is.cert.NotAfter).UTC().Truncate(time.Second),
		id:        iss.ID.String(),
		dnsNames:  names,
	}
	if l.publicKey, err = x509.MarshalPKIXPublicKey(iss.PublicKey); err != nil {
		return fail(fmt.Errorf("%w: encoding the public key: %v", identity.ErrInvalid, err))
	}
	if l.keyID, err = x509util.GenerateSubjectKeyID(iss.PublicKey); err != nil {
		return fail(fmt.Errorf("%w: identifying the public key: %v", identity.ErrInvalid, err))
	}
	tbs, err := is.encoder.encode(&l)
	if err != nil {
		return fail(err)
	}
	if err := c.lintLeaf(is, tbs); err != nil {
		return fail(err)
	}
	return &PreparedX509{ca: c, issuer: is, tbs: tbs, serial: l.serial, svid: identity.X509SVID{
		ID: iss.ID, NotBefore: l.notBefore, NotAfter: l.notAfter,
	}}, nil
}

// lintLeaf parses the bytes that will be signed, with nothing where the signature goes, and lints what comes out.
func (c *CA) lintLeaf(is *issuer, tbs []byte) error {
	der, err := wrapSigned(tbs, make([]byte, 64))
	if err != nil {
		return err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return fmt.Errorf("%w: parsing what is to be signed: %v", identity.ErrInvalid, err)
	}
	if err := asError(Lint(c.cfg.TrustDomain, cert, KindLeaf)); err != nil {
		return err
	}
	if err := checkUnder(cert, is.cert); err != nil {
		return err
	}
	if bytes.Equal(cert.SubjectKeyId, is.authority.cert.SubjectKeyId) {
		return fmt.Errorf("%w: its key is the authority's", identity.ErrInvalid)
	}
	return nil
}

// Serial is the serial number that the certificate will have, in hex, and NotAfter its end, for who records it before it
// is signed.
func (p *PreparedX509) Serial() string { return p.serial.Text(16) }

// NotAfter is the end of the certificate's life.
func (p *PreparedX509) NotAfter() time.Time { return p.svid.NotAfter }

// Authority is the ID of the x509 authority that it will be under.
func (p *PreparedX509) Authority() string { return p.issuer.authority.id }

// Issue signs what was prepared. Only the first call can succeed. The chain is the leaf, the issuer and, below an
// upstream, the authority and what leads from it to the roots, without those. The error wraps identity.ErrPrecondition when the token was used, and identity.ErrUnavailable when the
// trust domain gave the authority up since: then prepare again.
func (p *PreparedX509) Issue() (identity.X509SVID, error) {
	if p == nil || p.issuer == nil {
		return identity.X509SVID{}, errors.New("issuing X.509-SVID: it was not prepared")
	}
	if p.used.Swap(true) {
		return identity.X509SVID{}, fmt.Errorf("issuing X.509-SVID for %s: %w: it was issued already", p.svid.ID, identity.ErrPrecondition)
	}
	if !p.ca.state.Load().vouched[p.issuer.authority.id] {
		return identity.X509SVID{}, fmt.Errorf("issuing X.509-SVID for %s: %w: authority %s is no longer trusted: try again", p.svid.ID, identity.ErrUnavailable, p.issuer.authority.id)
	}
	der, err := p.issuer.sign(p.tbs)
	if err != nil {
		return identity.X509SVID{}, fmt.Errorf("issuing X.509-SVID for %s: %w", p.svid.ID, err)
	}
	svid := p.svid
	svid.Chain = p.issuer.chain(der)
	return svid, nil
}

// checkID takes what may be the subject of an SVID (X509-SVID section 3.1, JWT-SVID section 3.1).
func (c *CA) checkID(id spiffeid.ID) error {
	switch {
	case id.IsZero():
		return fmt.Errorf("%w: no SPIFFE ID", identity.ErrInvalid)
	case id.TrustDomain() != c.cfg.TrustDomain:
		return fmt.Errorf("%w: it is not of trust domain %q", identity.ErrInvalid, c.cfg.TrustDomain.Name())
	case id.Path() == "":
		return fmt.Errorf("%w: it has no path: only a CA's ID has none (X509-SVID section 3.1)", identity.ErrInvalid)
	case len(id.String()) > 2048:
		return fmt.Errorf("%w: SPIFFE ID of %d bytes: at the most 2048", identity.ErrInvalid, len(id.String()))
	}
	return nil
}

func checkTTL(ttl, standard, most time.Duration) (time.Duration, error) {
	if ttl == 0 {
		return standard, nil
	}
	if ttl < identity.MinTTL || ttl > most {
		return 0, fmt.Errorf("%w: TTL %v: it must be from %v to %v", identity.ErrInvalid, ttl, identity.MinTTL, most)
	}
	return ttl, nil
}

// checkDNSNames drops repetitions, which two templates of an entry may well give.
func checkDNSNames(names []string) ([]string, error) {
	var out []string
	for _, n := range names {
		if err := identity.ParseDNSName(n); err != nil {
			return nil, err
		}
		if !slices.Contains(out, n) {
			out = append(out, n)
		}
		if len(out) > identity.MaxDNSNames {
			return nil, fmt.Errorf("%w: more than %d DNS names", identity.ErrInvalid, identity.MaxDNSNames)
		}
	}
	return out, nil
}
