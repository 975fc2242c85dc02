package server

import (
	"container/list"
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"countersign.io/countersign/api"
)

// ListenConfig configures the one TLS port.
type ListenConfig struct {
	TCP net.Listener
	TLS *tls.Config // of ServerTLS
	// HandshakeTimeout is how long a newcomer has; 0: 10 s.
	HandshakeTimeout time.Duration
	// MaxStrangers is how many connections may be open that have not proved to be an agent's or a member's; 0: 1024.
	// Beyond it the oldest gives way, so that stalled handshakes cannot keep others out.
	MaxStrangers int
	// MaxPerAddress is how many of them may come from one address (one /64 for IPv6); 0: 64.
	MaxPerAddress int
	// MaxPerAgent is how many connections one agent, or one admin, may have; 0: 16.
	MaxPerAgent int
	// Downstream reports whether a workload's ID is a cluster's below ours, whose connections last as an agent's do; nil: none is.
	Downstream func(spiffeid.ID) bool
	// Admin reports whether an ID has an admin's power; nil: none has. Connections for admins of others stay strangers: they
	// are told no at their first call.
	Admin func(spiffeid.ID) bool
	Log   *slog.Logger
}

// Listener finishes each TLS handshake on its own and then hands the connection to whom it is for. Run accepts;
// the net.Listeners give what has arrived.
type Listener struct {
	cfg                                       ListenConfig
	agents, guests, admins, candidates, peers *queue
	crowds                                    *lineLimit // an agent over its limit comes again at once

	mu        sync.Mutex
	strangers *list.List // of *stranger, the oldest first
	perAddr   map[netip.Addr]int
	perAgent  map[spiffeid.ID]int
}

// stranger is a connection that has not proved to be an agent's or a member's.
type stranger struct {
	tcp     net.Conn
	addr    netip.Addr
	element *list.Element // in Listener.strangers, nil when out; guarded by Listener.mu
}

// conn is a connection with its handshake done.
type conn struct {
	net.Conn
	caller caller
	forget func() // ends its part in the limits; idempotent
}

func (c *conn) Close() error {
	c.forget()
	return c.Conn.Close()
}

// NewListener checks the configuration and takes over the TCP listener.
func NewListener(cfg ListenConfig) (*Listener, error) {
	if cfg.TCP == nil || cfg.TLS == nil || cfg.Log == nil {
		return nil, errors.New("making the TLS listener: TCP, TLS and Log are needed")
	}
	if cfg.HandshakeTimeout <= 0 {
		cfg.HandshakeTimeout = 10 * time.Second
	}
	if cfg.MaxStrangers <= 0 {
		cfg.MaxStrangers = 1024
	}
	if cfg.MaxPerAddress <= 0 {
		cfg.MaxPerAddress = 64
	}
	if cfg.MaxPerAgent <= 0 {
		cfg.MaxPerAgent = 16
	}
	l := &Listener{cfg: cfg, strangers: list.New(), perAddr: map[netip.Addr]int{}, perAgent: map[spiffeid.ID]int{}, crowds: newLineLimit()}
	for _, q := range []**queue{&l.agents, &l.guests, &l.admins, &l.candidates, &l.peers} {
		*q = newQueue(cfg.TCP.Addr())
	}
	return l, nil
}

// Agents gives the gRPC connections of agents.
func (l *Listener) Agents() net.Listener { return l.agents }

// Guests gives the gRPC connections of everybody else.
func (l *Listener) Guests() net.Listener { return l.guests }

// Admins gives the connections with ALPN api.ALPNAdmin of those who are admins by ListenConfig.Admin, Candidates those of workloads
// that are not: they get as little memory and time as guests, and are told no.
func (l *Listener) Admins() net.Listener { return l.admins }

// Candidates: see Admins.
func (l *Listener) Candidates() net.Listener { return l.candidates }

// Raft gives the connections of other members with ALPN api.ALPNRaft.
func (l *Listener) Raft() net.Listener { return l.peers }

// Addr is the port's address.
func (l *Listener) Addr() net.Addr { return l.cfg.TCP.Addr() }

// Run accepts until ctx ends, then closes the port and what nobody has taken.
func (l *Listener) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { l.close() })
	defer stop()
	defer l.close()
	delay := 5 * time.Millisecond
	for {
		tcp, err := l.cfg.TCP.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			if errors.Is(err, net.ErrClosed) {
				return err
			}
			// Out of file descriptors, most likely: what is open must be able to end.
			l.cfg.Log.Error("cannot accept connections", "error", err)
			select {
			case <-time.After(delay):
			case <-ctx.Done():
			}
			delay = min(2*delay, time.Second)
			continue
		}
		delay = 5 * time.Millisecond
		if s := l.admit(tcp); s != nil {
			wg.Go(func() { l.greet(ctx, s) })
		}
	}
}

func (l *Listener) close() {
	l.cfg.TCP.Close()
	for _, q := range []*queue{l.agents, l.guests, l.admins, l.candidates, l.peers} {
		q.Close()
	}
}

// admit counts a newcomer in, at the cost of the oldest stranger if need be; nil if its address has too many.
func (l *Listener) admit(tcp net.Conn) *stranger {
	s := &stranger{tcp: tcp, addr: addrOf(tcp.RemoteAddr())}
	l.mu.Lock()
	if l.perAddr[s.addr] >= l.cfg.MaxPerAddress {
		l.mu.Unlock()
		l.cfg.Log.Debug("too many connections from one address", "address", s.addr)
		tcp.Close()
		return nil
	}
	var oldest *stranger
	if l.strangers.Len() >= l.cfg.MaxStrangers {
		oldest = l.strangers.Front().Value.(*stranger)
		l.forgetLocked(oldest)
	}
	l.perAddr[s.addr]++
	s.element = l.strangers.PushBack(s)
	l.mu.Unlock()
	if oldest != nil {
		l.cfg.Log.Debug("too many strangers: the oldest connection gives way", "address", oldest.addr)
		oldest.tcp.Close()
	}
	return s
}

func (l *Listener) forget(s *stranger) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.forgetLocked(s)
}

func (l *Listener) forgetLocked(s *stranger) {
	if s.element == nil {
		return
	}
	l.strangers.Remove(s.element)
	s.element = nil
	if l.perAddr[s.addr]--; l.perAddr[s.addr] <= 0 {
		delete(l.perAddr, s.addr)
	}
}

// greet does the handshake and hands the connection on, or closes it.
func (l *Listener) greet(ctx context.Context, s *stranger) {
	ctx, cancel := context.WithTimeout(ctx, l.cfg.HandshakeTimeout)
	defer cancel()
	tc := tls.Server(s.tcp, l.cfg.TLS)
	c := &conn{Conn: tc, forget: func() { l.forget(s) }}
	if err := tc.HandshakeContext(ctx); err != nil {
		l.cfg.Log.Debug("TLS handshake failed", "address", s.addr, "error", err)
		c.Close()
		return
	}
	st := tc.ConnectionState()
	var err error
	if c.caller, err = tlsCaller(st.PeerCertificates, s.addr); err != nil {
		l.cfg.Log.Debug("refused a certificate", "address", s.addr, "error", err)
		c.Close()
		return
	}
	to := l.route(st.NegotiatedProtocol, c.caller)
	if to == nil {
		l.cfg.Log.Debug("refused a connection: its ALPN protocol is not for this caller", "address", s.addr, "alpn", st.NegotiatedProtocol, "caller", c.caller.kind)
		c.Close()
		return
	}
	if to == l.admins || to == l.candidates {
		c.caller.kind = remote
	}
	if to != l.guests && to != l.candidates {
		c.forget() // no stranger any more
	} else {
		c.caller.proven = c.forget
	}
	if (to == l.agents || to == l.admins) && !l.enlist(c) {
		if leftOut, ok := l.crowds.allow(time.Now()); ok {
			l.cfg.Log.Warn("too many connections of one agent or admin", "caller", c.caller.id, "address", s.addr, "left_out_before", leftOut)
		}
		tc.Close()
		return
	}
	if !to.put(ctx, c) {
		c.Close()
	}
}

// enlist counts the connection of an agent, or of an admin, until it is closed; false if that one has too many.
func (l *Listener) enlist(c *conn) bool {
	id := c.caller.id
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.perAgent[id] >= l.cfg.MaxPerAgent {
		return false
	}
	l.perAgent[id]++
	c.forget = sync.OnceFunc(func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.perAgent[id]--; l.perAgent[id] <= 0 {
			delete(l.perAgent, id)
		}
	})
	return true
}

func (l *Listener) route(alpn string, c caller) *queue {
	k := c.kind
	switch {
	case alpn == alpnGRPC && k == agent,
		alpn == alpnGRPC && k == workload && l.cfg.Downstream != nil && l.cfg.Downstream(c.id):
		return l.agents
	case alpn == alpnGRPC:
		return l.guests
	case alpn == api.ALPNAdmin && k == workload && l.cfg.Admin != nil && l.cfg.Admin(c.id):
		return l.admins
	case alpn == api.ALPNAdmin && k == workload:
		return l.candidates
	case alpn == api.ALPNRaft && k == member:
		return l.peers
	}
	return nil
}

// queue is a net.Listener that gives what is put.
type queue struct {
	addr net.Addr
	ch   chan *conn
	done chan struct{}
	once sync.Once
}

func newQueue(addr net.Addr) *queue {
	return &queue{addr: addr, ch: make(chan *conn), done: make(chan struct{})}
}

func (q *queue) put(ctx context.Context, c *conn) bool {
	select {
	case q.ch <- c:
		return true
	case <-q.done:
	case <-ctx.Done():
	}
	return false
}

// Accept waits for the next connection.
func (q *queue) Accept() (net.Conn, error) {
	select {
	case c := <-q.ch:
		return c, nil
	case <-q.done:
		return nil, net.ErrClosed
	}
}

// Close ends Accept. The port itself is closed by Run.
func (q *queue) Close() error {
	q.once.Do(func() { close(q.done) })
	return nil
}

// Addr is the port's address.
func (q *queue) Addr() net.Addr { return q.addr }
