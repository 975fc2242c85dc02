package server

import (
	"testing"

	adminv1 "countersign.io/countersign/api/admin/v1"
	workloadv1 "countersign.io/countersign/api/workload/v1"
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
