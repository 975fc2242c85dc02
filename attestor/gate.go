package attestor

import (
	"context"
	"sync"
)

// gate lets one inspection in per name at a time. What a caller controls can make a system call wait for
// ever (a dead network file system, say), and such a call holds a thread: so it is at the most one thread
// per pod or user, and the others of that pod or user wait, with their contexts, and nobody else does.
type gate struct {
	mu   sync.Mutex
	busy map[string]chan struct{} // closed when the one inside leaves
}

func (g *gate) enter(ctx context.Context, name string) error {
	for {
		g.mu.Lock()
		inside, ok := g.busy[name]
		if !ok {
			if g.busy == nil {
				g.busy = make(map[string]chan struct{})
			}
			g.busy[name] = make(chan struct{})
		}
		g.mu.Unlock()
		if !ok {
			return nil
		}
		select {
		case <-inside:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (g *gate) leave(name string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	close(g.busy[name])
	delete(g.busy, name)
}
