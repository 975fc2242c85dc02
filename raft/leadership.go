package raft

import (
	"context"
	"sync"
	"time"

	hraft "github.com/hashicorp/raft"
)

// leadership says when this member leads with all earlier writes applied, and wakes those who wait for that
// or for any leader.
type leadership struct {
	mu      sync.Mutex
	current context.Context // of the present reign; nil while not leading
	end     context.CancelFunc
	changed chan struct{} // closed and replaced when current changes
	seen    chan struct{} // closed and replaced when the cluster's leader changes
}

func (l *leadership) init() {
	l.changed = make(chan struct{})
	l.seen = make(chan struct{})
}

func (l *leadership) set(ctx context.Context, end context.CancelFunc) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.end != nil {
		l.end()
	}
	l.current, l.end = ctx, end
	close(l.changed)
	l.changed = make(chan struct{})
}

func (l *leadership) get() (reign context.Context, changed <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.current, l.changed
}

// clear is for a member that does not lead.
func (l *leadership) clear() {
	var none context.Context
	l.set(none, nil)
}

func (l *leadership) leaderSeen() {
	l.mu.Lock()
	defer l.mu.Unlock()
	close(l.seen)
	l.seen = make(chan struct{})
}

func (l *leadership) whenSeen() <-chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.seen
}

// watchLeadership follows raft's word on whether this member leads.
func (n *Node) watchLeadership(notify <-chan bool) {
	defer n.lead.clear()
	for {
		select {
		case <-n.ctx.Done():
			return
		case leads := <-notify:
			if leads {
				n.ascend()
				continue
			}
			n.lead.clear()
			// The last moment at which a quorum was certain is a lease before the one it was missed at.
			n.fresh.ledUntil(time.Now().Add(-n.cfg.LeaseTimeout))
		}
	}
}

// ascend waits until a new leader has applied its whole log, and announces it. Elected is not yet up to date:
// a member that was restarted and elected first replays.
func (n *Node) ascend() {
	term := n.raft.CurrentTerm()
	if err := n.await(n.raft.Barrier(0)); err != nil {
		return // leadership is lost again; raft says so on the channel
	}
	if n.raft.State() != hraft.Leader || n.raft.CurrentTerm() != term {
		return
	}
	reign, end := context.WithCancel(n.ctx)
	n.fresh.leads(term)
	n.lead.set(reign, end)
	n.spawn(func() { n.watchOver(reign) })
}

// watchLeader wakes those who wait for a leader.
func (n *Node) watchLeader() {
	seen := make(chan hraft.Observation, 8)
	observer := hraft.NewObserver(seen, false, func(o *hraft.Observation) bool {
		l, ok := o.Data.(hraft.LeaderObservation)
		return ok && l.LeaderID != ""
	})
	n.raft.RegisterObserver(observer)
	n.spawn(func() {
		defer n.raft.DeregisterObserver(observer)
		for {
			select {
			case <-n.ctx.Done():
				return
			case <-seen:
				n.lead.leaderSeen()
			}
		}
	})
}

// Leadership runs f whenever this member leads, each time with a context that ends when it no longer does,
// until ctx ends or the node closes. When f starts, every write acknowledged under earlier leaders is
// applied here. f MUST return soon after its context ends; it is never run twice at once by one call.
func (n *Node) Leadership(ctx context.Context, f func(context.Context)) {
	for {
		reign, changed := n.lead.get()
		if reign != nil && reign.Err() == nil {
			fctx, cancel := context.WithCancel(ctx)
			stop := context.AfterFunc(reign, cancel)
			f(fctx)
			stop()
			cancel()
		}
		// Wait for the end of this reign, or the start of the next; a call that returned early is not repeated.
		select {
		case <-ctx.Done():
			return
		case <-n.ctx.Done():
			return
		case <-changed:
		}
	}
}

// IsLeader tells whether this member leads and has applied every earlier write. It may have lost leadership
// without knowing it yet, for at most the lease.
func (n *Node) IsLeader() bool {
	reign, _ := n.lead.get()
	return reign != nil && reign.Err() == nil && n.raft.State() == hraft.Leader
}

// Leader is the leader as far as this member knows, or two empty strings.
func (n *Node) Leader() (id, address string) {
	a, i := n.raft.LeaderWithID()
	return string(i), string(a)
}
