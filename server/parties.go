package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"

	"countersign.io/countersign/api"
	memberv1 "countersign.io/countersign/api/member/v1"
	"countersign.io/countersign/identity"
)

// This file is how the members tell each other what their agents, the clusters below and they themselves have of the bundle, and
// what of theirs is under an authority. Rotations go by it: gate.go.

const (
	// partyChunk is how many parties go into one message.
	partyChunk = 1000
	// reportTime is how long one member is waited for.
	reportTime = 5 * time.Second
	// maxParties bounds what is taken from one member.
	maxParties = 200_000
)

// Reports asks one member, that very one, what it has to tell: its Member.Report.
type Reports func(ctx context.Context, m identity.Member, req *memberv1.ReportRequest) (grpc.ServerStreamingClient[memberv1.ReportResponse], func(), error)

// report is what one member tells.
type report struct {
	member    string
	sequence  uint64
	signs     string // ID of the authority of the kind that it signs under; empty: of none
	startedAt time.Time
	since     time.Time // it does not know what it signed before; zero: it knows all
	until     time.Time
	longest   time.Duration
	noKey     string // why it could not sign under the authority, of a prepared one
	parties   []party
}

// ownReport is this member's.
func (s *Server) ownReport(kind identity.AuthorityKind, authority string) report {
	longest := s.longestTTL(kind)
	r := report{
		member: s.cfg.MemberID, sequence: s.cfg.State.Bundle().Sequence, signs: s.cfg.CA.Signs(kind), startedAt: s.startedAt,
		since: s.issued.since(s.cfg.Now()), until: s.issued.last(authority), longest: longest,
	}
	if a, ok := s.authority(kind, authority, ""); ok && a.State == identity.AuthorityPrepared && authority != "" {
		if err := s.opens(a); err != nil {
			r.noKey = infoText(err.Error())
		}
	}
	r.parties = append(s.hub.parties(authority, longest, s.cfg.Now()), s.downstreams.parties(authority)...)
	return r
}

// opens reports whether this member has the key of an authority. Of one whose key is in a token, or below a seal that this member
// cannot open, it would not be able to sign. What it could open once it is not asked again.
func (s *Server) opens(a *identity.Authority) error {
	key := fmt.Sprint(a.Kind, " ", a.ID, " ", a.Revision)
	if s.opened.Load() == key {
		return nil
	}
	if _, err := s.cfg.Open(*a); err != nil {
		return err
	}
	s.opened.Store(key)
	return nil
}

// Report tells another member what this one knows.
func (s memberService) Report(req *memberv1.ReportRequest, stream grpc.ServerStreamingServer[memberv1.ReportResponse]) error {
	ctx := stream.Context()
	if _, err := s.currentMember(ctx, callOf(ctx).caller); err != nil {
		return err
	}
	kind := identity.AuthorityKind(req.Kind)
	if kind != identity.AuthorityX509 && kind != identity.AuthorityJWT || len(req.Authority) > maxKeyID {
		return fmt.Errorf("%w: a report on kind %q: want %s or %s, and an ID of at the most %d bytes", identity.ErrInvalid, infoText(req.Kind), identity.AuthorityX509, identity.AuthorityJWT, maxKeyID)
	}
	r := s.ownReport(kind, req.Authority)
	msg := &memberv1.ReportResponse{Self: &memberv1.ReportResponse_Self{
		BundleSequence: r.sequence, SignsUnder: r.signs, StartedAt: api.TimeToWire(r.startedAt), Until: api.TimeToWire(r.until), KnowsSince: api.TimeToWire(r.since), LongestMs: r.longest.Milliseconds(),
		NoKey: r.noKey,
	}}
	for i := range r.parties {
		p := &r.parties[i]
		msg.Parties = append(msg.Parties, &memberv1.ReportResponse_Party{
			Id: p.id, Connected: p.connected, SeenAt: api.TimeToWire(p.seen), BundleSequence: p.sequence, Tells: p.tells, Svids: p.svids, Until: api.TimeToWire(p.until),
		})
		if len(msg.Parties) == partyChunk {
			if err := stream.Send(msg); err != nil {
				return err
			}
			msg = &memberv1.ReportResponse{}
		}
	}
	return stream.Send(msg)
}

// askReport asks another member.
func (s *Server) askReport(ctx context.Context, m identity.Member, kind identity.AuthorityKind, authority string) (report, error) {
	r := report{member: m.ID}
	if s.cfg.Reports == nil {
		return r, fmt.Errorf("%w: this member asks no others", identity.ErrUnavailable)
	}
	ctx, cancel := context.WithTimeout(ctx, reportTime)
	defer cancel()
	stream, done, err := s.cfg.Reports(ctx, m, &memberv1.ReportRequest{Kind: string(kind), Authority: authority})
	if err != nil {
		return r, err
	}
	defer done()
	for first := true; ; first = false {
		msg, err := stream.Recv()
		if err != nil {
			if errors.Is(err, io.EOF) && !first {
				return r, nil
			}
			return r, api.FromStatus(err)
		}
		if self := msg.Self; first && self != nil {
			r.sequence, r.signs = self.BundleSequence, self.SignsUnder
			r.startedAt, r.until, r.longest = api.TimeFromWire(self.StartedAt), api.TimeFromWire(self.Until), time.Duration(self.LongestMs)*time.Millisecond
			r.since, r.noKey = api.TimeFromWire(self.KnowsSince), infoText(self.NoKey)
		} else if first {
			return r, fmt.Errorf("%w: it does not begin with itself", identity.ErrInvalid)
		}
		if len(r.parties)+len(msg.Parties) > maxParties {
			return r, fmt.Errorf("%w: more than %d agents", identity.ErrExhausted, maxParties)
		}
		for _, p := range msg.Parties {
			r.parties = append(r.parties, party{
				id: p.GetId(), connected: p.GetConnected(), seen: api.TimeFromWire(p.GetSeenAt()), sequence: p.GetBundleSequence(),
				tells: p.GetTells(), svids: p.GetSvids(), until: api.TimeFromWire(p.GetUntil()),
			})
		}
	}
}

// census is what all members told, by party. Of one that several have connected, since it moves or one has not noticed yet that it
// went, it is the worst of what they know that it uses; of one that is connected nowhere, what the one knows that saw it last.
type census struct {
	reports []report
	failed  map[string]error // members that could not be asked
	parties map[string]party
	oldest  time.Time // since when every member that was asked knows who was connected
}

func (s *Server) takeCensus(ctx context.Context, kind identity.AuthorityKind, authority string) census {
	c := census{failed: map[string]error{}, parties: map[string]party{}}
	var mu sync.Mutex
	var wg sync.WaitGroup
	for _, m := range s.allMembers() {
		wg.Go(func() {
			r, err := s.ownReport(kind, authority), error(nil)
			if m.ID != s.cfg.MemberID {
				r, err = s.askReport(ctx, m, kind, authority)
			}
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				c.failed[m.ID] = err
				return
			}
			c.reports = append(c.reports, r)
		})
	}
	wg.Wait()
	for i := range c.reports {
		r := &c.reports[i]
		if r.startedAt.After(c.oldest) {
			c.oldest = r.startedAt
		}
		for _, p := range r.parties {
			if old, ok := c.parties[p.id]; ok {
				p = old.and(p)
			}
			c.parties[p.id] = p
		}
	}
	return c
}

// and is what two members know of one party.
func (p party) and(o party) party {
	switch {
	case p.connected != o.connected:
		if o.connected {
			p, o = o, p
		}
		return p
	case !p.connected:
		if o.seen.After(p.seen) {
			return o
		}
		return p
	}
	p.sequence = max(p.sequence, o.sequence) // what it has it keeps
	p.tells = p.tells && o.tells
	p.svids = max(p.svids, o.svids)
	if o.until.After(p.until) {
		p.until = o.until
	}
	return p
}

// allMembers are those on the list, and those that agree with them and are not on it yet, or still.
func (s *Server) allMembers() []identity.Member {
	out := slices.Clone(s.cfg.State.Members())
	for _, m := range s.cfg.Cluster.Members() {
		if !slices.ContainsFunc(out, func(o identity.Member) bool { return o.ID == m.ID }) {
			out = append(out, identity.Member{ID: m.ID, Address: m.Address})
		}
	}
	return out
}
