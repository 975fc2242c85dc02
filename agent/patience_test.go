package agent

import (
	"context"
	"errors"
	"net"
	"sync/atomic"
	"testing"
	"time"
)

func TestPatience(t *testing.T) {
	for rounds, want := range map[int]time.Duration{0: attemptTimeout, 1: 2 * attemptTimeout, 2: 4 * attemptTimeout, 3: mostPatience, 1000: mostPatience} {
		if got := patience(rounds); got != want {
			t.Errorf("after %d rounds in vain: %v, want %v", rounds, got, want)
		}
	}
}

// TestSlowConnections is a node, or members, with so much to do that no connection is made within the time of the first round.
func TestSlowConnections(t *testing.T) {
	t.Parallel()
	c := newCluster(t)
	c.member("a")
	c.grant("web", web())
	cfg := c.config()
	var dials atomic.Int32
	dial := cfg.Dial
	if dial == nil {
		dial = func(ctx context.Context, addr string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", addr)
		}
	}
	cfg.Dial = func(ctx context.Context, addr string) (net.Conn, error) {
		dials.Add(1)
		sleep(ctx, attemptTimeout+attemptTimeout/4)
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return dial(ctx, addr)
	}
	a := run(t, cfg)
	eventually(t, "it is connected all the same", func() bool { return a.Status().Member != "" })
	if n := dials.Load(); n < 2 {
		t.Errorf("%d dials: the first was not too slow", n)
	}
	current(t, a.Agent, caller("web"))
	// So does the move to a connection with its next SVID.
	o := *a.own.Load()
	o.renewAt = time.Now()
	a.own.Store(&o)
	wake(a.ownSooner)
	eventually(t, "it moves", func() bool {
		a.link.mu.Lock()
		defer a.link.mu.Unlock()
		now := a.own.Load()
		return now.tls != o.tls && a.link.sess != nil && a.link.sess.connectedAs.tls == now.tls
	})
}

// TestBackWithinTheRound: one member's host is gone, and answers nothing; another is back before anybody gives up on the first.
func TestBackWithinTheRound(t *testing.T) {
	t.Parallel()
	c := newCluster(t)
	b := c.member("b")
	cfg := c.config()
	const gone = "192.0.2.1:8443"
	cfg.Servers = append(cfg.Servers, gone)
	var refusals, waits atomic.Int32
	var fault atomic.Bool
	back, waited := make(chan struct{}), make(chan struct{})
	cfg.Dial = func(ctx context.Context, addr string) (net.Conn, error) {
		if !fault.Load() && addr == b.addr {
			return new(net.Dialer).DialContext(ctx, "tcp", addr)
		}
		if !fault.Load() {
			return nil, errors.New("connection refused")
		}
		if addr == gone {
			if waits.Add(1) == 1 {
				close(waited)
			}
			<-ctx.Done()
			return nil, ctx.Err()
		}
		select {
		case <-back:
			return new(net.Dialer).DialContext(ctx, "tcp", addr)
		default:
			refusals.Add(1)
			return nil, errors.New("connection refused")
		}
	}
	a, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	if err := a.attest(ctx, attemptTimeout); err != nil {
		t.Fatal(err)
	}
	fault.Store(true)
	go func() {
		<-waited
		for refusals.Load() == 0 && ctx.Err() == nil {
			sleep(ctx, time.Millisecond)
		}
		close(back)
	}()
	s, err := a.connect(ctx, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	s.close()
	if s.addr != b.addr || waits.Load() != 1 || refusals.Load() == 0 {
		t.Errorf("connected to %s; %d waits, %d refusals", s.addr, waits.Load(), refusals.Load())
	}
}

// TestProbeTimeout: whoever finds one member after the other hanging is in no position to judge.
func TestProbeTimeout(t *testing.T) {
	var l link
	l.init()
	for i, want := range []time.Duration{probeTimeout, probeTimeout, 2 * probeTimeout, 4 * probeTimeout, 8 * probeTimeout, callTimeout, callTimeout} {
		if got := l.probeTimeout(); got != want {
			t.Errorf("after %d that hung: %v, want %v", i, got, want)
		}
		s := &session{cancel: func(error) {}, done: make(chan struct{})}
		l.set(s, nil)
		l.fail(s, errHung)
		l.fail(s, errHung) // once for each session
	}
	other := &session{cancel: func(error) {}, done: make(chan struct{})}
	l.set(other, nil)
	l.fail(other, errAnswer)
	if l.hung != 7 {
		t.Errorf("counted %d", l.hung)
	}
	l.hungAt = l.hungAt.Add(-blameFor - time.Second)
	if got := l.probeTimeout(); got != probeTimeout {
		t.Errorf("long after: %v", got)
	}
}
