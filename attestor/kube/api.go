package kube

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	authv1 "k8s.io/api/authentication/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"countersign.io/countersign/identity"
)

const (
	inCluster          = "in-cluster" // as identity.KubeCluster.Kubeconfig
	userAgent          = "countersign"
	maxKubeconfigBytes = 1 << 20
	maxAnswerBytes     = 64 << 20 // of the API server, but for a watch: a page of 500 pods is below 1 MiB
	requestsPerSecond  = 200      // to one API server from one member; a flood of tokens must not become its flood
)

// The extras of a TokenReview's user that name what a token is bound to.
const (
	extraPodName  = "authentication.kubernetes.io/pod-name"
	extraPodUID   = "authentication.kubernetes.io/pod-uid"
	extraNodeName = "authentication.kubernetes.io/node-name"
	extraNodeUID  = "authentication.kubernetes.io/node-uid"
)

// apiServer is the API server of one cluster, as its kubeconfig names it, and what is known of its pods.
type apiServer struct {
	cfg                 Config
	cluster, kubeconfig string
	pods                *podSet
	// namespaces are by name, replicaSets by UID
	namespaces, replicaSets objectSet
	wants                   atomic.Pointer[interest] // nil: entries name no facts

	mu          sync.Mutex
	made        *apiClient
	file        os.FileInfo // of the kubeconfig that made was made from
	fault       error       // why there is no client
	tried       time.Time   // when that was tried
	reviewFault error       // of the last TokenReview
	wantsOther  chan struct{}
}

// apiClient is immutable.
type apiClient struct {
	host   *url.URL
	http   *http.Client // with the kubeconfig's credentials and CA
	review rest.Interface
	meta   metadata.Interface
	fault  error // set: there is no client, and this is why
}

func newAPIServer(cfg Config, cluster, kubeconfig string) *apiServer {
	a := &apiServer{cfg: cfg, cluster: cluster, kubeconfig: kubeconfig, pods: newPodSet(cfg.MaxTombstones), wantsOther: make(chan struct{})}
	a.namespaces.clear()
	a.replicaSets.clear()
	return a
}

// client makes the client if there is none, or anew if the kubeconfig was replaced; a faulty one is read again no sooner
// than RetryInterval later. (Files that a kubeconfig points to are watched by client-go itself.)
func (a *apiServer) client() (*apiClient, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	var file os.FileInfo
	if a.kubeconfig != inCluster {
		file, _ = os.Stat(a.kubeconfig) // a file that is gone does not undo what was read from it
	}
	if a.made != nil && (file == nil || os.SameFile(file, a.file) && file.Size() == a.file.Size() && file.ModTime().Equal(a.file.ModTime())) {
		return a.made, nil
	}
	now := a.cfg.Now()
	if since := now.Sub(a.tried); a.fault != nil && since >= 0 && since < a.cfg.RetryInterval {
		return nil, a.fault
	}
	a.tried = now
	c, err := newAPIClient(a.kubeconfig)
	if err != nil {
		a.made, a.fault = nil, fmt.Errorf("%w: kube cluster %q: %v", identity.ErrUnavailable, a.cluster, err)
		return nil, a.fault
	}
	a.made, a.file, a.fault = c, file, nil
	return c, nil
}

func (a *apiServer) status() (watching bool, pods int, fault error) {
	watching, pods, fault = a.pods.status()
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, f := range []error{a.reviewFault, a.fault} {
		if f != nil {
			fault = f
		}
	}
	return watching, pods, fault
}

func (a *apiServer) setReviewFault(err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.reviewFault = err
}

// RESTConfig reads a kubeconfig, or takes the pod's own credentials where it is "in-cluster". One whose API server anybody could play
// is refused.
func RESTConfig(kubeconfig string) (*rest.Config, error) {
	cfg, err := loadKubeconfig(kubeconfig)
	if err != nil {
		return nil, err
	}
	host, _, err := rest.DefaultServerUrlFor(cfg)
	switch {
	case err != nil || host.Scheme != "https":
		return nil, fmt.Errorf("kubeconfig %s: its server is not an https URL", kubeconfig)
	case cfg.Insecure:
		return nil, fmt.Errorf("kubeconfig %s: it has insecure-skip-tls-verify: give certificate-authority-data instead, since whoever answers decides which pods are real", kubeconfig)
	}
	return cfg, nil
}

func newAPIClient(kubeconfig string) (*apiClient, error) {
	cfg, err := RESTConfig(kubeconfig)
	if err != nil {
		return nil, err
	}
	host, _, err := rest.DefaultServerUrlFor(cfg)
	if err != nil {
		return nil, fmt.Errorf("kubeconfig %s: its server is not an https URL", kubeconfig)
	}
	cfg.UserAgent = userAgent
	cfg.WarningHandler = rest.NoWarnings{}
	cfg.QPS, cfg.Burst = requestsPerSecond, 2*requestsPerSecond
	if cfg.ExecProvider != nil {
		cfg.ExecProvider.StdinUnavailable = true
	}
	cfg.Wrap(func(rt http.RoundTripper) http.RoundTripper { return limitAnswers{rt} })
	shared, err := rest.HTTPClientFor(cfg)
	if err != nil {
		return nil, fmt.Errorf("kubeconfig %s: %w", kubeconfig, err)
	}
	hc := *shared // not to change http.DefaultClient
	hc.CheckRedirect = refuseRedirect

	scheme := runtime.NewScheme()
	if err := authv1.AddToScheme(scheme); err != nil {
		return nil, err
	}
	rc := rest.CopyConfig(cfg)
	rc.APIPath, rc.GroupVersion = "/apis", &authv1.SchemeGroupVersion
	rc.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	review, err := rest.RESTClientForConfigAndClient(rc, &hc)
	if err != nil {
		return nil, fmt.Errorf("kubeconfig %s: %w", kubeconfig, err)
	}
	meta, err := metadata.NewForConfigAndClient(cfg, &hc)
	if err != nil {
		return nil, fmt.Errorf("kubeconfig %s: %w", kubeconfig, err)
	}
	return &apiClient{host: host, http: &hc, review: review, meta: meta}, nil
}

// loadKubeconfig never quotes the file: a wrong path may lead to a secret.
func loadKubeconfig(path string) (*rest.Config, error) {
	if path == inCluster {
		cfg, err := rest.InClusterConfig()
		if err != nil {
			return nil, fmt.Errorf("taking in-cluster credentials: %w: give the path of a kubeconfig if this member does not run in a pod of that cluster", err)
		}
		return cfg, nil
	}
	const hint = "each member needs this file, readable by the server's user"
	info, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("reading kubeconfig: %w: %s", err, hint)
	}
	if !info.Mode().IsRegular() || info.Size() > maxKubeconfigBytes {
		return nil, fmt.Errorf("reading kubeconfig %s: it is not a regular file of at the most %d bytes", path, maxKubeconfigBytes)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("reading kubeconfig: %w: %s", err, hint)
	}
	f.Close()
	raw, err := clientcmd.LoadFromFile(path)
	if err != nil {
		return nil, fmt.Errorf("reading kubeconfig %s: it is not one: check it with kubectl --kubeconfig %s version", path, path)
	}
	if err := clientcmd.ResolveLocalPaths(raw); err != nil {
		return nil, fmt.Errorf("reading kubeconfig %s: %w", path, err)
	}
	cfg, err := clientcmd.NewDefaultClientConfig(*raw, &clientcmd.ConfigOverrides{}).ClientConfig()
	if err != nil {
		return nil, fmt.Errorf("reading kubeconfig %s: %w", path, err)
	}
	return cfg, nil
}

// limitAnswers keeps one API server from filling the memory that all clusters share.
type limitAnswers struct{ next http.RoundTripper }

func (l limitAnswers) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := l.next.RoundTrip(r)
	if err == nil && r.URL.Query().Get("watch") == "" {
		resp.Body = &limitedBody{resp.Body, maxAnswerBytes}
	}
	return resp, err
}

type limitedBody struct {
	io.ReadCloser
	left int64
}

func (b *limitedBody) Read(p []byte) (int, error) {
	if b.left <= 0 {
		return 0, fmt.Errorf("the answer is larger than %d bytes", maxAnswerBytes)
	}
	n, err := b.ReadCloser.Read(p[:min(int64(len(p)), b.left)])
	b.left -= int64(n)
	return n, err
}

// serves reports whether a JWKS URL is one of this API server's own, and gives the URL to fetch with its credentials.
// kubernetes.default.svc is what every cluster calls its own API server.
func (c *apiClient) serves(jwks string) (string, bool) {
	u, err := url.Parse(jwks)
	if err != nil {
		return "", false
	}
	name := u.Hostname()
	if !strings.EqualFold(hostPort(u), hostPort(c.host)) && name != "kubernetes.default.svc" && !strings.HasPrefix(name, "kubernetes.default.svc.") {
		return "", false
	}
	return c.host.JoinPath(u.EscapedPath()).String(), true
}

func hostPort(u *url.URL) string {
	if u.Port() == "" {
		return u.Hostname() + ":443"
	}
	return u.Hostname() + ":" + u.Port()
}

// review asks the cluster's API server about the token, and whether it reads the token as we do.
func (c *cluster) review(ctx context.Context, t *token) error {
	client, err := c.api.client()
	if err != nil {
		return fmt.Errorf("verifying service account token: %w", err)
	}
	rctx, cancel := context.WithTimeout(ctx, c.api.cfg.RequestTimeout)
	defer cancel()
	ask := &authv1.TokenReview{Spec: authv1.TokenReviewSpec{Token: t.raw, Audiences: []string{c.Audience}}}
	var answer authv1.TokenReview
	if err := client.review.Post().Resource("tokenreviews").Body(ask).Do(rctx).Into(&answer); err != nil {
		err = c.api.failure(client, "asking for a TokenReview", "create on tokenreviews.authentication.k8s.io (ClusterRole system:auth-delegator)", err, t.raw)
		if ctx.Err() == nil { // else it says nothing about the API server
			c.api.setReviewFault(err)
		}
		return err
	}
	c.api.setReviewFault(nil)
	return c.checkReview(t, &answer.Status)
}

// checkReview accepts nothing but a full agreement: where the API server tells less than the token claims, the claim has
// nobody's word behind it when TokenReview is all there is.
func (c *cluster) checkReview(t *token, s *authv1.TokenReviewStatus) error {
	if !s.Authenticated || s.Error != "" {
		why := ""
		if s.Error != "" {
			why = " (" + scrub(s.Error, t.raw) + ")"
		}
		return refused(notBacked, "the API server of kube cluster %q does not accept it%s: its pod or service account may be gone", c.Name, why)
	}
	if !slices.Contains(s.Audiences, c.Audience) {
		return refused(badAudience, "the API server of kube cluster %q does not confirm audience %q", c.Name, c.Audience)
	}
	k := &t.claims.Kubernetes
	for _, f := range []struct {
		what, claim string
		review      []string
		optional    bool
	}{
		{"user name", t.claims.username(), []string{s.User.Username}, false},
		{"pod name", k.Pod.Name, s.User.Extra[extraPodName], false},
		{"pod UID", k.Pod.UID, s.User.Extra[extraPodUID], false},
		{"node name", k.Node.Name, s.User.Extra[extraNodeName], false},
		{"node UID", k.Node.UID, s.User.Extra[extraNodeUID], k.Node.UID == ""},
		{"service account UID", k.ServiceAccount.UID, []string{s.User.UID}, k.ServiceAccount.UID == "" || s.User.UID == ""},
	} {
		if !f.optional && !slices.Equal(f.review, []string{f.claim}) {
			return refused(notBacked, "the API server of kube cluster %q gives %s as its %s, the token %s", c.Name, short(strings.Join(f.review, " ")), f.what, short(f.claim))
		}
	}
	return nil
}

// podExists asks whether the one pod is there, has not finished, and should not have ended a while ago.
func (a *apiServer) podExists(ctx context.Context, namespace, name, podUID string) (bool, error) {
	client, err := a.client()
	if err != nil {
		return false, err
	}
	ctx, cancel := context.WithTimeout(ctx, a.cfg.RequestTimeout)
	defer cancel()
	pod, err := a.askObject(ctx, client, "pods", namespace, name)
	switch {
	case apierrors.IsNotFound(err):
		return false, nil
	case err != nil:
		return false, a.failure(client, "asking for a pod", "list on pods", err, "")
	}
	at, ending := endOf(pod)
	return string(pod.UID) == podUID && (!ending || a.cfg.Now().Before(at)), nil
}

// failure words an API server's refusal or silence. secret is a token that the answer might repeat.
func (a *apiServer) failure(c *apiClient, doing, right string, err error, secret string) error {
	hint := "is the API server up, and do the kubeconfig's server and CA fit?"
	switch {
	case apierrors.IsUnauthorized(err):
		hint = "the credentials of kubeconfig " + a.kubeconfig + " were refused: renew them"
	case apierrors.IsForbidden(err):
		hint = "allow the user of kubeconfig " + a.kubeconfig + ": " + right
	}
	out := fmt.Errorf("%s of kube cluster %q at %s: %w: %s: %s", doing, a.cluster, c.host.Host, identity.ErrUnavailable, scrub(err.Error(), secret), hint)
	for _, is := range []error{context.DeadlineExceeded, context.Canceled} {
		if errors.Is(err, is) {
			out = fmt.Errorf("%w (%w)", out, is)
		}
	}
	return out
}

// scrub cuts what an API server said to what fits into a log line, and withholds it if it repeats any piece of the secret.
func scrub(text, secret string) string {
	const most, piece = 300, 16
	if len(text) > most {
		text = text[:most] + "..."
	}
	for i := 0; i+piece <= len(text); i++ {
		if strings.Contains(secret, text[i:i+piece]) {
			return "its answer is withheld, for it repeats the token"
		}
	}
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, text)
}
