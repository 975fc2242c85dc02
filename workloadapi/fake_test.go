package workloadapi

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"maps"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	spiffe "github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"countersign.io/countersign/attestor"
	"countersign.io/countersign/identity"
)

// must is for what cannot fail in a test.
func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// domain is a trust domain with its authorities.
type domain struct {
	td     spiffeid.TrustDomain
	caKey  *ecdsa.PrivateKey
	ca     *x509.Certificate
	jwtKey *ecdsa.PrivateKey
}

func newDomain(name string) *domain {
	d := &domain{td: spiffeid.RequireTrustDomainFromString(name)}
	d.caKey = must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	d.jwtKey = must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, URIs: []*url.URL{must(url.Parse("spiffe://" + name))},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	d.ca = must(x509.ParseCertificate(must(x509.CreateCertificate(rand.Reader, tmpl, tmpl, d.caKey.Public(), d.caKey))))
	return d
}

func (d *domain) bundle() *identity.Bundle {
	return &identity.Bundle{
		TrustDomain: d.td, Sequence: 7, RefreshHint: 5 * time.Minute, X509: [][]byte{d.ca.Raw},
		JWT: map[string][]byte{"kid-1": must(x509.MarshalPKIXPublicKey(d.jwtKey.Public()))},
	}
}

// svid issues one; the URI SANs are the ID but where others are given.
func (d *domain) svid(path, hint string, uris ...string) identity.X509SVID {
	id := spiffeid.RequireFromPath(d.td, path)
	if uris == nil {
		uris = []string{id.String()}
	}
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	tmpl := &x509.Certificate{
		SerialNumber: must(rand.Int(rand.Reader, big.NewInt(1<<60))), Subject: pkix.Name{CommonName: "x"},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour), BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	for _, u := range uris {
		tmpl.URIs = append(tmpl.URIs, must(url.Parse(u)))
	}
	der := must(x509.CreateCertificate(rand.Reader, tmpl, d.ca, key.Public(), d.caKey))
	return identity.X509SVID{ID: id, Chain: [][]byte{der, d.ca.Raw}, Key: must(x509.MarshalPKCS8PrivateKey(key)), Hint: hint,
		NotBefore: tmpl.NotBefore, NotAfter: tmpl.NotAfter}
}

func (d *domain) update(svids ...identity.X509SVID) *identity.Update {
	return &identity.Update{SVIDs: svids, Bundles: map[spiffeid.TrustDomain]*identity.Bundle{d.td: d.bundle()}}
}

// token signs claims over those of a good token; a nil value removes the claim. The header's too.
func (d *domain) token(sub string, claims, header map[string]any) string {
	all := map[string]any{"sub": sub, "aud": []string{"test"}, "exp": time.Now().Add(time.Hour).Unix(), "iat": time.Now().Unix()}
	maps.Copy(all, claims)
	head := map[jose.HeaderKey]any{"typ": "JWT"}
	kid := "kid-1"
	for k, v := range header {
		switch {
		case k == "kid":
			kid = v.(string)
		case v == nil:
			delete(head, jose.HeaderKey(k))
		default:
			head[jose.HeaderKey(k)] = v
		}
	}
	maps.DeleteFunc(all, func(_ string, v any) bool { return v == nil })
	signer := must(jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: d.jwtKey, KeyID: kid}}, &jose.SignerOptions{ExtraHeaders: head}))
	return must(jwt.Signed(signer).Claims(all).Serialize())
}

// fakeAttestor knows a caller by the name that its connection was given, see dial.
type fakeAttestor struct {
	calls atomic.Int64
	do    func(ctx context.Context, name string) (*attestor.Workload, error) // nil: always works
}

func (a *fakeAttestor) Attest(ctx context.Context, p *attestor.Peer) (*attestor.Workload, error) {
	a.calls.Add(1)
	c, ok := connOf(ctx)
	if !ok || p == nil {
		return nil, fmt.Errorf("attesting without a caller")
	}
	name := nameOf(c.UnixConn)
	if a.do != nil {
		return a.do(ctx, name)
	}
	w := &attestor.Workload{Key: name}
	w.Evidence.Token = []byte("token of " + name)
	return w, nil
}

// fakeSource gives every workload the state that set gave for its key.
type fakeSource struct {
	mu      sync.Mutex
	state   map[string]any // *identity.Update or error
	changed chan struct{}  // closed at each change
	running int            // Updates under way
	jwt     func(key string, audience []string, id spiffeid.ID) ([]identity.JWTSVID, error)
}

func newSource() *fakeSource {
	return &fakeSource{state: map[string]any{}, changed: make(chan struct{})}
}

func (s *fakeSource) set(key string, v any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.state[key] = v
	close(s.changed)
	s.changed = make(chan struct{})
}

func (s *fakeSource) add(n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.running += n
}

func (s *fakeSource) subscribers() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.running
}

func (s *fakeSource) get(key string) (*identity.Update, <-chan struct{}, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch v := s.state[key].(type) {
	case *identity.Update:
		return v, s.changed, nil
	case error:
		return nil, s.changed, v
	}
	return nil, s.changed, fmt.Errorf("%w: no entry", identity.ErrDenied)
}

func (s *fakeSource) Updates(ctx context.Context, attest attestor.Func, send func(*identity.Update) error) error {
	s.add(1)
	defer s.add(-1)
	w, err := attest(ctx)
	if err != nil {
		return err
	}
	defer w.Wipe()
	for {
		u, changed, err := s.get(w.Key)
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
	u, _, err := s.get(w.Key)
	return u, err
}

func (s *fakeSource) FetchJWT(ctx context.Context, attest attestor.Func, audience []string, id spiffeid.ID) ([]identity.JWTSVID, error) {
	w, err := attest(ctx)
	if err != nil {
		return nil, err
	}
	defer w.Wipe()
	if s.jwt != nil {
		return s.jwt(w.Key, audience, id)
	}
	u, _, err := s.get(w.Key)
	if err != nil {
		return nil, err
	}
	var out []identity.JWTSVID
	for _, svid := range u.SVIDs {
		if id.IsZero() || svid.ID == id {
			out = append(out, identity.JWTSVID{ID: svid.ID, Token: "a." + strings.Join(audience, "+") + ".c", Hint: svid.Hint})
		}
	}
	if out == nil {
		return nil, fmt.Errorf("%w: not an identity of this workload: %s", identity.ErrDenied, id)
	}
	return out, nil
}

// fixture is a server that runs, with callers by name: "web" is the usual one.
type fixture struct {
	t        testing.TB
	d        *domain
	source   *fakeSource
	attestor *fakeAttestor
	server   *Server
	path     string
	stop     func() error // ends Run and returns its error
}

// setup is what a test may change before the server runs.
type setup struct {
	Config
	tune func(*Server)
}

// start runs a server in which the caller "web" has the identity /web.
func start(t testing.TB, change ...func(*setup)) *fixture {
	t.Helper()
	dir := must(os.MkdirTemp("", "wl")) // t.TempDir has a path too long for a socket
	t.Cleanup(func() { os.RemoveAll(dir) })
	f := &fixture{t: t, d: newDomain("example.org"), source: newSource(), attestor: &fakeAttestor{}, path: filepath.Join(dir, "agent.sock")}
	f.source.set("web", f.d.update(f.d.svid("/web", "")))
	with := setup{Config{Path: f.path, Source: f.source, Attestor: f.attestor}, func(*Server) {}}
	for _, c := range change {
		c(&with)
	}
	s, err := New(with.Config)
	if err != nil {
		t.Fatal(err)
	}
	s.identify = func(c *net.UnixConn) (caller, error) {
		name := nameOf(c)
		return caller{key: "test:" + name, uid: uint32(len(name))}, nil // names of one length are of one user
	}
	with.tune(s)
	f.server = s
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	f.stop = sync.OnceValue(func() error {
		cancel()
		select {
		case err := <-done:
			return err
		case <-time.After(30 * time.Second):
			return fmt.Errorf("Run has not returned")
		}
	})
	t.Cleanup(func() {
		if err := f.stop(); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return f
}

func withLimits(l Limits) func(*setup) { return func(s *setup) { s.Limits = l } }

var dialed atomic.Int64

// dial connects as the named caller: the name is in the client's own abstract address.
func (f *fixture) dial(name string) (net.Conn, error) {
	local := &net.UnixAddr{Name: fmt.Sprintf("@%s/%s/%d", name, filepath.Base(filepath.Dir(f.path)), dialed.Add(1)), Net: "unix"}
	return net.DialUnix("unix", local, &net.UnixAddr{Name: f.path, Net: "unix"})
}

// nameOf is the name that a connection was dialed with; go-spiffe's client gives none and is "web".
func nameOf(c *net.UnixConn) string {
	name, _, ok := strings.Cut(strings.TrimPrefix(c.RemoteAddr().String(), "@"), "/")
	if !ok {
		return "web"
	}
	return name
}

// conn is a gRPC connection of the named caller.
func (f *fixture) conn(name string) *grpc.ClientConn {
	f.t.Helper()
	cc, err := grpc.NewClient("passthrough:///socket", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return f.dial(name) }))
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { cc.Close() })
	return cc
}

// client is a raw Workload API client of the named caller.
func (f *fixture) client(name string) workload.SpiffeWorkloadAPIClient {
	return workload.NewSpiffeWorkloadAPIClient(f.conn(name))
}

// spiffe is go-spiffe's client, of the caller "web".
func (f *fixture) spiffe() *spiffe.Client {
	f.t.Helper()
	c, err := spiffe.New(f.ctx(), spiffe.WithAddr(f.server.Address()))
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { c.Close() })
	return c
}

// ctx is for one test's calls: the security header, and an end if something hangs.
func (f *fixture) ctx() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	f.t.Cleanup(cancel)
	return metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
}

// x509 opens a stream of the named caller.
func (f *fixture) x509(name string) grpc.ServerStreamingClient[workload.X509SVIDResponse] {
	f.t.Helper()
	stream, err := f.client(name).FetchX509SVID(f.ctx(), &workload.X509SVIDRequest{})
	if err != nil {
		f.t.Fatal(err)
	}
	return stream
}

func wantCode(t testing.TB, err error, want codes.Code) {
	t.Helper()
	if got := status.Code(err); got != want {
		t.Fatalf("got code %v (%v), want %v", got, err, want)
	}
}

// ids are the SPIFFE IDs of a response in order.
func ids(r *workload.X509SVIDResponse) string {
	var out []string
	for _, s := range r.GetSvids() {
		out = append(out, s.SpiffeId)
	}
	return strings.Join(out, " ")
}

// eventually polls for what happens at its own time in another goroutine.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.After(30 * time.Second)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("never happened: %s", what)
		}
	}
}

func keysOf(d *domain) func(spiffeid.TrustDomain) map[string]crypto.PublicKey {
	return func(td spiffeid.TrustDomain) map[string]crypto.PublicKey {
		if td == d.td {
			return jwtKeys(d.bundle())
		}
		return nil
	}
}
