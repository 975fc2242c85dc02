package kmskey

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/sha256"
	"errors"
	"os"
	"strings"
	"testing"

	"countersign.io/countersign/identity"
	"countersign.io/countersign/internal/hsm/hsmtest"
)

func TestMain(m *testing.M) { os.Exit(hsmtest.Run(m)) }

func TestTokenKey(t *testing.T) {
	ctx := context.Background()
	tok := hsmtest.New(t)
	if _, err := Open(ctx, tok.URI("ca")); !errors.Is(err, identity.ErrNotFound) {
		t.Skipf("no PKCS#11 here: %v", err)
	}
	made, err := OpenOrCreate(ctx, tok.URI("ca"))
	if err != nil {
		t.Fatal(err)
	}
	for _, open := range []func(context.Context, string) (crypto.Signer, error){Open, OpenOrCreate} {
		s, err := open(ctx, tok.URI("ca"))
		if err != nil {
			t.Fatal(err)
		}
		if !s.Public().(*ecdsa.PublicKey).Equal(made.Public()) {
			t.Error("another key")
		}
		digest := sha256.Sum256([]byte("x"))
		if sig, err := s.Sign(nil, digest[:], crypto.SHA256); err != nil || !ecdsa.VerifyASN1(made.Public().(*ecdsa.PublicKey), digest[:], sig) {
			t.Errorf("signed %x, %v", sig, err)
		}
	}
	if _, err := Create(ctx, tok.URI("ca")); !errors.Is(err, identity.ErrExists) {
		t.Errorf("made it twice: %v", err)
	}
}

func TestOpenRefuses(t *testing.T) {
	ctx := context.Background()
	tok := hsmtest.New(t)
	if _, err := Open(ctx, tok.URI("none")); err != nil && strings.Contains(err.Error(), "no PKCS#11") {
		t.Skip(err)
	}
	if err := os.WriteFile(tok.PINFile+".wrong", []byte("0000-geheim"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		uri  string
		want error
	}{
		"empty":      {"", identity.ErrInvalid},
		"a file":     {"file:/x", identity.ErrInvalid},
		"no key":     {tok.URI("none"), identity.ErrNotFound},
		"no token":   {strings.Replace(tok.URI("none"), tok.Label, "nobody", 1), identity.ErrUnavailable},
		"wrong PIN":  {tok.URI("none") + ".wrong", identity.ErrUnavailable},
		"no PIN":     {strings.Replace(tok.URI("none"), "&pin-source="+tok.PINFile, "", 1), identity.ErrUnavailable},
		"PIN in URI": {"pkcs11:token=a;object=b?module-path=/m&pin-value=0000-geheim", identity.ErrInvalid},
		"malformed":  {"pkcs11:pin-value=0000-geheim", identity.ErrInvalid},
	} {
		if _, err := Open(ctx, c.uri); !errors.Is(err, c.want) || strings.Contains(err.Error(), "geheim") {
			t.Errorf("%s: %v; want %v", name, err, c.want)
		}
		if _, err := Create(ctx, c.uri); err == nil && name != "no key" || err != nil && strings.Contains(err.Error(), "geheim") {
			t.Errorf("%s: made: %v", name, err)
		}
	}
	for _, uri := range []string{"awskms:key-id=k;region=r", "cloudkms:projects/p", "azurekms:name=k;vault=v"} {
		if _, err := Create(ctx, uri); !errors.Is(err, identity.ErrInvalid) || !strings.Contains(err.Error(), "own tools") {
			t.Errorf("%s: %v", uri, err)
		}
	}
}

func TestCheckSame(t *testing.T) {
	const own = "pkcs11:token=t;object=ca?module-path=/m.so&pin-source=/pin"
	for _, theirs := range []string{
		own, "pkcs11:object=ca;token=t?module-path=/tmp/evil.so&pin-source=/etc/shadow", "pkcs11:token=%74;object=ca?module-path=/m.so",
	} {
		if err := CheckSame(own, theirs); err != nil {
			t.Errorf("%s: %v", theirs, err)
		}
	}
	for _, c := range [][2]string{
		{own, "pkcs11:token=t;object=other?module-path=/m.so"},
		{own, "pkcs11:token=u;object=ca?module-path=/m.so"},
		{own, "pkcs11:token=t;object=ca;id=%01?module-path=/m.so"},
		{own, "pkcs11:serial=t;object=ca?module-path=/m.so"},
		{own, "pkcs11:token=t;object=ca?module-path=m.so"}, // malformed
		{own, "awskms:key-id=k;region=r"},
		{"awskms:key-id=k;region=r", own},
		{"awskms:key-id=k;region=r", "awskms:key-id=k;region=r;profile=x"},
		{"cloudkms:projects/p", "cloudkms:projects/q"},
		{"", own},
	} {
		if err := CheckSame(c[0], c[1]); !errors.Is(err, identity.ErrPrecondition) || strings.Contains(err.Error(), "module-path") {
			t.Errorf("%s, %s: %v", c[0], c[1], err)
		}
	}
}
