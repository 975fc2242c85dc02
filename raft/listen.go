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
)

// mux accepts the members' connections, tells them apart, and is raft's stream layer. It knows every open
// connection, so that closing it ends whatever waits on one.
type mux struct {
	n    *Node
	raft chan net.Conn // accepted connections that speak raft
	done chan struct{}

	mu     sync.Mutex
	conns  map[*trackedConn]struct{}
	closed bool
}

var _ hraft.StreamLayer = (*mux)(nil)

func newMux(n *Node) *mux {
	return &mux{n: n, raft: make(chan net.Conn), done: make(chan struct{}), conns: map[*trackedConn]struct{}{}}
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
		tracked, err := m.track(conn, maxConns)
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
	switch first[0] {
	case connRaft:
		if peer := m.n.peer(conn); m.n.outcast(peer) {
			m.n.log.Warn("refusing the raft connection of a member of a cluster that this one no longer belongs to; end that member",
				"member", peer, "remote", conn.RemoteAddr())
			conn.Close()
			return
		}
		select {
		case m.raft <- conn:
		case <-m.done:
			conn.Close()
		}
	case connForward:
		m.n.serve(conn)
	default:
		m.n.log.Warn("closing a connection that starts with an unknown byte; is the other member's program newer?",
			"remote", conn.RemoteAddr(), "byte", first[0])
		conn.Close()
	}
}

// outcast tells whether a member is not of this cluster for sure. That a member is not in the configuration does
// not say so: it may have been added since, and lead. But it does if it was left behind by Recover, or if this
// member is the only one with a vote: any change would then have to come from itself. Such a member, with a
// folder from before, could have a newer term, and overwrite this one's log.
func (n *Node) outcast(peer string) bool {
	if peer == "" {
		return false
	}
	members := n.Members()
	sole := len(members) > 0
	for _, m := range members {
		if m.ID == peer {
			return false
		}
		sole = sole && (m.ID == n.cfg.ID) == m.Voter
	}
	return sole || n.left[peer]
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
	if got := m.n.peer(conn); id != "" && got != "" && got != id {
		conn.Close()
		return nil, fmt.Errorf("member %q answers there: %w", got, errOther)
	}
	conn.SetWriteDeadline(time.Now().Add(m.n.cfg.RPCTimeout))
	if _, err := conn.Write([]byte{kind}); err != nil {
		conn.Close()
		return nil, err
	}
	conn.SetWriteDeadline(time.Time{})
	tracked, err := m.track(conn, 0)
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

// Accept implements net.Listener for raft.
func (m *mux) Accept() (net.Conn, error) {
	select {
	case conn := <-m.raft:
		return conn, nil
	case <-m.done:
		return nil, net.ErrClosed
	}
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

// track registers a connection; limit 0 is none.
func (m *mux) track(conn net.Conn, limit int) (*trackedConn, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return nil, net.ErrClosed
	}
	if limit > 0 && len(m.conns) >= limit {
		return nil, fmt.Errorf("%d connections are open", len(m.conns))
	}
	t := &trackedConn{Conn: conn, m: m}
	m.conns[t] = struct{}{}
	return t, nil
}

type trackedConn struct {
	net.Conn
	m *mux
}

// Close closes the connection and forgets it.
func (t *trackedConn) Close() error {
	t.m.mu.Lock()
	delete(t.m.conns, t)
	t.m.mu.Unlock()
	return t.Conn.Close()
}
