package store

import (
	"context"
	"fmt"

	"countersign.io/countersign/identity"
)

// maxPending is how many changes wait for a slow watcher before they become one Reset.
const maxPending = 4096

type watcher struct {
	pending []identity.Change // guarded by Store.mu
	wake    chan struct{}     // has one element while pending is not empty
}

func (w *watcher) add(changes []identity.Change) {
	if len(w.pending)+len(changes) > maxPending {
		w.pending = []identity.Change{{Revision: changes[len(changes)-1].Revision, Reset: true}}
	} else {
		w.pending = append(w.pending, changes...)
	}
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// Watch calls f with the changes of the state, in order, in batches, until ctx ends or the store is closed; the
// error says which. The first batch is a Reset and comes at once, so that a watcher reads all from there on, and
// misses nothing. The state that f reads is never older than the changes it was given. A watcher that falls too
// far behind gets a Reset in place of what it missed.
func (s *Store) Watch(ctx context.Context, f func([]identity.Change)) error {
	w := &watcher{wake: make(chan struct{}, 1)}
	s.mu.Lock()
	w.add([]identity.Change{{Revision: s.view.revision, Reset: true}})
	s.watchers[w] = struct{}{}
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.watchers, w)
		s.mu.Unlock()
	}()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-s.closed:
			return fmt.Errorf("%w: the store is closed", identity.ErrUnavailable)
		case <-w.wake:
		}
		s.mu.Lock()
		batch := w.pending
		w.pending = nil
		s.mu.Unlock()
		if ctx.Err() == nil {
			f(batch)
		}
	}
}

// publish makes committed changes visible to reads, and then known to watchers.
func (s *Store) publish(changes []change, revision uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	told := make([]identity.Change, len(changes))
	for i, c := range changes {
		told[i] = s.view.apply(c)
	}
	s.view.revision = revision
	s.tell(told)
}

// replace makes another state visible, whole.
func (s *Store) replace(v *view) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.view = v
	s.tell([]identity.Change{{Revision: v.revision, Reset: true}})
}

func (s *Store) tell(changes []identity.Change) {
	if len(changes) == 0 {
		return
	}
	for w := range s.watchers {
		w.add(changes)
	}
}
