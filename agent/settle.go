package agent

import (
	"context"
	"runtime/debug"
	"sync/atomic"
	"time"
)

const (
	settleBurst  = 256             // answers that make a burst
	settleQuiet  = 2 * time.Second // without an answer: the burst is over
	settleRounds = 5               // each collection halves the stacks that the burst has grown
)

// burst counts answers, to know when many came at once: a node that starts with thousands of workloads needs several times the
// memory for a moment that it needs for good, and the collector, which goes by growth, would leave it at that for minutes.
type burst struct {
	answers atomic.Int64
	more    chan struct{} // cap 1
}

func (b *burst) init() { b.more = make(chan struct{}, 1) }

// answered notes one answer.
func (b *burst) answered() {
	if b.answers.Add(1) >= settleBurst {
		wake(b.more)
	}
}

// runSettler gives back to the system what a burst leaves behind. Without one it does nothing at all.
func (a *Agent) runSettler(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-a.burst.more:
		}
		for quiet := false; !quiet; {
			before := a.burst.answers.Load()
			sleep(ctx, settleQuiet)
			quiet = ctx.Err() != nil || a.burst.answers.Load() == before
		}
		for i := 0; i < settleRounds && ctx.Err() == nil; i++ {
			debug.FreeOSMemory()
			sleep(ctx, 100*time.Millisecond)
		}
		a.burst.answers.Store(0)
	}
}
