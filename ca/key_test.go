package ca

//lint:file-ignore SA1019 keys that no library would make are made here on purpose

import (
	"bytes"
	"crypto"
	"crypto/dsa" //nolint:staticcheck // a type of key that must be refused
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"math/big"
	"os"
	"path/filepath"
	"testing"

	"countersign.io/countersign/identity"
)

func der(t testing.TB, pub crypto.PublicKey) []byte {
	t.Helper()
	b, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestParsePublicKey(t *testing.T) {
	keys := publicKeys(t)
	keys["RSA-4096"] = newRSA(t, 4096).Public()
	for name, pub := range keys {
		got, err := ParsePublicKey(der(t, pub))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if !got.(interface{ Equal(crypto.PublicKey) bool }).Equal(pub) {
			t.Errorf("%s: parsed as another key", name)
		}
	}
}

func TestParsePublicKeyRefuses(t *testing.T) {
	p256 := der(t, newP256(t).Public())
	off := bytes.Clone(p256)
	off[len(off)-1] ^= 1 // y of the point
	infinity := append(bytes.Clone(p256[:len(p256)-64]), make([]byte, 64)...)
	x25519, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string][]byte{
		"empty":                nil,
		"malformed":            []byte("not DER at all"),
		"truncated":            p256[:len(p256)-1],
		"trailing data":        append(bytes.Clone(p256), 0),
		"P-224":                der(t, newEC(t, elliptic.P224()).Public()),
		"P-521":                der(t, newEC(t, elliptic.P521()).Public()),
		"off the curve":        off,
		"point of zeros":       infinity,
		"X25519":               der(t, x25519.Public()),
		"RSA-1024":             der(t, &newWeakRSA(t).PublicKey),
		"1 MiB":                make([]byte, 1<<20),
		"1 MiB after a prefix": append(bytes.Clone(p256), make([]byte, 1<<20)...),
		"a private key":        func() []byte { b, _ := x509.MarshalPKCS8PrivateKey(newP256(t)); return b }(),
	} {
		t.Run(name, func(t *testing.T) {
			_, err := ParsePublicKey(b)
			wantErr(t, err, identity.ErrInvalid)
		})
	}
}

// newWeakRSA is made by hand, because the library refuses to.
func newWeakRSA(t *testing.T) *rsa.PrivateKey {
	t.Helper()
	p, err := rand.Prime(rand.Reader, 512)
	if err != nil {
		t.Fatal(err)
	}
	q, err := rand.Prime(rand.Reader, 512)
	if err != nil {
		t.Fatal(err)
	}
	return &rsa.PrivateKey{PublicKey: rsa.PublicKey{N: new(big.Int).Mul(p, q), E: 65537}}
}

func TestCheckPublicKeyRefuses(t *testing.T) {
	n := newRSA(t, 2048).N
	p := newP256(t).PublicKey
	for name, pub := range map[string]crypto.PublicKey{
		"nil":                   nil,
		"a string":              "key",
		"a private key":         newP256(t),
		"DSA":                   &dsa.PublicKey{},
		"nil ECDSA":             (*ecdsa.PublicKey)(nil),
		"ECDSA without curve":   &ecdsa.PublicKey{X: p.X, Y: p.Y},
		"ECDSA without point":   &ecdsa.PublicKey{Curve: elliptic.P256()},
		"P-224":                 newEC(t, elliptic.P224()).Public(),
		"off the curve":         &ecdsa.PublicKey{Curve: elliptic.P256(), X: p.X, Y: new(big.Int).Add(p.Y, big.NewInt(1))},
		"of another curve":      &ecdsa.PublicKey{Curve: elliptic.P384(), X: p.X, Y: p.Y},
		"the point at infinity": &ecdsa.PublicKey{Curve: elliptic.P256(), X: new(big.Int), Y: new(big.Int)},
		"a negative coordinate": &ecdsa.PublicKey{Curve: elliptic.P256(), X: new(big.Int).Neg(p.X), Y: p.Y},
		"short Ed25519":         ed25519.PublicKey(make([]byte, 31)),
		"nil Ed25519":           ed25519.PublicKey(nil),
		"nil RSA":               (*rsa.PublicKey)(nil),
		"RSA without modulus":   &rsa.PublicKey{E: 65537},
		"RSA-1024":              &newWeakRSA(t).PublicKey,
		"RSA-8192":              &rsa.PublicKey{N: new(big.Int).SetBit(big.NewInt(1), 8191, 1), E: 65537},
		"RSA of 2049 bits":      &rsa.PublicKey{N: new(big.Int).SetBit(big.NewInt(1), 2048, 1), E: 65537},
		"even modulus":          &rsa.PublicKey{N: new(big.Int).Add(n, big.NewInt(1)), E: 65537},
		"negative modulus":      &rsa.PublicKey{N: new(big.Int).Neg(n), E: 65537},
		"exponent 0":            &rsa.PublicKey{N: n, E: 0},
		"exponent 1":            &rsa.PublicKey{N: n, E: 1},
		"exponent 3":            &rsa.PublicKey{N: n, E: 3},
		"exponent -65537":       &rsa.PublicKey{N: n, E: -65537},
		"even exponent":         &rsa.PublicKey{N: n, E: 65538},
	} {
		t.Run(name, func(t *testing.T) {
			wantErr(t, CheckPublicKey(pub), identity.ErrInvalid)
		})
	}
	// And no way round it.
	r := newRig(t)
	for _, pub := range []crypto.PublicKey{nil, newEC(t, elliptic.P224()).Public(), &rsa.PublicKey{N: n, E: 3}} {
		_, err := r.PrepareX509(identity.Issuance{ID: workload(), PublicKey: pub})
		wantErr(t, err, identity.ErrInvalid)
	}
}

// A fuzz test whose corpus is missing still passes: this one does not.
func TestFuzzSeedsExist(t *testing.T) {
	for _, name := range []string{"FuzzParsePublicKey", "FuzzLeafEncoder"} {
		if files, err := os.ReadDir(filepath.Join("testdata", "fuzz", name)); err != nil || len(files) < 4 {
			t.Errorf("%s has %d seeds, %v", name, len(files), err)
		}
	}
}

// What is parsed can be encoded, and comes back as the same key.
func FuzzParsePublicKey(f *testing.F) {
	f.Fuzz(func(t *testing.T, b []byte) {
		pub, err := ParsePublicKey(b)
		if err != nil {
			return
		}
		again, err := ParsePublicKey(der(t, pub))
		if err != nil || !again.(interface{ Equal(crypto.PublicKey) bool }).Equal(pub) {
			t.Errorf("the key changed: %v", err)
		}
	})
}
