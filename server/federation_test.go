package server

import (
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"countersign.io/countersign/api"
	adminv1 "countersign.io/countersign/api/admin/v1"
	memberv1 "countersign.io/countersign/api/member/v1"
	nodev1 "countersign.io/countersign/api/node/v1"
	workloadv1 "countersign.io/countersign/api/workload/v1"
	"countersign.io/countersign/audit"
	"countersign.io/countersign/identity"
)

// fakeFederation keeps relationships in a map, and does what the contracts in federation.go say.
type fakeFederation struct {
	state *fakeState

	mu      sync.Mutex
	all     map[string]identity.Federation
	bundles map[string]*identity.Bundle
	puts    int // of fetched bundles
	fetch   func(identity.Federation) (*identity.Bundle, error)
	status  map[string]identity.FederationStatus
	changes atomic.Int64
	running atomic.Bool
}

func (f *fakeFederation) Federations() []identity.Federation {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []identity.Federation
	for _, x := range f.all {
		out = append(out, x)
	}
	slices.SortFunc(out, func(a, b identity.Federation) int { return cmp.Compare(a.TrustDomain, b.TrustDomain) })
	return out
}

func (f *fakeFederation) Federated(td string) *identity.Bundle {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.bundles[td]
}

func (f *fakeFederation) keep(x identity.Federation) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.all[x.TrustDomain] = x
	delete(f.bundles, x.TrustDomain)
	if x.Bundle != nil {
		f.bundles[x.TrustDomain] = x.Bundle.Bundle(spiffeid.RequireTrustDomainFromString(x.TrustDomain))
	}
}

func (f *fakeFederation) PutFederation(_ context.Context, now time.Time, x identity.Federation, replace bool, ifRevision uint64) (identity.Federation, error) {
	err := f.state.write(func(rev uint64) (identity.Change, error) {
		f.mu.Lock()
		old, ok := f.all[x.TrustDomain]
		f.mu.Unlock()
		if ok && !replace {
			return identity.Change{}, identity.ErrExists
		}
		if ifRevision != 0 && ifRevision != old.Revision {
			return identity.Change{}, identity.ErrPrecondition
		}
		x.Revision, x.CreatedAt = rev, now
		if x.Bundle == nil {
			x.Bundle = old.Bundle
		} else {
			x.Bundle.Pinned, x.Bundle.TakenAt = true, now
		}
		f.keep(x)
		return identity.Change{Federation: x.TrustDomain}, nil
	})
	return x, err
}

func (f *fakeFederation) DeleteFederation(_ context.Context, td string) error {
	return f.state.write(func(uint64) (identity.Change, error) {
		f.mu.Lock()
		defer f.mu.Unlock()
		delete(f.all, td)
		delete(f.bundles, td)
		return identity.Change{Federation: td}, nil
	})
}

func (f *fakeFederation) PutFederatedBundle(_ context.Context, now time.Time, td string, of uint64, b identity.FederatedBundle) error {
	return f.state.write(func(uint64) (identity.Change, error) {
		f.mu.Lock()
		x, ok := f.all[td]
		f.puts++
		f.mu.Unlock()
		if !ok || x.Revision != of {
			return identity.Change{}, identity.ErrPrecondition
		}
		if err := x.CheckNext(b.Sequence); err != nil {
			return identity.Change{}, err
		}
		b.TakenAt = now
		x.Bundle = &b
		f.keep(x)
		return identity.Change{Federation: td}, nil
	})
}

func (f *fakeFederation) Run(ctx context.Context, _ func() []identity.Federation, _ func(context.Context, identity.Federation, *identity.Bundle) (string, error)) error {
	f.running.Store(true)
	<-ctx.Done()
	f.running.Store(false)
	return nil
}

func (f *fakeFederation) Refresh(ctx context.Context, td string, source func() []identity.Federation, take func(context.Context, identity.Federation, *identity.Bundle) (string, error)) error {
	for _, x := range source() {
		if x.TrustDomain == td {
			b, err := f.fetch(x)
			warning := ""
			if err == nil {
				warning, err = take(ctx, x, b)
			}
			st := identity.FederationStatus{LastAttempt: time.Now(), Warning: warning}
			if err != nil {
				st.LastError, st.Failures = err.Error(), 1
			}
			f.mu.Lock()
			f.status[td] = st
			f.mu.Unlock()
			return err
		}
	}
	return identity.ErrNotFound
}

func (f *fakeFederation) Status(td string) (identity.FederationStatus, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	st, ok := f.status[td]
	return st, ok
}

func (f *fakeFederation) Changed() { f.changes.Add(1) }

func (f *fakeFederation) count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.puts
}

// newFederatedWorld is a world with federation and an endpoint.
func newFederatedWorld(t *testing.T, edits ...func(*Config)) (*world, *fakeFederation) {
	t.Helper()
	f := &fakeFederation{all: map[string]identity.Federation{}, bundles: map[string]*identity.Bundle{}, status: map[string]identity.FederationStatus{}}
	w := newWorld(t, append([]func(*Config){func(c *Config) {
		f.state = c.State.EntryReader.(*fakeState)
		c.Federation = Federation{
			FederationState: f, Writes: f, Refresher: f, Endpoints: []Endpoint{{identity.ProfileSPIFFE, "https://ca.example.org/bundle"}},
			DialMember: func(context.Context, identity.Member) (*grpc.ClientConn, error) {
				return nil, errors.New("nobody is there")
			},
		}
	}}, edits...)...)
	return w, f
}

// foreignRoot is a CA certificate of a trust domain.
func foreignRoot(t testing.TB, td string) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		URIs: []*url.URL{{Scheme: "spiffe", Host: td}}}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func foreignBundle(t testing.TB, td string, sequence uint64) *identity.Bundle {
	t.Helper()
	_, key := newKey(t)
	return &identity.Bundle{TrustDomain: spiffeid.RequireTrustDomainFromString(td), Sequence: sequence, RefreshHint: time.Minute, X509: [][]byte{foreignRoot(t, td)}, JWT: map[string][]byte{"k": key}}
}

func putRequest(t testing.TB, td string) *adminv1.PutFederationRequest {
	t.Helper()
	return &adminv1.PutFederationRequest{TrustDomain: td, Url: "https://" + td + "/bundle", Profile: identity.ProfileSPIFFE, EndpointId: "spiffe://" + td + "/endpoint", Bundle: api.BundleToWire(foreignBundle(t, td, 3))}
}

func (w *world) federation(t testing.TB) adminv1.FederationClient {
	t.Helper()
	return adminv1.NewFederationClient(dialWith(t, w.socket, insecure.NewCredentials()))
}

func TestFederationAdmin(t *testing.T) {
	w, f := newFederatedWorld(t)
	w.start(t)
	c, ctx := w.federation(t), testContext(t)
	if d := w.srv.FederationSettle(); d != 15*time.Minute {
		t.Errorf("a new key must wait %v", d)
	}
	req := putRequest(t, "partner.org")
	req.DryRun = true
	res, err := c.CreateFederation(ctx, req)
	if err != nil || res.Sequence != 3 || !res.Pinned || len(f.Federations()) != 0 {
		t.Fatalf("dry run: %v, %v, %d", res, err, len(f.Federations()))
	}
	req.DryRun = false
	if res, err = c.CreateFederation(ctx, req); err != nil || res.Revision == 0 || res.X509Authorities != 1 || res.JwtAuthorities != 1 || len(res.Bundle.X509Authorities) != 1 {
		t.Fatalf("%v, %v", res, err)
	}
	if _, err = c.CreateFederation(ctx, req); err == nil {
		t.Error("twice")
	}
	events := w.audit.find("admin.create_federation", audit.OK)
	if len(events) != 2 || !strings.Contains(fmt.Sprint(events[1]), "x509_sha256") || !slices.Equal(events[1].Subjects, []string{"partner.org"}) {
		t.Errorf("audit: %+v", events)
	}
	eventually(t, "every member records the change", func() bool { return len(w.audit.find(audit.FederationChange, audit.OK)) == 1 })

	list, err := c.ListFederations(ctx, &adminv1.Empty{})
	if err != nil || len(list.Federations) != 1 || list.Federations[0].Bundle != nil || list.Federations[0].Status != nil || !strings.Contains(list.Federations[0].StatusUnknownBecause, "not asked it yet") {
		t.Errorf("%v, %v", list, err)
	}
	// An update keeps the bundle, and is refused if somebody was faster.
	up := &adminv1.PutFederationRequest{TrustDomain: "partner.org", Url: "https://elsewhere.org/b", Profile: identity.ProfileWeb, Revision: res.Revision}
	if res, err = c.UpdateFederation(ctx, up); err != nil || res.Url != "https://elsewhere.org/b" || res.Sequence != 3 {
		t.Errorf("%v, %v", res, err)
	}
	_, err = c.UpdateFederation(ctx, up)
	wantCode(t, err, codes.FailedPrecondition, "read it again")

	// Entries say when what they federate with has no effect.
	e := w.createEntry(t, &adminv1.Entry{Selectors: []string{"k8s:ns:prod"}, SpiffeId: "spiffe://example.org/prod", FederatesWith: []string{"partner.org", "nobody.org"}})
	if len(e.Warnings) != 1 || !strings.Contains(e.Warnings[0], "nobody.org") {
		t.Errorf("warnings %q", e.Warnings)
	}
	if e, err = w.admin(t).GetEntry(ctx, &adminv1.NameRequest{Name: e.Id}); err != nil || len(e.Warnings) != 1 {
		t.Errorf("%v, %v", e, err)
	}
	got, err := c.GetFederation(ctx, &adminv1.NameRequest{Name: "partner.org"})
	if err != nil || got.Entries != 1 {
		t.Errorf("%v, %v", got, err)
	}
	del := &adminv1.DeleteFederationRequest{TrustDomain: "partner.org", DryRun: true}
	if d, err := c.DeleteFederation(ctx, del); err != nil || d.Entries != 1 || len(f.Federations()) != 1 {
		t.Errorf("dry run: %v, %v", d, err)
	}
	del.DryRun = false
	if _, err := c.DeleteFederation(ctx, del); err != nil || len(f.Federations()) != 0 {
		t.Error(err)
	}
	_, err = c.DeleteFederation(ctx, del)
	wantCode(t, err, codes.NotFound, "partner.org")
	eventually(t, "the end is recorded", func() bool {
		return slices.ContainsFunc(w.audit.find(audit.FederationChange, audit.OK), func(e audit.Event) bool { return strings.Contains(fmt.Sprint(e.Details), "deleted") })
	})
	end, err := c.DescribeEndpoint(ctx, &adminv1.DescribeEndpointRequest{})
	if err != nil || end.EndpointId != "spiffe://example.org/countersign/bundle-endpoint" || end.Profile != identity.ProfileSPIFFE || end.Bundle.RefreshHintSeconds != 300 || len(end.Bundle.X509Authorities) != 1 {
		t.Errorf("%v, %v", end, err)
	}
	_, err = c.DescribeEndpoint(ctx, &adminv1.DescribeEndpointRequest{Profile: identity.ProfileWeb})
	wantCode(t, err, codes.FailedPrecondition, "https_web")
	if f.changes.Load() == 0 || !f.running.Load() {
		t.Error("the refresher does not run, or was not told")
	}
}

func TestFederationAdminRefuses(t *testing.T) {
	w, f := newFederatedWorld(t)
	w.start(t)
	c, ctx := w.federation(t), testContext(t)
	if _, err := c.CreateFederation(ctx, putRequest(t, "third.org")); err != nil {
		t.Fatal(err)
	}
	third := f.Federated("third.org")
	own := w.state.Bundle()
	for name, x := range map[string]struct {
		change func(*adminv1.PutFederationRequest)
		code   codes.Code
		says   string
	}{
		"the own trust domain":        {func(r *adminv1.PutFederationRequest) { r.TrustDomain = "example.org" }, codes.InvalidArgument, "own trust domain"},
		"nothing":                     {func(r *adminv1.PutFederationRequest) { *r = adminv1.PutFederationRequest{} }, codes.InvalidArgument, "trust domain"},
		"plain HTTP":                  {func(r *adminv1.PutFederationRequest) { r.Url = "http://partner.org" }, codes.InvalidArgument, "https"},
		"a password":                  {func(r *adminv1.PutFederationRequest) { r.Url = "https://u:hunter2@partner.org" }, codes.InvalidArgument, "password"},
		"another's endpoint":          {func(r *adminv1.PutFederationRequest) { r.EndpointId = "spiffe://other.org/x" }, codes.InvalidArgument, "endpoint ID"},
		"no bundle to know it by":     {func(r *adminv1.PutFederationRequest) { r.Bundle = nil }, codes.InvalidArgument, "pin it"},
		"an empty one":                {func(r *adminv1.PutFederationRequest) { r.Bundle = &workloadv1.Bundle{TrustDomain: "partner.org"} }, codes.InvalidArgument, "X.509 authority"},
		"another trust domain's":      {func(r *adminv1.PutFederationRequest) { r.Bundle.TrustDomain = "other.org" }, codes.InvalidArgument, "never mixed"},
		"our own root":                {func(r *adminv1.PutFederationRequest) { r.Bundle.X509Authorities = own.X509 }, codes.FailedPrecondition, `one of "example.org"`},
		"a third trust domain's root": {func(r *adminv1.PutFederationRequest) { r.Bundle.X509Authorities = third.X509 }, codes.FailedPrecondition, `one of "third.org"`},
		"a third one's JWT key":       {func(r *adminv1.PutFederationRequest) { r.Bundle.JwtAuthorities[0].PublicKey = third.JWT["k"] }, codes.FailedPrecondition, `one of "third.org"`},
		"a revision":                  {func(r *adminv1.PutFederationRequest) { r.Revision = 7 }, codes.InvalidArgument, "update"},
	} {
		r := putRequest(t, "partner.org")
		x.change(r)
		_, err := c.CreateFederation(ctx, r)
		wantCode(t, err, x.code, x.says)
		w.wantNoSecrets(t, err, "hunter2")
		r.Revision = 0
		if _, err := c.UpdateFederation(ctx, r); err == nil {
			t.Errorf("%s: an update was taken", name)
		}
	}
	_, err := c.GetFederation(ctx, &adminv1.NameRequest{Name: "nobody.org"})
	wantCode(t, err, codes.NotFound, "nobody.org")
	_, err = c.RefreshFederation(ctx, &adminv1.NameRequest{Name: "nobody.org"})
	wantCode(t, err, codes.NotFound, "nobody.org")
	// Unrecorded, nothing is changed.
	w.audit.set(func() { w.audit.down = errAuditDown })
	_, err = c.CreateFederation(ctx, putRequest(t, "partner.org"))
	wantCode(t, err, codes.Unavailable)
	w.audit.set(func() { w.audit.down = nil })
	if len(f.Federations()) != 1 {
		t.Errorf("%d relationships", len(f.Federations()))
	}
}

// A member that serves no endpoint and federates with nobody has nobody to wait for, and says what to do about invitations.
func TestFederationOff(t *testing.T) {
	w := newWorld(t).start(t)
	c, ctx := w.federation(t), testContext(t)
	if d := w.srv.FederationSettle(); d != 0 {
		t.Errorf("a new key must wait %v", d)
	}
	_, err := c.ListFederations(ctx, &adminv1.Empty{})
	wantCode(t, err, codes.Unavailable, "no federation")
	_, err = c.DescribeEndpoint(ctx, &adminv1.DescribeEndpointRequest{})
	wantCode(t, err, codes.FailedPrecondition, "public.listen")
}

// What a partner publishes is taken once, refused if it is no good, and costs no write when it is no news.
func TestTakeFederated(t *testing.T) {
	w, f := newFederatedWorld(t)
	w.start(t)
	c, ctx := w.federation(t), testContext(t)
	if _, err := c.CreateFederation(ctx, putRequest(t, "partner.org")); err != nil {
		t.Fatal(err)
	}
	next := foreignBundle(t, "partner.org", 5)
	f.fetch = func(identity.Federation) (*identity.Bundle, error) { return next, nil }
	refresh := func() (*adminv1.FederationRelationship, error) {
		return c.RefreshFederation(ctx, &adminv1.NameRequest{Name: "partner.org"})
	}
	res, err := refresh()
	if err != nil || res.Sequence != 5 || res.Pinned || res.Status == nil || f.count() != 1 {
		t.Fatalf("%v, %v", res, err)
	}
	if taken := w.audit.find(audit.FederationTake, audit.Attempted); len(taken) != 1 || !strings.Contains(fmt.Sprint(taken[0].Details), "sequence") {
		t.Errorf("audit: %+v", taken)
	}
	if _, err := refresh(); err != nil || f.count() != 1 {
		t.Errorf("the same again: %v, %d writes", err, f.count())
	}
	good := f.Federated("partner.org")
	for name, x := range map[string]struct {
		b    *identity.Bundle
		says string
	}{
		"back":                 {foreignBundle(t, "partner.org", 4), "went back from sequence 5 to 4"},
		"no sequence":          {foreignBundle(t, "partner.org", 0), "went back from sequence 5 to 0"},
		"our root":             {&identity.Bundle{Sequence: 9, X509: w.state.Bundle().X509}, `one of "example.org"`},
		"our JWT key":          {&identity.Bundle{Sequence: 9, JWT: w.state.Bundle().JWT}, `one of "example.org"`},
		"ours under a new kid": {&identity.Bundle{Sequence: 9, JWT: renamed(w.state.Bundle().JWT)}, `one of "example.org"`},
	} {
		next = x.b
		_, err := refresh()
		wantCode(t, err, codes.FailedPrecondition, x.says)
		list, err := c.ListFederations(ctx, &adminv1.Empty{})
		if err != nil || !strings.Contains(list.Federations[0].Status.GetLastError(), x.says) {
			t.Errorf("%s: %v, %v", name, list, err)
		}
	}
	if f.count() != 1 || f.Federated("partner.org") != good {
		t.Errorf("%d writes", f.count())
	}
	// The sequence stands still and the keys do not: taken, and said.
	next = foreignBundle(t, "partner.org", 5)
	if res, err := refresh(); err != nil || !strings.Contains(res.Status.Warning, "not its sequence") || f.count() != 2 {
		t.Errorf("%v, %v", res, err)
	}
	// All revoked.
	next = &identity.Bundle{Sequence: 6}
	if res, err := refresh(); err != nil || res.X509Authorities+res.JwtAuthorities != 0 || res.Sequence != 6 {
		t.Errorf("%v, %v", res, err)
	}
	// Unrecorded, it is not taken.
	next = foreignBundle(t, "partner.org", 7)
	w.audit.set(func() { w.audit.down = errAuditDown })
	if _, err := w.srv.takeFederated(ctx, f.Federations()[0], next); !errors.Is(err, identity.ErrUnavailable) || f.Federated("partner.org").Sequence != 6 {
		t.Errorf("unrecorded: %v", err)
	}
	w.audit.set(func() { w.audit.down = nil })
}

func renamed(in map[string][]byte) map[string][]byte {
	out := map[string][]byte{}
	for kid, key := range in {
		out["x"+kid] = key
	}
	return out
}

// wantBundles is the next message, which must have bundles of exactly these trust domains beside the own.
func (s *syncer) wantBundles(want ...string) *nodev1.State_Bundles {
	s.t.Helper()
	m := s.next()
	b := m.GetState().GetBundles()
	var got []string
	for _, f := range b.GetFederated() {
		got = append(got, f.TrustDomain)
	}
	if b == nil || b.Own == nil || !slices.Equal(got, want) {
		s.t.Fatalf("message %v: bundles of %q, want %q", m, got, want)
	}
	return b
}

// TestSyncFederation: an agent gets the bundles of the trust domains that an entry of a workload of its federates with, no others,
// and nothing when one changes that it does not have.
func TestSyncFederation(t *testing.T) {
	w, f := newFederatedWorld(t)
	w.start(t)
	w.registerCluster(t)
	c, ctx := w.federation(t), testContext(t)
	for _, td := range []string{"a.org", "b.org", "c.org"} {
		if _, err := c.CreateFederation(ctx, putRequest(t, td)); err != nil {
			t.Fatal(err)
		}
	}
	_, cert := w.agent(t, "a1", "node-1")
	conn := w.dial(t, cert)
	s := w.sync(t, conn)
	_, other := w.agent(t, "a2", "node-2")
	idle := w.sync(t, w.dial(t, other))
	put := func(td string, sequence uint64) {
		t.Helper()
		i := slices.IndexFunc(f.Federations(), func(x identity.Federation) bool { return x.TrustDomain == td })
		if _, err := w.srv.takeFederated(ctx, f.Federations()[i], foreignBundle(t, td, sequence)); err != nil {
			t.Fatal(err)
		}
	}
	issue := func(ns string) *workloadv1.IssueX509Response {
		t.Helper()
		_, pub := newKey(t)
		resp, err := workloadv1.NewWorkloadClient(conn).IssueX509(ctx, &workloadv1.IssueX509Request{Requests: []*workloadv1.X509Request{{Evidence: &workloadv1.Evidence{Token: w.podToken(t, pod{ns: ns})}, PublicKey: pub}}})
		if err != nil {
			t.Fatal(err)
		}
		return resp
	}
	put("a.org", 4)
	w.wantNothing(s) // it federates with nobody

	e := w.createEntry(t, &adminv1.Entry{Selectors: []string{"k8s:ns:prod"}, SpiffeId: "spiffe://example.org/prod", FederatesWith: []string{"a.org", "nobody.org"}})
	resp := issue("prod")
	if len(resp.Federated) != 1 || resp.Federated[0].TrustDomain != "a.org" || resp.Federated[0].Sequence != 4 {
		t.Fatalf("the answer brings %v", resp.Federated)
	}
	s.watch(watched(1, resp.Results[0]))
	if b := s.wantBundles("a.org"); !slices.Equal(b.FederatesWith, []string{"a.org", "nobody.org"}) {
		t.Errorf("it is told of %q", b.FederatesWith)
	}
	if again := issue("prod"); len(again.Federated) != 0 {
		t.Errorf("what the stream has was sent again: %v", again.Federated)
	}
	s.watch(watched(1, resp.Results[0])) // issued anew: nothing to send
	w.wantNothing(s)

	put("a.org", 5)
	if b := s.wantBundles("a.org"); b.Federated[0].Sequence != 5 {
		t.Errorf("sequence %d", b.Federated[0].Sequence)
	}
	put("b.org", 4)
	w.wantNothing(s)

	// A second workload with another entry, and the first one's entry changed.
	w.createEntry(t, &adminv1.Entry{Selectors: []string{"k8s:ns:dev"}, SpiffeId: "spiffe://example.org/dev", FederatesWith: []string{"b.org"}})
	resp = issue("dev")
	if len(resp.Federated) != 1 || resp.Federated[0].TrustDomain != "b.org" {
		t.Fatalf("the answer brings %v", resp.Federated)
	}
	s.watch(watched(2, resp.Results[0]))
	s.wantBundles("a.org", "b.org")
	e.FederatesWith, e.Revision = []string{"c.org"}, 0
	if _, err := w.admin(t).UpdateEntry(ctx, e); err != nil {
		t.Fatal(err)
	}
	// What was granted a moment ago stays for the SVID that is on its way; the entry's new one comes at once.
	var last *nodev1.State_Bundles
	for told := false; last == nil || !told; {
		m := s.next()
		told = told || slices.Contains(m.GetChanged().GetHandles(), 1)
		if b := m.GetState().GetBundles(); b != nil {
			last = b
		}
	}
	if !slices.ContainsFunc(last.Federated, func(b *workloadv1.Bundle) bool { return b.TrustDomain == "c.org" }) {
		t.Errorf("bundles %v", last.Federated)
	}
	// The relationship ends: its bundle is gone at once.
	if _, err := c.DeleteFederation(ctx, &adminv1.DeleteFederationRequest{TrustDomain: "c.org"}); err != nil {
		t.Fatal(err)
	}
	ended := s.next().GetState().GetBundles()
	if !slices.Contains(ended.GetFederatesWith(), "c.org") {
		t.Errorf("the end of a relationship is not told: %v", ended)
	}
	for _, b := range ended.GetFederated() {
		if b.TrustDomain == "c.org" {
			t.Error("a bundle of a relationship that has ended")
		}
	}
	w.ahead.Store(int64(2 * grantedFor)) // nobody is on his way any longer
	put("b.org", 5)
	s.wantBundles("b.org")
	// The workload that federates is gone, and its bundle with it.
	s.send(&nodev1.SyncRequest{Message: &nodev1.SyncRequest_Watch{Watch: &nodev1.Watch{Unset: []uint64{1, 2}}}})
	s.wantBundles()
	put("b.org", 6)
	w.wantNothing(s)
	w.srv.hub.mu.Lock()
	if n := len(w.srv.hub.federating); n != 0 {
		t.Errorf("%d trust domains are still said to be federated with", n)
	}
	w.srv.hub.mu.Unlock()
	for len(idle.got) > 0 {
		if m := idle.next(); m.GetState().GetBundles() != nil {
			t.Errorf("an agent that federates with nobody got %v", m)
		}
	}
}

// A federated trust domain's SVIDs are nobody's to our members, whatever they are called: only workloads are given its bundle.
func TestFederatedSVIDIsAStranger(t *testing.T) {
	w, f := newFederatedWorld(t)
	w.start(t)
	key, _ := newKey(t)
	root := &x509.Certificate{SerialNumber: big.NewInt(1), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, root, root, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	req := putRequest(t, "partner.org")
	req.Bundle.X509Authorities = [][]byte{der}
	if _, err := w.federation(t).CreateFederation(testContext(t), req); err != nil || f.Federated("partner.org") == nil {
		t.Fatal(err)
	}
	parent, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"spiffe://partner.org/web", "spiffe://partner.org/countersign/member/m1", "spiffe://partner.org/countersign/agent/join/x", "spiffe://example.org/countersign/member/m1", "spiffe://example.org/web"} {
		u, err := url.Parse(id)
		if err != nil {
			t.Fatal(err)
		}
		leaf := &x509.Certificate{SerialNumber: big.NewInt(2), URIs: []*url.URL{u}, KeyUsage: x509.KeyUsageDigitalSignature, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
		cert, err := x509.CreateCertificate(rand.Reader, leaf, parent, key.Public(), key)
		if err != nil {
			t.Fatal(err)
		}
		conn := w.dial(t, &tls.Certificate{Certificate: [][]byte{cert}, PrivateKey: key})
		if _, err := memberv1.NewMemberClient(conn).Keyring(testContext(t), &memberv1.KeyringRequest{}); status.Code(err) != codes.Unavailable {
			t.Errorf("%s got through the handshake: %v", id, err)
		}
	}
	_, err = memberv1.NewMemberClient(w.dial(t, w.certificate(t, "/web"))).Keyring(testContext(t), &memberv1.KeyringRequest{})
	wantCode(t, err, codes.PermissionDenied) // one of ours gets as far as that
}

// A pod without an agent has no stream: its answer brings the bundles.
func TestGuestGetsFederatedBundles(t *testing.T) {
	w, _ := newFederatedWorld(t)
	w.start(t)
	w.registerCluster(t)
	if _, err := w.federation(t).CreateFederation(testContext(t), putRequest(t, "a.org")); err != nil {
		t.Fatal(err)
	}
	w.createEntry(t, &adminv1.Entry{Selectors: []string{"k8s:ns:prod"}, SpiffeId: "spiffe://example.org/prod", FederatesWith: []string{"a.org"}})
	for ns, want := range map[string]int{"prod": 1, "dev": 0} {
		_, pub := newKey(t)
		resp, err := workloadv1.NewWorkloadClient(w.dial(t, nil)).IssueX509(testContext(t), &workloadv1.IssueX509Request{Requests: []*workloadv1.X509Request{{Evidence: &workloadv1.Evidence{Token: w.podToken(t, pod{ns: ns})}, PublicKey: pub}}})
		if err != nil || len(resp.Federated) != want {
			t.Errorf("%s: %v, %v", ns, resp.GetFederated(), err)
		}
	}
}

// Another member shows what the leader knows, and has it ask.
func TestFederationFromAnotherMember(t *testing.T) {
	leads, f := newFederatedWorld(t)
	leads.start(t)
	ctx := testContext(t)
	f.fetch = func(identity.Federation) (*identity.Bundle, error) {
		return nil, fmt.Errorf("%w: it is away", identity.ErrUnavailable)
	}
	if _, err := leads.federation(t).CreateFederation(ctx, putRequest(t, "partner.org")); err != nil {
		t.Fatal(err)
	}
	follows, g := newFederatedWorld(t, func(c *Config) {
		c.Cluster.Members = func() []MemberStatus {
			return []MemberStatus{{ID: "m1", Address: "x:1", Voter: true}, {ID: "m2", Address: "y:1", Voter: true, Leader: true}}
		}
		c.Federation.DialMember = func(_ context.Context, m identity.Member) (*grpc.ClientConn, error) {
			if m.ID != "m2" || m.Address != "y:1" {
				t.Errorf("asked %+v", m)
			}
			return leads.dial(t, leads.certificate(t, "/countersign/member/m1")), nil
		}
	})
	follows.start(t)
	g.keep(f.Federations()[0])
	c := follows.federation(t)
	_, err := c.RefreshFederation(ctx, &adminv1.NameRequest{Name: "partner.org"})
	wantCode(t, err, codes.Unavailable, "it is away")
	list, err := c.ListFederations(ctx, &adminv1.Empty{})
	if err != nil || list.Federations[0].Status.GetLastError() == "" || list.Federations[0].Status.Failures != 1 {
		t.Errorf("%v, %v", list, err)
	}
	// It is for members only, and only the one that leads answers.
	for who, cert := range map[string]*tls.Certificate{"guest": nil, "workload": leads.certificate(t, "/ns/prod/sa/web"), "former member": leads.certificate(t, "/countersign/agent/x")} {
		if _, err := memberv1.NewRefreshingClient(leads.dial(t, cert)).State(ctx, &memberv1.RefreshStateRequest{}); err == nil {
			t.Errorf("%s was answered", who)
		}
	}
	_, err = memberv1.NewRefreshingClient(follows.dial(t, follows.certificate(t, "/countersign/member/m1"))).State(ctx, &memberv1.RefreshStateRequest{})
	wantCode(t, err, codes.Unavailable, "does not lead")
	// A leader that does not answer is said, and the rest is shown.
	follows.srv.cfg.Federation.DialMember = func(context.Context, identity.Member) (*grpc.ClientConn, error) {
		return nil, errors.New("nobody is there")
	}
	list, err = c.ListFederations(ctx, &adminv1.Empty{})
	if err != nil || !strings.Contains(list.Federations[0].StatusUnknownBecause, "nobody is there") || list.Federations[0].Sequence != 3 {
		t.Errorf("%v, %v", list, err)
	}
}

// TestConformance20PublishedBeforeItSigns: where anybody reads the bundle, a new key is in it for three refresh hints before it
// signs (SPIFFE Federation section 4.1).
func TestConformance20PublishedBeforeItSigns(t *testing.T) {
	for name, federated := range map[string]func(*Config){
		"an endpoint is served": func(c *Config) {
			c.Federation.Endpoints = []Endpoint{{identity.ProfileWeb, "https://ca.example.org/bundle"}}
		},
		"there is a partner": func(c *Config) {
			f := &fakeFederation{all: map[string]identity.Federation{}, bundles: map[string]*identity.Bundle{}}
			f.keep(identity.Federation{TrustDomain: "partner.org"})
			c.Federation.FederationState = f
		},
	} {
		for _, kind := range []identity.AuthorityKind{x509Kind, jwtKind} {
			r := newRotor(t)
			r.srv.cfg.Federation.RefreshHint = 2 * time.Minute
			federated(&r.srv.cfg)
			a, err := r.srv.prepareNew(t.Context(), kind, false)
			if err != nil {
				t.Fatal(err)
			}
			r.srv.ackGate(t.Context(), &a)
			r.now = r.now.Add(6*time.Minute - time.Second)
			if g := r.srv.ackGate(t.Context(), &a); g.open() || len(g.waiting) != 1 || g.waiting[0].name != "publishing" {
				t.Errorf("%s: a second before: %+v", name, g.waiting)
			}
			r.now = r.now.Add(time.Second)
			waitsFor(t, r.srv.ackGate(t.Context(), &a))
		}
	}
}
