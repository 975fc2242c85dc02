package ca

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"math/big"
	"net/url"
	"strings"
	"testing"
	"time"

	casapi "github.com/smallstep/certificates/cas/apiv1"
	"github.com/smallstep/certificates/cas/softcas"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.step.sm/crypto/x509util"

	"countersign.io/countersign/identity"
)

// template is the leaf as the standard library is told of it.
func (l *leaf) template(pub crypto.PublicKey) *x509.Certificate {
	u, err := url.Parse(l.id)
	if err != nil {
		panic(err)
	}
	return &x509.Certificate{
		SerialNumber: l.serial, NotBefore: l.notBefore, NotAfter: l.notAfter,
		SubjectKeyId: l.keyID, PublicKey: pub,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
		DNSNames:              l.dnsNames,
		URIs:                  []*url.URL{u},
	}
}

// sameAsLibrary encodes the leaf both ways.
func sameAsLibrary(t *testing.T, is *issuer, l *leaf, pub crypto.PublicKey) {
	t.Helper()
	var err error
	if l.publicKey, err = x509.MarshalPKIXPublicKey(pub); err != nil {
		t.Fatal(err)
	}
	if l.keyID, err = x509util.GenerateSubjectKeyID(pub); err != nil {
		t.Fatal(err)
	}
	got, err := is.encoder.encode(l)
	if err != nil {
		t.Fatal(err)
	}
	whole, err := x509.CreateCertificate(rand.Reader, l.template(pub), is.cert, pub, is.key)
	if err != nil {
		t.Fatal(err)
	}
	want := parse(t, whole)
	if !bytes.Equal(got, want.RawTBSCertificate) {
		t.Errorf("the TBSCertificate is not that of x509.CreateCertificate:\n got %x\nwant %x", got, want.RawTBSCertificate)
	}
	// And with the library's own signature, the whole.
	if wrapped, err := wrapSigned(got, want.Signature); err != nil || !bytes.Equal(wrapped, whole) {
		t.Errorf("the Certificate is not that of x509.CreateCertificate: %v", err)
	}
}

func someLeaf() *leaf {
	at := time.Date(2026, 7, 1, 12, 0, 0, 0, time.UTC)
	return &leaf{serial: newSerial(), notBefore: at, notAfter: at.Add(time.Hour), id: workload().String()}
}

func TestLeafEncoderMatchesLibrary(t *testing.T) {
	is := newRig(t).state.Load().issuer
	keys := publicKeys(t)
	for kind, pub := range keys {
		t.Run(kind, func(t *testing.T) { sameAsLibrary(t, is, someLeaf(), pub) })
	}
	long := strings.Repeat("/abcdefghijklmno", 127)
	var names []string
	for i := range identity.MaxDNSNames {
		names = append(names, fmt.Sprintf("%s.n%d.example.org", strings.Repeat("x", 63), i))
	}
	for name, change := range map[string]func(*leaf){
		"high bit in the serial": func(l *leaf) { l.serial = new(big.Int).SetBytes(bytes.Repeat([]byte{0xff}, 16)) },
		"short serial":           func(l *leaf) { l.serial = big.NewInt(0x7f) },
		"serial with leading 0":  func(l *leaf) { l.serial = new(big.Int).SetBytes(append([]byte{0, 0x80}, make([]byte, 14)...)) },
		"one DNS name":           func(l *leaf) { l.dnsNames = []string{"web"} },
		"wildcard":               func(l *leaf) { l.dnsNames = []string{"*.web.example.org"} },
		"all DNS names":          func(l *leaf) { l.dnsNames = names },
		"short ID":               func(l *leaf) { l.id = "spiffe://example.org/a" },
		"every character":        func(l *leaf) { l.id = "spiffe://example.org/aZ09.-_/..." },
		"longest ID":             func(l *leaf) { l.id = ("spiffe://example.org" + long)[:2048] },
		"longest of all":         func(l *leaf) { l.id, l.dnsNames = ("spiffe://example.org" + long)[:2048], names },
		"end of 2049":            func(l *leaf) { l.notAfter = time.Date(2049, 12, 31, 23, 59, 59, 0, time.UTC) },
		"start of 2050":          func(l *leaf) { l.notAfter = time.Date(2050, 1, 1, 0, 0, 0, 0, time.UTC) },
		"after 2050":             func(l *leaf) { l.notBefore, l.notAfter = l.notBefore.AddDate(50, 0, 0), l.notAfter.AddDate(50, 0, 0) },
	} {
		t.Run(name, func(t *testing.T) {
			for kind, pub := range keys {
				l := someLeaf()
				change(l)
				t.Run(kind, func(t *testing.T) { sameAsLibrary(t, is, l, pub) })
			}
		})
	}
}

// Issuers differ in name (its length and its string type) and in key identifier.
func TestLeafEncoderMatchesLibraryUnderEveryIssuer(t *testing.T) {
	for _, member := range []string{"a", "m1.example.org", "under_score", strings.Repeat("m", 200)} {
		r := newRig(t, func(c *Config) { c.MemberName = member })
		sameAsLibrary(t, r.state.Load().issuer, someLeaf(), newP256(t).Public())
	}
}

// spell writes s in the letters of an alphabet.
func spell(s, alphabet string) string {
	out := []byte(s)
	for i, c := range out {
		out[i] = alphabet[int(c)%len(alphabet)]
	}
	return string(out)
}

func FuzzLeafEncoder(f *testing.F) {
	r := newRig(f)
	is, keys := r.state.Load().issuer, publicKeys(f)
	kinds := []string{"P-256", "P-384", "Ed25519", "RSA-2048"}
	f.Fuzz(func(t *testing.T, kind uint8, serial []byte, start int64, seconds uint32, path, dns string) {
		// Whatever comes is turned into something valid, so that hardly an input is wasted.
		path = "/x" + spell(path, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.")
		id, err := spiffeid.FromPath(r.td, path[:min(len(path), 2000)])
		if err != nil || len(serial) > 19 {
			return
		}
		var names []string
		for _, n := range strings.Fields(dns)[:min(len(strings.Fields(dns)), identity.MaxDNSNames)] {
			names = append(names, spell(n[:min(len(n), 60)], "abcdefghijklmnopqrstuvwxyz0123456789"))
		}
		if names, err = checkDNSNames(names); err != nil {
			t.Fatal(err)
		}
		l := someLeaf()
		l.id, l.dnsNames = id.String(), names
		if l.serial = new(big.Int).SetBytes(serial); l.serial.Sign() == 0 {
			return
		}
		// 1950 to 9999 is what both times can express together.
		l.notBefore = time.Unix(start, 0).UTC()
		l.notAfter = l.notBefore.Add(time.Duration(seconds) * time.Second)
		if l.notBefore.Year() < 1950 || l.notAfter.Year() > 9999 {
			return
		}
		sameAsLibrary(t, is, l, keys[kinds[int(kind)%len(kinds)]])
	})
}

// softcas makes of the same template a certificate whose signed part is the same, byte for byte; so a leaf of ours is
// a leaf of softcas.
func TestSoftCASGivesTheSameLeaf(t *testing.T) {
	r := newRig(t)
	is := r.state.Load().issuer
	cas, err := softcas.New(t.Context(), casapi.Options{CertificateChain: []*x509.Certificate{is.cert}, Signer: is.key})
	if err != nil {
		t.Fatal(err)
	}
	for kind, pub := range publicKeys(t) {
		t.Run(kind, func(t *testing.T) {
			svid, ours := r.mustIssue(t, identity.Issuance{ID: workload(), PublicKey: pub, DNSNames: []string{"web", "*.web"}, TTL: time.Minute})
			l := &leaf{serial: ours.SerialNumber, notBefore: svid.NotBefore, notAfter: svid.NotAfter, keyID: ours.SubjectKeyId, dnsNames: []string{"web", "*.web"}, id: svid.ID.String()}
			resp, err := cas.CreateCertificate(&casapi.CreateCertificateRequest{Template: l.template(pub), Lifetime: time.Minute})
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(resp.Certificate.RawTBSCertificate, ours.RawTBSCertificate) {
				t.Error("softcas encodes another certificate")
			}
			if err := ours.CheckSignatureFrom(is.cert); err != nil {
				t.Error(err)
			}
			if f := Lint(r.td, resp.Certificate, KindLeaf); len(f) != 0 {
				t.Errorf("softcas's leaf: %v", f)
			}
		})
	}
}
