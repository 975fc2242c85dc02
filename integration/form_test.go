//go:build integration

package integration

import (
	"context"
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

	"countersign.io/countersign/integration/cluster"
)

const formNamespace = "countersign"

// formed is a StatefulSet's worth of member processes: pods are objects of the API server, and each process has its pod's token.
type formed struct {
	*cluster.Cluster
	t          *testing.T
	k          *kubeAPI
	kubeconfig string
	addresses  []string
}

func newFormed(t *testing.T, k *kubeAPI, replicas int) *formed {
	t.Helper()
	dir, err := os.MkdirTemp("", "cs-")
	if err != nil {
		t.Fatal(err)
	}
	f := &formed{Cluster: &cluster.Cluster{Dir: dir, Bin: bin, TrustDomain: trustDomain}, t: t, k: k}
	t.Cleanup(func() {
		f.Close()
		if t.Failed() {
			(&world{Cluster: f.Cluster, t: t}).logs()
		}
		os.RemoveAll(dir)
	})
	k.namespace(formNamespace)
	k.account(formNamespace, "countersign")
	f.kubeconfig = k.memberKubeconfig(formNamespace, "countersign")
	for range replicas {
		a, err := cluster.FreeAddress()
		if err != nil {
			t.Fatal(err)
		}
		f.addresses = append(f.addresses, a)
	}
	return f
}

// memberKubeconfig is what the chart's Role and ClusterRole let the members' account do, and a kubeconfig as that account.
func (k *kubeAPI) memberKubeconfig(ns, account string) string {
	k.t.Helper()
	meta := metav1.ObjectMeta{Name: "countersign-members"}
	rbac := "/apis/rbac.authorization.k8s.io/v1/"
	who := []rbacv1.Subject{{Kind: "ServiceAccount", Namespace: ns, Name: account}}
	k.must(http.MethodPost, rbac+"clusterroles", &rbacv1.ClusterRole{ObjectMeta: meta, Rules: []rbacv1.PolicyRule{
		mayReview(), mayWatch(), {NonResourceURLs: []string{"/.well-known/openid-configuration", "/openid/v1/jwks"}, Verbs: []string{"get"}},
	}}, nil)
	k.must(http.MethodPost, rbac+"clusterrolebindings", &rbacv1.ClusterRoleBinding{ObjectMeta: meta, RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: meta.Name}, Subjects: who}, nil)
	k.must(http.MethodPost, rbac+"namespaces/"+ns+"/roles", &rbacv1.Role{ObjectMeta: meta, Rules: []rbacv1.PolicyRule{
		{APIGroups: []string{""}, Resources: []string{"configmaps"}, Verbs: []string{"create"}},
		{APIGroups: []string{""}, Resources: []string{"configmaps"}, ResourceNames: []string{"countersign-bundle"}, Verbs: []string{"get"}},
	}}, nil)
	k.must(http.MethodPost, rbac+"namespaces/"+ns+"/rolebindings", &rbacv1.RoleBinding{ObjectMeta: meta, RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: meta.Name}, Subjects: who}, nil)
	file := filepath.Join(k.dir, "members.kubeconfig")
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

// member makes the pod of that ordinal and launches its process; peers are where it may find others.
func (f *formed) member(ordinal int, account string) *cluster.Member {
	f.t.Helper()
	name := fmt.Sprintf("countersign-%d", ordinal)
	m := &cluster.Member{Name: name, Dir: filepath.Join(f.Dir, name), Address: f.addresses[ordinal]}
	m.Socket = filepath.Join(m.Dir, "admin.sock")
	var err error
	if m.Health, err = cluster.FreeAddress(); err != nil {
		f.t.Fatal(err)
	}
	if err := os.MkdirAll(m.Dir, 0o700); err != nil {
		f.t.Fatal(err)
	}
	f.token(m, f.k.pod(formNamespace, name, account, "node-1"))
	yaml := fmt.Sprintf(`version: 1
trust_domain: %s
name: %s
data_dir: %s
listen: %s
advertise: %s
admin_socket: %s
health: %s
cluster: {peers: [%s]}
kubernetes:
  cluster: main
  kubeconfig: %s
  namespace: %s
  stateful_set: countersign
  join_token_path: %s
  agent_accounts: [%s/countersign-agent]
%s`, trustDomain, name, filepath.Join(m.Dir, "data"), m.Address, m.Address, m.Socket, m.Health, strings.Join(f.addresses, ", "),
		f.kubeconfig, formNamespace, filepath.Join(m.Dir, "token"), formNamespace, f.ServerYAML)
	if err := os.WriteFile(filepath.Join(m.Dir, "server.yaml"), []byte(yaml), 0o600); err != nil {
		f.t.Fatal(err)
	}
	if err := f.LaunchMember(m); err != nil {
		f.t.Fatal(err)
	}
	return m
}

// token gives the process its pod's token, as the kubelet would.
func (f *formed) token(m *cluster.Member, p kubePod) {
	f.t.Helper()
	token := f.k.request(p.ns, p.account, "countersign-member", &authv1.BoundObjectReference{Kind: "Pod", APIVersion: "v1", Name: p.name})
	if err := os.WriteFile(filepath.Join(m.Dir, "token"), []byte(token), 0o600); err != nil {
		f.t.Fatal(err)
	}
}

// notReady waits until the process says on /ready what contains every text.
func (f *formed) notReady(health string, want ...string) string {
	f.t.Helper()
	ctx, cancel := context.WithTimeout(f.k.ctx, time.Minute)
	defer cancel()
	for last := ""; ; time.Sleep(50 * time.Millisecond) {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+health+"/ready", nil)
		if err != nil {
			f.t.Fatal(err)
		}
		if res, err := http.DefaultClient.Do(req); err == nil {
			body, _ := io.ReadAll(res.Body)
			res.Body.Close()
			last = string(body)
			all := res.StatusCode != http.StatusOK
			for _, w := range want {
				all = all && strings.Contains(last, w)
			}
			if all {
				return last
			}
		}
		if ctx.Err() != nil {
			f.t.Fatalf("never said %q; the last: %s", want, last)
		}
	}
}

// TestFormByThemselves: three pods of a StatefulSet, started at once, become one cluster, and an agent joins it, without anybody doing
// anything; and who may not be a member is none.
func TestFormByThemselves(t *testing.T) {
	k := newKubeAPI(t)
	f := newFormed(t, k, 4)
	began := time.Now()
	for i := range 3 {
		f.Members = append(f.Members, f.member(i, "countersign"))
	}
	for _, m := range f.Members {
		if err := f.WaitReady(k.ctx, m); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.AllVote(k.ctx); err != nil {
		t.Fatal(err)
	}
	t.Logf("three members of one cluster after %.1f s", time.Since(began).Seconds())
	var published corev1.ConfigMap
	k.must(http.MethodGet, "/api/v1/namespaces/"+formNamespace+"/configmaps/countersign-bundle", nil, &published)
	if !strings.Contains(published.Data["bundle.pem"], "CERTIFICATE") || !strings.Contains(published.Data["bundle.json"], "x509-svid") {
		t.Fatalf("published: %v", published.Data)
	}
	w := &world{Cluster: f.Cluster, t: t, ctx: k.ctx}
	w.eventually("the kube cluster is registered", func() error {
		out, err := w.Admin(w.ctx, "kube", "list", "-o", "json")
		if err == nil && !strings.Contains(out, kubeIssuer) {
			err = fmt.Errorf("%s", out)
		}
		return err
	})
	if out := w.admin("audit", "query", "--action", "member.join", "-o", "json"); !strings.Contains(out, "countersign/countersign-1") && !strings.Contains(out, "countersign/countersign-2") {
		t.Logf("this member admitted none: %s", out)
	}

	t.Run("an agent without a join token", func(t *testing.T) { f.agent(published.Data["bundle.pem"]) })
	t.Run("another account is no member", func(t *testing.T) {
		m := f.member(3, "intruder")
		said := f.notReady(m.Health, "intruder")
		t.Logf("it says: %s", said)
		if out := w.admin("cluster", "members"); strings.Contains(out, "countersign-3") {
			t.Fatalf("it is a member: %s", out)
		}
		m.Stop()
	})
	t.Run("a lost volume begins no second cluster", func(t *testing.T) {
		m := f.Members[0]
		m.Stop()
		if err := os.RemoveAll(filepath.Join(m.Dir, "data")); err != nil {
			t.Fatal(err)
		}
		k.delete(kubePod{ns: formNamespace, name: m.Name})
		f.token(m, k.pod(formNamespace, m.Name, "countersign", "node-2"))
		if err := f.LaunchMember(m); err != nil {
			t.Fatal(err)
		}
		t.Logf("it says: %s", f.notReady(m.Health, "countersign cluster remove countersign-0"))
		w.admin("cluster", "remove", "countersign-0")
		if err := f.WaitReady(k.ctx, m); err != nil {
			t.Fatal(err)
		}
		if err := f.AllVote(k.ctx); err != nil {
			t.Fatal(err)
		}
	})
}

// agent attests by its pod's token, knowing nothing but the published bundle.
func (f *formed) agent(bundle string) {
	f.t.Helper()
	dir := filepath.Join(f.Dir, "agent")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		f.t.Fatal(err)
	}
	p := f.k.pod(formNamespace, "countersign-agent-x", "countersign-agent", "node-1")
	health, err := cluster.FreeAddress()
	if err != nil {
		f.t.Fatal(err)
	}
	for name, text := range map[string]string{"bundle.pem": bundle, "token": f.k.token(p, "countersign")} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			f.t.Fatal(err)
		}
	}
	yaml := fmt.Sprintf("version: 1\ntrust_domain: %s\nservers: [%s]\nbundle_file: %s\nsocket: %s\nstate_dir: none\nhealth: %s\nattest: {kube: {cluster: main, token_path: %s}}\n",
		trustDomain, f.addresses[1], filepath.Join(dir, "bundle.pem"), filepath.Join(dir, "agent.sock"), health, filepath.Join(dir, "token"))
	if err := os.WriteFile(filepath.Join(dir, "agent.yaml"), []byte(yaml), 0o600); err != nil {
		f.t.Fatal(err)
	}
	log := newLines()
	proc, err := f.Start("agent", nil, log, filepath.Join(f.Bin, "countersign-agent"), "run", "-c", filepath.Join(dir, "agent.yaml"))
	if err != nil {
		f.t.Fatal(err)
	}
	if err := f.WaitReady(f.k.ctx, &cluster.Member{Process: proc, Health: health}); err != nil {
		f.t.Fatalf("%v\n%s", err, log.tail(20))
	}
	proc.Stop()
}
