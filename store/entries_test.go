package store

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"testing"
	"time"

	"countersign.io/countersign/identity"
)

func TestEntryLife(t *testing.T) {
	s, w, l := newStore(t)
	ctx := t.Context()
	in := entryFor("web", "/web", "k8s:ns:prod", "k8s:sa:web")
	in.Selectors = append(in.Selectors, in.Selectors[0]) // neither sorted nor unique
	in.Revision, in.CreatedAt = 99, now.Add(time.Hour)   // not the caller's to say
	got := must[identity.Entry](t)(w.CreateEntry(ctx, now, in))
	want := entryFor("web", "/web", "k8s:ns:prod", "k8s:sa:web")
	want.Revision, want.CreatedAt = 1, now
	if !reflect.DeepEqual(got, want) {
		t.Fatalf("created %+v, want %+v", got, want)
	}
	if have, ok := s.Entry("web"); !ok || !reflect.DeepEqual(*have, want) {
		t.Fatalf("stored %+v, want %+v", have, want)
	}

	in = entryFor("web", "/web2", "k8s:ns:prod")
	in.Hint = "changed"
	got = must[identity.Entry](t)(w.UpdateEntry(ctx, now.Add(time.Minute), in, 1))
	if got.Revision != 2 || !got.CreatedAt.Equal(now) || got.Hint != "changed" {
		t.Fatalf("updated %+v", got)
	}
	got = must[identity.Entry](t)(w.UpdateEntry(ctx, now, in, 0))
	if got.Revision != 2 || s.Revision() != 3 {
		t.Fatalf("an update that changes nothing gave revision %d at %d, want 2 at 3", got.Revision, s.Revision())
	}
	if m := s.Match(sel("k8s:ns:prod")); len(m) != 1 || m[0].SPIFFEID != "spiffe://example.org/web2" {
		t.Fatalf("matched %v", m)
	}

	if err := w.DeleteEntry(ctx, "web"); err != nil {
		t.Fatal(err)
	}
	if _, ok := s.Entry("web"); ok || len(s.Match(sel("k8s:ns:prod"))) != 0 {
		t.Fatal("the entry is still there")
	}
	wantErr(t, w.DeleteEntry(ctx, "web"), identity.ErrNotFound, "web")
	checkConsistent(t, s)
	if l.index != 5 {
		t.Errorf("%d commands, want 5", l.index)
	}
}

func TestEntryRefused(t *testing.T) {
	s, w, l := newStore(t)
	ctx := t.Context()
	must[identity.Entry](t)(w.CreateEntry(ctx, now, entryFor("first", "/a", "k8s:ns:a")))
	must[identity.Entry](t)(w.CreateEntry(ctx, now, entryFor("second", "/b", "k8s:ns:b")))
	records := func() []byte { // without the header, which has the revision, and the hash
		snap := snapshotOf(t, s)
		return snap[snapshotHeaderBytes : len(snap)-sha256.Size]
	}
	before := records()
	create := func(e identity.Entry) error { _, err := w.CreateEntry(ctx, now, e); return err }
	update := func(e identity.Entry, rev uint64) error { _, err := w.UpdateEntry(ctx, now, e, rev); return err }
	expired := entryFor("late", "/late", "k8s:ns:late")
	expired.ExpiresAt = now
	bad := entryFor("b@d", "/reserved", "unix:uid:0")
	bad.SPIFFEID = "spiffe://other.org/countersign/member/x"
	for _, c := range []struct {
		name     string
		err      error
		sentinel error
		words    []string
	}{
		{"duplicate rule", create(entryFor("third", "/a", "k8s:ns:a")), identity.ErrExists, []string{"first", "/a"}},
		{"duplicate ID", create(entryFor("first", "/c", "k8s:ns:c")), identity.ErrExists, []string{"first"}},
		{"update to a duplicate", update(entryFor("second", "/a", "k8s:ns:a"), 0), identity.ErrExists, []string{"first"}},
		{"stale revision", update(entryFor("second", "/c", "k8s:ns:c"), 1), identity.ErrPrecondition, []string{"revision 2, not 1"}},
		{"update of none", update(entryFor("none", "/c", "k8s:ns:c"), 0), identity.ErrNotFound, []string{"none"}},
		{"already expired", create(expired), identity.ErrInvalid, []string{"past"}},
		{"several faults", create(bad), identity.ErrInvalid, []string{"b@d", "other.org", "agent's word"}},
		{"no ID", create(entryFor("", "/c", "k8s:ns:c")), identity.ErrInvalid, []string{"entry ID"}},
		{"ID of a pseudo entry", create(entryFor("default:x", "/c", "k8s:ns:c")), identity.ErrInvalid, nil},
		{"bad template", create(entryFor("t", "/{k8s:nope}", "k8s:ns:c")), identity.ErrInvalid, []string{"k8s:nope"}},
		{"update is checked too", update(bad, 0), identity.ErrInvalid, nil},
	} {
		t.Run(c.name, func(t *testing.T) { wantErr(t, c.err, c.sentinel, c.words...) })
	}
	if !bytes.Equal(before, records()) {
		t.Error("a refused command changed something")
	}
	if l.index != 7 {
		t.Errorf("%d commands reached the log, want 7: what a check refuses does not", l.index)
	}
	// An entry may take a rule over once its owner is gone, and keep its own.
	if err := w.DeleteEntry(ctx, "first"); err != nil {
		t.Fatal(err)
	}
	if err := create(entryFor("third", "/a", "k8s:ns:a")); err != nil {
		t.Fatal(err)
	}
	if err := update(entryFor("third", "/a", "k8s:ns:a"), 0); err != nil {
		t.Fatal(err)
	}
	checkConsistent(t, s)
}

func TestMatchOrderIsOfCreation(t *testing.T) {
	s, w, _ := newStore(t)
	for _, id := range []string{"z", "m", "a"} {
		must[identity.Entry](t)(w.CreateEntry(t.Context(), now, entryFor(id, "/"+id, "k8s:ns:x")))
	}
	must[identity.Entry](t)(w.UpdateEntry(t.Context(), now, entryFor("z", "/z2", "k8s:ns:x"), 0)) // keeps its place
	var got []string
	for _, e := range s.Match([]identity.Selector{"k8s:sa:y", "k8s:ns:x"}) { // not sorted
		got = append(got, e.ID)
	}
	if !slices.Equal(got, []string{"z", "m", "a"}) {
		t.Errorf("matched %v", got)
	}
}

func TestSweep(t *testing.T) {
	s, w, l := newStore(t)
	ctx := t.Context()
	const n = sweepBatch + 7
	for i := range n {
		e := entryFor(fmt.Sprint("e", i), fmt.Sprint("/", i), "k8s:ns:x")
		e.ExpiresAt = now.Add(time.Minute + 500*time.Millisecond)
		must[identity.Entry](t)(w.CreateEntry(ctx, now, e))
	}
	must[identity.Entry](t)(w.CreateEntry(ctx, now, entryFor("stays", "/stays", "k8s:ns:x")))
	later := entryFor("later", "/later", "k8s:ns:x")
	later.ExpiresAt = now.Add(time.Minute)
	must[identity.Entry](t)(w.CreateEntry(ctx, now, later))
	later.ExpiresAt = now.Add(time.Hour)
	must[identity.Entry](t)(w.UpdateEntry(ctx, now, later, 0)) // its old end counts no more
	if err := w.CreateJoinToken(ctx, token("used", identity.JoinAgent, now.Add(time.Minute))); err != nil {
		t.Fatal(err)
	}
	at := l.index
	for _, early := range []time.Time{now, now.Add(time.Minute)} {
		if err := w.Sweep(ctx, early); err != nil || l.index != at {
			t.Fatalf("a sweep with nothing to do: %v, %d commands", err, l.index-at)
		}
	}
	if err := w.Sweep(ctx, now.Add(61*time.Second)); err != nil || l.index != at+2 {
		t.Fatalf("a sweep of %d: %v, %d commands", n, err, l.index-at)
	}
	page, _ := s.Entries("", 0)
	if len(page) != 2 {
		t.Fatalf("%d entries are left, want 2", len(page))
	}
	_, err := w.UseJoinToken(ctx, now.Add(tokenMemory), hashOf("used"), identity.JoinAgent)
	wantErr(t, err, identity.ErrUnauthenticated, "expired") // still remembered
	if err := w.Sweep(ctx, now.Add(tokenMemory+time.Minute)); err != nil {
		t.Fatal(err)
	}
	_, err = w.UseJoinToken(ctx, now, hashOf("used"), identity.JoinAgent)
	wantErr(t, err, identity.ErrUnauthenticated, "no such")
	checkConsistent(t, s)
}

func TestListingIsStable(t *testing.T) {
	s, w, _ := newStore(t)
	ctx := t.Context()
	create := func(id string) {
		must[identity.Entry](t)(w.CreateEntry(ctx, now, entryFor(id, "/"+id, "k8s:ns:x")))
		must[identity.Agent](t)(w.PutAgent(ctx, agent(id)))
	}
	for i := range 25 {
		create(fmt.Sprintf("e%02d", i))
	}
	var ids, agents []string
	for after, round := "", 0; ; round++ {
		page, next := s.Entries(after, 10)
		for _, e := range page {
			ids = append(ids, e.ID)
		}
		if next == "" {
			break
		}
		if len(page) != 10 || next != page[9].ID {
			t.Fatalf("page of %d up to %q", len(page), next)
		}
		after = next
		if round == 0 { // the very key to go on after goes, and others come before and behind
			for _, id := range []string{"e09", "e03", "e15"} {
				if err := w.DeleteEntry(ctx, id); err != nil {
					t.Fatal(err)
				}
			}
			create("e00b")
			create("e20b")
		}
	}
	for after, next := "", "x"; next != ""; after = next {
		var page []*identity.Agent
		page, next = s.Agents(after, 4)
		for _, a := range page {
			agents = append(agents, a.ID)
		}
	}
	if len(ids) != 25 || !slices.IsSorted(ids) || len(slices.Compact(slices.Clone(ids))) != len(ids) {
		t.Errorf("listed %d: %v", len(ids), ids)
	}
	for i := range 25 {
		if id := fmt.Sprintf("e%02d", i); i != 15 && !slices.Contains(ids, id) {
			t.Errorf("%s was there all the time and is not listed", id)
		}
	}
	if len(agents) != 27 || !slices.IsSorted(agents) {
		t.Errorf("listed %d agents", len(agents))
	}
	if page, next := s.Entries("e99", 5); len(page) != 0 || next != "" {
		t.Errorf("after the end: %v, %q", page, next)
	}
	if page, next := s.Entries("", 24); len(page) != 24 || next != "" {
		t.Errorf("a page that holds all but the end says %d, %q", len(page), next)
	}
}

func TestProposeErrors(t *testing.T) {
	s, w, l := newStore(t)
	broken := errors.New("connection lost")
	l.err = broken
	err := w.DeleteEntry(t.Context(), "x")
	wantErr(t, err, identity.ErrUnavailable, "delete_entry", "connection lost")
	if !errors.Is(err, broken) {
		t.Error("the cause is lost")
	}
	l.err = fmt.Errorf("waiting: %w", context.DeadlineExceeded)
	if err := w.DeleteEntry(t.Context(), "x"); !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, identity.ErrUnavailable) {
		t.Errorf("a deadline came back as %v", err)
	}
	if s.Revision() != 0 {
		t.Error("something was applied")
	}
	k := cluster("big")
	k.JWKS = make([]byte, maxCommandBytes)
	_, err = w.PutKubeCluster(t.Context(), k, false)
	wantErr(t, err, identity.ErrInvalid, "at the most")
	e := entryFor("late", "/late", "k8s:ns:x")
	e.ExpiresAt = time.Date(12000, 1, 1, 0, 0, 0, 0, time.UTC)
	_, err = w.CreateEntry(t.Context(), now, e)
	wantErr(t, err, identity.ErrInvalid, "year")
}
