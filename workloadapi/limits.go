package workloadapi

import (
	"fmt"
	"log/slog"
	"strconv"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"countersign.io/countersign/identity"
)

// Quota is how much may be held at one time.
type Quota struct {
	Connections int
	Streams     int // calls under way, also those whose request has not come
}

// Limits bound what callers can hold and cause. A caller is a control group, the kernel's word for one container,
// service or session, and once its connection is attested also one user's processes in a pod. Not the pod alone: no
// member has verified by then that a process is of the pod that its control group names, and whoever may make control
// groups could use up another's pod. Every caller also counts against its user, so that a user who can make control
// groups without end gains little by it, and no user, root included, may have all there is.
//
// A private socket (see Private) is a caller by itself, and Total bounds all of them together, beside what the socket of all has.
//
// Zero fields mean DefaultLimits.
type Limits struct {
	Caller, User, Total Quota
	// CallsPerSecond of one caller, with bursts of as many; beyond it its connections are read more slowly. It is
	// true of small calls; 1 KiB received counts like one of them, a connection opened like ten, and a call refused by
	// the Source like fifty.
	CallsPerSecond int
}

// DefaultLimits suits a node of some hundred pods. In the worst case one caller holds some 10 MiB.
func DefaultLimits() Limits {
	return Limits{
		Caller:         Quota{Connections: 64, Streams: 256},
		User:           Quota{Connections: 1024, Streams: 4096},
		Total:          Quota{Connections: 2048, Streams: 8192},
		CallsPerSecond: 4000,
	}
}

// The units of work. An ordinary call is a call, three reads and some 200 bytes, which makes workPerCall.
const (
	workPerCall  = 16
	workOfCall   = 10
	workOfRead   = 1 // or single bytes would come cheap
	bytesPerWork = 64
	workOfConn   = 10 * workPerCall
	// A refusal is not cached as an identity is: it can cost a member a check of evidence, each time. A burst pays for 80
	// of them, so that who asks before its identity is there does not notice.
	workOfRefusal = 50 * workPerCall

	// Of connections and of streams, what a private socket may have however much the others hold.
	reserved = 8

	filesPerConn = 3 // the socket and what an attestor.Peer holds
)

func (l Limits) withDefaults() (Limits, error) {
	d := DefaultLimits()
	for _, f := range []struct {
		v   *int
		def int
	}{
		{&l.Caller.Connections, d.Caller.Connections}, {&l.Caller.Streams, d.Caller.Streams},
		{&l.User.Connections, d.User.Connections}, {&l.User.Streams, d.User.Streams},
		{&l.Total.Connections, d.Total.Connections}, {&l.Total.Streams, d.Total.Streams},
		{&l.CallsPerSecond, d.CallsPerSecond},
	} {
		if *f.v < 0 {
			return l, fmt.Errorf("%w: a Workload API limit is %d: it must not be negative", identity.ErrInvalid, *f.v)
		}
		if *f.v == 0 {
			*f.v = f.def
		}
	}
	return l, nil
}

// kind is what is counted; it indexes share.held and is looked up in a Quota by its limit method.
type kind int

const (
	connections kind = iota
	streams
	kinds
)

func (q Quota) limit(k kind) int { return [kinds]int{q.Connections, q.Streams}[k] }

func (k kind) String() string { return [kinds]string{"connections", "streams"}[k] }

// share is what one caller, one user, or everybody together holds. All fields but work are guarded by
// admission.mu.
type share struct {
	key    string
	held   [kinds]int
	work   *rate.Limiter // of callers only
	idleAt time.Time     // since when nothing is held
}

func (s *share) idle() bool { return s.held == [kinds]int{} }

// holder is whom something is counted against: the caller, its user, everybody, and, of a connection that was renamed,
// the caller that it came as. Without that, a container's root could become many callers by changing its user.
type holder [4]*share

// admission counts. It is the one place where callers meet, so nothing is done under its lock but counting.
type admission struct {
	limits Limits
	log    *slog.Logger
	told   rate.Sometimes // a flood must not become a flood of log lines

	mu     sync.Mutex
	total  share
	owned  share             // by the private sockets together
	shares map[string]*share // callers and users by key; see forget
	sweep  int               // size of shares at which to forget idle ones
	conns  map[*conn]struct{}
}

func newAdmission(l Limits, log *slog.Logger) *admission {
	return &admission{limits: l, log: log, total: share{key: "all callers"}, owned: share{key: "all volumes"}, told: rate.Sometimes{Interval: 10 * time.Second},
		shares: map[string]*share{}, sweep: 1024, conns: map[*conn]struct{}{}}
}

// open admits a connection, or says why not.
func (a *admission) open(c *conn, who caller) error {
	return a.count(func() error {
		h := holder{a.share(who.key, true), a.share("user:"+strconv.FormatUint(uint64(who.uid), 10), false), &a.total, nil}
		if !h[0].work.AllowN(time.Now(), workOfConn) {
			return overLimit(h[0], "connections a second")
		}
		if err := a.take(h, connections); err != nil {
			return err
		}
		c.holder = h
		a.conns[c] = struct{}{}
		return nil
	})
}

// openPrivate admits a connection to a private socket. It counts against that one, and of what it has beyond its reserve also
// against what all of them may have, so that none can take from another what that one needs.
func (a *admission) openPrivate(c *conn, key string) error {
	return a.count(func() error {
		h := holder{a.share(key, true), nil, &a.owned, nil}
		if !h[0].work.AllowN(time.Now(), workOfConn) {
			return overLimit(h[0], "connections a second")
		}
		if err := a.take(h, connections); err != nil {
			return err
		}
		c.holder = h
		a.conns[c] = struct{}{}
		return nil
	})
}

// close is the end of a connection that was admitted.
func (a *admission) close(c *conn) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.conns, c)
	a.give(c.holder, connections)
}

// inPod says that the connection's caller is in a pod, as far as this node can tell. Its calls under way stay counted
// where they were taken.
func (a *admission) inPod(c *conn, uid string) error {
	return a.count(func() error {
		key := "pod:" + uid + " " + c.holder[1].key
		if _, open := a.conns[c]; !open || c.holder[0].key == key {
			return nil
		}
		to := a.share(key, true)
		if to.held[connections] >= a.limits.Caller.Connections {
			return overLimit(to, connections.String())
		}
		to.held[connections]++
		if c.holder[3] == nil {
			c.holder[3] = c.holder[0]
		} else {
			a.give(holder{c.holder[0]}, connections)
		}
		c.holder[0] = to
		return nil
	})
}

// hold takes one of the kind for the connection's caller. The holder returned is to be given to release.
func (a *admission) hold(c *conn, k kind) (h holder, err error) {
	err = a.count(func() error {
		h = c.holder
		return a.take(h, k)
	})
	return h, err
}

// count does what may be over a limit. The log is written without the lock.
func (a *admission) count(f func() error) error {
	a.mu.Lock()
	err := f()
	a.mu.Unlock()
	if err != nil {
		a.told.Do(func() { a.log.Warn("a limit of the Workload API is reached", "error", err) })
	}
	return err
}

// overLimit is how load is shed: Unavailable (Workload Endpoint section 6), so that clients come back.
func overLimit(s *share, what string) error {
	return fmt.Errorf("%w: too many %s of %s at the Workload API: close some, or try again later", identity.ErrUnavailable, what, s.key)
}

func (a *admission) release(h holder, k kind) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.give(h, k)
}

// pay charges work to the connection's caller, also as whom it came: that is whose next connection will be refused. It
// returns how long the caller should wait for it.
func (a *admission) pay(c *conn, work int) (wait time.Duration) {
	a.mu.Lock()
	payers := [2]*share{c.holder[0], c.holder[3]}
	a.mu.Unlock()
	now := time.Now()
	for _, s := range payers {
		if s != nil {
			wait = max(wait, s.work.ReserveN(now, min(work, s.work.Burst())).DelayFrom(now))
		}
	}
	return wait
}

func (a *admission) take(h holder, k kind) error {
	for i, q := range [4]Quota{a.limits.Caller, a.limits.User, a.limits.Total, a.limits.Caller} {
		if i == 2 && h[1] == nil && h[0].held[k] < reserved {
			continue
		}
		if h[i] != nil && h[i].held[k] >= q.limit(k) {
			return overLimit(h[i], k.String())
		}
	}
	for _, s := range h {
		if s != nil {
			s.held[k]++
		}
	}
	return nil
}

func (a *admission) give(h holder, k kind) {
	for _, s := range h {
		if s == nil {
			continue
		}
		if s.held[k]--; s.idle() {
			s.idleAt = time.Now()
		}
	}
}

// share finds or makes the share of a caller or user.
func (a *admission) share(key string, caller bool) *share {
	if s := a.shares[key]; s != nil {
		return s
	}
	if len(a.shares) >= a.sweep {
		a.forget()
	}
	s := &share{key: key, idleAt: time.Now()}
	if caller {
		n := workPerCall * a.limits.CallsPerSecond
		s.work = rate.NewLimiter(rate.Limit(n), max(n, workOfConn))
	}
	a.shares[key] = s
	return s
}

// forget drops the shares of those who hold nothing, once their measure of work has filled up again: earlier,
// hanging up would be a way around it. Doubling spreads its cost over the calls that made the shares.
func (a *admission) forget() {
	now := time.Now()
	for key, s := range a.shares {
		refilled := s.idleAt.Add(time.Second)
		if s.work != nil { // refusals may have left it far below nothing
			if debt := -s.work.TokensAt(s.idleAt); debt > 0 {
				refilled = refilled.Add(time.Duration(debt / float64(s.work.Limit()) * float64(time.Second)))
			}
		}
		if s.idle() && refilled.Before(now) {
			delete(a.shares, key)
		}
	}
	a.sweep = max(1024, 2*len(a.shares))
}

// closeConns closes the connections that match.
func (a *admission) closeConns(match func(*conn) bool) {
	a.mu.Lock()
	var out []*conn
	for c := range a.conns {
		out = append(out, c)
	}
	a.mu.Unlock()
	for _, c := range out {
		if match(c) {
			c.Close()
		}
	}
}
