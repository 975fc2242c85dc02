package agent

import (
	"container/heap"
	"context"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"countersign.io/countersign/identity"
)

// timers is a heap of workloads by due.
type timers []*workload

func (t timers) Len() int           { return len(t) }
func (t timers) Less(i, j int) bool { return t[i].due.Before(t[j].due) }
func (t timers) Swap(i, j int)      { t[i], t[j] = t[j], t[i]; t[i].index, t[j].index = i, j }

// Push and Pop are for container/heap.
func (t *timers) Push(x any) { w := x.(*workload); w.index = len(*t); *t = append(*t, w) }

// Pop is for container/heap.
func (t *timers) Pop() any {
	old := *t
	w := old[len(old)-1]
	old[len(old)-1] = nil
	*t = old[:len(old)-1]
	w.index = -1
	return w
}

// schedule sets the workload's one timer: to at, or sooner if an SVID or the grace after a change ends before.
func (c *cache) schedule(w *workload, at time.Time) {
	if w.gone != nil {
		return
	}
	if e := w.expires(); !e.IsZero() && e.Before(at) {
		at = e
	}
	if !w.changedAt.IsZero() && w.changedAt.Add(changedGrace).Before(at) {
		at = w.changedAt.Add(changedGrace)
	}
	w.due = at
	if w.index < 0 {
		heap.Push(&c.timers, w)
	} else {
		heap.Fix(&c.timers, w.index)
	}
	if w.index == 0 {
		wake(c.rearm)
	}
}

// next is when the first timer is due; zero: there is none.
func (c *cache) next() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.timers) == 0 {
		return time.Time{}
	}
	return c.timers[0].due
}

// expire handles every timer that is due: what has ended is dropped, and what is to be renewed is returned.
func (c *cache) expire(now time.Time) (renew []*workload) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for len(c.timers) > 0 && !now.Before(c.timers[0].due) {
		w := c.timers[0]
		if len(w.svids) > 0 && !now.Before(w.expires()) {
			rest := slices.DeleteFunc(slices.Clone(w.svids), func(s identity.X509SVID) bool { return !now.Before(s.NotAfter) })
			if len(rest) == 0 {
				c.drop(w, fmt.Errorf("%w: the SVID has expired and no member could renew it", identity.ErrUnavailable))
				continue
			}
			c.replace(w, rest)
			w.update = nil
			c.watch(w.handle)
			c.save(w.key)
			c.tell(w)
		}
		switch {
		case !w.changedAt.IsZero() && !now.Before(w.changedAt.Add(changedGrace)):
			c.drop(w, fmt.Errorf("%w: its entries have changed and no member could confirm its identity for %v", identity.ErrUnavailable, changedGrace))
		case !w.changedAt.IsZero() && len(w.streams) == 0 && w.flight == nil:
			c.drop(w, fmt.Errorf("%w: its entries have changed: ask again", identity.ErrUnavailable))
		case w.flight != nil: // settle says when again
			c.schedule(w, now.Add(maxBackoff))
		case len(w.streams) == 0: // not renewed: whoever comes asks anew
			c.schedule(w, w.expires())
		default:
			renew = append(renew, w)
			c.schedule(w, c.retryAt(w, now)) // in case nothing comes of it
		}
	}
	return renew
}

// runTimers renews and expires until ctx ends.
func (a *Agent) runTimers(ctx context.Context) error {
	var workers errgroup.Group
	workers.SetLimit(renewWorkers)
	defer workers.Wait()
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	var waiting []*workload // for a worker
	for {
		waiting = append(waiting, a.cache.expire(time.Now())...)
		for len(waiting) > 0 {
			w := waiting[0]
			if !workers.TryGo(func() error { a.renew(ctx, w); return nil }) {
				break
			}
			waiting = waiting[1:]
		}
		wait := time.Hour
		if next := a.cache.next(); !next.IsZero() {
			wait = time.Until(next)
		}
		if len(waiting) > 0 {
			wait = min(wait, 5*time.Millisecond)
		}
		timer.Reset(max(wait, 0))
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		case <-a.cache.rearm:
		}
	}
}

// renew asks anew for a workload, with fresh evidence from the first of its callers that can be attested. One that is no
// longer what it was loses its stream.
func (a *Agent) renew(ctx context.Context, w *workload) {
	for _, s := range a.cache.streamsOf(w) {
		actx, cancel := context.WithTimeout(ctx, attestTimeout)
		wl, err := identify(actx, s.attest)
		cancel()
		switch {
		case ctx.Err() != nil:
			return
		case err != nil && transient(err):
			a.log.Warn("could not attest a caller anew: trying another of the workload's, or later", "error", err)
			continue
		case err != nil:
			a.cache.endStream(s, denied(err))
			continue
		}
		err = checkEvidence(&wl.Evidence)
		if wl.Key != w.who {
			err = errMoved()
		}
		if err != nil {
			wl.Wipe()
			a.cache.endStream(s, err)
			continue
		}
		if f := a.cache.again(w); f != nil {
			a.launch(ctx, w, f, wl.Evidence)
		}
		wl.Wipe()
		return
	}
}

// errMoved ends the stream of a caller that is another workload now, such as a process that has executed another program.
func errMoved() error {
	return fmt.Errorf("%w: the caller is no longer the workload that opened this stream: connect again", identity.ErrUnavailable)
}

func (c *cache) streamsOf(w *workload) []*stream {
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []*stream
	for _, s := range w.streams {
		if s.gone == nil {
			out = append(out, s)
		}
	}
	return out
}
