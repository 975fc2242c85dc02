package workloadapi

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"countersign.io/countersign/attestor"
	"countersign.io/countersign/identity"
)

// raw is a client that speaks HTTP/2 as badly as it wants.
type raw struct {
	t testing.TB
	net.Conn
	*http2.Framer
	fields bytes.Buffer
	enc    *hpack.Encoder
	stream uint32
}

func (f *fixture) raw(name string, settings ...http2.Setting) *raw {
	f.t.Helper()
	c, err := f.dial(name)
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { c.Close() })
	r := &raw{t: f.t, Conn: c, Framer: http2.NewFramer(c, c)}
	r.enc = hpack.NewEncoder(&r.fields)
	io.WriteString(c, http2.ClientPreface)
	r.must(r.WriteSettings(settings...))
	return r
}

func (r *raw) must(err error) {
	r.t.Helper()
	if err != nil {
		r.t.Fatal(err)
	}
}

// header encodes the header of a call.
func (r *raw) header(method string, extra ...string) []byte {
	r.fields.Reset()
	all := append([]string{":method", "POST", ":scheme", "http", ":path", "/SpiffeWorkloadAPI/" + method, ":authority", "localhost",
		"content-type", "application/grpc", "te", "trailers", "workload.spiffe.io", "true"}, extra...)
	for i := 0; i < len(all); i += 2 {
		r.enc.WriteField(hpack.HeaderField{Name: all[i], Value: all[i+1]})
	}
	return r.fields.Bytes()
}

// open begins a call and does not send its request.
func (r *raw) open(method string) error {
	r.stream = max(r.stream+2, 1) | 1
	return r.WriteHeaders(http2.HeadersFrameParam{StreamID: r.stream, BlockFragment: r.header(method), EndHeaders: true})
}

// call makes a call with an empty request.
func (r *raw) call(method string) error {
	return errors.Join(r.open(method), r.WriteData(r.stream, true, make([]byte, 5)))
}

// victim is another caller, with a stream that is open already. The function it returns proves that it is served
// as ever: a change reaches the stream, and calls on an open and on a new connection are answered.
func (f *fixture) victim() (served func()) {
	f.t.Helper()
	f.source.set("victim", f.d.update(f.d.svid("/victim/0", "")))
	stream, client := f.x509("victim"), f.client("victim")
	must(stream.Recv())
	n := 0
	return func() {
		f.t.Helper()
		n++
		want := fmt.Sprintf("/victim/%d", n)
		f.source.set("victim", f.d.update(f.d.svid(want, "")))
		if m, err := stream.Recv(); err != nil || ids(m) != "spiffe://example.org"+want {
			f.t.Fatalf("the victim's stream: %v, %v", ids(m), err)
		}
		if _, err := client.FetchJWTSVID(f.ctx(), &workload.JWTSVIDRequest{Audience: []string{"test"}}); err != nil {
			f.t.Fatalf("the victim's call: %v", err)
		}
		cc := f.conn("victim")
		defer cc.Close()
		if _, err := workload.NewSpiffeWorkloadAPIClient(cc).FetchJWTSVID(f.ctx(), &workload.JWTSVIDRequest{Audience: []string{"test"}}); err != nil {
			f.t.Fatalf("the victim's call on a new connection: %v", err)
		}
	}
}

// held is what the named caller holds.
func (f *fixture) held(name string) [kinds]int {
	f.server.admit.mu.Lock()
	defer f.server.admit.mu.Unlock()
	if s := f.server.admit.shares["test:"+name]; s != nil {
		return s.held
	}
	return [kinds]int{}
}

// gone waits until nothing is left of an attack: neither counted nor running.
func (f *fixture) gone(name string, goroutines int) {
	f.t.Helper()
	eventually(f.t, "nothing of "+name+" is counted", func() bool { return f.held(name) == [kinds]int{} })
	eventually(f.t, "the goroutines of "+name+" have ended", func() bool { return runtime.NumGoroutine() <= goroutines })
}

func TestHostileConnections(t *testing.T) {
	f := start(t, withLimits(Limits{Caller: Quota{Connections: 8}}))
	served := f.victim()
	served()
	before := runtime.NumGoroutine()
	var all []net.Conn
	for range 100 {
		c, err := f.dial("attacker")
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		all = append(all, c)
	}
	served()
	// Those over the limit were closed at once: as gRPC's clients see it, Unavailable.
	for _, c := range all[8:] {
		c.SetReadDeadline(time.Now().Add(30 * time.Second))
		if _, err := io.Copy(io.Discard, c); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatal("a connection over the limit is still open")
		}
	}
	if n := f.held("attacker")[connections]; n != 8 {
		t.Errorf("the attacker holds %d connections", n)
	}
	_, err := f.client("attacker").FetchJWTSVID(f.ctx(), &workload.JWTSVIDRequest{Audience: []string{"test"}})
	wantCode(t, err, codes.Unavailable)
	if n := runtime.NumGoroutine(); n > before+8*5+20 {
		t.Errorf("%d goroutines for 8 connections", n-before)
	}
	served()
	for _, c := range all {
		c.Close()
	}
	f.gone("attacker", before+10) // gRPC's client above has some
}

// A user who can make control groups, and so callers, without end cannot take all there is. Names of the same
// length are of one user here.
func TestHostileUser(t *testing.T) {
	f := start(t, withLimits(Limits{Caller: Quota{Connections: 4}, User: Quota{Connections: 10, Streams: 12}, Total: Quota{Connections: 20, Streams: 100}}))
	served := f.victim()
	for i := range 10 {
		name := fmt.Sprintf("user%d", i)
		f.source.set(name, f.d.update(f.d.svid("/user", "")))
		for range 4 {
			if c, err := f.dial(name); err == nil {
				defer c.Close()
			}
		}
	}
	eventually(t, "the user has what is its", func() bool {
		f.server.admit.mu.Lock()
		defer f.server.admit.mu.Unlock()
		s := f.server.admit.shares["user:5"]
		return s != nil && s.held[connections] == 10
	})
	served()
}

func TestHostileStreams(t *testing.T) {
	f := start(t, withLimits(Limits{Caller: Quota{Streams: 10}}))
	served := f.victim()
	f.source.set("attacker", f.d.update(f.d.svid("/attacker", "")))
	ok, shed := 0, 0
	for range 3 {
		client := f.client("attacker")
		for range 20 {
			stream := must(client.FetchX509SVID(f.ctx(), &workload.X509SVIDRequest{}))
			switch _, err := stream.Recv(); status.Code(err) {
			case codes.OK:
				ok++
			case codes.Unavailable:
				shed++
			default:
				t.Fatal(err)
			}
		}
	}
	if ok != 10 || shed != 50 {
		t.Errorf("%d streams were served and %d refused", ok, shed)
	}
	served()
}

// Connections of one pod count together, whatever control groups its containers have.
func TestPodIsOneCaller(t *testing.T) {
	f := start(t, withLimits(Limits{Caller: Quota{Connections: 2}}))
	f.attestor.do = podOf
	call := func(name string) error {
		f.source.set(name, f.d.update(f.d.svid("/pod", "")))
		_, err := f.client(name).FetchJWTSVID(f.ctx(), &workload.JWTSVIDRequest{Audience: []string{"test"}})
		return err
	}
	wantCode(t, call("pod1-a"), codes.OK)
	wantCode(t, call("pod1-b"), codes.OK)
	wantCode(t, call("pod1-c"), codes.Unavailable)
	wantCode(t, call("pod2-a"), codes.OK)
	if n := f.held("pod1-a")[connections]; n != 1 {
		t.Errorf("the container counts %d connections", n)
	}
}

// A control group that names another's pod does not use up what that pod may hold.
func TestHostilePodImitator(t *testing.T) {
	f := start(t, withLimits(Limits{Caller: Quota{Connections: 2}}))
	f.attestor.do = podOf
	call := func(name string) error {
		f.source.set(name, f.d.update(f.d.svid("/pod", "")))
		_, err := f.client(name).FetchJWTSVID(f.ctx(), &workload.JWTSVIDRequest{Audience: []string{"test"}})
		return err
	}
	for i, want := range []codes.Code{codes.OK, codes.OK, codes.Unavailable} {
		wantCode(t, call(fmt.Sprintf("pod1-imitator%d", i)), want) // each in a control group of its own
	}
	wantCode(t, call("pod1-a"), codes.OK) // of another user, as its name is shorter
	wantCode(t, call("pod1-b"), codes.OK)
}

// Nor does a container become many callers by changing its user: it stays one control group too.
func TestHostileManyUsers(t *testing.T) {
	var uid atomic.Uint32
	f := start(t, withLimits(Limits{Caller: Quota{Connections: 2}}), func(s *setup) {
		s.tune = func(s *Server) {
			s.identify = func(c *net.UnixConn) (caller, error) { return caller{"test:" + nameOf(c), uid.Add(1)}, nil }
		}
	})
	f.attestor.do = podOf
	f.source.set("pod1-a", f.d.update(f.d.svid("/pod", "")))
	for _, want := range []codes.Code{codes.OK, codes.OK, codes.Unavailable} {
		_, err := f.client("pod1-a").FetchJWTSVID(f.ctx(), &workload.JWTSVIDRequest{Audience: []string{"test"}})
		wantCode(t, err, want)
	}
	f.server.admit.closeConns(func(*conn) bool { return true })
	eventually(t, "nothing is counted", func() bool {
		f.server.admit.mu.Lock()
		defer f.server.admit.mu.Unlock()
		for _, s := range f.server.admit.shares {
			if !s.idle() {
				return false
			}
		}
		return true
	})
}

// Streams that are never read: neither the socket nor, by a window of nothing, the streams. The source is not held
// up, of the messages only the newest is kept, and all ends with the connection.
func TestHostileNeverReads(t *testing.T) {
	f := start(t)
	served := f.victim()
	before := runtime.NumGoroutine()
	attacker := f.raw("attacker", http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0})
	big := func(i int) { // half a MiB
		u := f.d.update(f.d.svid("/attacker", ""))
		u.Bundles[f.d.td].X509 = append(u.Bundles[f.d.td].X509, append(make([]byte, 512<<10), byte(i), byte(i>>8)))
		f.source.set("attacker", u)
	}
	big(0)
	for range streamsPerConn {
		attacker.must(attacker.call("FetchX509SVID"))
	}
	eventually(t, "all streams are open", func() bool { return f.source.subscribers() == streamsPerConn+1 })
	served()
	heap := heapInUse()
	for i := range 300 {
		big(i + 1)
		if i%30 == 0 {
			served()
		}
	}
	served()
	if grown := heapInUse() - heap; grown > 64<<20 {
		t.Errorf("150 MiB that nobody reads keep %d MiB of memory", grown>>20)
	}
	if n := runtime.NumGoroutine(); n > before+2*streamsPerConn+30 {
		t.Errorf("%d goroutines for %d streams", n-before, streamsPerConn)
	}
	// Losing the identity frees what the source holds for the streams, though nobody listens.
	f.source.set("attacker", nil)
	eventually(t, "the streams have ended", func() bool { return f.source.subscribers() == 1 })
	attacker.Close()
	f.gone("attacker", before+10)
	served()
}

func heapInUse() int64 {
	runtime.GC()
	runtime.GC() // the first runs cleanups
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// Frames without end from a client that reads nothing: the server stops reading from it, and keeps no more than
// what it takes to notice.
func TestHostileFloods(t *testing.T) {
	for name, write := range map[string]func(*raw) error{
		"window updates": func(r *raw) error { return r.WriteWindowUpdate(0, 1) },
		"settings": func(r *raw) error {
			return r.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 20})
		},
		"pings": func(r *raw) error { return r.WritePing(false, [8]byte{}) },
		"resets": func(r *raw) error {
			return errors.Join(r.open("FetchX509SVID"), r.WriteRSTStream(r.stream, http2.ErrCodeCancel))
		},
		"calls": func(r *raw) error { return r.call("FetchJWTSVID") },
	} {
		t.Run(name, func(t *testing.T) {
			f := start(t)
			served := f.victim()
			before := runtime.NumGoroutine()
			attacker := f.stuck("attacker")
			heap := heapInUse()
			sent := 0
			for ; sent < 16<<20; sent += 13 { // no frame here is smaller
				attacker.SetWriteDeadline(time.Now().Add(time.Second))
				if write(attacker) != nil {
					break // the socket is full, or the server has hung up
				}
			}
			if sent >= 16<<20 {
				t.Error("the server takes all that it is sent")
			}
			if grown := heapInUse() - heap; grown > 16<<20 {
				t.Errorf("%d MiB of memory are kept", grown>>20)
			}
			served()
			attacker.Close()
			f.gone("attacker", before+10)
		})
	}
}

// stuck is a connection that the server cannot write to any more: all windows are open, and nobody reads.
func (f *fixture) stuck(name string) *raw {
	f.t.Helper()
	u := f.d.update(f.d.svid("/stuck", ""))
	u.Bundles[f.d.td].X509 = append(u.Bundles[f.d.td].X509, make([]byte, 4<<20))
	f.source.set(name, u)
	already := f.source.subscribers()
	r := f.raw(name, http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 30})
	r.must(r.WriteWindowUpdate(0, 1<<30))
	r.must(r.call("FetchX509SVID"))
	eventually(f.t, "the stream is open", func() bool { return f.source.subscribers() == already+1 })
	return r
}

// Calls that are reset as soon as they are made, by a client that reads well.
func TestHostileRapidResets(t *testing.T) {
	f := start(t)
	served := f.victim()
	before := runtime.NumGoroutine()
	attacker := f.raw("attacker")
	f.source.set("attacker", f.d.update(f.d.svid("/attacker", "")))
	var sent atomic.Int64
	var flood sync.WaitGroup
	flood.Go(func() { io.Copy(io.Discard, attacker.Conn) })
	flood.Go(func() {
		for attacker.call("FetchX509SVID") == nil && attacker.WriteRSTStream(attacker.stream, http2.ErrCodeCancel) == nil {
			sent.Add(1)
		}
	})
	for range 20 {
		mark := sent.Load()
		eventually(t, "the attack goes on", func() bool { return sent.Load() > mark+10 })
		served()
		if n := runtime.NumGoroutine(); n > before+3*streamsPerConn {
			t.Fatalf("%d goroutines for one connection", n-before)
		}
	}
	attacker.Close()
	flood.Wait()
	f.gone("attacker", before+10)
	if n := f.source.subscribers(); n != 1 {
		t.Errorf("%d updates still run", n)
	}
}

// Connections on which nothing or half a word is said.
func TestHostileHalfOpen(t *testing.T) {
	f := start(t)
	served := f.victim()
	before := runtime.NumGoroutine()
	var all []net.Conn
	for range 10 {
		for _, said := range []string{"", "PRI", http2.ClientPreface, http2.ClientPreface + "\x00\x00\x06\x04", "GET / HTTP/1.1\r\n\r\n"} {
			c, err := f.dial("attacker")
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			io.WriteString(c, said)
			all = append(all, c)
		}
		r := f.raw("attacker")
		for range 10 { // calls without a request
			r.must(r.open("FetchX509SVID"))
			r.must(r.open("FetchJWTSVID"))
		}
		all = append(all, r.Conn)
	}
	served()
	for _, c := range all {
		c.Close()
	}
	f.gone("attacker", before+10)
}

// The server hangs up on who does not say what it came for.
func TestHalfOpenEnds(t *testing.T) {
	f := start(t, func(s *setup) { s.tune = func(s *Server) { s.handshakeTimeout = time.Second } })
	c, err := f.dial("attacker")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	io.WriteString(c, http2.ClientPreface[:10])
	c.SetReadDeadline(time.Now().Add(30 * time.Second))
	if _, err := io.Copy(io.Discard, c); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("a connection with half a preface stays open")
	}
	eventually(t, "it is not counted any more", func() bool { return f.held("attacker") == [kinds]int{} })
}

// Calls without a request count like any other.
func TestHostileCallsWithoutRequest(t *testing.T) {
	f := start(t, withLimits(Limits{Caller: Quota{Streams: 20}}))
	served := f.victim()
	before := runtime.NumGoroutine()
	for range 10 {
		r := f.raw("attacker")
		for range 10 {
			r.must(r.open("FetchJWTSVID"))
			r.must(r.open("FetchX509SVID"))
		}
	}
	eventually(t, "the limit is reached", func() bool { return f.held("attacker") == [kinds]int{10, 20} })
	eventually(t, "what is over it has ended", func() bool { return runtime.NumGoroutine() <= before+10*4+20 })
	_, err := f.client("attacker").FetchJWTSVID(f.ctx(), &workload.JWTSVIDRequest{Audience: []string{"test"}})
	wantCode(t, err, codes.Unavailable)
	served()
}

// Evidence that cannot be read, because it lies on a file system that hangs, keeps its own caller waiting.
func TestHostileEvidence(t *testing.T) {
	f := start(t)
	f.attestor.do = func(ctx context.Context, name string) (*attestor.Workload, error) {
		if name == "attacker" {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		return &attestor.Workload{Key: name}, nil
	}
	served := f.victim()
	before := runtime.NumGoroutine()
	for range 10 {
		r := f.raw("attacker")
		for range 20 {
			r.must(r.call("FetchX509SVID"))
		}
	}
	eventually(t, "all calls wait", func() bool { return f.held("attacker") == [kinds]int{10, 200} })
	served()
	f.server.admit.closeConns(func(c *conn) bool { return nameOf(c.UnixConn) == "attacker" })
	f.gone("attacker", before+10)
}

// A source that does not answer is given up.
func TestCallTimeout(t *testing.T) {
	f := start(t, func(s *setup) { s.tune = func(s *Server) { s.callTimeout = 50 * time.Millisecond } })
	f.server.source = sourceFunc(func(ctx context.Context, _ attestor.Func) error {
		<-ctx.Done()
		return fmt.Errorf("waiting for a member: %w", ctx.Err())
	})
	_, err := f.client("web").FetchJWTSVID(f.ctx(), &workload.JWTSVIDRequest{Audience: []string{"test"}})
	wantCode(t, err, codes.DeadlineExceeded)
}

func TestHostileHeaders(t *testing.T) {
	f := start(t)
	served := f.victim()
	f.source.set("tester", f.d.update(f.d.svid("/tester", "")))
	ctx := metadata.AppendToOutgoingContext(f.ctx(), "x", strings.Repeat("y", 100<<10))
	if _, err := f.client("tester").FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{"test"}}); err == nil {
		t.Error("a header of 100 KiB was accepted")
	}
	before := runtime.NumGoroutine()
	attacker := f.raw("attacker")
	block := attacker.header("FetchJWTSVID")
	attacker.must(attacker.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block}))
	heap := heapInUse()
	sent := 0
	for ; sent < 32<<20; sent += 16 << 10 { // a header that does not end
		attacker.SetWriteDeadline(time.Now().Add(time.Second))
		if attacker.WriteContinuation(1, false, bytes.Repeat([]byte{0x40, 1, 'x', 1, 'y'}, 3000)) != nil {
			break
		}
	}
	if grown := heapInUse() - heap; grown > 16<<20 {
		t.Errorf("%d MiB of memory are kept for %d MiB of headers", grown>>20, sent>>20)
	}
	served()
	attacker.Close()
	f.gone("attacker", before+10)
}

// What can be refused by looking at it costs neither an attestation nor the source anything.
func TestHostileRequests(t *testing.T) {
	f := start(t)
	served := f.victim()
	attested := f.attestor.calls.Load()
	client := f.client("attacker")
	many := func(n, size int) []string {
		out := make([]string, n)
		for i := range out {
			out[i] = strings.Repeat("a", size)
		}
		return out
	}
	for name, tc := range map[string]struct {
		audience []string
		id       string
		want     codes.Code
	}{
		"33 audiences":     {many(33, 5), "", codes.InvalidArgument},
		"5000 audiences":   {many(5000, 5), "", codes.InvalidArgument},
		"a long audience":  {many(1, 513), "", codes.InvalidArgument},
		"an empty one":     {append(many(3, 5), ""), "", codes.InvalidArgument},
		"a bad ID":         {many(1, 5), "spiffe://", codes.InvalidArgument},
		"over the message": {many(20000, 5), "", codes.ResourceExhausted},
		"1 MiB":            {many(1, 1<<20), "", codes.ResourceExhausted},
	} {
		if _, err := client.FetchJWTSVID(f.ctx(), &workload.JWTSVIDRequest{Audience: tc.audience, SpiffeId: tc.id}); status.Code(err) != tc.want {
			t.Errorf("%s: %v", name, err)
		}
	}
	_, err := client.ValidateJWTSVID(f.ctx(), &workload.ValidateJWTSVIDRequest{Audience: "test", Svid: strings.Repeat("a", 1<<20)})
	wantCode(t, err, codes.ResourceExhausted)
	if n := f.attestor.calls.Load() - attested; n != 0 {
		t.Errorf("%d attestations", n)
	}
	served()
	f.source.set("attacker", f.d.update(f.d.svid("/attacker", "")))
	if _, err := client.FetchJWTSVID(f.ctx(), &workload.JWTSVIDRequest{Audience: many(32, 512)}); err != nil {
		t.Errorf("as much as is allowed: %v", err)
	}
}

// A caller over its rate is served more slowly, not refused; others are not slowed down.
func TestCallsPerSecond(t *testing.T) {
	f := start(t, withLimits(Limits{CallsPerSecond: 50}))
	served := f.victim()
	f.source.set("busy", f.d.update(f.d.svid("/busy", "")))
	client := f.client("busy")
	begin := time.Now()
	for range 140 {
		if _, err := client.FetchJWTSVID(f.ctx(), &workload.JWTSVIDRequest{Audience: []string{"test"}}); err != nil {
			t.Fatal(err)
		}
	}
	if took := time.Since(begin); took < time.Second {
		t.Errorf("140 calls at 50 a second, 50 at once, took %v", took)
	}
	served()
}

// tokens is how many calls the caller's measure of work is good for.
func (f *fixture) tokens(name string) float64 {
	f.server.admit.mu.Lock()
	defer f.server.admit.mu.Unlock()
	return f.server.admit.shares["test:"+name].work.Tokens() / workPerCall
}

// dear lets a caller's measure of work fill up no more, so that what is left of it tells what was paid.
func (f *fixture) dear(name string) {
	f.server.admit.mu.Lock()
	defer f.server.admit.mu.Unlock()
	f.server.admit.share("test:"+name, true).work.SetLimit(1e-3)
}

// What a caller is refused by the Source it pays for dearly, and nobody else does. Faults that are not its doing are cheap.
func TestHostileRefusals(t *testing.T) {
	for name, tc := range map[string]struct {
		err  error
		want codes.Code
		dear bool
	}{
		"refused":         {fmt.Errorf("%w: no entry", identity.ErrDenied), codes.PermissionDenied, true},
		"not answerable":  {fmt.Errorf("%w: no leader", identity.ErrUnavailable), codes.Unavailable, false},
		"a fault of ours": {errors.New("a fault"), codes.Internal, false},
	} {
		t.Run(name, func(t *testing.T) {
			f := start(t, withLimits(Limits{CallsPerSecond: 1000}))
			f.dear("attacker")
			f.dear("victim")
			served := f.victim()
			f.source.set("attacker", tc.err)
			_, err := f.client("attacker").FetchJWTSVID(f.ctx(), &workload.JWTSVIDRequest{Audience: []string{"test"}})
			wantCode(t, err, tc.want)
			if left := f.tokens("attacker"); (left < 1000-10-50) != tc.dear {
				t.Errorf("the attacker has %v of 1000 calls left", left)
			}
			served()
			if left := f.tokens("victim"); left < 1000-50 {
				t.Errorf("the victim has %v of 1000 calls left", left)
			}
		})
	}
}

// A caller that does not wait for its refusal pays like one that does.
func TestHostileLeavesBeforeRefusal(t *testing.T) {
	var leave context.CancelFunc
	f := start(t, withLimits(Limits{CallsPerSecond: 1000}), func(s *setup) {
		s.tune = func(s *Server) {
			s.source = sourceFunc(func(ctx context.Context, _ attestor.Func) error {
				leave()
				<-ctx.Done()
				return ctx.Err()
			})
		}
	})
	f.dear("attacker")
	client := f.client("attacker")
	for i := range 2 {
		ctx, cancel := context.WithCancel(f.ctx())
		defer cancel()
		leave = cancel
		var err error
		if i == 0 {
			_, err = client.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{"test"}})
		} else {
			_, err = must(client.FetchX509SVID(ctx, &workload.X509SVIDRequest{})).Recv()
		}
		wantCode(t, err, codes.Canceled)
		eventually(t, "it is paid for", func() bool { return f.tokens("attacker") < 1000-10-50*float64(i+1) })
	}
}

// Who asks too early is refused at once, and served as soon as it has an identity; who goes on asking is slowed down.
func TestRefusalsAreSlowedDown(t *testing.T) {
	f := start(t, withLimits(Limits{CallsPerSecond: 100}))
	served := f.victim()
	client := f.client("early")
	begin := time.Now()
	for range 6 {
		_, err := client.FetchJWTSVID(f.ctx(), &workload.JWTSVIDRequest{Audience: []string{"test"}})
		wantCode(t, err, codes.PermissionDenied)
	}
	if took := time.Since(begin); took < time.Second {
		t.Errorf("6 refusals that cost 300 calls at 100 a second, 100 at once, took %v", took)
	}
	served()
	f.source.set("early", f.d.update(f.d.svid("/early", "")))
	_, err := client.FetchJWTSVID(f.ctx(), &workload.JWTSVIDRequest{Audience: []string{"test"}})
	wantCode(t, err, codes.OK)
}

func TestShutdown(t *testing.T) {
	f := start(t)
	f.source.set("attacker", f.d.update(f.d.svid("/attacker", "")))
	stream := f.x509("web")
	must(stream.Recv())
	f.stuck("stuck")
	unread := f.raw("attacker", http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0})
	unread.must(unread.call("FetchX509SVID"))
	unread.must(unread.open("FetchJWTSVID"))
	for _, said := range []string{"", "PRI"} {
		c := must(f.dial("attacker"))
		defer c.Close()
		io.WriteString(c, said)
	}
	eventually(t, "all are connected", func() bool { return f.held("attacker")[connections] == 3 && f.source.subscribers() == 3 })
	if err := f.stop(); err != nil { // within its deadline
		t.Fatal(err)
	}
	_, err := stream.Recv()
	wantCode(t, err, codes.Unavailable)
	eventually(t, "nothing is counted", func() bool {
		f.server.admit.mu.Lock()
		defer f.server.admit.mu.Unlock()
		return f.server.admit.total.held == [kinds]int{}
	})
	if _, err := os.Stat(f.path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket file is left: %v", err)
	}
	_, err = f.client("web").FetchJWTSVID(f.ctx(), &workload.JWTSVIDRequest{Audience: []string{"test"}}, grpc.WaitForReady(false))
	wantCode(t, err, codes.Unavailable)
}
