package server

import (
	"fmt"
	"maps"
	"sync"
	"time"

	"countersign.io/countersign/identity"
)

// issued remembers until when something is live that this member signed and that no agent or cluster below accounts for:
// every JWT-SVID, and the X.509-SVIDs of whoever asks without an agent. It is on the disk before anything is signed, and says
// somewhat more than is so, for else each signature would be a write.
type issued struct {
	keep func(map[string]time.Time) error // nil: it is in memory only

	mu      sync.Mutex
	until   map[string]time.Time // by the ID of an authority, or unknown, as it is on the disk
	sent    map[string]time.Time // when something was signed last for an agent, which has yet to tell of it; lost with its connection
	longest map[identity.AuthorityKind]time.Duration
	scanned bool // longest counts all entries; from then on what changes
}

const (
	// maxAhead is how far what is kept is ahead of what was signed, at the most.
	maxAhead = 5 * time.Minute
	// answerTime is more than an agent waits for an answer: what it has not told of by then it has not taken.
	answerTime = 10 * time.Second
	// unknown stands for whatever was signed before this was kept: under any authority, and no longer than the longest life.
	unknown = ""
)

func (i *issued) begin(until map[string]time.Time, keep func(map[string]time.Time) error, now time.Time) {
	i.keep, i.until, i.sent = keep, maps.Clone(until), map[string]time.Time{}
	if until == nil {
		i.until = map[string]time.Time{unknown: now.Add(identity.MaxX509TTL).UTC()}
	}
}

// save has on the disk what begin found: the next start is not to know less, nor to believe that it knows more.
func (i *issued) save() error {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.keep == nil {
		return nil
	}
	return i.keep(i.until)
}

// lose notes that somebody's memory is gone: what was signed before now lasts for as long as anything does.
func (i *issued) lose(now time.Time) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	next := maps.Clone(i.until)
	next[unknown] = now.Add(identity.MaxX509TTL).UTC()
	if i.keep != nil {
		if err := i.keep(next); err != nil {
			return err
		}
	}
	i.until = next
	return nil
}

// since is before when it is not known what was signed; zero: all is known.
func (i *issued) since(now time.Time) time.Time {
	i.mu.Lock()
	defer i.mu.Unlock()
	if t, ok := i.until[unknown]; ok && now.Before(t) {
		return t.Add(-identity.MaxX509TTL)
	}
	return time.Time{}
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

// send is called before anything is signed for an agent.
func (i *issued) send(authority string, now time.Time) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if now.After(i.sent[authority]) {
		maps.DeleteFunc(i.sent, func(_ string, t time.Time) bool { return now.Sub(t) > answerTime })
		i.sent[authority] = now
	}
}

// last is when the last of it ends; zero: there was none. What an agent is being sent ends, as far as this member has to know,
// when the agent tells of it.
func (i *issued) last(authority string) time.Time {
	i.mu.Lock()
	defer i.mu.Unlock()
	if t, ok := i.sent[authority]; ok && t.Add(answerTime).After(i.until[authority]) {
		return t.Add(answerTime)
	}
	return i.until[authority]
}

// longestTTL is how long what an entry is issued lasts at the most: by default, or by any entry that this member has seen since
// it started, also one that is gone.
func (s *Server) longestTTL(kind identity.AuthorityKind) time.Duration {
	i := &s.issued
	i.mu.Lock()
	scanned := i.scanned
	i.mu.Unlock()
	if !scanned {
		s.scanTTLs()
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	return max(i.longest[kind], map[identity.AuthorityKind]time.Duration{identity.AuthorityX509: s.cfg.X509TTL, identity.AuthorityJWT: s.cfg.JWTTTL}[kind])
}

func (s *Server) scanTTLs() {
	for after, more := "", true; more; more = after != "" {
		var page []*identity.Entry
		page, after = s.cfg.State.Entries(after, 1000)
		s.issued.lasts(page...)
	}
	s.issued.mu.Lock()
	defer s.issued.mu.Unlock()
	s.issued.scanned = true
}

// lasts notes how long what these entries are issued lasts.
func (i *issued) lasts(entries ...*identity.Entry) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.longest == nil {
		i.longest = map[identity.AuthorityKind]time.Duration{}
	}
	for _, e := range entries {
		i.longest[identity.AuthorityX509] = max(i.longest[identity.AuthorityX509], e.X509TTL)
		i.longest[identity.AuthorityJWT] = max(i.longest[identity.AuthorityJWT], e.JWTTTL)
	}
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
		if isPodID(id) { // what was signed for it is known, as of every pod without an agent
			continue
		}
		p := party{id: id, connected: true, seen: now}
		for _, x := range sessions { // what it has it keeps
			_, seq := x.acked()
			p.sequence = max(p.sequence, seq)
		}
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
		page, after = s.cfg.State.Agents(after, 1000)
		for _, a := range page {
			if !a.Banned {
				out = append(out, *a)
			}
		}
	}
	return out
}
