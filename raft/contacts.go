package raft

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
)

// contacts keeps a forwarding connection to each member that is asked about itself: by the leader all the time,
// by others now and then.
type contacts struct {
	n *Node

	mu     sync.Mutex
	links  map[string]*link
	closed bool
}

func (c *contacts) init(n *Node) { c.n, c.links = n, map[string]*link{} }

func (c *contacts) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	for _, l := range c.links {
		l.fail(ErrClosed)
	}
	clear(c.links)
}

// to is a live connection to a member, made now if need be.
func (c *contacts) to(ctx context.Context, id, configured string) (*link, error) {
	c.mu.Lock()
	l := c.links[id]
	if l != nil {
		l.used = time.Now()
	}
	c.mu.Unlock()
	if l != nil && !l.dead() {
		return l, nil
	}
	to := peerAddress{id, c.n.book.where(id, configured)}
	l, err := c.n.connect(ctx, to)
	if err != nil {
		return nil, err
	}
	c.n.book.found(id, to.Address)
	return l, c.keep(id, l)
}

// keep takes a new connection in the place of the former.
func (c *contacts) keep(id string, l *link) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		l.fail(ErrClosed)
		return ErrClosed
	}
	if former := c.links[id]; former != nil {
		former.retire()
	}
	l.used = time.Now()
	c.links[id] = l
	return nil
}

// drop ends a connection that did not answer in time: the next question makes a new one.
func (c *contacts) drop(id string, l *link) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.links[id] == l {
		delete(c.links, id)
	}
	l.retire()
}

// only ends the connections to all members but these.
func (c *contacts) only(ids map[string]bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for id, l := range c.links {
		if !ids[id] {
			delete(c.links, id)
			l.retire()
		}
	}
}

// idleAfter is how long a connection stays that nobody asks on: the leader asks all the time, others seldom.
const idleAfter = 30 * time.Second

// expire ends the connections that nobody has used for a while.
func (c *contacts) expire(now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for id, l := range c.links {
		if now.Sub(l.used) > idleAfter {
			delete(c.links, id)
			l.retire()
		}
	}
}

// askMember asks a member, on a connection that stays. A member that was restarted has ended the old one, which
// may show only now: then a new one is tried.
func (n *Node) askMember(ctx context.Context, m Member, req request) (answer, error) {
	for again := false; ; again = true {
		l, err := n.peers.to(ctx, m.ID, m.Address)
		if err != nil {
			return answer{}, err
		}
		a, err := l.ask(ctx, req)
		if err == nil || errors.Is(err, errOld) || errors.Is(err, ErrRefused) {
			return a, err
		}
		n.peers.drop(m.ID, l)
		if again || ctx.Err() != nil {
			// The member was there, or it would not have been connected to: a question that came to nothing says nothing of where it is.
			return answer{}, fmt.Errorf("asking member %s at %s: %w", m.ID, l.to.Address, err)
		}
	}
}
