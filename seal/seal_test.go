package seal

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func keyring(t testing.TB) *Keyring {
	t.Helper()
	k, err := NewKeyring()
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func TestSealOpen(t *testing.T) {
	k := keyring(t)
	for _, plain := range [][]byte{nil, []byte("x"), bytes.Repeat([]byte("y"), 1<<20)} {
		a, err := k.Seal(plain, []byte("place"))
		if err != nil {
			t.Fatal(err)
		}
		b, err := k.Seal(plain, []byte("place"))
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Equal(a, b) {
			t.Error("sealing twice gave the same bytes: the nonce is not random")
		}
		if len(plain) > 8 && bytes.Contains(a, plain[:8]) {
			t.Error("the plaintext is in the ciphertext")
		}
		got, err := k.Open(a, []byte("place"))
		if err != nil || !bytes.Equal(got, plain) {
			t.Errorf("opening %d bytes: %d bytes, %v", len(plain), len(got), err)
		}
	}
}

func TestOpenRefuses(t *testing.T) {
	k := keyring(t)
	good, err := k.Seal([]byte("secret"), []byte("place"))
	if err != nil {
		t.Fatal(err)
	}
	two := &Keyring{active: 1, terms: []*term{k.terms[0], {number: 2, key: k.terms[0].key, aead: k.terms[0].aead}}}
	mutate := func(f func(b []byte) []byte) []byte { return f(bytes.Clone(good)) }
	for _, c := range []struct {
		name string
		k    *Keyring
		b    []byte
		ad   string
	}{
		{"another keyring", keyring(t), good, "place"},
		{"another place", k, good, "place2"},
		{"no place", k, good, ""},
		{"empty", k, nil, "place"},
		{"truncated", k, good[:len(good)-1], "place"},
		{"truncated to the header", k, good[:sealedHeader], "place"},
		{"extended", k, mutate(func(b []byte) []byte { return append(b, 0) }), "place"},
		{"another format", k, mutate(func(b []byte) []byte { b[0]++; return b }), "place"},
		{"a key the keyring lacks", k, mutate(func(b []byte) []byte { b[4]++; return b }), "place"},
		{"relabelled to a key of the same bytes", two, mutate(func(b []byte) []byte { b[4]++; return b }), "place"},
		{"nonce altered", k, mutate(func(b []byte) []byte { b[sealedHeader]++; return b }), "place"},
		{"tag altered", k, mutate(func(b []byte) []byte { b[len(b)-1]++; return b }), "place"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got, err := c.k.Open(c.b, []byte(c.ad)); !errors.Is(err, ErrOpen) || got != nil {
				t.Errorf("got %q, %v; want ErrOpen", got, err)
			}
		})
	}
}

func TestParseKeyringRefuses(t *testing.T) {
	plain := keyring(t).Plain()
	zero := bytes.Clone(plain)
	copy(zero[len(keyringMagic):], []byte{0, 0, 0, 0})
	for name, b := range map[string][]byte{
		"empty":       nil,
		"no key":      []byte(keyringMagic),
		"truncated":   plain[:len(plain)-1],
		"extended":    append(bytes.Clone(plain), 1),
		"format":      append([]byte("CSKR\x02"), plain[len(keyringMagic):]...),
		"term zero":   zero,
		"term twice":  append(bytes.Clone(plain), plain[len(keyringMagic):]...),
		"1 MiB":       append([]byte(keyringMagic), make([]byte, 1<<20)...),
		"1001 keys":   append([]byte(keyringMagic), make([]byte, 1001*termBytes)...),
		"other magic": []byte("hello, world, this is no keyring at all.."),
	} {
		if k, err := ParseKeyring(b); err == nil {
			t.Errorf("%s: accepted as %v", name, k)
		}
	}
}

func TestKeyringIsNotPrinted(t *testing.T) {
	k := keyring(t)
	raw := string(k.terms[0].key[:])
	for _, f := range []string{"%v", "%+v", "%#v", "%s", "%x"} {
		if s := fmt.Sprintf(f, k); strings.Contains(s, raw) || strings.Contains(s, fmt.Sprintf("%x", raw)) {
			t.Errorf("%s prints the key: %s", f, s)
		}
	}
	if s := k.LogValue().String(); s != "keyring of 1 keys" {
		t.Errorf("logged as %q", s)
	}
}

func TestFileKEK(t *testing.T) {
	ctx := context.Background()
	path := filepath.Join(t.TempDir(), "kek")
	a, err := OpenFileKEK(path)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 || info.Size() != keyBytes {
		t.Fatalf("the key file is %v, %v", info, err)
	}
	if want := "file://" + path; a.URI() != want {
		t.Errorf("URI %q, want %q", a.URI(), want)
	}
	wrapped, err := a.Wrap(ctx, []byte("keys"), []byte("place"))
	if err != nil {
		t.Fatal(err)
	}
	b, err := OpenFileKEK(path)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := b.Unwrap(ctx, wrapped, []byte("place")); err != nil || string(got) != "keys" {
		t.Errorf("unwrapping after a restart: %q, %v", got, err)
	}
	other, err := OpenFileKEK(filepath.Join(t.TempDir(), "kek"))
	if err != nil {
		t.Fatal(err)
	}
	for name, err := range map[string]error{
		"another key":    second(other.Unwrap(ctx, wrapped, []byte("place"))),
		"another place":  second(b.Unwrap(ctx, wrapped, []byte("else"))),
		"empty":          second(b.Unwrap(ctx, nil, []byte("place"))),
		"only a header":  second(b.Unwrap(ctx, wrapped[:1], []byte("place"))),
		"another format": second(b.Unwrap(ctx, append([]byte{9}, wrapped[1:]...), []byte("place"))),
		"truncated":      second(b.Unwrap(ctx, wrapped[:len(wrapped)-1], []byte("place"))),
	} {
		if !errors.Is(err, ErrOpen) {
			t.Errorf("%s: %v, want ErrOpen", name, err)
		}
	}
}

func second(_ []byte, err error) error { return err }

func TestFileKEKRefuses(t *testing.T) {
	for name, prepare := range map[string]func(path string) error{
		"group may read": func(p string) error {
			if err := os.WriteFile(p, make([]byte, keyBytes), 0o600); err != nil {
				return err
			}
			return os.Chmod(p, 0o640)
		},
		"others may read": func(p string) error {
			if err := os.WriteFile(p, make([]byte, keyBytes), 0o600); err != nil {
				return err
			}
			return os.Chmod(p, 0o604)
		},
		"empty":       func(p string) error { return os.WriteFile(p, nil, 0o600) },
		"too short":   func(p string) error { return os.WriteFile(p, make([]byte, keyBytes-1), 0o600) },
		"too long":    func(p string) error { return os.WriteFile(p, make([]byte, keyBytes+1), 0o600) },
		"1 MiB":       func(p string) error { return os.WriteFile(p, make([]byte, 1<<20), 0o600) },
		"a directory": func(p string) error { return os.Mkdir(p, 0o700) },
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "kek")
			if err := prepare(path); err != nil {
				t.Fatal(err)
			}
			if _, err := OpenFileKEK(path); err == nil || !strings.Contains(err.Error(), path) {
				t.Errorf("got %v; want an error that names the file", err)
			}
		})
	}
	t.Run("no folder", func(t *testing.T) {
		if _, err := OpenFileKEK(filepath.Join(t.TempDir(), "none", "kek")); err == nil {
			t.Error("made a key where there is no folder")
		}
	})
}

func TestKeyringFile(t *testing.T) {
	ctx := context.Background()
	dir := t.TempDir()
	td := spiffeid.RequireTrustDomainFromString("example.org")
	kek, err := OpenFileKEK(filepath.Join(dir, "kek"))
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "keyring")
	if _, _, err := LoadKeyring(ctx, path, kek, td); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("no file: %v, want fs.ErrNotExist", err)
	}
	k := keyring(t)
	if err := SaveKeyring(ctx, path, kek, td, k); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("the file is %v, %v", info, err)
	}
	got, _, err := LoadKeyring(ctx, path, kek, td)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got.Plain(), k.Plain()) {
		t.Error("the keyring changed on disk")
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(data, k.terms[0].key[:]) {
		t.Error("the key is on disk in the clear")
	}

	t.Run("refuses", func(t *testing.T) {
		other, err := OpenFileKEK(filepath.Join(dir, "other"))
		if err != nil {
			t.Fatal(err)
		}
		_, _, err = LoadKeyring(ctx, path, other, td)
		if !errors.Is(err, ErrOpen) || !strings.Contains(err.Error(), kek.URI()) || !strings.Contains(err.Error(), other.URI()) {
			t.Errorf("another kek: %v; want ErrOpen naming both keys", err)
		}
		_, _, err = LoadKeyring(ctx, path, kek, spiffeid.RequireTrustDomainFromString("other.org"))
		if err == nil || !strings.Contains(err.Error(), "other.org") {
			t.Errorf("another trust domain: %v", err)
		}
		for name, edit := range map[string]func(string) string{
			"truncated":          func(s string) string { return s[:len(s)/2] },
			"empty":              func(string) string { return "" },
			"trailing data":      func(s string) string { return s + "{}" },
			"unknown field":      func(s string) string { return strings.Replace(s, "{", `{"x":1,`, 1) },
			"unknown format":     func(s string) string { return strings.Replace(s, `"format":1`, `"format":2`, 1) },
			"altered ciphertext": func(s string) string { return strings.Replace(s, `"wrapped":"`, `"wrapped":"AAAA`, 1) },
			"too large":          func(s string) string { return s + strings.Repeat(" ", maxKeyringFile) },
			"no wrapped keys":    func(string) string { return `{"format":1,"trust_domain":"example.org"}` },
		} {
			bad := filepath.Join(t.TempDir(), "keyring")
			if err := os.WriteFile(bad, []byte(edit(string(data))), 0o600); err != nil {
				t.Fatal(err)
			}
			if _, _, err := LoadKeyring(ctx, bad, kek, td); err == nil || !strings.Contains(err.Error(), bad) {
				t.Errorf("%s: %v; want an error that names the file", name, err)
			}
		}
		moved := filepath.Join(t.TempDir(), "keyring")
		if err := os.WriteFile(moved, []byte(strings.Replace(string(data), "example.org", "other.org", 1)), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, _, err := LoadKeyring(ctx, moved, kek, spiffeid.RequireTrustDomainFromString("other.org")); !errors.Is(err, ErrOpen) {
			t.Errorf("trust domain edited in the file: %v, want ErrOpen", err)
		}
		if err := os.Chmod(path, 0o644); err != nil {
			t.Fatal(err)
		}
		if _, _, err := LoadKeyring(ctx, path, kek, td); err == nil {
			t.Error("a file that others may read was accepted")
		}
	})
}

// failing is a KEK whose store does not answer.
type failing struct{ KEK }

func (failing) URI() string { return "test:down" }
func (failing) Wrap(context.Context, []byte, []byte) ([]byte, error) {
	return nil, errors.New("no answer")
}

func TestSaveKeyringLeavesTheOldFile(t *testing.T) {
	ctx := context.Background()
	dir := t.TempDir()
	td := spiffeid.RequireTrustDomainFromString("example.org")
	kek, err := OpenFileKEK(filepath.Join(dir, "kek"))
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "keyring")
	old := keyring(t)
	if err := SaveKeyring(ctx, path, kek, td, old); err != nil {
		t.Fatal(err)
	}
	if err := SaveKeyring(ctx, path, failing{}, td, keyring(t)); err == nil {
		t.Fatal("saved without a KEK")
	}
	got, _, err := LoadKeyring(ctx, path, kek, td)
	if err != nil || !bytes.Equal(got.Plain(), old.Plain()) {
		t.Errorf("the old keyring is gone: %v", err)
	}
}

func TestConcurrentUse(t *testing.T) {
	k := keyring(t)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 100 {
				b, err := k.Seal([]byte("x"), nil)
				if err != nil {
					t.Error(err)
					return
				}
				if _, err := k.Open(b, nil); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
}
