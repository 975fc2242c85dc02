package server

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"countersign.io/countersign/api"
	"countersign.io/countersign/attestor/node"
	"countersign.io/countersign/identity"
)

// alpnGRPC is the ALPN protocol of HTTP/2, and so of gRPC.
const alpnGRPC = "h2"

// TLSConfig is what the member's side of every TLS connection needs.
type TLSConfig struct {
	TrustDomain spiffeid.TrustDomain
	// Certificate returns the member's own SVID: leaf, issuer and the self-signed root, because a newcomer knows
	// nothing but the root's pin.
	Certificate func() (*tls.Certificate, error)
	// Bundle returns the trust domain's current bundle.
	Bundle func() *identity.Bundle
	// Authorities are the trust domain's as this member knows them; nil: only the certificate tells whose cluster this is.
	Authorities func() []identity.Authority
	Now         func() time.Time // nil: time.Now
}

// verify is ParseAndVerify at the member's own time, for certificates of this very cluster: those below ours, which have the
// same roots, may sign any name of the trust domain, a member's too.
func (c TLSConfig) verify(raw [][]byte, roots x509bundle.Source) (spiffeid.ID, error) {
	now := time.Now
	if c.Now != nil {
		now = c.Now
	}
	id, chains, err := x509svid.ParseAndVerify(raw, roots, x509svid.WithTime(now()))
	if err != nil {
		return id, err
	}
	own, err := c.lineages()
	if err != nil {
		return id, err
	}
	return id, identity.CheckSameCluster(chains, own...)
}

// lineages are what members of this cluster may show above their leaves: this one, and those that have yet to take up another
// authority, or have done so already.
func (c TLSConfig) lineages() ([][]*x509.Certificate, error) {
	own, err := c.Certificate()
	if err != nil {
		return nil, fmt.Errorf("this member has no certificate: %w", err)
	}
	ders := [][][]byte{own.Certificate}
	if c.Authorities != nil {
		for _, a := range c.Authorities() {
			if a.Kind == identity.AuthorityX509 && a.State.Vouched() {
				ders = append(ders, append([][]byte{a.Cert}, a.Chain...))
			}
		}
	}
	var out [][]*x509.Certificate
	for _, chain := range ders {
		var parsed []*x509.Certificate
		for _, der := range chain {
			x, err := x509.ParseCertificate(der)
			if err != nil {
				return nil, fmt.Errorf("parsing this cluster's own chain: %w", err)
			}
			parsed = append(parsed, x)
		}
		out = append(out, parsed)
	}
	return out, nil
}

// ServerTLS is for the one TLS port. A client certificate is optional; one that is shown must be an SVID of the
// trust domain that is valid now, or the handshake fails. What it allows is decided later: here by ALPN, per
// call by the rule table.
func ServerTLS(c TLSConfig) *tls.Config {
	roots := &bundleSource{td: c.TrustDomain, current: c.Bundle}
	return &tls.Config{
		MinVersion:     tls.VersionTLS13,
		NextProtos:     []string{alpnGRPC, api.ALPNRaft, api.ALPNAdmin},
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return c.Certificate() },
		ClientAuth:     tls.RequestClientCert,
		// A resumed session would skip VerifyPeerCertificate: who was removed from the bundle must not come back by
		// a ticket. Connections are long; tickets would save next to nothing.
		SessionTicketsDisabled: true,
		VerifyPeerCertificate: func(raw [][]byte, _ [][]*x509.Certificate) error {
			if len(raw) == 0 {
				return nil
			}
			_, err := c.verify(raw, roots)
			return err
		},
	}
}

// MemberTLS is for dialling another member: it shows the own SVID and accepts a member of the trust domain only.
// id, if not empty, is the one member it accepts.
func MemberTLS(c TLSConfig, id string) *tls.Config {
	roots := &bundleSource{td: c.TrustDomain, current: c.Bundle}
	return &tls.Config{
		MinVersion:           tls.VersionTLS13,
		NextProtos:           []string{api.ALPNRaft},
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return c.Certificate() },
		InsecureSkipVerify:   true, // SVIDs have no host names: VerifyPeerCertificate verifies
		VerifyPeerCertificate: func(raw [][]byte, _ [][]*x509.Certificate) error {
			got, err := c.verify(raw, roots)
			if err != nil {
				return err
			}
			return checkMember(got, id)
		},
	}
}

// PinnedTLS is for a newcomer's first contact: it accepts a member of any trust domain whose chain leads to the
// root with this pin (sha256:HEX of its SubjectPublicKeyInfo). td, if not zero, is the trust domain it must be.
func PinnedTLS(pin string, td spiffeid.TrustDomain) (*tls.Config, error) {
	if err := node.CheckPin(pin); err != nil {
		return nil, err
	}
	return &tls.Config{
		MinVersion:         tls.VersionTLS13,
		NextProtos:         []string{alpnGRPC},
		InsecureSkipVerify: true, // there is no bundle yet: VerifyPeerCertificate verifies against the pin
		VerifyPeerCertificate: func(raw [][]byte, _ [][]*x509.Certificate) error {
			return verifyPinned(raw, pin, td)
		},
	}, nil
}

// RootsTLS is for a newcomer's first contact where it has the trust domain's roots from somebody it believes: it accepts a member whose
// chain leads to one of them.
func RootsTLS(roots []*x509.Certificate, td spiffeid.TrustDomain) *tls.Config {
	source := x509bundle.FromX509Authorities(td, roots)
	return &tls.Config{
		MinVersion:         tls.VersionTLS13,
		NextProtos:         []string{alpnGRPC},
		InsecureSkipVerify: true, // SVIDs have no host names: VerifyPeerCertificate verifies
		VerifyPeerCertificate: func(raw [][]byte, _ [][]*x509.Certificate) error {
			id, _, err := x509svid.ParseAndVerify(raw, source)
			if err != nil {
				return fmt.Errorf("%w: it is not of this cluster, or the roots are older than its last rotation", err)
			}
			return checkMember(id, "")
		},
	}
}

func verifyPinned(raw [][]byte, pin string, td spiffeid.TrustDomain) error {
	if len(raw) == 0 {
		return errors.New("the server shows no certificate")
	}
	leaf, err := x509.ParseCertificate(raw[0])
	if err != nil {
		return fmt.Errorf("parsing the server's certificate: %w", err)
	}
	id, err := x509svid.IDFromCert(leaf)
	if err != nil {
		return err
	}
	if !td.IsZero() && id.TrustDomain() != td {
		return fmt.Errorf("the server is of trust domain %q, not %q", id.TrustDomain(), td)
	}
	var shown []*x509.Certificate
	for _, der := range raw[1:] {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return fmt.Errorf("parsing the server's chain: %w", err)
		}
		shown = append(shown, c)
	}
	if believed := node.PinnedRoots(shown, pin, time.Now()); len(believed) > 0 {
		if _, _, err := x509svid.ParseAndVerify(raw, x509bundle.FromX509Authorities(id.TrustDomain(), believed)); err != nil {
			return err
		}
		return checkMember(id, "")
	}
	return fmt.Errorf("no certificate of the server's chain has the CA pin %s: the token is of another cluster, or this is not the cluster that made it", pin)
}

func checkMember(id spiffeid.ID, want string) error {
	if identity.RoleOf(id) != identity.RoleMember {
		return fmt.Errorf("the other side is %s, which is not a member", id)
	}
	if want == "" {
		return nil
	}
	if m, err := identity.MemberID(id.TrustDomain(), want); err != nil || m != id {
		return fmt.Errorf("the other side is %s, not the member %q", id, want)
	}
	return nil
}

// bundleSource gives go-spiffe the current bundle and parses it once per change.
type bundleSource struct {
	td      spiffeid.TrustDomain
	current func() *identity.Bundle
	parsed  atomic.Pointer[parsedBundle]
}

type parsedBundle struct {
	of     *identity.Bundle
	bundle *x509bundle.Bundle
}

// GetX509BundleForTrustDomain is x509bundle.Source. It knows the own trust domain only (X509-SVID section 5.1).
func (s *bundleSource) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	if td != s.td {
		return nil, fmt.Errorf("trust domain %q is not ours (%q)", td, s.td)
	}
	now := s.current()
	if p := s.parsed.Load(); p != nil && p.of == now {
		return p.bundle, nil
	}
	if now == nil {
		return nil, errors.New("the trust domain has no bundle yet")
	}
	bundle := x509bundle.New(td)
	for _, der := range now.X509 {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("parsing the bundle: %w", err)
		}
		bundle.AddX509Authority(c)
	}
	s.parsed.Store(&parsedBundle{of: now, bundle: bundle})
	return bundle, nil
}
