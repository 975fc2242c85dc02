package agent

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	workloadv1 "countersign.io/countersign/api/workload/v1"
	"countersign.io/countersign/identity"
)

func TestFetchJWT(t *testing.T) {
	c := newCluster(t)
	c.member("a")
	second := testGrant{entry: "e-2", id: "spiffe://example.org/second"}
	c.grant("web", web(), second)
	c.grant("other", web())
	a := run(t, c.config())
	fetch := func(token string, id string, audience ...string) []identity.JWTSVID {
		t.Helper()
		var want spiffeid.ID
		if id != "" {
			want = spiffeid.RequireFromString(id)
		}
		s, err := a.FetchJWT(t.Context(), caller(token), audience, want)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	all := fetch("web", "", "db", "cache")
	if len(all) != 2 || all[0].ID.String() != "spiffe://example.org/web" || all[0].ExpiresAt.IsZero() || all[0].IssuedAt.IsZero() {
		t.Fatalf("got %+v", all)
	}
	// The audience is a set.
	if again := fetch("web", "", "cache", "db", "db"); again[0].Token != all[0].Token || c.jwts != 1 {
		t.Error("asked again for the same")
	}
	// Another audience, ID or workload is another question.
	if one := fetch("web", second.id, "db", "cache"); len(one) != 1 || one[0].ID.String() != second.id {
		t.Errorf("got %+v", one)
	}
	fetch("web", "", "db")
	fetch("other", "", "db", "cache")
	if c.jwts != 4 {
		t.Errorf("%d questions", c.jwts)
	}
	// Many at once are one.
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() { _, _ = a.FetchJWT(t.Context(), caller("web"), []string{"many"}, spiffeid.ID{}) })
	}
	wg.Wait()
	if c.jwts > 6 {
		t.Errorf("%d questions", c.jwts)
	}
	// A change leaves what was cached behind.
	eventually(t, "watched", func() (ok bool) { c.locked(func() { ok = len(c.watched) == 2 }); return ok })
	c.grant("web", second)
	c.pushChanged(false)
	eventually(t, "changed", func() bool { return len(fetch("web", "", "db", "cache")) == 1 })

	for _, audience := range [][]string{nil, {}, {""}, {"a", ""}, {strings.Repeat("x", 513)}, make([]string, 33), {"a\x00b"}} {
		if _, err := a.FetchJWT(t.Context(), caller("web"), audience, spiffeid.ID{}); !errors.Is(err, identity.ErrInvalid) {
			t.Errorf("audience %q: %v", audience, err)
		}
	}
	if _, err := a.FetchJWT(t.Context(), caller("web"), []string{"db"}, spiffeid.RequireFromString("spiffe://example.org/not-mine")); !errors.Is(err, identity.ErrDenied) {
		t.Errorf("an ID not entitled to: %v", err)
	}
	if _, err := a.FetchJWT(t.Context(), caller("nobody"), []string{"db"}, spiffeid.ID{}); !errors.Is(err, identity.ErrDenied) {
		t.Errorf("no identity: %v", err)
	}
	c.pushChanged(true)
	c.grant("web")
	eventually(t, "ended", func() bool {
		_, err := a.FetchJWT(t.Context(), caller("web"), []string{"db", "cache"}, spiffeid.ID{})
		return errors.Is(err, identity.ErrDenied)
	})
}

func TestBadJWTsAreNotServed(t *testing.T) {
	other := newTestCA()
	for name, bad := range map[string]func(*cluster, *workloadv1.JWTSVID){
		"another key": func(c *cluster, s *workloadv1.JWTSVID) {
			s.Token = other.token(s.SpiffeId, []string{"db"}, time.Minute)
		},
		"another key, kid": func(c *cluster, s *workloadv1.JWTSVID) {
			o := *other
			o.kid = c.ca.kid
			s.Token = o.token(s.SpiffeId, []string{"db"}, time.Minute)
		},
		"another audience": func(c *cluster, s *workloadv1.JWTSVID) { s.Token = c.ca.token(s.SpiffeId, []string{"x"}, time.Minute) },
		"an audience less": func(c *cluster, s *workloadv1.JWTSVID) {
			s.Token = c.ca.token(s.SpiffeId, []string{"cache"}, time.Minute)
		},
		"expired": func(c *cluster, s *workloadv1.JWTSVID) {
			s.Token = c.ca.token(s.SpiffeId, []string{"db", "cache"}, -2*time.Minute)
		},
		"just expired": func(c *cluster, s *workloadv1.JWTSVID) {
			s.Token = c.ca.token(s.SpiffeId, []string{"db", "cache"}, -time.Second)
		},
		"another subject": func(c *cluster, s *workloadv1.JWTSVID) {
			s.Token = c.ca.token("spiffe://example.org/db", []string{"db", "cache"}, time.Minute)
		},
		"another domain": func(c *cluster, s *workloadv1.JWTSVID) {
			s.SpiffeId = "spiffe://other.org/web"
			s.Token = c.ca.token(s.SpiffeId, []string{"db", "cache"}, time.Minute)
		},
		"a member's": func(c *cluster, s *workloadv1.JWTSVID) {
			s.SpiffeId = "spiffe://example.org/countersign/member/a"
			s.Token = c.ca.token(s.SpiffeId, []string{"db", "cache"}, time.Minute)
		},
		"tampered": func(c *cluster, s *workloadv1.JWTSVID) { s.Token = s.Token[:len(s.Token)-8] + "AAAAAAAA" },
		"garbage":  func(c *cluster, s *workloadv1.JWTSVID) { s.Token = "garbage" },
		"alg none": func(c *cluster, s *workloadv1.JWTSVID) {
			s.Token = "eyJhbGciOiJub25lIn0" + s.Token[strings.Index(s.Token, "."):]
		},
		"long hint": func(c *cluster, s *workloadv1.JWTSVID) { s.Hint = strings.Repeat("x", 1025) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := newCluster(t)
			c.member("a")
			c.grant("web", web())
			c.badJWT = func(s *workloadv1.JWTSVID) { bad(c, s) }
			a := run(t, c.config())
			got, err := a.FetchJWT(t.Context(), caller("web"), []string{"db", "cache"}, spiffeid.ID{})
			if !errors.Is(err, identity.ErrUnavailable) || !errors.Is(err, errAnswer) || got != nil {
				t.Errorf("got %v, %v", got, err)
			}
			if err != nil && strings.Contains(err.Error(), "eyJ") {
				t.Errorf("a token in the error: %v", err)
			}
		})
	}
}

func TestJWTCacheIsBounded(t *testing.T) {
	c := newCluster(t)
	c.member("a")
	a := must(New(c.config()))
	for i := range 3 * maxJWTs {
		a.jwts.Add(jwtKey{audience: fmt.Sprint(i)}, jwtAnswer{})
	}
	if n := a.jwts.Len(); n != maxJWTs {
		t.Errorf("%d answers are cached", n)
	}
}
