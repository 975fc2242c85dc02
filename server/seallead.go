package server

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"countersign.io/countersign/identity"
)

// orphanAfter is how long a pending key that nobody says to keep may wait for its maker before it is dropped.
const orphanAfter = 10 * time.Second

// leadSeal takes the seal's changes on to their end, whoever began them, until ctx ends: this member leads. Each step looks at
// the replicated state alone and may be done twice, so that a leader may die after any of them.
func (s *Server) leadSeal(ctx context.Context) {
	var told string
	var orphan orphanWatch
	for wait := retryFirst; ; {
		again, err := s.leadSealStep(ctx, &orphan)
		switch {
		case err != nil && ctx.Err() == nil:
			if err.Error() != told {
				told = err.Error()
				s.cfg.Log.Warn("the seal's change waits: trying again", "error", err)
			}
			wait = min(2*wait, retryMost)
		case again:
			wait, told = retryFirst, ""
		default:
			wait, told = sweepEvery, ""
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-s.seal.leader:
			timer.Stop()
			wait = max(retryFirst, min(wait, retryMost))
		case <-timer.C:
		}
	}
}

// orphanWatch is since when this leader has seen a pending key that nobody keeps.
type orphanWatch struct {
	keyID string
	since time.Time
}

// leadSealStep does the next thing, and reports whether there may be another that no change of the state will announce.
func (s *Server) leadSealStep(ctx context.Context, orphan *orphanWatch) (again bool, err error) {
	c := &s.cfg.Sealing
	if s.cfg.State.Level() < levelSeal {
		return false, nil
	}
	terms := c.Terms()
	if len(terms) == 0 {
		return true, s.recordFirstTerm(ctx)
	}
	for _, t := range terms {
		if t.State == identity.SealPending {
			return true, s.settleTerm(ctx, t, orphan)
		}
	}
	_, err = s.reseal(ctx, nil)
	return false, err
}

// recordFirstTerm makes known the key that every member got when it joined, or made when it began the cluster.
func (s *Server) recordFirstTerm(ctx context.Context) error {
	c := &s.cfg.Sealing
	number := c.Active()
	id, ok := c.Keys.KeyID(number)
	if !ok {
		return fmt.Errorf("%w: this member has no data key %d", identity.ErrUnavailable, number)
	}
	if err := c.Writes.PutSealTerm(ctx, s.cfg.Now(), number, id); err != nil {
		return fmt.Errorf("recording data key %d: %w", number, err)
	}
	return nil
}

// settleTerm makes a pending key active once every member keeps it, or drops one that nobody has: its maker died before it
// told anybody, and nothing is sealed under it.
func (s *Server) settleTerm(ctx context.Context, t identity.SealTerm, orphan *orphanWatch) error {
	c := &s.cfg.Sealing
	if waiting := s.waitingFor(&t); len(waiting) == 0 {
		if err := c.Writes.ActivateSealTerm(ctx, t.Number); err != nil {
			return fmt.Errorf("activating data key %d: %w", t.Number, err)
		}
		s.cfg.Log.Info("data key active", "term", t.Number)
		return nil
	}
	if len(t.Holders) > 0 || s.holds(&t) {
		*orphan = orphanWatch{}
		return nil
	}
	now := s.cfg.Now()
	if orphan.keyID != string(t.KeyID) {
		*orphan = orphanWatch{string(t.KeyID), now}
	}
	if now.Sub(orphan.since) < s.orphanAfter {
		return nil
	}
	// Its maker may be alive and slow to say so.
	if err := s.fetchTerm(ctx, t); err == nil || ctx.Err() != nil {
		return err
	}
	if err := c.Writes.DropSealTerm(ctx, t.Number); err != nil {
		return fmt.Errorf("dropping data key %d, which no member has: %w", t.Number, err)
	}
	s.cfg.Log.Warn("data key dropped: the member that made it died before another had it; rotate again", "term", t.Number)
	return nil
}

// waitingFor names the members that have not said that they keep the key; one if there are no members at all.
func (s *Server) waitingFor(t *identity.SealTerm) []string {
	members := s.cfg.State.Members()
	if len(members) == 0 {
		return []string{s.cfg.MemberID}
	}
	var out []string
	for _, m := range members {
		if !slices.Contains(t.Holders, m.ID) {
			out = append(out, m.ID)
		}
	}
	return out
}

// reseal seals under the active key what is sealed under another, and says how many values it was. A value that changed
// meanwhile is left to the next time.
func (s *Server) reseal(ctx context.Context, progress func(done, total int) error) (int, error) {
	c := &s.cfg.Sealing
	active, ok := s.activeTerm()
	if !ok {
		return 0, nil
	}
	if !s.holds(&active) {
		return 0, fmt.Errorf("%w: data key %d is not here yet", identity.ErrUnavailable, active.Number)
	}
	if err := c.Keys.Activate(active.Number); err != nil {
		return 0, err
	}
	var old []identity.Authority
	for _, a := range s.cfg.State.Authorities() {
		if n, ok := c.TermOf(a.SealedKey); len(a.SealedKey) > 0 && (!ok || n != active.Number) {
			old = append(old, a)
		}
	}
	var errs []error
	done := 0
	for _, a := range old {
		if err := s.resealAuthority(ctx, &a); err != nil {
			errs = append(errs, err)
			continue
		}
		done++
		if progress != nil {
			if err := progress(done, len(old)); err != nil {
				return done, err
			}
		}
	}
	if done > 0 {
		s.cfg.Log.Info("sealed anew", "values", done, "term", active.Number)
	}
	return done, errors.Join(errs...)
}

func (s *Server) resealAuthority(ctx context.Context, a *identity.Authority) error {
	ad := identity.AuthorityAD(s.cfg.TrustDomain, a.Kind, a.ID)
	plain, err := s.cfg.Sealing.Open(a.SealedKey, ad)
	if err != nil {
		return fmt.Errorf("opening the key of %s authority %s: %w", a.Kind, a.ID, err)
	}
	defer clear(plain)
	sealed, err := s.cfg.Seal(plain, ad)
	if err != nil {
		return fmt.Errorf("sealing the key of %s authority %s: %w", a.Kind, a.ID, err)
	}
	err = s.cfg.Sealing.Writes.ResealAuthority(ctx, a.Kind, a.ID, sealed, a.Revision)
	if errors.Is(err, identity.ErrPrecondition) || errors.Is(err, identity.ErrNotFound) {
		return nil // somebody else did, or it is gone: the next look will tell
	}
	if err != nil {
		return fmt.Errorf("replacing the sealed key of %s authority %s: %w", a.Kind, a.ID, err)
	}
	return nil
}

func (s *Server) activeTerm() (identity.SealTerm, bool) {
	for _, t := range s.cfg.Sealing.Terms() {
		if t.State == identity.SealActive {
			return t, true
		}
	}
	return identity.SealTerm{}, false
}
