package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"countersign.io/countersign/identity"
)

// in brings an authority of the kind into a state, with another that signs where it does not itself.
func in(t testing.TB, w *Writer, kind identity.AuthorityKind, state identity.AuthorityState) {
	t.Helper()
	ctx := t.Context()
	step := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	if state == identity.AuthorityPrepared {
		must[identity.Authority](t)(w.CreateAuthority(ctx, authority(kind, "other")))
		must[identity.Authority](t)(w.PrepareAuthority(ctx, now, prepared(kind, "it")))
		return
	}
	must[identity.Authority](t)(w.CreateAuthority(ctx, authority(kind, "it")))
	if state == identity.AuthorityActive {
		return
	}
	must[identity.Authority](t)(w.PrepareAuthority(ctx, now, prepared(kind, "other")))
	step(w.ActivateAuthority(ctx, now.Add(time.Minute), kind, "other", false))
	if state == identity.AuthorityTainted {
		step(w.TaintAuthority(ctx, now.Add(2*time.Minute), kind, "it", 7*time.Second, false))
	}
	if state == identity.AuthorityRevoked {
		step(w.RevokeAuthority(ctx, now.Add(3*time.Minute), kind, "it"))
	}
	if got := stateOf(w.store, string(kind)+"/it"); got != state {
		t.Fatalf("it is %s", got)
	}
}

func authorityAt(t testing.TB, s *Store, kind identity.AuthorityKind, id string) identity.Authority {
	t.Helper()
	for _, a := range s.Authorities() {
		if a.Kind == kind && a.ID == id {
			return a
		}
	}
	t.Fatalf("no %s authority %s", kind, id)
	return identity.Authority{}
}

// TestAuthorityTransitions takes every step from every state: what is not allowed changes nothing, and one of the kind signs
// at every moment.
func TestAuthorityTransitions(t *testing.T) {
	const refused = identity.AuthorityState("refused")
	const gone = identity.AuthorityState("")
	kinds := []identity.AuthorityKind{identity.AuthorityX509, identity.AuthorityJWT}
	later := now.Add(10 * time.Minute)
	steps := map[string]func(context.Context, *Writer, identity.AuthorityKind) error{
		"activate": func(ctx context.Context, w *Writer, k identity.AuthorityKind) error {
			return w.ActivateAuthority(ctx, later, k, "it", false)
		},
		"back": func(ctx context.Context, w *Writer, k identity.AuthorityKind) error {
			return w.ActivateAuthority(ctx, later, k, "it", true)
		},
		"taint": func(ctx context.Context, w *Writer, k identity.AuthorityKind) error {
			return w.TaintAuthority(ctx, later, k, "it", time.Second, false)
		},
		"revoke": func(ctx context.Context, w *Writer, k identity.AuthorityKind) error {
			return w.RevokeAuthority(ctx, later, k, "it")
		},
		"drop": func(ctx context.Context, w *Writer, k identity.AuthorityKind) error {
			return w.DropAuthority(ctx, later, k, "it")
		},
	}
	want := map[identity.AuthorityState]map[string]identity.AuthorityState{
		identity.AuthorityPrepared: {"activate": identity.AuthorityActive, "back": refused, "taint": refused, "revoke": refused, "drop": gone},
		identity.AuthorityActive:   {"activate": identity.AuthorityActive, "back": identity.AuthorityActive, "taint": refused, "revoke": refused, "drop": refused},
		identity.AuthorityRetiring: {"activate": refused, "back": identity.AuthorityActive, "taint": identity.AuthorityTainted, "revoke": identity.AuthorityRevoked, "drop": refused},
		identity.AuthorityTainted:  {"activate": refused, "back": identity.AuthorityActive, "taint": identity.AuthorityTainted, "revoke": identity.AuthorityRevoked, "drop": refused},
		identity.AuthorityRevoked:  {"activate": refused, "back": refused, "taint": refused, "revoke": identity.AuthorityRevoked, "drop": refused},
	}
	for from, row := range want {
		for name, to := range row {
			for _, kind := range kinds {
				t.Run(fmt.Sprint(kind, " ", from, " ", name), func(t *testing.T) {
					s, w, _ := newStore2(t)
					in(t, w, kind, from)
					before := s.Authorities()
					err := steps[name](t.Context(), w, kind)
					if to == refused {
						wantErr(t, err, identity.ErrPrecondition, "it")
					} else if err != nil || stateOf(s, string(kind)+"/it") != to {
						t.Errorf("%v, and it is %q", err, stateOf(s, string(kind)+"/it"))
					}
					if (to == from || to == refused) && !reflect.DeepEqual(before, s.Authorities()) {
						t.Errorf("%+v\nbecame %+v", before, s.Authorities())
					}
					n := 0
					for _, a := range s.Authorities() {
						if a.Kind == kind && a.State == identity.AuthorityActive {
							n++
						}
					}
					if n != 1 {
						t.Errorf("%d of the kind sign", n)
					}
					checkConsistent(t, s)
				})
			}
		}
	}
	s, w, _ := newStore2(t)
	for _, do := range steps {
		wantErr(t, do(t.Context(), w, identity.AuthorityX509), identity.ErrNotFound, "x509/it")
	}
	if len(s.Authorities()) != 0 {
		t.Errorf("%+v", s.Authorities())
	}
}

// TestAuthorityTimes: each state's time is that of whoever proposed it, a way back clears what is not so any more, and with
// the revocation the key is gone.
func TestAuthorityTimes(t *testing.T) {
	s, w, _ := newStore2(t)
	ctx, x := t.Context(), identity.AuthorityX509
	at := func(minutes int) time.Time { return now.Add(time.Duration(minutes) * time.Minute) }
	zone := time.FixedZone("elsewhere", 3600)
	must[identity.Authority](t)(w.CreateAuthority(ctx, authority(x, "old")))
	p := must[identity.Authority](t)(w.PrepareAuthority(ctx, at(1).In(zone), prepared(x, "new")))
	if !p.PreparedAt.Equal(at(1)) || p.Sequence != s.Bundle().Sequence || p.Sequence != 2 {
		t.Errorf("prepared at %v, in bundle %d; the bundle is %d", p.PreparedAt, p.Sequence, s.Bundle().Sequence)
	}
	step := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		checkConsistent(t, s)
	}
	step(w.ActivateAuthority(ctx, at(2), x, "new", false))
	step(w.TaintAuthority(ctx, at(3), x, "old", 5*time.Second, false))
	old, fresh := authorityAt(t, s, x, "old"), authorityAt(t, s, x, "new")
	if !fresh.ActivatedAt.Equal(at(2)) || !old.RetiredAt.Equal(at(2)) || !old.TaintedAt.Equal(at(3)) || old.Spread != 5*time.Second || !old.RevokedAt.IsZero() || old.SealedKey == nil {
		t.Errorf("old %+v\nnew %+v", old, fresh)
	}
	step(w.ActivateAuthority(ctx, at(4), x, "old", true))
	old, fresh = authorityAt(t, s, x, "old"), authorityAt(t, s, x, "new")
	if !old.TaintedAt.IsZero() || !old.RetiredAt.IsZero() || old.Spread != 0 || !old.ActivatedAt.Equal(at(4)) || !fresh.RetiredAt.Equal(at(4)) {
		t.Errorf("back: old %+v\nnew %+v", old, fresh)
	}
	if !slices.Equal(s.Bundle().Ending, []identity.Ending{{ID: "new"}}) {
		t.Errorf("ending: %+v", s.Bundle().Ending)
	}
	step(w.RevokeAuthority(ctx, at(5), x, "new"))
	fresh = authorityAt(t, s, x, "new")
	if !fresh.RevokedAt.Equal(at(5)) || fresh.SealedKey != nil || bytes.Contains(snapshotOf(t, s), []byte("sealed new")) {
		t.Errorf("revoked: %+v", fresh)
	}
	if len(s.Bundle().X509) != 1 || len(s.Bundle().Ending) != 0 {
		t.Errorf("the bundle has %d, and %+v", len(s.Bundle().X509), s.Bundle().Ending)
	}
}

// TestPreparedSequence: it is the first bundle's by which what the authority signs is verified, also where the bundle had it before.
func TestPreparedSequence(t *testing.T) {
	s, w, _ := newStore2(t)
	ctx, x := t.Context(), identity.AuthorityX509
	one, two := caCert(t, "root 1"), caCert(t, "root 2")
	below := func(id string, roots ...[]byte) identity.Authority {
		a := prepared(x, id)
		a.Upstream, a.Roots, a.Chain = "disk", roots, [][]byte{caCert(t, "intermediate")}
		return a
	}
	for _, c := range []struct {
		a            identity.Authority
		want, bundle uint64
	}{
		{prepared(x, "own"), 1, 1}, {below("a", one), 2, 2}, {below("b", one), 2, 2}, {below("c", two, one), 3, 3},
		{below("d", one, caCert(t, "root 3")), 3, 4}, // what it signs is verified by its first root
		{prepared(identity.AuthorityJWT, "j"), 5, 5},
	} {
		got, err := w.PrepareAuthority(ctx, now, c.a)
		if err != nil {
			t.Fatalf("%s: %v", c.a.ID, err)
		}
		if got.Sequence != c.want || s.Bundle().Sequence != c.bundle {
			t.Errorf("%s is in bundle %d on, and the bundle is %d; want %d, %d", c.a.ID, got.Sequence, s.Bundle().Sequence, c.want, c.bundle)
		}
	}
}

// TestEndingIsNotPublished: what signs no longer is told to agents, sorted, and whoever reads the published bundle sees no change.
func TestEndingIsNotPublished(t *testing.T) {
	s, w, _ := newStore2(t)
	ctx, x := t.Context(), identity.AuthorityX509
	for _, kind := range []identity.AuthorityKind{x, identity.AuthorityJWT} {
		must[identity.Authority](t)(w.CreateAuthority(ctx, authority(kind, "z-"+string(kind))))
		must[identity.Authority](t)(w.PrepareAuthority(ctx, now, prepared(kind, "a-"+string(kind))))
	}
	seq := s.Bundle().Sequence
	is := func(want ...identity.Ending) {
		t.Helper()
		if got := s.Bundle(); !slices.Equal(got.Ending, want) || got.Sequence != seq || len(got.X509) != 2 || len(got.JWT) != 2 {
			t.Fatalf("%+v", got)
		}
	}
	is()
	next, _ := startWatch(t, s)
	next()
	told := func() {
		t.Helper()
		if c := next(); len(c) != 1 || !c[0].Bundle {
			t.Fatalf("told %+v", c)
		}
	}
	do := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		told()
	}
	do(w.ActivateAuthority(ctx, now, x, "a-x509", false))
	is(identity.Ending{ID: "z-x509"})
	do(w.ActivateAuthority(ctx, now, identity.AuthorityJWT, "a-jwt", false))
	is(identity.Ending{ID: "z-jwt"}, identity.Ending{ID: "z-x509"})
	do(w.TaintAuthority(ctx, now, x, "z-x509", time.Second, false))
	is(identity.Ending{ID: "z-jwt"}, identity.Ending{ID: "z-x509", Tainted: true, Spread: time.Second})
	for _, spread := range []time.Duration{-1, maxSpread + 1} {
		wantErr(t, w.TaintAuthority(ctx, now, identity.AuthorityJWT, "z-jwt", spread, false), identity.ErrInvalid, "spread")
	}
	is(identity.Ending{ID: "z-jwt"}, identity.Ending{ID: "z-x509", Tainted: true, Spread: time.Second})
	do(w.RevokeAuthority(ctx, now, x, "z-x509"))
	if got := s.Bundle(); got.Sequence != seq+1 || len(got.X509) != 1 {
		t.Errorf("after the revocation: %+v", got)
	}
}

// TestSweepEnded: what signs no longer goes at its end, whatever it is; a revoked one takes nothing out of the bundle with it.
func TestSweepEnded(t *testing.T) {
	for _, state := range []identity.AuthorityState{identity.AuthorityPrepared, identity.AuthorityActive, identity.AuthorityRetiring, identity.AuthorityTainted, identity.AuthorityRevoked} {
		t.Run(string(state), func(t *testing.T) {
			s, w, l := newStore2(t)
			in(t, w, identity.AuthorityX509, state)
			seq, n := s.Bundle().Sequence, len(l.cmds)
			if err := w.Sweep(t.Context(), now.Add(time.Hour-1)); err != nil || stateOf(s, "x509/it") != state || len(l.cmds) != n {
				t.Fatalf("before its end: %v, %q, %d commands", err, stateOf(s, "x509/it"), len(l.cmds)-n)
			}
			if err := w.Sweep(t.Context(), now.Add(time.Hour)); err != nil {
				t.Fatal(err)
			}
			want, wantSeq := identity.AuthorityState(""), seq
			switch state {
			case identity.AuthorityPrepared, identity.AuthorityActive:
				want = state
			case identity.AuthorityRetiring, identity.AuthorityTainted:
				wantSeq++
			}
			if got := stateOf(s, "x509/it"); got != want || s.Bundle().Sequence != wantSeq {
				t.Errorf("%q, sequence %d; want %q, %d", got, s.Bundle().Sequence, want, wantSeq)
			}
			checkConsistent(t, s)
		})
	}
}

func rotationOf(kind identity.AuthorityKind, phase identity.RotationPhase) identity.Rotation {
	r := identity.Rotation{Kind: kind, Phase: phase, Why: "by a test", StartedAt: now, PhaseAt: now}
	if phase != identity.RotationPrepare {
		r.New, r.Old = "new", "old"
	}
	return r
}

// TestPutRotation: of two that begin or move one at once, one does.
func TestPutRotation(t *testing.T) {
	s, w, _ := newStore2(t)
	ctx, x := t.Context(), identity.AuthorityX509
	next, _ := startWatch(t, s)
	next()
	begun := must[identity.Rotation](t)(w.PutRotation(ctx, now, rotationOf(x, identity.RotationPrepare), 0))
	if begun.Revision == 0 || begun.Revision != s.Revision() {
		t.Errorf("revision %d of %d", begun.Revision, s.Revision())
	}
	if c := next(); len(c) != 1 || !c[0].Rotation || c[0].Bundle {
		t.Errorf("told %+v", c)
	}
	_, err := w.PutRotation(ctx, now, rotationOf(x, identity.RotationPrepare), 0)
	wantErr(t, err, identity.ErrPrecondition, "under way", "roll it back")
	must[identity.Rotation](t)(w.PutRotation(ctx, now, rotationOf(identity.AuthorityJWT, identity.RotationPrepare), 0)) // the other kind's
	moved := must[identity.Rotation](t)(w.PutRotation(ctx, now, rotationOf(x, identity.RotationActivate), begun.Revision))
	for _, stale := range []uint64{begun.Revision, moved.Revision + 1} {
		_, err = w.PutRotation(ctx, now, rotationOf(x, identity.RotationRevoke), stale)
		wantErr(t, err, identity.ErrPrecondition, "moved on")
	}
	if got := s.Rotations(); len(got) != 2 || !reflect.DeepEqual(got[1], moved) || got[0].Kind != identity.AuthorityJWT {
		t.Errorf("%+v", got)
	}
	for _, end := range []identity.RotationPhase{identity.RotationDone, identity.RotationRolledBack} {
		ended := must[identity.Rotation](t)(w.PutRotation(ctx, now, rotationOf(x, end), moved.Revision))
		moved = must[identity.Rotation](t)(w.PutRotation(ctx, now, rotationOf(x, identity.RotationPrepare), 0)) // after the end, another one
		if moved.Revision <= ended.Revision {
			t.Error("the same revision again")
		}
	}
	_, err = w.PutRotation(ctx, now, rotationOf("", identity.RotationPrepare), 7) // none of the kind
	wantErr(t, err, identity.ErrInvalid, "kind")
	checkConsistent(t, s)

	// A snapshot has them.
	o := openAt(t, filepath.Join(t.TempDir(), "other"))
	if err := o.Restore(bytes.NewReader(snapshotOf(t, s))); err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(o.Rotations(), s.Rotations()) || !bytes.Equal(snapshotOf(t, o), snapshotOf(t, s)) {
		t.Errorf("restored %+v\nof %+v", o.Rotations(), s.Rotations())
	}
}

// A write that did not happen leaves the rotation as it was, and can be repeated.
func TestPutRotationFails(t *testing.T) {
	s, w, l := newStore2(t)
	x := identity.AuthorityX509
	begun := must[identity.Rotation](t)(w.PutRotation(t.Context(), now, rotationOf(x, identity.RotationPrepare), 0))
	l.err = fmt.Errorf("%w: no leader", identity.ErrUnavailable)
	if _, err := w.PutRotation(t.Context(), now, rotationOf(x, identity.RotationActivate), begun.Revision); !errors.Is(err, identity.ErrUnavailable) {
		t.Errorf("%v", err)
	}
	if got := s.Rotations()[0]; got.Phase != identity.RotationPrepare || got.Revision != begun.Revision {
		t.Errorf("%+v", got)
	}
	l.err = nil
	must[identity.Rotation](t)(w.PutRotation(t.Context(), now, rotationOf(x, identity.RotationActivate), begun.Revision))
}

func TestRotationCheck(t *testing.T) {
	_, w, l := newStore2(t)
	n := len(l.cmds)
	names := func(n int) (out []string) {
		for i := range n {
			out = append(out, fmt.Sprintf("%06d", i))
		}
		return out
	}
	for want, change := range map[string]func(*identity.Rotation){
		"want a kind":          func(r *identity.Rotation) { r.Kind = "wit" },
		"unknown phase":        func(r *identity.Rotation) { r.Phase = "limbo" },
		"without a new":        func(r *identity.Rotation) { r.Phase = identity.RotationActivate },
		"deadline is negative": func(r *identity.Rotation) { r.AckDeadline = -1 },
		"is negative":          func(r *identity.Rotation) { r.UseDeadline = -1 },
		"names to ignore":      func(r *identity.Rotation) { r.Ignore = names(identity.MaxIgnored + 1) },
		"sorted":               func(r *identity.Rotation) { r.Ignore = []string{"b", "a"} },
		"bytes of why":         func(r *identity.Rotation) { r.Why = strings.Repeat("x", 4097) },
	} {
		r := rotationOf(identity.AuthorityX509, identity.RotationPrepare)
		change(&r)
		_, err := w.PutRotation(t.Context(), now, r, 0)
		wantErr(t, err, identity.ErrInvalid, want)
	}
	if len(l.cmds) != n {
		t.Error("nonsense was proposed")
	}
	r := rotationOf(identity.AuthorityX509, identity.RotationPrepare)
	r.Ignore, r.Why = names(identity.MaxIgnored), strings.Repeat("x", 4096)
	must[identity.Rotation](t)(w.PutRotation(t.Context(), now, r, 0))
}

// Nothing of it before every member knows it: an older one would stop.
func TestRotationBelowLevel2(t *testing.T) {
	s, w, l := newStore(t)
	ctx, x := t.Context(), identity.AuthorityX509
	must[identity.Authority](t)(w.CreateAuthority(ctx, authority(x, "one")))
	n := len(l.cmds)
	_, err := w.PutRotation(ctx, now, rotationOf(x, identity.RotationPrepare), 0)
	wantErr(t, err, identity.ErrPrecondition, "put_rotation")
	wantErr(t, w.TaintAuthority(ctx, now, x, "one", 0, false), identity.ErrPrecondition, "taint_authority")
	wantErr(t, w.RevokeAuthority(ctx, now, x, "one"), identity.ErrPrecondition, "revoke_authority")
	if len(l.cmds) != n {
		t.Error("it was proposed")
	}
	for _, cmd := range []any{taintData{x, "one", 0, false}, authorityData{x, "one"}, putRotationData{Rotation: rotationOf(x, identity.RotationPrepare)}} {
		typ := map[string]string{"store.taintData": taintAuthority, "store.authorityData": revokeAuthority, "store.putRotationData": putRotation}[fmt.Sprintf("%T", cmd)]
		if _, err := propose[identity.Authority](ctx, w, typ, now, cmd); !errors.Is(err, identity.ErrPrecondition) {
			t.Errorf("%s at level 1: %v", typ, err)
		}
	}
	if len(s.Bundle().Ending) != 0 || len(s.Rotations()) != 0 || stateOf(s, "x509/one") != identity.AuthorityActive {
		t.Error("it was applied")
	}
}

// The bundle of level 1 says nothing that level 1 did not: what is ending is not in it, though the records are there.
func TestNoEndingAtLevel1(t *testing.T) {
	a, b := authority(identity.AuthorityX509, "a"), authority(identity.AuthorityX509, "b")
	b.State = identity.AuthorityRetiring
	if got := makeBundle(td, 1, []*identity.Authority{&a, &b}, nil); len(got.Ending) != 0 || len(got.X509) != 2 {
		t.Errorf("%+v", got)
	}
	if got := makeBundle(td, level2, []*identity.Authority{&a, &b}, nil); len(got.Ending) != 1 {
		t.Errorf("%+v", got)
	}
}
