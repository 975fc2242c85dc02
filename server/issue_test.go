package server

import (
	"context"

	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc/codes"

	adminv1 "countersign.io/countersign/api/admin/v1"
	workloadv1 "countersign.io/countersign/api/workload/v1"
	"countersign.io/countersign/identity"
)

// verify checks an SVID as a consumer would, with go-spiffe and the bundle.
func (w *world) verify(t *testing.T, svid *workloadv1.X509SVID, issuer [][]byte) {
	t.Helper()
	var roots []*x509.Certificate
	for _, der := range w.state.Bundle().X509 {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		roots = append(roots, c)
	}
	id, _, err := x509svid.ParseAndVerify(append([][]byte{svid.Leaf}, issuer...), x509bundle.FromX509Authorities(w.td, roots))
	if err != nil {
		t.Fatal(err)
	}
	if id.String() != svid.SpiffeId {
		t.Fatalf("SVID of %s, announced as %s", id, svid.SpiffeId)
	}
}

func (w *world) createEntry(t testing.TB, e *adminv1.Entry) *adminv1.Entry {
	t.Helper()
	out, err := w.admin(t).CreateEntry(testContext(t), e)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestAgentIssuesForPodWithoutEntry(t *testing.T) {
	w := newWorld(t).start(t)
	w.registerCluster(t)
	_, cert := w.agent(t, "a1", "node-1")
	conn := w.dial(t, cert)
	_, pub := newKey(t)
	token := w.podToken(t, pod{})
	resp, err := workloadv1.NewWorkloadClient(conn).IssueX509(testContext(t), &workloadv1.IssueX509Request{Requests: []*workloadv1.X509Request{
		{Evidence: &workloadv1.Evidence{Token: token, Selectors: []string{"unix:uid:1000"}}, PublicKey: pub},
	}})
	if err != nil {
		t.Fatal(err)
	}
	r := resp.Results[0]
	if r.Error != nil || len(r.Svids) != 1 {
		t.Fatalf("result %v", r)
	}
	svid := r.Svids[0]
	if svid.SpiffeId != "spiffe://example.org/ns/prod/sa/web" || svid.EntryId != "default:c1" || svid.EntryRevision == 0 {
		t.Fatalf("SVID %v", svid)
	}
	w.verify(t, svid, resp.IssuerChain)
	for _, want := range []string{"k8s:ns:prod", "k8s:sa:web", "k8s:pod-name:web-0", "k8s:node-name:node-1", "k8s:cluster:c1", "unix:uid:1000", "agent:kube-node:node-1"} {
		if !strings.Contains(strings.Join(r.Selectors, " "), want) {
			t.Errorf("selectors %v: want %s", r.Selectors, want)
		}
	}
	if resp.Bundle != nil || resp.Revision == 0 {
		t.Errorf("response %v: an agent gets no bundle, but a revision", resp)
	}
	w.wantNoSecrets(t, nil, token, strings.Split(token, ".")[2])
}

func TestEntriesReplaceTheDefault(t *testing.T) {
	w := newWorld(t).start(t)
	w.registerCluster(t)
	_, cert := w.agent(t, "a1", "node-1")
	first := w.createEntry(t, &adminv1.Entry{Selectors: []string{"k8s:ns:prod"}, SpiffeId: "spiffe://example.org/{k8s:ns}/{k8s:pod-name}", DnsNames: []string{"{k8s:sa}.{k8s:ns}.svc"}, Hint: "h"})
	second := w.createEntry(t, &adminv1.Entry{Selectors: []string{"k8s:sa:web", "unix:uid:7"}, SpiffeId: "spiffe://example.org/two"})
	w.createEntry(t, &adminv1.Entry{Selectors: []string{"k8s:ns:other"}, SpiffeId: "spiffe://example.org/other"})
	r := w.issueOne(t, w.dial(t, cert), &workloadv1.Evidence{Token: w.podToken(t, pod{}), Selectors: []string{"unix:uid:7"}})
	if r.Error != nil || len(r.Svids) != 2 || r.Svids[0].EntryId != first.Id || r.Svids[1].EntryId != second.Id {
		t.Fatalf("result %v: want the entries' identities, the older first", r)
	}
	leaf, err := x509.ParseCertificate(r.Svids[0].Leaf)
	if err != nil {
		t.Fatal(err)
	}
	if r.Svids[0].SpiffeId != "spiffe://example.org/prod/web-0" || len(leaf.DNSNames) != 1 || leaf.DNSNames[0] != "web.prod.svc" || r.Svids[0].Hint != "h" {
		t.Fatalf("SVID %v with DNS names %v", r.Svids[0], leaf.DNSNames)
	}
}

func TestIssuanceRefuses(t *testing.T) {
	w := newWorld(t).start(t)
	w.registerCluster(t)
	_, onNode1 := w.agent(t, "a1", "node-1")
	_, onNode2 := w.agent(t, "a2", "node-2")
	_, noNode := w.agent(t, "a3", "")
	w.createEntry(t, &adminv1.Entry{Selectors: []string{"agent:kind:join_token", "unix:uid:9"}, SpiffeId: "spiffe://example.org/nine"})
	w.createEntry(t, &adminv1.Entry{Selectors: []string{"agent:kind:join_token", "unix:user:bad"}, SpiffeId: "spiffe://example.org/{unix:path}"})
	good := w.podToken(t, pod{})
	for _, tc := range []struct {
		name  string
		cert  *tls.Certificate
		ev    *workloadv1.Evidence
		code  codes.Code
		words []string
	}{
		{"token of another node, replayed through that node's neighbour", onNode2, &workloadv1.Evidence{Token: good}, codes.PermissionDenied, []string{`"node-1"`, `"node-2"`, "web-0"}},
		{"agent without a node", noNode, &workloadv1.Evidence{Token: good}, codes.PermissionDenied, []string{"without a Kubernetes node", "--kube-node"}},
		{"tampered token", onNode1, &workloadv1.Evidence{Token: good[:len(good)-6] + "AAAAAA"}, codes.Unauthenticated, nil},
		{"expired token", onNode1, &workloadv1.Evidence{Token: w.podToken(t, pod{exp: -time.Hour})}, codes.Unauthenticated, nil},
		{"token for another audience", onNode1, &workloadv1.Evidence{Token: w.podToken(t, pod{aud: "vault"})}, codes.Unauthenticated, nil},
		{"1 MiB token", onNode1, &workloadv1.Evidence{Token: strings.Repeat("a", 1<<20)}, codes.InvalidArgument, nil},
		{"no evidence", onNode1, &workloadv1.Evidence{}, codes.InvalidArgument, nil},
		{"no evidence at all", onNode1, nil, codes.InvalidArgument, nil},
		{"an asserted namespace", noNode, &workloadv1.Evidence{Selectors: []string{"k8s:ns:prod"}}, codes.PermissionDenied, []string{"asserted"}},
		{"an asserted agent", noNode, &workloadv1.Evidence{Selectors: []string{"agent:kind:kube", "unix:uid:1"}}, codes.PermissionDenied, []string{"asserted"}},
		{"an unknown selector", noNode, &workloadv1.Evidence{Selectors: []string{"unix:uidd:1"}}, codes.InvalidArgument, nil},
		{"65 selectors", noNode, &workloadv1.Evidence{Selectors: manySelectors(65)}, codes.InvalidArgument, nil},
		{"no entry", noNode, &workloadv1.Evidence{Selectors: []string{"unix:uid:10"}}, codes.PermissionDenied, []string{"no entry matches"}},
		{"a template that yields a bad ID", noNode, &workloadv1.Evidence{Selectors: []string{"unix:user:bad", "unix:path:/usr/bin/x"}}, codes.InvalidArgument, []string{"{unix:path}"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := w.issueOne(t, w.dial(t, tc.cert), tc.ev)
			wantError(t, r, tc.code, tc.words...)
		})
	}
	t.Run("the same evidence through the right agent", func(t *testing.T) {
		if r := w.issueOne(t, w.dial(t, onNode1), &workloadv1.Evidence{Token: good}); r.Error != nil {
			t.Fatal(r.Error)
		}
		if r := w.issueOne(t, w.dial(t, noNode), &workloadv1.Evidence{Selectors: []string{"unix:uid:9"}}); r.Error != nil {
			t.Fatal(r.Error)
		}
	})
	w.wantNoSecrets(t, nil, good, strings.Split(good, ".")[2])
}

func manySelectors(n int) []string {
	out := make([]string, n)
	for i := range out {
		out[i] = fmt.Sprintf("unix:gid:%d", i)
	}
	return out
}

func TestNothingMatchedTellsSelectors(t *testing.T) {
	w := newWorld(t).start(t)
	w.registerCluster(t, func(k *identity.KubeCluster) { k.DefaultID = "" })
	_, cert := w.agent(t, "a1", "node-1")
	r := w.issueOne(t, w.dial(t, cert), &workloadv1.Evidence{Token: w.podToken(t, pod{})})
	wantError(t, r, codes.PermissionDenied)
	if len(r.Selectors) == 0 {
		t.Error("no selectors: the agent could not watch for an entry to come")
	}
}

func TestBadPublicKeys(t *testing.T) {
	w := newWorld(t).start(t)
	_, cert := w.agent(t, "a1", "")
	w.createEntry(t, &adminv1.Entry{Selectors: []string{"agent:kind:join_token"}, SpiffeId: "spiffe://example.org/x"})
	conn := w.dial(t, cert)
	_, pub := newKey(t)
	weak, err := x509.MarshalPKIXPublicKey(&rsa.PublicKey{N: new(big.Int).Lsh(big.NewInt(1), 1023), E: 65537})
	if err != nil {
		t.Fatal(err)
	}
	off := append([]byte(nil), pub...)
	off[len(off)-1] ^= 1 // off the curve
	trailing := append(append([]byte(nil), pub...), 0)

	for name, der := range map[string][]byte{"none": nil, "garbage": []byte("garbage"), "RSA-1024": weak, "off the curve": off, "trailing bytes": trailing, "too long": make([]byte, 2048)} {
		t.Run(name, func(t *testing.T) {
			resp, err := workloadv1.NewWorkloadClient(conn).IssueX509(testContext(t), &workloadv1.IssueX509Request{Requests: []*workloadv1.X509Request{
				{Evidence: &workloadv1.Evidence{Selectors: []string{"unix:uid:1"}}, PublicKey: der},
				{Evidence: &workloadv1.Evidence{Selectors: []string{"unix:uid:1"}}, PublicKey: pub},
			}})
			if err != nil {
				t.Fatal(err)
			}
			wantError(t, resp.Results[0], codes.InvalidArgument, "public key")
			if resp.Results[1].Error != nil {
				t.Errorf("the other request of the batch failed too: %v", resp.Results[1].Error)
			}
		})
	}
}

func TestBatchBounds(t *testing.T) {
	w := newWorld(t).start(t)
	_, cert := w.agent(t, "a1", "")
	c := workloadv1.NewWorkloadClient(w.dial(t, cert))
	_, err := c.IssueX509(testContext(t), &workloadv1.IssueX509Request{})
	wantCode(t, err, codes.InvalidArgument)
	_, err = c.IssueX509(testContext(t), &workloadv1.IssueX509Request{Requests: make([]*workloadv1.X509Request, 51)})
	wantCode(t, err, codes.InvalidArgument, "at the most 50")
}

func TestBatchOfFifty(t *testing.T) {
	w := newWorld(t).start(t)
	w.registerCluster(t)
	_, cert := w.agent(t, "a1", "node-1")
	req := &workloadv1.IssueX509Request{}
	for i := range 50 {
		_, pub := newKey(t)
		req.Requests = append(req.Requests, &workloadv1.X509Request{PublicKey: pub, Evidence: &workloadv1.Evidence{Token: w.podToken(t, pod{name: fmt.Sprintf("p-%d", i), sa: fmt.Sprintf("s-%d", i)})}})
	}
	resp, err := workloadv1.NewWorkloadClient(w.dial(t, cert)).IssueX509(testContext(t), req)
	if err != nil {
		t.Fatal(err)
	}
	for i, r := range resp.Results {
		if want := fmt.Sprintf("spiffe://example.org/ns/prod/sa/s-%d", i); r.Error != nil || r.Svids[0].SpiffeId != want {
			t.Fatalf("result %d: %v: want %s", i, r, want)
		}
		w.verify(t, r.Svids[0], resp.IssuerChain)
	}
}

func TestEntryThatExpires(t *testing.T) {
	w := newWorld(t).start(t)
	_, cert := w.agent(t, "a1", "")
	conn := w.dial(t, cert)
	e, err := w.state.CreateEntry(testContext(t), time.Now(), identity.Entry{ID: "e", Selectors: []identity.Selector{"agent:kind:join_token"}, SPIFFEID: "spiffe://example.org/x", ExpiresAt: time.Now().Add(10 * time.Minute)})
	if err != nil {
		t.Fatal(err)
	}
	r := w.issueOne(t, conn, &workloadv1.Evidence{Selectors: []string{"unix:uid:1"}})
	if r.Error != nil || r.Svids[0].NotAfter.AsTime().After(e.ExpiresAt) {
		t.Fatalf("result %v: the SVID must not outlive the entry (%v)", r, e.ExpiresAt)
	}
	w.ahead.Store(int64(11 * time.Minute))
	wantError(t, w.issueOne(t, conn, &workloadv1.Evidence{Selectors: []string{"unix:uid:1"}}), codes.PermissionDenied)
}

func TestUnusableEntryDoesNotSpoilAnother(t *testing.T) {
	w := newWorld(t).start(t)
	_, cert := w.agent(t, "a1", "")
	w.createEntry(t, &adminv1.Entry{Selectors: []string{"agent:kind:join_token"}, SpiffeId: "spiffe://example.org/{unix:path}"})
	w.createEntry(t, &adminv1.Entry{Selectors: []string{"agent:kind:join_token", "unix:uid:1"}, SpiffeId: "spiffe://example.org/good"})
	r := w.issueOne(t, w.dial(t, cert), &workloadv1.Evidence{Selectors: []string{"unix:uid:1", "unix:path:/bin/x"}})
	if r.Error != nil || len(r.Svids) != 1 || r.Svids[0].SpiffeId != "spiffe://example.org/good" {
		t.Fatalf("result %v", r)
	}
}

func TestAgentless(t *testing.T) {
	w := newWorld(t).start(t)
	w.registerCluster(t)
	conn := w.dial(t, nil)
	c := workloadv1.NewWorkloadClient(conn)
	_, pub := newKey(t)
	token := w.podToken(t, pod{node: "a-node-without-agent"})
	one := &workloadv1.X509Request{PublicKey: pub, Evidence: &workloadv1.Evidence{Token: token}}

	resp, err := c.IssueX509(testContext(t), &workloadv1.IssueX509Request{Requests: []*workloadv1.X509Request{one}})
	if err != nil {
		t.Fatal(err)
	}
	w.verify(t, resp.Results[0].Svids[0], resp.IssuerChain)
	if resp.Bundle == nil || len(resp.Bundle.X509Authorities) != 1 {
		t.Fatalf("bundle %v: an agentless caller has no other way to get it", resp.Bundle)
	}
	jwt, err := c.IssueJWT(testContext(t), &workloadv1.IssueJWTRequest{Evidence: one.Evidence, Audience: []string{"db"}})
	if err != nil || jwt.Bundle == nil {
		t.Fatalf("JWT %v, error %v", jwt, err)
	}

	for name, req := range map[string]*workloadv1.IssueX509Request{
		"two requests":   {Requests: []*workloadv1.X509Request{one, one}},
		"with selectors": {Requests: []*workloadv1.X509Request{{PublicKey: pub, Evidence: &workloadv1.Evidence{Token: token, Selectors: []string{"unix:uid:0"}}}}},
		"selectors only": {Requests: []*workloadv1.X509Request{{PublicKey: pub, Evidence: &workloadv1.Evidence{Selectors: []string{"unix:uid:0"}}}}},
		"no evidence":    {Requests: []*workloadv1.X509Request{{PublicKey: pub}}},
	} {
		t.Run(name, func(t *testing.T) {
			resp, err := c.IssueX509(testContext(t), req)
			if err == nil {
				t.Fatalf("answered %v", resp)
			}
			want := codes.Unauthenticated
			if name == "two requests" {
				want = codes.InvalidArgument
			}
			wantCode(t, err, want)
		})
	}
	t.Run("with another's certificate", func(t *testing.T) {
		c := workloadv1.NewWorkloadClient(w.dial(t, w.certificate(t, "/ns/prod/sa/web")))
		_, err := c.IssueX509(testContext(t), &workloadv1.IssueX509Request{Requests: []*workloadv1.X509Request{one}})
		wantCode(t, err, codes.PermissionDenied, "/ns/prod/sa/web")
		_, err = c.IssueJWT(testContext(t), &workloadv1.IssueJWTRequest{Evidence: one.Evidence, Audience: []string{"db"}})
		wantCode(t, err, codes.PermissionDenied)
	})
	w.wantNoSecrets(t, nil, token)
	before := strings.Count(w.log.String(), "call refused")
	_, err = c.IssueX509(testContext(t), &workloadv1.IssueX509Request{Requests: []*workloadv1.X509Request{{PublicKey: pub}}})
	wantCode(t, err, codes.Unauthenticated)
	if n := strings.Count(w.log.String(), "call refused") - before; n != 1 {
		t.Errorf("one refusal made %d lines", n)
	}
}

// Strangers who keep an API server busy, by tokens that they make up, keep nobody waiting but strangers.
func TestStrangersTakeTurns(t *testing.T) {
	w := newWorld(t).start(t)
	w.registerCluster(t)
	_, cert := w.agent(t, "a1", "node-1")
	for range maxTurns {
		w.srv.turns <- struct{}{}
	}
	ev := &workloadv1.Evidence{Token: w.podToken(t, pod{})}
	_, pub := newKey(t)
	ask := func() error {
		_, err := workloadv1.NewWorkloadClient(w.dial(t, nil)).IssueX509(testContext(t), &workloadv1.IssueX509Request{Requests: []*workloadv1.X509Request{{PublicKey: pub, Evidence: ev}}})
		return err
	}
	wantCode(t, ask(), codes.Unavailable, "too many tokens")
	_, err := attest(t, w.dial(t, nil), byKube(w.podToken(t, pod{ns: "countersign", sa: "agent"}), cluster, pub))
	wantCode(t, err, codes.Unavailable, "too many tokens")
	if r := w.issueOne(t, w.dial(t, cert), ev); r.Error != nil {
		t.Errorf("an agent had to wait: %v", r.Error)
	}
	<-w.srv.turns
	for range 2 { // each gives its turn back
		if err := ask(); err != nil {
			t.Error(err)
		}
	}
}

// A ban is of no use if the node's pods' tokens, which its owner has, still work without the agent.
func TestBanReachesAgentlessPods(t *testing.T) {
	w := newWorld(t).start(t)
	w.registerCluster(t)
	a, _ := w.agent(t, "a1", "node-1")
	c := workloadv1.NewWorkloadClient(w.dial(t, nil))
	_, pub := newKey(t)
	ask := func(node string) error {
		ev := &workloadv1.Evidence{Token: w.podToken(t, pod{node: node})}
		_, err := c.IssueX509(testContext(t), &workloadv1.IssueX509Request{Requests: []*workloadv1.X509Request{{PublicKey: pub, Evidence: ev}}})
		_, err2 := c.IssueJWT(testContext(t), &workloadv1.IssueJWTRequest{Evidence: ev, Audience: []string{"db"}})
		if (err == nil) != (err2 == nil) {
			t.Fatalf("X.509: %v, JWT: %v", err, err2)
		}
		return err
	}
	if err := ask("node-1"); err != nil {
		t.Fatal(err)
	}
	if _, err := w.admin(t).BanAgent(testContext(t), &adminv1.NameRequest{Name: a.ID}); err != nil {
		t.Fatal(err)
	}
	wantCode(t, ask("node-1"), codes.PermissionDenied, "node-1", "banned")
	if err := ask("node-2"); err != nil {
		t.Errorf("a pod of another node: %v", err)
	}
}

func TestIssueJWT(t *testing.T) {
	w := newWorld(t).start(t)
	_, cert := w.agent(t, "a1", "")
	w.createEntry(t, &adminv1.Entry{Selectors: []string{"agent:kind:join_token", "unix:uid:1"}, SpiffeId: "spiffe://example.org/one"})
	w.createEntry(t, &adminv1.Entry{Selectors: []string{"agent:kind:join_token", "unix:gid:1"}, SpiffeId: "spiffe://example.org/two"})
	c := workloadv1.NewWorkloadClient(w.dial(t, cert))
	ev := &workloadv1.Evidence{Selectors: []string{"unix:uid:1", "unix:gid:1"}}

	resp, err := c.IssueJWT(testContext(t), &workloadv1.IssueJWTRequest{Evidence: ev, Audience: []string{"db", "cache"}})
	if err != nil || len(resp.Svids) != 2 {
		t.Fatalf("answer %v, error %v: want both identities", resp, err)
	}
	keys := jwtbundle.New(w.td)
	for kid, der := range w.state.Bundle().JWT {
		key, err := x509.ParsePKIXPublicKey(der)
		if err != nil {
			t.Fatal(err)
		}
		keys.AddJWTAuthority(kid, key)
	}
	svid, err := jwtsvid.ParseAndValidate(resp.Svids[0].Token, keys, []string{"cache"})
	if err != nil || svid.ID.String() != "spiffe://example.org/one" {
		t.Fatalf("SVID %v, error %v", svid, err)
	}
	resp, err = c.IssueJWT(testContext(t), &workloadv1.IssueJWTRequest{Evidence: ev, Audience: []string{"db"}, SpiffeId: "spiffe://example.org/two"})
	if err != nil || len(resp.Svids) != 1 || resp.Svids[0].SpiffeId != "spiffe://example.org/two" {
		t.Fatalf("answer %v, error %v", resp, err)
	}
	w.wantNoSecrets(t, nil, resp.Svids[0].Token)
	long := make([]string, identity.MaxAudiences+1)
	for i := range long {
		long[i] = "a"
	}
	for name, tc := range map[string]struct {
		req  *workloadv1.IssueJWTRequest
		code codes.Code
	}{
		"no audience":        {&workloadv1.IssueJWTRequest{Evidence: ev}, codes.InvalidArgument},
		"empty audience":     {&workloadv1.IssueJWTRequest{Evidence: ev, Audience: []string{""}}, codes.InvalidArgument},
		"too many audiences": {&workloadv1.IssueJWTRequest{Evidence: ev, Audience: long}, codes.InvalidArgument},
		"long audience":      {&workloadv1.IssueJWTRequest{Evidence: ev, Audience: []string{strings.Repeat("a", 513)}}, codes.InvalidArgument},
		"not entitled":       {&workloadv1.IssueJWTRequest{Evidence: ev, Audience: []string{"db"}, SpiffeId: "spiffe://example.org/three"}, codes.PermissionDenied},
		"no identity":        {&workloadv1.IssueJWTRequest{Evidence: &workloadv1.Evidence{Selectors: []string{"unix:uid:5"}}, Audience: []string{"db"}}, codes.PermissionDenied},
		"no evidence":        {&workloadv1.IssueJWTRequest{Audience: []string{"db"}}, codes.InvalidArgument},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := c.IssueJWT(testContext(t), tc.req)
			wantCode(t, err, tc.code)
		})
	}
}

func TestNotReady(t *testing.T) {
	w := newWorld(t).start(t)
	_, cert := w.agent(t, "a1", "")
	c := workloadv1.NewWorkloadClient(w.dial(t, cert))
	w.stale.Store(int64(2 * time.Hour))
	_, err := c.IssueX509(testContext(t), &workloadv1.IssueX509Request{Requests: []*workloadv1.X509Request{{}}})
	wantCode(t, err, codes.Unavailable, "max_staleness", "2h0m0s")
	_, err = c.IssueJWT(testContext(t), &workloadv1.IssueJWTRequest{Audience: []string{"a"}})
	wantCode(t, err, codes.Unavailable, "max_staleness")
	st, err := w.admin(t).Status(testContext(t), &adminv1.Empty{})
	if err != nil || st.Issuing || !strings.Contains(st.NotIssuingBecause, "max_staleness") {
		t.Fatalf("status %v, error %v", st, err)
	}
	w.stale.Store(0)
	if err := w.srv.Ready(); err != nil {
		t.Fatal(err)
	}
}

func TestNotReadyWithoutAuthority(t *testing.T) {
	w := newWorld(t) // not started: nobody has made an authority
	if err := w.srv.Ready(); err == nil || !strings.Contains(err.Error(), "authority") {
		t.Fatalf("error %v: want the reason", err)
	}
	ctx := context.WithValue(context.Background(), callKey{}, call{caller: caller{kind: guest}})
	if _, err := (workloadService{Server: w.srv}).IssueX509(ctx, &workloadv1.IssueX509Request{}); err == nil {
		t.Fatal("issued")
	}
}
