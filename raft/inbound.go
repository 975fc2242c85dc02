package raft

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	hraft "github.com/hashicorp/raft"
)

// inbound is the stream layer of a transport that has one connection: one that a member made to this one. Raft's
// transport does not say which connection a request came on, and only so it is known whose it is.
type inbound struct {
	conn   *trackedConn
	taken  atomic.Bool
	once   sync.Once
	closed chan struct{}
}

var _ hraft.StreamLayer = (*inbound)(nil)

// Accept implements net.Listener.
func (i *inbound) Accept() (net.Conn, error) {
	if !i.taken.Swap(true) {
		return i.conn, nil
	}
	<-i.closed
	return nil, net.ErrClosed
}

// Close implements net.Listener.
func (i *inbound) Close() error {
	i.once.Do(func() { close(i.closed) })
	return i.conn.Close()
}

// Addr implements net.Listener.
func (i *inbound) Addr() net.Addr { return i.conn.LocalAddr() }

// Dial implements hraft.StreamLayer.
func (i *inbound) Dial(hraft.ServerAddress, time.Duration) (net.Conn, error) {
	return nil, errors.New("this transport only answers")
}

// serve reads raft's requests from a connection until it ends, and passes them on.
func (t *transport) serve(conn *trackedConn) {
	in := hraft.NewNetworkTransportWithConfig(&hraft.NetworkTransportConfig{
		Stream:  &inbound{conn: conn, closed: make(chan struct{})},
		Timeout: t.n.cfg.RPCTimeout,
		Logger:  newHCLog(t.n.log, slog.LevelWarn, func() bool { return conn.ended() || t.n.closing.Load() }),
	})
	defer in.Close()
	if beat := t.heartbeat.Load(); beat != nil { // raft takes heartbeats aside: they must not wait for a disk
		in.SetHeartbeatHandler(func(rpc hraft.RPC) {
			if t.admit(conn, rpc) {
				(*beat)(rpc)
			}
		})
	}
	for {
		select {
		case <-t.n.ctx.Done():
			return
		case <-conn.done:
			return
		case rpc := <-in.Consumer():
			if !t.admit(conn, rpc) {
				return
			}
			if a, ok := rpc.Command.(*hraft.AppendEntriesRequest); ok {
				t.n.fresh.heard(a.Term, a.LeaderCommitIndex)
			}
			select {
			case t.rpcs <- rpc:
			case <-conn.done:
				return
			case <-t.n.ctx.Done():
				return
			}
		}
	}
}

// SetHeartbeatHandler implements hraft.Transport. Raft calls it before the first connection is taken.
func (t *transport) SetHeartbeatHandler(f func(hraft.RPC)) { t.heartbeat.Store(&f) }

// admit checks a request before raft sees it, and ends the connection if it is not to: without an answer, since that
// would say this member's term.
func (t *transport) admit(conn *trackedConn, rpc hraft.RPC) bool {
	err := t.check(conn, rpc)
	if err == nil {
		return true
	}
	if !conn.ended() && t.n.mux.warns(conn.peer) {
		t.n.log.Warn("ending the raft connection of a member", "member", conn.peer, "remote", conn.RemoteAddr(), "error", err)
	}
	conn.Close()
	rpc.Respond(nil, err) // whoever waits for it finds the connection closed
	return false
}

func (t *transport) check(conn *trackedConn, rpc hraft.RPC) error {
	if conn.ended() {
		return net.ErrClosed
	}
	if h, ok := rpc.Command.(hraft.WithRPCHeader); conn.peer != "" {
		if !ok || string(h.GetRPCHeader().ID) != conn.peer {
			return errors.New("it sends requests in another member's name")
		}
	}
	var term uint64
	switch c := rpc.Command.(type) {
	case *hraft.AppendEntriesRequest:
		term = c.Term
		conn.claims(term)
	case *hraft.InstallSnapshotRequest:
		term = c.Term
		conn.claims(term)
	case *hraft.RequestVoteRequest:
		term = c.Term
	case *hraft.RequestPreVoteRequest:
		term = c.Term
	default: // hand-over of leadership, which has no term
		return nil
	}
	if own := t.n.raft.CurrentTerm(); eraOf(term) < eraOf(own) {
		return fmt.Errorf("its term %d is of the cluster from before a recovery or restore, and this one is at term %d; end that member, and join it again with an empty data folder", term, own)
	}
	return nil
}

// eraBits is how many bits of a term count the elections of an era. A cluster begins in era 0, and in a new one each
// time that it is recovered or restored: no member of an earlier one can have its term by its own elections.
const eraBits = 20

func eraOf(term uint64) uint64 { return term >> eraBits }

// nextEra is the first term of an era above that of a term: the time in Unix seconds, if that is later.
func nextEra(term uint64, now time.Time) uint64 {
	return max(eraOf(term)+1, uint64(max(0, now.Unix()))) << eraBits
}
