package cli

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"countersign.io/countersign/identity"
)

func authority(t testing.TB, isCA bool) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "it"}, NotAfter: time.Now().Add(time.Hour), IsCA: isCA, BasicConstraintsValid: true,
	}, &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "it"}}, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func pemOf(kind string, ders ...[]byte) string {
	var out strings.Builder
	for _, der := range ders {
		out.Write(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
	}
	return out.String()
}

// spiffeOf writes the X.509 part of a bundle, and a JWT key beside it.
func spiffeOf(t testing.TB, ders ...[]byte) string {
	t.Helper()
	var keys []string
	for _, der := range ders {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		raw, err := jose.JSONWebKey{Key: c.PublicKey}.MarshalJSON()
		if err != nil {
			t.Fatal(err)
		}
		keys = append(keys, fmt.Sprintf(`%s, "use": "x509-svid", "x5c": [%q]}`, raw[:len(raw)-1], base64.StdEncoding.EncodeToString(der)))
	}
	return `{"spiffe_sequence": 1, "keys": [{"use": "jwt-svid", "kid": "x", "kty": "EC"}, ` + strings.Join(keys, ", ") + `]}`
}

func TestParseRoots(t *testing.T) {
	a, b, leaf := authority(t, true), authority(t, true), authority(t, false)
	for name, text := range map[string]string{"PEM": pemOf("CERTIFICATE", a, b), "SPIFFE": spiffeOf(t, a, b)} {
		roots, err := ParseRoots([]byte("\n" + text + "\n"))
		if err != nil || len(roots) != 2 || !bytes.Equal(roots[0], a) || !bytes.Equal(roots[1], b) {
			t.Errorf("%s: %d roots, %v", name, len(roots), err)
		}
	}
	var many [][]byte
	for range maxBundleRoots + 1 {
		many = append(many, a)
	}
	for says, text := range map[string]string{
		"0 X.509 authorities":  "",
		"neither PEM":          pemOf("CERTIFICATE", a) + "junk",
		`type "PRIVATE KEY"`:   pemOf("CERTIFICATE", a) + pemOf("PRIVATE KEY", b),
		"no authority":         pemOf("CERTIFICATE", a, leaf),
		"is no authority":      spiffeOf(t, leaf),
		"X.509 authority 2":    pemOf("CERTIFICATE", a, []byte("x")),
		"want 1 to":            pemOf("CERTIFICATE", many...),
		"not a SPIFFE bundle":  `{"keys": 1}`,
		"want 1 to 64":         `{"keys": []}`,
		"exactly one certific": `{"keys": [{"use": "x509-svid", "kty": "EC"}]}`,
		"at the most 1048576":  strings.Repeat("x", MaxBundleBytes+1),
	} {
		if roots, err := ParseRoots([]byte(text)); !errors.Is(err, identity.ErrInvalid) || !strings.Contains(err.Error(), says) || roots != nil {
			t.Errorf("%s: %d roots, %v", says, len(roots), err)
		}
	}
}

func FuzzParseRoots(f *testing.F) {
	if seeds, _ := filepath.Glob(filepath.Join("testdata", "fuzz", "FuzzParseRoots", "*")); len(seeds) == 0 {
		f.Fatal("no seeds")
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		roots, err := ParseRoots(raw)
		if err != nil {
			if !errors.Is(err, identity.ErrInvalid) || roots != nil {
				t.Fatalf("%d roots, %v", len(roots), err)
			}
			return
		}
		again, err := ParseRoots([]byte(pemOf("CERTIFICATE", roots...)))
		if err != nil || len(again) != len(roots) {
			t.Fatalf("what was read cannot be read again: %v", err)
		}
	})
}
