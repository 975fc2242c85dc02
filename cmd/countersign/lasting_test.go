package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	grpcpeer "google.golang.org/grpc/peer"

	"countersign.io/countersign/api"
	adminv1 "countersign.io/countersign/api/admin/v1"
	"countersign.io/countersign/identity"
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
	m.mu.Unlock()
	if calls != nil {
		calls <- struct{}{}
		select {
		case <-hold:
		case <-ctx.Done():
		}
	}
	return &adminv1.StatusResponse{TrustDomain: m.name + " " + serial}, api.ToStatus(fault)
}

func (m *askedMember) set(fault error, calls, hold chan struct{}) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.fault, m.calls, m.hold = fault, calls, hold
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
	l := newLasting(&admin{remote: remote{members: []string{one.address, two.address}, svid: dir}, timeout: 20 * time.Second})
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
	fails("after its end", identity.ErrInvalid)
	mu.Lock()
	now = time.Now()
	mu.Unlock()
	if err := l.Close(); err != nil { // its clock goes back
		t.Error(err)
	}
	third := renew()
	answers("with one again", "one "+third)

	// A member that is gone, that cannot answer, that is silent: the next one is asked.
	one.server.Stop()
	for range 100 { // the end of a connection takes a moment to be seen, and may cost one call
		if got, err := ask(); err == nil {
			if got != "two "+third {
				t.Errorf("after the end of a member: %q", got)
			}
			break
		}
	}
	one = startAskedMember(t, d, "one", one.address)
	two.set(fmt.Errorf("%w: no leader", identity.ErrUnavailable), nil, nil)
	fails("a member without a leader", identity.ErrUnavailable)
	answers("after that", "one "+third)
	two.set(nil, nil, nil)
	silent := make(chan struct{}, 1)
	one.set(nil, silent, nil)
	l.a.timeout = time.Second
	if _, err := ask(); err == nil {
		t.Error("a silent member answered")
	}
	l.a.timeout = 20 * time.Second
	answers("after a silent member", "two "+third)

	// Who is denied may be an admin by his next SVID; the member is not to blame.
	two.set(fmt.Errorf("%w: no admin", identity.ErrDenied), nil, nil)
	fails("no admin", identity.ErrDenied)
	fourth := renew()
	two.set(nil, nil, nil)
	answers("an admin by now", "two "+fourth)

	if _, err := adminv1.NewAdminClient(l).RotateSeal(t.Context(), &adminv1.Empty{}); !errors.Is(err, identity.ErrPrecondition) {
		t.Errorf("a stream: %v", err)
	}
}
