package seal

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"countersign.io/countersign/internal/hsm"
	"countersign.io/countersign/internal/hsm/hsmtest"
	"countersign.io/countersign/internal/vault"
)

func TestMain(m *testing.M) { os.Exit(hsmtest.Run(m)) }

func TestOpenKEKRefuses(t *testing.T) {
	dir := t.TempDir()
	for uri, says := range map[string]string{
		"":                              "want a URI",
		"/path":                         "want a URI",
		"ftp:x":                         "unknown",
		"file:relative":                 "absolute",
		"file://host/x":                 "absolute",
		"file:/x?y=z":                   "absolute",
		"file:" + dir + "/none/kek":     "none",
		"transit:noslash":               "transit:MOUNT/KEY",
		"transit:a/../b":                "transit:MOUNT/KEY",
		"transit:a/b?c":                 "transit:MOUNT/KEY",
		"transit:mount/key":             "seal.vault",
		"pkcs11:":                       "module-path",
		"pkcs11:token=a;pin-value=1234": "pin-source",
	} {
		k, err := OpenKEK(context.Background(), uri, Options{})
		if !errors.Is(err, ErrKEK) || !strings.Contains(err.Error(), says) || strings.Contains(err.Error(), "1234") {
			t.Errorf("%q: %v, %v; want ErrKEK saying %q", uri, k, err, says)
		}
	}
	if _, err := OpenKEK(context.Background(), "file:"+filepath.Join(dir, "old"), Options{MustExist: true}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("an old key that is gone: %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "old")); err == nil {
		t.Error("made an old key")
	}
	if k, err := OpenKEK(context.Background(), "file:"+filepath.Join(dir, "new"), Options{}); err != nil || k.URI() != "file://"+filepath.Join(dir, "new") {
		t.Errorf("a new key: %v, %v", k, err)
	}
}

// testKEK is what every kind of key must do.
func testKEK(t *testing.T, k, again, other KEK) {
	t.Helper()
	ctx := context.Background()
	b, err := k.Wrap(ctx, []byte("the keys"), []byte("place"))
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(b), "the keys") {
		t.Error("the plaintext is in the ciphertext")
	}
	if got, err := again.Unwrap(ctx, b, []byte("place")); err != nil || string(got) != "the keys" {
		t.Errorf("unwrapped %q, %v", got, err)
	}
	if _, err := other.Wrap(ctx, []byte("x"), nil); err != nil {
		t.Fatal(err)
	}
	for name, err := range map[string]error{
		"another key":   second(other.Unwrap(ctx, b, []byte("place"))),
		"another place": second(k.Unwrap(ctx, b, []byte("else"))),
		"empty":         second(k.Unwrap(ctx, nil, []byte("place"))),
		"truncated":     second(k.Unwrap(ctx, b[:len(b)-1], []byte("place"))),
	} {
		if !errors.Is(err, ErrOpen) {
			t.Errorf("%s: %v, want ErrOpen", name, err)
		}
	}
}

func TestTokenKEK(t *testing.T) {
	tok := hsmtest.New(t)
	open := func(object string) KEK {
		k, err := OpenKEK(context.Background(), tok.URI(object), Options{})
		if err != nil {
			t.Skipf("no PKCS#11 here: %v", err)
		}
		return k
	}
	testKEK(t, open("kek"), open("kek"), open("other"))
	if s := open("kek").URI(); strings.Contains(s, tok.PIN) || !strings.HasPrefix(s, "pkcs11:") {
		t.Errorf("URI %q", s)
	}
	// A keyring under a key of the token, and then the key's absence: clear, and not made anew.
	ctx := context.Background()
	td := spiffeid.RequireTrustDomainFromString("example.org")
	path := filepath.Join(t.TempDir(), "keyring")
	if err := SaveKeyring(ctx, path, open("kek"), td, keyring(t)); err != nil {
		t.Fatal(err)
	}
	if _, by, err := LoadKeyring(ctx, path, open("kek"), td); err != nil || by.URI() != open("kek").URI() {
		t.Errorf("loaded by %v, %v", by, err)
	}
	if _, _, err := LoadKeyring(ctx, path, open("gone"), td); !errors.Is(err, hsm.ErrNoKey) || !strings.Contains(err.Error(), "gone") {
		t.Errorf("the key is gone: %v", err)
	}
	// A new key, and the old one among the old keys.
	k, by, err := LoadKeyring(ctx, path, open("gone"), td, open("other"), open("kek"))
	if err != nil || by.URI() != open("kek").URI() {
		t.Fatalf("by an old key: %v, %v", by, err)
	}
	if err := SaveKeyring(ctx, path, open("gone"), td, k); err != nil {
		t.Fatal(err)
	}
	if _, by, err := LoadKeyring(ctx, path, open("gone"), td); err != nil || by.URI() != open("gone").URI() {
		t.Errorf("wrapped anew: %v, %v", by, err)
	}
}

// fakeVault is a transit engine whose ciphertext is the text itself, with key and place.
type fakeVault struct{ down bool }

func (f *fakeVault) Do(_ context.Context, method, path string, in, out any) error {
	m := in.(map[string]string)
	parts := strings.Split(path, "/")
	if f.down {
		return fmt.Errorf("%w: sealed", vault.ErrUnavailable)
	}
	if method != http.MethodPost || len(parts) != 3 || parts[0] != "transit" {
		return vault.ErrNotFound
	}
	tag := "vault:v1:" + parts[2] + "," + m["associated_data"] + ","
	switch parts[1] {
	case "encrypt":
		sum := fmt.Sprintf("%d", len(m["plaintext"]))
		out.(*struct {
			Ciphertext string `json:"ciphertext"`
		}).Ciphertext = tag + sum + "," + base64.RawStdEncoding.EncodeToString([]byte(m["plaintext"]))
	case "decrypt":
		rest, ok := strings.CutPrefix(m["ciphertext"], tag)
		n, body, _ := strings.Cut(rest, ",")
		plain, err := base64.RawStdEncoding.DecodeString(body)
		if !ok || err != nil || fmt.Sprint(len(plain)) != n {
			return fmt.Errorf("%w: status 400", vault.ErrInvalid)
		}
		out.(*struct {
			Plaintext string `json:"plaintext"`
		}).Plaintext = string(plain)
	}
	return nil
}

func TestTransitKEK(t *testing.T) {
	v := &fakeVault{}
	open := func(uri string) KEK {
		k, err := OpenKEK(context.Background(), uri, Options{Vault: v})
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	k := open("transit:transit/kek")
	testKEK(t, k, open("transit:transit/kek"), open("transit:transit/other"))
	b, err := k.Wrap(context.Background(), []byte("x"), nil)
	if err != nil {
		t.Fatal(err)
	}
	// A Vault that is down is not a key that does not fit.
	v.down = true
	if _, err := k.Unwrap(context.Background(), b, nil); errors.Is(err, ErrOpen) || !errors.Is(err, vault.ErrUnavailable) {
		t.Errorf("down: %v", err)
	}
	if _, err := k.Wrap(context.Background(), nil, nil); !errors.Is(err, vault.ErrUnavailable) {
		t.Errorf("down: %v", err)
	}
	v.down = false
	if _, err := open("transit:elsewhere/kek").Wrap(context.Background(), []byte("x"), nil); !errors.Is(err, vault.ErrNotFound) {
		t.Errorf("another mount: %v", err)
	}
}
