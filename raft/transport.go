package raft

import (
	"log/slog"
	"sync"

	hraft "github.com/hashicorp/raft"
)

// maxPool is how many idle connections raft keeps to each member: heartbeats, appends, votes.
const maxPool = 3

// transport is raft's own, with an ear on what a leader says it has committed. It embeds *NetworkTransport
// because raft looks for optional methods: without RequestPreVote it would turn pre-vote off and only warn.
type transport struct {
	*hraft.NetworkTransport
	n    *Node
	rpcs chan hraft.RPC

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

// pump passes on what comes in, and notes the leader's commit index on the way. Heartbeats do not come by
// here (raft takes them aside, and they carry no commit index).
func (t *transport) pump() {
	for {
		select {
		case <-t.n.ctx.Done():
			return
		case rpc := <-t.NetworkTransport.Consumer():
			if a, ok := rpc.Command.(*hraft.AppendEntriesRequest); ok {
				t.n.fresh.heard(a.Term, a.LeaderCommitIndex)
			}
			select {
			case t.rpcs <- rpc:
			case <-t.n.ctx.Done():
				return
			}
		}
	}
}
