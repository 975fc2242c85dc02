package ca

import (
	"crypto"
	"crypto/x509"
	"errors"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"countersign.io/countersign/attestor/node"
	"countersign.io/countersign/identity"
)

// TestVouch: whoever has pinned a root verifies the members of the third root after it, also when its certificate has ended; and by
// no other key.
func TestVouch(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("example.org")
	now := time.Now()
	type root struct {
		a   identity.Authority
		key crypto.Signer
	}
	next := func(ttl time.Duration) root {
		a, der, err := NewX509Authority(td, ttl, now)
		if err != nil {
			t.Fatal(err)
		}
		key, err := x509.ParsePKCS8PrivateKey(der)
		if err != nil {
			t.Fatal(err)
		}
		return root{a, key.(crypto.Signer)}
	}
	roots := []root{next(time.Hour)}
	for i := range 5 {
		r := next(time.Duration(i+2) * 24 * time.Hour)
		var err error
		before := roots[len(roots)-1]
		if r.a.Vouched, err = Vouch(&before.a, before.key, &r.a, now); err != nil {
			t.Fatal(err)
		}
		roots = append(roots, r)
	}
	stranger := next(24 * time.Hour)
	shown := func(r root, at time.Time) []*x509.Certificate {
		c, err := New(Config{TrustDomain: td, MemberName: "ca-1", Now: func() time.Time { return at }})
		if err != nil {
			t.Fatal(err)
		}
		if err := c.SetAuthorities([]identity.Authority{r.a}, func(identity.Authority) (crypto.Signer, error) { return r.key, nil }); err != nil {
			t.Fatal(err)
		}
		cert, err := c.MemberCertificate()
		if err != nil {
			t.Fatal(err)
		}
		var out []*x509.Certificate
		for _, der := range cert.Certificate {
			x, err := x509.ParseCertificate(der)
			if err != nil {
				t.Fatal(err)
			}
			out = append(out, x)
		}
		return out
	}
	verifies := func(chain []*x509.Certificate, pinned root, at time.Time) bool {
		cert, err := x509.ParseCertificate(pinned.a.Cert)
		if err != nil {
			t.Fatal(err)
		}
		opts := x509.VerifyOptions{Roots: x509.NewCertPool(), Intermediates: x509.NewCertPool(), CurrentTime: at, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
		for _, c := range node.PinnedRoots(chain[1:], node.Pin(cert.RawSubjectPublicKeyInfo), at) {
			opts.Roots.AddCert(c)
		}
		for _, c := range chain[1:] {
			opts.Intermediates.AddCert(c)
		}
		_, err = chain[0].Verify(opts)
		return err == nil
	}
	for _, row := range []struct {
		name          string
		shows, pinned int
		after         time.Duration
		want          bool
	}{
		{"its own", 0, 0, 0, true},
		{"the one before", 1, 0, 0, true},
		{"three before", 3, 0, 0, true},
		{"the one before, whose certificate has ended", 1, 0, 2 * time.Hour, true},
		{"three before, whose certificate has ended", 3, 0, 2 * time.Hour, true},
		{"too many before", 5, 0, 0, false},
		{"a later one", 0, 1, 0, false},
	} {
		at := now.Add(row.after)
		if got := verifies(shown(roots[row.shows], at), roots[row.pinned], at); got != row.want {
			t.Errorf("%s: %v", row.name, got)
		}
	}
	if verifies(shown(roots[1], now), stranger, now) {
		t.Error("by a stranger's pin")
	}
	// A compromised one's successor, for which nobody vouches.
	alone := roots[1]
	alone.a.Vouched = nil
	if verifies(shown(alone, now), roots[0], now) {
		t.Error("without being vouched for")
	}
	// Somebody who shows the pinned root beside his own chain.
	if verifies(append(shown(stranger, now), shown(roots[0], now)[1:]...), roots[0], now) {
		t.Error("a stranger that shows the pinned root")
	}

	if _, err := Vouch(&roots[0].a, stranger.key, &roots[1].a, now); err == nil {
		t.Error("signed by another key")
	}
	under := roots[1].a
	under.Roots = [][]byte{roots[0].a.Cert}
	if _, err := Vouch(&roots[0].a, roots[0].key, &under, now); !errors.Is(err, identity.ErrInvalid) {
		t.Errorf("below an upstream: %v", err)
	}
	for _, bad := range []identity.Authority{{}, {Cert: []byte("garbage")}} {
		if _, err := Vouch(&bad, roots[0].key, &roots[1].a, now); !errors.Is(err, identity.ErrInvalid) {
			t.Errorf("of garbage: %v", err)
		}
		if _, err := Vouch(&roots[0].a, roots[0].key, &bad, now); !errors.Is(err, identity.ErrInvalid) {
			t.Errorf("for garbage: %v", err)
		}
	}
}
