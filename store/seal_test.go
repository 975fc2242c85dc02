package store

import (
	"bytes"
	"reflect"
	"testing"
	"time"

	"countersign.io/countersign/identity"
)

func keyID(of string) []byte { return hashOf(of)[:sealKeyIDBytes] }

func putMembers(t testing.TB, w *Writer, ids ...string) {
	t.Helper()
	for _, id := range ids {
		if err := w.PutMember(t.Context(), identity.Member{ID: id, Address: id + ":1"}); err != nil {
			t.Fatal(err)
		}
	}
}

func TestSealTerms(t *testing.T) {
	s, w, _ := newStore2(t)
	ctx := t.Context()
	states := func() (out []identity.SealState) {
		for _, r := range s.SealTerms() {
			out = append(out, r.State)
		}
		return out
	}
	ok := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	putMembers(t, w, "a", "b")
	wantErr(t, w.PutSealTerm(ctx, now, 0, keyID("1")), identity.ErrInvalid)
	wantErr(t, w.PutSealTerm(ctx, now, 1, []byte("short")), identity.ErrInvalid, "16 bytes")
	next, _ := startWatch(t, s)
	next() // the reset
	ok(w.PutSealTerm(ctx, now, 1, keyID("1")))
	if told := next(); len(told) != 1 || !told[0].Seal {
		t.Errorf("told %+v", told)
	}
	if got := s.SealTerms(); len(got) != 1 || !reflect.DeepEqual(got[0], identity.SealTerm{Number: 1, KeyID: keyID("1"), State: identity.SealPending, CreatedAt: now, Revision: 4}) {
		t.Fatalf("terms %+v", got)
	}
	ok(w.PutSealTerm(ctx, now.Add(time.Hour), 1, keyID("1"))) // the answer may have been lost
	if got := s.SealTerms(); got[0].Revision != 4 {
		t.Errorf("said again: %+v", got)
	}
	wantErr(t, w.PutSealTerm(ctx, now, 1, keyID("other")), identity.ErrPrecondition, "1 is pending")
	wantErr(t, w.PutSealTerm(ctx, now, 2, keyID("2")), identity.ErrPrecondition, "1 is pending")

	wantErr(t, w.ActivateSealTerm(ctx, 1), identity.ErrPrecondition, "a, b")
	wantErr(t, w.AckSealTerm(ctx, 2, "a"), identity.ErrNotFound, "2")
	wantErr(t, w.AckSealTerm(ctx, 1, "stranger"), identity.ErrNotFound, "stranger")
	ok(w.AckSealTerm(ctx, 1, "b"))
	wantErr(t, w.ActivateSealTerm(ctx, 1), identity.ErrPrecondition, "fetch its key: a")
	ok(w.AckSealTerm(ctx, 1, "a"))
	ok(w.AckSealTerm(ctx, 1, "a"))
	ok(w.ActivateSealTerm(ctx, 1))
	ok(w.ActivateSealTerm(ctx, 1))
	if got := s.SealTerms(); got[0].State != identity.SealActive || !reflect.DeepEqual(got[0].Holders, []string{"a", "b"}) {
		t.Fatalf("active: %+v", got)
	}
	wantErr(t, w.DropSealTerm(ctx, 1), identity.ErrPrecondition, "active")
	wantErr(t, w.PutSealTerm(ctx, now, 1, keyID("1")), identity.ErrPrecondition, "only go up")

	ok(w.PutSealTerm(ctx, now, 3, keyID("3")))
	ok(w.AckSealTerm(ctx, 3, "a"))
	ok(w.AckSealTerm(ctx, 3, "b"))
	putMembers(t, w, "c") // came meanwhile
	wantErr(t, w.ActivateSealTerm(ctx, 3), identity.ErrPrecondition, "fetch its key: c")
	ok(w.AckSealTerm(ctx, 3, "c"))
	ok(w.ActivateSealTerm(ctx, 3))
	if got := states(); !reflect.DeepEqual(got, []identity.SealState{identity.SealRetired, identity.SealActive}) {
		t.Fatalf("states %v", got)
	}
	wantErr(t, w.ActivateSealTerm(ctx, 1), identity.ErrPrecondition, "retired")
	wantErr(t, w.PutSealTerm(ctx, now, 2, keyID("2")), identity.ErrPrecondition, "term 3")
	ok(w.DropSealTerm(ctx, 1))
	wantErr(t, w.DropSealTerm(ctx, 1), identity.ErrNotFound, "1")
	wantErr(t, w.ActivateSealTerm(ctx, 1), identity.ErrNotFound, "1")
	ok(w.PutSealTerm(ctx, now, 4, keyID("4")))
	ok(w.DropSealTerm(ctx, 4)) // a pending one
	if got := states(); !reflect.DeepEqual(got, []identity.SealState{identity.SealActive}) {
		t.Fatalf("states %v", got)
	}
	checkConsistent(t, s)
}

func TestSealTermWithoutMembers(t *testing.T) {
	_, w, _ := newStore2(t)
	if err := w.PutSealTerm(t.Context(), now, 1, keyID("1")); err != nil {
		t.Fatal(err)
	}
	wantErr(t, w.ActivateSealTerm(t.Context(), 1), identity.ErrPrecondition)
}

// What a member said for a key that was dropped does not count for the next one of that number.
func TestLateAckIsOfItsKey(t *testing.T) {
	s, w, l := newStore2(t)
	ctx := t.Context()
	putMembers(t, w, "a")
	late, err := encodeCommand(ackSealTerm, now, ackSealTermData{Number: 1, KeyID: keyID("old"), Member: "a"})
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"old", "new"} {
		if len(s.SealTerms()) > 0 {
			if err := w.DropSealTerm(ctx, 1); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.PutSealTerm(ctx, now, 1, keyID(id)); err != nil {
			t.Fatal(err)
		}
	}
	res, err := l.Propose(ctx, late)
	if err != nil {
		t.Fatal(err)
	}
	wantErr(t, decodeResult(res, nil), identity.ErrPrecondition, "another key")
	wantErr(t, w.ActivateSealTerm(ctx, 1), identity.ErrPrecondition, "fetch its key: a")
}

// A member that goes takes its word with it: the next one of its name has another disk.
func TestRemovedMemberHoldsNothing(t *testing.T) {
	s, w, _ := newStore2(t)
	ctx := t.Context()
	putMembers(t, w, "a", "b")
	if err := w.PutSealTerm(ctx, now, 1, keyID("1")); err != nil {
		t.Fatal(err)
	}
	for _, m := range []string{"a", "b"} {
		if err := w.AckSealTerm(ctx, 1, m); err != nil {
			t.Fatal(err)
		}
	}
	next, _ := startWatch(t, s)
	next() // the reset
	if err := w.RemoveMember(ctx, "b"); err != nil {
		t.Fatal(err)
	}
	if told := next(); len(told) != 2 || !told[0].Members || !told[1].Seal {
		t.Errorf("told %+v", told)
	}
	putMembers(t, w, "b")
	wantErr(t, w.ActivateSealTerm(ctx, 1), identity.ErrPrecondition, "fetch its key: b")
	if err := w.RemoveMember(ctx, "b"); err != nil {
		t.Fatal(err)
	}
	if err := w.ActivateSealTerm(ctx, 1); err != nil {
		t.Fatal(err)
	}
	checkConsistent(t, s)
}

func TestSealTermKeysSortAsNumbers(t *testing.T) {
	last := ""
	for _, n := range []uint32{0, 1, 2, 9, 10, 99, 100, 1 << 31, 1<<32 - 1} {
		if key := sealTermKey(n); key <= last || len(key) != 10 {
			t.Errorf("%d is %q, after %q", n, key, last)
		} else {
			last = key
		}
	}
	if bytes.Equal(keyID("a"), keyID("b")) {
		t.Error("the test's key IDs are the same")
	}
}
