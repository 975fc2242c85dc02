package raft

import (
	"context"
	"sync"
	"testing"
	"time"

	hraft "github.com/hashicorp/raft"
)

// narrow is a pipeline that waits, like raft's own, until each answer is taken or it is closed.
type narrow struct {
	sent   chan *hraft.AppendEntriesRequest
	out    chan hraft.AppendFuture
	once   sync.Once
	closed chan struct{}
}

func newNarrow() *narrow {
	return &narrow{sent: make(chan *hraft.AppendEntriesRequest, 1024), out: make(chan hraft.AppendFuture), closed: make(chan struct{})}
}

func (n *narrow) AppendEntries(args *hraft.AppendEntriesRequest, _ *hraft.AppendEntriesResponse) (hraft.AppendFuture, error) {
	select {
	case <-n.closed:
		return nil, hraft.ErrPipelineShutdown
	default:
	}
	n.sent <- args
	select {
	case n.out <- nil:
		return nil, nil
	case <-n.closed:
		return nil, hraft.ErrPipelineShutdown
	}
}
func (n *narrow) Consumer() <-chan hraft.AppendFuture { return n.out }
func (n *narrow) Close() error                        { n.once.Do(func() { close(n.closed) }); return nil }

func testPipeline(t *testing.T) (*pipeline, *narrow) {
	t.Helper()
	n := &Node{}
	n.ctx, n.cancel = context.WithCancel(context.Background())
	inner := newNarrow()
	p := newPipeline(&transport{n: n, pipelines: map[*pipeline]struct{}{}}, inner)
	p.t.pipelines[p] = struct{}{}
	n.spawn(p.run)
	go p.drain()
	t.Cleanup(func() { p.Close(); n.cancel(); n.wg.Wait() })
	return p, inner
}

func entry(index, term uint64) *hraft.Log { return &hraft.Log{Index: index, Term: term} }

// TestPipelineNobodyReads: appends go on when raft no longer takes the answers.
func TestPipelineNobodyReads(t *testing.T) {
	p, _ := testPipeline(t)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := range uint64(100) {
			p.AppendEntries(&hraft.AppendEntriesRequest{Term: 1, Entries: []*hraft.Log{entry(i+1, 1)}}, nil)
		}
	}()
	select {
	case <-done:
	case <-time.After(patience):
		t.Fatal("an append waits for ever")
	}
}

// TestPipelineSays: what is said about commits is true and needed, and nothing else is said.
func TestPipelineSays(t *testing.T) {
	p, inner := testPipeline(t)
	next := func() *hraft.AppendEntriesRequest {
		t.Helper()
		select {
		case r := <-inner.sent:
			return r
		case <-time.After(patience):
			t.Fatal("nothing was sent")
			return nil
		}
	}
	header := hraft.RPCHeader{ProtocolVersion: 3, ID: []byte("m1"), Addr: []byte("a:1")}
	send := func(term, commit uint64, entries ...*hraft.Log) {
		p.AppendEntries(&hraft.AppendEntriesRequest{RPCHeader: header, Term: term, PrevLogEntry: entries[0].Index - 1, PrevLogTerm: term, Entries: entries, LeaderCommitIndex: commit}, nil)
		next()
	}
	send(3, 6, entry(7, 3), entry(8, 3))

	p.t.applied(7, 3) // entry 8 is under way: its commit will be said
	p.t.applied(8, 2) // an entry of an earlier term under that index: not the one that was sent
	p.t.applied(9, 3) // not sent to this follower yet
	p.t.applied(8, 3) // this one
	r := next()
	if r.Term != 3 || r.PrevLogEntry != 8 || r.PrevLogTerm != 3 || r.LeaderCommitIndex != 8 || len(r.Entries) != 0 || string(r.ID) != "m1" || string(r.Addr) != "a:1" {
		t.Fatalf("said %+v", r)
	}
	p.t.applied(8, 3) // said already
	send(3, 8, entry(9, 3))

	// Committed by the others before it was sent here: said after the append.
	p.t.applied(10, 3)
	p.AppendEntries(&hraft.AppendEntriesRequest{RPCHeader: header, Term: 3, PrevLogEntry: 9, PrevLogTerm: 3, Entries: []*hraft.Log{entry(10, 3)}, LeaderCommitIndex: 9}, nil)
	if r := next(); len(r.Entries) != 1 {
		t.Fatalf("sent %+v", r)
	}
	if r := next(); r.PrevLogEntry != 10 || r.LeaderCommitIndex != 10 || len(r.Entries) != 0 {
		t.Fatalf("said %+v", r)
	}
	p.Close()
	p.Close()
	p.t.applied(10, 3)
	if len(p.t.pipelines) != 0 || len(inner.sent) != 0 {
		t.Error("a closed pipeline is still told")
	}
}
