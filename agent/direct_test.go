package agent

import (
	"crypto"
	"crypto/x509"
	"errors"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	workloadv1 "countersign.io/countersign/api/workload/v1"
	"countersign.io/countersign/identity"
)

func (c *cluster) direct(token string) DirectConfig {
	cfg := c.config()
	return DirectConfig{Servers: cfg.Servers, Pin: cfg.Pin, Token: []byte(token)}
}

func TestDirect(t *testing.T) {
	c := newCluster(t)
	dead := c.member("dead")
	c.member("a")
	c.grant("pod", web())
	dead.stop()
	u, err := Direct(t.Context(), c.direct("pod"))
	if err != nil {
		t.Fatal(err)
	}
	leaf := must(x509.ParseCertificate(u.SVIDs[0].Chain[0]))
	if u.SVIDs[0].ID.String() != web().id || u.Bundles[td].Sequence != 1 || !samePublic(leaf, must(x509.ParsePKCS8PrivateKey(u.SVIDs[0].Key))) {
		t.Errorf("got %+v", u)
	}
	jwts, bundle, err := DirectJWT(t.Context(), c.direct("pod"), []string{"db"}, spiffeid.ID{})
	if err != nil || len(jwts) != 1 || bundle.TrustDomain != td {
		t.Errorf("got %v, %v, %v", jwts, bundle, err)
	}
	c.locked(func() {
		if c.attested != 0 {
			t.Error("it attested a node")
		}
	})
}

func TestDirectRefuses(t *testing.T) {
	c := newCluster(t)
	c.member("a")
	c.grant("pod", web())
	for name, tt := range map[string]struct {
		spoil func(*DirectConfig)
		want  error
	}{
		"no identity":        {func(cfg *DirectConfig) { cfg.Token = []byte("other") }, identity.ErrDenied},
		"no token":           {func(cfg *DirectConfig) { cfg.Token = nil }, identity.ErrInvalid},
		"huge token":         {func(cfg *DirectConfig) { cfg.Token = make([]byte, 1<<20) }, identity.ErrInvalid},
		"no pin":             {func(cfg *DirectConfig) { cfg.Pin = "" }, identity.ErrInvalid},
		"no servers":         {func(cfg *DirectConfig) { cfg.Servers = nil }, identity.ErrInvalid},
		"another's pin":      {func(cfg *DirectConfig) { cfg.Pin = newTestCA().pin() }, identity.ErrUnavailable},
		"another's name":     {func(cfg *DirectConfig) { cfg.TrustDomain = spiffeid.RequireTrustDomainFromString("other.org") }, identity.ErrUnavailable},
		"nobody there":       {func(cfg *DirectConfig) { cfg.Servers = []string{"127.0.0.1:1"} }, identity.ErrUnavailable},
		"another key type":   {func(cfg *DirectConfig) { cfg.KeyType = "dsa" }, identity.ErrInvalid},
		"by another's token": {func(cfg *DirectConfig) { cfg.Token = []byte("poison") }, identity.ErrInvalid},
	} {
		cfg := c.direct("pod")
		tt.spoil(&cfg)
		if u, err := Direct(t.Context(), cfg); !errors.Is(err, tt.want) || u != nil {
			t.Errorf("%s: %v, %v", name, u, err)
		}
		if name == "by another's token" {
			continue
		}
		if _, _, err := DirectJWT(t.Context(), cfg, []string{"db"}, spiffeid.ID{}); !errors.Is(err, tt.want) {
			t.Errorf("%s, JWT: %v", name, err)
		}
	}
	if _, _, err := DirectJWT(t.Context(), c.direct("pod"), nil, spiffeid.ID{}); !errors.Is(err, identity.ErrInvalid) {
		t.Errorf("no audience: %v", err)
	}
	if n := asked(c, "pod"); n != 0 {
		t.Errorf("a token was sent %d times to a server that did not verify", n)
	}
}

func TestDirectVerifiesAnswers(t *testing.T) {
	for name := range badAnswers(newCluster(t)) {
		c := newCluster(t)
		c.member("a")
		c.grant("pod", web())
		c.bad = badAnswers(c)[name]
		if u, err := Direct(t.Context(), c.direct("pod")); !errors.Is(err, errAnswer) || u != nil {
			t.Errorf("%s: %v, %v", name, u, err)
		}
	}
	c := newCluster(t)
	c.member("a")
	c.grant("pod", web())
	c.bad = func(r *workloadv1.X509Result, pub crypto.PublicKey) {}
	c.bundle.TrustDomain = spiffeid.RequireTrustDomainFromString("other.org")
	if _, err := Direct(t.Context(), c.direct("pod")); !errors.Is(err, errAnswer) {
		t.Errorf("a bundle of another trust domain: %v", err)
	}
	c.bundle = nil
	if _, err := Direct(t.Context(), c.direct("pod")); !errors.Is(err, errAnswer) {
		t.Errorf("no bundle: %v", err)
	}
	c = newCluster(t)
	c.member("a")
	c.grant("pod", web())
	c.badJWT = func(s *workloadv1.JWTSVID) { s.Token = newTestCA().token(s.SpiffeId, []string{"db"}, time.Minute) }
	if _, _, err := DirectJWT(t.Context(), c.direct("pod"), []string{"db"}, spiffeid.ID{}); !errors.Is(err, errAnswer) {
		t.Errorf("a JWT by another key: %v", err)
	}
}
