package server

import (
	"fmt"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	memberv1 "countersign.io/countersign/api/member/v1"
	nodev1 "countersign.io/countersign/api/node/v1"
	"countersign.io/countersign/identity"
)

const (
	x509Kind = identity.AuthorityX509
	jwtKind  = identity.AuthorityJWT
)

// TestAckGate: nothing signs before everyone has it, and what cannot be known counts as not so.
func TestAckGate(t *testing.T) {
	self := func(change func(*memberv1.ReportResponse_Self)) func(*rotor, *identity.Authority) {
		return func(r *rotor, a *identity.Authority) { r.other("m2", change) }
	}
	id := func(name string) string { return "spiffe://example.org/countersign/agent/join/" + name }
	for _, c := range []struct {
		name string
		do   func(*rotor, *identity.Authority)
		want []string
	}{
		{"nobody else", func(*rotor, *identity.Authority) {}, nil},
		{"acknowledged", func(r *rotor, _ *identity.Authority) { r.says(r.connect(r.node("a"))) }, nil},
		{"connected and silent", func(r *rotor, _ *identity.Authority) { r.connect(r.node("a")) }, []string{id("a") + "=acknowledged bundle 0"}},
		{"connected and behind", func(r *rotor, a *identity.Authority) {
			s := r.connect(r.node("a"))
			if err := r.srv.takeAck(s, &nodev1.Ack{BundleSequence: a.Sequence - 1, Tells: true}); err != nil {
				r.t.Fatal(err)
			}
		}, []string{id("a") + "=acknowledged bundle "}},
		{"of an older version", func(r *rotor, a *identity.Authority) {
			r.srv.takeAck(r.connect(r.node("a")), &nodev1.Ack{BundleSequence: a.Sequence})
		}, nil},
		{"ahead of what there is", func(r *rotor, a *identity.Authority) { // its bundle is one that the cluster lost
			r.srv.takeAck(r.connect(r.node("a")), &nodev1.Ack{BundleSequence: a.Sequence + 100, Tells: true})
		}, []string{id("a") + "=acknowledged bundle 0"}},
		{"one of two streams has it", func(r *rotor, _ *identity.Authority) {
			a := r.node("a")
			r.says(r.connect(a))
			r.connect(a)
		}, nil},
		{"not connected", func(r *rotor, _ *identity.Authority) { r.node("a") }, []string{id("a") + "=connected to no member"}},
		{"gone a moment ago", func(r *rotor, _ *identity.Authority) {
			s := r.connect(r.node("a"))
			r.says(s)
			r.srv.hub.remove(s)
		}, []string{id("a") + "=not been connected to any member since"}},
		{"gone for a day", func(r *rotor, _ *identity.Authority) {
			s := r.connect(r.node("a"))
			r.srv.hub.remove(s)
			r.now = r.now.Add(goneAfter + time.Second)
		}, nil},
		{"gone for a day, says a member that was not there", func(r *rotor, _ *identity.Authority) {
			r.node("a")
			r.now = r.now.Add(goneAfter + time.Second)
			r.other("m2", func(s *memberv1.ReportResponse_Self) { s.StartedAt = timestamppb.New(r.now.Add(-time.Minute)) })
		}, []string{id("a") + "=connected to no member"}},
		{"gone for a day, and a member cannot be asked", func(r *rotor, _ *identity.Authority) {
			r.node("a")
			r.now = r.now.Add(goneAfter + time.Second)
			r.other("m2", nil)
			delete(r.others, "m2")
		}, []string{id("a") + "=connected to no member", "m2=cannot be asked"}},
		{"seen by another a moment ago", func(r *rotor, _ *identity.Authority) {
			a := r.node("a")
			r.now = r.now.Add(goneAfter + time.Second)
			r.other("m2", nil, &memberv1.ReportResponse_Party{Id: a.ID, SeenAt: timestamppb.New(r.now.Add(-time.Minute))})
		}, []string{id("a") + "=not been connected"}},
		{"connected to another", func(r *rotor, a *identity.Authority) {
			r.other("m2", nil, &memberv1.ReportResponse_Party{Id: r.node("a").ID, Connected: true, BundleSequence: a.Sequence, Tells: true})
		}, nil},
		{"connected to another and behind", func(r *rotor, a *identity.Authority) {
			r.other("m2", nil, &memberv1.ReportResponse_Party{Id: r.node("a").ID, Connected: true, BundleSequence: a.Sequence - 1, Tells: true})
		}, []string{id("a") + "=acknowledged bundle"}},
		{"banned", func(r *rotor, _ *identity.Authority) {
			if err := r.state.BanAgent(r.t.Context(), r.node("a").ID); err != nil {
				r.t.Fatal(err)
			}
		}, nil},
		{"evicted", func(r *rotor, _ *identity.Authority) {
			if err := r.state.EvictAgent(r.t.Context(), r.node("a").ID); err != nil {
				r.t.Fatal(err)
			}
		}, nil},
		{"a member has it", self(nil), nil},
		{"a member is behind", self(func(s *memberv1.ReportResponse_Self) { s.BundleSequence-- }), []string{"m2=it has bundle"}},
		{"a member has not the key", self(func(s *memberv1.ReportResponse_Self) { s.NoKey = "ca.key names another key" }), []string{"m2=could not sign under it: ca.key names another key"}},
		{"this member has not the key", func(r *rotor, _ *identity.Authority) {
			r.srv.opened.Store("")
			r.state.mu.Lock()
			defer r.state.mu.Unlock()
			for i := range r.state.authorities {
				if r.state.authorities[i].State == identity.AuthorityPrepared {
					r.state.authorities[i].SealedKey = []byte("sealed under a term that it has not")
				}
			}
		}, []string{"m1=could not sign under it: sealed for another place"}},
		{"a member cannot be asked", func(r *rotor, _ *identity.Authority) { r.other("m2", nil); delete(r.others, "m2") }, []string{"m2=cannot be asked"}},
		{"a member ends in the middle", func(r *rotor, _ *identity.Authority) {
			r.other("m2", nil)
			r.others["m2"] = func(*memberv1.ReportRequest) ([]*memberv1.ReportResponse, error) { return nil, nil }
		}, []string{"m2=cannot be asked"}},
		{"a member says nothing of itself", func(r *rotor, _ *identity.Authority) {
			r.other("m2", nil)
			r.others["m2"] = func(*memberv1.ReportRequest) ([]*memberv1.ReportResponse, error) {
				return []*memberv1.ReportResponse{{}}, nil
			}
		}, []string{"m2=does not begin with itself"}},
		{"a member that is not on the list yet", func(r *rotor, _ *identity.Authority) {
			members := r.srv.cfg.Cluster.Members
			r.srv.cfg.Cluster.Members = func() []MemberStatus { return append(members(), MemberStatus{ID: "m9", Address: "m9:1"}) }
		}, []string{"m9=cannot be asked"}},
		{"published", func(r *rotor, _ *identity.Authority) {
			r.srv.cfg.PublishAhead = func(identity.AuthorityKind) time.Duration { return time.Minute }
		}, []string{"publishing=federated"}},
		{"published for long enough", func(r *rotor, _ *identity.Authority) {
			r.srv.cfg.PublishAhead = func(identity.AuthorityKind) time.Duration { return ackSettle }
		}, nil},
		{"nobody reads it", func(r *rotor, _ *identity.Authority) {
			r.srv.cfg.PublishAhead = func(identity.AuthorityKind) time.Duration { return 0 }
		}, nil},
		{"a cluster below that is away", func(r *rotor, _ *identity.Authority) { r.below() }, []string{"spiffe://example.org/below=not connected"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, kind := range []identity.AuthorityKind{x509Kind, jwtKind} {
				r := newRotor(t)
				a, err := r.srv.prepareNew(t.Context(), kind, false)
				if err != nil {
					t.Fatal(err)
				}
				c.do(r, &a)
				r.srv.ackGate(t.Context(), &a)
				r.now = r.now.Add(ackSettle)
				waitsFor(t, r.srv.ackGate(t.Context(), &a), c.want...)
			}
		})
	}
}

// TestAckGateSettles: it counts from the last acknowledgement, by this member's own clock.
func TestAckGateSettles(t *testing.T) {
	r := newRotor(t)
	a, err := r.srv.prepareNew(t.Context(), x509Kind, false)
	if err != nil {
		t.Fatal(err)
	}
	s := r.connect(r.node("late"))
	r.now = r.now.Add(time.Hour)
	if g := r.srv.ackGate(t.Context(), &a); g.open() || len(g.waiting) != 1 {
		t.Fatalf("%+v", g.waiting)
	}
	r.says(s)
	waitsFor(t, r.srv.ackGate(t.Context(), &a), "settling=")
	r.now = r.now.Add(ackSettle - time.Millisecond)
	waitsFor(t, r.srv.ackGate(t.Context(), &a), "settling=")
	r.srv.hub.remove(s) // gone again: it begins anew
	waitsFor(t, r.srv.ackGate(t.Context(), &a), "spiffe://example.org/countersign/agent/join/late=not been connected")
	r.now = r.now.Add(ackSettle)
	s = r.connect(identity.Agent{ID: "spiffe://example.org/countersign/agent/join/late"})
	r.says(s)
	waitsFor(t, r.srv.ackGate(t.Context(), &a), "settling=")
	r.now = r.now.Add(ackSettle)
	waitsFor(t, r.srv.ackGate(t.Context(), &a))
	r.now = r.now.Add(-time.Hour) // a clock that was set back
	if g := r.srv.ackGate(t.Context(), &a); g.open() {
		t.Error("what was acknowledged in the future counts")
	}
}

func used(id string, svids uint32, until time.Time) *nodev1.Ack_Use {
	u := &nodev1.Ack_Use{Authority: id, Svids: svids}
	if !until.IsZero() {
		u.Until = timestamppb.New(until)
	}
	return u
}

// TestUseGate: nothing is revoked while anything live is under it. Each case is right after the new one signs, and what it waits for at
// after (0: then); it opens at until (0: never by itself).
func TestUseGate(t *testing.T) {
	id := func(name string) string { return "spiffe://example.org/countersign/agent/join/" + name }
	const bound, end = 2 * time.Hour, 25 * time.Hour // with max_staleness and x509_ttl of an hour
	type row struct {
		name  string
		do    func(r *rotor, old identity.Authority)
		want  []string
		until time.Duration
	}
	for _, c := range []row{
		{"nobody else", func(*rotor, identity.Authority) {}, nil, 0},
		{"uses nothing", func(r *rotor, _ identity.Authority) { r.says(r.connect(r.node("a"))) }, nil, 0},
		{"uses another", func(r *rotor, old identity.Authority) {
			r.says(r.connect(r.node("a")), used("another", 7, r.now.Add(time.Hour)))
		}, nil, 0},
		{"holds some", func(r *rotor, old identity.Authority) { r.says(r.connect(r.node("a")), used(old.ID, 3, time.Time{})) }, []string{id("a") + "=holds 3 SVIDs"}, end},
		{"others may hold some", func(r *rotor, old identity.Authority) {
			r.says(r.connect(r.node("a")), used(old.ID, 0, r.now.Add(40*time.Minute)))
		}, []string{id("a") + "=have left it"}, 40 * time.Minute},
		{"others held some", func(r *rotor, old identity.Authority) {
			r.says(r.connect(r.node("a")), used(old.ID, 0, r.now))
		}, nil, 0},
		{"longer than there is", func(r *rotor, old identity.Authority) {
			r.says(r.connect(r.node("a")), used(old.ID, 0, r.now.Add(1000*time.Hour)))
		}, []string{id("a") + "=have left it"}, end},
		{"does not know", func(r *rotor, old identity.Authority) {
			r.srv.takeAck(r.connect(r.node("a")), &nodev1.Ack{BundleSequence: r.state.Bundle().Sequence, Tells: true, Since: timestamppb.New(r.now.Add(-20 * time.Minute))})
		}, []string{id("a") + "=have left it"}, 40 * time.Minute},
		{"attested again 20 minutes ago", func(r *rotor, old identity.Authority) {
			a := r.node("a")
			a.FirstAt, a.AttestedAt = r.now.Add(-10*time.Hour), r.now.Add(-20*time.Minute)
			if _, err := r.state.PutAgent(r.t.Context(), a); err != nil {
				r.t.Fatal(err)
			}
			r.says(r.connect(a))
		}, []string{id("a") + "=have left it"}, 40 * time.Minute},
		{"attested again long ago", func(r *rotor, old identity.Authority) {
			a := r.node("a")
			a.FirstAt, a.AttestedAt = r.now.Add(-10*time.Hour), r.now.Add(-2*time.Hour)
			if _, err := r.state.PutAgent(r.t.Context(), a); err != nil {
				r.t.Fatal(err)
			}
			r.says(r.connect(a))
		}, nil, 0},
		{"a member was removed", func(r *rotor, old identity.Authority) {
			if err := r.srv.forgetMember(r.t.Context(), "m9"); err != nil {
				r.t.Fatal(err)
			}
		}, []string{"m1=no agent accounts for"}, 24 * time.Hour},
		{"of an older version", func(r *rotor, old identity.Authority) {
			r.srv.takeAck(r.connect(r.node("a")), &nodev1.Ack{BundleSequence: r.state.Bundle().Sequence})
		}, []string{id("a") + "=older version"}, bound},
		{"connected and silent", func(r *rotor, _ identity.Authority) { r.connect(r.node("a")) }, []string{id("a") + "=does not tell"}, bound},
		{"the newer of two streams is silent", func(r *rotor, _ identity.Authority) {
			a := r.node("a")
			r.says(r.connect(a))
			r.connect(a)
		}, []string{id("a") + "=does not tell"}, bound},
		{"not connected", func(r *rotor, _ identity.Authority) { r.node("a") }, []string{id("a") + "=connected to no member"}, bound},
		{"gone a moment ago", func(r *rotor, _ identity.Authority) {
			s := r.connect(r.node("a"))
			r.says(s)
			r.srv.hub.remove(s)
		}, []string{id("a") + "=not been connected"}, bound},
		{"not connected, and an entry gives longer lives", func(r *rotor, _ identity.Authority) {
			r.node("a")
			r.srv.changed([]identity.Change{{NewEntry: &identity.Entry{ID: "e", X509TTL: 9 * time.Hour}}})
			r.srv.changed([]identity.Change{{OldEntry: &identity.Entry{ID: "e", X509TTL: 9 * time.Hour}}})
		}, []string{id("a") + "=connected to no member"}, 10 * time.Hour},
		{"not connected, and another member has seen longer lives", func(r *rotor, _ identity.Authority) {
			r.node("a")
			r.other("m2", func(s *memberv1.ReportResponse_Self) { s.LongestMs = (5 * time.Hour).Milliseconds() })
		}, []string{id("a") + "=connected to no member"}, 6 * time.Hour},
		{"connected to two, and one does not know the worse", func(r *rotor, old identity.Authority) {
			a := r.node("a")
			r.says(r.connect(a))
			r.other("m2", nil, &memberv1.ReportResponse_Party{Id: a.ID, Connected: true, BundleSequence: r.state.Bundle().Sequence, Tells: true, Svids: 2})
		}, []string{id("a") + "=holds 2"}, end},
		{"connected to two, and only this one knows the worse", func(r *rotor, old identity.Authority) {
			a := r.node("a")
			r.says(r.connect(a), used(old.ID, 2, time.Time{}))
			r.other("m2", nil, &memberv1.ReportResponse_Party{Id: a.ID, Connected: true, BundleSequence: r.state.Bundle().Sequence + 1, Tells: true})
		}, []string{id("a") + "=holds 2"}, end},
		{"moved to another", func(r *rotor, old identity.Authority) {
			a := r.node("a")
			s := r.connect(a)
			r.says(s, used(old.ID, 9, time.Time{}))
			r.srv.hub.remove(s)
			r.other("m2", nil, &memberv1.ReportResponse_Party{Id: a.ID, Connected: true, BundleSequence: r.state.Bundle().Sequence, Tells: true})
		}, nil, 0},
		{"banned", func(r *rotor, old identity.Authority) {
			a := r.node("a")
			s := r.connect(a)
			r.says(s, used(old.ID, 3, time.Time{}))
			if err := r.state.BanAgent(r.t.Context(), a.ID); err != nil {
				r.t.Fatal(err)
			}
			r.srv.hub.remove(s)
		}, nil, 0},
		{"evicted", func(r *rotor, old identity.Authority) {
			a := r.node("a")
			s := r.connect(a)
			r.says(s, used(old.ID, 3, time.Time{}))
			if err := r.state.EvictAgent(r.t.Context(), a.ID); err != nil {
				r.t.Fatal(err)
			}
			r.srv.hub.remove(s)
		}, []string{id("a") + "=evicted"}, bound},
		{"a member signs under it", func(r *rotor, old identity.Authority) {
			r.other("m2", func(s *memberv1.ReportResponse_Self) { s.SignsUnder = old.ID })
		}, []string{"m2=signs under it still"}, 0},
		{"a member cannot be asked", func(r *rotor, _ identity.Authority) { r.other("m2", nil); delete(r.others, "m2") }, []string{"m2=cannot be asked"}, 0},
		{"another member minted for a day", func(r *rotor, _ identity.Authority) {
			until := timestamppb.New(r.now.Add(23 * time.Hour))
			r.other("m2", func(s *memberv1.ReportResponse_Self) { s.Until = until })
		}, []string{"m2=no agent accounts for"}, 23 * time.Hour},
		{"this member minted for a day", func(r *rotor, old identity.Authority) {
			if err := r.srv.issued.note(old.ID, r.now.Add(20*time.Hour), r.now); err != nil {
				r.t.Fatal(err)
			}
		}, []string{"m1=no agent accounts for"}, 20*time.Hour + maxAhead},
		{"a member does not know what it signed", func(r *rotor, _ identity.Authority) {
			since := timestamppb.New(r.now.Add(-10 * time.Hour))
			r.other("m2", func(s *memberv1.ReportResponse_Self) { s.KnowsSince = since })
		}, []string{"m2=no agent accounts for"}, 14 * time.Hour},
		{"a member began to know after it was cut off", func(r *rotor, _ identity.Authority) {
			r.other("m2", func(s *memberv1.ReportResponse_Self) { s.KnowsSince = timestamppb.New(r.now.Add(9 * time.Hour)) })
		}, []string{"m2=no agent accounts for"}, end},
		{"an answer is on its way", func(r *rotor, old identity.Authority) {
			r.says(r.connect(r.node("a")))
			r.srv.issued.send(old.ID, r.now)
		}, []string{"m1=no agent accounts for"}, answerTime},
		{"a cluster below that is away", func(r *rotor, _ identity.Authority) { r.below() }, []string{"spiffe://example.org/below=not connected"}, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRotor(t)
			old := r.toRevokeQuietly()
			retired := r.now
			c.do(r, old)
			waitsFor(t, r.srv.useGate(t.Context(), &old), c.want...)
			if c.want == nil || c.until == 0 {
				return
			}
			r.now = retired.Add(c.until - time.Second)
			if g := r.srv.useGate(t.Context(), &old); g.open() {
				t.Errorf("open before %v", c.until)
			}
			r.now = retired.Add(c.until + time.Second)
			if g := r.srv.useGate(t.Context(), &old); !g.open() {
				t.Errorf("after %v: %+v", c.until, g.waiting)
			}
		})
	}
}

// toRevokeQuietly has a new authority sign without a rotation, so that nothing goes on by itself.
func (r *rotor) toRevokeQuietly() identity.Authority {
	r.t.Helper()
	old := r.active(x509Kind)
	a, err := r.srv.prepareNew(r.t.Context(), x509Kind, false)
	if err != nil {
		r.t.Fatal(err)
	}
	if err := r.state.ActivateAuthority(r.t.Context(), r.now, x509Kind, a.ID, false); err != nil {
		r.t.Fatal(err)
	}
	r.srv.takeAuthorities()
	return r.authorityNow(x509Kind, old.ID)
}

// TestUseGateJWT: tokens are counted by members alone.
func TestUseGateJWT(t *testing.T) {
	r := newRotor(t)
	r.below()
	r.connect(r.node("a"))
	old := r.active(jwtKind)
	if err := r.srv.issued.note(old.ID, r.now.Add(5*time.Minute), r.now); err != nil {
		t.Fatal(err)
	}
	a, err := r.srv.prepareNew(t.Context(), jwtKind, false)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.state.ActivateAuthority(t.Context(), r.now, jwtKind, a.ID, false); err != nil {
		t.Fatal(err)
	}
	old = r.authorityNow(jwtKind, old.ID)
	waitsFor(t, r.srv.useGate(t.Context(), &old), "m1=signs under it still", "m1=no agent accounts for")
	r.srv.takeAuthorities()
	waitsFor(t, r.srv.useGate(t.Context(), &old), "m1=no agent accounts for")
	r.now = r.now.Add(10*time.Minute + time.Second)
	waitsFor(t, r.srv.useGate(t.Context(), &old))
}

// TestGateNames: what is told is bounded, and sorted; who is ignored is not waited for.
func TestGateNames(t *testing.T) {
	var g gate
	for i := range maxNamed + 7 {
		g.wait(time.Time{}, fmt.Sprintf("agent-%03d", maxNamed+7-i), "it is away")
	}
	g.pass()
	names := g.names()
	if len(names) != maxNamed+1 || names[maxNamed] != "and 7 more" {
		t.Errorf("%d names, the last %q", len(names), names[len(names)-1])
	}
	wire := g.toWire()
	if len(wire.Waiting) != maxNamed || wire.More != 7 || wire.Waiting[0].Name != "agent-001" || wire.Open || wire.Ready != 1 || wire.Total != maxNamed+8 {
		t.Errorf("%d waiting, %d more, %d of %d", len(wire.Waiting), wire.More, wire.Ready, wire.Total)
	}
	left := g.ignoring([]string{"agent-001", "agent-002", "nobody"})
	if len(left.waiting) != maxNamed+5 || left.ready != 3 || left.total != g.total || len(g.waiting) != maxNamed+7 {
		t.Errorf("%d waiting, %d of %d; before %d", len(left.waiting), left.ready, left.total, len(g.waiting))
	}
	if left := g.ignoring(nil); len(left.waiting) != len(g.waiting) || left.open() {
		t.Error("nobody ignored, and somebody gone")
	}
}
