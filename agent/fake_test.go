package agent

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/url"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/types/known/timestamppb"

	"countersign.io/countersign/api"
	nodev1 "countersign.io/countersign/api/node/v1"
	workloadv1 "countersign.io/countersign/api/workload/v1"
	"countersign.io/countersign/attestor"
	"countersign.io/countersign/attestor/node"
	"countersign.io/countersign/identity"
)

const wait = 20 * time.Second // for what must happen

var td = spiffeid.RequireTrustDomainFromString("example.org")

// testCA is a root, an issuer under it, and a JWT key.
type testCA struct {
	root, issuer       *x509.Certificate
	rootKey, issuerKey *ecdsa.PrivateKey
	jwtKey             *ecdsa.PrivateKey
	kid                string
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func newKey() *ecdsa.PrivateKey { return must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)) }

func newTestCA() *testCA {
	c := &testCA{rootKey: newKey(), issuerKey: newKey(), jwtKey: newKey(), kid: rand.Text()}
	ca := func(name string, pub, parentKey *ecdsa.PrivateKey, parent *x509.Certificate) *x509.Certificate {
		t := &x509.Certificate{
			SerialNumber: serial(), Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true,
			KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(1000 * time.Hour),
			URIs: []*url.URL{td.ID().URL()},
		}
		if parent == nil {
			parent = t
		}
		return must(x509.ParseCertificate(must(x509.CreateCertificate(rand.Reader, t, parent, pub.Public(), parentKey))))
	}
	c.root = ca("root", c.rootKey, c.rootKey, nil)
	c.issuer = ca("issuer", c.issuerKey, c.rootKey, c.root)
	return c
}

func serial() *big.Int { return must(rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))) }

// leaf signs an SVID; change may break it.
func (c *testCA) leaf(id string, pub crypto.PublicKey, ttl time.Duration, change func(*x509.Certificate)) []byte {
	t := &x509.Certificate{
		SerialNumber: serial(), URIs: []*url.URL{must(url.Parse(id))},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		NotBefore: time.Now().Add(-10 * time.Second), NotAfter: time.Now().Add(ttl), BasicConstraintsValid: true,
	}
	if change != nil {
		change(t)
	}
	return must(x509.CreateCertificate(rand.Reader, t, c.issuer, pub, c.issuerKey))
}

func (c *testCA) token(id string, audience []string, ttl time.Duration) string {
	s := must(jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: c.jwtKey}, new(jose.SignerOptions).WithType("JWT").WithHeader("kid", c.kid)))
	return must(jwt.Signed(s).Claims(jwt.Claims{
		Subject: id, Audience: audience, IssuedAt: jwt.NewNumericDate(time.Now()), Expiry: jwt.NewNumericDate(time.Now().Add(ttl)),
	}).Serialize())
}

func (c *testCA) pin() string { return node.Pin(c.root.RawSubjectPublicKeyInfo) }

// testGrant is an identity that a token gets.
type testGrant struct {
	entry     string
	revision  uint64
	id        string
	ttl       time.Duration
	federates []string
}

// cluster is what the fake members share, as if it were replicated.
type cluster struct {
	t         testing.TB
	followed  []string // tokens of pods that have streams of their own
	followErr error    // what they are told
	ca        *testCA

	mu        sync.Mutex
	signs     *testCA // instead of ca, from which all that is issued comes
	bundle    *identity.Bundle
	federated []*identity.Bundle
	along     []*identity.Bundle // federated ones that come with SVIDs
	spokenOf  []string           // the trust domains that pushes say to be federated with, besides those of federated
	revision  uint64
	grants    map[string][]testGrant // by token
	ownTTL    time.Duration
	banned    bool
	refuse    error // what Attest answers
	attested  int
	begins    []*nodev1.AttestRequest_Begin
	members   []*member
	requests  int   // X.509
	batches   []int // their sizes
	jwts      int
	tokens    []string // as shown with X.509 requests
	acks      []*nodev1.Ack
	watched   map[uint64]*nodev1.Watch_Workload
	bad       func(*workloadv1.X509Result, crypto.PublicKey) // spoils an answer
	badOwn    func(*nodev1.AgentSVID, crypto.PublicKey)
	badJWT    func(*workloadv1.JWTSVID)
	issueErr  error
	refusals  int // calls that were answered with it
}

func newCluster(t testing.TB) *cluster {
	c := &cluster{t: t, ca: newTestCA(), grants: map[string][]testGrant{}, ownTTL: time.Hour, revision: 10, watched: map[uint64]*nodev1.Watch_Workload{}}
	c.bundle = &identity.Bundle{
		TrustDomain: td, Sequence: 1, RefreshHint: 5 * time.Minute, X509: [][]byte{c.ca.root.Raw},
		JWT: map[string][]byte{c.ca.kid: must(x509.MarshalPKIXPublicKey(c.ca.jwtKey.Public()))},
	}
	return c
}

func (c *cluster) locked(f func()) { c.mu.Lock(); defer c.mu.Unlock(); f() }

func (c *cluster) grant(token string, g ...testGrant) {
	c.locked(func() {
		c.revision++
		for i := range g {
			if g[i].ttl == 0 {
				g[i].ttl = time.Hour
			}
			if g[i].revision == 0 {
				g[i].revision = c.revision
			}
		}
		c.grants[token] = g
	})
}

func web() testGrant { return testGrant{entry: "e-web", id: "spiffe://example.org/web"} }

// member is one fake server of the cluster.
type member struct {
	nodev1.UnimplementedNodeServer
	workloadv1.UnimplementedWorkloadServer
	c    *cluster
	name string
	addr string
	srv  *grpc.Server
	mem  *bufconn.Listener // instead of loopback
	stop func()

	mu        sync.Mutex
	hangSync  bool
	dead      bool          // answers no probe
	hangIssue chan struct{} // closed to let go
	lag       uint64        // revisions behind
	id        string        // shown instead of its own
	ca        *testCA
	streams   map[chan *nodev1.SyncResponse]struct{}
}

func (c *cluster) member(name string) *member {
	lis := must(net.Listen("tcp", "127.0.0.1:0"))
	return c.serve(name, lis.Addr().String(), lis, nil)
}

// memoryMember needs no network, and so can live in a synctest bubble.
func (c *cluster) memoryMember(name string) *member {
	lis := bufconn.Listen(1 << 20)
	return c.serve(name, name+":1", lis, lis)
}

func (c *cluster) serve(name, addr string, lis net.Listener, mem *bufconn.Listener) *member {
	m := &member{c: c, mem: mem, name: name, addr: addr, ca: c.ca, streams: map[chan *nodev1.SyncResponse]struct{}{}}
	key := newKey()
	cfg := &tls.Config{
		MinVersion: tls.VersionTLS13, ClientAuth: tls.RequestClientCert, NextProtos: []string{"h2"},
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			m.mu.Lock()
			defer m.mu.Unlock()
			id := m.id
			if id == "" {
				id = "spiffe://example.org/countersign/member/" + name
			}
			return &tls.Certificate{Certificate: [][]byte{m.ca.leaf(id, key.Public(), time.Hour, nil), m.ca.issuer.Raw, m.ca.root.Raw}, PrivateKey: key}, nil
		},
		VerifyConnection: func(cs tls.ConnectionState) error {
			if len(cs.PeerCertificates) == 0 {
				return nil
			}
			c.mu.Lock()
			roots := poolOf(must(parseChain(c.bundle.X509)))
			c.mu.Unlock()
			_, err := cs.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: roots, Intermediates: poolOf(cs.PeerCertificates[1:]), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
			return err
		},
	}
	m.srv = grpc.NewServer(grpc.Creds(credentials.NewTLS(cfg)), grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}))
	healthv1.RegisterHealthServer(m.srv, &health{m: m})
	nodev1.RegisterNodeServer(m.srv, m)
	workloadv1.RegisterWorkloadServer(m.srv, m)
	done := make(chan struct{})
	go func() { defer close(done); m.srv.Serve(lis) }()
	m.stop = func() { m.srv.Stop(); lis.Close(); <-done }
	c.t.Cleanup(m.stop)
	c.locked(func() { c.members = append(c.members, m) })
	return m
}

// health answers probes unless the member hangs.
type health struct {
	healthv1.UnimplementedHealthServer
	m *member
}

func (h *health) Check(ctx context.Context, _ *healthv1.HealthCheckRequest) (*healthv1.HealthCheckResponse, error) {
	var dead bool
	h.m.set(func() { dead = h.m.dead })
	if dead {
		<-ctx.Done()
	}
	return &healthv1.HealthCheckResponse{Status: healthv1.HealthCheckResponse_SERVING}, nil
}

func (m *member) set(f func()) { m.mu.Lock(); defer m.mu.Unlock(); f() }

// agentOf is the ID of the agent that calls; empty: it showed no certificate.
func agentOf(ctx context.Context) string {
	p, _ := peer.FromContext(ctx)
	certs := p.AuthInfo.(credentials.TLSInfo).State.PeerCertificates
	if len(certs) == 0 {
		return ""
	}
	return certs[0].URIs[0].String()
}

func (m *member) Attest(stream grpc.BidiStreamingServer[nodev1.AttestRequest, nodev1.AttestResponse]) error {
	req, err := stream.Recv()
	if err != nil {
		return err
	}
	b := req.GetBegin()
	var refuse error
	m.c.locked(func() {
		m.c.attested++
		m.c.begins = append(m.c.begins, b)
		refuse = m.c.refuse
	})
	if refuse != nil {
		return api.ToStatus(refuse)
	}
	id := "spiffe://example.org/countersign/agent/join/1"
	switch {
	case b.GetKubeToken() != "":
		id = "spiffe://example.org/countersign/agent/kube/east/node-1"
	case b.GetX509Pop() != nil:
		challenge := node.Challenge()
		if err := stream.Send(&nodev1.AttestResponse{Step: &nodev1.AttestResponse_Challenge{Challenge: challenge}}); err != nil {
			return err
		}
		if req, err = stream.Recv(); err != nil {
			return err
		}
		_, print, err := node.VerifyX509Pop(b.GetX509Pop().Chain, poolOf([]*x509.Certificate{m.c.ca.root}), challenge, b.PublicKey, req.GetProof(), time.Now())
		if err != nil {
			return api.ToStatus(err)
		}
		id = "spiffe://example.org/countersign/agent/x509pop/" + print
	}
	return stream.Send(&nodev1.AttestResponse{Step: &nodev1.AttestResponse_Svid{Svid: m.agentSVID(id, b.PublicKey)}})
}

func (m *member) agentSVID(id string, public []byte) *nodev1.AgentSVID {
	m.c.mu.Lock()
	defer m.c.mu.Unlock()
	pub := must(x509.ParsePKIXPublicKey(public))
	s := &nodev1.AgentSVID{SpiffeId: id, Chain: [][]byte{m.c.signer().leaf(id, pub, m.c.ownTTL, nil), m.c.signer().issuer.Raw}, Bundle: api.BundleToWire(m.c.bundle)}
	if m.c.badOwn != nil {
		m.c.badOwn(s, pub)
	}
	return s
}

func (m *member) Renew(ctx context.Context, req *nodev1.RenewRequest) (*nodev1.AgentSVID, error) {
	if err := m.admit(ctx); err != nil {
		return nil, err
	}
	return m.agentSVID(agentOf(ctx), req.PublicKey), nil
}

func (m *member) admit(ctx context.Context) error {
	m.c.mu.Lock()
	defer m.c.mu.Unlock()
	if m.c.banned || agentOf(ctx) == "" {
		return status.Error(codes.PermissionDenied, "permission denied: agent is banned")
	}
	return nil
}

// signer is what signs. The caller holds c.mu.
func (c *cluster) signer() *testCA {
	if c.signs != nil {
		return c.signs
	}
	return c.ca
}

// state is the full state as it is pushed. The caller holds c.mu.
func (c *cluster) state() *nodev1.SyncResponse {
	st := &nodev1.State{Bundles: &nodev1.State_Bundles{Own: api.BundleToWire(c.bundle)}, Members: &nodev1.State_Members{}}
	st.Bundles.FederatesWith = slices.Clone(c.spokenOf)
	for _, b := range c.federated {
		st.Bundles.Federated = append(st.Bundles.Federated, api.BundleToWire(b))
		st.Bundles.FederatesWith = append(st.Bundles.FederatesWith, b.TrustDomain.Name())
	}
	for _, m := range c.members {
		st.Members.Addresses = append(st.Members.Addresses, m.addr)
	}
	return &nodev1.SyncResponse{Revision: c.revision, Message: &nodev1.SyncResponse_State{State: st}}
}

func (m *member) Sync(stream grpc.BidiStreamingServer[nodev1.SyncRequest, nodev1.SyncResponse]) error {
	if err := m.admit(stream.Context()); err != nil {
		return err
	}
	if req, err := stream.Recv(); err != nil || req.GetHello() == nil || req.GetHello().Token != "" {
		return errors.Join(errors.New("no hello"), err)
	}
	return m.sync(stream)
}

// Follow is a pod's own stream: its token is one that was granted something.
func (m *member) Follow(stream grpc.BidiStreamingServer[nodev1.SyncRequest, nodev1.SyncResponse]) error {
	req, err := stream.Recv()
	if err != nil || req.GetHello() == nil || agentOf(stream.Context()) != "" {
		return errors.Join(errors.New("no hello, or a certificate"), err)
	}
	m.c.mu.Lock()
	m.c.followed = append(m.c.followed, req.GetHello().Token)
	refuse := m.c.followErr
	m.c.mu.Unlock()
	if refuse != nil {
		return api.ToStatus(refuse)
	}
	return m.sync(stream)
}

func (m *member) sync(stream grpc.BidiStreamingServer[nodev1.SyncRequest, nodev1.SyncResponse]) error {
	var hang bool
	out := make(chan *nodev1.SyncResponse, 100)
	m.set(func() {
		hang = m.hangSync
		m.streams[out] = struct{}{}
	})
	defer m.set(func() { delete(m.streams, out) })
	if hang {
		<-stream.Context().Done()
		return nil
	}
	m.c.mu.Lock()
	first := m.c.state()
	m.c.mu.Unlock()
	if err := stream.Send(first); err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() {
		for {
			req, err := stream.Recv()
			if err != nil {
				ended <- err
				return
			}
			m.c.locked(func() {
				if a := req.GetAck(); a != nil {
					m.c.acks = append(m.c.acks, a)
				}
				for _, w := range req.GetWatch().GetSet() {
					m.c.watched[w.Handle] = w
				}
				for _, h := range req.GetWatch().GetUnset() {
					delete(m.c.watched, h)
				}
			})
		}
	}()
	for {
		select {
		case err := <-ended:
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		case r := <-out:
			if r == nil {
				return status.Error(codes.PermissionDenied, "permission denied: agent is banned")
			}
			if err := stream.Send(r); err != nil {
				return err
			}
		}
	}
}

// push sends to every agent of every member; nil ends its stream with a refusal.
func (c *cluster) push(r *nodev1.SyncResponse) {
	c.mu.Lock()
	members := slices.Clone(c.members)
	c.mu.Unlock()
	for _, m := range members {
		m.set(func() {
			for s := range m.streams {
				s <- r
			}
		})
	}
}

// pushChanged tells of every watched workload as of now.
func (c *cluster) pushChanged(ended bool) {
	c.mu.Lock()
	var handles []uint64
	for h := range c.watched {
		handles = append(handles, h)
	}
	r := &nodev1.SyncResponse{Revision: c.revision, Message: &nodev1.SyncResponse_Changed{Changed: &nodev1.Changed{}}}
	if ended {
		r.GetChanged().Ended = handles
	} else {
		r.GetChanged().Handles = handles
	}
	c.mu.Unlock()
	c.push(r)
}

func (m *member) hanging(ctx context.Context) bool {
	var hang chan struct{}
	m.set(func() { hang = m.hangIssue })
	if hang == nil {
		return false
	}
	select {
	case <-ctx.Done():
		return true
	case <-hang:
		return false
	}
}

func (m *member) IssueX509(ctx context.Context, req *workloadv1.IssueX509Request) (*workloadv1.IssueX509Response, error) {
	direct := agentOf(ctx) == ""
	if !direct {
		if err := m.admit(ctx); err != nil {
			return nil, err
		}
	}
	if m.hanging(ctx) {
		return nil, ctx.Err()
	}
	m.c.mu.Lock()
	defer m.c.mu.Unlock()
	if m.c.issueErr != nil {
		m.c.refusals++
		return nil, api.ToStatus(m.c.issueErr)
	}
	if len(req.Requests) == 0 || len(req.Requests) > identity.MaxBatch {
		return nil, status.Errorf(codes.InvalidArgument, "%d requests", len(req.Requests))
	}
	m.c.batches = append(m.c.batches, len(req.Requests))
	resp := &workloadv1.IssueX509Response{IssuerChain: [][]byte{m.c.signer().issuer.Raw}}
	m.set(func() { resp.Revision = m.c.revision - m.lag })
	for _, b := range m.c.along {
		resp.Federated = append(resp.Federated, api.BundleToWire(b))
	}
	if direct {
		resp.Bundle = api.BundleToWire(m.c.bundle)
	}
	for _, r := range req.Requests {
		m.c.requests++
		m.c.tokens = append(m.c.tokens, r.Evidence.Token)
		res := &workloadv1.X509Result{Selectors: append([]string{"agent:kind:join_token"}, r.Evidence.Selectors...)}
		pub := must(x509.ParsePKIXPublicKey(r.PublicKey))
		grants := m.c.grants[r.Evidence.Token]
		if r.Evidence.Token == "poison" {
			return nil, status.Error(codes.InvalidArgument, "a request that spoils its batch")
		}
		if len(grants) == 0 && direct {
			return nil, status.Error(codes.PermissionDenied, "permission denied: no entry matches")
		}
		if len(grants) == 0 {
			res.Error = &workloadv1.Error{Code: uint32(codes.PermissionDenied), Message: "permission denied: no entry matches"}
		}
		for _, g := range grants {
			leaf := m.c.signer().leaf(g.id, pub, g.ttl, nil)
			cert := must(x509.ParseCertificate(leaf))
			res.Svids = append(res.Svids, &workloadv1.X509SVID{
				EntryId: g.entry, EntryRevision: g.revision, SpiffeId: g.id, Leaf: leaf, FederatesWith: g.federates,
				NotBefore: timestamppb.New(cert.NotBefore), NotAfter: timestamppb.New(cert.NotAfter),
			})
		}
		if m.c.bad != nil && res.Error == nil {
			m.c.bad(res, pub)
		}
		resp.Results = append(resp.Results, res)
	}
	return resp, nil
}

func (m *member) IssueJWT(ctx context.Context, req *workloadv1.IssueJWTRequest) (*workloadv1.IssueJWTResponse, error) {
	m.c.mu.Lock()
	defer m.c.mu.Unlock()
	m.c.jwts++
	resp := &workloadv1.IssueJWTResponse{Revision: m.c.revision}
	if agentOf(ctx) == "" {
		resp.Bundle = api.BundleToWire(m.c.bundle)
	}
	for _, g := range m.c.grants[req.Evidence.Token] {
		if req.SpiffeId != "" && req.SpiffeId != g.id {
			continue
		}
		now := time.Now()
		s := &workloadv1.JWTSVID{
			EntryId: g.entry, SpiffeId: g.id, Token: m.c.signer().token(g.id, req.Audience, 5*time.Minute),
			IssuedAt: timestamppb.New(now), ExpiresAt: timestamppb.New(now.Add(5 * time.Minute)),
		}
		if m.c.badJWT != nil {
			m.c.badJWT(s)
		}
		resp.Svids = append(resp.Svids, s)
	}
	if len(resp.Svids) == 0 {
		return nil, status.Error(codes.PermissionDenied, "permission denied: not entitled")
	}
	return resp, nil
}

// config is for an agent of the cluster by its pin.
func (c *cluster) config() Config {
	secret, _ := node.NewSecret()
	cfg := Config{Pin: c.ca.pin(), Credential: JoinToken(secret), Log: slog.New(slog.DiscardHandler)}
	c.locked(func() {
		for _, m := range c.members {
			cfg.Servers = append(cfg.Servers, m.addr)
			if m.mem != nil {
				cfg.Dial = func(ctx context.Context, addr string) (net.Conn, error) {
					c.mu.Lock()
					defer c.mu.Unlock()
					for _, m := range c.members {
						if m.addr == addr {
							return m.mem.DialContext(ctx)
						}
					}
					return nil, fmt.Errorf("no member at %s", addr)
				}
			}
		}
	})
	return cfg
}

// running is an agent under test.
type running struct {
	*Agent
	cancel context.CancelFunc
	done   chan error
}

func run(t testing.TB, cfg Config) *running {
	t.Helper()
	a, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return start(t, a)
}

func start(t testing.TB, a *Agent) *running {
	ctx, cancel := context.WithCancel(context.Background())
	r := &running{Agent: a, cancel: cancel, done: make(chan error, 1)}
	go func() { r.done <- a.Run(ctx) }()
	t.Cleanup(r.halt)
	return r
}

func (r *running) halt() {
	r.cancel()
	err := <-r.done
	r.done <- err
}

// caller attests as the workload of a token: one key each.
func caller(token string) attestor.Func {
	return func(context.Context) (*attestor.Workload, error) {
		return &attestor.Workload{Key: "key of " + token, Evidence: identity.Evidence{
			Selectors: []identity.Selector{"unix:uid:1000"}, Token: []byte(token),
		}}, nil
	}
}

// watcher is an open Updates call.
type watcher struct {
	t    testing.TB
	got  chan *identity.Update
	done chan error
	stop context.CancelFunc
}

func watchUpdates(t testing.TB, a *Agent, attest attestor.Func) *watcher {
	ctx, cancel := context.WithCancel(context.Background())
	w := &watcher{t: t, got: make(chan *identity.Update, 100), done: make(chan error, 1), stop: cancel}
	go func() {
		w.done <- a.Updates(ctx, attest, func(u *identity.Update) error { w.got <- u; return nil })
	}()
	t.Cleanup(func() {
		cancel()
		err := <-w.done
		w.done <- err
	})
	return w
}

func (w *watcher) next() *identity.Update {
	w.t.Helper()
	select {
	case u := <-w.got:
		return u
	case err := <-w.done:
		w.done <- err
		w.t.Fatalf("the stream ended instead of an update: %v", err)
	case <-time.After(wait):
		w.t.Fatal("no update")
	}
	return nil
}

func (w *watcher) end(want error) {
	w.t.Helper()
	select {
	case u := <-w.got:
		w.t.Fatalf("an update instead of the end: %v", u)
	case err := <-w.done:
		w.done <- err
		if !errors.Is(err, want) {
			w.t.Fatalf("the stream ended with %v, want %v", err, want)
		}
	case <-time.After(wait):
		w.t.Fatal("the stream did not end")
	}
}

func (w *watcher) quiet() {
	w.t.Helper()
	select {
	case u := <-w.got:
		w.t.Fatalf("an update that nothing called for: %v", u)
	case err := <-w.done:
		w.t.Fatalf("the stream ended: %v", err)
	default:
	}
}

// eventually waits for something that no channel tells of.
func eventually(t testing.TB, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(wait); !f(); {
		if time.Now().After(end) {
			t.Fatalf("it never happened: %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

func current(t testing.TB, a *Agent, attest attestor.Func) *identity.Update {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), wait)
	defer cancel()
	u, err := a.Current(ctx, attest)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

func currentErr(t testing.TB, a *Agent, attest attestor.Func, want error) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), wait)
	defer cancel()
	u, err := a.Current(ctx, attest)
	if !errors.Is(err, want) || u != nil {
		t.Fatalf("got %v, %v, want %v", u, err, want)
	}
	return err
}
