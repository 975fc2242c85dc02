package server

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	adminv1 "countersign.io/countersign/api/admin/v1"
	"countersign.io/countersign/identity"
)

// rebundle makes the bundle of what the state has, as the store does. The caller holds mu.
func (f *fakeState) rebundle() {
	b := &identity.Bundle{TrustDomain: f.td, Sequence: f.bundle.Sequence + 1, RefreshHint: 5 * time.Minute, JWT: map[string][]byte{}}
	add := func(ders ...[]byte) {
		for _, der := range ders {
			if !contains(b.X509, der) {
				b.X509 = append(b.X509, der)
			}
		}
	}
	for _, x := range f.foreign {
		add(x.X509...)
		for _, k := range x.JWT {
			b.JWT[k.ID] = k.PublicKey
		}
	}
	for _, x := range f.authorities {
		if !x.State.Vouched() {
			continue
		}
		if x.State == identity.AuthorityRetiring || x.State == identity.AuthorityTainted {
			b.Ending = append(b.Ending, identity.Ending{ID: x.ID, Tainted: x.State == identity.AuthorityTainted, Spread: x.Spread})
		}
		switch {
		case x.Kind == identity.AuthorityJWT:
			b.JWT[x.ID] = x.PublicKey
		case len(x.Roots) > 0:
			add(x.Roots...)
		default:
			add(x.Cert)
		}
	}
	f.bundle = b
}

func (f *fakeState) Foreign() []identity.Foreign {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []identity.Foreign
	for _, x := range f.foreign {
		out = append(out, x)
	}
	return out
}

func (f *fakeState) Downstream(id string) (*identity.Entry, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, e := range f.entries {
		if e.Downstream && e.SPIFFEID == id {
			return e, true
		}
	}
	return nil, false
}

func (f *fakeState) DownstreamIDs() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []string
	for _, e := range f.entries {
		if e.Downstream {
			out = append(out, e.SPIFFEID)
		}
	}
	return out
}

func (f *fakeState) PutForeign(_ context.Context, x identity.Foreign) error {
	return f.write(func(uint64) (identity.Change, error) {
		if f.foreign == nil {
			f.foreign = map[string]identity.Foreign{}
		}
		if f.foreign[x.Source] = x; len(x.X509)+len(x.JWT) == 0 {
			delete(f.foreign, x.Source)
		}
		f.rebundle()
		return identity.Change{Bundle: true}, nil
	})
}

func (f *fakeState) PrepareAuthority(_ context.Context, now time.Time, a identity.Authority) (identity.Authority, error) {
	err := f.write(func(uint64) (identity.Change, error) {
		a.PreparedAt, a.Sequence = now, f.bundle.Sequence+1
		f.authorities = append(slices.Clone(f.authorities), a)
		f.rebundle()
		return identity.Change{Bundle: true}, nil
	})
	return a, err
}

func (f *fakeState) setAuthority(id string, set func(a *identity.Authority) error) error {
	return f.write(func(uint64) (identity.Change, error) {
		f.authorities = slices.Clone(f.authorities)
		for i := range f.authorities {
			if f.authorities[i].ID == id {
				if err := set(&f.authorities[i]); err != nil {
					return identity.Change{}, err
				}
				f.rebundle()
				return identity.Change{Bundle: true}, nil
			}
		}
		return identity.Change{}, fmt.Errorf("%w: authority %s", identity.ErrNotFound, id)
	})
}

func (f *fakeState) ActivateAuthority(_ context.Context, now time.Time, kind identity.AuthorityKind, id string, back bool) error {
	return f.setAuthority(id, func(a *identity.Authority) error {
		if back == (a.State == identity.AuthorityPrepared) || a.State == identity.AuthorityRevoked {
			return fmt.Errorf("%w: authority %s is %s", identity.ErrPrecondition, id, a.State)
		}
		for i := range f.authorities {
			if o := &f.authorities[i]; o.Kind == kind && o.State == identity.AuthorityActive {
				o.State, o.RetiredAt = identity.AuthorityRetiring, now
			}
		}
		a.State, a.ActivatedAt = identity.AuthorityActive, now
		return nil
	})
}

func (f *fakeState) DropAuthority(_ context.Context, now time.Time, _ identity.AuthorityKind, id string) error {
	return f.write(func(uint64) (identity.Change, error) {
		i := slices.IndexFunc(f.authorities, func(a identity.Authority) bool { return a.ID == id })
		if i < 0 {
			return identity.Change{}, fmt.Errorf("%w: authority %s", identity.ErrNotFound, id)
		}
		if a := f.authorities[i]; a.State != identity.AuthorityPrepared && now.Before(a.NotAfter) {
			return identity.Change{}, fmt.Errorf("%w: authority %s is %s", identity.ErrPrecondition, id, a.State)
		}
		f.authorities = slices.Delete(slices.Clone(f.authorities), i, i+1)
		f.rebundle()
		return identity.Change{Bundle: true}, nil
	})
}

// upper is an upstream in this process.
type upper struct {
	mu     sync.Mutex
	name   string
	root   *x509.Certificate
	key    crypto.Signer
	down   error
	signed int
	keys   []identity.JWTKey // as last told
	jwt    []identity.JWTKey // of its own
	wake   chan struct{}
	now    func() time.Time
	ttl    time.Duration // at the most
}

func newUpper(t testing.TB, w *world) *upper {
	u := &upper{name: "test:upper", wake: make(chan struct{}, 1), ttl: 10 * 24 * time.Hour}
	if w != nil {
		u.now = func() time.Time { return w.srv.cfg.Now() }
	}
	u.rotate(t)
	return u
}

// rotate gives it another root.
func (u *upper) rotate(t testing.TB) {
	t.Helper()
	key, _ := newKey(t)
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: "upper " + rand.Text()}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(1000 * 24 * time.Hour),
		KeyUsage: x509.KeyUsageCertSign, BasicConstraintsValid: true, IsCA: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	root, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	u.mu.Lock()
	u.root, u.key = root, key
	u.mu.Unlock()
	u.poke()
}

func (u *upper) set(f func()) {
	u.mu.Lock()
	f()
	u.mu.Unlock()
	u.poke()
}

// signings is how often it signed.
func (u *upper) signings() int {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.signed
}

func (u *upper) poke() {
	select {
	case u.wake <- struct{}{}:
	default:
	}
}

func (u *upper) String() string {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.name
}

func (u *upper) Sign(_ context.Context, req *x509.CertificateRequest, ttl time.Duration) ([]byte, [][]byte, [][]byte, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.down != nil {
		return nil, nil, nil, u.down
	}
	u.signed++
	now := u.now()
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), RawSubject: req.RawSubject, URIs: req.URIs, NotBefore: now.Add(-time.Second), NotAfter: now.Add(min(ttl, u.ttl)),
		KeyUsage: x509.KeyUsageCertSign, BasicConstraintsValid: true, IsCA: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, u.root, req.PublicKey, u.key)
	return der, nil, [][]byte{u.root.Raw}, err
}

func (u *upper) Follow(ctx context.Context, keys <-chan identity.Below, tell func(*identity.Above, error)) error {
	for {
		u.mu.Lock()
		f, err := &identity.Above{Foreign: identity.Foreign{X509: [][]byte{u.root.Raw}, JWT: slices.Clone(u.jwt)}}, u.down
		u.mu.Unlock()
		if err != nil {
			tell(nil, err)
		} else {
			tell(f, nil)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-u.wake:
		case k := <-keys:
			u.mu.Lock()
			u.keys = k.Keys
			u.mu.Unlock()
		}
	}
}

func newUpperWorld(t *testing.T, edits ...func(*Config)) (*world, *upper) {
	t.Helper()
	u := newUpper(t, nil)
	w := newWorld(t, append([]func(*Config){func(c *Config) { c.Upstream = u }}, edits...)...)
	w.srv.cfg.Outside, w.srv.cfg.Authorities = w.state, w.state
	u.now = w.srv.cfg.Now
	return w, u
}

func (w *world) x509By(state identity.AuthorityState) *identity.Authority {
	for _, a := range w.state.Authorities() {
		if a.Kind == identity.AuthorityX509 && a.State == state {
			return &a
		}
	}
	return nil
}

// pass moves the member's clock and has the leader look.
func (w *world) pass(d time.Duration) {
	w.ahead.Add(int64(d))
	w.srv.wakeUpstream()
}

func TestUpstreamMakesTheAuthority(t *testing.T) {
	w, u := newUpperWorld(t)
	w.start(t)
	a := w.x509By(identity.AuthorityActive)
	if a.Upstream != "test:upper" || !bytes.Equal(a.Roots[0], u.root.Raw) {
		t.Fatalf("%+v", a)
	}
	if got := w.state.Bundle().X509; len(got) != 1 || !bytes.Equal(got[0], u.root.Raw) {
		t.Fatalf("the bundle has %d roots", len(got))
	}
	eventually(t, "the upstream knows the JWT keys", func() bool {
		u.mu.Lock()
		defer u.mu.Unlock()
		return len(u.keys) == 1
	})
	// The CA pin is of the root that members' certificates end at.
	if _, err := w.admin(t).GetBundle(testContext(t), &adminv1.Empty{}); err != nil {
		t.Fatal(err)
	}
	list, err := w.admin(t).ListAuthorities(testContext(t), &adminv1.Empty{})
	if err != nil || len(list.Authorities) != 2 {
		t.Fatalf("%v, %v", list, err)
	}
	for _, x := range list.Authorities {
		if (x.Kind == "x509") != (x.Upstream == "test:upper") || x.Key != "sealed" || x.State != "active" {
			t.Errorf("%+v", x)
		}
	}
	if d := w.srv.Degraded(); len(d) != 0 {
		t.Errorf("degraded: %q", d)
	}
}

func TestNoAuthorityWithoutTheUpstream(t *testing.T) {
	w, u := newUpperWorld(t)
	u.down = fmt.Errorf("%w: nobody there", identity.ErrUnavailable)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { w.srv.Run(ctx) })
	wg.Go(func() { w.srv.RunLeader(ctx) })
	defer wg.Wait()
	defer cancel()
	eventually(t, "it says why it is not ready", func() bool {
		err := w.srv.Ready()
		return errors.Is(err, identity.ErrUnavailable) && strings.Contains(err.Error(), "nobody there") && strings.Contains(err.Error(), "no x509 authority yet")
	})
	if w.x509By(identity.AuthorityActive) != nil {
		t.Fatal("it made a root for itself")
	}
	u.set(func() { u.down = nil })
	eventually(t, "it is ready once the upstream is", func() bool { return w.srv.Ready() == nil })
	eventually(t, "and is no longer degraded", func() bool { return len(w.srv.Degraded()) == 0 })
}

func TestAuthorityIsRenewedAtHalfLife(t *testing.T) {
	w, u := newUpperWorld(t)
	w.start(t)
	first := w.x509By(identity.AuthorityActive).ID
	w.pass(4 * 24 * time.Hour)
	eventually(t, "the leader looked", func() bool { return len(w.srv.upstreamWake) == 0 })
	if u.signings() != 1 {
		t.Fatal("it was renewed before half its life")
	}
	w.pass(30 * time.Hour)
	// The root is the one that everybody knows: the new authority signs at once, the old one stays trusted.
	eventually(t, "another authority signs", func() bool {
		a := w.x509By(identity.AuthorityActive)
		return a.ID != first && w.x509By(identity.AuthorityRetiring).ID == first
	})
	if n := len(w.state.Bundle().X509); n != 1 {
		t.Errorf("%d roots", n)
	}
}

func TestNewRootIsOutBeforeItIsUsed(t *testing.T) {
	w, u := newUpperWorld(t)
	w.start(t)
	first := w.x509By(identity.AuthorityActive).ID
	u.set(func() { u.jwt = []identity.JWTKey{} })
	u.rotate(t)
	eventually(t, "an authority is prepared below the new root", func() bool { return w.x509By(identity.AuthorityPrepared) != nil })
	next := w.x509By(identity.AuthorityPrepared).ID
	if n := len(w.state.Bundle().X509); n != 2 {
		t.Fatalf("%d roots in the bundle", n)
	}
	w.pass(9 * time.Minute) // twice the hint is 10
	eventually(t, "the leader looked", func() bool { return len(w.srv.upstreamWake) == 0 })
	if w.x509By(identity.AuthorityActive).ID != first {
		t.Fatal("it signs below a root that not everybody can know")
	}
	w.pass(61 * time.Second)
	eventually(t, "it signs", func() bool { return w.x509By(identity.AuthorityActive).ID == next })
	// The old one's root is in the bundle for as long as something below it may live.
	if n := len(w.state.Bundle().X509); n != 2 {
		t.Errorf("%d roots in the bundle", n)
	}
	if n := u.signings(); n != 2 {
		t.Errorf("the upstream signed %d times", n)
	}
}

// contrary signs below one root and vouches for another.
type contrary struct {
	*upper
	other *upper
}

func (c contrary) Follow(ctx context.Context, _ <-chan identity.Below, tell func(*identity.Above, error)) error {
	tell(&identity.Above{Foreign: identity.Foreign{X509: [][]byte{c.other.root.Raw}}}, nil)
	<-ctx.Done()
	return nil
}

func TestContraryUpstreamIsNotAskedAllTheTime(t *testing.T) {
	w, u := newUpperWorld(t)
	w.srv.cfg.Upstream = contrary{u, newUpper(t, nil)}
	w.start(t)
	signed := u.signings
	for range 3 { // each time that it may be asked again
		before := signed()
		eventually(t, "it is asked again", func() bool {
			w.pass(time.Second)
			return signed() > before
		})
	}
	// After some rounds it is left alone for long, however often the loop looks.
	before := signed()
	for end := time.Now().Add(300 * time.Millisecond); time.Now().Before(end); time.Sleep(time.Millisecond) {
		w.srv.wakeUpstream()
	}
	if n := signed() - before; n > 2 { // one may have been under way
		t.Errorf("it was asked %d times at once", n)
	}
}

func TestUpstreamGoneDegradesFirst(t *testing.T) {
	w, u := newUpperWorld(t)
	w.start(t)
	u.set(func() { u.down = fmt.Errorf("%w: it is away", identity.ErrUnavailable) })
	eventually(t, "it says that it is degraded", func() bool {
		d := w.srv.Degraded()
		return len(d) == 1 && strings.Contains(d[0], "it is away")
	})
	if err := w.srv.Ready(); err != nil {
		t.Fatal(err)
	}
	w.pass(8 * 24 * time.Hour) // past half its life
	eventually(t, "it says that nothing was signed", func() bool {
		d := w.srv.Degraded()
		return len(d) == 3 && strings.Contains(d[0], "has not signed") && strings.Contains(d[2], "has not been renewed")
	})
	eventually(t, "it still issues", func() bool { return w.srv.Ready() == nil })
	status, err := w.admin(t).Status(testContext(t), &adminv1.Empty{})
	if err != nil || !status.Issuing || len(status.Degraded) != 3 {
		t.Errorf("%v, %v", status, err)
	}
	u.set(func() { u.down = nil })
	eventually(t, "all is well again", func() bool { w.pass(time.Minute); return len(w.srv.Degraded()) == 0 })
}

func TestAnotherUpstreamIsConfigured(t *testing.T) {
	w, u := newUpperWorld(t)
	w.start(t)
	first := w.x509By(identity.AuthorityActive).ID
	u.set(func() { u.name = "test:other" })
	w.pass(time.Second)
	eventually(t, "an authority of the other upstream", func() bool {
		a := w.x509By(identity.AuthorityActive)
		return a.ID != first && a.Upstream == "test:other"
	})
}

func TestUpstreamAfterARootOfOurOwn(t *testing.T) {
	w, u := newUpperWorld(t, func(c *Config) { c.RootSettle = 3 * time.Minute })
	w.srv.cfg.Upstream = nil
	w.start(t)
	own := w.x509By(identity.AuthorityActive)
	w.srv.cfg.Upstream = u
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { w.srv.runUpstream(ctx) })
	defer wg.Wait()
	defer cancel()
	eventually(t, "an authority is prepared below the upstream", func() bool { return w.x509By(identity.AuthorityPrepared) != nil })
	if w.x509By(identity.AuthorityActive).ID != own.ID || !contains(w.state.Bundle().X509, own.Cert) {
		t.Fatal("the own root is given up before its time")
	}
	eventually(t, "it signs", func() bool { w.pass(time.Minute); return w.x509By(identity.AuthorityActive).Upstream == "test:upper" })
}

func TestJWTKeysFromAbove(t *testing.T) {
	w, u := newUpperWorld(t)
	_, pub := newKey(t)
	u.jwt = []identity.JWTKey{{ID: "above", PublicKey: pub}}
	w.start(t)
	eventually(t, "the key from above is in the bundle", func() bool { return bytes.Equal(w.state.Bundle().JWT["above"], pub) })
	// Our own key comes back from above: it is ours already.
	own := w.state.Authorities()[0]
	for _, a := range w.state.Authorities() {
		if a.Kind == identity.AuthorityJWT {
			own = a
		}
	}
	seq := w.state.Bundle().Sequence
	u.set(func() { u.jwt = append(u.jwt, identity.JWTKey{ID: own.ID, PublicKey: own.PublicKey}) })
	w.pass(time.Hour) // the end that we give a key moves, and that alone changes nothing
	u.poke()
	eventually(t, "the leader looked", func() bool { return len(w.srv.upstreamWake) == 0 && len(u.wake) == 0 })
	if w.state.Bundle().Sequence != seq {
		t.Error("the bundle changed for nothing")
	}
	u.set(func() { u.jwt = nil })
	eventually(t, "the key is gone", func() bool { return w.state.Bundle().JWT["above"] == nil })
}

func TestUpstreamIsNoLongerConfigured(t *testing.T) {
	w := newWorld(t)
	w.srv.cfg.Outside, w.srv.cfg.Authorities = w.state, w.state
	if err := w.state.PutForeign(context.Background(), identity.Foreign{Source: identity.SourceUpstream, X509: [][]byte{newUpper(t, w).root.Raw}}); err != nil {
		t.Fatal(err)
	}
	w.start(t)
	eventually(t, "what it vouched for is forgotten", func() bool { return len(w.state.Foreign()) == 0 })
}
