package ca

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"countersign.io/countersign/identity"
)

// Bounds of what an upstream may answer. Every SVID carries the chain.
const (
	maxChain       = 8
	maxRoots       = 16
	maxCertificate = 16 << 10 // bytes, DER
	// minAuthorityLife is how long an authority must have left to be worth taking up.
	minAuthorityLife = 30 * time.Second
)

// Upstream is a certificate authority above the trust domain's.
type Upstream interface {
	// Sign must return a certificate for a certificate authority with the request's key, what leads from it to the roots
	// (without them, in any order) and the roots, all DER. It should have the request's subject and names, and last for
	// ttl or less. What it returns is checked by NewX509AuthorityUnder. An error that goes away by itself must wrap
	// identity.ErrUnavailable.
	Sign(ctx context.Context, req *x509.CertificateRequest, ttl time.Duration) (cert []byte, chain, roots [][]byte, err error)
	// String names it for operators, always in the same way, and tells no secret.
	String() string
}

// NewX509AuthorityUnder makes a P-256 key and has the upstream sign it. The answer is verified completely, up to a
// trial of an issuer and a leaf below it, before anything is returned: what an upstream gets wrong takes nothing away
// from what there is. The record is active and has no SealedKey: seal pkcs8 (PKCS #8 DER) into it, and clear pkcs8. Its
// Roots begin with the one that its chain ends at, and its NotAfter is the earliest of the chain.
//
// Errors name the upstream. They wrap identity.ErrInvalid where its answer is at fault, ErrUnavailable where the dates are.
func NewX509AuthorityUnder(ctx context.Context, td spiffeid.TrustDomain, up Upstream, ttl time.Duration, now func() time.Time) (a identity.Authority, pkcs8 []byte, err error) {
	if err := checkAuthorityTTL(td, ttl); err != nil {
		return a, nil, fmt.Errorf("making an x509 authority under %s: %w", up, err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return a, nil, fmt.Errorf("making an x509 authority under %s: %w", up, err)
	}
	defer forget(key)
	req, err := newRequest(td, key)
	if err != nil {
		return a, nil, fmt.Errorf("making an x509 authority under %s: %w", up, err)
	}
	cert, chain, roots, err := up.Sign(ctx, req, ttl)
	if err != nil {
		return a, nil, fmt.Errorf("making an x509 authority under %s: asking it to sign: %w", up, err)
	}
	record, err := checkAnswer(td, key, cert, chain, roots, now())
	if err != nil {
		return a, nil, fmt.Errorf("making an x509 authority under %s: what it answered cannot be used: %w", up, err)
	}
	record.Upstream = up.String()
	return newAuthority(record, key.Public(), key)
}

// newRequest is a PKCS #10 request with the subject and the names of an authority.
func newRequest(td spiffeid.TrustDomain, key *ecdsa.PrivateKey) (*x509.CertificateRequest, error) {
	tmpl := caTemplate(td, td.Name(), time.Time{}, time.Time{})
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: tmpl.Subject, URIs: []*url.URL{td.ID().URL()}}, key)
	if err != nil {
		return nil, fmt.Errorf("making the request: %w", err)
	}
	req, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, fmt.Errorf("making the request: %w", err)
	}
	return req, nil
}

// checkAnswer turns an upstream's answer into an authority's record.
func checkAnswer(td spiffeid.TrustDomain, key *ecdsa.PrivateKey, certDER []byte, chain, roots [][]byte, now time.Time) (a identity.Authority, err error) {
	cert, err := parseOne("its certificate", certDER)
	if err != nil {
		return a, err
	}
	if !key.PublicKey.Equal(cert.PublicKey) {
		return a, fmt.Errorf("%w: its certificate is for another key than the one that was asked for: look for a cache or a proxy on the way", identity.ErrInvalid)
	}
	if err := asError(Lint(td, cert, KindAuthority)); err != nil { // before its absent key ID is what is wrong with it
		return a, err
	}
	record := x509Record(cert)
	record.Chain, record.Roots = chain, roots
	above, err := parseAuthority(td, &record, now)
	if err != nil {
		return a, err
	}
	if above.end.Sub(now) < minAuthorityLife {
		return a, fmt.Errorf("%w: it ends at %v, in less than %v: have the upstream sign for longer, or renew what is above it", identity.ErrInvalid, above.end, minAuthorityLife)
	}
	if err := above.rehearse(td, key, now); err != nil {
		return a, err
	}
	record.NotAfter = above.end
	record.Chain = slices.Clone(above.between[1:])
	record.Roots = [][]byte{above.root.Raw}
	for _, r := range roots {
		if !slices.ContainsFunc(record.Roots, func(x []byte) bool { return bytes.Equal(x, r) }) {
			record.Roots = append(record.Roots, r)
		}
	}
	return record, nil
}

// authority is an x509 authority's record, parsed and verified at some moment. It never changes.
type authority struct {
	id      string
	cert    *x509.Certificate
	root    *x509.Certificate // that the chain ends at: cert, unless there is an upstream
	between [][]byte          // DER, from cert to before root; empty where cert is the root
	end     time.Time         // the first of the whole chain
	record  *identity.Authority
}

// is reports whether the record is the one that this was made of, as far as certificates go.
func (u *authority) is(a *identity.Authority) bool {
	return u.id == a.ID && bytes.Equal(u.record.Cert, a.Cert) && slices.EqualFunc(u.record.Chain, a.Chain, bytes.Equal) && slices.EqualFunc(u.record.Roots, a.Roots, bytes.Equal) && slices.EqualFunc(u.record.Vouched, a.Vouched, bytes.Equal)
}

func parseOne(what string, der []byte) (*x509.Certificate, error) {
	if len(der) == 0 || len(der) > maxCertificate {
		return nil, fmt.Errorf("%w: %s has %d bytes: want 1 to %d", identity.ErrInvalid, what, len(der), maxCertificate)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("%w: parsing %s: %v", identity.ErrInvalid, what, err)
	}
	return cert, nil
}

func parseMany(what string, ders [][]byte, most int) ([]*x509.Certificate, error) {
	if len(ders) > most {
		return nil, fmt.Errorf("%w: %d certificates in %s: at the most %d", identity.ErrInvalid, len(ders), what, most)
	}
	out := make([]*x509.Certificate, len(ders))
	for i, der := range ders {
		var err error
		if out[i], err = parseOne(fmt.Sprintf("certificate %d of %s", i+1, what), der); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// parseAuthority parses and verifies an x509 authority's record. Errors wrap identity.ErrInvalid, or ErrUnavailable
// where the dates alone are at fault.
func parseAuthority(td spiffeid.TrustDomain, a *identity.Authority, now time.Time) (*authority, error) {
	cert, err := parseOne("its certificate", a.Cert)
	if err != nil {
		return nil, err
	}
	if id := hex.EncodeToString(cert.SubjectKeyId); id != a.ID || id == "" {
		return nil, fmt.Errorf("%w: its certificate has the subject key ID %q", identity.ErrInvalid, id)
	}
	out := &authority{id: a.ID, cert: cert, record: a}
	if len(a.Roots) == 0 && len(a.Chain) == 0 && a.Upstream == "" && bytes.Equal(cert.RawIssuer, cert.RawSubject) {
		err = out.selfSigned(td)
	} else {
		err = out.below(td, a, now)
	}
	if err == nil {
		err = out.checkDates(now)
	}
	if err != nil {
		return nil, err
	}
	return out, nil
}

func (u *authority) selfSigned(td spiffeid.TrustDomain) error {
	if err := asError(Lint(td, u.cert, KindRoot)); err != nil {
		return err
	}
	if err := u.cert.CheckSignatureFrom(u.cert); err != nil {
		return fmt.Errorf("%w: its certificate is not self-signed: %v", identity.ErrInvalid, err)
	}
	u.root, u.end = u.cert, u.cert.NotAfter
	return nil
}

// below verifies an authority below an upstream: each fault that has a clear name by itself first, the chain as
// a whole last.
func (u *authority) below(td spiffeid.TrustDomain, a *identity.Authority, now time.Time) error {
	if err := asError(Lint(td, u.cert, KindAuthority)); err != nil {
		return err
	}
	chain, err := parseMany("its chain", a.Chain, maxChain)
	if err != nil {
		return err
	}
	roots, err := parseMany("its roots", a.Roots, maxRoots)
	if err != nil {
		return err
	}
	if len(roots) == 0 {
		return fmt.Errorf("%w: it comes without a root: nobody could verify what is signed below it. Configure the upstream's roots, or have it answer with its whole chain", identity.ErrInvalid)
	}
	if err := weak(u.cert, "its certificate"); err != nil {
		return err
	}
	for i, c := range chain {
		if err := weak(c, fmt.Sprintf("certificate %d of its chain", i+1)); err != nil {
			return err
		}
	}
	rootPool, between := x509.NewCertPool(), x509.NewCertPool()
	for i, r := range roots {
		what := fmt.Sprintf("root %d (%s)", i+1, r.Subject)
		if err := CheckPublicKey(r.PublicKey); err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		// Only the name: verifiers take a root as it is, and an old one may well have signed itself by SHA-1.
		if !r.IsCA || !bytes.Equal(r.RawIssuer, r.RawSubject) {
			return fmt.Errorf("%w: %s is not a self-signed certificate authority", identity.ErrInvalid, what)
		}
		rootPool.AddCert(r)
	}
	for _, c := range chain {
		between.AddCert(c)
	}
	chains, err := u.cert.Verify(x509.VerifyOptions{Roots: rootPool, Intermediates: between, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
	if err != nil {
		// Dates first: that there is no chain may be due to nothing else.
		for i, c := range append([]*x509.Certificate{u.cert}, chain...) {
			if dates := checkDates(c, now, fmt.Sprintf("certificate %d of its chain (%s)", i, c.Subject)); dates != nil {
				return dates
			}
		}
		return explain(td, "its chain does not lead to its roots", err)
	}
	// The shortest, and among those the one that lasts longest: every SVID carries it.
	best := slices.MinFunc(chains, func(a, b []*x509.Certificate) int {
		if d := len(a) - len(b); d != 0 {
			return d
		}
		return endOf(b).Compare(endOf(a))
	})
	u.root, u.end = best[len(best)-1], endOf(best)
	for _, c := range best[:len(best)-1] {
		u.between = append(u.between, c.Raw)
	}
	return nil
}

func endOf(chain []*x509.Certificate) time.Time {
	end := chain[0].NotAfter
	for _, c := range chain[1:] {
		end = earlier(end, c.NotAfter)
	}
	return end
}

// weak refuses signatures that can be forged. That of the key itself is the lint's or Verify's.
func weak(c *x509.Certificate, what string) error {
	switch c.SignatureAlgorithm {
	case x509.SHA256WithRSA, x509.SHA384WithRSA, x509.SHA512WithRSA, x509.SHA256WithRSAPSS, x509.SHA384WithRSAPSS, x509.SHA512WithRSAPSS,
		x509.ECDSAWithSHA256, x509.ECDSAWithSHA384, x509.ECDSAWithSHA512, x509.PureEd25519:
	default:
		return fmt.Errorf("%w: %s is signed by %v, which is not safe any longer: have the upstream sign by SHA-256 or better", identity.ErrInvalid, what, c.SignatureAlgorithm)
	}
	if k, ok := c.PublicKey.(*rsa.PublicKey); ok && k.N.BitLen() < minRSABits {
		return fmt.Errorf("%w: %s has an RSA key of %d bits: at least %d", identity.ErrInvalid, what, k.N.BitLen(), minRSABits)
	}
	return nil
}

func checkDates(c *x509.Certificate, now time.Time, what string) error {
	if now.Before(c.NotBefore) {
		return fmt.Errorf("%w: %s is not valid before %v: check the clock, here and there", identity.ErrUnavailable, what, c.NotBefore)
	}
	if now.Add(identity.MinTTL).After(c.NotAfter) {
		return fmt.Errorf("%w: %s ended, or is about to, at %v", identity.ErrUnavailable, what, c.NotAfter)
	}
	return nil
}

func (u *authority) checkDates(now time.Time) error {
	if err := checkDates(u.cert, now, "it"); err != nil {
		return err
	}
	if now.Add(identity.MinTTL).After(u.end) {
		return fmt.Errorf("%w: what is above it ended, or is about to, at %v", identity.ErrUnavailable, u.end)
	}
	return nil
}

// verifyLeaf verifies a leaf as a stranger would who has the root, and nothing but the chain that is sent along.
func (u *authority) verifyLeaf(now time.Time, leaf, issuer *x509.Certificate) error {
	roots, between := x509.NewCertPool(), x509.NewCertPool()
	roots.AddCert(u.root)
	between.AddCert(issuer)
	for _, der := range u.between {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return err
		}
		between.AddCert(c)
	}
	for _, usage := range []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth} {
		opts := x509.VerifyOptions{Roots: roots, Intermediates: between, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{usage}}
		if _, err := leaf.Verify(opts); err != nil {
			return err
		}
	}
	return nil
}

// rehearse signs an issuer and a leaf below the authority and verifies them as a stranger would. That finds whatever
// above forbids them: name constraints, path lengths, key usages. Both are thrown away, with the issuer's key.
func (u *authority) rehearse(td spiffeid.TrustDomain, key crypto.Signer, now time.Time) error {
	c, err := New(Config{TrustDomain: td, MemberName: "rehearsal", Now: func() time.Time { return now }})
	if err != nil {
		return err
	}
	cert, issuerKey, err := c.signIssuer(now, u.cert, u.end, key)
	if err != nil {
		return fmt.Errorf("rehearsing: %w", err)
	}
	_, err = c.makeMember(now, &issuer{authority: u, cert: cert, key: issuerKey, encoder: newLeafEncoder(cert)})
	if err != nil {
		return explain(td, "what is signed below it does not verify", err)
	}
	return nil
}

// explain says what to do about the faults of a chain that lie above it.
func explain(td spiffeid.TrustDomain, what string, err error) error {
	var fault x509.CertificateInvalidError
	if !errors.As(err, &fault) {
		return fmt.Errorf("%w: %s: %v", identity.ErrInvalid, what, err)
	}
	switch fault.Reason {
	case x509.TooManyIntermediates:
		return fmt.Errorf("%w: a path length above it leaves no room for it and the members' issuers: what signs it needs one of at least 2 (%v)", identity.ErrInvalid, err)
	case x509.CANotAuthorizedForThisName, x509.TooManyConstraints, x509.NameConstraintsWithoutSANs, x509.UnconstrainedName:
		return fmt.Errorf("%w: name constraints above it exclude the URIs of trust domain %s: permit the URI domain %s (%v)", identity.ErrInvalid, td.Name(), td.Name(), err)
	case x509.IncompatibleUsage:
		return fmt.Errorf("%w: extended key usages above it exclude TLS servers or clients (%v)", identity.ErrInvalid, err)
	}
	return fmt.Errorf("%w: %s: %v", identity.ErrInvalid, what, err)
}
