package server

import (
	"fmt"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"

	adminv1 "countersign.io/countersign/api/admin/v1"
	nodev1 "countersign.io/countersign/api/node/v1"
	workloadv1 "countersign.io/countersign/api/workload/v1"
	"countersign.io/countersign/identity"
)

const byLabel = "spiffe://example.org/by-label"

func (w *world) labelEntry(t *testing.T) *adminv1.Entry {
	t.Helper()
	return w.createEntry(t, &adminv1.Entry{Selectors: []string{"k8s:cluster:" + cluster, "k8s:ns:prod", "k8s:pod-label:app:web"}, SpiffeId: byLabel})
}

// TestLabelsAreTheAPIServersWord: never the agent's.
func TestLabelsAreTheAPIServersWord(t *testing.T) {
	w := newWorld(t).start(t)
	w.registerCluster(t)
	_, cert := w.agent(t, "a1", "node-1")
	conn := w.dial(t, cert)
	w.labelEntry(t)
	token := w.podToken(t, pod{})
	w.pods.setFacts("k8s:pod-label:other:x")
	for _, claim := range []string{"k8s:pod-label:app:web", "k8s:pod-label-key:app", "k8s:ns-label:env:prod", "k8s:ns-label-key:env", "k8s:pod-owner:Deployment:web"} {
		wantError(t, w.issueOne(t, conn, &workloadv1.Evidence{Token: token, Selectors: []string{claim}}), codes.PermissionDenied, "only proven")
		wantError(t, w.issueOne(t, conn, &workloadv1.Evidence{Selectors: []string{claim, "k8s:cluster:" + cluster, "k8s:ns:prod"}}), codes.PermissionDenied, "only proven")
	}
	if r := w.issueOne(t, conn, &workloadv1.Evidence{Token: token}); r.Error != nil || r.Svids[0].SpiffeId != "spiffe://example.org/ns/prod/sa/web" {
		t.Errorf("a pod without the label: %v", r)
	}
	w.pods.setFacts("k8s:pod-label-key:app", "k8s:pod-label:app:web")
	r := w.issueOne(t, conn, &workloadv1.Evidence{Token: token})
	if r.Error != nil || len(r.Svids) != 1 || r.Svids[0].SpiffeId != byLabel {
		t.Fatalf("a pod with the label: %v", r)
	}
	for _, s := range r.Selectors {
		if identity.Selector(s).Fact() {
			t.Errorf("the agent was told %s", s)
		}
	}
	w.pods.setFacts("k8s:pod-label-key:app", "k8s:pod-label:app:db")
	if r := w.issueOne(t, conn, &workloadv1.Evidence{Token: token}); r.Error != nil || r.Svids[0].SpiffeId == byLabel {
		t.Errorf("a pod with another value: %v", r)
	}
}

// TestUndecidable: a pod that an entry could match, by labels that nobody can tell now, gets nothing, rather than another identity.
func TestUndecidable(t *testing.T) {
	w := newWorld(t).start(t)
	w.registerCluster(t)
	_, cert := w.agent(t, "a1", "node-1")
	conn, guests := w.dial(t, cert), w.dial(t, nil)
	e := w.labelEntry(t)
	w.createEntry(t, &adminv1.Entry{Selectors: []string{"k8s:cluster:" + cluster, "k8s:ns:prod"}, SpiffeId: "spiffe://example.org/prod"})
	if i := w.pods.facts.interest[cluster]; len(i.PodLabels) != 1 || i.PodLabels[0] != "app" {
		t.Errorf("the verifier was told of %v", w.pods.facts.interest)
	}
	prod, dev := w.podToken(t, pod{}), w.podToken(t, pod{ns: "dev"})
	wantError(t, w.issueOne(t, conn, &workloadv1.Evidence{Token: prod}), codes.Unavailable, "10.0.0.1 is away")
	_, err := workloadv1.NewWorkloadClient(conn).IssueJWT(testContext(t), &workloadv1.IssueJWTRequest{Evidence: &workloadv1.Evidence{Token: prod}, Audience: []string{"x"}})
	wantCode(t, err, codes.Unavailable)
	// Without an agent, as with one; but a stranger is not told where the API server is.
	_, pub := newKey(t)
	_, err = workloadv1.NewWorkloadClient(guests).IssueX509(testContext(t), &workloadv1.IssueX509Request{Requests: []*workloadv1.X509Request{{Evidence: &workloadv1.Evidence{Token: prod}, PublicKey: pub}}})
	wantCode(t, err, codes.Unavailable, "labels or owners")
	if strings.Contains(err.Error(), "10.0.0.1") {
		t.Errorf("a stranger was told %v", err)
	}
	// Nobody is asked about a pod that no such entry could match.
	if r := w.issueOne(t, conn, &workloadv1.Evidence{Token: dev}); r.Error != nil || r.Svids[0].SpiffeId != "spiffe://example.org/ns/dev/sa/web" {
		t.Errorf("a pod that no entry for labels could match: %v", r)
	}
	// What is asked counts.
	w.pods.facts.mu.Lock()
	w.pods.facts.asked = func() ([]identity.Selector, error) { return []identity.Selector{"k8s:pod-label:app:web"}, nil }
	w.pods.facts.mu.Unlock()
	if r := w.issueOne(t, conn, &workloadv1.Evidence{Token: prod}); r.Error != nil || len(r.Svids) != 2 {
		t.Errorf("once the API server was asked: %v", r)
	}
	// The pod is gone, says the API server.
	w.pods.facts.mu.Lock()
	w.pods.facts.asked = func() ([]identity.Selector, error) { return nil, fmt.Errorf("%w: gone", identity.ErrUnauthenticated) }
	w.pods.facts.mu.Unlock()
	wantError(t, w.issueOne(t, conn, &workloadv1.Evidence{Token: prod}), codes.Unauthenticated)
	w.pods.facts.mu.Lock()
	w.pods.facts.asked = nil
	w.pods.facts.mu.Unlock()
	// Without the entry there is nothing to ask.
	if _, err := w.admin(t).DeleteEntry(testContext(t), &adminv1.NameRequest{Name: e.Id}); err != nil {
		t.Fatal(err)
	}
	if r := w.issueOne(t, conn, &workloadv1.Evidence{Token: prod}); r.Error != nil || len(r.Svids) != 1 {
		t.Errorf("without the entry: %v", r)
	}
}

// TestSyncFollowsLabels: a change of labels is pushed to the pods concerned, and to no others.
func TestSyncFollowsLabels(t *testing.T) {
	w := newWorld(t).start(t)
	w.registerCluster(t)
	_, cert := w.agent(t, "a1", "node-1")
	conn := w.dial(t, cert)
	s := w.sync(t, conn)
	w.pods.setFacts("k8s:pod-label:app:db")
	evidence := map[uint64]*workloadv1.Evidence{1: {Token: w.podToken(t, pod{})}, 2: {Token: w.podToken(t, pod{ns: "dev"})}}
	uid := map[uint64]string{}
	ask := func(handle uint64) *workloadv1.X509Result {
		t.Helper()
		r := w.issueOne(t, conn, evidence[handle])
		if r.Error != nil {
			t.Fatal(r.Error)
		}
		for _, x := range r.Selectors {
			if sel := identity.Selector(x); sel.Name() == "k8s:pod-uid" {
				uid[handle] = sel.Value()
			}
		}
		s.watch(watched(handle, r))
		return r
	}
	ask(1)
	ask(2)
	w.labelEntry(t)
	w.wantNothing(s) // nobody has the label
	w.pods.setFacts("k8s:pod-label:app:web")
	w.pods.change(t, "elsewhere", "prod", uid[1])
	w.wantNothing(s)
	w.pods.change(t, cluster, "", uid[1])
	s.wantChanged(1)
	if r := ask(1); r.Svids[0].SpiffeId != byLabel {
		t.Fatalf("result %v", r)
	}
	w.wantNothing(s)
	// The label goes between the decision and the word about it: what the agent says it was issued by is compared with what is
	// known now, not with what was.
	r := w.issueOne(t, conn, evidence[1])
	w.pods.setFacts("k8s:pod-label:app:db")
	s.watch(watched(1, r))
	s.wantChanged(1)
	if r := ask(1); r.Svids[0].SpiffeId == byLabel {
		t.Fatalf("result %v", r)
	}
	// Nor does it help an agent to say that its workload has the label.
	lie := watched(1, r)
	lie.Selectors = append(lie.Selectors, "k8s:pod-label:app:web")
	s.watch(lie)
	s.wantChanged(1)
	ask(1)
	// A namespace's labels concern all of its pods.
	w.pods.setFacts("k8s:pod-label:app:web")
	w.pods.change(t, cluster, "prod", "")
	s.wantChanged(1)
	ask(1)
	// What this member cannot tell by itself is left as it is.
	w.pods.setFacts()
	w.pods.change(t, cluster, "prod", "")
	w.wantNothing(s)
	s.watch(&nodev1.Watch_Workload{Handle: 1, Selectors: lie.Selectors})
	w.wantNothing(s)
}
