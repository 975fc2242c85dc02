package raft

import (
	"sync"

	hraft "github.com/hashicorp/raft"
)

// pipeline is raft's pipeline of appends to one follower, on which the leader also says at once that an
// entry is committed. By itself raft says so with the next append, or up to twice CommitTimeout later: a
// follower would see a lone write some 75 ms late.
//
// Why this is safe: what is said is "the entry (index, term) is committed", with that entry as the previous
// one and its index as the commit index. It is said only after this member applied that entry, so it is
// true, and remains true whoever leads by the time it arrives. A follower acts on it only if it has exactly
// that entry, and then, as logs that share an entry share all before it, everything up to it.
type pipeline struct {
	hraft.AppendPipeline
	t   *transport
	out chan hraft.AppendFuture // the answers, for raft

	send sync.Mutex // one append at a time; guards the following
	last hraft.AppendEntriesRequest
	sent uint64 // index of the last entry sent

	mu    sync.Mutex
	index uint64 // the newest entry that is applied here
	term  uint64
	wake  chan struct{} // has room for one
	done  chan struct{}
	once  sync.Once
}

// pipelineRoom is for answers that raft may leave unread.
const pipelineRoom = 128

// AppendEntriesPipeline implements hraft.Transport.
func (t *transport) AppendEntriesPipeline(id hraft.ServerID, target hraft.ServerAddress) (hraft.AppendPipeline, error) {
	inner, err := t.NetworkTransport.AppendEntriesPipeline(id, t.target(id, target))
	if err != nil {
		return nil, err
	}
	p := newPipeline(t, inner)
	t.mu.Lock()
	t.pipelines[p] = struct{}{}
	t.mu.Unlock()
	t.n.spawn(p.run)
	go p.drain() // to the end of the pipeline, which raft's shutdown waits for: it must outlive the node's own
	return p, nil
}

func newPipeline(t *transport, inner hraft.AppendPipeline) *pipeline {
	return &pipeline{
		AppendPipeline: inner, t: t, out: make(chan hraft.AppendFuture, pipelineRoom),
		wake: make(chan struct{}, 1), done: make(chan struct{}),
	}
}

// Consumer implements hraft.AppendPipeline.
func (p *pipeline) Consumer() <-chan hraft.AppendFuture { return p.out }

// drain passes on the answers. Raft stops taking them when a follower refuses an append or has a newer term,
// and may go on sending before it notices; without room for the answers the second such send would wait for
// ever, with it replication to that follower, and in the end Close.
func (p *pipeline) drain() {
	for {
		select {
		case <-p.done:
			return
		case f := <-p.AppendPipeline.Consumer():
			select {
			case p.out <- f:
			case <-p.done:
				return
			}
		}
	}
}

// applied tells every pipeline of the newest applied entry. It does not block.
func (t *transport) applied(index, term uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for p := range t.pipelines {
		p.mu.Lock()
		p.index, p.term = index, term
		p.mu.Unlock()
		p.nudge()
	}
}

func (p *pipeline) nudge() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// AppendEntries implements hraft.AppendPipeline.
func (p *pipeline) AppendEntries(args *hraft.AppendEntriesRequest, resp *hraft.AppendEntriesResponse) (hraft.AppendFuture, error) {
	p.send.Lock()
	defer p.send.Unlock()
	f, err := p.AppendPipeline.AppendEntries(args, resp)
	if err == nil {
		p.last, p.sent = *args, args.PrevLogEntry
		if n := len(args.Entries); n > 0 {
			p.sent = args.Entries[n-1].Index
		}
		p.last.Entries = nil
		p.nudge() // the entry may have been committed by others while this append was on its way here
	}
	return f, err
}

// Close implements hraft.AppendPipeline.
func (p *pipeline) Close() error {
	p.once.Do(func() {
		p.t.mu.Lock()
		delete(p.t.pipelines, p)
		p.t.mu.Unlock()
		close(p.done)
	})
	return p.AppendPipeline.Close()
}

func (p *pipeline) run() {
	for {
		select {
		case <-p.done:
			return
		case <-p.t.n.ctx.Done():
			return
		case <-p.wake:
			p.sayCommitted()
		}
	}
}

// sayCommitted sends the newest commit index unless an append has carried it, or one that is under way will:
// under load it costs nothing.
func (p *pipeline) sayCommitted() {
	p.send.Lock()
	defer p.send.Unlock()
	p.mu.Lock()
	index, term := p.index, p.term
	p.mu.Unlock()
	if term != p.last.Term || p.sent != index || p.last.LeaderCommitIndex >= index {
		return
	}
	say := p.last // header, term and leader as raft sets them
	say.PrevLogEntry, say.PrevLogTerm, say.LeaderCommitIndex = index, term, index
	// Raft gets the answer like any other's; an error shows in its own next append.
	if _, err := p.AppendPipeline.AppendEntries(&say, new(hraft.AppendEntriesResponse)); err == nil {
		p.last = say
	}
}
