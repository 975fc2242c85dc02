package ca

import (
	"bytes"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/crypto/cryptobyte"
	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"

	"countersign.io/countersign/identity"
)

// Kind is what a certificate is for.
type Kind int

// The kinds of certificate.
const (
	KindRoot   Kind = iota + 1 // an x509 authority, self-signed
	KindIssuer                 // a member's intermediate
	KindLeaf                   // an X.509-SVID
	// KindAuthority is an x509 authority below an upstream. Its maker is not ours: what an upstream may choose is not
	// linted, only what the standards demand and what the certificates below it need to verify.
	KindAuthority
)

// Serials are positive and at the most 20 bytes (RFC 5280 section 4.1.2.2); of 128 random bits, fewer than 64
// significant ones mean a broken generator.
const (
	minSerialBits = 64
	maxSerialBits = 159
)

// Finding is one fault of a certificate and the section of the standard that it offends.
type Finding struct {
	Section string
	Problem string
}

// String is both, for people.
func (f Finding) String() string { return f.Problem + " (" + f.Section + ")" }

type linter struct {
	cert     *x509.Certificate
	findings []Finding
}

func (l *linter) check(ok bool, section, format string, args ...any) {
	if !ok {
		l.findings = append(l.findings, Finding{Section: section, Problem: fmt.Sprintf(format, args...)})
	}
}

// Lint checks a parsed certificate of the trust domain against the MUSTs of X509-SVID and of RFC 5280, and against
// the house's own profile. It does not verify the signature. No finding means that it may be signed or used.
func Lint(td spiffeid.TrustDomain, cert *x509.Certificate, kind Kind) []Finding {
	l := &linter{cert: cert}
	l.basics(kind)
	l.names(td, kind)
	switch kind {
	case KindAuthority:
		l.intermediate()
	case KindRoot, KindIssuer:
		l.authority(td, kind)
	case KindLeaf:
		l.leaf()
	default:
		l.check(false, "house", "certificate of an unknown kind")
	}
	return l.findings
}

// asError turns findings into one error, or nil.
func asError(findings []Finding) error {
	if len(findings) == 0 {
		return nil
	}
	s := make([]string, len(findings))
	for i, f := range findings {
		s[i] = f.String()
	}
	return fmt.Errorf("%w: certificate: %s", identity.ErrInvalid, strings.Join(s, "; "))
}

func (l *linter) basics(kind Kind) {
	c := l.cert
	least := minSerialBits
	if kind == KindAuthority {
		least = 1
	}
	l.check(c.Version == 3, "RFC 5280 section 4.1.2.1", "version %d, not 3", c.Version)
	n := c.SerialNumber
	l.check(n != nil && n.Sign() > 0 && n.BitLen() >= least && n.BitLen() <= maxSerialBits,
		"RFC 5280 section 4.1.2.2", "serial number is not a positive number of %d to %d bits", least, maxSerialBits)
	l.check(c.NotBefore.Before(c.NotAfter), "RFC 5280 section 4.1.2.5", "it ends before it starts")
	l.check(len(c.UnhandledCriticalExtensions) == 0, "RFC 5280 section 4.2", "unknown critical extensions %v", c.UnhandledCriticalExtensions)
	l.check(len(c.SubjectKeyId) > 0, "RFC 5280 section 4.2.1.2", "no subject key identifier")
	if err := CheckPublicKey(c.PublicKey); err != nil {
		l.check(false, "house", "%v", err)
	}
	ku := l.extension(2, 5, 29, 15)
	l.check(ku != nil && ku.Critical, "X509-SVID section 4.3", "key usage is missing or not critical")
	bc := l.extension(2, 5, 29, 19)
	l.check(bc != nil && bc.Critical && c.BasicConstraintsValid, "X509-SVID section 4.1", "basic constraints are missing or not critical")
}

func (l *linter) extension(oid ...int) *pkix.Extension {
	i := slices.IndexFunc(l.cert.Extensions, func(e pkix.Extension) bool { return e.Id.Equal(asn1.ObjectIdentifier(oid)) })
	if i < 0 {
		return nil
	}
	return &l.cert.Extensions[i]
}

// names checks the subject alternative name: one SPIFFE ID of the trust domain, and DNS names at the most.
func (l *linter) names(td spiffeid.TrustDomain, kind Kind) {
	const section = "X509-SVID section 2"
	san := l.extension(2, 5, 29, 17)
	if kind == KindAuthority { // it need be no SVID (section 2: of leaves), but one of another trust domain it is not
		l.check(len(l.cert.URIs) <= 1, section, "%d URI names, more than one", len(l.cert.URIs))
		if len(l.cert.URIs) == 1 {
			l.spiffeID(td, kind, l.cert.URIs[0].String())
		}
		return
	}
	if san == nil {
		l.check(false, section, "no subject alternative name")
		return
	}
	l.check(san.Critical || !l.emptySubject(), "RFC 5280 section 4.2.1.6", "the subject is empty and the subject alternative name is not critical")
	uris, dns, others := countNames(san.Value)
	l.check(others == 0, section, "names that are neither URI nor DNS name")
	l.check(uris == 1 && len(l.cert.URIs) == 1, section, "%d URI names, not exactly one", uris)
	l.check(dns <= identity.MaxDNSNames, "house", "%d DNS names: at the most %d", dns, identity.MaxDNSNames)
	if len(l.cert.URIs) == 1 {
		l.spiffeID(td, kind, l.cert.URIs[0].String())
	}
	for _, name := range l.cert.DNSNames {
		if err := identity.ParseDNSName(name); err != nil {
			l.check(false, "house", "%v", err)
		}
	}
	l.check(kind == KindLeaf || dns == 0, "house", "a CA certificate with DNS names")
}

func (l *linter) spiffeID(td spiffeid.TrustDomain, kind Kind, s string) {
	id, err := spiffeid.FromString(s)
	if err != nil || len(s) > 2048 {
		l.check(false, "X509-SVID section 2", "%.100q is no SPIFFE ID", s)
		return
	}
	l.check(id.TrustDomain() == td, "X509-SVID section 3", "%s is not of trust domain %s", id, td.Name())
	if kind == KindLeaf {
		l.check(id.Path() != "", "X509-SVID section 3.1", "the SPIFFE ID of a leaf has no path")
	} else {
		l.check(id.Path() == "", "X509-SVID section 3.2", "the SPIFFE ID of a CA has a path")
	}
}

func (l *linter) emptySubject() bool { return bytes.Equal(l.cert.RawSubject, []byte{0x30, 0x00}) }

// countNames walks the raw extension, because parsing it drops the kinds of name that it does not know.
func countNames(der []byte) (uris, dns, others int) {
	in := cryptobyte.String(der)
	var names cryptobyte.String
	if !in.ReadASN1(&names, cbasn1.SEQUENCE) || !in.Empty() {
		return 0, 0, 1
	}
	for !names.Empty() {
		var value cryptobyte.String
		var tag cbasn1.Tag
		if !names.ReadAnyASN1(&value, &tag) {
			return uris, dns, others + 1
		}
		switch tag {
		case cbasn1.Tag(2).ContextSpecific():
			dns++
		case cbasn1.Tag(6).ContextSpecific():
			uris++
		default:
			others++
		}
	}
	return uris, dns, others
}

func (l *linter) authority(td spiffeid.TrustDomain, kind Kind) {
	c := l.cert
	l.check(c.IsCA, "X509-SVID section 4.1", "a CA certificate that says it is none")
	l.check(c.KeyUsage == x509.KeyUsageCertSign, "X509-SVID section 4.3", "the key usage of a CA is not keyCertSign alone")
	l.check(len(c.ExtKeyUsage)+len(c.UnknownExtKeyUsage) == 0, "house", "a CA certificate with extended key usage")
	l.check(isEC(c.PublicKey), "house", "a CA key that is not P-256 or P-384")
	l.check(!l.emptySubject(), "RFC 5280 section 4.1.2.6", "a CA certificate without a subject")
	if kind == KindRoot {
		l.check(bytes.Equal(c.RawSubject, c.RawIssuer), "RFC 5280 section 3.2", "a root with another issuer")
		return
	}
	l.check(c.MaxPathLen == 0 && c.MaxPathLenZero, "X509-SVID section 4.1", "the path length of a member's issuer is not 0")
	l.constrained(td)
}

// intermediate checks an authority below an upstream.
func (l *linter) intermediate() {
	c := l.cert
	l.check(c.IsCA, "X509-SVID section 4.1", "it is not a certificate authority: the upstream issued it for another purpose")
	l.check(c.KeyUsage&x509.KeyUsageCertSign != 0, "X509-SVID section 4.3", "its key usage does not have keyCertSign")
	l.check(!c.MaxPathLenZero && c.MaxPathLen != 0, "X509-SVID section 4.1", "its path length is 0: the members' issuers do not fit below it")
	l.check(isEC(c.PublicKey), "house", "a CA key that is not P-256 or P-384")
	l.check(!l.emptySubject(), "RFC 5280 section 4.1.2.6", "a CA certificate without a subject")
	l.check(!bytes.Equal(c.RawSubject, c.RawIssuer), "RFC 5280 section 3.2", "it has its issuer's name")
}

// lintDownstream is the house's own profile of an authority that we sign for a cluster below.
func lintDownstream(td spiffeid.TrustDomain, cert *x509.Certificate) []Finding {
	l := &linter{cert: cert}
	l.check(cert.MaxPathLen == 1, "X509-SVID section 4.1", "the path length of an authority below is not 1")
	l.check(len(cert.URIs) == 1 && len(cert.DNSNames)+len(cert.IPAddresses)+len(cert.EmailAddresses) == 0, "X509-SVID section 2", "its name is not the trust domain's ID alone")
	l.check(cert.KeyUsage == x509.KeyUsageCertSign, "X509-SVID section 4.3", "the key usage of a CA is not keyCertSign alone")
	l.constrained(td)
	return l.findings
}

func (l *linter) constrained(td spiffeid.TrustDomain) {
	c := l.cert
	l.check(slices.Equal(c.PermittedURIDomains, []string{td.Name()}) && c.PermittedDNSDomainsCritical && len(c.ExcludedURIDomains) == 0,
		"X509-SVID section 4.2", "it is not constrained to the URIs of trust domain %s alone", td.Name())
	l.check(len(c.AuthorityKeyId) > 0, "RFC 5280 section 4.2.1.1", "no authority key identifier")
}

func (l *linter) leaf() {
	c := l.cert
	l.check(!c.IsCA, "X509-SVID section 4.1", "a leaf that says it is a CA")
	l.check(c.KeyUsage == x509.KeyUsageDigitalSignature, "X509-SVID section 4.3", "the key usage of a leaf is not digitalSignature alone")
	l.check(slices.Equal(c.ExtKeyUsage, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}) && len(c.UnknownExtKeyUsage) == 0,
		"X509-SVID section 4.4", "the extended key usage of a leaf is not serverAuth and clientAuth")
	l.check(len(c.AuthorityKeyId) > 0, "RFC 5280 section 4.2.1.1", "no authority key identifier")
}

// checkUnder checks a certificate against the one that is to sign it.
func checkUnder(cert, parent *x509.Certificate) error {
	switch {
	case !bytes.Equal(cert.RawIssuer, parent.RawSubject), !bytes.Equal(cert.AuthorityKeyId, parent.SubjectKeyId):
		return errors.New("it names another issuer")
	case cert.NotBefore.Before(parent.NotBefore), cert.NotAfter.After(parent.NotAfter):
		return errors.New("it is valid when its issuer is not")
	case bytes.Equal(cert.SubjectKeyId, parent.SubjectKeyId):
		return fmt.Errorf("%w: its key is its issuer's", identity.ErrInvalid)
	}
	return nil
}
