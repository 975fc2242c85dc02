package ca

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	casapi "github.com/smallstep/certificates/cas/apiv1"
	kmsapi "go.step.sm/crypto/kms/apiv1"

	"countersign.io/countersign/identity"
)

// issuer is this member's intermediate. It never changes; its key is in memory alone, and is left to the garbage
// collector with it, since a signature may still be under way when it is replaced.
type issuer struct {
	authority string // ID of the x509 authority above
	root      *x509.Certificate
	cert      *x509.Certificate
	key       *ecdsa.PrivateKey // P-256
	encoder   *leafEncoder
	renewAt   time.Time
}

// memberCert is what this member shows in TLS.
type memberCert struct {
	tls     *tls.Certificate
	renewAt time.Time
}

func (is *issuer) due() time.Time {
	if is == nil {
		return time.Time{}
	}
	return is.renewAt
}

func (m *memberCert) due() time.Time {
	if m == nil {
		return time.Time{}
	}
	return m.renewAt
}

// halfLife of what is made now and ends at end.
func halfLife(now, end time.Time) time.Time { return now.Add(end.Sub(now) / 2) }

// makeIssuer makes a key and has the authority sign a certificate for it.
func (c *CA) makeIssuer(now time.Time, a *identity.Authority) (*issuer, error) {
	root, err := parseRoot(c.cfg.TrustDomain, a)
	if err != nil {
		return nil, err
	}
	if now.Before(root.NotBefore) {
		return nil, fmt.Errorf("%w: it is not valid before %v: check the clock", identity.ErrUnavailable, root.NotBefore)
	}
	if now.Add(identity.MinTTL).After(root.NotAfter) {
		return nil, fmt.Errorf("%w: it ended, or is about to, at %v", identity.ErrUnavailable, root.NotAfter)
	}
	// A rehearsal under a key that nobody trusts: the authority's is not opened for what fails the lint.
	stand, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("rehearsing: %w", err)
	}
	shadow := *root
	shadow.PublicKey = stand.Public()
	if _, _, err := c.signIssuer(now, &shadow, stand); err != nil {
		return nil, fmt.Errorf("rehearsing: %w", err)
	}
	signer, err := openSigner(a, root.PublicKey, c.want.open)
	if err != nil {
		return nil, err
	}
	cert, key, err := c.signIssuer(now, root, signer)
	if err != nil {
		return nil, err
	}
	return &issuer{
		authority: a.ID, root: root, cert: cert, key: key,
		encoder: newLeafEncoder(cert), renewAt: halfLife(now, cert.NotAfter),
	}, nil
}

// signIssuer makes an issuer under parent: path length 0, constrained to the URIs of the trust domain.
func (c *CA) signIssuer(now time.Time, parent *x509.Certificate, signer crypto.Signer) (*x509.Certificate, *ecdsa.PrivateKey, error) {
	tmpl := caTemplate(c.cfg.TrustDomain, c.cfg.MemberName, later(now.Add(-backdate), parent.NotBefore), earlier(now.Add(c.cfg.IssuerTTL), parent.NotAfter))
	tmpl.MaxPathLenZero = true
	tmpl.PermittedURIDomains = []string{c.cfg.TrustDomain.Name()}
	tmpl.PermittedDNSDomainsCritical = true // Go's name for the criticality of all name constraints
	resp, err := createCA(&casapi.CreateCertificateAuthorityRequest{
		Type: casapi.IntermediateCA, Template: tmpl, Lifetime: c.cfg.IssuerTTL,
		CreateKey: &kmsapi.CreateKeyRequest{SignatureAlgorithm: kmsapi.ECDSAWithSHA256},
		Parent:    &casapi.CreateCertificateAuthorityResponse{Certificate: parent, Signer: signer},
	})
	if err != nil {
		return nil, nil, fmt.Errorf("signing the issuer: %w", err)
	}
	key, ok := resp.PrivateKey.(*ecdsa.PrivateKey)
	if !ok || key.Curve != elliptic.P256() {
		return nil, nil, errors.New("signing the issuer: its key is not P-256")
	}
	if err := asError(Lint(c.cfg.TrustDomain, resp.Certificate, KindIssuer)); err != nil {
		return nil, nil, err
	}
	if err := checkUnder(resp.Certificate, parent); err != nil {
		return nil, nil, fmt.Errorf("signing the issuer: %w", err)
	}
	return resp.Certificate, key, nil
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

// makeMember issues this member's own X.509-SVID and verifies it as a stranger would. That is also the proof, once
// for each issuer, that its signatures are good: Issue does not verify every one again.
func (c *CA) makeMember(now time.Time, is *issuer) (*memberCert, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("making its key: %w", err)
	}
	p, err := c.prepareX509(now, is, identity.Issuance{ID: c.member, PublicKey: key.Public()})
	if err != nil {
		return nil, err
	}
	der, err := is.sign(p.tbs)
	if err != nil {
		return nil, err
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("parsing what was signed: %w", err)
	}
	roots, between := x509.NewCertPool(), x509.NewCertPool()
	roots.AddCert(is.root)
	between.AddCert(is.cert)
	for _, usage := range []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth} {
		opts := x509.VerifyOptions{Roots: roots, Intermediates: between, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{usage}}
		if _, err := leaf.Verify(opts); err != nil {
			return nil, fmt.Errorf("verifying what was signed: %w", err)
		}
	}
	if !bytes.Equal(leaf.RawTBSCertificate, p.tbs) {
		return nil, errors.New("verifying what was signed: it is not what was prepared")
	}
	return &memberCert{
		tls:     &tls.Certificate{Certificate: [][]byte{der, is.cert.Raw, is.root.Raw}, PrivateKey: key, Leaf: leaf},
		renewAt: halfLife(now, leaf.NotAfter),
	}, nil
}
