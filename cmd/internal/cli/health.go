package cli

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"
)

// ServeHealth answers /live, /ready and /metrics on an open listener until ctx ends. ready says nil, or why not.
// What notes say follows in lines of their own when it is ready. Without metrics (nil) there is no such path.
func ServeHealth(ctx context.Context, l net.Listener, ready func() error, metrics http.Handler, notes ...func() []string) error {
	mux := http.NewServeMux()
	if metrics != nil {
		mux.Handle("GET /metrics", metrics)
	}
	mux.HandleFunc("GET /live", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "live") })
	mux.HandleFunc("GET /ready", func(w http.ResponseWriter, _ *http.Request) {
		if err := ready(); err != nil {
			http.Error(w, "not ready: "+err.Error(), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ready")
		for _, f := range notes {
			for _, s := range f() {
				fmt.Fprintln(w, "degraded: "+strings.ReplaceAll(s, "\n", "; "))
			}
		}
	})
	s := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 5 * time.Second, WriteTimeout: 5 * time.Second, IdleTimeout: 30 * time.Second, MaxHeaderBytes: 8 << 10}
	stop := context.AfterFunc(ctx, func() { s.Close() })
	defer stop()
	if err := s.Serve(&newest{Listener: l}); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serving health: %w", err)
	}
	return nil
}

// maxHealthConns is how many connections may ask for health at once.
const maxHealthConns = 64

// newest is a listener that closes its oldest connection when there are too many. Every process of the machine may ask for
// health: it must take neither the descriptors that others need, nor the places of those who ask after it.
type newest struct {
	net.Listener
	mu   sync.Mutex
	open []*healthConn // the oldest first
}

type healthConn struct {
	net.Conn
	of *newest
}

// Accept makes room and never waits for it.
func (n *newest) Accept() (net.Conn, error) {
	c, err := n.Listener.Accept()
	if err != nil {
		return nil, err
	}
	h := &healthConn{Conn: c, of: n}
	n.mu.Lock()
	n.open = append(n.open, h)
	var old *healthConn
	if len(n.open) > maxHealthConns {
		old = n.open[0]
	}
	n.mu.Unlock()
	if old != nil {
		old.Close()
	}
	return h, nil
}

// Close may be called more than once.
func (h *healthConn) Close() error {
	h.of.mu.Lock()
	h.of.open = slices.DeleteFunc(h.of.open, func(o *healthConn) bool { return o == h })
	h.of.mu.Unlock()
	return h.Conn.Close()
}
