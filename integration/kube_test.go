//go:build integration

package integration

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	workloadv1 "countersign.io/countersign/api/workload/v1"
	"countersign.io/countersign/identity"
	"countersign.io/countersign/integration/cluster"
)

const shortTTL = "x509_ttl: 5s\nmax_staleness: 1m\n"

// register tells the members of the kube cluster "kube", in place of what they knew of it.
func register(w *world, how ...string) {
	w.t.Helper()
	w.admin(append([]string{"kube", "add", "kube", "--replace", "--issuer", kubeIssuer, "--default-id", identity.DefaultKubeID}, how...)...)
}

// asker asks one member for X.509-SVIDs as the agent of node-1 does.
func asker(w *world) func(token string) (id string, err error) {
	w.t.Helper()
	c, err := w.NewClient(w.ctx, "kube/node-1")
	if err != nil {
		w.t.Fatal(err)
	}
	conn, err := c.Dial(w.Members[0].Address)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { conn.Close() })
	_, public, err := cluster.NewKey()
	if err != nil {
		w.t.Fatal(err)
	}
	return func(token string) (string, error) {
		res, err := cluster.Issue(w.ctx, workloadv1.NewWorkloadClient(conn), token, public)
		if err != nil {
			if strings.Contains(err.Error(), token) || strings.Contains(err.Error(), token[strings.LastIndex(token, ".")+1:]) {
				w.t.Errorf("a token is in the error")
			}
			return "", err
		}
		if len(res.Svids) != 1 {
			return "", fmt.Errorf("%d SVIDs", len(res.Svids))
		}
		return res.Svids[0].SpiffeId, nil
	}
}

// TestKubeForms verifies real tokens in each way that a kube cluster can be registered.
func TestKubeForms(t *testing.T) {
	k := newKubeAPI(t)
	w := newWorld(t, 1, "")
	jwks := k.jwks()
	reviewer := k.kubeconfig("reviewer", mayReview(), mayWatch())
	reader := k.kubeconfig("reader", mayReadKeys(), mayWatch())
	url := "https://kubernetes.default.svc/openid/v1/jwks"
	register(w, "--jwks-file", jwks)
	ask := asker(w)
	for i, f := range []struct {
		name string
		how  []string
		ends bool // a deleted pod's token is refused
	}{
		{"TokenReview", []string{"--token-review", "--kubeconfig", reviewer}, true},
		{"JWKS held", []string{"--jwks-file", jwks}, false},
		{"JWKS through the API server", []string{"--jwks-url", url, "--kubeconfig", reader}, true},
		{"JWKS held and TokenReview", []string{"--jwks-file", jwks, "--token-review", "--kubeconfig", reviewer}, true},
	} {
		t.Run(f.name, func(t *testing.T) {
			register(w, f.how...)
			name := fmt.Sprintf("web-%d", i)
			p := k.pod("shop", name, "web", "node-1")
			good := k.token(p, "countersign")
			if id, err := ask(good); err != nil || id != "spiffe://"+trustDomain+"/ns/shop/sa/web" {
				t.Fatalf("the pod's own token: got %q, %v", id, err)
			}
			elsewhere := k.pod("shop", name+"-b", "web", "node-2")
			unscheduled := k.pod("shop", name+"-c", "web", "")
			signed := strings.LastIndex(good, ".")
			foreign := k.token(elsewhere, "countersign")
			for _, bad := range []struct{ what, token, says string }{
				{"of a pod of another node", foreign, "node"},
				{"of a pod on no node", k.token(unscheduled, "countersign"), "node"},
				{"for another audience", k.token(p, "vault"), "audience"},
				{"for the API server", k.token(p, ""), "audience"},
				{"bound to no pod", k.request("shop", "web", "countersign", nil), "pod"},
				{"with another token's signature", good[:signed] + foreign[strings.LastIndex(foreign, "."):], "verifying"},
			} {
				_, err := ask(bad.token)
				if err == nil {
					t.Errorf("a token %s was accepted", bad.what)
					continue
				}
				t.Logf("a token %s: %v", bad.what, err)
				if !strings.Contains(err.Error(), bad.says) {
					t.Errorf("a token %s: the error does not say %q: %v", bad.what, bad.says, err)
				}
			}
			deleted := time.Now()
			k.delete(p)
			if !f.ends {
				if _, err := ask(good); err != nil {
					t.Errorf("keys alone cannot tell that a pod has gone, and yet: %v", err)
				}
				return
			}
			w.eventually("a deleted pod's token is refused", func() error {
				if _, err := ask(good); err == nil {
					return fmt.Errorf("accepted")
				}
				return nil
			})
			t.Logf("a deleted pod's token is refused after %v", time.Since(deleted).Round(time.Millisecond))
		})
	}
}

// TestKubePodEnds holds streams open in pods that end.
func TestKubePodEnds(t *testing.T) {
	k := newKubeAPI(t)
	w := newWorld(t, 3, shortTTL)
	seeing := k.kubeconfig("seeing", mayReview(), mayWatch())
	blind := k.kubeconfig("blind", mayReview())
	register(w, "--token-review", "--kubeconfig", seeing)
	a, err := w.StartAgent(w.ctx, "kube/node-1")
	if err != nil {
		t.Fatal(err)
	}
	n := newKubelet(t, w.ctx, w.Cluster, a.Socket)
	for _, f := range []struct {
		name, kubeconfig string
		within           time.Duration // generous: what a person is told is the log below
	}{
		{"pods watched", seeing, 15 * time.Second},
		{"pods not watched", blind, 40 * time.Second},
	} {
		t.Run(f.name, func(t *testing.T) {
			register(w, "--token-review", "--kubeconfig", f.kubeconfig)
			stays := k.pod("shop", "stays-"+random(2), "stays", "node-1")
			goes := k.pod("shop", "goes-"+random(2), "goes", "node-1")
			in := n.sandbox(goes.uid, "cgroupfs", k.token(goes, "countersign"))
			gone, here := in.watch(), n.sandbox(stays.uid, "systemd", k.token(stays, "countersign")).watch()
			for account, l := range map[string]*lines{"goes": gone, "stays": here} {
				l.wait(t, w.ctx, "the first SVID of "+account, func(l []string) bool { return contains(l, "spiffe://"+trustDomain+"/ns/shop/sa/"+account+" ") })
			}
			deleted := time.Now()
			k.delete(goes)
			gone.wait(t, w.ctx, "PermissionDenied on the stream", func(l []string) bool { return contains(l, "permission denied") })
			took := time.Since(deleted)
			t.Logf("the stream of a deleted pod ended after %v: %s", took.Round(time.Millisecond), gone.tail(1))
			if took > f.within {
				t.Errorf("the stream ended after %v", took)
			}
			if out := in.ask(); !strings.HasPrefix(out, "refused PermissionDenied") {
				t.Errorf("a deleted pod asks anew: %s", out)
			}
			svids := count(here.all(), "serial")
			here.wait(t, w.ctx, "the other pod's next SVID", func(l []string) bool { return count(l, "serial") > svids })
			if contains(here.all(), "permission denied") {
				t.Errorf("the other pod lost its identity meanwhile: %s", here.tail(5))
			}
		})
	}
}

// TestKubeAgent attests node agents by the Kubernetes token of their own pod.
func TestKubeAgent(t *testing.T) {
	k := newKubeAPI(t)
	w := newWorld(t, 1, shortTTL)
	k.namespace("countersign")
	register(w, "--token-review", "--kubeconfig", k.kubeconfig("reviewer", mayReview(), mayWatch()), "--agent-account", "countersign/agent")
	start := func(name string, p kubePod) (*cluster.Process, string, func() error) {
		return startKubeAgent(w, name, "kube", k.token(p, "countersign"))
	}

	listed := k.pod("countersign", "agent-1", "agent", "node-1")
	proc, socket, ready := start("listed", listed)
	w.eventually("the agent is ready", ready)
	id := "spiffe://" + trustDomain + "/countersign/agent/kube/kube/node-1"
	if out := w.admin("agent", "list"); !strings.Contains(out, id) {
		t.Errorf("agent list does not show %s:\n%s", id, out)
	}
	web := k.pod("shop", "web", "web", "node-1")
	n := newKubelet(t, w.ctx, w.Cluster, socket)
	in := n.sandbox(web.uid, "systemd", k.token(web, "countersign"))
	if out := in.ask(); !strings.Contains(out, "/ns/shop/sa/web") {
		t.Errorf("a pod behind that agent: %s", out)
	}
	other := k.pod("shop", "other", "web", "node-2")
	if out := n.sandbox(other.uid, "systemd", k.token(other, "countersign")).ask(); !strings.HasPrefix(out, "refused PermissionDenied") {
		t.Errorf("a pod of another node: %s", out)
	}

	t.Run("restart", func(t *testing.T) {
		proc.Kill()
		if err := os.RemoveAll(cluster.StateDir(w.Dir, "listed")); err != nil { // as after a boot: nothing is kept
			t.Fatal(err)
		}
		_, again, ready := start("listed", listed)
		w.eventually("the restarted agent is ready without an operator", ready)
		if again != socket {
			t.Fatal("the socket has moved")
		}
		if out := in.ask(); !strings.Contains(out, "/ns/shop/sa/web") {
			t.Errorf("a pod behind the restarted agent: %s", out)
		}
	})
	t.Run("account not listed", func(t *testing.T) {
		impostor := k.pod("shop", "agent", "agent", "node-2") // shop/agent is not countersign/agent
		_, _, ready := start("unlisted", impostor)
		log := filepath.Join(w.Dir, "unlisted", "log")
		w.eventually("the agent says why it is refused", func() error {
			if ready() == nil {
				t.Fatal("the agent is ready")
			}
			data, _ := os.ReadFile(log)
			if !strings.Contains(string(data), "shop/agent") {
				return fmt.Errorf("the log does not name the account: %s", data)
			}
			return nil
		})
		if out := w.admin("agent", "list"); strings.Contains(out, "node-2") {
			t.Errorf("agent list shows the impostor:\n%s", out)
		}
	})
	t.Run("banned", func(t *testing.T) {
		w.admin("agent", "ban", id)
		w.eventually("the pods lose their identity", func() error {
			if out := in.ask(); strings.Contains(out, "/ns/shop/sa/web") {
				return fmt.Errorf("still served: %s", out)
			}
			return nil
		})
	})
}

// startKubeAgent starts an agent whose own pod has that token; ready asks it, as a probe does.
func startKubeAgent(w *world, name, kubeCluster, token string) (p *cluster.Process, socket string, ready func() error) {
	w.t.Helper()
	dir := filepath.Join(w.Dir, name)
	health, err := cluster.FreeAddress()
	if err != nil {
		w.t.Fatal(err)
	}
	var b struct {
		CAPin string `json:"ca_pin"`
	}
	parseJSON(w.t, w.admin("bundle", "show", "-o", "json"), &b)
	state := cluster.StateDir(w.Dir, name)
	w.t.Cleanup(func() { os.RemoveAll(state) })
	socket = filepath.Join(dir, "agent.sock")
	yaml := fmt.Sprintf("version: 1\ntrust_domain: %s\nservers: [%q]\nca_pin: %s\nsocket: %s\nstate_dir: %s\nhealth: %s\nattest: {kube: {cluster: %s, token_path: %s}}\n",
		w.TrustDomain, w.Members[0].Address, b.CAPin, socket, state, health, kubeCluster, filepath.Join(dir, "token"))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		w.t.Fatal(err)
	}
	for file, text := range map[string]string{"token": token, "agent.yaml": yaml} {
		if err := os.WriteFile(filepath.Join(dir, file), []byte(text), 0o600); err != nil {
			w.t.Fatal(err)
		}
	}
	log, err := os.OpenFile(filepath.Join(dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { log.Close() })
	if p, err = w.Start(name, nil, log, filepath.Join(bin, "countersign-agent"), "run", "-c", filepath.Join(dir, "agent.yaml")); err != nil {
		w.t.Fatal(err)
	}
	return p, socket, func() error {
		if p.Exited() {
			return fmt.Errorf("the agent has ended: see its log")
		}
		res, err := http.Get("http://" + health + "/ready")
		if err != nil {
			return err
		}
		defer res.Body.Close()
		if res.StatusCode != http.StatusOK {
			return fmt.Errorf("not ready: %s", res.Status)
		}
		return nil
	}
}

// TestKubeDown takes the API server away: first it hangs, then it is gone.
func TestKubeDown(t *testing.T) {
	k := newKubeAPI(t)
	w := newWorld(t, 1, shortTTL)
	seeing := k.kubeconfig("seeing", mayReview(), mayWatch(), mayReadKeys())
	jwks := k.jwks()
	register(w, "--jwks-file", jwks, "--kubeconfig", seeing)
	a, err := w.StartAgent(w.ctx, "kube/node-1")
	if err != nil {
		t.Fatal(err)
	}
	n := newKubelet(t, w.ctx, w.Cluster, a.Socket)
	early := k.pod("shop", "early", "web", "node-1")
	running := n.sandbox(early.uid, "cgroupfs", k.token(early, "countersign")).watch()
	running.wait(t, w.ctx, "the first SVID", func(l []string) bool { return contains(l, "serial") })
	late := k.pod("shop", "late", "late", "node-1")
	token := k.token(late, "countersign")
	good := func(what string) {
		t.Helper()
		if out := n.sandbox(late.uid, "systemd", token).ask(); !strings.Contains(out, "/ns/shop/sa/late") {
			t.Errorf("%s, a new container: %s", what, out)
		}
		before := count(running.all(), "serial")
		running.wait(t, w.ctx, what+", the next two SVIDs", func(l []string) bool { return count(l, "serial") > before+1 })
	}
	unavailable := func(what string) {
		t.Helper()
		out := n.sandbox(late.uid, "systemd", token).ask()
		t.Logf("%s, TokenReview asked for: %s", what, out)
		if !strings.HasPrefix(out, "refused Unavailable") || !strings.Contains(out, "TokenReview") {
			t.Errorf("%s, TokenReview asked for: want Unavailable and the reason, got: %s", what, out)
		}
	}
	w.eventually("the watch has begun", func() error {
		p := k.pod("shop", "probe-"+random(3), "web", "node-1")
		tok := k.token(p, "countersign")
		k.delete(p)
		if out := n.sandbox(p.uid, "systemd", tok).ask(); strings.Contains(out, "/ns/shop") {
			return fmt.Errorf("a deleted pod has an identity: %s", out)
		}
		return nil
	})

	k.proc.Signal(syscall.SIGSTOP)
	defer k.proc.Signal(syscall.SIGCONT)
	good("hanging, keys held")
	register(w, "--token-review", "--kubeconfig", seeing)
	unavailable("hanging")

	k.proc.Signal(syscall.SIGCONT)
	again := func(what string) {
		t.Helper()
		w.eventually(what, func() error {
			if out := n.sandbox(late.uid, "systemd", token).ask(); !strings.Contains(out, "/ns/shop/sa/late") {
				return fmt.Errorf("%s", out)
			}
			return nil
		})
	}
	again("TokenReview serves when the API server is back")
	register(w, "--jwks-url", "https://kubernetes.default.svc/openid/v1/jwks", "--kubeconfig", seeing)
	again("fetched keys serve")
	k.proc.Kill()
	good("gone, keys fetched before")
	register(w, "--jwks-file", jwks)
	good("gone, keys held, no kubeconfig")
	register(w, "--token-review", "--kubeconfig", seeing)
	unavailable("gone")
	register(w, "--jwks-file", jwks, "--token-review", "--kubeconfig", seeing)
	unavailable("gone, keys and TokenReview")
}

// TestKubeDownAlone has an API server hang that many pods of a node depend on: what does not depend on it is served as ever.
func TestKubeDownAlone(t *testing.T) {
	k := newKubeAPI(t)
	w := newWorld(t, 1, shortTTL)
	register(w, "--token-review", "--kubeconfig", k.kubeconfig("seeing", mayReview(), mayWatch()))
	a, err := w.StartAgent(w.ctx, "kube/node-1")
	if err != nil {
		t.Fatal(err)
	}
	n := newKubelet(t, w.ctx, w.Cluster, a.Socket)
	w.createEntry(append(uidSelectors(), "--id", clientID)...)
	var pods []*lines
	for i := range 24 {
		p := k.pod("shop", fmt.Sprintf("web-%d", i), "web", "node-1")
		pods = append(pods, n.sandbox(p.uid, "cgroupfs", k.token(p, "countersign")).watch())
	}
	for _, p := range pods {
		p.wait(t, w.ctx, "the first SVID", func(l []string) bool { return contains(l, "serial") })
	}
	s := w.watch(a)
	w.until(s, "the process's identity", func(ids []string) bool { return len(ids) == 1 })
	k.proc.Signal(syscall.SIGSTOP)
	defer k.proc.Signal(syscall.SIGCONT)
	hung := time.Now()
	for i := range 6 {
		select {
		case <-s.updates:
			t.Logf("rotation %d of the process after %v", i+1, time.Since(hung).Round(time.Millisecond))
		case err := <-s.errs:
			t.Fatalf("the process lost its stream after %v: %v", time.Since(hung), err)
		case <-w.ctx.Done():
			t.Fatal(w.ctx.Err())
		}
	}
}

// TestKubeTwoClusters registers two kube clusters that look alike: the same namespace, account, pod and node names, and the same
// issuer. What tells them apart is their keys.
func TestKubeTwoClusters(t *testing.T) {
	first, second := newKubeAPI(t), newKubeAPI(t)
	w := newWorld(t, 1, shortTTL)
	add := func(name, path string, k *kubeAPI) {
		w.admin("kube", "add", name, "--issuer", kubeIssuer, "--jwks-file", k.jwks(), "--token-review",
			"--kubeconfig", k.kubeconfig("member", mayReview(), mayWatch()), "--default-id", path, "--agent-account", "shop/agent")
	}
	add("first", "/first/ns/{k8s:ns}/sa/{k8s:sa}", first)
	add("second", "/second/ns/{k8s:ns}/sa/{k8s:sa}", second)
	node := map[string]*cluster.Agent{}
	for _, name := range []string{"first", "second"} {
		a, err := w.StartAgent(w.ctx, name+"/node-1")
		if err != nil {
			t.Fatal(err)
		}
		node[name] = a
	}
	of := func(k *kubeAPI) kubePod { return k.pod("shop", "web", "web", "node-1") }
	pods := map[string]kubePod{"first": of(first), "second": of(second)}
	tokens := map[string]string{"first": first.token(pods["first"], "countersign"), "second": second.token(pods["second"], "countersign")}
	for _, here := range []string{"first", "second"} {
		n := newKubelet(t, w.ctx, w.Cluster, node[here].Socket)
		want := "identity spiffe://" + trustDomain + "/" + here + "/ns/shop/sa/web"
		if out := n.sandbox(pods[here].uid, "cgroupfs", tokens[here]).ask(); out != want {
			t.Errorf("a pod of cluster %s: got %q, want %q", here, out, want)
		}
		there := map[string]string{"first": "second", "second": "first"}[here]
		// As if a pod's volume had been carried over, with all that it says of itself.
		if out := n.sandbox(pods[there].uid, "systemd", tokens[there]).ask(); !strings.HasPrefix(out, "refused PermissionDenied") {
			t.Errorf("a pod of cluster %s behind an agent of cluster %s: %s", there, here, out)
		}
		if out := n.sandbox(pods[here].uid, "systemd", tokens[there]).ask(); !strings.HasPrefix(out, "refused PermissionDenied") {
			t.Errorf("a token of cluster %s in a pod of cluster %s: %s", there, here, out)
		}
	}

	// A token that claims to be of one and is signed by the other has no key, whatever else it says; and each API server backs its own alone.
	mixed := tokens["first"][:strings.LastIndex(tokens["first"], ".")] + tokens["second"][strings.LastIndex(tokens["second"], "."):]
	n := newKubelet(t, w.ctx, w.Cluster, node["first"].Socket)
	if out := n.sandbox(pods["first"].uid, "cgroupfs", mixed).ask(); !strings.HasPrefix(out, "refused") {
		t.Errorf("a token with the other cluster's signature: %s", out)
	}
	// The pods' end in one cluster is nothing to the other's.
	first.delete(pods["first"])
	w.eventually("a deleted pod's token is refused", func() error {
		if out := n.sandbox(pods["first"].uid, "systemd", tokens["first"]).ask(); strings.HasPrefix(out, "identity") {
			return fmt.Errorf("%s", out)
		}
		return nil
	})
	if out := newKubelet(t, w.ctx, w.Cluster, node["second"].Socket).sandbox(pods["second"].uid, "systemd", tokens["second"]).ask(); !strings.HasPrefix(out, "identity") {
		t.Errorf("the other cluster's pod of the same name: %s", out)
	}
	// An agent's own token is of its cluster too.
	agent := second.pod("shop", "agent", "agent", "node-1")
	_, _, ready := startKubeAgent(w, "carried", "first", second.token(agent, "countersign"))
	log := filepath.Join(w.Dir, "carried", "log")
	w.eventually("the agent says why it is refused", func() error {
		if ready() == nil {
			t.Fatal("the agent is ready")
		}
		data, _ := os.ReadFile(log)
		if !strings.Contains(string(data), "is of kube cluster") {
			return fmt.Errorf("the log does not say: %s", data)
		}
		return nil
	})
}
