package federation

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"io"
	"log"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"countersign.io/countersign/identity"
)

// partner is another trust domain: a root, JWT keys, and a bundle that a test changes.
type partner struct {
	t    testing.TB
	td   spiffeid.TrustDomain
	root *x509.Certificate
	key  crypto.Signer

	mu  sync.Mutex
	now *identity.Bundle
}

func newPartner(t testing.TB, name string) *partner {
	t.Helper()
	p := &partner{t: t, td: spiffeid.RequireTrustDomainFromString(name)}
	p.root, p.key = p.newRoot(name)
	p.now = &identity.Bundle{TrustDomain: p.td, Sequence: 7, X509: [][]byte{p.root.Raw}, JWT: map[string][]byte{"k1": publicKey(t)}}
	return p
}

func (p *partner) bundle() *identity.Bundle {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.now
}

// change replaces the bundle by a changed copy.
func (p *partner) change(f func(*identity.Bundle)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	b := *p.now
	f(&b)
	p.now = &b
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func publicKey(t testing.TB) []byte {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(newKey(t).Public())
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// newRoot is a CA certificate that names the trust domain.
func (p *partner) newRoot(name string) (*x509.Certificate, crypto.Signer) {
	p.t.Helper()
	tmpl := &x509.Certificate{IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	if name != "" {
		tmpl.URIs = []*url.URL{{Scheme: "spiffe", Host: name}}
	}
	key := newKey(p.t)
	return p.sign(tmpl, nil, key, key), key
}

func (p *partner) sign(tmpl, parent *x509.Certificate, key, signer crypto.Signer) *x509.Certificate {
	p.t.Helper()
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		p.t.Fatal(err)
	}
	tmpl.SerialNumber, tmpl.Subject = serial, pkix.Name{CommonName: "test"}
	if tmpl.NotBefore.IsZero() {
		tmpl.NotBefore = time.Now().Add(-time.Hour)
	}
	if tmpl.NotAfter.IsZero() {
		tmpl.NotAfter = time.Now().Add(time.Hour)
	}
	if parent == nil {
		parent = tmpl
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, key.Public(), signer)
	if err != nil {
		p.t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		p.t.Fatal(err)
	}
	return c
}

// svid is a certificate of the ID, and of the web's name 127.0.0.1 as well.
func (p *partner) svid(id string, change ...func(*x509.Certificate)) *tls.Certificate {
	p.t.Helper()
	u, err := url.Parse(id)
	if err != nil {
		p.t.Fatal(err)
	}
	tmpl := &x509.Certificate{URIs: []*url.URL{u}, KeyUsage: x509.KeyUsageDigitalSignature, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, DNSNames: []string{"localhost"},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}}
	for _, f := range change {
		f(tmpl)
	}
	key := newKey(p.t)
	leaf := p.sign(tmpl, p.root, key, p.key)
	return &tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: key, Leaf: leaf}
}

func (p *partner) endpointID() string {
	id, err := identity.BundleEndpointID(p.td)
	if err != nil {
		p.t.Fatal(err)
	}
	return id.String()
}

// relationship is what somebody who federates with the partner has on record.
func (p *partner) relationship(profile, url string) identity.Federation {
	f := identity.Federation{TrustDomain: p.td.Name(), URL: url, Profile: profile}
	if profile == identity.ProfileSPIFFE {
		f.EndpointID = p.endpointID()
		f.Bundle = &identity.FederatedBundle{Sequence: 1, X509: [][]byte{p.root.Raw}, Pinned: true}
	}
	return f
}

func (p *partner) webRoots() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(p.root)
	return pool
}

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

// serve runs a public port with a handler; it returns its URL.
func (p *partner) serve(cert *tls.Certificate, path string, h http.Handler) string {
	p.t.Helper()
	return p.serveAt(func() (*certificate, error) { return cert, nil }, path, h)
}

type certificate = tls.Certificate

// serveWith asks for the certificate at each handshake.
func (p *partner) serveWith(cert func() (*certificate, error), h http.Handler) string {
	p.t.Helper()
	return p.serveAt(cert, "/bundle", h)
}

func (p *partner) serveAt(cert func() (*certificate, error), path string, h http.Handler) string {
	p.t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		p.t.Fatal(err)
	}
	pub, err := NewPublic(PublicConfig{TCP: l, Certificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return cert() }, Log: quiet()})
	if err != nil {
		p.t.Fatal(err)
	}
	pub.Handle(path, h)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- pub.Run(ctx) }()
	p.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			p.t.Error(err)
		}
	})
	return "https://" + pub.Addr().String() + path
}

// endpoint serves the partner's bundle, as a member does.
func (p *partner) endpoint(hint time.Duration) http.Handler {
	return NewEndpoint(EndpointConfig{Bundle: p.bundle, RefreshHint: hint, Log: quiet()})
}

func discardLog() *log.Logger { return log.New(io.Discard, "", 0) }
