package controller

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"countersign.io/countersign/api"
	adminv1 "countersign.io/countersign/api/admin/v1"
	"countersign.io/countersign/controller/v1alpha1"
	"countersign.io/countersign/identity"
)

func webIdentity() *v1alpha1.WorkloadIdentity {
	return &v1alpha1.WorkloadIdentity{
		ObjectMeta: metav1.ObjectMeta{Name: "web"},
		Spec: v1alpha1.WorkloadIdentitySpec{
			PodSelector:      &metav1.LabelSelector{MatchLabels: map[string]string{"app": "web"}},
			SPIFFEIDTemplate: "spiffe://example.org/apps/{k8s:ns}/web", Hint: "web", X509TTL: &metav1.Duration{Duration: 10 * time.Minute},
		},
	}
}

func partnerDomain() *v1alpha1.FederatedTrustDomain {
	return &v1alpha1.FederatedTrustDomain{
		ObjectMeta: metav1.ObjectMeta{Name: "partner"},
		Spec: v1alpha1.FederatedTrustDomainSpec{
			TrustDomain: "partner.org", BundleEndpointURL: "https://partner.org/bundle", Profile: "https_spiffe", EndpointSPIFFEID: "spiffe://partner.org/e", InitialBundle: "bundle one",
		},
	}
}

func eastCluster() *v1alpha1.KubeCluster {
	return &v1alpha1.KubeCluster{ObjectMeta: metav1.ObjectMeta{Name: "east"}, Spec: v1alpha1.KubeClusterSpec{
		Issuer: "https://east", Audience: "countersign", JWKS: "{keys}", DefaultID: "/east/{k8s:ns}/{k8s:sa}", AgentAccounts: []string{"a/b"},
	}}
}

// TestFollower: what the three kinds have in common.
func TestFollower(t *testing.T) {
	for _, make := range []func() client.Object{
		func() client.Object { return webIdentity() }, func() client.Object { return partnerDomain() }, func() client.Object { return eastCluster() },
	} {
		obj := make()
		t.Run(fmt.Sprintf("%T", obj), func(t *testing.T) {
			w := newKubeWorld(t)
			size := func() int { return len(w.member.entries) + len(w.member.clusters) + len(w.fed.all) }
			before := size()
			w.create(obj)

			// No member can be asked: nothing is made, the condition says so, and so does one event.
			w.member.fault = fmt.Errorf("%w: all members are away", identity.ErrUnavailable)
			w.settles(obj, reasonFailed, "all members are away")
			w.settles(obj, reasonFailed)
			if all := w.said(); len(all) != 1 || !strings.Contains(all[0], "Warning Failed") || !strings.Contains(all[0], "all members are away") {
				t.Errorf("events: %q", all)
			}
			if !slices.Contains(obj.GetFinalizers(), finalizer) {
				t.Error("it has no finalizer before anything is made")
			}
			// Nor can the others, who say so each in their own way: it is not written each time that it is tried.
			said := 0
			for i := range 10 {
				w.member.fault = fmt.Errorf("%w: no leader at 10.0.0.%d", identity.ErrUnavailable, i)
				w.settles(obj, reasonFailed)
				said += len(w.said())
			}
			w.now = w.now.Add(wordedAgain)
			w.settles(obj, reasonFailed, "no leader at 10.0.0.9")
			if said += len(w.said()); said != 2 {
				t.Errorf("%d events of nobody who can be asked, want one at once and one later", said)
			}
			// The role does not do.
			w.member.fault, w.member.denied = nil, fmt.Errorf("%w: it needs the role security", identity.ErrDenied)
			w.settles(obj, reasonDenied, "needs the role security")
			if size() != before {
				t.Error("something was made without the role")
			}
			w.member.denied = nil
			w.settles(obj, reasonReady)
			if size() != before+1 || w.member.changes != 1 {
				t.Errorf("%d things made by %d changes, want one", size()-before, w.member.changes)
			}
			if statusOf(obj).ObservedGeneration != obj.GetGeneration() {
				t.Errorf("observed generation %d of %d", statusOf(obj).ObservedGeneration, obj.GetGeneration())
			}
			// Nothing changes, and nothing is written.
			w.said()
			version := obj.GetResourceVersion()
			w.settles(obj, reasonReady)
			if w.member.changes != 1 || obj.GetResourceVersion() != version || len(w.said()) != 0 {
				t.Errorf("a look at what is right wrote something: %d changes", w.member.changes)
			}

			// Not among what is kept here: the API server is asked, and has it.
			w.behind = true
			w.settles(obj, reasonReady)
			if w.member.changes != 1 || size() != before+1 || obj.GetResourceVersion() != version {
				t.Errorf("a resource that is there was taken for gone: %d changes, %d things", w.member.changes, size()-before)
			}
			w.behind = false

			// Deleted while nobody can undo it: it stays, and says why.
			w.delete(obj)
			w.member.fault = fmt.Errorf("%w: all members are away", identity.ErrUnavailable)
			w.settles(obj, reasonFailed, "taking away what it made", "all members are away")
			w.member.fault, w.member.denied = nil, fmt.Errorf("%w: the role was taken away", identity.ErrDenied)
			w.settles(obj, reasonDenied, "taking away what it made")
			if size() != before+1 || !w.there(obj) {
				t.Error("it went, and what it made did not")
			}
			w.member.denied = nil
			w.lets(obj)
			if size() != before {
				t.Error("what it made is left")
			}

			// By force: the finalizer was taken off by hand.
			obj = make()
			w.create(obj)
			w.settles(obj, reasonReady)
			obj.SetFinalizers(nil)
			w.update(obj)
			w.delete(obj)
			if size() != before+1 {
				t.Fatal("nothing is left to be taken away")
			}
			w.lets(obj)
			if size() != before {
				t.Error("what it made is left after it was deleted by force")
			}

			// Somebody else's finalizer keeps it: that is none of ours to do.
			obj = make()
			obj.SetFinalizers([]string{"example.org/other"})
			w.create(obj)
			w.settles(obj, reasonReady)
			w.delete(obj)
			changes := w.member.changes
			for range 2 {
				if _, err := w.follow(obj); err != nil {
					t.Fatal(err)
				}
				w.member.fault = fmt.Errorf("%w: nobody is to be asked any more", identity.ErrUnavailable)
			}
			w.member.fault = nil
			if !w.there(obj) || size() != before || w.member.changes != changes+1 || !slices.Equal(obj.GetFinalizers(), []string{"example.org/other"}) {
				t.Errorf("finalizers %v, %d changes", obj.GetFinalizers(), w.member.changes-changes)
			}
		})
	}
}

// TestIdentities: entries are what a WorkloadIdentity asks for, whoever changes them, and nobody else's are touched.
func TestIdentities(t *testing.T) {
	w := newKubeWorld(t)
	obj := webIdentity()
	obj.Spec.PodSelector = &metav1.LabelSelector{MatchExpressions: []metav1.LabelSelectorRequirement{{Key: "app", Operator: "In", Values: []string{"web", "api"}}}}
	w.member.entries["hand"] = &adminv1.Entry{Id: "hand", Selectors: []string{"k8s:ns:ops"}, SpiffeId: "spiffe://example.org/ops"}
	w.member.entries["other"] = &adminv1.Entry{Id: "other", Selectors: []string{"k8s:ns:ops"}, SpiffeId: "spiffe://example.org/other", ManagedBy: "workloadidentity/west/web"}
	w.create(obj)
	w.settles(obj, reasonReady, "2 entries")
	if len(obj.Status.Entries) != 2 || obj.Status.PodsMatched != 1 {
		t.Fatalf("status %+v", obj.Status)
	}
	ours := obj.Status.Entries
	check := func(what string) {
		t.Helper()
		w.settles(obj, reasonReady)
		for _, id := range obj.Status.Entries {
			e := w.member.entries[id]
			if e == nil || e.SpiffeId != obj.Spec.SPIFFEIDTemplate || e.Hint != "web" || e.X509Ttl.AsDuration() != 10*time.Minute || e.ManagedBy != "workloadidentity/main/web" || e.Selectors[0] != "k8s:cluster:main" {
				t.Errorf("%s: entry %s is %v", what, id, e)
			}
		}
		if len(obj.Status.Entries) != 2 || len(w.member.entries) != 4 {
			t.Errorf("%s: %d entries of %d", what, len(obj.Status.Entries), len(w.member.entries))
		}
	}
	// Changed and deleted by hand.
	w.member.entries[ours[0]].SpiffeId = "spiffe://example.org/stolen"
	w.member.entries[ours[1]].AdminRole = "security"
	check("after an edit by hand")
	if w.member.entries[ours[1]].AdminRole != "" {
		t.Error("a role that was put on by hand stays")
	}
	delete(w.member.entries, ours[0])
	check("after a deletion by hand")
	// Other selectors change the entries that are there: a pod that matches both loses nothing in between.
	have := obj.Status.Entries
	obj.Spec.PodSelector.MatchExpressions[0].Values = []string{"web", "db"}
	w.update(obj)
	check("after the selectors were changed")
	if !slices.Equal(obj.Status.Entries, have) {
		t.Errorf("entries %v were replaced by %v", have, obj.Status.Entries)
	}
	// What is refused loses what it had.
	obj.Spec.SPIFFEIDTemplate = "spiffe://example.org/web"
	w.update(obj)
	w.settles(obj, reasonRefused, "several namespaces")
	if len(obj.Status.Entries) != 0 || len(w.member.entries) != 2 {
		t.Errorf("it is refused, and has entries %v", obj.Status.Entries)
	}
	for _, id := range []string{"hand", "other"} {
		if w.member.entries[id] == nil {
			t.Errorf("entry %s, which is somebody else's, is gone", id)
		}
	}
}

// TestIdentitiesConflict: an ID that somebody else could have is not given to pods, whoever was first.
func TestIdentitiesConflict(t *testing.T) {
	for what, c := range map[string]struct {
		entry  *adminv1.Entry
		reason string
		says   string
	}{
		"an operator's":          {&adminv1.Entry{SpiffeId: "spiffe://example.org/apps/shop/web", CreatedAt: api.TimeToWire(born().Add(-time.Hour))}, reasonConflict, "made by an operator"},
		"an operator's template": {&adminv1.Entry{SpiffeId: "spiffe://example.org/apps/{k8s:ns}/web", CreatedAt: api.TimeToWire(born().Add(-time.Hour))}, reasonConflict, "choose another ID"},
		"another cluster's":      {&adminv1.Entry{SpiffeId: "spiffe://example.org/apps/shop/web", ManagedBy: "workloadidentity/west/web", CreatedAt: api.TimeToWire(born().Add(-time.Hour))}, reasonConflict, "of workloadidentity/west/web"},
		"a younger one":          {&adminv1.Entry{SpiffeId: "spiffe://example.org/apps/shop/web", CreatedAt: api.TimeToWire(born().Add(time.Hour))}, reasonReady, ""},
		"a younger admin's":      {&adminv1.Entry{SpiffeId: "spiffe://example.org/apps/shop/web", AdminRole: "reader", CreatedAt: api.TimeToWire(born().Add(time.Hour))}, reasonConflict, "made by an operator"},
		"a younger cluster's":    {&adminv1.Entry{SpiffeId: "spiffe://example.org/apps/shop/web", Downstream: true, CreatedAt: api.TimeToWire(born().Add(time.Hour))}, reasonConflict, "made by an operator"},
		"another ID":             {&adminv1.Entry{SpiffeId: "spiffe://example.org/apps/shop/db", CreatedAt: api.TimeToWire(born().Add(-time.Hour))}, reasonReady, ""},
	} {
		t.Run(what, func(t *testing.T) {
			w := newKubeWorld(t)
			c.entry.Id, c.entry.Selectors = "theirs", []string{"k8s:ns:ops"}
			w.member.entries["theirs"] = c.entry
			obj := webIdentity()
			w.create(obj)
			w.settles(obj, c.reason, c.says)
			if n := len(w.member.entries); (n == 2) != (c.reason == reasonReady) || w.member.entries["theirs"] == nil {
				t.Errorf("%d entries", n)
			}
			if c.reason == reasonReady {
				return
			}
			delete(w.member.entries, "theirs")
			w.settles(obj, reasonReady)
		})
	}
	// Of two resources the older one has it, and of two of the same second the one whose name comes first.
	w := newKubeWorld(t)
	first, second := webIdentity(), webIdentity()
	first.Name, second.Name = "a", "b"
	w.create(first)
	w.create(second)
	w.settles(second, reasonConflict, "WorkloadIdentity a, which is older")
	w.settles(first, reasonReady)
	first.SetFinalizers(append(first.GetFinalizers(), "example.org/other")) // it stays while it goes
	w.update(first)
	w.delete(first)
	if _, err := w.follow(first); err != nil || !w.there(first) {
		t.Fatal("the older one is gone already", err)
	}
	w.settles(second, reasonReady)
}

// TestIdentitiesGarbage: whatever a resource holds that the schema would have refused, nothing is made of it.
func TestIdentitiesGarbage(t *testing.T) {
	for what, edit := range map[string]func(*v1alpha1.WorkloadIdentitySpec){
		"nothing":        func(s *v1alpha1.WorkloadIdentitySpec) { *s = v1alpha1.WorkloadIdentitySpec{} },
		"no ID":          func(s *v1alpha1.WorkloadIdentitySpec) { s.SPIFFEIDTemplate = "" },
		"no selector":    func(s *v1alpha1.WorkloadIdentitySpec) { s.PodSelector = nil },
		"not a URL":      func(s *v1alpha1.WorkloadIdentitySpec) { s.SPIFFEIDTemplate = "\x00{k8s:ns}/{k8s:ns}" },
		"another domain": func(s *v1alpha1.WorkloadIdentitySpec) { s.SPIFFEIDTemplate = "spiffe://elsewhere.org/a/{k8s:ns}" },
		"a member's": func(s *v1alpha1.WorkloadIdentitySpec) {
			s.SPIFFEIDTemplate = "spiffe://example.org/countersign/{k8s:ns}"
		},
		"another's": func(s *v1alpha1.WorkloadIdentitySpec) {
			s.SPIFFEIDTemplate = "spiffe://example.org/ns/{k8s:ns}/sa/admin"
		},
		"negative TTL":   func(s *v1alpha1.WorkloadIdentitySpec) { s.X509TTL = &metav1.Duration{Duration: -time.Hour} },
		"a TTL of years": func(s *v1alpha1.WorkloadIdentitySpec) { s.JWTTTL = &metav1.Duration{Duration: 1 << 60} },
		"a DNS name":     func(s *v1alpha1.WorkloadIdentitySpec) { s.DNSNames = []string{"\n"} },
		"a partner":      func(s *v1alpha1.WorkloadIdentitySpec) { s.FederatesWith = []string{"Not A Domain"} },
		"a label":        func(s *v1alpha1.WorkloadIdentitySpec) { s.PodSelector.MatchLabels["app"] = "a b" },
		"an operator": func(s *v1alpha1.WorkloadIdentitySpec) {
			s.PodSelector.MatchExpressions = []metav1.LabelSelectorRequirement{{Key: "a", Operator: "Sounds"}}
		},
		"a long template": func(s *v1alpha1.WorkloadIdentitySpec) { s.SPIFFEIDTemplate += strings.Repeat("/x", 5000) },
	} {
		t.Run(what, func(t *testing.T) {
			w := newKubeWorld(t)
			obj := webIdentity()
			edit(&obj.Spec)
			w.create(obj)
			w.settles(obj, reasonRefused)
			if len(w.member.entries) != 0 {
				t.Errorf("entries %v", w.member.entries)
			}
			w.delete(obj)
			w.lets(obj)
		})
	}
}

// TestIdentitiesOfUnknownCluster: what nobody could verify is not made.
func TestIdentitiesOfUnknownCluster(t *testing.T) {
	w := newKubeWorld(t)
	obj := webIdentity()
	w.create(obj)
	home := w.member.clusters["main"]
	delete(w.member.clusters, "main")
	w.settles(obj, reasonFailed, "is not registered")
	home.Kubeconfig = ""
	w.member.clusters["main"] = home
	w.settles(obj, reasonFailed, "registered without --kubeconfig")
	if len(w.member.entries) != 0 {
		t.Errorf("entries %v", w.member.entries)
	}
	obj.Spec.PodSelector, obj.Spec.NamespaceSelector = nil, &metav1.LabelSelector{MatchLabels: map[string]string{nameLabel: "shop"}}
	w.update(obj)
	w.settles(obj, reasonReady)
	// What there is stays while nobody can tell.
	delete(w.member.clusters, "main")
	w.settles(obj, reasonFailed, "is not registered")
	if len(w.member.entries) != 1 {
		t.Errorf("entries %v", w.member.entries)
	}
}

// TestIdentitiesStay: nothing is taken away from a resource for a fault that is not its own, such as the controller's own credentials that
// cannot be read for a moment.
func TestIdentitiesStay(t *testing.T) {
	w := newKubeWorld(t)
	obj := webIdentity()
	w.create(obj)
	w.settles(obj, reasonReady)
	for _, err := range []error{identity.ErrInvalid, identity.ErrExists, identity.ErrNotFound, identity.ErrPrecondition, fmt.Errorf("%w: --svid /x with key /y", identity.ErrInvalid)} {
		w.now = w.now.Add(wordedAgain)
		w.member.local = err
		w.settles(obj, reasonFailed, err.Error())
		w.now = w.now.Add(wordedAgain)
		w.member.local, w.member.fault = nil, err
		w.settles(obj, reasonFailed, err.Error())
		w.member.fault = nil
	}
	for _, err := range []error{identity.ErrDenied, identity.ErrUnauthenticated} {
		w.member.local = err
		w.settles(obj, reasonDenied, err.Error())
	}
	if len(w.member.entries) != 1 || len(obj.Status.Entries) != 1 || w.member.changes != 1 {
		t.Errorf("%d entries, status %v, %d changes", len(w.member.entries), obj.Status.Entries, w.member.changes)
	}
	// A resource that is to blame itself loses what it had, as before.
	w.member.local = nil
	obj.Spec.DNSNames = []string{"not a name"}
	w.update(obj)
	w.settles(obj, reasonRefused)
	if len(w.member.entries) != 0 {
		t.Errorf("entries %v", w.member.entries)
	}
}

func TestFederations(t *testing.T) {
	w := newKubeWorld(t)
	obj := partnerDomain()
	w.create(obj)
	w.settles(obj, reasonReady, "partner.org")
	f := func() *adminv1.FederationRelationship { return w.fed.all["partner.org"] }
	if f().ManagedBy != "federatedtrustdomain/main/partner" || f().EndpointId != "spiffe://partner.org/e" || obj.Status.Sequence != 10 || w.fed.pinned != 1 || obj.Status.PinnedBundle == "" {
		t.Fatalf("made %v, status %+v, pinned %d times", f(), obj.Status, w.fed.pinned)
	}
	// By hand: put back, with what was fetched since.
	for _, edit := range []func(){
		func() { f().Url, f().Sequence = "https://evil.org", 20 }, func() { f().Profile = "https_web" }, func() { f().EndpointId = "spiffe://partner.org/evil" },
	} {
		edit()
		w.settles(obj, reasonReady)
		if f().Url != obj.Spec.BundleEndpointURL || f().Profile != "https_spiffe" || f().EndpointId != "spiffe://partner.org/e" || w.fed.pinned != 1 || obj.Status.Sequence != 20 {
			t.Errorf("after an edit by hand it is %v, pinned %d times", f(), w.fed.pinned)
		}
	}
	delete(w.fed.all, "partner.org")
	w.settles(obj, reasonReady)
	if f() == nil || w.fed.pinned != 2 {
		t.Errorf("after a deletion by hand it is %v, pinned %d times", f(), w.fed.pinned)
	}
	// Another bundle is pinned once; one that is none changes nothing.
	obj.Spec.InitialBundle = "bundle number two"
	w.update(obj)
	w.settles(obj, reasonReady)
	w.settles(obj, reasonReady)
	if w.fed.pinned != 3 || obj.Status.Sequence != 17 {
		t.Errorf("pinned %d times, sequence %d", w.fed.pinned, obj.Status.Sequence)
	}
	obj.Spec.InitialBundle = "garbage"
	w.update(obj)
	w.settles(obj, reasonRefused, "initialBundle", "not a bundle")
	if w.fed.pinned != 3 || f().Sequence != 17 {
		t.Errorf("garbage was pinned: %v", f())
	}
	obj.Spec.InitialBundle = "bundle number two"
	w.update(obj)

	// How the refreshing stands.
	at := born().Add(time.Hour)
	f().Status = &adminv1.RefreshStatus{LastSuccess: api.TimeToWire(at)}
	w.settles(obj, reasonReady)
	if last := obj.Status.LastRefresh; last == nil || !last.Time.Equal(at) {
		t.Errorf("refreshed at %v, want %v", last, at)
	}
	f().Status.LastSuccess = api.TimeToWire(at.Add(30 * time.Second))
	version := obj.ResourceVersion
	w.settles(obj, reasonReady)
	if obj.ResourceVersion != version {
		t.Error("it is written each time that the partner is asked")
	}
	w.said()
	for i := range 3 { // each try fails, and the resource is written once
		f().Status.Failures, f().Status.LastError = uint32(i+1), "connection refused"
		w.settles(obj, reasonFailed, "could not be refreshed since 2026-01-02T04:04:35Z", "connection refused")
	}
	if all := w.said(); len(all) != 1 {
		t.Errorf("events: %q", all)
	}
	if f() == nil || obj.Status.Sequence != 17 {
		t.Errorf("the last good bundle is gone: %v", f())
	}
	f().Status.Failures, f().Status.LastError = 0, ""
	w.settles(obj, reasonReady)
}

// TestFederationsConflict: what an operator made stays his, also when the resource goes.
func TestFederationsConflict(t *testing.T) {
	for owner, says := range map[string]string{"": "an operator made it", "federatedtrustdomain/west/partner": "it is of federatedtrustdomain/west/partner"} {
		w := newKubeWorld(t)
		w.fed.all["partner.org"] = &adminv1.FederationRelationship{TrustDomain: "partner.org", Url: "https://theirs", ManagedBy: owner, Revision: 7}
		obj := partnerDomain()
		w.create(obj)
		w.settles(obj, reasonConflict, says)
		w.delete(obj)
		w.lets(obj)
		if f := w.fed.all["partner.org"]; f == nil || f.Url != "https://theirs" || f.Revision != 7 || w.member.changes != 0 {
			t.Errorf("owner %q: it is now %v", owner, f)
		}
	}
	w := newKubeWorld(t)
	obj := partnerDomain()
	obj.Spec.TrustDomain = "Not A Domain"
	w.create(obj)
	w.settles(obj, reasonRefused, "trustDomain")
	if len(w.fed.all) != 0 {
		t.Errorf("made %v", w.fed.all)
	}
}

func TestClusters(t *testing.T) {
	w := newKubeWorld(t)
	obj := eastCluster()
	w.create(obj)
	w.settles(obj, reasonReady)
	k := func() *adminv1.KubeCluster { return w.member.clusters["east"] }
	if k().ManagedBy != "kubecluster/main/east" || k().DefaultId != obj.Spec.DefaultID || string(k().Jwks) != "{keys}" {
		t.Fatalf("registered as %v", k())
	}
	k().AgentAccounts = append(k().AgentAccounts, "evil/agent")
	w.settles(obj, reasonReady)
	if !slices.Equal(k().AgentAccounts, []string{"a/b"}) {
		t.Errorf("after an edit by hand it is %v", k())
	}
	delete(w.member.clusters, "east")
	w.settles(obj, reasonReady)
	if k() == nil {
		t.Error("a deletion by hand was not made good")
	}
	// Keys that are none: the member refuses them, and what is registered stays.
	obj.Spec.JWKS = "garbage"
	w.update(obj)
	w.settles(obj, reasonRefused, "the JWKS is not one")
	if string(k().Jwks) != "{keys}" {
		t.Errorf("it is registered as %v", k())
	}
	obj.Spec.JWKS, obj.Spec.DefaultID, obj.Spec.NoDefaultID = "{more}", "", true
	w.update(obj)
	w.settles(obj, reasonReady)
	changes := w.member.changes
	w.settles(obj, reasonReady)
	if string(k().Jwks) != "{more}" || k().DefaultId != "" || w.member.changes != changes {
		t.Errorf("it is registered as %v by %d changes more", k(), w.member.changes-changes)
	}
}

// TestClustersConflict: no resource takes over a cluster that is registered, nor the IDs of its pods.
func TestClustersConflict(t *testing.T) {
	w := newKubeWorld(t)
	taken := eastCluster()
	taken.Name = "main"
	w.create(taken)
	w.settles(taken, reasonConflict, "an operator registered it")
	w.delete(taken)
	w.lets(taken)
	if w.member.clusters["main"].Issuer != "https://main" {
		t.Errorf("main is now %v", w.member.clusters["main"])
	}
	for _, path := range []string{identity.DefaultKubeID, "/ns/{k8s:ns}/sa/x-{k8s:sa}", "/{k8s:ns}/{k8s:ns}/{k8s:sa}/{k8s:sa}"} {
		thief := eastCluster()
		thief.Spec.DefaultID = path
		w.create(thief)
		w.settles(thief, reasonConflict, "could give the IDs of pods of kube cluster main")
		w.delete(thief)
		w.lets(thief)
	}
	w.member.clusters["east"] = &adminv1.KubeCluster{Name: "east", Issuer: "https://east", ManagedBy: "kubecluster/west/east"}
	obj := eastCluster()
	w.create(obj)
	w.settles(obj, reasonConflict, "it is of kubecluster/west/east")
	w.delete(obj)
	w.lets(obj)
	if len(w.member.clusters) != 2 || w.member.changes != 0 {
		t.Errorf("%d clusters after %d changes", len(w.member.clusters), w.member.changes)
	}
}
