package server

import (
	"fmt"
	"net/netip"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"golang.org/x/time/rate"

	"countersign.io/countersign/identity"
)

// Limits bound what callers that have proved nothing may cost, and an agent that somebody took over. Zero values mean the defaults.
type Limits struct {
	// GuestRate and GuestBurst are the calls per second of one address (one /64 for IPv6); 0: 20 and 100.
	GuestRate  float64
	GuestBurst int
	// TotalRate and TotalBurst are those of all addresses together; 0: 1000 and 2000.
	TotalRate  float64
	TotalBurst int
	// AgentRate and AgentBurst are the SVIDs per second that one agent is given, each with a record in the audit log; 0: 4000 and
	// 20,000, more than any node can need.
	AgentRate  float64
	AgentBurst int
	// AdminRate and AdminBurst are the calls per second of one remote admin; 0: 50 and 200.
	AdminRate  float64
	AdminBurst int
}

// trackedAddresses is how many addresses have a limiter of their own. Who has more addresses than that meets the
// total.
const trackedAddresses = 16384

// trackedAgents is how many agents have a limiter of their own. One that is forgotten has been idle for longer than the others.
const trackedAgents = 16384

// trackedAdmins is how many admins have a limiter of their own.
const trackedAdmins = 1024

type limits struct {
	cfg    Limits
	total  *rate.Limiter
	byAddr *lru.Cache[netip.Addr, *rate.Limiter]

	byAgent *lru.Cache[string, *rate.Limiter]
	byAdmin *lru.Cache[string, *rate.Limiter] // by SPIFFE ID
}

func newLimits(cfg Limits) (*limits, error) {
	if cfg.GuestRate < 0 || cfg.GuestBurst < 0 || cfg.TotalRate < 0 || cfg.TotalBurst < 0 || cfg.AgentRate < 0 || cfg.AgentBurst < 0 || cfg.AdminRate < 0 || cfg.AdminBurst < 0 {
		return nil, fmt.Errorf("%w: negative limits for callers", identity.ErrInvalid)
	}
	orDefault(&cfg.GuestRate, 20)
	orDefault(&cfg.GuestBurst, 100)
	orDefault(&cfg.TotalRate, 1000)
	orDefault(&cfg.TotalBurst, 2000)
	orDefault(&cfg.AgentRate, 4000)
	orDefault(&cfg.AgentBurst, 20000)
	orDefault(&cfg.AdminRate, 50)
	orDefault(&cfg.AdminBurst, 200)
	byAddr, err := lru.New[netip.Addr, *rate.Limiter](trackedAddresses)
	if err != nil {
		return nil, err
	}
	byAgent, err := lru.New[string, *rate.Limiter](trackedAgents)
	if err != nil {
		return nil, err
	}
	byAdmin, err := lru.New[string, *rate.Limiter](trackedAdmins)
	if err != nil {
		return nil, err
	}
	return &limits{cfg: cfg, total: rate.NewLimiter(rate.Limit(cfg.TotalRate), cfg.TotalBurst), byAddr: byAddr, byAgent: byAgent, byAdmin: byAdmin}, nil
}

// admin counts a call of a remote admin. Who has no power counts as a stranger, by address.
func (l *limits) admin(who caller, power bool) error {
	if !power {
		return l.allow(who.addr)
	}
	id := who.id.String()
	own, ok := l.byAdmin.Get(id)
	if !ok {
		own = rate.NewLimiter(rate.Limit(l.cfg.AdminRate), l.cfg.AdminBurst)
		if prev, ok, _ := l.byAdmin.PeekOrAdd(id, own); ok {
			own = prev
		}
	}
	if !own.Allow() {
		return fmt.Errorf("%w: too many calls of %s: at the most %v a second", identity.ErrExhausted, id, l.cfg.AdminRate)
	}
	return nil
}

// issue counts n SVIDs that an agent asks for. Guests are counted by the call.
func (l *limits) issue(who call, n int) error {
	if who.agent == nil || n <= 0 {
		return nil
	}
	own, ok := l.byAgent.Get(who.agent.ID)
	if !ok {
		own = rate.NewLimiter(rate.Limit(l.cfg.AgentRate), l.cfg.AgentBurst)
		if prev, ok, _ := l.byAgent.PeekOrAdd(who.agent.ID, own); ok {
			own = prev
		}
	}
	if !own.AllowN(time.Now(), n) {
		return fmt.Errorf("%w: agent %s asks for too many SVIDs: at the most %v a second, %d at once; try again", identity.ErrExhausted, who.agent.ID, l.cfg.AgentRate, l.cfg.AgentBurst)
	}
	return nil
}

func (l *limits) allow(addr netip.Addr) error {
	own, ok := l.byAddr.Get(addr)
	if !ok {
		own = rate.NewLimiter(rate.Limit(l.cfg.GuestRate), l.cfg.GuestBurst)
		if prev, ok, _ := l.byAddr.PeekOrAdd(addr, own); ok {
			own = prev
		}
	}
	// The own limit first: who is over it must not use up the total.
	if !own.Allow() {
		return fmt.Errorf("%w: too many calls without an agent's certificate from %s: at the most %v a second", identity.ErrExhausted, addr, l.cfg.GuestRate)
	}
	if !l.total.Allow() {
		return fmt.Errorf("%w: too many calls without an agent's certificate: try again, or another member", identity.ErrUnavailable)
	}
	return nil
}

func orDefault[T ~int | ~int64 | ~float64](p *T, v T) {
	if *p == 0 {
		*p = v
	}
}
