package store

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"fmt"
	"math/big"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"countersign.io/countersign/identity"
)

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func pkixOf(t testing.TB, pub any) []byte {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func publicKey(t testing.TB) []byte { return pkixOf(t, &newKey(t).PublicKey) }

func cert(t testing.TB, name string, ca bool, usage x509.KeyUsage) []byte {
	t.Helper()
	key := newKey(t)
	c := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotBefore: now, NotAfter: now.Add(time.Hour),
		IsCA: ca, BasicConstraintsValid: true, KeyUsage: usage}
	der, err := x509.CreateCertificate(rand.Reader, c, c, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func caCert(t testing.TB, name string) []byte { return cert(t, name, true, x509.KeyUsageCertSign) }

func prepared(kind identity.AuthorityKind, id string) identity.Authority {
	a := authority(kind, id)
	a.State = identity.AuthorityPrepared
	return a
}

// stateOf is by kind/ID.
func stateOf(s *Store, key string) identity.AuthorityState {
	for _, a := range s.Authorities() {
		if authorityKey(&a) == key {
			return a.State
		}
	}
	return ""
}

func TestAuthorityLife(t *testing.T) {
	s, w, _ := newStore2(t)
	ctx := t.Context()
	x := identity.AuthorityX509
	are := func(sequence uint64, want string) {
		t.Helper()
		got := fmt.Sprint(stateOf(s, "x509/one"), " ", stateOf(s, "x509/two"))
		if got != want || s.Bundle().Sequence != sequence {
			t.Fatalf("%s, sequence %d; want %s, %d", got, s.Bundle().Sequence, want, sequence)
		}
		checkConsistent(t, s)
	}
	must[identity.Authority](t)(w.CreateAuthority(ctx, authority(x, "one")))
	are(1, "active ")
	_, err := w.PrepareAuthority(ctx, now, authority(x, "two"))
	wantErr(t, err, identity.ErrInvalid, "prepared")
	must[identity.Authority](t)(w.PrepareAuthority(ctx, now, prepared(x, "two")))
	are(2, "active prepared")
	_, err = w.PrepareAuthority(ctx, now, prepared(x, "two"))
	wantErr(t, err, identity.ErrExists, "x509/two")
	must[identity.Authority](t)(w.PrepareAuthority(ctx, now, prepared(identity.AuthorityJWT, "two"))) // another kind
	are(3, "active prepared")
	wantErr(t, w.ActivateAuthority(ctx, now, x, "three", false), identity.ErrNotFound, "x509/three")
	wantErr(t, w.DropAuthority(ctx, now, x, "one"), identity.ErrPrecondition, "active until 2026-03-01T13:00:00Z")

	next, _ := startWatch(t, s)
	next() // the reset
	if err := w.ActivateAuthority(ctx, now, x, "two", false); err != nil {
		t.Fatal(err)
	}
	are(3, "retiring active") // the bundle had both
	if told := next(); len(told) != 1 || !told[0].Bundle {
		t.Errorf("told %+v", told)
	}
	if err := w.ActivateAuthority(ctx, now, x, "two", false); err != nil {
		t.Fatal(err)
	}
	wantErr(t, w.ActivateAuthority(ctx, now, x, "one", false), identity.ErrPrecondition, "retiring")
	if stateOf(s, "jwt/two") != identity.AuthorityPrepared {
		t.Error("the other kind's went along")
	}
	wantErr(t, w.DropAuthority(ctx, now.Add(time.Hour-1), x, "one"), identity.ErrPrecondition, "retiring")
	if err := w.DropAuthority(ctx, now.Add(time.Hour), x, "one"); err != nil {
		t.Fatal(err)
	}
	are(4, " active")
	wantErr(t, w.DropAuthority(ctx, now, x, "one"), identity.ErrNotFound)
	if err := w.DropAuthority(ctx, now, identity.AuthorityJWT, "two"); err != nil { // only prepared
		t.Fatal(err)
	}
	are(5, " active")
}

func TestResealAuthority(t *testing.T) {
	s, w, _ := newStore2(t)
	ctx := t.Context()
	a := must[identity.Authority](t)(w.CreateAuthority(ctx, authority(identity.AuthorityX509, "one")))
	reseal := func(id, key string, revision uint64) error {
		return w.ResealAuthority(ctx, identity.AuthorityX509, id, []byte(key), revision)
	}
	wantErr(t, reseal("two", "x", 0), identity.ErrNotFound, "x509/two")
	wantErr(t, reseal("one", "x", a.Revision+1), identity.ErrPrecondition, "somebody changed it")
	wantErr(t, reseal("one", "", 0), identity.ErrPrecondition, "no sealed key")
	if err := reseal("one", "again", a.Revision); err != nil {
		t.Fatal(err)
	}
	wantErr(t, reseal("one", "late", a.Revision), identity.ErrPrecondition)
	got := s.Authorities()[0]
	want := a
	want.SealedKey, want.Revision = []byte("again"), got.Revision
	if !reflect.DeepEqual(got, want) || got.Revision == a.Revision || s.Bundle().Sequence != 1 {
		t.Errorf("%+v", got)
	}
	if err := reseal("one", "again", 0); err != nil || s.Authorities()[0].Revision != got.Revision {
		t.Errorf("the same again: %v", err)
	}
	elsewhere := prepared(identity.AuthorityX509, "hsm")
	elsewhere.SealedKey, elsewhere.KeyURI = nil, "pkcs11:object=x"
	must[identity.Authority](t)(w.PrepareAuthority(ctx, now, elsewhere))
	wantErr(t, reseal("hsm", "a copy", 0), identity.ErrPrecondition, "not sealed here")
	checkConsistent(t, s)
}

// An authority below an upstream is in the bundle by the upstream's roots, which are there once.
func TestBundleBelowUpstream(t *testing.T) {
	s, w, _ := newStore2(t)
	ctx := t.Context()
	roots := [][]byte{caCert(t, "root 1"), caCert(t, "root 2")}
	below := func(id string, roots ...[]byte) identity.Authority {
		a := prepared(identity.AuthorityX509, id)
		a.Chain, a.Roots, a.Upstream = [][]byte{caCert(t, "intermediate")}, roots, "disk"
		return a
	}
	is := func(sequence uint64, want ...[]byte) {
		t.Helper()
		slices.SortFunc(want, bytes.Compare)
		if b := s.Bundle(); !reflect.DeepEqual(b.X509, want) || b.Sequence != sequence {
			t.Fatalf("sequence %d with %d roots, want %d with %d", b.Sequence, len(b.X509), sequence, len(want))
		}
		checkConsistent(t, s)
	}
	own := must[identity.Authority](t)(w.CreateAuthority(ctx, authority(identity.AuthorityX509, "own")))
	is(1, own.Cert)
	must[identity.Authority](t)(w.PrepareAuthority(ctx, now, below("a", roots[0])))
	is(2, own.Cert, roots[0])
	must[identity.Authority](t)(w.PrepareAuthority(ctx, now, below("b", roots[0]))) // says nothing new
	is(2, own.Cert, roots[0])
	must[identity.Authority](t)(w.PrepareAuthority(ctx, now, below("c", roots[1], roots[0])))
	is(3, own.Cert, roots[0], roots[1])
	if err := w.DropAuthority(ctx, now, identity.AuthorityX509, "a"); err != nil {
		t.Fatal(err)
	}
	is(3, own.Cert, roots[0], roots[1])
	if err := w.PutForeign(ctx, identity.Foreign{Source: identity.SourceUpstream, X509: [][]byte{roots[1], caCert(t, "x"), roots[1]}}); err != nil {
		t.Fatal(err)
	}
	if f := s.Foreign(); len(f) != 1 || len(f[0].X509) != 2 {
		t.Fatalf("foreign %+v", f)
	}
	for name, c := range map[string]func(*identity.Authority){
		"a leaf among the roots":   func(a *identity.Authority) { a.Roots = [][]byte{cert(t, "leaf", false, 0)} },
		"no certificate":           func(a *identity.Authority) { a.Chain = [][]byte{[]byte("garbage")} },
		"a CA that may not sign":   func(a *identity.Authority) { a.Roots = [][]byte{cert(t, "x", true, x509.KeyUsageCRLSign)} },
		"roots without a name":     func(a *identity.Authority) { a.Upstream = "" },
		"a name without roots":     func(a *identity.Authority) { a.Roots, a.Chain = nil, nil },
		"too long a chain":         func(a *identity.Authority) { a.Chain = slices.Repeat(roots[:1], maxCerts+1) },
		"too large":                func(a *identity.Authority) { a.Chain = [][]byte{make([]byte, maxCertBytes+1)} },
		"a sealed key and a URI":   func(a *identity.Authority) { a.KeyURI = "pkcs11:object=x" },
		"neither":                  func(a *identity.Authority) { a.SealedKey = nil },
		"a PIN":                    func(a *identity.Authority) { a.SealedKey, a.KeyURI = nil, "pkcs11:object=x?PIN-value=1234" },
		"a long URI":               func(a *identity.Authority) { a.SealedKey, a.KeyURI = nil, string(make([]byte, maxURIBytes+1)) },
		"a JWT key below upstream": func(a *identity.Authority) { a.Kind = identity.AuthorityJWT },
	} {
		a := below("bad", roots[0])
		c(&a)
		_, err := w.PrepareAuthority(ctx, now, a)
		if err == nil {
			t.Fatalf("%s was taken", name)
		}
		if wantErr(t, err, identity.ErrInvalid); strings.Contains(err.Error(), "1234") {
			t.Errorf("the error has the PIN: %v", err)
		}
	}
}

func TestForeign(t *testing.T) {
	s, w, _ := newStore2(t)
	ctx := t.Context()
	own := authority(identity.AuthorityJWT, "own")
	own.PublicKey = publicKey(t)
	must[identity.Authority](t)(w.CreateAuthority(ctx, own))
	later := now.Add(time.Hour)
	key := func(id string) identity.JWTKey {
		return identity.JWTKey{ID: id, PublicKey: publicKey(t), NotAfter: later.In(time.FixedZone("", 3600))}
	}
	from := func(source string, keys ...identity.JWTKey) identity.Foreign {
		return identity.Foreign{Source: source, JWT: keys}
	}
	const one, two = "spiffe://example.org/ca/one", "spiffe://example.org/ca/two"
	ok := func(sequence uint64, jwt int, err error) {
		t.Helper()
		if b := s.Bundle(); err != nil || b.Sequence != sequence || len(b.JWT) != jwt {
			t.Fatalf("%v; sequence %d with %d keys, want %d with %d", err, b.Sequence, len(b.JWT), sequence, jwt)
		}
		checkConsistent(t, s)
	}
	a, b := key("a"), key("b")
	ok(2, 3, w.PutForeign(ctx, from(one, b, a)))
	if f := s.Foreign(); len(f) != 1 || f[0].JWT[0].ID != "a" || f[0].Source != one || f[0].JWT[0].NotAfter != later || f[0].Revision != 3 {
		t.Fatalf("foreign %+v", f)
	}
	next, _ := startWatch(t, s)
	next()                                       // the reset
	ok(2, 3, w.PutForeign(ctx, from(one, a, b))) // the same
	if f := s.Foreign(); f[0].Revision != 3 {
		t.Error("the same counts as a change")
	}
	c := key("c")
	ok(3, 4, w.PutForeign(ctx, from(two, a, c))) // a is the same key
	if told := next(); len(told) != 1 || !told[0].Bundle {
		t.Errorf("told %+v", told)
	}
	ok(3, 4, w.PutForeign(ctx, from(one, b)))
	ok(4, 3, w.PutForeign(ctx, from(one)))
	ok(4, 3, w.PutForeign(ctx, from(one))) // not there
	if len(s.Foreign()) != 1 {
		t.Errorf("foreign %+v", s.Foreign())
	}
	same := own
	ok(4, 3, w.PutForeign(ctx, from(one, identity.JWTKey{ID: "own", PublicKey: same.PublicKey, NotAfter: later})))

	wantErr(t, w.PutForeign(ctx, from(one, key("own"))), identity.ErrExists, "own", one)
	wantErr(t, w.PutForeign(ctx, from(one, key("a"))), identity.ErrExists, "a", two)
	_, err := w.PrepareAuthority(ctx, now, prepared(identity.AuthorityJWT, "a"))
	wantErr(t, err, identity.ErrExists, "a", two)
	weak, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Skip(err)
	}
	small, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	_, edwards, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	many := make([]identity.JWTKey, maxForeignKeys+1)
	for i := range many {
		many[i] = identity.JWTKey{ID: fmt.Sprint(i), PublicKey: a.PublicKey, NotAfter: later}
	}
	for name, bad := range map[string]identity.Foreign{
		"no source":             from("", c),
		"a word":                from("downstream", c),
		"another trust domain":  from("spiffe://example.com/ca", c),
		"the trust domain":      from("spiffe://example.org", c),
		"roots from below":      {Source: one, X509: [][]byte{caCert(t, "x")}},
		"a leaf for a root":     {Source: identity.SourceUpstream, X509: [][]byte{cert(t, "x", false, 0)}},
		"garbage for a root":    {Source: identity.SourceUpstream, X509: [][]byte{[]byte("x")}},
		"too many roots":        {Source: identity.SourceUpstream, X509: slices.Repeat([][]byte{caCert(t, "x")}, maxCerts+1)},
		"too many keys":         from(one, many...),
		"two keys of one ID":    from(one, a, key("a")),
		"no key ID":             from(one, key("")),
		"a long key ID":         from(one, key(string(bytes.Repeat([]byte("x"), maxKeyIDBytes+1)))),
		"a key ID not in UTF-8": from(one, key("\xff")),
		"no end":                from(one, identity.JWTKey{ID: "x", PublicKey: a.PublicKey}),
		"no key":                from(one, identity.JWTKey{ID: "x", NotAfter: later}),
		"a huge key":            from(one, identity.JWTKey{ID: "x", PublicKey: make([]byte, maxPublicKey+1), NotAfter: later}),
		"a small curve":         from(one, identity.JWTKey{ID: "x", PublicKey: pkixOf(t, &small.PublicKey), NotAfter: later}),
		"a key for no JWT":      from(one, identity.JWTKey{ID: "x", PublicKey: pkixOf(t, edwards.Public()), NotAfter: later}),
		"a weak key":            from(one, identity.JWTKey{ID: "x", PublicKey: pkixOf(t, &weak.PublicKey), NotAfter: later}),
	} {
		if err := w.PutForeign(ctx, bad); err == nil {
			t.Errorf("%s was taken", name)
		} else {
			wantErr(t, err, identity.ErrInvalid)
		}
	}
	ok(4, 3, nil)
}

func TestForeignSourcesAreBounded(t *testing.T) {
	_, w, _ := newStore2(t)
	put := func(i int) error {
		k := identity.JWTKey{ID: fmt.Sprint(i), PublicKey: publicKey(t), NotAfter: now.Add(time.Hour)}
		return w.PutForeign(t.Context(), identity.Foreign{Source: fmt.Sprint("spiffe://example.org/ca/", i), JWT: []identity.JWTKey{k}})
	}
	for i := range maxForeign {
		if err := put(i); err != nil {
			t.Fatal(err)
		}
	}
	wantErr(t, put(maxForeign), identity.ErrExhausted, "64")
	if err := put(0); err != nil { // one that is there may change
		t.Error(err)
	}
}

// What ended by the proposer's clock goes; what signs or is about to stays, and so does everything at level 1.
func TestSweepAuthoritiesAndForeign(t *testing.T) {
	s, w, l := newStore2(t)
	ctx := t.Context()
	x := identity.AuthorityX509
	must[identity.Authority](t)(w.CreateAuthority(ctx, authority(x, "old")))
	must[identity.Authority](t)(w.PrepareAuthority(ctx, now, prepared(x, "new")))
	must[identity.Authority](t)(w.PrepareAuthority(ctx, now, prepared(x, "next")))
	if err := w.ActivateAuthority(ctx, now, x, "new", false); err != nil {
		t.Fatal(err)
	}
	keys := []identity.JWTKey{{ID: "short", PublicKey: publicKey(t), NotAfter: now.Add(time.Minute)}, {ID: "long", PublicKey: publicKey(t), NotAfter: now.Add(2 * time.Hour)}}
	for source, keys := range map[string][]identity.JWTKey{"upstream": keys, "spiffe://example.org/ca": keys[:1]} {
		if err := w.PutForeign(ctx, identity.Foreign{Source: source, JWT: keys}); err != nil {
			t.Fatal(err)
		}
	}
	sweep := func(at time.Duration, commands int, sequence uint64) {
		t.Helper()
		before := len(l.cmds)
		if err := w.Sweep(ctx, now.Add(at)); err != nil {
			t.Fatal(err)
		}
		if n := len(l.cmds) - before; n != commands || s.Bundle().Sequence != sequence {
			t.Fatalf("%d commands, sequence %d; want %d, %d", n, s.Bundle().Sequence, commands, sequence)
		}
		checkConsistent(t, s)
	}
	at := s.Bundle().Sequence
	sweep(time.Minute-1, 0, at)
	sweep(time.Minute, 1, at+1)
	if f := s.Foreign(); len(f) != 1 || len(f[0].JWT) != 1 || f[0].JWT[0].ID != "long" {
		t.Errorf("foreign %+v", f)
	}
	sweep(time.Hour-1, 0, at+1)
	sweep(time.Hour, 1, at+2)
	if stateOf(s, "x509/old") != "" || stateOf(s, "x509/new") != identity.AuthorityActive || stateOf(s, "x509/next") != identity.AuthorityPrepared {
		t.Errorf("authorities %+v", s.Authorities())
	}
	sweep(2*time.Hour, 1, at+3)
	sweep(2*time.Hour, 0, at+3)
	if len(s.Foreign()) != 0 {
		t.Errorf("foreign %+v", s.Foreign())
	}
}

func TestAdmitAgent(t *testing.T) {
	s, w, _ := newStore2(t)
	ctx := t.Context()
	bound := token("bound", identity.JoinAgent, now.Add(time.Minute))
	bound.KubeCluster, bound.KubeNode = "prod", "n1"
	for _, j := range []identity.JoinToken{bound, token("free", identity.JoinAgent, now.Add(time.Minute)), token("server", identity.JoinServer, now.Add(time.Minute)), token("late", identity.JoinAgent, now)} {
		if err := w.CreateJoinToken(ctx, j); err != nil {
			t.Fatal(err)
		}
	}
	on := func(name, cluster, node string) identity.Agent {
		a := agent(name)
		a.KubeCluster, a.KubeNode = cluster, node
		return a
	}
	must[identity.Agent](t)(w.PutAgent(ctx, agent("banned")))
	if err := w.BanAgent(ctx, agent("banned").ID); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		token string
		a     identity.Agent
		want  error
		words string
	}{
		{"guess", agent("a"), identity.ErrUnauthenticated, "no such"},
		{"late", agent("a"), identity.ErrUnauthenticated, "expired"},
		{"server", agent("a"), identity.ErrDenied, "admits one server"},
		{"bound", agent("a"), identity.ErrDenied, `"n1"`},
		{"bound", on("a", "prod", "n2"), identity.ErrDenied, `"n2"`},
		{"bound", on("a", "dev", "n1"), identity.ErrDenied, `"dev"`},
		{"free", on("a", "prod", "n1"), identity.ErrDenied, "free"},
		{"free", agent("banned"), identity.ErrDenied, "banned"},
		{"free", identity.Agent{ID: "spiffe://example.org/web", Kind: "join_token"}, identity.ErrInvalid, "agent ID"},
	} {
		_, err := w.AdmitAgent(ctx, now, hashOf(c.token), c.a)
		wantErr(t, err, c.want, c.words)
		if j, ok := s.JoinToken(hashOf(c.token)); ok != (c.token != "guess") || !j.UsedAt.IsZero() {
			t.Errorf("%s: the refusal cost the token: %+v", c.token, j)
		}
		if _, ok := s.Agent(agent("a").ID); ok {
			t.Error("refused, and recorded all the same")
		}
	}
	next, _ := startWatch(t, s)
	next() // the reset
	in := on("a", "prod", "n1")
	in.Banned = true // not the caller's to say
	got := must[identity.Agent](t)(w.AdmitAgent(ctx, now, hashOf("bound"), in))
	if have, ok := s.Agent(in.ID); !ok || !reflect.DeepEqual(*have, got) || got.Banned || got.KubeNode != "n1" {
		t.Errorf("admitted %+v", got)
	}
	if told := next(); len(told) != 1 || told[0].Agent == nil || told[0].AgentGone {
		t.Errorf("told %+v", told)
	}
	if j, ok := s.JoinToken(hashOf("bound")); !ok || j.UsedAt != now {
		t.Errorf("the token is %+v", j)
	}
	_, err := w.AdmitAgent(ctx, now, hashOf("bound"), in)
	wantErr(t, err, identity.ErrPrecondition, "was used")
	if _, ok := s.JoinToken(nil); ok {
		t.Error("a token of no hash")
	}
	checkConsistent(t, s)
}

// A refusal leaves nothing, neither the token's use nor the agent, whichever of the two cannot be stored.
func TestAdmitAgentRefusedLeavesNothing(t *testing.T) {
	s, w, l := newStore2(t)
	if err := w.CreateJoinToken(t.Context(), token("t", identity.JoinAgent, time.Date(9999, 12, 31, 0, 0, 0, 0, time.UTC))); err != nil {
		t.Fatal(err)
	}
	beyond := time.Date(9999, 12, 31, 23, 59, 59, 0, time.FixedZone("", -3600)) // the year 10000 in UTC
	for name, c := range map[string]struct{ at, attested string }{
		"agent": {"2026-03-01T12:00:00Z", beyond.Format(time.RFC3339)}, "both": {beyond.Format(time.RFC3339), beyond.Format(time.RFC3339)},
	} {
		cmd := fmt.Sprintf("\x01"+`{"type":"admit_agent","time":%q,"data":{"hash":%q,"agent":{"id":%q,"kind":"join_token","attested_at":%q}}}`,
			c.at, base64.StdEncoding.EncodeToString(hashOf("t")), agent("a").ID, c.attested)
		res, err := l.Propose(t.Context(), []byte(cmd))
		if err != nil {
			t.Fatal(err)
		}
		if err := decodeResult(res, nil); err == nil {
			t.Fatalf("%s: admitted", name)
		}
		j, _ := s.JoinToken(hashOf("t"))
		if _, ok := s.Agent(agent("a").ID); ok || !j.UsedAt.IsZero() {
			t.Errorf("%s: refused, and the token is %+v, the agent recorded: %v", name, j, ok)
		}
		checkConsistent(t, s)
	}
}
