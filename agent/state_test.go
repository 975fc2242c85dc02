package agent

import (
	"bytes"
	"crypto/x509"
	"encoding/json"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"countersign.io/countersign/attestor/node"
	"countersign.io/countersign/identity"
	"countersign.io/countersign/internal/durable"
)

// memoryDir is a folder on a tmpfs.
func memoryDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "countersign-agent-test-")
	if err != nil {
		t.Skipf("no tmpfs here: %v", err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if ok, err := durable.OnMemory(dir); err != nil || !ok {
		t.Skipf("/dev/shm is no tmpfs (%v)", err)
	}
	return dir
}

func workloadFiles(t testing.TB, d *stateDir) []string {
	t.Helper()
	whole, _, err := d.files()
	if err != nil {
		t.Fatal(err)
	}
	return whole
}

func TestRestartServesWithoutAnyMember(t *testing.T) {
	c := newCluster(t)
	m := c.member("a")
	other := &identity.Bundle{TrustDomain: spiffeid.RequireTrustDomainFromString("other.org"), Sequence: 7, X509: [][]byte{newTestCA().root.Raw}, JWT: map[string][]byte{}}
	c.federated = []*identity.Bundle{other}
	c.grant("web", web(), testGrant{entry: "e-2", id: "spiffe://example.org/second", federates: []string{"other.org"}})
	c.grant("gone", web())
	cfg := c.config()
	cfg.StateDir = memoryDir(t)
	a := run(t, cfg)
	before := current(t, a.Agent, caller("web"))
	current(t, a.Agent, caller("gone"))
	id := a.Status().ID
	eventually(t, "watched", func() (ok bool) { c.locked(func() { ok = len(c.watched) == 2 }); return ok })
	eventually(t, "written", func() bool { return len(workloadFiles(t, a.state)) == 2 })
	// One is dropped: its file goes.
	c.grant("gone")
	c.locked(func() {
		for h, w := range c.watched {
			if w.Entries[0].Revision == c.grants["web"][0].revision {
				delete(c.watched, h)
			}
		}
	})
	c.pushChanged(false)
	eventually(t, "removed", func() bool { return len(workloadFiles(t, a.state)) == 1 })
	for _, path := range append(workloadFiles(t, a.state), a.state.own(), a.state.trust()) {
		if st := must(os.Stat(path)); st.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %v", path, st.Mode())
		}
	}
	a.halt()
	m.stop()

	b := run(t, cfg)
	after := current(t, b.Agent, caller("web"))
	if len(after.SVIDs) != 2 || after.SVIDs[0].ID != before.SVIDs[0].ID || !bytes.Equal(after.SVIDs[1].Key, before.SVIDs[1].Key) ||
		!bytes.Equal(after.SVIDs[0].Chain[0], before.SVIDs[0].Chain[0]) || after.SVIDs[0].EntryID != "e-web" || after.SVIDs[0].EntryRevision != before.SVIDs[0].EntryRevision {
		t.Errorf("before %+v, after %+v", before.SVIDs, after.SVIDs)
	}
	if len(after.Bundles) != 2 || after.Bundles[td].Sequence != 1 || after.Bundles[other.TrustDomain].Sequence != 7 {
		t.Errorf("bundles %+v", after.Bundles)
	}
	currentErr(t, b.Agent, caller("gone"), identity.ErrUnavailable)
	if got := b.Status(); got.ID != id || got.Workloads != 1 {
		t.Errorf("status %+v", got)
	}
	b.halt()

	// With a member again: no new attestation, and the member learns what is served.
	c.locked(func() { c.members = nil; clear(c.watched); c.bundle.Sequence = 1 })
	m2 := c.member("b")
	cfg.Servers = []string{m2.addr}
	d := run(t, cfg)
	eventually(t, "connected and watched", func() (ok bool) {
		c.locked(func() { ok = len(c.watched) == 1 && c.attested == 1 })
		return ok && d.Ready() == nil
	})
	w := watchUpdates(t, d.Agent, caller("web"))
	w.next()
	c.grant("web")
	c.pushChanged(false)
	w.end(identity.ErrDenied)
}

func TestRestoredRenewalsAreSpread(t *testing.T) {
	now := time.Now()
	seen := map[time.Duration]bool{}
	for range 1000 { // past half-life while the agent was down
		at := renewRestored(now.Add(-45*time.Minute), now.Add(15*time.Minute), now).Sub(now)
		if at < 0 || at > 6*time.Minute {
			t.Fatalf("renewal in %v", at)
		}
		seen[at.Truncate(10*time.Second)] = true
		if at := renewRestored(now.Add(-time.Minute), now.Add(59*time.Minute), now).Sub(now); at < 25*time.Minute || at > 33*time.Minute {
			t.Fatalf("renewal in %v of a fresh one", at)
		}
	}
	if len(seen) < 30 {
		t.Errorf("renewals fall on %d moments only", len(seen))
	}
}

func TestRestoredAreRenewedForWhoComesBack(t *testing.T) {
	dir := memoryDir(t)
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t)
		c.memoryMember("a")
		c.grant("web", web())
		cfg := c.config()
		cfg.StateDir = dir
		a := run(t, cfg)
		current(t, a.Agent, caller("web"))
		a.halt()
		b := run(t, cfg)
		w := watchUpdates(t, b.Agent, caller("web"))
		<-w.got
		if n := asked(c, "web"); n != 1 {
			t.Fatalf("asked %d times", n)
		}
		began := time.Now()
		<-w.got
		if d := time.Since(began); d < 25*time.Minute || d > 35*time.Minute {
			t.Errorf("renewed after %v", d)
		}
		b.halt()
		time.Sleep(2 * time.Hour) // everything expires
		d := run(t, cfg)
		if n := d.Status().Workloads; n != 0 {
			t.Errorf("%d expired workloads are served", n)
		}
		current(t, d.Agent, caller("web"))
		if n := asked(c, "web"); n != 3 {
			t.Errorf("asked %d times", n)
		}
	})
}

// TestDamagedState restarts on every file damaged in every way: the agent says so, serves nothing of it, and works.
func TestDamagedState(t *testing.T) {
	c := newCluster(t)
	c.member("a")
	c.grant("web", web())
	other := newCluster(t)
	other.member("x")
	other.grant("web", web())
	saved := func(c *cluster) (Config, string) {
		cfg := c.config()
		cfg.StateDir = memoryDir(t)
		a := run(t, cfg)
		current(t, a.Agent, caller("web"))
		a.halt()
		return cfg, workloadFiles(t, a.state)[0]
	}
	foreign, foreignSVID := saved(other)
	file := func(dir, name string) string {
		if name == "svid" {
			return workloadFiles(t, &stateDir{dir})[0]
		}
		return filepath.Join(dir, name)
	}
	for _, name := range []string{"svid", "agent.json", "trust.json"} {
		for damage, f := range map[string]func(t *testing.T, path string, data []byte){
			"truncated": func(_ *testing.T, p string, d []byte) { os.WriteFile(p, d[:len(d)/2], 0o600) },
			"empty":     func(_ *testing.T, p string, d []byte) { os.WriteFile(p, nil, 0o600) },
			"trailing":  func(_ *testing.T, p string, d []byte) { os.WriteFile(p, append(d, "{}"...), 0o600) },
			"unknown":   func(_ *testing.T, p string, d []byte) { os.WriteFile(p, append([]byte(`{"x":1,`), d[1:]...), 0o600) },
			"version": func(_ *testing.T, p string, d []byte) {
				os.WriteFile(p, bytes.Replace(d, []byte(`"version":1`), []byte(`"version":2`), 1), 0o600)
			},
			"huge": func(_ *testing.T, p string, d []byte) {
				os.WriteFile(p, append(d, bytes.Repeat([]byte(" "), 5<<20)...), 0o600)
			},
			"loose":       func(_ *testing.T, p string, d []byte) { os.Chmod(p, 0o644) },
			"a directory": func(_ *testing.T, p string, d []byte) { os.Remove(p); os.Mkdir(p, 0o700) },
			"a symlink":   func(_ *testing.T, p string, d []byte) { os.Rename(p, p+".x"); os.Symlink(p+".x", p) },
			"a cluster of another name's": func(t *testing.T, p string, d []byte) {
				src := file(foreign.StateDir, name)
				if name == "svid" {
					src = foreignSVID
				}
				os.WriteFile(p, must(os.ReadFile(src)), 0o600)
			},
		} {
			t.Run(name+" "+damage, func(t *testing.T) {
				cfg, _ := saved(c)
				path := file(cfg.StateDir, name)
				f(t, path, must(os.ReadFile(path)))
				var log bytes.Buffer
				cfg.Log = slog.New(slog.NewTextHandler(&log, nil))
				n := asked(c, "web")
				a := run(t, cfg)
				u := current(t, a.Agent, caller("web"))
				a.halt()
				if len(u.SVIDs) != 1 || !bytes.Equal(u.Bundles[td].X509[0], c.ca.root.Raw) {
					t.Errorf("got %+v", u)
				}
				if !strings.Contains(log.String(), "ignoring a file of the agent's state") {
					t.Errorf("the log does not say: %s", log.String())
				}
				if name == "svid" && asked(c, "web") != n+1 {
					t.Errorf("asked %d times", asked(c, "web")-n)
				}
			})
		}
	}
}

func TestStateOfAnotherTrustDomain(t *testing.T) {
	c := newCluster(t)
	c.member("a")
	c.grant("web", web())
	cfg := c.config()
	cfg.StateDir = memoryDir(t)
	a := run(t, cfg)
	current(t, a.Agent, caller("web"))
	a.halt()
	var log bytes.Buffer
	cfg.Log = slog.New(slog.NewTextHandler(&log, nil))
	cfg.TrustDomain = spiffeid.RequireTrustDomainFromString("other.org")
	b := run(t, cfg)
	currentErr(t, b.Agent, caller("web"), identity.ErrUnavailable)
	b.halt()
	if !strings.Contains(log.String(), "other.org") {
		t.Errorf("the log does not say: %s", log.String())
	}
}

func TestStateFollowsTheConfiguredAnchor(t *testing.T) {
	c, other := newCluster(t), newCluster(t)
	c.member("a")
	other.member("a")
	c.grant("web", web())
	other.grant("web", web())
	cfg := c.config()
	cfg.StateDir = memoryDir(t)
	a := run(t, cfg)
	current(t, a.Agent, caller("web"))
	a.halt()
	for _, tt := range []struct {
		change func(*Config)
		kept   bool
	}{
		{func(cfg *Config) { cfg.Pin = node.Pin(c.ca.issuer.RawSubjectPublicKeyInfo) }, false},
		{func(cfg *Config) { cfg.Bundle, cfg.Pin = c.bundle, "" }, true},
		{func(cfg *Config) { cfg.Bundle = c.bundle }, true},
		{func(cfg *Config) {}, true},
		{func(cfg *Config) { *cfg = other.config() }, false}, // another cluster of the same name
	} {
		cfg := cfg
		tt.change(&cfg)
		cfg.StateDir = a.cfg.StateDir
		n, m := asked(c, "web"), asked(other, "web")
		b := run(t, cfg)
		current(t, b.Agent, caller("web"))
		b.halt()
		if kept := asked(c, "web")+asked(other, "web") == n+m; kept != tt.kept {
			t.Errorf("kept: %v, want %v", kept, tt.kept)
		}
	}
	if asked(other, "web") != 1 {
		t.Error("the other cluster was not asked")
	}
}

func TestStateDirIsPrivate(t *testing.T) {
	dir := memoryDir(t)
	if _, err := openStateDir(dir, func(string) (bool, error) { return false, nil }); !errors.Is(err, identity.ErrInvalid) || !strings.Contains(err.Error(), "/run") {
		t.Errorf("a disk: %v", err)
	}
	if _, err := openStateDir(dir, func(string) (bool, error) { return false, errors.New("statfs") }); err == nil {
		t.Error("unknown file system: taken")
	}
	os.Chmod(dir, 0o755)
	if _, err := openStateDir(dir, durable.OnMemory); !errors.Is(err, durable.ErrLoose) {
		t.Errorf("others can read it: %v", err)
	}
	os.Chmod(dir, 0o700)
	c := newCluster(t)
	c.member("a")
	c.grant("web", web())
	cfg := c.config()
	cfg.StateDir = dir
	a := run(t, cfg)
	current(t, a.Agent, caller("web"))
	two := must(New(cfg))
	if err := two.Run(t.Context()); !errors.Is(err, durable.ErrLocked) {
		t.Errorf("a second agent on the same folder: %v", err)
	}
	left := filepath.Join(dir, "svid", ".x.json.1.tmp")
	os.WriteFile(left, []byte("x"), 0o600)
	a.halt()
	run(t, cfg)
	eventually(t, "what a crash left is removed", func() bool {
		_, err := os.Stat(left)
		return errors.Is(err, fs.ErrNotExist)
	})
}

func TestNoSecretInLogs(t *testing.T) {
	c := newCluster(t)
	c.member("a")
	c.grant("tok-secret-1", web())
	var log bytes.Buffer
	cfg := c.config()
	cfg.StateDir = memoryDir(t)
	cfg.Log = slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	a := run(t, cfg)
	u := current(t, a.Agent, caller("tok-secret-1"))
	err := currentErr(t, a.Agent, caller("tok-secret-2"), identity.ErrDenied)
	c.locked(func() { c.issueErr = errors.New("broken") })
	err2 := currentErr(t, a.Agent, caller("tok-secret-3"), identity.ErrUnavailable)
	path := workloadFiles(t, a.state)[0]
	a.halt()
	os.WriteFile(path, bytes.Replace(must(os.ReadFile(path)), []byte(`"key":"`), []byte(`"key":"!`), 1), 0o600)
	b := run(t, cfg)
	b.halt()
	all := log.String() + err.Error() + err2.Error()
	key, _ := json.Marshal(u.SVIDs[0].Key)
	for _, secret := range []string{"tok-secret", cfg.Credential.(*joinToken).secret, string(bytes.Trim(key, `"`))[20:40]} {
		if strings.Contains(all, secret) {
			t.Errorf("%q in %s", secret, all)
		}
	}
}

// states are good files of each kind, for the fuzzers.
func states(t testing.TB) (tr *trust, own, bundles, wl []byte) {
	c := newCluster(t)
	tr = must(newTrust(nil, td, c.bundle, []*identity.Bundle{{TrustDomain: spiffeid.RequireTrustDomainFromString("other.org"), JWT: map[string][]byte{}}}))
	key := must(KeyP256.makePair())
	pub := must(x509.ParsePKIXPublicKey(must(pairOf(key.private)).public))
	const id = "spiffe://example.org/countersign/agent/join/1"
	o := must(newOwnSVID(tr, id, [][]byte{c.ca.leaf(id, pub, time.Hour, nil), c.ca.issuer.Raw}, key, true, time.Now()))
	s := identity.X509SVID{EntryID: "e", EntryRevision: 3, ID: spiffeid.RequireFromString("spiffe://example.org/web"), Hint: "h", Key: key.private,
		Chain: [][]byte{c.ca.leaf("spiffe://example.org/web", pub, time.Hour, nil), c.ca.issuer.Raw}, FederatesWith: []spiffeid.TrustDomain{spiffeid.RequireTrustDomainFromString("other.org")}}
	return tr, must(encodeOwn(o)), must(encodeTrust(tr, "pin", []string{"a:1"})), must(encodeWorkload(&savedWorkload{key: "k", selectors: []string{"unix:uid:1"}, svids: []identity.X509SVID{s}}))
}

func TestStateFilesRoundTrip(t *testing.T) {
	tr, own, bundles, wl := states(t)
	now := time.Now()
	if got := must(encodeOwn(must(parseOwn(own, tr, now)))); !bytes.Equal(got, own) {
		t.Errorf("own: %s, was %s", got, own)
	}
	tr2, anchor, members, err := parseTrust(bundles)
	if err != nil || !slices.Equal(members, []string{"a:1"}) || !bytes.Equal(must(encodeTrust(tr2, anchor, members)), bundles) {
		t.Errorf("trust: %v", err)
	}
	if got := must(encodeWorkload(must(parseWorkload(wl, tr, now)))); !bytes.Equal(got, wl) {
		t.Errorf("workload: %s, was %s", got, wl)
	}
	for _, after := range []time.Duration{2 * time.Hour, -time.Hour} {
		if _, err := parseWorkload(wl, tr, now.Add(after)); err == nil {
			t.Errorf("taken %v later", after)
		}
		if _, err := parseOwn(own, tr, now.Add(after)); err == nil {
			t.Errorf("own taken %v later", after)
		}
	}
}
