package server

import (
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"countersign.io/countersign/api"
	adminv1 "countersign.io/countersign/api/admin/v1"
	"countersign.io/countersign/audit"
	"countersign.io/countersign/ca"
	"countersign.io/countersign/identity"
)

// roleOfRPC is what each RPC must need of a remote admin, written down a second time: who changes one decides it twice.
func roleOfRPC() map[string]identity.AdminRole {
	out := map[string]identity.AdminRole{}
	for role, methods := range map[identity.AdminRole]string{
		identity.AdminReader: `Admin/ListKubeClusters Admin/GetEntry Admin/ListEntries Admin/ListAgents Admin/GetAgent Admin/GetBundle Admin/Status
			Admin/ClusterStatus Admin/ListAuthorities Admin/SealStatus Admin/QueryAudit Checkup/Examine Checkup/Clock Trust/GetRotation Trust/WatchRotation
			Federation/ListFederations Federation/GetFederation Federation/DescribeEndpoint Health/Check Health/List Health/Watch ServerReflection/ServerReflectionInfo`,
		identity.AdminOperator: `Admin/CreateToken Admin/CreateEntry Admin/UpdateEntry Admin/DeleteEntry Admin/BanAgent Admin/EvictAgent Admin/TransferLeader
			Federation/RefreshFederation Preview/CreateEntry Preview/UpdateEntry Preview/DeleteEntry Preview/BanAgent Preview/EvictAgent Mint/MintX509 Mint/MintJWT`,
		identity.AdminSecurity: `Admin/AddKubeCluster Admin/DeleteKubeCluster Admin/RotateSeal Admin/RewrapSeal Admin/RemoveMember Admin/SaveBackup
			Preview/AddKubeCluster Preview/DeleteKubeCluster Preview/RemoveMember Preview/RotateSeal
			Federation/CreateFederation Federation/UpdateFederation Federation/DeleteFederation Trust/Rotate Trust/ChangeRotation Trust/Rollback Trust/PrepareAuthority Trust/ActivateAuthority Trust/TaintAuthority Trust/RevokeAuthority`,
	} {
		for _, m := range strings.Fields(methods) {
			out[m] = role
		}
	}
	return out
}

// dialAdmin connects as a remote admin does.
func (w *world) dialAdmin(t testing.TB, cert *tls.Certificate) *grpc.ClientConn {
	t.Helper()
	conf := &tls.Config{MinVersion: tls.VersionTLS13, NextProtos: []string{api.ALPNAdmin}, InsecureSkipVerify: true}
	if cert != nil {
		conf.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil }
	}
	conn, err := grpc.NewClient("passthrough:///"+w.port.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) {
			return (&tls.Dialer{Config: conf}).DialContext(ctx, "tcp", addr)
		}))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// adminEntry makes an admin of whoever has the path's ID.
func (w *world) adminEntry(t testing.TB, path string, role identity.AdminRole, edits ...func(*adminv1.Entry)) *adminv1.Entry {
	t.Helper()
	e := &adminv1.Entry{Selectors: []string{"k8s:ns:ops", "k8s:sa:" + strings.ReplaceAll(strings.Trim(path, "/"), "/", "-")}, SpiffeId: "spiffe://example.org" + path, AdminRole: string(role)}
	for _, f := range edits {
		f(e)
	}
	return w.createEntry(t, e)
}

// as connects as an admin of the role, by an entry.
func (w *world) as(t testing.TB, role identity.AdminRole) adminv1.AdminClient {
	t.Helper()
	return adminv1.NewAdminClient(w.asConn(t, role))
}

func (w *world) asConn(t testing.TB, role identity.AdminRole) *grpc.ClientConn {
	t.Helper()
	path := "/ops/" + string(role)
	if len(w.state.AdminEntries("spiffe://example.org"+path)) == 0 {
		w.adminEntry(t, path, role)
	}
	return w.dialAdmin(t, w.certificate(t, path))
}

// TestEveryRPCByEveryRole calls each RPC that operators have, as everybody.
func TestEveryRPCByEveryRole(t *testing.T) {
	w := newWorld(t).start(t)
	_, agentCert := w.agent(t, "a1", "")
	callers := map[string]*grpc.ClientConn{
		"":        w.dialAdmin(t, w.certificate(t, "/ns/prod/sa/web")),
		"guest":   w.dialAdmin(t, nil),
		"agent":   w.dialAdmin(t, agentCert),
		"member":  w.dialAdmin(t, w.certificate(t, "/countersign/member/m1")),
		"as h2":   nil, // below
		"by name": w.dialAdmin(t, w.certificate(t, "/admin")),
	}
	for _, role := range []identity.AdminRole{identity.AdminReader, identity.AdminOperator, identity.AdminSecurity} {
		callers[string(role)] = w.asConn(t, role)
	}
	callers["as h2"] = w.dial(t, w.certificate(t, "/ops/security")) // the right SVID on the port of everybody else
	want, seen := roleOfRPC(), map[string]bool{}
	for _, r := range rpcsOf(w.srv.admins) {
		short := r.method[strings.LastIndexByte(r.method, '.')+1:]
		need, ok := want[short]
		if !ok {
			t.Errorf("%s: nobody decided what role it needs", r.method)
			continue
		}
		seen[short] = true
		if got := ruleFor(r.method); got.role != need || got.by&(remote|local) != remote|local {
			t.Errorf("%s: the rule is %+v, want %s", r.method, got, need)
		}
		for name, conn := range callers {
			err := try(t, conn, r)
			code := status.Code(err)
			switch role := identity.AdminRole(name); {
			case name == "guest" || name == "agent" || name == "member": // the connection itself
				if code != codes.Unavailable {
					t.Errorf("%s by %s on a connection for admins: %v", r.method, name, err)
				}
			case name == "as h2":
				if code == codes.OK && !strings.HasSuffix(r.method, "Health/Check") || code != codes.OK && code != codes.Unimplemented && code != codes.PermissionDenied {
					t.Errorf("%s on a connection that is not for admins: %v", r.method, err)
				}
			case name == "" || name == "by name":
				if code != codes.PermissionDenied || !strings.Contains(err.Error(), "is no admin") {
					t.Errorf("%s by a workload: %v", r.method, err)
				}
			case short == "Admin/CreateToken" && role == identity.AdminOperator: // the empty message is for no agent, see TestOperatorsCannotRise
			case role.Includes(need):
				if code == codes.PermissionDenied || code == codes.Unauthenticated || code == codes.Unimplemented {
					t.Errorf("%s by %s: %v: it needs %s", r.method, name, err, need)
				}
			default:
				if code != codes.PermissionDenied || !strings.Contains(err.Error(), "needs the role "+string(need)) {
					t.Errorf("%s by %s: %v: it needs %s", r.method, name, err, need)
				}
			}
		}
	}
	for _, m := range slices.Sorted(maps.Keys(want)) {
		if !seen[m] {
			t.Errorf("%s is not served to admins", m)
		}
	}
	if a, b, c := rpcsOf(w.srv.admin), rpcsOf(w.srv.admins), rpcsOf(w.srv.candidates); !slices.Equal(a, b) || !slices.Equal(a, c) {
		t.Errorf("on the socket %v\non the port %v\nof candidates %v", a, b, c)
	}
}

// What an operator may not do by way of what he may: make himself somebody who may do more.
func TestOperatorsCannotRise(t *testing.T) {
	w := newUpperCluster(t)
	boss := w.adminEntry(t, "/boss", identity.AdminSecurity)
	peer := w.adminEntry(t, "/peer", identity.AdminReader)
	below := w.downstreamEntry(t, "/below")
	plain := w.createEntry(t, &adminv1.Entry{Selectors: []string{"k8s:ns:plain"}, SpiffeId: "spiffe://example.org/plain"})
	conn := w.asConn(t, identity.AdminOperator)
	op, mint := adminv1.NewAdminClient(conn), adminv1.NewMintClient(conn)
	sec := w.as(t, identity.AdminSecurity)
	ctx := testContext(t)
	_, pub := newKey(t)
	entry := func(id string, edit func(*adminv1.Entry)) *adminv1.Entry {
		e := &adminv1.Entry{Selectors: []string{"k8s:ns:mine"}, SpiffeId: "spiffe://example.org/" + id}
		if edit != nil {
			edit(e)
		}
		return e
	}
	changed := func(e *adminv1.Entry, edit func(*adminv1.Entry)) *adminv1.Entry {
		c := &adminv1.Entry{Id: e.Id, Selectors: e.Selectors, SpiffeId: e.SpiffeId, AdminRole: e.AdminRole, Downstream: e.Downstream}
		edit(c)
		return c
	}
	own := func(e *adminv1.Entry) { e.Selectors = []string{"k8s:ns:mine"} }
	for name, call := range map[string]func() error{
		"an admin entry": func() error {
			_, err := op.CreateEntry(ctx, entry("x", func(e *adminv1.Entry) { e.Admin = true }))
			return err
		},
		"an entry with a role": func() error {
			_, err := op.CreateEntry(ctx, entry("x", func(e *adminv1.Entry) { e.AdminRole = "reader" }))
			return err
		},
		"a downstream entry": func() error {
			_, err := op.CreateEntry(ctx, entry("x", func(e *adminv1.Entry) { e.Downstream = true }))
			return err
		},
		"an entry for an admin's ID":  func() error { _, err := op.CreateEntry(ctx, entry("boss", nil)); return err },
		"one for a cluster below's":   func() error { _, err := op.CreateEntry(ctx, entry("below", nil)); return err },
		"another's selectors":         func() error { _, err := op.UpdateEntry(ctx, changed(boss, own)); return err },
		"a reader's selectors":        func() error { _, err := op.UpdateEntry(ctx, changed(peer, own)); return err },
		"a cluster below's selectors": func() error { _, err := op.UpdateEntry(ctx, changed(below, own)); return err },
		"taking the role away": func() error {
			_, err := op.UpdateEntry(ctx, changed(boss, func(e *adminv1.Entry) { e.AdminRole = "" }))
			return err
		},
		"moving an entry there": func() error {
			_, err := op.UpdateEntry(ctx, changed(plain, func(e *adminv1.Entry) { e.SpiffeId = boss.SpiffeId }))
			return err
		},
		"a role for an entry": func() error {
			_, err := op.UpdateEntry(ctx, changed(plain, func(e *adminv1.Entry) { e.AdminRole = "operator" }))
			return err
		},
		"deleting an admin":        func() error { _, err := op.DeleteEntry(ctx, &adminv1.NameRequest{Name: boss.Id}); return err },
		"deleting a cluster below": func() error { _, err := op.DeleteEntry(ctx, &adminv1.NameRequest{Name: below.Id}); return err },
		"a member's token": func() error {
			_, err := op.CreateToken(ctx, &adminv1.CreateTokenRequest{Purpose: identity.JoinServer})
			return err
		},
		"a token for nobody knows": func() error { _, err := op.CreateToken(ctx, &adminv1.CreateTokenRequest{Purpose: "x"}); return err },
		"an admin's certificate": func() error {
			_, err := mint.MintX509(ctx, &adminv1.MintX509Request{SpiffeId: boss.SpiffeId, PublicKey: pub})
			return err
		},
		"a reader's certificate": func() error {
			_, err := mint.MintX509(ctx, &adminv1.MintX509Request{SpiffeId: peer.SpiffeId, PublicKey: pub})
			return err
		},
		"a cluster below's": func() error {
			_, err := mint.MintX509(ctx, &adminv1.MintX509Request{SpiffeId: below.SpiffeId, PublicKey: pub})
			return err
		},
		"an admin's JWT": func() error {
			_, err := mint.MintJWT(ctx, &adminv1.MintJWTRequest{SpiffeId: boss.SpiffeId, Audience: []string{"a"}})
			return err
		},
	} {
		if err := call(); status.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), "needs the role security") {
			t.Errorf("%s: %v", name, err)
		}
	}
	// What is his to do he can; and who has the role can do all of it.
	if _, err := op.UpdateEntry(ctx, changed(plain, func(e *adminv1.Entry) { e.X509Ttl = durationpb.New(time.Hour) })); err != nil {
		t.Error(err)
	}
	if _, err := op.DeleteEntry(ctx, &adminv1.NameRequest{Name: plain.Id}); err != nil {
		t.Error(err)
	}
	if _, err := op.CreateToken(ctx, &adminv1.CreateTokenRequest{Purpose: identity.JoinAgent}); err != nil {
		t.Error(err)
	}
	if _, err := sec.UpdateEntry(ctx, changed(peer, func(e *adminv1.Entry) { e.AdminRole = "operator" })); err != nil {
		t.Error(err)
	}
	if _, err := sec.CreateToken(ctx, &adminv1.CreateTokenRequest{Purpose: identity.JoinServer}); err != nil {
		t.Error(err)
	}
	if _, err := sec.DeleteEntry(ctx, &adminv1.NameRequest{Name: boss.Id}); err != nil {
		t.Error(err)
	}
	// The refusal is on record: who, as what, about what.
	e := w.wantEvent(t, "admin.create_token", audit.Refused)
	if e.Who.Kind != "admin" || e.Who.Role != "operator" || e.Who.ID != "spiffe://example.org/ops/operator" || e.Who.Serial == "" || e.Who.Address == "" || e.Details.Get("purpose") == "" {
		t.Errorf("recorded as %+v", e)
	}
	if e := w.wantEvent(t, "admin.delete_entry", audit.Refused); len(e.Subjects) != 1 {
		t.Errorf("recorded as %+v", e)
	}
}

// No template and no other entry leads to an admin's ID.
func TestOnlyAdminEntriesGiveTheirIDs(t *testing.T) {
	chief := spiffeid.RequireFromString("spiffe://example.org/shop/chief")
	w := newWorld(t, func(c *Config) { c.AdminRoles = map[spiffeid.ID]identity.AdminRole{chief: identity.AdminSecurity} }).start(t)
	w.registerCluster(t)
	w.createEntry(t, &adminv1.Entry{Selectors: []string{"k8s:ns:shop"}, SpiffeId: "spiffe://example.org/{k8s:ns}/{k8s:sa}"})
	w.createEntry(t, &adminv1.Entry{Selectors: []string{"k8s:ns:other"}, SpiffeId: "spiffe://example.org/shop/web"})
	given := func(ns, sa string) error {
		_, _, err := w.srv.entitled([]identity.Selector{identity.Selector("k8s:ns:" + ns), identity.Selector("k8s:sa:" + sa)}, time.Now())
		return err
	}
	for _, ns := range []string{"shop", "other"} {
		if err := given(ns, "web"); err != nil {
			t.Fatalf("%s: %v", ns, err)
		}
	}
	reader := w.createEntry(t, &adminv1.Entry{Selectors: []string{"k8s:ns:ops"}, SpiffeId: "spiffe://example.org/shop/web", AdminRole: "reader"})
	for _, ns := range []string{"shop", "other"} {
		if err := given(ns, "web"); !errors.Is(err, identity.ErrDenied) {
			t.Errorf("%s: %v", ns, err)
		}
	}
	if err := given("ops", "any"); err != nil {
		t.Error(err)
	}
	// An entry of more power takes the ID from one of less.
	w.createEntry(t, &adminv1.Entry{Selectors: []string{"k8s:ns:top"}, SpiffeId: "spiffe://example.org/shop/web", AdminRole: "security"})
	if err := given("ops", "any"); !errors.Is(err, identity.ErrDenied) {
		t.Errorf("%s: %v", reader.Id, err)
	}
	if err := given("top", "any"); err != nil {
		t.Error(err)
	}
	// By configuration.
	if err := given("shop", "chief"); !errors.Is(err, identity.ErrDenied) || !strings.Contains(err.Error(), "admin.ids") {
		t.Errorf("by a template: %v", err)
	}
	w.createEntry(t, &adminv1.Entry{Selectors: []string{"k8s:ns:it"}, SpiffeId: chief.String()})
	if err := given("it", "any"); err != nil {
		t.Errorf("spelt out: %v", err)
	}
	if _, err := w.as(t, identity.AdminOperator).CreateEntry(testContext(t), &adminv1.Entry{Selectors: []string{"k8s:ns:mine"}, SpiffeId: chief.String()}); status.Code(err) != codes.PermissionDenied {
		t.Errorf("an operator gives it to another: %v", err)
	}
}

// The power is that of this moment, whatever the SVID says.
func TestPowerEnds(t *testing.T) {
	boss := spiffeid.RequireFromString("spiffe://example.org/chief")
	w := newWorld(t, func(c *Config) { c.AdminRoles = map[spiffeid.ID]identity.AdminRole{boss: identity.AdminOperator} }).start(t)
	ctx := testContext(t)
	status1 := func(c adminv1.AdminClient) error { _, err := c.Status(ctx, &adminv1.Empty{}); return err }
	entry := w.adminEntry(t, "/ops/one", identity.AdminOperator)
	one := adminv1.NewAdminClient(w.dialAdmin(t, w.certificate(t, "/ops/one")))
	if err := status1(one); err != nil {
		t.Fatal(err)
	}
	if e := w.wantEvent(t, "admin.status", audit.OK); e.Who.Kind != "admin" || e.Who.Role != "operator" || e.Who.Serial == "" {
		t.Errorf("recorded as %+v", e)
	}
	entry.AdminRole = "reader"
	entry, err := w.admin(t).UpdateEntry(ctx, entry)
	if err != nil {
		t.Fatal(err)
	}
	if err := status1(one); err != nil {
		t.Fatal(err)
	}
	_, err = one.EvictAgent(ctx, &adminv1.NameRequest{Name: "x"})
	wantCode(t, err, codes.PermissionDenied, "has the role reader")
	stream, err := one.QueryAudit(ctx, &adminv1.AuditQuery{Follow: true})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.admin(t).DeleteEntry(ctx, &adminv1.NameRequest{Name: entry.Id}); err != nil {
		t.Fatal(err)
	}
	wantCode(t, status1(one), codes.PermissionDenied, "is no admin")
	for err = nil; err == nil; {
		_, err = stream.Recv()
	}
	wantCode(t, err, codes.PermissionDenied, "is no admin")
	if e := w.wantEvent(t, "admin.status", audit.Refused); e.Who.Kind != "workload" || e.Who.ID != "spiffe://example.org/ops/one" || e.Who.Serial == "" {
		t.Errorf("recorded as %+v", e)
	}
	// An entry that has expired, though nobody swept it.
	w.adminEntry(t, "/ops/short", identity.AdminReader, func(e *adminv1.Entry) { e.ExpiresAt = timestamppb.New(time.Now().Add(30 * time.Minute)) })
	short := adminv1.NewAdminClient(w.dialAdmin(t, w.certificate(t, "/ops/short")))
	chief := adminv1.NewAdminClient(w.dialAdmin(t, w.certificate(t, "/chief")))
	for _, c := range []adminv1.AdminClient{short, chief} {
		if err := status1(c); err != nil {
			t.Fatal(err)
		}
	}
	w.ahead.Store(int64(45 * time.Minute))
	wantCode(t, status1(short), codes.PermissionDenied, "is no admin")
	if err := status1(chief); err != nil {
		t.Fatal(err)
	}
	// A member that is cut off does not know who is an admin.
	w.stale.Store(int64(2 * time.Hour))
	wantCode(t, status1(chief), codes.Unavailable, "who is an admin")
	if err := status1(w.admin(t)); err != nil {
		t.Errorf("on the socket: %v", err)
	}
	w.stale.Store(0)
	stream, err = chief.QueryAudit(ctx, &adminv1.AuditQuery{Follow: true})
	if err != nil {
		t.Fatal(err)
	}
	w.ahead.Store(int64(2 * time.Hour))
	wantCode(t, status1(chief), codes.Unauthenticated, "expired")
	for err = nil; err == nil; {
		_, err = stream.Recv()
	}
	wantCode(t, err, codes.Unauthenticated, "expired")
}

// A change needs the power as the cluster knows it, not only as this member does.
func TestChangesAskTheLeaderWhoIsAnAdmin(t *testing.T) {
	var w *world
	barrier := func() error { return nil }
	w = newWorld(t, func(c *Config) { c.Cluster.ReadBarrier = func(context.Context) error { return barrier() } }).start(t)
	entry := w.adminEntry(t, "/ops/one", identity.AdminOperator)
	conn := w.dialAdmin(t, w.certificate(t, "/ops/one"))
	c, ctx := adminv1.NewAdminClient(conn), testContext(t)
	if _, err := c.CreateToken(ctx, &adminv1.CreateTokenRequest{Purpose: identity.JoinAgent}); err != nil {
		t.Fatal(err)
	}
	_, pub := newKey(t)
	calls := map[string]func() error{
		"a change": func() error {
			_, err := c.CreateToken(ctx, &adminv1.CreateTokenRequest{Purpose: identity.JoinAgent})
			return err
		},
		"an entry": func() error {
			_, err := c.CreateEntry(ctx, &adminv1.Entry{Selectors: []string{"k8s:ns:x"}, SpiffeId: "spiffe://example.org/x"})
			return err
		},
		"a mint": func() error {
			_, err := adminv1.NewMintClient(conn).MintX509(ctx, &adminv1.MintX509Request{SpiffeId: "spiffe://example.org/x", PublicKey: pub})
			return err
		},
	}
	barrier = func() error { return fmt.Errorf("%w: no leader", identity.ErrUnavailable) }
	for name, call := range calls {
		if err := call(); status.Code(err) != codes.Unavailable {
			t.Errorf("%s without a leader: %v", name, err)
		}
	}
	// The barrier brings the news.
	barrier = func() error { return w.state.DeleteEntry(context.Background(), entry.Id) }
	wantCode(t, calls["a mint"](), codes.PermissionDenied, "is no admin")
	if n := len(w.audit.find(audit.MintX509, audit.OK)); n != 0 {
		t.Errorf("%d certificates were minted", n)
	}
}

func TestAdminsAreLimited(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.Limits.AdminRate, c.Limits.AdminBurst = 0.001, 3 }).start(t)
	a, b := w.as(t, identity.AdminReader), w.as(t, identity.AdminOperator)
	ctx := testContext(t)
	for range 3 {
		if _, err := a.Status(ctx, &adminv1.Empty{}); err != nil {
			t.Fatal(err)
		}
	}
	_, err := a.Status(ctx, &adminv1.Empty{})
	wantCode(t, err, codes.ResourceExhausted, "too many calls")
	if _, err := b.Status(ctx, &adminv1.Empty{}); err != nil {
		t.Errorf("another admin: %v", err)
	}
}

// Who has an SVID and no power stays a stranger, whatever he says in the handshake: his connections give way to others'.
func TestWorkloadsOnAdminConnectionsStayStrangers(t *testing.T) {
	w := newWorldOn(t, ListenConfig{MaxStrangers: 2}).start(t)
	admin := w.as(t, identity.AdminReader)
	if _, err := admin.Status(testContext(t), &adminv1.Empty{}); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		_, err := adminv1.NewAdminClient(w.dialAdmin(t, w.certificate(t, "/ns/prod/sa/web"))).Status(testContext(t), &adminv1.Empty{})
		wantCode(t, err, codes.PermissionDenied)
	}
	w.port.mu.Lock()
	n, enlisted := w.port.strangers.Len(), len(w.port.perAgent)
	w.port.mu.Unlock()
	if n > 2 || enlisted != 1 {
		t.Errorf("%d strangers, %d that are known", n, enlisted)
	}
	// They get no more memory than guests do.
	big := &adminv1.Entry{Hint: strings.Repeat("x", maxGuestMessage+1)}
	_, err := adminv1.NewAdminClient(w.dialAdmin(t, w.certificate(t, "/ns/prod/sa/web"))).CreateEntry(testContext(t), big)
	wantCode(t, err, codes.ResourceExhausted, "larger than max")
	_, err = w.as(t, identity.AdminOperator).CreateEntry(testContext(t), big)
	wantCode(t, err, codes.InvalidArgument)
}

// Who could have an admin's ID before it was one does not become an admin by having kept an SVID.
func TestSVIDsFromBeforeGiveNoPower(t *testing.T) {
	w := newWorld(t).start(t)
	early := w.certificate(t, "/ops/chief") // minted while it was a workload's ID like any other
	e := w.adminEntry(t, "/ops/chief", identity.AdminSecurity)
	call := func(c *tls.Certificate) error {
		_, err := adminv1.NewAdminClient(w.dialAdmin(t, c)).Status(testContext(t), &adminv1.Empty{})
		return err
	}
	since := func(at time.Time) {
		w.state.mu.Lock()
		defer w.state.mu.Unlock()
		changed := *w.state.entries[e.Id]
		changed.PowerSince = at
		w.state.entries[e.Id] = &changed
	}
	since(time.Now().Add(-time.Hour))
	if err := call(early); err != nil {
		t.Fatal(err)
	}
	since(time.Now().Add(time.Minute))
	wantCode(t, call(early), codes.PermissionDenied, "was made an admin: get a new one")
	if e := w.wantEvent(t, "admin.status", audit.Refused); e.Who.Kind != "workload" || e.Who.Role != "" {
		t.Errorf("recorded as %+v", e)
	}
}

// A cluster below may sign any name of the trust domain, and another trust domain its own: neither makes an admin.
func TestAdminsOfOtherClusters(t *testing.T) {
	w := newUpperCluster(t)
	w.adminEntry(t, "/boss", identity.AdminSecurity)
	ok := adminv1.NewAdminClient(w.dialAdmin(t, w.certificate(t, "/boss")))
	if _, err := ok.Status(testContext(t), &adminv1.Empty{}); err != nil {
		t.Fatal(err)
	}
	below := w.nested(t, "/below")
	td := spiffeid.RequireTrustDomainFromString("other.org")
	foreign, err := ca.New(ca.Config{TrustDomain: td, MemberName: "m1"})
	if err != nil {
		t.Fatal(err)
	}
	a, der, err := ca.NewX509Authority(td, time.Hour, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	a.SealedKey = []byte("x")
	err = foreign.SetAuthorities([]identity.Authority{a}, func(identity.Authority) (crypto.Signer, error) {
		k, err := x509.ParsePKCS8PrivateKey(der)
		return k.(crypto.Signer), err
	})
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		ca *ca.CA
		td spiffeid.TrustDomain
	}{"below": {below, w.td}, "foreign": {foreign, td}} {
		key, _ := newKey(t)
		p, err := c.ca.PrepareX509(identity.Issuance{ID: spiffeid.RequireFromPath(c.td, "/boss"), PublicKey: key.Public()})
		if err != nil {
			t.Fatal(err)
		}
		svid, err := p.Issue()
		if err != nil {
			t.Fatal(err)
		}
		conn := w.dialAdmin(t, &tls.Certificate{Certificate: svid.Chain, PrivateKey: key})
		if _, err := adminv1.NewAdminClient(conn).Status(testContext(t), &adminv1.Empty{}); status.Code(err) != codes.Unavailable {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Below an upstream's root others may sign too, without a mark of their own: they make no admins.
func TestAdminsByAnotherAuthority(t *testing.T) {
	w, u := newUpperWorld(t)
	w.start(t)
	w.adminEntry(t, "/boss", identity.AdminSecurity)
	if _, err := adminv1.NewAdminClient(w.dialAdmin(t, w.certificate(t, "/boss"))).Status(testContext(t), &adminv1.Empty{}); err != nil {
		t.Fatal(err)
	}
	a, der, err := ca.NewX509AuthorityUnder(testContext(t), w.td, u, time.Hour, time.Now)
	if err != nil {
		t.Fatal(err)
	}
	beside, err := ca.New(ca.Config{TrustDomain: w.td, MemberName: "m9"})
	if err != nil {
		t.Fatal(err)
	}
	a.SealedKey = []byte("x")
	err = beside.SetAuthorities([]identity.Authority{a}, func(identity.Authority) (crypto.Signer, error) {
		k, err := x509.ParsePKCS8PrivateKey(der)
		return k.(crypto.Signer), err
	})
	if err != nil {
		t.Fatal(err)
	}
	key, _ := newKey(t)
	p, err := beside.PrepareX509(identity.Issuance{ID: spiffeid.RequireFromPath(w.td, "/boss"), PublicKey: key.Public()})
	if err != nil {
		t.Fatal(err)
	}
	svid, err := p.Issue()
	if err != nil {
		t.Fatal(err)
	}
	_, err = adminv1.NewAdminClient(w.dialAdmin(t, &tls.Certificate{Certificate: svid.Chain, PrivateKey: key})).Status(testContext(t), &adminv1.Empty{})
	wantCode(t, err, codes.PermissionDenied, "not issued by a member of this cluster")
	if e := w.wantEvent(t, "admin.status", audit.Refused); e.Who.Kind != "workload" {
		t.Errorf("recorded as %+v", e)
	}
}

func TestConfiguredAdminsAreChecked(t *testing.T) {
	for id, role := range map[string]identity.AdminRole{
		"spiffe://example.org/countersign/member/m1": identity.AdminReader, "spiffe://other.org/x": identity.AdminReader,
		"spiffe://example.org": identity.AdminReader, "spiffe://example.org/x": "root",
	} {
		c := Config{TrustDomain: spiffeid.RequireTrustDomainFromString("example.org"), AdminRoles: map[spiffeid.ID]identity.AdminRole{spiffeid.RequireFromString(id): role}}
		if err := c.checkAdmins(); !errors.Is(err, identity.ErrInvalid) {
			t.Errorf("%s as %s: %v", id, role, err)
		}
	}
}
