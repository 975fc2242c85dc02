package agent

import (
	"bytes"
	"container/heap"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"countersign.io/countersign/attestor"
	"countersign.io/countersign/identity"
)

// workload is one caller with an identity, or with a question about one under way. Its fields are owned by cache.mu, but for
// who, which never changes; the slices' contents are immutable and shared with whoever was sent them.
type workload struct {
	who       string // attestor.Workload.Key
	key       string // see cacheKey
	handle    uint64 // the name that members know it by; never used twice
	svids     []identity.X509SVID
	selectors []string // as the member accepted them
	update    *identity.Update
	renewAt   time.Time
	// changedAt is when a member last said that the entries changed, zero when an answer has been had since; an answer
	// counts if it was decided on minRevision or later.
	changedAt   time.Time
	minRevision uint64
	epoch       uint64 // of the JWTs that belong to it; replaced on a change
	streams     []*stream
	handed      bool // somebody was given svids; who asks for JWT-SVIDs alone is not
	flight      *flight
	gone        error     // why it was dropped; it is in no map then
	due         time.Time // of its next timer
	index       int       // in the heap; -1: not there
}

// cacheKey is what an identity is found by: the workload and, for a pod, the token that a member took for it. The agent
// cannot verify a token, and a process outside of pods may be able to give its cgroup the name of one. So whoever
// looks like a pod but shows another token than the one that was verified must not get what is held for it, nor, by
// being refused, end it: he is another workload until a member has said that he is the same.
//
// A volume is known without its token: nobody reaches its socket but the pod that the kubelet mounted it into, and nobody but the kubelet
// hands over its token. So what is held for it is served also when there is no token, as after a restart of the agent; a new
// question needs one (see tokenNeeded).
func cacheKey(who string, token []byte) string {
	if len(token) == 0 || attestor.IsVolume(who) {
		return who
	}
	h := sha256.Sum256(token)
	return who + tokenMark + hex.EncodeToString(h[:16])
}

// tokenNeeded is why a volume whose token is not here can be served what is held for it, and nothing new: without a token it would be asked
// for as a plain process.
func tokenNeeded(who string, token []byte) error {
	if attestor.IsVolume(who) && len(token) == 0 {
		return fmt.Errorf("%w: the kubelet has not handed over the pod's token since this agent started: it does within some two minutes", identity.ErrUnavailable)
	}
	return nil
}

// tokenMark is in no attestor.Workload.Key.
const tokenMark = "#"

// stream is one open Updates call. gone is owned by cache.mu.
type stream struct {
	attest attestor.Func
	wake   chan struct{} // cap 1
	gone   error
}

// flight is one question to a member, and who waits for it.
type flight struct {
	done chan struct{}
	err  error // set before done is closed
}

// live reports whether an SVID that may be handed out is there.
func (w *workload) live(now time.Time) bool {
	return len(w.svids) > 0 && w.changedAt.IsZero() && now.Before(w.expires())
}

// expires is when the first of its SVIDs ends.
func (w *workload) expires() time.Time {
	var t time.Time
	for i := range w.svids {
		if n := w.svids[i].NotAfter; t.IsZero() || n.Before(t) {
			t = n
		}
	}
	return t
}

// cache is every workload that the agent knows. Nothing in it has a goroutine: timers are one heap.
type cache struct {
	mu       sync.Mutex
	byKey    map[string]*workload
	byHandle map[uint64]*workload
	timers   timers
	handles  uint64 // the last one given
	epochs   uint64
	streams  int
	uses     uses
	issuer   [][]byte // the last issuer chain: SVIDs share it
	told     Stats    // what is counted as it happens

	rearm chan struct{} // cap 1: the first timer may have changed

	unwatched map[uint64]struct{} // handles that the member is to be told about
	watchWake chan struct{}       // of the session; nil without one

	persist  bool // there is a state dir
	unsaved  unsaved
	saveWake chan struct{} // cap 1
}

func (c *cache) init(persist bool) {
	c.byKey = map[string]*workload{}
	c.byHandle = map[uint64]*workload{}
	c.unwatched = map[uint64]struct{}{}
	c.unsaved.keys = map[string]struct{}{}
	c.uses.init()
	c.persist = persist
	c.rearm = make(chan struct{}, 1)
	c.saveWake = make(chan struct{}, 1)
}

// find returns the workload of a key. If it can be served as it stands there is no flight; otherwise the flight is the
// question about it, which the caller must launch if it is his. With nobody to ask (alone), what is live is served past
// half-life too.
func (c *cache) find(key string, now time.Time, alone bool) (w *workload, f *flight, mine bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	w = c.byKey[key]
	if w == nil {
		w = c.add(key)
	}
	if w.live(now) && (alone || now.Before(w.renewAt)) {
		return w, nil, false
	}
	f, mine = w.begin()
	return w, f, mine
}

func (c *cache) add(key string) *workload {
	c.handles++
	who, _, _ := strings.Cut(key, tokenMark)
	w := &workload{who: who, key: key, handle: c.handles, index: -1}
	c.newEpoch(w)
	c.byKey[key] = w
	c.byHandle[w.handle] = w
	return w
}

func (c *cache) newEpoch(w *workload) {
	c.epochs++
	w.epoch = c.epochs
}

func (w *workload) begin() (f *flight, mine bool) {
	if w.flight == nil {
		w.flight, mine = &flight{done: make(chan struct{})}, true
	}
	return w.flight, mine
}

// again starts a question for a renewal; nil if one is under way or the workload is gone.
func (c *cache) again(w *workload) *flight {
	c.mu.Lock()
	defer c.mu.Unlock()
	if w.gone != nil || w.flight != nil {
		return nil
	}
	f, _ := w.begin()
	return f
}

// usable reports whether a live SVID can be served while no newer one is to be had.
func (c *cache) usable(w *workload, now time.Time) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return w.gone == nil && w.live(now)
}

// settle takes the answer to a flight; key is what the evidence that was shown makes of the workload.
func (c *cache) settle(w *workload, f *flight, key string, res *issued, now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	w.flight = nil
	switch {
	case w.gone != nil:
		f.err = w.gone
	case res.err == nil && res.revision < w.minRevision:
		// Decided before the change that a member told of, or by a member that lags: it cannot be known to still hold.
		f.err = fmt.Errorf("%w: the entries have changed and the member that answered does not know it yet", identity.ErrUnavailable)
		c.schedule(w, now.Add(changedRetry))
	case res.err == nil:
		c.told.X509Issued += uint64(len(res.svids))
		if len(w.svids) > 0 {
			c.told.Renewed++
		}
		c.rename(w, key)
		c.replace(w, res.svids)
		w.selectors, w.update = res.selectors, nil
		w.changedAt, w.minRevision = time.Time{}, 0
		w.renewAt = halfLife(now, w.expires())
		if slices.ContainsFunc(w.svids, func(s identity.X509SVID) bool { return c.uses.ending[s.Authority].Tainted }) {
			w.renewAt = now.Add(lagging) // the member that answered does not know yet
		}
		c.schedule(w, w.renewAt)
		c.tell(w)
		c.watch(w.handle)
		c.save(w.key)
	case !transient(res.err):
		c.told.Denied++
		f.err = denied(res.err)
		c.drop(w, f.err)
	case len(w.svids) == 0:
		c.told.Failed++
		f.err = unavailable(res.err)
		c.drop(w, f.err)
	default:
		c.told.RenewalFailed++
		f.err = unavailable(res.err)
		c.schedule(w, c.retryAt(w, now))
	}
	close(f.done)
}

// rename follows a pod's token: the kubelet has replaced it, and a member took the new one.
func (c *cache) rename(w *workload, key string) {
	if w.key == key || c.byKey[key] != nil { // somebody came with it before: then there are two, until one is done
		return
	}
	delete(c.byKey, w.key)
	c.save(w.key)
	w.key = key
	c.byKey[key] = w
}

// retryAt is when to ask again after a question that had no answer.
func (c *cache) retryAt(w *workload, now time.Time) time.Time {
	if !w.changedAt.IsZero() {
		return now.Add(changedRetry)
	}
	return now.Add(retryIn(now, w.expires()))
}

// denied is a definite no in the form that a workload gets it in.
func denied(err error) error {
	if errors.Is(err, identity.ErrDenied) {
		return err
	}
	return fmt.Errorf("%w: %v", identity.ErrDenied, err)
}

// unavailable is a failure that says nothing about the workload in the form that a workload gets it in.
func unavailable(err error) error {
	if errors.Is(err, identity.ErrUnavailable) {
		return err
	}
	return fmt.Errorf("%w: %v", identity.ErrUnavailable, err)
}

// drop forgets a workload and ends its streams.
func (c *cache) drop(w *workload, why error) {
	if w.gone != nil {
		return
	}
	w.gone = why
	delete(c.byKey, w.key)
	delete(c.byHandle, w.handle)
	if w.index >= 0 {
		heap.Remove(&c.timers, w.index)
	}
	if len(w.svids) > 0 {
		c.count(w.svids, -1)
		if w.handed {
			c.strays(w.svids)
		}
		c.watch(w.handle)
		c.save(w.key)
	}
	c.tell(w)
}

// lagging is how long after an answer under a tainted authority the next question is asked.
const lagging = time.Second

func (c *cache) dropAll(why error) (n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, w := range c.byKey {
		if len(w.svids) > 0 {
			n++
			c.drop(w, why)
		}
	}
	return n
}

// endStreams ends every open call at the agent's own end, and keeps what the state dir has.
func (c *cache) endStreams(why error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, w := range c.byKey {
		for _, s := range w.streams {
			s.gone = why
			wake(s.wake)
		}
	}
}

// changed is told by a member: the entries are no longer those that these workloads' SVIDs were issued by, as of
// revision. Without a live caller there is no evidence to ask with, so the workload is forgotten until somebody comes.
func (c *cache) changed(handles []uint64, revision uint64, now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, h := range handles {
		w := c.byHandle[h]
		if w == nil {
			continue
		}
		c.newEpoch(w)
		if len(w.streams) == 0 && w.flight == nil {
			c.drop(w, fmt.Errorf("%w: its entries have changed: ask again", identity.ErrUnavailable))
			continue
		}
		w.minRevision = max(w.minRevision, revision)
		if w.changedAt.IsZero() {
			w.changedAt = now
		}
		c.save(w.key) // not over a restart either
		c.schedule(w, now)
	}
}

// ended is told by a member: these workloads' pods are gone.
func (c *cache) ended(handles []uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, h := range handles {
		if w := c.byHandle[h]; w != nil {
			c.drop(w, fmt.Errorf("%w: the workload's pod is gone", identity.ErrDenied))
		}
	}
}

// attach adds a stream to a workload that was found; an error says why it is gone.
func (c *cache) attach(w *workload, s *stream) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if w.gone != nil {
		return w.gone
	}
	w.streams, w.handed = append(w.streams, s), true
	// Past half-life, and its timer went off when nobody was there to ask for it: served because no member could be asked, it
	// must be renewed as soon as one can.
	if now := time.Now(); w.flight == nil && w.live(now) && !now.Before(w.renewAt) {
		if at := c.retryAt(w, now); at.Before(w.due) {
			c.schedule(w, at)
		}
	}
	c.streams++
	return nil
}

func (c *cache) detach(w *workload, s *stream) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if i := slices.Index(w.streams, s); i >= 0 {
		w.streams = slices.Delete(w.streams, i, i+1)
		if w.gone == nil {
			c.strays(w.svids) // who leaves may go on using what he has
		}
		if len(w.streams) == 0 {
			w.streams = nil
		}
		c.streams--
	}
}

// endStream ends one stream, whose caller is not what it was.
func (c *cache) endStream(s *stream, why error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	s.gone = why
	wake(s.wake)
}

// current is what a workload is to see now. It is the same pointer as before as long as nothing has changed. s may be nil.
func (c *cache) current(w *workload, s *stream, t *trust) (*identity.Update, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if w.gone != nil {
		return nil, w.gone
	}
	if s != nil && s.gone != nil {
		return nil, s.gone
	}
	bundles := t.bundlesFor(w.svids)
	if w.update != nil && len(bundles) == len(w.update.Bundles) {
		same := true
		for td, b := range bundles {
			same = same && w.update.Bundles[td] == b
		}
		if same {
			return w.update, nil
		}
	}
	w.update = &identity.Update{SVIDs: w.svids, Bundles: bundles}
	return w.update, nil
}

// tell wakes the workload's streams.
func (c *cache) tell(w *workload) {
	for _, s := range w.streams {
		wake(s.wake)
	}
}

// bundlesChanged wakes every stream.
func (c *cache) bundlesChanged() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, w := range c.byKey {
		c.tell(w)
	}
	c.unsaved.bundles = true
	wake(c.saveWake)
}

func (c *cache) epochOf(w *workload) (uint64, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return w.epoch, w.gone
}

// intern returns the chain that is held already if it is the same, so that thousands of SVIDs share one.
func (c *cache) intern(chain [][]byte) [][]byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !slices.EqualFunc(c.issuer, chain, bytes.Equal) {
		c.issuer = chain
	}
	return c.issuer
}

func (c *cache) counts() (workloads, streams int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, w := range c.byKey {
		if len(w.svids) > 0 {
			workloads++
		}
	}
	return workloads, c.streams
}

func (c *cache) stats() Stats {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.told
	for _, w := range c.byKey {
		s.SVIDs += len(w.svids)
		if e := w.expires(); !e.IsZero() && (s.FirstExpiry.IsZero() || e.Before(s.FirstExpiry)) {
			s.FirstExpiry = e
		}
	}
	return s
}

func (c *cache) empty() bool {
	n, _ := c.counts()
	return n == 0
}
