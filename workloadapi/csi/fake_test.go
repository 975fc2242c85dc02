package csi

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	csispec "github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"countersign.io/countersign/attestor"
	"countersign.io/countersign/identity"
	"countersign.io/countersign/workloadapi"
)

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// fakeSource gives each workload that shows a token one identity, named by its pod.
type fakeSource struct {
	mu      sync.Mutex
	denied  map[string]error // by pod UID
	held    map[string]bool  // pods with an identity: like the agent's cache, it needs no token
	tokens  []string         // as shown, the newest last
	changed chan struct{}
	now     func() time.Time
	ca      *x509.Certificate
	caKey   *ecdsa.PrivateKey
	issued  map[string]*identity.Update
	jwts    int
	jwtErr  error
}

var td = spiffeid.RequireTrustDomainFromString("example.org")

func newSource() *fakeSource {
	s := &fakeSource{denied: map[string]error{}, held: map[string]bool{}, issued: map[string]*identity.Update{}, changed: make(chan struct{}), now: time.Now}
	s.caKey = must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "ca"}, NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	s.ca = must(x509.ParseCertificate(must(x509.CreateCertificate(rand.Reader, tmpl, tmpl, s.caKey.Public(), s.caKey))))
	return s
}

// set gives or takes (err) a pod's identity; a new one is another than before.
func (s *fakeSource) set(uid string, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.denied[uid] = err
	delete(s.issued, uid)
	close(s.changed)
	s.changed = make(chan struct{})
}

func (s *fakeSource) shown() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]string(nil), s.tokens...)
}

func (s *fakeSource) get(w *attestor.Workload) (*identity.Update, <-chan struct{}, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !attestor.IsVolume(w.Key) {
		return nil, nil, errors.New("not a volume's key")
	}
	if len(w.Evidence.Token) > 0 {
		s.tokens = append(s.tokens, string(w.Evidence.Token))
	} else if !s.held[w.Key] {
		return nil, s.changed, fmt.Errorf("%w: no token", identity.ErrUnavailable)
	}
	if err := s.denied[w.PodUID]; err != nil {
		return nil, s.changed, err
	}
	s.held[w.Key] = true
	if s.issued[w.PodUID] == nil {
		id := spiffeid.RequireFromPath(td, "/pod/"+w.PodUID)
		key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
		tmpl := &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), NotAfter: time.Now().Add(time.Hour), URIs: []*url.URL{id.URL()}, KeyUsage: x509.KeyUsageDigitalSignature}
		der := must(x509.CreateCertificate(rand.Reader, tmpl, s.ca, key.Public(), s.caKey))
		partner := spiffeid.RequireTrustDomainFromString("partner.test")
		s.issued[w.PodUID] = &identity.Update{
			SVIDs: []identity.X509SVID{{ID: id, Chain: [][]byte{der}, Key: must(x509.MarshalPKCS8PrivateKey(key)), NotAfter: tmpl.NotAfter}},
			Bundles: map[spiffeid.TrustDomain]*identity.Bundle{
				td: {TrustDomain: td, X509: [][]byte{s.ca.Raw}}, partner: {TrustDomain: partner, X509: [][]byte{s.ca.Raw}},
			},
		}
	}
	return s.issued[w.PodUID], s.changed, nil
}

func (s *fakeSource) Updates(ctx context.Context, attest attestor.Func, send func(*identity.Update) error) error {
	for {
		w, err := attest(ctx)
		if err != nil {
			return err
		}
		u, changed, err := s.get(w)
		w.Wipe()
		if err != nil {
			return err
		}
		if err := send(u); err != nil {
			return err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (s *fakeSource) Current(ctx context.Context, attest attestor.Func) (*identity.Update, error) {
	w, err := attest(ctx)
	if err != nil {
		return nil, err
	}
	defer w.Wipe()
	u, _, err := s.get(w)
	return u, err
}

func (s *fakeSource) FetchJWT(ctx context.Context, attest attestor.Func, audience []string, id spiffeid.ID) ([]identity.JWTSVID, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.jwtErr != nil {
		return nil, s.jwtErr
	}
	s.jwts++
	return []identity.JWTSVID{{ID: id, Token: fmt.Sprintf("jwt %d for %s", s.jwts, audience[0]), IssuedAt: s.now(), ExpiresAt: s.now().Add(time.Hour)}}, nil
}

// fakeMounts remembers instead of mounting. It outlives a driver, as the kernel's table does.
type fakeMounts struct {
	mu      sync.Mutex
	at      map[place]os.FileInfo
	bindErr error
	binds   int
}

func (m *fakeMounts) look(folder string, p place) (seen, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	info, ok := m.at[p]
	if !ok {
		return nothing, nil
	}
	now, err := os.Lstat(folder)
	if err == nil && os.SameFile(info, now) {
		return ours, nil
	}
	return other, nil
}

func (m *fakeMounts) bind(folder string, p place) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.bindErr != nil {
		return m.bindErr
	}
	if _, ok := m.at[p]; ok {
		return errors.New("mounted twice")
	}
	info, err := os.Lstat(folder)
	if err != nil {
		return err
	}
	m.at[p], m.binds = info, m.binds+1
	return nil
}

func (m *fakeMounts) unbind(p place) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.at, p)
	return nil
}

func (m *fakeMounts) count() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.at)
}

// syncBuffer is a log that tests read.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// world is a node: what outlives an agent.
type world struct {
	t      testing.TB
	dir    string
	source *fakeSource
	mounts *fakeMounts
	log    *syncBuffer
	uid    func(net.Conn) (uint32, error)
}

func newWorld(t testing.TB) *world {
	t.Helper()
	dir := must(os.MkdirTemp("", "csi")) // t.TempDir has a path too long for a socket
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Mkdir(filepath.Join(dir, "reg"), 0o755); err != nil {
		t.Fatal(err)
	}
	return &world{t: t, dir: dir, source: newSource(), mounts: &fakeMounts{at: map[place]os.FileInfo{}}, log: &syncBuffer{},
		uid: func(net.Conn) (uint32, error) { return 0, nil }}
}

func (w *world) kubelet() string { return filepath.Join(w.dir, "kubelet") }

// node is an agent on it.
type node struct {
	*world
	d    *Driver
	api  *workloadapi.Server
	stop func() error
}

type attestNobody struct{}

func (attestNobody) Attest(context.Context, *attestor.Peer) (*attestor.Workload, error) {
	return nil, fmt.Errorf("%w: processes are not looked at here", identity.ErrDenied)
}

func (w *world) config(api *workloadapi.Server) Config {
	return Config{Socket: filepath.Join(w.dir, "plugin", "csi.sock"), RegistrationDir: filepath.Join(w.dir, "reg"), KubeletDir: w.kubelet(),
		Dir: filepath.Join(w.dir, "v"), Node: "node-1", Audience: "countersign", Version: "1.2.3", Source: w.source, API: api,
		Log: slog.New(slog.NewTextHandler(w.log, &slog.HandlerOptions{Level: slog.LevelDebug}))}
}

func (w *world) make() (*Driver, *workloadapi.Server) {
	w.t.Helper()
	api, err := workloadapi.New(workloadapi.Config{Path: filepath.Join(w.dir, "agent.sock"), Source: w.source, Attestor: attestNobody{}})
	if err != nil {
		w.t.Fatal(err)
	}
	d, err := newDriver(w.config(api), hooks{memory: func(string) (bool, error) { return true, nil }, caller: w.uid, mounts: w.mounts})
	if err != nil {
		w.t.Fatal(err)
	}
	return d, api
}

func (w *world) start(change ...func(*Driver)) *node {
	w.t.Helper()
	d, api := w.make()
	for _, c := range change {
		c(d)
	}
	ctx, cancel := context.WithCancel(context.Background())
	errs := make(chan error, 2)
	go func() { errs <- api.Run(ctx) }()
	go func() { errs <- d.Run(ctx) }()
	n := &node{world: w, d: d, api: api}
	n.stop = sync.OnceValue(func() error { cancel(); return errors.Join(<-errs, <-errs) })
	w.t.Cleanup(func() {
		if err := n.stop(); err != nil {
			w.t.Errorf("stopping: %v", err)
		}
	})
	return n
}

func dial(t testing.TB, path string) *grpc.ClientConn {
	t.Helper()
	c, err := grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func (n *node) node() csispec.NodeClient {
	return csispec.NewNodeClient(dial(n.t, n.d.cfg.Socket))
}

func (n *node) publish(req *csispec.NodePublishVolumeRequest) error {
	_, err := n.node().NodePublishVolume(n.ctx(), req)
	return err
}

func (n *node) unpublish(req *csispec.NodePublishVolumeRequest) error {
	_, err := n.node().NodeUnpublishVolume(n.ctx(), &csispec.NodeUnpublishVolumeRequest{VolumeId: req.VolumeId, TargetPath: req.TargetPath})
	return err
}

func (w *world) ctx() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	w.t.Cleanup(cancel)
	return metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
}

func uidOf(n int) string { return fmt.Sprintf("0f5c8c3e-0000-4000-8000-%012x", n) }

// token is what the API server would sign for a pod; mark makes it another one.
func token(uid, mark string, change ...func(map[string]any)) string {
	claims := map[string]any{"aud": []string{"countersign"}, "exp": 4e9, "jti": mark, "kubernetes.io": map[string]any{
		"namespace": "shop", "pod": map[string]any{"name": "web-" + uid[30:], "uid": uid}, "serviceaccount": map[string]any{"name": "web", "uid": "x"},
	}}
	for _, c := range change {
		c(claims)
	}
	return "e30." + base64.RawURLEncoding.EncodeToString(must(json.Marshal(claims))) + ".c2ln" + strings.ReplaceAll(mark, " ", "")
}

func tokens(audience, token string) string {
	return string(must(json.Marshal(map[string]any{audience: map[string]any{"token": token, "expirationTimestamp": "2030-01-01T00:00:00Z"}})))
}

// request is the kubelet's for pod n's volume.
func (w *world) request(n int, attributes ...string) *csispec.NodePublishVolumeRequest {
	uid := uidOf(n)
	r := &csispec.NodePublishVolumeRequest{
		VolumeId:   fmt.Sprintf("csi-%064x", n),
		TargetPath: filepath.Join(w.kubelet(), "pods", uid, "volumes", "kubernetes.io~csi", "identity", "mount"),
		Readonly:   true,
		VolumeCapability: &csispec.VolumeCapability{
			AccessType: &csispec.VolumeCapability_Mount{Mount: &csispec.VolumeCapability_MountVolume{}},
			AccessMode: &csispec.VolumeCapability_AccessMode{Mode: csispec.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
		},
		VolumeContext: map[string]string{
			ephemeralKey: "true", podUIDKey: uid, podNameKey: "web-" + uid[30:], podNamespaceKey: "shop", podAccountKey: "web",
			tokensKey: tokens("countersign", token(uid, "first")),
		},
	}
	for i := 0; i < len(attributes); i += 2 {
		r.VolumeContext[attributes[i]] = attributes[i+1]
	}
	return r
}

// folder is what a pod sees.
func (n *node) folder(req *csispec.NodePublishVolumeRequest) string {
	return n.d.dir.volume(nameOf(req.VolumeId))
}

// x509 asks on a volume's socket and returns the SPIFFE ID.
func (n *node) x509(req *csispec.NodePublishVolumeRequest) (string, error) {
	stream, err := workload.NewSpiffeWorkloadAPIClient(dial(n.t, filepath.Join(n.folder(req), socketName))).FetchX509SVID(n.ctx(), &workload.X509SVIDRequest{})
	if err != nil {
		return "", err
	}
	resp, err := stream.Recv()
	if err != nil {
		return "", err
	}
	return resp.Svids[0].SpiffeId, nil
}

func (n *node) wantID(req *csispec.NodePublishVolumeRequest, i int) {
	n.t.Helper()
	if id, err := n.x509(req); err != nil || id != "spiffe://example.org/pod/"+uidOf(i) {
		n.t.Fatalf("on the volume's socket: %q, %v", id, err)
	}
}

// wantNothing checks that no trace of volumes is left.
func (w *world) wantNothing() {
	w.t.Helper()
	for _, dir := range []string{"volumes", "records"} {
		if names, err := os.ReadDir(filepath.Join(w.dir, "v", dir)); err != nil || len(names) > 0 {
			w.t.Errorf("left in %s: %v, %v", dir, names, err)
		}
	}
	if w.mounts.count() > 0 {
		w.t.Error("mounts are left")
	}
}

func wantCode(t testing.TB, err error, want codes.Code, text ...string) {
	t.Helper()
	if got := status.Code(err); got != want {
		t.Fatalf("got code %v (%v), want %v", got, err, want)
	}
	for _, s := range text {
		if !strings.Contains(err.Error(), s) {
			t.Errorf("%q does not say %q", err, s)
		}
	}
}

// eventually polls for what happens at its own time in another goroutine.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.After(30 * time.Second)
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("never happened: %s", what)
		}
	}
}

// stream opens one on a volume's socket.
func (n *node) stream(req *csispec.NodePublishVolumeRequest) grpc.ServerStreamingClient[workload.X509SVIDResponse] {
	n.t.Helper()
	s, err := workload.NewSpiffeWorkloadAPIClient(dial(n.t, filepath.Join(n.folder(req), socketName))).FetchX509SVID(n.ctx(), &workload.X509SVIDRequest{})
	if err != nil {
		n.t.Fatal(err)
	}
	return s
}
