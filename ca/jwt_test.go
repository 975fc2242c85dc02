package ca

import (
	"bytes"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"countersign.io/countersign/identity"
)

func TestIssueJWT(t *testing.T) {
	r := newRig(t)
	now := r.clock.now()
	p, err := r.PrepareJWT(workload(), []string{"db"}, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	svid, err := p.Issue()
	if err != nil {
		t.Fatal(err)
	}
	if svid.ID != workload() || !svid.IssuedAt.Equal(now.Truncate(time.Second)) || !svid.ExpiresAt.Equal(now.Add(time.Minute).Truncate(time.Second)) {
		t.Errorf("%v, from %v until %v", svid.ID, svid.IssuedAt, svid.ExpiresAt)
	}
	_, claims := r.token(t)
	if claims["sub"] != workload().String() || claims["iat"] != float64(now.Unix()) ||
		claims["exp"] != float64(now.Add(identity.DefaultJWTTL).Unix()) {
		t.Errorf("claims %v", claims)
	}
	if aud, ok := claims["aud"].([]any); !ok || len(aud) != 1 || aud[0] != "db" {
		t.Errorf("audience %v", claims["aud"])
	}
}

// TestTokensVerify: whatever the numbers of a signature are, of which one in 128 begins with zeros.
func TestTokensVerify(t *testing.T) {
	r := newRig(t)
	a := r.newJWT(t, ES256, time.Hour)
	if err := r.set(r.x, a); err != nil {
		t.Fatal(err)
	}
	key, err := x509.ParsePKIXPublicKey(a.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	for range 600 {
		p, err := r.PrepareJWT(workload(), []string{"db", "<&>\u2028\""}, 0)
		if err != nil {
			t.Fatal(err)
		}
		svid, err := p.Issue()
		if err != nil {
			t.Fatal(err)
		}
		token, err := jose.ParseSignedCompact(svid.Token, []jose.SignatureAlgorithm{jose.ES256})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := token.Verify(key); err != nil {
			t.Fatal(err)
		}
	}
}

// TestJWTIssuer: tokens name it if there is one, and no claim else.
func TestJWTIssuer(t *testing.T) {
	r := newRig(t)
	if _, claims := r.token(t); len(claims) != 4 {
		t.Errorf("without an issuer: %v", claims)
	}
	r.cfg.JWTIssuer = "https://ca.example.org"
	if _, claims := r.token(t); len(claims) != 5 || claims["iss"] != "https://ca.example.org" {
		t.Errorf("%v", claims)
	}
	cfg := r.cfg
	cfg.JWTIssuer = "http://ca.example.org/"
	if _, err := New(cfg); !errors.Is(err, identity.ErrInvalid) {
		t.Errorf("an issuer that is none: %v", err)
	}
}

func TestRawSignature(t *testing.T) {
	der := func(r, s *big.Int) []byte {
		b, err := asn1.Marshal(struct{ R, S *big.Int }{r, s})
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	one, top := big.NewInt(1), new(big.Int).Lsh(big.NewInt(255), 248)
	got, err := rawSignature(der(one, top))
	if want := append(append(make([]byte, 31), 1, 255), make([]byte, 31)...); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%x, %v", got, err)
	}
	for name, b := range map[string][]byte{
		"nothing":     nil,
		"more behind": append(der(one, one), 0),
		"too large":   der(one, new(big.Int).Lsh(one, 256)),
		"negative":    der(one, big.NewInt(-1)),
		"zero":        der(big.NewInt(0), one),
		"cut":         der(one, one)[:4],
	} {
		if got, err := rawSignature(b); err == nil {
			t.Errorf("%s: %x", name, got)
		}
	}
}

func TestPrepareJWTRefuses(t *testing.T) {
	r := newRig(t)
	for _, c := range []struct {
		name     string
		id       spiffeid.ID
		audience []string
		ttl      time.Duration
		want     error
	}{
		{"no ID", spiffeid.ID{}, []string{"db"}, 0, identity.ErrInvalid},
		{"no path", r.td.ID(), []string{"db"}, 0, identity.ErrInvalid},
		{"another trust domain", spiffeid.RequireFromString("spiffe://other.org/web"), []string{"db"}, 0, identity.ErrInvalid},
		{"a member", r.member, []string{"db"}, 0, identity.ErrDenied},
		{"an agent", spiffeid.RequireFromPath(r.td, "/countersign/agent/join/a"), []string{"db"}, 0, identity.ErrDenied},
		{"no audience", workload(), nil, 0, identity.ErrInvalid},
		{"an empty audience", workload(), []string{"db", ""}, 0, identity.ErrInvalid},
		{"a long audience", workload(), []string{strings.Repeat("a", identity.MaxAudienceBytes+1)}, 0, identity.ErrInvalid},
		{"a 1 MiB audience", workload(), []string{strings.Repeat("a", 1<<20)}, 0, identity.ErrInvalid},
		{"thousands of audiences", workload(), make([]string, 5000), 0, identity.ErrInvalid},
		{"an audience that is not UTF-8", workload(), []string{"\xff"}, 0, identity.ErrInvalid},
		{"TTL too short", workload(), []string{"db"}, time.Second, identity.ErrInvalid},
		{"negative TTL", workload(), []string{"db"}, -time.Minute, identity.ErrInvalid},
		{"TTL too long", workload(), []string{"db"}, identity.MaxJWTTL + 1, identity.ErrInvalid},
	} {
		t.Run(c.name, func(t *testing.T) {
			p, err := r.PrepareJWT(c.id, c.audience, c.ttl)
			wantErr(t, err, c.want)
			if p != nil {
				t.Error("and yet there is a token")
			}
			if err != nil && len(err.Error()) > 1000 {
				t.Errorf("an error of %d bytes", len(err.Error()))
			}
		})
	}
}

func TestPreparedJWTIsSingleUseAndItsAudienceFixed(t *testing.T) {
	r := newRig(t)
	audience := []string{"db"}
	p, err := r.PrepareJWT(workload(), audience, 0)
	if err != nil {
		t.Fatal(err)
	}
	audience[0] = "bank"
	if p.claims.Audience[0] != "db" {
		t.Error("the audience changed after the check")
	}
	if _, err := p.Issue(); err != nil {
		t.Fatal(err)
	}
	_, err = p.Issue()
	wantErr(t, err, identity.ErrPrecondition)
}

func TestJWTNeverOutlivesItsKey(t *testing.T) {
	r := newRig(t)
	short := r.newJWT(t, ES256, time.Minute)
	if err := r.set(r.x, short); err != nil {
		t.Fatal(err)
	}
	p, err := r.PrepareJWT(workload(), []string{"db"}, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if svid, err := p.Issue(); err != nil || !svid.ExpiresAt.Equal(short.NotAfter) {
		t.Errorf("until %v, the key until %v, %v", svid.ExpiresAt, short.NotAfter, err)
	}
	for _, d := range []time.Duration{time.Minute, -time.Hour} {
		r.clock.add(d)
		_, err = r.PrepareJWT(workload(), []string{"db"}, 0)
		wantErr(t, err, identity.ErrUnavailable)
		wantErr(t, r.Ready(), identity.ErrUnavailable)
	}
}
