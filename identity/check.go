package identity

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// CheckEntry reports every fault of an entry of the trust domain, joined; nil means that it can be stored.
func CheckEntry(td spiffeid.TrustDomain, e *Entry) error {
	var errs []error
	bad := func(format string, args ...any) {
		errs = append(errs, fmt.Errorf("%w: "+format, append([]any{ErrInvalid}, args...)...))
	}
	if len(e.Selectors) == 0 {
		bad("the entry has no selectors: it would match every workload; name at least one, such as k8s:ns:default")
	}
	raw := make([]string, len(e.Selectors))
	proven := false
	for i, s := range e.Selectors {
		raw[i] = string(s)
		proven = proven || s.Proven()
	}
	if _, err := ParseSelectors(raw); err != nil {
		errs = append(errs, err)
	} else if !proven && len(e.Selectors) > 0 {
		bad("every selector is an agent's word (unix:, systemd:), so any agent of the trust domain could claim the identity: add a selector that says which agents may, such as agent:id:..., agent:kind:... or agent:kube-node:...")
	}
	if slices.ContainsFunc(e.Selectors, Selector.Fact) && KubeClusterOf(e.Selectors) == "" {
		bad("labels and owners say something within one kube cluster only: add the selector k8s:cluster:NAME, or whoever may label pods in any cluster that is registered has the identity")
	}
	errs = append(errs, checkIDTemplate(td, e.SPIFFEID))
	if t, err := ParseTemplate(e.SPIFFEID); e.Downstream && err == nil && len(t.Names()) > 0 {
		bad("SPIFFE ID %q of a downstream entry has placeholders: one identity gets a certificate authority, so write its ID out", e.SPIFFEID)
	}
	checkPower(e, bad)
	if len(e.DNSNames) > MaxDNSNames {
		bad("%d DNS names: at the most %d", len(e.DNSNames), MaxDNSNames)
	}
	for _, n := range e.DNSNames {
		errs = append(errs, checkDNSTemplate(n))
	}
	for _, ttl := range []struct {
		name string
		v    time.Duration
		max  time.Duration
	}{{"x509_ttl", e.X509TTL, MaxX509TTL}, {"jwt_ttl", e.JWTTTL, MaxJWTTL}} {
		if ttl.v != 0 && (ttl.v < MinTTL || ttl.v > ttl.max) {
			bad("%s is %v: it must be from %v to %v", ttl.name, ttl.v, MinTTL, ttl.max)
		}
	}
	checkManagedBy(e.ManagedBy, bad)
	if e.ManagedBy != "" && (e.Power() != "" || e.Downstream) {
		bad("an entry that is managed (by %s) gives no power: make one for admins and clusters below by hand", e.ManagedBy)
	}
	if len(e.Hint) > MaxHintBytes {
		bad("hint of %d bytes: at the most %d", len(e.Hint), MaxHintBytes)
	}
	for _, f := range e.FederatesWith {
		if ftd, err := spiffeid.TrustDomainFromString(f); err != nil {
			bad("federates_with %q: %v", f, err)
		} else if ftd == td {
			bad("federates_with %q is the own trust domain", f)
		}
	}
	return errors.Join(errs...)
}

func checkManagedBy(s string, bad func(string, ...any)) {
	if len(s) > MaxManagedBy || strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r > '~' }) {
		bad("managed_by of %d bytes: want at the most %d printable ones, such as workloadidentity/main/web", len(s), MaxManagedBy)
	}
}

// checkIDTemplate fills every placeholder with a sample segment: what fails then fails for every workload.
func checkIDTemplate(td spiffeid.TrustDomain, s string) error {
	t, err := ParseTemplate(s)
	if err != nil {
		return err
	}
	if _, err := t.ExpandID(td, sample(t)); err != nil {
		return err
	}
	return t.checkSegments()
}

// checkSegments refuses two names of Kubernetes that run into each other: {k8s:ns}-{k8s:sa} is a-b-c both for b-c in a and
// for c in a-b, so whoever may choose one name could have the other workload's ID. A name of Kubernetes has letters,
// digits, '-' and '.', so '_' keeps two apart, as '/' does.
func (t Template) checkSegments() error {
	open := "" // the k8s placeholder that what follows could run into
	for _, p := range t.parts {
		switch {
		case strings.ContainsAny(p.literal, "/_"):
			open = ""
		case !strings.HasPrefix(p.name, "k8s:"):
		case open != "":
			return fmt.Errorf("%w: template %q: {%s} and {%s} are in one path segment with no '_' between them, so that different workloads could get the same ID: put '/' or '_' between them", ErrInvalid, t, open, p.name)
		default:
			open = p.name
		}
	}
	return nil
}

func sample(t Template) []Selector {
	var sel []Selector
	for _, n := range t.Names() {
		sel = append(sel, Selector(n+":x"))
	}
	return SortSelectors(sel)
}

// Lengths are checked apart from this and other forms here: an expression that counts is large in memory, and agents link this package.
var dnsName = regexp.MustCompile(`^(\*\.)?([a-z0-9]([-a-z0-9]*[a-z0-9])?\.)*[a-z0-9]([-a-z0-9]*[a-z0-9])?$`)

func isDNSName(s string) bool {
	if len(s) > 253 || !dnsName.MatchString(s) {
		return false
	}
	for label := range strings.SplitSeq(s, ".") {
		if len(label) > 63 {
			return false
		}
	}
	return true
}

// ParseDNSName accepts a lower-case DNS name of at most 253 bytes, with at the most one leading wildcard label.
func ParseDNSName(s string) error {
	if !isDNSName(s) {
		return fmt.Errorf("%w: DNS name %q: want lower-case labels of letters, digits and hyphens, such as web.prod.svc", ErrInvalid, s)
	}
	return nil
}

func checkDNSTemplate(s string) error {
	t, err := ParseTemplate(s)
	if err != nil {
		return err
	}
	name, err := t.Expand(sample(t))
	if err != nil {
		return err
	}
	return ParseDNSName(name)
}

var kubeName = regexp.MustCompile(`^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$`)

func isKubeName(s string) bool { return len(s) <= 63 && kubeName.MatchString(s) }

// CheckKubeCluster reports every fault of a kube cluster's registration, joined.
func CheckKubeCluster(td spiffeid.TrustDomain, k *KubeCluster) error {
	var errs []error
	bad := func(format string, args ...any) {
		errs = append(errs, fmt.Errorf("%w: "+format, append([]any{ErrInvalid}, args...)...))
	}
	if !isKubeName(k.Name) {
		bad("kube cluster name %q: want lower-case letters, digits, - and .", k.Name)
	}
	if k.Issuer == "" {
		bad("kube cluster %q has no issuer: give the iss of its tokens (kubectl get --raw /.well-known/openid-configuration)", k.Name)
	}
	if k.Audience == "" {
		bad("kube cluster %q has no audience", k.Name)
	}
	if len(k.JWKS) > 0 && k.JWKSURL != "" {
		bad("kube cluster %q has both a JWKS and a JWKS URL: give one", k.Name)
	}
	if k.JWKSURL != "" && !strings.HasPrefix(k.JWKSURL, "https://") {
		bad("kube cluster %q: JWKS URL %q is not https", k.Name, RedactURL(k.JWKSURL))
	}
	if k.Kubeconfig != "" && k.Kubeconfig != "in-cluster" && !strings.HasPrefix(k.Kubeconfig, "/") {
		bad("kube cluster %q: kubeconfig %q: want in-cluster, or an absolute path on each member", k.Name, RedactURL(k.Kubeconfig))
	}
	if k.TokenReview && k.Kubeconfig == "" {
		bad("kube cluster %q: TokenReview needs a kubeconfig (a path on each member, or in-cluster)", k.Name)
	}
	if len(k.JWKS) == 0 && k.JWKSURL == "" && !k.TokenReview {
		bad("kube cluster %q has no way to verify a token: give a JWKS, a JWKS URL, or a kubeconfig for TokenReview", k.Name)
	}
	checkManagedBy(k.ManagedBy, bad)
	for _, a := range k.AgentAccounts {
		ns, sa, ok := strings.Cut(a, "/")
		if !ok || ns == "" || sa == "" || strings.Contains(sa, "/") {
			bad("agent account %q: want namespace/serviceaccount", a)
		}
	}
	if k.DefaultID != "" {
		if !strings.HasPrefix(k.DefaultID, "/") {
			bad("default ID %q: want a path template such as %s", k.DefaultID, DefaultKubeID)
		} else {
			errs = append(errs, checkIDTemplate(td, td.IDString()+k.DefaultID))
		}
	}
	return errors.Join(errs...)
}
