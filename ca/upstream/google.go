//go:build gcp

package upstream

import (
	"context"
	"crypto/x509"
	"fmt"
	"time"

	casapi "github.com/smallstep/certificates/cas/apiv1"
	"github.com/smallstep/certificates/cas/cloudcas"

	"countersign.io/countersign/identity"
)

// GoogleConfig names an authority of Google's Certificate Authority Service.
type GoogleConfig struct {
	Authority   string // projects/P/locations/L/caPools/C/certificateAuthorities/A
	Credentials string // a service account's file; empty: those of the machine
}

// Google is an authority of Google's Certificate Authority Service.
type Google struct {
	cfg GoogleConfig
	cas *cloudcas.CloudCAS
}

// NewGoogle makes the client; nothing is asked yet.
func NewGoogle(ctx context.Context, cfg GoogleConfig) (*Google, error) {
	cas, err := cloudcas.New(ctx, casapi.Options{CertificateAuthority: cfg.Authority, CredentialsFile: cfg.Credentials})
	if err != nil {
		return nil, fmt.Errorf("%w: making the client of Google's Certificate Authority Service: %v", identity.ErrInvalid, err)
	}
	return &Google{cfg: cfg, cas: cas}, nil
}

// String names the authority.
func (g *Google) String() string { return "google:" + g.cfg.Authority }

// Sign has the service sign a certificate with isCa: the pool's issuance policy must allow that, a URI name and a path
// length of 2.
func (g *Google) Sign(ctx context.Context, req *x509.CertificateRequest, ttl time.Duration) ([]byte, [][]byte, [][]byte, error) {
	type answer struct {
		cert  *x509.Certificate
		chain []*x509.Certificate
		err   error
	}
	done := make(chan answer, 1)
	go func() { // the client takes no context; it has deadlines of its own
		resp, err := g.cas.CreateCertificate(&casapi.CreateCertificateRequest{
			Template: &x509.Certificate{
				Subject: req.Subject, URIs: req.URIs, PublicKey: req.PublicKey, PublicKeyAlgorithm: req.PublicKeyAlgorithm,
				KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, BasicConstraintsValid: true, IsCA: true, MaxPathLen: pathLength,
			},
			CSR: req, Lifetime: ttl,
		})
		if err != nil {
			done <- answer{err: fmt.Errorf("%w: %v", identity.ErrUnavailable, err)}
			return
		}
		done <- answer{cert: resp.Certificate, chain: resp.CertificateChain}
	}()
	select {
	case a := <-done:
		if a.err != nil {
			return nil, nil, nil, a.err
		}
		chain, roots := split(a.chain)
		var err error
		if len(roots) == 0 {
			roots, err = g.roots(ctx)
		}
		return a.cert.Raw, chain, roots, err
	case <-ctx.Done():
		return nil, nil, nil, fmt.Errorf("%w: %v", identity.ErrUnavailable, ctx.Err())
	}
}

func (g *Google) roots(context.Context) ([][]byte, error) {
	resp, err := g.cas.GetCertificateAuthority(&casapi.GetCertificateAuthorityRequest{Name: g.cfg.Authority})
	if err != nil {
		return nil, fmt.Errorf("%w: %v", identity.ErrUnavailable, err)
	}
	return [][]byte{resp.RootCertificate.Raw}, nil
}

// Follow asks for the root every now and then.
func (g *Google) Follow(ctx context.Context, _ <-chan identity.Below, tell func(*identity.Above, error)) error {
	poll(ctx, nil, g.roots, tell)
	return nil
}
