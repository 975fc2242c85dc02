package server

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	adminv1 "countersign.io/countersign/api/admin/v1"
	"countersign.io/countersign/identity"

	"countersign.io/countersign/api"
)

// A gate is what stands between an authority and its next state: nothing signs with a key before everyone who must trust it has
// it, and nothing stops being trusted while anything live is under it. What cannot be known counts as not so.

// ackSettle is how long after the last acknowledgement is the earliest that the new authority signs: an agent's word means that
// it has sent the bundle on, not that every program behind it has read it.
const ackSettle = 5 * time.Second

// maxNamed is how many of those that a gate waits for are named.
const maxNamed = 100

// gate is who is waited for.
type gate struct {
	ready, total int
	svids        uint64
	waiting      []waiter
}

type waiter struct {
	name, because string
	until         time.Time // it ends by itself then; zero: it does not
}

func (g *gate) wait(until time.Time, name, because string, args ...any) {
	g.total++
	g.waiting = append(g.waiting, waiter{name, fmt.Sprintf(because, args...), until})
}

func (g *gate) pass() { g.ready, g.total = g.ready+1, g.total+1 }

// ignoring is the gate without those of these names.
func (g gate) ignoring(names []string) gate {
	before := len(g.waiting)
	g.waiting = slices.DeleteFunc(slices.Clone(g.waiting), func(w waiter) bool { return slices.Contains(names, w.name) })
	g.ready += before - len(g.waiting)
	return g
}

func (g *gate) open() bool { return len(g.waiting) == 0 }

// names of those that are waited for, as far as they are told.
func (g *gate) names() []string {
	var out []string
	for _, w := range g.waiting[:min(len(g.waiting), maxNamed)] {
		out = append(out, w.name)
	}
	if more := len(g.waiting) - len(out); more > 0 {
		out = append(out, fmt.Sprintf("and %d more", more))
	}
	return out
}

func (g *gate) toWire() *adminv1.Gate {
	slices.SortFunc(g.waiting, func(a, b waiter) int { return cmp.Compare(a.name, b.name) })
	out := &adminv1.Gate{Ready: uint32(g.ready), Total: uint32(g.total), Svids: g.svids, Open: g.open()}
	for _, w := range g.waiting {
		if len(out.Waiting) == maxNamed {
			out.More = uint32(len(g.waiting) - maxNamed)
			break
		}
		out.Waiting = append(out.Waiting, &adminv1.Gate_Waiting{Name: w.name, Because: w.because, Until: api.TimeToWire(w.until)})
	}
	return out
}

// bundleGate is who has yet to have the bundle of a sequence.
func (s *Server) bundleGate(c census, sequence uint64, now time.Time) gate {
	var g gate
	g.members(c, func(r report) string {
		if r.sequence < sequence {
			return fmt.Sprintf("it has bundle %d and not %d yet", r.sequence, sequence)
		}
		if r.noKey != "" {
			return "it could not sign under it: " + r.noKey
		}
		return ""
	})
	behind := func(p party) string {
		if p.sequence < sequence {
			return fmt.Sprintf("it has acknowledged bundle %d and not %d yet", p.sequence, sequence)
		}
		return ""
	}
	for _, rec := range s.agentIDs() {
		p, known := c.parties[rec.ID]
		switch {
		case p.connected && behind(p) == "":
			g.pass()
		case p.connected:
			g.wait(time.Time{}, rec.ID, "%s", behind(p))
		case s.agentGone24(c, rec, p, now):
		case known:
			g.wait(time.Time{}, rec.ID, "it has not been connected to any member since %s", p.seen.UTC().Format(time.RFC3339))
		default:
			g.wait(time.Time{}, rec.ID, "it is connected to no member")
		}
	}
	for _, id := range s.clustersBelow(now) {
		if p, known := c.parties[id]; !known || !p.connected {
			g.wait(time.Time{}, id, "the cluster below is not connected")
		} else if why := behind(p); why != "" {
			g.wait(time.Time{}, id, "%s", why)
		} else {
			g.pass()
		}
	}
	return g
}

// ackGate is who has yet to have the bundle with a prepared authority.
func (s *Server) ackGate(ctx context.Context, a *identity.Authority) gate {
	now := s.cfg.Now()
	g := s.bundleGate(s.takeCensus(ctx, a.Kind, a.ID), a.Sequence, now)
	since := s.rotations.complete(a, g.open(), now)
	if a.PreparedAt.After(since) {
		since = a.PreparedAt
	}
	g.after(since.Add(ackSettle), now, "settling", "programs behind the agents read the bundle that they were sent")
	if !a.PreparedAt.IsZero() {
		ahead := s.FederationSettle()
		if s.cfg.PublishAhead != nil {
			ahead = max(ahead, s.cfg.PublishAhead(a.Kind))
		}
		if ahead > 0 {
			g.after(a.PreparedAt.Add(ahead), now, "publishing", "whoever reads the published bundle or keys now and then, such as federated trust domains, must have had the time to")
		}
	}
	return g
}

func (g *gate) after(at, now time.Time, name, because string) {
	if now.Before(at) {
		g.wait(at, name, "%s", because)
	}
}

// members counts every member; ok says what one lacks.
func (g *gate) members(c census, lacks func(report) string) {
	for id, err := range c.failed {
		g.wait(time.Time{}, id, "the member cannot be asked: %v", err)
	}
	for _, r := range c.reports {
		if why := lacks(r); why != "" {
			g.wait(time.Time{}, r.member, "%s", why)
		} else {
			g.pass()
		}
	}
}

// agentGone24 reports whether nothing that the agent was given can be live: no member has seen it for the longest life of an SVID,
// and every member would have.
func (s *Server) agentGone24(c census, rec identity.Agent, p party, now time.Time) bool {
	last := rec.AttestedAt
	if p.seen.After(last) {
		last = p.seen
	}
	if c.oldest.After(last) {
		last = c.oldest
	}
	return len(c.failed) == 0 && now.Sub(last) > goneAfter
}

// clustersBelow are the SPIFFE IDs of the entries that are marked downstream.
func (s *Server) clustersBelow(now time.Time) []string {
	if s.cfg.Outside == nil {
		return nil
	}
	var out []string
	for _, id := range s.cfg.Outside.DownstreamIDs() {
		if e, ok := s.cfg.Outside.Downstream(id); ok && !e.Expired(now) {
			out = append(out, id)
		}
	}
	return out
}

// useGate is who has something live under an authority that signs no longer.
func (s *Server) useGate(ctx context.Context, a *identity.Authority) gate {
	var g gate
	now := s.cfg.Now()
	c := s.takeCensus(ctx, a.Kind, a.ID)
	// Whatever an entry was issued ends by then: a member that is cut off signs for maxStaleness at the most.
	longest := s.longestTTL(a.Kind)
	for _, r := range c.reports {
		longest = max(longest, r.longest)
	}
	signed := a.RetiredAt.Add(s.cfg.MaxStaleness)
	bound := signed.Add(longest)
	// And everything by then, also what was minted, or by an entry that is gone.
	end := signed.Add(identity.MaxX509TTL)
	g.members(c, func(r report) string {
		if r.signs == a.ID {
			return "it signs under it still"
		}
		return ""
	})
	for _, r := range c.reports {
		until := r.until
		if !r.since.IsZero() { // it may have minted something before
			until = later(until, sooner(r.since, signed).Add(identity.MaxX509TTL))
		}
		g.after(until, now, r.member, "what it signed and no agent accounts for lasts until then")
	}
	if a.Kind == identity.AuthorityX509 {
		for _, rec := range s.agentIDs() {
			s.agentUse(&g, c, rec, longest, bound, end, now)
		}
		s.goneUses(&g, c, bound, now)
	}
	for _, id := range s.clustersBelow(now) {
		switch p := c.parties[id]; {
		case a.Kind == identity.AuthorityJWT: // it has keys of its own
		case !p.connected:
			g.wait(time.Time{}, id, "the cluster below is not connected")
		case !p.tells:
			g.wait(time.Time{}, id, "the cluster below does not tell what is under the authority: it runs an older version")
		case p.svids > 0:
			g.wait(time.Time{}, id, "the cluster below has something live under it")
		default:
			g.pass()
		}
	}
	return g
}

func (s *Server) agentUse(g *gate, c census, rec identity.Agent, longest time.Duration, bound, end, now time.Time) {
	p, known := c.parties[rec.ID]
	until := sooner(p.until, end)
	if !rec.FirstAt.IsZero() { // a process before this one may have handed out what this one does not know of
		until = later(until, sooner(rec.AttestedAt.Add(longest), bound))
	}
	g.svids += uint64(p.svids)
	switch {
	case p.connected && p.tells && p.svids > 0 && now.Before(end): // whatever it says, there is nothing left after that
		g.wait(end, rec.ID, "it holds %d SVIDs under it", p.svids)
	case p.connected && p.tells && now.Before(until):
		g.wait(until, rec.ID, "programs that have left it may have an SVID under it")
	case p.connected && p.tells, !now.Before(bound), s.agentGone24(c, rec, p, now):
		g.pass()
	case p.connected:
		g.wait(bound, rec.ID, "it does not tell what it holds under it: it runs an older version")
	case known:
		g.wait(bound, rec.ID, "it has not been connected to any member since %s", p.seen.UTC().Format(time.RFC3339))
	default:
		g.wait(bound, rec.ID, "it is connected to no member")
	}
}

// goneUses counts agents that were evicted: what they were given is good until it ends, unlike that of a banned one.
func (s *Server) goneUses(g *gate, c census, bound, now time.Time) {
	for id, p := range c.parties {
		if _, ok := s.cfg.State.Agent(id); ok || now.Sub(p.seen) > goneAfter {
			continue
		}
		if parsed, err := spiffeid.FromString(id); err != nil || identity.RoleOf(parsed) != identity.RoleAgent {
			continue
		}
		g.after(bound, now, id, "it was evicted, and programs behind it may have an SVID under it")
	}
}

func later(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}

func sooner(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}
