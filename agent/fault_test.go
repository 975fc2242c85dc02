package agent

import (
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	nodev1 "countersign.io/countersign/api/node/v1"
	workloadv1 "countersign.io/countersign/api/workload/v1"
	"countersign.io/countersign/attestor/node"
	"countersign.io/countersign/identity"
)

func TestFailover(t *testing.T) {
	c := newCluster(t)
	for _, name := range []string{"a", "b", "c"} {
		c.member(name)
	}
	c.grant("web", web())
	cfg := c.config()
	cfg.Servers = cfg.Servers[:1] // the others are learnt
	a := run(t, cfg)
	w := watchUpdates(t, a.Agent, caller("web"))
	w.next()
	for i := range 2 {
		old := a.Status().Member
		var m *member
		c.locked(func() {
			for _, x := range c.members {
				if x.addr == old {
					m = x
				}
			}
			clear(c.watched)
		})
		m.stop()
		began := time.Now()
		token := fmt.Sprint("new", i)
		c.grant(token, web())
		eventually(t, "it notices", func() bool { return a.Status().Member != old })
		current(t, a.Agent, caller(token)) // fails if nobody else serves it
		t.Logf("failover took %v", time.Since(began))
		if now := a.Status().Member; now == old || now == "" {
			t.Fatalf("member is %q, was %q", now, old)
		}
		eventually(t, "all that is served is told to the new member", func() (ok bool) {
			c.locked(func() { ok = len(c.watched) == i+2 })
			return ok
		})
		w.quiet() // the same state is not sent again
	}
	c.grant("web", web(), testGrant{entry: "e-2", id: "spiffe://example.org/second"})
	c.pushChanged(false)
	if u := w.next(); len(u.SVIDs) != 2 {
		t.Errorf("got %+v", u)
	}
}

// TestMembersThatDoNotServe connects through members of which one only is sound.
func TestMembersThatDoNotServe(t *testing.T) {
	for name, spoil := range map[string]func(*member){
		"refuses connections": func(m *member) { m.stop() },
		"hangs on Sync":       func(m *member) { m.set(func() { m.hangSync = true }) },
		"hangs on IssueX509":  func(m *member) { m.set(func() { m.hangIssue = make(chan struct{}) }) },
		"hangs altogether":    func(m *member) { m.set(func() { m.hangIssue, m.dead = make(chan struct{}), true }) },
		"has another CA":      func(m *member) { m.set(func() { m.ca = newTestCA() }) },
		"is a workload":       func(m *member) { m.set(func() { m.id = "spiffe://example.org/web" }) },
		"is an agent":         func(m *member) { m.set(func() { m.id = "spiffe://example.org/countersign/agent/join/1" }) },
		"is of another domain": func(m *member) {
			m.set(func() { m.id = "spiffe://other.org/countersign/member/a" })
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := newCluster(t)
			good := c.member("good")
			bad := []*member{c.member("bad-1"), c.member("bad-2")}
			c.grant("web", web())
			for _, m := range bad {
				spoil(m)
			}
			a := run(t, c.config())
			current(t, a.Agent, caller("web"))
			eventually(t, "on the good one", func() bool { return a.Status().Member == good.addr })
		})
	}
}

// TestListenerThatNeverShakesHands accepts and says nothing.
func TestListenerThatNeverShakesHands(t *testing.T) {
	lis := must(net.Listen("tcp", "127.0.0.1:0"))
	defer lis.Close()
	c := newCluster(t)
	c.member("good")
	c.grant("web", web())
	cfg := c.config()
	a := must(New(cfg))
	a.members.Store(&[]string{lis.Addr().String()})
	start(t, a)
	current(t, a, caller("web"))
}

func TestFirstContact(t *testing.T) {
	c := newCluster(t)
	m := c.member("a")
	c.grant("web", web())
	for name, tt := range map[string]struct {
		cfg  func(*Config)
		ok   bool
		says string
	}{
		"pin":                   {func(*Config) {}, true, ""},
		"pin and name":          {func(cfg *Config) { cfg.TrustDomain = td }, true, ""},
		"bundle":                {func(cfg *Config) { cfg.Pin, cfg.Bundle = "", c.bundle }, true, ""},
		"another's pin":         {func(cfg *Config) { cfg.Pin = newTestCA().pin() }, false, "pinned key"},
		"the issuer's pin does": {func(cfg *Config) { cfg.Pin = node.Pin(c.ca.issuer.RawSubjectPublicKeyInfo) }, true, ""},
		"another's name":        {func(cfg *Config) { cfg.TrustDomain = spiffeid.RequireTrustDomainFromString("other.org") }, false, "other.org"},
		"another's bundle": {func(cfg *Config) {
			b := *c.bundle
			b.X509 = [][]byte{newTestCA().root.Raw}
			cfg.Pin, cfg.Bundle = "", &b
		}, false, "unknown authority"},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := c.config()
			tt.cfg(&cfg)
			a := run(t, cfg)
			if tt.ok {
				current(t, a.Agent, caller("web"))
				return
			}
			err := currentErr(t, a.Agent, caller("web"), identity.ErrUnavailable)
			if !strings.Contains(err.Error(), tt.says) || !strings.Contains(a.Ready().Error(), tt.says) {
				t.Errorf("it does not say %q: %v; %v", tt.says, err, a.Ready())
			}
			c.locked(func() { // nothing was shown to it
				for _, b := range c.begins {
					if b.GetJoinToken() == cfg.Credential.(*joinToken).secret {
						t.Error("the secret was sent to a server that did not verify")
					}
				}
			})
		})
	}
	_ = m
}

func TestContactVerify(t *testing.T) {
	ca := newTestCA()
	key := newKey()
	trust := must(newTrust(nil, td, newCluster(t).with(ca).bundle, nil))
	for name, tt := range map[string]struct {
		id     string
		change func(*x509.Certificate)
		after  time.Duration
		ok     bool
	}{
		"member":          {"spiffe://example.org/countersign/member/a", nil, 0, true},
		"workload":        {"spiffe://example.org/web", nil, 0, false},
		"agent":           {"spiffe://example.org/countersign/agent/join/1", nil, 0, false},
		"member of none":  {"spiffe://example.org/countersign/member", nil, 0, false},
		"no ID":           {"https://example.org/countersign/member/a", nil, 0, false},
		"expired":         {"spiffe://example.org/countersign/member/a", nil, 2 * time.Hour, false},
		"not yet":         {"spiffe://example.org/countersign/member/a", nil, -time.Minute, false},
		"client only":     {"spiffe://example.org/countersign/member/a", func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth} }, 0, false},
		"two IDs":         {"spiffe://example.org/countersign/member/a", func(c *x509.Certificate) { c.URIs = append(c.URIs, td.ID().URL()) }, 0, false},
		"another domain":  {"spiffe://other.org/countersign/member/a", nil, 0, false},
		"path tricks":     {"spiffe://example.org/web/countersign/member/a", nil, 0, false},
		"upper case path": {"spiffe://example.org/Countersign/member/a", nil, 0, false},
	} {
		leaf := must(x509.ParseCertificate(ca.leaf(tt.id, key.Public(), time.Hour, tt.change)))
		chain := []*x509.Certificate{leaf, ca.issuer, ca.root}
		for by, con := range map[string]contact{"bundle": {td: td, trust: trust}, "pin": {td: td, pin: ca.pin()}} {
			_, err := con.verify(chain, time.Now().Add(tt.after))
			if (err == nil) != tt.ok || err != nil && !errors.Is(err, identity.ErrUnauthenticated) {
				t.Errorf("%s by %s: %v", name, by, err)
			}
		}
	}
	leaf := must(x509.ParseCertificate(ca.leaf("spiffe://example.org/countersign/member/a", key.Public(), time.Hour, nil)))
	for name, chain := range map[string][]*x509.Certificate{
		"nothing":             nil,
		"leaf alone":          {leaf},
		"another's issuer":    {leaf, newTestCA().issuer, ca.root},
		"pinned key in front": {ca.root},
	} {
		if _, err := (contact{pin: ca.pin()}).verify(chain, time.Now()); !errors.Is(err, identity.ErrUnauthenticated) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// Once there is a bundle, sessions do not use the pin.
	if _, err := (contact{td: td, trust: must(newTrust(nil, td, newCluster(t).bundle, nil))}).verify([]*x509.Certificate{leaf, ca.issuer, ca.root}, time.Now()); err == nil {
		t.Error("a member of another root was taken")
	}
}

func (c *cluster) with(ca *testCA) *cluster {
	c.ca = ca
	c.bundle = &identity.Bundle{TrustDomain: td, Sequence: 1, X509: [][]byte{ca.root.Raw}, JWT: map[string][]byte{}}
	return c
}

// badAnswers spoil the answer to a request for X.509-SVIDs, each in one way.
func badAnswers(c *cluster) map[string]func(*workloadv1.X509Result, crypto.PublicKey) {
	other, stranger := newTestCA(), newKey()
	leaf := func(id string, ca *testCA, change func(*x509.Certificate)) func(*workloadv1.X509Result, crypto.PublicKey) {
		return func(r *workloadv1.X509Result, pub crypto.PublicKey) {
			r.Svids[0].SpiffeId = id
			r.Svids[0].Leaf = ca.leaf(id, pub, time.Hour, change)
		}
	}
	const id = "spiffe://example.org/web"
	return map[string]func(*workloadv1.X509Result, crypto.PublicKey){
		"another key": func(r *workloadv1.X509Result, _ crypto.PublicKey) {
			r.Svids[0].Leaf = c.ca.leaf(id, stranger.Public(), time.Hour, nil)
		},
		"announced as another": func(r *workloadv1.X509Result, _ crypto.PublicKey) { r.Svids[0].SpiffeId = "spiffe://example.org/db" },
		"another trust domain": leaf("spiffe://other.org/web", c.ca, nil),
		"an agent's":           leaf("spiffe://example.org/countersign/agent/join/9", c.ca, nil),
		"a member's":           leaf("spiffe://example.org/countersign/member/a", c.ca, nil),
		"no path":              leaf("spiffe://example.org", c.ca, nil),
		"not an ID":            func(r *workloadv1.X509Result, _ crypto.PublicKey) { r.Svids[0].SpiffeId = "web" },
		"another CA":           leaf(id, other, nil),
		"expired":              leaf(id, c.ca, func(x *x509.Certificate) { x.NotAfter = time.Now().Add(-time.Second) }),
		"not yet valid":        leaf(id, c.ca, func(x *x509.Certificate) { x.NotBefore = time.Now().Add(time.Minute) }),
		"a CA's":               leaf(id, c.ca, func(x *x509.Certificate) { x.IsCA = true }),
		"signs certificates":   leaf(id, c.ca, func(x *x509.Certificate) { x.KeyUsage |= x509.KeyUsageCertSign }),
		"two URIs":             leaf(id, c.ca, func(x *x509.Certificate) { x.URIs = append(x.URIs, must(url.Parse("spiffe://example.org/2"))) }),
		"garbage":              func(r *workloadv1.X509Result, _ crypto.PublicKey) { r.Svids[0].Leaf = []byte("garbage") },
		"no leaf":              func(r *workloadv1.X509Result, _ crypto.PublicKey) { r.Svids[0].Leaf = nil },
		"long hint":            func(r *workloadv1.X509Result, _ crypto.PublicKey) { r.Svids[0].Hint = strings.Repeat("x", 1025) },
		"error without a code": func(r *workloadv1.X509Result, _ crypto.PublicKey) { r.Error = &workloadv1.Error{} },
		"bad federation":       func(r *workloadv1.X509Result, _ crypto.PublicKey) { r.Svids[0].FederatesWith = []string{"//"} },
	}
}

func TestBadAnswersAreNotServed(t *testing.T) {
	for name := range badAnswers(newCluster(t)) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := newCluster(t)
			c.member("a")
			c.member("b")
			c.grant("web", web())
			c.bad = badAnswers(c)[name]
			a := run(t, c.config())
			err := currentErr(t, a.Agent, caller("web"), identity.ErrUnavailable)
			if !errors.Is(err, errAnswer) {
				t.Errorf("got %v", err)
			}
			// A stream that has a good one keeps it over a renewal that brings a bad one; and the next good one is taken.
			c.locked(func() { c.bad = nil })
			eventually(t, "served again", func() bool {
				u, err := a.Current(t.Context(), caller("web"))
				return err == nil && len(u.SVIDs) == 1
			})
		})
	}
}

func TestBadAnswerOfOneMemberIsReplacedByAnothers(t *testing.T) {
	c := newCluster(t)
	c.member("a")
	c.member("b")
	c.grant("web", web())
	n := 0
	c.bad = func(r *workloadv1.X509Result, pub crypto.PublicKey) {
		if n++; n == 1 {
			r.Svids[0].Leaf = []byte("garbage")
		}
	}
	a := run(t, c.config())
	current(t, a.Agent, caller("web"))
}

func TestBadOwnSVIDIsNotUsed(t *testing.T) {
	other := newTestCA()
	for name, bad := range map[string]func(*cluster) func(*nodev1.AgentSVID, crypto.PublicKey){
		"another key": func(c *cluster) func(*nodev1.AgentSVID, crypto.PublicKey) {
			return func(s *nodev1.AgentSVID, _ crypto.PublicKey) {
				s.Chain[0] = c.ca.leaf(s.SpiffeId, newKey().Public(), time.Hour, nil)
			}
		},
		"a workload's": func(c *cluster) func(*nodev1.AgentSVID, crypto.PublicKey) {
			return func(s *nodev1.AgentSVID, pub crypto.PublicKey) {
				s.SpiffeId = "spiffe://example.org/web"
				s.Chain[0] = c.ca.leaf(s.SpiffeId, pub, time.Hour, nil)
			}
		},
		"another CA": func(*cluster) func(*nodev1.AgentSVID, crypto.PublicKey) {
			return func(s *nodev1.AgentSVID, pub crypto.PublicKey) {
				s.Chain[0] = other.leaf(s.SpiffeId, pub, time.Hour, nil)
			}
		},
		"no bundle": func(*cluster) func(*nodev1.AgentSVID, crypto.PublicKey) {
			return func(s *nodev1.AgentSVID, _ crypto.PublicKey) { s.Bundle = nil }
		},
		"empty bundle": func(*cluster) func(*nodev1.AgentSVID, crypto.PublicKey) {
			return func(s *nodev1.AgentSVID, _ crypto.PublicKey) { s.Bundle.X509Authorities = nil }
		},
		"another's bundle": func(*cluster) func(*nodev1.AgentSVID, crypto.PublicKey) {
			return func(s *nodev1.AgentSVID, _ crypto.PublicKey) { s.Bundle.TrustDomain = "other.org" }
		},
		"no chain": func(*cluster) func(*nodev1.AgentSVID, crypto.PublicKey) {
			return func(s *nodev1.AgentSVID, _ crypto.PublicKey) { s.Chain = nil }
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := newCluster(t)
			c.member("a")
			c.grant("web", web())
			c.badOwn = bad(c)
			a := run(t, c.config())
			currentErr(t, a.Agent, caller("web"), identity.ErrUnavailable)
			if a.own.Load() != nil {
				t.Error("it was taken")
			}
			c.locked(func() { c.badOwn = nil })
			eventually(t, "attested", func() bool { _, err := a.Current(t.Context(), caller("web")); return err == nil })
		})
	}
}

func TestCredentials(t *testing.T) {
	c := newCluster(t)
	c.member("a")
	c.grant("web", web())
	key := newKey()
	cert := c.ca.leaf("spiffe://example.org/node", key.Public(), time.Hour, nil)
	load := func() ([][]byte, crypto.Signer, error) { return [][]byte{cert, c.ca.issuer.Raw}, key, nil }
	for want, cred := range map[string]Credential{
		"/countersign/agent/kube/east/node-1": KubeToken("east", func() ([]byte, error) { return []byte("pod token"), nil }),
		"/countersign/agent/x509pop/":         X509Pop(load),
	} {
		cfg := c.config()
		cfg.Credential = cred
		a := run(t, cfg)
		current(t, a.Agent, caller("web"))
		if id := a.Status().ID; !strings.Contains(id, want) {
			t.Errorf("%s gave %s", cred, id)
		}
	}
	if b := c.begins[0]; b.GetKubeToken() != "" && b.KubeCluster != "east" {
		t.Errorf("kube cluster %q", b.KubeCluster)
	}
	for name, cred := range map[string]Credential{
		"kube token unreadable": KubeToken("east", func() ([]byte, error) { return nil, errors.New("no such file") }),
		"kube token empty":      KubeToken("east", func() ([]byte, error) { return nil, nil }),
		"kube token huge":       KubeToken("east", func() ([]byte, error) { return make([]byte, 1<<20), nil }),
		"x509pop unreadable":    X509Pop(func() ([][]byte, crypto.Signer, error) { return nil, nil, errors.New("no such file") }),
		"x509pop other key":     X509Pop(func() ([][]byte, crypto.Signer, error) { return [][]byte{cert, c.ca.issuer.Raw}, newKey(), nil }),
	} {
		cfg := c.config()
		cfg.Credential = cred
		a := run(t, cfg)
		err := currentErr(t, a.Agent, caller("web"), identity.ErrUnavailable)
		if !strings.Contains(err.Error(), "attesting this node") {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, cred := range []Credential{JoinToken("secret-1"), KubeToken("c", func() ([]byte, error) { return []byte("secret-1"), nil })} {
		if s := fmt.Sprintf("%v %+v %#v %s", cred, cred, cred, cred); strings.Contains(s, "secret-1") {
			t.Errorf("it prints its secret: %s", s)
		}
	}
}

func TestJoinTokenRefusedEndsRun(t *testing.T) {
	c := newCluster(t)
	c.member("a")
	c.refuse = fmt.Errorf("%w: the join token is used up: make another", identity.ErrPrecondition)
	a := run(t, c.config())
	err := <-a.done
	a.done <- err
	if !errors.Is(err, identity.ErrPrecondition) || !strings.Contains(err.Error(), "make another") {
		t.Fatalf("got %v", err)
	}
	currentErr(t, a.Agent, caller("web"), identity.ErrUnavailable)

	// A kind that works again keeps trying.
	cfg := c.config()
	cfg.Credential = KubeToken("east", func() ([]byte, error) { return []byte("t"), nil })
	k := run(t, cfg)
	currentErr(t, k.Agent, caller("web"), identity.ErrUnavailable)
	c.grant("web", web())
	c.locked(func() { c.refuse = nil })
	eventually(t, "let in", func() bool { _, err := k.Current(t.Context(), caller("web")); return err == nil })
}

func TestBannedAgentServesNothing(t *testing.T) {
	for name, cred := range map[string]Credential{"join": nil, "kube": KubeToken("east", func() ([]byte, error) { return []byte("t"), nil })} {
		t.Run(name, func(t *testing.T) {
			c := newCluster(t)
			c.member("a")
			c.member("b")
			c.grant("web", web())
			cfg := c.config()
			if cred != nil {
				cfg.Credential = cred
			}
			a := run(t, cfg)
			w := watchUpdates(t, a.Agent, caller("web"))
			w.next()
			c.locked(func() {
				c.banned = true
				c.refuse = fmt.Errorf("%w: agent is banned", identity.ErrDenied)
			})
			c.push(nil)
			w.end(identity.ErrDenied)
			if n := a.Status().Workloads; n != 0 {
				t.Errorf("%d workloads are served", n)
			}
			currentErr(t, a.Agent, caller("web"), identity.ErrUnavailable)
		})
	}
}

func TestEvictedAgentAttestsAgain(t *testing.T) {
	c := newCluster(t)
	c.member("a")
	c.grant("web", web())
	cfg := c.config()
	cfg.Credential = KubeToken("east", func() ([]byte, error) { return []byte("t"), nil })
	a := run(t, cfg)
	w := watchUpdates(t, a.Agent, caller("web"))
	w.next()
	c.locked(func() { c.banned = true }) // refused until it attests
	c.push(nil)
	eventually(t, "attested again", func() (ok bool) {
		c.locked(func() {
			if ok = c.attested > 1; ok {
				c.banned = false
			}
		})
		return ok
	})
	eventually(t, "connected again", func() bool { return a.Ready() == nil })
	w.quiet()
}

func TestExhaustedAndBrokenMembers(t *testing.T) {
	c := newCluster(t)
	c.member("a")
	c.grant("web", web())
	a := run(t, c.config())
	current(t, a.Agent, caller("web"))
	for _, answer := range []error{
		fmt.Errorf("%w: slow down", identity.ErrExhausted),
		fmt.Errorf("%w: stale", identity.ErrUnavailable),
		errors.New("a bug"),
		fmt.Errorf("%w: agent is unknown", identity.ErrUnauthenticated),
	} {
		c.locked(func() { c.issueErr = answer })
		currentErr(t, a.Agent, caller("other"), identity.ErrUnavailable)
		current(t, a.Agent, caller("web")) // what is live is served
	}
}
