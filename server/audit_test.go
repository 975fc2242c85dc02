package server

import (
	"cmp"
	"context"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"

	adminv1 "countersign.io/countersign/api/admin/v1"
	memberv1 "countersign.io/countersign/api/member/v1"
	nodev1 "countersign.io/countersign/api/node/v1"
	workloadv1 "countersign.io/countersign/api/workload/v1"
	"countersign.io/countersign/attestor/node"
	"countersign.io/countersign/audit"
	"countersign.io/countersign/identity"
)

// fakeAudit keeps events, and fails when told to.
type fakeAudit struct {
	mu     sync.Mutex
	events []audit.Event
	down   error             // of Ready and Record
	deaf   error             // of Record alone
	before func(audit.Event) // what happens between a record and what it announces
}

func (f *fakeAudit) Record(_ context.Context, events ...audit.Event) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := cmp.Or(f.down, f.deaf); err != nil {
		return err
	}
	f.events = append(f.events, events...)
	if f.before != nil {
		for _, e := range events {
			f.before(e)
		}
	}
	return nil
}

func (f *fakeAudit) Note(_ string, e audit.Event) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.events = append(f.events, e)
}

func (f *fakeAudit) Query(ctx context.Context, q audit.Query, yield func([]byte) error) error {
	f.mu.Lock()
	events := slices.Clone(f.events)
	f.mu.Unlock()
	for _, e := range events {
		if err := yield(fmt.Appendf(nil, "%s %s", e.Action, e.Outcome)); err != nil {
			return err
		}
	}
	if q.Follow {
		<-ctx.Done()
	}
	return ctx.Err()
}

func (f *fakeAudit) Ready() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.down
}

func (f *fakeAudit) set(g func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	g()
}

// text is all that was recorded.
func (f *fakeAudit) text() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return fmt.Sprintf("%+v", f.events)
}

var errAuditDown = fmt.Errorf("%w: the audit log is down", identity.ErrUnavailable)

// find returns the events of an action with an outcome.
func (f *fakeAudit) find(action audit.Action, outcome audit.Outcome) []audit.Event {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(f.events), func(e audit.Event) bool { return e.Action != action || e.Outcome != outcome })
}

// TestEveryRPCHasAnAuditRule: whatever any of the servers answers.
func TestEveryRPCHasAnAuditRule(t *testing.T) {
	w := newWorld(t)
	n := 0
	for _, r := range slices.Concat(rpcsOf(w.srv.agents), rpcsOf(w.srv.guests), rpcsOf(w.srv.admin), rpcsOf(w.srv.admins)) {
		n++
		rule, ok := auditRuleFor(r.method)
		if !ok || rule.action == "" || rule.mode == 0 {
			t.Errorf("%s has no audit rule", r.method)
			continue
		}
		if strings.Contains(r.method, ".Admin/") && (rule.mode == auditNever || rule.mode == auditWalk || !strings.HasPrefix(string(rule.action), "admin.")) {
			t.Errorf("%s is an operator's: its rule is %v %s", r.method, rule.mode, rule.action)
		}
		if rule.mode == auditNever && strings.HasPrefix(r.method, "/countersign.") {
			t.Errorf("%s is never recorded", r.method)
		}
		if r.streaming && (rule.on != nil || rule.with != nil) {
			t.Errorf("%s is a stream: its first message is not at hand when it is recorded", r.method)
		}
	}
	if n < 40 {
		t.Fatalf("only %d RPCs", n)
	}
	if _, ok := auditRuleFor("/countersign.admin.v1.Admin/New"); ok {
		t.Fatal("a method that is not there has a rule")
	}
}

func (w *world) wantEvent(t testing.TB, action audit.Action, outcome audit.Outcome) audit.Event {
	t.Helper()
	var out audit.Event
	eventually(t, fmt.Sprintf("%s %s is recorded", action, outcome), func() bool {
		all := w.audit.find(action, outcome)
		if len(all) > 0 {
			out = all[len(all)-1]
		}
		return len(all) > 0
	})
	return out
}

// TestIssuanceIsRecorded: one record for each SVID, with what it takes to find it again.
func TestIssuanceIsRecorded(t *testing.T) {
	w := newWorld(t).start(t)
	w.registerCluster(t)
	a, cert := w.agent(t, "a1", "node-1")
	conn := w.dial(t, cert)
	e := w.createEntry(t, &adminv1.Entry{Selectors: []string{"k8s:ns:prod"}, SpiffeId: "spiffe://example.org/one"})
	w.createEntry(t, &adminv1.Entry{Selectors: []string{"k8s:ns:prod"}, SpiffeId: "spiffe://example.org/two"})
	_, pub := newKey(t)
	token := w.podToken(t, pod{})
	reqs := []*workloadv1.X509Request{
		{Evidence: &workloadv1.Evidence{Token: token}, PublicKey: pub}, {Evidence: &workloadv1.Evidence{Token: "junk"}, PublicKey: pub},
	}
	var trailer metadata.MD
	resp, err := workloadv1.NewWorkloadClient(conn).IssueX509(testContext(t), &workloadv1.IssueX509Request{Requests: reqs}, grpc.Trailer(&trailer))
	if err != nil {
		t.Fatal(err)
	}
	events := w.audit.find(audit.IssueX509, audit.OK)
	if len(events) != 2 {
		t.Fatalf("%d records", len(events))
	}
	for i, svid := range resp.Results[0].Svids {
		leaf, err := x509.ParseCertificate(svid.Leaf)
		if err != nil {
			t.Fatal(err)
		}
		got := events[i]
		if got.Serial != leaf.SerialNumber.Text(16) || !got.NotAfter.Equal(leaf.NotAfter) || got.Subjects[0] != svid.SpiffeId || got.Entry != svid.EntryId || got.EntryRevision != svid.EntryRevision {
			t.Errorf("the record of %s: %+v", svid.SpiffeId, got)
		}
		if got.Who.Kind != "agent" || got.Who.ID != a.ID || got.Who.Serial == "" || !strings.HasPrefix(got.Who.Address, "127.0.0.1:") || !slices.Contains(got.Workload, "k8s:pod-name:web-0") || got.Revision == 0 {
			t.Errorf("who and what: %+v", got)
		}
		if ids := trailer.Get(RequestIDKey); len(ids) != 1 || ids[0] != got.RequestID {
			t.Errorf("the caller is told the request ID %v, the record has %q", ids, got.RequestID)
		}
	}
	if e.Id != events[0].Entry {
		t.Errorf("entry %s: %+v", e.Id, events[0])
	}
	if refused := w.wantEvent(t, audit.IssueX509, audit.Refused); refused.Reason == "" || refused.RequestID != events[0].RequestID {
		t.Errorf("the refused one: %+v", refused)
	}
	jwt, err := workloadv1.NewWorkloadClient(conn).IssueJWT(testContext(t), &workloadv1.IssueJWTRequest{Evidence: &workloadv1.Evidence{Token: token}, Audience: []string{"db"}, SpiffeId: "spiffe://example.org/one"})
	if err != nil {
		t.Fatal(err)
	}
	got := w.audit.find(audit.IssueJWT, audit.OK)
	if len(got) != 1 || !slices.Equal(got[0].Audience, []string{"db"}) || !got[0].NotAfter.Equal(jwt.Svids[0].ExpiresAt.AsTime()) || got[0].Details.Get("kid") == "" {
		t.Errorf("the JWT-SVID: %+v", got)
	}
	w.wantNoSecrets(t, nil, token, jwt.Svids[0].Token, strings.Split(jwt.Svids[0].Token, ".")[2])
}

// TestNothingIsDoneUnrecorded: whether the log says so beforehand or not.
func TestNothingIsDoneUnrecorded(t *testing.T) {
	w := newWorld(t).start(t)
	w.registerCluster(t)
	_, cert := w.agent(t, "a1", "node-1")
	conn, guests := w.dial(t, cert), w.dial(t, nil)
	entry := w.createEntry(t, &adminv1.Entry{Selectors: []string{"k8s:ns:x"}, SpiffeId: "spiffe://example.org/x"})
	secret := w.joinToken(t, &adminv1.CreateTokenRequest{Purpose: "agent"}).Secret
	serverSecret := w.joinToken(t, &adminv1.CreateTokenRequest{Purpose: "server"}).Secret
	_, pub := newKey(t)
	ev := &workloadv1.Evidence{Token: w.podToken(t, pod{})}
	ctx, admin := testContext(t), w.admin(t)
	for name, set := range map[string]func(){"it says so": func() { w.audit.down = errAuditDown }, "it says nothing": func() { w.audit.deaf = errAuditDown }} {
		w.audit.set(set)
		before := w.state.Revision()
		if _, err := workloadv1.NewWorkloadClient(guests).IssueX509(ctx, &workloadv1.IssueX509Request{Requests: []*workloadv1.X509Request{{Evidence: ev, PublicKey: pub}}}); err == nil {
			t.Errorf("%s: agentless issuance", name)
		}
		resp, err := workloadv1.NewWorkloadClient(conn).IssueX509(ctx, &workloadv1.IssueX509Request{Requests: []*workloadv1.X509Request{{Evidence: ev, PublicKey: pub}}})
		if err == nil {
			wantError(t, resp.Results[0], codes.Unavailable, "audit log")
		} else {
			wantCode(t, err, codes.Unavailable, "audit log")
		}
		_, err = workloadv1.NewWorkloadClient(conn).IssueJWT(ctx, &workloadv1.IssueJWTRequest{Evidence: ev, Audience: []string{"db"}})
		wantCode(t, err, codes.Unavailable, "audit log")
		_, err = nodev1.NewNodeClient(conn).Renew(ctx, &nodev1.RenewRequest{PublicKey: pub})
		wantCode(t, err, codes.Unavailable, "audit log")
		_, err = attest(t, guests, byJoin(secret, pub))
		wantCode(t, err, codes.Unavailable, "audit log")
		_, err = memberv1.NewMemberClient(guests).Join(ctx, &memberv1.JoinRequest{Secret: serverSecret, Id: "m2", Address: "10.0.0.2:1", Level: 2})
		wantCode(t, err, codes.Unavailable, "audit log")
		_, err = admin.CreateEntry(ctx, &adminv1.Entry{Selectors: []string{"k8s:ns:y"}, SpiffeId: "spiffe://example.org/y"})
		wantCode(t, err, codes.Unavailable, "audit log")
		_, err = admin.GetEntry(ctx, &adminv1.NameRequest{Name: entry.Id})
		wantCode(t, err, codes.Unavailable, "audit log")
		if _, err := admin.Status(ctx, &adminv1.Empty{}); err != nil {
			t.Errorf("%s: an operator cannot find out why: %v", name, err)
		}
		if now := w.state.Revision(); now != before {
			t.Errorf("%s: the state changed from revision %d to %d", name, before, now)
		}
		w.audit.set(func() { w.audit.down, w.audit.deaf = nil, nil })
	}
	if n := len(w.audit.find(audit.IssueX509, audit.OK)) + len(w.audit.find(audit.AttestNode, audit.OK)); n > 0 {
		t.Errorf("%d records of what was not done", n)
	}
	// And it goes on, with the tokens unspent.
	eventually(t, "it issues again", func() bool { return w.srv.Ready() == nil })
	if _, err := attest(t, guests, byJoin(secret, pub)); err != nil {
		t.Error(err)
	}
}

// TestWhatWasAnnouncedAndFailed has a second record.
func TestWhatWasAnnouncedAndFailed(t *testing.T) {
	w := newWorld(t).start(t)
	w.registerCluster(t)
	_, cert := w.agent(t, "a1", "node-1")
	all := w.state.Authorities()
	w.audit.set(func() {
		w.audit.before = func(e audit.Event) { // the authority is given up in between
			if e.Action == audit.IssueX509 || e.Action == audit.IssueJWT || e.Action == audit.RenewAgent {
				if err := w.ca.SetAuthorities(nil, w.open); err != nil {
					t.Log(err)
				}
			}
		}
	})
	conn := w.dial(t, cert)
	again := func() {
		if err := w.ca.SetAuthorities(all, w.open); err != nil {
			t.Fatal(err)
		}
	}
	r := w.issueOne(t, conn, &workloadv1.Evidence{Token: w.podToken(t, pod{})})
	if r.Error == nil {
		t.Fatal("issued")
	}
	ok, failed := w.audit.find(audit.IssueX509, audit.OK), w.audit.find(audit.IssueX509, audit.Failed)
	if len(ok) != 1 || len(failed) == 0 || failed[0].Serial != ok[0].Serial || failed[0].RequestID != ok[0].RequestID || failed[0].Reason == "" {
		t.Errorf("X.509: announced %+v, failed %+v", ok, failed)
	}
	again()
	if _, err := workloadv1.NewWorkloadClient(conn).IssueJWT(testContext(t), &workloadv1.IssueJWTRequest{Evidence: &workloadv1.Evidence{Token: w.podToken(t, pod{})}, Audience: []string{"db"}}); err == nil {
		t.Fatal("issued")
	}
	if len(w.audit.find(audit.IssueJWT, audit.Failed)) == 0 {
		t.Error("JWT: no record of the failure")
	}
	again()
	_, pub := newKey(t)
	if _, err := nodev1.NewNodeClient(conn).Renew(testContext(t), &nodev1.RenewRequest{PublicKey: pub}); err == nil {
		t.Fatal("renewed")
	}
	if len(w.audit.find(audit.RenewAgent, audit.Failed)) == 0 {
		t.Error("the agent's renewal: no record of the failure")
	}
}

// TestOperatorsCallsAreRecorded: changes before and after, under one request; reads once.
func TestOperatorsCallsAreRecorded(t *testing.T) {
	w := newWorld(t).start(t)
	w.registerCluster(t)
	admin, ctx := w.admin(t), testContext(t)
	a, _ := w.agent(t, "a1", "node-1")
	e := w.createEntry(t, &adminv1.Entry{Selectors: []string{"k8s:ns:prod"}, SpiffeId: "spiffe://example.org/one"})
	for _, x := range []struct {
		action  audit.Action
		subject string
		call    func() error
	}{
		{"admin.ban_agent", a.ID, func() error { _, err := admin.BanAgent(ctx, &adminv1.NameRequest{Name: a.ID}); return err }},
		{"admin.evict_agent", a.ID, func() error { _, err := admin.EvictAgent(ctx, &adminv1.NameRequest{Name: a.ID}); return err }},
		{"admin.create_entry", "spiffe://example.org/one", func() error { return nil }},
		{"admin.delete_entry", e.Id, func() error { _, err := admin.DeleteEntry(ctx, &adminv1.NameRequest{Name: e.Id}); return err }},
	} {
		if err := x.call(); err != nil {
			t.Fatal(err)
		}
		before, after := w.wantEvent(t, x.action, audit.Attempted), w.wantEvent(t, x.action, audit.OK)
		if before.RequestID == "" || before.RequestID != after.RequestID || after.Revision == 0 || before.Who.Kind != "operator" || before.Who.UID == "" || !slices.Contains(before.Subjects, x.subject) || !slices.Contains(after.Subjects, x.subject) {
			t.Errorf("%s: %+v, then %+v", x.action, before, after)
		}
	}
	if after := w.wantEvent(t, "admin.create_entry", audit.OK); !slices.Contains(after.Subjects, e.Id) || after.Revision != e.Revision {
		t.Errorf("the entry that was made: %+v", after)
	}
	if _, err := admin.DeleteEntry(ctx, &adminv1.NameRequest{Name: e.Id}); err == nil {
		t.Fatal("deleted twice")
	}
	if refused := w.wantEvent(t, "admin.delete_entry", audit.Refused); refused.Reason == "" || refused.Subjects[0] != e.Id {
		t.Errorf("refused: %+v", refused)
	}
	if _, err := admin.ListEntries(ctx, &adminv1.ListRequest{}); err != nil {
		t.Fatal(err)
	}
	w.wantEvent(t, "admin.list_entries", audit.OK)
	if n := len(w.audit.find("admin.list_entries", audit.Attempted)); n != 0 {
		t.Errorf("a read is recorded %d times before", n)
	}
	stream, err := admin.QueryAudit(ctx, &adminv1.AuditQuery{})
	if err != nil {
		t.Fatal(err)
	}
	if m, err := stream.Recv(); err != nil || len(m.Lines) == 0 {
		t.Fatalf("%v %v", m, err)
	}
	w.wantEvent(t, "admin.query_audit", audit.OK)
	for _, action := range []audit.Action{audit.BundleChange, audit.MemberChange, audit.AuthorityCreate} {
		if action == audit.AuthorityCreate {
			w.wantEvent(t, action, audit.Attempted)
			continue
		}
		w.wantEvent(t, action, audit.OK)
	}
}

// TestNoSecretIsRecorded drives everything that carries one, with a log on a disk.
func TestNoSecretIsRecorded(t *testing.T) {
	dir := filepath.Join(privateDir(t), "audit")
	l, err := audit.New(audit.Config{Member: "m1", Dir: dir, Reserve: 1 << 16})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- l.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	w := newWorld(t, func(c *Config) { c.Audit = l }).start(t)
	w.registerCluster(t)
	admin, guests := w.admin(t), w.dial(t, nil)
	var secrets []string
	secret := func(s string) string { secrets = append(secrets, s); return s }
	_, cert := w.agent(t, "a1", "node-1")
	conn := w.dial(t, cert)
	call := testContext(t)

	good, other := secret(w.podToken(t, pod{})), secret(w.podToken(t, pod{node: "node-9"}))
	agentToken := secret(w.podToken(t, pod{ns: "countersign", sa: "agent"}))
	junk := secret("ey" + strings.Repeat("SECRETJUNK", 20))
	for _, s := range []string{good, other, agentToken} {
		secret(strings.Split(s, ".")[2])
	}
	_, pub := newKey(t)
	for _, token := range []string{good, other, junk} {
		for _, c := range []*grpc.ClientConn{conn, guests} {
			ev := &workloadv1.Evidence{Token: token}
			_, _ = workloadv1.NewWorkloadClient(c).IssueX509(call, &workloadv1.IssueX509Request{Requests: []*workloadv1.X509Request{{Evidence: ev, PublicKey: pub}}})
			if resp, err := workloadv1.NewWorkloadClient(c).IssueJWT(call, &workloadv1.IssueJWTRequest{Evidence: ev, Audience: []string{"db"}}); err == nil {
				secret(resp.Svids[0].Token)
			}
		}
		_, _ = attest(t, guests, byKube(token, cluster, pub))
	}
	if _, err := attest(t, guests, byKube(agentToken, cluster, pub)); err != nil {
		t.Fatal(err)
	}
	for _, purpose := range []string{"agent", "server"} {
		resp, err := admin.CreateToken(call, &adminv1.CreateTokenRequest{Purpose: purpose})
		if err != nil {
			t.Fatal(err)
		}
		tok, err := node.ParseToken(secret(resp.Token))
		if err != nil {
			t.Fatal(err)
		}
		secret(tok.Secret)
		hash := node.HashSecret(tok.Secret)
		secret(hex.EncodeToString(hash))
		secret(base64.StdEncoding.EncodeToString(hash))
		for range 2 {
			_, _ = attest(t, guests, byJoin(tok.Secret, pub))
			_, _ = memberv1.NewMemberClient(guests).Join(call, &memberv1.JoinRequest{Secret: tok.Secret, Id: "m2", Address: "10.0.0.2:1", Level: 2})
		}
	}
	_, _ = attest(t, guests, byJoin(secret(node.Token{}.Secret+"SECRETSECRETSECRETSECRETSECRETSECRETSECRETSE"), pub))
	jwks := `{"keys":[{"kty":"oct","k":"` + secret("SECRETKEYSECRETKEY") + `"}]}`
	_, _ = admin.AddKubeCluster(call, &adminv1.KubeCluster{Name: "c2", Issuer: "https://x", Audience: "a", Jwks: []byte(jwks)})
	_, _ = admin.AddKubeCluster(call, &adminv1.KubeCluster{Name: "c3", Issuer: "https://x", Audience: "a", JwksUrl: "https://user:" + secret("SECRETPASSWORD") + "@x/jwks?token=" + secret("SECRETQUERY"), NoDefaultId: true})
	secret("the keyring") // of Join's answer
	for _, r := range rpcsOf(w.srv.admin) {
		if strings.HasPrefix(r.method, "/countersign.") {
			_ = try(t, dialWith(t, w.socket, insecure.NewCredentials()), r)
		}
	}
	w.stop()
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	done <- nil
	if rep, err := audit.VerifyDir(dir, audit.VerifyConfig{}); err != nil || rep.Records < 40 || len(rep.Faults) > 0 {
		t.Fatalf("%+v %v", rep, err)
	}
	files, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil || len(files) < 3 {
		t.Fatal(files, err)
	}
	seen := map[string]bool{}
	for _, f := range files {
		raw, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		for _, line := range strings.Split(string(raw), "\n") {
			if r, err := audit.Parse([]byte(line)); err == nil {
				seen[string(r.Action)+" "+string(r.Outcome)] = true
			}
		}
		for i, s := range secrets {
			if s != "" && strings.Contains(string(raw), s) {
				t.Errorf("secret %d is in %s", i, f)
			}
		}
	}
	for _, want := range []string{"issue.x509 ok", "issue.x509 refused", "issue.jwt ok", "issue.jwt refused", "agent.attest ok", "agent.attest refused", "member.join ok", "member.join refused", "admin.create_token ok", "admin.add_kube_cluster attempted", "admin.save_backup attempted"} {
		if !seen[want] {
			t.Errorf("the test drives no %q", want)
		}
	}
}

// TestFollowingDoesNotKeepTheMember: who looks on is told that it stops.
func TestFollowingDoesNotKeepTheMember(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.Audit = followed{c.Audit} }).start(t)
	stream, err := w.admin(t).QueryAudit(testContext(t), &adminv1.AuditQuery{Follow: true})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); err != nil {
		t.Fatal(err)
	}
	w.stop()
	_, err = stream.Recv()
	wantCode(t, err, codes.Unavailable, "stopping")
}

// followed goes on until its reader leaves.
type followed struct{ Audit }

func (f followed) Query(ctx context.Context, _ audit.Query, yield func([]byte) error) error {
	if err := yield([]byte("a line")); err != nil {
		return err
	}
	<-ctx.Done()
	return ctx.Err()
}
