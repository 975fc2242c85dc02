//go:build integration

package integration

import (
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"countersign.io/countersign/integration/node"
)

// kubeDomain is the trust domain of what is installed on the node.
const kubeDomain = "kube.test"

// stage is Countersign on a node of Kubernetes, shared by tests: members, and an agent on the node.
type stage struct {
	n         *node.Node
	installed node.Installation
	pin       string // of the CA
}

// members of the stage; all on one node.
const members = 3

// sharedStage installs Countersign by its chart on the shared node.
var sharedStage = sync.OnceValues(func() (*stage, error) {
	n, err := sharedNode()
	if err != nil {
		return nil, err
	}
	programs, err := static()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Minute)
	defer cancel()
	s := &stage{n: n, installed: node.Installation{
		Countersign: filepath.Join(bin, "countersign"), Programs: programs, TrustDomain: kubeDomain, Members: members,
		// Lives are short, so that tests see many of them.
		Set: []string{"logFormat=text", "members.config={x509_ttl: 20s, max_staleness: 1m}", "bundle.namespaces=countersign.io/bundle=true"},
	}}
	if err := n.Install(ctx, s.installed); err != nil {
		return nil, s.explain(ctx, err)
	}
	out, err := s.admin(ctx, "bundle", "show", "-o", "json")
	if err != nil {
		return nil, err
	}
	var bundle struct {
		CAPin string `json:"ca_pin"`
	}
	if err := json.Unmarshal([]byte(out), &bundle); err != nil {
		return nil, err
	}
	s.pin = bundle.CAPin
	return s, nil
})

// explain adds to an error what the pods of the product wrote last.
func (s *stage) explain(ctx context.Context, err error) error {
	pods, _ := s.n.Pods(ctx, "countersign", "")
	for _, p := range pods {
		for _, c := range p.Spec.Containers {
			out, _ := s.n.Logs(ctx, p.Namespace, p.Name, c.Name)
			err = fmt.Errorf("%w\n--- %s %s\n%s", err, p.Name, c.Name, out[max(0, len(out)-4000):])
		}
		events, _ := s.n.Events(ctx, p.Namespace, p.Name)
		err = fmt.Errorf("%w\n%s", err, strings.Join(events, "\n"))
	}
	return err
}

// admin runs an operator's command in the first member's pod.
func (s *stage) admin(ctx context.Context, args ...string) (string, error) {
	return s.n.Exec(ctx, "countersign", "countersign-0", "countersign", append([]string{"/countersign"}, args...)...)
}

// play is one test's part of a stage: namespaces of its own.
type play struct {
	*stage
	t   *testing.T
	ctx context.Context
	ns  string
}

// onStage gives a test a namespace on the shared stage.
func onStage(t *testing.T) *play {
	t.Helper()
	ctx, _ := kubernetes(t)
	began := time.Now()
	s, err := sharedStage()
	if err != nil {
		t.Fatal(err)
	}
	if took := time.Since(began); took > time.Second {
		t.Logf("Countersign ready after %.1f s", took.Seconds())
	}
	p := &play{stage: s, t: t, ctx: ctx, ns: "t-" + random(4)}
	p.apply("apiVersion: v1\nkind: Namespace\nmetadata: {name: " + p.ns + "}\n")
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(s.explain(ctx, fmt.Errorf("what the product wrote:")))
		}
		_ = s.n.Do(ctx, "DELETE", "/api/v1/namespaces/"+p.ns, nil, nil)
	})
	return p
}

func (p *play) apply(manifest string) {
	p.t.Helper()
	if err := p.n.Apply(p.ctx, manifest); err != nil {
		p.t.Fatal(err)
	}
}

// account makes a service account.
func (p *play) account(name string) {
	p.t.Helper()
	p.apply("apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: " + name + ", namespace: " + p.ns + "}\n")
}

// The volumes by which a pod has its identity, and where it sees them.
const (
	shared = `
  volumes:
  - {name: agent, hostPath: {path: /run/countersign, type: Directory}}
  - {name: token, projected: {sources: [{serviceAccountToken: {path: token, audience: countersign, expirationSeconds: 600}}]}}
`
	volume = `
  volumes: [{name: identity, csi: {driver: csi.countersign.io, readOnly: true}}]
`
	volumeMounts = `[{name: identity, mountPath: /run/countersign, readOnly: true}]`
	sharedMounts = `[{name: agent, mountPath: /run/countersign, readOnly: true}, {name: token, mountPath: /var/run/secrets/countersign.io}]`
)

// podManifest is a pod of one container by the given way to have an identity, with more of its spec.
func (p *play) podManifest(name, account, volumes, mounts, more string, command ...string) string {
	argv, _ := json.Marshal(command)
	if !strings.Contains(more, "terminationGracePeriodSeconds") {
		more += "  terminationGracePeriodSeconds: 1\n"
	}
	return fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: %s, namespace: %s, labels: {app: %s}}
spec:
  serviceAccountName: %s
  automountServiceAccountToken: false
  securityContext: {runAsUser: 1000, runAsGroup: 1000, fsGroup: 1000, runAsNonRoot: true, seccompProfile: {type: RuntimeDefault}}
  containers:
  - name: main
    image: %s
    imagePullPolicy: Never
    command: %s
    env: [{name: SPIFFE_ENDPOINT_SOCKET, value: "unix:///run/countersign/agent.sock"}]
    securityContext: {allowPrivilegeEscalation: false, readOnlyRootFilesystem: true, capabilities: {drop: [ALL]}}
    volumeMounts: %s
%s%s`, name, p.ns, name, account, appImage, argv, mounts, more, volumes)
}

// get reads a pod.
func (p *play) get(name string) *corev1.Pod {
	p.t.Helper()
	var pod corev1.Pod
	if err := p.n.Do(p.ctx, "GET", "/api/v1/namespaces/"+p.ns+"/pods/"+name, nil, &pod); err != nil {
		p.t.Fatal(err)
	}
	return &pod
}

// running is a pod whose program is followed.
type running struct {
	p   *play
	pod *corev1.Pod
	out *node.Output
}

// start applies a pod and waits until its program runs.
func (p *play) start(name, manifest string) *running {
	p.t.Helper()
	p.apply(manifest)
	var pod corev1.Pod
	if err := node.WaitFor(p.ctx, p.n, "/api/v1/namespaces/"+p.ns+"/pods", name, "pod "+name+" runs", func(o *corev1.Pod) bool {
		pod = *o
		return o.Status.Phase == corev1.PodRunning
	}); err != nil {
		p.t.Fatal(err)
	}
	out, err := p.n.Output(p.ctx, &pod, "main")
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { out.Close() })
	return &running{p, &pod, out}
}

// follow starts a pod with a CSI volume that prints what its stream sees; more is of its spec.
func (p *play) follow(name, account, more string) *running {
	p.t.Helper()
	return p.start(name, p.podManifest(name, account, volume, volumeMounts, more, "/pod", "follow"))
}

// glimpse is one line of what a following pod prints.
type glimpse struct {
	Time              time.Time
	Event, ID, Serial string
	Expires           time.Time
	Error             string
}

// seen are all glimpses so far.
func (r *running) seen() []glimpse {
	r.p.t.Helper()
	lines, err := r.out.Lines()
	if err != nil {
		r.p.t.Fatal(err)
	}
	return glimpses(lines)
}

func glimpses(lines []string) (out []glimpse) {
	for _, l := range lines {
		var g glimpse
		if json.Unmarshal([]byte(l), &g) == nil && g.Event != "" {
			out = append(out, g)
		}
	}
	return out
}

// until waits for a glimpse, among those after the first ones, and returns it.
func (r *running) until(what string, after int, ok func(glimpse) bool) (found glimpse) {
	r.p.t.Helper()
	if err := r.out.Wait(r.p.ctx, what, func(lines []string) bool {
		all := glimpses(lines)
		for _, g := range all[min(after, len(all)):] {
			if ok(g) {
				found = g
				return true
			}
		}
		return false
	}); err != nil {
		r.p.t.Fatalf("pod %s: %v", r.pod.Name, err)
	}
	return found
}

// identity waits for an SVID and checks whose it is.
func (r *running) identity() glimpse {
	r.p.t.Helper()
	g := r.until("an SVID", 0, func(g glimpse) bool { return g.Event == "svid" })
	if want := fmt.Sprintf("spiffe://%s/ns/%s/sa/%s", kubeDomain, r.p.ns, r.pod.Spec.ServiceAccountName); g.ID != want {
		r.p.t.Errorf("pod %s is %s, want %s", r.pod.Name, g.ID, want)
	}
	return g
}

// TestStageSharedSocket has a pod its identity by the node's socket, and none where a part of it is missing.
func TestStageSharedSocket(t *testing.T) {
	p := onStage(t)
	p.account("web")
	p.start("web", p.podManifest("web", "web", shared, sharedMounts, "", "/pod", "follow")).identity()
	for _, c := range []struct{ name, audience, says string }{
		{"audience", "vault", "audience"},
		{"none", "", "has no token"},
	} {
		volumes, mounts := strings.ReplaceAll(shared, "audience: countersign", "audience: "+c.audience), sharedMounts
		if c.audience == "" {
			volumes, mounts = "\n  volumes: [{name: agent, hostPath: {path: /run/countersign, type: Directory}}]\n", `[{name: agent, mountPath: /run/countersign, readOnly: true}]`
		}
		r := p.start(c.name, p.podManifest(c.name, "web", volumes, mounts, "", "/pod", "follow"))
		g := r.until("a refusal", 0, func(g glimpse) bool { return g.Event != "start" })
		if g.Event != "error" || !strings.Contains(g.Error, "PermissionDenied") || !strings.Contains(g.Error, c.says) {
			t.Errorf("a pod with a token for %q: got %+v, want PermissionDenied and %q", c.audience, g, c.says)
		}
	}
}
