package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	"countersign.io/countersign/identity"
)

// runLink keeps the agent attested and connected.
func (a *Agent) runLink(ctx context.Context) error {
	rounds := 0
	for ctx.Err() == nil {
		var err error
		if !a.live() {
			if err = a.attest(ctx, patience(rounds)); err != nil {
				err = a.notAttested(err)
			}
		}
		var s *session
		if err == nil {
			s, err = a.connect(ctx, patience(rounds))
			if err != nil && ctx.Err() == nil {
				err = a.notConnected(ctx, err, rounds)
			}
		}
		if s != nil {
			up := time.Now()
			var addr string
			addr, err = a.serve(ctx, s)
			if ctx.Err() != nil {
				return nil
			}
			a.link.blame(addr)
			a.log.Warn("lost the member: trying the next", "member", addr, "error", err)
			if time.Since(up) > provenAfter {
				rounds = 0
				continue
			}
			if rounds++; rounds <= len(a.addresses()) {
				continue
			}
		} else if err == nil {
			continue // attested again
		} else if fatal := (*fatalError)(nil); errors.As(err, &fatal) {
			return fatal.err
		} else {
			rounds++
		}
		if err != nil && ctx.Err() == nil {
			a.link.down(err)
			a.log.Error("no member of the cluster can be used: trying again", "error", err)
			sleep(ctx, backoff(rounds)) // callers keep getting the reason, through the next round too
		}
	}
	return nil
}

// fatalError ends Run.
type fatalError struct{ err error }

func (e *fatalError) Error() string { return e.err.Error() }

// notAttested decides what a failed attestation means while the agent has no live SVID of its own.
func (a *Agent) notAttested(err error) error {
	if transient(err) {
		return err
	}
	if errors.Is(err, identity.ErrDenied) {
		a.dropAll(err)
	}
	if !a.cfg.Credential.reusable() && a.own.Load() == nil && a.cache.empty() {
		return &fatalError{err}
	}
	return err
}

// notConnected decides what to do when no member took the agent's live SVID. Members that refuse it may take its
// credential anew (it was evicted, or the authority is another one); it returns nil then.
func (a *Agent) notConnected(ctx context.Context, err error, rounds int) error {
	// A TLS alert looks like a lost connection. So that an agent whose SVID no member accepts any more is not locked out,
	// it tries its credential in some of the rounds where nobody refused either.
	if a.cfg.Pod != nil {
		if errors.Is(err, identity.ErrDenied) {
			a.dropAll(err)
		}
		a.anew.Store(rounds%4 == 3)
		return err
	}
	if !refused(err) && !(a.cfg.Credential.reusable() && rounds%4 == 3) {
		return err
	}
	again := a.attest(ctx, patience(rounds))
	switch {
	case again == nil:
		return nil
	case ctx.Err() != nil || transient(again):
		return err
	}
	if err = fmt.Errorf("%w; and %w", err, again); errors.Is(err, identity.ErrDenied) {
		a.dropAll(err)
	}
	return err
}

// dropAll is what being banned means: no identity that this agent obtained is served any more.
func (a *Agent) dropAll(err error) {
	if n := a.cache.dropAll(denied(fmt.Errorf("the cluster refuses this node's agent: %w", err))); n > 0 {
		a.log.Error("the cluster refuses this agent: dropped every identity", "workloads", n, "error", err)
	}
}

// serve uses the session until it ends and returns the address of the member it was with. When the agent's own SVID is
// renewed it moves to a new connection, to any member: none outlives the SVID that opened it, and agents spread anew.
func (a *Agent) serve(ctx context.Context, s *session) (string, error) {
	if err := a.adopt(s); err != nil {
		return s.addr, err
	}
	timer := time.NewTimer(a.untilRenewal())
	defer timer.Stop()
	for moves := 0; ; {
		select {
		case <-ctx.Done():
			a.link.set(nil, nil)
			s.stopSync()
			s.close()
			return s.addr, ctx.Err()
		case <-s.done:
			a.link.fail(s, s.err())
			s.stopSync()
			s.close()
			return s.addr, s.err()
		case <-timer.C:
		case <-a.ownSooner:
		}
		if o := a.own.Load(); a.cfg.Pod == nil && s.connectedAs.tls == o.tls { // what differs else is when to renew it
			if time.Now().Before(o.renewAt) {
				timer.Reset(time.Until(o.renewAt))
				continue
			}
			if err := a.renewOwn(ctx, s); err != nil && ctx.Err() == nil {
				a.log.Warn("could not renew the agent's own SVID: trying again", "expires", o.notAfter, "error", err)
				if refused(err) || !time.Now().Before(o.notAfter) {
					a.link.fail(s, err)
				}
				timer.Reset(retryIn(time.Now(), o.notAfter))
				continue
			}
		}
		next, err := a.connect(ctx, patience(moves))
		if err != nil {
			moves++
			timer.Reset(max(time.Second, backoff(moves)))
			continue
		}
		moves = 0
		old := s
		s.stopSync()
		err = a.adopt(next)
		if err != nil {
			a.link.set(nil, nil)
		}
		a.link.retire(old)
		if err != nil {
			return next.addr, err
		}
		s = next
		timer.Reset(a.untilRenewal())
	}
}

// untilRenewal is how long the connection is used as it is.
func (a *Agent) untilRenewal() time.Duration {
	if a.cfg.Pod != nil {
		return podMove - spread(podMove/4)
	}
	return time.Until(a.own.Load().renewAt)
}

// adopt makes a session the agent's: its first state is applied, and its Sync stream runs.
func (a *Agent) adopt(s *session) error {
	if err := a.handle(s, s.first); err != nil {
		s.close()
		return err
	}
	s.first = nil
	a.anew.Store(false)
	a.cache.watchAll(s.wake)
	s.start(a)
	a.link.set(s, nil)
	a.log.Info("connected to a member", "member", s.addr)
	return nil
}

// patience is how long a member has to answer after so many rounds in vain. Where this node or the members have far too much to do, what
// takes a moment else takes many seconds, and giving up and beginning anew would never come to an end.
func patience(rounds int) time.Duration {
	return min(mostPatience, attemptTimeout<<min(rounds, 10))
}

// backoff is how long to wait after so many rounds: at random up to a limit that doubles, so that agents do not come back
// in step.
func backoff(rounds int) time.Duration {
	limit := min(maxBackoff, 100*time.Millisecond<<min(rounds, 10))
	return limit/2 + spread(limit/2)
}

// retryIn is when to try again to renew what ends at notAfter.
func retryIn(now, notAfter time.Time) time.Duration {
	d := min(max(notAfter.Sub(now)/10, 250*time.Millisecond), time.Minute)
	return d/2 + spread(d/2)
}

func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
