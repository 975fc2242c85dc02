package server

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	memberv1 "countersign.io/countersign/api/member/v1"
	nodev1 "countersign.io/countersign/api/node/v1"
	"countersign.io/countersign/identity"
)

func (f *fakeState) Rotations() []identity.Rotation {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []identity.Rotation
	for _, r := range f.rotations {
		out = append(out, r)
	}
	return out
}

func (f *fakeState) PutRotation(_ context.Context, _ time.Time, r identity.Rotation, ifRevision uint64) (identity.Rotation, error) {
	err := f.write(func(rev uint64) (identity.Change, error) {
		if f.rotations == nil {
			f.rotations = map[identity.AuthorityKind]identity.Rotation{}
		}
		old, ok := f.rotations[r.Kind]
		if ifRevision == 0 && ok && !old.Ended() || ifRevision != 0 && old.Revision != ifRevision {
			return identity.Change{}, fmt.Errorf("%w: the rotation has moved on", identity.ErrPrecondition)
		}
		if err := r.Check(); err != nil {
			return identity.Change{}, err
		}
		r.Revision = rev
		f.rotations[r.Kind] = r
		return identity.Change{Rotation: true}, nil
	})
	return r, err
}

func (f *fakeState) TaintAuthority(_ context.Context, now time.Time, _ identity.AuthorityKind, id string, spread time.Duration, compromised bool) error {
	return f.setAuthority(id, func(a *identity.Authority) error {
		if a.State != identity.AuthorityRetiring && a.State != identity.AuthorityTainted {
			return fmt.Errorf("%w: authority %s is %s", identity.ErrPrecondition, id, a.State)
		}
		a.State, a.TaintedAt, a.Spread = identity.AuthorityTainted, now, spread
		for i := range f.authorities {
			if compromised {
				f.authorities[i].Vouched = nil
			}
		}
		return nil
	})
}

func (f *fakeState) RevokeAuthority(_ context.Context, now time.Time, _ identity.AuthorityKind, id string) error {
	return f.setAuthority(id, func(a *identity.Authority) error {
		if a.State != identity.AuthorityRetiring && a.State != identity.AuthorityTainted && a.State != identity.AuthorityRevoked {
			return fmt.Errorf("%w: authority %s is %s", identity.ErrPrecondition, id, a.State)
		}
		a.State, a.RevokedAt, a.SealedKey = identity.AuthorityRevoked, now, nil
		return nil
	})
}

// rotor is a member that leads, as far as rotations go: nothing of it runs by itself, and its clock stands still.
type rotor struct {
	*world
	t      testing.TB
	now    time.Time
	others map[string]func(*memberv1.ReportRequest) ([]*memberv1.ReportResponse, error)
}

func newRotor(t testing.TB, edits ...func(*Config)) *rotor {
	t.Helper()
	r := &rotor{t: t, now: time.Now(), others: map[string]func(*memberv1.ReportRequest) ([]*memberv1.ReportResponse, error){}}
	r.world = newWorld(t, append([]func(*Config){func(c *Config) {
		c.Now = func() time.Time { return r.now }
		c.IssuedUntil = map[string]time.Time{}
		c.X509TTL, c.JWTTTL, c.MaxStaleness = time.Hour, 5*time.Minute, time.Hour
		c.Reports = r.report
	}}, edits...)...)
	r.srv.cfg.Outside, r.srv.cfg.Authorities = r.state, r.state
	r.srv.cfg.Rotating = Rotating{Rotations: r.state.Rotations, Writes: r.state, Manual: true}
	if err := r.state.PutMember(t.Context(), identity.Member{ID: "m1", Address: "m1:1"}); err != nil {
		t.Fatal(err)
	}
	if err := r.srv.ensureAuthorities(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.srv.takeAuthorities()
	return r
}

// stream is what another member answers.
type stream struct {
	grpc.ClientStream
	messages []*memberv1.ReportResponse
	err      error
}

func (s *stream) Recv() (*memberv1.ReportResponse, error) {
	if len(s.messages) == 0 {
		return nil, s.err
	}
	m := s.messages[0]
	s.messages = s.messages[1:]
	return m, nil
}

func (r *rotor) report(_ context.Context, m identity.Member, req *memberv1.ReportRequest) (grpc.ServerStreamingClient[memberv1.ReportResponse], func(), error) {
	answer := r.others[m.ID]
	if answer == nil {
		return nil, nil, fmt.Errorf("%w: nobody is there", identity.ErrUnavailable)
	}
	messages, err := answer(req)
	if err != nil {
		return nil, nil, err
	}
	return &stream{messages: messages, err: io.EOF}, func() {}, nil
}

// other is a member that is up to date and has this to add; self may be changed.
func (r *rotor) other(name string, change func(*memberv1.ReportResponse_Self), parties ...*memberv1.ReportResponse_Party) {
	r.t.Helper()
	if err := r.state.PutMember(r.t.Context(), identity.Member{ID: name, Address: name + ":1"}); err != nil {
		r.t.Fatal(err)
	}
	r.others[name] = func(req *memberv1.ReportRequest) ([]*memberv1.ReportResponse, error) {
		self := &memberv1.ReportResponse_Self{
			BundleSequence: r.state.Bundle().Sequence, SignsUnder: r.active(identity.AuthorityKind(req.Kind)).ID, StartedAt: timestamppb.New(r.srv.startedAt),
			LongestMs: time.Hour.Milliseconds(),
		}
		if change != nil {
			change(self)
		}
		return []*memberv1.ReportResponse{{Self: self, Parties: parties}}, nil
	}
}

func (r *rotor) by(kind identity.AuthorityKind, state identity.AuthorityState) (out []identity.Authority) {
	for _, a := range r.state.Authorities() {
		if a.Kind == kind && a.State == state {
			out = append(out, a)
		}
	}
	return out
}

func (r *rotor) active(kind identity.AuthorityKind) identity.Authority {
	r.t.Helper()
	a := r.by(kind, identity.AuthorityActive)
	if len(a) != 1 {
		r.t.Fatalf("%d active %s authorities: %+v", len(a), kind, r.state.Authorities())
	}
	return a[0]
}

// node puts an agent on record.
func (r *rotor) node(name string) identity.Agent {
	r.t.Helper()
	a, _ := r.agent(r.t, name, "")
	a.AttestedAt = r.now
	if _, err := r.state.PutAgent(r.t.Context(), a); err != nil {
		r.t.Fatal(err)
	}
	return a
}

// below has an entry for a cluster below.
func (r *rotor) below() {
	r.t.Helper()
	e := identity.Entry{ID: "below", SPIFFEID: "spiffe://example.org/below", Selectors: []identity.Selector{"k8s:ns:ca"}, Downstream: true}
	if _, err := r.state.CreateEntry(r.t.Context(), r.now, e); err != nil {
		r.t.Fatal(err)
	}
}

// connect opens an agent's stream here; it has said nothing yet.
func (r *rotor) connect(a identity.Agent) *session {
	r.t.Helper()
	s, err := r.srv.hub.open(a.ID, "test")
	if err != nil {
		r.t.Fatal(err)
	}
	return s
}

// says has an agent acknowledge what this member has, and tell what it uses.
func (r *rotor) says(s *session, uses ...*nodev1.Ack_Use) {
	r.t.Helper()
	if err := r.srv.takeAck(s, &nodev1.Ack{BundleSequence: r.state.Bundle().Sequence, Tells: true, Uses: uses}); err != nil {
		r.t.Fatal(err)
	}
}

// lead has the leader look, as often as there is something to do, and returns what keeps it.
func (r *rotor) lead(kind identity.AuthorityKind) error {
	r.t.Helper()
	for range 20 {
		before := r.state.Revision()
		_, err := r.srv.leadRotation(r.t.Context(), kind)
		r.srv.takeAuthorities()
		if err != nil || r.state.Revision() == before {
			return err
		}
	}
	r.t.Fatal("it does not come to rest")
	return nil
}

func (r *rotor) led(kind identity.AuthorityKind) {
	r.t.Helper()
	if err := r.lead(kind); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rotor) rotation(kind identity.AuthorityKind) identity.Rotation {
	r.t.Helper()
	x, ok := r.srv.rotation(kind)
	if !ok {
		r.t.Fatal("no rotation")
	}
	return x
}

func (r *rotor) at(kind identity.AuthorityKind, phase identity.RotationPhase) {
	r.t.Helper()
	if x := r.rotation(kind); x.Phase != phase {
		r.t.Fatalf("it is at %s, not at %s: %+v", x.Phase, phase, x)
	}
}

// begin begins a rotation, as an operator does.
func (r *rotor) begin(kind identity.AuthorityKind, changes ...func(*identity.Rotation)) {
	r.t.Helper()
	x := identity.Rotation{Kind: kind, Phase: identity.RotationPrepare, Why: "by a test", StartedAt: r.now, PhaseAt: r.now, Old: r.active(kind).ID}
	for _, c := range changes {
		c(&x)
	}
	if _, err := r.srv.putRotation(r.t.Context(), x, 0); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rotor) authorityNow(kind identity.AuthorityKind, id string) identity.Authority {
	r.t.Helper()
	a, ok := r.srv.authority(kind, id, "")
	if !ok {
		r.t.Fatalf("no %s authority %s", kind, id)
	}
	return *a
}

// waitsFor checks whom a gate waits for, and that each reason says something: name=words.
func waitsFor(t *testing.T, g gate, want ...string) {
	t.Helper()
	var got []string
	for _, w := range g.waiting {
		got = append(got, w.name+"="+w.because)
	}
	bad := len(got) != len(want) || g.total != g.ready+len(g.waiting) || g.open() != (len(want) == 0)
	for _, x := range want {
		name, words, _ := strings.Cut(x, "=")
		found := false
		for _, w := range g.waiting {
			found = found || w.name == name && strings.Contains(w.because, words)
		}
		bad = bad || !found
	}
	if bad {
		t.Errorf("%d of %d are ready, and it waits for %q; want %q", g.ready, g.total, got, want)
	}
}

var errLost = errors.New("the connection to the leader is lost")

// keyAt is ca.key: a key that is elsewhere.
func (r *rotor) keyAt(key crypto.Signer, uri string) func(context.Context) (crypto.Signer, string, error) {
	return func(context.Context) (crypto.Signer, string, error) { return key, uri, nil }
}
