package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"countersign.io/countersign/attestor"
	"countersign.io/countersign/identity"
)

// The tests here run whole agents and members, TLS and all, on synctest's clock.

// away stops every member.
func (c *cluster) away() {
	c.mu.Lock()
	members := slices.Clone(c.members)
	c.mu.Unlock()
	for _, m := range members {
		m.stop()
	}
}

func asked(c *cluster, token string) (n int) {
	c.locked(func() {
		for _, s := range c.tokens {
			if s == token {
				n++
			}
		}
	})
	return n
}

func TestRenewsAtHalfLifeWithFreshEvidence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t)
		c.memoryMember("a")
		c.grant("web", web())
		a := run(t, c.config())
		var attested atomic.Int32
		w := watchUpdates(t, a.Agent, func(ctx context.Context) (*attestor.Workload, error) {
			attested.Add(1)
			return caller("web")(ctx)
		})
		old := <-w.got
		for i := range 5 {
			began := time.Now()
			u := <-w.got
			if after := time.Since(began); after < 26*time.Minute || after > 34*time.Minute {
				t.Errorf("renewed after %v of 1 h", after)
			}
			if n := attested.Load(); n != int32(i)+2 {
				t.Errorf("attested %d times for %d renewals", n, i+1)
			}
			if string(u.SVIDs[0].Key) == string(old.SVIDs[0].Key) {
				t.Error("the key was kept")
			}
			old = u
		}
		if n := asked(c, "web"); n != 6 {
			t.Errorf("asked %d times", n)
		}
	})
}

func TestHalfLifeJitter(t *testing.T) {
	now := time.Now()
	seen := map[time.Duration]bool{}
	for range 1000 {
		at := halfLife(now, now.Add(time.Hour)).Sub(now)
		if at < 27*time.Minute || at > 33*time.Minute {
			t.Fatalf("renewal at %v", at)
		}
		seen[at.Truncate(10*time.Second)] = true
	}
	if len(seen) < 30 {
		t.Errorf("renewals fall on %d moments only", len(seen))
	}
	for _, life := range []time.Duration{0, -time.Hour, 1} { // must not panic
		halfLife(now, now.Add(life))
		retryIn(now, now.Add(life))
		renewRestored(now.Add(-time.Hour), now.Add(life), now)
	}
	backoff(1000)
}

func TestNobodyThereNoRenewal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t)
		c.memoryMember("a")
		c.grant("web", web())
		c.grant("gone", web())
		a := run(t, c.config())
		first := current(t, a.Agent, caller("web"))
		current(t, a.Agent, caller("gone"))
		time.Sleep(20 * time.Minute)
		if u := current(t, a.Agent, caller("web")); u != first {
			t.Error("not from the cache")
		}
		time.Sleep(20 * time.Minute)
		if n := asked(c, "web"); n != 1 {
			t.Errorf("renewed for nobody: asked %d times", n)
		}
		if u := current(t, a.Agent, caller("web")); u == first || asked(c, "web") != 2 {
			t.Error("past half-life it is not fetched fresh")
		}
		time.Sleep(21 * time.Minute)
		if n := a.Status().Workloads; n != 1 {
			t.Errorf("%d workloads: what has expired is kept", n)
		}
		time.Sleep(time.Hour)
		synctest.Wait()
		c.locked(func() {
			if a.Status().Workloads != 0 || len(c.watched) != 0 || len(a.cache.timers) != 0 {
				t.Errorf("left: %+v, watched %v", a.Status(), c.watched)
			}
		})
	})
}

func TestOutageOfAllMembers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t)
		c.memoryMember("a")
		c.memoryMember("b")
		short := testGrant{entry: "e-short", id: "spiffe://example.org/short", ttl: 10 * time.Minute}
		c.grant("web", web(), short)
		a := run(t, c.config())
		w := watchUpdates(t, a.Agent, caller("web"))
		if u := <-w.got; len(u.SVIDs) != 2 {
			t.Fatal(u)
		}
		c.away()
		synctest.Wait()
		time.Sleep(9 * time.Minute)
		w.quiet()
		if err := a.Ready(); !errors.Is(err, identity.ErrUnavailable) {
			t.Errorf("ready without a member: %v", err)
		}
		began := time.Now()
		if u := current(t, a.Agent, caller("web")); len(u.SVIDs) != 2 {
			t.Error(u)
		}
		currentErr(t, a.Agent, caller("new"), identity.ErrUnavailable)
		if d := time.Since(began); d > time.Second {
			t.Errorf("answers took %v though nobody is there to ask", d)
		}
		// One SVID expires, then the other.
		if u := <-w.got; len(u.SVIDs) != 1 || u.SVIDs[0].EntryID != "e-web" {
			t.Errorf("got %+v", u.SVIDs)
		}
		time.Sleep(40 * time.Minute)
		w.quiet()
		if err := <-w.done; !errors.Is(err, identity.ErrUnavailable) || errors.Is(err, identity.ErrDenied) {
			t.Errorf("ended with %v", err)
		} else {
			w.done <- err
		}
		currentErr(t, a.Agent, caller("web"), identity.ErrUnavailable)
	})
}

func TestRenewsOnceAMemberIsBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t)
		a1 := c.memoryMember("a")
		c.grant("web", web())
		cfg := c.config()
		cfg.Servers = append(cfg.Servers, "b:1")
		a := run(t, cfg)
		w := watchUpdates(t, a.Agent, caller("web"))
		<-w.got
		a1.stop()
		time.Sleep(50 * time.Minute)
		w.quiet()
		began := time.Now()
		c.memoryMember("b")
		<-w.got
		if d := time.Since(began); d > 2*time.Minute {
			t.Errorf("renewed %v after a member was back", d)
		}
	})
}

// TestStreamOpenedInAnOutageIsRenewed: past half-life nobody was there, so nothing was asked; whoever then comes while no
// member can be asked is served what there is, and must not be left with it until it expires.
func TestStreamOpenedInAnOutageIsRenewed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t)
		a1 := c.memoryMember("a")
		c.grant("web", web())
		cfg := c.config()
		cfg.Servers = append(cfg.Servers, "b:1")
		a := run(t, cfg)
		current(t, a.Agent, caller("web"))
		time.Sleep(40 * time.Minute) // its timer has gone off, and waits for the end
		a1.stop()
		synctest.Wait()
		w := watchUpdates(t, a.Agent, caller("web"))
		<-w.got
		if n := asked(c, "web"); n != 1 {
			t.Fatalf("asked %d times", n)
		}
		began := time.Now()
		c.memoryMember("b")
		select {
		case <-w.got:
		case err := <-w.done:
			w.done <- err
			t.Fatalf("never renewed: %v", err)
		case <-time.After(time.Hour):
			t.Fatal("never renewed")
		}
		if d := time.Since(began); d > 5*time.Minute {
			t.Errorf("renewed %v after a member was back", d)
		}
	})
}

func TestChangedButNobodyConfirms(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t)
		c.memoryMember("a")
		c.grant("web", web())
		a := run(t, c.config())
		w := watchUpdates(t, a.Agent, caller("web"))
		<-w.got
		synctest.Wait()
		c.locked(func() { c.issueErr = fmt.Errorf("%w: stale", identity.ErrUnavailable) })
		began := time.Now()
		c.pushChanged(false)
		synctest.Wait()
		currentErr(t, a.Agent, caller("web"), identity.ErrUnavailable) // handed to nobody new
		err := <-w.done
		w.done <- err
		if !errors.Is(err, identity.ErrUnavailable) || time.Since(began) > changedGrace+time.Second {
			t.Errorf("ended after %v with %v", time.Since(began), err)
		}
		if n := a.Status().Workloads; n != 0 {
			t.Errorf("%d workloads", n)
		}
		c.locked(func() { c.issueErr = nil })
		time.Sleep(time.Minute)
		current(t, a.Agent, caller("web"))
	})
}

func TestChangedAndConfirmedInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t)
		c.memoryMember("a")
		c.memoryMember("b")
		c.grant("web", web())
		a := run(t, c.config())
		w := watchUpdates(t, a.Agent, caller("web"))
		<-w.got
		synctest.Wait()
		c.locked(func() { c.issueErr = fmt.Errorf("%w: stale", identity.ErrUnavailable) })
		c.pushChanged(false)
		time.Sleep(3 * time.Second)
		c.locked(func() { c.issueErr = nil })
		<-w.got
		w.quiet()
	})
}

func TestCallersThatChange(t *testing.T) {
	for name, tt := range map[string]struct {
		then func(context.Context) (*attestor.Workload, error)
		want error // nil: the stream goes on
	}{
		"another key": {caller("other"), identity.ErrUnavailable},
		"gone": {func(context.Context) (*attestor.Workload, error) {
			return nil, fmt.Errorf("%w: no such process", identity.ErrUnauthenticated)
		}, identity.ErrDenied},
		"a bug": {func(context.Context) (*attestor.Workload, error) { return nil, errors.New("cannot read") }, nil},
		"not now": {func(context.Context) (*attestor.Workload, error) {
			return nil, fmt.Errorf("%w: swapped while read", identity.ErrUnavailable)
		}, nil},
		"nothing known": {func(context.Context) (*attestor.Workload, error) { return nil, nil }, identity.ErrDenied},
		"huge token": {func(ctx context.Context) (*attestor.Workload, error) {
			wl, _ := caller("web")(ctx)
			wl.Evidence.Token = make([]byte, 1<<20)
			return wl, nil
		}, identity.ErrDenied},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := newCluster(t)
				c.memoryMember("a")
				c.grant("web", web())
				c.grant("other", web())
				a := run(t, c.config())
				var n atomic.Int32
				w := watchUpdates(t, a.Agent, func(ctx context.Context) (*attestor.Workload, error) {
					if n.Add(1) == 1 {
						return caller("web")(ctx)
					}
					return tt.then(ctx)
				})
				<-w.got
				time.Sleep(40 * time.Minute)
				if tt.want == nil {
					w.quiet()
					// Another caller of the same workload is as good.
					good := watchUpdates(t, a.Agent, caller("web"))
					<-good.got
					time.Sleep(10 * time.Minute)
					if u := <-w.got; len(u.SVIDs) != 1 {
						t.Error(u)
					}
					return
				}
				err := <-w.done
				w.done <- err
				if !errors.Is(err, tt.want) {
					t.Errorf("ended with %v, want %v", err, tt.want)
				}
				if asked(c, "other") != 0 {
					t.Error("the other workload was asked for")
				}
			})
		})
	}
}

func TestOwnSVIDIsRenewed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t)
		c.memoryMember("a")
		c.memoryMember("b")
		c.grant("web", testGrant{entry: "e", id: "spiffe://example.org/web", ttl: 24 * time.Hour})
		a := run(t, c.config())
		w := watchUpdates(t, a.Agent, caller("web"))
		<-w.got
		serials, members := map[string]bool{}, map[string]bool{}
		for range 20 {
			time.Sleep(20 * time.Minute)
			if err := a.Ready(); err != nil {
				t.Fatal(err)
			}
			serials[a.own.Load().tls.Leaf.SerialNumber.String()] = true
			members[a.Status().Member] = true
			if left := time.Until(a.own.Load().notAfter); left < 20*time.Minute {
				t.Errorf("%v left", left)
			}
		}
		c.locked(func() {
			if c.attested != 1 || len(serials) < 10 || len(members) != 2 {
				t.Errorf("attested %d times, %d SVIDs, members %v", c.attested, len(serials), members)
			}
		})
		w.quiet() // none of it concerns the workload
	})
}

func TestOwnSVIDExpiresDuringAnOutage(t *testing.T) {
	for name, cred := range map[string]Credential{"kube": KubeToken("east", func() ([]byte, error) { return []byte("t"), nil }), "join": nil} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := newCluster(t)
				c.ownTTL = 10 * time.Minute
				a1 := c.memoryMember("a")
				c.grant("web", testGrant{entry: "e", id: "spiffe://example.org/web", ttl: 10 * time.Hour})
				cfg := c.config()
				cfg.Servers = append(cfg.Servers, "b:1")
				if cred != nil {
					cfg.Credential = cred
				}
				a := run(t, cfg)
				w := watchUpdates(t, a.Agent, caller("web"))
				<-w.got
				a1.stop()
				time.Sleep(20 * time.Minute)
				if cred == nil {
					c.locked(func() { c.refuse = fmt.Errorf("%w: the join token is used up", identity.ErrPrecondition) })
				}
				c.memoryMember("b")
				time.Sleep(time.Minute)
				w.quiet() // its SVID is live, whatever becomes of the agent
				err := a.Ready()
				if cred != nil && err != nil {
					t.Errorf("did not attest again: %v", err)
				}
				if cred == nil && (err == nil || !strings.Contains(err.Error(), "used up")) {
					t.Errorf("it says %v", err)
				}
			})
		})
	}
}

func TestJWTCacheUntilHalfLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t)
		c.memoryMember("a")
		c.grant("web", web())
		a := run(t, c.config())
		fetch := func() string {
			s, err := a.FetchJWT(t.Context(), caller("web"), []string{"db", "cache"}, spiffeid.ID{})
			if err != nil {
				t.Fatal(err)
			}
			return s[0].Token
		}
		first := fetch()
		time.Sleep(2 * time.Minute)
		if fetch() != first {
			t.Error("not from the cache")
		}
		time.Sleep(time.Minute)
		if fetch() == first || c.jwts != 2 {
			t.Error("not fetched anew past half-life")
		}
		c.away()
		synctest.Wait()
		if fetch() == "" {
			t.Error("nothing from the cache while the members are away")
		}
	})
}
