// Package federation is how trust domains that are not one's own come to be trusted, and how they learn whom to trust here:
// the HTTPS port that anybody may read, with the bundle endpoint on it; the client that fetches a partner's bundle; and the
// loop that does so at each partner's refresh hint (SPIFFE Federation). It knows no signing, no gRPC and no disk: what it
// shows, and where what it fetched goes, arrive as functions.
package federation

import (
	"container/list"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"time"

	"countersign.io/countersign/identity"
)

// PublicConfig configures a port that anybody may read.
type PublicConfig struct {
	TCP net.Listener
	// Certificate is asked for at each handshake.
	Certificate func(*tls.ClientHelloInfo) (*tls.Certificate, error)
	// Protocols are more of ALPN than HTTP's: an ACME challenge's.
	Protocols []string
	// MaxConns is how many connections may be open, 0: 1024, and MaxPerAddress how many of one address (one /64 of IPv6), 0: 64.
	// Beyond MaxConns the oldest gives way.
	MaxConns, MaxPerAddress int
	Log                     *slog.Logger
}

// Public serves documents by HTTPS to anybody. It asks for no client certificate, reads no request's body, and gives each
// connection little memory and little time.
type Public struct {
	cfg PublicConfig
	mux *http.ServeMux
}

// The limits of one connection.
const (
	publicHeaderTime = 5 * time.Second
	publicTime       = 20 * time.Second
	publicIdle       = 30 * time.Second
	publicHeader     = 8 << 10
	publicStreams    = 16
)

// NewPublic checks the configuration and takes over the listener.
func NewPublic(cfg PublicConfig) (*Public, error) {
	if cfg.TCP == nil || cfg.Certificate == nil || cfg.Log == nil {
		return nil, fmt.Errorf("making the public port: %w: TCP, Certificate and Log are needed", identity.ErrInvalid)
	}
	if cfg.MaxConns <= 0 {
		cfg.MaxConns = 1024
	}
	if cfg.MaxPerAddress <= 0 {
		cfg.MaxPerAddress = 64
	}
	return &Public{cfg: cfg, mux: http.NewServeMux()}, nil
}

// Handle serves what is at a path, to be called before Run. The handler answers GET and HEAD, and must be as cheap as reading
// memory.
func (p *Public) Handle(path string, h http.Handler) { p.mux.Handle(path, h) }

// Addr is the port's address.
func (p *Public) Addr() net.Addr { return p.cfg.TCP.Addr() }

// Run serves until ctx ends.
func (p *Public) Run(ctx context.Context) error {
	conf := Intermediate()
	conf.GetCertificate = p.cfg.Certificate
	conf.NextProtos = append([]string{"h2", "http/1.1"}, p.cfg.Protocols...)
	s := &http.Server{
		Handler: http.MaxBytesHandler(p.mux, 0), TLSConfig: conf,
		ReadHeaderTimeout: publicHeaderTime, ReadTimeout: publicTime, WriteTimeout: publicTime, IdleTimeout: publicIdle, MaxHeaderBytes: publicHeader,
		HTTP2:    &http.HTTP2Config{MaxConcurrentStreams: publicStreams},
		ErrorLog: log.New(debugLines{p.cfg.Log}, "", 0),
	}
	stop := context.AfterFunc(ctx, func() { s.Close() })
	defer stop()
	if err := s.ServeTLS(newCrowd(p.cfg), "", ""); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serving the public port: %w", err)
	}
	return nil
}

// debugLines takes what net/http says of strangers, who could fill a log with it.
type debugLines struct{ log *slog.Logger }

func (d debugLines) Write(p []byte) (int, error) {
	d.log.Debug("public port", "says", strings.TrimSpace(string(p)))
	return len(p), nil
}

// crowd is a listener that bounds who is connected: nobody proves anything here, so whoever came first gives way.
type crowd struct {
	net.Listener
	most, perAddress int

	mu   sync.Mutex
	open *list.List // of *guest, the oldest first
	from map[netip.Addr]int
}

type guest struct {
	net.Conn
	of      *crowd
	addr    netip.Addr
	element *list.Element // nil once it is out; guarded by crowd.mu
}

func newCrowd(cfg PublicConfig) *crowd {
	return &crowd{Listener: cfg.TCP, most: cfg.MaxConns, perAddress: cfg.MaxPerAddress, open: list.New(), from: map[netip.Addr]int{}}
}

// Accept makes room and never waits for it.
func (c *crowd) Accept() (net.Conn, error) {
	for {
		conn, err := c.Listener.Accept()
		if err != nil {
			return nil, err
		}
		g := &guest{Conn: conn, of: c, addr: block(conn.RemoteAddr())}
		old, ok := c.admit(g)
		if old != nil {
			old.Conn.Close()
		}
		if ok {
			return g, nil
		}
		conn.Close()
	}
}

func (c *crowd) admit(g *guest) (old *guest, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.from[g.addr] >= c.perAddress {
		return nil, false
	}
	if c.open.Len() >= c.most {
		old = c.open.Front().Value.(*guest)
		c.forget(old)
	}
	c.from[g.addr]++
	g.element = c.open.PushBack(g)
	return old, true
}

func (c *crowd) forget(g *guest) {
	if g.element == nil {
		return
	}
	c.open.Remove(g.element)
	g.element = nil
	if c.from[g.addr]--; c.from[g.addr] <= 0 {
		delete(c.from, g.addr)
	}
}

// Close may be called more than once.
func (g *guest) Close() error {
	g.of.mu.Lock()
	g.of.forget(g)
	g.of.mu.Unlock()
	return g.Conn.Close()
}

// block is the address, or the /64 that an IPv6 one is in: who has one of those has all.
func block(a net.Addr) netip.Addr {
	ap, err := netip.ParseAddrPort(a.String())
	if err != nil {
		return netip.Addr{}
	}
	addr := ap.Addr().Unmap().WithZone("")
	if addr.Is6() {
		p, err := addr.Prefix(64)
		if err == nil {
			return p.Addr()
		}
	}
	return addr
}
