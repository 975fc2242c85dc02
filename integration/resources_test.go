//go:build integration

package integration

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	rbacv1 "k8s.io/api/rbac/v1"
	"sigs.k8s.io/yaml"
)

const resourcesAPI = "/apis/countersign.io/v1alpha1/"

// object is any object of Kubernetes.
type object map[string]any

func (o object) at(path ...string) any {
	var v any = map[string]any(o)
	for _, p := range path {
		m, ok := v.(map[string]any)
		if !ok {
			return nil
		}
		v = m[p]
	}
	return v
}

// ready is the condition Ready: its status, its reason and its message.
func (o object) ready() (status, reason, message string) {
	all, _ := o.at("status", "conditions").([]any)
	for _, c := range all {
		if m, ok := c.(map[string]any); ok && m["type"] == "Ready" {
			return fmt.Sprint(m["status"]), fmt.Sprint(m["reason"]), fmt.Sprint(m["message"])
		}
	}
	return "", "", ""
}

// crds applies the chart's CustomResourceDefinitions, as Helm does.
func (k *kubeAPI) crds() {
	k.t.Helper()
	files, err := filepath.Glob("../deploy/chart/crds/*.yaml")
	if err != nil || len(files) != 3 {
		k.t.Fatal(files, err)
	}
	for _, f := range files {
		k.crd(strings.TrimSuffix(filepath.Base(f), ".yaml"))
	}
}

// crd applies one, and waits until the API server has it.
func (k *kubeAPI) crd(plural string) {
	k.t.Helper()
	raw, err := os.ReadFile("../deploy/chart/crds/" + plural + ".yaml")
	if err != nil {
		k.t.Fatal(err)
	}
	var crd object
	if err := yaml.UnmarshalStrict(raw, &crd); err != nil {
		k.t.Fatalf("%s: %v", plural, err)
	}
	k.must(http.MethodPost, "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", crd, nil)
	for limit := time.Now().Add(time.Minute); k.do(http.MethodGet, resourcesAPI+plural, nil, nil) != nil; {
		if time.Now().After(limit) {
			k.t.Fatalf("%s are not served", plural)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

func (k *kubeAPI) resource(plural, name string, spec object) error {
	kind := map[string]string{"workloadidentities": "WorkloadIdentity", "federatedtrustdomains": "FederatedTrustDomain", "kubeclusters": "KubeCluster"}[plural]
	o := object{"apiVersion": "countersign.io/v1alpha1", "kind": kind, "metadata": object{"name": name}, "spec": spec}
	if err := k.do(http.MethodGet, resourcesAPI+plural+"/"+name, nil, nil); err != nil {
		return k.do(http.MethodPost, resourcesAPI+plural, o, nil)
	}
	return k.patch(resourcesAPI+plural+"/"+name, object{"spec": spec})
}

// patch is a merge patch.
func (k *kubeAPI) patch(path string, with any) error {
	return k.send(http.MethodPatch, path, "application/merge-patch+json", with, nil)
}

func (w *world) becomes(k *kubeAPI, plural, name, status, reason string, says ...string) object {
	w.t.Helper()
	var o object
	w.eventually(fmt.Sprintf("%s %s is Ready=%s, %s", plural, name, status, reason), func() error {
		o = nil
		if err := k.do(http.MethodGet, resourcesAPI+plural+"/"+name, nil, &o); err != nil {
			return err
		}
		s, r, m := o.ready()
		if s != status || r != reason {
			return fmt.Errorf("Ready=%s, %s: %s", s, r, m)
		}
		for _, want := range says {
			if !strings.Contains(m, want) {
				return fmt.Errorf("it does not say %q: %s", want, m)
			}
		}
		return nil
	})
	return o
}

// chartRules are what the chart allows the members (deploy/chart/templates/members-rbac.yaml).
func chartRules(t *testing.T) []rbacv1.PolicyRule {
	t.Helper()
	raw, err := os.ReadFile("../deploy/chart/templates/members-rbac.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var plain []string
	for _, line := range strings.Split(string(raw), "\n") {
		if !strings.Contains(line, "{{") {
			plain = append(plain, line)
		}
	}
	var out []rbacv1.PolicyRule
	for _, doc := range strings.Split(strings.Join(plain, "\n"), "\n---\n") {
		var role rbacv1.ClusterRole
		if err := yaml.Unmarshal([]byte(doc), &role); err != nil {
			t.Fatalf("%v in\n%s", err, doc)
		}
		out = append(out, role.Rules...)
	}
	return out
}

type resourcesWorld struct {
	*world
	k   *kubeAPI
	ask func(token string) (string, error)
}

// newResources is a cluster of three members whose leader follows the resources of a real API server, with the chart's rights.
func newResources(t *testing.T) *resourcesWorld {
	t.Helper()
	k := newKubeAPI(t, "--feature-gates=ClusterTrustBundle=true", "--runtime-config=certificates.k8s.io/v1beta1=true")
	k.crds()
	k.namespace("countersign")
	config := k.kubeconfig("members", chartRules(t)...)
	w := newWorld(t, 3, shortTTL+fmt.Sprintf(`kubernetes:
  cluster: kube
  kubeconfig: %s
  namespace: countersign
  default_id: /home/{k8s:ns}/{k8s:sa}
  resources: true
  bundle: {namespaces: "countersign.io/bundle=true"}
`, config))
	// As the other tests have it: pods have the usual IDs.
	register(w, "--token-review", "--kubeconfig", config)
	return &resourcesWorld{w, k, asker(w)}
}

func (k *kubeAPI) label(p kubePod, labels map[string]any) {
	k.t.Helper()
	if err := k.patch("/api/v1/namespaces/"+p.ns+"/pods/"+p.name, object{"metadata": object{"labels": labels}}); err != nil {
		k.t.Fatal(err)
	}
}

func (w *resourcesWorld) is(token, id string) {
	w.t.Helper()
	began := time.Now()
	w.eventually("the pod is "+id, func() error {
		got, err := w.ask(token)
		if err != nil {
			return err
		}
		if got != "spiffe://"+trustDomain+id {
			return fmt.Errorf("it is %s", got)
		}
		return nil
	})
	w.t.Logf("the pod is %s after %v", id, time.Since(began).Round(time.Millisecond))
}

func id(path string) string { return "spiffe://" + trustDomain + path }

func TestWorkloadIdentity(t *testing.T) {
	w := newResources(t)
	k := w.k
	web := k.pod("shop", "web", "web", "node-1")
	token := k.token(web, "countersign")
	w.is(token, "/ns/shop/sa/web")

	if err := k.resource("workloadidentities", "web", object{
		"podSelector":      object{"matchLabels": object{"app": "web"}},
		"spiffeIDTemplate": id("/apps/{k8s:ns}/web"), "x509TTL": "10m", "jwtTTL": "1m", "dnsNames": []string{"web.{k8s:ns}.svc"}, "hint": "web",
	}); err != nil {
		t.Fatal(err)
	}
	w.becomes(k, "workloadidentities", "web", "True", "Ready")
	w.is(token, "/ns/shop/sa/web") // it has no label
	k.label(web, map[string]any{"app": "web"})
	w.is(token, "/apps/shop/web")
	k.label(web, map[string]any{"app": "db"})
	w.is(token, "/ns/shop/sa/web")
	k.label(web, map[string]any{"app": "web"})
	w.is(token, "/apps/shop/web")

	// The namespace's labels.
	if err := k.resource("workloadidentities", "team", object{
		"namespaceSelector": object{"matchExpressions": []object{{"key": "team", "operator": "In", "values": []string{"red", "blue"}}}},
		"podSelector":       object{"matchExpressions": []object{{"key": "app", "operator": "Exists"}}},
		"spiffeIDTemplate":  id("/teams/{k8s:ns}/{k8s:sa}"),
	}); err != nil {
		t.Fatal(err)
	}
	o := w.becomes(k, "workloadidentities", "team", "True", "Ready", "2 entries")
	if n := len(o.at("status", "entries").([]any)); n != 2 {
		t.Errorf("%d entries, want one for each value", n)
	}
	k.label(web, map[string]any{"app": "api"})
	w.is(token, "/ns/shop/sa/web")
	if err := k.patch("/api/v1/namespaces/shop", object{"metadata": object{"labels": object{"team": "red"}}}); err != nil {
		t.Fatal(err)
	}
	w.is(token, "/teams/shop/web")
	if err := k.do(http.MethodDelete, resourcesAPI+"workloadidentities/team", nil, nil); err != nil {
		t.Fatal(err)
	}
	w.is(token, "/ns/shop/sa/web")
	k.label(web, map[string]any{"app": "web"})
	w.is(token, "/apps/shop/web")

	// A hand edit is put back, and a deletion made good.
	made := w.becomes(k, "workloadidentities", "web", "True", "Ready").at("status", "entries").([]any)[0].(string)
	w.admin("entry", "update", made, "--id", id("/stolen"))
	w.is(token, "/apps/shop/web")
	w.admin("entry", "delete", made)
	w.is(token, "/apps/shop/web")
	// By the admin API, on the leader's own socket, and so on record: the edit, and that it was put back.
	if out, err := w.Leader(w.ctx).Admin(w.ctx, w.Bin, "audit", "query", "-o", "json"); err != nil || strings.Count(out, `"action":"admin.update_entry"`) < 2 {
		t.Errorf("audit: %v %s", err, out)
	}

	for _, m := range w.Members {
		if raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", m.PID())); err == nil {
			for _, line := range strings.Split(string(raw), "\n") {
				if strings.HasPrefix(line, "VmRSS") {
					t.Logf("%s leads=%t %s", m.Name, m == w.Leader(w.ctx), line)
				}
			}
		}
	}
	// Another leader goes on, and what is deleted is taken away.
	first := w.Leader(w.ctx)
	first.Kill()
	if first == w.Members[0] {
		t.Log("the member that is asked led: it is started again")
	}
	if err := w.RestartMember(w.ctx, first); err != nil {
		t.Fatal(err)
	}
	w.eventually("there is a leader", func() error {
		if w.Leader(w.ctx) == nil {
			return errors.New("none")
		}
		return nil
	})
	w.ask = asker(w.world)
	if err := k.do(http.MethodDelete, resourcesAPI+"workloadidentities/web", nil, nil); err != nil {
		t.Fatal(err)
	}
	w.is(token, "/ns/shop/sa/web")
	w.eventually("the resource is gone", func() error {
		if k.do(http.MethodGet, resourcesAPI+"workloadidentities/web", nil, nil) == nil {
			return errors.New("it is there")
		}
		return nil
	})
	if out := w.admin("entry", "list"); strings.Contains(out, "/apps/") {
		t.Errorf("an entry is left:\n%s", out)
	}
}

// TestResourcesRefused: what is wrong is refused by the API server where a schema can say so, else by a condition and an event.
func TestResourcesRefused(t *testing.T) {
	w := newResources(t)
	k := w.k
	pods := object{"matchLabels": object{"app": "web"}}
	pinned := object{"matchLabels": object{"kubernetes.io/metadata.name": "shop"}}
	good := id("/apps/{k8s:ns}/web")
	for what, c := range map[string]struct {
		plural string
		spec   object
		says   string
	}{
		"no selector":               {"workloadidentities", object{"spiffeIDTemplate": good}, "match every pod"},
		"empty selectors":           {"workloadidentities", object{"spiffeIDTemplate": good, "podSelector": object{}, "namespaceSelector": object{"matchLabels": object{}}}, "match every pod"},
		"NotIn":                     {"workloadidentities", object{"spiffeIDTemplate": good, "podSelector": object{"matchExpressions": []object{{"key": "a", "operator": "NotIn", "values": []string{"b"}}}}}, "absent proves nothing"},
		"DoesNotExist":              {"workloadidentities", object{"spiffeIDTemplate": good, "podSelector": object{"matchExpressions": []object{{"key": "a", "operator": "DoesNotExist"}}}}, "absent proves nothing"},
		"In without values":         {"workloadidentities", object{"spiffeIDTemplate": good, "podSelector": object{"matchExpressions": []object{{"key": "a", "operator": "In"}}}}, "values go with In"},
		"a literal for all":         {"workloadidentities", object{"spiffeIDTemplate": id("/web"), "podSelector": pods}, "pin one namespace"},
		"account only":              {"workloadidentities", object{"spiffeIDTemplate": id("/apps/{k8s:sa}"), "podSelector": pods}, "pin one namespace"},
		"another account's":         {"workloadidentities", object{"spiffeIDTemplate": id("/ns/{k8s:ns}/sa/admin"), "podSelector": pods}, "another account's"},
		"reserved":                  {"workloadidentities", object{"spiffeIDTemplate": id("/countersign/member/{k8s:ns}"), "podSelector": pods}, "CA cluster's own"},
		"reserved by a name":        {"workloadidentities", object{"spiffeIDTemplate": id("/{k8s:ns}/x"), "podSelector": pods}, "first path segment"},
		"unknown placeholder":       {"workloadidentities", object{"spiffeIDTemplate": id("/a/{k8s:ns}/{pod}"), "podSelector": pods}, "no placeholders but"},
		"placeholders run together": {"workloadidentities", object{"spiffeIDTemplate": id("/a/{k8s:ns}-{k8s:sa}"), "podSelector": pods}, "'_' between them"},
		"TTL too long":              {"workloadidentities", object{"spiffeIDTemplate": good, "podSelector": pods, "x509TTL": "25h"}, "5s to 24h"},
		"TTL nonsense":              {"workloadidentities", object{"spiffeIDTemplate": good, "podSelector": pods, "jwtTTL": "soon"}, "5s to 24h"},
		"DNS name":                  {"workloadidentities", object{"spiffeIDTemplate": good, "podSelector": pods, "dnsNames": []string{"Web.example.org"}}, "lower-case"},
		"power":                     {"workloadidentities", object{"spiffeIDTemplate": good, "podSelector": pods, "adminRole": "security"}, "unknown field"},
		"two JWKS":                  {"kubeclusters", object{"issuer": "https://x", "audience": "a", "jwks": "{}", "jwksURL": "https://x/keys"}, "not both"},
		"no JWKS":                   {"kubeclusters", object{"issuer": "https://x", "audience": "a"}, "no way to verify"},
		"relative kubeconfig":       {"kubeclusters", object{"issuer": "https://x", "audience": "a", "tokenReview": true, "kubeconfig": "in-cluster"}, "kubeconfig"},
		"default without account":   {"kubeclusters", object{"issuer": "https://x", "audience": "a", "jwks": "{}", "defaultID": "/x/{k8s:ns}"}, "{k8s:sa}"},
		"spiffe without bundle":     {"federatedtrustdomains", object{"trustDomain": "p.org", "bundleEndpointURL": "https://p.org/b", "profile": "https_spiffe", "endpointSPIFFEID": "spiffe://p.org/e"}, "initialBundle"},
		"endpoint of another":       {"federatedtrustdomains", object{"trustDomain": "p.org", "bundleEndpointURL": "https://p.org/b", "profile": "https_spiffe", "endpointSPIFFEID": "spiffe://q.org/e", "initialBundle": "{}"}, "must be of the trust domain"},
		"http":                      {"federatedtrustdomains", object{"trustDomain": "p.org", "bundleEndpointURL": "http://p.org/b", "profile": "https_web"}, "bundleEndpointURL"},
	} {
		err := k.do(http.MethodPost, resourcesAPI+c.plural+"?fieldValidation=Strict", object{
			"apiVersion": "countersign.io/v1alpha1", "metadata": object{"name": "bad"}, "spec": c.spec,
			"kind": map[string]string{"workloadidentities": "WorkloadIdentity", "federatedtrustdomains": "FederatedTrustDomain", "kubeclusters": "KubeCluster"}[c.plural],
		}, nil)
		if err == nil {
			t.Errorf("%s: accepted", what)
			_ = k.do(http.MethodDelete, resourcesAPI+c.plural+"/bad", nil, nil)
		} else if !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: it does not say %q: %v", what, c.says, err)
		}
	}

	apply := func(name string, spec object) {
		t.Helper()
		if err := k.resource("workloadidentities", name, spec); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
	}
	// What only the controller can tell.
	apply("elsewhere", object{"spiffeIDTemplate": "spiffe://elsewhere.org/a/{k8s:ns}", "podSelector": pods})
	w.becomes(k, "workloadidentities", "elsewhere", "False", "Refused", "not of trust domain")
	apply("foreign-dns", object{"spiffeIDTemplate": good, "podSelector": pods, "dnsNames": []string{"db.prod.svc"}})
	w.becomes(k, "workloadidentities", "foreign-dns", "False", "Refused", "another namespace")
	apply("pinned-other", object{"spiffeIDTemplate": id("/ns/dev/sa/{k8s:sa}"), "namespaceSelector": pinned})
	w.becomes(k, "workloadidentities", "pinned-other", "False", "Refused", "another account's")
	apply("pinned", object{"spiffeIDTemplate": id("/one"), "namespaceSelector": pinned})
	w.becomes(k, "workloadidentities", "pinned", "True", "Ready")
	apply("pinned-again", object{"spiffeIDTemplate": id("/one"), "namespaceSelector": object{"matchLabels": object{"kubernetes.io/metadata.name": "default"}}})
	w.becomes(k, "workloadidentities", "pinned-again", "False", "Conflict", "WorkloadIdentity pinned, which is older")
	w.admin("entry", "create", "-s", "k8s:ns:ops", "--id", id("/hand/made"))
	apply("hand", object{"spiffeIDTemplate": id("/hand/{k8s:ns}"), "podSelector": pods})
	w.becomes(k, "workloadidentities", "hand", "False", "Conflict", "made by an operator")
	w.admin("entry", "create", "-s", "k8s:ns:ops", "-s", "k8s:sa:boss", "--id", id("/boss"), "--admin-role", "operator")
	apply("boss", object{"spiffeIDTemplate": id("/boss"), "namespaceSelector": pinned})
	w.becomes(k, "workloadidentities", "boss", "False", "Conflict", id("/boss"))
	// The older one goes: the other has it.
	if err := k.do(http.MethodDelete, resourcesAPI+"workloadidentities/pinned", nil, nil); err != nil {
		t.Fatal(err)
	}
	w.becomes(k, "workloadidentities", "pinned-again", "True", "Ready")
	w.eventually("an event says what was refused", func() error {
		var all struct{ Items []object }
		if err := k.do(http.MethodGet, "/apis/events.k8s.io/v1/events", nil, &all); err != nil {
			return err
		}
		for _, e := range all.Items {
			if e.at("regarding", "name") == "foreign-dns" && e.at("reason") == "Refused" {
				return nil
			}
		}
		return fmt.Errorf("none of %d", len(all.Items))
	})

	// A kube cluster that was registered by hand is not taken over, and another's IDs are not to be had.
	jwks, err := os.ReadFile(k.jwks())
	if err != nil {
		t.Fatal(err)
	}
	spec := object{"issuer": "https://east", "audience": "countersign", "jwks": string(jwks), "defaultID": "/east/{k8s:ns}/{k8s:sa}"}
	for name, edit := range map[string]func(object){"kube": func(object) {}, "east": func(object) {}, "thief": func(s object) { s["defaultID"] = "/ns/{k8s:ns}/sa/{k8s:sa}" }} {
		s := object{}
		for key, v := range spec {
			s[key] = v
		}
		edit(s)
		if err := k.resource("kubeclusters", name, s); err != nil {
			t.Fatal(err)
		}
	}
	w.becomes(k, "kubeclusters", "kube", "False", "Conflict", "an operator registered it")
	w.becomes(k, "kubeclusters", "thief", "False", "Conflict", "could give the IDs")
	w.becomes(k, "kubeclusters", "east", "True", "Ready")
	if out := w.admin("kube", "list"); !strings.Contains(out, "east") || strings.Contains(out, "thief") {
		t.Errorf("kube list:\n%s", out)
	}
	for _, name := range []string{"kube", "east"} {
		if err := k.do(http.MethodDelete, resourcesAPI+"kubeclusters/"+name, nil, nil); err != nil {
			t.Fatal(err)
		}
	}
	w.eventually("what the resource registered is gone, and nothing else", func() error {
		out := w.admin("kube", "list")
		if strings.Contains(out, "east") || !strings.Contains(out, "kube") {
			return errors.New(out)
		}
		return nil
	})
	if err := k.resource("federatedtrustdomains", "partner", object{"trustDomain": "partner.org", "bundleEndpointURL": "https://127.0.0.1:1/bundle", "profile": "https_web"}); err != nil {
		t.Fatal(err)
	}
	w.eventually("the federation is there", func() error {
		if out := w.admin("federation", "list"); !strings.Contains(out, "partner.org") {
			return errors.New(out)
		}
		return nil
	})
	w.becomes(k, "federatedtrustdomains", "partner", "False", "Failed", "could not be refreshed")
	if err := k.do(http.MethodDelete, resourcesAPI+"federatedtrustdomains/partner", nil, nil); err != nil {
		t.Fatal(err)
	}
	w.eventually("the federation is gone", func() error {
		if out := w.admin("federation", "list"); strings.Contains(out, "partner.org") {
			return errors.New(out)
		}
		return nil
	})
}

// TestBundlePublished: where the bundle is to be, it is, as it is now, whatever somebody writes there.
func TestBundlePublished(t *testing.T) {
	w := newResources(t)
	k := w.k
	read := func(ns string) (object, error) {
		var o object
		err := k.do(http.MethodGet, "/api/v1/namespaces/"+ns+"/configmaps/countersign-bundle", nil, &o)
		return o, err
	}
	roots := func() string { return w.admin("bundle", "show", "--format", "pem") }
	const trust = "/apis/certificates.k8s.io/v1beta1/clustertrustbundles/countersign.io:bundle:" + trustDomain
	current := func(what string) {
		t.Helper()
		w.eventually(what, func() error {
			pem := roots()
			for _, ns := range []string{"countersign", "shop"} {
				o, err := read(ns)
				if err != nil {
					return err
				}
				if got := o.at("data", "bundle.pem"); strings.TrimSpace(fmt.Sprint(got)) != strings.TrimSpace(pem) || o.at("data", "bundle.json") == nil {
					return fmt.Errorf("namespace %s has %v, want %s", ns, got, pem)
				}
			}
			var b object
			if err := k.do(http.MethodGet, trust, nil, &b); err != nil {
				return err
			}
			if got := b.at("spec", "trustBundle"); strings.TrimSpace(fmt.Sprint(got)) != strings.TrimSpace(pem) || b.at("spec", "signerName") != "countersign.io/bundle" {
				return fmt.Errorf("the ClusterTrustBundle has %v", b["spec"])
			}
			return nil
		})
	}
	w.eventually("the members' own namespace has it", func() error { _, err := read("countersign"); return err })
	if _, err := read("shop"); err == nil {
		t.Error("a namespace that was not chosen has it")
	}
	if err := k.patch("/api/v1/namespaces/shop", object{"metadata": object{"labels": object{"countersign.io/bundle": "true"}}}); err != nil {
		t.Fatal(err)
	}
	current("a namespace that was chosen has it")
	if err := k.patch("/api/v1/namespaces/shop/configmaps/countersign-bundle", object{"data": object{"bundle.pem": "mine"}}); err != nil {
		t.Fatal(err)
	}
	current("an edit is put back")
	if err := k.do(http.MethodDelete, "/api/v1/namespaces/countersign/configmaps/countersign-bundle", nil, nil); err != nil {
		t.Fatal(err)
	}
	current("a deletion is made good")
	if err := k.do(http.MethodDelete, trust, nil, nil); err != nil {
		t.Fatal(err)
	}
	current("a deletion of the ClusterTrustBundle is made good")
	before := roots()
	w.admin("bundle", "prepare")
	if roots() == before {
		t.Fatal("the bundle did not change")
	}
	current("a new root is published")
	if err := k.patch("/api/v1/namespaces/shop", object{"metadata": object{"labels": object{"countersign.io/bundle": nil}}}); err != nil {
		t.Fatal(err)
	}
	w.eventually("a namespace that is chosen no longer loses it", func() error {
		if _, err := read("shop"); err == nil {
			return errors.New("it is there")
		}
		return nil
	})
}
