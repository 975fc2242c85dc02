package raft

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
)

// moved restarts all stopped members on new addresses. hints are the addresses they are given, by name of the
// member that is there.
func (c *cluster) moved(hints map[string]string) {
	c.t.Helper()
	for _, m := range c.members {
		m.address = ""
	}
	tune := c.tune
	defer func() { c.tune = tune }()
	start := func(m *member, peers ...string) {
		c.tune = func(cfg *Config) {
			if tune != nil {
				tune(cfg)
			}
			cfg.Peers = peers
		}
		c.start(m, false)
	}
	for _, m := range c.members { // those who are hinted at come first: only then their address is known
		for _, at := range hints {
			if at == m.name && m.address == "" {
				start(m)
			}
		}
	}
	for _, m := range c.members {
		if m.address != "" {
			continue
		}
		var peers []string
		for _, o := range c.members {
			if hints[m.name] == o.name {
				peers = append(peers, "127.0.0.1:1", o.address) // a wrong one does no harm
			}
		}
		start(m, peers...)
	}
}

// agreed waits until every member has all members at their present addresses in its configuration.
func (c *cluster) agreed() {
	c.t.Helper()
	eventually(c.t, "the configuration has the new addresses", func() bool {
		for _, m := range c.members {
			for _, k := range m.Members() {
				if !slices.ContainsFunc(c.members, func(o *member) bool { return o.name == k.ID && o.address == k.Address }) {
					return false
				}
			}
		}
		return true
	})
}

// TestAllAddressesChange: all stopped, all restarted elsewhere, and the one right hint that two of them have is
// enough to elect, to commit, and to put the addresses into the configuration.
func TestAllAddressesChange(t *testing.T) {
	changesAddress(t)
	t.Parallel()
	c := newCluster(t, 3, nil)
	c.propose(c.members[0], "before")
	c.same("before")
	for _, m := range c.members {
		m.Close()
	}
	c.moved(map[string]string{"m1": "m2", "m3": "m2"})
	c.voting(3)
	c.propose(c.members[0], "after")
	c.agreed()
	c.propose(c.members[2], "agreed")
	c.same("before", "after", "agreed")
	eventually(t, "all write down where the others are", func() bool {
		for _, m := range c.members {
			data, err := os.ReadFile(filepath.Join(m.dir, "peers.json"))
			if err != nil {
				return false
			}
			for _, o := range c.others(m) {
				if !bytes.Contains(data, []byte(o.address)) {
					return false
				}
			}
		}
		return true
	})

	// One hint for one member: it and the one hinted at are a quorum, and go on. The third knows nobody's new address.
	for _, m := range c.members {
		m.Close()
	}
	c.moved(map[string]string{"m3": "m1"})
	c.propose(c.members[0], "two of three")
	// The third is told where one is, and the rest follows: it moves once more, with a hint.
	third := c.members[1]
	third.Close()
	third.address = ""
	tune := c.tune
	c.tune = func(cfg *Config) { cfg.Peers = []string{c.members[2].address} }
	c.start(third, false)
	c.tune = tune
	c.voting(3)
	c.propose(third, "three")
	c.agreed()
	c.same("before", "two of three", "three")
}

// TestMoveWhileOthersRun: one that moves tells the others, whom it finds where they were.
func TestMoveWhileOthersRun(t *testing.T) {
	changesAddress(t)
	t.Parallel()
	c := newCluster(t, 3, nil)
	for _, m := range c.members { // leader and followers alike
		m.Close()
		m.address = ""
		c.start(m, false)
		c.voting(3)
		c.agreed()
		c.propose(m, "moved "+m.name)
	}
	c.same("moved m1", "moved m2", "moved m3")
}

// TestSwappedAddresses: two members take each other's address. They do not take each other for the other.
func TestSwappedAddresses(t *testing.T) {
	changesAddress(t)
	t.Parallel()
	c := newCluster(t, 3, nil)
	c.propose(c.members[0], "before")
	a, b := c.members[1], c.members[2]
	a.Close()
	b.Close()
	a.address, b.address = b.address, a.address
	c.start(a, false)
	c.start(b, false)
	c.voting(3)
	c.propose(a, "from a")
	c.propose(b, "from b")
	c.same("before", "from a", "from b")
}

// TestOnlyOneself: a member's word about its own address counts if it is known to be its own; about another's it
// is a hint that hides nothing; and of who is no member, nothing is noted.
func TestOnlyOneself(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3, nil)
	m := c.members[0]
	right := c.members[1].address
	for _, tc := range []struct {
		what, peer string
		w          word
	}{
		{"another's name", "m3", word{ID: "m2", Address: "evil:1"}},
		{"nobody's name", "", word{ID: "m2", Address: "evil:1"}},
		{"hearsay", "m3", word{ID: "m3", Address: c.members[2].address, Peers: []peerAddress{{"m2", "evil:1"}, {"m9", "evil:2"}, {"m1", "evil:3"}}}},
		{"a stranger", "m9", word{ID: "m9", Address: "evil:4"}},
	} {
		m.learn(tc.peer, tc.w)
		if got := m.book.where("m2", right); got != right {
			t.Errorf("%s: m2 is now at %s", tc.what, got)
		}
		for _, p := range m.book.first() {
			if p.ID != "m2" && p.ID != "m3" {
				t.Errorf("%s: the book has %v", tc.what, p)
			}
		}
	}
	m.learn("m9", word{ID: "m9", Address: "evil:4", Peers: []peerAddress{{"m2", "evil:5"}}})
	m.book.mu.Lock()
	if slices.Contains(m.book.entries["m2"], "evil:5") {
		t.Error("a stranger's hearsay is in the book")
	}
	m.book.mu.Unlock()
	// Lies without end do not push out where it was last found.
	for i := range 100 {
		m.learn("m3", word{ID: "m3", Address: c.members[2].address, Peers: []peerAddress{{"m2", fmt.Sprint("evil:", i)}}})
	}
	if got := m.book.where("m2", right); got != right {
		t.Errorf("m2 is now at %s", got)
	}
	c.propose(c.members[1], "fine")
	c.same("fine")
}

// TestBookDamage: a book that is damaged in any byte is said to be, and the member starts without it.
func TestBookDamage(t *testing.T) {
	t.Parallel()
	good, err := marshalBook([]bookEntry{{"m1", []string{"host-1:8443", "10.0.0.1:8443"}}, {"m2", []string{"<&>:1"}}})
	if err != nil {
		t.Fatal(err)
	}
	if e, err := parseBook(good); err != nil || len(e) != 2 {
		t.Fatalf("%v, %v", e, err)
	}
	for i := range good {
		for _, flip := range []byte{1, 0x20, 0x80} {
			bad := bytes.Clone(good)
			bad[i] ^= flip
			if _, err := parseBook(bad); err == nil {
				t.Errorf("byte %d: %q is accepted", i, bad)
			}
		}
		if _, err := parseBook(good[:i]); err == nil {
			t.Errorf("cut at %d: accepted", i)
		}
	}

	logged := &syncBuffer{}
	c := newCluster(t, 3, func(c *Config) { c.Log = slog.New(slog.NewTextHandler(logged, nil)) })
	m := c.follower()
	m.Close()
	path := filepath.Join(m.dir, "peers.json")
	if err := os.WriteFile(path, bytes.Replace(good, []byte("host-1"), []byte("host-2"), 1), 0o600); err != nil {
		t.Fatal(err)
	}
	c.start(m, false)
	c.voting(3)
	c.propose(m, "x")
	if !strings.Contains(logged.String(), "peers.json") || !strings.Contains(logged.String(), "damaged on disk") {
		t.Error("the damage is not in the log")
	}
	eventually(t, "it is written anew", func() bool {
		data, err := os.ReadFile(path)
		if err != nil {
			return false
		}
		_, err = parseBook(data)
		return err == nil
	})
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
}

func TestBookRotates(t *testing.T) {
	t.Parallel()
	b := newBook("me")
	b.heard("x", "a")
	b.heard("x", "b")
	if got := b.where("x", "c"); got != "a" {
		t.Errorf("first %s", got)
	}
	var tried []string
	for range 4 {
		at := b.where("x", "c")
		tried = append(tried, at)
		b.failed("x", at)
	}
	if !slices.Equal(tried, []string{"a", "b", "c", "a"}) {
		t.Errorf("tried %v", tried)
	}
	b.found("x", "c")
	b.failed("x", "a") // somebody else's attempt of before
	if got := b.where("x", "a"); got != "c" {
		t.Errorf("found at c, tried at %s", got)
	}
	b.heard("me", "z")
	b.heard("y", "bad\naddress")
	if got := b.where("me", ""); got != "" || len(b.first()) != 1 {
		t.Errorf("%q, %v", got, b.first())
	}
	for i := range 2 * maxBook {
		b.heard(fmt.Sprint("y", i), "a")
	}
	if n := len(b.first()); n != maxBook {
		t.Errorf("%d members", n)
	}
	b.retain(map[string]bool{"x": true})
	if n := len(b.first()); n != 1 {
		t.Errorf("%d members", n)
	}
}

// FuzzBook: what parses is what would be written. The sum is fitted by the seeds only: damage must not get past it.
func FuzzBook(f *testing.F) {
	seeds(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		entries, err := parseBook(b)
		if err != nil {
			return
		}
		if again, err := marshalBook(entries); err != nil || !bytes.Equal(again, b) {
			t.Fatalf("read %q, would write %q, %v", b, again, err)
		}
	})
}

// FuzzWord: whatever another member sends, what is taken over is within bounds, and is what it would send on.
func FuzzWord(f *testing.F) {
	seeds(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		w, err := parseWord(b)
		if err != nil {
			if !errors.Is(err, errWord) {
				t.Fatal(err)
			}
			return
		}
		if len(w.Info) > MaxInfo || len(w.Peers) > maxBook || !validAddress(w.ID, w.Address) || w.Contact < 0 {
			t.Fatalf("accepted %+v", w)
		}
		again, err := w.marshal()
		if err != nil {
			t.Fatal(err)
		}
		w2, err := parseWord(again)
		if len(w.Info) == 0 {
			w.Info, w2.Info = nil, nil
		}
		if len(w.Peers) == 0 {
			w.Peers, w2.Peers = nil, nil
		}
		if err != nil || !reflect.DeepEqual(w, w2) {
			t.Fatalf("%+v became %+v, %v", w, w2, err)
		}
		own := newBook("me")
		for _, p := range w.Peers {
			own.heard(p.ID, p.Address)
		}
		own.found(w.ID, w.Address)
		if len(own.entries) > maxBook {
			t.Fatal("the book grew too large")
		}
	})
}
