package federation

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"countersign.io/countersign/identity"
)

func TestNewPublicRefuses(t *testing.T) {
	if _, err := NewPublic(PublicConfig{}); !errors.Is(err, identity.ErrInvalid) {
		t.Error(err)
	}
}

// Several handlers share the port; what none of them serves is not there, and no body is read.
func TestPublicServesSeveral(t *testing.T) {
	p := newPartner(t, "partner.org")
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	cert := p.svid(p.endpointID())
	pub, err := NewPublic(PublicConfig{TCP: l, Certificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return cert, nil }, Log: quiet()})
	if err != nil {
		t.Fatal(err)
	}
	pub.Handle("/bundle", p.endpoint(time.Minute))
	bodyErr := make(chan error, 1)
	pub.Handle("/other", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, err := io.ReadAll(r.Body)
		bodyErr <- err
	}))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- pub.Run(ctx) }()
	for _, h2 := range []bool{false, true} {
		tr := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: p.webRoots()}, ForceAttemptHTTP2: h2}
		client := &http.Client{Transport: tr, Timeout: 30 * time.Second}
		base := "https://" + pub.Addr().String()
		for path, want := range map[string]int{"/bundle": 200, "/": 404, "/bundle/": 404, "/bundle/x": 404} {
			r, err := client.Get(base + path)
			if err != nil {
				t.Fatal(err)
			}
			r.Body.Close()
			if r.StatusCode != want || h2 != (r.ProtoMajor == 2) {
				t.Errorf("%s: %d, %s", path, r.StatusCode, r.Proto)
			}
		}
		r, err := client.Post(base+"/other", "text/plain", strings.NewReader("something"))
		if err == nil {
			r.Body.Close()
		}
		if err := <-bodyErr; err == nil {
			t.Error("a body was read")
		}
		tr.CloseIdleConnections()
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// Whoever connects and says nothing keeps nobody out, and one address does not take all.
func TestPublicCrowd(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c := newCrowd(PublicConfig{TCP: l, MaxConns: 3, MaxPerAddress: 4})
	accepted := make(chan net.Conn, 16)
	go func() {
		for {
			conn, err := c.Accept()
			if err != nil {
				return
			}
			accepted <- conn
		}
	}()
	var dialled, served []net.Conn
	dial := func() {
		conn, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		dialled, served = append(dialled, conn), append(served, <-accepted)
	}
	for range 5 {
		dial() // the fourth and fifth push out the first and second
	}
	for i, conn := range dialled {
		_ = conn.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		_, err := conn.Read(make([]byte, 1))
		var ne net.Error
		if alive := errors.As(err, &ne) && ne.Timeout(); alive != (i >= 2) {
			t.Errorf("connection %d: %v", i, err)
		}
	}
	for _, conn := range served {
		conn.Close()
		conn.Close()
	}
	c.mu.Lock()
	if c.open.Len() != 0 || len(c.from) != 0 {
		t.Errorf("%d open, %d addresses remembered", c.open.Len(), len(c.from))
	}
	c.mu.Unlock()

	c.mu.Lock()
	c.most, c.perAddress = 10, 1
	c.mu.Unlock()
	dial()
	second, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	_ = second.SetReadDeadline(time.Now().Add(30 * time.Second))
	if _, err := second.Read(make([]byte, 1)); err == nil || strings.Contains(err.Error(), "timeout") {
		t.Errorf("a second connection of one address: %v", err)
	}
}

func TestBlockOfAddress(t *testing.T) {
	for in, want := range map[string]string{
		"192.0.2.1:5": "192.0.2.1", "[::ffff:192.0.2.1]:5": "192.0.2.1", "[2001:db8::1:2]:5": "2001:db8::", "[fe80::1%eth0]:5": "fe80::",
	} {
		a, err := net.ResolveTCPAddr("tcp", in)
		if err != nil {
			t.Fatal(err)
		}
		if got := block(a); got.String() != want {
			t.Errorf("%s: %s", in, got)
		}
	}
}
