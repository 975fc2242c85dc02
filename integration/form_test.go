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
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
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
	t.Run("a sidecar", func(t *testing.T) { f.sidecar(t, published.Data["bundle.json"]) })
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

// sidecar is a pod's own: its identity comes by its token alone, a change of the entries by push, and its end with the pod's.
func (f *formed) sidecar(t *testing.T, bundle string) {
	dir, err := os.MkdirTemp("", "cs-pod-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	p := f.k.pod("shop", "lonely", "lonely", "node-1")
	health, err := cluster.FreeAddress()
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"bundle.json": bundle, "token": f.k.token(p, "countersign")} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	log := newLines()
	socket := filepath.Join(dir, "pod", "agent.sock")
	proc, err := f.Start("sidecar", []string{"COUNTERSIGN_TRUST_DOMAIN=" + trustDomain, "COUNTERSIGN_BUNDLE_FILE=" + filepath.Join(dir, "bundle.json")}, log,
		filepath.Join(f.Bin, "countersign-agent"), "sidecar", "--servers", strings.Join(f.addresses[:3], ","), "--token-path", filepath.Join(dir, "token"), "--socket", socket, "--health", health)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		proc.Stop()
		if t.Failed() {
			t.Log(log.tail(40))
		}
	})
	if err := f.WaitReady(f.k.ctx, &cluster.Member{Process: proc, Health: health}); err != nil {
		t.Fatal(err)
	}
	w := &world{Cluster: f.Cluster, t: t, ctx: f.k.ctx}
	ctx, cancel := context.WithTimeout(f.k.ctx, 2*time.Minute)
	defer cancel()
	client, err := workloadapi.New(ctx, workloadapi.WithAddr("unix://"+socket))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	seen := make(chan []string, 100)
	gone := make(chan error, 100)
	go func() {
		_ = client.WatchX509Context(ctx, contexts{func(c *workloadapi.X509Context) {
			var ids []string
			for _, s := range c.SVIDs {
				ids = append(ids, s.ID.String())
			}
			seen <- ids
		}, func(err error) { gone <- err }})
	}()
	wait := func(what string, ok func([]string) bool) {
		t.Helper()
		for {
			select {
			case ids := <-seen:
				if ok(ids) {
					return
				}
			case <-ctx.Done():
				t.Fatalf("never happened: %s", what)
			}
		}
	}
	usual := "spiffe://" + trustDomain + "/ns/shop/sa/lonely"
	wait("its usual identity", func(ids []string) bool { return len(ids) == 1 && ids[0] == usual })
	if _, err := client.FetchJWTSVID(ctx, jwtsvid.Params{Audience: "db"}); err != nil {
		t.Errorf("a JWT-SVID: %v", err)
	}
	w.createEntry("--id", "spiffe://"+trustDomain+"/more", "-s", "k8s:ns:shop", "-s", "k8s:sa:lonely", "-s", "k8s:cluster:main")
	wait("another identity, by push", func(ids []string) bool { return len(ids) == 1 && strings.HasSuffix(ids[0], "/more") })
	// The members go away: what is held is served on, also to a new caller with another token.
	for _, m := range f.Members {
		m.Signal(syscall.SIGSTOP)
	}
	if err := os.WriteFile(filepath.Join(dir, "token"), []byte(f.k.token(p, "countersign")), 0o644); err != nil {
		t.Fatal(err)
	}
	svid, err := workloadapi.FetchX509SVID(ctx, workloadapi.WithAddr("unix://"+socket))
	for _, m := range f.Members {
		m.Signal(syscall.SIGCONT)
	}
	if err != nil || !strings.HasSuffix(svid.ID.String(), "/more") {
		t.Errorf("while the members are away: %v, %v", svid, err)
	}
	for _, m := range f.Members {
		if err := f.WaitReady(ctx, m); err != nil {
			t.Fatal(err)
		}
	}
	w.eventually("the sidecar is connected again", func() error {
		return f.WaitReady(ctx, &cluster.Member{Process: proc, Health: health})
	})
	f.k.delete(p)
	for {
		select {
		case err := <-gone:
			if status.Code(err) == codes.PermissionDenied {
				return
			}
		case <-ctx.Done():
			t.Fatal("the pod is gone, and its stream goes on")
		}
	}
}

// contexts are what a stream brings.
type contexts struct {
	update func(*workloadapi.X509Context)
	ended  func(error)
}

func (c contexts) OnX509ContextUpdate(u *workloadapi.X509Context) { c.update(u) }

func (c contexts) OnX509ContextWatchError(err error) { c.ended(err) }

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
