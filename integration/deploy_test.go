//go:build integration

package integration

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	authzv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"countersign.io/countersign/deploy"
)

// chartValues are what the chart is tried with, one after the other in the same cluster, as upgrades.
func chartValues() []string {
	return []string{
		"trustDomain: example.org\n",
		`trustDomain: example.org
cluster: prod
audience: ids
image: {registry: registry.example/team, tag: v1, pullSecrets: [one, two], pullPolicy: Always}
logFormat: text
members:
  replicas: 5
  config: {x509_ttl: 30m, audit: {file: {max_size: 1048576}}, kubernetes: {kubeconfig: /etc/other}}
  defaultID: spiffe://example.org/{k8s:ns}/{k8s:sa}
  agentAccounts: [a/b, c/d]
  resources: {requests: {cpu: 1, memory: 1Gi}}
  antiAffinity: preferred
  nodeSelector: {disk: fast}
  tolerations: [{key: dedicated, operator: Equal, value: ca, effect: NoSchedule}]
  annotations: {note: "with: colon"}
bundle: {namespaces: "countersign.io/bundle=true", clusterTrustBundle: "off"}
resources: true
agent: {hostPID: false, maxUnavailable: 2, csi: {kubeletDir: /data/kubelet, tokenSeconds: 900}, config: {key_type: ed25519}, annotations: {a: b}}
networkPolicy: {clients: [{namespaceSelector: {matchLabels: {team: a}}}], extraIngress: [{ports: [{port: 9443}]}]}
`,
		"trustDomain: example.org\nagent: {csi: {enabled: false}, caPin: 'sha256:" + strings.Repeat("0a", 32) + "', tolerations: null}\nnetworkPolicy: {enabled: false}\n",
		"trustDomain: example.org\nmembers: {image: 'r.example/m@sha256:" + strings.Repeat("0", 64) + "'}\nagent: {enabled: false}\nnetworkPolicy: {clients: []}\n",
		"trustDomain: example.org\nmembers: {enabled: false}\nagent: {servers: ['ca.example.org:8443', '[::1]:8443']}\n",
		"trustDomain: example.org\ncluster: edge\nmembers: {enabled: false}\nagent: {servers: ['ca.example.org:8443', '[::1]:8443']}\ncontroller: {enabled: true}\n",
		`trustDomain: example.org
members: {enabled: false}
agent: {enabled: false}
image: {tag: v1, pullSecrets: [one]}
controller: {enabled: true, replicas: 3, members: ['ca.example.org:8443'], spiffeID: 'spiffe://example.org/edge/controller', image: r.example/c:v2, priorityClassName: system-cluster-critical, nodeSelector: {a: b}, tolerations: [{operator: Exists}], annotations: {c: d}}
`,
	}
}

func rendered(t *testing.T, text string, o deploy.Options) []byte {
	t.Helper()
	var err error
	if o.Values, err = deploy.ReadValues(strings.NewReader(text)); err != nil {
		t.Fatal(err)
	}
	out, err := deploy.Render(o)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// TestRenderedAsHelmDoes: what countersign install kube prints is byte for byte what helm template does, and Helm refuses what it refuses.
func TestRenderedAsHelmDoes(t *testing.T) {
	helm, err := filepath.Abs("helm/bin/helm")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(helm); err != nil {
		t.Skipf("%v: make integration builds it", err)
	}
	run := func(values string, args ...string) ([]byte, string, error) {
		file := filepath.Join(t.TempDir(), "values.yaml")
		if err := os.WriteFile(file, []byte(values), 0o600); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(helm, append([]string{"template", "countersign", "../deploy/chart", "-n", "countersign", "-f", file, "--include-crds"}, args...)...)
		cmd.Env = []string{"HOME=" + t.TempDir(), "PATH=/nonexistent"}
		var faults bytes.Buffer
		cmd.Stderr = &faults
		out, err := cmd.Output()
		return out, faults.String(), err
	}
	for i, values := range chartValues() {
		for _, version := range []string{"1.30.0", "1.37.2"} {
			want, faults, err := run(values, "--kube-version", version, "--skip-tests")
			if err != nil {
				t.Fatalf("helm template with values %d: %v: %s", i, err, faults)
			}
			if got := rendered(t, values, deploy.Options{KubeVersion: version, CRDs: true}); !bytes.Equal(got, want) {
				t.Errorf("values %d, Kubernetes %s: %s", i, version, firstDifference(got, want))
			}
		}
	}
	for _, bad := range []string{"", "trustDomain: example.org\nmember: {}", "trustDomain: example.org\nmembers: {replicas: x}", "trustDomain: example.org\nmembers: {config: {name: x}}"} {
		if _, _, err := run(bad, "--kube-version", "1.37.2"); err == nil {
			t.Errorf("Helm takes %q", bad)
		}
		v, err := deploy.ReadValues(strings.NewReader(bad))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := deploy.Render(deploy.Options{Values: v}); err == nil {
			t.Errorf("install kube takes %q", bad)
		}
	}
	if _, _, err := run(chartValues()[0], "--kube-version", "1.29.0"); err == nil {
		t.Error("Helm takes an API server that is too old")
	}
}

func firstDifference(got, want []byte) string {
	a, b := strings.Split(string(got), "\n"), strings.Split(string(want), "\n")
	for i := range max(len(a), len(b)) {
		if i >= len(a) || i >= len(b) || a[i] != b[i] {
			from := max(0, i-3)
			return fmt.Sprintf("line %d:\n%s\n--- helm\n%s", i+1, strings.Join(a[from:min(i+2, len(a))], "\n"), strings.Join(b[from:min(i+2, len(b))], "\n"))
		}
	}
	return "they are the same"
}

// apply gives the API server every object as kubectl apply --server-side does. A field that it does not know is an error, and so is a
// warning.
func (k *kubeAPI) apply(what string, objects []byte) {
	k.t.Helper()
	n := 0
	for _, doc := range strings.Split("\n"+string(objects), "\n---\n") {
		var o struct {
			APIVersion string            `json:"apiVersion"`
			Kind       string            `json:"kind"`
			Metadata   metav1.ObjectMeta `json:"metadata"`
		}
		if err := yaml.Unmarshal([]byte(doc), &o); err != nil {
			k.t.Fatalf("%s: %v", what, err)
		}
		if o.Kind == "" {
			continue
		}
		n++
		path := "/apis/" + o.APIVersion
		if o.APIVersion == "v1" {
			path = "/api/v1"
		}
		if o.Metadata.Namespace != "" {
			path += "/namespaces/" + o.Metadata.Namespace
		}
		plural := strings.ToLower(o.Kind) + "s"
		if o.Kind == "NetworkPolicy" {
			plural = "networkpolicies"
		}
		path += "/" + plural + "/" + o.Metadata.Name + "?fieldManager=test&force=true&fieldValidation=Strict"
		req, err := http.NewRequestWithContext(k.ctx, http.MethodPatch, k.url+path, strings.NewReader(doc))
		if err != nil {
			k.t.Fatal(err)
		}
		req.Header.Set("Content-Type", "application/apply-patch+yaml")
		res, err := k.http.Do(req)
		if err != nil {
			k.t.Fatal(err)
		}
		answer, err := io.ReadAll(res.Body)
		res.Body.Close()
		if err != nil || res.StatusCode >= 300 {
			k.t.Errorf("%s: %s %s: %s, %v: %s", what, o.Kind, o.Metadata.Name, res.Status, err, answer)
		}
		for _, w := range res.Header.Values("Warning") {
			k.t.Errorf("%s: %s %s: warning: %s", what, o.Kind, o.Metadata.Name, w)
		}
	}
	if n == 0 {
		k.t.Errorf("%s: no objects", what)
	}
}

// security labels a namespace with what Pod Security lets in, and warns of what is not in it.
func (k *kubeAPI) secured(namespace, level string) {
	k.t.Helper()
	labels := map[string]string{}
	for _, mode := range []string{"enforce", "warn"} {
		labels["pod-security.kubernetes.io/"+mode] = level
	}
	k.must(http.MethodPost, "/api/v1/namespaces", &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace, Labels: labels}}, nil)
	k.account(namespace, "default")
}

// TestChartAccepted: a real API server takes every object, without a warning, with each of the values as an upgrade of the former;
// members' pods and applications' keep Pod Security's "restricted".
func TestChartAccepted(t *testing.T) {
	k := newKubeAPI(t, "--allow-privileged=true")
	k.secured("countersign", "privileged")
	// Some fields of members' claims are for good; what the chart lets one change is not among them.
	for i, values := range append(chartValues(), chartValues()[0]) {
		k.apply(fmt.Sprintf("values %d", i), rendered(t, values, deploy.Options{KubeVersion: "1.37.2", CRDs: true}))
	}
	k.apply("with the namespace", rendered(t, chartValues()[0], deploy.Options{NewSpace: true, KubeVersion: "1.37.2"}))

	k.secured("restricted", "restricted")
	members := rendered(t, "trustDomain: example.org\nagent: {enabled: false}\n", deploy.Options{Namespace: "restricted", KubeVersion: "1.37.2"})
	k.apply("members alone", members)
	k.apply("the pod of helm test", rendered(t, "trustDomain: example.org\n", deploy.Options{Namespace: "restricted", Test: true}))
	k.apply("a member's pod", podOf(t, "StatefulSet", members))
	far := rendered(t, "trustDomain: example.org\nmembers: {enabled: false}\nagent: {enabled: false}\ncontroller: {enabled: true, members: ['ca.example.org:8443']}\n", deploy.Options{Namespace: "restricted", KubeVersion: "1.37.2"})
	k.apply("a controller alone", far)
	k.apply("a controller's pod", podOf(t, "Deployment", far))

	// And Pod Security does look: an agent's pod is refused there.
	agent := rendered(t, "trustDomain: example.org\n", deploy.Options{Namespace: "restricted", KubeVersion: "1.37.2"})
	var refused map[string]any
	if err := yaml.Unmarshal(podOf(t, "DaemonSet", agent), &refused); err != nil {
		t.Fatal(err)
	}
	k.account("restricted", "countersign-agent")
	if err := k.do(http.MethodPost, "/api/v1/namespaces/restricted/pods", refused, nil); err == nil || !strings.Contains(err.Error(), "violates PodSecurity") {
		t.Errorf("an agent's pod under restricted: %v", err)
	}
}

// podOf is the pod that a controller would make of the one object of a kind.
func podOf(t *testing.T, kind string, objects []byte) []byte {
	t.Helper()
	for _, doc := range strings.Split("\n"+string(objects), "\n---\n") {
		var o struct {
			Kind     string            `json:"kind"`
			Metadata metav1.ObjectMeta `json:"metadata"`
			Spec     struct {
				Template corev1.PodTemplateSpec                 `json:"template"`
				Claims   []struct{ Metadata metav1.ObjectMeta } `json:"volumeClaimTemplates"`
			} `json:"spec"`
		}
		if err := yaml.Unmarshal([]byte(doc), &o); err != nil {
			t.Fatal(err)
		}
		if o.Kind != kind {
			continue
		}
		pod := corev1.Pod{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"}, ObjectMeta: o.Spec.Template.ObjectMeta, Spec: o.Spec.Template.Spec}
		pod.Name, pod.Namespace = o.Metadata.Name+"-0", o.Metadata.Namespace
		for _, c := range o.Spec.Claims {
			pod.Spec.Volumes = append(pod.Spec.Volumes, corev1.Volume{Name: c.Metadata.Name, VolumeSource: corev1.VolumeSource{
				PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: c.Metadata.Name + "-" + pod.Name}}})
		}
		raw, err := json.Marshal(pod)
		if err != nil {
			t.Fatal(err)
		}
		// What is empty and not left out is the API server's to fill in.
		return regexp.MustCompile(`,"status":\{\}|"creationTimestamp":null,?`).ReplaceAll(raw, nil)
	}
	t.Fatalf("no %s", kind)
	return nil
}

// TestChartRights asks the API server what each account may do.
func TestChartRights(t *testing.T) {
	k := newKubeAPI(t, "--allow-privileged=true")
	k.secured("countersign", "privileged")
	may := func(account, verb, group, resource, namespace, name string) bool {
		t.Helper()
		resource, sub, _ := strings.Cut(resource, "/")
		var out authzv1.SubjectAccessReview
		k.must(http.MethodPost, "/apis/authorization.k8s.io/v1/subjectaccessreviews", &authzv1.SubjectAccessReview{Spec: authzv1.SubjectAccessReviewSpec{
			User: "system:serviceaccount:countersign:" + account, Groups: []string{"system:serviceaccounts", "system:serviceaccounts:countersign", "system:authenticated"},
			ResourceAttributes: &authzv1.ResourceAttributes{Verb: verb, Group: group, Resource: resource, Subresource: sub, Namespace: namespace, Name: name},
		}}, &out)
		return out.Status.Allowed
	}
	type right struct{ verb, group, resource, namespace, name string }
	check := func(what, account string, want bool, rights ...right) {
		t.Helper()
		for _, r := range rights {
			if got := may(account, r.verb, r.group, r.resource, r.namespace, r.name); got != want {
				t.Errorf("%s: %s may %s %s %s/%s: %v, want %v", what, account, r.verb, r.resource, r.namespace, r.name, got, want)
			}
		}
	}
	needed := []right{
		{"create", "authentication.k8s.io", "tokenreviews", "", ""}, {"watch", "", "pods", "", ""}, {"get", "", "pods", "shop", "web"},
		{"list", "", "namespaces", "", ""}, {"watch", "apps", "replicasets", "", ""},
		{"create", "", "configmaps", "countersign", ""}, {"get", "", "configmaps", "countersign", "countersign-bundle"}, {"update", "", "configmaps", "countersign", "countersign-bundle"},
	}
	never := []right{
		{"get", "", "secrets", "countersign", "x"}, {"list", "", "secrets", "", ""}, {"create", "", "pods", "countersign", ""}, {"delete", "", "pods", "shop", "web"},
		{"create", "", "serviceaccounts/token", "shop", "default"}, {"create", "", "pods/exec", "shop", "web"}, {"update", "", "configmaps", "countersign", "countersign"},
		{"get", "", "configmaps", "kube-system", "x"}, {"impersonate", "", "users", "", "x"}, {"create", "rbac.authorization.k8s.io", "clusterrolebindings", "", ""},
		{"attest", "certificates.k8s.io", "signers", "", "kubernetes.io/kube-apiserver-serving"}, {"get", "", "nodes/proxy", "", "node-1"},
	}
	spaces := []right{{"create", "", "configmaps", "shop", ""}, {"update", "", "configmaps", "shop", "countersign-bundle"}}
	trust := []right{{"create", "certificates.k8s.io", "clustertrustbundles", "", ""}, {"attest", "certificates.k8s.io", "signers", "", "countersign.io/*"}}
	own := []right{{"get", "countersign.io", "kubeclusters", "", "x"}, {"watch", "countersign.io", "workloadidentities", "", ""}, {"patch", "countersign.io", "workloadidentities/status", "shop", "web"}}

	k.apply("least", rendered(t, "trustDomain: example.org\nbundle: {clusterTrustBundle: 'off'}\n", deploy.Options{KubeVersion: "1.37.2"}))
	check("least", "countersign", true, needed...)
	for _, rights := range [][]right{never, spaces, trust, own} {
		check("least", "countersign", false, rights...)
	}
	k.apply("most", rendered(t, "trustDomain: example.org\nbundle: {namespaces: a=b}\nresources: true\n", deploy.Options{KubeVersion: "1.37.2"}))
	for _, rights := range [][]right{needed, spaces, trust, own} {
		check("most", "countersign", true, rights...)
		check("most", "countersign-agent", false, rights...)
	}
	check("most", "countersign", false, never...)
	check("most", "countersign-agent", false, never...)

	// The controller of a cluster that the members do not live in has its own rights, which nobody else has.
	leases := []right{
		{"create", "coordination.k8s.io", "leases", "countersign", ""},
		{"get", "coordination.k8s.io", "leases", "countersign", "countersign-controller"}, {"update", "coordination.k8s.io", "leases", "countersign", "countersign-controller"},
	}
	follows := []right{
		{"get", "countersign.io", "workloadidentities", "", "web"},
		{"watch", "countersign.io", "workloadidentities", "", ""}, {"patch", "countersign.io", "kubeclusters", "", "east"}, {"patch", "countersign.io", "federatedtrustdomains/status", "", "x"},
		{"create", "events.k8s.io", "events", "default", ""}, {"list", "", "pods", "", ""}, {"list", "", "namespaces", "", ""},
	}
	notHis := []right{
		{"create", "authentication.k8s.io", "tokenreviews", "", ""}, {"watch", "", "pods", "", ""}, {"get", "", "pods", "shop", "web"}, {"list", "apps", "replicasets", "", ""},
		{"create", "", "configmaps", "countersign", ""}, {"get", "", "configmaps", "countersign", "countersign-bundle"},
		{"create", "countersign.io", "workloadidentities", "", ""}, {"delete", "countersign.io", "workloadidentities", "", "web"}, {"update", "countersign.io", "kubeclusters", "", "east"},
		{"get", "coordination.k8s.io", "leases", "countersign", "other"}, {"delete", "coordination.k8s.io", "leases", "countersign", "countersign-controller"},
		{"create", "coordination.k8s.io", "leases", "kube-system", ""}, {"get", "coordination.k8s.io", "leases", "kube-system", "countersign-controller"}, {"create", "", "events", "countersign", ""},
	}
	check("most", "countersign", false, leases...)
	check("most", "countersign-agent", false, leases...)
	check("most", "countersign-controller", false, slices.Concat(leases, follows)...)
	k.apply("elsewhere", rendered(t, "trustDomain: example.org\nmembers: {enabled: false}\nagent: {servers: ['ca.example.org:8443']}\ncontroller: {enabled: true}\n", deploy.Options{KubeVersion: "1.37.2"}))
	check("elsewhere", "countersign-controller", true, slices.Concat(leases, follows)...)
	check("elsewhere", "countersign-controller", false, slices.Concat(never, notHis)...)
	check("elsewhere", "countersign", false, leases...)
	check("elsewhere", "countersign-agent", false, slices.Concat(leases, follows, never)...)
}
