package agent

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"countersign.io/countersign/identity"
	"countersign.io/countersign/internal/durable"
)

// restore takes what an earlier process left: all of it, or as much as is intact and still valid. Nothing in it is trusted
// more than an answer from a member. It runs before anything else does.
func (a *Agent) restore(now time.Time) {
	ignore := func(path string, err error) {
		a.log.Warn("ignoring a file of the agent's state", "path", path, "error", err)
	}
	data, err := readState(a.state.trust(), maxStateFile)
	if usesErr := a.restoreUses(now, data == nil && err == nil); usesErr != nil {
		ignore(a.state.uses(), usesErr)
	}
	if data == nil {
		if err != nil {
			ignore(a.state.trust(), err)
			a.cache.forget(now)
		}
		return // without a bundle nothing else can be checked
	}
	t, anchor, members, err := parseTrust(data)
	if err == nil && anchor != a.anchor() && !a.vouched(t) {
		err = fmt.Errorf("%w: the configured pin or bundle is not the one that it started from, and does not vouch for it: the agent starts anew", identity.ErrInvalid)
	}
	if err == nil && !a.cfg.TrustDomain.IsZero() && t.td != a.cfg.TrustDomain {
		err = fmt.Errorf("%w: it is of trust domain %q, the agent is configured for %q", identity.ErrInvalid, t.td, a.cfg.TrustDomain)
	}
	if err != nil {
		ignore(a.state.trust(), err)
		a.cache.forget(now)
		return
	}
	a.trust.Store(t)
	a.takeMembers(members)
	if data, err = readState(a.state.own(), maxStateFile); data != nil {
		var o *ownSVID
		if o, err = parseOwn(data, t, now); err == nil {
			a.own.Store(o)
			a.log.Info("agent has an SVID from before its restart", "id", o.id, "expires", o.notAfter)
		}
		clear(data)
	}
	if err != nil {
		ignore(a.state.own(), err)
	}
	paths, torn, err := a.state.files()
	for _, path := range torn { // nobody writes yet
		err = errors.Join(err, os.Remove(path))
	}
	if err != nil {
		ignore(a.state.path, err)
		a.cache.forget(now)
	}
	if len(paths) > maxRestored {
		a.cache.forget(now)
		a.log.Warn("restoring a part of the agent's state", "files", len(paths), "limit", maxRestored)
		paths = paths[:maxRestored]
	}
	var g errgroup.Group
	g.SetLimit(runtime.GOMAXPROCS(0))
	for _, path := range paths {
		g.Go(func() error {
			if err := a.restoreWorkload(path, t, now); err != nil {
				ignore(path, err)
				if info, err := os.Stat(path); err != nil || now.Sub(info.ModTime()) < identity.MaxX509TTL {
					a.cache.forget(now) // whoever was given it may have it
				}
				if err := os.Remove(path); err != nil { // it holds a key that nothing will use
					ignore(path, err)
				}
			}
			return nil
		})
	}
	g.Wait()
	if n, _ := a.cache.counts(); n > 0 {
		a.log.Info("restored identities from before the restart", "workloads", n)
	}
}

// anchor names what the operator configured to verify members by. As long as that stays the same, the newest bundle counts
// and not it: the authority it names may have been rotated out long since.
func (a *Agent) anchor() string {
	ders := a.published()
	if a.cfg.Bundle != nil {
		ders = append(ders, a.cfg.Bundle.X509...)
	} else if a.cfg.Roots == nil {
		return a.cfg.Pin
	}
	h := sha256.New()
	for _, der := range ders {
		fmt.Fprintf(h, "%d:%s", len(der), der)
	}
	return a.cfg.Pin + " " + hex.EncodeToString(h.Sum(nil))
}

// published are the authorities that Roots reads now; nil where that fails: nothing is believed by it then.
func (a *Agent) published() [][]byte {
	if a.cfg.Roots == nil {
		return nil
	}
	ders, err := a.cfg.Roots()
	if err != nil {
		return nil
	}
	return slices.Clone(ders)
}

// vouched reports whether what is configured now vouches for a bundle.
func (a *Agent) vouched(t *trust) bool {
	if a.cfg.Bundle != nil && sharesAuthority(a.cfg.Bundle, t.own) {
		return true
	}
	if sharesAuthority(&identity.Bundle{X509: a.published()}, t.own) {
		return true
	}
	certs, err := parseChain(t.own.X509)
	if err != nil || a.cfg.Pin == "" {
		return false
	}
	_, err = pinnedRoot(certs, a.cfg.Pin, time.Now())
	return err == nil
}

func (a *Agent) restoreWorkload(path string, t *trust, now time.Time) error {
	data, err := durable.ReadPrivateFile(path, maxStateSVID)
	if err != nil {
		return err
	}
	defer clear(data)
	w, err := parseWorkload(data, t, now)
	if err != nil {
		return err
	}
	if a.state.svid(w.key) != path {
		return fmt.Errorf("%w: it is not under the name of its workload", identity.ErrInvalid)
	}
	for i := range w.svids {
		chain := w.svids[i].Chain
		w.svids[i].Chain = append(chain[:1:1], a.cache.intern(chain[1:])...)
	}
	a.cache.restore(w, now)
	return nil
}

// restore puts a workload in place.
func (c *cache) restore(s *savedWorkload, now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	w := c.add(s.key)
	c.replace(w, s.svids)
	c.strays(w.svids) // not every caller of before need come back
	w.selectors = s.selectors
	for i := range w.svids {
		at := renewRestored(w.svids[i].NotBefore, w.svids[i].NotAfter, now)
		if w.renewAt.IsZero() || at.Before(w.renewAt) {
			w.renewAt = at
		}
	}
	c.schedule(w, w.renewAt)
}

// save notes that a workload's file is to be written, or removed. The caller holds mu.
func (c *cache) save(key string) {
	if c.persist {
		c.unsaved.keys[key] = struct{}{}
		wake(c.saveWake)
	}
}

func (c *cache) markOwn() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.unsaved.own = true
	wake(c.saveWake)
}

func (c *cache) markTrust() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.unsaved.bundles = true
	wake(c.saveWake)
}

// unsaved is what changed and is not in the state dir yet.
type unsaved struct {
	keys               map[string]struct{} // of workloads
	own, bundles, uses bool
}

// takeUnsaved returns what changed since the last call.
func (c *cache) takeUnsaved() unsaved {
	c.mu.Lock()
	defer c.mu.Unlock()
	u := c.unsaved
	c.unsaved = unsaved{keys: map[string]struct{}{}}
	return u
}

// saved is what a restart should find of a workload; nil: nothing.
func (c *cache) saved(key string, now time.Time) *savedWorkload {
	c.mu.Lock()
	defer c.mu.Unlock()
	w := c.byKey[key]
	if w == nil || !w.live(now) {
		return nil
	}
	return &savedWorkload{key: w.key, selectors: w.selectors, svids: w.svids}
}

func (a *Agent) runPersister(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-a.cache.saveWake:
			a.persistDirty()
		}
	}
}

// persistDirty writes what changed. Only one goroutine runs it at a time, and it reads what is true at that moment: a file that
// a drop has made wrong is always removed by a later pass.
func (a *Agent) persistDirty() {
	failed := func(path string, err error) {
		a.log.Error("could not write the agent's state: it may be missing after a restart", "path", path, "error", err)
		a.usesLost = true
	}
	write := func(path string, data []byte, err error) {
		if err == nil {
			err = durable.WriteFile(path, data, 0o600)
		}
		clear(data)
		if err != nil {
			failed(path, err)
		}
	}
	dirty := a.cache.takeUnsaved()
	if t := a.trust.Load(); dirty.bundles && t != nil { // first: the others mean nothing without it
		var members []string
		if m := a.members.Load(); m != nil {
			members = *m
		}
		data, err := encodeTrust(t, a.anchor(), members)
		write(a.state.trust(), data, err)
	}
	if o := a.own.Load(); dirty.own && o != nil {
		data, err := encodeOwn(o)
		write(a.state.own(), data, err)
	}
	if (dirty.uses || dirty.bundles) && !a.usesLost {
		data, err := encodeUses(a.cache.strayUses(time.Now()))
		write(a.state.uses(), data, err)
	}
	for key := range dirty.keys {
		path := a.state.svid(key)
		w := a.cache.saved(key, time.Now())
		if w == nil {
			if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
				failed(path, err)
			}
			continue
		}
		data, err := encodeWorkload(w)
		write(path, data, err)
	}
	if a.usesLost { // a restart must not believe that it knows all: see restoreUses
		if err := os.Remove(a.state.uses()); err != nil && !errors.Is(err, fs.ErrNotExist) {
			failed(a.state.uses(), err)
		}
	}
}
