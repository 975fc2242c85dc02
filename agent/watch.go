package agent

import (
	nodev1 "countersign.io/countersign/api/node/v1"
)

// watch notes that the member is to be told about a handle.
func (c *cache) watch(handle uint64) {
	c.unwatched[handle] = struct{}{}
	if c.watchWake != nil {
		wake(c.watchWake)
	}
}

// watchAll starts anew with a member that knows nothing.
func (c *cache) watchAll(w chan struct{}) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.watchWake = w
	c.unwatched = make(map[uint64]struct{}, len(c.byHandle))
	for h, w := range c.byHandle {
		if len(w.svids) > 0 {
			c.unwatched[h] = struct{}{}
		}
	}
	wake(w)
}

// takeWatch is the next at the most n handles to tell the member about; nil: none.
func (c *cache) takeWatch(n int) *nodev1.Watch {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.unwatched) == 0 {
		return nil
	}
	out := &nodev1.Watch{}
	for h := range c.unwatched {
		if n--; n < 0 {
			break
		}
		delete(c.unwatched, h)
		w := c.byHandle[h]
		if w == nil || len(w.svids) == 0 {
			out.Unset = append(out.Unset, h)
			continue
		}
		entries := make([]*nodev1.Watch_EntryRef, len(w.svids))
		for i := range w.svids {
			entries[i] = &nodev1.Watch_EntryRef{Id: w.svids[i].EntryID, Revision: w.svids[i].EntryRevision}
		}
		out.Set = append(out.Set, &nodev1.Watch_Workload{Handle: h, Selectors: w.selectors, Entries: entries})
	}
	return out
}
