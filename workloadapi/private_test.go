package workloadapi

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"sync/atomic"
	"testing"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"

	"countersign.io/countersign/attestor"
	"countersign.io/countersign/identity"
)

// private opens a socket whose callers are the workload of the name, and returns how to connect.
func (f *fixture) private(name string) (*Private, func() *grpc.ClientConn) {
	f.t.Helper()
	path := filepath.Join(filepath.Dir(f.path), name+".sock")
	p, err := f.server.Open(path, 0, name, func(context.Context) (*attestor.Workload, error) { return &attestor.Workload{Key: name}, nil })
	if err != nil {
		f.t.Fatal(err)
	}
	return p, func() *grpc.ClientConn {
		cc, err := grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			f.t.Fatal(err)
		}
		f.t.Cleanup(func() { cc.Close() })
		return cc
	}
}

func (f *fixture) fetch(cc *grpc.ClientConn) (*workload.X509SVIDResponse, error) {
	stream, err := workload.NewSpiffeWorkloadAPIClient(cc).FetchX509SVID(f.ctx(), &workload.X509SVIDRequest{})
	if err != nil {
		return nil, err
	}
	return stream.Recv()
}

// TestPrivate: the socket says who its callers are, and no process is looked at.
func TestPrivate(t *testing.T) {
	f := start(t)
	f.source.set("db", f.d.update(f.d.svid("/db", "")))
	web, dialWeb := f.private("web")
	_, dialDB := f.private("db")
	for name, dial := range map[string]func() *grpc.ClientConn{"web": dialWeb, "db": dialDB} {
		resp, err := f.fetch(dial())
		if err != nil || ids(resp) != "spiffe://example.org/"+name {
			t.Errorf("%s: %v, %v", name, ids(resp), err)
		}
	}
	if n := f.attestor.calls.Load(); n != 0 {
		t.Errorf("the process was attested %d times", n)
	}
	if resp, err := f.x509("web").Recv(); err != nil || ids(resp) != "spiffe://example.org/web" || f.attestor.calls.Load() == 0 {
		t.Errorf("on the socket of all: %v, %v", ids(resp), err)
	}
	// The header is asked for here too.
	stream, err := workload.NewSpiffeWorkloadAPIClient(dialDB()).FetchX509SVID(t.Context(), &workload.X509SVIDRequest{})
	if err == nil {
		_, err = stream.Recv()
	}
	wantCode(t, err, codes.InvalidArgument)

	open, err := workload.NewSpiffeWorkloadAPIClient(dialWeb()).FetchX509SVID(f.ctx(), &workload.X509SVIDRequest{})
	if err == nil {
		_, err = open.Recv()
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := web.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := open.Recv(); err == nil {
		t.Error("a stream outlives its socket")
	}
	if _, err := os.Lstat(filepath.Join(filepath.Dir(f.path), "web.sock")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket's file is left: %v", err)
	}
	if resp, err := f.fetch(dialDB()); err != nil || ids(resp) != "spiffe://example.org/db" {
		t.Errorf("another socket after that: %v, %v", ids(resp), err)
	}
	if err := web.Close(); err != nil {
		t.Error("closed again:", err)
	}
	if err := f.stop(); err != nil {
		t.Fatal(err)
	}
	if _, err := f.fetch(dialDB()); err == nil {
		t.Error("a private socket outlives its server")
	}
}

// TestPrivateEvidence: every call asks who the caller is, so that the newest token is shown; a caller that is nobody gets nothing.
func TestPrivateEvidence(t *testing.T) {
	f := start(t)
	path := filepath.Join(filepath.Dir(f.path), "v.sock")
	var asked atomic.Int64
	var gone atomic.Bool
	_, err := f.server.Open(path, 0o700, "v", func(context.Context) (*attestor.Workload, error) {
		asked.Add(1)
		if gone.Load() {
			return nil, fmt.Errorf("%w: the volume is gone", identity.ErrDenied)
		}
		return &attestor.Workload{Key: "web"}, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	cc, err := grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer cc.Close()
	for want := range int64(3) {
		if _, err := f.fetch(cc); err != nil || asked.Load() != want+1 {
			t.Fatalf("asked %d times, %v", asked.Load(), err)
		}
	}
	gone.Store(true)
	_, err = f.fetch(cc)
	wantCode(t, err, codes.PermissionDenied)
	for _, bad := range []error{
		second(f.server.Open(path, 0, "v", nil)), second(f.server.Open(path, 0, "", func(context.Context) (*attestor.Workload, error) { return nil, nil })),
		second(f.server.Open("relative", 0, "v", func(context.Context) (*attestor.Workload, error) { return nil, nil })),
		second(f.server.Open(path, 0, "v", func(context.Context) (*attestor.Workload, error) { return nil, nil })), // in use
	} {
		if bad == nil {
			t.Error("taken")
		}
	}
}

func second[T any](_ T, err error) error { return err }

// TestPrivateLimits: what one volume's callers hold is theirs; when all together hold what there is, each still has its reserve.
func TestPrivateLimits(t *testing.T) {
	f := start(t, withLimits(Limits{Caller: Quota{Connections: 20}, Total: Quota{Connections: 30}}))
	open := func(name string) func() error {
		path := filepath.Join(filepath.Dir(f.path), name+".sock")
		if _, err := f.server.Open(path, 0, name, func(context.Context) (*attestor.Workload, error) { return &attestor.Workload{Key: name}, nil }); err != nil {
			t.Fatal(err)
		}
		return func() error {
			c, err := net.Dial("unix", path)
			if err != nil {
				return err
			}
			t.Cleanup(func() { c.Close() })
			_, err = c.Read(make([]byte, 1)) // the server's settings, or the end
			return err
		}
	}
	greedy, second, modest := open("greedy"), open("second"), open("modest")
	held := func(dial func() error) (n int) {
		for n < 100 && dial() == nil {
			n++
		}
		return n
	}
	if n := held(greedy); n != 20 {
		t.Errorf("one has %d connections", n)
	}
	if n := held(second); n != 10 {
		t.Errorf("another has %d connections, of the 10 that are left", n)
	}
	if n := held(modest); n != reserved {
		t.Errorf("a third has %d connections: want its reserve of %d", n, reserved)
	}
	if resp, err := f.x509("web").Recv(); err != nil || ids(resp) == "" {
		t.Errorf("the socket of all: %v", err)
	}
}

// TestPrivateIdleBytes logs what an idle volume costs.
func TestPrivateIdleBytes(t *testing.T) {
	f := start(t)
	const n = 200
	measure := func() (bytes uint64) {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc + m.StackInuse
	}
	before := measure()
	for i := range n {
		f.private(fmt.Sprintf("v%d", i))
	}
	after := measure()
	per := (int64(after) - int64(before)) / n
	t.Logf("%d bytes for each idle private socket (heap and stacks)", per)
	if per > 64<<10 {
		t.Errorf("%d bytes for each idle private socket", per)
	}
}
