package node

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"errors"
	"math/big"
	"strings"
	"testing"
	"time"

	"countersign.io/countersign/identity"
)

var popNow = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

type testCA struct {
	cert *x509.Certificate
	key  crypto.Signer
}

func ecKey(t *testing.T) crypto.Signer {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func (ca *testCA) issue(t *testing.T, key crypto.Signer, cn string, edit func(*x509.Certificate)) []byte {
	t.Helper()
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: cn}, NotBefore: popNow.Add(-time.Hour), NotAfter: popNow.Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, BasicConstraintsValid: true,
	}
	if edit != nil {
		edit(tmpl)
	}
	parent, signer := tmpl, key
	if ca != nil {
		parent, signer = ca.cert, ca.key
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func asCA(c *x509.Certificate) {
	c.IsCA, c.KeyUsage, c.ExtKeyUsage = true, x509.KeyUsageCertSign, nil
}

func newCA(t *testing.T, parent *testCA, cn string) (*testCA, []byte) {
	t.Helper()
	key := ecKey(t)
	der := parent.issue(t, key, cn, asCA)
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &testCA{cert, key}, der
}

func TestX509Pop(t *testing.T) {
	root, _ := newCA(t, nil, "root")
	sub, subDER := newCA(t, root, "sub")
	roots := x509.NewCertPool()
	roots.AddCert(root.cert)
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	_, edKey, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	svidKey := []byte("a public key in PKIX form")
	for name, key := range map[string]crypto.Signer{"P-256": ecKey(t), "P-384": p384, "RSA": rsaKey, "Ed25519": edKey} {
		t.Run(name, func(t *testing.T) {
			leaf := sub.issue(t, key, "node-1", nil)
			chain := [][]byte{leaf, subDER}
			challenge := Challenge()
			sig, err := SignX509Pop(key, challenge, svidKey)
			if err != nil {
				t.Fatal(err)
			}
			cn, fp, err := VerifyX509Pop(chain, roots, challenge, svidKey, sig, popNow)
			parsed, perr := x509.ParseCertificate(leaf)
			if perr != nil {
				t.Fatal(perr)
			}
			sum := sha256.Sum256(parsed.RawTBSCertificate)
			if err != nil || cn != "node-1" || fp != hex.EncodeToString(sum[:]) {
				t.Fatalf("%q %q %v", cn, fp, err)
			}
			bad := bytes.Clone(sig)
			bad[len(bad)-1] ^= 1
			other, err := SignX509Pop(ecKey(t), challenge, svidKey)
			if err != nil {
				t.Fatal(err)
			}
			for what, err := range map[string]error{
				"another challenge":  second(VerifyX509Pop(chain, roots, Challenge(), svidKey, sig, popNow)),
				"another public key": second(VerifyX509Pop(chain, roots, challenge, []byte("the attacker's"), sig, popNow)),
				"changed signature":  second(VerifyX509Pop(chain, roots, challenge, svidKey, bad, popNow)),
				"another's key":      second(VerifyX509Pop(chain, roots, challenge, svidKey, other, popNow)),
				"expired":            second(VerifyX509Pop(chain, roots, challenge, svidKey, sig, popNow.Add(2*time.Hour))),
				"not yet valid":      second(VerifyX509Pop(chain, roots, challenge, svidKey, sig, popNow.Add(-2*time.Hour))),
				"without the sub CA": second(VerifyX509Pop(chain[:1], roots, challenge, svidKey, sig, popNow)),
			} {
				if !errors.Is(err, identity.ErrUnauthenticated) || strings.Contains(err.Error(), hex.EncodeToString(sig)) {
					t.Errorf("%s: %v", what, err)
				}
			}
			for what, err := range map[string]error{
				"no signature":    second(VerifyX509Pop(chain, roots, challenge, svidKey, nil, popNow)),
				"long signature":  second(VerifyX509Pop(chain, roots, challenge, svidKey, make([]byte, 1<<20), popNow)),
				"short challenge": second(VerifyX509Pop(chain, roots, challenge[:31], svidKey, sig, popNow)),
				"no public key":   second(VerifyX509Pop(chain, roots, challenge, nil, sig, popNow)),
				"no chain":        second(VerifyX509Pop(nil, roots, challenge, svidKey, sig, popNow)),
				"long chain":      second(VerifyX509Pop(make([][]byte, 9), roots, challenge, svidKey, sig, popNow)),
				"1 MiB":           second(VerifyX509Pop([][]byte{make([]byte, 1<<20)}, roots, challenge, svidKey, sig, popNow)),
				"garbage":         second(VerifyX509Pop([][]byte{[]byte("hello")}, roots, challenge, svidKey, sig, popNow)),
				"garbage after":   second(VerifyX509Pop([][]byte{leaf, []byte("hello")}, roots, challenge, svidKey, sig, popNow)),
			} {
				if !errors.Is(err, identity.ErrInvalid) {
					t.Errorf("%s: %v", what, err)
				}
			}
		})
	}
}

// The signature (r, s) of a certificate is as good as (r, n-s). Who makes one of the other must stay the same agent, or a ban
// could be shaken off.
func TestX509PopFingerprintIgnoresSignature(t *testing.T) {
	root, _ := newCA(t, nil, "root")
	roots := x509.NewCertPool()
	roots.AddCert(root.cert)
	key := ecKey(t)
	leaf := root.issue(t, key, "node-1", nil)
	var outer struct {
		TBS       asn1.RawValue
		Algorithm asn1.RawValue
		Signature asn1.BitString
	}
	var sig struct{ R, S *big.Int }
	if _, err := asn1.Unmarshal(leaf, &outer); err != nil {
		t.Fatal(err)
	}
	if _, err := asn1.Unmarshal(outer.Signature.Bytes, &sig); err != nil {
		t.Fatal(err)
	}
	sig.S.Sub(elliptic.P256().Params().N, sig.S)
	der, err := asn1.Marshal(sig)
	if err != nil {
		t.Fatal(err)
	}
	outer.Signature = asn1.BitString{Bytes: der, BitLength: 8 * len(der)}
	other, err := asn1.Marshal(outer)
	if err != nil || bytes.Equal(other, leaf) {
		t.Fatal("the certificate was not changed", err)
	}
	challenge := Challenge()
	proof, err := SignX509Pop(key, challenge, []byte("k"))
	if err != nil {
		t.Fatal(err)
	}
	_, one, err := VerifyX509Pop([][]byte{leaf}, roots, challenge, []byte("k"), proof, popNow)
	if err != nil {
		t.Fatal(err)
	}
	_, two, err := VerifyX509Pop([][]byte{other}, roots, challenge, []byte("k"), proof, popNow)
	if err != nil {
		t.Fatal("the changed certificate is not good, and the test shows nothing:", err)
	}
	if one != two {
		t.Error("one certificate makes two agents")
	}
}

func second(_, _ string, err error) error { return err }

func TestX509PopRefusesCertificates(t *testing.T) {
	root, rootDER := newCA(t, nil, "root")
	stranger, strangerDER := newCA(t, nil, "root") // same name, another key
	roots := x509.NewCertPool()
	roots.AddCert(root.cert)
	small, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	key := ecKey(t)
	// A key that nobody has, and that no signature is checked under: the leaf only names its certificate as its issuer.
	huge := &rsa.PublicKey{N: new(big.Int).SetBit(big.NewInt(1), 99999, 1), E: 1<<31 - 1}
	hugeTmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "huge"}, NotBefore: popNow.Add(-time.Hour), NotAfter: popNow.Add(time.Hour)}
	asCA(hugeTmpl)
	hugeDER, err := x509.CreateCertificate(rand.Reader, hugeTmpl, root.cert, huge, root.key)
	if err != nil {
		t.Fatal(err)
	}
	for name, row := range map[string]struct {
		chain [][]byte
		is    error
		says  string
	}{
		"under another CA":     {[][]byte{stranger.issue(t, key, "node-1", nil), strangerDER}, identity.ErrUnauthenticated, "roots of this member"},
		"self-signed":          {[][]byte{(*testCA)(nil).issue(t, key, "node-1", nil)}, identity.ErrUnauthenticated, "roots of this member"},
		"the root itself":      {[][]byte{rootDER}, identity.ErrUnauthenticated, "CA's"},
		"a CA below it":        {[][]byte{root.issue(t, key, "sub", asCA)}, identity.ErrUnauthenticated, "CA's"},
		"for servers only":     {[][]byte{root.issue(t, key, "node-1", func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} })}, identity.ErrUnauthenticated, "client authentication"},
		"not for signatures":   {[][]byte{root.issue(t, key, "node-1", func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyAgreement })}, identity.ErrUnauthenticated, "digitalSignature"},
		"RSA key of 1024 bits": {[][]byte{root.issue(t, small, "node-1", nil)}, identity.ErrInvalid, "1024 bits"},
		"a huge RSA key above": {[][]byte{root.issue(t, key, "node-1", nil), hugeDER}, identity.ErrInvalid, "certificate 2: "},
		"leaf not first":       {[][]byte{rootDER, root.issue(t, key, "node-1", nil)}, identity.ErrUnauthenticated, "CA's"},
		"an unknown critical extension": {[][]byte{root.issue(t, key, "node-1", func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: []int{1, 2, 3, 4}, Critical: true, Value: []byte{5, 0}}}
		})}, identity.ErrUnauthenticated, "critical"},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := VerifyX509PopChain(row.chain, roots, popNow); !errors.Is(err, row.is) || !strings.Contains(err.Error(), row.says) {
				t.Errorf("%v does not say %q", err, row.says)
			}
		})
	}
	good := [][]byte{root.issue(t, key, "node-1", nil)}
	if _, err := VerifyX509PopChain(good, roots, popNow); err != nil {
		t.Error(err)
	}
	for _, none := range []*x509.CertPool{nil, x509.NewCertPool()} {
		if _, err := VerifyX509PopChain(good, none, popNow); !errors.Is(err, identity.ErrPrecondition) {
			t.Errorf("without roots: %v", err)
		}
	}
	if _, err := SignX509Pop(small, Challenge(), []byte("k")); !errors.Is(err, identity.ErrInvalid) {
		t.Errorf("signing with a small key: %v", err)
	}
	if _, err := SignX509Pop(key, []byte("short"), []byte("k")); !errors.Is(err, identity.ErrInvalid) {
		t.Errorf("signing a short challenge: %v", err)
	}
}
