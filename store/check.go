package store

import (
	"bytes"
	"cmp"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"countersign.io/countersign/identity"
)

// What a Writer refuses before it proposes. Unlike Apply's own rules, these may change between versions.

// maxNameBytes bounds the IDs that are one path segment.
const maxNameBytes = 128

func checkName(what, s string) error {
	if len(s) > maxNameBytes {
		return fmt.Errorf("%w: %s of %d bytes: at the most %d", identity.ErrInvalid, what, len(s), maxNameBytes)
	}
	if err := spiffeid.ValidatePathSegment(s); err != nil {
		return fmt.Errorf("%w: %s %q: want letters, digits, dots, hyphens and underscores", identity.ErrInvalid, what, s)
	}
	return nil
}

// checkEntry brings the selectors into order as well.
func (w *Writer) checkEntry(e *identity.Entry) error {
	e.Selectors = identity.SortSelectors(slices.Clone(e.Selectors))
	if err := errors.Join(checkName("entry ID", e.ID), identity.CheckEntry(w.store.td, e)); err != nil {
		return err
	}
	return w.need(levelOfEntry(e), "a downstream entry, an admin's role, a managed entry, or a selector of labels or owners,")
}

func checkNewToken(t *identity.JoinToken) error {
	errs := []error{checkName("join token ID", t.ID)}
	if len(t.Hash) != sha256.Size {
		errs = append(errs, fmt.Errorf("%w: join token %s: hash of %d bytes, not %d", identity.ErrInvalid, t.ID, len(t.Hash), sha256.Size))
	}
	if t.Purpose != identity.JoinAgent && t.Purpose != identity.JoinServer {
		errs = append(errs, fmt.Errorf("%w: join token purpose %q: want %s or %s", identity.ErrInvalid, t.Purpose, identity.JoinAgent, identity.JoinServer))
	}
	if t.ExpiresAt.IsZero() {
		errs = append(errs, fmt.Errorf("%w: join token %s never expires: give it an end", identity.ErrInvalid, t.ID))
	}
	return errors.Join(errs...)
}

func (w *Writer) checkAgent(a *identity.Agent) error {
	id, err := spiffeid.FromString(a.ID)
	if err != nil || id.TrustDomain() != w.store.td || identity.RoleOf(id) != identity.RoleAgent {
		return fmt.Errorf("%w: agent ID %q: want one of trust domain %q below /%s/agent/", identity.ErrInvalid, a.ID, w.store.td.Name(), identity.ReservedPath)
	}
	if a.Kind == "" {
		return fmt.Errorf("%w: agent %s has no kind", identity.ErrInvalid, a.ID)
	}
	return nil
}

// checkAuthority refuses as well what the cluster's level does not have yet.
func (w *Writer) checkAuthority(a *identity.Authority) error {
	errs := []error{checkName("authority ID", a.ID)}
	bad := func(what string) {
		errs = append(errs, fmt.Errorf("%w: authority %s %s: %s", identity.ErrInvalid, a.Kind, a.ID, what))
	}
	switch a.Kind {
	case identity.AuthorityX509:
		if len(a.Cert) == 0 {
			bad("no certificate")
		}
		if (len(a.Roots) > 0) != (a.Upstream != "") || len(a.Chain) > 0 && len(a.Roots) == 0 {
			bad("roots, chain and upstream go together: an authority below an upstream has its roots and its name")
		}
		for what, certs := range map[string][][]byte{"chain": a.Chain, "root": a.Roots, "certificate that vouches for it": a.Vouched} {
			if err := checkCAs(certs); err != nil {
				bad(fmt.Sprintf("%s: %v", what, err))
			}
		}
	case identity.AuthorityJWT:
		if len(a.Cert)+len(a.Chain)+len(a.Roots)+len(a.Upstream) > 0 {
			bad("a JWT authority has no certificate")
		}
	default:
		bad("unknown kind")
	}
	switch a.State {
	case identity.AuthorityPrepared, identity.AuthorityActive, identity.AuthorityRetiring: // new ones get into no other
	default:
		bad(fmt.Sprintf("unknown state %q", a.State))
	}
	if len(a.PublicKey) == 0 {
		bad("no public key")
	}
	if (len(a.SealedKey) == 0) == (a.KeyURI == "") {
		bad("want a sealed private key, or the URI of one")
	}
	if strings.Contains(strings.ToLower(a.KeyURI), "pin-value") {
		bad("the key's URI has a PIN in it: every member would store it; name a file of each member instead (pin-source)")
	}
	if len(a.KeyURI) > maxURIBytes || len(a.Upstream) > maxURIBytes {
		bad(fmt.Sprintf("a URI of %d bytes: at the most %d", max(len(a.KeyURI), len(a.Upstream)), maxURIBytes))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return w.need(levelOfAuthority(a), "an authority below an upstream, or with its key elsewhere,")
}

// The limits of what an upstream, or another cluster of the trust domain, adds to the bundle: all workloads hold it.
const (
	maxURIBytes    = 2048
	maxCerts       = 32 // in a chain, or as roots
	maxCertBytes   = 16 << 10
	maxForeignKeys = 32
	maxKeyIDBytes  = 256
	maxPublicKey   = 4096 // bytes, PKIX
	minRSABits     = 2048
	minECBits      = 256
	maxSourceBytes = 2048
)

func checkCAs(certs [][]byte) error {
	if len(certs) > maxCerts {
		return fmt.Errorf("%d certificates: at the most %d", len(certs), maxCerts)
	}
	for i, der := range certs {
		if err := checkCA(der); err != nil {
			return fmt.Errorf("certificate %d: %w", i+1, err)
		}
	}
	return nil
}

func checkCA(der []byte) error {
	if len(der) > maxCertBytes {
		return fmt.Errorf("%d bytes: at the most %d", len(der), maxCertBytes)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return err
	}
	if !c.BasicConstraintsValid || !c.IsCA || c.KeyUsage != 0 && c.KeyUsage&x509.KeyUsageCertSign == 0 {
		return errors.New("it is not a CA's")
	}
	return nil
}

// checkForeign brings the roots and the keys into order as well.
func (w *Writer) checkForeign(f *identity.Foreign) error {
	var errs []error
	bad := func(format string, args ...any) {
		errs = append(errs, fmt.Errorf("%w: keys of %q: "+format, append([]any{identity.ErrInvalid, f.Source}, args...)...))
	}
	if f.Source != identity.SourceUpstream {
		if len(f.X509) > 0 {
			bad("roots of a cluster below: its certificates come from ours")
		}
		if id, err := spiffeid.FromString(f.Source); err != nil || id.TrustDomain() != w.store.td || id.Path() == "" || len(f.Source) > maxSourceBytes {
			bad("want %q, or a SPIFFE ID of trust domain %q", identity.SourceUpstream, w.store.td.Name())
		}
	}
	if len(f.X509) > maxCerts || len(f.JWT) > maxForeignKeys {
		bad("%d roots and %d JWT keys: at the most %d and %d", len(f.X509), len(f.JWT), maxCerts, maxForeignKeys)
		return errors.Join(errs...)
	}
	for i, der := range f.X509 {
		if err := checkCA(der); err != nil {
			bad("root %d: %v", i+1, err)
		}
	}
	f.X509 = slices.SortedFunc(slices.Values(f.X509), bytes.Compare)
	f.X509 = slices.CompactFunc(f.X509, bytes.Equal)
	f.JWT = slices.SortedFunc(slices.Values(f.JWT), func(a, b identity.JWTKey) int { return cmp.Compare(a.ID, b.ID) })
	for i, k := range f.JWT {
		if k.ID == "" || len(k.ID) > maxKeyIDBytes || !utf8.ValidString(k.ID) {
			bad("a key ID of %d bytes: want 1 to %d, in UTF-8", len(k.ID), maxKeyIDBytes)
		}
		if i > 0 && k.ID == f.JWT[i-1].ID {
			bad("two keys %q", k.ID)
		}
		if k.NotAfter.IsZero() {
			bad("key %q never expires: give it an end", k.ID)
		}
		if err := checkPublicKey(k.PublicKey); err != nil {
			bad("key %q: %v", k.ID, err)
		}
	}
	return errors.Join(errs...)
}

func checkPublicKey(der []byte) error {
	if len(der) > maxPublicKey {
		return fmt.Errorf("%d bytes: at the most %d", len(der), maxPublicKey)
	}
	pub, err := x509.ParsePKIXPublicKey(der)
	if err != nil {
		return err
	}
	switch k := pub.(type) {
	case *ecdsa.PublicKey:
		if k.Curve.Params().BitSize >= minECBits {
			return nil
		}
		return fmt.Errorf("an elliptic curve of %d bits: want %d or more", k.Curve.Params().BitSize, minECBits)
	case *rsa.PublicKey:
		if k.N.BitLen() >= minRSABits {
			return nil
		}
		return fmt.Errorf("RSA of %d bits: want %d or more", k.N.BitLen(), minRSABits)
	}
	return fmt.Errorf("a %T signs no JWT-SVID", pub)
}

func (w *Writer) checkMember(m *identity.Member) error {
	errs := []error{checkName("member ID", m.ID)}
	if m.Address == "" || len(m.Address) > 512 {
		errs = append(errs, fmt.Errorf("%w: member %s: address of %d bytes: want host:port", identity.ErrInvalid, m.ID, len(m.Address)))
	}
	return errors.Join(errs...)
}
