package audit

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"io"
	"math/big"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"countersign.io/countersign/identity"
)

// fakeSink takes lines, or fails, or hangs.
type fakeSink struct {
	mu    sync.Mutex
	lines [][]byte
	err   error
	gate  chan struct{}
}

func (s *fakeSink) Write(_ context.Context, lines []Line) error {
	s.mu.Lock()
	gate, err := s.gate, s.err
	s.mu.Unlock()
	if gate != nil {
		<-gate // whatever ctx says
	}
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range lines {
		s.lines = append(s.lines, append(bytes.Clone(l.Text), '\n'))
	}
	return nil
}

func (s *fakeSink) Close() error { return nil }

func (s *fakeSink) set(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
}

func (s *fakeSink) got() [][]byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([][]byte(nil), s.lines...)
}

// TestOutputsGetWhatTheFilesHave, in order.
func TestOutputsGetWhatTheFilesHave(t *testing.T) {
	dir, s := privateDir(t), &fakeSink{}
	var out bytes.Buffer
	l := start(t, dir, func(c *Config) {
		c.MaxSize = MaxLine
		c.Outputs = []Output{{Name: "fake", Sink: s}, {Name: "stdout", Required: true, Sink: Stream(&out)}}
	})
	record(t, l.Log, 200)
	l.stop()
	want := bytes.Join(lines(t, dir), nil)
	if got := bytes.Join(s.got(), nil); !bytes.Equal(got, want) {
		t.Errorf("the sink has %d bytes, the files %d", len(got), len(want))
	}
	if !bytes.Equal(out.Bytes(), want) {
		t.Errorf("the stream has %d bytes, the files %d", out.Len(), len(want))
	}
}

// TestRequiredSinkHangs: nothing is decided, nobody waits for longer than the deadline.
func TestRequiredSinkHangs(t *testing.T) {
	dir, s := privateDir(t), &fakeSink{}
	l := start(t, dir, func(c *Config) {
		c.Deadline = 500 * time.Millisecond
		c.Outputs = []Output{{Name: "fake", Required: true, Sink: s}}
	})
	gate := make(chan struct{})
	s.set(func() { s.gate = gate })
	if err := l.Record(context.Background(), event(1)); !errors.Is(err, identity.ErrUnavailable) {
		t.Fatalf("recorded: %v", err)
	}
	eventually(t, "it says so", func() bool { return l.Ready() != nil })
	// What got into the files all the same is withdrawn.
	eventually(t, "the record is withdrawn", func() bool { return len(l.durable(t, LogWithdrawn)) == 1 })
	// Memory is bounded, however many come.
	big := event(2)
	big.Reason = strings.Repeat("x", maxReason)
	for range 3 * maxBacklog / maxReason {
		l.Note("", big)
		l.mu.Lock()
		n := l.bytes
		l.mu.Unlock()
		if n > maxBytes {
			t.Fatalf("%d bytes wait for the writer", n)
		}
	}
	eventually(t, "the writer has written", func() bool { l.mu.Lock(); defer l.mu.Unlock(); return len(l.queue) == 0 })
	o := l.outputs[0]
	o.mu.Lock()
	waiting := o.bytes
	o.mu.Unlock()
	if waiting > maxBacklog {
		t.Fatalf("%d bytes wait for the sink", waiting)
	}
	s.set(func() { s.gate = nil })
	close(gate)
	eventually(t, "it goes on by itself", func() bool { return l.Record(context.Background(), event(3)) == nil })
	l.stop()
	wantClean(t, dir, nil)
}

// TestRequiredSinkFails: what it has not got is not decided, and it gets it once it works again.
func TestRequiredSinkFails(t *testing.T) {
	dir, s := privateDir(t), &fakeSink{}
	l := start(t, dir, func(c *Config) {
		c.Deadline = 500 * time.Millisecond
		c.Outputs = []Output{{Name: "fake", Required: true, Sink: s}}
	})
	s.set(func() { s.err = errors.New("no route") })
	if err := l.Record(context.Background(), event(1)); !errors.Is(err, identity.ErrUnavailable) {
		t.Fatalf("recorded: %v", err)
	}
	eventually(t, "it says why", func() bool { err := l.Ready(); return err != nil && strings.Contains(err.Error(), "no route") })
	s.set(func() { s.err = nil })
	eventually(t, "it goes on by itself", func() bool { return l.Ready() == nil })
	eventually(t, "it takes decisions again", func() bool { return l.Record(context.Background(), event(2)) == nil })
	l.stop()
	if got, want := bytes.Join(s.got(), nil), bytes.Join(lines(t, dir), nil); !bytes.Equal(got, want) {
		t.Errorf("the sink has %d bytes, the files %d", len(got), len(want))
	}
	if len(find(t, dir, LogFailed)) != 1 || len(find(t, dir, LogRecovered)) != 1 {
		t.Error("the log does not say that the sink failed, and recovered")
	}
	wantClean(t, dir, nil)
}

func (o *output) idle() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return len(o.queue) == 0
}

// TestBestEffortSinkFails: nobody waits for it; what it missed is said.
func TestBestEffortSinkFails(t *testing.T) {
	dir, s := privateDir(t), &fakeSink{err: errors.New("no route")}
	l := start(t, dir, func(c *Config) { c.Outputs = []Output{{Name: "fake", Sink: s}} })
	big := event(1)
	big.Reason = strings.Repeat("x", maxReason)
	for range maxBacklog/maxReason/100 + 2 {
		if err := l.Record(context.Background(), slices.Repeat([]Event{big}, 100)...); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Ready(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it says so", func() bool { d := l.Degraded(); return len(d) == 1 && strings.Contains(d[0], "no route") })
	s.set(func() { s.err = nil })
	eventually(t, "it has caught up", func() bool { return len(l.Degraded()) == 0 && l.outputs[0].idle() })
	l.stop()
	wantClean(t, dir, nil)
	if !slices.ContainsFunc(find(t, dir, LogRecovered), func(r *Record) bool { return r.Details.Get("missed_from") != "" }) {
		t.Error("the log does not say what the sink missed")
	}
}

// collector is a syslog server over TLS.
type collector struct {
	addr string
	cert tls.Certificate
	ln   net.Listener

	mu    sync.Mutex
	msgs  []string
	conns []net.Conn
	slow  chan struct{} // while not nil, nothing is read
}

func newCollector(t *testing.T, name string) *collector {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, _ := x509.ParseCertificate(der)
	c := &collector{cert: tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}}
	c.listen(t, "127.0.0.1:0")
	t.Cleanup(func() { c.stop() })
	return c
}

func (c *collector) listen(t *testing.T, addr string) {
	t.Helper()
	ln, err := tls.Listen("tcp", addr, &tls.Config{Certificates: []tls.Certificate{c.cert}})
	if err != nil {
		t.Fatal(err)
	}
	c.ln, c.addr = ln, ln.Addr().String()
	go func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			c.mu.Lock()
			c.conns = append(c.conns, conn)
			c.mu.Unlock()
			go c.read(conn)
		}
	}()
}

// read takes messages framed by counting, as RFC 5425 section 4.3 has it.
func (c *collector) read(conn net.Conn) {
	defer conn.Close()
	r := bufio.NewReader(conn)
	for {
		c.mu.Lock()
		slow := c.slow
		c.mu.Unlock()
		if slow != nil {
			<-slow
		}
		count, err := r.ReadString(' ')
		if err != nil {
			return
		}
		n, err := strconv.Atoi(strings.TrimSuffix(count, " "))
		if err != nil {
			return
		}
		msg := make([]byte, n)
		if _, err := io.ReadFull(r, msg); err != nil {
			return
		}
		c.mu.Lock()
		c.msgs = append(c.msgs, string(msg))
		c.mu.Unlock()
	}
}

func (c *collector) stop() {
	c.ln.Close()
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, conn := range c.conns {
		conn.Close()
	}
	c.conns = nil
}

func (c *collector) messages() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return append([]string(nil), c.msgs...)
}

func (c *collector) sink(t *testing.T, name string, trust *x509.Certificate) Sink {
	t.Helper()
	pool := x509.NewCertPool()
	pool.AddCert(trust)
	s, err := Syslog(SyslogConfig{Address: c.addr, TLS: &tls.Config{RootCAs: pool, ServerName: name}, Member: "m1", Timeout: 2 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// payload is the message of an RFC 5424 line (section 6), whose header is checked.
func payload(t *testing.T, msg string) string {
	t.Helper()
	f := strings.SplitN(msg, " ", 8)
	if len(f) != 8 || f[2] != "m1" || f[3] != "countersign" || f[4] != "-" || f[6] != "-" {
		t.Fatalf("%q is not as RFC 5424 has it", msg)
	}
	if f[0] != "<110>1" && f[0] != "<109>1" && f[0] != "<108>1" {
		t.Fatalf("priority and version %q", f[0])
	}
	if _, err := time.Parse(time.RFC3339Nano, f[1]); err != nil {
		t.Fatal(err)
	}
	return f[7]
}

func TestSyslog(t *testing.T) {
	col := newCollector(t, "logs.test")
	dir := privateDir(t)
	l := start(t, dir, func(c *Config) {
		c.Deadline = time.Second
		c.Outputs = []Output{{Name: "syslog", Required: true, Sink: col.sink(t, "logs.test", col.cert.Leaf)}}
	})
	for i := range 20 {
		eventually(t, "it is recorded, however long the first handshake takes", func() bool { return l.Record(context.Background(), event(i)) == nil })
	}
	eventually(t, "they arrive", func() bool { return len(col.messages()) >= 21 })
	v := NewVerifier(VerifyConfig{Collected: true})
	for i, m := range col.messages() {
		v.Line("syslog", i+1, []byte(payload(t, m)))
	}
	if r := v.Done(); r.Records < 21 || len(r.Faults) > 0 {
		t.Fatalf("%+v", r)
	}
	// The collector goes away, and comes back at the same address.
	col.stop()
	eventually(t, "decisions are refused", func() bool { return l.Record(context.Background(), event(100)) != nil })
	eventually(t, "it says so", func() bool { return l.Ready() != nil })
	col.listen(t, col.addr)
	eventually(t, "it goes on by itself", func() bool { return l.Record(context.Background(), event(101)) == nil })
	eventually(t, "the record arrives", func() bool {
		for _, m := range col.messages() {
			if strings.Contains(m, "q-101") {
				return true
			}
		}
		return false
	})
	// One that takes nothing: the connection's buffers fill, and a write times out.
	slow := make(chan struct{})
	defer close(slow)
	col.mu.Lock()
	col.slow = slow
	col.mu.Unlock()
	big := event(1)
	big.Reason = strings.Repeat("x", maxReason)
	eventually(t, "a collector that takes nothing is noticed", func() bool {
		for range 50 {
			l.Note("", big)
		}
		return l.Ready() != nil
	})
	l.stop()
	wantClean(t, dir, nil)
}

// TestSyslogWithTheWrongCertificate: nothing is sent to whoever it is.
func TestSyslogWithTheWrongCertificate(t *testing.T) {
	col, other := newCollector(t, "logs.test"), newCollector(t, "logs.test")
	for name, sink := range map[string]Sink{
		"another authority": col.sink(t, "logs.test", other.cert.Leaf),
		"another name":      col.sink(t, "elsewhere.test", col.cert.Leaf),
	} {
		l := startAnyhow(t, privateDir(t), func(c *Config) {
			c.Deadline = 100 * time.Millisecond
			c.Outputs = []Output{{Name: "syslog", Required: true, Sink: sink}}
		})
		eventually(t, name+" is refused", func() bool { err := l.Ready(); return err != nil && strings.Contains(err.Error(), "certificate") })
		if err := l.Record(context.Background(), event(1)); !errors.Is(err, identity.ErrUnavailable) {
			t.Errorf("%s: recorded: %v", name, err)
		}
		l.stop()
	}
	if m := col.messages(); len(m) > 0 {
		t.Errorf("%d messages were sent", len(m))
	}
}

func TestSyslogRefuses(t *testing.T) {
	for name, c := range map[string]SyslogConfig{
		"no port":   {Address: "host", TLS: &tls.Config{}, Member: "m1"},
		"no TLS":    {Address: "host:1", Member: "m1"},
		"no member": {Address: "host:1", TLS: &tls.Config{}},
	} {
		if _, err := Syslog(c); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// TestFrame: what is in a header cannot break out of it.
func TestFrame(t *testing.T) {
	s := &syslog{c: SyslogConfig{Member: "m 1\n\x00é" + strings.Repeat("x", 300)}}
	b := s.frame(nil, &Line{Time: time.Unix(0, 0), Action: "a b\n", Outcome: Refused, Text: []byte(`{"x":1}`)})
	count, rest, ok := strings.Cut(string(b), " ")
	if n, err := strconv.Atoi(count); !ok || err != nil || n != len(rest) {
		t.Fatalf("%q", b)
	}
	if f := strings.SplitN(rest, " ", 8); len(f) != 8 || f[0] != "<109>1" || len(f[2]) != 255 || f[5] != "a_b_" || f[7] != `{"x":1}` || strings.ContainsAny(rest, "\n\x00") {
		t.Fatalf("%q", rest)
	}
}
