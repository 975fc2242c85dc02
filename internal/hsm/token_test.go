//go:build cgo

package hsm

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"countersign.io/countersign/internal/hsm/hsmtest"
)

func TestMain(m *testing.M) { os.Exit(hsmtest.Run(m)) }

func uri(t testing.TB, s string) URI {
	t.Helper()
	u, err := ParseURI(s)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

func openAES(t testing.TB, s string) *AES {
	t.Helper()
	k, err := OpenAES(uri(t, s))
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func TestAES(t *testing.T) {
	tok := hsmtest.New(t)
	k := openAES(t, tok.URI("kek"))
	if _, err := k.Decrypt(make([]byte, 64), nil); !errors.Is(err, ErrOpen) {
		t.Errorf("decrypted nothing: %v", err)
	}
	var sealed [][]byte
	for _, plain := range [][]byte{[]byte("x"), bytes.Repeat([]byte("y"), 40<<10)} {
		b, err := k.Encrypt(plain, []byte("place"))
		if err != nil {
			t.Fatal(err)
		}
		sealed = append(sealed, b)
		got, err := openAES(t, tok.URI("kek")).Decrypt(b, []byte("place"))
		if err != nil || !bytes.Equal(got, plain) {
			t.Errorf("decrypted %d bytes of %d: %v", len(got), len(plain), err)
		}
	}
	flipped := bytes.Clone(sealed[0])
	flipped[len(flipped)-1] ^= 1
	nonce := bytes.Clone(sealed[0])
	nonce[3] ^= 1
	for name, c := range map[string]struct {
		b  []byte
		ad string
	}{
		"another place": {sealed[0], "place2"}, "a flipped bit": {flipped, "place"}, "another nonce": {nonce, "place"},
		"truncated": {sealed[0][:20], "place"}, "empty": {nil, "place"}, "another format": {append([]byte{9}, sealed[0][1:]...), "place"},
	} {
		if got, err := k.Decrypt(c.b, []byte(c.ad)); !errors.Is(err, ErrOpen) || got != nil {
			t.Errorf("%s: %q, %v; want ErrOpen", name, got, err)
		}
	}
	// The key cannot be taken out.
	err := k.m.with(func(s *session) error {
		h, err := k.find(s)
		if err != nil {
			return err
		}
		for attr, want := range map[uint]byte{pkcs11.CKA_SENSITIVE: 1, pkcs11.CKA_EXTRACTABLE: 0, pkcs11.CKA_PRIVATE: 1, pkcs11.CKA_NEVER_EXTRACTABLE: 1, pkcs11.CKA_ALWAYS_SENSITIVE: 1} {
			a, err := s.ctx.GetAttributeValue(s.handle, h, []*pkcs11.Attribute{pkcs11.NewAttribute(attr, nil)})
			if err != nil || len(a[0].Value) != 1 || a[0].Value[0] != want {
				t.Errorf("attribute %#x is %v, %v", attr, a, err)
			}
		}
		if a, err := s.ctx.GetAttributeValue(s.handle, h, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_VALUE, nil)}); err == nil {
			t.Errorf("the token gave its key away: %d bytes", len(a[0].Value))
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

// What goes wrong with tokens is told apart, and never with the PIN in it.
func TestTokenFaults(t *testing.T) {
	tok := hsmtest.New(t)
	k := openAES(t, tok.URI("kek"))
	sealed, err := k.Encrypt([]byte("x"), nil)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	pin := func(name, text string, mode os.FileMode) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(p, mode); err != nil {
			t.Fatal(err)
		}
		return strings.Replace(tok.URI("kek"), tok.PINFile, p, 1)
	}
	if _, err := CreateSigner(uri(t, tok.URI("pair"))); err != nil {
		t.Fatal(err)
	}
	small := func(s *session) error {
		_, err := s.ctx.GenerateKey(s.handle, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_KEY_GEN, nil)}, []*pkcs11.Attribute{
			pkcs11.NewAttribute(pkcs11.CKA_VALUE_LEN, 16), pkcs11.NewAttribute(pkcs11.CKA_LABEL, "small"), pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true)})
		return err
	}
	if err := k.m.with(small); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		uri  string
		want error
		says string
	}{
		"no pin-source":    {strings.Replace(tok.URI("kek"), "&pin-source="+tok.PINFile, "", 1), ErrPIN, "pin-source"},
		"no PIN file":      {strings.Replace(tok.URI("kek"), tok.PINFile, filepath.Join(dir, "none"), 1), ErrPIN, "none"},
		"others read it":   {pin("open", tok.PIN, 0o644), ErrPIN, "chmod"},
		"empty PIN file":   {pin("empty", "\n", 0o600), ErrPIN, "empty"},
		"wrong PIN":        {pin("wrong", "1234-wrong", 0o600), ErrPIN, "refused"},
		"absent token":     {strings.Replace(tok.URI("kek"), tok.Label, "nobody", 1), ErrToken, "nobody"},
		"absent module":    {strings.Replace(tok.URI("kek"), tok.Module, "/nonexistent/module.so", 1), ErrToken, "/nonexistent/module.so"},
		"no module":        {strings.Replace(tok.URI("kek"), tok.Module, tok.PINFile, 1), ErrToken, "not a PKCS#11 module"},
		"a key pair":       {tok.URI("pair"), ErrKeyType, "a key pair"},
		"AES of 128 bits":  {tok.URI("small"), ErrKeyType, "AES-256"},
		"another slot":     {strings.Replace(tok.URI("kek"), "token="+tok.Label, "slot-id=4000000000", 1), ErrToken, "slot 4000000000"},
		"another's serial": {strings.Replace(tok.URI("kek"), "token="+tok.Label, "serial=0", 1), ErrToken, "serial"},
	} {
		_, err := OpenAES(uri(t, c.uri))
		if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v; want %v saying %q", name, err, c.want, c.says)
		}
		if err != nil && (strings.Contains(err.Error(), tok.PIN) || strings.Contains(err.Error(), "1234-wrong")) {
			t.Errorf("%s: the PIN is in the error: %v", name, err)
		}
	}
	// One that fails leaves the others working: the module has one state for all.
	if got, err := k.Decrypt(sealed, nil); err != nil || string(got) != "x" {
		t.Errorf("after others' faults: %q, %v", got, err)
	}
	// Another key, and the key gone.
	other := openAES(t, tok.URI("other"))
	if _, err := other.Encrypt([]byte("x"), nil); err != nil {
		t.Fatal(err)
	}
	if _, err := other.Decrypt(sealed, nil); !errors.Is(err, ErrOpen) {
		t.Errorf("another key opened it: %v", err)
	}
	if err := k.m.with(func(s *session) error {
		h, err := k.find(s)
		if err != nil {
			return err
		}
		return s.ctx.DestroyObject(s.handle, h)
	}); err != nil {
		t.Fatal(err)
	}
	if _, err := k.Decrypt(sealed, nil); !errors.Is(err, ErrNoKey) || !strings.Contains(err.Error(), "kek") {
		t.Errorf("the key is gone: %v", err)
	}
	if _, err := OpenSigner(uri(t, tok.URI("kek"))); !errors.Is(err, ErrNoKey) {
		t.Errorf("a signer without a key: %v", err)
	}
	if _, err := OpenSigner(uri(t, tok.URI("other"))); !errors.Is(err, ErrKeyType) {
		t.Errorf("a signer of a secret key: %v", err)
	}
}

func TestSigner(t *testing.T) {
	tok := hsmtest.New(t)
	made, err := CreateSigner(uri(t, tok.URI("ca")))
	if err != nil {
		t.Fatal(err)
	}
	k, err := OpenSigner(uri(t, tok.URI("ca")))
	if err != nil {
		t.Fatal(err)
	}
	if !made.Public().(*ecdsa.PublicKey).Equal(k.Public()) {
		t.Error("opened another key than was made")
	}
	digest := sha256.Sum256([]byte("text"))
	sig, err := k.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil || !ecdsa.VerifyASN1(k.Public().(*ecdsa.PublicKey), digest[:], sig) {
		t.Errorf("signed: %x, %v", sig, err)
	}
	if _, err := k.Sign(rand.Reader, []byte("no digest"), crypto.SHA256); err == nil {
		t.Error("signed what is no digest")
	}
	if _, err := CreateSigner(uri(t, tok.URI("ca"))); !errors.Is(err, ErrExists) {
		t.Errorf("made a second key of the name: %v", err)
	}
	if _, err := OpenSigner(uri(t, tok.URI("none"))); !errors.Is(err, ErrNoKey) {
		t.Errorf("opened what is not there: %v", err)
	}
	if s, ok := k.(*signer); ok {
		p384 := uri(t, tok.URI("p384"))
		m, err := load(p384)
		if err != nil {
			t.Fatal(err)
		}
		if err := m.with(func(s *session) error {
			oid := []byte{0x06, 0x05, 0x2b, 0x81, 0x04, 0x00, 0x22}
			_, _, err := s.ctx.GenerateKeyPair(s.handle, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_EC_KEY_PAIR_GEN, nil)},
				[]*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_LABEL, "p384"), pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true), pkcs11.NewAttribute(pkcs11.CKA_EC_PARAMS, oid)},
				[]*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_LABEL, "p384"), pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true), pkcs11.NewAttribute(pkcs11.CKA_SIGN, true)})
			return err
		}); err != nil {
			t.Fatal(err)
		}
		if _, err := OpenSigner(p384); !errors.Is(err, ErrKeyType) {
			t.Errorf("a key on P-384: %v", err)
		}
		_ = s
	}
}

func TestTokenConcurrently(t *testing.T) {
	tok := hsmtest.New(t)
	k := openAES(t, tok.URI("kek"))
	if _, err := k.Encrypt([]byte("x"), nil); err != nil {
		t.Fatal(err)
	}
	signer, err := CreateSigner(uri(t, tok.URI("ca")))
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 10 {
				b, err := k.Encrypt([]byte("x"), nil)
				if err != nil {
					t.Error(err)
					return
				}
				if _, err := k.Decrypt(b, nil); err != nil {
					t.Error(err)
				}
				digest := sha256.Sum256(b)
				if _, err := signer.Sign(nil, digest[:], crypto.SHA256); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
}

// Two that make the key at once: there is one in the end, or none, never two that would stop both.
func TestKeyMadeTwiceAtOnce(t *testing.T) {
	tok := hsmtest.New(t)
	k := openAES(t, tok.URI("kek"))
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() { _, _ = k.Encrypt([]byte("x"), nil) })
	}
	wg.Wait()
	if _, err := k.Encrypt([]byte("x"), nil); err != nil {
		t.Errorf("after several made it at once: %v", err)
	}
}

// A token that does not answer holds nobody up for ever.
func TestTokenThatHangs(t *testing.T) {
	tok := hsmtest.New(t)
	m, err := load(uri(t, tok.URI("kek")))
	if err != nil {
		t.Fatal(err)
	}
	m.patience = 50 * time.Millisecond
	release := make(chan struct{})
	defer close(release)
	_, err = use(m, func(*session) (int, error) { <-release; return 1, nil })
	if !errors.Is(err, ErrToken) || !strings.Contains(err.Error(), "has not answered") {
		t.Errorf("a token that hangs: %v", err)
	}
}
