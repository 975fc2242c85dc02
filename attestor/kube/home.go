package kube

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"countersign.io/countersign/identity"
)

const (
	// MemberAudience is the audience of the token by which a pod asks to become a member. No other token will do.
	MemberAudience = "countersign-member"
	// BundleConfigMap is the ConfigMap with the trust domain's bundle, in the members' namespace.
	BundleConfigMap = "countersign-bundle"
	// BundlePEM and BundleJSON are its keys: the X.509 authorities as PEM, and the bundle in the SPIFFE format.
	BundlePEM, BundleJSON = "bundle.pem", "bundle.json"
	// trustDomainAnnotation says whose bundle it is: the formats of its keys do not.
	trustDomainAnnotation = "countersign.io/trust-domain"

	homeTimeout = 10 * time.Second
)

// HomeConfig is what a Home needs. OwnToken is needed by VerifyMember alone.
type HomeConfig struct {
	Cluster     string // the name of the kube cluster, for messages and as what Claims say
	Kubeconfig  string // in-cluster, or a path
	Namespace   string // of the members
	StatefulSet string // whose pods the members are; empty: pods do not become members
	// OwnToken reads this member's own join token, which says what its service account is.
	OwnToken       func() ([]byte, error)
	RequestTimeout time.Duration // of one question to the API server; 0: 10 s
	Now            func() time.Time
}

// Home is the kube cluster that a member lives in: its API server, and the ConfigMap and the pods of the members' namespace.
// The user of its kubeconfig needs, in that namespace, get on the pods and get on the ConfigMap countersign-bundle, and create on ConfigMaps;
// and in the cluster create on tokenreviews.authentication.k8s.io (ClusterRole system:auth-delegator) and ClusterRole
// system:service-account-issuer-discovery.
type Home struct {
	cfg HomeConfig
	api *apiServer
}

// NewHome checks the configuration and asks nobody.
func NewHome(cfg HomeConfig) (*Home, error) {
	orDefault(&cfg.RequestTimeout, homeTimeout)
	if cfg.Cluster == "" || cfg.Kubeconfig == "" || cfg.Now == nil || cfg.StatefulSet != "" && (cfg.Namespace == "" || cfg.OwnToken == nil) {
		return nil, fmt.Errorf("%w: making the client of the members' kube cluster: Cluster, Kubeconfig and Now must be set, and with a StatefulSet Namespace and OwnToken", identity.ErrInvalid)
	}
	c := Config{Now: cfg.Now, RequestTimeout: cfg.RequestTimeout, RetryInterval: time.Second, MaxTombstones: 1}
	return &Home{cfg: cfg, api: newAPIServer(c, cfg.Cluster, cfg.Kubeconfig)}, nil
}

// Ordinal is the number of the StatefulSet's pod of that name; false if it is none of its pods.
func Ordinal(statefulSet, pod string) (int, bool) {
	digits, ok := strings.CutPrefix(pod, statefulSet+"-")
	if statefulSet == "" || !ok || !ordinalForm.MatchString(digits) {
		return 0, false
	}
	n, err := strconv.Atoi(digits)
	return n, err == nil
}

var ordinalForm = regexp.MustCompile(`^(0|[1-9][0-9]{0,3})$`)

// VerifyMember checks that the token is that of the pod of this name, of the members' own StatefulSet, namespace and service account, which
// is there now. It asks the API server each time: a key that was copied, or known from before, proves nothing here. Errors wrap
// identity.ErrInvalid for what is no token, ErrUnauthenticated for one that proves nothing, ErrDenied for another pod's, ErrPrecondition
// where this member is not set up to tell, ErrUnavailable when the API server does not.
func (h *Home) VerifyMember(ctx context.Context, raw []byte, name string) (*Claims, error) {
	if h.cfg.StatefulSet == "" {
		return nil, fmt.Errorf("%w: this member admits no pods by their tokens: set kubernetes.stateful_set on all members, or make a join token (countersign token create --server)", identity.ErrPrecondition)
	}
	t, err := parseToken(raw)
	if err != nil {
		return nil, err
	}
	if err := t.claims.checkTimes(h.cfg.Now()); err != nil {
		return nil, err
	}
	// For nobody else: whoever else may receive it could show it here.
	if !slices.Equal(t.claims.Audience, []string{MemberAudience}) {
		return nil, refused(badAudience, "it is for audience %s, not for %q alone: set the audience of the serviceAccountToken volume by which members join", short(strings.Join(t.claims.Audience, " ")), MemberAudience)
	}
	own, err := h.own()
	if err != nil {
		return nil, err
	}
	c := &cluster{KubeCluster: identity.KubeCluster{Name: h.cfg.Cluster, Audience: MemberAudience}, api: h.api}
	if err := c.review(ctx, t); err != nil {
		return nil, err
	}
	claims := t.claims.proven(h.cfg.Cluster)
	switch _, ofSet := Ordinal(h.cfg.StatefulSet, claims.PodName); {
	case claims.Namespace != h.cfg.Namespace || claims.Namespace != own.Namespace:
		return nil, fmt.Errorf("%w: pod %s/%s is not in the members' namespace %s", identity.ErrDenied, claims.Namespace, claims.PodName, h.cfg.Namespace)
	case claims.ServiceAccount != own.ServiceAccount.Name:
		return nil, fmt.Errorf("%w: pod %s/%s runs as service account %s, not as the members' %s", identity.ErrDenied, claims.Namespace, claims.PodName, claims.ServiceAccount, own.ServiceAccount.Name)
	case !ofSet:
		return nil, fmt.Errorf("%w: pod %s/%s is not one of StatefulSet %s", identity.ErrDenied, claims.Namespace, claims.PodName, h.cfg.StatefulSet)
	case claims.PodName != name:
		return nil, fmt.Errorf("%w: pod %s/%s asks to be member %s: a pod is admitted under its own name", identity.ErrDenied, claims.Namespace, claims.PodName, short(name))
	}
	return claims, h.checkLive(ctx, claims)
}

// checkLive asks for the pod itself: TokenReview answers from a cache for some seconds.
func (h *Home) checkLive(ctx context.Context, claims *Claims) error {
	client, err := h.api.client()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, h.cfg.RequestTimeout)
	defer cancel()
	pod, err := h.api.askObject(ctx, client, "pods", claims.Namespace, claims.PodName)
	switch {
	case apierrors.IsNotFound(err):
		return errGone(claims)
	case err != nil:
		return h.api.failure(client, "asking for a pod", "get on pods", err, "")
	case string(pod.UID) != claims.PodUID:
		return errGone(claims)
	case pod.DeletionTimestamp != nil:
		return refused(podGone, "pod %s/%s (UID %s) of kube cluster %q is being deleted", claims.Namespace, claims.PodName, claims.PodUID, claims.Cluster)
	}
	return nil
}

type ownClaims struct {
	Namespace      string
	ServiceAccount ref
	Pod            ref
}

// own reads who this member is from its own token, which the kubelet keeps there: nobody else can write that.
func (h *Home) own() (*ownClaims, error) {
	raw, err := h.cfg.OwnToken()
	if err != nil {
		return nil, fmt.Errorf("%w: this member cannot tell its own service account: reading kubernetes.join_token_path: %v", identity.ErrPrecondition, err)
	}
	defer clear(raw)
	t, err := parseToken(raw)
	if err != nil {
		return nil, fmt.Errorf("%w: this member cannot tell its own service account: kubernetes.join_token_path: %v", identity.ErrPrecondition, err)
	}
	k := &t.claims.Kubernetes
	return &ownClaims{Namespace: k.Namespace, ServiceAccount: k.ServiceAccount, Pod: *k.Pod}, nil
}

// CheckOwn says why this member could not join by its own token as the member of that name; nil: nothing speaks against it here.
func (h *Home) CheckOwn(name string) error {
	own, err := h.own()
	switch {
	case err != nil:
		return err
	case own.Namespace != h.cfg.Namespace:
		return fmt.Errorf("%w: kubernetes.namespace is %q, and this pod, by its token, is in %q: leave kubernetes.namespace out, or mend it", identity.ErrPrecondition, h.cfg.Namespace, own.Namespace)
	case own.Pod.Name != name:
		return fmt.Errorf("%w: name is %q, and this pod, by its token, is %q: leave name out, or mend it", identity.ErrPrecondition, name, own.Pod.Name)
	}
	return nil
}

// Issuer asks the API server what its tokens' issuer is (OpenID Connect Discovery 1.0, section 4).
func (h *Home) Issuer(ctx context.Context) (string, error) {
	var doc struct {
		Issuer string `json:"issuer"`
	}
	if err := h.do(ctx, http.MethodGet, "/.well-known/openid-configuration", nil, &doc, "asking for the issuer", "ClusterRole system:service-account-issuer-discovery"); err != nil {
		return "", err
	}
	if doc.Issuer == "" || len(doc.Issuer) > 1<<10 {
		return "", fmt.Errorf("%w: the API server of kube cluster %q names no issuer: register the cluster with countersign kube add", identity.ErrUnavailable, h.cfg.Cluster)
	}
	return doc.Issuer, nil
}

// PublishedBundle is what the ConfigMap holds.
type PublishedBundle struct {
	TrustDomain string // by its annotation; empty: it has none
	Data        map[string]string
}

// configMap is the part of a ConfigMap (v1) that is used.
type configMap struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`
	Data              map[string]string `json:"data,omitempty"`
}

// ConfigMapName says where the bundle is published, for messages.
func (h *Home) ConfigMapName() string { return h.cfg.Namespace + "/" + BundleConfigMap }

// Bundle reads the ConfigMap. Its error wraps identity.ErrNotFound where there is none, ErrUnavailable where nobody can tell.
func (h *Home) Bundle(ctx context.Context) (*PublishedBundle, error) {
	var out configMap
	err := h.do(ctx, http.MethodGet, h.configMaps()+"/"+BundleConfigMap, nil, &out, "reading ConfigMap "+h.ConfigMapName(), "get on configmaps in namespace "+h.cfg.Namespace)
	if err != nil {
		return nil, err
	}
	return &PublishedBundle{TrustDomain: out.Annotations[trustDomainAnnotation], Data: out.Data}, nil
}

// CreateBundle makes the ConfigMap. It never changes one: then its error wraps identity.ErrExists.
func (h *Home) CreateBundle(ctx context.Context, b PublishedBundle) error {
	in := &configMap{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "ConfigMap"},
		ObjectMeta: metav1.ObjectMeta{
			Name: BundleConfigMap, Namespace: h.cfg.Namespace,
			Labels: map[string]string{"app.kubernetes.io/managed-by": "countersign"}, Annotations: map[string]string{trustDomainAnnotation: b.TrustDomain},
		},
		Data: b.Data,
	}
	return h.do(ctx, http.MethodPost, h.configMaps(), in, nil, "creating ConfigMap "+h.ConfigMapName(), "create on configmaps in namespace "+h.cfg.Namespace)
}

func (h *Home) configMaps() string {
	return "/api/v1/namespaces/" + url.PathEscape(h.cfg.Namespace) + "/configmaps"
}

// do is one call of the API server.
func (h *Home) do(ctx context.Context, method, path string, in, out any, doing, right string) error {
	client, err := h.api.client()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, h.cfg.RequestTimeout)
	defer cancel()
	err = client.call(ctx, method, path, in, out)
	switch {
	case err == nil:
		return nil
	case apierrors.IsNotFound(err) && method == http.MethodGet:
		return fmt.Errorf("%s of kube cluster %q: %w", doing, h.cfg.Cluster, identity.ErrNotFound)
	case apierrors.IsAlreadyExists(err):
		return fmt.Errorf("%s of kube cluster %q: %w", doing, h.cfg.Cluster, identity.ErrExists)
	}
	return h.api.failure(client, doing, right, err, "")
}

// call sends and receives JSON. What the API server refuses is a StatusError.
func (c *apiClient) call(ctx context.Context, method, path string, in, out any) error {
	var body io.Reader
	if in != nil {
		raw, err := json.Marshal(in)
		if err != nil {
			return fmt.Errorf("encoding what the API server is asked for: %w", err)
		}
		body = bytes.NewReader(raw)
	}
	req, err := http.NewRequestWithContext(ctx, method, c.host.JoinPath(path).String(), body)
	if err != nil {
		return err
	}
	req.Header.Set("Accept", "application/json, application/jwk-set+json") // the latter of keys alone
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("User-Agent", userAgent)
	resp, err := c.http.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(io.LimitReader(resp.Body, maxCallBytes+1))
	if err != nil {
		return fmt.Errorf("reading the answer: %w", err)
	}
	if len(raw) > maxCallBytes {
		return fmt.Errorf("the answer is larger than %d bytes", maxCallBytes)
	}
	if resp.StatusCode < 200 || resp.StatusCode >= 300 {
		var st metav1.Status
		if json.Unmarshal(raw, &st) == nil && st.Kind == "Status" && st.Status != metav1.StatusSuccess {
			return &apierrors.StatusError{ErrStatus: st}
		}
		return apierrors.NewGenericServerResponse(resp.StatusCode, strings.ToLower(method), schema.GroupResource{Resource: path}, "", "", 0, true)
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(raw, out); err != nil {
		return errors.New("the answer is not the JSON that was asked for")
	}
	return nil
}

// maxCallBytes bounds an answer: a ConfigMap has 1 MiB at the most.
const maxCallBytes = 4 << 20
