package raft

import (
	"io"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"

	hraft "github.com/hashicorp/raft"
)

// maxPool is how many idle connections raft keeps to each member: heartbeats, appends, votes.
const maxPool = 3

// transport is raft's own, with an ear on what a leader says it has committed, and one more for each connection that
// others make. It embeds *NetworkTransport
// because raft looks for optional methods: without RequestPreVote it would turn pre-vote off and only warn.
type transport struct {
	*hraft.NetworkTransport
	n    *Node
	rpcs chan hraft.RPC // what others ask, see inbound.go

	heartbeat atomic.Pointer[func(hraft.RPC)]

	mu        sync.Mutex
	pipelines map[*pipeline]struct{} // to the followers, while this member leads
}

var (
	_ hraft.Transport   = (*transport)(nil)
	_ hraft.WithPreVote = (*transport)(nil)
	_ hraft.WithClose   = (*transport)(nil)
)

func newTransport(n *Node) *transport {
	return &transport{
		NetworkTransport: hraft.NewNetworkTransportWithConfig(&hraft.NetworkTransportConfig{
			Stream:  n.mux,
			MaxPool: maxPool,
			Timeout: n.cfg.RPCTimeout,
			Logger:  newHCLog(n.log, slog.LevelWarn, n.closing.Load),
		}),
		n:         n,
		rpcs:      make(chan hraft.RPC),
		pipelines: map[*pipeline]struct{}{},
	}
}

// Consumer implements hraft.Transport.
func (t *transport) Consumer() <-chan hraft.RPC { return t.rpcs }

// target is what raft's pool of connections knows a member's present address by. Raft names a member by id and
// by the address in its configuration, but its stream layer hears only of an address: so the id goes along.
func (t *transport) target(id hraft.ServerID, configured hraft.ServerAddress) hraft.ServerAddress {
	return hraft.ServerAddress(string(id) + "\x00" + t.n.book.where(string(id), string(configured)))
}

// splitTarget undoes target.
func splitTarget(target hraft.ServerAddress) (id, address string) {
	id, address, ok := strings.Cut(string(target), "\x00")
	if !ok {
		return "", string(target)
	}
	return id, address
}

// AppendEntries implements hraft.Transport.
func (t *transport) AppendEntries(id hraft.ServerID, at hraft.ServerAddress, args *hraft.AppendEntriesRequest, resp *hraft.AppendEntriesResponse) error {
	return t.NetworkTransport.AppendEntries(id, t.target(id, at), args, resp)
}

// RequestVote implements hraft.Transport.
func (t *transport) RequestVote(id hraft.ServerID, at hraft.ServerAddress, args *hraft.RequestVoteRequest, resp *hraft.RequestVoteResponse) error {
	if t.n.gone.is() {
		return errRemoved
	}
	return t.NetworkTransport.RequestVote(id, t.target(id, at), args, resp)
}

// RequestPreVote implements hraft.WithPreVote.
func (t *transport) RequestPreVote(id hraft.ServerID, at hraft.ServerAddress, args *hraft.RequestPreVoteRequest, resp *hraft.RequestPreVoteResponse) error {
	if t.n.gone.is() {
		return errRemoved
	}
	return t.NetworkTransport.RequestPreVote(id, t.target(id, at), args, resp)
}

// InstallSnapshot implements hraft.Transport.
func (t *transport) InstallSnapshot(id hraft.ServerID, at hraft.ServerAddress, args *hraft.InstallSnapshotRequest, resp *hraft.InstallSnapshotResponse, data io.Reader) error {
	return t.NetworkTransport.InstallSnapshot(id, t.target(id, at), args, resp, data)
}

// TimeoutNow implements hraft.Transport.
func (t *transport) TimeoutNow(id hraft.ServerID, at hraft.ServerAddress, args *hraft.TimeoutNowRequest, resp *hraft.TimeoutNowResponse) error {
	return t.NetworkTransport.TimeoutNow(id, t.target(id, at), args, resp)
}
