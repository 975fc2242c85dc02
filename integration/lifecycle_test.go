//go:build integration

package integration

import (
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	authv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"countersign.io/countersign/integration/node"
)

func (p *play) must(method, path string, in, out any) {
	p.t.Helper()
	if err := p.n.Do(p.ctx, method, path, in, out); err != nil {
		p.t.Fatal(err)
	}
}

func (p *play) pods() string { return "/api/v1/namespaces/" + p.ns + "/pods" }

// token is one as the kubelet gets it for a pod. It stands for what an attacker has stolen from it.
func (p *play) token(pod *corev1.Pod) string {
	p.t.Helper()
	in := &authv1.TokenRequest{Spec: authv1.TokenRequestSpec{
		Audiences: []string{"countersign"}, ExpirationSeconds: new(int64(600)),
		BoundObjectRef: &authv1.BoundObjectReference{Kind: "Pod", APIVersion: "v1", Name: pod.Name, UID: pod.UID},
	}}
	var out authv1.TokenRequest
	p.must(http.MethodPost, "/api/v1/namespaces/"+p.ns+"/serviceaccounts/"+pod.Spec.ServiceAccountName+"/token", in, &out)
	return out.Status.Token
}

// show shows a token to the members, as anybody who reaches them can, and returns their answer.
func (p *play) show(token string) (string, error) {
	p.t.Helper()
	programs, err := static()
	if err != nil {
		p.t.Fatal(err)
	}
	file := filepath.Join(p.t.TempDir(), "token")
	if err := os.WriteFile(file, []byte(token), 0o600); err != nil {
		p.t.Fatal(err)
	}
	argv := []string{filepath.Join(programs, "countersign-agent"), "fetch", "x509", "--direct", "--ca-pin", p.pin, "--token-path", file}
	all, err := p.n.Pods(p.ctx, "countersign", "app.kubernetes.io/name=countersign")
	if err != nil {
		p.t.Fatal(err)
	}
	for _, m := range all {
		argv = append(argv, "--server", m.Status.PodIP+":8443")
	}
	return p.n.Run(p.ctx, "", argv...)
}

// accepted waits until the members accept a token, as they must unless they cannot tell.
func (p *play) accepted(token string) {
	p.t.Helper()
	for last := time.Now().Add(2 * time.Minute); ; time.Sleep(50 * time.Millisecond) {
		out, err := p.show(token)
		if err == nil {
			return
		}
		if !strings.Contains(err.Error(), "unavailable") || time.Now().After(last) {
			p.t.Fatalf("the token of a living pod: %s %v", out, err)
		}
	}
}

// refused waits until a token is refused for good.
func (p *play) refused(token, says string) {
	p.t.Helper()
	for last := time.Now().Add(2 * time.Minute); ; time.Sleep(50 * time.Millisecond) {
		out, err := p.show(token)
		if err != nil && strings.Contains(err.Error(), says) {
			return
		}
		if time.Now().After(last) {
			p.t.Fatalf("the token is not refused with %q: %s %v", says, out, err)
		}
	}
}

func since(from time.Time) time.Duration { return time.Since(from).Round(10 * time.Millisecond) }

// ended takes the errors that a pod's stream saw.
func (r *running) errors() (out []glimpse) {
	r.p.t.Helper()
	for _, g := range r.seen() {
		if g.Event == "error" {
			out = append(out, g)
		}
	}
	return out
}

// TestStagePodsEnd has pods end in every way in which Kubernetes ends them. Their programs go on for their grace period, as some do.
func TestStagePodsEnd(t *testing.T) {
	const grace = 4 * time.Second
	for _, c := range []struct {
		name string
		end  func(p *play, pod *corev1.Pod)
	}{
		{"deleted", func(p *play, pod *corev1.Pod) { p.must(http.MethodDelete, p.pods()+"/"+pod.Name, nil, nil) }},
		{"evicted", func(p *play, pod *corev1.Pod) {
			p.must(http.MethodPost, p.pods()+"/"+pod.Name+"/eviction", &policyv1.Eviction{
				TypeMeta: metav1.TypeMeta{APIVersion: "policy/v1", Kind: "Eviction"}, ObjectMeta: metav1.ObjectMeta{Name: pod.Name},
			}, nil)
		}},
		{"namespace terminating", func(p *play, pod *corev1.Pod) { p.must(http.MethodDelete, "/api/v1/namespaces/"+p.ns, nil, nil) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := onStage(t)
			p.account("web")
			r := p.follow("web", "web", "  terminationGracePeriodSeconds: 4\n")
			r.identity()
			token := p.token(r.pod)
			p.accepted(token)
			began := time.Now()
			c.end(p, r.pod)
			if err := p.n.WaitGone(p.ctx, p.pods(), "web"); err != nil {
				t.Fatal(err)
			}
			gone := time.Now()
			p.refused(token, "is gone")
			t.Logf("gone after %v with %v of grace, its token refused %v later; its stream saw %v", gone.Sub(began).Round(10*time.Millisecond), grace, since(gone), r.errors())
		})
	}
	t.Run("deleted by force", func(t *testing.T) {
		p := onStage(t)
		p.account("web")
		r := p.follow("web", "web", "  terminationGracePeriodSeconds: 20\n")
		r.identity()
		token := p.token(r.pod)
		began := time.Now()
		p.must(http.MethodDelete, p.pods()+"/web", &metav1.DeleteOptions{GracePeriodSeconds: new(int64(0))}, nil)
		p.refused(token, "is gone")
		t.Logf("its token refused after %v; its stream saw %v", since(began), r.errors())
	})
	for _, c := range []struct {
		name, phase string
		by          syscall.Signal
	}{
		{"completed", "Succeeded", syscall.SIGUSR1},
		{"failed", "Failed", syscall.SIGKILL},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := onStage(t)
			p.account("job")
			r := p.follow("job", "job", "  restartPolicy: Never\n")
			r.identity()
			token := p.token(r.pod)
			p.accepted(token)
			if err := p.n.Signal(p.ctx, p.get("job"), "main", c.by); err != nil {
				t.Fatal(err)
			}
			if err := node.WaitFor(p.ctx, p.n, p.pods(), "job", "it ends", func(o *corev1.Pod) bool { return string(o.Status.Phase) == c.phase }); err != nil {
				t.Fatal(err)
			}
			ended := time.Now()
			p.refused(token, "has finished")
			t.Logf("its token refused %v after the pod was %s", since(ended), c.phase)
		})
	}
}

// TestStageAccountDeleted has a service account go while its pod runs on.
func TestStageAccountDeleted(t *testing.T) {
	p := onStage(t)
	p.account("web")
	r := p.follow("web", "web", "")
	r.identity()
	before := len(r.seen())
	began := time.Now()
	p.must(http.MethodDelete, "/api/v1/namespaces/"+p.ns+"/serviceaccounts/web", nil, nil)
	g := r.until("the end of its identity", before, func(g glimpse) bool { return g.Event == "error" })
	if !strings.Contains(g.Error, "PermissionDenied") {
		t.Errorf("the stream ended with %s", g.Error)
	}
	t.Logf("the stream ended %v after the service account: %s", g.Time.Sub(began).Round(10*time.Millisecond), g.Error)
}

// TestStageAgentRestarts kills the node's agent. What it served is there again, by the same sockets.
func TestStageAgentRestarts(t *testing.T) {
	p := onStage(t)
	k := p.talking()
	p.account("web")
	r := p.follow("web", "web", "")
	r.identity()
	k.shaken(50)
	agents, err := p.n.WaitReady(p.ctx, "countersign", "app.kubernetes.io/name=countersign-agent", 1)
	if err != nil {
		t.Fatal(err)
	}
	before, began := len(r.seen()), time.Now()
	if err := p.n.Signal(p.ctx, &agents[0], "countersign-agent", syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	g := r.until("an SVID by the agent that follows", before, func(g glimpse) bool { return g.Event == "svid" })
	t.Logf("an SVID again %v after the agent was killed; its stream saw %v", g.Time.Sub(began).Round(10*time.Millisecond), r.errors())
	k.shaken(100)
	if p.follow("late", "web", "").identity(); len(k.log.errs) > 0 {
		t.Error(k.log.errs)
	}
}

// TestStageBadVolume has volumes that are refused, each with an event on the pod that says why.
func TestStageBadVolume(t *testing.T) {
	p := onStage(t)
	p.account("web")
	for i, c := range []struct{ attributes, says string }{
		{`{colour: "red"}`, "colour"},
		{`{files: "maybe"}`, "files"},
		{`{jwtAudiences: "vault"}`, "files"},
		{`{files: "true", jwtAudiences: "a,a"}`, "jwtAudiences"},
	} {
		name := fmt.Sprint("bad-", i)
		p.apply(p.podManifest(name, "web", "\n  volumes: [{name: identity, csi: {driver: csi.countersign.io, readOnly: true, volumeAttributes: "+c.attributes+"}}]\n", volumeMounts, "", "/pod", "pause"))
		p.event(name, "FailedMount", c.says)
	}
	// The kubelet takes nothing out of the volume that is not in it, nor follows what a pod could plant.
	for i, c := range []struct{ sub, says string }{{"agent.sock/x", ""}, {"nothing-there", ""}} {
		name := fmt.Sprint("sub-", i)
		p.apply(p.podManifest(name, "web", volume, "[{name: identity, mountPath: /run/countersign, readOnly: true, subPath: "+c.sub+"}]", "", "/pod", "pause"))
		p.event(name, "Failed", c.says)
	}
	r := p.start("planter", p.podManifest("planter", "web", volume, "[{name: identity, mountPath: /run/countersign}]", "", "/pod", "plant", "/run/countersign"))
	if err := r.out.Wait(p.ctx, "what it could do", func(lines []string) bool { return contains(lines, "done") }); err != nil {
		t.Fatal(err)
	}
	if lines, _ := r.out.Lines(); contains(lines, "could") || count(lines, "read-only file system") < 5 {
		t.Errorf("a pod changed its volume: %v", lines)
	}
	forger := p.start("forger", p.podManifest("forger", "web", `
  volumes: [{name: plugin, hostPath: {path: /var/lib/kubelet/plugins, type: Directory}}]
`, "[{name: plugin, mountPath: /plugins}]", "", "/pod", "dial", "/plugins/csi.countersign.io/csi.sock"))
	if err := forger.out.Wait(p.ctx, "what it could do", func(lines []string) bool { return contains(lines, "done") }); err != nil {
		t.Fatal(err)
	}
	if lines, _ := forger.out.Lines(); contains(lines, "could") || !contains(lines, "permission denied") {
		t.Errorf("a pod calls the driver: %v", lines)
	}
}

// TestStageNoToken has the kubelet hand over tokens for somebody else, and none.
func TestStageNoToken(t *testing.T) {
	p := onStage(t)
	p.account("web")
	const driver = "/apis/storage.k8s.io/v1/csidrivers/csi.countersign.io"
	var was storagev1.CSIDriver
	p.must(http.MethodGet, driver, nil, &was)
	set := func(requests []storagev1.TokenRequest) {
		var d storagev1.CSIDriver
		p.must(http.MethodGet, driver, nil, &d)
		d.Spec.TokenRequests = requests
		p.must(http.MethodPut, driver, &d, nil)
	}
	defer set(was.Spec.TokenRequests)
	for name, requests := range map[string][]storagev1.TokenRequest{"none": nil, "other": {{Audience: "vault"}}} {
		set(requests)
		p.apply(p.podManifest(name, "web", volume, volumeMounts, "", "/pod", "pause"))
		p.event(name, "FailedMount", "tokenRequests")
	}
	set(was.Spec.TokenRequests)
	// The kubelet tries again, and the pods start.
	for _, name := range []string{"none", "other"} {
		if err := node.WaitFor(p.ctx, p.n, p.pods(), name, "it runs", func(o *corev1.Pod) bool { return o.Status.Phase == corev1.PodRunning }); err != nil {
			t.Error(err)
		}
	}
}

// TestStageVolumeFiles has a program read its SVID from files, and the next from the same files.
func TestStageVolumeFiles(t *testing.T) {
	p := onStage(t)
	p.account("web")
	const files = `
  volumes: [{name: identity, csi: {driver: csi.countersign.io, readOnly: true, volumeAttributes: {files: "true", jwtAudiences: "vault"}}}]
`
	pod := p.start("web", p.podManifest("web", "web", files, volumeMounts, "", "/pod", "follow")).pod
	want := fmt.Sprintf("files spiffe://%s/ns/%s/sa/web ", kubeDomain, p.ns)
	serials := map[string]bool{}
	for end := time.Now().Add(time.Minute); len(serials) < 3 && time.Now().Before(end); time.Sleep(time.Second) {
		out, err := p.n.Exec(p.ctx, p.ns, pod.Name, "main", "/pod", "files", "/run/countersign")
		if err == nil && out == "" { // ctr sometimes ends before it has read what the program wrote, which always writes something
			continue
		}
		f := strings.Fields(out)
		if err != nil || !strings.HasPrefix(out, want) || len(f) != 5 || !strings.HasPrefix(f[4], "[jwt-") {
			t.Fatalf("got %q, %v; want %s and a JWT-SVID", out, err, want)
		}
		if f[3] != "-rw-r-----" {
			t.Errorf("the key has mode %s", f[3])
		}
		serials[f[2]] = true
	}
	if len(serials) < 3 {
		t.Errorf("only %d SVIDs in the files within a minute", len(serials))
	}
}

// event waits for an event on a pod.
func (p *play) event(pod, reason, says string) {
	p.t.Helper()
	var last []string
	for end := time.Now().Add(90 * time.Second); time.Now().Before(end); time.Sleep(200 * time.Millisecond) {
		var err error
		if last, err = p.n.Events(p.ctx, p.ns, pod); err != nil {
			p.t.Fatal(err)
		}
		for _, e := range last {
			if strings.HasPrefix(e, reason) && strings.Contains(e, says) {
				p.t.Logf("pod %s: %s", pod, e)
				return
			}
		}
	}
	p.t.Errorf("pod %s: no event %s with %q: %v", pod, reason, says, last)
}

// TestStageNodeLost has the kubelet die. Nobody can confirm the end of the node's pods, which run on.
func TestStageNodeLost(t *testing.T) {
	p := onStage(t)
	p.account("web")
	r := p.follow("web", "web", `  terminationGracePeriodSeconds: 2
  tolerations:
  - {key: node.kubernetes.io/unreachable, operator: Exists, effect: NoExecute, tolerationSeconds: 1}
  - {key: node.kubernetes.io/not-ready, operator: Exists, effect: NoExecute, tolerationSeconds: 1}
`)
	r.identity()
	token := p.token(r.pod)
	before, began := len(r.seen()), time.Now()
	if err := p.n.StopKubelet(p.ctx); err != nil {
		t.Fatal(err)
	}
	defer p.settle()
	var deleted time.Time
	if err := node.WaitFor(p.ctx, p.n, p.pods(), "web", "the pod is to end", func(o *corev1.Pod) bool {
		if o.DeletionTimestamp != nil {
			deleted = o.DeletionTimestamp.Time
		}
		return o.DeletionTimestamp != nil
	}); err != nil {
		t.Fatal(err)
	}
	g := r.until("the end of its identity", before, func(g glimpse) bool { return g.Event == "error" })
	if !strings.Contains(g.Error, "PermissionDenied") {
		t.Errorf("the stream ended with %s", g.Error)
	}
	t.Logf("its grace period was over %v after the kubelet died, the stream ended %v after that: %s",
		deleted.Sub(began).Round(time.Second), g.Time.Sub(deleted).Round(100*time.Millisecond), g.Error)
	p.refused(token, "")
	if err := p.n.StartKubelet(p.ctx); err != nil {
		t.Fatal(err)
	}
	if err := p.n.WaitGone(p.ctx, p.pods(), "web"); err != nil {
		t.Fatal(err)
	}
}

// settle waits until the stage is whole again, with the kubelet and the API server running.
func (p *play) settle() {
	p.t.Helper()
	if err := p.n.StartAPI(p.ctx); err != nil { // unless it runs
		p.t.Fatal(err)
	}
	if err := p.n.StartKubelet(p.ctx); err != nil {
		p.t.Fatal(err)
	}
	if err := node.WaitFor(p.ctx, p.n, "/api/v1/nodes", node.Name, "the node is ready", node.Ready); err != nil {
		p.t.Fatal(err)
	}
	for app, count := range map[string]int{"countersign": members, "countersign-agent": 1} {
		if _, err := p.n.WaitReady(p.ctx, "countersign", "app.kubernetes.io/name="+app, count); err != nil {
			p.t.Fatal(err)
		}
	}
}

// TestStageTokenEnds has a pod's token end while the API server is away, so that the kubelet cannot renew it. The pod has it from a
// folder of the node: one as the API server signs it, but of a minute, since that gives none of less than ten.
func TestStageTokenEnds(t *testing.T) {
	p := onStage(t)
	p.account("web")
	dir := filepath.Join(p.n.Dir(), p.ns)
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	r := p.start("web", p.podManifest("web", "web", fmt.Sprintf(`
  volumes:
  - {name: agent, hostPath: {path: /run/countersign, type: Directory}}
  - {name: token, hostPath: {path: %s, type: Directory}}
`, dir), sharedMounts, "", "/pod", "follow"))
	end := time.Now().Add(time.Minute)
	put := func(token string) {
		file := filepath.Join(dir, "next")
		if err := os.WriteFile(file, []byte(token), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(file, filepath.Join(dir, "token")); err != nil {
			t.Fatal(err)
		}
	}
	put(p.until(p.token(r.pod), end))
	svid := r.until("an SVID", 0, func(g glimpse) bool { return g.Event == "svid" })
	other := p.follow("other", "web", "")
	other.identity()
	before := len(r.seen())
	if err := p.n.StopAPI(p.ctx); err != nil {
		t.Fatal(err)
	}
	defer p.settle()
	down := time.Now()
	unavailable := r.until("the end of its SVID", before, func(g glimpse) bool { return g.Event == "error" && g.Time.After(svid.Expires) })
	t.Logf("its SVID's time was over, and the stream ended, %v after the API server went: %s", unavailable.Time.Sub(down).Round(time.Second), unavailable.Error)
	if !strings.Contains(unavailable.Error, "Unavailable") {
		t.Errorf("the stream ended with %s", unavailable.Error)
	}
	denied := r.until("the end of its token", before, func(g glimpse) bool { return strings.Contains(g.Error, "PermissionDenied") })
	t.Logf("its token's time was over %v after the API server went; the next answer, %v later: %s",
		end.Sub(down).Round(time.Second), denied.Time.Sub(end).Round(100*time.Millisecond), denied.Error)
	if denied.Time.Before(end) || !strings.Contains(denied.Error, "expired") {
		t.Errorf("got %+v", denied)
	}
	before, others := len(r.seen()), len(other.seen())
	if err := p.n.StartAPI(p.ctx); err != nil {
		t.Fatal(err)
	}
	back := time.Now()
	g := other.until("an SVID, with the API server back", others, func(g glimpse) bool { return g.Event == "svid" })
	t.Logf("a pod with a token that lasted has an SVID again %v after the API server was back", g.Time.Sub(back).Round(100*time.Millisecond))
	put(p.token(r.pod))
	r.until("an SVID by a new token", before, func(g glimpse) bool { return g.Event == "svid" })
}

// until signs a token anew, with the API server's own key, to end then.
func (p *play) until(token string, end time.Time) string {
	p.t.Helper()
	pemKey, err := os.ReadFile(filepath.Join(p.n.Dir(), "pki", "sa.key"))
	if err != nil {
		p.t.Fatal(err)
	}
	block, _ := pem.Decode(pemKey)
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		p.t.Fatal(err)
	}
	old, err := jose.ParseSignedCompact(token, []jose.SignatureAlgorithm{jose.RS256})
	if err != nil {
		p.t.Fatal(err)
	}
	claims := map[string]any{}
	if err := json.Unmarshal(old.UnsafePayloadWithoutVerification(), &claims); err != nil {
		p.t.Fatal(err)
	}
	claims["exp"] = end.Unix()
	payload, err := json.Marshal(claims)
	if err != nil {
		p.t.Fatal(err)
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.RS256, Key: key}, (&jose.SignerOptions{}).WithHeader("kid", old.Signatures[0].Header.KeyID))
	if err != nil {
		p.t.Fatal(err)
	}
	signed, err := signer.Sign(payload)
	if err != nil {
		p.t.Fatal(err)
	}
	out, err := signed.CompactSerialize()
	if err != nil {
		p.t.Fatal(err)
	}
	return out
}
