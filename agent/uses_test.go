package agent

import (
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"countersign.io/countersign/api"
	nodev1 "countersign.io/countersign/api/node/v1"
	"countersign.io/countersign/identity"
)

// id is the authority's, as members know it.
func (c *testCA) id() string { return hex.EncodeToString(c.root.SubjectKeyId) }

// said is what the agent said last of an authority; nil: that nothing is under it.
func (c *cluster) said(authority string) (use *nodev1.Ack_Use, ack *nodev1.Ack) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.acks) == 0 {
		return nil, nil
	}
	ack = c.acks[len(c.acks)-1]
	for _, u := range ack.Uses {
		if u.Authority == authority {
			return u, ack
		}
	}
	return nil, ack
}

// rotate has another authority sign, and tells of it; what ends is tainted or not, or is trusted no longer.
func (c *cluster) rotate(next *testCA, tainted bool, spread time.Duration) {
	c.locked(func() {
		c.signs = next
		b := *c.bundle
		b.Sequence++
		b.X509 = [][]byte{c.ca.root.Raw, next.root.Raw}
		b.JWT = maps.Clone(b.JWT)
		b.JWT[next.kid] = jwtPublic(next)
		b.Ending = []identity.Ending{{ID: c.ca.id(), Tainted: tainted, Spread: spread}}
		if tainted {
			b.Ending = append(b.Ending, identity.Ending{ID: c.ca.kid, Tainted: true})
		}
		c.bundle = &b
	})
	c.pushState()
}

func (c *cluster) pushState() {
	var st *nodev1.SyncResponse
	c.locked(func() { c.revision++; st = c.state() })
	c.push(st)
}

func jwtPublic(c *testCA) []byte { return must(x509.MarshalPKIXPublicKey(c.jwtKey.Public())) }

func svidUnder(authority string, until time.Time) identity.X509SVID {
	return identity.X509SVID{ID: spiffeid.RequireFromString("spiffe://example.org/web"), Authority: authority, NotAfter: until}
}

// TestUsesAreCounted: what is held, and what somebody has who does not hear of the next.
func TestUsesAreCounted(t *testing.T) {
	now := time.Now()
	end := now.Add(time.Hour)
	type book struct {
		*cache
		w *workload
	}
	give := func(b book, authority string) { b.replace(b.w, []identity.X509SVID{svidUnder(authority, end)}) }
	open := func(b book) *stream {
		s := &stream{wake: make(chan struct{}, 1)}
		if err := b.attach(b.w, s); err != nil {
			t.Fatal(err)
		}
		return s
	}
	for _, c := range []struct {
		name string
		do   func(b book)
		want string
	}{
		{"nothing", func(book) {}, ""},
		{"held", func(b book) { give(b, "old") }, "old:1"},
		{"two at once", func(b book) {
			b.replace(b.w, []identity.X509SVID{svidUnder("old", end), svidUnder("old", end), svidUnder("other", end)})
		}, "old:2 other:1"},
		{"replaced for who listens", func(b book) { give(b, "old"); open(b); give(b, "new") }, "new:1"},
		{"replaced, and one had left", func(b book) { give(b, "old"); s := open(b); open(b); b.detach(b.w, s); give(b, "new") }, "new:1 old:0+"},
		{"replaced, and all had left", func(b book) { give(b, "old"); b.detach(b.w, open(b)); give(b, "new") }, "new:1 old:0+"},
		{"replaced, and nobody ever had it", func(b book) { give(b, "old"); give(b, "new") }, "new:1"},
		{"replaced twice, and nobody had the second", func(b book) { give(b, "old"); b.detach(b.w, open(b)); give(b, "new"); give(b, "newer") }, "newer:1 old:0+"},
		{"dropped", func(b book) { give(b, "old"); open(b); b.drop(b.w, identity.ErrUnavailable) }, "old:0+"},
		{"dropped, and nobody had it", func(b book) { give(b, "old"); b.drop(b.w, identity.ErrUnavailable) }, ""},
		{"dropped twice", func(b book) {
			give(b, "old")
			open(b)
			b.drop(b.w, identity.ErrUnavailable)
			b.drop(b.w, identity.ErrUnavailable)
		}, "old:0+"},
		{"left, and dropped", func(b book) {
			give(b, "old")
			s := open(b)
			b.drop(b.w, identity.ErrUnavailable)
			b.detach(b.w, s)
		}, "old:0+"},
		{"restored", func(b book) {
			b.restore(&savedWorkload{key: "k", svids: []identity.X509SVID{svidUnder("old", end)}}, now)
		}, "old:1+"},
	} {
		var k cache
		k.init(false)
		b := book{&k, k.add("it")}
		c.do(b)
		if got := list(&k, now); got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
		if got := list(&k, end.Add(time.Second)); got != list(&k, end.Add(time.Second)) || len(k.uses.stray) != 0 {
			t.Errorf("%s: after the end: %q, %v", c.name, got, k.uses.stray)
		}
		for id, n := range k.uses.held {
			if n <= 0 {
				t.Errorf("%s: %d of %s", c.name, n, id)
			}
		}
	}
}

// list is authority:held, with a + where others may have one.
func list(c *cache, now time.Time) (out string) {
	uses, _ := c.listUses(nil, now)
	for i, u := range uses {
		if i > 0 {
			out += " "
		}
		out += fmt.Sprintf("%s:%d", u.Authority, u.Svids)
		if u.Until != nil {
			out += "+"
		}
	}
	return out
}

// TestUsesAreTold: the agent's own counts, and each message is whole.
func TestUsesAreTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t)
		c.memoryMember("a")
		c.grant("web", web(), testGrant{entry: "e-2", id: "spiffe://example.org/second"})
		a := run(t, c.config())
		w := watchUpdates(t, a.Agent, caller("web"))
		<-w.got
		synctest.Wait()
		u, ack := c.said(c.ca.id())
		if u.GetSvids() != 3 || !ack.Tells || ack.BundleSequence != 1 || len(ack.Uses) != 1 {
			t.Fatalf("told %v", ack)
		}
		if ack.Since == nil { // there is no state dir: an earlier process may have handed something out
			t.Error("it says that it knows all")
		}
		w.stop()
		synctest.Wait()
		time.Sleep(usesEvery)
		synctest.Wait()
		c.rotate(newTestCA(), false, 0)
		synctest.Wait()
		if u, _ := c.said(c.ca.id()); u.GetUntil() == nil || u.Until.AsTime().Before(time.Now().Add(59*time.Minute)) {
			t.Errorf("who has left may use it on: %v", u)
		}
	})
}

// TestTaintReplacesEverything: within the spread and no sooner, the agent's own too; then nothing is under the tainted one.
func TestTaintReplacesEverything(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const workloads, spread = 60, 30 * time.Second
		c := newCluster(t)
		c.memoryMember("a")
		a := run(t, c.config())
		var watchers []*watcher
		for i := range workloads {
			token := fmt.Sprint("web-", i)
			c.grant(token, testGrant{entry: token, id: "spiffe://example.org/" + token})
			watchers = append(watchers, watchUpdates(t, a.Agent, caller(token)))
		}
		for _, w := range watchers {
			<-w.got
		}
		synctest.Wait()
		next := newTestCA()
		c.rotate(next, false, 0)
		time.Sleep(time.Minute)
		if u, _ := c.said(c.ca.id()); u.GetSvids() != workloads+1 {
			t.Errorf("replaced though it only retires: %v", u)
		}
		var before int
		c.locked(func() { before = len(c.acks) })
		began := time.Now()
		c.rotate(next, true, spread)
		time.Sleep(spread / 2)
		if u, _ := c.said(c.ca.id()); u.GetSvids() < workloads/6 || u.GetSvids() > workloads*5/6 {
			t.Errorf("after half of the time %v are left", u)
		}
		for _, w := range watchers {
			for u := <-w.got; u.SVIDs[0].Authority != next.id(); u = <-w.got {
			}
		}
		if took := time.Since(began); took > spread+time.Second {
			t.Errorf("replaced in %v", took)
		}
		time.Sleep(spread) // the agent's own
		synctest.Wait()
		u, ack := c.said(c.ca.id())
		if u != nil {
			t.Errorf("still under the tainted one: %v", u)
		}
		if n, _ := c.said(next.id()); n.GetSvids() != workloads+1 {
			t.Errorf("under the new one: %v", ack)
		}
		var sent int
		c.locked(func() { sent = len(c.acks) - before })
		if most := int(spread/usesEvery) + 20; sent > most {
			t.Errorf("%d messages for %d renewals, want %d at the most", sent, workloads, most)
		}
	})
}

// TestManyRenewalsFewMessages: whatever thousands of workloads do at once, the member is told now and then.
func TestManyRenewalsFewMessages(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var c cache
		c.init(false)
		c.watchWake = make(chan struct{}, 1)
		c.uses.ending = map[string]identity.Ending{"old": {ID: "old", Tainted: true}}
		var all []*workload
		for i := range 5000 {
			w := c.add(fmt.Sprint("w-", i))
			c.replace(w, []identity.X509SVID{svidUnder("old", time.Now().Add(time.Hour))})
			w.streams, w.handed = []*stream{{}}, true
			all = append(all, w)
		}
		told := 0
		for i, w := range all {
			c.mu.Lock()
			c.replace(w, []identity.X509SVID{svidUnder("new", time.Now().Add(time.Hour))})
			c.mu.Unlock()
			if i%10 == 0 {
				time.Sleep(10 * time.Millisecond) // 5 seconds in all
				synctest.Wait()
			}
			if c.takeUses() {
				told++
			}
		}
		if most := int(5*time.Second/usesEvery) + 5; told > most {
			t.Errorf("told %d times in 5 s, want %d at the most", told, most)
		}
		if got := list(&c, time.Now()); got != "new:5000" || !c.takeUses() && told == 0 {
			t.Errorf("in the end %q", got)
		}
	})
}

// TestMemberThatLags signs under the tainted authority still: it is asked again until it does not.
func TestMemberThatLags(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t)
		c.memoryMember("a")
		c.grant("web", web())
		a := run(t, c.config())
		w := watchUpdates(t, a.Agent, caller("web"))
		<-w.got
		next := newTestCA()
		c.rotate(next, true, 0)
		c.locked(func() { c.signs = c.ca })
		time.Sleep(10 * time.Second)
		n := asked(c, "web")
		if n < 5 || n > 15 {
			t.Errorf("asked %d times in 10 s", n)
		}
		c.locked(func() { c.signs = next })
		time.Sleep(3 * time.Second)
		synctest.Wait()
		if u, ack := c.said(c.ca.id()); u != nil {
			t.Errorf("%v", ack)
		}
		n = asked(c, "web")
		time.Sleep(10 * time.Second)
		if asked(c, "web") != n {
			t.Error("asked on")
		}
	})
}

// TestRevokedUnderIt: a chain that leads to the bundle no longer is replaced at once, though nothing was tainted.
func TestRevokedUnderIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t)
		c.memoryMember("a")
		c.grant("web", web())
		a := run(t, c.config())
		w := watchUpdates(t, a.Agent, caller("web"))
		<-w.got
		next := newTestCA()
		c.rotate(next, false, 0)
		time.Sleep(time.Minute)
		if n := asked(c, "web"); n != 1 {
			t.Errorf("asked %d times", n)
		}
		c.locked(func() {
			b := *c.bundle
			b.Sequence++
			b.X509, b.Ending = [][]byte{next.root.Raw}, nil
			c.bundle = &b
		})
		began := time.Now()
		c.pushState()
		for {
			if u := <-w.got; u.SVIDs[0].Authority == next.id() {
				break
			}
		}
		if took := time.Since(began); took > time.Second {
			t.Errorf("replaced after %v", took)
		}
	})
}

// TestNobodyHasIt: what no caller was given is not waited for, and what one has who left is.
func TestNobodyHasIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t)
		c.memoryMember("a")
		c.grant("jwt", web())
		c.grant("left", testGrant{entry: "left", id: "spiffe://example.org/left"})
		a := run(t, c.config())
		if _, err := a.FetchJWT(t.Context(), caller("jwt"), []string{"x"}, spiffeid.ID{}); err != nil {
			t.Fatal(err)
		}
		w := watchUpdates(t, a.Agent, caller("left"))
		<-w.got
		w.stop()
		synctest.Wait()
		if u, _ := c.said(c.ca.id()); u.GetSvids() < 2 {
			t.Fatalf("%v", u)
		}
		next := newTestCA()
		c.rotate(next, true, 0)
		time.Sleep(2 * time.Second)
		synctest.Wait()
		u, _ := c.said(c.ca.id())
		if u.GetSvids() != 0 || u.GetUntil() == nil { // nobody listens for the next: it is not renewed
			t.Errorf("%v; want none that is renewed, and one that somebody has", u)
		}
		// Tokens of the tainted key are not handed out.
		got, err := a.FetchJWT(t.Context(), caller("jwt"), []string{"x"}, spiffeid.ID{})
		if err != nil || c.jwts != 2 {
			t.Fatalf("%v, asked %d times", err, c.jwts)
		}
		if again, err := a.FetchJWT(t.Context(), caller("jwt"), []string{"x"}, spiffeid.ID{}); err != nil || again[0].Token != got[0].Token {
			t.Errorf("the new one is not kept: %v", err)
		}
	})
}

// TestTaintedTokensAreNotKept: a push purges them, also where the X.509 authority is as it was.
func TestTaintedTokensAreNotKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t)
		c.memoryMember("a")
		c.grant("web", web())
		a := run(t, c.config())
		w := watchUpdates(t, a.Agent, caller("web"))
		<-w.got
		fetch := func(asked int) {
			t.Helper()
			if _, err := a.FetchJWT(t.Context(), caller("web"), []string{"x"}, spiffeid.ID{}); err != nil || c.jwts != asked {
				t.Errorf("%v, asked %d times, want %d", err, c.jwts, asked)
			}
		}
		fetch(1)
		fetch(1)
		end := func(tainted bool) {
			c.locked(func() {
				b := *c.bundle
				b.Ending = []identity.Ending{{ID: c.ca.kid, Tainted: tainted}}
				c.bundle = &b
			})
			c.pushState()
			synctest.Wait()
		}
		end(false)
		fetch(1)
		end(true)
		fetch(2)
	})
}

// TestUsesOverARestart: what an earlier process handed out is known, or it is said that it is not.
func TestUsesOverARestart(t *testing.T) {
	for _, c := range []struct {
		name   string
		damage func(t *testing.T, d *stateDir)
		knows  bool
		gone   bool // nothing of before is left
	}{
		{"intact", func(*testing.T, *stateDir) {}, true, false},
		{"uses lost", func(t *testing.T, d *stateDir) { remove(t, d.uses()) }, false, false},
		{"uses damaged", func(t *testing.T, d *stateDir) { write(t, d.uses(), "{") }, false, false},
		{"uses empty", func(t *testing.T, d *stateDir) { write(t, d.uses(), "") }, false, false},
		{"uses of another version", func(t *testing.T, d *stateDir) { write(t, d.uses(), `{"version":99,"stray":{}}`) }, false, false},
		{"trust damaged", func(t *testing.T, d *stateDir) { write(t, d.trust(), "{") }, false, false},
		{"a workload damaged", func(t *testing.T, d *stateDir) { write(t, workloadFiles(t, d)[0], "{") }, false, false},
		{"trust unreadable", func(t *testing.T, d *stateDir) {
			if err := os.Chmod(d.trust(), 0o666); err != nil {
				t.Fatal(err)
			}
		}, false, false},
		{"trust lost", func(t *testing.T, d *stateDir) { remove(t, d.trust()) }, false, false},
		{"all lost", func(t *testing.T, d *stateDir) { remove(t, d.trust()); remove(t, d.uses()) }, true, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			k := newCluster(t)
			k.member("a")
			k.grant("web", web())
			cfg := k.config()
			cfg.StateDir = memoryDir(t)
			a := run(t, cfg)
			w := watchUpdates(t, a.Agent, caller("web"))
			w.next()
			w.stop()
			eventually(t, "the first knows all", func() bool { _, ack := k.said(""); return ack.GetTells() })
			if _, ack := k.said(""); ack.Since != nil {
				t.Errorf("a first start does not know what was before: %v", ack)
			}
			eventually(t, "written", func() bool {
				data, err := readState(a.state.uses(), maxStateFile)
				if err != nil || data == nil {
					return false
				}
				stray, err := parseUses(data)
				return err == nil && !stray[k.ca.id()].IsZero() && len(workloadFiles(t, a.state)) == 1
			})
			a.halt()
			c.damage(t, a.state)
			k.locked(func() { k.acks = nil })
			cfg.Credential = k.config().Credential
			b := run(t, cfg)
			// The last word of the process before may come late.
			eventually(t, "it says whether it knows all, and what was handed out", func() bool {
				u, ack := k.said(k.ca.id())
				return ack.GetTells() && (ack.Since == nil) == c.knows && (!c.knows || c.gone || u.GetUntil() != nil)
			})
			b.halt()
		})
	}
}

func remove(t *testing.T, path string) {
	t.Helper()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
}

func write(t *testing.T, path, data string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(data), 0o600); err != nil {
		t.Fatal(err)
	}
}

func FuzzUsesFile(f *testing.F) {
	seeds(f)
	f.Fuzz(func(t *testing.T, data []byte) {
		stray, err := parseUses(data)
		if err != nil {
			return
		}
		one := must(encodeUses(stray))
		two, err := parseUses(one)
		if err != nil || !maps.EqualFunc(stray, two, time.Time.Equal) {
			t.Errorf("%s is not read back: %v", one, err)
		}
	})
}

// An older agent's push of what ends is no reason to drop the newer one's; a newer number is.
func TestEndingOfTheSameBundle(t *testing.T) {
	c := newCluster(t)
	first := must(newTrust(nil, td, c.bundle, nil))
	with := func(seq uint64, e ...identity.Ending) *identity.Bundle {
		b := *c.bundle
		b.Sequence, b.Ending = seq, e
		return must(api.BundleFromWire(api.BundleToWire(&b)))
	}
	tainted := must(newTrust(first, td, with(1, identity.Ending{ID: "x", Tainted: true, Spread: time.Second}), nil))
	if tainted == first || !tainted.ending["x"].Tainted || tainted.ending["x"].Spread != time.Second {
		t.Errorf("%+v", tainted.ending)
	}
	if again := must(newTrust(tainted, td, with(1, identity.Ending{ID: "x", Tainted: true, Spread: time.Second}), nil)); again != tainted {
		t.Error("the same again is something new")
	}
	if old := must(newTrust(tainted, td, with(0), nil)); old != tainted {
		t.Error("an older bundle takes it back")
	}
	if !slices.Equal(slices.Collect(maps.Keys(tainted.ending)), []string{"x"}) {
		t.Errorf("%v", tainted.ending)
	}
}

// TestUnwrittenUses: what could not be written once is not known after a restart.
func TestUnwrittenUses(t *testing.T) {
	c := newCluster(t)
	c.member("a")
	c.grant("web", web())
	c.grant("other", testGrant{entry: "other", id: "spiffe://example.org/other"})
	cfg := c.config()
	cfg.StateDir = memoryDir(t)
	a := run(t, cfg)
	watchUpdates(t, a.Agent, caller("web")).next()
	eventually(t, "written", func() bool { return len(workloadFiles(t, a.state)) == 1 && exists(a.state.uses()) })
	dir := filepath.Dir(a.state.svid("x"))
	if err := os.Rename(dir, dir+".away"); err != nil {
		t.Fatal(err)
	}
	watchUpdates(t, a.Agent, caller("other")).next()
	eventually(t, "it is said that something is missing", func() bool { return !exists(a.state.uses()) })
	if err := os.Rename(dir+".away", dir); err != nil {
		t.Fatal(err)
	}
	c.rotate(newTestCA(), false, 0) // writes the bundle
	a.halt()
	if exists(a.state.uses()) {
		t.Error("it says again that it knows all")
	}
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
