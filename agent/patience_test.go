package agent

import (
	"context"
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
