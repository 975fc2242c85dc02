// Command workload is a small program with a SPIFFE identity, as any user would write one with go-spiffe: it serves and
// dials mutual TLS, checks the other side's ID at every handshake, and prints one JSON line for everything that happens. It
// knows nothing of Countersign.
package main

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// Event is one line of output.
type Event struct {
	Time   time.Time `json:"time"`
	Event  string    `json:"event"` // svid, first, failed, count, error
	ID     string    `json:"id,omitempty"`
	Peer   string    `json:"peer,omitempty"`
	Serial string    `json:"serial,omitempty"`
	Error  string    `json:"error,omitempty"`
	OK     int       `json:"ok,omitempty"`
	Failed int       `json:"failed,omitempty"`
}

type program struct {
	listen, dial, peer string
	interval           time.Duration

	mu  sync.Mutex // guards out and the counters
	out *json.Encoder
	ok  int
	bad int
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	p := &program{out: json.NewEncoder(os.Stdout)}
	flag.StringVar(&p.listen, "listen", "", "serve mutual TLS here")
	flag.StringVar(&p.dial, "dial", "", "dial mutual TLS here, again and again")
	flag.StringVar(&p.peer, "peer", "", "the SPIFFE ID that the other side must have")
	flag.DurationVar(&p.interval, "interval", 50*time.Millisecond, "between two handshakes")
	flag.Parse()
	if err := p.run(ctx); err != nil && ctx.Err() == nil {
		p.emit(Event{Event: "error", Error: err.Error()})
		os.Exit(1)
	}
}

func (p *program) emit(e Event) {
	e.Time = time.Now()
	p.mu.Lock()
	defer p.mu.Unlock()
	_ = p.out.Encode(e)
}

func (p *program) run(ctx context.Context) error {
	peer, err := spiffeid.FromString(p.peer)
	if err != nil {
		return fmt.Errorf("reading -peer: %w", err)
	}
	source, err := workloadapi.NewX509Source(ctx)
	if err != nil {
		return fmt.Errorf("opening the Workload API: %w", err)
	}
	defer source.Close()
	go p.watch(ctx, source)
	if p.listen != "" {
		l, err := tls.Listen("tcp", p.listen, tlsconfig.MTLSServerConfig(source, source, tlsconfig.AuthorizeID(peer)))
		if err != nil {
			return fmt.Errorf("listening: %w", err)
		}
		context.AfterFunc(ctx, func() { l.Close() })
		return p.serve(l)
	}
	return p.call(ctx, source, peer)
}

// watch prints each new SVID; an update may be the bundle's alone.
func (p *program) watch(ctx context.Context, source *workloadapi.X509Source) {
	for last := ""; ; {
		if svid, err := source.GetX509SVID(); err == nil {
			if serial := fmt.Sprintf("%032x", svid.Certificates[0].SerialNumber); serial != last {
				p.emit(Event{Event: "svid", ID: svid.ID.String(), Serial: serial})
				last = serial
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-source.Updated():
		}
	}
}

func (p *program) serve(l net.Listener) error {
	for {
		conn, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("accepting: %w", err)
		}
		go func() {
			defer conn.Close()
			_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
			_, _ = io.Copy(conn, io.LimitReader(conn, 4))
		}()
	}
}

func (p *program) call(ctx context.Context, source *workloadapi.X509Source, peer spiffeid.ID) error {
	tick := time.NewTicker(p.interval)
	defer tick.Stop()
	conf := tlsconfig.MTLSClientConfig(source, source, tlsconfig.AuthorizeID(peer))
	report := time.Now()
	for {
		err := p.handshake(ctx, conf)
		switch {
		case ctx.Err() != nil:
		case err != nil:
			p.bad++
			p.emit(Event{Event: "failed", Error: err.Error(), OK: p.ok, Failed: p.bad})
		default:
			if p.ok++; p.ok == 1 {
				p.emit(Event{Event: "first", Peer: peer.String()})
			}
		}
		if time.Since(report) > time.Second || ctx.Err() != nil {
			p.emit(Event{Event: "count", OK: p.ok, Failed: p.bad})
			report = time.Now()
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// handshake is one full mutual TLS handshake and four bytes there and back.
func (p *program) handshake(ctx context.Context, conf *tls.Config) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	d := tls.Dialer{Config: conf}
	conn, err := d.DialContext(ctx, "tcp", p.dial)
	if err != nil {
		return fmt.Errorf("handshake: %w", err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := conn.Write([]byte("ping")); err != nil {
		return fmt.Errorf("writing: %w", err)
	}
	var got [4]byte
	if _, err := io.ReadFull(conn, got[:]); err != nil {
		return fmt.Errorf("reading: %w", err)
	}
	return nil
}
