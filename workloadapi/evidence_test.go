package workloadapi

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"testing"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"

	"countersign.io/countersign/attestor"
	"countersign.io/countersign/identity"
)

// only is the one connection that is open.
func (f *fixture) only() *conn {
	f.t.Helper()
	f.server.admit.mu.Lock()
	defer f.server.admit.mu.Unlock()
	if len(f.server.admit.conns) != 1 {
		f.t.Fatalf("%d connections", len(f.server.admit.conns))
	}
	for c := range f.server.admit.conns {
		return c
	}
	return nil
}

func TestAttestOncePerConnection(t *testing.T) {
	f := start(t)
	client := f.client("web")
	call := func() error {
		_, err := client.FetchJWTSVID(f.ctx(), &workload.JWTSVIDRequest{Audience: []string{"test"}})
		return err
	}
	for range 3 {
		if err := call(); err != nil {
			t.Fatal(err)
		}
	}
	if n := f.attestor.calls.Load(); n != 1 {
		t.Errorf("%d attestations for three calls of one connection", n)
	}
	c := f.only()
	c.evidence.mu.Lock()
	kept := c.evidence.workload
	c.evidence.drop() // as its timer does
	c.evidence.mu.Unlock()
	if kept.Evidence.Token != nil {
		t.Error("evidence that is too old was not wiped")
	}
	if err := call(); err != nil {
		t.Fatal(err)
	}
	if n := f.attestor.calls.Load(); n != 2 {
		t.Errorf("%d attestations after the evidence became too old", n)
	}
	if err := func() error {
		_, err := f.client("web").FetchJWTSVID(f.ctx(), &workload.JWTSVIDRequest{Audience: []string{"test"}})
		return err
	}(); err != nil {
		t.Fatal(err)
	}
	if n := f.attestor.calls.Load(); n != 3 {
		t.Errorf("%d attestations after another connection", n)
	}
}

// The real things in place of the fakes: this process, attested as itself.
func TestRealCaller(t *testing.T) {
	real, err := attestor.New(attestor.Config{})
	if err != nil {
		t.Fatal(err)
	}
	var seen identity.Evidence
	f := start(t, func(s *setup) {
		s.Attestor = real
		s.tune = func(s *Server) {
			s.identify = identifyPeer
			s.source = sourceFunc(func(ctx context.Context, attest attestor.Func) error {
				w, err := attest(ctx)
				if err == nil {
					seen = w.Evidence
				}
				return err
			})
		}
	})
	_, err = f.client("web").FetchJWTSVID(f.ctx(), &workload.JWTSVIDRequest{Audience: []string{"test"}})
	wantCode(t, err, codes.PermissionDenied) // this source has no identity for anyone
	if want := identity.Selector(fmt.Sprintf("unix:uid:%d", os.Getuid())); !slices.Contains(seen.Selectors, want) {
		t.Errorf("the caller has the selectors %q", seen.Selectors)
	}
}

func TestConcurrentFirstCallsAttestOnce(t *testing.T) {
	f := start(t)
	entered, leave := make(chan struct{}), make(chan struct{})
	f.attestor.do = func(context.Context, string) (*attestor.Workload, error) {
		close(entered) // a second attestation would panic
		<-leave
		return &attestor.Workload{Key: "web"}, nil
	}
	client := f.client("web")
	var calls sync.WaitGroup
	for range 8 {
		calls.Go(func() {
			if _, err := client.FetchJWTSVID(f.ctx(), &workload.JWTSVIDRequest{Audience: []string{"test"}}); err != nil {
				t.Error(err)
			}
		})
	}
	<-entered
	close(leave)
	calls.Wait()
}

// The Source gets a copy that it may wipe, and fresh evidence from the second time on.
func TestAttestAgain(t *testing.T) {
	f := start(t)
	var tokens []string
	f.source.jwt = func(string, []string, spiffeid.ID) ([]identity.JWTSVID, error) { return nil, nil }
	n := 0
	f.attestor.do = func(_ context.Context, name string) (*attestor.Workload, error) {
		n++
		w := &attestor.Workload{Key: name}
		w.Evidence.Token = fmt.Appendf(nil, "token %d", n)
		return w, nil
	}
	f.server.source = sourceFunc(func(ctx context.Context, attest attestor.Func) error {
		for range 3 {
			w, err := attest(ctx)
			if err != nil {
				return err
			}
			tokens = append(tokens, string(w.Evidence.Token))
			w.Wipe()
		}
		return nil
	})
	client := f.client("web")
	for range 2 {
		_, err := client.FetchJWTSVID(f.ctx(), &workload.JWTSVIDRequest{Audience: []string{"test"}})
		wantCode(t, err, codes.PermissionDenied)
	}
	if got := fmt.Sprint(tokens); got != "[token 1 token 2 token 3 token 1 token 4 token 5]" {
		t.Errorf("got %s", got)
	}
}

// sourceFunc is a source that only attests.
type sourceFunc func(context.Context, attestor.Func) error

func (f sourceFunc) Updates(ctx context.Context, a attestor.Func, _ func(*identity.Update) error) error {
	return f(ctx, a)
}
func (f sourceFunc) Current(ctx context.Context, a attestor.Func) (*identity.Update, error) {
	return &identity.Update{}, f(ctx, a)
}
func (f sourceFunc) FetchJWT(ctx context.Context, a attestor.Func, _ []string, _ spiffeid.ID) ([]identity.JWTSVID, error) {
	return nil, f(ctx, a)
}

func TestCallerGone(t *testing.T) {
	f := start(t)
	client := f.client("web")
	if _, err := client.FetchJWTSVID(f.ctx(), &workload.JWTSVIDRequest{Audience: []string{"test"}}); err != nil {
		t.Fatal(err)
	}
	stream := must(client.FetchX509SVID(f.ctx(), &workload.X509SVIDRequest{}))
	must(stream.Recv())
	f.only().peer.Load().Close() // which is what it sees of a process that has exited
	f.source.set("web", f.d.update(f.d.svid("/rotated", "")))
	_, err := stream.Recv()
	wantCode(t, err, codes.PermissionDenied)
	_, err = client.FetchJWTSVID(f.ctx(), &workload.JWTSVIDRequest{Audience: []string{"test"}})
	wantCode(t, err, codes.PermissionDenied)
}

// What attestation refuses reaches the caller in the standard's codes, and is tried again at the next call.
func TestAttestationRefused(t *testing.T) {
	f := start(t)
	var refuse error
	f.attestor.do = func(_ context.Context, name string) (*attestor.Workload, error) {
		if refuse != nil {
			return nil, refuse
		}
		return &attestor.Workload{Key: name}, nil
	}
	client := f.client("web")
	for _, tc := range []struct {
		err  error
		want codes.Code
	}{
		{fmt.Errorf("%w: the token is another pod's", identity.ErrUnauthenticated), codes.PermissionDenied},
		{fmt.Errorf("%w: the pod has no token", identity.ErrDenied), codes.PermissionDenied},
		{fmt.Errorf("gone: %w", attestor.ErrPeerChanged), codes.PermissionDenied},
		{fmt.Errorf("%w: reading the token", identity.ErrUnavailable), codes.Unavailable},
		{errors.New("a fault"), codes.Internal},
		{nil, codes.OK},
	} {
		refuse = tc.err
		_, err := client.FetchJWTSVID(f.ctx(), &workload.JWTSVIDRequest{Audience: []string{"test"}})
		wantCode(t, err, tc.want)
	}
}

func TestEvidenceWipedWithConnection(t *testing.T) {
	f := start(t)
	conn := f.conn("web")
	if _, err := workload.NewSpiffeWorkloadAPIClient(conn).FetchJWTSVID(f.ctx(), &workload.JWTSVIDRequest{Audience: []string{"test"}}); err != nil {
		t.Fatal(err)
	}
	c := f.only()
	conn.Close()
	eventually(t, "the evidence is wiped", func() bool { return !c.evidence.has() })
	late := &attestor.Workload{Evidence: identity.Evidence{Token: []byte("x")}}
	c.evidence.keep(late)
	if c.evidence.has() || late.Evidence.Token != nil {
		t.Error("a closed connection keeps evidence")
	}
}

// A caller that asks before its identity exists is refused, and a stream opened after it was made gets it.
func TestIdentityComesLater(t *testing.T) {
	f := start(t)
	client := f.client("new")
	stream := must(client.FetchX509SVID(f.ctx(), &workload.X509SVIDRequest{}))
	_, err := stream.Recv()
	wantCode(t, err, codes.PermissionDenied)
	f.source.set("new", f.d.update(f.d.svid("/new", "")))
	stream = must(client.FetchX509SVID(f.ctx(), &workload.X509SVIDRequest{}))
	if m, err := stream.Recv(); err != nil || ids(m) != "spiffe://example.org/new" {
		t.Errorf("%v, %v", ids(m), err)
	}
}
