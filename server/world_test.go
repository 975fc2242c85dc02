package server

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	adminv1 "countersign.io/countersign/api/admin/v1"
	memberv1 "countersign.io/countersign/api/member/v1"
	nodev1 "countersign.io/countersign/api/node/v1"
	workloadv1 "countersign.io/countersign/api/workload/v1"
	"countersign.io/countersign/attestor/kube"
	"countersign.io/countersign/attestor/node"
	"countersign.io/countersign/ca"
	"countersign.io/countersign/identity"
)

const (
	deadline = 30 * time.Second // for what must happen; never what a test waits for when all is well
	issuer   = "https://kube.test"
	cluster  = "c1"
)

// world is one member in this process, with a fake state and a real everything else.
type world struct {
	td       spiffeid.TrustDomain
	state    *fakeState
	ca       *ca.CA
	pods     testPods
	port     *Listener
	srv      *Server
	socket   string
	kubeKey  crypto.Signer // of the kube cluster's tokens: ECDSA, or RSA as most real ones
	log      *lockedBuffer
	audit    *fakeAudit
	ahead    atomic.Int64 // of the server's clock
	stale    atomic.Int64
	acks     atomic.Uint64 // see syncer.settle
	added    chan identity.Member
	kept     atomic.Int64
	promoted atomic.Bool // members that joined have a vote
	stop     context.CancelFunc
	finished chan error
	raft     chan net.Conn
}

// lockedBuffer collects the log, so that tests can look for what must not be in it.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// sealer only looks like one.
func fakeSeal(plain, ad []byte) ([]byte, error) {
	return append(append([]byte("sealed|"), ad...), plain...), nil
}

func (w *world) open(a identity.Authority) (crypto.Signer, error) {
	der, ok := bytes.CutPrefix(a.SealedKey, append([]byte("sealed|"), identity.AuthorityAD(w.td, a.Kind, a.ID)...))
	if !ok {
		return nil, errors.New("sealed for another place")
	}
	key, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, err
	}
	return key.(crypto.Signer), nil
}

func newWorld(t testing.TB, edits ...func(*Config)) *world {
	return newWorldOn(t, ListenConfig{}, edits...)
}

func newWorldOn(t testing.TB, lc ListenConfig, edits ...func(*Config)) *world {
	t.Helper()
	w := &world{
		td: spiffeid.RequireTrustDomainFromString("example.org"), log: &lockedBuffer{}, audit: &fakeAudit{},
		added: make(chan identity.Member, 8), finished: make(chan error, 1), raft: make(chan net.Conn, 8),
	}
	log := slog.New(slog.NewTextHandler(w.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	w.state = newFakeState(w.td)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	var err error
	w.ca, err = ca.New(ca.Config{TrustDomain: w.td, MemberName: "m1", Log: log})
	must(err)
	v, err := kube.New(kube.Config{Log: log, Now: time.Now})
	must(err)
	w.pods = testPods{Verifier: v, tell: make(chan func(kube.Events)), facts: &testFacts{}}
	w.kubeKey, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(err)
	lc.TCP, err = net.Listen("tcp", "127.0.0.1:0")
	must(err)
	lc.TLS = ServerTLS(TLSConfig{TrustDomain: w.td, Certificate: w.ca.MemberCertificate, Bundle: w.state.Bundle})
	lc.Log = log
	lc.Admin = func(id spiffeid.ID) bool { return w.srv.IsAdmin(id) }
	w.port, err = NewListener(lc)
	must(err)
	w.socket = filepath.Join(privateDir(t), "admin.sock")
	admin, err := ListenAdmin(w.socket)
	must(err)
	cfg := Config{
		TrustDomain: w.td, MemberID: "m1", Version: "test", Level: 2, Agents: w.port.Agents(), Guests: w.port.Guests(), Admins: w.port.Admins(), Candidates: w.port.Candidates(), Admin: admin,
		CA: w.ca, State: State{w.state, w.state, w.state, w.state}, Writes: Writes{w.state, w.state, w.state, w.state, w.state}, Pods: w.pods,
		Cluster: Cluster{
			Staleness: func() time.Duration { return time.Duration(w.stale.Load()) },
			Members: func() []MemberStatus {
				out := []MemberStatus{{ID: "m1", Address: w.port.Addr().String(), Voter: true, Leader: true}}
				for _, m := range w.state.Members() {
					if m.ID != "m1" {
						out = append(out, MemberStatus{ID: m.ID, Address: m.Address, Voter: w.promoted.Load()})
					}
				}
				return out
			},
			AddMember: func(_ context.Context, id, address string) error {
				w.added <- identity.Member{ID: id, Address: address}
				return nil
			},
			RemoveMember:   func(context.Context, string) error { return nil },
			TransferLeader: func(context.Context, string) error { return nil },
			ReadBarrier:    func(context.Context) error { return nil },
			Health:         func(context.Context) ([]MemberHealth, error) { return nil, nil },
		},
		Seal: fakeSeal, Open: w.open, Keyring: func() ([]byte, error) { return []byte("the keyring"), nil },
		Keep:   func([]identity.Authority) error { w.kept.Add(1); return nil },
		Limits: Limits{GuestRate: 1e6, GuestBurst: 1e6, TotalRate: 1e6, TotalBurst: 1e6},
		Now:    func() time.Time { return time.Now().Add(time.Duration(w.ahead.Load())) },
		Log:    log,
		Audit:  w.audit,
	}
	for _, e := range edits {
		e(&cfg)
	}
	w.srv, err = New(cfg)
	must(err)
	return w
}

// privateDir is a t.TempDir whatever the umask.
func privateDir(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}

// start runs the world until the test ends, and waits until it issues.
func (w *world) start(t testing.TB) *world {
	t.Helper()
	var ctx context.Context
	ctx, w.stop = context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { w.port.Run(ctx) })
	wg.Go(func() { w.finished <- w.srv.Run(ctx) })
	wg.Go(func() { w.srv.RunLeader(ctx) })
	wg.Go(func() {
		for {
			c, err := w.port.Raft().Accept()
			if err != nil {
				return
			}
			w.raft <- c
		}
	})
	t.Cleanup(func() {
		w.stop()
		wg.Wait()
	})
	eventually(t, "the member issues", func() bool { return w.srv.Ready() == nil && len(w.state.Members()) > 0 })
	return w
}

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(deadline); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never happened: %s", what)
		}
	}
}

// registerCluster registers the kube cluster whose tokens podToken makes.
func (w *world) registerCluster(t testing.TB, edits ...func(*identity.KubeCluster)) {
	t.Helper()
	jwks, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: w.kubeKey.Public(), KeyID: "k1", Algorithm: string(w.kubeAlg()), Use: "sig"}}})
	if err != nil {
		t.Fatal(err)
	}
	k := identity.KubeCluster{Name: cluster, Issuer: issuer, Audience: "countersign", JWKS: jwks, DefaultID: identity.DefaultKubeID, AgentAccounts: []string{"countersign/agent"}}
	for _, e := range edits {
		e(&k)
	}
	if _, err := w.state.PutKubeCluster(context.Background(), k, true); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the verifier knows the cluster", func() bool {
		_, err := w.pods.Verify(context.Background(), []byte(w.podToken(t, pod{})))
		return err == nil
	})
}

func (w *world) kubeAlg() jose.SignatureAlgorithm {
	if _, ok := w.kubeKey.(*rsa.PrivateKey); ok {
		return jose.RS256
	}
	return jose.ES256
}

// pod is what a token says; empty fields are those of prod/web-0 on node-1.
type pod struct {
	ns, sa, name, uid, node, aud string
	exp                          time.Duration
}

func (w *world) podToken(t testing.TB, p pod) string {
	t.Helper()
	def := func(s *string, v string) {
		if *s == "" {
			*s = v
		}
	}
	def(&p.ns, "prod")
	def(&p.sa, "web")
	def(&p.name, "web-0")
	def(&p.uid, "uid-"+p.ns+"-"+p.name)
	def(&p.node, "node-1")
	def(&p.aud, "countersign")
	if p.exp == 0 {
		p.exp = time.Hour
	}
	now := time.Now()
	claims, err := json.Marshal(map[string]any{
		"iss": issuer, "aud": []string{p.aud}, "sub": "system:serviceaccount:" + p.ns + ":" + p.sa,
		"iat": now.Add(-2 * time.Hour).Unix(), "nbf": now.Add(-2 * time.Hour).Unix(), "exp": now.Add(p.exp).Unix(),
		"kubernetes.io": map[string]any{
			"namespace": p.ns, "serviceaccount": map[string]any{"name": p.sa, "uid": "sa-" + p.sa},
			"pod": map[string]any{"name": p.name, "uid": p.uid}, "node": map[string]any{"name": p.node, "uid": "n-" + p.node},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	s, err := jose.NewSigner(jose.SigningKey{Algorithm: w.kubeAlg(), Key: w.kubeKey}, (&jose.SignerOptions{}).WithHeader("kid", "k1"))
	if err != nil {
		t.Fatal(err)
	}
	o, err := s.Sign(claims)
	if err != nil {
		t.Fatal(err)
	}
	out, err := o.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// newKey makes a P-256 key and its public half as it goes over the wire.
func newKey(t testing.TB) (*ecdsa.PrivateKey, []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	return key, der
}

// certificate makes a TLS certificate for an ID, as the CA would sign it. Members make their own.
func (w *world) certificate(t testing.TB, path string) *tls.Certificate {
	t.Helper()
	if strings.HasPrefix(path, "/countersign/member/") {
		c, err := w.ca.MemberCertificate()
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	key, _ := newKey(t)
	p, err := w.ca.PrepareX509(identity.Issuance{ID: spiffeid.RequireFromPath(w.td, path), PublicKey: key.Public()})
	if err != nil {
		t.Fatal(err)
	}
	svid, err := p.Issue()
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Certificate{Certificate: svid.Chain, PrivateKey: key}
}

// agent puts an agent on record and returns its certificate. Without a node it serves no pods.
func (w *world) agent(t testing.TB, name, kubeNode string) (identity.Agent, *tls.Certificate) {
	t.Helper()
	token := identity.JoinToken{ID: name, Purpose: identity.JoinAgent}
	if kubeNode != "" {
		token.KubeCluster, token.KubeNode = cluster, kubeNode
	}
	a, err := node.JoinAgent(w.td, token, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.state.PutAgent(context.Background(), a); err != nil {
		t.Fatal(err)
	}
	id := spiffeid.RequireFromString(a.ID)
	return a, w.certificate(t, id.Path())
}

// dial connects to the TLS port with the certificate, or without.
func (w *world) dial(t testing.TB, cert *tls.Certificate) *grpc.ClientConn {
	t.Helper()
	root, err := x509.ParseCertificate(w.state.Bundle().X509[0])
	if err != nil {
		t.Fatal(err)
	}
	conf, err := PinnedTLS(node.Pin(root.RawSubjectPublicKeyInfo), w.td)
	if err != nil {
		t.Fatal(err)
	}
	if cert != nil {
		conf.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil }
	}
	return dialWith(t, w.port.Addr().String(), credentials.NewTLS(conf))
}

func dialWith(t testing.TB, target string, creds credentials.TransportCredentials) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+target, grpc.WithTransportCredentials(creds),
		grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) {
			network := "tcp"
			if strings.HasPrefix(addr, "/") {
				network = "unix"
			}
			var d net.Dialer
			return d.DialContext(ctx, network, addr)
		}))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func (w *world) admin(t testing.TB) adminv1.AdminClient {
	t.Helper()
	return adminv1.NewAdminClient(dialWith(t, w.socket, insecure.NewCredentials()))
}

func testContext(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	t.Cleanup(cancel)
	return ctx
}

func wantCode(t testing.TB, err error, code codes.Code, words ...string) {
	t.Helper()
	if status.Code(err) != code {
		t.Fatalf("error %v: want code %v", err, code)
	}
	for _, word := range words {
		if !strings.Contains(err.Error(), word) {
			t.Fatalf("error %q: want it to say %q", err, word)
		}
	}
}

// wantNoSecrets fails if the log or the error contains one.
func (w *world) wantNoSecrets(t testing.TB, err error, secrets ...string) {
	t.Helper()
	all := w.log.String() + w.audit.text()
	if err != nil {
		all += err.Error()
	}
	for _, s := range secrets {
		if s != "" && strings.Contains(all, s) {
			t.Fatalf("a secret is in the log or in an error")
		}
	}
}

// wantError is wantCode for one result of a batch.
func wantError(t testing.TB, r *workloadv1.X509Result, code codes.Code, words ...string) {
	t.Helper()
	if r.Error == nil || len(r.Svids) != 0 {
		t.Fatalf("result %v: want an error and nothing else", r)
	}
	wantCode(t, status.Error(codes.Code(r.Error.Code), r.Error.Message), code, words...)
}

func (w *world) issueOne(t testing.TB, conn *grpc.ClientConn, ev *workloadv1.Evidence) *workloadv1.X509Result {
	t.Helper()
	_, pub := newKey(t)
	resp, err := workloadv1.NewWorkloadClient(conn).IssueX509(testContext(t), &workloadv1.IssueX509Request{Requests: []*workloadv1.X509Request{{Evidence: ev, PublicKey: pub}}})
	if err != nil {
		t.Fatal(err)
	}
	return resp.Results[0]
}

// attest sends one Begin and returns the answer.
func attest(t testing.TB, conn *grpc.ClientConn, begin *nodev1.AttestRequest_Begin) (*nodev1.AgentSVID, error) {
	t.Helper()
	s, err := nodev1.NewNodeClient(conn).Attest(testContext(t))
	if err != nil {
		return nil, err
	}
	// A stream that has been refused already: Recv says why.
	if err := s.Send(&nodev1.AttestRequest{Step: &nodev1.AttestRequest_Begin_{Begin: begin}}); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	resp, err := s.Recv()
	if err != nil {
		return nil, err
	}
	return resp.GetSvid(), nil
}

var _ memberv1.MemberServer = memberService{}
