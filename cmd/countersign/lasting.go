package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/connectivity"

	"countersign.io/countersign/identity"
)

// lookAgain is how long a connection goes on whose successor cannot be had yet: the agent may be away for a moment.
const lookAgain = 2 * time.Second

// lasting is the connection of a process that runs on. Before the SVID ends that it was made with it is made anew with a new one, and by
// another member where one cannot be asked. It makes no call twice: who uses it tries again.
type lasting struct {
	a     *admin
	now   func() time.Time
	mu    sync.Mutex
	cur   *lastingLink // nil: to be made
	first int          // which member to begin with
}

// lastingLink is one of its connections. What is unfinished on it when the next is made ends in order.
type lastingLink struct {
	*link
	renew   time.Time // zero: never
	calls   int       // that are under way
	used    bool
	retired bool // closed with its last call
}

func newLasting(a *admin) *lasting { return &lasting{a: a, now: time.Now} }

// Invoke is grpc.ClientConnInterface's. Each call has the command's own time.
func (l *lasting) Invoke(ctx context.Context, method string, args, reply any, opts ...grpc.CallOption) error {
	ctx, cancel := context.WithTimeout(ctx, l.a.timeout)
	defer cancel()
	c, err := l.take(ctx)
	if err != nil {
		return err
	}
	err = c.explain(c.conn.Invoke(ctx, method, args, reply, opts...))
	another := errors.Is(err, identity.ErrUnavailable) || ctx.Err() != nil
	// Whoever is denied may have become an admin after the SVID was made, and needs a new one.
	l.give(c, another || errors.Is(err, identity.ErrUnauthenticated) || errors.Is(err, identity.ErrDenied), another)
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
	alive := c != nil && (!c.used || c.conn.GetState() == connectivity.Ready)
	if alive && (c.renew.IsZero() || now.Before(c.renew)) {
		c.calls, c.used = c.calls+1, true
		return c, nil
	}
	next, err := l.make(ctx)
	switch {
	case err == nil:
		_ = l.retire() // what it says concerns nobody any more
		l.cur = next
	case alive && now.Before(c.expires):
		c.renew = now.Add(lookAgain)
		next = c
	default:
		return nil, err
	}
	next.calls, next.used = next.calls+1, true
	return next, nil
}

// make connects to the first member that answers, beginning with the one that did so last.
func (l *lasting) make(ctx context.Context) (*lastingLink, error) {
	servers := l.a.members()
	if len(servers) == 0 {
		c, err := l.a.dial(ctx)
		return &lastingLink{link: c}, err
	}
	from := l.first % len(servers)
	c, err := l.a.reach(ctx, slices.Concat(servers[from:], servers[:from]))
	if err != nil {
		return nil, err
	}
	l.first = slices.Index(servers, c.where)
	now := l.now()
	return &lastingLink{link: c, renew: now.Add(c.expires.Sub(now) / 2)}, nil
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
