package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	adminv1 "countersign.io/countersign/api/admin/v1"
	nodev1 "countersign.io/countersign/api/node/v1"
	workloadv1 "countersign.io/countersign/api/workload/v1"
	"countersign.io/countersign/ca"
	"countersign.io/countersign/identity"
)

// syncer is an agent's end of a Sync stream.
type syncer struct {
	t      *testing.T
	w      *world
	stream grpc.BidiStreamingClient[nodev1.SyncRequest, nodev1.SyncResponse]
	got    chan *nodev1.SyncResponse
	end    chan error
}

func (w *world) sync(t *testing.T, conn *grpc.ClientConn) *syncer {
	t.Helper()
	s := w.openSync(t, conn)
	go func() {
		for {
			m, err := s.stream.Recv()
			if err != nil {
				s.end <- err
				return
			}
			s.got <- m
		}
	}()
	m := s.next()
	if st := m.GetState(); st.GetBundles() == nil || st.GetMembers() == nil || m.Revision == 0 {
		t.Fatalf("first message %v: want the full state", m)
	}
	return s
}

func (w *world) openSync(t *testing.T, conn *grpc.ClientConn) *syncer {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	stream, err := nodev1.NewNodeClient(conn).Sync(ctx)
	if err != nil {
		t.Fatal(err)
	}
	s := &syncer{t: t, w: w, stream: stream, got: make(chan *nodev1.SyncResponse, 64), end: make(chan error, 1)}
	s.send(&nodev1.SyncRequest{Message: &nodev1.SyncRequest_Hello{Hello: &nodev1.Hello{Version: "v1"}}})
	return s
}

func (s *syncer) send(m *nodev1.SyncRequest) {
	s.t.Helper()
	// EOF: the member has ended the stream; Recv says why.
	if err := s.stream.Send(m); err != nil && !errors.Is(err, io.EOF) {
		s.t.Fatal(err)
	}
}

func (s *syncer) watch(set ...*nodev1.Watch_Workload) {
	s.t.Helper()
	s.send(&nodev1.SyncRequest{Message: &nodev1.SyncRequest_Watch{Watch: &nodev1.Watch{Set: set}}})
	s.settle()
}

func (s *syncer) next() *nodev1.SyncResponse {
	s.t.Helper()
	select {
	case m := <-s.got:
		return m
	case err := <-s.end:
		s.t.Fatalf("the stream ended: %v", err)
	case <-time.After(deadline):
		s.t.Fatal("no message")
	}
	return nil
}

// wantChanged waits until the handles, and no others, were told; more than one message may tell them.
func (s *syncer) wantChanged(want ...uint64) {
	s.t.Helper()
	var got []uint64
	for len(got) < len(want) {
		got = append(got, s.next().GetChanged().GetHandles()...)
	}
	slices.Sort(got)
	if !slices.Equal(slices.Compact(got), want) {
		s.t.Fatalf("changed %v: want %v", got, want)
	}
}

// settle waits until the member has taken all that was said so far.
func (s *syncer) settle() {
	s.t.Helper()
	want := uint64(1)<<40 + s.w.acks.Add(1) // no other stream's
	s.send(&nodev1.SyncRequest{Message: &nodev1.SyncRequest_Ack{Ack: &nodev1.Ack{Revision: want}}})
	eventually(s.t, "the member has listened", func() bool {
		found := false
		s.w.srv.hub.mu.Lock()
		defer s.w.srv.hub.mu.Unlock()
		for sess := range s.w.srv.hub.sessions {
			rev, _ := sess.acked()
			found = found || rev == want
		}
		return found
	})
}

// wantNothing makes sure that nothing is on its way: a message that is caused after it arrives first.
func (w *world) wantNothing(s *syncer) {
	s.t.Helper()
	s.settle()
	if err := w.state.PutMember(testContext(s.t), identity.Member{ID: "probe", Address: fmt.Sprintf("probe-%d:1", time.Now().UnixNano())}); err != nil {
		s.t.Fatal(err)
	}
	if m := s.next(); m.GetState().GetMembers() == nil || m.GetState().GetBundles() != nil {
		s.t.Fatalf("message %v: want none", m)
	}
}

func (s *syncer) wantEnd(code codes.Code, words ...string) {
	s.t.Helper()
	select {
	case err := <-s.end:
		wantCode(s.t, err, code, words...)
	case <-time.After(deadline):
		s.t.Fatal("the stream goes on")
	}
}

// watched turns an issuance into what the agent says about it.
func watched(handle uint64, r *workloadv1.X509Result) *nodev1.Watch_Workload {
	w := &nodev1.Watch_Workload{Handle: handle, Selectors: r.Selectors}
	for _, s := range r.Svids {
		w.Entries = append(w.Entries, &nodev1.Watch_EntryRef{Id: s.EntryId, Revision: s.EntryRevision})
	}
	return w
}

// TestSyncFollowsAWorkload goes through everything that can happen to a pod's identities.
func TestSyncFollowsAWorkload(t *testing.T) {
	w := newWorld(t).start(t)
	w.registerCluster(t)
	_, cert := w.agent(t, "a1", "node-1")
	conn := w.dial(t, cert)
	s := w.sync(t, conn)
	evidence := map[uint64]*workloadv1.Evidence{1: {Token: w.podToken(t, pod{})}, 2: {Token: w.podToken(t, pod{ns: "dev"})}}
	ask := func(handle uint64) *workloadv1.X509Result {
		t.Helper()
		r := w.issueOne(t, conn, evidence[handle])
		s.watch(watched(handle, r))
		return r
	}
	ask(1)
	ask(2)
	w.wantNothing(s) // both hold what matches: the default

	e := w.createEntry(t, &adminv1.Entry{Selectors: []string{"k8s:ns:prod"}, SpiffeId: "spiffe://example.org/prod"})
	s.wantChanged(1)
	if r := ask(1); r.Svids[0].EntryId != e.Id {
		t.Fatalf("result %v", r)
	}
	w.wantNothing(s)

	w.createEntry(t, &adminv1.Entry{Selectors: []string{"k8s:ns:prod", "k8s:sa:other"}, SpiffeId: "spiffe://example.org/other"})
	w.wantNothing(s) // concerns nobody here

	e.Hint = "new"
	e, err := w.admin(t).UpdateEntry(testContext(t), e)
	if err != nil {
		t.Fatal(err)
	}
	s.wantChanged(1)
	ask(1)

	if _, err := w.admin(t).DeleteEntry(testContext(t), &adminv1.NameRequest{Name: e.Id}); err != nil {
		t.Fatal(err)
	}
	s.wantChanged(1)
	if r := ask(1); r.Svids[0].EntryId != "default:c1" {
		t.Fatalf("result %v: want the default again", r)
	}

	k, _ := w.state.KubeCluster(cluster)
	off := *k
	off.DefaultID = ""
	if _, err := w.state.PutKubeCluster(testContext(t), off, true); err != nil {
		t.Fatal(err)
	}
	s.wantChanged(1, 2)
	for h := range evidence {
		if r := ask(h); r.Error == nil {
			t.Fatalf("result %v: want none", r)
		}
	}
	w.wantNothing(s) // nothing is what they hold
	w.createEntry(t, &adminv1.Entry{Selectors: []string{"k8s:cluster:c1"}, SpiffeId: "spiffe://example.org/all/{k8s:ns}"})
	s.wantChanged(1, 2)
	ask(1)
	ask(2)

	s.send(&nodev1.SyncRequest{Message: &nodev1.SyncRequest_Watch{Watch: &nodev1.Watch{Unset: []uint64{2}}}})
	w.wantNothing(s)
	w.pods.end(t, cluster, "uid-dev-web-0") // not watched any more
	w.pods.end(t, "c2", "uid-prod-web-0")   // another cluster's
	w.wantNothing(s)
	w.pods.end(t, cluster, "uid-prod-web-0")
	if m := s.next().GetChanged(); !slices.Equal(m.GetEnded(), []uint64{1}) || len(m.GetHandles()) != 0 {
		t.Fatalf("message %v: want the pod's end", m)
	}
	if _, err := w.admin(t).DeleteKubeCluster(testContext(t), &adminv1.NameRequest{Name: cluster}); err != nil {
		t.Fatal(err)
	}
	s.wantChanged(1) // its evidence is worth nothing any more
}

func TestSyncTellsWhatWasMissed(t *testing.T) {
	w := newWorld(t).start(t)
	_, cert := w.agent(t, "a1", "")
	e := w.createEntry(t, &adminv1.Entry{Selectors: []string{"agent:kind:join_token", "unix:uid:1"}, SpiffeId: "spiffe://example.org/x"})
	s := w.sync(t, w.dial(t, cert))
	sel := []string{"agent:kind:join_token", "unix:uid:1"}
	for _, held := range [][]*nodev1.Watch_EntryRef{
		nil,
		{{Id: e.Id, Revision: e.Revision - 1}},
		{{Id: e.Id, Revision: e.Revision}, {Id: "gone", Revision: 1}},
	} {
		s.watch(&nodev1.Watch_Workload{Handle: 7, Selectors: sel, Entries: held})
		s.wantChanged(7)
		s.watch(&nodev1.Watch_Workload{Handle: 7, Selectors: sel, Entries: []*nodev1.Watch_EntryRef{{Id: e.Id, Revision: e.Revision}}})
		w.wantNothing(s)
	}
}

// TestSyncIsPatient: an agent that comes back with the same is not told again at once, for ever.
func TestSyncIsPatient(t *testing.T) {
	w := newWorld(t).start(t)
	_, cert := w.agent(t, "a1", "")
	w.createEntry(t, &adminv1.Entry{Selectors: []string{"agent:kind:join_token", "unix:uid:1"}, SpiffeId: "spiffe://example.org/x"})
	s := w.sync(t, w.dial(t, cert))
	stuck := &nodev1.Watch_Workload{Handle: 7, Selectors: []string{"agent:kind:join_token", "unix:uid:1"}}
	s.watch(stuck)
	s.wantChanged(7)
	const times = 500
	start, told := time.Now(), 0
	for range times { // it will not learn: the second telling is a second away, the later ones more
		s.send(&nodev1.SyncRequest{Message: &nodev1.SyncRequest_Watch{Watch: &nodev1.Watch{Set: []*nodev1.Watch_Workload{stuck}}}})
	}
	s.settle()
	if err := w.state.PutMember(testContext(t), identity.Member{ID: "probe", Address: "probe:1"}); err != nil {
		t.Fatal(err)
	}
	for s.next().GetState().GetMembers() == nil {
		told++
	}
	if most := 1 + int(time.Since(start)/time.Second); told > most {
		t.Fatalf("told %d times more in %v", told, time.Since(start))
	}
	s.send(&nodev1.SyncRequest{Message: &nodev1.SyncRequest_Watch{Watch: &nodev1.Watch{Unset: []uint64{7}}}})
	s.watch(stuck) // another workload under the same handle
	s.wantChanged(7)
}

func TestSyncNoticesExpiry(t *testing.T) {
	w := newWorld(t).start(t)
	_, cert := w.agent(t, "a1", "")
	conn := w.dial(t, cert)
	s := w.sync(t, conn)
	e, err := w.state.CreateEntry(testContext(t), time.Now(), identity.Entry{ID: "e", Selectors: []identity.Selector{"agent:kind:join_token"}, SPIFFEID: "spiffe://example.org/x", ExpiresAt: time.Now().Add(300 * time.Millisecond)})
	if err != nil {
		t.Fatal(err)
	}
	s.watch(&nodev1.Watch_Workload{Handle: 1, Selectors: []string{"agent:kind:join_token"}, Entries: []*nodev1.Watch_EntryRef{{Id: e.ID, Revision: e.Revision}}})
	s.wantChanged(1) // nobody but the clock did anything
	if time.Now().Before(e.ExpiresAt) {
		t.Fatal("told before it expired")
	}
	r := w.issueOne(t, conn, &workloadv1.Evidence{Selectors: []string{"unix:uid:1"}})
	wantError(t, r, codes.PermissionDenied)
}

func TestSyncEnds(t *testing.T) {
	w := newWorld(t).start(t)
	banned, cert1 := w.agent(t, "banned", "")
	evicted, cert2 := w.agent(t, "evicted", "")
	_, cert3 := w.agent(t, "good", "")
	s1, s2, s3 := w.sync(t, w.dial(t, cert1)), w.sync(t, w.dial(t, cert2)), w.sync(t, w.dial(t, cert3))
	if _, err := w.admin(t).BanAgent(testContext(t), &adminv1.NameRequest{Name: banned.ID}); err != nil {
		t.Fatal(err)
	}
	s1.wantEnd(codes.PermissionDenied, "banned")
	if _, err := w.admin(t).EvictAgent(testContext(t), &adminv1.NameRequest{Name: evicted.ID}); err != nil {
		t.Fatal(err)
	}
	s2.wantEnd(codes.PermissionDenied, "evicted")
	// At once, and not "not yet", though its SVID is new.
	back := w.openSync(t, w.dial(t, cert2))
	_, err := back.stream.Recv()
	wantCode(t, err, codes.PermissionDenied, "evicted")
	w.wantNothing(s3)
	w.stale.Store(int64(2 * time.Hour))
	s3.wantEnd(codes.Unavailable, "max_staleness")
	again := w.openSync(t, w.dial(t, cert3))
	_, err = again.stream.Recv()
	wantCode(t, err, codes.Unavailable, "max_staleness")
}

func TestSyncEndsWithTheServer(t *testing.T) {
	w := newWorld(t).start(t)
	_, cert := w.agent(t, "a1", "")
	s := w.sync(t, w.dial(t, cert))
	w.stop()
	s.wantEnd(codes.Unavailable, "stopping")
	select {
	case err := <-w.finished:
		if err != nil {
			t.Fatal(err)
		}
	case <-time.After(deadline):
		t.Fatal("Run does not end")
	}
}

// TestSyncEndsWithTheSVID: a connection is not worth more than the certificate it was made with.
func TestSyncEndsWithTheSVID(t *testing.T) {
	w := newWorld(t).start(t)
	_, cert := w.agent(t, "a1", "")
	w.ahead.Store(int64(time.Hour - 4*time.Second)) // time enough to open the stream on a busy machine
	s := w.openSync(t, w.dial(t, cert))
	for {
		if _, err := s.stream.Recv(); err != nil {
			wantCode(t, err, codes.Unauthenticated, "expired")
			return
		}
	}
}

func TestSyncRefusesNonsense(t *testing.T) {
	w := newWorld(t).start(t)
	_, cert := w.agent(t, "a1", "")
	conn := w.dial(t, cert)
	hello := &nodev1.SyncRequest{Message: &nodev1.SyncRequest_Hello{Hello: &nodev1.Hello{}}}
	set := func(wl *nodev1.Watch_Workload) *nodev1.SyncRequest {
		return &nodev1.SyncRequest{Message: &nodev1.SyncRequest_Watch{Watch: &nodev1.Watch{Set: []*nodev1.Watch_Workload{wl}}}}
	}
	for name, msgs := range map[string][]*nodev1.SyncRequest{
		"no hello":           {{Message: &nodev1.SyncRequest_Ack{Ack: &nodev1.Ack{}}}},
		"empty":              {{}},
		"hello twice":        {hello, hello},
		"a bad selector":     {hello, set(&nodev1.Watch_Workload{Selectors: []string{"nonsense"}})},
		"too many selectors": {hello, set(&nodev1.Watch_Workload{Selectors: manySelectors(maxWatchSelectors + 1)})},
		"too many entries":   {hello, set(&nodev1.Watch_Workload{Selectors: []string{"unix:uid:1"}, Entries: make([]*nodev1.Watch_EntryRef, maxIdentities+1)})},
		"a long entry ID":    {hello, set(&nodev1.Watch_Workload{Selectors: []string{"unix:uid:1"}, Entries: []*nodev1.Watch_EntryRef{{Id: strings.Repeat("x", maxEntryID+1)}}})},
	} {
		t.Run(name, func(t *testing.T) {
			stream, err := nodev1.NewNodeClient(conn).Sync(testContext(t))
			if err != nil {
				t.Fatal(err)
			}
			for _, m := range msgs {
				if err := stream.Send(m); err != nil && err != io.EOF {
					t.Fatal(err)
				}
			}
			for err == nil {
				_, err = stream.Recv()
			}
			wantCode(t, err, codes.InvalidArgument)
		})
	}
}

// What one agent makes a member remember is bounded, and what it gives up is its again.
func TestHubBoundsAnAgent(t *testing.T) {
	h := newHub(func([]identity.Selector) ([]*identity.Entry, bool) { return nil, true }, time.Now)
	s, err := h.open("a", "")
	if err != nil {
		t.Fatal(err)
	}
	long := func(i int) []identity.Selector {
		return []identity.Selector{identity.Selector(fmt.Sprintf("unix:path:/%06d/%s", i, strings.Repeat("x", 1<<20)))}
	}
	n := 0
	for ; ; n++ {
		if err = h.set(s, uint64(n), long(n), nil); err != nil {
			break
		}
	}
	if !errors.Is(err, identity.ErrExhausted) || n == 0 || n > maxWeight>>20 {
		t.Fatalf("after %d MiB: %v", n, err)
	}
	if err := h.set(s, 0, long(0), nil); err != nil { // instead of what it was
		t.Error(err)
	}
	h.unset(s, 1)
	if err := h.set(s, uint64(n), long(n), nil); err != nil {
		t.Errorf("after one was given up: %v", err)
	}
	h.remove(s)
	if s.weight != 0 || len(h.postings) != 0 {
		t.Errorf("%d bytes, %d postings are left of a stream that ended", s.weight, len(h.postings))
	}
	// As many as may be, as they usually are.
	if s, err = h.open("a", ""); err != nil {
		t.Fatal(err)
	}
	for i := range maxWatches {
		sel := []identity.Selector{"agent:id:spiffe://example.org/countersign/agent/kube/east/node-with-a-name-17", "agent:kind:kube", "agent:kube-cluster:east",
			"agent:kube-node:node-with-a-name-17", "k8s:cluster:east", "k8s:node-name:node-with-a-name-17", "k8s:ns:a-namespace-of-some-team",
			identity.Selector(fmt.Sprintf("k8s:pod-name:a-deployment-7c9f8d6b5-%05d", i)), identity.Selector(fmt.Sprintf("k8s:pod-uid:0a1b2c3d-0000-4000-8000-%012d", i)),
			"k8s:sa:the-service-account", "unix:gid:1000", "unix:path:/usr/local/bin/the-server", "unix:uid:1000"}
		if err := h.set(s, uint64(i), sel, []held{{id: "ABCDEFGHIJKLMNOPQRSTUVWXYZ"}}); err != nil {
			t.Fatalf("workload %d: %v", i, err)
		}
	}
}

func TestSyncManyStreamsOfOneAgent(t *testing.T) {
	w := newWorld(t).start(t)
	_, cert := w.agent(t, "a1", "")
	conn := w.dial(t, cert)
	first := w.sync(t, conn)
	for range maxSessions {
		w.sync(t, conn)
	}
	first.wantEnd(codes.ResourceExhausted, "newer")
}

// TestStuckAgentBlocksNobody: an agent never reads; what it is told is merged, others are told at once, and its
// ban still ends it here.
func TestStuckAgentBlocksNobody(t *testing.T) {
	w := newWorld(t).start(t)
	stuck, cert1 := w.agent(t, "stuck", "")
	_, cert2 := w.agent(t, "quick", "")
	sel := []string{"agent:kind:join_token"}
	slow := w.openSync(t, w.dial(t, cert1)) // nobody receives
	set := make([]*nodev1.Watch_Workload, 5000)
	for i := range set {
		set[i] = &nodev1.Watch_Workload{Handle: uint64(i + 1<<40), Selectors: sel}
	}
	slow.watch(set...)
	eventually(t, "the member knows the workloads", func() bool { return w.srv.hub.status(stuck.ID).workloads == len(set) })
	quick := w.sync(t, w.dial(t, cert2))
	quick.watch(&nodev1.Watch_Workload{Handle: 1, Selectors: sel})
	e := w.createEntry(t, &adminv1.Entry{Selectors: sel, SpiffeId: "spiffe://example.org/x"})
	for i := range 100 { // some megabytes, if they were all sent
		quick.wantChanged(1)
		e.Hint = fmt.Sprint(i)
		var err error
		if e, err = w.admin(t).UpdateEntry(testContext(t), e); err != nil {
			t.Fatal(err)
		}
	}
	w.srv.hub.mu.Lock()
	sess := w.srv.hub.byAgent[stuck.ID][0]
	w.srv.hub.mu.Unlock()
	sess.mu.Lock()
	pending := len(sess.mail.changed) + len(sess.mail.ended)
	sess.mu.Unlock()
	if pending > len(set) {
		t.Fatalf("%d handles wait for %d workloads", pending, len(set))
	}
	if err := w.state.BanAgent(testContext(t), stuck.ID); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the stuck session is gone", func() bool { return !w.srv.hub.status(stuck.ID).connected })
	eventually(t, "nothing of it is left", func() bool {
		w.srv.hub.mu.Lock()
		defer w.srv.hub.mu.Unlock()
		return len(w.srv.hub.postings) == 1 && len(w.srv.hub.sessions) == 1
	})
}

func TestAgentsAreListed(t *testing.T) {
	w := newWorld(t).start(t)
	a, cert := w.agent(t, "a1", "node-1")
	w.agent(t, "a2", "")
	s := w.sync(t, w.dial(t, cert))
	s.watch(&nodev1.Watch_Workload{Handle: 1, Selectors: []string{"unix:uid:1"}})
	s.send(&nodev1.SyncRequest{Message: &nodev1.SyncRequest_Ack{Ack: &nodev1.Ack{Revision: 1 << 50, BundleSequence: 2}}})
	var got *adminv1.Agent
	eventually(t, "the acknowledgement is seen", func() bool {
		var err error
		if got, err = w.admin(t).GetAgent(testContext(t), &adminv1.NameRequest{Name: a.ID}); err != nil {
			t.Fatal(err)
		}
		return got.AckedRevision == 1<<50
	})
	if !got.Connected || got.Version != "v1" || got.Workloads != 1 || got.AckedBundleSequence != 2 || got.KubeNode != "node-1" {
		t.Fatalf("agent %v", got)
	}
	all, err := w.admin(t).ListAgents(testContext(t), &adminv1.ListRequest{PageSize: 1})
	if err != nil || len(all.Agents) != 1 || all.NextPageToken == "" {
		t.Fatalf("page %v, error %v", all, err)
	}
	all, err = w.admin(t).ListAgents(testContext(t), &adminv1.ListRequest{PageToken: all.NextPageToken})
	if err != nil || len(all.Agents) != 1 || all.NextPageToken != "" || all.Agents[0].Connected {
		t.Fatalf("page %v, error %v", all, err)
	}
}

// TestResetCatchesUp: after the state was replaced whole, sessions and workloads are measured against the new one.
func TestResetCatchesUp(t *testing.T) {
	w := newWorld(t).start(t)
	gone, cert1 := w.agent(t, "gone", "")
	_, cert2 := w.agent(t, "here", "")
	s1, s2 := w.sync(t, w.dial(t, cert1)), w.sync(t, w.dial(t, cert2))
	s2.watch(&nodev1.Watch_Workload{Handle: 3, Selectors: []string{"agent:kind:join_token"}})
	w.wantNothing(s2)
	w.state.mu.Lock() // as a snapshot does: without a word about each
	delete(w.state.agentsByID, gone.ID)
	w.state.entries["e"] = &identity.Entry{ID: "e", Selectors: []identity.Selector{"agent:kind:join_token"}, SPIFFEID: "spiffe://example.org/e", Revision: 9}
	w.state.mu.Unlock()
	if err := w.state.write(func(uint64) (identity.Change, error) { return identity.Change{Reset: true}, nil }); err != nil {
		t.Fatal(err)
	}
	select { // s1 may have been told of the probe before
	case <-s1.got:
	case err := <-s1.end:
		s1.end <- err
	}
	s1.wantEnd(codes.PermissionDenied, "evicted")
	for {
		if m := s2.next(); m.GetChanged() != nil {
			if !slices.Equal(m.GetChanged().Handles, []uint64{3}) {
				t.Fatalf("message %v", m)
			}
			return
		}
	}
}

func TestBundleIsPushed(t *testing.T) {
	w := newWorld(t).start(t)
	eventually(t, "the authorities are kept for the next start", func() bool { return w.kept.Load() > 0 })
	_, cert := w.agent(t, "a1", "")
	s := w.sync(t, w.dial(t, cert))
	w.wantNothing(s)
	next, key, err := ca.NewX509Authority(w.td, time.Hour, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	next.State = identity.AuthorityPrepared
	if next.SealedKey, err = fakeSeal(key, identity.AuthorityAD(w.td, next.Kind, next.ID)); err != nil {
		t.Fatal(err)
	}
	before := w.state.Bundle().Sequence
	w.state.mu.Lock() // the fake's CreateAuthority answers with the active one
	w.state.authorities[0].State = identity.AuthorityRetiring
	w.state.mu.Unlock()
	if _, err := w.state.CreateAuthority(testContext(t), next); err != nil {
		t.Fatal(err)
	}
	b := s.next().GetState().GetBundles().GetOwn()
	if b.GetSequence() != before+1 || len(b.GetX509Authorities()) != 2 {
		t.Fatalf("bundle %v", b)
	}
}

// TestEmptyStateKeepsTheCA: a state that is being rebuilt does not take away what the CA had from before.
func TestEmptyStateKeepsTheCA(t *testing.T) {
	w := newWorld(t).start(t)
	w.state.mu.Lock()
	w.state.authorities = nil
	w.state.mu.Unlock()
	w.srv.changed([]identity.Change{{Reset: true}})
	if err := w.srv.Ready(); err != nil {
		t.Fatal(err)
	}
}
