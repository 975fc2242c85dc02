package store

import (
	"reflect"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"countersign.io/countersign/identity"
)

func TestJoinToken(t *testing.T) {
	s, w, _ := newStore(t)
	ctx := t.Context()
	tok := token("t1", identity.JoinAgent, now.Add(time.Minute))
	tok.KubeCluster, tok.KubeNode = "prod", "node-1"
	tok.UsedAt = now // not the caller's to say
	if err := w.CreateJoinToken(ctx, tok); err != nil {
		t.Fatal(err)
	}
	if err := w.CreateJoinToken(ctx, token("t2", identity.JoinServer, now.Add(time.Minute))); err != nil {
		t.Fatal(err)
	}
	use := func(at time.Time, secret, purpose string) (identity.JoinToken, error) {
		return w.UseJoinToken(ctx, at, hashOf(secret), purpose)
	}

	_, err := use(now, "t1", identity.JoinServer)
	wantErr(t, err, identity.ErrDenied, "t1", "agent", "server")
	_, err = use(now, "guess", identity.JoinAgent)
	wantErr(t, err, identity.ErrUnauthenticated, "no such")
	_, err = w.UseJoinToken(ctx, now, nil, identity.JoinAgent)
	wantErr(t, err, identity.ErrUnauthenticated)
	_, err = use(now.Add(time.Minute), "t2", identity.JoinServer)
	wantErr(t, err, identity.ErrUnauthenticated, "t2", "expired")

	got := must[identity.JoinToken](t)(use(now.Add(time.Second), "t1", identity.JoinAgent)) // after the wrong purpose
	tok.UsedAt = now.Add(time.Second)
	if !reflect.DeepEqual(got, tok) {
		t.Fatalf("used %+v, want %+v", got, tok)
	}
	_, err = use(now.Add(2*time.Second), "t1", identity.JoinAgent)
	wantErr(t, err, identity.ErrPrecondition, "t1", "was used at")
	_, err = use(now.Add(time.Hour), "t1", identity.JoinAgent)
	wantErr(t, err, identity.ErrPrecondition, "was used at") // more telling than expired

	wantErr(t, w.CreateJoinToken(ctx, token("t1", identity.JoinAgent, now)), identity.ErrExists, "t1")
	other := token("t1", identity.JoinAgent, now.Add(time.Minute))
	other.Hash = hashOf("other secret") // the ID names an agent: it must not be given twice
	wantErr(t, w.CreateJoinToken(ctx, other), identity.ErrExists, "t1")
	for _, bad := range []identity.JoinToken{{}, {ID: "x", Hash: []byte("short"), Purpose: "agent", ExpiresAt: now}, {ID: "x", Hash: hashOf("x"), Purpose: "root", ExpiresAt: now},
		{ID: "x", Hash: hashOf("x"), Purpose: "agent"}, {ID: "a/b", Hash: hashOf("x"), Purpose: "agent", ExpiresAt: now}} {
		wantErr(t, w.CreateJoinToken(ctx, bad), identity.ErrInvalid)
	}
	checkConsistent(t, s)
}

func TestJoinTokenAdmitsOneOfMany(t *testing.T) {
	_, w, _ := newStore(t)
	if err := w.CreateJoinToken(t.Context(), token("t", identity.JoinAgent, now.Add(time.Minute))); err != nil {
		t.Fatal(err)
	}
	var admitted atomic.Int32
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			if _, err := w.UseJoinToken(t.Context(), now, hashOf("t"), identity.JoinAgent); err == nil {
				admitted.Add(1)
			}
		})
	}
	wg.Wait()
	if n := admitted.Load(); n != 1 {
		t.Errorf("%d were admitted", n)
	}
}

func TestAgents(t *testing.T) {
	s, w, _ := newStore(t)
	ctx := t.Context()
	in := agent("one")
	in.Banned, in.Revision = true, 9 // not the caller's to say
	got := must[identity.Agent](t)(w.PutAgent(ctx, in))
	if got.Banned || got.Revision != 1 {
		t.Fatalf("put %+v", got)
	}
	if have, ok := s.Agent(in.ID); !ok || !reflect.DeepEqual(*have, got) {
		t.Fatalf("stored %+v", have)
	}
	if again := must[identity.Agent](t)(w.PutAgent(ctx, in)); again.Revision != 2 {
		t.Fatalf("put again: %+v", again)
	}
	if err := w.EvictAgent(ctx, in.ID); err != nil {
		t.Fatal(err)
	}
	if _, ok := s.Agent(in.ID); ok {
		t.Fatal("the evicted agent is still there")
	}
	must[identity.Agent](t)(w.PutAgent(ctx, in)) // an evicted agent may come again

	for range 2 { // banning again does nothing
		if err := w.BanAgent(ctx, in.ID); err != nil {
			t.Fatal(err)
		}
	}
	if have, ok := s.Agent(in.ID); !ok || !have.Banned || have.Revision != 5 {
		t.Fatalf("banned: %+v", have)
	}
	_, err := w.PutAgent(ctx, in)
	wantErr(t, err, identity.ErrDenied, in.ID, "banned")
	wantErr(t, w.EvictAgent(ctx, in.ID), identity.ErrPrecondition, "banned") // or the ban would be gone
	_, err = w.PutAgent(ctx, in)
	wantErr(t, err, identity.ErrDenied)
	wantErr(t, w.BanAgent(ctx, "spiffe://example.org/none"), identity.ErrNotFound)
	wantErr(t, w.EvictAgent(ctx, "spiffe://example.org/none"), identity.ErrNotFound)
	for _, id := range []string{"", "x", "spiffe://example.org/web", "spiffe://example.org/countersign/member/a", "spiffe://other.org/countersign/agent/join/x"} {
		_, err := w.PutAgent(ctx, identity.Agent{ID: id, Kind: "join_token"})
		wantErr(t, err, identity.ErrInvalid)
	}
	checkConsistent(t, s)
}

// A ban concerns the node too: its pods must not come without an agent. It outlives a restart.
func TestNodeBanned(t *testing.T) {
	s, w, _ := newStore(t)
	ctx := t.Context()
	in := agent("one")
	in.KubeCluster, in.KubeNode = "c", "n"
	must[identity.Agent](t)(w.PutAgent(ctx, in))
	must[identity.Agent](t)(w.PutAgent(ctx, agent("two"))) // of no node
	if s.NodeBanned("c", "n") || s.NodeBanned("", "") {
		t.Fatal("banned before anybody said so")
	}
	for _, name := range []string{"one", "two"} {
		if err := w.BanAgent(ctx, agent(name).ID); err != nil {
			t.Fatal(err)
		}
	}
	if !s.NodeBanned("c", "n") {
		t.Error("the banned agent's node is not banned")
	}
	if s.NodeBanned("c", "m") || s.NodeBanned("d", "n") || s.NodeBanned("", "") {
		t.Error("another node is banned")
	}
	checkConsistent(t, s)
	dir := s.dir
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if s = openAt(t, dir); !s.NodeBanned("c", "n") {
		t.Error("forgotten over a restart")
	}
}

func TestKubeClusters(t *testing.T) {
	s, w, _ := newStore(t)
	ctx := t.Context()
	must[identity.KubeCluster](t)(w.PutKubeCluster(ctx, cluster("b"), false))
	must[identity.KubeCluster](t)(w.PutKubeCluster(ctx, cluster("a"), true))
	_, err := w.PutKubeCluster(ctx, cluster("b"), false)
	wantErr(t, err, identity.ErrExists, "b")
	if k := must[identity.KubeCluster](t)(w.PutKubeCluster(ctx, cluster("b"), true)); k.Revision != 1 {
		t.Errorf("a replacement that changes nothing has revision %d", k.Revision)
	}
	changed := cluster("b")
	changed.Audience = "other"
	if k := must[identity.KubeCluster](t)(w.PutKubeCluster(ctx, changed, true)); k.Revision != 5 {
		t.Errorf("replaced: revision %d", k.Revision)
	}
	if k, ok := s.KubeCluster("b"); !ok || k.Audience != "other" {
		t.Errorf("stored %+v", k)
	}
	if all := s.KubeClusters(); len(all) != 2 || all[0].Name != "a" || all[1].Name != "b" {
		t.Errorf("listed %+v", all)
	}
	if err := w.DeleteKubeCluster(ctx, "a"); err != nil {
		t.Fatal(err)
	}
	wantErr(t, w.DeleteKubeCluster(ctx, "a"), identity.ErrNotFound, "a")
	_, err = w.PutKubeCluster(ctx, identity.KubeCluster{Name: "A_B"}, false)
	wantErr(t, err, identity.ErrInvalid, "A_B")
	checkConsistent(t, s)
}

// A cluster's word counts no more once it is deleted, for its agents too: the next one of that name may be another's.
func TestDeleteKubeClusterEvictsItsAgents(t *testing.T) {
	s, w, _ := newStore(t)
	ctx := t.Context()
	must[identity.KubeCluster](t)(w.PutKubeCluster(ctx, cluster("c"), false))
	put := func(kind, of, name string) string {
		a := identity.Agent{ID: "spiffe://example.org/countersign/agent/" + kind + "/of-" + of + "/" + name, Kind: kind, KubeCluster: of, AttestedAt: now}
		if of != "" {
			a.KubeNode = name
		}
		return must[identity.Agent](t)(w.PutAgent(ctx, a)).ID
	}
	gone, banned := put("kube", "c", "n1"), put("kube", "c", "n2")
	stay := []string{put("kube", "d", "n1"), put("join_token", "c", "n1"), put("x509pop", "", "n1")}
	if err := w.BanAgent(ctx, banned); err != nil {
		t.Fatal(err)
	}
	next, _ := startWatch(t, s)
	next() // the reset
	if err := w.DeleteKubeCluster(ctx, "c"); err != nil {
		t.Fatal(err)
	}
	if _, ok := s.Agent(gone); ok {
		t.Error("the cluster is gone and its agent is not")
	}
	if a, ok := s.Agent(banned); !ok || !a.Banned || !s.NodeBanned("c", "n2") {
		t.Error("the ban went with the cluster")
	}
	for _, id := range stay {
		if _, ok := s.Agent(id); !ok {
			t.Errorf("%s was evicted", id)
		}
	}
	if told := next(); len(told) != 2 || told[0].KubeCluster != "c" || !told[1].AgentGone || told[1].Agent.ID != gone {
		t.Errorf("watchers were told %+v", told)
	}
	checkConsistent(t, s)
}

// The sequence counts up exactly when the content changes (SPIFFE Trust Domain and Bundle, section 4.1.2).
func TestBundleSequence(t *testing.T) {
	s, w, _ := newStore(t)
	ctx := t.Context()
	step := func(what string, sequence uint64, x509, jwt int) {
		t.Helper()
		b := s.Bundle()
		if b.Sequence != sequence || len(b.X509) != x509 || len(b.JWT) != jwt || b.RefreshHint != 5*time.Minute || b.TrustDomain != td {
			t.Fatalf("%s: %+v, want sequence %d with %d and %d keys", what, b, sequence, x509, jwt)
		}
	}
	step("empty", 0, 0, 0)
	first := must[identity.Authority](t)(w.CreateAuthority(ctx, authority(identity.AuthorityX509, "x1")))
	step("first", 1, 1, 0)
	again := must[identity.Authority](t)(w.CreateAuthority(ctx, authority(identity.AuthorityX509, "x2")))
	if !reflect.DeepEqual(first, again) {
		t.Fatalf("a second leader got %+v, not the first one's %+v", again, first)
	}
	step("again", 1, 1, 0)
	must[identity.Authority](t)(w.CreateAuthority(ctx, authority(identity.AuthorityJWT, "j1")))
	step("another kind", 2, 1, 1)
	must[identity.Entry](t)(w.CreateEntry(ctx, now, entryFor("e", "/e", "k8s:ns:x")))
	must[identity.Agent](t)(w.PutAgent(ctx, agent("a")))
	step("not its content", 2, 1, 1)
	if a := s.Authorities(); len(a) != 2 || a[0].Kind != identity.AuthorityJWT || a[1].ID != "x1" || string(a[1].SealedKey) != "sealed" {
		t.Errorf("authorities %+v", a)
	}
	for _, bad := range []identity.Authority{{}, authority("wit", "w"), authority(identity.AuthorityX509, "a/b"),
		{ID: "x", Kind: identity.AuthorityX509, State: "revoked", PublicKey: []byte{1}, SealedKey: []byte{1}, Cert: []byte{1}},
		{ID: "x", Kind: identity.AuthorityJWT, State: identity.AuthorityActive, PublicKey: []byte{1}}} {
		_, err := w.CreateAuthority(ctx, bad)
		wantErr(t, err, identity.ErrInvalid)
	}
	checkConsistent(t, s)
}

func TestMembers(t *testing.T) {
	s, w, _ := newStore(t)
	ctx := t.Context()
	for _, m := range []identity.Member{{ID: "b", Address: "h:1"}, {ID: "a", Address: "h:2"}, {ID: "b", Address: "h:3"}} {
		if err := w.PutMember(ctx, m); err != nil {
			t.Fatal(err)
		}
	}
	if got, want := s.Members(), []identity.Member{{ID: "a", Address: "h:2"}, {ID: "b", Address: "h:3"}}; !reflect.DeepEqual(got, want) {
		t.Errorf("members %+v", got)
	}
	if err := w.RemoveMember(ctx, "a"); err != nil {
		t.Fatal(err)
	}
	wantErr(t, w.RemoveMember(ctx, "a"), identity.ErrNotFound, "a")
	wantErr(t, w.PutMember(ctx, identity.Member{ID: "a/b"}), identity.ErrInvalid, "a/b")
	checkConsistent(t, s)
}

// TestAgentFirstAt: that an agent was attested before is remembered from level 2 on, and is not the caller's to say.
func TestAgentFirstAt(t *testing.T) {
	for level, want := range map[uint32]time.Time{1: {}, 2: now.Add(time.Minute)} {
		_, w, _ := newStore(t)
		ctx := t.Context()
		if err := w.SetLevel(ctx, level); err != nil {
			t.Fatal(err)
		}
		in := agent("one")
		in.AttestedAt, in.FirstAt = now.Add(time.Minute), now.Add(-time.Hour)
		if got := must[identity.Agent](t)(w.PutAgent(ctx, in)); !got.FirstAt.IsZero() {
			t.Errorf("level %d, at first: %v", level, got.FirstAt)
		}
		for i := range 2 {
			in.AttestedAt = now.Add(time.Duration(i+2) * time.Minute)
			if got := must[identity.Agent](t)(w.PutAgent(ctx, in)); !got.FirstAt.Equal(want) {
				t.Errorf("level %d, again: %v, want %v", level, got.FirstAt, want)
			}
		}
	}
}
