package ca

import (
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"math/big"
	"net"
	"net/url"
	"slices"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func refused(t *testing.T, findings []Finding, section string) {
	t.Helper()
	if !slices.ContainsFunc(findings, func(f Finding) bool { return f.Section == section }) {
		t.Errorf("findings %v: none of %s", findings, section)
	}
}

func uri(s string) *url.URL {
	u, err := url.Parse(s)
	if err != nil {
		panic(err)
	}
	return u
}

// goodTemplate is a template that lints clean as kind.
func goodTemplate(kind Kind) *x509.Certificate {
	now := time.Date(2026, 7, 1, 12, 0, 0, 0, time.UTC)
	switch kind {
	case KindLeaf:
		return &x509.Certificate{
			SerialNumber: newSerial(), NotBefore: now, NotAfter: now.Add(time.Hour), SubjectKeyId: []byte{1, 2, 3},
			KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true,
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
			URIs:        []*url.URL{uri("spiffe://example.org/web")},
		}
	case KindIssuer:
		c := caTemplate(testTD(), "m1", now, now.Add(time.Hour))
		c.MaxPathLenZero, c.PermittedURIDomains, c.PermittedDNSDomainsCritical = true, []string{"example.org"}, true
		return c
	case KindAuthority: // as an upstream may well make it
		c := caTemplate(testTD(), "example.org", now, now.Add(time.Hour))
		c.SerialNumber, c.URIs, c.MaxPathLen, c.KeyUsage = big.NewInt(1), nil, 1, x509.KeyUsageCertSign|x509.KeyUsageCRLSign
		return c
	}
	return caTemplate(testTD(), "example.org", now, now.Add(time.Hour))
}

// signed makes the certificate that a template describes, under a CA of no consequence; a root signs itself.
func signed(t *testing.T, kind Kind, tmpl *x509.Certificate, pub any) *x509.Certificate {
	t.Helper()
	key := newP256(t)
	parent := goodTemplate(KindRoot)
	parent.SubjectKeyId = []byte{9, 9}
	if kind == KindRoot {
		parent = tmpl
	}
	if pub == nil {
		pub = key.Public()
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, pub, key)
	if err != nil {
		t.Fatal(err)
	}
	return parse(t, der)
}

func TestLintPassesGood(t *testing.T) {
	for _, kind := range []Kind{KindRoot, KindIssuer, KindLeaf, KindAuthority} {
		if f := Lint(testTD(), signed(t, kind, goodTemplate(kind), nil), kind); len(f) != 0 {
			t.Errorf("kind %d: %v", kind, f)
		}
	}
}

// One fault at a time, in certificates that were really encoded and parsed.
func TestLintRefuses(t *testing.T) {
	otherName := func(c *x509.Certificate) {
		value, err := asn1.Marshal([]asn1.RawValue{
			{Class: 2, Tag: 6, Bytes: []byte("spiffe://example.org/web")},
			{Class: 2, Tag: 8, Bytes: []byte{0x2a, 0x03}}, // registeredID
		})
		if err != nil {
			t.Fatal(err)
		}
		c.URIs = nil
		c.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Critical: true, Value: value}}
	}
	san := func(critical bool, values ...string) func(c *x509.Certificate) {
		return func(c *x509.Certificate) {
			var raw []asn1.RawValue
			for _, v := range values {
				raw = append(raw, asn1.RawValue{Class: 2, Tag: 6, Bytes: []byte(v)})
			}
			value, err := asn1.Marshal(raw)
			if err != nil {
				t.Fatal(err)
			}
			c.URIs = nil
			c.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Critical: critical, Value: value}}
		}
	}
	uncritical := func(value []byte, oid ...int) func(c *x509.Certificate) {
		return func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier(oid), Value: value}}
		}
	}
	for _, c := range []struct {
		name    string
		kind    Kind
		section string
		fault   func(*x509.Certificate)
	}{
		{"two URIs", KindLeaf, "X509-SVID section 2", func(c *x509.Certificate) { c.URIs = append(c.URIs, uri("spiffe://example.org/db")) }},
		{"the same URI twice", KindLeaf, "X509-SVID section 2", san(true, "spiffe://example.org/web", "spiffe://example.org/web")},
		{"no URI", KindLeaf, "X509-SVID section 2", func(c *x509.Certificate) { c.URIs, c.DNSNames = nil, []string{"web"} }},
		{"no names at all", KindLeaf, "X509-SVID section 2", func(c *x509.Certificate) { c.URIs = nil }},
		{"an e-mail address", KindLeaf, "X509-SVID section 2", func(c *x509.Certificate) { c.EmailAddresses = []string{"a@example.org"} }},
		{"an IP address", KindLeaf, "X509-SVID section 2", func(c *x509.Certificate) { c.IPAddresses = []net.IP{net.IPv4(10, 0, 0, 1)} }},
		{"a name that parsing drops", KindLeaf, "X509-SVID section 2", otherName},
		{"https", KindLeaf, "X509-SVID section 2", func(c *x509.Certificate) { c.URIs[0] = uri("https://example.org/web") }},
		{"a query", KindLeaf, "X509-SVID section 2", func(c *x509.Certificate) { c.URIs[0] = uri("spiffe://example.org/web?a=b") }},
		{"a trailing slash", KindLeaf, "X509-SVID section 2", func(c *x509.Certificate) { c.URIs[0] = uri("spiffe://example.org/web/") }},
		{"another trust domain", KindLeaf, "X509-SVID section 3", func(c *x509.Certificate) { c.URIs[0] = uri("spiffe://other.org/web") }},
		{"a leaf without path", KindLeaf, "X509-SVID section 3.1", func(c *x509.Certificate) { c.URIs[0] = uri("spiffe://example.org") }},
		{"an issuer with path", KindIssuer, "X509-SVID section 3.2", func(c *x509.Certificate) { c.URIs[0] = uri("spiffe://example.org/web") }},
		{"a root with path", KindRoot, "X509-SVID section 3.2", func(c *x509.Certificate) { c.URIs[0] = uri("spiffe://example.org/web") }},
		{"SAN not critical", KindLeaf, "RFC 5280 section 4.2.1.6", san(false, "spiffe://example.org/web")},
		{"a leaf that is a CA", KindLeaf, "X509-SVID section 4.1", func(c *x509.Certificate) { c.IsCA = true }},
		{"a leaf without basic constraints", KindLeaf, "X509-SVID section 4.1", func(c *x509.Certificate) { c.BasicConstraintsValid = false }},
		{"an issuer that is no CA", KindIssuer, "X509-SVID section 4.1", func(c *x509.Certificate) { c.IsCA, c.MaxPathLenZero = false, false }},
		{"a root that is no CA", KindRoot, "X509-SVID section 4.1", func(c *x509.Certificate) { c.IsCA = false }},
		{"an issuer of longer paths", KindIssuer, "X509-SVID section 4.1", func(c *x509.Certificate) { c.MaxPathLen, c.MaxPathLenZero = 1, false }},
		{"an unconstrained issuer", KindIssuer, "X509-SVID section 4.2", func(c *x509.Certificate) { c.PermittedURIDomains = nil }},
		{"an issuer for all below", KindIssuer, "X509-SVID section 4.2", func(c *x509.Certificate) { c.PermittedURIDomains = []string{".example.org"} }},
		{"an issuer for two", KindIssuer, "X509-SVID section 4.2", func(c *x509.Certificate) { c.PermittedURIDomains = []string{"example.org", "other.org"} }},
		{"constraints not critical", KindIssuer, "X509-SVID section 4.2", func(c *x509.Certificate) { c.PermittedDNSDomainsCritical = false }},
		{"no key usage", KindLeaf, "X509-SVID section 4.3", func(c *x509.Certificate) { c.KeyUsage = 0 }},
		{"key usage not critical", KindLeaf, "X509-SVID section 4.3", uncritical([]byte{3, 2, 7, 0x80}, 2, 5, 29, 15)},
		{"a leaf with keyCertSign", KindLeaf, "X509-SVID section 4.3", func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign }},
		{"a leaf with cRLSign", KindLeaf, "X509-SVID section 4.3", func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCRLSign }},
		{"an issuer without keyCertSign", KindIssuer, "X509-SVID section 4.3", func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCRLSign }},
		{"serverAuth alone", KindLeaf, "X509-SVID section 4.4", func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[:1] }},
		{"clientAuth alone", KindLeaf, "X509-SVID section 4.4", func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[1:] }},
		{"any usage", KindLeaf, "X509-SVID section 4.4", func(c *x509.Certificate) { c.ExtKeyUsage = append(c.ExtKeyUsage, x509.ExtKeyUsageAny) }},
		{"a small serial", KindLeaf, "RFC 5280 section 4.1.2.2", func(c *x509.Certificate) { c.SerialNumber = big.NewInt(1) }},
		{"a large serial", KindLeaf, "RFC 5280 section 4.1.2.2", func(c *x509.Certificate) { c.SerialNumber = new(big.Int).Lsh(big.NewInt(1), 160) }},
		{"ends before it starts", KindLeaf, "RFC 5280 section 4.1.2.5", func(c *x509.Certificate) { c.NotAfter = c.NotBefore.Add(-time.Second) }},
		{"no subject key ID", KindLeaf, "RFC 5280 section 4.2.1.2", func(c *x509.Certificate) { c.SubjectKeyId = nil }},
		{"a CA without subject", KindIssuer, "RFC 5280 section 4.1.2.6", func(c *x509.Certificate) { c.Subject = pkix.Name{} }},
		{"unknown critical extension", KindLeaf, "RFC 5280 section 4.2", func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{1, 2, 3, 4}, Critical: true, Value: []byte{5, 0}}}
		}},
		{"an authority that is no CA", KindAuthority, "X509-SVID section 4.1", func(c *x509.Certificate) { c.IsCA, c.MaxPathLen = false, 0 }},
		{"an authority of path length 0", KindAuthority, "X509-SVID section 4.1", func(c *x509.Certificate) { c.MaxPathLen, c.MaxPathLenZero = 0, true }},
		{"an authority without keyCertSign", KindAuthority, "X509-SVID section 4.3", func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCRLSign }},
		{"an authority with a path", KindAuthority, "X509-SVID section 3.2", func(c *x509.Certificate) { c.URIs = []*url.URL{uri("spiffe://example.org/web")} }},
		{"an authority of another trust domain", KindAuthority, "X509-SVID section 3", func(c *x509.Certificate) { c.URIs = []*url.URL{uri("spiffe://other.org")} }},
		{"an authority of two", KindAuthority, "X509-SVID section 2", func(c *x509.Certificate) { c.URIs = []*url.URL{uri("spiffe://example.org"), uri("spiffe://other.org")} }},
		{"an authority without subject", KindAuthority, "RFC 5280 section 4.1.2.6", func(c *x509.Certificate) { c.Subject = pkix.Name{} }},
		{"an authority with a large serial", KindAuthority, "RFC 5280 section 4.1.2.2", func(c *x509.Certificate) { c.SerialNumber = new(big.Int).Lsh(big.NewInt(1), 160) }},
		{"upper-case DNS name", KindLeaf, "house", func(c *x509.Certificate) { c.DNSNames = []string{"Web"} }},
		{"a CA with DNS names", KindIssuer, "house", func(c *x509.Certificate) { c.DNSNames = []string{"web"} }},
		{"a CA with extended key usage", KindIssuer, "house", func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }},
	} {
		t.Run(c.name, func(t *testing.T) {
			tmpl := goodTemplate(c.kind)
			c.fault(tmpl)
			refused(t, Lint(testTD(), signed(t, c.kind, tmpl, nil), c.kind), c.section)
		})
	}
}

func TestLintRefusesKeysAndKinds(t *testing.T) {
	weak := signed(t, KindLeaf, goodTemplate(KindLeaf), newEC(t, elliptic.P521()).Public())
	refused(t, Lint(testTD(), weak, KindLeaf), "house")
	rsaCA := signed(t, KindIssuer, goodTemplate(KindIssuer), newRSA(t, 2048).Public())
	refused(t, Lint(testTD(), rsaCA, KindIssuer), "house")
	good := signed(t, KindLeaf, goodTemplate(KindLeaf), nil)
	refused(t, Lint(testTD(), good, Kind(0)), "house")
	refused(t, Lint(spiffeid.RequireTrustDomainFromString("other.org"), good, KindLeaf), "X509-SVID section 3")
	child := signed(t, KindIssuer, goodTemplate(KindRoot), nil)
	refused(t, Lint(testTD(), child, KindRoot), "RFC 5280 section 3.2")
}
