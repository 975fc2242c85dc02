package server

import (
	"testing"

	"google.golang.org/grpc/codes"

	adminv1 "countersign.io/countersign/api/admin/v1"
	workloadv1 "countersign.io/countersign/api/workload/v1"
	"countersign.io/countersign/identity"
)

// TestPodsAreNotProcesses: what an image says of itself, its user and its path, never makes a pod one of the host's own programs.
func TestPodsAreNotProcesses(t *testing.T) {
	w := newWorld(t).start(t)
	w.registerCluster(t)
	_, cert := w.agent(t, "a1", "node-1")
	conn := w.dial(t, cert)
	w.createEntry(t, &adminv1.Entry{Selectors: []string{"agent:kube-node:node-1", "unix:uid:0"}, SpiffeId: "spiffe://example.org/host-daemon"})
	root := []string{"unix:uid:0"}
	if r := w.issueOne(t, conn, &workloadv1.Evidence{Selectors: root}); r.Error != nil || r.Svids[0].SpiffeId != "spiffe://example.org/host-daemon" {
		t.Fatalf("the host's process: %v", r)
	}
	token := w.podToken(t, pod{})
	if r := w.issueOne(t, conn, &workloadv1.Evidence{Token: token, Selectors: root}); r.Error != nil || r.Svids[0].SpiffeId != "spiffe://example.org/ns/prod/sa/web" {
		t.Errorf("a pod's root: %v, want its own default identity alone", r)
	}
	w.createEntry(t, &adminv1.Entry{Selectors: []string{"k8s:ns:prod", "unix:uid:0"}, SpiffeId: "spiffe://example.org/prod-root"})
	if r := w.issueOne(t, conn, &workloadv1.Evidence{Token: token, Selectors: root}); r.Error != nil || len(r.Svids) != 1 || r.Svids[0].SpiffeId != "spiffe://example.org/prod-root" {
		t.Errorf("a pod's root with an entry for it: %v", r)
	}
	// One that trusts nobody's word, only the agent, is for whatever runs there.
	w.createEntry(t, &adminv1.Entry{Selectors: []string{"agent:kube-node:node-1"}, SpiffeId: "spiffe://example.org/any"})
	if r := w.issueOne(t, conn, &workloadv1.Evidence{Token: token, Selectors: root}); r.Error != nil || len(r.Svids) != 2 {
		t.Errorf("an entry for all on the node: %v", r)
	}
}

// TestClusterNotTakenUpYet: between a state that knows a kube cluster and a verifier that does not, a member has no opinion. What
// it refused then would end identities that are good.
func TestClusterNotTakenUpYet(t *testing.T) {
	w := newWorld(t).start(t)
	w.registerCluster(t)
	_, cert := w.agent(t, "a1", "node-1")
	conn := w.dial(t, cert)
	token := w.podToken(t, pod{})
	k, ok := w.state.KubeCluster(cluster)
	if !ok {
		t.Fatal("the cluster is not registered")
	}
	// As at a start: the verifier has nothing, the state has all.
	if err := w.pods.SetClusters(nil); err != nil {
		t.Fatal(err)
	}
	w.srv.clusters.Store(nil)
	wantError(t, w.issueOne(t, conn, &workloadv1.Evidence{Token: token}), codes.Unavailable)
	if err := w.pods.SetClusters([]identity.KubeCluster{*k}); err != nil {
		t.Fatal(err)
	}
	if r := w.issueOne(t, conn, &workloadv1.Evidence{Token: token}); r.Error != nil {
		t.Errorf("a token that is good: %v", r.Error)
	}
	// And as registered anew with other keys, which the verifier has yet to hear of.
	w.srv.clusters.Store(&map[string]uint64{cluster: k.Revision - 1})
	wantError(t, w.issueOne(t, conn, &workloadv1.Evidence{Token: token + "x"}), codes.Unavailable)
	w.srv.clusters.Store(&map[string]uint64{cluster: k.Revision})
	if r := w.issueOne(t, conn, &workloadv1.Evidence{Token: token + "x"}); r.Error == nil || codes.Code(r.Error.Code) == codes.Unavailable {
		t.Errorf("a changed token, with a verifier that knows all: %v", r)
	}
}
