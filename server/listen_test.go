package server

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/grpc/codes"

	"countersign.io/countersign/api"
	"countersign.io/countersign/attestor/node"
	"countersign.io/countersign/identity"
)

func (w *world) tlsClient(t *testing.T, cert *tls.Certificate, alpn ...string) *tls.Config {
	t.Helper()
	conf := &tls.Config{InsecureSkipVerify: true, NextProtos: alpn, MinVersion: tls.VersionTLS12}
	if cert != nil {
		conf.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil }
	}
	return conf
}

// wantClosed reads until the other side hangs up.
func wantClosed(t *testing.T, c net.Conn) {
	t.Helper()
	c.SetDeadline(time.Now().Add(deadline))
	if _, err := io.Copy(io.Discard, c); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatal("the connection stays open")
	}
}

func TestALPNSplits(t *testing.T) {
	w := newWorld(t).start(t)
	_, agentCert := w.agent(t, "a1", "")
	memberCert := w.certificate(t, "/countersign/member/m1")
	for _, tc := range []struct {
		name string
		cert *tls.Certificate
		alpn []string
	}{
		{"no ALPN", memberCert, nil},
		{"an unknown protocol", memberCert, []string{"http/1.1"}},
		{"raft without a certificate", nil, []string{api.ALPNRaft}},
		{"raft by an agent", agentCert, []string{api.ALPNRaft}},
		{"raft by a workload", w.certificate(t, "/x"), []string{api.ALPNRaft}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c, err := tls.Dial("tcp", w.port.Addr().String(), w.tlsClient(t, tc.cert, tc.alpn...))
			if err != nil {
				return // refused in the handshake
			}
			defer c.Close()
			wantClosed(t, c)
		})
	}
	t.Run("raft by a member", func(t *testing.T) {
		c, err := tls.Dial("tcp", w.port.Addr().String(), MemberTLS(TLSConfig{TrustDomain: w.td, Certificate: w.ca.MemberCertificate, Bundle: w.state.Bundle}, "m1"))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		fmt.Fprint(c, "R")
		other := <-w.raft
		defer other.Close()
		b := make([]byte, 1)
		if _, err := io.ReadFull(other, b); err != nil || b[0] != 'R' {
			t.Fatalf("read %q, error %v", b, err)
		}
	})
	if len(w.raft) != 0 {
		t.Error("somebody else got through to raft")
	}
}

func TestCertificatesThatAreRefused(t *testing.T) {
	w, other := newWorld(t).start(t), newWorld(t).start(t)
	_, good := w.agent(t, "a1", "")
	_, foreign := other.agent(t, "a1", "") // the same trust domain's name, another key
	root, err := x509.ParseCertificate(w.state.Bundle().X509[0])
	if err != nil {
		t.Fatal(err)
	}
	for name, cert := range map[string]*tls.Certificate{
		"of another CA":     foreign,
		"with another key":  {Certificate: good.Certificate, PrivateKey: foreign.PrivateKey},
		"the CA's own":      {Certificate: [][]byte{root.Raw}, PrivateKey: good.PrivateKey},
		"without its chain": {Certificate: good.Certificate[:1], PrivateKey: good.PrivateKey},
	} {
		t.Run(name, func(t *testing.T) {
			c, err := tls.Dial("tcp", w.port.Addr().String(), w.tlsClient(t, cert, "h2"))
			if err == nil {
				defer c.Close()
				c.SetDeadline(time.Now().Add(deadline))
				if _, err = c.Read(make([]byte, 1)); err == nil {
					t.Fatal("accepted") // a TLS 1.3 client learns of the refusal at its first read
				}
			}
			if errors.Is(err, os.ErrDeadlineExceeded) {
				t.Fatal("accepted")
			}
		})
	}
	t.Run("TLS 1.2", func(t *testing.T) {
		conf := w.tlsClient(t, good, "h2")
		conf.MaxVersion = tls.VersionTLS12
		if c, err := tls.Dial("tcp", w.port.Addr().String(), conf); err == nil {
			c.Close()
			t.Fatal("accepted")
		}
	})
}

func TestPlainGarbage(t *testing.T) {
	w := newWorld(t).start(t)
	for name, b := range map[string][]byte{
		"zeros": make([]byte, 4096), "HTTP": []byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n"), "HTTP/2": []byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
		"a huge record": append([]byte{22, 3, 1, 0xff, 0xff}, bytes.Repeat([]byte{1}, 1<<17)...),
	} {
		t.Run(name, func(t *testing.T) {
			c, err := net.Dial("tcp", w.port.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			go c.Write(b)
			wantClosed(t, c)
		})
	}
	if err := try(t, w.dial(t, nil), rpc{method: "/grpc.health.v1.Health/Check"}); err != nil {
		t.Fatalf("afterwards nobody is served: %v", err)
	}
}

// TestStalledHandshakes fills the port with connections that never speak; the oldest give way, and all end.
func TestStalledHandshakes(t *testing.T) {
	w := newWorldOn(t, ListenConfig{MaxStrangers: 4, HandshakeTimeout: time.Hour}).start(t)
	var stalled []net.Conn
	for range 12 {
		c, err := net.Dial("tcp", w.port.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.Write([]byte{22, 3, 1}) // the beginning of a ClientHello
		stalled = append(stalled, c)
	}
	for _, c := range stalled[:8] {
		wantClosed(t, c)
	}
	if err := try(t, w.dial(t, nil), rpc{method: "/grpc.health.v1.Health/Check"}); err != nil {
		t.Fatalf("nobody else is served: %v", err)
	}
	// Agents do not count as strangers and are not thrown out by them.
	_, cert := w.agent(t, "a1", "")
	conn := w.dial(t, cert)
	if err := try(t, conn, rpc{method: "/grpc.health.v1.Health/Check"}); err != nil {
		t.Fatal(err)
	}
	for range 8 {
		c, err := net.Dial("tcp", w.port.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	if err := try(t, conn, rpc{method: "/grpc.health.v1.Health/Check"}); err != nil {
		t.Fatalf("an agent's connection was closed: %v", err)
	}
}

func TestHandshakeTimeout(t *testing.T) {
	w := newWorldOn(t, ListenConfig{HandshakeTimeout: 10 * time.Millisecond})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- w.port.Run(ctx) }()
	c, err := net.Dial("tcp", w.port.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	wantClosed(t, c)
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

func TestOneAddressHasAShare(t *testing.T) {
	w := newWorldOn(t, ListenConfig{MaxPerAddress: 3, HandshakeTimeout: time.Hour}).start(t)
	var open []net.Conn
	for range 3 {
		c, err := net.Dial("tcp", w.port.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		open = append(open, c)
	}
	over, err := net.Dial("tcp", w.port.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer over.Close()
	wantClosed(t, over)
	open[0].Close()
	eventually(t, "the share is free again", func() bool {
		w.port.mu.Lock()
		defer w.port.mu.Unlock()
		return w.port.strangers.Len() == 2
	})
	if err := try(t, w.dial(t, nil), rpc{method: "/grpc.health.v1.Health/Check"}); err != nil {
		t.Fatal(err)
	}
}

func TestOneAgentHasAShare(t *testing.T) {
	w := newWorldOn(t, ListenConfig{MaxPerAgent: 2})
	w.port.crowds = &lineLimit{lines: rate.NewLimiter(0, 1)}
	w.start(t)
	_, cert := w.agent(t, "a1", "")
	_, other := w.agent(t, "a2", "")
	for range 2 {
		if err := try(t, w.dial(t, cert), rpc{method: "/grpc.health.v1.Health/Check"}); err != nil {
			t.Fatal(err)
		}
	}
	for range 3 {
		wantCode(t, try(t, w.dial(t, cert), rpc{method: "/grpc.health.v1.Health/Check"}), codes.Unavailable)
	}
	if n := strings.Count(w.log.String(), "too many connections of one agent"); n != 1 {
		t.Errorf("%d lines say so, want what the limit allows", n)
	}
	if err := try(t, w.dial(t, other), rpc{method: "/grpc.health.v1.Health/Check"}); err != nil {
		t.Fatal(err)
	}
}

// TestNothingIsLeftInTheLimits: whoever is gone is not counted.
func TestNothingIsLeftInTheLimits(t *testing.T) {
	w := newWorld(t).start(t)
	_, cert := w.agent(t, "a1", "")
	for _, c := range []*tls.Certificate{nil, cert, w.certificate(t, "/x")} {
		conn := w.dial(t, c)
		if err := try(t, conn, rpc{method: "/grpc.health.v1.Health/Check"}); err != nil {
			t.Fatal(err)
		}
		conn.Close()
	}
	eventually(t, "no strangers are counted", func() bool {
		w.port.mu.Lock()
		defer w.port.mu.Unlock()
		return w.port.strangers.Len() == 0 && len(w.port.perAddr) == 0 && len(w.port.perAgent) == 0
	})
}

func TestPinnedTLS(t *testing.T) {
	w, other := newWorld(t).start(t), newWorld(t).start(t)
	pinOf := func(w *world) string {
		root, err := x509.ParseCertificate(w.state.Bundle().X509[0])
		if err != nil {
			t.Fatal(err)
		}
		return node.Pin(root.RawSubjectPublicKeyInfo)
	}
	dial := func(pin string, td string) error {
		conf, err := PinnedTLS(pin, w.td)
		if err != nil {
			return err
		}
		c, err := tls.Dial("tcp", w.port.Addr().String(), conf)
		if err == nil {
			c.Close()
		}
		return err
	}
	if err := dial(pinOf(w), "example.org"); err != nil {
		t.Fatal(err)
	}
	if err := dial(pinOf(other), "example.org"); err == nil || !strings.Contains(err.Error(), "CA pin") {
		t.Fatalf("error %v: another cluster's pin must not do", err)
	}
	if err := dial("sha256:00", "example.org"); !errors.Is(err, identity.ErrInvalid) {
		t.Fatalf("error %v: want a malformed pin refused", err)
	}
	// A chain whose pinned root is only an ornament: the leaf is another CA's.
	mine, err := w.ca.MemberCertificate()
	if err != nil {
		t.Fatal(err)
	}
	forged, err := other.ca.MemberCertificate()
	if err != nil {
		t.Fatal(err)
	}
	chain := append(append([][]byte{}, forged.Certificate...), mine.Certificate[len(mine.Certificate)-1])
	if err := verifyPinned(chain, pinOf(w), w.td); err == nil {
		t.Fatal("accepted a leaf of another CA next to the pinned root")
	}
	// An agent must not pass for a member.
	_, cert := w.agent(t, "a1", "")
	if err := verifyPinned(append(append([][]byte{}, cert.Certificate...), mine.Certificate[len(mine.Certificate)-1]), pinOf(w), w.td); err == nil || !strings.Contains(err.Error(), "not a member") {
		t.Fatalf("error %v: want an agent refused", err)
	}
}

func TestMemberTLSWantsAMember(t *testing.T) {
	w := newWorld(t).start(t)
	conf := TLSConfig{TrustDomain: w.td, Certificate: w.ca.MemberCertificate, Bundle: w.state.Bundle}
	if c, err := tls.Dial("tcp", w.port.Addr().String(), MemberTLS(conf, "m2")); err == nil {
		c.Close()
		t.Fatal("m1 passed for m2")
	}
	_, cert := w.agent(t, "a1", "")
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{*cert}, NextProtos: []string{api.ALPNRaft}})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.(*tls.Conn).Handshake()
			c.Close()
		}
	}()
	if c, err := tls.Dial("tcp", l.Addr().String(), MemberTLS(conf, "")); err == nil || !strings.Contains(err.Error(), "not a member") {
		if c != nil {
			c.Close()
		}
		t.Fatalf("error %v: want an agent refused", err)
	}
}

func TestGuestMessagesAreSmall(t *testing.T) {
	w := newWorld(t).start(t)
	conn := w.dial(t, nil)
	_, err := attestBig(t, conn)
	wantCode(t, err, codes.ResourceExhausted)
}

func TestListenAdmin(t *testing.T) {
	dir := privateDir(t)
	path := filepath.Join(dir, "a.sock")
	l, err := ListenAdmin(path)
	if err != nil {
		t.Fatal(err)
	}
	st, err := os.Stat(path)
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Fatalf("mode %v, error %v: want 0600", st.Mode(), err)
	}
	if _, err := ListenAdmin(path); !errors.Is(err, identity.ErrExists) || !strings.Contains(err.Error(), "running already") {
		t.Fatalf("error %v: a socket in use must not be taken", err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	l.Close()
	l, err = ListenAdmin(path) // stale now
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	if _, err := ListenAdmin(filepath.Join(dir, strings.Repeat("x", 108))); !errors.Is(err, identity.ErrInvalid) || !strings.Contains(err.Error(), "107") {
		t.Fatalf("error %v: want the limit named", err)
	}
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ListenAdmin(file); !errors.Is(err, identity.ErrExists) {
		t.Fatalf("error %v: a file must not be replaced", err)
	}
	if b, _ := os.ReadFile(file); string(b) != "precious" {
		t.Fatal("the file is gone")
	}
	for mode, ok := range map[os.FileMode]bool{0o770: false, 0o707: false, 0o777 | os.ModeSticky: true, 0o755: true} {
		if err := os.Chmod(dir, mode); err != nil {
			t.Fatal(err)
		}
		l, err := ListenAdmin(path)
		if ok != (err == nil) || !ok && (!errors.Is(err, identity.ErrInvalid) || !strings.Contains(err.Error(), "chmod go-w")) {
			t.Errorf("in a folder of mode %v: %v", mode, err)
		}
		if err == nil {
			l.Close()
		}
	}
}
