package server

import (
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"countersign.io/countersign/identity"
)

// issued remembers until when something is live that this member signed and that no agent or cluster below accounts for:
// every JWT-SVID, and the X.509-SVIDs of whoever asks without an agent. It is on the disk before anything is signed, and says
// somewhat more than is so, for else each signature would be a write.
type issued struct {
	keep  func(map[string]time.Time) error // nil: it is in memory only
	since time.Time                        // what was signed before is not known; zero: all is

	mu      sync.Mutex
	until   map[string]time.Time // by the ID of an authority, as it is on the disk
	longest map[identity.AuthorityKind]time.Duration
	at      uint64 // revision that longest counts
}

// maxAhead is how far what is kept is ahead of what was signed, at the most.
const maxAhead = 5 * time.Minute

func (i *issued) begin(until map[string]time.Time, keep func(map[string]time.Time) error, now time.Time) {
	i.keep, i.until = keep, maps.Clone(until)
	if until == nil {
		i.since, i.until = now, map[string]time.Time{}
	}
}

// note is called before anything is signed that nobody else accounts for; after an error nothing may be.
func (i *issued) note(authority string, notAfter, now time.Time) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	if !notAfter.After(i.until[authority]) {
		return nil
	}
	next := maps.Clone(i.until)
	maps.DeleteFunc(next, func(_ string, t time.Time) bool { return now.After(t) })
	next[authority] = notAfter.Add(min(maxAhead, notAfter.Sub(now))).UTC()
	if i.keep != nil {
		if err := i.keep(next); err != nil {
			return fmt.Errorf("%w: this member cannot keep until when what it signs lasts, so it does not sign: %v", identity.ErrUnavailable, err)
		}
	}
	i.until = next
	return nil
}

// last is when the last of it ends; zero: there was none.
func (i *issued) last(authority string) time.Time {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.until[authority]
}

// longestTTL is how long what is signed lasts at the most: by default, or by any entry that this member has seen.
func (s *Server) longestTTL(kind identity.AuthorityKind) time.Duration {
	i := &s.issued
	rev := s.cfg.State.Revision()
	i.mu.Lock()
	if i.longest == nil {
		i.longest = map[identity.AuthorityKind]time.Duration{identity.AuthorityX509: s.cfg.X509TTL, identity.AuthorityJWT: s.cfg.JWTTTL}
	}
	current, out := i.at == rev, i.longest[kind]
	i.mu.Unlock()
	if current {
		return out
	}
	var x509, jwt time.Duration
	for after, more := "", true; more; more = after != "" {
		var page []*identity.Entry
		page, after = s.cfg.State.Entries(after, 1000)
		for _, e := range page {
			x509, jwt = max(x509, e.X509TTL), max(jwt, e.JWTTTL)
		}
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	i.longest[identity.AuthorityX509] = max(i.longest[identity.AuthorityX509], x509)
	i.longest[identity.AuthorityJWT] = max(i.longest[identity.AuthorityJWT], jwt)
	i.at = rev
	return i.longest[kind]
}

// party is an agent, or a cluster below, as one member knows it: what it has of the bundle, and what of it is under an authority.
type party struct {
	id        string
	connected bool
	seen      time.Time // when it was connected last; zero: not since this member started
	sequence  uint64
	tells     bool
	svids     uint32
	until     time.Time // when the last ends of what it does not renew
}

// use is what an agent says is under one authority.
type use struct {
	svids uint32
	until time.Time
}

// uses is what an agent said last of what it has handed out.
type uses struct {
	tells bool
	by    map[string]use
	since time.Time // it does not know what was handed out before; zero: it knows all
}

// maxUses bounds the authorities that one agent may name.
const maxUses = 64

// goneAfter is how long an agent, that no member has seen meanwhile, can have anything live that it was given: then no
// rotation waits for it any more.
const goneAfter = identity.MaxX509TTL

// parties lists the agents that this member knows of, connected or not.
func (h *hub) parties(authority string, longest time.Duration, now time.Time) []party {
	h.mu.Lock()
	defer h.mu.Unlock()
	maps.DeleteFunc(h.seen, func(_ string, at time.Time) bool { return now.Sub(at) > goneAfter })
	out := make([]party, 0, len(h.byAgent)+len(h.seen))
	for id, sessions := range h.byAgent {
		p := party{id: id, connected: true, seen: now}
		_, p.sequence = sessions[len(sessions)-1].acked()
		u := sessions[len(sessions)-1].used()
		p.tells = u.tells
		p.svids, p.until = u.by[authority].svids, u.by[authority].until
		if end := u.since.Add(longest); !u.since.IsZero() && end.After(p.until) {
			p.until = end
		}
		out = append(out, p)
	}
	for id, at := range h.seen {
		if len(h.byAgent[id]) == 0 {
			out = append(out, party{id: id, seen: at})
		}
	}
	return out
}

func (s *session) use(u uses) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.uses = u
}

func (s *session) used() uses {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.uses
}

// agentIDs are all agents that may speak: those on record and not banned.
func (s *Server) agentIDs() []identity.Agent {
	var out []identity.Agent
	for after, more := "", true; more; more = after != "" {
		var page []*identity.Agent
		page, after = s.agentPage(after)
		for _, a := range page {
			if !a.Banned {
				out = append(out, *a)
			}
		}
	}
	return out
}

func (s *Server) agentPage(after string) ([]*identity.Agent, string) {
	page, next := s.cfg.State.Agents(after, 1000)
	return slices.Clone(page), next
}
