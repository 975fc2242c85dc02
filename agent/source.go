package agent

import (
	"context"
	"fmt"
	"time"

	"countersign.io/countersign/attestor"
	"countersign.io/countersign/identity"
)

// Updates calls send with all that the caller is to see, at once and again on every change, until ctx ends (its error is
// returned), send fails (likewise), or the identity is lost. The caller is attested with attest now and at every renewal.
//
// The error wraps identity.ErrDenied when the workload has no identity (any more), and identity.ErrUnavailable when nothing
// can be told: no member answers and nothing live is held. An Update is shared and must not be modified; an unchanged state is
// not sent again, and its pointer stays the same.
func (a *Agent) Updates(ctx context.Context, attest attestor.Func, send func(*identity.Update) error) error {
	wl, err := identify(ctx, attest)
	if err != nil {
		return err
	}
	s := &stream{attest: attest, wake: make(chan struct{}, 1)}
	w, err := a.find(ctx, wl, s)
	wl.Wipe()
	if err != nil {
		return err
	}
	defer a.cache.detach(w, s)
	var sent *identity.Update
	for {
		u, err := a.cache.current(w, s, a.trust.Load())
		if err != nil {
			return err
		}
		if u != sent {
			if err := send(u); err != nil {
				return err
			}
			sent = u
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-s.wake:
		}
	}
}

// Current is what Updates would send first.
func (a *Agent) Current(ctx context.Context, attest attestor.Func) (*identity.Update, error) {
	wl, err := identify(ctx, attest)
	if err != nil {
		return nil, err
	}
	defer wl.Wipe()
	w, err := a.find(ctx, wl, nil)
	if err != nil {
		return nil, err
	}
	return a.cache.current(w, nil, a.trust.Load())
}

// Forget drops what is held for a workload that will not come again, such as a volume (see attestor.VolumeKey) that has been unmounted.
// Its streams end with identity.ErrDenied.
func (a *Agent) Forget(who string) {
	a.cache.mu.Lock()
	defer a.cache.mu.Unlock()
	if w := a.cache.byKey[who]; w != nil {
		a.cache.drop(w, fmt.Errorf("%w: the workload's volume is gone", identity.ErrDenied))
	}
}

// identify attests the caller. The result is to be wiped.
func identify(ctx context.Context, attest attestor.Func) (*attestor.Workload, error) {
	wl, err := attest(ctx)
	if err != nil {
		return nil, fmt.Errorf("attesting the caller: %w", err)
	}
	if wl == nil || wl.Key == "" {
		return nil, fmt.Errorf("attesting the caller: %w: nothing is known of it", identity.ErrDenied)
	}
	return wl, nil
}

// find returns the workload with a live identity. A stream is attached to it before anything is read from it, so that no
// change is missed.
func (a *Agent) find(ctx context.Context, wl *attestor.Workload, s *stream) (*workload, error) {
	for try := 0; ; try++ {
		w, err := a.fetch(ctx, wl)
		if err != nil || s == nil {
			return w, err
		}
		// Between the two it may have been dropped for a change: then the same evidence is asked about again.
		if err = a.cache.attach(w, s); err == nil || try == 2 || !transient(err) {
			return w, err
		}
	}
}

// fetch returns the workload with a live identity: what is held, or a member's answer. All that ask at once share one
// question, and there is no memory of a refusal.
func (a *Agent) fetch(ctx context.Context, wl *attestor.Workload) (*workload, error) {
	if err := checkEvidence(&wl.Evidence); err != nil {
		return nil, err
	}
	select {
	case <-a.loaded:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	now := time.Now()
	w, f, mine := a.cache.find(cacheKey(wl.Key, wl.Evidence.Token), now, a.link.why() != nil)
	if f == nil {
		return w, nil
	}
	var enough <-chan time.Time
	if a.cache.usable(w, now) {
		t := time.NewTimer(freshWait)
		defer t.Stop()
		enough = t.C
	}
	if mine {
		a.launch(ctx, w, f, wl.Evidence)
	}
	for {
		select {
		case <-f.done:
			if f.err != nil && !(transient(f.err) && a.cache.usable(w, time.Now())) {
				return nil, f.err
			}
			return w, nil
		case <-enough:
			if a.cache.usable(w, time.Now()) {
				return w, nil
			}
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}
