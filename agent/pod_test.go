package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"countersign.io/countersign/attestor"
	"countersign.io/countersign/identity"
)

// podWorld is a sidecar of a pod whose token a test replaces.
type podWorld struct {
	*cluster
	token atomic.Value
	cfg   Config
}

func newPodWorld(t *testing.T) *podWorld {
	w := &podWorld{cluster: newCluster(t)}
	w.member("a")
	w.token.Store("token-1")
	w.cfg = w.config()
	w.cfg.Credential, w.cfg.TrustDomain = nil, td
	w.cfg.Pod = func() ([]byte, error) { return []byte(w.token.Load().(string) + "\n"), nil }
	return w
}

// caller is whoever reaches the pod's socket.
func (w *podWorld) caller(context.Context) (*attestor.Workload, error) {
	return &attestor.Workload{Key: attestor.VolumeKey("", "/run/x"), Evidence: identity.Evidence{Token: []byte(w.token.Load().(string))}}, nil
}

func TestPod(t *testing.T) {
	w := newPodWorld(t)
	a := run(t, w.cfg)
	currentErr(t, a.Agent, w.caller, identity.ErrDenied) // and not Unavailable: a member said so
	w.grant("token-1", web())
	s := watchUpdates(t, a.Agent, w.caller)
	if u := s.next(); u.SVIDs[0].ID.String() != web().id {
		t.Fatalf("got %+v", u)
	}
	if err := a.Ready(); err != nil {
		t.Error(err)
	}
	if jwts, err := a.FetchJWT(t.Context(), w.caller, []string{"db"}, spiffeid.ID{}); err != nil || len(jwts) != 1 {
		t.Errorf("%v, %v", jwts, err)
	}
	w.locked(func() {
		if w.attested != 0 || !slices.Contains(w.followed, "token-1") {
			t.Errorf("attested %d times, followed by %q", w.attested, w.followed)
		}
	})
	// By push, with the token as it is then.
	eventually(t, "the member knows of it", func() (ok bool) { w.locked(func() { ok = len(w.watched) == 1 }); return ok })
	w.token.Store("token-2")
	more := web()
	more.id += "/more"
	w.grant("token-2", more)
	w.pushChanged(false)
	if u := s.next(); u.SVIDs[0].ID.String() != more.id {
		t.Fatalf("got %+v", u)
	}
	// A caller with another token is the same pod: the socket says so.
	w.token.Store("token-3")
	if u := current(t, a.Agent, w.caller); u.SVIDs[0].ID.String() != more.id {
		t.Fatalf("got %+v", u)
	}
	w.pushChanged(true)
	s.end(identity.ErrDenied)
}

// TestPodIsBanned: a definite no ends what is served, and an end of the members does not.
func TestPodIsBanned(t *testing.T) {
	for name, row := range map[string]struct {
		says error
		ends bool
	}{
		"banned":           {fmt.Errorf("%w: the node's agent is banned", identity.ErrDenied), true},
		"members are away": {fmt.Errorf("%w: this member is stopping", identity.ErrUnavailable), false},
		"token has ended":  {fmt.Errorf("%w: it has expired", identity.ErrUnauthenticated), false},
	} {
		t.Run(name, func(t *testing.T) {
			w := newPodWorld(t)
			w.grant("token-1", web())
			a := run(t, w.cfg)
			s := watchUpdates(t, a.Agent, w.caller)
			s.next()
			w.locked(func() { w.followErr = row.says; w.followed = nil })
			w.push(nil) // ends its stream
			eventually(t, "it comes again", func() (ok bool) { w.locked(func() { ok = len(w.followed) > 1 }); return ok })
			if row.ends {
				s.end(identity.ErrDenied)
				return
			}
			s.quiet()
			if u := current(t, a.Agent, w.caller); u.SVIDs[0].ID.String() != web().id {
				t.Errorf("got %+v", u)
			}
		})
	}
}

// TestPodShowsItsTokenToMembersOnly: nobody whom the pin does not vouch for, and, once there is a bundle, whom that does not, is shown it.
func TestPodShowsItsTokenToMembersOnly(t *testing.T) {
	w, other := newPodWorld(t), newCluster(t)
	other.member("stranger")
	other.grant("token-1", web())
	cfg := w.cfg
	cfg.Servers = other.config().Servers
	a := run(t, cfg)
	currentErr(t, a.Agent, w.caller, identity.ErrUnavailable)
	other.locked(func() {
		if len(other.followed) != 0 || len(other.tokens) != 0 {
			t.Error("a stranger was shown the token")
		}
	})
	b := run(t, w.cfg)
	eventually(t, "it has a bundle", func() bool { return b.trust.Load() != nil })
	if c := b.podContact(); c.pin != "" || c.trust == nil {
		t.Errorf("the pin, which cannot be revoked, still counts: %+v", c)
	}
	b.anew.Store(true)
	if c := b.podContact(); c.pin == "" {
		t.Error("a cluster that was made anew could never be known")
	}
}

func TestPodRefusesConfigurations(t *testing.T) {
	w := newPodWorld(t)
	for name, spoil := range map[string]func(*Config){
		"another credential": func(c *Config) { c.Credential = KubeToken("x", nil) },
		"a state folder":     func(c *Config) { c.StateDir = t.TempDir() },
		"no trust domain":    func(c *Config) { c.TrustDomain = spiffeid.TrustDomain{} },
	} {
		cfg := w.cfg
		spoil(&cfg)
		if _, err := New(cfg); !errors.Is(err, identity.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	cfg := w.cfg
	for _, read := range []func() ([]byte, error){
		func() ([]byte, error) { return nil, errors.New("no such file") },
		func() ([]byte, error) { return []byte(" "), nil },
		func() ([]byte, error) { return make([]byte, identity.MaxTokenBytes+1), nil },
	} {
		cfg.Pod = read
		if _, err := must(New(cfg)).podToken(); !errors.Is(err, identity.ErrUnavailable) {
			t.Errorf("%v", err)
		}
	}
}
