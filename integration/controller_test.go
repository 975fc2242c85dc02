//go:build integration

package integration

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	rbacv1 "k8s.io/api/rbac/v1"

	"countersign.io/countersign/deploy"
	"countersign.io/countersign/integration/cluster"
)

// controllerID is who the controllers of these tests are towards members.
const controllerID = "spiffe://" + trustDomain + "/edge/controller"

// controlled is a kube cluster that the members do not live in, and a controller of its own there: by the account and the rights that the
// chart gives it, and by the SVID that an agent gives it.
type controlled struct {
	*resourcesWorld
	agent *cluster.Agent
	entry string // that makes it an admin
	login string // kubeconfig
}

func newControlled(t *testing.T, role string) *controlled {
	t.Helper()
	k := newKubeAPI(t, "--allow-privileged=true")
	k.crds()
	k.secured("countersign", "privileged")
	k.apply("the chart", rendered(t, "trustDomain: "+trustDomain+"\ncluster: kube\nmembers: {enabled: false}\nagent: {servers: ['ca.example.org:8443']}\ncontroller: {enabled: true}\n", deploy.Options{KubeVersion: "1.37.2"}))
	w := newWorld(t, 3, shortTTL)
	// By keys as well, so that another cluster's API server is not taken for this one.
	register(w, "--jwks-file", k.jwks(), "--token-review", "--kubeconfig", k.kubeconfig("members", mayReview(), mayWatch()))
	c := &controlled{resourcesWorld: &resourcesWorld{world: w, k: k}, agent: w.agent(), login: k.login("countersign", "countersign-controller")}
	c.entry = w.adminEntry(c.agent, controllerID, role)
	c.ask = asker(w)
	return c
}

// start runs a controller. It asks the second member, and then the third.
func (c *controlled) start(name string, args ...string) (*cluster.Process, *lines) {
	c.t.Helper()
	return c.startAsking(name, []string{c.Members[1].Address, c.Members[2].Address}, args...)
}

func (c *controlled) startAsking(name string, members []string, args ...string) (*cluster.Process, *lines) {
	c.t.Helper()
	log := newLines()
	all := append([]string{filepath.Join(bin, "countersign"), "controller", "run", "--kubeconfig", c.login, "--cluster", "kube",
		"--member", strings.Join(members, ","), "--leader-election", "countersign"}, args...)
	p, err := c.Start(name, []string{"SPIFFE_ENDPOINT_SOCKET=" + c.agent.Endpoint()}, log, all...)
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() {
		if c.t.Failed() {
			c.t.Logf("--- controller %s\n%s", name, log.tail(30))
		}
	})
	return p, log
}

const worksNow = "this controller works now"

func (c *controlled) works(log *lines) {
	c.t.Helper()
	log.wait(c.t, c.ctx, "the controller to work", func(l []string) bool { return contains(l, worksNow) })
}

func (c *controlled) apply(plural, name string, spec object) {
	c.t.Helper()
	if err := c.k.resource(plural, name, spec); err != nil {
		c.t.Fatal(err)
	}
}

func web(hint string) object {
	return object{"podSelector": object{"matchLabels": object{"app": "web"}}, "spiffeIDTemplate": id("/apps/{k8s:ns}/web"), "hint": hint}
}

// hinted waits until the entries have the hint, which a controller wrote.
func (c *controlled) hinted(hint string) {
	c.t.Helper()
	c.eventually("the entry has hint "+hint, func() error {
		if out := c.admin("entry", "list", "-o", "json"); !strings.Contains(out, `"`+hint+`"`) {
			return errors.New(out)
		}
		return nil
	})
}

// serials are the SVIDs by which the controller changed something.
func (c *controlled) serials() map[string]bool {
	c.t.Helper()
	out := map[string]bool{}
	for _, m := range c.Members {
		if m.Exited() {
			continue
		}
		text, err := m.Admin(c.ctx, bin, "audit", "query", "--who", controllerID, "--action", "admin.update_entry", "-o", "json")
		if err != nil {
			continue
		}
		for _, s := range regexp.MustCompile(`"serial":"([0-9a-f]+)"`).FindAllStringSubmatch(text, -1) {
			out[s[1]] = true
		}
	}
	return out
}

// TestControllerRun: two controllers follow the resources of a cluster that the members do not live in. Their SVIDs end and are made
// anew all the while, the member that they ask dies, and then the one of the two that works.
func TestControllerRun(t *testing.T) {
	c := newControlled(t, "security")
	k := c.k
	one, oneLog := c.start("one")
	c.works(oneLog)
	two, twoLog := c.start("two")
	twoLog.wait(t, c.ctx, "the other to wait", func(l []string) bool { return contains(l, "controller started") })

	pod := k.pod("shop", "web", "web", "node-1")
	token := k.token(pod, "countersign")
	c.is(token, "/ns/shop/sa/web")
	c.apply("workloadidentities", "web", web("first"))
	c.becomes(k, "workloadidentities", "web", "True", "Ready", "1 entries")
	k.label(pod, map[string]any{"app": "web"})
	c.is(token, "/apps/shop/web")
	jwks, err := os.ReadFile(k.jwks())
	if err != nil {
		t.Fatal(err)
	}
	east := object{"issuer": "https://east", "audience": "countersign", "jwks": string(jwks), "defaultID": "/east/{k8s:ns}/{k8s:sa}"}
	c.apply("kubeclusters", "east", east)
	c.becomes(k, "kubeclusters", "east", "True", "Ready")
	partner := object{"trustDomain": "partner.org", "bundleEndpointURL": "https://127.0.0.1:1/bundle", "profile": "https_web"}
	c.apply("federatedtrustdomains", "partner", partner)
	c.becomes(k, "federatedtrustdomains", "partner", "False", "Failed", "could not be refreshed")
	if out := c.admin("kube", "list") + c.admin("federation", "list"); !strings.Contains(out, "east") || !strings.Contains(out, "partner.org") {
		t.Errorf("kube list, federation list:\n%s", out)
	}

	// SVIDs of five seconds: it goes on with new ones.
	for n := 0; len(c.serials()) < 4; n++ {
		hint := fmt.Sprintf("turn-%d", n)
		c.apply("workloadidentities", "web", web(hint))
		c.hinted(hint)
	}
	c.becomes(k, "workloadidentities", "web", "True", "Ready")
	t.Logf("%d SVIDs, %d calls failed", len(c.serials()), count(oneLog.all(), "Reconciler error")) // the partner is not one: it is stale

	// The member that it asks is away.
	c.Members[1].Kill()
	c.apply("workloadidentities", "web", web("member-away"))
	c.becomes(k, "workloadidentities", "web", "True", "Ready")
	c.hinted("member-away")
	if err := c.RestartMember(c.ctx, c.Members[1]); err != nil {
		t.Fatal(err)
	}

	// The one that works dies; the other was told nothing.
	if contains(twoLog.all(), worksNow) && !one.Exited() { // one that cannot renew its Lease in time ends, rightly
		t.Error("two controllers work at the same time")
	}
	one.Kill()
	c.apply("workloadidentities", "late", object{"namespaceSelector": object{"matchLabels": object{"kubernetes.io/metadata.name": "shop"}}, "spiffeIDTemplate": id("/late")})
	c.works(twoLog)
	c.becomes(k, "workloadidentities", "late", "True", "Ready")
	// What is deleted is undone.
	for plural, name := range map[string]string{"workloadidentities": "web", "kubeclusters": "east", "federatedtrustdomains": "partner"} {
		if err := k.do(http.MethodDelete, resourcesAPI+plural+"/"+name, nil, nil); err != nil {
			t.Fatal(err)
		}
		c.eventually(plural+" "+name+" is gone", func() error {
			if k.do(http.MethodGet, resourcesAPI+plural+"/"+name, nil, nil) == nil {
				return errors.New("it is there")
			}
			return nil
		})
	}
	if out := c.admin("kube", "list") + c.admin("federation", "list") + c.admin("entry", "list"); strings.Contains(out, "east") || strings.Contains(out, "partner.org") || strings.Contains(out, "/apps/") {
		t.Errorf("left:\n%s", out)
	}

	// One that is told to end does so in order, and the next need not wait until its Lease is over.
	third, thirdLog := c.start("three")
	thirdLog.wait(t, c.ctx, "the third to wait", func(l []string) bool { return contains(l, "acquire leader lease") })
	two.Signal(syscall.SIGTERM)
	<-two.Done()
	c.works(thirdLog)
	third.Signal(syscall.SIGTERM)
	<-third.Done()
	if two.Code() != 0 || third.Code() != 0 {
		t.Errorf("controllers that are told to end have exit codes %d and %d:\n%s\n%s", two.Code(), third.Code(), twoLog.tail(10), thirdLog.tail(10))
	}
}

// TestControllerRoles: what the controller's role does not allow is not made, and its resource says so. The role operator is enough for
// WorkloadIdentity.
func TestControllerRoles(t *testing.T) {
	c := newControlled(t, "operator")
	k := c.k
	_, log := c.start("one")
	c.works(log)
	jwks, err := os.ReadFile(k.jwks())
	if err != nil {
		t.Fatal(err)
	}
	c.apply("workloadidentities", "web", web("first"))
	c.becomes(k, "workloadidentities", "web", "True", "Ready")
	c.apply("kubeclusters", "east", object{"issuer": "https://east", "audience": "countersign", "jwks": string(jwks), "defaultID": "/east/{k8s:ns}/{k8s:sa}"})
	c.becomes(k, "kubeclusters", "east", "False", "Denied", "needs the role security", controllerID)
	c.apply("federatedtrustdomains", "partner", object{"trustDomain": "partner.org", "bundleEndpointURL": "https://127.0.0.1:1/bundle", "profile": "https_web"})
	c.becomes(k, "federatedtrustdomains", "partner", "False", "Denied", "needs the role security")
	if out := c.admin("kube", "list") + c.admin("federation", "list"); strings.Contains(out, "east") || strings.Contains(out, "partner.org") {
		t.Errorf("made without the role:\n%s", out)
	}
	// Nor does the role give it the way to a higher one.
	c.admin("entry", "create", "-s", "k8s:ns:ops", "-s", "k8s:sa:boss", "--id", id("/apps/shop/boss"), "--admin-role", "reader")
	c.apply("workloadidentities", "boss", object{"namespaceSelector": object{"matchLabels": object{"kubernetes.io/metadata.name": "shop"}}, "spiffeIDTemplate": id("/apps/shop/boss")})
	c.eventually("an admin's ID is not to be had", func() error { // by the member's word, or by the controller's, once that has read the entries again
		var o object
		if err := k.do(http.MethodGet, resourcesAPI+"workloadidentities/boss", nil, &o); err != nil {
			return err
		}
		if s, r, m := o.ready(); s != "False" || r != "Denied" && r != "Conflict" || !strings.Contains(m, id("/apps/shop/boss")) {
			return fmt.Errorf("Ready=%s, %s: %s", s, r, m)
		}
		return nil
	})
	if n := strings.Count(c.admin("entry", "list", "-o", "json"), "/apps/shop/boss"); n != 1 {
		t.Errorf("%d entries for the admin's ID", n)
	}

	c.admin("entry", "update", c.entry, "--admin-role", "reader")
	before := c.admin("entry", "list", "-o", "json")
	c.apply("workloadidentities", "web", web("second"))
	c.apply("workloadidentities", "more", object{"namespaceSelector": object{"matchLabels": object{"kubernetes.io/metadata.name": "shop"}}, "spiffeIDTemplate": id("/more")})
	for _, name := range []string{"web", "more"} {
		c.becomes(k, "workloadidentities", name, "False", "Denied", "needs the role operator")
	}
	if after := c.admin("entry", "list", "-o", "json"); after != before {
		t.Errorf("changed without the role: before\n%s\nafter\n%s", before, after)
	}
	c.admin("entry", "update", c.entry, "--admin-role", "security")
	for plural, name := range map[string]string{"workloadidentities": "more", "kubeclusters": "east"} {
		if err := k.patch(resourcesAPI+plural+"/"+name, object{"metadata": object{"labels": object{"look": "again"}}}); err != nil {
			t.Fatal(err)
		}
	}
	c.apply("workloadidentities", "web", web("third"))
	c.becomes(k, "workloadidentities", "web", "True", "Ready")
	c.hinted("third")
}

// TestControllerRefused: what keeps a controller from working is said at once, with what to do.
func TestControllerRefused(t *testing.T) {
	c := newControlled(t, "security")
	k := c.k
	refused := func(what string, code int, says []string, args ...string) {
		t.Helper()
		p, log := c.start(what, args...)
		select {
		case <-p.Done():
		case <-c.ctx.Done():
			t.Fatalf("%s: it runs on:\n%s", what, log.tail(10))
		}
		for _, want := range says {
			if p.Code() != code || !strings.Contains(log.tail(5), want) {
				t.Errorf("%s: exit code %d, want %d and %q:\n%s", what, p.Code(), code, want, log.tail(5))
			}
		}
	}
	refused("a cluster that nobody knows", 3, []string{"no kube cluster of that name", "countersign kube add edge"}, "--cluster", "edge")
	refused("a cluster of another issuer", 1, []string{"another cluster's", c.iss.URL}, "--cluster", "test")
	// The same issuer, by other keys.
	keys, err := os.ReadFile(c.iss.JWKSFile)
	if err != nil {
		t.Fatal(err)
	}
	twin := filepath.Join(c.Dir, "twin.jwks")
	if err := os.WriteFile(twin, keys, 0o600); err != nil {
		t.Fatal(err)
	}
	c.admin("kube", "add", "twin", "--issuer", kubeIssuer, "--jwks-file", twin, "--default-id", "/twin/{k8s:ns}/{k8s:sa}")
	refused("a cluster of the same issuer", 1, []string{"other keys"}, "--cluster", "twin")

	// Rights: without those for the Lease, and without any.
	role := func(name string, rules ...rbacv1.PolicyRule) string { return k.kubeconfig(name, rules...) }
	var chart rbacv1.ClusterRole
	k.must(http.MethodGet, "/apis/rbac.authorization.k8s.io/v1/clusterroles/countersign-controller", nil, &chart)
	refused("no rights for Leases", 4, []string{"may not: create leases.coordination.k8s.io in namespace countersign; get leases"}, "--kubeconfig", role("leaseless", chart.Rules...))
	refused("no rights at all", 4, []string{"list workloadidentities.countersign.io", "patch kubeclusters/status"}, "--kubeconfig", role("nobody"))
	refused("no kubeconfig", 2, []string{"none.kubeconfig"}, "--kubeconfig", filepath.Join(k.dir, "none.kubeconfig"))

	k.must(http.MethodDelete, "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/kubeclusters.countersign.io", nil, nil)
	c.eventually("the API server has forgotten a kind", func() error {
		if err := k.do(http.MethodGet, resourcesAPI+"kubeclusters", nil, nil); err == nil {
			return errors.New("it is there")
		}
		return nil
	})
	refused("a kind that is not there", 1, []string{"does not know KubeCluster", "deploy/chart/crds"})
	k.crd("kubeclusters")

	// No member, and later one.
	p, log := c.startAsking("no member", []string{"127.0.0.1:1", c.Members[1].Address}, "--timeout", "2s")
	c.works(log) // by the other that it is told of
	p.Stop()
	alone := newLines()
	address := c.Members[1].Address
	c.Members[1].Kill()
	p, err = c.Start("waiting", []string{"SPIFFE_ENDPOINT_SOCKET=" + c.agent.Endpoint()}, alone, filepath.Join(bin, "countersign"), "controller", "run", "--kubeconfig", c.login, "--cluster", "kube", "--member", address)
	if err != nil {
		t.Fatal(err)
	}
	alone.wait(t, c.ctx, "the controller to say that no member can be asked", func(l []string) bool { return contains(l, "no member can be asked") && contains(l, address) })
	if err := c.RestartMember(c.ctx, c.Members[1]); err != nil {
		t.Fatal(err)
	}
	c.works(alone)
	p.Stop()

	// No power at all, and no identity at all.
	c.admin("entry", "delete", c.entry)
	c.createEntry(append(uidSelectors(), "--id", controllerID)...)
	c.eventually("the SVID is one without power", func() error { _, err := c.fetch(c.agent); return err })
	refused("no admin", 4, []string{"is no admin", "--admin-role"})
	p, log = c.start("no agent", "--socket", "unix:///nonexistent/agent.sock", "--timeout", "1s")
	log.wait(t, c.ctx, "the controller to say that there is no agent", func(l []string) bool {
		return contains(l, "no member can be asked") && contains(l, "/nonexistent/agent.sock")
	})
	p.Stop()
}
