//go:build integration

package integration

import (
	"fmt"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"countersign.io/countersign/integration/node"
)

// TestStageController: the chart's controller runs in a real kubelet's pods, known to the members by its CSI volume alone, and pods have the
// IDs that a WorkloadIdentity gives them. The one that works is killed, and the other goes on.
func TestStageController(t *testing.T) {
	p := onStage(t)
	const controller = "spiffe://" + kubeDomain + "/controller"
	out, err := p.admin(p.ctx, "entry", "create", "-s", "k8s:cluster:main", "-s", "k8s:ns:countersign", "-s", "k8s:sa:countersign-controller", "--id", controller, "--admin-role", "operator", "-o", "json")
	if err != nil {
		t.Fatal(err)
	}
	var entry struct{ ID string }
	parseJSON(t, out, &entry)
	far := p.installed
	far.Set = []string{"members.enabled=false", "agent.enabled=false", "controller.enabled=true", "controller.members=[countersign.countersign.svc:8443]", "logFormat=text"}
	manifest, err := far.Render(p.ctx, "--create-namespace=false", "--crds=false")
	if err != nil {
		t.Fatal(err)
	}
	p.apply(manifest)
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(p.explain(p.ctx, fmt.Errorf("what the product wrote:")))
		}
		if err := p.n.Delete(p.ctx, manifest); err != nil {
			t.Error(err)
		}
		if _, err := p.admin(p.ctx, "entry", "delete", entry.ID); err != nil {
			t.Error(err)
		}
	})
	const selector = "app.kubernetes.io/name=countersign-controller"
	if _, err := p.n.WaitReady(p.ctx, "countersign", selector, 2); err != nil {
		t.Fatal(err)
	}

	p.account("web")
	r := p.follow("web", "web", "")
	r.identity()
	give := func(name, template string) {
		t.Helper()
		p.apply(fmt.Sprintf(`
apiVersion: countersign.io/v1alpha1
kind: WorkloadIdentity
metadata: {name: %s-%s}
spec:
  spiffeIDTemplate: "spiffe://%s%s"
  podSelector: {matchLabels: {app: web}}
  namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: %s}}
`, p.ns, name, kubeDomain, template, p.ns))
	}
	has := func(path string) {
		t.Helper()
		want := "spiffe://" + kubeDomain + path
		r.until("the ID "+want, 0, func(g glimpse) bool { return g.ID == want })
	}
	take := func(name string) {
		t.Helper()
		const path = "/apis/countersign.io/v1alpha1/workloadidentities"
		if err := p.n.Do(p.ctx, "DELETE", path+"/"+p.ns+"-"+name, nil, nil); err != nil {
			t.Fatal(err)
		}
		if err := p.n.WaitGone(p.ctx, path, p.ns+"-"+name); err != nil {
			t.Error(err)
		}
	}
	give("one", "/apps/{k8s:ns}/web")
	has("/apps/" + p.ns + "/web")
	take("one")

	// The pod that holds the Lease goes at once, as with its node.
	holder := func() (who string) {
		t.Helper()
		if err := node.WaitFor(p.ctx, p.n, "/apis/coordination.k8s.io/v1/namespaces/countersign/leases", "countersign-controller", "a controller holds the Lease", func(l *object) bool {
			id, _ := l.at("spec", "holderIdentity").(string)
			who, _, _ = strings.Cut(id, "_")
			return who != ""
		}); err != nil {
			t.Fatal(err)
		}
		return who
	}
	before := holder()
	var now int64
	if err := p.n.Do(p.ctx, "DELETE", "/api/v1/namespaces/countersign/pods/"+before, &metav1.DeleteOptions{GracePeriodSeconds: &now}, nil); err != nil {
		t.Fatal(err)
	}
	give("two", "/later/{k8s:ns}/web")
	has("/later/" + p.ns + "/web")
	if after := holder(); after == before {
		t.Errorf("%s still holds the Lease", after)
	}
	take("two")
}
