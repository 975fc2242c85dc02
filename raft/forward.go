package raft

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"
)

// dialer keeps the one connection to the leader that forwarded requests share.
type dialer struct {
	n *Node

	turn chan struct{} // holds one token: who has it may dial; waiting for it ends with the caller's context

	mu      sync.Mutex
	current *link
	closed  bool
}

func (d *dialer) init(n *Node) {
	d.n = n
	d.turn = make(chan struct{}, 1)
	d.turn <- struct{}{}
}

func (d *dialer) close() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.closed = true
	if d.current != nil {
		d.current.fail(ErrClosed)
		d.current = nil
	}
}

// ask forwards a request to the leader at address. Connecting ends with wait, the request with ctx.
func (d *dialer) ask(ctx, wait context.Context, address string, req request) (answer, error) {
	l, err := d.link(wait, address)
	if err != nil {
		return answer{}, fmt.Errorf("%w: %w", errNotExecuted, err)
	}
	return l.ask(ctx, req)
}

// link is the live connection to address, made now if need be.
func (d *dialer) link(ctx context.Context, address string) (*link, error) {
	if l := d.live(address); l != nil {
		return l, nil
	}
	select {
	case <-d.turn:
		defer func() { d.turn <- struct{}{} }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if l := d.live(address); l != nil { // made while waiting for the turn
		return l, nil
	}
	l, err := d.n.connect(ctx, address)
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		l.fail(ErrClosed)
		return nil, ErrClosed
	}
	if d.current != nil {
		d.current.retire() // the former leader may still answer what it was asked
	}
	d.current = l
	return l, nil
}

func (d *dialer) live(address string) *link {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.current == nil || d.current.address != address || d.current.dead() {
		return nil
	}
	return d.current
}

// link is a connection that carries many requests at once.
type link struct {
	n       *Node
	address string
	conn    net.Conn

	write sync.Mutex // one frame at a time

	mu      sync.Mutex
	next    uint64
	pending map[uint64]chan frame
	retired bool
	err     error         // why it is dead
	done    chan struct{} // closed with err set
}

// connect dials a forwarding connection and starts reading answers.
func (n *Node) connect(ctx context.Context, address string) (*link, error) {
	ctx, cancel := context.WithTimeout(ctx, n.cfg.RPCTimeout)
	defer cancel()
	conn, err := n.mux.dial(ctx, address, connForward)
	if err != nil {
		return nil, err
	}
	l := &link{n: n, address: address, conn: conn, pending: map[uint64]chan frame{}, done: make(chan struct{})}
	n.spawn(l.read)
	n.spawn(l.ping)
	return l, nil
}

func (l *link) dead() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.err != nil || l.retired
}

// fail ends the connection: what is pending on it has an unknown outcome.
func (l *link) fail(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err != nil {
		return
	}
	l.err = err
	close(l.done)
	l.conn.Close()
}

// retire takes no further request and closes once the pending ones are answered.
func (l *link) retire() {
	l.mu.Lock()
	l.retired = true
	idle := len(l.pending) == 0
	l.mu.Unlock()
	if idle {
		l.fail(net.ErrClosed)
	}
}

// ask sends a request and waits for its answer.
func (l *link) ask(ctx context.Context, req request) (answer, error) {
	reply := make(chan frame, 1)
	l.mu.Lock()
	if l.err != nil || l.retired {
		l.mu.Unlock()
		return answer{}, fmt.Errorf("%w: the connection to %s ended", errNotExecuted, l.address)
	}
	l.next++
	id := l.next
	l.pending[id] = reply
	l.mu.Unlock()
	defer l.forget(id)

	b, err := appendFrame(make([]byte, 0, frameHeader+len(req.payload)), frame{req.kind, id, req.payload})
	if err != nil {
		return answer{}, err
	}
	if ctx.Err() != nil {
		return answer{}, fmt.Errorf("%w: %w", errNotExecuted, ctx.Err())
	}
	// From the first byte on, the leader may have it all.
	if err := l.send(b); err != nil {
		l.fail(err)
		return answer{}, fmt.Errorf("%w: sending to the leader at %s: %w", ErrUnknownOutcome, l.address, err)
	}
	select {
	case f := <-reply:
		return l.outcome(f)
	case <-ctx.Done():
		return answer{}, l.n.unknown(ctx)
	case <-l.done:
	}
	select { // an answer that came just before the end counts
	case f := <-reply:
		return l.outcome(f)
	default:
		return answer{}, fmt.Errorf("%w: the connection to the leader at %s ended before its answer: %w", ErrUnknownOutcome, l.address, l.err)
	}
}

func (l *link) forget(id uint64) {
	l.mu.Lock()
	delete(l.pending, id)
	idle := l.retired && len(l.pending) == 0
	l.mu.Unlock()
	if idle {
		l.fail(net.ErrClosed)
	}
}

func (l *link) send(b []byte) error {
	l.write.Lock()
	defer l.write.Unlock()
	l.conn.SetWriteDeadline(time.Now().Add(l.n.cfg.RPCTimeout))
	_, err := l.conn.Write(b)
	return err
}

func (l *link) outcome(f frame) (answer, error) {
	why := func(sentinel error) error {
		return fmt.Errorf("the leader at %s: %s: %w", l.address, f.payload, sentinel)
	}
	switch f.kind {
	case kindOK:
		return parseAnswer(f.payload)
	case kindNotExecuted:
		return answer{}, why(errNotExecuted)
	case kindRefused:
		return answer{}, why(ErrRefused)
	default:
		return answer{}, why(ErrUnknownOutcome)
	}
}

// pingEvery is also what a link's patience is measured in: a leader that does not answer four pings is gone,
// even if nothing closes the connection.
func (n *Node) pingEvery() time.Duration { return n.cfg.HeartbeatTimeout }

func (l *link) ping() {
	tick := time.NewTicker(l.n.pingEvery())
	defer tick.Stop()
	b, err := appendFrame(nil, frame{kind: kindPing})
	if err != nil {
		l.fail(err)
		return
	}
	for {
		select {
		case <-l.done:
			return
		case <-tick.C:
			if err := l.send(b); err != nil {
				l.fail(err)
				return
			}
		}
	}
}

func (l *link) read() {
	r := bufio.NewReader(l.conn)
	for {
		l.conn.SetReadDeadline(time.Now().Add(4 * l.n.pingEvery()))
		f, err := readFrame(r)
		if err != nil {
			if errors.Is(err, errFrame) {
				l.n.log.Warn("closing the connection to the leader: its answer makes no sense", "address", l.address, "error", err)
			}
			l.fail(err)
			return
		}
		switch f.kind {
		case kindPong:
			continue
		case kindGoodbye:
			l.retire()
			continue
		}
		l.mu.Lock()
		reply := l.pending[f.id]
		delete(l.pending, f.id) // a second answer to one request finds nobody
		l.mu.Unlock()
		if reply != nil {
			reply <- f
		}
	}
}
