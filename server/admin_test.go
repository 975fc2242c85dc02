package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	reflectionv1 "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"google.golang.org/grpc/credentials/insecure"

	adminv1 "countersign.io/countersign/api/admin/v1"
	memberv1 "countersign.io/countersign/api/member/v1"
	"countersign.io/countersign/attestor/node"
	"countersign.io/countersign/identity"
)

func TestEntriesByAdmin(t *testing.T) {
	w := newWorld(t).start(t)
	c, ctx := w.admin(t), testContext(t)
	good := func() *adminv1.Entry {
		return &adminv1.Entry{Selectors: []string{"k8s:ns:prod"}, SpiffeId: "spiffe://example.org/x", X509Ttl: durationpb.New(time.Minute)}
	}
	e, err := c.CreateEntry(ctx, good())
	if err != nil || e.Id == "" || e.Revision == 0 || e.CreatedAt == nil {
		t.Fatalf("entry %v, error %v", e, err)
	}
	got, err := c.GetEntry(ctx, &adminv1.NameRequest{Name: e.Id})
	if err != nil || got.SpiffeId != e.SpiffeId {
		t.Fatalf("entry %v, error %v", got, err)
	}
	_, err = c.CreateEntry(ctx, good())
	wantCode(t, err, codes.AlreadyExists, e.Id)
	for name, edit := range map[string]func(*adminv1.Entry){
		"a bad ID":               func(e *adminv1.Entry) { e.SpiffeId = "spiffe://example.org/a//b" },
		"another trust domain":   func(e *adminv1.Entry) { e.SpiffeId = "spiffe://example.com/a" },
		"a reserved ID":          func(e *adminv1.Entry) { e.SpiffeId = "spiffe://example.org/countersign/member/m1" },
		"no path":                func(e *adminv1.Entry) { e.SpiffeId = "spiffe://example.org" },
		"a bad template":         func(e *adminv1.Entry) { e.SpiffeId = "spiffe://example.org/{k8s:nope}" },
		"no selectors":           func(e *adminv1.Entry) { e.Selectors = nil },
		"an agent's word alone":  func(e *adminv1.Entry) { e.Selectors = []string{"unix:uid:0"} },
		"a misspelt selector":    func(e *adminv1.Entry) { e.Selectors = []string{"k8s:namespace:prod"} },
		"an ID of the caller's":  func(e *adminv1.Entry) { e.Id = "mine" },
		"expired":                func(e *adminv1.Entry) { e.ExpiresAt = timestamppb.New(time.Now().Add(-time.Hour)) },
		"too long a TTL":         func(e *adminv1.Entry) { e.X509Ttl = durationpb.New(48 * time.Hour) },
		"a negative TTL":         func(e *adminv1.Entry) { e.JwtTtl = durationpb.New(-time.Hour) },
		"a DNS name with spaces": func(e *adminv1.Entry) { e.DnsNames = []string{"a b"} },
	} {
		t.Run(name, func(t *testing.T) {
			bad := good()
			bad.SpiffeId = "spiffe://example.org/y"
			edit(bad)
			_, err := c.CreateEntry(ctx, bad)
			wantCode(t, err, codes.InvalidArgument)
		})
	}
	e.Hint = "h"
	rev := e.Revision
	updated, err := c.UpdateEntry(ctx, e)
	if err != nil || updated.Hint != "h" || updated.Revision <= rev {
		t.Fatalf("entry %v, error %v", updated, err)
	}
	e.Revision = rev
	_, err = c.UpdateEntry(ctx, e)
	wantCode(t, err, codes.FailedPrecondition)
	_, err = c.UpdateEntry(ctx, good())
	wantCode(t, err, codes.InvalidArgument, "ID")
	for i := range 3 {
		x := good()
		x.SpiffeId = fmt.Sprintf("spiffe://example.org/n/%d", i)
		if _, err := c.CreateEntry(ctx, x); err != nil {
			t.Fatal(err)
		}
	}
	n := 0
	for token := ""; ; {
		page, err := c.ListEntries(ctx, &adminv1.ListRequest{PageSize: 3, PageToken: token})
		if err != nil {
			t.Fatal(err)
		}
		n += len(page.Entries)
		if token = page.NextPageToken; token == "" {
			break
		}
	}
	if n != 4 {
		t.Fatalf("%d entries listed: want 4", n)
	}
	_, err = c.ListEntries(ctx, &adminv1.ListRequest{PageSize: 1001})
	wantCode(t, err, codes.InvalidArgument)
	if _, err := c.DeleteEntry(ctx, &adminv1.NameRequest{Name: e.Id}); err != nil {
		t.Fatal(err)
	}
	_, err = c.DeleteEntry(ctx, &adminv1.NameRequest{Name: e.Id})
	wantCode(t, err, codes.NotFound)
	_, err = c.GetEntry(ctx, &adminv1.NameRequest{Name: e.Id})
	wantCode(t, err, codes.NotFound)
}

func TestKubeClustersByAdmin(t *testing.T) {
	w := newWorld(t).start(t)
	w.registerCluster(t)
	c, ctx := w.admin(t), testContext(t)
	all, err := c.ListKubeClusters(ctx, &adminv1.ListRequest{})
	if err != nil || len(all.KubeClusters) != 1 {
		t.Fatalf("clusters %v, error %v", all, err)
	}
	k := all.KubeClusters[0]
	_, err = c.AddKubeCluster(ctx, k)
	wantCode(t, err, codes.AlreadyExists)
	k.Replace, k.DefaultId, k.NoDefaultId = true, "", true
	if got, err := c.AddKubeCluster(ctx, k); err != nil || got.DefaultId != "" || !got.NoDefaultId {
		t.Fatalf("cluster %v, error %v", got, err)
	}
	_, err = c.AddKubeCluster(ctx, &adminv1.KubeCluster{Name: "x", Issuer: "i", Audience: "a"})
	wantCode(t, err, codes.InvalidArgument, "no way to verify")
	_, err = c.AddKubeCluster(ctx, &adminv1.KubeCluster{Name: "x", Issuer: "i", Audience: "a", Jwks: []byte("{}")})
	wantCode(t, err, codes.InvalidArgument)
	_, err = c.AddKubeCluster(ctx, &adminv1.KubeCluster{Name: "x", Issuer: issuer, Audience: "a", Kubeconfig: "/nowhere", TokenReview: true})
	wantCode(t, err, codes.InvalidArgument, "same issuer")
	// Two clusters have the same identities only if somebody says so.
	k.NoDefaultId = false
	if _, err := c.AddKubeCluster(ctx, k); err != nil { // again, and not its own rival
		t.Fatal(err)
	}
	edge := func(edit func(*adminv1.KubeCluster)) error {
		e := &adminv1.KubeCluster{Name: "edge", Issuer: "https://edge.test", Audience: "a", Jwks: k.Jwks, Replace: true}
		edit(e)
		_, err := c.AddKubeCluster(ctx, e)
		return err
	}
	wantCode(t, edge(func(*adminv1.KubeCluster) {}), codes.FailedPrecondition, `"c1"`, "/edge/ns/{k8s:ns}/sa/{k8s:sa}")
	for what, edit := range map[string]func(*adminv1.KubeCluster){
		"its own":            func(e *adminv1.KubeCluster) { e.DefaultId = "/edge" + identity.DefaultKubeID },
		"none":               func(e *adminv1.KubeCluster) { e.NoDefaultId = true },
		"the same, and said": func(e *adminv1.KubeCluster) { e.DefaultId = identity.DefaultKubeID },
	} {
		if err := edge(edit); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	_, err = c.DeleteKubeCluster(ctx, &adminv1.NameRequest{Name: "nope"})
	wantCode(t, err, codes.NotFound)
}

func TestCreateToken(t *testing.T) {
	w := newWorld(t).start(t)
	c, ctx := w.admin(t), testContext(t)
	for i := range 40 { // more members than a token can name
		if err := w.state.PutMember(ctx, identity.Member{ID: fmt.Sprintf("x%d", i), Address: fmt.Sprintf("10.0.0.%d:8443", i)}); err != nil {
			t.Fatal(err)
		}
	}
	resp, err := c.CreateToken(ctx, &adminv1.CreateTokenRequest{Purpose: "server", Ttl: durationpb.New(time.Hour)})
	if err != nil {
		t.Fatal(err)
	}
	tok, err := node.ParseToken(resp.Token)
	if err != nil {
		t.Fatal(err)
	}
	bundle, err := c.GetBundle(ctx, &adminv1.Empty{})
	if err != nil || bundle.CaPin != tok.Pin || len(tok.Addresses) != node.MaxAddresses || tok.Purpose != identity.JoinServer {
		t.Fatalf("token %v, bundle %v, error %v", tok, bundle, err)
	}
	if d := time.Until(resp.ExpiresAt.AsTime()); d < 59*time.Minute || d > time.Hour {
		t.Errorf("expires in %v", d)
	}
	w.wantNoSecrets(t, nil, tok.Secret, resp.Token)
	for name, req := range map[string]*adminv1.CreateTokenRequest{
		"no purpose":        {},
		"another purpose":   {Purpose: "admin"},
		"too long":          {Purpose: "agent", Ttl: durationpb.New(25 * time.Hour)},
		"negative":          {Purpose: "agent", Ttl: durationpb.New(-time.Hour)},
		"a server's node":   {Purpose: "server", KubeCluster: "c1", KubeNode: "n"},
		"half a node":       {Purpose: "agent", KubeNode: "n"},
		"the other half":    {Purpose: "agent", KubeCluster: "c1"},
		"unknown a cluster": {Purpose: "agent", KubeCluster: "c1", KubeNode: "n"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := c.CreateToken(ctx, req)
			want := codes.InvalidArgument
			if name == "unknown a cluster" {
				want = codes.NotFound
			}
			wantCode(t, err, want)
		})
	}
}

func TestStatus(t *testing.T) {
	w := newWorld(t).start(t)
	_, cert := w.agent(t, "a1", "")
	w.sync(t, w.dial(t, cert))
	st, err := w.admin(t).Status(testContext(t), &adminv1.Empty{})
	if err != nil || st.TrustDomain != "example.org" || st.MemberId != "m1" || st.LeaderId != "m1" || !st.Issuing || st.AgentsConnected != 1 || len(st.Members) != 1 || st.BundleSequence == 0 {
		t.Fatalf("status %v, error %v", st, err)
	}
}

func TestHealthAndReflection(t *testing.T) {
	w := newWorld(t).start(t)
	ctx := testContext(t)
	network, socket := healthv1.NewHealthClient(w.dial(t, nil)), dialWith(t, w.socket, insecure.NewCredentials())
	check := func(want healthv1.HealthCheckResponse_ServingStatus) {
		t.Helper()
		for _, c := range []healthv1.HealthClient{network, healthv1.NewHealthClient(socket)} {
			resp, err := c.Check(ctx, &healthv1.HealthCheckRequest{})
			if err != nil || resp.Status != want {
				t.Fatalf("health %v, error %v: want %v", resp, err, want)
			}
		}
	}
	check(healthv1.HealthCheckResponse_SERVING)
	watch, err := healthv1.NewHealthClient(socket).Watch(ctx, &healthv1.HealthCheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if m, err := watch.Recv(); err != nil || m.Status != healthv1.HealthCheckResponse_SERVING {
		t.Fatalf("health %v, error %v", m, err)
	}
	w.stale.Store(int64(2 * time.Hour))
	check(healthv1.HealthCheckResponse_NOT_SERVING)
	if m, err := watch.Recv(); err != nil || m.Status != healthv1.HealthCheckResponse_NOT_SERVING {
		t.Fatalf("health %v, error %v", m, err)
	}

	stream, err := reflectionv1.NewServerReflectionClient(socket).ServerReflectionInfo(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&reflectionv1.ServerReflectionRequest{MessageRequest: &reflectionv1.ServerReflectionRequest_ListServices{}}); err != nil {
		t.Fatal(err)
	}
	m, err := stream.Recv()
	if err != nil || !strings.Contains(m.String(), "countersign.admin.v1.Admin") {
		t.Fatalf("services %v, error %v", m, err)
	}
}

func TestJoin(t *testing.T) {
	w := newWorld(t).start(t)
	ctx := testContext(t)
	c := memberv1.NewMemberClient(w.dial(t, nil))
	tok := w.joinToken(t, &adminv1.CreateTokenRequest{Purpose: "server"})
	for name, req := range map[string]*memberv1.JoinRequest{
		"a bad name":             {Secret: tok.Secret, Id: "m/2", Address: "10.0.0.2:8443", Level: 2},
		"no name":                {Secret: tok.Secret, Address: "10.0.0.2:8443", Level: 2},
		"no port":                {Secret: tok.Secret, Id: "m2", Address: "10.0.0.2"},
		"an unspecified address": {Secret: tok.Secret, Id: "m2", Address: "0.0.0.0:8443"},
		"a huge version":         {Secret: tok.Secret, Id: "m2", Address: "10.0.0.2:8443", Version: strings.Repeat("v", 1000)},
		"no secret":              {Id: "m2", Address: "10.0.0.2:8443", Level: 2},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := c.Join(ctx, req)
			wantCode(t, err, codes.InvalidArgument)
			w.wantNoSecrets(t, err, tok.Secret)
		})
	}
	// None of these has spent it.
	resp, err := c.Join(ctx, &memberv1.JoinRequest{Secret: tok.Secret, Id: "m2", Address: "10.0.0.2:8443", Level: 2})
	if err != nil {
		t.Fatal(err)
	}
	if m := <-w.added; m.ID != "m2" || m.Address != "10.0.0.2:8443" {
		t.Fatalf("added %v", m)
	}
	var authorities []identity.Authority
	if err := json.Unmarshal(resp.Authorities, &authorities); err != nil || len(authorities) != 2 {
		t.Fatalf("authorities %v, error %v", authorities, err)
	}
	if resp.TrustDomain != "example.org" || string(resp.Keyring) != "the keyring" || len(resp.Members) != 2 {
		t.Fatalf("answer %v", resp)
	}
	for _, a := range authorities {
		if _, err := w.open(a); err != nil {
			t.Errorf("authority %s does not open: %v", a.ID, err)
		}
	}
	_, err = c.Join(ctx, &memberv1.JoinRequest{Secret: tok.Secret, Id: "m3", Address: "10.0.0.3:8443", Level: 2})
	wantCode(t, err, codes.FailedPrecondition, "used")
	late := w.joinToken(t, &adminv1.CreateTokenRequest{Purpose: "server"})
	w.ahead.Store(int64(time.Hour))
	_, err = c.Join(ctx, &memberv1.JoinRequest{Secret: late.Secret, Id: "m3", Address: "10.0.0.3:8443", Level: 2})
	wantCode(t, err, codes.Unauthenticated, "expired")
	w.ahead.Store(0)
	forAgents := w.joinToken(t, &adminv1.CreateTokenRequest{Purpose: "agent"})
	_, err = c.Join(ctx, &memberv1.JoinRequest{Secret: forAgents.Secret, Id: "m3", Address: "10.0.0.3:8443", Level: 2})
	wantCode(t, err, codes.PermissionDenied)
	twice := w.joinToken(t, &adminv1.CreateTokenRequest{Purpose: "server"})
	_, err = c.Join(ctx, &memberv1.JoinRequest{Secret: twice.Secret, Id: "m2", Address: "10.0.0.9:8443", Level: 2})
	wantCode(t, err, codes.AlreadyExists, "10.0.0.2:8443", "choose another name")
	if len(w.added) != 0 {
		t.Error("somebody else was added")
	}
	// The same again is one whose join broke off, until it has a vote: then its empty log would break the vote's promises.
	again := w.joinToken(t, &adminv1.CreateTokenRequest{Purpose: "server"})
	if _, err := c.Join(ctx, &memberv1.JoinRequest{Secret: again.Secret, Id: "m2", Address: "10.0.0.2:8443", Level: 2}); err != nil {
		t.Errorf("joining again without a vote: %v", err)
	}
	w.promoted.Store(true)
	voter := w.joinToken(t, &adminv1.CreateTokenRequest{Purpose: "server"})
	_, err = c.Join(ctx, &memberv1.JoinRequest{Secret: voter.Secret, Id: "m2", Address: "10.0.0.2:8443", Level: 2})
	wantCode(t, err, codes.AlreadyExists)
	w.wantNoSecrets(t, err, tok.Secret, late.Secret, forAgents.Secret, twice.Secret, "the keyring")
}

func TestLeader(t *testing.T) {
	w := newWorld(t)
	w.state.down = fmt.Errorf("%w: no leader", identity.ErrUnavailable)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 2)
	go func() { done <- w.srv.RunLeader(ctx) }()
	eventually(t, "the leader keeps trying", func() bool { return strings.Contains(w.log.String(), "trying again") })
	w.state.mu.Lock()
	w.state.down = nil
	w.state.mu.Unlock()
	eventually(t, "the leader sweeps", func() bool {
		w.state.mu.Lock()
		defer w.state.mu.Unlock()
		return w.state.swept > 0
	})
	go func() { done <- w.srv.RunLeader(ctx) }() // a second one for a moment
	eventually(t, "the second sweeps too", func() bool {
		w.state.mu.Lock()
		defer w.state.mu.Unlock()
		return w.state.swept > 1
	})
	cancel()
	for range 2 {
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	}
	all := w.state.Authorities()
	if len(all) != 2 || all[0].Kind == all[1].Kind {
		t.Fatalf("authorities %v: want one of each kind", all)
	}
	for _, a := range all {
		if _, err := w.open(a); err != nil {
			t.Errorf("authority %s: %v", a.ID, err)
		}
	}
	if m := w.state.Members(); len(m) != 1 || m[0].ID != "m1" {
		t.Errorf("members %v: want the first one registered", m)
	}
}

func TestConfigIsChecked(t *testing.T) {
	_, err := New(Config{})
	if !errors.Is(err, identity.ErrInvalid) {
		t.Fatalf("error %v", err)
	}
	for _, field := range []string{"TrustDomain", "MemberID", "CA", "State", "Writes", "Pods", "Cluster", "Seal", "Log"} {
		if !strings.Contains(err.Error(), field) {
			t.Errorf("error %q does not name %s", err, field)
		}
	}
	if _, err := NewListener(ListenConfig{}); err == nil {
		t.Error("a listener of nothing")
	}
}
