package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	grpcpeer "google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"countersign.io/countersign/api"
	adminv1 "countersign.io/countersign/api/admin/v1"
	"countersign.io/countersign/identity"
	"countersign.io/countersign/server"
)

// askedMember is a member that says by whom it was asked.
type askedMember struct {
	adminv1.UnimplementedAdminServer
	name    string
	address string
	server  *grpc.Server
	gone    chan string // serials of connections that ended

	mu     sync.Mutex
	serial map[string]string // by the other side's address
	fault  error
	asked  int
	calls  chan struct{} // set: each call says that it is there
	hold   chan struct{} // set: and waits for this
}

func startAskedMember(t *testing.T, d *testDomain, name, address string) *askedMember {
	t.Helper()
	cert, err := d.ca.MemberCertificate()
	if err != nil {
		t.Fatal(err)
	}
	l, err := tls.Listen("tcp", address, &tls.Config{Certificates: []tls.Certificate{*cert}, NextProtos: []string{api.ALPNAdmin}, ClientAuth: tls.RequireAnyClientCert, MinVersion: tls.VersionTLS13})
	if err != nil {
		t.Fatal(err)
	}
	m := &askedMember{name: name, address: l.Addr().String(), server: grpc.NewServer(), serial: map[string]string{}, gone: make(chan string, 100)}
	adminv1.RegisterAdminServer(m.server, m)
	go func() { _ = m.server.Serve(seenListener{l, m}) }()
	t.Cleanup(m.server.Stop)
	return m
}

// seenListener notes whose connections there are.
type seenListener struct {
	net.Listener
	m *askedMember
}

type seenConn struct {
	net.Conn
	once   sync.Once
	closed func()
}

// Close is net.Conn's.
func (c *seenConn) Close() error {
	c.once.Do(c.closed)
	return c.Conn.Close()
}

// Accept is net.Listener's.
func (l seenListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	if err := c.(*tls.Conn).Handshake(); err != nil {
		return c, nil
	}
	serial := c.(*tls.Conn).ConnectionState().PeerCertificates[0].SerialNumber.Text(16)
	l.m.mu.Lock()
	l.m.serial[c.RemoteAddr().String()] = serial
	l.m.mu.Unlock()
	return &seenConn{Conn: c, closed: func() { l.m.gone <- serial }}, nil
}

// Status answers with the member's name, and the caller's serial number.
func (m *askedMember) Status(ctx context.Context, _ *adminv1.Empty) (*adminv1.StatusResponse, error) {
	p, _ := grpcpeer.FromContext(ctx)
	m.mu.Lock()
	serial, fault, calls, hold := m.serial[p.Addr.String()], m.fault, m.calls, m.hold
	m.asked++
	request := fmt.Sprintf("request-%d", m.asked)
	m.mu.Unlock()
	_ = grpc.SetTrailer(ctx, metadata.Pairs(server.RequestIDKey, request)) // fails outside of a call only
	if calls != nil {
		calls <- struct{}{}
		select {
		case <-hold:
		case <-ctx.Done():
			return nil, status.FromContextError(ctx.Err()).Err()
		}
	}
	return &adminv1.StatusResponse{TrustDomain: m.name + " " + serial}, api.ToStatus(fault)
}

func (m *askedMember) set(fault error, calls, hold chan struct{}) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.fault, m.calls, m.hold = fault, calls, hold
}

// connections is how many there were so far.
func (m *askedMember) connections() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.serial)
}

// TestLasting: a process that runs on is known by an SVID that lasts, by a member that can be asked, and loses no call on the way.
func TestLasting(t *testing.T) {
	d := newTestDomain(t, "example.org")
	one, two := startAskedMember(t, d, "one", "127.0.0.1:0"), startAskedMember(t, d, "two", "127.0.0.1:0")
	dir := t.TempDir()
	renew := func() string { // as an agent's volume is renewed
		t.Helper()
		c := d.svid(t, "/edge/controller")
		from := d.write(t, c, d.root)
		for _, name := range []string{"svid.pem", "key.pem", "bundle.pem"} {
			if err := os.Rename(filepath.Join(from, name), filepath.Join(dir, name)); err != nil {
				t.Fatal(err)
			}
		}
		s, err := fromFiles(filepath.Join(dir, "svid.pem"), filepath.Join(dir, "key.pem"), filepath.Join(dir, "bundle.pem"))
		if err != nil {
			t.Fatal(err)
		}
		return s.svid.Certificates[0].SerialNumber.Text(16)
	}
	first := renew()
	l := newLasting(&admin{remote: remote{members: []string{one.address, two.address}, svid: dir}, timeout: 20 * time.Second}, slog.New(slog.DiscardHandler))
	defer l.Close()
	var mu sync.Mutex
	now := time.Now()
	l.now = func() time.Time { mu.Lock(); defer mu.Unlock(); return now }
	later := func(by time.Duration) { mu.Lock(); defer mu.Unlock(); now = now.Add(by) }
	ask := func() (string, error) {
		st, err := adminv1.NewAdminClient(l).Status(t.Context(), &adminv1.Empty{})
		return st.GetTrustDomain(), err
	}
	answers := func(what, want string) {
		t.Helper()
		if got, err := ask(); err != nil || got != want {
			t.Errorf("%s: %q, %v; want %q", what, got, err, want)
		}
	}
	fails := func(what string, want error) {
		t.Helper()
		if got, err := ask(); !errors.Is(api.FromStatus(err), want) {
			t.Errorf("%s: %q, %v; want %v", what, got, err, want)
		}
	}
	answers("at first", "one "+first)
	second := renew()
	answers("with a new SVID at hand", "one "+first)

	// Half of its life is over. What is under way ends on the old connection.
	calls, hold := make(chan struct{}), make(chan struct{})
	one.set(nil, calls, hold)
	slow := make(chan string)
	go func() {
		got, err := ask()
		slow <- fmt.Sprint(got, " ", err)
	}()
	<-calls
	one.set(nil, nil, nil)
	later(31 * time.Minute)
	answers("after half of the first one's life", "one "+second)
	close(hold)
	if got := <-slow; got != "one "+first+" <nil>" {
		t.Errorf("what was under way ended with %s", got)
	}
	if got := <-one.gone; got != first {
		t.Errorf("the connection of %s was closed, want that of %s", got, first)
	}

	// No new SVID is to be had: the old one does until its end.
	if err := os.Rename(filepath.Join(dir, "svid.pem"), filepath.Join(dir, "away")); err != nil {
		t.Fatal(err)
	}
	later(20 * time.Minute)
	answers("without a new SVID", "one "+second)
	later(24 * time.Hour)
	fails("after its end", identity.ErrUnavailable)
	mu.Lock()
	now = time.Now()
	mu.Unlock()
	if err := l.Close(); err != nil { // its clock goes back
		t.Error(err)
	}
	third := renew()
	answers("with one again", "one "+third)

	// A member that is gone, that cannot answer, that is silent: the next one is asked.
	conn := l.cur.conn
	one.server.Stop()
	conn.WaitForStateChange(t.Context(), connectivity.Ready) // a call before that is seen would be lost
	answers("after the end of a member", "two "+third)
	one = startAskedMember(t, d, "one", "127.0.0.1:0")
	l.a.remote.members[0] = one.address
	two.set(fmt.Errorf("%w: no leader", identity.ErrUnavailable), nil, nil)
	fails("a member without a leader", identity.ErrUnavailable)
	answers("after that", "one "+third)
	two.set(nil, nil, nil)
	for _, m := range []*askedMember{one, two} { // that say themselves, and sooner than the caller's clock, that the time is over
		m.set(status.Error(codes.DeadlineExceeded, "late"), nil, nil)
		if _, err := ask(); status.Code(err) != codes.DeadlineExceeded && !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a member that is late: %v", err)
		}
		m.set(nil, nil, nil)
		answers("after a member that is late", map[*askedMember]string{one: "two ", two: "one "}[m]+third)
	}
	silent := make(chan struct{}, 1)
	one.set(nil, silent, nil)
	l.a.timeout = time.Second
	if _, err := ask(); err == nil {
		t.Error("a silent member answered")
	}
	l.a.timeout = 20 * time.Second
	answers("after a silent member", "two "+third)

	// Who is denied may be an admin by his next SVID; the member is not to blame. Nor is a new SVID made of each call that is denied.
	before := two.connections()
	two.set(fmt.Errorf("%w: no admin", identity.ErrDenied), nil, nil)
	fourth := renew()
	fails("no admin", identity.ErrDenied)
	fails("still no admin", identity.ErrDenied)
	if n := two.connections(); n != before {
		t.Errorf("%d connections more for calls that were denied", n-before)
	}
	later(deniedAgain)
	fails("no admin for long", identity.ErrDenied)
	two.set(nil, nil, nil)
	answers("an admin by now", "two "+fourth)

	l.a.timeout = 0
	answers("with all the time", "two "+fourth)
	if _, err := adminv1.NewAdminClient(l).RotateSeal(t.Context(), &adminv1.Empty{}); !errors.Is(err, identity.ErrPrecondition) {
		t.Errorf("a stream: %v", err)
	}
}

// TestLastingBegins: calls that begin together go by one connection.
func TestLastingBegins(t *testing.T) {
	d := newTestDomain(t, "example.org")
	m := startAskedMember(t, d, "one", "127.0.0.1:0")
	l := newLasting(&admin{remote: remote{members: []string{m.address}, svid: d.write(t, d.svid(t, "/edge/controller"), d.root)}, timeout: time.Minute}, slog.New(slog.DiscardHandler))
	defer l.Close()
	var all sync.WaitGroup
	for range 20 {
		all.Go(func() {
			if _, err := adminv1.NewAdminClient(l).Status(t.Context(), &adminv1.Empty{}); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if n := m.connections(); n != 1 {
		t.Errorf("%d connections", n)
	}
	// Whichever way those calls went: one that no call has got on yet is idle, as is one that has ended.
	var r requestID
	conn, err := r.dial("passthrough:///127.0.0.1:1", insecure.NewCredentials())
	if err != nil {
		t.Fatal(err)
	}
	for what, row := range map[string]struct {
		calls int
		used  bool
		want  bool
	}{"new": {0, false, true}, "with its first call": {1, true, true}, "ended": {0, true, false}} {
		if got := (&lastingLink{link: &link{conn: conn}, calls: row.calls, used: row.used}).alive(); got != row.want {
			t.Errorf("%s: alive %v", what, got)
		}
	}
	conn.Close()
	if (&lastingLink{link: &link{conn: conn}, calls: 1, used: true}).alive() {
		t.Error("a connection that is closed is alive")
	}
}

// TestLastingCloses: whoever hangs up while a connection is being handed on closes it, once.
func TestLastingCloses(t *testing.T) {
	d := newTestDomain(t, "example.org")
	m := startAskedMember(t, d, "one", "127.0.0.1:0")
	a := &admin{remote: remote{svid: d.write(t, d.svid(t, "/edge/controller"), d.root)}}
	for range 20 {
		l, err := a.reach(t.Context(), []string{m.address})
		if err != nil {
			t.Fatal(err)
		}
		l.conn.Connect()
		if err := l.Close(); err != nil {
			t.Error(err)
		}
		<-m.gone
	}
}

// TestLastingErrors: an error that comes again is the same, and the ID of each request is in the log. What cannot be read for a moment is no
// fault of a call, but at the start.
func TestLastingErrors(t *testing.T) {
	d := newTestDomain(t, "example.org")
	m := startAskedMember(t, d, "one", "127.0.0.1:0")
	dir := d.write(t, d.svid(t, "/edge/controller"), d.root)
	cert := filepath.Join(dir, "svid.pem")
	var log bytes.Buffer
	l := newLasting(&admin{remote: remote{members: []string{m.address}, svid: dir}, timeout: time.Minute}, slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug})))
	defer l.Close()
	ask := func() error {
		_, err := adminv1.NewAdminClient(l).Status(t.Context(), &adminv1.Empty{})
		return err
	}
	good, err := os.ReadFile(cert)
	if err != nil {
		t.Fatal(err)
	}
	part := func() {
		t.Helper()
		if err := os.WriteFile(cert, good[:100], 0o600); err != nil {
			t.Fatal(err)
		}
	}
	part()
	if err := ask(); !errors.Is(err, identity.ErrInvalid) {
		t.Errorf("a part of a certificate at the start: %v", err)
	}
	if err := os.WriteFile(cert, good, 0o600); err != nil {
		t.Fatal(err)
	}
	m.set(fmt.Errorf("%w: not now", identity.ErrPrecondition), nil, nil)
	one, two := ask(), ask()
	if !errors.Is(one, identity.ErrPrecondition) || one.Error() != two.Error() || strings.Contains(one.Error(), "request") {
		t.Errorf("one error, and the same again: %v; %v", one, two)
	}
	for _, id := range []string{"request_id=request-1", "request_id=request-2"} {
		if !strings.Contains(log.String(), id) {
			t.Errorf("%s is not in the log:\n%s", id, &log)
		}
	}
	part()
	l.Close()
	if err := ask(); !errors.Is(err, identity.ErrUnavailable) || errors.Is(err, identity.ErrInvalid) {
		t.Errorf("a part of a certificate later: %v", err)
	}
}

// TestReadPair: a certificate and a key of which one was replaced in between are read again, and two that never fit are refused.
func TestReadPair(t *testing.T) {
	d := newTestDomain(t, "example.org")
	old, next := d.write(t, d.svid(t, "/a"), d.root), d.write(t, d.svid(t, "/b"), d.root)
	reading := func(dirs ...[2]string) func() (cert, key []byte, err error) {
		return func() (cert, key []byte, err error) {
			if len(dirs) == 0 {
				return nil, nil, errors.New("nothing more to read")
			}
			from := dirs[0]
			dirs = dirs[1:]
			if cert, err = os.ReadFile(filepath.Join(from[0], "svid.pem")); err == nil {
				key, err = os.ReadFile(filepath.Join(from[1], "key.pem"))
			}
			return cert, key, err
		}
	}
	svid, err := readPair("--svid", reading([2]string{old, next}, [2]string{next, next}))
	if err != nil || svid.ID.Path() != "/b" {
		t.Errorf("replaced while it was read: %v, %v", svid, err)
	}
	for what, read := range map[string]func() (cert, key []byte, err error){
		"never fits":     reading([2]string{old, next}, [2]string{old, next}, [2]string{next, next}),
		"standard input": reading([2]string{old, next}),
	} {
		if svid, err := readPair("--svid", read); !errors.Is(err, identity.ErrInvalid) || !strings.Contains(err.Error(), "--svid") {
			t.Errorf("%s: %v, %v", what, svid, err)
		}
	}
}
