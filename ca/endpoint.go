package ca

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"sync"
	"time"

	"countersign.io/countersign/identity"
)

// endpoint is the certificate of the bundle endpoint, made when it is first asked for.
type endpoint struct {
	mu      sync.Mutex
	under   *issuer // that signed it
	tls     *tls.Certificate
	renewAt time.Time
}

// EndpointCertificate is what this member shows where it serves the trust domain's bundle: an X.509-SVID of the ID that all
// members' endpoints have (identity.BundleEndpointID), and what leads to the roots, without them. It is made anew at half-life
// and with each new issuer, so ask for each handshake. The error wraps identity.ErrUnavailable. The value is shared: do not modify it.
func (c *CA) EndpointCertificate() (*tls.Certificate, error) {
	now := c.cfg.Now()
	is, err := c.state.Load().x509(now)
	if err != nil {
		return nil, err
	}
	e := &c.endpoint
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.under == is && now.Before(e.renewAt) {
		return e.tls, nil
	}
	cert, err := c.makeEndpoint(now, is)
	if err != nil {
		return nil, fmt.Errorf("making the bundle endpoint's certificate: %w", err)
	}
	e.under, e.tls, e.renewAt = is, cert, halfLife(now, cert.Leaf.NotAfter)
	return cert, nil
}

func (c *CA) makeEndpoint(now time.Time, is *issuer) (*tls.Certificate, error) {
	id, err := identity.BundleEndpointID(c.cfg.TrustDomain)
	if err != nil {
		return nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("making its key: %w", err)
	}
	p, err := c.prepareX509(now, is, identity.Issuance{ID: id, PublicKey: key.Public()})
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
	return &tls.Certificate{Certificate: is.chain(der), PrivateKey: key, Leaf: leaf}, nil
}
