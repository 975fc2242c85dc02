package main

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/crypto/acme/autocert"
)

// writeWebCert writes a self-signed certificate of a host, and its key.
func writeWebCert(t *testing.T, certFile, keyFile, host string) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), DNSNames: []string{host}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for file, b := range map[string]*pem.Block{certFile: {Type: "CERTIFICATE", Bytes: der}, keyFile: {Type: "PRIVATE KEY", Bytes: pkcs8}} {
		if err := os.WriteFile(file, pem.EncodeToMemory(b), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return der
}

// A certificate in files is taken up when it changes; one that is no good leaves the one before.
func TestCertFiles(t *testing.T) {
	dir := t.TempDir()
	f := &certFiles{cert: filepath.Join(dir, "cert.pem"), key: filepath.Join(dir, "key.pem")}
	now := time.Now()
	if c, err := f.load(now); c != nil || !errors.Is(err, os.ErrNotExist) {
		t.Errorf("without files: %v", err)
	}
	first := writeWebCert(t, f.cert, f.key, "one.test")
	shows := func(want []byte, wantErr bool) {
		t.Helper()
		now = now.Add(certLook)
		c, err := f.load(now)
		if c == nil || !bytes.Equal(c.Certificate[0], want) || (err != nil) != wantErr {
			t.Errorf("got %v", err)
		}
	}
	shows(first, false)
	shows(first, false)
	if err := os.WriteFile(f.cert, []byte("half a file"), 0o600); err != nil {
		t.Fatal(err)
	}
	shows(first, true)
	shows(first, false) // said once
	second := writeWebCert(t, f.cert, f.key, "two.test")
	shows(second, false)
	if err := os.Remove(f.key); err != nil {
		t.Fatal(err)
	}
	shows(second, true)
}

// What ACME keeps is the member's alone, and no name leads out of the folder.
func TestACMEFiles(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "acme")
	d := acmeFiles(dir)
	ctx := t.Context()
	if _, err := d.Get(ctx, "x"); !errors.Is(err, autocert.ErrCacheMiss) {
		t.Errorf("nothing there: %v", err)
	}
	for _, key := range []string{"acme_account+key", "example.org", "../../escape", "a/b", "example.org+token"} {
		if err := d.Put(ctx, key, []byte(key)); err != nil {
			t.Fatal(err)
		}
		if got, err := d.Get(ctx, key); err != nil || string(got) != key {
			t.Errorf("%s: %q, %v", key, got, err)
		}
	}
	names, err := os.ReadDir(dir)
	if err != nil || len(names) != 5 {
		t.Errorf("%d files, %v", len(names), err)
	}
	for _, n := range names {
		if info, err := n.Info(); err != nil || info.Mode() != 0o600 {
			t.Errorf("%s has mode %v", n.Name(), info.Mode())
		}
	}
	if err := errors.Join(d.Delete(ctx, "a/b"), d.Delete(ctx, "a/b")); err != nil {
		t.Error(err)
	}
	if err := os.Chmod(filepath.Join(dir, "example.org"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Get(ctx, "example.org"); err == nil || errors.Is(err, autocert.ErrCacheMiss) {
		t.Errorf("a key that others can read: %v", err)
	}
}
