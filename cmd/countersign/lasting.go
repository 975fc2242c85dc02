package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"countersign.io/countersign/identity"
	"countersign.io/countersign/server"
)

const (
	// lookAgain is how long a connection goes on whose successor cannot be had yet: the agent may be away for a moment.
	lookAgain = 2 * time.Second
	// deniedAgain is how old a connection must be for its SVID to be taken anew because its calls are denied.
	deniedAgain = 10 * time.Second
)

// lasting is the connection of a process that runs on. Before the SVID ends that it was made with it is made anew with a new one, and by
// another member where one cannot be asked. It makes no call twice: who uses it tries again.
type lasting struct {
	a     *admin
	log   *slog.Logger
	now   func() time.Time
	mu    sync.Mutex
	cur   *lastingLink // nil: to be made
	first int          // which member to begin with
	met   bool         // whether there was one already
}

// lastingLink is one of its connections. What is unfinished on it when the next is made ends in order.
type lastingLink struct {
	*link
	made    time.Time
	renew   time.Time // zero: never
	calls   int       // that are under way
	used    bool
	retired bool // closed with its last call
}

func newLasting(a *admin, log *slog.Logger) *lasting { return &lasting{a: a, log: log, now: time.Now} }

// Invoke is grpc.ClientConnInterface's. Each call has the command's own time. The ID of a request that failed is logged and is not in the
// error: that is compared with the one before.
func (l *lasting) Invoke(ctx context.Context, method string, args, reply any, opts ...grpc.CallOption) error {
	if l.a.timeout > 0 { // as connectFor has it
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, l.a.timeout)
		defer cancel()
	}
	c, err := l.take(ctx)
	if err != nil {
		return err
	}
	var trailer metadata.MD
	late := false
	if err = c.conn.Invoke(ctx, method, args, reply, append(opts, grpc.Trailer(&trailer))...); err != nil {
		late = status.Code(err) == codes.DeadlineExceeded // which the member may say a moment before this context does
		err = c.unexplained(err)
		l.log.Debug("a call of a member failed", "member", c.where, "method", method, "request_id", strings.Join(trailer.Get(server.RequestIDKey), " "), "error", err)
	}
	another := errors.Is(err, identity.ErrUnavailable) || late || ctx.Err() != nil
	// Whoever is denied may have become an admin after the SVID was made, and needs a new one.
	old := errors.Is(err, identity.ErrDenied) && l.now().Sub(c.made) >= deniedAgain
	l.give(c, another || errors.Is(err, identity.ErrUnauthenticated) || old, another)
	return err
}

// NewStream is grpc.ClientConnInterface's: what runs on makes no streams.
func (l *lasting) NewStream(_ context.Context, _ *grpc.StreamDesc, method string, _ ...grpc.CallOption) (grpc.ClientStream, error) {
	return nil, fmt.Errorf("%w: opening stream %s: a lasting connection has calls only", identity.ErrPrecondition, method)
}

// Close hangs up.
func (l *lasting) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.retire()
}

// take is the connection to make a call by.
func (l *lasting) take(ctx context.Context) (*lastingLink, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	c, now := l.cur, l.now()
	alive := c != nil && c.alive()
	if alive && (c.renew.IsZero() || now.Before(c.renew)) {
		c.calls, c.used = c.calls+1, true
		return c, nil
	}
	next, err := l.make(ctx)
	switch {
	case err == nil:
		_ = l.retire() // what it says concerns nobody any more
		l.cur, l.met = next, true
	case alive && now.Before(c.expires):
		c.renew = now.Add(lookAgain)
		next = c
	case !l.met, errors.Is(err, identity.ErrUnavailable), errors.Is(err, identity.ErrDenied), errors.Is(err, identity.ErrUnauthenticated):
		return nil, err
	default: // such as files of an SVID that are being written: what did once will do again, and says nothing of the call
		return nil, fmt.Errorf("%w: connecting anew: %v", identity.ErrUnavailable, err)
	}
	next.calls, next.used = next.calls+1, true
	return next, nil
}

// alive reports whether calls may go by it. One that was made just now is idle until its first call has got on.
func (c *lastingLink) alive() bool {
	switch c.conn.GetState() {
	case connectivity.TransientFailure, connectivity.Shutdown:
		return false
	case connectivity.Idle:
		return !c.used || c.calls > 0
	}
	return true
}

// make connects to the first member that answers, beginning with the one that did so last.
func (l *lasting) make(ctx context.Context) (*lastingLink, error) {
	servers := l.a.members()
	if len(servers) == 0 {
		c, err := l.a.dial(ctx)
		return &lastingLink{link: c, made: l.now()}, err
	}
	from := l.first % len(servers)
	c, err := l.a.reach(ctx, slices.Concat(servers[from:], servers[:from]))
	if err != nil {
		return nil, err
	}
	l.first = slices.Index(servers, c.where)
	now := l.now()
	return &lastingLink{link: c, made: now, renew: now.Add(c.expires.Sub(now) / 2)}, nil
}

// give ends a call. A connection that failed is not used again, nor, if another member is to be asked, its member before the others.
func (l *lasting) give(c *lastingLink, failed, another bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	c.calls--
	if failed && l.cur == c {
		_ = l.retire()
		if another {
			l.first++
		}
	}
	if c.retired && c.calls == 0 {
		_ = c.Close()
	}
}

func (l *lasting) retire() error {
	c := l.cur
	if l.cur = nil; c == nil {
		return nil
	}
	if c.retired = true; c.calls == 0 {
		return c.Close()
	}
	return nil
}
