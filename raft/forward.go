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

// ask forwards a request to the leader, a member, at its address. Connecting ends with wait, the request with ctx.
func (d *dialer) ask(ctx, wait context.Context, to peerAddress, req request) (answer, error) {
	l, err := d.link(wait, to)
	if err != nil {
		return answer{}, fmt.Errorf("%w: %w", errNotExecuted, err)
	}
	return l.ask(ctx, req)
}

// link is the live connection to the leader, made now if need be.
func (d *dialer) link(ctx context.Context, to peerAddress) (*link, error) {
	if l := d.live(to); l != nil {
		return l, nil
	}
	select {
	case <-d.turn:
		defer func() { d.turn <- struct{}{} }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if l := d.live(to); l != nil { // made while waiting for the turn
		return l, nil
	}
	l, err := d.n.connect(ctx, to)
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

func (d *dialer) live(to peerAddress) *link {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.current == nil || d.current.to != to || d.current.dead() {
		return nil
	}
	return d.current
}

// link is a connection that carries many requests at once.
type link struct {
	n    *Node
	to   peerAddress
	conn net.Conn

	write sync.Mutex // one frame at a time

	mu      sync.Mutex
	next    uint64
	pending map[uint64]chan frame
	retired bool
	err     error         // why it is dead
	done    chan struct{} // closed with err set

	used time.Time // by contacts, under its lock

	greet    sync.Once
	greeted  chan struct{} // closed when the other side has said its protocol
	protocol uint32        // set before greeted is closed
}

// connect dials a forwarding connection to a member ("" as id: whoever answers) and starts reading answers.
func (n *Node) connect(ctx context.Context, to peerAddress) (*link, error) {
	ctx, cancel := context.WithTimeout(ctx, n.cfg.RPCTimeout)
	defer cancel()
	conn, err := n.mux.dial(ctx, to.ID, to.Address, connForward)
	if err != nil {
		return nil, err
	}
	l := &link{
		n: n, to: to, conn: conn, pending: map[uint64]chan frame{},
		done: make(chan struct{}), greeted: make(chan struct{}),
	}
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

// errOld: the other member runs a program that does not know the request. Nothing was sent.
var errOld = errors.New("the other member runs an older program")

// knows waits until the other side has said its protocol, and tells whether it has this request.
func (l *link) knows(ctx context.Context, k frameKind) error {
	if k.since() == 1 {
		return nil
	}
	select {
	case <-l.greeted:
	case <-l.done:
		return fmt.Errorf("%w: the connection to %s ended", errNotExecuted, l.to.Address)
	case <-ctx.Done():
		return fmt.Errorf("%w: %w", errNotExecuted, ctx.Err())
	}
	if l.protocol < k.since() {
		return errOld
	}
	return nil
}

// ask sends a request and waits for its answer.
func (l *link) ask(ctx context.Context, req request) (answer, error) {
	if err := l.knows(ctx, req.kind); err != nil {
		return answer{}, err
	}
	reply := make(chan frame, 1)
	l.mu.Lock()
	if l.err != nil || l.retired {
		l.mu.Unlock()
		return answer{}, fmt.Errorf("%w: the connection to %s ended", errNotExecuted, l.to.Address)
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
		return answer{}, fmt.Errorf("%w: sending to the leader at %s: %w", ErrUnknownOutcome, l.to.Address, err)
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
		return answer{}, fmt.Errorf("%w: the connection to the leader at %s ended before its answer: %w", ErrUnknownOutcome, l.to.Address, l.err)
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
		return fmt.Errorf("the leader at %s: %s: %w", l.to.Address, f.payload, sentinel)
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
	for { // the first at once: its answer says which protocol the other side speaks
		if err := l.send(b); err != nil {
			l.fail(err)
			return
		}
		select {
		case <-l.done:
			return
		case <-tick.C:
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
				l.n.log.Warn("closing the connection to the leader: its answer makes no sense", "address", l.to.Address, "error", err)
			}
			l.fail(err)
			return
		}
		switch f.kind {
		case kindPong:
			l.greet.Do(func() {
				l.protocol = 1
				if len(f.payload) > 0 {
					l.protocol = uint32(f.payload[0])
				}
				close(l.greeted)
			})
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
