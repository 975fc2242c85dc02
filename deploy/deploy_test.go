package deploy_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	storagev1 "k8s.io/api/storage/v1"
	"sigs.k8s.io/yaml"

	"countersign.io/countersign/deploy"
	"countersign.io/countersign/identity"
)

// object is one rendered object.
type object struct {
	APIVersion string `json:"apiVersion"`
	Kind       string `json:"kind"`
	Metadata   struct {
		Name      string            `json:"name"`
		Namespace string            `json:"namespace"`
		Labels    map[string]string `json:"labels"`
	} `json:"metadata"`
	text string
}

func (o object) id() string { return o.Kind + "/" + o.Metadata.Name }

func objects(t *testing.T, raw []byte) map[string]object {
	t.Helper()
	out := map[string]object{}
	for _, doc := range strings.Split("\n"+string(raw), "\n---\n") {
		var o object
		if err := yaml.Unmarshal([]byte(doc), &o); err != nil {
			t.Fatalf("%v in\n%s", err, doc)
		}
		if o.Kind == "" {
			continue
		}
		o.text = doc + "\n"
		if _, twice := out[o.id()]; twice {
			t.Errorf("%s is there twice", o.id())
		}
		out[o.id()] = o
	}
	return out
}

func render(t *testing.T, o deploy.Options) map[string]object {
	t.Helper()
	raw, err := deploy.Render(o)
	if err != nil {
		t.Fatal(err)
	}
	return objects(t, raw)
}

// into reads an object as the API server does: a field that it does not know is an error.
func into[T any](t *testing.T, o object) T {
	t.Helper()
	var out T
	if err := yaml.UnmarshalStrict([]byte(o.text), &out); err != nil {
		t.Fatalf("%s: %v", o.id(), err)
	}
	return out
}

func values(t testing.TB, text string) map[string]any {
	t.Helper()
	v, err := deploy.ReadValues(strings.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func TestRenderDefaults(t *testing.T) {
	got := render(t, deploy.Options{Namespace: "cs", AppVersion: "9.8.7", NewSpace: true, Values: values(t, "trustDomain: example.org")})
	want := []string{
		"CSIDriver/csi.countersign.io", "ClusterRole/countersign-members", "ClusterRoleBinding/countersign-members", "ConfigMap/countersign",
		"ConfigMap/countersign-agent", "DaemonSet/countersign-agent", "Namespace/cs", "NetworkPolicy/countersign", "NetworkPolicy/countersign-agent",
		"PodDisruptionBudget/countersign", "Role/countersign-members", "RoleBinding/countersign-members", "Service/countersign",
		"Service/countersign-members", "ServiceAccount/countersign", "ServiceAccount/countersign-agent", "StatefulSet/countersign",
	}
	if ids := slices.Sorted(maps.Keys(got)); !slices.Equal(ids, want) {
		t.Errorf("rendered %v, want %v", ids, want)
	}
	for id, o := range got {
		cluster := slices.Contains([]string{"CSIDriver", "ClusterRole", "ClusterRoleBinding", "Namespace"}, o.Kind)
		if cluster != (o.Metadata.Namespace == "") || !cluster && o.Metadata.Namespace != "cs" {
			t.Errorf("%s is in namespace %q", id, o.Metadata.Namespace)
		}
		if o.Metadata.Labels["app.kubernetes.io/part-of"] != "countersign" {
			t.Errorf("%s has labels %v", id, o.Metadata.Labels)
		}
	}
	sts := into[appsv1.StatefulSet](t, got["StatefulSet/countersign"])
	if image := sts.Spec.Template.Spec.Containers[0].Image; image != "countersign.io/countersign:9.8.7" {
		t.Errorf("the members' image is %s", image)
	}
}

// TestMembersPodIsRestricted: member pods keep Pod Security's "restricted", and have no more than they need.
func TestMembersPodIsRestricted(t *testing.T) {
	pod := into[appsv1.StatefulSet](t, render(t, deploy.Options{Values: values(t, "trustDomain: example.org")})["StatefulSet/countersign"]).Spec.Template.Spec
	checkRestricted(t, pod)
	if pod.HostNetwork || pod.HostPID {
		t.Error("a member is in its node's namespaces")
	}
	var join *corev1.ServiceAccountTokenProjection
	for _, v := range pod.Volumes {
		if v.HostPath != nil {
			t.Errorf("volume %s is of the node", v.Name)
		}
		if v.Projected != nil {
			join = v.Projected.Sources[0].ServiceAccountToken
		}
	}
	if join == nil || join.Audience != "countersign-member" {
		t.Errorf("the token to join by is %+v", join)
	}
}

func checkRestricted(t *testing.T, pod corev1.PodSpec) {
	t.Helper()
	s := pod.SecurityContext
	if s == nil || s.RunAsNonRoot == nil || !*s.RunAsNonRoot || s.RunAsUser == nil || *s.RunAsUser != 65532 || s.SeccompProfile == nil || s.SeccompProfile.Type != corev1.SeccompProfileTypeRuntimeDefault {
		t.Errorf("security context of the pod: %+v", s)
	}
	for _, c := range pod.Containers {
		s := c.SecurityContext
		if s == nil || s.AllowPrivilegeEscalation == nil || *s.AllowPrivilegeEscalation || s.ReadOnlyRootFilesystem == nil || !*s.ReadOnlyRootFilesystem ||
			s.Capabilities == nil || !slices.Equal(s.Capabilities.Drop, []corev1.Capability{"ALL"}) || len(s.Capabilities.Add) != 0 {
			t.Errorf("security context of container %s: %+v", c.Name, s)
		}
	}
}

// TestTestPodIsOrdinary: helm test proves what an application's pod has, so its pod must have no more.
func TestTestPodIsOrdinary(t *testing.T) {
	got := render(t, deploy.Options{Test: true, NewSpace: true, CRDs: true, Values: values(t, "trustDomain: example.org")})
	if len(got) != 1 {
		t.Fatalf("rendered %v, want the test's pod alone", slices.Sorted(maps.Keys(got)))
	}
	pod := into[corev1.Pod](t, got["Pod/countersign-test"])
	checkRestricted(t, pod.Spec)
	if v := pod.Spec.Volumes; len(v) != 1 || v[0].CSI == nil || v[0].CSI.Driver != "csi.countersign.io" {
		t.Errorf("its volumes are %+v", v)
	}
}

// TestAgentHasNoRights: the agent's account is bound to nothing, and no token for the API server is in its pod.
func TestAgentHasNoRights(t *testing.T) {
	got := render(t, deploy.Options{Values: values(t, "trustDomain: example.org\nresources: true\nbundle: {namespaces: a=b}")})
	for id, o := range got {
		if o.Kind == "RoleBinding" || o.Kind == "ClusterRoleBinding" {
			for _, s := range into[rbacv1.ClusterRoleBinding](t, o).Subjects {
				if s.Name != "countersign" {
					t.Errorf("%s gives rights to %s", id, s.Name)
				}
			}
		}
	}
	pod := into[appsv1.DaemonSet](t, got["DaemonSet/countersign-agent"]).Spec.Template.Spec
	if pod.AutomountServiceAccountToken == nil || *pod.AutomountServiceAccountToken {
		t.Error("the agent's pod has a token for the API server")
	}
	for _, v := range pod.Volumes {
		if v.Projected == nil {
			continue
		}
		for _, s := range v.Projected.Sources {
			if s.ServiceAccountToken != nil && s.ServiceAccountToken.Audience != "countersign" {
				t.Errorf("the agent's pod has a token for %q", s.ServiceAccountToken.Audience)
			}
		}
	}
}

// TestRights: members have these rights and no other; each switch adds its own.
func TestRights(t *testing.T) {
	base := []string{
		"authentication.k8s.io tokenreviews create", "core pods,namespaces get,list,watch", "apps replicasets get,list,watch",
		"/.well-known/openid-configuration,/openid/v1/jwks get",
	}
	ctb := []string{"certificates.k8s.io clustertrustbundles create,get,list,watch,update", "certificates.k8s.io signers countersign.io/* attest"}
	spaces := []string{"core configmaps create", "core configmaps countersign-bundle get,list,watch,update,delete"}
	res := []string{
		"countersign.io workloadidentities,federatedtrustdomains,kubeclusters get,list,watch,patch",
		"countersign.io workloadidentities/status,federatedtrustdomains/status,kubeclusters/status patch", "events.k8s.io events create,patch",
	}
	for _, c := range []struct {
		values string
		want   [][]string
	}{
		{"", [][]string{base, ctb}},
		{"bundle: {clusterTrustBundle: 'off'}", [][]string{base}},
		{"bundle: {clusterTrustBundle: 'off', namespaces: a=b}", [][]string{base, spaces}},
		{"bundle: {clusterTrustBundle: 'off'}\nresources: true", [][]string{base, res}},
	} {
		got := render(t, deploy.Options{Values: values(t, "trustDomain: example.org\n"+c.values)})
		if rules, want := rulesOf(t, got["ClusterRole/countersign-members"]), slices.Concat(c.want...); !slices.Equal(rules, want) {
			t.Errorf("with %q members may\n%s\nwant\n%s", c.values, strings.Join(rules, "\n"), strings.Join(want, "\n"))
		}
		want := []string{"core configmaps create", "core configmaps countersign-bundle get,list,watch,update"}
		if rules := rulesOf(t, got["Role/countersign-members"]); !slices.Equal(rules, want) {
			t.Errorf("in their namespace members may %q, want %q", rules, want)
		}
	}
}

const elsewhere = "trustDomain: example.org\ncluster: edge\nmembers: {enabled: false}\nagent: {servers: ['ca-1.example.org:8443', 'ca-2.example.org:8443']}\ncontroller: {enabled: true}\n"

// TestController: the controller of a cluster that the members do not live in has these rights and no other, keeps Pod Security's
// "restricted", and knows who it is by the CSI volume. Members get none of its rights.
func TestController(t *testing.T) {
	got := render(t, deploy.Options{Namespace: "cs", AppVersion: "9.8.7", Values: values(t, elsewhere)})
	want := []string{
		"countersign.io workloadidentities,federatedtrustdomains,kubeclusters get,list,watch,patch",
		"countersign.io workloadidentities/status,federatedtrustdomains/status,kubeclusters/status patch", "events.k8s.io events create,patch",
		"core pods,namespaces list", "/.well-known/openid-configuration,/openid/v1/jwks get",
	}
	if rules := rulesOf(t, got["ClusterRole/countersign-controller"]); !slices.Equal(rules, want) {
		t.Errorf("the controller may\n%s\nwant\n%s", strings.Join(rules, "\n"), strings.Join(want, "\n"))
	}
	want = []string{"coordination.k8s.io leases create", "coordination.k8s.io leases countersign-controller get,update"}
	if rules := rulesOf(t, got["Role/countersign-controller"]); !slices.Equal(rules, want) || got["Role/countersign-controller"].Metadata.Namespace != "cs" {
		t.Errorf("in its namespace the controller may %q, want %q", rules, want)
	}
	d := into[appsv1.Deployment](t, got["Deployment/countersign-controller"])
	pod := d.Spec.Template.Spec
	checkRestricted(t, pod)
	if v := pod.Volumes; len(v) != 1 || v[0].CSI == nil || v[0].CSI.Driver != "csi.countersign.io" || pod.ServiceAccountName != "countersign-controller" {
		t.Errorf("its volumes are %+v", v)
	}
	c := pod.Containers[0]
	if args := []string{"controller", "run", "--cluster=edge", "--leader-election=cs", "--log-format=json"}; !slices.Equal(c.Args, args) || c.Image != "countersign.io/countersign:9.8.7" {
		t.Errorf("it runs %v of %s, want %v", c.Args, c.Image, args)
	}
	if c.Env[0].Name != "COUNTERSIGN_MEMBER" || c.Env[0].Value != "ca-1.example.org:8443,ca-2.example.org:8443" {
		t.Errorf("its environment is %+v", c.Env)
	}
	for id, o := range got {
		if (o.Kind == "RoleBinding" || o.Kind == "ClusterRoleBinding") && into[rbacv1.ClusterRoleBinding](t, o).Subjects[0].Name != "countersign-controller" {
			t.Errorf("%s gives rights to somebody else", id)
		}
	}
	got = render(t, deploy.Options{Values: values(t, strings.Replace(elsewhere, "enabled: true}", "enabled: true, members: ['x:1'], spiffeID: 'spiffe://example.org/edge/controller', image: 'r/c:1', replicas: 1}", 1))})
	c = into[appsv1.Deployment](t, got["Deployment/countersign-controller"]).Spec.Template.Spec.Containers[0]
	if c.Env[0].Value != "x:1" || c.Image != "r/c:1" || !slices.Contains(c.Args, "--as=spiffe://example.org/edge/controller") {
		t.Errorf("it runs %v of %s for %v", c.Args, c.Image, c.Env)
	}
}

func rulesOf(t *testing.T, o object) (out []string) {
	t.Helper()
	for _, r := range into[rbacv1.ClusterRole](t, o).Rules {
		words := []string{strings.Join(r.APIGroups, ","), strings.Join(r.Resources, ","), strings.Join(r.ResourceNames, ","), strings.Join(r.NonResourceURLs, ","), strings.Join(r.Verbs, ",")}
		if len(r.APIGroups) == 1 && r.APIGroups[0] == "" {
			words[0] = "core"
		}
		out = append(out, strings.Join(slices.DeleteFunc(words, func(w string) bool { return w == "" }), " "))
	}
	return out
}

func TestCSIDriver(t *testing.T) {
	got := render(t, deploy.Options{Values: values(t, "trustDomain: example.org\naudience: mine\nagent: {csi: {tokenSeconds: 900}}")})
	d := into[storagev1.CSIDriver](t, got["CSIDriver/csi.countersign.io"]).Spec
	switch {
	case len(d.TokenRequests) != 1 || d.TokenRequests[0].Audience != "mine" || *d.TokenRequests[0].ExpirationSeconds != 900:
		t.Errorf("tokens: %+v", d.TokenRequests)
	case !*d.RequiresRepublish || !*d.PodInfoOnMount || *d.AttachRequired || !slices.Equal(d.VolumeLifecycleModes, []storagev1.VolumeLifecycleMode{"Ephemeral"}):
		t.Errorf("driver: %+v", d)
	}
	off := render(t, deploy.Options{Values: values(t, "trustDomain: example.org\nagent: {csi: {enabled: false}}")})
	if _, ok := off["CSIDriver/csi.countersign.io"]; ok {
		t.Error("a driver is registered that no agent serves")
	}
	c := into[appsv1.DaemonSet](t, off["DaemonSet/countersign-agent"]).Spec.Template.Spec.Containers[0]
	if c.SecurityContext.Privileged != nil {
		t.Error("an agent without CSI is privileged")
	}
}

// TestRoll: a change of the configuration replaces the pods, and no other change of the values does.
func TestRoll(t *testing.T) {
	sums := func(text string) (members, agent string) {
		got := render(t, deploy.Options{Values: values(t, "trustDomain: example.org\n"+text)})
		return into[appsv1.StatefulSet](t, got["StatefulSet/countersign"]).Spec.Template.Annotations["checksum/config"],
			into[appsv1.DaemonSet](t, got["DaemonSet/countersign-agent"]).Spec.Template.Annotations["checksum/config"]
	}
	m0, a0 := sums("")
	m1, a1 := sums("members: {config: {x509_ttl: 30m}}")
	m2, a2 := sums("agent: {config: {key_type: ed25519}}")
	m3, a3 := sums("members: {replicas: 5}")
	if m0 == m1 || a0 != a1 || m0 != m2 || a0 == a2 || m0 != m3 || a0 != a3 || m0 == "" || a0 == "" {
		t.Errorf("checksums: members %s %s %s %s, agents %s %s %s %s", m0, m1, m2, m3, a0, a1, a2, a3)
	}
}

// TestElsewhere: agents of members in another cluster.
func TestElsewhere(t *testing.T) {
	got := render(t, deploy.Options{Values: values(t, "trustDomain: example.org\nmembers: {enabled: false}\nagent: {servers: ['ca.example.org:8443'], caPin: 'sha256:"+strings.Repeat("ab", 32)+"'}")})
	for _, id := range []string{"StatefulSet/countersign", "ClusterRole/countersign-members", "Service/countersign", "PodDisruptionBudget/countersign"} {
		if _, ok := got[id]; ok {
			t.Errorf("%s is there without members", id)
		}
	}
	conf := into[corev1.ConfigMap](t, got["ConfigMap/countersign-agent"]).Data["agent.yaml"]
	if !strings.Contains(conf, "ca_pin: sha256:abab") || strings.Contains(conf, "bundle_file") || !strings.Contains(conf, "- ca.example.org:8443") {
		t.Errorf("agent.yaml:\n%s", conf)
	}
}

// TestBadValues: what is refused, and what the refusal says.
func TestBadValues(t *testing.T) {
	for _, c := range []struct{ values, want string }{
		{"", "trustDomain"},
		{"trustDomain: Example.ORG", "trustDomain"},
		{"trustDomain: example.org\ntrustdomain: x", "'trustdomain' not allowed"},
		{"trustDomain: example.org\nmembers: {replica: 5}", "members: additional properties 'replica'"},
		{"trustDomain: example.org\nmembers: {replicas: 0}", "members.replicas"},
		{"trustDomain: example.org\nmembers: {replicas: three}", "members.replicas"},
		{"trustDomain: example.org\nmembers: {config: text}", "members.config"},
		{"trustDomain: example.org\nmembers: {image: 'x y'}", "members.image"},
		{"trustDomain: example.org\nmembers: {antiAffinity: none}", "members.antiAffinity"},
		{"trustDomain: example.org\nmembers: {enabled: false}", "agent.servers"},
		{"trustDomain: example.org\nagent: {caPin: abc}", "agent.caPin"},
		{"trustDomain: example.org\nagent: {csi: {tokenSeconds: 60}}", "agent.csi.tokenSeconds"},
		{"trustDomain: example.org\nagent: {csi: {kubeletDir: var/lib}}", "agent.csi.kubeletDir"},
		{"trustDomain: example.org\nagent: {maxUnavailable: 0}", "agent.maxUnavailable"},
		{"trustDomain: example.org\nimage: {tag: 'a b'}", "image.tag"},
		{"trustDomain: example.org\nbundle: {clusterTrustBundle: yes please}", "bundle.clusterTrustBundle"},
		{"trustDomain: example.org\nnetworkPolicy: {clients: [{}]}", "networkPolicy.clients.0"},
		{"trustDomain: example.org\nmonitoring: {from: [{}]}", "monitoring.from.0"},
		{"trustDomain: example.org\nmonitoring: {interval: often}", "monitoring.interval"},
		{"trustDomain: example.org\nmonitoring: {labels: {app.kubernetes.io/name: x}}", "monitoring.labels"},
		{"trustDomain: example.org\ncontroller: {enabled: true}", "members.enabled"},
		{"trustDomain: example.org\nmembers: {enabled: false}\nagent: {enabled: false}\ncontroller: {enabled: true}", "servers"},
		{"trustDomain: example.org\nmembers: {enabled: false}\nagent: {enabled: false}\ncontroller: {enabled: true, members: ['a b:1']}", "controller.members.0"},
		{"trustDomain: example.org\ncontroller: {spiffeID: 'x, --kubeconfig=y'}", "controller.spiffeID"},
		{"trustDomain: example.org\ncontroller: {replicas: 0}", "controller.replicas"},
		{"trustDomain: example.org\nresources: null", ""},
	} {
		_, err := deploy.Render(deploy.Options{Values: values(t, c.values)})
		if c.want == "" {
			if err != nil {
				t.Errorf("values %q: %v", c.values, err)
			}
			continue
		}
		if err == nil || !errors.Is(err, identity.ErrInvalid) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("values %q: %v; want one about %q", c.values, err, c.want)
		}
	}
	if _, err := deploy.Render(deploy.Options{Namespace: "a b", Values: values(t, "trustDomain: example.org")}); !errors.Is(err, identity.ErrInvalid) {
		t.Errorf("namespace with a space: %v", err)
	}
	for _, text := range []string{"a: 1\na: 2", "- a", "a: [", strings.Repeat("#", 2<<20)} {
		if _, err := deploy.ReadValues(strings.NewReader(text)); !errors.Is(err, identity.ErrInvalid) {
			t.Errorf("values %.20q: %v", text, err)
		}
	}
}

func TestSet(t *testing.T) {
	v := values(t, "members: {replicas: 3, config: {x509_ttl: 1h}}")
	for _, s := range []string{"members.replicas=5", "agent.servers=[a:1, b:2]", "members.config={jwt_ttl: 1m}", "image.tag=", "agent.tolerations=null"} {
		var err error
		if v, err = deploy.Set(v, s); err != nil {
			t.Fatal(err)
		}
	}
	got, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	want := `{"agent":{"servers":["a:1","b:2"],"tolerations":null},"image":{"tag":""},"members":{"config":{"jwt_ttl":"1m","x509_ttl":"1h"},"replicas":5}}`
	if string(got) != want {
		t.Errorf("have %s\nwant %s", got, want)
	}
	for _, s := range []string{"", "a", "=1", "a..b=1", "a=[", "a={x: 1, x: 2}"} {
		if _, err := deploy.Set(v, s); !errors.Is(err, identity.ErrInvalid) {
			t.Errorf("--set %q: %v", s, err)
		}
	}
}

// TestSchemaIsWhole: each value of values.yaml is in the schema, the schema has no other, it lets nothing else in, and each has its
// comment or one above its group.
func TestSchemaIsWhole(t *testing.T) {
	var schema map[string]any
	raw, err := os.ReadFile("chart/values.schema.json")
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(raw, &schema); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile("chart/values.yaml")
	if err != nil {
		t.Fatal(err)
	}
	free := []string{"members.config", "agent.config", "members.nodeSelector", "members.annotations", "controller.nodeSelector", "controller.annotations", "agent.nodeSelector", "agent.annotations", "monitoring.labels", "global"}
	var walk func(path string, schema, values map[string]any)
	walk = func(path string, schema, values map[string]any) {
		if schema["additionalProperties"] != false {
			t.Errorf("%s: the schema lets in what it does not know", path)
		}
		properties, _ := schema["properties"].(map[string]any)
		for k := range values {
			if _, ok := properties[k]; !ok {
				t.Errorf("%s%s is in values.yaml and not in the schema", path, k)
			}
		}
		for k, s := range properties {
			v, ok := values[k]
			if !ok && k != "global" {
				t.Errorf("%s%s is in the schema and not in values.yaml", path, k)
			}
			if m, isMap := v.(map[string]any); isMap && !slices.Contains(free, path+k) && k != "requests" && k != "limits" && k != "resources" {
				walk(path+k+".", s.(map[string]any), m)
			}
		}
	}
	walk("", schema, values(t, string(text)))
}

func mustRead(t *testing.T, name string) []byte {
	t.Helper()
	raw, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// FuzzValues: whatever a file of values says, it is refused, or gives the chart's own objects and no other.
func FuzzValues(f *testing.F) {
	seeds, err := os.ReadDir("testdata/fuzz/FuzzValues")
	if err != nil || len(seeds) == 0 {
		f.Fatalf("no seeds: %v", err)
	}
	evil := "x\n---\nkind: ClusterRoleBinding\napiVersion: v1\nmetadata: {name: evil}"
	for _, key := range []string{
		"members.defaultID", "members.image", "agent.caPin", "audience", "cluster", "trustDomain", "image.tag", "image.registry", "members.priorityClassName",
		"members.storage.className", "members.storage.size", "bundle.namespaces", "agent.csi.kubeletDir", "logFormat", "agent.maxUnavailable",
	} {
		quoted, err := json.Marshal(evil)
		if err != nil {
			f.Fatal(err)
		}
		v, err := deploy.Set(map[string]any{"trustDomain": "example.org"}, fmt.Sprintf("%s=%s", key, quoted))
		if err != nil {
			f.Fatal(err)
		}
		raw, err := yaml.Marshal(v)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(string(raw))
	}
	for _, key := range []string{"cluster", "controller.members", "controller.spiffeID", "controller.image", "logFormat"} {
		v, err := deploy.Set(values(f, elsewhere), fmt.Sprintf("%s=%q", key, evil))
		if err != nil {
			f.Fatal(err)
		}
		raw, err := yaml.Marshal(v)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(string(raw))
	}
	known := []string{
		"CSIDriver/csi.countersign.io", "ClusterRole/countersign-members", "ClusterRoleBinding/countersign-members", "ConfigMap/countersign",
		"ConfigMap/countersign-agent", "DaemonSet/countersign-agent", "NetworkPolicy/countersign", "NetworkPolicy/countersign-agent",
		"PodDisruptionBudget/countersign", "Role/countersign-members", "RoleBinding/countersign-members", "Service/countersign",
		"Service/countersign-members", "ServiceAccount/countersign", "ServiceAccount/countersign-agent", "StatefulSet/countersign",
		"ServiceAccount/countersign-controller", "ClusterRole/countersign-controller", "ClusterRoleBinding/countersign-controller",
		"Role/countersign-controller", "RoleBinding/countersign-controller", "Deployment/countersign-controller", "NetworkPolicy/countersign-controller",
	}
	f.Fuzz(func(t *testing.T, text string) {
		v, err := deploy.ReadValues(strings.NewReader(text))
		if err != nil {
			return
		}
		raw, err := deploy.Render(deploy.Options{Values: v})
		if err != nil {
			if !errors.Is(err, identity.ErrInvalid) {
				t.Errorf("%v: it does not wrap ErrInvalid", err)
			}
			return
		}
		for id := range objects(t, raw) {
			if !slices.Contains(known, id) {
				t.Errorf("%s is not the chart's", id)
			}
		}
	})
}
