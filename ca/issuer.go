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
	authority *authority
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

// chain is a leaf and what leads from it to the roots, without them.
func (is *issuer) chain(leaf []byte) [][]byte {
	return append([][]byte{leaf, is.cert.Raw}, is.authority.between...)
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
	above, err := parseAuthority(c.cfg.TrustDomain, a, now)
	if err != nil {
		return nil, err
	}
	// A rehearsal under a key that nobody trusts: the authority's is not opened for what fails the lint.
	stand, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("rehearsing: %w", err)
	}
	shadow := *above.cert
	shadow.PublicKey = stand.Public()
	if _, _, err := c.signIssuer(now, &shadow, above.end, stand); err != nil {
		return nil, fmt.Errorf("rehearsing: %w", err)
	}
	signer, err := openSigner(a, above.cert.PublicKey, c.want.open)
	if err != nil {
		return nil, err
	}
	cert, key, err := c.signIssuer(now, above.cert, above.end, signer)
	if err != nil {
		return nil, err
	}
	return &issuer{
		authority: above, cert: cert, key: key,
		encoder: newLeafEncoder(cert), renewAt: halfLife(now, cert.NotAfter),
	}, nil
}

// signIssuer makes an issuer under parent, to end with it and all above it: path length 0, constrained to the URIs of
// the trust domain.
func (c *CA) signIssuer(now time.Time, parent *x509.Certificate, end time.Time, signer crypto.Signer) (*x509.Certificate, *ecdsa.PrivateKey, error) {
	tmpl := caTemplate(c.cfg.TrustDomain, c.cfg.MemberName, later(now.Add(-backdate), parent.NotBefore), earlier(now.Add(c.cfg.IssuerTTL), end))
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
	if err := is.authority.verifyLeaf(now, leaf, is.cert); err != nil {
		return nil, fmt.Errorf("verifying what was signed: %w", err)
	}
	if !bytes.Equal(leaf.RawTBSCertificate, p.tbs) {
		return nil, errors.New("verifying what was signed: it is not what was prepared")
	}
	return &memberCert{
		tls:     &tls.Certificate{Certificate: append(append(is.chain(der), is.authority.root.Raw), is.authority.record.Vouched...), PrivateKey: key, Leaf: leaf},
		renewAt: halfLife(now, leaf.NotAfter),
	}, nil
}
