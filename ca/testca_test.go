package ca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"countersign.io/countersign/identity"
)

// clock is a wall clock that a test moves.
type clock struct {
	mu sync.Mutex
	t  time.Time
}

func newClock() *clock { return &clock{t: time.Date(2026, 7, 1, 12, 0, 0, 123456789, time.UTC)} }

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.t
}

func (c *clock) add(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.t = c.t.Add(d)
}

// vault stands for the seal: it opens what it was given.
type vault struct {
	mu     sync.Mutex
	keys   map[string][]byte
	opened map[string]int
	down   error
}

func (v *vault) open(a identity.Authority) (crypto.Signer, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.opened[a.ID]++
	if v.down != nil {
		return nil, v.down
	}
	der, ok := v.keys[a.ID]
	if !ok {
		return nil, errors.New("no such key")
	}
	key, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, err
	}
	return key.(crypto.Signer), nil
}

func (v *vault) count(id string) int {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.opened[id]
}

func (v *vault) fail(err error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.down = err
}

// rig is a CA with an authority of each kind.
type rig struct {
	*CA
	td    spiffeid.TrustDomain
	clock *clock
	vault *vault
	x, j  identity.Authority
}

func testTD() spiffeid.TrustDomain { return spiffeid.RequireTrustDomainFromString("example.org") }

func newRig(t testing.TB, change ...func(*Config)) *rig {
	t.Helper()
	r := &rig{td: testTD(), clock: newClock(), vault: &vault{keys: map[string][]byte{}, opened: map[string]int{}}}
	cfg := Config{TrustDomain: r.td, MemberName: "m1", Now: r.clock.now}
	for _, f := range change {
		f(&cfg)
	}
	var err error
	if r.CA, err = New(cfg); err != nil {
		t.Fatal(err)
	}
	r.clock.t = r.CA.cfg.Now()
	r.x = r.newX509(t, 10*365*24*time.Hour)
	r.j = r.newJWT(t, ES256, 365*24*time.Hour)
	if err := r.set(r.x, r.j); err != nil {
		t.Fatal(err)
	}
	return r
}

func (r *rig) set(a ...identity.Authority) error { return r.SetAuthorities(a, r.vault.open) }

func (r *rig) newX509(t testing.TB, ttl time.Duration) identity.Authority {
	t.Helper()
	a, key, err := NewX509Authority(r.td, ttl, r.clock.now())
	if err != nil {
		t.Fatal(err)
	}
	r.keep(a, key)
	return a
}

func (r *rig) newJWT(t testing.TB, alg string, ttl time.Duration) identity.Authority {
	t.Helper()
	a, key, err := NewJWTAuthority(alg, ttl, r.clock.now())
	if err != nil {
		t.Fatal(err)
	}
	r.keep(a, key)
	return a
}

func (r *rig) keep(a identity.Authority, key []byte) {
	r.vault.mu.Lock()
	defer r.vault.mu.Unlock()
	r.vault.keys[a.ID] = key
}

func (r *rig) bundle(t testing.TB, as ...identity.Authority) *x509bundle.Bundle {
	t.Helper()
	b := x509bundle.New(r.td)
	for _, a := range as {
		b.AddX509Authority(parse(t, a.Cert))
	}
	return b
}

// issue is Prepare and Issue for an ID of the rig's trust domain.
func (r *rig) issue(iss identity.Issuance) (identity.X509SVID, error) {
	p, err := r.PrepareX509(iss)
	if err != nil {
		return identity.X509SVID{}, err
	}
	return p.Issue()
}

func (r *rig) mustIssue(t testing.TB, iss identity.Issuance) (identity.X509SVID, *x509.Certificate) {
	t.Helper()
	svid, err := r.issue(iss)
	if err != nil {
		t.Fatal(err)
	}
	return svid, parse(t, svid.Chain[0])
}

func (r *rig) request(t testing.TB) identity.Issuance {
	return identity.Issuance{ID: workload(), PublicKey: newP256(t).Public()}
}

func workload() spiffeid.ID { return spiffeid.RequireFromString("spiffe://example.org/ns/prod/sa/web") }

func parse(t testing.TB, der []byte) *x509.Certificate {
	t.Helper()
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func chain(t testing.TB, ders [][]byte) []*x509.Certificate {
	t.Helper()
	out := make([]*x509.Certificate, len(ders))
	for i, d := range ders {
		out[i] = parse(t, d)
	}
	return out
}

func newP256(t testing.TB) *ecdsa.PrivateKey { return newEC(t, elliptic.P256()) }

func newEC(t testing.TB, curve elliptic.Curve) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func newRSA(t testing.TB, bits int) *rsa.PrivateKey {
	t.Helper()
	k, err := rsa.GenerateKey(rand.Reader, bits)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// publicKeys is a key of each kind that a leaf may have.
func publicKeys(t testing.TB) map[string]crypto.PublicKey {
	t.Helper()
	ed, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return map[string]crypto.PublicKey{
		"P-256":    newP256(t).Public(),
		"P-384":    newEC(t, elliptic.P384()).Public(),
		"Ed25519":  ed,
		"RSA-2048": newRSA(t, 2048).Public(),
	}
}

func wantErr(t testing.TB, err, sentinel error) {
	t.Helper()
	if !errors.Is(err, sentinel) {
		t.Errorf("got error %v; want one that wraps %q", err, sentinel)
	}
}
