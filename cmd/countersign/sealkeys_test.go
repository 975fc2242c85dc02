package main

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	adminv1 "countersign.io/countersign/api/admin/v1"
	"countersign.io/countersign/config"
	"countersign.io/countersign/identity"
	"countersign.io/countersign/seal"
)

// testKeys are data keys with a file, as a member has them.
func testKeys(t *testing.T) *sealKeys {
	t.Helper()
	dir := t.TempDir()
	kek, err := seal.OpenFileKEK(filepath.Join(dir, "kek"))
	if err != nil {
		t.Fatal(err)
	}
	ring, err := seal.NewKeyring()
	if err != nil {
		t.Fatal(err)
	}
	k := &sealKeys{ring: ring, path: filepath.Join(dir, "keyring"), td: spiffeid.RequireTrustDomainFromString("example.org"), kek: kek}
	if err := k.Rewrap(context.Background()); err != nil {
		t.Fatal(err)
	}
	return k
}

// onDisk is what a restart would find.
func (k *sealKeys) onDisk(t *testing.T) *seal.Keyring {
	t.Helper()
	ring, _, err := seal.LoadKeyring(context.Background(), k.path, k.kek, k.td)
	if err != nil {
		t.Fatal(err)
	}
	return ring
}

func TestSealKeys(t *testing.T) {
	ctx := context.Background()
	a := testKeys(t)
	n, id, err := a.Generate(ctx)
	if err != nil || n != 2 {
		t.Fatalf("made %d, %v", n, err)
	}
	if got, ok := a.onDisk(t).KeyID(2); !ok || !bytes.Equal(got, id) {
		t.Error("the key is not on disk")
	}
	b := testKeys(t)
	plain := a.ring.Plain()
	kept := bytes.Clone(plain)
	if taken, err := b.Take(ctx, plain, 2, []byte("another key's ID")); taken || err != nil {
		t.Errorf("took another key: %v, %v", taken, err)
	}
	if taken, err := b.Take(ctx, plain, 3, id); taken || err != nil {
		t.Errorf("took what is not there: %v, %v", taken, err)
	}
	if taken, err := b.Take(ctx, plain, 2, id); !taken || err != nil {
		t.Fatalf("taking: %v, %v", taken, err)
	}
	if !bytes.Equal(plain, kept) {
		t.Error("taking changed what it was given")
	}
	// Only what was asked for came: the two keyrings' first keys differ.
	first, _ := a.KeyID(1)
	if mine, _ := b.KeyID(1); bytes.Equal(first, mine) {
		t.Error("the first key came along")
	}
	if got, ok := b.onDisk(t).KeyID(2); !ok || !bytes.Equal(got, id) || !slices.Equal(b.ring.Terms(), []uint32{1, 2}) {
		t.Error("the taken key is not on disk")
	}
	// In place of one of its own that the cluster did not take; and never of the active one.
	c := testKeys(t)
	_, made, err := c.Generate(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Activate(2); err != nil {
		t.Fatal(err)
	}
	if taken, err := c.Take(ctx, plain, 2, id); taken || !errors.Is(err, seal.ErrTerm) {
		t.Errorf("replaced the active key: %v, %v", taken, err)
	}
	if err := c.Activate(1); err != nil {
		t.Fatal(err)
	}
	if taken, err := c.Take(ctx, plain, 2, id); !taken || err != nil {
		t.Errorf("taking in place of another: %v, %v", taken, err)
	}
	if got, _ := c.onDisk(t).KeyID(2); !bytes.Equal(got, id) {
		t.Error("the other key is still on disk")
	}
	// It made a key 2 too, which lost: what came in its place is not what it forgets.
	if err := c.Forget(ctx, 2, made); err != nil || len(c.ring.Terms()) != 2 || len(c.onDisk(t).Terms()) != 2 {
		t.Errorf("forgetting the one that is gone: %v, %v", c.ring.Terms(), err)
	}
	if err := c.Forget(ctx, 2, id); err != nil || len(c.ring.Terms()) != 1 || len(c.onDisk(t).Terms()) != 1 {
		t.Errorf("forgetting: %v, %v", c.ring.Terms(), err)
	}
	only, _ := c.KeyID(1)
	if err := c.Forget(ctx, 1, only); err == nil {
		t.Error("forgot the only key")
	}
	if _, err := c.Take(ctx, []byte("garbage"), 2, id); err == nil {
		t.Error("took garbage")
	}
}

// What cannot be saved is not in use.
func TestSealKeysThatCannotBeSaved(t *testing.T) {
	ctx := context.Background()
	a, b := testKeys(t), testKeys(t)
	_, id, err := b.Generate(ctx)
	if err != nil {
		t.Fatal(err)
	}
	a.path = filepath.Join(t.TempDir(), "none", "keyring")
	if _, _, err := a.Generate(ctx); err == nil {
		t.Error("made a key without a disk")
	}
	if taken, err := a.Take(ctx, b.ring.Plain(), 2, id); taken || err == nil {
		t.Errorf("took a key without a disk: %v, %v", taken, err)
	}
	if len(a.ring.Terms()) != 1 {
		t.Errorf("keys that are not on disk are in use: %v", a.ring.Terms())
	}
	if err := a.Rewrap(ctx); err == nil {
		t.Error("wrapped anew without a disk")
	}
}

func TestOpenKEKs(t *testing.T) {
	ctx := context.Background()
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	conf := func(key string, old ...string) *config.Server {
		c := &config.Server{Version: 1, TrustDomain: "example.org", Name: "m1", DataDir: dir}
		c.Seal.Key, c.Seal.OldKeys = key, old
		return c
	}
	file := func(name string) string { return "file:" + filepath.Join(dir, name) }
	open := func(c *config.Server) error {
		d, err := openDataDir(ctx, c, nil)
		if err != nil {
			return err
		}
		return d.Close()
	}
	if err := open(conf(file("k1"))); err != nil {
		t.Fatal(err)
	}
	// Another key alone does not fit, and is not made for nothing.
	if err := open(conf(file("k2"))); !errors.Is(err, identity.ErrPrecondition) || !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "k2") {
		t.Errorf("another key: %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "k2")); err == nil {
		t.Error("a key was made that opens nothing")
	}
	if _, err := seal.OpenFileKEK(filepath.Join(dir, "k3")); err != nil {
		t.Fatal(err)
	}
	if err := open(conf(file("k3"))); !errors.Is(err, seal.ErrOpen) || !strings.Contains(err.Error(), "old_keys") {
		t.Errorf("a key that does not fit: %v", err)
	}
	// With the old one named, the keyring moves at once; absent old keys are no matter.
	if err := open(conf(file("k2"), file("gone"), file("k1"))); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(dir, "k1")); err != nil {
		t.Fatal(err)
	}
	if err := open(conf(file("k2"), file("gone"), file("k1"))); err != nil {
		t.Errorf("after the move: %v", err)
	}
	if err := open(conf(file("k2"))); err != nil {
		t.Errorf("after the move: %v", err)
	}
	if err := open(conf(file("k3"), file("gone"))); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "gone") {
		t.Errorf("an absent old key that was needed: %v", err)
	}
	for uri, says := range map[string]string{"transit:transit/kek": "seal.vault", "awskms:alias/x": "-tags aws", "gcpkms:x": "-tags gcp", "azurekeyvault:v/k": "-tags azure", "nothing": "want a URI"} {
		if err := open(conf(uri)); !errors.Is(err, identity.ErrPrecondition) || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v; want it to say %q", uri, err, says)
		}
	}
}

func TestSealTables(t *testing.T) {
	if got := ranges([]uint32{1, 2, 3, 7, 9, 10}); got != "1-3, 7, 9-10" {
		t.Errorf("ranges: %q", got)
	}
	for want, p := range map[string]*adminv1.SealProgress{
		"distribute 1/3 (waiting for b, c)": {Phase: "distribute", Done: 1, Total: 3, WaitingFor: []string{"b", "c"}},
		"distribute 1/3: waiting for b, c":  {Phase: "distribute", Done: 1, Total: 3, WaitingFor: []string{"b", "c"}, Detail: "waiting for b, c"},
		"done 2/2: everything is sealed":    {Phase: "done", Done: 2, Total: 2, Detail: "everything is sealed"},
		"rewrap":                            {Phase: "rewrap"},
	} {
		if got := progressLine(p); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
	tables := sealTables(&adminv1.SealStatusResponse{Values: 2, Terms: []*adminv1.SealStatusResponse_Term{{Number: 2, State: "pending", Holders: []string{"a"}}},
		Members: []*adminv1.SealStatusResponse_Member{{Id: "a", Kek: "file:/k", Terms: []uint32{1}}, {Id: "b", Problem: "it does not answer"}}})
	if len(tables) != 3 || tables[0].Rows[0][1] != "pending (held by a)" || tables[1].Rows[1][2] != "it does not answer" {
		t.Errorf("tables: %v", tables)
	}
}

// What a record says of where a key is, another member said: it must not make this one load anything.
func TestOpenKeyAtTrustsOnlyItsOwnFile(t *testing.T) {
	loaded := "pkcs11:token=t;object=ca?module-path=/tmp/evil.so&pin-source=/tmp/evil-pin"
	for own, want := range map[string]string{
		"": "set ca.key",
		"pkcs11:token=t;object=other?module-path=/none/m.so": "is not the key at",
		"awskms:key-id=k;region=r":                           "is not the key at",
		// The same key: opened by our module, which is not there.
		"pkcs11:token=t;object=ca?module-path=/none/m.so&pin-source=/none/pin": "opening ca.key",
	} {
		m := &member{c: &config.Server{CA: config.CA{Key: own}}}
		_, err := m.openKeyAt(identity.Authority{Kind: identity.AuthorityX509, ID: "a1", KeyURI: loaded})
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "evil") {
			t.Errorf("ca.key %q: %v; want %q", own, err, want)
		}
	}
}
