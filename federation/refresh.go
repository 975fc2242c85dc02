package federation

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"countersign.io/countersign/identity"
)

// RefresherConfig configures a Refresher.
type RefresherConfig struct {
	// Fetch asks one endpoint. *Client does.
	Fetch func(ctx context.Context, f identity.Federation) (*identity.Bundle, error)
	Log   *slog.Logger
}

// Refresher asks each partner for its bundle at the partner's refresh hint, or when somebody wants it now. It remembers how
// that went, and nothing else: what it fetched is given away, and the last good bundle is whoever's who took it.
type Refresher struct {
	cfg RefresherConfig

	mu    sync.Mutex
	known map[string]*polled // by trust domain
	wake  chan struct{}      // has an element when there may be something new to do
}

// polled is how one relationship stands.
type polled struct {
	revision uint64 // of the relationship: a changed one begins anew
	turn     chan struct{}
	busy     bool // the loop is at it
	status   identity.FederationStatus
	interval time.Duration
}

const (
	// MinInterval and MaxInterval bound what a partner's hint may make this member do.
	MinInterval = time.Second
	MaxInterval = time.Hour
	// width is how many partners are asked at a time: one that is slow keeps nobody else waiting.
	width = 8
	// jitter is by how much of the interval a poll may be early or late, in percent, so that those who began together do not
	// stay together.
	jitter = 10
	// first is within which time partners are asked for the first time by a new leader.
	first = 2 * time.Second
)

// NewRefresher makes a Refresher that does nothing yet.
func NewRefresher(cfg RefresherConfig) *Refresher {
	return &Refresher{cfg: cfg, known: map[string]*polled{}, wake: make(chan struct{}, 1)}
}

// Changed says that there may be other relationships than before.
func (r *Refresher) Changed() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// Status is how a relationship stands; ok is false for one that was never asked by this member since it leads.
func (r *Refresher) Status(trustDomain string) (st identity.FederationStatus, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if p := r.known[trustDomain]; p != nil {
		return p.status, true
	}
	return identity.FederationStatus{}, false
}

// Run refreshes what source has until ctx ends, and then forgets how all stood: another member knows better. take is where a
// bundle goes: it must refuse one whose sequence is below that of the last one, and return only once the new one is kept for
// good. Its warning says what is odd about a bundle that was taken all the same.
func (r *Refresher) Run(ctx context.Context, source func() []identity.Federation, take func(context.Context, identity.Federation, *identity.Bundle) (warning string, err error)) error {
	var wg sync.WaitGroup
	defer func() {
		wg.Wait()
		r.mu.Lock()
		clear(r.known)
		r.mu.Unlock()
	}()
	slots := make(chan struct{}, width)
	for {
		due, next := r.due(source(), time.Now())
		for _, f := range due {
			select {
			case slots <- struct{}{}:
			case <-ctx.Done():
				return nil
			}
			wg.Go(func() {
				defer func() {
					<-slots
					r.Changed() // there is a new time to wait for
				}()
				_ = r.refresh(ctx, f.TrustDomain, source, take) // its status has it
			})
		}
		timer := time.NewTimer(next)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-r.wake:
			timer.Stop()
		case <-timer.C:
		}
	}
}

// due takes up the relationships that there are, forgets the others, and returns those to ask now and how long until the next.
func (r *Refresher) due(all []identity.Federation, now time.Time) (due []identity.Federation, next time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	there := make(map[string]bool, len(all))
	next = MaxInterval
	for _, f := range all {
		there[f.TrustDomain] = true
		p := r.take(f, now)
		switch wait := p.status.NextRefresh.Sub(now); {
		case p.busy:
		case wait > 0:
			next = min(next, wait)
		default:
			p.busy = true
			due = append(due, f)
		}
	}
	for td := range r.known {
		if !there[td] {
			delete(r.known, td)
		}
	}
	return due, next
}

// take is the record of a relationship as it is now. The caller holds mu.
func (r *Refresher) take(f identity.Federation, now time.Time) *polled {
	p := r.known[f.TrustDomain]
	if p == nil || p.revision != f.Revision {
		p = &polled{revision: f.Revision, turn: make(chan struct{}, 1), interval: Interval(f.Bundle)}
		if f.Bundle != nil && !f.Bundle.Pinned { // it was asked before, by another leader
			p.status.NextRefresh = now.Add(rand.N(first))
		}
		r.known[f.TrustDomain] = p
	}
	return p
}

// Refresh asks a partner now, and returns once its bundle is kept, or why not. source and take are as for Run.
func (r *Refresher) Refresh(ctx context.Context, trustDomain string, source func() []identity.Federation, take func(context.Context, identity.Federation, *identity.Bundle) (warning string, err error)) error {
	err := r.refresh(ctx, trustDomain, source, take)
	r.Changed()
	return err
}

// refresh is one poll. Two of one partner come after each other, and each verifies by the newest bundle.
func (r *Refresher) refresh(ctx context.Context, trustDomain string, source func() []identity.Federation, take func(context.Context, identity.Federation, *identity.Bundle) (string, error)) error {
	_, p, err := r.newest(trustDomain, source)
	if err != nil {
		return err
	}
	turn := p.turn // p is another one below, if the relationship changes while this waits
	select {
	case turn <- struct{}{}:
		defer func() { <-turn }()
	case <-ctx.Done():
		return ctx.Err()
	}
	f, p, err := r.newest(trustDomain, source)
	if err != nil {
		return err
	}
	b, err := r.cfg.Fetch(ctx, f)
	warning := ""
	if err == nil {
		if warning, err = take(ctx, f, b); err != nil {
			err = fmt.Errorf("taking the bundle that was fetched: %w", err)
		}
	}
	now := time.Now()
	r.mu.Lock()
	defer r.mu.Unlock()
	st := &p.status
	p.busy, st.LastAttempt = false, now
	if err == nil {
		p.interval = bound(b.RefreshHint)
		st.LastSuccess, st.Failures, st.LastError, st.Warning = now, 0, "", oneLine(warning)
	} else if ctx.Err() == nil || !errors.Is(err, ctx.Err()) {
		st.Failures++
		st.LastError = oneLine(err.Error())
		if st.Failures == 1 {
			r.cfg.Log.Warn("cannot refresh a federated bundle: keeping the last good one", "trust_domain", f.TrustDomain, "url", identity.RedactURL(f.URL), "error", st.LastError)
		}
	}
	st.NextRefresh = now.Add(wait(p.interval, st.Failures))
	return err
}

func (r *Refresher) newest(trustDomain string, source func() []identity.Federation) (identity.Federation, *polled, error) {
	for _, f := range source() {
		if f.TrustDomain == trustDomain {
			r.mu.Lock()
			defer r.mu.Unlock()
			return f, r.take(f, time.Now()), nil
		}
	}
	return identity.Federation{}, nil, fmt.Errorf("%w: no federation with %q", identity.ErrNotFound, trustDomain)
}

// Interval is how often a partner is to be asked that said so in its bundle.
func Interval(b *identity.FederatedBundle) time.Duration {
	if b == nil {
		return bound(0)
	}
	return bound(b.RefreshHint)
}

func bound(hint time.Duration) time.Duration {
	if hint <= 0 {
		return identity.DefaultRefreshHint
	}
	return max(MinInterval, min(hint, MaxInterval))
}

// wait is until the next poll. After a failure that is the next interval, too (SPIFFE Federation, section 6.2), and after more
// of them twice that: never longer, since a partner signs with a new key three intervals after it began to publish it, and
// may come back from being away in the middle of that.
func wait(interval time.Duration, failures int) time.Duration {
	if failures > 1 {
		interval *= 2
	}
	span := interval * jitter / 100
	return interval - span + rand.N(2*span+1)
}
