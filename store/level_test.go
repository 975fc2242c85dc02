package store

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"countersign.io/countersign/identity"
	"countersign.io/countersign/raft"
)

// newStore2 is a store of a cluster at level 2; index 1 is what raised it.
func newStore2(t testing.TB) (*Store, *Writer, *directLog) {
	t.Helper()
	s, w, l := newStore(t)
	if err := w.SetLevel(t.Context(), 2); err != nil {
		t.Fatal(err)
	}
	return s, w, l
}

func downstreamEntry(id, path string) identity.Entry {
	e := entryFor(id, path, "k8s:ns:"+id)
	e.Downstream = true
	return e
}

func TestSetLevel(t *testing.T) {
	s, w, l := newStore(t)
	ctx := t.Context()
	if s.Level() != 1 {
		t.Fatalf("a new cluster has level %d", s.Level())
	}
	for _, bad := range []uint32{0, Level + 1} {
		wantErr(t, w.SetLevel(ctx, bad), identity.ErrInvalid, "1 to 2")
	}
	if err := w.SetLevel(ctx, 1); err != nil || len(l.cmds) != 0 {
		t.Fatalf("%v, %d commands for the level that it has", err, len(l.cmds))
	}
	must[identity.Authority](t)(w.CreateAuthority(ctx, authority(identity.AuthorityX509, "x1")))
	next, _ := startWatch(t, s)
	next() // the reset
	if err := w.SetLevel(ctx, 2); err != nil || s.Level() != 2 {
		t.Fatalf("level %d, %v", s.Level(), err)
	}
	if told := next(); len(told) != 1 || !told[0].Level || told[0].Bundle || told[0].Revision != 2 {
		t.Errorf("told %+v", told)
	}
	if b := s.Bundle(); b.Sequence != 1 {
		t.Errorf("the bundle's sequence is %d, and nothing of it changed", b.Sequence)
	}
	if err := w.SetLevel(ctx, 2); err != nil || len(l.cmds) != 2 {
		t.Errorf("again: %v, %d commands", err, len(l.cmds))
	}
	wantErr(t, w.SetLevel(ctx, 1), identity.ErrPrecondition, "never goes down")
	checkConsistent(t, s)

	dir := s.dir
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if s = openAt(t, dir); s.Level() != 2 {
		t.Errorf("level %d after a restart", s.Level())
	}
	again := openAt(t, stateDir(t))
	if err := again.Restore(bytes.NewReader(snapshotOf(t, s))); err != nil || again.Level() != 2 {
		t.Errorf("level %d after a restore, %v", again.Level(), err)
	}
}

// What level 1 does not know is not proposed to it; proposed all the same, it is refused, and changes nothing.
func TestBelowLevel2(t *testing.T) {
	s, w, l := newStore(t)
	ctx := t.Context()
	below := authority(identity.AuthorityX509, "x1")
	below.Roots, below.Upstream = [][]byte{caCert(t, "root")}, "disk"
	elsewhere := authority(identity.AuthorityJWT, "j1")
	elsewhere.SealedKey, elsewhere.KeyURI = nil, "pkcs11:object=x"
	prepared := authority(identity.AuthorityJWT, "j2")
	prepared.State = identity.AuthorityPrepared
	errOf := func(_ any, err error) error { return err }
	for name, err := range map[string]error{
		"create downstream": errOf(w.CreateEntry(ctx, now, downstreamEntry("d", "/d"))),
		"update downstream": errOf(w.UpdateEntry(ctx, now, downstreamEntry("d", "/d"), 0)),
		"below an upstream": errOf(w.CreateAuthority(ctx, below)),
		"key elsewhere":     errOf(w.CreateAuthority(ctx, elsewhere)),
		"admit":             errOf(w.AdmitAgent(ctx, now, hashOf("t"), agent("a"))),
		"put term":          w.PutSealTerm(ctx, now, 1, hashOf("k")[:16]),
		"ack term":          w.AckSealTerm(ctx, 1, "m"),
		"activate term":     w.ActivateSealTerm(ctx, 1),
		"drop term":         w.DropSealTerm(ctx, 1),
		"reseal":            w.ResealAuthority(ctx, identity.AuthorityX509, "x1", []byte("x"), 0),
		"prepare":           errOf(w.PrepareAuthority(ctx, now, prepared)),
		"activate":          w.ActivateAuthority(ctx, now, identity.AuthorityX509, "x1", false),
		"drop":              w.DropAuthority(ctx, now, identity.AuthorityX509, "x1"),
		"foreign":           w.PutForeign(ctx, identity.Foreign{Source: identity.SourceUpstream}),
		"federation":        errOf(w.PutFederation(ctx, now, partnerFederation("partner.org"), false, 0)),
		"delete federation": w.DeleteFederation(ctx, "partner.org"),
		"federated bundle":  w.PutFederatedBundle(ctx, now, "partner.org", 0, identity.FederatedBundle{}),
	} {
		t.Run(name, func(t *testing.T) {
			wantErr(t, err, identity.ErrPrecondition, "until every member runs this version", "countersign cluster status")
		})
	}
	if len(l.cmds) != 0 {
		t.Fatalf("proposed %d commands", len(l.cmds))
	}

	must[identity.Entry](t)(w.CreateEntry(ctx, now, entryFor("d", "/d", "k8s:ns:d")))
	before := snapshotOf(t, s)
	for typ, data := range map[string]any{
		createEntry: downstreamEntry("e", "/e"), updateEntry: updateEntryData{Entry: downstreamEntry("d", "/d")}, createAuthority: below,
		admitAgent: admitAgentData{Hash: hashOf("t"), Agent: agent("a")}, putSealTerm: putSealTermData{Number: 1, KeyID: hashOf("k")[:16]},
		ackSealTerm: ackSealTermData{Number: 1}, activateSealTerm: sealTermData{1}, dropSealTerm: sealTermData{1},
		resealAuthority: resealData{}, prepareAuthority: prepared, activateAuthority: authorityData{}, dropAuthority: authorityData{},
		putForeign: identity.Foreign{Source: "upstream", JWT: []identity.JWTKey{{ID: "k"}}}, putFederation: putFederationData{Federation: partnerFederation("partner.org")},
		deleteFederation: keyData{"partner.org"}, putFederatedBundle: putFederatedBundleData{TrustDomain: "partner.org"},
	} {
		cmd, err := encodeCommand(typ, now, data)
		if err != nil {
			t.Fatal(err)
		}
		res, err := l.Propose(ctx, cmd)
		if err != nil {
			t.Fatalf("%s stopped the store: %v", typ, err)
		}
		wantErr(t, decodeResult(res, nil), identity.ErrPrecondition, "level")
	}
	after := snapshotOf(t, s)
	if at := snapshotHeaderBytes; !bytes.Equal(before[at:len(before)-32], after[at:len(after)-32]) {
		t.Error("something changed")
	}
	checkConsistent(t, s)
}

// A level that this version does not know stops it, as a command does that it does not know.
func TestHigherLevelStops(t *testing.T) {
	s, _, l := newStore2(t)
	cmd, err := encodeCommand(setLevel, now, setLevelData{Level + 1})
	if err != nil {
		t.Fatal(err)
	}
	if err := Check(cmd); !errors.Is(err, errUnknownCommand) || !strings.Contains(err.Error(), "level 3") {
		t.Errorf("Check says %v", err)
	}
	if _, err := l.Propose(t.Context(), cmd); err == nil || !errors.Is(s.Err(), errUnknownCommand) || !strings.Contains(s.Err().Error(), "upgrade") {
		t.Errorf("%v; the store says %v", err, s.Err())
	}
	fresh := openAt(t, stateDir(t))
	wantErr(t, fresh.Restore(bytes.NewReader(writeSnapshot(record{kindCluster, clusterKey, `{"level":3}`}))), identity.ErrInvalid, "level 3", "up to 2", "upgrade")
	if fresh.Level() != 1 {
		t.Error("it took the level over")
	}
}

// A snapshot cannot have what its level does not have: the next write would go to members that stop at it.
func TestSnapshotNeedsItsLevel(t *testing.T) {
	entry := record{kindEntry, "a", `{"created":1,"id":"a","selectors":["k8s:ns:x"],"spiffe_id":"spiffe://example.org/a","downstream":true}`}
	term := record{kindSealTerm, "0000000001", `{"number":1,"key_id":"AAAAAAAAAAAAAAAAAAAAAA==","state":"active","created_at":"2026-01-01T00:00:00Z"}`}
	foreign := record{kindForeign, "upstream", `{"source":"upstream"}`}
	federation := record{kindFederation, "partner.org", `{"trust_domain":"partner.org","url":"https://partner.org","profile":"https_web"}`}
	authority := record{kindAuthority, "jwt/a", `{"id":"a","kind":"jwt","state":"active","public_key":"","sealed_key":null,"not_before":"2026-01-01T00:00:00Z","not_after":"2026-01-01T00:00:00Z","key_uri":"x"}`}
	level := record{kindCluster, clusterKey, `{"level":2}`}
	for i, r := range []record{entry, authority, term, foreign, federation} {
		s := openAt(t, stateDir(t))
		wantErr(t, s.Restore(bytes.NewReader(writeSnapshot(r))), identity.ErrInvalid, "level 1", "level 2 brought")
		both := []record{r, level}
		if r.kind > kindCluster {
			both = []record{level, r}
		}
		if err := s.Restore(bytes.NewReader(writeSnapshot(both...))); err != nil {
			t.Errorf("record %d: %v", i, err)
		}
		checkConsistent(t, s)
	}
	for name, bad := range map[string]record{
		"level 1 has no record": {kindCluster, clusterKey, `{"level":1}`},
		"another key":           {kindCluster, "x", `{"level":2}`},
		"term's key":            {kindSealTerm, "1", term.value},
		"term's key ID":         {kindSealTerm, "0000000001", `{"number":1,"key_id":"AAAA","state":"active","created_at":"2026-01-01T00:00:00Z"}`},
		"source":                {kindForeign, "downstream", foreign.value},
		"federation's key":      {kindFederation, "other.org", federation.value},
		"federation's name":     {kindFederation, "Partner/Org", strings.ReplaceAll(federation.value, "partner.org", "Partner/Org")},
	} {
		records := []record{level, bad}
		if bad.kind == kindCluster {
			records = records[1:]
		}
		if err := openAt(t, stateDir(t)).Restore(bytes.NewReader(writeSnapshot(records...))); !errors.Is(err, identity.ErrInvalid) {
			t.Errorf("%s: got %v", name, err)
		}
	}
}

// Check takes what Apply takes, whatever Apply then says to it, and nothing else.
func TestCheck(t *testing.T) {
	for _, e := range randomCommands(rand.New(rand.NewPCG(7, 1)), 300) {
		if err := Check(e.Data); err != nil {
			t.Errorf("%q: %v", e.Data, err)
		}
	}
	for name, raw := range map[string]string{
		"nothing": "", "version": "\x02" + `{"type":"sweep","data":{"limit":1}}`, "type": "\x01" + `{"type":"conquer","data":{}}`, "field": "\x01" + `{"type":"sweep","data":{"most":1}}`,
		"no data": "\x01" + `{"type":"sweep"}`, "huge": "\x01" + `{"type":"sweep","data":{"limit":1}}` + strings.Repeat(" ", maxCommandBytes),
	} {
		if err := Check([]byte(raw)); !errors.Is(err, errUnknownCommand) || !strings.Contains(err.Error(), "upgrade") {
			t.Errorf("%s: got %v", name, err)
		}
	}
}

// A leader of an older version refuses what it does not understand, before it is in the log.
func TestRefusedByLeader(t *testing.T) {
	_, w, l := newStore2(t)
	l.err = fmt.Errorf("%w: a command that it does not know", raft.ErrRefused)
	wantErr(t, w.DropSealTerm(t.Context(), 1), identity.ErrPrecondition, "does not know")
	l.err = raft.ErrNoLeader
	wantErr(t, w.DropSealTerm(t.Context(), 1), identity.ErrUnavailable)
}

func TestDownstream(t *testing.T) {
	s, w, _ := newStore2(t)
	ctx := t.Context()
	is := func(id, want string) {
		t.Helper()
		e, ok := s.Downstream("spiffe://example.org" + id)
		if ok != (want != "") || ok && e.ID != want {
			t.Errorf("%s: %+v, want entry %q", id, e, want)
		}
	}
	must[identity.Entry](t)(w.CreateEntry(ctx, now, entryFor("plain", "/plain", "k8s:ns:plain")))
	first := downstreamEntry("one", "/ca")
	first.ExpiresAt = now.Add(1e12)
	must[identity.Entry](t)(w.CreateEntry(ctx, now, first))
	is("/plain", "")
	is("/ca", "one")
	is("/ca/x", "")
	second := downstreamEntry("two", "/ca")
	must[identity.Entry](t)(w.CreateEntry(ctx, now, second))
	is("/ca", "two") // lasts longer
	checkConsistent(t, s)
	second.ExpiresAt = now.Add(1e11)
	must[identity.Entry](t)(w.UpdateEntry(ctx, now, second, 0))
	is("/ca", "one")
	first.Downstream = false
	must[identity.Entry](t)(w.UpdateEntry(ctx, now, first, 0))
	is("/ca", "two")
	if err := w.DeleteEntry(ctx, "two"); err != nil {
		t.Fatal(err)
	}
	is("/ca", "")
	checkConsistent(t, s)
	everybody := downstreamEntry("all", "/{k8s:ns}")
	_, err := w.CreateEntry(ctx, now, everybody)
	wantErr(t, err, identity.ErrInvalid, "placeholders")
	raw, err := json.Marshal(entryFor("x", "/x", "k8s:ns:x"))
	if err != nil || bytes.Contains(raw, []byte("downstream")) {
		t.Errorf("an entry that is not downstream says so: %s, %v", raw, err)
	}
}

func TestAdminEntries(t *testing.T) {
	s, w, _ := newStore2(t)
	ctx := t.Context()
	are := func(id string, want ...string) {
		t.Helper()
		var got []string
		for _, e := range s.AdminEntries("spiffe://example.org" + id) {
			got = append(got, e.ID+"="+string(e.Power()))
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s: %q, want %q", id, got, want)
		}
	}
	admin := func(id, path string, role identity.AdminRole) identity.Entry {
		e := entryFor(id, path, "k8s:ns:"+id)
		e.AdminRole = role
		return e
	}
	must[identity.Entry](t)(w.CreateEntry(ctx, now, entryFor("plain", "/ops", "k8s:ns:plain")))
	are("/ops")
	must[identity.Entry](t)(w.CreateEntry(ctx, now, admin("one", "/ops", identity.AdminReader)))
	old := entryFor("two", "/ops", "k8s:ns:two")
	old.Admin = true
	must[identity.Entry](t)(w.CreateEntry(ctx, now, old))
	are("/ops", "one=reader", "two=security")
	are("/ops/x")
	checkConsistent(t, s)
	must[identity.Entry](t)(w.UpdateEntry(ctx, now, admin("one", "/ops", identity.AdminOperator), 0))
	are("/ops", "two=security", "one=operator")
	must[identity.Entry](t)(w.UpdateEntry(ctx, now, admin("one", "/other", identity.AdminOperator), 0))
	are("/ops", "two=security")
	are("/other", "one=operator")
	old.Admin = false
	must[identity.Entry](t)(w.UpdateEntry(ctx, now, old, 0))
	if err := w.DeleteEntry(ctx, "one"); err != nil {
		t.Fatal(err)
	}
	are("/ops")
	are("/other")
	checkConsistent(t, s)
	// Since when is the state's to say, from the command's time.
	late := admin("late", "/late", identity.AdminReader)
	late.PowerSince = now.Add(-time.Hour)
	if e := must[identity.Entry](t)(w.CreateEntry(ctx, now, late)); !e.PowerSince.Equal(now) {
		t.Errorf("its power is since %v", e.PowerSince)
	}
	late.AdminRole = identity.AdminSecurity
	if e := must[identity.Entry](t)(w.UpdateEntry(ctx, now.Add(time.Minute), late, 0)); !e.PowerSince.Equal(now.Add(time.Minute)) {
		t.Errorf("its power is since %v", e.PowerSince)
	}
	late.Hint = "x"
	if e := must[identity.Entry](t)(w.UpdateEntry(ctx, now.Add(time.Hour), late, 0)); !e.PowerSince.Equal(now.Add(time.Minute)) {
		t.Errorf("its power is since %v", e.PowerSince)
	}
	late.AdminRole = ""
	if e := must[identity.Entry](t)(w.UpdateEntry(ctx, now.Add(time.Hour), late, 0)); !e.PowerSince.IsZero() {
		t.Errorf("its power is since %v", e.PowerSince)
	}
	checkConsistent(t, s)
	_, err := w.CreateEntry(ctx, now, admin("all", "/{k8s:ns}", identity.AdminReader))
	wantErr(t, err, identity.ErrInvalid, "placeholders")
	raw, err := json.Marshal(entryFor("x", "/x", "k8s:ns:x"))
	if err != nil || bytes.Contains(raw, []byte("admin")) {
		t.Errorf("an entry without power speaks of it: %s, %v", raw, err)
	}
}

// A role is of level 2: a member of the version before would take the entry for one without any power, and lose the role.
func TestAdminRolesWaitForTheLevel(t *testing.T) {
	_, w, _ := newStore(t)
	e := entryFor("one", "/ops", "k8s:ns:ops")
	e.AdminRole = identity.AdminReader
	_, err := w.CreateEntry(t.Context(), now, e)
	wantErr(t, err, identity.ErrPrecondition, "an admin's role")
	e.Admin, e.AdminRole = true, ""
	if e = must[identity.Entry](t)(w.CreateEntry(t.Context(), now, e)); !e.PowerSince.IsZero() {
		t.Errorf("what older members do not keep is there: %v", e.PowerSince)
	}
}
