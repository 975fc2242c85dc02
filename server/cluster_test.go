package server

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"

	"countersign.io/countersign/api"
	adminv1 "countersign.io/countersign/api/admin/v1"
	memberv1 "countersign.io/countersign/api/member/v1"
	"countersign.io/countersign/identity"
)

func info(edits ...func(*MemberInfo)) []byte {
	i := MemberInfo{Version: "v2", Level: 2, Issuing: true, DiskFree: 1 << 40, DiskTotal: 1 << 41, StartedAt: time.Unix(1e9, 0).UTC()}
	for _, e := range edits {
		e(&i)
	}
	raw, err := i.Marshal()
	if err != nil {
		panic(err)
	}
	return raw
}

// three is a cluster of three in good health; edits change members by name.
func three(edits map[string]func(*MemberHealth)) []MemberHealth {
	all := []MemberHealth{}
	for _, id := range []string{"m1", "m2", "m3"} {
		h := MemberHealth{MemberStatus: MemberStatus{ID: id, Address: id + ":8443", Voter: true, Leader: id == "m1"}, Reachable: true, Applied: 100, Commit: 100, Info: info()}
		if e := edits[id]; e != nil {
			e(&h)
		}
		all = append(all, h)
	}
	return all
}

func down(h *MemberHealth) {
	h.Reachable, h.Problem, h.Applied, h.Commit, h.Info = false, "connection refused", 0, 0, nil
}

func TestMemberInfo(t *testing.T) {
	want := MemberInfo{Version: "v1.2.3", Level: 2, StartedAt: time.Unix(1e9, 0).UTC(), DiskFree: 1, DiskTotal: 2, NotIssuingBecause: "x", KEK: "file:/k", SealTerms: []uint32{1, 2}}
	raw, err := want.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	if got, err := ParseMemberInfo(raw); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, %v", got, err)
	}
	// An older version tells nothing, a newer one more.
	if got, err := ParseMemberInfo(nil); err != nil || got.Level != 1 || got.Version != "" {
		t.Errorf("of an older version: %+v, %v", got, err)
	}
	if got, err := ParseMemberInfo([]byte(`{"version":"v9","level":9,"mood":["good"]}`)); err != nil || got.Level != 9 {
		t.Errorf("of a newer version: %+v, %v", got, err)
	}
	if got, err := ParseMemberInfo([]byte("{\"version\":\"v\\u001b[2J\\n\"}")); err != nil || got.Version != "v?[2J?" || got.Level != 1 {
		t.Errorf("what a terminal would act on: %+v, %v", got, err)
	}
	for _, bad := range []string{"x", "[]", `{"level":-1}`, `{"level":"2"}`, `{"version":"` + strings.Repeat("v", maxInfo) + `"}`} {
		if got, err := ParseMemberInfo([]byte(bad)); !errors.Is(err, identity.ErrInvalid) || got.Level != 1 || got.Issuing {
			t.Errorf("%.40s: %+v, %v", bad, got, err)
		}
	}
	long := MemberInfo{Version: strings.Repeat("\x01", 1e4), NotIssuingBecause: strings.Repeat("é", 1e4), KEK: strings.Repeat("<", 1e4), SealTerms: slices.Repeat([]uint32{1 << 31}, 1e4)}
	if raw, err := long.Marshal(); err != nil || len(raw) > maxInfo {
		t.Errorf("%d bytes, %v", len(raw), err)
	}
}

// FuzzMemberInfo: what another member tells is bounded and can be shown, and what is parsed is told again as it was.
func FuzzMemberInfo(f *testing.F) {
	if seeds, _ := filepath.Glob(filepath.Join("testdata", "fuzz", "FuzzMemberInfo", "*")); len(seeds) == 0 {
		f.Error("no seeds: is testdata there?")
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		i, err := ParseMemberInfo(raw)
		if i.Level == 0 {
			t.Error("level 0")
		}
		if err != nil {
			return
		}
		for _, s := range []string{i.Version, i.NotIssuingBecause, i.KEK} {
			if len(s) > maxInfoText || strings.ContainsAny(s, "\x00\x1b\n\r") {
				t.Errorf("text %q", s)
			}
		}
		again, err := i.Marshal()
		if err != nil {
			return // a year that JSON cannot write
		}
		if len(again) > maxInfo {
			t.Errorf("%d bytes", len(again))
		}
		back, err := ParseMemberInfo(again)
		if err != nil || !back.StartedAt.Equal(i.StartedAt) {
			t.Errorf("%+v, then %+v, %v", i, back, err)
		}
		back.StartedAt = i.StartedAt
		a, _ := json.Marshal(i)
		b, _ := json.Marshal(back)
		if string(a) != string(b) {
			t.Errorf("%s, then %s", a, b)
		}
	})
}

func TestUnhealthy(t *testing.T) {
	for name, c := range map[string]struct {
		edit func(*MemberHealth)
		lag  uint64
		says string
	}{
		"well":              {func(*MemberHealth) {}, 5, ""},
		"of an old version": {func(h *MemberHealth) { h.Info = nil }, 0, ""},
		"down":              {down, 0, "it cannot be reached: connection refused"},
		"down, without why": {func(h *MemberHealth) { down(h); h.Problem = "" }, 0, "it cannot be reached"},
		"not issuing": {func(h *MemberHealth) {
			h.Info = info(func(i *MemberInfo) { i.Issuing, i.NotIssuingBecause = false, "no leader" })
		}, 0, "it does not issue: no leader"},
		"out of contact":     {func(h *MemberHealth) { h.LastContact = time.Minute }, 0, "has not heard from a leader for 1m0s"},
		"behind":             {func(*MemberHealth) {}, maxLag + 1, "2049 log entries behind"},
		"without a vote":     {func(h *MemberHealth) { h.Voter = false }, 0, "no vote yet"},
		"with a full disk":   {func(h *MemberHealth) { h.Info = info(func(i *MemberInfo) { i.DiskFree = 5 << 20 }) }, 0, "5 MiB free"},
		"in trouble, but up": {func(h *MemberHealth) { h.Problem = "the log is damaged" }, 0, "the log is damaged"},
	} {
		h := three(map[string]func(*MemberHealth){"m2": c.edit})[1]
		i, err := ParseMemberInfo(h.Info)
		if err != nil {
			t.Fatal(err)
		}
		if got := unhealthy(h, i, c.lag); (got == "") != (c.says == "") || !strings.Contains(got, c.says) {
			t.Errorf("%s: %q", name, got)
		}
	}
}

func TestMayRemove(t *testing.T) {
	for name, c := range map[string]struct {
		all  []MemberHealth
		id   string
		want error
		says string
	}{
		"one of three":                      {three(nil), "m3", nil, ""},
		"the leader":                        {three(nil), "m1", nil, ""},
		"the dead one":                      {three(map[string]func(*MemberHealth){"m3": down}), "m3", nil, ""},
		"a living one beside a dead one":    {three(map[string]func(*MemberHealth){"m3": down}), "m2", identity.ErrPrecondition, "m3 cannot be reached"},
		"nobody":                            {three(nil), "m4", identity.ErrNotFound, "m1, m2, m3"},
		"the last":                          {three(nil)[:1], "m1", identity.ErrPrecondition, "last member with a vote"},
		"the last but a newcomer":           {three(map[string]func(*MemberHealth){"m2": func(h *MemberHealth) { h.Voter = false }})[:2], "m1", identity.ErrPrecondition, "last member with a vote"},
		"a newcomer, whatever else is down": {three(map[string]func(*MemberHealth){"m2": down, "m3": func(h *MemberHealth) { h.Voter = false }}), "m3", nil, ""},
		"one of two":                        {three(nil)[:2], "m2", nil, ""},
	} {
		got, err := mayRemove(c.all, c.id)
		if !errors.Is(err, c.want) || c.want == nil && got.ID != c.id || c.want != nil && !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
}

func TestTolerance(t *testing.T) {
	five := append(three(nil), three(nil)[1:]...)
	five[3].ID, five[4].ID = "m4", "m5"
	for name, c := range map[string]struct {
		all  []MemberHealth
		want int
	}{
		"none": {nil, 0}, "one": {three(nil)[:1], 0}, "two": {three(nil)[:2], 0}, "three": {three(nil), 1}, "five": {five, 2},
		"two of three up":    {three(map[string]func(*MemberHealth){"m3": down}), 0},
		"one of three up":    {three(map[string]func(*MemberHealth){"m2": down, "m3": down}), 0},
		"two and a newcomer": {three(map[string]func(*MemberHealth){"m3": func(h *MemberHealth) { h.Voter = false }}), 0},
	} {
		if got := tolerance(c.all); got != c.want {
			t.Errorf("%s: %d, want %d", name, got, c.want)
		}
	}
}

// care is a cluster whose inner life the test decides.
type care struct {
	mu       sync.Mutex
	all      []MemberHealth
	barrier  error
	did      []string
	barriers int
}

func (c *care) set(f func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f()
}

func (c *care) asked() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.barriers
}

func (c *care) calls() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.did)
}

func (c *care) config(cfg *Config) {
	cfg.Cluster.Health = func(context.Context) ([]MemberHealth, error) {
		c.mu.Lock()
		defer c.mu.Unlock()
		return slices.Clone(c.all), nil
	}
	cfg.Cluster.Members = func() []MemberStatus {
		c.mu.Lock()
		defer c.mu.Unlock()
		var out []MemberStatus
		for _, h := range c.all {
			out = append(out, h.MemberStatus)
		}
		return out
	}
	cfg.Cluster.ReadBarrier = func(context.Context) error {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.barriers++
		return c.barrier
	}
	cfg.Cluster.RemoveMember = func(_ context.Context, id string) error {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.did = append(c.did, "remove "+id)
		c.all = slices.DeleteFunc(c.all, func(h MemberHealth) bool { return h.ID == id })
		return nil
	}
	cfg.Cluster.TransferLeader = func(_ context.Context, id string) error {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.did = append(c.did, "transfer "+id)
		return nil
	}
}

func (f *fakeState) memberAddresses() string {
	var out []string
	for _, m := range f.Members() {
		out = append(out, m.ID+"="+m.Address)
	}
	slices.Sort(out)
	return strings.Join(out, " ")
}

func TestClusterStatus(t *testing.T) {
	c := &care{all: three(nil)}
	w := newWorld(t, c.config).start(t)
	a := w.admin(t)
	ctx := testContext(t)
	s, err := a.ClusterStatus(ctx, &adminv1.Empty{})
	if err != nil {
		t.Fatal(err)
	}
	if !s.Healthy || s.LeaderId != "m1" || s.Level != 2 || s.FailureTolerance != 1 || len(s.Members) != 3 || s.TrustDomain != "example.org" {
		t.Errorf("%v", s)
	}
	if m := s.Members[1]; !m.Healthy || m.Version != "v2" || m.Level != 2 || m.DiskFree != 1<<40 || !m.Issuing || m.StartedAt.AsTime().Unix() != 1e9 || m.AppliedIndex != 100 {
		t.Errorf("%v", m)
	}
	// Without a leader it answers too.
	c.set(func() {
		c.all = three(map[string]func(*MemberHealth){"m1": func(h *MemberHealth) { down(h); h.Leader = false }, "m3": func(h *MemberHealth) { h.Applied = 40; h.Info = []byte("nonsense") }})
		c.barrier = fmt.Errorf("%w: no leader", identity.ErrUnavailable)
	})
	if s, err = a.ClusterStatus(ctx, &adminv1.Empty{}); err != nil {
		t.Fatal(err)
	}
	if s.Healthy || s.LeaderId != "" || s.FailureTolerance != 0 || s.Members[0].Healthy || !strings.Contains(s.Members[0].UnhealthyBecause, "connection refused") || s.Members[2].Lag != 60 || s.Members[0].Lag != 0 {
		t.Errorf("%v", s)
	}
}

// TestReadsAreLinearizable: reads ask the leader, unless they are told not to; what is asked when there is no leader answers.
func TestReadsAreLinearizable(t *testing.T) {
	c := &care{all: three(nil)}
	w := newWorld(t, c.config).start(t)
	a := w.admin(t)
	ctx := testContext(t)
	stale := metadata.AppendToOutgoingContext(ctx, MetadataStale, "true")
	read := map[string]func(context.Context) error{
		"entries":       func(ctx context.Context) error { _, err := a.ListEntries(ctx, &adminv1.ListRequest{}); return err },
		"kube clusters": func(ctx context.Context) error { _, err := a.ListKubeClusters(ctx, &adminv1.ListRequest{}); return err },
		"agents":        func(ctx context.Context) error { _, err := a.ListAgents(ctx, &adminv1.ListRequest{}); return err },
		"bundle":        func(ctx context.Context) error { _, err := a.GetBundle(ctx, &adminv1.Empty{}); return err },
	}
	for name, f := range read {
		before := c.asked()
		if err := f(ctx); err != nil || c.asked() != before+1 {
			t.Errorf("%s: %v, %d barriers", name, err, c.asked()-before)
		}
	}
	c.set(func() { c.barrier = fmt.Errorf("%w: no leader", identity.ErrUnavailable) })
	for name, f := range read {
		wantCode(t, f(ctx), codes.Unavailable, "no leader", "--stale")
		if err := f(stale); err != nil {
			t.Errorf("%s, stale: %v", name, err)
		}
	}
	if _, err := a.Status(ctx, &adminv1.Empty{}); err != nil {
		t.Error(err)
	}
	_, err := a.CreateToken(stale, &adminv1.CreateTokenRequest{Purpose: "agent"})
	wantCode(t, err, codes.Unavailable, "no leader")
	_, err = a.GetEntry(ctx, &adminv1.NameRequest{Name: "none"})
	wantCode(t, err, codes.Unavailable)
	_, err = a.GetEntry(stale, &adminv1.NameRequest{Name: "none"})
	wantCode(t, err, codes.NotFound)
}

func TestRemoveMember(t *testing.T) {
	c := &care{all: three(map[string]func(*MemberHealth){"m1": func(h *MemberHealth) { h.Leader = false }, "m2": func(h *MemberHealth) { h.Leader = true }})}
	w := newWorld(t, c.config).start(t)
	a := w.admin(t)
	ctx := testContext(t)
	eventually(t, "the members are registered", func() bool { return len(w.state.Members()) == 3 })
	_, err := a.RemoveMember(ctx, &adminv1.NameRequest{Name: "m9"})
	wantCode(t, err, codes.NotFound, "m1, m2, m3")
	c.set(func() { c.barrier = fmt.Errorf("%w: no leader", identity.ErrUnavailable) })
	_, err = a.RemoveMember(ctx, &adminv1.NameRequest{Name: "m3"})
	wantCode(t, err, codes.Unavailable, "no leader")
	c.set(func() { c.barrier = nil; down(&c.all[2]) })
	_, err = a.RemoveMember(ctx, &adminv1.NameRequest{Name: "m2"})
	wantCode(t, err, codes.FailedPrecondition, "m3 cannot be reached")
	if did := c.calls(); len(did) > 0 {
		t.Fatalf("refused, it did %v", did)
	}
	if _, err := a.RemoveMember(ctx, &adminv1.NameRequest{Name: "m3"}); err != nil {
		t.Fatal(err)
	}
	if got := w.state.memberAddresses(); got != "m1=m1:8443 m2=m2:8443" {
		t.Errorf("the list is %s", got)
	}
	// The leader hands over first, and this member may remove itself.
	if _, err := a.RemoveMember(ctx, &adminv1.NameRequest{Name: "m2"}); err != nil {
		t.Fatal(err)
	}
	if did := c.calls(); !slices.Equal(did, []string{"remove m3", "transfer ", "remove m2"}) {
		t.Errorf("it did %v", did)
	}
	_, err = a.RemoveMember(ctx, &adminv1.NameRequest{Name: "m1"})
	wantCode(t, err, codes.FailedPrecondition, "last member with a vote")
}

func TestTransferLeader(t *testing.T) {
	c := &care{all: three(map[string]func(*MemberHealth){"m3": func(h *MemberHealth) { h.Voter = false }})}
	w := newWorld(t, c.config).start(t)
	a := w.admin(t)
	ctx := testContext(t)
	for name, want := range map[string]codes.Code{"m9": codes.NotFound, "m3": codes.FailedPrecondition, "m1": codes.OK, "m2": codes.OK, "": codes.OK} {
		if _, err := a.TransferLeader(ctx, &adminv1.NameRequest{Name: name}); want != codes.OK {
			wantCode(t, err, want, "m")
		} else if err != nil {
			t.Errorf("%q: %v", name, err)
		}
	}
	did := c.calls()
	slices.Sort(did)
	if !slices.Equal(did, []string{"transfer ", "transfer m2"}) {
		t.Errorf("it did %v", did)
	}
	c.set(func() { c.all = c.all[:1] })
	_, err := a.TransferLeader(ctx, &adminv1.NameRequest{})
	wantCode(t, err, codes.FailedPrecondition, "no other member")
}

// TestCareOfMembers: the list that agents learn from follows the cluster: who moved, who joined, who is gone.
func TestCareOfMembers(t *testing.T) {
	c := &care{all: three(nil)}
	w := newWorld(t, c.config).start(t)
	eventually(t, "all are registered", func() bool { return w.state.memberAddresses() == "m1=m1:8443 m2=m2:8443 m3=m3:8443" })
	c.set(func() { c.all = c.all[:2]; c.all[1].Address = "moved:1" })
	eventually(t, "who moved and who is gone is known", func() bool { return w.state.memberAddresses() == "m1=m1:8443 m2=moved:1" })
	c.set(func() { c.all = nil }) // a member that knows none at all knows nothing
	w.srv.registerMembers(testContext(t))
	if got := w.state.memberAddresses(); got != "m1=m1:8443 m2=moved:1" {
		t.Errorf("the list is %s", got)
	}
}

// TestLevelRises only when every member says that it knows it, and never beyond what this version knows.
func TestLevelRises(t *testing.T) {
	for name, c := range map[string]struct {
		edit func(*MemberHealth)
		want uint32
	}{
		"all know":        {func(*MemberHealth) {}, 2},
		"one is old":      {func(h *MemberHealth) { h.Info = nil }, 1},
		"one says 1":      {func(h *MemberHealth) { h.Info = info(func(i *MemberInfo) { i.Level = 1 }) }, 1},
		"one is away":     {down, 1},
		"one is newer":    {func(h *MemberHealth) { h.Info = info(func(i *MemberInfo) { i.Level = 7 }) }, 2},
		"one is nonsense": {func(h *MemberHealth) { h.Info = []byte("{") }, 1},
	} {
		cl := &care{all: three(map[string]func(*MemberHealth){"m3": c.edit})}
		w := newWorld(t, cl.config)
		w.state.level = 1
		if err := w.srv.raiseLevel(testContext(t)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if got := w.state.Level(); got != c.want {
			t.Errorf("%s: level %d, want %d", name, got, c.want)
		}
	}
	// Somebody joined while the others were asked.
	cl := &care{all: three(nil)}
	w := newWorld(t, cl.config)
	w.state.level = 1
	w.srv.cfg.Cluster.Health = func(context.Context) ([]MemberHealth, error) { return three(nil)[:2], nil }
	if err := w.srv.raiseLevel(testContext(t)); err != nil || w.state.Level() != 1 {
		t.Errorf("with one who was not asked: level %d, %v", w.state.Level(), err)
	}
}

func TestRemovedMemberDoesNotIssue(t *testing.T) {
	removed := make(chan struct{})
	w := newWorld(t, func(c *Config) { c.Cluster.Removed = removed }).start(t)
	close(removed)
	if err := w.srv.Ready(); !errors.Is(err, identity.ErrUnavailable) || !strings.Contains(err.Error(), "removed from the cluster") || !strings.Contains(err.Error(), "empty data_dir and join") {
		t.Error(err)
	}
	s, err := w.admin(t).Status(testContext(t), &adminv1.Empty{})
	if err != nil || s.Issuing || !strings.Contains(s.NotIssuingBecause, "removed from the cluster") {
		t.Errorf("%v, %v", s, err)
	}
}

// TestJoinOrder: a token is spent last, so that a change of leader in the middle does not cost it.
func TestJoinOrder(t *testing.T) {
	var fail error
	w := newWorld(t)
	var mu sync.Mutex
	var did []string
	w.srv.cfg.Cluster.AddMember = func(_ context.Context, id, _ string) error {
		mu.Lock()
		defer mu.Unlock()
		did = append(did, "add "+id)
		return fail
	}
	w.srv.cfg.Cluster.RemoveMember = func(_ context.Context, id string) error {
		mu.Lock()
		defer mu.Unlock()
		did = append(did, "remove "+id)
		return nil
	}
	w.start(t)
	ctx := testContext(t)
	c := memberv1.NewMemberClient(w.dial(t, nil))
	tok := w.joinToken(t, &adminv1.CreateTokenRequest{Purpose: "server"})
	req := func(id string, level uint32) *memberv1.JoinRequest {
		return &memberv1.JoinRequest{Secret: tok.Secret, Id: id, Address: "10.0.0.2:8443", Version: "v0.1", Level: level}
	}
	mu.Lock()
	fail = fmt.Errorf("%w: leadership lost", identity.ErrUnavailable)
	mu.Unlock()
	_, err := c.Join(ctx, req("m2", 2))
	wantCode(t, err, codes.Unavailable, "leadership lost", "try again with the same token")
	for _, level := range []uint32{0, 1} { // what was not known then is 0
		_, err = c.Join(ctx, req("m2", level))
		wantCode(t, err, codes.FailedPrecondition, "level 2", `version "v0.1"`, "knows level 1", "the members run (test)")
	}
	_, err = c.Join(ctx, req("m1", 2))
	wantCode(t, err, codes.AlreadyExists, "choose another name")
	mu.Lock()
	fail, did = nil, nil
	mu.Unlock()
	if _, err := c.Join(ctx, req("m2", 9)); err != nil {
		t.Fatal(err)
	}
	_, err = c.Join(ctx, req("m3", 2))
	wantCode(t, err, codes.FailedPrecondition, "used")
	if !slices.Equal(did, []string{"add m2"}) {
		t.Errorf("it did %v", did)
	}
	// Two with one token: the second one's admission is taken back.
	tok = w.joinToken(t, &adminv1.CreateTokenRequest{Purpose: "server"})
	mu.Lock()
	did = nil
	mu.Unlock()
	inner := w.srv.cfg.Cluster.AddMember
	w.srv.cfg.Cluster.AddMember = func(ctx context.Context, id, address string) error {
		w.state.mu.Lock()
		for _, k := range w.state.tokens {
			k.UsedAt = time.Now()
		}
		w.state.mu.Unlock()
		return inner(ctx, id, address)
	}
	_, err = c.Join(ctx, req("m4", 2))
	wantCode(t, err, codes.FailedPrecondition, "used")
	if !slices.Equal(did, []string{"add m4", "remove m4"}) {
		t.Errorf("it did %v", did)
	}
}

// TestAttestByJoinTokenInOneWrite: at level 2 the token is spent and the agent recorded in one; before, one after the other.
func TestAttestByJoinTokenInOneWrite(t *testing.T) {
	w := newWorld(t).start(t)
	for level, want := range map[uint32]int{1: 0, 2: 1} {
		w.state.mu.Lock()
		w.state.level, w.state.admitted = level, 0
		w.state.mu.Unlock()
		tok := w.joinToken(t, &adminv1.CreateTokenRequest{Purpose: "agent"})
		_, pub := newKey(t)
		svid, err := attest(t, w.dial(t, nil), byJoin(tok.Secret, pub))
		if err != nil {
			t.Fatal(err)
		}
		if _, ok := w.state.Agent(svid.SpiffeId); !ok || w.state.admitted != want {
			t.Errorf("level %d: recorded %t, %d in one write", level, ok, w.state.admitted)
		}
		_, err = attest(t, w.dial(t, nil), byJoin(tok.Secret, pub))
		wantCode(t, err, codes.FailedPrecondition, "used")
	}
}

func TestPeerMember(t *testing.T) {
	w := newWorld(t).start(t)
	dial := func(cert *tls.Certificate, alpn string) *tls.Conn {
		conf := MemberTLS(TLSConfig{TrustDomain: w.td, Certificate: func() (*tls.Certificate, error) { return cert, nil }, Bundle: w.state.Bundle}, "m1")
		conf.NextProtos = []string{alpn}
		c, err := tls.Dial("tcp", w.port.Addr().String(), conf)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	out := dial(w.certificate(t, "/countersign/member/m1"), api.ALPNRaft)
	if got := PeerMember(w.td, out); got != "m1" {
		t.Errorf("who was dialled is %q", got)
	}
	select {
	case in := <-w.raft:
		if got := PeerMember(w.td, in); got != "m1" {
			t.Errorf("who dialled is %q", got)
		}
	case <-time.After(deadline):
		t.Fatal("the connection did not arrive")
	}
	_, cert := w.agent(t, "a", "")
	if got := PeerMember(w.td, dial(cert, alpnGRPC)); got != "m1" {
		t.Errorf("the other end of an agent's connection is %q", got)
	}
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	if got := PeerMember(w.td, a); got != "" {
		t.Errorf("a pipe leads to %q", got)
	}
	for path, want := range map[string]string{"/countersign/member/x": "x", "/countersign/member/x/y": "", "/countersign/agent/x": "", "/x": ""} {
		if got := PeerMember(w.td, &conn{caller: caller{id: spiffeid.RequireFromPath(w.td, path)}}); got != want {
			t.Errorf("%s: %q, want %q", path, got, want)
		}
	}
}
