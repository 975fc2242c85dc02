package agent

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	nodev1 "countersign.io/countersign/api/node/v1"
	"countersign.io/countersign/identity"
)

// maxUses is how many authorities a member lets an agent name. Whoever has more does not tell, and is waited for.
const maxUses = 64

// usesEvery is how often a member is told that the SVIDs under an authority that ends have become fewer.
const usesEvery = 250 * time.Millisecond

// uses is what the agent has handed out, by the x509 authority that it is under. A rotation revokes the old authority once no
// agent uses it any more, so what is counted too little here is a handshake that fails. It is owned by cache.mu.
type uses struct {
	held   map[string]int       // SVIDs in the cache: replaced when they are renewed
	stray  map[string]time.Time // when the last ends of those that were handed to callers who do not listen for the next
	ending map[string]identity.Ending
	since  time.Time // what was handed out before is not known; zero: all is
	dirty  bool
	timer  bool // one runs that will make it dirty
}

func (u *uses) init() {
	u.held, u.stray, u.ending = map[string]int{}, map[string]time.Time{}, map[string]identity.Ending{}
}

// replace puts SVIDs in the place of a workload's. The old ones go with it where every caller is sent the new ones.
func (c *cache) replace(w *workload, svids []identity.X509SVID) {
	c.count(w.svids, -1)
	if len(w.streams) == 0 && w.handed {
		c.strays(w.svids)
	}
	w.svids, w.handed = svids, len(w.streams) > 0
	c.count(svids, 1)
}

func (c *cache) count(svids []identity.X509SVID, n int) {
	for i := range svids {
		id := svids[i].Authority
		before := c.uses.held[id]
		c.uses.held[id] = before + n
		if before+n == 0 {
			delete(c.uses.held, id)
		}
		if _, ends := c.uses.ending[id]; before == 0 || before+n == 0 {
			c.tellUses()
		} else if ends && !c.uses.timer {
			c.uses.timer = true
			time.AfterFunc(usesEvery, func() {
				c.mu.Lock()
				defer c.mu.Unlock()
				c.uses.timer = false
				c.tellUses()
			})
		}
	}
}

// strays notes SVIDs that somebody may go on using who will not hear of the next.
func (c *cache) strays(svids []identity.X509SVID) {
	for i := range svids {
		s := &svids[i]
		if s.NotAfter.After(c.uses.stray[s.Authority]) {
			c.uses.stray[s.Authority] = s.NotAfter
			if c.persist {
				c.unsaved.uses = true
				wake(c.saveWake)
			}
			if _, ends := c.uses.ending[s.Authority]; ends {
				c.tellUses()
			}
		}
	}
}

// tellUses has the session tell the member.
func (c *cache) tellUses() {
	c.uses.dirty = true
	if c.watchWake != nil {
		wake(c.watchWake)
	}
}

// ownChanged is called when the agent's own SVID is another one.
func (c *cache) ownChanged() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.tellUses()
}

// takeUses reports whether the member is to be told of changes.
func (c *cache) takeUses() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	dirty := c.uses.dirty
	c.uses.dirty = false
	return dirty
}

// listUses is all that is live, own included, by authority, and since when.
func (c *cache) listUses(own *ownSVID, now time.Time) (uses []*nodev1.Ack_Use, since time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	by := map[string]*nodev1.Ack_Use{}
	use := func(id string) *nodev1.Ack_Use {
		if by[id] == nil {
			by[id] = &nodev1.Ack_Use{Authority: id}
		}
		return by[id]
	}
	for id, n := range c.uses.held {
		use(id).Svids = uint32(n)
	}
	for id, until := range c.uses.stray {
		if now.After(until) {
			delete(c.uses.stray, id)
			continue
		}
		use(id).Until = timestamppb.New(until)
	}
	if own != nil {
		use(own.authority).Svids++
	}
	out := make([]*nodev1.Ack_Use, 0, len(by))
	for _, u := range by {
		out = append(out, u)
	}
	slices.SortFunc(out, func(a, b *nodev1.Ack_Use) int { return cmp.Compare(a.Authority, b.Authority) })
	return out, c.uses.since
}

// strayUses is what is not in any other file of the state.
func (c *cache) strayUses(now time.Time) map[string]time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	maps.DeleteFunc(c.uses.stray, func(_ string, until time.Time) bool { return now.After(until) })
	return maps.Clone(c.uses.stray)
}

// restoreUses takes up what an earlier process handed out. Where that cannot be known, the agent says since when it knows. bare: there is
// no other state, so that without this one there was no earlier process.
func (a *Agent) restoreUses(now time.Time, bare bool) error {
	data, err := readState(a.state.uses(), maxStateFile)
	if err == nil && data == nil {
		if bare {
			return nil
		}
		err = fmt.Errorf("%w: it is not there: an older version ran before, or it could not be written", identity.ErrInvalid)
	}
	var stray map[string]time.Time
	if err == nil {
		stray, err = parseUses(data)
	}
	if err != nil || bare {
		a.cache.forget(now)
	}
	a.cache.mu.Lock()
	defer a.cache.mu.Unlock()
	maps.Copy(a.cache.uses.stray, stray)
	return err
}

// forget has the agent say that it does not know what was handed out before now.
func (c *cache) forget(now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.uses.since = now
}

// given is a trust's word on which SVIDs are to be replaced, remembered by the chains that they share.
type given struct {
	t     *trust
	now   time.Time
	known map[*byte]bool
}

// up reports whether an SVID was given up: its authority is tainted, or its chain leads to the bundle no longer.
func (g *given) up(s *identity.X509SVID) bool {
	if g.t.ending[s.Authority].Tainted {
		return true
	}
	if len(s.Chain) < 2 || len(s.Chain[1]) == 0 {
		return false
	}
	key := &s.Chain[1][0]
	broken, ok := g.known[key]
	if !ok {
		_, err := g.t.issuer(s.Chain[1:], g.now)
		broken = err != nil
		g.known[key] = broken
	}
	return broken
}

func (g *given) anyUp(svids []identity.X509SVID) (up bool, within time.Duration) {
	for i := range svids {
		if g.up(&svids[i]) {
			up, within = true, max(within, g.t.ending[svids[i].Authority].Spread)
		}
	}
	return up, within
}

// giveUp has everything renewed that the bundle gives up, each within the spread that it names, so that thousands do not
// come at once. What nobody listens for is asked for anew when the next caller comes.
func (c *cache) giveUp(t *trust, now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.uses.ending = t.ending
	c.tellUses()
	g := &given{t: t, now: now, known: map[*byte]bool{}}
	for _, w := range c.byKey {
		up, within := g.anyUp(w.svids)
		if !up {
			continue
		}
		if len(w.streams) == 0 && w.flight == nil { // it is not renewed: who has it may go on using it, and who comes asks anew
			c.drop(w, fmt.Errorf("%w: the authority that signed it was given up: ask again", identity.ErrUnavailable))
			continue
		}
		at := now
		if len(w.streams) > 0 {
			at = now.Add(spread(within))
		}
		if at.Before(w.renewAt) {
			w.renewAt = at
			if len(w.streams) > 0 {
				c.schedule(w, at)
			}
		}
	}
}
