package server

import (
	"context"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"countersign.io/countersign/api"
	nodev1 "countersign.io/countersign/api/node/v1"
	"countersign.io/countersign/audit"
	"countersign.io/countersign/identity"
)

type followClient = grpc.BidiStreamingClient[nodev1.SyncRequest, nodev1.SyncResponse]

// follow opens the stream of a pod and returns it with the state that came first.
func (w *world) follow(t *testing.T, token string) (followClient, *nodev1.SyncResponse, error) {
	t.Helper()
	stream, err := nodev1.NewNodeClient(w.dial(t, nil)).Follow(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	_ = stream.Send(&nodev1.SyncRequest{Message: &nodev1.SyncRequest_Hello{Hello: &nodev1.Hello{Version: "test", Token: token}}})
	m, err := stream.Recv()
	return stream, m, api.FromStatus(err)
}

func watchOne(handle uint64, entry string, revision uint64, selectors ...string) *nodev1.SyncRequest {
	return &nodev1.SyncRequest{Message: &nodev1.SyncRequest_Watch{Watch: &nodev1.Watch{Set: []*nodev1.Watch_Workload{{
		Handle: handle, Selectors: selectors, Entries: []*nodev1.Watch_EntryRef{{Id: entry, Revision: revision}},
	}}}}}
}

// defaultRef is the entry that a pod of the registered cluster has without any.
func (w *world) defaultRef(t *testing.T) (id string, revision uint64) {
	t.Helper()
	k, ok := w.state.KubeCluster(cluster)
	if !ok {
		t.Fatal("not registered")
	}
	return DefaultEntryID(cluster), k.Revision
}

func TestFollow(t *testing.T) {
	w := newWorld(t).start(t)
	w.registerCluster(t)
	p := pod{ns: "shop", sa: "web", name: "web-1", uid: "uid-1", node: "node-1"}
	stream, first, err := w.follow(t, w.podToken(t, p))
	if err != nil || first.GetState().GetBundles().GetOwn() == nil || len(first.GetState().GetMembers().GetAddresses()) == 0 {
		t.Fatalf("%v, %v", first, err)
	}
	id, rev := w.defaultRef(t)
	// What it says that it is counts for nothing: another pod's entry does not concern it, its own does.
	if err := stream.Send(watchOne(1, id, rev, "k8s:ns:bank", "k8s:sa:vault")); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is watched", func() bool { return w.srv.hub.watching(p.uid) == 1 })
	for _, e := range []identity.Entry{
		{ID: "other", SPIFFEID: "spiffe://example.org/vault", Selectors: []identity.Selector{"k8s:ns:bank", "k8s:sa:vault"}},
		{ID: "mine", SPIFFEID: "spiffe://example.org/more", Selectors: []identity.Selector{"k8s:ns:shop", "k8s:sa:web"}},
	} {
		if _, err := w.state.CreateEntry(context.Background(), w.srv.cfg.Now(), e); err != nil {
			t.Fatal(err)
		}
	}
	recvUntil(t, stream, "its entry changed", func(m *nodev1.SyncResponse) bool { return len(m.GetChanged().GetHandles()) == 1 })
	w.pods.end(t, cluster, p.uid)
	recvUntil(t, stream, "its pod is gone", func(m *nodev1.SyncResponse) bool { return len(m.GetChanged().GetEnded()) == 1 })
	if n := w.srv.hub.agents(); n != 0 {
		t.Errorf("it counts as %d agents", n)
	}
	for _, p := range w.srv.hub.parties("x", 0, w.srv.cfg.Now()) {
		t.Errorf("a rotation waits for %+v", p)
	}
	_ = stream.CloseSend()
}

func recvUntil(t *testing.T, stream followClient, what string, ok func(*nodev1.SyncResponse) bool) {
	t.Helper()
	for {
		m, err := stream.Recv()
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		if ok(m) {
			return
		}
	}
}

// watching is how many workloads of a pod are known.
func (h *hub) watching(uid string) int {
	h.mu.Lock()
	defer h.mu.Unlock()
	if p := h.postings[identity.Selector("k8s:pod-uid:"+uid)]; p != nil {
		return len(p.watches)
	}
	return 0
}

func TestFollowRefuses(t *testing.T) {
	w := newWorld(t).start(t)
	w.registerCluster(t)
	p := pod{ns: "shop", sa: "web", name: "web-1", uid: "uid-1", node: "node-1"}
	good := w.podToken(t, p)
	for name, row := range map[string]struct {
		token string
		code  codes.Code
	}{
		"no token":         {"", codes.Unauthenticated},
		"no token at all":  {"x", codes.InvalidArgument},
		"a changed token":  {good[:len(good)-8] + "AAAAAAAA", codes.Unauthenticated},
		"a token too long": {string(make([]byte, identity.MaxTokenBytes+1)), codes.InvalidArgument},
	} {
		_, _, err := w.follow(t, row.token)
		if api.Code(err) != row.code {
			t.Errorf("%s: %v", name, err)
		}
	}
	a, cert := w.agent(t, "a", "node-1")
	stream, err := nodev1.NewNodeClient(w.dial(t, cert)).Follow(testContext(t))
	if err == nil {
		_, err = stream.Recv()
	}
	wantCode(t, err, codes.PermissionDenied)

	// A ban of the node's agent, and the end of the kube cluster, end what is open, and keep others out.
	open, _, err := w.follow(t, good)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.state.BanAgent(context.Background(), a.ID); err != nil {
		t.Fatal(err)
	}
	if _, err := open.Recv(); api.Code(api.FromStatus(err)) != codes.PermissionDenied {
		t.Errorf("after the ban: %v", err)
	}
	if _, _, err := w.follow(t, good); api.Code(err) != codes.PermissionDenied {
		t.Errorf("a banned node's pod: %v", err)
	}
	p.node = "node-2"
	if open, _, err = w.follow(t, w.podToken(t, p)); err != nil {
		t.Fatal(err)
	}
	if err := w.state.DeleteKubeCluster(context.Background(), cluster); err != nil {
		t.Fatal(err)
	}
	if _, err := open.Recv(); api.Code(api.FromStatus(err)) != codes.PermissionDenied {
		t.Errorf("after the kube cluster's end: %v", err)
	}
	if len(w.audit.find(audit.FollowPod, audit.Refused)) == 0 {
		t.Error("no refusal is recorded")
	}
}

// TestFollowIsBounded: one pod has a few streams, the oldest giving way, and follows itself alone.
func TestFollowIsBounded(t *testing.T) {
	w := newWorld(t).start(t)
	w.registerCluster(t)
	p := pod{ns: "shop", sa: "web", name: "web-1", uid: "uid-1", node: "node-1"}
	var oldest followClient
	for i := range maxSessions + 1 {
		s, _, err := w.follow(t, w.podToken(t, p))
		if err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			oldest = s
		}
	}
	if _, err := oldest.Recv(); api.Code(api.FromStatus(err)) != codes.ResourceExhausted {
		t.Errorf("the oldest: %v", err)
	}
	w.srv.hub.mu.Lock()
	if w.srv.hub.pods != maxSessions {
		t.Errorf("%d streams", w.srv.hub.pods)
	}
	w.srv.hub.pods = maxPodSessions
	w.srv.hub.mu.Unlock()
	p.uid = "uid-2"
	if _, _, err := w.follow(t, w.podToken(t, p)); api.Code(err) != codes.Unavailable {
		t.Errorf("one too many: %v", err)
	}
	w.srv.hub.mu.Lock()
	w.srv.hub.pods = maxSessions
	w.srv.hub.mu.Unlock()
	s, _, err := w.follow(t, w.podToken(t, p))
	if err != nil {
		t.Fatal(err)
	}
	id, rev := w.defaultRef(t)
	for handle := range uint64(maxPodWatches + 1) {
		_ = s.Send(watchOne(handle, id, rev))
	}
	for err == nil {
		_, err = s.Recv()
	}
	if api.Code(api.FromStatus(err)) != codes.ResourceExhausted {
		t.Errorf("more workloads than a pod has: %v", err)
	}
}
