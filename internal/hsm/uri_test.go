package hsm

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

func TestParseURI(t *testing.T) {
	slot := uint(5)
	for s, want := range map[string]URI{
		"pkcs11:token=T;object=K?module-path=/m.so&pin-source=/pin":             {Module: "/m.so", Token: "T", Object: "K", PINSource: "/pin"},
		"pkcs11:token=My%20token;object=a%3Bb?module-path=/m.so":                {Module: "/m.so", Token: "My token", Object: "a;b"},
		"pkcs11:module-path=/m.so;serial=12;id=%00%ff?pin-source=file:/pin":     {Module: "/m.so", Serial: "12", ID: []byte{0, 0xff}, PINSource: "/pin"},
		"pkcs11:slot-id=5;object=K;type=secret-key?module-path=/m.so":           {Module: "/m.so", Slot: &slot, Object: "K"},
		"pkcs11:object=K;token=T?pin-source=/pin&module-path=/usr/lib/a-b.so.1": {Module: "/usr/lib/a-b.so.1", Token: "T", Object: "K", PINSource: "/pin"},
	} {
		got, err := ParseURI(s)
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %+v, %v", s, got, err)
		}
		if again, err := ParseURI(got.String()); err != nil || !reflect.DeepEqual(again, got) {
			t.Errorf("%s: written as %s, read as %+v, %v", s, got, again, err)
		}
	}
	for name, s := range map[string]string{
		"another scheme":  "file:/x",
		"no module":       "pkcs11:token=T;object=K",
		"relative module": "pkcs11:token=T;object=K?module-path=m.so",
		"no token":        "pkcs11:object=K?module-path=/m.so",
		"two tokens":      "pkcs11:token=T;serial=1;object=K?module-path=/m.so",
		"no key":          "pkcs11:token=T?module-path=/m.so",
		"twice":           "pkcs11:token=T;token=U;object=K?module-path=/m.so",
		"no value":        "pkcs11:token;object=K?module-path=/m.so",
		"bad escape":      "pkcs11:token=%zz;object=K?module-path=/m.so",
		"a NUL":           "pkcs11:token=%00;object=K?module-path=/m.so",
		"unknown":         "pkcs11:token=T;object=K?module-path=/m.so&x=y",
		"bad slot":        "pkcs11:slot-id=-1;object=K?module-path=/m.so",
		"certificate":     "pkcs11:token=T;object=K;type=cert?module-path=/m.so",
		"relative PIN":    "pkcs11:token=T;object=K?module-path=/m.so&pin-source=pin",
		"a PIN":           "pkcs11:token=T;object=K?module-path=/m.so&pin-value=geheim",
		"very long":       "pkcs11:token=" + strings.Repeat("T", maxURI) + ";object=K?module-path=/m.so",
	} {
		if u, err := ParseURI(s); !errors.Is(err, ErrURI) || strings.Contains(err.Error(), "geheim") {
			t.Errorf("%s: %+v, %v; want ErrURI", name, u, err)
		}
	}
}

func TestFuzzSeedsExist(t *testing.T) {
	if files, err := os.ReadDir(filepath.Join("testdata", "fuzz", "FuzzParseURI")); err != nil || len(files) < 3 {
		t.Errorf("FuzzParseURI has %d seeds, %v", len(files), err)
	}
}

func FuzzParseURI(f *testing.F) {
	f.Fuzz(func(t *testing.T, s string) {
		u, err := ParseURI(s)
		if err != nil {
			return
		}
		again, err := ParseURI(u.String())
		if len(u.String()) <= maxURI && (err != nil || !reflect.DeepEqual(again, u)) {
			t.Errorf("%q: written as %q, read as %+v, %v", s, u.String(), again, err)
		}
	})
}
