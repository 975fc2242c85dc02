package main

import (
	"bytes"
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	memberv1 "countersign.io/countersign/api/member/v1"
	"countersign.io/countersign/attestor/kube"
	"countersign.io/countersign/ca"
	"countersign.io/countersign/config"
	"countersign.io/countersign/identity"
	"countersign.io/countersign/seal"
	"countersign.io/countersign/server"
)

// fakeFormHome is the namespace of a StatefulSet.
type fakeFormHome struct {
	mu        sync.Mutex
	published *kube.PublishedBundle
	err, own  error
	asked     chan struct{} // one per question
}

func (f *fakeFormHome) CheckOwn(string) error { return f.own }

func (f *fakeFormHome) ConfigMapName() string { return "ns/countersign-bundle" }

func (f *fakeFormHome) Bundle(context.Context) (*kube.PublishedBundle, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	select {
	case f.asked <- struct{}{}:
	default:
	}
	if f.err == nil && f.published == nil {
		return nil, fmt.Errorf("ConfigMap: %w", identity.ErrNotFound)
	}
	return f.published, f.err
}

// fakeMember is a member that answers Join.
type fakeMember struct {
	memberv1.UnimplementedMemberServer
	address string
	bundle  *identity.Bundle
	answer  error
	mu      sync.Mutex
	asked   []*memberv1.JoinRequest
}

func (m *fakeMember) Join(_ context.Context, req *memberv1.JoinRequest) (*memberv1.JoinResponse, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.asked = append(m.asked, req)
	if m.answer != nil {
		return nil, m.answer
	}
	keyring, err := seal.NewKeyring()
	if err != nil {
		return nil, err
	}
	authorities, err := json.Marshal([]identity.Authority{})
	return &memberv1.JoinResponse{TrustDomain: m.bundle.TrustDomain.Name(), Keyring: keyring.Plain(), Authorities: authorities}, err
}

func newFakeMember(t *testing.T, trustDomain string) *fakeMember {
	t.Helper()
	td := spiffeid.RequireTrustDomainFromString(trustDomain)
	a, der, err := ca.NewX509Authority(td, time.Hour, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	a.State = identity.AuthorityActive
	c, err := ca.New(ca.Config{TrustDomain: td, MemberName: "countersign-1", Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.SetAuthorities([]identity.Authority{a}, func(identity.Authority) (crypto.Signer, error) {
		key, err := x509.ParsePKCS8PrivateKey(der)
		return key.(crypto.Signer), err
	}); err != nil {
		t.Fatal(err)
	}
	m := &fakeMember{bundle: &identity.Bundle{TrustDomain: td, Sequence: 1, X509: [][]byte{a.Cert}}}
	conf := server.ServerTLS(server.TLSConfig{TrustDomain: td, Certificate: c.MemberCertificate, Bundle: func() *identity.Bundle { return m.bundle }})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	m.address = l.Addr().String()
	g := grpc.NewServer(grpc.Creds(credentials.NewTLS(conf)))
	memberv1.RegisterMemberServer(g, m)
	done := make(chan struct{})
	go func() { defer close(done); _ = g.Serve(l) }()
	t.Cleanup(func() { g.Stop(); <-done })
	return m
}

// former is a member's of that name, with what it logs.
func newTestFormer(t *testing.T, name string, home *fakeFormHome, peers ...string) (*dataDir, *former, *bytes.Buffer) {
	t.Helper()
	c, err := config.ParseServer("x", fmt.Appendf(nil, "version: 1\ntrust_domain: example.org\nname: %s\ndata_dir: %s\nadvertise: 'own:1'\ncluster: {peers: [%s]}\nkubernetes: {cluster: main, namespace: ns, stateful_set: countersign}\n",
		name, t.TempDir()+"/data", strings.Join(append(peers, "'own:1'"), ", ")))
	if err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	f, err := newFormer(c, home, slog.New(slog.NewTextHandler(&log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	f.token = func() ([]byte, error) { return []byte("TOKENTOKENTOKEN\n"), nil }
	f.retry = time.Millisecond
	if err := os.Mkdir(c.DataDir, 0o700); err != nil {
		t.Fatal(err)
	}
	return &dataDir{path: c.DataDir, td: f.td}, f, &log
}

// formContext ends a member that would look for its cluster for ever.
func formContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func publishedBy(t *testing.T, m *fakeMember) *kube.PublishedBundle {
	t.Helper()
	data, err := bundleData(m.bundle)
	if err != nil {
		t.Fatal(err)
	}
	return &kube.PublishedBundle{TrustDomain: m.bundle.TrustDomain.Name(), Data: data}
}

func TestFormBegins(t *testing.T) {
	d, f, _ := newTestFormer(t, "countersign-0", &fakeFormHome{}, "127.0.0.1:1")
	keyring, err := d.form(formContext(t), f)
	if err != nil || keyring == nil || !d.member.Bootstrap || !d.member.Unclaimed {
		t.Fatalf("%v, %+v, %v", keyring, d.member, err)
	}
}

func TestFormJoins(t *testing.T) {
	m, stranger := newFakeMember(t, "example.org"), newFakeMember(t, "example.org")
	for _, name := range []string{"countersign-0", "countersign-2"} { // pod 0 as well: it has lost its volume
		d, f, _ := newTestFormer(t, name, &fakeFormHome{published: publishedBy(t, m)}, stranger.address, "127.0.0.1:1", m.address)
		keyring, err := d.form(formContext(t), f)
		if err != nil || keyring == nil || d.member.Bootstrap || d.member.Unclaimed {
			t.Fatalf("%s: %+v, %v", name, d.member, err)
		}
		req := m.asked[len(m.asked)-1]
		if req.PodToken != "TOKENTOKENTOKEN" || req.Secret != "" || req.Id != name || req.Address != "own:1" {
			t.Errorf("%s asked %v", name, req)
		}
	}
	if len(stranger.asked) != 0 {
		t.Error("a member that the published roots do not vouch for was shown a token")
	}
}

// TestFormWaits: what each member without data says for as long as it can neither begin nor join.
func TestFormWaits(t *testing.T) {
	m, denies, elsewhere := newFakeMember(t, "example.org"), newFakeMember(t, "example.org"), newFakeMember(t, "other.org")
	denies.answer = status.Error(codes.PermissionDenied, "wrong account")
	ours := publishedBy(t, m)
	for name, row := range map[string]struct {
		member string
		home   *fakeFormHome
		peers  []string
		says   []string
	}{
		"another pod, before pod 0 has begun": {"countersign-1", &fakeFormHome{}, nil, []string{"pod countersign-0 makes it"}},
		"pod 0, where a member answers":       {"countersign-0", &fakeFormHome{}, []string{"127.0.0.1:1", m.address}, []string{"second cluster", "countersign-1"}},
		"pod 0, API server down":              {"countersign-0", &fakeFormHome{err: fmt.Errorf("%w: sleeps", identity.ErrUnavailable)}, nil, []string{"sleeps"}},
		"a ConfigMap left over":               {"countersign-0", &fakeFormHome{published: ours}, []string{"127.0.0.1:1"}, []string{"left over", "kubectl -n ns delete configmap countersign-bundle", "docs/BACKUP.md"}},
		"a ConfigMap of another cluster":      {"countersign-1", &fakeFormHome{published: ours}, []string{denies.address}, []string{"left over", "older than its last rotation"}},
		"another trust domain's":              {"countersign-1", &fakeFormHome{published: publishedBy(t, elsewhere)}, []string{elsewhere.address}, []string{`trust domain "other.org"`, "delete the ConfigMap"}},
		"an empty ConfigMap":                  {"countersign-1", &fakeFormHome{published: &kube.PublishedBundle{}}, nil, []string{"bundle.pem"}},
		"damaged roots":                       {"countersign-1", &fakeFormHome{published: &kube.PublishedBundle{Data: map[string]string{kube.BundlePEM: ours.Data[kube.BundlePEM] + "junk"}}}, []string{m.address}, []string{"neither PEM"}},
		"refused":                             {"countersign-1", &fakeFormHome{published: publishedBy(t, denies)}, []string{denies.address}, []string{"wrong account"}},
	} {
		t.Run(name, func(t *testing.T) {
			row.home.asked = make(chan struct{}, 2)
			d, f, log := newTestFormer(t, row.member, row.home, row.peers...)
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			done := make(chan error, 1)
			go func() { _, err := d.form(ctx, f); done <- err }()
			<-row.home.asked
			<-row.home.asked // it asks again: the first answer has been said
			cancel()
			if err := <-done; err == nil {
				t.Fatal("it has a cluster")
			}
			for _, want := range row.says {
				if why := f.why.Load(); why == nil || !strings.Contains(*why, want) || !strings.Contains(log.String(), strings.ReplaceAll(want, `"`, `\"`)) {
					t.Errorf("it does not say %q: %s", want, log)
				}
			}
			if strings.Contains(log.String(), "TOKENTOKEN") {
				t.Error("the token is in the log")
			}
		})
	}
	if len(m.asked) != 0 {
		t.Error("a token was shown to a member that should not have been asked")
	}
}

// TestFormChecksItself: a pod whose token is another's is at fault, and no waiting mends that.
func TestFormChecksItself(t *testing.T) {
	d, f, _ := newTestFormer(t, "countersign-0", &fakeFormHome{own: fmt.Errorf("%w: it is another pod", identity.ErrPrecondition)})
	if _, err := d.form(formContext(t), f); !errors.Is(err, identity.ErrPrecondition) {
		t.Error(err)
	}
}

// TestUnclaimedOutlivesACrash: who crashed between beginning the cluster and knowing that it is the one still does not know.
func TestUnclaimedOutlivesACrash(t *testing.T) {
	_, f, _ := newTestFormer(t, "countersign-0", &fakeFormHome{})
	open := func() *dataDir {
		d, err := openDataDir(context.Background(), f.c, f)
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	d := open()
	if !d.isUnclaimed() {
		t.Fatal("it believes itself the one")
	}
	d.Close()
	if d = open(); !d.isUnclaimed() || !d.member.Bootstrap {
		t.Fatal("after a crash it believes itself the one")
	}
	if err := d.claim(); err != nil || d.isUnclaimed() {
		t.Fatal(err)
	}
	d.Close()
	if d = open(); d.isUnclaimed() || !d.member.Bootstrap {
		t.Fatal("it forgot that it is the one")
	}
	d.Close()
}

// TestPeersOfAStatefulSet: without cluster.peers they are its other pods, by the names that do not change.
func TestPeersOfAStatefulSet(t *testing.T) {
	_, f, _ := newTestFormer(t, "countersign-1", &fakeFormHome{})
	f.c.Cluster.Peers = nil
	all := f.addresses()
	if len(all) != maxPeers-1 || all[0] != "countersign-0.countersign-members.ns.svc:8443" || all[1] != "countersign-2.countersign-members.ns.svc:8443" {
		t.Fatalf("%v", all)
	}
	// The first names resolve, the rest do not: they are not spoken of.
	f.dial = func(_ context.Context, address string) (net.Conn, error) {
		if strings.HasPrefix(address, "countersign-0.") {
			return nil, errors.New("refused")
		}
		return nil, &net.OpError{Err: &net.DNSError{IsNotFound: true}}
	}
	if got := f.ask(context.Background(), &tls.Config{}); len(got) != 1 || !strings.Contains(got[0].err.Error(), "countersign-0") {
		t.Fatalf("%v", got)
	}
}
