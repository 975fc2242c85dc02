package kube

import (
	"bytes"
	"errors"
	"fmt"
	"regexp"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/json"
	"github.com/go-jose/go-jose/v4/jwt"

	"countersign.io/countersign/identity"
)

// leeway is how far the clocks of a member and an API server may be apart.
const leeway = 10 * time.Second

// Claims is what a verified token proves.
type Claims struct {
	Cluster, Namespace, ServiceAccount, PodName, PodUID, NodeName string
	NodeUID                                                       string // empty if the token does not tell
	ExpiresAt                                                     time.Time
}

// Selectors are the k8s: selectors that the claims prove, sorted.
func (c *Claims) Selectors() []identity.Selector {
	return identity.SortSelectors([]identity.Selector{
		identity.Selector("k8s:cluster:" + c.Cluster),
		identity.Selector("k8s:ns:" + c.Namespace),
		identity.Selector("k8s:sa:" + c.ServiceAccount),
		identity.Selector("k8s:pod-name:" + c.PodName),
		identity.Selector("k8s:pod-uid:" + c.PodUID),
		identity.Selector("k8s:node-name:" + c.NodeName),
	})
}

// allowedAlgorithms is everything a kube API server signs with (its --service-account-signing-key-file is RSA or
// ECDSA), and nothing that a public key could be abused for.
func allowedAlgorithms() []jose.SignatureAlgorithm {
	return []jose.SignatureAlgorithm{jose.RS256, jose.RS384, jose.RS512, jose.ES256, jose.ES384, jose.ES512, jose.PS256, jose.PS384, jose.PS512}
}

// token is a parsed token: well formed, its claims consistent; not yet verified.
type token struct {
	raw    string
	jws    *jose.JSONWebSignature
	kid    string
	alg    jose.SignatureAlgorithm
	claims tokenClaims
}

// tokenClaims are those of a bound token (KEP-1205, KEP-4193).
type tokenClaims struct {
	jwt.Claims
	Kubernetes struct {
		Namespace      string `json:"namespace"`
		ServiceAccount ref    `json:"serviceaccount"`
		Pod            *ref   `json:"pod"`
		Node           *ref   `json:"node"`
	} `json:"kubernetes.io"`
}

type ref struct {
	Name string `json:"name"`
	UID  string `json:"uid"`
}

const bindHint = "use a token that the kubelet projects into the pod (a serviceAccountToken volume)"

func malformed(format string, args ...any) error {
	return fmt.Errorf("reading service account token: %w: "+format, append([]any{identity.ErrInvalid}, args...)...)
}

func refused(why reason, format string, args ...any) error {
	return &reasoned{fmt.Errorf("verifying service account token: %w: "+format, append([]any{identity.ErrUnauthenticated}, args...)...), why}
}

// parseToken reads a compact JWS (RFC 7515 section 3.1) and checks what needs no key and no clock. No text of the parsing
// libraries gets into an error: it may quote the token.
func parseToken(in []byte) (*token, error) {
	in = bytes.TrimSpace(in)
	switch {
	case len(in) == 0:
		return nil, malformed("it is empty: %s", bindHint)
	case len(in) > identity.MaxTokenBytes:
		return nil, malformed("it has %d bytes, at the most %d", len(in), identity.MaxTokenBytes)
	case bytes.Count(in, []byte{'.'}) != 2:
		return nil, malformed("it is not three parts with dots between: %s", bindHint)
	}
	t := &token{raw: string(in)}
	// White space inside would pass the base64 decoder, and so would be in what TokenReview is asked about.
	for _, c := range in {
		if c != '.' && c != '-' && c != '_' && (c < '0' || c > '9') && (c < 'A' || c > 'Z') && (c < 'a' || c > 'z') {
			return nil, malformed("it has bytes that are not base64url: %s", bindHint)
		}
	}
	var err error
	var alg *jose.ErrUnexpectedSignatureAlgorithm
	t.jws, err = jose.ParseSignedCompact(t.raw, allowedAlgorithms())
	if errors.As(err, &alg) {
		return nil, refused(badForm, "its algorithm %s is not accepted: want RS, ES or PS with 256, 384 or 512", short(string(alg.Got)))
	}
	if err != nil || len(t.jws.Signatures) != 1 {
		return nil, malformed("it is not a compact JWS: %s", bindHint)
	}
	h := t.jws.Signatures[0].Protected
	t.kid, t.alg = h.KeyID, jose.SignatureAlgorithm(h.Algorithm)
	if t.kid == "" {
		return nil, refused(badForm, "it has no key ID (kid): %s", bindHint)
	}
	if err := json.Unmarshal(t.jws.UnsafePayloadWithoutVerification(), &t.claims); err != nil {
		return nil, malformed("its claims are not those of a service account token: %s", bindHint)
	}
	if err := t.claims.check(); err != nil {
		return nil, err
	}
	return t, nil
}

var (
	dnsLabel = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)
	dnsName  = regexp.MustCompile(`^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$`)
	uid      = regexp.MustCompile(`^[A-Za-z0-9][-A-Za-z0-9._]{0,127}$`)
)

// check makes sure that every claim that is used later is there, has the form that Kubernetes gives it, and
// agrees with the subject.
func (c *tokenClaims) check() error {
	k := &c.Kubernetes
	switch {
	case c.Issuer == "":
		return refused(badForm, "it has no issuer (iss): %s", bindHint)
	case c.Expiry == nil:
		return refused(badForm, "it has no expiry (exp): %s", bindHint)
	case k.Namespace == "" || k.ServiceAccount.Name == "":
		return refused(badForm, "it is not a service account token of Kubernetes (no kubernetes.io claim): %s", bindHint)
	case k.Pod == nil || k.Pod.Name == "" || k.Pod.UID == "":
		return refused(notBound, "it is not bound to a pod: %s", bindHint)
	case k.Node == nil || k.Node.Name == "":
		return refused(notBound, "it does not name the pod's node: Kubernetes 1.30 or later puts the node into pod-bound tokens")
	}
	for _, f := range []struct {
		what, value string
		form        *regexp.Regexp
	}{
		{"namespace", k.Namespace, dnsLabel},
		{"service account", k.ServiceAccount.Name, dnsName},
		{"pod name", k.Pod.Name, dnsName},
		{"pod UID", k.Pod.UID, uid},
		{"node name", k.Node.Name, dnsName},
	} {
		if !f.form.MatchString(f.value) {
			return refused(badForm, "its %s %s does not have the form of one", f.what, short(f.value))
		}
	}
	if k.Node.UID != "" && !uid.MatchString(k.Node.UID) {
		return refused(badForm, "its node UID %s does not have the form of one", short(k.Node.UID))
	}
	if c.Subject != c.username() {
		return refused(badForm, "its subject %s is not its service account %s", short(c.Subject), c.username())
	}
	return nil
}

// username is the name of the service account as a user of the API server.
func (c *tokenClaims) username() string {
	return "system:serviceaccount:" + c.Kubernetes.Namespace + ":" + c.Kubernetes.ServiceAccount.Name
}

// checkTimes is RFC 7519 section 4.1.4 to 4.1.6.
func (c *tokenClaims) checkTimes(now time.Time) error {
	if exp := c.Expiry.Time(); !now.Before(exp.Add(leeway)) {
		return refused(expired, "it expired at %s, %s ago: the kubelet renews a projected token in time, so the file may be a copy, or a clock is wrong", exp.UTC().Format(time.RFC3339), now.Sub(exp).Round(time.Second))
	}
	if c.NotBefore != nil && now.Add(leeway).Before(c.NotBefore.Time()) {
		return refused(notYetValid, "it is not valid before %s: compare the clocks of this member and the API server", c.NotBefore.Time().UTC().Format(time.RFC3339))
	}
	if c.IssuedAt != nil && now.Add(leeway).Before(c.IssuedAt.Time()) {
		return refused(notYetValid, "it was issued at %s, which is to come: compare the clocks of this member and the API server", c.IssuedAt.Time().UTC().Format(time.RFC3339))
	}
	return nil
}

// proven turns the claims, once verified, into what callers see.
func (c *tokenClaims) proven(cluster string) *Claims {
	k := &c.Kubernetes
	return &Claims{
		Cluster: cluster, Namespace: k.Namespace, ServiceAccount: k.ServiceAccount.Name,
		PodName: k.Pod.Name, PodUID: k.Pod.UID, NodeName: k.Node.Name, NodeUID: k.Node.UID,
		ExpiresAt: c.Expiry.Time(),
	}
}

// short quotes what a stranger wrote, cut to what fits into a log line.
func short(s string) string {
	const most = 100
	if len(s) > most {
		return fmt.Sprintf("%q...", s[:most])
	}
	return fmt.Sprintf("%q", s)
}
