package store

import (
	"bytes"
	"context"
	"fmt"
	"reflect"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"countersign.io/countersign/identity"
)

func partnerFederation(trustDomain string) identity.Federation {
	return identity.Federation{TrustDomain: trustDomain, URL: "https://" + trustDomain + "/bundle", Profile: identity.ProfileWeb}
}

func TestFederation(t *testing.T) {
	s, w, l := newStore2(t)
	ctx := t.Context()
	put := func(f identity.Federation, replace bool, rev uint64) (identity.Federation, error) {
		return w.PutFederation(ctx, now, f, replace, rev)
	}
	f := must[identity.Federation](t)(put(partnerFederation("partner.org"), false, 0))
	if f.Revision != 2 || f.CreatedAt != now || f.Bundle != nil || s.Federated("partner.org") != nil {
		t.Errorf("%+v", f)
	}
	_, err := put(partnerFederation("partner.org"), false, 0)
	wantErr(t, err, identity.ErrExists, "partner.org", "update")
	_, err = put(partnerFederation("partner.org"), true, 1)
	wantErr(t, err, identity.ErrPrecondition, "revision 2", "read it again")
	_, err = put(partnerFederation("other.org"), true, 7)
	wantErr(t, err, identity.ErrNotFound, "other.org")

	next, _ := startWatch(t, s)
	next() // the reset
	root, key := caCert(t, "partner"), publicKey(t)
	fetched := identity.FederatedBundle{Sequence: 5, RefreshHint: time.Minute, X509: [][]byte{root}, JWT: map[string][]byte{"k": key}}
	if err := w.PutFederatedBundle(ctx, now.Add(time.Second), "partner.org", f.Revision, fetched); err != nil {
		t.Fatal(err)
	}
	if told := next(); len(told) != 1 || told[0].Federation != "partner.org" || told[0].Bundle {
		t.Errorf("told %+v", told)
	}
	b := s.Federated("partner.org")
	want := &identity.Bundle{TrustDomain: spiffeid.RequireTrustDomainFromString("partner.org"), Sequence: 5, RefreshHint: time.Minute, X509: [][]byte{root}, JWT: fetched.JWT}
	if !reflect.DeepEqual(b, want) {
		t.Errorf("%+v", b)
	}
	got := s.Federations()
	if len(got) != 1 || got[0].Revision != f.Revision || got[0].Bundle.Pinned || !got[0].Bundle.TakenAt.Equal(now.Add(time.Second)) {
		t.Errorf("%+v", got)
	}
	// The same again is no change, and no sequence goes back.
	if err := w.PutFederatedBundle(ctx, now.Add(time.Hour), "partner.org", f.Revision, fetched); err != nil || s.Federated("partner.org") != b {
		t.Errorf("the same again: %v", err)
	}
	for name, old := range map[string]identity.FederatedBundle{"older": {Sequence: 4, X509: [][]byte{root}}, "none": {X509: [][]byte{root}}} {
		t.Run(name, func(t *testing.T) {
			wantErr(t, w.PutFederatedBundle(ctx, now, "partner.org", f.Revision, old), identity.ErrPrecondition, "sequence 5", "pin its new bundle")
		})
	}
	wantErr(t, w.PutFederatedBundle(ctx, now, "other.org", f.Revision, fetched), identity.ErrNotFound, "other.org")

	// The relationship leads elsewhere now: what is fetched by the old one is not taken, and what there was stays.
	moved := partnerFederation("partner.org")
	moved.URL = "https://elsewhere.org/bundle"
	f2 := must[identity.Federation](t)(put(moved, true, f.Revision))
	if f2.Bundle == nil || f2.Bundle.Sequence != 5 || f2.CreatedAt != now || s.Federated("partner.org") == nil {
		t.Errorf("%+v", f2)
	}
	fetched.Sequence = 6
	wantErr(t, w.PutFederatedBundle(ctx, now, "partner.org", f.Revision, fetched), identity.ErrPrecondition, "while its bundle was fetched")

	// A pinned bundle begins anew, whatever the sequence was; none of it is merged with another's.
	other := caCert(t, "partner, made anew")
	moved.Bundle = &identity.FederatedBundle{Sequence: 1, X509: [][]byte{other}}
	f3 := must[identity.Federation](t)(put(moved, true, 0))
	if !f3.Bundle.Pinned || s.Federated("partner.org").Sequence != 1 || len(s.Federated("partner.org").X509) != 1 {
		t.Errorf("%+v", f3)
	}
	if s.Bundle().Sequence != 0 {
		t.Error("the own bundle changed")
	}
	checkConsistent(t, s)

	dir := s.dir
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = openAt(t, dir)
	again := openAt(t, stateDir(t))
	if err := again.Restore(bytes.NewReader(snapshotOf(t, s))); err != nil || !reflect.DeepEqual(again.Federations(), s.Federations()) || len(s.Federations()) != 1 {
		t.Errorf("after a restart and a restore: %+v, %+v, %v", s.Federations(), again.Federations(), err)
	}
	l.s = s
	w = s.Writer(l)
	if err := w.DeleteFederation(ctx, "partner.org"); err != nil || s.Federated("partner.org") != nil || len(s.Federations()) != 0 {
		t.Errorf("deleted: %v", err)
	}
	wantErr(t, w.DeleteFederation(ctx, "partner.org"), identity.ErrNotFound, "partner.org")
	wantErr(t, w.PutFederatedBundle(ctx, now, "partner.org", f3.Revision, fetched), identity.ErrNotFound)
	checkConsistent(t, s)
}

func TestFederationRefuses(t *testing.T) {
	s, w, l := newStore2(t)
	ctx := t.Context()
	root := caCert(t, "partner")
	proposed := len(l.cmds)
	for name, change := range map[string]func(*identity.Federation){
		"own trust domain":        func(f *identity.Federation) { f.TrustDomain = "example.org" },
		"no trust domain":         func(f *identity.Federation) { f.TrustDomain = "" },
		"trust domain as ID":      func(f *identity.Federation) { f.TrustDomain = "spiffe://partner.org" },
		"no URL":                  func(f *identity.Federation) { f.URL = "" },
		"plain HTTP":              func(f *identity.Federation) { f.URL = "http://partner.org" },
		"a password":              func(f *identity.Federation) { f.URL = "https://u:p@partner.org" },
		"a user":                  func(f *identity.Federation) { f.URL = "https://u@partner.org" },
		"no host":                 func(f *identity.Federation) { f.URL = "https:///bundle" },
		"a fragment":              func(f *identity.Federation) { f.URL = "https://partner.org/#x" },
		"no profile":              func(f *identity.Federation) { f.Profile = "" },
		"web with an endpoint ID": func(f *identity.Federation) { f.EndpointID = "spiffe://partner.org/x" },
		"SPIFFE without one":      func(f *identity.Federation) { f.Profile = identity.ProfileSPIFFE },
		"SPIFFE of somebody else": func(f *identity.Federation) { f.Profile, f.EndpointID = identity.ProfileSPIFFE, "spiffe://other.org/x" },
		"SPIFFE of the domain":    func(f *identity.Federation) { f.Profile, f.EndpointID = identity.ProfileSPIFFE, "spiffe://partner.org" },
		"a broken root":           func(f *identity.Federation) { f.Bundle = &identity.FederatedBundle{X509: [][]byte{{1}}} },
		"a root that is no CA": func(f *identity.Federation) {
			f.Bundle = &identity.FederatedBundle{X509: [][]byte{cert(t, "x", false, 0)}}
		},
		"a broken key": func(f *identity.Federation) { f.Bundle = &identity.FederatedBundle{JWT: map[string][]byte{"k": {1}}} },
		"a key without ID": func(f *identity.Federation) {
			f.Bundle = &identity.FederatedBundle{JWT: map[string][]byte{"": publicKey(t)}}
		},
		"more roots than agents do": func(f *identity.Federation) {
			f.Bundle = &identity.FederatedBundle{X509: make([][]byte, identity.MaxFederatedX509+1)}
		},
	} {
		f := partnerFederation("partner.org")
		change(&f)
		if _, err := w.PutFederation(ctx, now, f, false, 0); err == nil {
			t.Errorf("%s was taken", name)
		}
	}
	if len(l.cmds) != proposed {
		t.Error("some were proposed")
	}
	// Apply has its own word for what matters to the state.
	cmd, err := encodeCommand(putFederation, now, putFederationData{Federation: partnerFederation("example.org")})
	if err != nil {
		t.Fatal(err)
	}
	res := must[[]byte](t)(l.Propose(ctx, cmd))
	wantErr(t, decodeResult(res, nil), identity.ErrInvalid, "own trust domain")

	for i := range identity.MaxFederations {
		must[identity.Federation](t)(w.PutFederation(ctx, now, partnerFederation(fmt.Sprintf("p%d.org", i)), false, 0))
	}
	_, err = w.PutFederation(ctx, now, partnerFederation("one-more.org"), false, 0)
	wantErr(t, err, identity.ErrExhausted, "delete one")
	f := partnerFederation("p1.org")
	f.Bundle = &identity.FederatedBundle{X509: [][]byte{root}}
	must[identity.Federation](t)(w.PutFederation(ctx, now, f, true, 0))
	checkConsistent(t, s)
}

// TestConformance21NeverMerged: bundles of different trust domains stay apart, the same key in two of them too (SPIFFE Federation
// section 4.2).
func TestConformance21NeverMerged(t *testing.T) {
	s, w, _ := newStore2(t)
	ctx := t.Context()
	must[identity.Authority](t)(w.CreateAuthority(ctx, authority(identity.AuthorityJWT, "k")))
	own := s.Bundle()
	rootA, rootB, keyA, keyB := caCert(t, "a"), caCert(t, "b"), publicKey(t), publicKey(t)
	for td, b := range map[string]identity.FederatedBundle{
		"a.org": {Sequence: 1, X509: [][]byte{rootA}, JWT: map[string][]byte{"k": keyA}}, // the same key ID as ours, and as b's
		"b.org": {Sequence: 9, X509: [][]byte{rootB}, JWT: map[string][]byte{"k": keyB}},
	} {
		f := must[identity.Federation](t)(w.PutFederation(ctx, now, partnerFederation(td), false, 0))
		if err := w.PutFederatedBundle(context.WithoutCancel(ctx), now, td, f.Revision, b); err != nil {
			t.Fatal(err)
		}
	}
	if s.Bundle() != own {
		t.Error("the own bundle changed")
	}
	a, b := s.Federated("a.org"), s.Federated("b.org")
	if len(a.X509) != 1 || len(b.X509) != 1 || !bytes.Equal(a.X509[0], rootA) || !bytes.Equal(b.X509[0], rootB) || !bytes.Equal(a.JWT["k"], keyA) || !bytes.Equal(b.JWT["k"], keyB) || a.TrustDomain == b.TrustDomain {
		t.Errorf("%+v\n%+v", a, b)
	}
	if s.Federated("example.org") != nil {
		t.Error("the own trust domain is federated with itself")
	}
}
