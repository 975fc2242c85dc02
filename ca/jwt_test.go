package ca

import (
	"strings"
	"testing"
	"time"

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
