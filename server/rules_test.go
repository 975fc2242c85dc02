package server

import (
	"context"
	"crypto/tls"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	adminv1 "countersign.io/countersign/api/admin/v1"
	workloadv1 "countersign.io/countersign/api/workload/v1"
	"countersign.io/countersign/audit"
	"countersign.io/countersign/identity"
)

type rpc struct {
	method    string
	streaming bool
}

func rpcsOf(s *grpc.Server) []rpc {
	var out []rpc
	for name, info := range s.GetServiceInfo() {
		for _, m := range info.Methods {
			out = append(out, rpc{"/" + name + "/" + m.Name, m.IsClientStream || m.IsServerStream})
		}
	}
	slices.SortFunc(out, func(a, b rpc) int { return strings.Compare(a.method, b.method) })
	return out
}

// try calls an RPC with an empty message and returns how it ended.
func try(t *testing.T, conn *grpc.ClientConn, r rpc) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	defer cancel()
	if !r.streaming {
		return conn.Invoke(ctx, r.method, &emptypb.Empty{}, &emptypb.Empty{})
	}
	s, err := conn.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, r.method)
	if err != nil {
		return err
	}
	s.SendMsg(&emptypb.Empty{}) // its error is io.EOF when the stream has ended; RecvMsg says how
	if err := s.CloseSend(); err != nil {
		return err
	}
	return s.RecvMsg(&emptypb.Empty{})
}

// TestEveryRPCHasARule calls each registered RPC as everybody, and finds the table's answer and no other.
func TestEveryRPCHasARule(t *testing.T) {
	w := newWorld(t).start(t)
	_, agentCert := w.agent(t, "a1", "")
	network := map[kind]*grpc.ClientConn{
		guest:    w.dial(t, nil),
		workload: w.dial(t, w.certificate(t, "/ns/prod/sa/web")),
		member:   w.dial(t, w.certificate(t, "/countersign/member/m1")),
		agent:    w.dial(t, agentCert),
	}
	denied := func(k kind, r rpc) codes.Code {
		if k == guest && ruleFor(r.method).by&agent != 0 {
			return codes.Unauthenticated
		}
		return codes.PermissionDenied
	}
	seen := map[string]bool{}
	for _, srv := range []*grpc.Server{w.srv.agents, w.srv.guests} {
		for _, r := range rpcsOf(srv) {
			if ruleFor(r.method).by == 0 {
				t.Errorf("%s has no rule", r.method)
			}
			if seen[r.method] {
				continue
			}
			seen[r.method] = true
			for k, conn := range network {
				err := try(t, conn, r)
				refused := err != nil && status.Code(err) == denied(k, r) && (strings.Contains(err.Error(), "is not for") || strings.Contains(err.Error(), "needs the SVID"))
				if allowed := ruleFor(r.method).by&k != 0; allowed == refused {
					t.Errorf("%s by %s: %v: the rule allows it: %t", r.method, k, err, allowed)
				}
			}
		}
	}
	for _, want := range []string{"Node/Attest", "Node/Renew", "Node/Sync", "Workload/IssueX509", "Workload/IssueJWT", "Member/Join"} {
		if !slices.ContainsFunc(rpcsOf(w.srv.guests), func(r rpc) bool { return strings.HasSuffix(r.method, want) }) {
			t.Errorf("%s is not served", want)
		}
	}
}

func TestEveryAdminRPCIsLocal(t *testing.T) {
	stranger := newWorld(t, func(c *Config) { c.operator = func(uint32) bool { return false } }).start(t)
	friend := newWorld(t).start(t)
	no := dialWith(t, stranger.socket, insecure.NewCredentials())
	yes := dialWith(t, friend.socket, insecure.NewCredentials())
	rpcs := rpcsOf(friend.srv.admin)
	if len(rpcs) < 15 {
		t.Fatalf("only %d RPCs on the admin socket", len(rpcs))
	}
	for _, r := range rpcs {
		rule := ruleFor(r.method)
		if rule.by&local == 0 || rule.role == "" {
			t.Errorf("%s has no rule for operators", r.method)
		}
		if err := try(t, no, r); status.Code(err) != codes.PermissionDenied {
			t.Errorf("%s by another local user: %v: want PermissionDenied", r.method, err)
		}
		if strings.HasSuffix(r.method, "/Watch") {
			continue // it answers, and goes on
		}
		if err := try(t, yes, r); err != nil && strings.Contains(err.Error(), "is not for") {
			t.Errorf("%s by an operator: %v", r.method, err)
		}
	}
}

func TestOperators(t *testing.T) {
	for uid, want := range map[uint32]bool{0: true, 4_000_000_000: false} {
		if rootOrSelf(uid) != want {
			t.Errorf("uid %d: want %t", uid, want)
		}
	}
}

func TestUnknownMethodHasNoRule(t *testing.T) {
	if k := ruleFor("/countersign.node.v1.Node/New"); k.by != 0 {
		t.Fatalf("allowed to %v", k)
	}
	w := newWorld(t).start(t)
	_, cert := w.agent(t, "a1", "")
	for _, conn := range []*grpc.ClientConn{w.dial(t, nil), w.dial(t, cert)} {
		err := try(t, conn, rpc{method: "/countersign.admin.v1.Admin/CreateToken"}) // not on this port
		wantCode(t, err, codes.Unimplemented)
	}
}

func TestAgentsThatAreRefused(t *testing.T) {
	w := newWorld(t).start(t)
	banned, bannedCert := w.agent(t, "banned", "")
	evicted, evictedCert := w.agent(t, "evicted", "")
	_, goodCert := w.agent(t, "good", "")
	unknownCert := w.certificate(t, "/countersign/agent/join/unknown")
	ctx := testContext(t)
	if err := w.state.BanAgent(ctx, banned.ID); err != nil {
		t.Fatal(err)
	}
	if err := w.state.EvictAgent(ctx, evicted.ID); err != nil {
		t.Fatal(err)
	}
	methods := []rpc{{"/countersign.node.v1.Node/Renew", false}, {"/countersign.node.v1.Node/Sync", true}, {"/countersign.workload.v1.Workload/IssueX509", false}, {"/countersign.workload.v1.Workload/IssueJWT", false}}
	check := func(name string, cert *tls.Certificate, code codes.Code, word string) {
		t.Helper()
		conn := w.dial(t, cert)
		for _, m := range methods {
			if err := try(t, conn, m); status.Code(err) != code || !strings.Contains(err.Error(), word) {
				t.Errorf("%s, %s: %v: want %v with %q", name, m.method, err, code, word)
			}
		}
	}
	check("banned", bannedCert, codes.PermissionDenied, "banned")
	// Without a record and fresh: perhaps this member is behind. Later: evicted.
	check("unknown", unknownCert, codes.Unavailable, "does not know")
	w.ahead.Store(int64(3 * time.Minute))
	check("evicted", evictedCert, codes.PermissionDenied, "evicted")
	w.ahead.Store(int64(2 * time.Hour))
	check("expired while connected", goodCert, codes.Unauthenticated, "expired")
}

func TestGuestsAreRateLimited(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.Limits = Limits{GuestRate: 0.001, GuestBurst: 3, TotalRate: 1e6, TotalBurst: 1e6} }).start(t)
	_, cert := w.agent(t, "a1", "")
	conn := w.dial(t, nil)
	r := rpc{method: "/countersign.workload.v1.Workload/IssueX509"}
	for range 3 {
		wantCode(t, try(t, conn, r), codes.InvalidArgument)
	}
	wantCode(t, try(t, conn, r), codes.ResourceExhausted, "too many calls")
	wantCode(t, try(t, conn, rpc{method: "/countersign.member.v1.Member/Join"}), codes.ResourceExhausted)
	wantCode(t, try(t, conn, rpc{"/countersign.node.v1.Node/Attest", true}), codes.ResourceExhausted)
	// Agents are not strangers, even from the same address.
	wantCode(t, try(t, w.dial(t, cert), r), codes.InvalidArgument, "no requests")
}

// Each SVID is a record in the audit log: one agent must not fill it.
func TestAgentsAreRateLimited(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.Limits = Limits{AgentRate: 0.001, AgentBurst: 8} }).start(t)
	_, greedy := w.agent(t, "a1", "")
	_, other := w.agent(t, "a2", "")
	for i := range 3 {
		w.createEntry(t, &adminv1.Entry{Selectors: []string{"agent:kind:join_token", "unix:uid:9"}, SpiffeId: fmt.Sprintf("spiffe://example.org/%d", i)})
	}
	ev := &workloadv1.Evidence{Selectors: []string{"unix:uid:9"}}
	conn := w.dial(t, greedy)
	if r := w.issueOne(t, conn, ev); r.Error != nil || len(r.Svids) != 3 {
		t.Fatalf("result %v", r)
	}
	if r := w.issueOne(t, conn, ev); r.Error != nil {
		t.Fatalf("result %v", r)
	}
	// Two are left: the request is within them, its three identities are not.
	if r := w.issueOne(t, conn, ev); r.Error == nil || codes.Code(r.Error.Code) != codes.ResourceExhausted || !strings.Contains(r.Error.Message, "try again") {
		t.Fatalf("result %v", r)
	}
	client := workloadv1.NewWorkloadClient(conn)
	_, err := client.IssueJWT(testContext(t), &workloadv1.IssueJWTRequest{Evidence: ev, Audience: []string{"a"}})
	wantCode(t, err, codes.ResourceExhausted)
	_, err = client.IssueX509(testContext(t), &workloadv1.IssueX509Request{Requests: make([]*workloadv1.X509Request, 2)})
	wantCode(t, err, codes.ResourceExhausted, "/a1 ")
	if x, j := len(w.audit.find(audit.IssueX509, audit.OK)), len(w.audit.find(audit.IssueJWT, audit.OK)); x != 6 || j != 0 {
		t.Errorf("%d X.509-SVIDs and %d JWT-SVIDs are on record, want 6 and none", x, j)
	}
	if r := w.issueOne(t, w.dial(t, other), ev); r.Error != nil {
		t.Errorf("another agent: %v", r.Error)
	}
}

func TestLimitsTotal(t *testing.T) {
	l, err := newLimits(Limits{GuestRate: 0.001, GuestBurst: 1, TotalRate: 0.001, TotalBurst: 2})
	if err != nil {
		t.Fatal(err)
	}
	addr := func(i int) error { return l.allow(addrOf(stringAddr(fmt.Sprintf("10.0.0.%d:1", i)))) }
	if err := addr(1); err != nil {
		t.Fatal(err)
	}
	for range 5 { // over its own limit: must not use up the total
		if err := addr(1); err == nil {
			t.Fatal("not limited")
		}
	}
	if err := addr(2); err != nil {
		t.Fatal(err)
	}
	if err := addr(3); err == nil || !strings.Contains(err.Error(), identity.ErrUnavailable.Error()) {
		t.Fatalf("error %v: want the total to say unavailable", err)
	}
}

type stringAddr string

func (stringAddr) Network() string  { return "tcp" }
func (s stringAddr) String() string { return string(s) }

func TestAddressesCountAsOne(t *testing.T) {
	for _, tc := range []struct{ a, b string }{{"[2001:db8::1]:1", "[2001:db8::ffff]:2"}, {"10.0.0.1:1", "[::ffff:10.0.0.1]:9"}} {
		if a, b := addrOf(stringAddr(tc.a)), addrOf(stringAddr(tc.b)); a != b || !a.IsValid() {
			t.Errorf("%s is %v, %s is %v: want one", tc.a, a, tc.b, b)
		}
	}
	if a, b := addrOf(stringAddr("[2001:db8:0:1::1]:1")), addrOf(stringAddr("[2001:db8:0:2::1]:1")); a == b {
		t.Error("two networks count as one")
	}
}
