package raft

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	hraft "github.com/hashicorp/raft"
)

// The first byte on a connection between members.
const (
	connRaft    = 'R' // hashicorp/raft's RPCs
	connForward = 'F' // requests to the leader, see frame.go
)

const (
	firstByteTimeout = 10 * time.Second
	maxConns         = 256 // accepted and open at once; a member has about five to each other member
	maxPeerConns     = 16  // of these, of one kind and from one member
)

// mux accepts the members' connections, tells them apart, and is raft's stream layer. It knows every open
// connection, so that closing it ends whatever waits on one.
type mux struct {
	n    *Node
	done chan struct{}

	mu     sync.Mutex
	conns  map[*trackedConn]struct{}
	warned map[string]time.Time // when the log last had something of a member's connections
	closed bool
}

var _ hraft.StreamLayer = (*mux)(nil)

func newMux(n *Node) *mux {
	return &mux{n: n, done: make(chan struct{}), conns: map[*trackedConn]struct{}{}, warned: map[string]time.Time{}}
}

// accept runs until the listener is closed.
func (m *mux) accept() {
	var wg sync.WaitGroup
	defer wg.Wait()
	backoff := 5 * time.Millisecond
	for {
		conn, err := m.n.cfg.Listener.Accept()
		if err != nil {
			select {
			case <-m.done:
				return
			default:
			}
			if errors.Is(err, net.ErrClosed) {
				m.n.fail(fmt.Errorf("accepting members' connections: %w", err))
				return
			}
			m.n.log.Warn("accepting a member's connection failed", "error", err)
			select {
			case <-m.done:
				return
			case <-time.After(backoff):
			}
			backoff = min(2*backoff, time.Second)
			continue
		}
		backoff = 5 * time.Millisecond
		tracked, err := m.track(&trackedConn{Conn: conn, peer: m.n.peer(conn), accepted: true})
		if err != nil {
			m.n.log.Warn("refusing a member's connection", "remote", conn.RemoteAddr(), "error", err)
			conn.Close()
			continue
		}
		wg.Go(func() { m.dispatch(tracked) })
	}
}

// dispatch reads the first byte and hands the connection on.
func (m *mux) dispatch(conn *trackedConn) {
	var first [1]byte
	conn.SetReadDeadline(time.Now().Add(firstByteTimeout))
	if _, err := conn.Read(first[:]); err != nil {
		conn.Close()
		return
	}
	conn.SetReadDeadline(time.Time{})
	m.sort(conn, first[0])
	switch first[0] {
	case connRaft:
		if m.n.outcast(conn.peer) {
			if m.warns(conn.peer) {
				m.n.log.Warn("refusing the raft connection of a member that this cluster does not have; end that member",
					"member", conn.peer, "remote", conn.RemoteAddr())
			}
			conn.Close()
			return
		}
		m.n.transport.serve(conn)
	case connForward:
		m.n.serve(conn)
	default:
		m.n.log.Warn("closing a connection that starts with an unknown byte; is the other member's program newer?",
			"remote", conn.RemoteAddr(), "byte", first[0])
		conn.Close()
	}
}

// dial connects to the member with this id ("": whoever answers) and says what the connection is for.
func (m *mux) dial(ctx context.Context, id, address string, kind byte) (*trackedConn, error) {
	conn, err := m.dialOnce(ctx, id, address, kind)
	switch {
	case err != nil && id != "":
		m.n.book.failed(id, address)
		return nil, fmt.Errorf("dialing member %s at %s: %w", id, address, err)
	case err != nil:
		return nil, fmt.Errorf("dialing a member at %s: %w", address, err)
	}
	return conn, nil
}

func (m *mux) dialOnce(ctx context.Context, id, address string, kind byte) (*trackedConn, error) {
	conn, err := m.n.cfg.Dial(ctx, id, address)
	if err != nil {
		return nil, err
	}
	got := m.n.peer(conn)
	if id != "" && got != "" && got != id {
		conn.Close()
		return nil, fmt.Errorf("member %q answers there: %w", got, errOther)
	}
	conn.SetWriteDeadline(time.Now().Add(m.n.cfg.RPCTimeout))
	if _, err := conn.Write([]byte{kind}); err != nil {
		conn.Close()
		return nil, err
	}
	conn.SetWriteDeadline(time.Time{})
	if got == "" {
		got = id
	}
	tracked, err := m.track(&trackedConn{Conn: conn, peer: got, kind: kind})
	if err != nil {
		conn.Close()
		return nil, err
	}
	return tracked, nil
}

// errOther: another member answers where one was looked for.
var errOther = errors.New("another member than the one dialed")

// peer is the authenticated member at the other end of a connection, "" if that is not known.
func (n *Node) peer(conn net.Conn) string {
	if n.cfg.Peer == nil {
		return ""
	}
	if t, ok := conn.(*trackedConn); ok {
		conn = t.Conn
	}
	return n.cfg.Peer(conn)
}

// Accept implements net.Listener for raft's transport, which here only dials; see inbound.
func (m *mux) Accept() (net.Conn, error) {
	<-m.done
	return nil, net.ErrClosed
}

// Dial implements hraft.StreamLayer.
func (m *mux) Dial(address hraft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	// A member that swallows packets must not keep heartbeats to it waiting once it is back.
	ctx, cancel := context.WithTimeout(m.n.ctx, min(timeout, max(time.Second, 2*m.n.cfg.HeartbeatTimeout)))
	defer cancel()
	id, at := splitTarget(address)
	return m.dial(ctx, id, at, connRaft)
}

// Addr implements net.Listener: the address that the other members know.
func (m *mux) Addr() net.Addr { return advertised(m.n.cfg.Address) }

type advertised string

func (advertised) Network() string  { return "tcp" }
func (a advertised) String() string { return string(a) }

// Close closes the listener and every connection.
func (m *mux) Close() error {
	m.mu.Lock()
	if m.closed {
		m.mu.Unlock()
		return nil
	}
	m.closed = true
	conns := m.conns
	m.conns = nil
	m.mu.Unlock()
	close(m.done)
	err := m.n.cfg.Listener.Close()
	for c := range conns {
		c.Conn.Close()
	}
	return err
}

// track registers a connection. One that was accepted may be one too many.
func (m *mux) track(t *trackedConn) (*trackedConn, error) {
	t.m, t.since, t.done = m, time.Now(), make(chan struct{})
	m.mu.Lock()
	if m.closed {
		m.mu.Unlock()
		return nil, net.ErrClosed
	}
	if t.accepted && len(m.conns) >= maxConns {
		defer m.mu.Unlock()
		return nil, fmt.Errorf("%d connections are open", len(m.conns))
	}
	m.conns[t] = struct{}{}
	m.mu.Unlock()
	m.crowd(t)
	return t, nil
}

// sort notes what an accepted connection is for.
func (m *mux) sort(t *trackedConn, kind byte) {
	m.mu.Lock()
	t.kind, t.since = kind, time.Now()
	m.mu.Unlock()
	m.crowd(t)
}

// crowd ends the oldest connection of a member that has made too many of the kind of this one: a member that was
// restarted leaves some that nothing ends soon, and one that makes more and more has only itself to harm.
func (m *mux) crowd(t *trackedConn) {
	if !t.accepted || t.peer == "" {
		return
	}
	m.mu.Lock()
	count, oldest := 0, t
	for c := range m.conns {
		if c.accepted && c.peer == t.peer && c.kind == t.kind {
			count++
			if c.since.Before(oldest.since) {
				oldest = c
			}
		}
	}
	if count > maxPeerConns {
		delete(m.conns, oldest) // at once: another may be counting next
	}
	m.mu.Unlock()
	if count <= maxPeerConns {
		return
	}
	if m.warns(t.peer) {
		m.n.log.Warn("a member has too many connections to this one; ending the oldest", "member", t.peer, "limit", maxPeerConns)
	}
	oldest.Close()
}

// warns tells whether the log is to have a word on a member's connections: every few seconds at most, or the member
// could fill the disk with it.
func (m *mux) warns(peer string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	now := time.Now()
	if last, ok := m.warned[peer]; ok && now.Sub(last) < 10*time.Second {
		return false
	}
	m.warned[peer] = now
	return true
}

// trackedConn is a connection that the mux knows, accepted or dialed.
type trackedConn struct {
	net.Conn
	m        *mux
	peer     string // who is at the other end, "" if that is not known
	accepted bool
	done     chan struct{} // closed when this side closes it
	once     sync.Once

	// Under the mux's lock:
	kind  byte // its first byte; 0 before that came
	since time.Time
	until time.Time // when it is to end; zero: not at all
	leads uint64    // the highest term in which the other end said that it leads
}

// Close closes the connection and forgets it.
func (t *trackedConn) Close() error {
	t.once.Do(func() { close(t.done) })
	t.m.mu.Lock()
	delete(t.m.conns, t)
	t.m.mu.Unlock()
	return t.Conn.Close()
}

func (t *trackedConn) ended() bool {
	select {
	case <-t.done:
		return true
	default:
		return false
	}
}

// claims notes that the other end says that it leads.
func (t *trackedConn) claims(term uint64) {
	t.m.mu.Lock()
	defer t.m.mu.Unlock()
	t.leads = max(t.leads, term)
}
