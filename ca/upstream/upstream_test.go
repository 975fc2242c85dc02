package upstream

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"countersign.io/countersign/ca"
	"countersign.io/countersign/identity"
	"countersign.io/countersign/internal/vault"
)

const deadline = 30 * time.Second

func trustDomain() spiffeid.TrustDomain { return spiffeid.RequireTrustDomainFromString("example.org") }

// signingCA is a certificate authority of a company.
type signingCA struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newCA(t testing.TB, name string, pathLen int, parent *signingCA) *signingCA {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		KeyUsage: x509.KeyUsageCertSign, BasicConstraintsValid: true, IsCA: true, MaxPathLen: pathLen, MaxPathLenZero: pathLen == 0,
	}
	out := &signingCA{key: key}
	by := &signingCA{cert: tmpl, key: key}
	if parent != nil {
		by = parent
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, by.cert, key.Public(), by.key)
	if err != nil {
		t.Fatal(err)
	}
	if out.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	return out
}

func pemOf(cs ...*signingCA) []byte {
	var out []byte
	for _, c := range cs {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.cert.Raw})...)
	}
	return out
}

func (c *signingCA) keyPEM(t testing.TB) []byte {
	der, err := x509.MarshalECPrivateKey(c.key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der})
}

func put(t testing.TB, path string, data []byte, mode os.FileMode) {
	t.Helper()
	if err := os.WriteFile(path, data, mode); err != nil {
		t.Fatal(err)
	}
}

// folder is a folder of files as DiskConfig names them.
func folder(t testing.TB, chain, key, roots []byte) DiskConfig {
	dir := t.TempDir()
	cfg := DiskConfig{CertFile: filepath.Join(dir, "ca.pem"), KeyFile: filepath.Join(dir, "key.pem")}
	put(t, cfg.CertFile, chain, 0o644)
	put(t, cfg.KeyFile, key, 0o600)
	if roots != nil {
		cfg.RootsFile = filepath.Join(dir, "roots.pem")
		put(t, cfg.RootsFile, roots, 0o644)
	}
	return cfg
}

func disk(t testing.TB, cfg DiskConfig) *Disk {
	t.Helper()
	d, err := NewDisk(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// take makes an authority as a member does, with every check that it makes.
func take(up ca.Upstream) (identity.Authority, error) {
	a, _, err := ca.NewX509AuthorityUnder(context.Background(), trustDomain(), up, 12*time.Hour, time.Now)
	return a, err
}

func TestDiskSigns(t *testing.T) {
	root := newCA(t, "root", -1, nil)
	mid := newCA(t, "mid", 3, root)
	for name, row := range map[string]struct {
		cfg   DiskConfig
		chain int
	}{
		"chain with its root": {folder(t, pemOf(mid, root), mid.keyPEM(t), nil), 1},
		"roots of their own":  {folder(t, pemOf(mid), mid.keyPEM(t), pemOf(root)), 1},
		"a root that signs":   {folder(t, pemOf(root), root.keyPEM(t), nil), 0},
	} {
		a, err := take(disk(t, row.cfg))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		cert, err := x509.ParseCertificate(a.Cert)
		if err != nil {
			t.Fatal(err)
		}
		if len(a.Chain) != row.chain || !bytes.Equal(a.Roots[0], root.cert.Raw) || cert.MaxPathLen != 2 || !cert.PermittedDNSDomainsCritical || cert.PermittedURIDomains[0] != "example.org" {
			t.Errorf("%s: chain of %d, path length %d, constraints %q", name, len(a.Chain), cert.MaxPathLen, cert.PermittedURIDomains)
		}
		if a.Upstream != "disk:"+row.cfg.CertFile {
			t.Errorf("it is called %q", a.Upstream)
		}
	}
	// A key that is elsewhere, by its URI.
	cfg := folder(t, pemOf(mid, root), nil, nil)
	cfg.KeyFile = "pkcs11:token=t;object=ca"
	closed := false
	cfg.OpenKey = func(_ context.Context, uri string) (crypto.Signer, error) {
		if uri != cfg.KeyFile {
			return nil, errors.New("another key")
		}
		return closing{mid.key, &closed}, nil
	}
	if _, err := take(disk(t, cfg)); err != nil || !closed {
		t.Errorf("%v, closed: %t", err, closed)
	}
}

type closing struct {
	crypto.Signer
	closed *bool
}

func (c closing) Close() error { *c.closed = true; return nil }

func TestDiskRefuses(t *testing.T) {
	root := newCA(t, "root", -1, nil)
	mid, short := newCA(t, "mid", 3, root), newCA(t, "short", 1, root)
	other := newCA(t, "other", -1, nil)
	leaf := []byte("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n")
	for name, row := range map[string]struct {
		cfg  DiskConfig
		want string
	}{
		"another's key":       {folder(t, pemOf(mid, root), other.keyPEM(t), nil), "is not the one of the certificate"},
		"no root":             {folder(t, pemOf(mid), mid.keyPEM(t), nil), "set roots_file"},
		"another's root":      {folder(t, pemOf(mid), mid.keyPEM(t), pemOf(other)), "does not lead to its roots"},
		"path length 1":       {folder(t, pemOf(short, root), short.keyPEM(t), nil), "path length of 1"},
		"no PEM":              {folder(t, []byte("hello"), mid.keyPEM(t), nil), "not PEM"},
		"a key among them":    {folder(t, append(pemOf(mid), leaf...), mid.keyPEM(t), nil), "certificates only"},
		"nothing":             {folder(t, nil, mid.keyPEM(t), nil), "no certificate"},
		"no key":              {folder(t, pemOf(mid, root), []byte("hello"), nil), "no PEM private key"},
		"half a key":          {folder(t, pemOf(mid, root), leaf, nil), "the key in"},
		"too many":            {folder(t, bytes.Repeat(pemOf(mid), 100), mid.keyPEM(t), nil), "more than 32"},
		"a mebibyte and more": {folder(t, bytes.Repeat([]byte("-"), maxPEM+1), mid.keyPEM(t), nil), "more than 1048576"},
	} {
		if _, err := take(disk(t, row.cfg)); err == nil || !errors.Is(err, identity.ErrInvalid) || !strings.Contains(err.Error(), row.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	cfg := folder(t, pemOf(mid, root), mid.keyPEM(t), nil)
	if err := os.Chmod(cfg.KeyFile, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := take(disk(t, cfg)); err == nil || !strings.Contains(err.Error(), "chmod 0600") {
		t.Errorf("a key for everybody: %v", err)
	}
	if err := os.Remove(cfg.KeyFile); err != nil {
		t.Fatal(err)
	}
	if _, err := take(disk(t, cfg)); !errors.Is(err, identity.ErrUnavailable) {
		t.Errorf("an absent key: %v", err)
	}
	if _, err := NewDisk(DiskConfig{CertFile: "/x", KeyFile: "pkcs11:a"}); !errors.Is(err, identity.ErrInvalid) {
		t.Errorf("a URI that nothing opens: %v", err)
	}
}

// heard is one call of tell.
type heard struct {
	f   *identity.Above
	err error
}

func follow(t *testing.T, f func(context.Context, <-chan identity.Below, func(*identity.Above, error)) error) <-chan heard {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ch, done := make(chan heard, 64), make(chan error, 1)
	go func() { done <- f(ctx, nil, func(f *identity.Above, err error) { ch <- heard{f, err} }) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Follow: %v", err)
		}
	})
	return ch
}

func until(t *testing.T, ch <-chan heard, what string, ok func(heard) bool) {
	t.Helper()
	limit := time.After(deadline)
	for {
		select {
		case h := <-ch:
			if ok(h) {
				return
			}
		case <-limit:
			t.Fatalf("never happened: %s", what)
		}
	}
}

func has(h heard, c *signingCA) bool {
	return h.err == nil && len(h.f.X509) == 1 && bytes.Equal(h.f.X509[0], c.cert.Raw)
}

// Kubernetes mounts a secret as links into a folder that it exchanges whole.
func TestDiskFollowsAnExchangedFolder(t *testing.T) {
	one, two := newCA(t, "one", -1, nil), newCA(t, "two", -1, nil)
	dir := t.TempDir()
	swap := func(name string, c, key *signingCA) {
		t.Helper()
		if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
		put(t, filepath.Join(dir, name, "tls.crt"), pemOf(c), 0o644)
		put(t, filepath.Join(dir, name, "tls.key"), key.keyPEM(t), 0o640)
		if err := os.Symlink(name, filepath.Join(dir, "..tmp")); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(filepath.Join(dir, "..tmp"), filepath.Join(dir, "..data")); err != nil {
			t.Fatal(err)
		}
	}
	swap("..1", one, one)
	for _, f := range []string{"tls.crt", "tls.key"} {
		if err := os.Symlink(filepath.Join("..data", f), filepath.Join(dir, f)); err != nil {
			t.Fatal(err)
		}
	}
	d := disk(t, DiskConfig{CertFile: filepath.Join(dir, "tls.crt"), KeyFile: filepath.Join(dir, "tls.key")})
	ch := follow(t, d.Follow)
	until(t, ch, "the root, at once", func(h heard) bool { return has(h, one) })
	swap("..2", two, one)
	until(t, ch, "a certificate without its key", func(h heard) bool { return h.err != nil && strings.Contains(h.err.Error(), "is not the one") })
	swap("..3", two, two)
	until(t, ch, "the new root", func(h heard) bool { return has(h, two) })
}

func TestDiskFollowsReplacedFiles(t *testing.T) {
	one, two := newCA(t, "one", -1, nil), newCA(t, "two", -1, nil)
	cfg := folder(t, pemOf(one), one.keyPEM(t), nil)
	ch := follow(t, disk(t, cfg).Follow)
	until(t, ch, "the root, at once", func(h heard) bool { return has(h, one) })
	for path, data := range map[string][]byte{cfg.CertFile: pemOf(two), cfg.KeyFile: two.keyPEM(t)} {
		put(t, path+".new", data, 0o600)
		if err := os.Rename(path+".new", path); err != nil {
			t.Fatal(err)
		}
	}
	until(t, ch, "the new root", func(h heard) bool { return has(h, two) })
}

// pkiEngine answers as Vault's PKI engine is documented to.
func pkiEngine(t *testing.T, answer func(csr *x509.CertificateRequest) map[string]any, chain func() []byte) *Vault {
	t.Helper()
	say := func(w http.ResponseWriter, data map[string]any) {
		_ = json.NewEncoder(w).Encode(map[string]any{"data": data})
	}
	s := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.Method + " " + r.URL.Path {
		case "GET /v1/auth/token/lookup-self":
			say(w, map[string]any{"ttl": 0})
		case "POST /v1/company/pki/root/sign-intermediate":
			var in map[string]any
			body, _ := io.ReadAll(r.Body)
			_ = json.Unmarshal(body, &in)
			block, _ := pem.Decode([]byte(fmt.Sprint(in["csr"])))
			if block == nil || in["use_csr_values"] != true || in["format"] != "pem" || in["ttl"] != "43200s" {
				w.WriteHeader(400)
				return
			}
			csr, err := x509.ParseCertificateRequest(block.Bytes)
			if err != nil || csr.CheckSignature() != nil {
				w.WriteHeader(400)
				return
			}
			say(w, answer(csr))
		case "GET /v1/company/pki/cert/ca_chain":
			say(w, map[string]any{"certificate": string(chain())})
		default:
			w.WriteHeader(404)
		}
	}))
	t.Cleanup(s.Close)
	dir := t.TempDir()
	put(t, filepath.Join(dir, "ca"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}), 0o644)
	put(t, filepath.Join(dir, "token"), []byte("s.token"), 0o600)
	client, err := vault.New(vault.Config{Address: s.URL, CAFile: filepath.Join(dir, "ca"), TokenFile: filepath.Join(dir, "token")})
	if err != nil {
		t.Fatal(err)
	}
	v, err := NewVault(client, "/company/pki/")
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func (c *signingCA) sign(t *testing.T, csr *x509.CertificateRequest, pub crypto.PublicKey) string {
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), RawSubject: csr.RawSubject, URIs: []*url.URL{trustDomain().ID().URL()}, NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, BasicConstraintsValid: true, IsCA: true,
	}, c.cert, pub, c.key)
	if err != nil {
		t.Error(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

func TestVaultSigns(t *testing.T) {
	root := newCA(t, "root", -1, nil)
	mid := newCA(t, "mid", 3, root)
	all := func() []byte { return pemOf(mid, root) }
	other := newCA(t, "other", -1, nil)
	for name, row := range map[string]struct {
		answer func(csr *x509.CertificateRequest) map[string]any
		chain  func() []byte
		want   string // of the error; empty: it is taken
	}{
		"the whole chain": {func(csr *x509.CertificateRequest) map[string]any {
			return map[string]any{"certificate": mid.sign(t, csr, csr.PublicKey), "issuing_ca": string(pemOf(mid)), "ca_chain": []string{string(pemOf(mid)), string(pemOf(root))}}
		}, all, ""},
		"the root from ca_chain": {func(csr *x509.CertificateRequest) map[string]any {
			return map[string]any{"certificate": mid.sign(t, csr, csr.PublicKey), "issuing_ca": string(pemOf(mid)), "ca_chain": []string{string(pemOf(mid))}}
		}, all, ""},
		"no root anywhere": {func(csr *x509.CertificateRequest) map[string]any {
			return map[string]any{"certificate": mid.sign(t, csr, csr.PublicKey), "issuing_ca": string(pemOf(mid))}
		}, func() []byte { return pemOf(mid) }, "import the root into the engine"},
		"another key": {func(csr *x509.CertificateRequest) map[string]any {
			return map[string]any{"certificate": mid.sign(t, csr, other.key.Public()), "ca_chain": string(pemOf(mid, root))}
		}, all, "another key"},
		"another authority's chain": {func(csr *x509.CertificateRequest) map[string]any {
			return map[string]any{"certificate": mid.sign(t, csr, csr.PublicKey), "ca_chain": string(pemOf(other))}
		}, all, "does not lead to its roots"},
		"garbage": {func(*x509.CertificateRequest) map[string]any { return map[string]any{"certificate": "<html>"} }, all, "not PEM"},
		"nothing": {func(*x509.CertificateRequest) map[string]any { return nil }, all, "no certificate"},
	} {
		a, err := take(pkiEngine(t, row.answer, row.chain))
		switch {
		case row.want == "" && (err != nil || len(a.Chain) != 1 || !bytes.Equal(a.Roots[0], root.cert.Raw) || !strings.HasSuffix(a.Upstream, "/company/pki")):
			t.Errorf("%s: %+v, %v", name, a.Upstream, err)
		case row.want != "" && (!errors.Is(err, identity.ErrInvalid) || !strings.Contains(err.Error(), row.want) || strings.Contains(err.Error(), "s.token")):
			t.Errorf("%s: %v", name, err)
		}
	}
	until(t, follow(t, pkiEngine(t, nil, all).Follow), "the root", func(h heard) bool { return has(h, root) })
	until(t, follow(t, pkiEngine(t, nil, func() []byte { return pemOf(mid) }).Follow), "an error", func(h heard) bool { return errors.Is(h.err, identity.ErrInvalid) })
	for _, mount := range []string{"", "../sys", "a b", "a?b"} {
		if _, err := NewVault(&vault.Client{}, mount); !errors.Is(err, identity.ErrInvalid) {
			t.Errorf("mount %q: %v", mount, err)
		}
	}
}

func TestCountersignWithoutItsAgent(t *testing.T) {
	if _, err := NewCountersign(CountersignConfig{TrustDomain: trustDomain()}); !errors.Is(err, identity.ErrInvalid) {
		t.Errorf("nothing configured: %v", err)
	}
	c, err := NewCountersign(CountersignConfig{TrustDomain: trustDomain(), Servers: []string{"b:1", "a:1"}, Socket: filepath.Join(t.TempDir(), "none")})
	if err != nil {
		t.Fatal(err)
	}
	if c.String() != "countersign:a:1,b:1" {
		t.Errorf("it is called %s", c)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
	defer cancel()
	_, _, _, err = c.Sign(ctx, &x509.CertificateRequest{PublicKey: newCA(t, "x", 0, nil).key.Public()}, time.Hour)
	if !errors.Is(err, identity.ErrUnavailable) || !strings.Contains(err.Error(), "from its agent at") {
		t.Errorf("got %v", err)
	}
}

func TestFuzzSeedsExist(t *testing.T) {
	if seeds, _ := filepath.Glob("testdata/fuzz/FuzzParsePEM/*"); len(seeds) == 0 {
		t.Error("no seeds: is testdata there?")
	}
}

func FuzzParsePEM(f *testing.F) {
	f.Add(pemOf(newCA(f, "root", -1, nil)))
	f.Fuzz(func(t *testing.T, raw []byte) {
		certs, err := parsePEM("the input", raw)
		if err != nil {
			return
		}
		var again []byte
		for _, c := range certs {
			again = append(again, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
		}
		same, err := parsePEM("the input", again)
		if err != nil || len(same) != len(certs) {
			t.Fatalf("%d certificates became %d: %v", len(certs), len(same), err)
		}
	})
}
