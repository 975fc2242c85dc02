package agent

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc/codes"

	"countersign.io/countersign/api"
	"countersign.io/countersign/identity"
)

// transient reports whether an error says nothing about who asked for what: the same call may succeed later or at another
// member.
func transient(err error) bool {
	if errors.Is(err, errAnswer) {
		return true
	}
	switch api.Code(err) {
	case codes.Unavailable, codes.DeadlineExceeded, codes.Canceled, codes.ResourceExhausted, codes.Internal, codes.Unknown,
		codes.Aborted, codes.DataLoss, codes.Unimplemented:
		return true
	}
	return false
}

// refused reports whether a member did not accept the agent itself.
func refused(err error) bool {
	return errors.Is(err, identity.ErrDenied) || errors.Is(err, identity.ErrUnauthenticated)
}

// link is the agent's connection to the cluster as its callers see it: one session, or the reason why there is none.
type link struct {
	mu       sync.Mutex
	sess     *session
	reason   error                // why there is none, once every member was tried; nil while a round is under way
	changed  chan struct{}        // closed and replaced whenever one of the above changes
	revision uint64               // of the last push
	failed   map[string]time.Time // when a member last failed, by address
	last     time.Time            // when the last session ended
	hung     int                  // sessions in a row that ended because the member did not answer a probe
	hungAt   time.Time            // the last of them
}

func (l *link) init() {
	l.changed = make(chan struct{})
	l.failed = map[string]time.Time{}
}

// probeTimeout is how long a member has to answer a probe. One or two members may hang; where one after the other does, it is this
// node or all of them that have too much to do, and to change the member would make it more.
func (l *link) probeTimeout() time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	if time.Since(l.hungAt) > blameFor {
		l.hung = 0
	}
	return min(callTimeout, probeTimeout<<min(max(l.hung-1, 0), 10))
}

// blame notes that a member failed, so that the others come first for a while.
func (l *link) blame(addr string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.failed) >= maxMembers {
		clear(l.failed)
	}
	l.failed[addr] = time.Now()
}

// whenFailed is when a member last failed; zero if that is long ago.
func (l *link) whenFailed(addr string) time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	if at := l.failed[addr]; time.Since(at) < blameFor {
		return at
	}
	return time.Time{}
}

func (l *link) set(s *session, reason error) (old *session) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if old = l.sess; old != nil {
		l.last = time.Now()
	}
	l.sess, l.reason = s, reason
	close(l.changed)
	l.changed = make(chan struct{})
	return old
}

// down says that no member can be had. Callers get the reason at once instead of waiting.
func (l *link) down(reason error) { l.set(nil, reason) }

// why is nil while there is a session.
func (l *link) why() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.sess != nil:
		return nil
	case l.reason != nil:
		return fmt.Errorf("%w: no member of the cluster can be used: %v", identity.ErrUnavailable, l.reason)
	}
	return fmt.Errorf("%w: connecting to a member of the cluster", identity.ErrUnavailable)
}

func (l *link) status() (member string, revision uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.sess != nil {
		member = l.sess.addr
	}
	return member, l.revision
}

// lastContact is now while there is a session, else when the last one ended; zero: there was none.
func (l *link) lastContact(now time.Time) time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.sess != nil {
		return now
	}
	return l.last
}

// acquire waits while a member is being looked for. The session must be released.
func (l *link) acquire(ctx context.Context) (*session, error) {
	for {
		l.mu.Lock()
		s, reason, changed := l.sess, l.reason, l.changed
		if s != nil {
			s.calls++
		}
		l.mu.Unlock()
		if s != nil {
			return s, nil
		}
		if reason != nil {
			return nil, fmt.Errorf("%w: no member of the cluster can be used: %v", identity.ErrUnavailable, reason)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, fmt.Errorf("%w: waiting for a member of the cluster: %w", identity.ErrUnavailable, ctx.Err())
		}
	}
}

func (l *link) release(s *session) {
	l.mu.Lock()
	s.calls--
	idle := s.retired && s.calls == 0
	l.mu.Unlock()
	if idle {
		s.close()
	}
}

// retire lets a replaced session's calls end before its connection goes.
func (l *link) retire(s *session) {
	s.stopSync()
	l.mu.Lock()
	s.retired = true
	idle := s.calls == 0
	l.mu.Unlock()
	if idle {
		s.close()
	}
}

// fail ends a session that did not serve a call, so that the next member is tried.
func (l *link) fail(s *session, err error) {
	l.mu.Lock()
	mine := l.sess == s
	if mine {
		l.sess, l.last = nil, time.Now()
		if errors.Is(err, errHung) {
			l.hung, l.hungAt = l.hung+1, l.last
		}
		close(l.changed)
		l.changed = make(chan struct{})
	}
	l.mu.Unlock()
	if mine {
		s.end(err)
	}
}

// call runs f against a member, and against the next one when that fails in a way that another may not.
func (a *Agent) call(ctx context.Context, f func(context.Context, *session) error) error {
	var last error
	for range callTries {
		s, err := a.link.acquire(ctx)
		if err != nil {
			return errors.Join(err, last)
		}
		err = s.try(ctx, f)
		a.link.release(s)
		switch {
		case err == nil:
			return nil
		case ctx.Err() != nil:
			return fmt.Errorf("%w: %w", identity.ErrUnavailable, ctx.Err())
		case errors.Is(err, identity.ErrExhausted):
			return fmt.Errorf("%w: member %s: %w", identity.ErrUnavailable, s.addr, err)
		case refused(err):
			// Not an answer about the workload: those come inside a response.
			err = fmt.Errorf("%w: the member refuses this agent: %v", identity.ErrUnavailable, err)
		case !transient(err):
			return err
		}
		last = fmt.Errorf("member %s: %w", s.addr, err)
		a.log.Warn("member did not serve a call: trying the next", "member", s.addr, "error", err)
		a.link.fail(s, err)
	}
	return fmt.Errorf("%w: %w", identity.ErrUnavailable, last)
}

// addresses lists the members in the order to try them: those the cluster named, then those configured, each shuffled, so that
// agents spread; who failed lately comes later, who failed last comes last.
func (a *Agent) addresses() []string {
	var out []string
	add := func(in []string) {
		in = slices.Clone(in)
		rand.Shuffle(len(in), func(i, j int) { in[i], in[j] = in[j], in[i] })
		for _, s := range in {
			if !slices.Contains(out, s) {
				out = append(out, s)
			}
		}
	}
	if m := a.members.Load(); m != nil {
		add(*m)
	}
	add(a.cfg.Servers)
	failed := make(map[string]time.Time, len(out))
	for _, s := range out {
		failed[s] = a.link.whenFailed(s)
	}
	slices.SortStableFunc(out, func(x, y string) int { return failed[x].Compare(failed[y]) })
	return out
}

// connect opens a session with the first member that answers. A member that does not answer is not waited for: the next is
// tried beside it, which is what keeps a failover under a second. One that fails while others are still being waited for is tried
// again, so that a long patience with those does not hold up its return.
func (a *Agent) connect(ctx context.Context, patience time.Duration) (*session, error) {
	type result struct {
		addr string
		s    *session
		err  error
	}
	addrs := a.addresses()
	results := make(chan result, len(addrs))
	attempts, cancel := context.WithTimeout(ctx, patience+time.Duration(len(addrs))*stagger)
	queue, pending := slices.Clone(addrs), 0
	launch := func() {
		addr := queue[0]
		queue, pending = queue[1:], pending+1
		go func() {
			s, err := a.open(attempts, addr, patience)
			if err != nil {
				if attempts.Err() == nil {
					a.link.blame(addr)
				}
				err = fmt.Errorf("member %s: %w", addr, err)
			}
			results <- result{addr, s, err}
		}()
	}
	defer func() { // who lost the race must go
		cancel()
		for ; pending > 0; pending-- {
			if r := <-results; r.s != nil {
				r.s.close()
			}
		}
	}()
	launch()
	beside, again := time.NewTicker(stagger), time.NewTicker(retryAddress)
	defer beside.Stop()
	defer again.Stop()
	last := map[string]error{} // by address
	var failed []string
	for pending > 0 {
		next := false
		select {
		case r := <-results:
			pending--
			if r.err == nil {
				return r.s, nil
			}
			last[r.addr], failed, next = r.err, append(failed, r.addr), true
		case <-beside.C:
			next = true
		case <-again.C:
			queue, failed = append(queue, failed...), nil
		}
		if next && len(queue) > 0 && attempts.Err() == nil {
			launch()
			beside.Reset(stagger)
		}
	}
	var errs []error
	for _, addr := range addrs {
		if refused(last[addr]) {
			return nil, last[addr]
		}
		errs = append(errs, last[addr])
	}
	return nil, fmt.Errorf("%w: %w", identity.ErrUnavailable, errors.Join(errs...))
}
