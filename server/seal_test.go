package server

import (
	"bytes"
	"cmp"
	"context"
	"crypto"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"

	adminv1 "countersign.io/countersign/api/admin/v1"
	memberv1 "countersign.io/countersign/api/member/v1"
	"countersign.io/countersign/identity"
	"countersign.io/countersign/seal"
)

// sealWorld is what the members agree on: terms, members, and values that are sealed. It does what the store does.
type sealWorld struct {
	*fakeState // for what the seal's loops read besides
	mu         sync.Mutex
	terms      []identity.SealTerm
}

func (f *sealWorld) Terms() []identity.SealTerm {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := slices.Clone(f.terms)
	for i := range out {
		out[i].Holders = slices.Clone(out[i].Holders)
	}
	return out
}

func (f *sealWorld) told(c identity.Change) {
	_ = f.write(func(uint64) (identity.Change, error) { return c, nil })
}

func (f *sealWorld) at(number uint32) *identity.SealTerm {
	for i := range f.terms {
		if f.terms[i].Number == number {
			return &f.terms[i]
		}
	}
	return nil
}

func (f *sealWorld) PutSealTerm(_ context.Context, now time.Time, number uint32, keyID []byte) error {
	defer f.told(identity.Change{Seal: true})
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, t := range f.terms {
		if t.State == identity.SealPending && t.Number == number && bytes.Equal(t.KeyID, keyID) {
			return nil
		}
		if t.State == identity.SealPending || t.Number >= number {
			return fmt.Errorf("%w: term %d", identity.ErrPrecondition, t.Number)
		}
	}
	f.terms = append(f.terms, identity.SealTerm{Number: number, KeyID: keyID, State: identity.SealPending, CreatedAt: now})
	return nil
}

func (f *sealWorld) AckSealTerm(_ context.Context, number uint32, member string) error {
	defer f.told(identity.Change{Seal: true})
	f.mu.Lock()
	defer f.mu.Unlock()
	t := f.at(number)
	if t == nil {
		return identity.ErrNotFound
	}
	if t.State == identity.SealPending && !slices.Contains(t.Holders, member) {
		t.Holders = append(t.Holders, member)
	}
	return nil
}

func (f *sealWorld) ActivateSealTerm(_ context.Context, number uint32) error {
	defer f.told(identity.Change{Seal: true})
	members := f.Members()
	f.mu.Lock()
	defer f.mu.Unlock()
	t := f.at(number)
	if t == nil {
		return identity.ErrNotFound
	}
	for _, m := range members {
		if !slices.Contains(t.Holders, m.ID) {
			return fmt.Errorf("%w: waits for %s", identity.ErrPrecondition, m.ID)
		}
	}
	for i := range f.terms {
		if f.terms[i].State == identity.SealActive {
			f.terms[i].State = identity.SealRetired
		}
	}
	t.State = identity.SealActive
	return nil
}

func (f *sealWorld) DropSealTerm(_ context.Context, number uint32) error {
	defer f.told(identity.Change{Seal: true})
	f.mu.Lock()
	defer f.mu.Unlock()
	if t := f.at(number); t == nil || t.State == identity.SealActive {
		return identity.ErrPrecondition
	}
	f.terms = slices.DeleteFunc(f.terms, func(t identity.SealTerm) bool { return t.Number == number })
	return nil
}

func (f *sealWorld) ResealAuthority(_ context.Context, kind identity.AuthorityKind, id string, sealed []byte, ifRevision uint64) error {
	return f.write(func(rev uint64) (identity.Change, error) {
		for i := range f.authorities {
			if a := &f.authorities[i]; a.Kind == kind && a.ID == id {
				if a.Revision != ifRevision {
					return identity.Change{}, identity.ErrPrecondition
				}
				f.authorities = slices.Clone(f.authorities)
				f.authorities[i].SealedKey, f.authorities[i].Revision = sealed, rev
				return identity.Change{Bundle: true}, nil
			}
		}
		return identity.Change{}, identity.ErrNotFound
	})
}

// errCrash is what everything answers that a member does after it has died.
var errCrash = errors.New("the member is dead")

// sealMember is a member with its loops stepped by hand: its keyring, and what is on its disk.
type sealMember struct {
	*Server
	t     testing.TB
	id    string
	sim   *sealSim
	disk  []byte
	ring  *seal.Keyring
	dead  bool
	steps int // until it dies; below 0: it does not
}

// step is called before and after each thing that lasts; the member dies at one.
func (m *sealMember) step() error {
	if m.dead {
		return errCrash
	}
	if m.steps == 0 {
		m.dead = true
		return errCrash
	}
	m.steps--
	return nil
}

// lasting does f between two places to die at.
func (m *sealMember) lasting(f func() error) error {
	if err := m.step(); err != nil {
		return err
	}
	if err := f(); err != nil {
		return err
	}
	return m.step()
}

func (m *sealMember) KeyID(n uint32) ([]byte, bool) { return m.ring.KeyID(n) }
func (m *sealMember) Activate(n uint32) error       { return m.ring.Activate(n) }

func (m *sealMember) save(edit func(*seal.Keyring) error) error {
	c, err := seal.ParseKeyring(m.ring.Plain())
	if err != nil {
		return err
	}
	if err := c.Activate(m.ring.Active()); err != nil {
		return err
	}
	if err := edit(c); err != nil {
		return err
	}
	if err := m.lasting(func() error { m.disk = c.Plain(); return nil }); err != nil {
		return err
	}
	m.ring = c
	return nil
}

func (m *sealMember) Generate(context.Context) (n uint32, id []byte, err error) {
	err = m.save(func(c *seal.Keyring) error { n, id, err = c.Generate(); return err })
	return n, id, err
}

func (m *sealMember) Take(_ context.Context, plain []byte, number uint32, keyID []byte) (bool, error) {
	other, err := seal.ParseKeyring(plain)
	if err != nil {
		return false, err
	}
	if id, ok := other.KeyID(number); !ok || !bytes.Equal(id, keyID) {
		return false, nil
	}
	if err := other.Activate(number); err != nil {
		return false, err
	}
	for _, n := range other.Terms() {
		if n != number {
			if err := other.Drop(n); err != nil {
				return false, err
			}
		}
	}
	err = m.save(func(c *seal.Keyring) error {
		if _, ok := c.KeyID(number); ok {
			if err := c.Drop(number); err != nil {
				return err
			}
		}
		_, err := c.Merge(other)
		return err
	})
	return err == nil, err
}

func (m *sealMember) Forget(_ context.Context, n uint32, keyID []byte) error {
	if id, ok := m.KeyID(n); !ok || !bytes.Equal(id, keyID) {
		return nil
	}
	return m.save(func(c *seal.Keyring) error { return c.Drop(n) })
}

// The writes go to what all agree on, unless the member has died.
type sealProposer struct{ m *sealMember }

func (p sealProposer) PutSealTerm(ctx context.Context, now time.Time, n uint32, id []byte) error {
	return p.m.lasting(func() error { return p.m.sim.state.PutSealTerm(ctx, now, n, id) })
}
func (p sealProposer) AckSealTerm(ctx context.Context, n uint32, member string) error {
	return p.m.lasting(func() error { return p.m.sim.state.AckSealTerm(ctx, n, member) })
}
func (p sealProposer) ActivateSealTerm(ctx context.Context, n uint32) error {
	return p.m.lasting(func() error { return p.m.sim.state.ActivateSealTerm(ctx, n) })
}
func (p sealProposer) DropSealTerm(ctx context.Context, n uint32) error {
	return p.m.lasting(func() error { return p.m.sim.state.DropSealTerm(ctx, n) })
}
func (p sealProposer) ResealAuthority(ctx context.Context, k identity.AuthorityKind, id string, sealed []byte, rev uint64) error {
	return p.m.lasting(func() error { return p.m.sim.state.ResealAuthority(ctx, k, id, sealed, rev) })
}

// sealSim is a cluster of three whose loops are stepped by hand.
type sealSim struct {
	t       testing.TB
	state   *sealWorld
	members []*sealMember
	now     time.Time
	orphan  map[string]*orphanWatch
	plain   map[string][]byte // what is sealed, by authority
}

func newSealSim(t testing.TB) *sealSim {
	td := spiffeid.RequireTrustDomainFromString("example.org")
	s := &sealSim{t: t, state: &sealWorld{fakeState: newFakeState(td)}, now: time.Unix(1e9, 0), orphan: map[string]*orphanWatch{}, plain: map[string][]byte{}}
	if err := s.state.SetLevel(context.Background(), 2); err != nil {
		t.Fatal(err)
	}
	first, err := seal.NewKeyring()
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"m1", "m2", "m3"} {
		m := &sealMember{t: t, id: id, sim: s, disk: first.Plain(), steps: -1}
		s.start(m)
		s.members = append(s.members, m)
		s.state.members = append(s.state.members, identity.Member{ID: id, Address: id + ":1"})
	}
	for i := range 3 {
		a := identity.Authority{ID: fmt.Sprint("a", i), Kind: identity.AuthorityX509, State: identity.AuthorityRetiring, Revision: 1}
		s.plain[a.ID] = []byte("the key of " + a.ID)
		if a.SealedKey, err = first.Seal(s.plain[a.ID], identity.AuthorityAD(td, a.Kind, a.ID)); err != nil {
			t.Fatal(err)
		}
		s.state.authorities = append(s.state.authorities, a)
	}
	s.settle()
	s.check(1)
	return s
}

// start is a member's (re)start: what it has is what is on its disk.
func (s *sealSim) start(m *sealMember) {
	var err error
	if m.ring, err = seal.ParseKeyring(m.disk); err != nil {
		s.t.Fatal(err)
	}
	m.dead, m.steps = false, -1
	m.Server = &Server{seal: newSealTending(), orphanAfter: orphanAfter, cfg: Config{
		TrustDomain: s.state.td, MemberID: m.id, State: State{s.state, s.state, s.state, s.state},
		Cluster: Cluster{ReadBarrier: func(context.Context) error { return nil }},
		Seal:    func(plain, ad []byte) ([]byte, error) { return m.ring.Seal(plain, ad) },
		Sealing: Sealing{
			Terms: s.state.Terms, Writes: sealProposer{m}, Keys: m, Active: func() uint32 { return m.ring.Active() }, TermOf: seal.TermOf,
			Open: func(c, ad []byte) ([]byte, error) { return m.ring.Open(c, ad) }, Rewrap: func(context.Context) error { return nil },
			Fetch: func(_ context.Context, from identity.Member) ([]byte, error) {
				for _, o := range s.members {
					if o.id == from.ID && !o.dead && !m.dead {
						return o.ring.Plain(), nil
					}
				}
				return nil, identity.ErrUnavailable
			},
		},
		Now: func() time.Time { return s.now }, Log: slog.New(slog.DiscardHandler),
	}}
	s.orphan[m.id] = &orphanWatch{}
}

// settle steps everybody that lives until nothing changes, and longer than an orphan may wait. The first that lives leads.
func (s *sealSim) settle() {
	s.t.Helper()
	ctx := context.Background()
	for range 40 {
		led := false
		for _, m := range s.members {
			if m.dead {
				continue
			}
			_, _ = m.takeTerms(ctx)
			if !led && !m.dead {
				led = true
				_, _ = m.leadSealStep(ctx, s.orphan[m.id])
			}
		}
		s.now = s.now.Add(time.Second)
	}
}

// check looks that there is one active term, that all who live have every key and seal under it, and that every value opens, on
// each of them, and is under it.
func (s *sealSim) check(min uint32) uint32 {
	s.t.Helper()
	var active identity.SealTerm
	for _, t := range s.state.Terms() {
		switch t.State {
		case identity.SealActive:
			if active.Number != 0 {
				s.t.Fatal("two active terms")
			}
			active = t
		case identity.SealPending:
			s.t.Errorf("term %d is still pending, held by %v", t.Number, t.Holders)
		}
	}
	if active.Number < min {
		s.t.Errorf("the active term is %d, want at least %d", active.Number, min)
	}
	for _, m := range s.members {
		if m.dead {
			continue
		}
		if m.ring.Active() != active.Number {
			s.t.Errorf("%s seals under %d, not %d", m.id, m.ring.Active(), active.Number)
		}
		disk, err := seal.ParseKeyring(m.disk)
		if err != nil {
			s.t.Fatal(err)
		}
		for _, t := range s.state.Terms() {
			if id, ok := disk.KeyID(t.Number); !ok || !bytes.Equal(id, t.KeyID) {
				s.t.Errorf("%s does not keep the key of term %d", m.id, t.Number)
			}
		}
		for _, a := range s.state.Authorities() {
			if n, _ := seal.TermOf(a.SealedKey); n != active.Number {
				s.t.Errorf("%s is sealed under %d, not %d", a.ID, n, active.Number)
			}
			got, err := disk.Open(a.SealedKey, identity.AuthorityAD(s.state.td, a.Kind, a.ID))
			if err != nil || !bytes.Equal(got, s.plain[a.ID]) {
				s.t.Errorf("%s cannot open %s: %v", m.id, a.ID, err)
			}
		}
	}
	return active.Number
}

func TestSealRotates(t *testing.T) {
	s := newSealSim(t)
	for i, by := range []int{0, 2, 1} { // the leader, and others
		n, _, err := s.members[by].beginRotation(context.Background())
		if err != nil || n != uint32(i+2) {
			t.Fatalf("rotating at %s: %d, %v", s.members[by].id, n, err)
		}
		s.settle()
		s.check(n)
	}
	// A member that is down is waited for.
	s.members[2].dead = true
	if _, _, err := s.members[0].beginRotation(context.Background()); err != nil {
		t.Fatal(err)
	}
	s.settle()
	p, err := s.members[0].rotationProgress(5)
	if err != nil || p.Phase != "distribute" || !slices.Equal(p.WaitingFor, []string{"m3"}) || p.Done != 2 || p.Total != 3 {
		t.Errorf("progress %v, %v", p, err)
	}
	if n, detail, err := s.members[1].beginRotation(context.Background()); err != nil || n != 5 || !strings.Contains(detail, "already") {
		t.Errorf("rotating at once at another: %d, %q, %v", n, detail, err)
	}
	s.start(s.members[2])
	s.settle()
	s.check(5)
	// A new member gets what it lacks from the others.
	fresh := &sealMember{t: t, id: "m4", sim: s, disk: s.members[0].disk[:len(s.members[0].disk)-2*36]}
	s.members = append(s.members, fresh)
	s.start(fresh)
	s.state.members = append(s.state.members, identity.Member{ID: "m4", Address: "m4:1"})
	s.settle()
	s.check(5)
}

// TestSealRotationCrashes lets the member that rotates, or another, die at each thing that lasts, before it and after it. The
// others must end or drop what it began, and it must fit in when it is back; then the next rotation works.
func TestSealRotationCrashes(t *testing.T) {
	for by := range 3 {
		for victim := range 3 {
			for steps := 0; ; steps++ {
				s := newSealSim(t)
				v := s.members[victim]
				v.steps = steps
				_, _, err := s.members[by].beginRotation(context.Background())
				if err != nil && !errors.Is(err, errCrash) {
					t.Fatal(err)
				}
				s.settle()
				died := v.dead
				if died {
					s.start(v)
					s.settle()
				}
				v.steps = -1
				before := s.check(1)
				if t.Failed() {
					t.Fatalf("m%d rotates, m%d dies at step %d", by+1, victim+1, steps)
				}
				n, _, err := s.members[2-by].beginRotation(context.Background())
				if err != nil || n <= before {
					t.Fatalf("m%d rotates, m%d dies at step %d: the next rotation: %d, %v", by+1, victim+1, steps, n, err)
				}
				s.settle()
				s.check(n)
				if t.Failed() {
					t.Fatalf("m%d rotates, m%d dies at step %d, then another rotation", by+1, victim+1, steps)
				}
				if !died {
					if steps < 4 {
						t.Fatalf("m%d has only %d steps to die at", victim+1, steps)
					}
					break
				}
			}
		}
	}
}

// A member that made a key which the cluster gave up, and does not come back, holds up nothing; when it does come back, its key
// of that number gives way to the one that the cluster has made since.
func TestSealOrphanIsDropped(t *testing.T) {
	s := newSealSim(t)
	maker := s.members[1]
	maker.steps = 4 // saved, proposed, and dead
	if _, _, err := maker.beginRotation(context.Background()); err != nil && !errors.Is(err, errCrash) {
		t.Fatal(err)
	}
	maker.dead = true
	if len(s.state.Terms()) != 2 {
		t.Fatalf("terms: %v", s.state.Terms())
	}
	s.settle()
	if _, err := s.members[0].rotationProgress(2); !errors.Is(err, identity.ErrUnavailable) || !strings.Contains(err.Error(), "given up") {
		t.Errorf("the watcher is told %v", err)
	}
	s.check(1)
	n, _, err := s.members[0].beginRotation(context.Background())
	if err != nil || n != 2 {
		t.Fatalf("rotated to %d, %v", n, err)
	}
	s.start(maker)
	mine, _ := maker.KeyID(2)
	if bytes.Equal(mine, s.state.Terms()[1].KeyID) {
		t.Fatal("the maker's key is the cluster's: the test tests nothing")
	}
	s.settle()
	s.check(2)
}

func TestSealRotationRefuses(t *testing.T) {
	ctx := context.Background()
	s := newSealSim(t)
	s.state.level = 1
	if _, _, err := s.members[0].beginRotation(ctx); !errors.Is(err, identity.ErrPrecondition) || !strings.Contains(err.Error(), "every member") {
		t.Errorf("at level 1: %v", err)
	}
	s.state.level = 2
	// One that is refused leaves no key behind.
	before := s.members[0].disk
	s.state.terms = append(s.state.terms, identity.SealTerm{Number: 9, KeyID: s.state.terms[0].KeyID, State: identity.SealRetired})
	if _, _, err := s.members[0].beginRotation(ctx); !errors.Is(err, identity.ErrUnavailable) || !strings.Contains(err.Error(), "data key 9") {
		t.Errorf("with a key that this member lacks: %v", err)
	}
	s.state.terms = s.state.terms[:1]
	s.members[0].cfg.Sealing.Writes = refusing{s.members[0].cfg.Sealing.Writes}
	if _, _, err := s.members[0].beginRotation(ctx); !errors.Is(err, identity.ErrPrecondition) {
		t.Errorf("refused: %v", err)
	}
	if !bytes.Equal(s.members[0].disk, before) {
		t.Error("a key that was refused is still on disk")
	}
	empty := newSealSim(t)
	empty.state.terms = nil
	if _, _, err := empty.members[0].beginRotation(ctx); !errors.Is(err, identity.ErrUnavailable) {
		t.Errorf("before the first term: %v", err)
	}
}

type refusing struct{ SealWriter }

func (refusing) PutSealTerm(context.Context, time.Time, uint32, []byte) error {
	return fmt.Errorf("%w: another is pending", identity.ErrPrecondition)
}

// sealed makes a world's seal real.
func sealed(t *testing.T, state **sealWorld) func(*Config) {
	ring, err := seal.NewKeyring()
	if err != nil {
		t.Fatal(err)
	}
	return func(c *Config) {
		f := c.State.EntryReader.(*fakeState)
		*state = &sealWorld{fakeState: f}
		m := &sealMember{t: t, id: "m1", sim: &sealSim{t: t, state: *state}, ring: ring, steps: -1}
		c.Seal = func(plain, ad []byte) ([]byte, error) { return m.ring.Seal(plain, ad) }
		c.Keyring = func() ([]byte, error) { return m.ring.Plain(), nil }
		open := c.Open
		c.Open = func(a identity.Authority) (crypto.Signer, error) {
			ad := identity.AuthorityAD(f.td, a.Kind, a.ID)
			plain, err := m.ring.Open(a.SealedKey, ad)
			if err != nil {
				return nil, err
			}
			a.SealedKey, _ = fakeSeal(plain, ad)
			return open(a)
		}
		c.Sealing = Sealing{
			Terms: (*state).Terms, Writes: *state, Keys: m, Active: func() uint32 { return m.ring.Active() }, TermOf: seal.TermOf,
			Open: func(b, ad []byte) ([]byte, error) { return m.ring.Open(b, ad) }, Rewrap: func(context.Context) error { return nil },
			Fetch: func(context.Context, identity.Member) ([]byte, error) { return nil, identity.ErrUnavailable },
		}
		c.Cluster.Health = func(context.Context) ([]MemberHealth, error) {
			info, err := MemberInfo{Version: "v", Level: 2, KEK: "file:/k", SealTerms: m.ring.Terms()}.Marshal()
			return []MemberHealth{{MemberStatus: MemberStatus{ID: "m1"}, Reachable: true, Info: info}, {MemberStatus: MemberStatus{ID: "m9"}, Problem: "gone"}}, err
		}
	}
}

func TestSealRPCs(t *testing.T) {
	var state *sealWorld
	w := newWorld(t, sealed(t, &state)).start(t)
	c := w.admin(t)
	eventually(t, "the first key is on record", func() bool {
		st, err := c.SealStatus(testContext(t), &adminv1.Empty{})
		return err == nil && len(st.Terms) == 1 && st.Terms[0].State == "active" && st.Values == 2 && st.ValuesOld == 0
	})
	stream, err := c.RotateSeal(testContext(t), &adminv1.Empty{})
	if err != nil {
		t.Fatal(err)
	}
	var last *adminv1.SealProgress
	for {
		p, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		last = p
	}
	if last == nil || last.Phase != "done" || last.Done != 2 {
		t.Errorf("ended with %v", last)
	}
	st, err := c.SealStatus(testContext(t), &adminv1.Empty{})
	if err != nil || len(st.Terms) != 2 || st.Terms[0].State != "retired" || st.Terms[1].State != "active" || st.Terms[1].Values != 2 || st.ValuesOld != 0 {
		t.Errorf("status %v, %v", st, err)
	}
	slices.SortFunc(st.Members, func(a, b *adminv1.SealStatusResponse_Member) int { return cmp.Compare(a.Id, b.Id) })
	if len(st.Members) != 2 || st.Members[0].Kek != "file:/k" || !slices.Equal(st.Members[0].Terms, []uint32{1, 2}) || st.Members[1].Problem != "gone" {
		t.Errorf("members %v", st.Members)
	}
	re, err := c.RewrapSeal(testContext(t), &adminv1.Empty{})
	if err != nil {
		t.Fatal(err)
	}
	var phases []string
	for {
		p, err := re.Recv()
		if err != nil {
			if !errors.Is(err, io.EOF) {
				t.Error(err)
			}
			break
		}
		phases = append(phases, p.Phase)
	}
	if !slices.Equal(phases, []string{"rewrap", "done"}) {
		t.Errorf("rewrap went through %v", phases)
	}

	without := newWorld(t).start(t)
	_, err = without.admin(t).SealStatus(testContext(t), &adminv1.Empty{})
	wantCode(t, err, codes.FailedPrecondition, "does not change")
}

// Data keys are for those who are members now. Who has a member's SVID and was removed gets none; see also
// TestEveryRPCHasARule for everybody else.
func TestKeyringIsForMembersOnly(t *testing.T) {
	var barrier error
	w := newWorld(t, func(c *Config) { c.Cluster.ReadBarrier = func(context.Context) error { return barrier } }).start(t)
	get := func(path string) ([]byte, error) {
		ctx := testContext(t)
		res, err := memberv1.NewMemberClient(w.dial(t, w.certificate(t, path))).Keyring(ctx, &memberv1.KeyringRequest{})
		return res.GetKeyring(), err
	}
	if got, err := get("/countersign/member/m1"); err != nil || string(got) != "the keyring" {
		t.Errorf("a member got %q, %v", got, err)
	}
	for _, path := range []string{"/ns/prod/sa/web", "/countersign/membership/m1"} {
		got, err := get(path)
		if wantCode(t, err, codes.PermissionDenied, "is not for"); got != nil {
			t.Errorf("%s got %q", path, got)
		}
	}
	if _, err := memberv1.NewMemberClient(w.dial(t, nil)).Keyring(testContext(t), &memberv1.KeyringRequest{}); err == nil {
		t.Error("a guest got the keyring")
	}
	// One that cannot make sure of who is a member gives nothing.
	barrier = fmt.Errorf("%w: no leader", identity.ErrUnavailable)
	_, err := get("/countersign/member/m1")
	wantCode(t, err, codes.Unavailable, "who is a member")
	barrier = nil
	// A connection that outlives its SVID.
	conn := w.dial(t, w.certificate(t, "/countersign/member/m1"))
	if _, err := memberv1.NewMemberClient(conn).Keyring(testContext(t), &memberv1.KeyringRequest{}); err != nil {
		t.Error(err)
	}
	w.ahead.Store(int64(2 * time.Hour))
	_, err = memberv1.NewMemberClient(conn).Keyring(testContext(t), &memberv1.KeyringRequest{})
	wantCode(t, err, codes.Unauthenticated, "expired")
	w.ahead.Store(0)
	// Removed.
	w.state.mu.Lock()
	w.state.members = []identity.Member{{ID: "m2", Address: "m2:1"}}
	w.state.mu.Unlock()
	_, err = memberv1.NewMemberClient(conn).Keyring(testContext(t), &memberv1.KeyringRequest{})
	wantCode(t, err, codes.PermissionDenied, "not on the list")
	if strings.Contains(w.log.String(), "the keyring") && strings.Contains(w.log.String(), "keyring=") {
		t.Error("the keyring is in the log")
	}
}
