//go:build integration

package integration

import (
	"fmt"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"countersign.io/countersign/integration/node"
)

// The volumes of a pod that shows its token to a member itself, and verifies members by the ConfigMap that they publish in its namespace.
const aloneVolumes = `
  volumes:
  - {name: identity, emptyDir: {medium: Memory}}
  - {name: bundle, configMap: {name: countersign-bundle}}
  - {name: token, projected: {sources: [{serviceAccountToken: {path: token, audience: AUDIENCE, expirationSeconds: 600}}]}}
`

const agentImage = "node.test/countersign-agent:it"

// sidecarOf is the sidecar as docs/KUBERNETES.md writes it.
func sidecarOf() string {
	return fmt.Sprintf(`
  initContainers:
  - name: identity
    image: %s
    imagePullPolicy: Never
    restartPolicy: Always
    args: [sidecar]
    env:
    - {name: COUNTERSIGN_SERVERS, value: countersign.countersign.svc:8443}
    - {name: COUNTERSIGN_TRUST_DOMAIN, value: %s}
    - {name: COUNTERSIGN_BUNDLE_FILE, value: /etc/countersign/bundle.pem}
    - {name: COUNTERSIGN_HEALTH, value: "0.0.0.0:8081"}
    startupProbe: {httpGet: {path: /ready, port: 8081}, periodSeconds: 1, failureThreshold: 60}
    securityContext: {allowPrivilegeEscalation: false, readOnlyRootFilesystem: true, capabilities: {drop: [ALL]}}
    volumeMounts:
    - {name: identity, mountPath: /run/countersign}
    - {name: token, mountPath: /var/run/secrets/countersign.io, readOnly: true}
    - {name: bundle, mountPath: /etc/countersign, readOnly: true}
`, agentImage, kubeDomain)
}

// withBundle has the members publish the bundle in the test's namespace, and no pod in it that has more than restricted pods may.
func (p *play) withBundle() {
	p.apply("apiVersion: v1\nkind: Namespace\nmetadata: {name: " + p.ns + `, labels: {countersign.io/bundle: "true", pod-security.kubernetes.io/enforce: restricted}}` + "\n")
}

// TestStageSidecar has a pod its identity from a sidecar, with nothing of the node, in a namespace of restricted pods: it is renewed, and it ends with
// the pod. A token for somebody else gives none.
func TestStageSidecar(t *testing.T) {
	p := onStage(t)
	p.withBundle()
	p.account("web")
	volumes := strings.ReplaceAll(aloneVolumes, "AUDIENCE", "countersign")
	manifest := p.podManifest("web", "web", volumes, "[{name: identity, mountPath: /run/countersign}]", sidecarOf(), "/pod", "follow", "unix:///run/countersign/pod/agent.sock")
	r := p.start("web", manifest)
	first := r.identity()
	r.until("a renewal", 0, func(g glimpse) bool { return g.Event == "svid" && g.Serial != first.Serial })

	wrong := strings.ReplaceAll(aloneVolumes, "AUDIENCE", "vault")
	p.apply(p.podManifest("wrong", "web", wrong, "[{name: identity, mountPath: /run/countersign}]", sidecarOf(), "/pod", "follow", "unix:///run/countersign/pod/agent.sock"))
	var pod corev1.Pod
	if err := node.WaitFor(p.ctx, p.n, "/api/v1/namespaces/"+p.ns+"/pods", "wrong", "the sidecar runs", func(o *corev1.Pod) bool {
		pod = *o
		return len(o.Status.InitContainerStatuses) == 1 && o.Status.InitContainerStatuses[0].State.Running != nil
	}); err != nil {
		t.Fatal(err)
	}
	out, err := p.n.Output(p.ctx, &pod, "identity")
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	if err := out.Wait(p.ctx, "the reason in its log", func(lines []string) bool { return strings.Contains(strings.Join(lines, "\n"), "audience") }); err != nil {
		t.Error(err)
	}
	if s := p.get("wrong").Status.InitContainerStatuses[0]; s.Started != nil && *s.Started {
		t.Error("a sidecar without an identity counts as started")
	}
}

// TestStageAgentless has a pod show its own token to a member, once, and a second one with a token for somebody else refused.
func TestStageAgentless(t *testing.T) {
	p := onStage(t)
	p.withBundle()
	p.account("job")
	for audience, ok := range map[string]bool{"countersign": true, "vault": false} {
		volumes := strings.ReplaceAll(aloneVolumes, "AUDIENCE", audience)
		mounts := "[{name: token, mountPath: /var/run/secrets/countersign.io, readOnly: true}, {name: bundle, mountPath: /etc/countersign, readOnly: true}]"
		manifest := p.podManifest("job-"+audience, "job", volumes, mounts, "  restartPolicy: Never\n", "/countersign-agent", "fetch", "x509", "--direct",
			"--server", "countersign.countersign.svc:8443", "--bundle-file", "/etc/countersign/bundle.pem", "-o", "json")
		p.apply(strings.Replace(manifest, appImage, agentImage, 1))
		var pod corev1.Pod
		if err := node.WaitFor(p.ctx, p.n, "/api/v1/namespaces/"+p.ns+"/pods", "job-"+audience, "it ends", func(o *corev1.Pod) bool {
			pod = *o
			return o.Status.Phase == corev1.PodSucceeded || o.Status.Phase == corev1.PodFailed
		}); err != nil {
			t.Fatal(err)
		}
		said, err := p.n.Logs(p.ctx, p.ns, pod.Name, "main")
		if err != nil {
			t.Fatal(err)
		}
		id := fmt.Sprintf("spiffe://%s/ns/%s/sa/job", kubeDomain, p.ns)
		if got := pod.Status.Phase == corev1.PodSucceeded; got != ok || strings.Contains(said, id) != ok || !ok && !strings.Contains(said, "audience") {
			t.Errorf("with a token for %q: %s, and it said %q", audience, pod.Status.Phase, said)
		}
	}
}
