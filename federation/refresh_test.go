package federation

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"countersign.io/countersign/identity"
)

// consumer is what keeps relationships and bundles: a store's behaviour in a map.
type consumer struct {
	mu      sync.Mutex
	rel     map[string]*identity.Federation
	taken   []uint64 // sequences, in order
	down    error    // what take answers
	warning string
}

func newConsumer(rel ...identity.Federation) *consumer {
	c := &consumer{rel: map[string]*identity.Federation{}}
	for i, f := range rel {
		f.Revision = uint64(i + 1)
		c.rel[f.TrustDomain] = &f
	}
	return c
}

func (c *consumer) source() (out []identity.Federation) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, f := range c.rel {
		out = append(out, *f)
	}
	return out
}

func (c *consumer) take(_ context.Context, f identity.Federation, b *identity.Bundle) (string, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.down != nil {
		return "", c.down
	}
	now := c.rel[f.TrustDomain]
	if now == nil || now.Revision != f.Revision {
		return "", fmt.Errorf("%w: changed meanwhile", identity.ErrPrecondition)
	}
	if err := now.CheckNext(b.Sequence); err != nil {
		return "", err
	}
	copied := *now
	copied.Bundle = &identity.FederatedBundle{Sequence: b.Sequence, RefreshHint: b.RefreshHint, X509: b.X509, JWT: b.JWT}
	c.rel[f.TrustDomain] = &copied
	c.taken = append(c.taken, b.Sequence)
	return c.warning, nil
}

func (c *consumer) bundle(td string) *identity.FederatedBundle {
	c.mu.Lock()
	defer c.mu.Unlock()
	if f := c.rel[td]; f != nil {
		return f.Bundle
	}
	return nil
}

func (c *consumer) change(f func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f()
}

// fakeFetch answers without a network, so that time can be the test's.
type fakeFetch struct {
	mu    sync.Mutex
	calls []time.Time
	err   error
	hint  time.Duration
	seq   uint64
	hang  bool
}

func (f *fakeFetch) fetch(ctx context.Context, rel identity.Federation) (*identity.Bundle, error) {
	f.mu.Lock()
	f.calls = append(f.calls, time.Now())
	err, hang := f.err, f.hang
	b := &identity.Bundle{Sequence: f.seq, RefreshHint: f.hint}
	f.mu.Unlock()
	if hang {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	if err != nil {
		return nil, err
	}
	return b, nil
}

func (f *fakeFetch) set(g func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	g()
}

func (f *fakeFetch) count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.calls)
}

func web(td string) identity.Federation {
	return identity.Federation{TrustDomain: td, URL: "https://" + td, Profile: identity.ProfileWeb}
}

// run runs the loop inside a synctest bubble until stop.
func run(t *testing.T, f *fakeFetch, c *consumer) (*Refresher, func()) {
	t.Helper()
	r := NewRefresher(RefresherConfig{Fetch: f.fetch, Log: quiet()})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx, c.source, c.take) }()
	synctest.Wait()
	return r, func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

// TestConformance20PollsAtTheHint: a partner is asked at its refresh hint, and every five minutes if it gives none (SPIFFE
// Federation section 4.1).
func TestConformance20PollsAtTheHint(t *testing.T) {
	for hint, want := range map[time.Duration]time.Duration{0: 5 * time.Minute, time.Minute: time.Minute, 20 * time.Minute: 20 * time.Minute, 48 * time.Hour: MaxInterval, time.Millisecond: MinInterval} {
		synctest.Test(t, func(t *testing.T) {
			f, c := &fakeFetch{hint: hint, seq: 1}, newConsumer(web("partner.org"))
			_, stop := run(t, f, c)
			if f.count() != 1 {
				t.Fatalf("asked %d times at once", f.count())
			}
			const polls = 20
			time.Sleep(polls * want)
			synctest.Wait()
			stop()
			if n := f.count() - 1; n < polls*8/10 || n > polls*12/10 {
				t.Errorf("hint %v: asked %d times in %d intervals", hint, n, polls)
			}
			different := map[time.Duration]bool{}
			for i := range f.calls[1:] {
				gap := f.calls[i+1].Sub(f.calls[i])
				different[gap] = true
				if gap < want*9/10 || gap > want*11/10+time.Millisecond {
					t.Errorf("hint %v: %v between two polls", hint, gap)
				}
			}
			if len(different) < polls/2 {
				t.Errorf("hint %v: no jitter: %v", hint, different)
			}
		})
	}
}

// TestConformance25FailedPollWaits: a failed poll waits for the next interval, and the last good bundle stays (SPIFFE Federation
// section 6.2).
func TestConformance25FailedPollWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, c := &fakeFetch{hint: time.Minute, seq: 4}, newConsumer(web("partner.org"))
		r, stop := run(t, f, c)
		defer stop()
		f.set(func() { f.err = fmt.Errorf("%w: it is away\x1b[31m", identity.ErrUnavailable) })
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		st, ok := r.Status("partner.org")
		if !ok || st.Failures < 4 || !strings.Contains(st.LastError, "it is away?[31m") || st.LastSuccess.IsZero() || !st.LastAttempt.After(st.LastSuccess) || !st.NextRefresh.After(time.Now()) {
			t.Errorf("%+v", st)
		}
		if b := c.bundle("partner.org"); b == nil || b.Sequence != 4 {
			t.Errorf("the last good bundle: %+v", b)
		}
		calls := f.calls
		if gap := calls[2].Sub(calls[1]); gap < 54*time.Second || gap > 67*time.Second {
			t.Errorf("after the first failure it waited %v", gap)
		}
		for i := 3; i < len(calls); i++ {
			if gap := calls[i].Sub(calls[i-1]); gap < 108*time.Second || gap > 133*time.Second {
				t.Errorf("after failure %d it waited %v: more than one, and less than three intervals", i-1, gap)
			}
		}
		f.set(func() { f.err, f.seq = nil, 5 })
		time.Sleep(3 * time.Minute)
		synctest.Wait()
		if st, _ := r.Status("partner.org"); st.Failures != 0 || st.LastError != "" || c.bundle("partner.org").Sequence != 5 {
			t.Errorf("%+v, %+v", st, c.bundle("partner.org"))
		}
	})
}

// A sequence that goes back is an error that is seen, and changes nothing; so is a consumer that cannot keep the bundle.
func TestRefreshKeepsTheLastGood(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, c := &fakeFetch{hint: time.Minute, seq: 9}, newConsumer(web("partner.org"))
		r, stop := run(t, f, c)
		defer stop()
		f.set(func() { f.seq = 2 })
		time.Sleep(70 * time.Second)
		synctest.Wait()
		if st, _ := r.Status("partner.org"); !strings.Contains(st.LastError, "went back from sequence 9 to 2") || c.bundle("partner.org").Sequence != 9 {
			t.Errorf("%+v, %+v", st, c.bundle("partner.org"))
		}
		f.set(func() { f.seq = 10 })
		c.change(func() { c.down = fmt.Errorf("%w: no leader", identity.ErrUnavailable) })
		time.Sleep(3 * time.Minute)
		synctest.Wait()
		if st, _ := r.Status("partner.org"); !strings.Contains(st.LastError, "taking the bundle that was fetched") || !strings.Contains(st.LastError, "no leader") || c.bundle("partner.org").Sequence != 9 {
			t.Errorf("%+v", st)
		}
		c.change(func() { c.down, c.warning = nil, "odd" })
		time.Sleep(3 * time.Minute)
		synctest.Wait()
		if st, _ := r.Status("partner.org"); st.LastError != "" || st.Warning != "odd" || c.bundle("partner.org").Sequence != 10 {
			t.Errorf("%+v", st)
		}
	})
}

// Relationships come, change and go; one that hangs keeps no other waiting.
func TestRefreshFollowsRelationships(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, c := &fakeFetch{hint: time.Hour, seq: 1}, newConsumer()
		r, stop := run(t, f, c)
		defer stop()
		if f.count() != 0 {
			t.Fatal("somebody was asked")
		}
		one := web("one.org")
		one.Revision = 1
		c.change(func() { c.rel["one.org"] = &one })
		r.Changed()
		synctest.Wait()
		if f.count() != 1 || c.bundle("one.org") == nil {
			t.Fatalf("a new relationship was asked %d times", f.count())
		}
		r.Changed()
		synctest.Wait()
		if f.count() != 1 {
			t.Error("one that did not change was asked again")
		}
		moved := *c.rel["one.org"]
		moved.Revision, moved.Bundle = 2, &identity.FederatedBundle{Sequence: 1, Pinned: true}
		c.change(func() { c.rel["one.org"] = &moved })
		r.Changed()
		synctest.Wait()
		if f.count() != 2 {
			t.Error("one that changed was not asked at once")
		}
		f.set(func() { f.hang = true })
		c.change(func() {
			for i := range width - 1 {
				h := web(fmt.Sprintf("hangs%d.org", i))
				h.Revision = 1
				c.rel[h.TrustDomain] = &h
			}
		})
		r.Changed()
		synctest.Wait()
		f.set(func() { f.hang = false })
		two := web("two.org")
		two.Revision = 1
		c.change(func() { c.rel["two.org"] = &two })
		r.Changed()
		synctest.Wait()
		if c.bundle("two.org") == nil {
			t.Error("one waits for others that hang")
		}
		c.change(func() { delete(c.rel, "one.org") })
		r.Changed()
		synctest.Wait()
		if _, ok := r.Status("one.org"); ok {
			t.Error("one that is gone is remembered")
		}
		if err := r.Refresh(t.Context(), "one.org", c.source, c.take); !errors.Is(err, identity.ErrNotFound) {
			t.Errorf("asking one that is gone: %v", err)
		}
	})
}

// Refresh on demand is at once, tells what is wrong, and counts for the loop.
func TestRefreshOnDemand(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, c := &fakeFetch{hint: time.Hour, seq: 1}, newConsumer(web("partner.org"))
		r, stop := run(t, f, c)
		time.Sleep(30 * time.Minute)
		f.set(func() { f.seq = 2 })
		if err := r.Refresh(t.Context(), "partner.org", c.source, c.take); err != nil || c.bundle("partner.org").Sequence != 2 {
			t.Errorf("%v, %+v", err, c.bundle("partner.org"))
		}
		before := f.count()
		time.Sleep(50 * time.Minute) // less than the interval since
		synctest.Wait()
		if f.count() != before {
			t.Error("the loop did not take notice")
		}
		f.set(func() { f.err = identity.ErrUnavailable })
		if err := r.Refresh(t.Context(), "partner.org", c.source, c.take); !errors.Is(err, identity.ErrUnavailable) {
			t.Errorf("got %v", err)
		}
		f.set(func() { f.hang = true })
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := r.Refresh(ctx, "partner.org", c.source, c.take); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("one that hangs: %v", err)
		}
		stop()
		if _, ok := r.Status("partner.org"); ok {
			t.Error("who leads no longer still tells how it stands")
		}
	})
}

// A relationship that changes while one waits for the turn to ask: the new one is asked.
func TestRefreshOfOneThatChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, c := &fakeFetch{hint: time.Hour, seq: 1, hang: true}, newConsumer(web("partner.org"))
		r := NewRefresher(RefresherConfig{Fetch: f.fetch, Log: quiet()})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 2)
		go func() { done <- r.Refresh(ctx, "partner.org", c.source, c.take) }()
		synctest.Wait()
		go func() { done <- r.Refresh(t.Context(), "partner.org", c.source, c.take) }()
		synctest.Wait()
		f.set(func() { f.hang = false })
		c.change(func() {
			moved := *c.rel["partner.org"]
			moved.Revision = 9
			c.rel["partner.org"] = &moved
		})
		cancel()
		var errs []error
		for range 2 {
			errs = append(errs, <-done)
		}
		if (errs[0] == nil) == (errs[1] == nil) || c.bundle("partner.org") == nil {
			t.Errorf("%v", errs)
		}
		if err := r.Refresh(t.Context(), "partner.org", c.source, c.take); err != nil {
			t.Error(err)
		}
	})
}

// The whole way with bad partners: each leaves the last good bundle, and an error to be seen.
func TestBadPartnerKeepsTheLastGood(t *testing.T) {
	p := newPartner(t, "partner.org")
	good := p.serve(p.svid(p.endpointID()), "/bundle", p.endpoint(time.Minute))
	patient, hasty := p.client(), p.client(func(c *ClientConfig) { c.Deadline = time.Second })
	fetch := func(ctx context.Context, f identity.Federation) (*identity.Bundle, error) {
		if f.URL == good {
			return patient.Fetch(ctx, f)
		}
		return hasty.Fetch(ctx, f)
	}
	for name, bad := range badPartners(t, p) {
		t.Run(name, func(t *testing.T) {
			c := newConsumer(p.relationship(identity.ProfileSPIFFE, good))
			r := NewRefresher(RefresherConfig{Fetch: fetch, Log: quiet()})
			if err := r.Refresh(t.Context(), "partner.org", c.source, c.take); err != nil {
				t.Fatal(err)
			}
			c.change(func() {
				f := *c.rel["partner.org"]
				f.URL = bad.url
				c.rel["partner.org"] = &f
			})
			if err := r.Refresh(t.Context(), "partner.org", c.source, c.take); err == nil {
				t.Error("no error")
			}
			st, ok := r.Status("partner.org")
			if !ok || st.LastError == "" || st.Failures != 1 || st.LastSuccess.IsZero() {
				t.Errorf("%+v", st)
			}
			if b := c.bundle("partner.org"); b.Sequence != 7 || len(b.X509) != 1 {
				t.Errorf("%+v", b)
			}
		})
	}
}

// TestConformance25NewestBundle: after the bootstrap, each connection is verified by the newest bundle: a partner that changes its
// root is followed, if it publishes the next one before it uses it (SPIFFE Federation section 5.2.2.4).
func TestConformance25NewestBundle(t *testing.T) {
	p := newPartner(t, "partner.org")
	var mu sync.Mutex
	cert := p.svid(p.endpointID())
	url := p.serveWith(func() (c *certificate, err error) {
		mu.Lock()
		defer mu.Unlock()
		return cert, nil
	}, p.endpoint(time.Minute))
	c := newConsumer(p.relationship(identity.ProfileSPIFFE, url))
	r := NewRefresher(RefresherConfig{Fetch: p.client().Fetch, Log: quiet()})
	refresh := func() error { return r.Refresh(t.Context(), "partner.org", c.source, c.take) }
	if err := refresh(); err != nil {
		t.Fatal(err)
	}
	oldRoot, oldKey := p.root, p.key
	next, key := p.newRoot("partner.org")
	p.change(func(b *identity.Bundle) { b.Sequence, b.X509 = 8, [][]byte{oldRoot.Raw, next.Raw} })
	if err := refresh(); err != nil {
		t.Fatal(err)
	}
	p.root, p.key = next, key
	mu.Lock()
	cert = p.svid(p.endpointID())
	mu.Unlock()
	p.change(func(b *identity.Bundle) { b.Sequence, b.X509 = 9, [][]byte{next.Raw} })
	if err := refresh(); err != nil || c.bundle("partner.org").Sequence != 9 {
		t.Fatalf("the next root: %v", err)
	}
	// The root of the bootstrap counts no more.
	p.root, p.key = oldRoot, oldKey
	mu.Lock()
	cert = p.svid(p.endpointID())
	mu.Unlock()
	if err := refresh(); !errors.Is(err, identity.ErrUnauthenticated) || c.bundle("partner.org").Sequence != 9 {
		t.Errorf("the root of the bootstrap: %v", err)
	}
}
