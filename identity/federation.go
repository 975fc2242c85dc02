package identity

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Limits of federation. All bundles that an agent may get together stay below what one message to it can hold.
const (
	MaxFederations     = 96
	MaxFederatedX509   = 32
	MaxFederatedJWT    = 32
	MaxFederatedBytes  = 32 << 10 // of all certificates and keys of one bundle
	MaxFederatedURL    = 2048
	MaxFederatedKeyID  = 256
	DefaultRefreshHint = 5 * time.Minute // where a bundle names none (SPIFFE Federation, section 4.1)
)

// The profiles of a bundle endpoint (SPIFFE Federation, section 5.2).
const (
	ProfileWeb    = "https_web"    // authenticated by the web's certificate authorities
	ProfileSPIFFE = "https_spiffe" // authenticated by an SVID, and the bundle that is held already
)

// Federation is a relationship with another trust domain: where its bundle is fetched from, and the last one that was good.
type Federation struct {
	TrustDomain string `json:"trust_domain"`
	URL         string `json:"url"`
	Profile     string `json:"profile"`
	EndpointID  string `json:"endpoint_id,omitempty"` // https_spiffe: the SPIFFE ID that the endpoint must have
	// Bundle is what the trust domain's identities are verified by; nil: none was pinned, and none fetched yet.
	Bundle    *FederatedBundle `json:"bundle,omitempty"`
	CreatedAt time.Time        `json:"created_at,omitzero"`
	ManagedBy string           `json:"managed_by,omitempty"` // as of an entry
	Revision  uint64           `json:"revision,omitempty"`   // of the last change of the relationship, its bundle left out
}

// FederatedBundle is another trust domain's bundle as replicated.
type FederatedBundle struct {
	Sequence    uint64            `json:"sequence,omitempty"`     // 0: the partner gives none
	RefreshHint time.Duration     `json:"refresh_hint,omitempty"` // 0: the partner gives none
	X509        [][]byte          `json:"x509,omitempty"`         // DER, sorted
	JWT         map[string][]byte `json:"jwt,omitempty"`          // kid -> PKIX DER
	TakenAt     time.Time         `json:"taken_at,omitzero"`      // when this content was pinned, or fetched for the first time
	Pinned      bool              `json:"pinned,omitempty"`       // by an operator, not fetched
	Revision    uint64            `json:"revision,omitempty"`
}

// Bundle is the bundle as workloads see it.
func (b *FederatedBundle) Bundle(td spiffeid.TrustDomain) *Bundle {
	out := &Bundle{TrustDomain: td, Sequence: b.Sequence, RefreshHint: b.RefreshHint, X509: b.X509, JWT: b.JWT}
	if out.JWT == nil {
		out.JWT = map[string][]byte{}
	}
	return out
}

// SameKeys reports whether two bundles vouch for the same; both have their certificates sorted.
func (b *FederatedBundle) SameKeys(o *FederatedBundle) bool {
	return slices.EqualFunc(b.X509, o.X509, bytes.Equal) && maps.EqualFunc(b.JWT, o.JWT, bytes.Equal)
}

// CheckNext refuses a bundle that is older than the last one: an endpoint that lags, or somebody who replays an answer, must not
// bring back what the partner has revoked.
func (f *Federation) CheckNext(next uint64) error {
	if f.Bundle == nil || next >= f.Bundle.Sequence {
		return nil
	}
	return fmt.Errorf("%w: the bundle of %q went back from sequence %d to %d: if %q was set up anew, pin its new bundle (countersign federation update %s --bundle-file, or --invite)",
		ErrPrecondition, f.TrustDomain, f.Bundle.Sequence, next, f.TrustDomain, f.TrustDomain)
}

// FederationStatus is how the refreshing of a relationship stands, in the memory of the member that leads.
type FederationStatus struct {
	LastAttempt, LastSuccess, NextRefresh time.Time
	Failures                              int    // in a row
	LastError                             string // of the last attempt; empty: it was good
	Warning                               string // what is odd in what the partner publishes
}

// BundleEndpointID is the SPIFFE ID of the trust domain's bundle endpoint: the same on every member, because a partner
// compares it exactly and must be able to ask any of them.
func BundleEndpointID(td spiffeid.TrustDomain) (spiffeid.ID, error) {
	return spiffeid.FromSegments(td, ReservedPath, "bundle-endpoint")
}

// CheckFederation reports every fault of a relationship of the trust domain, joined; its bundle is the store's to check. The
// trust domain, the URL and the profile are given, none is inferred (SPIFFE Federation, section 5.1).
func CheckFederation(own spiffeid.TrustDomain, f *Federation) error {
	var errs []error
	bad := func(format string, args ...any) {
		errs = append(errs, fmt.Errorf("%w: "+format, append([]any{ErrInvalid}, args...)...))
	}
	td, err := spiffeid.TrustDomainFromString(f.TrustDomain)
	switch {
	case err != nil:
		bad("trust domain %q: %v", f.TrustDomain, err)
	case td.Name() != f.TrustDomain:
		bad("trust domain %q: write the bare name %q", f.TrustDomain, td.Name())
	case td == own:
		bad("%q is the own trust domain: it needs no federation", f.TrustDomain)
	}
	if err := CheckBundleURL(f.URL); err != nil {
		errs = append(errs, err)
	}
	checkManagedBy(f.ManagedBy, bad)
	switch f.Profile {
	case ProfileWeb:
		if f.EndpointID != "" {
			bad("an endpoint ID (%q) is for profile %s: one of %s is known by its URL's host", f.EndpointID, ProfileSPIFFE, ProfileWeb)
		}
	case ProfileSPIFFE:
		id, err := spiffeid.FromString(f.EndpointID)
		switch {
		case err != nil:
			bad("endpoint ID %q: %v", f.EndpointID, err)
		case id.TrustDomain().Name() != f.TrustDomain || id.Path() == "":
			bad("endpoint ID %q: want the ID of a workload of trust domain %q, whose bundle it serves", f.EndpointID, f.TrustDomain)
		}
	default:
		bad("profile %q: want %s or %s", f.Profile, ProfileSPIFFE, ProfileWeb)
	}
	return errors.Join(errs...)
}

// CheckBundleURL accepts an endpoint's URL: https, without user and password (SPIFFE Federation, sections 5.2.1 and 5.2.2).
func CheckBundleURL(s string) error {
	if len(s) > MaxFederatedURL {
		return fmt.Errorf("%w: a URL of %d bytes: at the most %d", ErrInvalid, len(s), MaxFederatedURL)
	}
	u, err := url.Parse(s)
	switch {
	case err != nil:
		return fmt.Errorf("%w: URL %q: want https://host[:port]/path", ErrInvalid, RedactURL(s))
	case u.User != nil:
		return fmt.Errorf("%w: URL %q has a user or a password: an endpoint asks nobody who he is", ErrInvalid, RedactURL(s))
	case u.Scheme != "https" || u.Host == "" || u.Hostname() == "" || u.Opaque != "":
		return fmt.Errorf("%w: URL %q: want https://host[:port]/path", ErrInvalid, RedactURL(s))
	case u.Fragment != "":
		return fmt.Errorf("%w: URL %q has a fragment, which no server sees: leave it out", ErrInvalid, RedactURL(s))
	}
	return nil
}

// CheckIssuer checks the issuer of JWT-SVIDs: an https URL that can be compared byte for byte (OpenID Connect Discovery 1.0,
// section 3), with a path of plain segments or none.
func CheckIssuer(s string) error {
	if err := CheckBundleURL(s); err != nil {
		return err
	}
	u, err := url.Parse(s)
	if err != nil || strings.ContainsAny(s, "?#") || strings.HasSuffix(s, "/") || u.String() != s || s != strings.ToLower(s[:len(s)-len(u.Path)])+u.Path {
		return fmt.Errorf("%w: issuer %q: want https://host[:port][/path], the host in lower case, nothing behind it and no slash at its end", ErrInvalid, RedactURL(s))
	}
	if u.Path == "" {
		return nil
	}
	for _, segment := range strings.Split(u.Path[1:], "/") {
		if segment == "" || segment == "." || segment == ".." || strings.Trim(segment, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._~") != "" {
			return fmt.Errorf("%w: issuer %q: path segment %q: want letters, digits, and - . _ ~", ErrInvalid, s, segment)
		}
	}
	return nil
}
