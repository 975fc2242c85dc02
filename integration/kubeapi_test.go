//go:build integration

package integration

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	authv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"countersign.io/countersign/integration/cluster"
)

// kubeIssuer is what the API server puts into its tokens.
const kubeIssuer = "https://kubernetes.default.svc.cluster.local"

// kubeAPI is a real Kubernetes API server with an etcd of its own, and its administrator. There is no kubelet: pods are
// objects, until a sandbox plays one.
type kubeAPI struct {
	t    *testing.T
	ctx  context.Context
	dir  string
	url  string
	http *http.Client
	proc *cluster.Process
}

// newKubeAPI starts the API server, with more flags of its own, and gives it the nodes node-1 and node-2 and the namespace shop.
func newKubeAPI(t *testing.T, flags ...string) *kubeAPI {
	t.Helper()
	needRoot(t)
	binary, err := filepath.Abs("kube/bin/kubeapi")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(binary); err != nil {
		t.Skipf("%v: make integration builds it", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 8*time.Minute)
	t.Cleanup(cancel)
	dir, err := os.MkdirTemp("", "cs-kube-")
	if err != nil {
		t.Fatal(err)
	}
	addr, err := cluster.FreeAddress()
	if err != nil {
		t.Fatal(err)
	}
	_, port, _ := strings.Cut(addr, ":")
	k := &kubeAPI{t: t, ctx: ctx, dir: dir, url: "https://127.0.0.1:" + port}
	log, starter := newLines(), &cluster.Cluster{Dir: dir}
	t.Cleanup(func() {
		if k.proc != nil {
			k.proc.Kill() // nothing of it is kept, and an orderly end takes long
		}
		if t.Failed() {
			t.Logf("--- kubeapi\n%s", log.tail(30))
		}
		os.RemoveAll(dir)
	})
	began := time.Now()
	if k.proc, err = starter.Start("kubeapi", nil, log, append([]string{binary, "-dir", dir, "-port", port, "-issuer", kubeIssuer, "--"}, flags...)...); err != nil {
		t.Fatal(err)
	}
	log.wait(t, ctx, "the API server", func(lines []string) bool { return contains(lines, "READY") })
	t.Logf("Kubernetes API server ready after %.1f s", time.Since(began).Seconds())
	conf, err := clientcmd.BuildConfigFromFlags("", filepath.Join(dir, "pki", "admin.kubeconfig"))
	if err != nil {
		t.Fatal(err)
	}
	if k.http, err = rest.HTTPClientFor(conf); err != nil {
		t.Fatal(err)
	}
	for _, n := range []string{"node-1", "node-2"} {
		k.must(http.MethodPost, "/api/v1/nodes", &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: n}}, nil)
	}
	k.namespace("shop")
	return k
}

// do is one call of the administrator's.
func (k *kubeAPI) do(method, path string, in, out any) error {
	return k.send(method, path, "application/json", in, out)
}

// send is do for a body of that type.
func (k *kubeAPI) send(method, path, contentType string, in, out any) error {
	body, err := json.Marshal(in)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(k.ctx, method, k.url+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", contentType)
	res, err := k.http.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	answer, err := io.ReadAll(res.Body)
	if err != nil {
		return err
	}
	if res.StatusCode >= 300 {
		return fmt.Errorf("%s %s: %s: %s", method, path, res.Status, answer)
	}
	if out == nil {
		return nil
	}
	return json.Unmarshal(answer, out)
}

func (k *kubeAPI) must(method, path string, in, out any) {
	k.t.Helper()
	if err := k.do(method, path, in, out); err != nil {
		k.t.Fatal(err)
	}
}

// namespace makes one, with the service account "default" that a controller would make.
func (k *kubeAPI) namespace(name string) {
	k.t.Helper()
	k.must(http.MethodPost, "/api/v1/namespaces", &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}, nil)
}

func (k *kubeAPI) account(ns, name string) {
	k.t.Helper()
	k.must(http.MethodPost, "/api/v1/namespaces/"+ns+"/serviceaccounts", &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: name}}, nil)
}

// kubePod is a pod as the API server knows it.
type kubePod struct{ ns, name, account, node, uid string }

// pod makes a pod, and its service account if there is none.
func (k *kubeAPI) pod(ns, name, account, node string) kubePod {
	k.t.Helper()
	if k.do(http.MethodGet, "/api/v1/namespaces/"+ns+"/serviceaccounts/"+account, nil, nil) != nil {
		k.account(ns, account)
	}
	no := false
	var out corev1.Pod
	k.must(http.MethodPost, "/api/v1/namespaces/"+ns+"/pods", &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: corev1.PodSpec{
			NodeName: node, ServiceAccountName: account, AutomountServiceAccountToken: &no,
			Containers: []corev1.Container{{Name: "main", Image: "none"}},
		},
	}, &out)
	return kubePod{ns, name, account, node, string(out.UID)}
}

// delete ends a pod at once, as a kubelet that confirms it would.
func (k *kubeAPI) delete(p kubePod) {
	k.t.Helper()
	var now int64
	k.must(http.MethodDelete, "/api/v1/namespaces/"+p.ns+"/pods/"+p.name, &metav1.DeleteOptions{GracePeriodSeconds: &now}, nil)
}

// token asks for a token as the kubelet does: of the pod's account, bound to the pod.
func (k *kubeAPI) token(p kubePod, audience string) string {
	k.t.Helper()
	return k.request(p.ns, p.account, audience, &authv1.BoundObjectReference{Kind: "Pod", APIVersion: "v1", Name: p.name})
}

func (k *kubeAPI) request(ns, account, audience string, bound *authv1.BoundObjectReference) string {
	k.t.Helper()
	hour := int64(3600)
	in := &authv1.TokenRequest{Spec: authv1.TokenRequestSpec{ExpirationSeconds: &hour, BoundObjectRef: bound}}
	if audience != "" {
		in.Spec.Audiences = []string{audience}
	}
	var out authv1.TokenRequest
	k.must(http.MethodPost, "/api/v1/namespaces/"+ns+"/serviceaccounts/"+account+"/token", in, &out)
	return out.Status.Token
}

// kubeconfig makes a service account that may do no more than the rules say, and a kubeconfig with its token.
func (k *kubeAPI) kubeconfig(account string, rules ...rbacv1.PolicyRule) string {
	k.t.Helper()
	k.account("default", account)
	meta := metav1.ObjectMeta{Name: account}
	rbac := "/apis/rbac.authorization.k8s.io/v1/"
	k.must(http.MethodPost, rbac+"clusterroles", &rbacv1.ClusterRole{ObjectMeta: meta, Rules: rules}, nil)
	k.must(http.MethodPost, rbac+"clusterrolebindings", &rbacv1.ClusterRoleBinding{
		ObjectMeta: meta, RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: account},
		Subjects: []rbacv1.Subject{{Kind: "ServiceAccount", Namespace: "default", Name: account}},
	}, nil)
	return k.login("default", account)
}

// login is a kubeconfig with a service account's token.
func (k *kubeAPI) login(ns, account string) string {
	k.t.Helper()
	file := filepath.Join(k.dir, account+".kubeconfig")
	if err := os.WriteFile(file, fmt.Appendf(nil, `apiVersion: v1
kind: Config
current-context: it
contexts: [{name: it, context: {cluster: it, user: it}}]
clusters: [{name: it, cluster: {server: %q, certificate-authority: %q}}]
users: [{name: it, user: {token: %q}}]
`, k.url, filepath.Join(k.dir, "pki", "ca.crt"), k.request(ns, account, "", nil)), 0o600); err != nil {
		k.t.Fatal(err)
	}
	return file
}

func mayReview() rbacv1.PolicyRule {
	return rbacv1.PolicyRule{APIGroups: []string{"authentication.k8s.io"}, Resources: []string{"tokenreviews"}, Verbs: []string{"create"}}
}

func mayWatch() rbacv1.PolicyRule {
	return rbacv1.PolicyRule{APIGroups: []string{""}, Resources: []string{"pods"}, Verbs: []string{"get", "list", "watch"}}
}

func mayReadKeys() rbacv1.PolicyRule {
	return rbacv1.PolicyRule{NonResourceURLs: []string{"/openid/v1/jwks"}, Verbs: []string{"get"}}
}

// jwks saves the keys that the API server signs tokens with.
func (k *kubeAPI) jwks() string {
	k.t.Helper()
	var keys json.RawMessage
	k.must(http.MethodGet, "/openid/v1/jwks", nil, &keys)
	file := filepath.Join(k.dir, "jwks.json")
	if err := os.WriteFile(file, keys, 0o600); err != nil {
		k.t.Fatal(err)
	}
	return file
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
}
