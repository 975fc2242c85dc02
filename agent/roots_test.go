package agent

import (
	"context"
	"errors"
	"testing"

	"countersign.io/countersign/identity"
)

// TestPublishedRoots: the file is read at each first contact, so that a renewed one counts without a restart.
func TestPublishedRoots(t *testing.T) {
	c := newCluster(t)
	c.member("a")
	c.grant("pod", web())
	other := newTestCA()
	var roots [][]byte
	var fault error
	read := 0
	cfg := c.direct("pod")
	cfg.Pin, cfg.TrustDomain = "", td
	cfg.Roots = func() ([][]byte, error) { read++; return roots, fault }
	for _, row := range []struct {
		name  string
		roots [][]byte
		fault error
		good  bool
	}{
		{"another cluster's", [][]byte{other.root.Raw}, nil, false},
		{"none", nil, nil, false},
		{"damaged", [][]byte{[]byte("x")}, nil, false},
		{"a leaf", [][]byte{c.ca.leaf(web().id, newKey().Public(), wait, nil)}, nil, false},
		{"unreadable", [][]byte{c.ca.root.Raw}, errors.New("no such file"), false},
		{"renewed, with both", [][]byte{other.root.Raw, c.ca.root.Raw}, nil, true},
	} {
		roots, fault = row.roots, row.fault
		u, err := Direct(t.Context(), cfg)
		if row.good != (err == nil) || row.good != (u != nil) {
			t.Errorf("%s: %v, %v", row.name, u, err)
		}
		if !row.good && asked(c, "pod") != 0 {
			t.Fatalf("%s: a member that was not verified was shown the token", row.name)
		}
	}
	if read < 5 {
		t.Errorf("read %d times", read)
	}
}

// TestAgentByPublishedRoots: an agent without a pin attests by them, and its state outlives a restart as long as what is published
// shares a root with it.
func TestAgentByPublishedRoots(t *testing.T) {
	c := newCluster(t)
	c.member("a")
	cfg := c.config()
	cfg.Pin, cfg.TrustDomain = "", td
	cfg.Roots = func() ([][]byte, error) { return [][]byte{c.ca.root.Raw}, nil }
	a, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), wait)
	defer cancel()
	if err := a.attest(ctx, attemptTimeout); err != nil {
		t.Fatal(err)
	}
	first := a.anchor()
	next := newTestCA()
	a.cfg.Roots = func() ([][]byte, error) { return [][]byte{c.ca.root.Raw, next.root.Raw}, nil }
	if a.anchor() == first || !a.vouched(a.trust.Load()) {
		t.Error("a rotation that has begun undoes what the agent knows")
	}
	a.cfg.Roots = func() ([][]byte, error) { return [][]byte{next.root.Raw}, nil }
	if a.vouched(a.trust.Load()) {
		t.Error("another cluster's roots vouch for it")
	}
	a.cfg.Roots = func() ([][]byte, error) { return [][]byte{c.ca.root.Raw}, errors.New("gone") }
	if a.vouched(a.trust.Load()) {
		t.Error("what cannot be read vouches for it")
	}
	cfg.Roots = nil
	if _, err := New(cfg); !errors.Is(err, identity.ErrInvalid) {
		t.Errorf("nothing to verify members by: %v", err)
	}
}
