package runagent

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"countersign.io/countersign/attestor/node"
	"countersign.io/countersign/config"
	"countersign.io/countersign/identity"
	"countersign.io/countersign/internal/durable"
)

func jwt(claims string) []byte {
	return []byte("e30." + base64.RawURLEncoding.EncodeToString([]byte(claims)) + ".c2ln")
}

func TestParsePodUID(t *testing.T) {
	const good = `{"kubernetes.io":{"pod":{"uid":"0f5c"}}}`
	if uid, err := parsePodUID(append(jwt(good), '\n')); err != nil || uid != "0f5c" {
		t.Errorf("%q, %v", uid, err)
	}
	for name, token := range map[string][]byte{
		"empty": nil, "not a JWT": []byte("secret"), "two parts": []byte("secret.secret"), "five parts": []byte("a.b.c.d.e"), "not base64": []byte("e30.se=cret.x"),
		"not JSON": jwt("secret"), "no pod": jwt(`{"sub":"secret"}`), "no UID": jwt(`{"kubernetes.io":{"pod":{"name":"secret"}}}`), "another type": jwt(`{"kubernetes.io":["secret"]}`),
	} {
		if uid, err := parsePodUID(token); !errors.Is(err, identity.ErrUnauthenticated) || uid != "" || strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: %q, %v", name, uid, err)
		}
	}
}

func FuzzParsePodUID(f *testing.F) {
	if seeds, err := filepath.Glob("testdata/fuzz/FuzzParsePodUID/*"); err != nil || len(seeds) < 3 {
		f.Fatalf("found %d seeds: %v", len(seeds), err)
	}
	f.Fuzz(func(t *testing.T, token []byte) {
		uid, err := parsePodUID(token)
		if (uid == "") == (err == nil) {
			t.Errorf("%q: %q, %v", token, uid, err)
		}
	})
}

func write(t *testing.T, path string, data []byte, mode os.FileMode) string {
	t.Helper()
	if err := os.WriteFile(path, data, mode); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestJoinTokenFile(t *testing.T) {
	dir := t.TempDir()
	secret, _ := node.NewSecret()
	pin := "sha256:" + strings.Repeat("ab", 32)
	token := func(purpose string) []byte {
		s, err := node.FormatToken(node.Token{Addresses: []string{"ca-1.example.org:8443"}, Pin: pin, Secret: secret, Purpose: purpose})
		if err != nil {
			t.Fatal(err)
		}
		return []byte(s + "\n")
	}
	good := write(t, filepath.Join(dir, "good"), token("agent"), 0o600)
	conf, err := agentConfig(&config.Agent{TrustDomain: "example.org", KeyType: "ec-p256", StateDir: "none", Attest: config.AgentAttest{JoinTokenFile: good}}, Options{})
	if err != nil || conf.Servers[0] != "ca-1.example.org:8443" || conf.Pin != pin || conf.Credential == nil || conf.StateDir != "" || conf.TrustDomain.Name() != "example.org" {
		t.Errorf("%+v, %v", conf, err)
	}
	// What the file says goes before what the token says.
	conf, err = agentConfig(&config.Agent{Servers: []string{"other:1"}, CAPin: "sha256:00", StateDir: "/run/x", Attest: config.AgentAttest{JoinTokenFile: good}}, Options{})
	if err != nil || len(conf.Servers) != 1 || conf.Servers[0] != "other:1" || conf.Pin != "sha256:00" || conf.StateDir != "/run/x" {
		t.Errorf("%+v, %v", conf, err)
	}
	for name, c := range map[string]struct {
		path string
		is   error
		says string
	}{
		"absent":       {filepath.Join(dir, "absent"), os.ErrNotExist, "attest.join_token_file"},
		"loose":        {write(t, filepath.Join(dir, "loose"), token("agent"), 0o644), durable.ErrLoose, "chmod 0600"},
		"a server's":   {write(t, filepath.Join(dir, "server"), token("server"), 0o600), identity.ErrInvalid, "countersign token create --agent"},
		"garbage":      {write(t, filepath.Join(dir, "garbage"), []byte("cs1.garbage"), 0o600), identity.ErrInvalid, "copy the whole token"},
		"empty":        {write(t, filepath.Join(dir, "empty"), nil, 0o600), identity.ErrInvalid, "copy the whole token"},
		"too large":    {write(t, filepath.Join(dir, "large"), make([]byte, 1<<20), 0o600), durable.ErrTooLarge, "attest.join_token_file"},
		"not a file":   {dir, os.ErrInvalid, "attest.join_token_file"},
		"trust domain": {good, identity.ErrInvalid, "trust_domain"},
	} {
		conf := &config.Agent{Attest: config.AgentAttest{JoinTokenFile: c.path}}
		if name == "trust domain" {
			conf.TrustDomain = "not/one"
		}
		if _, err := agentConfig(conf, Options{}); !errors.Is(err, c.is) || !strings.Contains(err.Error(), c.says) || strings.Contains(err.Error(), secret) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestLoadPair(t *testing.T) {
	dir := t.TempDir()
	pair := func(name string) (cert, key string) {
		k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotAfter: time.Now().Add(time.Hour)}
		der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, k.Public(), k)
		if err != nil {
			t.Fatal(err)
		}
		pkcs8, err := x509.MarshalPKCS8PrivateKey(k)
		if err != nil {
			t.Fatal(err)
		}
		return write(t, filepath.Join(dir, name+".pem"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o644),
			write(t, filepath.Join(dir, name+"-key.pem"), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}), 0o600)
	}
	cert, key := pair("one")
	_, otherKey := pair("two")
	if chain, signer, err := loadPair(cert, key); err != nil || len(chain) != 1 || signer == nil {
		t.Errorf("%d, %v, %v", len(chain), signer, err)
	}
	if _, _, err := loadPair(cert, otherKey); !errors.Is(err, identity.ErrInvalid) || !strings.Contains(err.Error(), cert) || !strings.Contains(err.Error(), otherKey) {
		t.Errorf("another's key: %v", err)
	}
	if _, _, err := loadPair(key, key); !errors.Is(err, identity.ErrInvalid) {
		t.Errorf("no certificate: %v", err)
	}
	if err := os.Chmod(key, 0o640); err != nil {
		t.Fatal(err)
	}
	if _, _, err := loadPair(cert, key); !errors.Is(err, durable.ErrLoose) {
		t.Errorf("a key that others can read: %v", err)
	}
	if _, _, err := loadPair(filepath.Join(dir, "absent"), key); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("absent: %v", err)
	}
}
