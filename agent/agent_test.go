package agent

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"countersign.io/countersign/api"
	workloadv1 "countersign.io/countersign/api/workload/v1"
	"countersign.io/countersign/attestor"
	"countersign.io/countersign/identity"
)

func TestFirstSVID(t *testing.T) {
	c := newCluster(t)
	c.member("a")
	c.grant("web", web(), testGrant{entry: "e-2", id: "spiffe://example.org/second", ttl: time.Minute})
	a := run(t, c.config())
	w := watchUpdates(t, a.Agent, caller("web"))
	u := w.next()
	if len(u.SVIDs) != 2 || u.SVIDs[0].ID.String() != "spiffe://example.org/web" || u.SVIDs[0].EntryID != "e-web" {
		t.Fatalf("got %+v", u.SVIDs)
	}
	for _, s := range u.SVIDs {
		key, err := x509.ParsePKCS8PrivateKey(s.Key)
		if err != nil {
			t.Fatal(err)
		}
		leaf, err := x509.ParseCertificate(s.Chain[0])
		if err != nil {
			t.Fatal(err)
		}
		if !samePublic(leaf, key) {
			t.Error("the key is not the certificate's")
		}
	}
	if len(u.Bundles) != 1 || u.Bundles[td].Sequence != 1 {
		t.Errorf("bundles: %+v", u.Bundles)
	}
	// The member is told what the agent serves, and what it has applied.
	eventually(t, "watch and ack", func() (ok bool) {
		c.locked(func() {
			for _, x := range c.watched {
				ok = len(x.Entries) == 2 && x.Entries[0].Id == "e-web" && x.Entries[0].Revision == 11 && slices.Contains(x.Selectors, "unix:uid:1000")
			}
			ok = ok && len(c.acks) > 0 && c.acks[0].BundleSequence == 1 && c.acks[0].Revision >= 10
		})
		return ok
	})
	if err := a.Ready(); err != nil {
		t.Error(err)
	}
	if s := a.Status(); s.Workloads != 1 || s.Streams != 1 || s.Member == "" || s.BundleSequence != 1 || s.ID == "" || s.Problem != "" {
		t.Errorf("status: %+v", s)
	}
	w.stop()
	eventually(t, "the stream is gone", func() bool { return a.Status().Streams == 0 })
}

func samePublic(leaf *x509.Certificate, key any) bool {
	pub, err := x509.MarshalPKIXPublicKey(key.(crypto.Signer).Public())
	return err == nil && bytes.Equal(pub, leaf.RawSubjectPublicKeyInfo)
}

func TestDeniedThenGrantedWithoutDelay(t *testing.T) {
	c := newCluster(t)
	c.member("a")
	a := run(t, c.config())
	for range 3 {
		currentErr(t, a.Agent, caller("web"), identity.ErrDenied)
	}
	watchUpdates(t, a.Agent, caller("web")).end(identity.ErrDenied)
	c.grant("web", web())
	if u := current(t, a.Agent, caller("web")); len(u.SVIDs) != 1 {
		t.Fatalf("got %+v", u)
	}
	watchUpdates(t, a.Agent, caller("web")).next()
	if n, _ := a.cache.counts(); n != 1 {
		t.Errorf("%d workloads in the cache", n)
	}
}

func TestOneQuestionPerWorkload(t *testing.T) {
	c := newCluster(t)
	m := c.member("a")
	c.grant("web", web())
	c.grant("other", web())
	a := run(t, c.config())
	current(t, a.Agent, caller("other")) // connected
	hang := make(chan struct{})
	m.set(func() { m.hangIssue = hang })
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() { _, _ = a.Current(ctx, caller("web")) })
	}
	eventually(t, "the flight", func() bool {
		a.cache.mu.Lock()
		defer a.cache.mu.Unlock()
		w := a.cache.byKey[cacheKey("key of web", []byte("web"))]
		return w != nil && w.flight != nil
	})
	cancel() // who asked is gone; the answer is kept all the same
	wg.Wait()
	close(hang)
	for range 20 {
		wg.Go(func() { current(t, a.Agent, caller("web")) })
	}
	wg.Wait()
	c.locked(func() {
		if n := len(slices.DeleteFunc(slices.Clone(c.tokens), func(s string) bool { return s != "web" })); n != 1 {
			t.Errorf("the member was asked %d times", n)
		}
	})
}

func TestBatches(t *testing.T) {
	c := newCluster(t)
	c.member("a")
	const n = 300
	for i := range n {
		c.grant(fmt.Sprint(i), testGrant{entry: fmt.Sprint("e", i), id: fmt.Sprintf("spiffe://example.org/w/%d", i)})
	}
	a := run(t, c.config())
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			u := current(t, a.Agent, caller(fmt.Sprint(i)))
			if got, want := u.SVIDs[0].ID.String(), fmt.Sprintf("spiffe://example.org/w/%d", i); got != want {
				t.Errorf("workload %d got %s", i, got)
			}
		})
	}
	wg.Wait()
	c.locked(func() {
		if c.requests != n || slices.Max(c.batches) > identity.MaxBatch || len(c.batches) > n/4 {
			t.Errorf("%d requests in batches of %v", c.requests, c.batches)
		}
	})
	// SVIDs of one issuer share its bytes, and every Update without federation shares its bundles.
	u1, u2 := current(t, a.Agent, caller("1")), current(t, a.Agent, caller("2"))
	if &u1.SVIDs[0].Chain[1][0] != &u2.SVIDs[0].Chain[1][0] || u1.Bundles[td] != u2.Bundles[td] {
		t.Error("issuer or bundle is not shared")
	}
	if u1 != current(t, a.Agent, caller("1")) {
		t.Error("an unchanged Update has a new pointer")
	}
}

func TestOddRequestDoesNotSpoilItsBatch(t *testing.T) {
	c := newCluster(t)
	c.member("a")
	c.grant("web", web())
	a := run(t, c.config())
	current(t, a.Agent, caller("web"))
	for i := range 20 {
		c.grant(fmt.Sprint(i), web())
	}
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() { current(t, a.Agent, caller(fmt.Sprint(i))) })
		wg.Go(func() {
			_, err := a.Current(t.Context(), func(ctx context.Context) (*attestor.Workload, error) {
				wl, _ := caller("poison")(ctx)
				wl.Key = fmt.Sprint("poison", i)
				return wl, nil
			})
			if !errors.Is(err, identity.ErrDenied) {
				t.Errorf("got %v", err)
			}
		})
	}
	wg.Wait()
}

// An agent that is over its limit is not asked to go elsewhere, and must not make many calls of one.
func TestOverTheLimit(t *testing.T) {
	c := newCluster(t)
	c.member("a")
	c.grant("web", web())
	a := run(t, c.config())
	current(t, a.Agent, caller("web"))
	c.locked(func() { c.issueErr = fmt.Errorf("%w: too many", identity.ErrExhausted) })
	const n = 20
	var batch []*issueRequest
	for i := range n {
		w, f, _ := a.cache.find(fmt.Sprint("late", i), time.Now(), false)
		batch = append(batch, &issueRequest{w: w, f: f, key: must(a.cfg.KeyType.makePair())})
	}
	a.issueBatch(t.Context(), batch)
	for _, r := range batch {
		if <-r.f.done; !errors.Is(r.f.err, identity.ErrUnavailable) {
			t.Errorf("got %v", r.f.err)
		}
	}
	c.locked(func() {
		if c.refusals != 1 {
			t.Errorf("%d calls for one batch", c.refusals)
		}
		c.issueErr = nil
	})
	if err := a.link.why(); err != nil {
		t.Errorf("the member was given up: %v", err)
	}
	current(t, a.Agent, caller("web"))
}

func TestOversizeEvidenceStaysHere(t *testing.T) {
	c := newCluster(t)
	c.member("a")
	a := run(t, c.config())
	currentErr(t, a.Agent, func(context.Context) (*attestor.Workload, error) {
		return &attestor.Workload{Key: "k", Evidence: identity.Evidence{Token: make([]byte, 1<<20)}}, nil
	}, identity.ErrDenied)
	currentErr(t, a.Agent, func(context.Context) (*attestor.Workload, error) { return &attestor.Workload{}, nil }, identity.ErrDenied)
	currentErr(t, a.Agent, func(context.Context) (*attestor.Workload, error) {
		return nil, fmt.Errorf("%w: who?", identity.ErrUnauthenticated)
	}, identity.ErrUnauthenticated)
	c.locked(func() {
		if c.requests != 0 {
			t.Error("it was sent")
		}
	})
}

func TestChanged(t *testing.T) {
	c := newCluster(t)
	c.member("a")
	c.grant("web", web())
	c.grant("idle", web())
	a := run(t, c.config())
	w := watchUpdates(t, a.Agent, caller("web"))
	w.next()
	current(t, a.Agent, caller("idle")) // nobody stays
	eventually(t, "watched", func() (ok bool) { c.locked(func() { ok = len(c.watched) == 2 }); return ok })

	second := testGrant{entry: "e-2", id: "spiffe://example.org/second"}
	c.grant("web", web(), second)
	c.pushChanged(false)
	if u := w.next(); len(u.SVIDs) != 2 {
		t.Fatalf("got %+v", u.SVIDs)
	}
	// The one without a caller cannot be asked about: it is forgotten, and whoever comes next asks anew.
	eventually(t, "idle dropped", func() (ok bool) { c.locked(func() { ok = len(c.watched) == 1 }); return ok })
	if n := a.Status().Workloads; n != 1 {
		t.Errorf("%d workloads", n)
	}
	// The identity goes.
	c.grant("web")
	c.pushChanged(false)
	w.end(identity.ErrDenied)
	currentErr(t, a.Agent, caller("web"), identity.ErrDenied)
	eventually(t, "unwatched", func() (ok bool) { c.locked(func() { ok = len(c.watched) == 0 }); return ok })
}

func TestChangedThroughMemberThatLags(t *testing.T) {
	c := newCluster(t)
	m := c.member("a")
	c.grant("web", web())
	a := run(t, c.config())
	w := watchUpdates(t, a.Agent, caller("web"))
	w.next()
	eventually(t, "watched", func() (ok bool) { c.locked(func() { ok = len(c.watched) == 1 }); return ok })
	m.set(func() { m.lag = 5 })
	c.grant("web", web(), testGrant{entry: "e-2", id: "spiffe://example.org/second"})
	c.pushChanged(false)
	var asked int
	eventually(t, "asked", func() bool { c.locked(func() { asked = c.requests }); return asked > 1 })
	w.quiet() // an answer from before the change does not count
	m.set(func() { m.lag = 0 })
	if u := w.next(); len(u.SVIDs) != 2 {
		t.Fatalf("got %+v", u.SVIDs)
	}
}

func TestEnded(t *testing.T) {
	c := newCluster(t)
	c.member("a")
	c.grant("web", web())
	a := run(t, c.config())
	w := watchUpdates(t, a.Agent, caller("web"))
	w.next()
	eventually(t, "watched", func() (ok bool) { c.locked(func() { ok = len(c.watched) == 1 }); return ok })
	c.pushChanged(true)
	w.end(identity.ErrDenied)
	if n := a.Status().Workloads; n != 0 {
		t.Errorf("%d workloads", n)
	}
}

func TestBundlePush(t *testing.T) {
	c := newCluster(t)
	c.member("a")
	other := &identity.Bundle{TrustDomain: spiffeid.RequireTrustDomainFromString("other.org"), Sequence: 7, X509: [][]byte{newTestCA().root.Raw}, JWT: map[string][]byte{}}
	c.federated = []*identity.Bundle{other}
	c.grant("web", web())
	fed := testGrant{entry: "e-f", id: "spiffe://example.org/fed", federates: []string{"other.org"}}
	c.grant("fed", fed)
	a := run(t, c.config())
	plain, both := watchUpdates(t, a.Agent, caller("web")), watchUpdates(t, a.Agent, caller("fed"))
	if u := plain.next(); len(u.Bundles) != 1 {
		t.Errorf("bundles: %v", u.Bundles)
	}
	if u := both.next(); len(u.Bundles) != 2 || u.Bundles[other.TrustDomain].Sequence != 7 {
		t.Errorf("bundles: %v", u.Bundles)
	}
	push := func(f func()) {
		c.mu.Lock()
		f()
		s := c.state()
		c.mu.Unlock()
		c.push(s)
	}
	// The own bundle concerns everybody.
	newRoot := newTestCA().root.Raw
	push(func() {
		b := *c.bundle
		b.Sequence, b.X509 = 2, append(slices.Clone(b.X509), newRoot)
		c.bundle = &b
	})
	for _, w := range []*watcher{plain, both} {
		if u := w.next(); u.Bundles[td].Sequence != 2 || len(u.Bundles[td].X509) != 2 {
			t.Errorf("bundle: %+v", u.Bundles[td])
		}
	}
	eventually(t, "acknowledged", func() (ok bool) {
		c.locked(func() { ok = len(c.acks) > 0 && c.acks[len(c.acks)-1].BundleSequence == 2 })
		return ok
	})
	// Another's concerns those who federate with it.
	push(func() { b := *other; b.Sequence = 8; c.federated = []*identity.Bundle{&b} })
	if u := both.next(); u.Bundles[other.TrustDomain].Sequence != 8 {
		t.Errorf("bundle: %+v", u.Bundles)
	}
	plain.quiet()
	// An older one is not taken, nor what comes with it, and the same again is not sent again.
	newest := c.bundle
	push(func() {
		b := *c.bundle
		b.Sequence, b.X509 = 1, b.X509[:1]
		c.bundle = &b
		old := *other
		c.federated = []*identity.Bundle{&old}
	})
	push(func() { b := *other; b.Sequence = 9; c.bundle, c.federated = newest, []*identity.Bundle{&b} })
	if u := both.next(); u.Bundles[td].Sequence != 2 || u.Bundles[other.TrustDomain].Sequence != 9 {
		t.Errorf("bundles: %+v", u.Bundles)
	}
	plain.quiet()
}

// A foreign bundle that comes with the SVID is there at the workload's first sight of it; the stream's word then counts.
func TestFederatedBundleComesAlong(t *testing.T) {
	c := newCluster(t)
	c.member("a")
	other := &identity.Bundle{TrustDomain: spiffeid.RequireTrustDomainFromString("other.org"), Sequence: 7, X509: [][]byte{newTestCA().root.Raw}, JWT: map[string][]byte{}}
	c.along = []*identity.Bundle{other}
	c.grant("fed", testGrant{entry: "e-f", id: "spiffe://example.org/fed", federates: []string{"other.org"}})
	a := run(t, c.config())
	w := watchUpdates(t, a.Agent, caller("fed"))
	if u := w.next(); len(u.Bundles) != 2 || u.Bundles[other.TrustDomain].Sequence != 7 {
		t.Fatalf("bundles: %v", u.Bundles)
	}
	push := func(federated ...*identity.Bundle) {
		c.mu.Lock()
		c.federated = federated
		s := c.state()
		c.mu.Unlock()
		c.push(s)
	}
	newer := *other
	newer.Sequence = 8
	push(&newer)
	if u := w.next(); u.Bundles[other.TrustDomain].Sequence != 8 {
		t.Errorf("bundles: %+v", u.Bundles)
	}
	// What comes along with another SVID does not undo it.
	c.grant("second", testGrant{entry: "e-s", id: "spiffe://example.org/second", federates: []string{"other.org"}})
	if u := watchUpdates(t, a.Agent, caller("second")).next(); u.Bundles[other.TrustDomain].Sequence != 8 {
		t.Errorf("bundles: %+v", u.Bundles)
	}
	// A stream that is new says nothing of a trust domain before it was told of the workloads: what is held stays.
	push()
	w.quiet()
	// A member that lags brings no bundle back.
	c.mu.Lock()
	c.bundle.Sequence++
	c.mu.Unlock()
	push(&newer)
	if u := w.next(); len(u.Bundles) != 2 || u.Bundles[td].Sequence != c.bundle.Sequence { // the first since: nothing was taken away
		t.Errorf("bundles: %+v", u.Bundles)
	}
	c.mu.Lock()
	c.bundle.Sequence--
	c.mu.Unlock()
	push(other)
	w.quiet()
	c.mu.Lock()
	c.bundle.Sequence++
	c.spokenOf = []string{"other.org"}
	c.mu.Unlock()
	push() // the relationship ended
	if u := w.next(); len(u.Bundles) != 1 {
		t.Errorf("bundles: %+v", u.Bundles)
	}
}

// A member that passes off a bundle as our own trust domain's by that way is not believed.
func TestFederatedBundleOfOurOwn(t *testing.T) {
	c := newCluster(t)
	c.member("a")
	own := &identity.Bundle{TrustDomain: td, Sequence: 99, X509: [][]byte{newTestCA().root.Raw}, JWT: map[string][]byte{}}
	c.grant("web", web())
	a := run(t, c.config())
	watchUpdates(t, a.Agent, caller("web")).next()
	before := a.trust.Load()
	if err := a.addFederated([]*workloadv1.Bundle{api.BundleToWire(own)}); err != nil {
		t.Fatal(err)
	}
	if now := a.trust.Load(); now.own != before.own || len(now.all) != 1 {
		t.Errorf("%+v", now.all)
	}
	if err := a.addFederated([]*workloadv1.Bundle{{TrustDomain: "Not/One"}}); !errors.Is(err, errAnswer) {
		t.Errorf("a broken one: %v", err)
	}
}

func TestKeyTypes(t *testing.T) {
	c := newCluster(t)
	c.member("a")
	c.grant("web", web())
	for _, kt := range []KeyType{KeyP256, KeyP384, KeyEd25519, KeyRSA2048} {
		t.Run(string(kt), func(t *testing.T) {
			cfg := c.config()
			cfg.KeyType = kt
			a := run(t, cfg)
			u := current(t, a.Agent, caller("web"))
			key, err := x509.ParsePKCS8PrivateKey(u.SVIDs[0].Key)
			if err != nil {
				t.Fatal(err)
			}
			if got := fmt.Sprintf("%T", key); got != map[KeyType]string{
				KeyP256: "*ecdsa.PrivateKey", KeyP384: "*ecdsa.PrivateKey", KeyEd25519: "ed25519.PrivateKey", KeyRSA2048: "*rsa.PrivateKey",
			}[kt] {
				t.Errorf("key is a %s", got)
			}
		})
	}
}

func TestNewRefuses(t *testing.T) {
	c := newCluster(t)
	c.member("a")
	good := c.config()
	if _, err := New(good); err != nil {
		t.Fatal(err)
	}
	for name, spoil := range map[string]func(*Config){
		"no servers":    func(cfg *Config) { cfg.Servers = nil },
		"server":        func(cfg *Config) { cfg.Servers = []string{"no-port"} },
		"no credential": func(cfg *Config) { cfg.Credential = nil },
		"no pin":        func(cfg *Config) { cfg.Pin = "" },
		"bad pin":       func(cfg *Config) { cfg.Pin = "sha256:abc" },
		"key type":      func(cfg *Config) { cfg.KeyType = "dsa" },
		"empty bundle":  func(cfg *Config) { cfg.Bundle = &identity.Bundle{TrustDomain: td} },
		"another's bundle": func(cfg *Config) {
			cfg.TrustDomain, cfg.Bundle = spiffeid.RequireTrustDomainFromString("other.org"), c.bundle
		},
		"state on a disk": func(cfg *Config) { cfg.StateDir = t.TempDir() },
		"no state folder": func(cfg *Config) { cfg.StateDir = "/dev/shm/no/such/folder" },
	} {
		cfg := good
		spoil(&cfg)
		if _, err := New(cfg); !errors.Is(err, identity.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// Two faults at once are both told.
	_, err := New(Config{Credential: good.Credential, Pin: "x"})
	if err == nil || !strings.Contains(err.Error(), "no servers") || !strings.Contains(err.Error(), "pin") {
		t.Errorf("got %v", err)
	}
}
