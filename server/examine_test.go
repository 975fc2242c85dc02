package server

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/credentials/insecure"

	adminv1 "countersign.io/countersign/api/admin/v1"
	"countersign.io/countersign/identity"
)

// examined is a world whose cluster says what a test has it say.
type examined struct {
	*world
	health []MemberHealth
	err    error
}

// madeAt is when a health was made, as its members tell it.
func madeAt(all []MemberHealth) time.Time {
	for _, h := range all {
		if info, err := ParseMemberInfo(h.Info); err == nil && h.ID == "m1" {
			return info.Now
		}
	}
	return time.Time{}
}

// asOf is the health as it would be told now: a test that waits for its turn must not find clocks that are off.
func asOf(now time.Time, all []MemberHealth) []MemberHealth {
	late := now.Sub(madeAt(all))
	out := slices.Clone(all)
	for i, h := range out {
		info, err := ParseMemberInfo(h.Info)
		if err != nil || info.Now.IsZero() {
			continue
		}
		info.Now = info.Now.Add(late)
		if raw, err := info.Marshal(); err == nil {
			out[i].Info = raw
		}
	}
	return out
}

// memberSays is a healthy member's health, with what it tells changed.
func memberSays(id string, edit func(*MemberHealth, *MemberInfo)) MemberHealth {
	h := MemberHealth{MemberStatus: MemberStatus{ID: id, Voter: true, Leader: id == "m1"}, Reachable: true, Applied: 10, Commit: 10}
	info := MemberInfo{Version: "test", Level: 2, StartedAt: time.Now().Add(-time.Hour), DiskFree: 50 << 30, DiskTotal: 100 << 30, Issuing: true, KEK: "pkcs11:x", Now: time.Now().UTC(),
		BackupEvery: 3600, BackupAt: time.Now().Add(-time.Minute)}
	if edit != nil {
		edit(&h, &info)
	}
	raw, err := info.Marshal()
	if err != nil {
		panic(err)
	}
	if h.Reachable {
		h.Info = raw
	}
	return h
}

func newExamined(t *testing.T, edits ...func(*Config)) *examined {
	x := &examined{}
	x.world = newWorld(t, append(edits, func(c *Config) {
		c.Cluster.Health = func(context.Context) ([]MemberHealth, error) { return asOf(time.Now(), x.health), x.err }
	})...).start(t)
	return x
}

func (x *examined) examine(t *testing.T) (out []string) {
	t.Helper()
	res, err := adminv1.NewCheckupClient(dialWith(t, x.socket, insecure.NewCredentials())).Examine(testContext(t), &adminv1.ExamineRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if res.MemberId != "m1" || res.TrustDomain != "example.org" || len(res.Examined) < 8 {
		t.Errorf("examined %v at %s of %s", res.Examined, res.MemberId, res.TrustDomain)
	}
	for _, f := range res.Findings {
		if f.Where == "" || f.What == "" || f.Todo == "" {
			t.Errorf("a finding that does not say all: %v", f)
		}
		out = append(out, f.Severity+" "+f.Check+" "+f.Where+": "+f.What)
	}
	return out
}

func threeSay(edit func(*MemberHealth, *MemberInfo)) []MemberHealth {
	return []MemberHealth{memberSays("m1", nil), memberSays("m2", nil), memberSays("m3", edit)}
}

func TestExamineFindsNothing(t *testing.T) {
	x := newExamined(t)
	x.health = threeSay(nil)
	if got := x.examine(t); len(got) != 0 {
		t.Errorf("found %q", got)
	}
}

func TestExamine(t *testing.T) {
	x := newExamined(t)
	for name, row := range map[string]struct {
		health []MemberHealth
		want   []string // each of them in one finding, and there are no others
	}{
		"one is down":        {threeSay(func(h *MemberHealth, _ *MemberInfo) { h.Reachable, h.Problem = false, "no route" }), []string{"error members member m3: it cannot be reached: no route", "warning members cluster: no further member may fail"}},
		"no leader":          {[]MemberHealth{memberSays("m1", func(h *MemberHealth, _ *MemberInfo) { h.Leader = false }), memberSays("m2", nil), memberSays("m3", nil)}, []string{"error members cluster: no member leads"}},
		"one alone":          {[]MemberHealth{memberSays("m1", nil)}, []string{"notice members cluster: there is one member"}},
		"two":                {[]MemberHealth{memberSays("m1", nil), memberSays("m2", nil)}, []string{"notice members cluster: 2 members survive"}},
		"does not issue":     {threeSay(func(_ *MemberHealth, i *MemberInfo) { i.Issuing, i.NotIssuingBecause = false, "its disk" }), []string{"error members member m3: it does not issue: its disk"}},
		"behind":             {threeSay(func(h *MemberHealth, _ *MemberInfo) { h.Applied, h.Commit = 1, 1 }), nil},
		"clock ahead":        {threeSay(func(_ *MemberHealth, i *MemberInfo) { i.Now = time.Now().Add(4 * time.Second) }), []string{"warning clock member m3: its clock is"}},
		"clock far behind":   {threeSay(func(_ *MemberHealth, i *MemberInfo) { i.Now = time.Now().Add(-time.Minute) }), []string{"error clock member m3: its clock is 1m0"}},
		"tells no time":      {threeSay(func(_ *MemberHealth, i *MemberInfo) { i.Now = time.Time{} }), nil},
		"mixed versions":     {threeSay(func(_ *MemberHealth, i *MemberInfo) { i.Version = "older" }), []string{"warning versions cluster: members run different versions: older on m3; test on m1, m2"}},
		"disk":               {threeSay(func(_ *MemberHealth, i *MemberInfo) { i.DiskFree = 5 << 30 }), []string{"warning disk member m3: its disk has 5% free"}},
		"key beside data":    {threeSay(func(_ *MemberHealth, i *MemberInfo) { i.KEK = "file:/var/lib/countersign/kek" }), []string{"warning kek member m3: its key-encryption key is a file"}},
		"old backup":         {threeSay(func(_ *MemberHealth, i *MemberInfo) { i.BackupAt = time.Now().Add(-3 * time.Hour) }), []string{"error backups member m3: its newest backup is 3h0m"}},
		"no backup, started": {threeSay(func(_ *MemberHealth, i *MemberInfo) { i.BackupAt = time.Time{} }), nil},
		"no backup": {threeSay(func(_ *MemberHealth, i *MemberInfo) {
			i.BackupAt, i.StartedAt = time.Time{}, time.Now().Add(-9*time.Hour)
		}), []string{"error backups member m3: it has made no backup"}},
		"other admins": {threeSay(func(_ *MemberHealth, i *MemberInfo) { i.Admins = strings.Repeat("ab", 16) }), []string{"warning admins member m3: admin.ids"}},
	} {
		x.health = row.health
		got := x.examine(t)
		for _, want := range row.want {
			if !slices.ContainsFunc(got, func(s string) bool { return strings.HasPrefix(s, want) }) {
				t.Errorf("%s: %q is not in %q", name, want, got)
			}
		}
		if len(got) != len(row.want) {
			t.Errorf("%s: found %q", name, got)
		}
	}
	none := func(_ *MemberHealth, i *MemberInfo) { i.BackupEvery = 0 }
	x.health = []MemberHealth{memberSays("m1", none), memberSays("m2", none), memberSays("m3", none)}
	if got := x.examine(t); len(got) != 1 || !strings.HasPrefix(got[0], "warning backups cluster: no member makes backups") {
		t.Errorf("found %q", got)
	}
	x.health, x.err = nil, fmt.Errorf("%w: nobody answers", identity.ErrUnavailable)
	if got := x.examine(t); len(got) != 1 || !strings.HasPrefix(got[0], "error members cluster: the members cannot be asked") {
		t.Errorf("found %q", got)
	}
}

func TestExamineAuthorities(t *testing.T) {
	x := newExamined(t, func(c *Config) {
		c.SealTerm = func(sealed []byte) (uint32, bool) { return 1, strings.HasPrefix(string(sealed), "sealed") }
	})
	x.health = threeSay(nil)
	if got := x.examine(t); len(got) != 0 {
		t.Fatalf("found %q", got)
	}
	set := func(edit func(*identity.Authority)) {
		x.state.mu.Lock()
		defer x.state.mu.Unlock()
		x.state.authorities = slices.Clone(x.state.authorities)
		for i := range x.state.authorities {
			if a := &x.state.authorities[i]; a.Kind == identity.AuthorityX509 {
				edit(a)
			}
		}
	}
	life := func(before, left time.Duration) func(*identity.Authority) {
		return func(a *identity.Authority) { a.NotBefore, a.NotAfter = time.Now().Add(-before), time.Now().Add(left) }
	}
	for _, row := range []struct {
		edit func(*identity.Authority)
		want string
	}{
		{life(90*24*time.Hour, 10*24*time.Hour), "warning authorities x509 authority "},
		{life(97*24*time.Hour, 3*24*time.Hour), "error authorities x509 authority "},
		{life(9*24*time.Hour, 20*time.Hour), "error authorities x509 authority "},
		{life(100*24*time.Hour, -time.Hour), "error authorities x509 authority "},
		{life(time.Hour, 23*time.Hour), ""}, // a short one, and new
		{func(a *identity.Authority) { a.SealedKey = []byte("plain") }, "error authorities x509 authority "},
		{func(a *identity.Authority) { a.SealedKey = nil }, "error authorities x509 authority "},
		{func(a *identity.Authority) { a.SealedKey, a.KeyURI = nil, "pkcs11:x" }, ""},
		{func(a *identity.Authority) { a.State = identity.AuthorityRetiring }, "error authorities cluster: there is no active x509 authority"},
	} {
		set(row.edit)
		got := x.examine(t)
		if (len(got) == 1) != (row.want != "") || row.want != "" && !strings.HasPrefix(got[0], row.want) {
			t.Errorf("found %q, want %q", got, row.want)
		}
	}
}

// An agent that has just not acknowledged yet is given its time; one that still has not is told of.
func TestExamineAgents(t *testing.T) {
	x := newExamined(t)
	x.health = threeSay(nil)
	a, _ := x.agent(t, "slow", "")
	s, err := x.srv.hub.open(a.ID, "test")
	if err != nil {
		t.Fatal(err)
	}
	defer x.srv.hub.remove(s)
	if got := x.examine(t); len(got) != 1 || !strings.HasPrefix(got[0], "warning agents agent "+a.ID+": it has acknowledged bundle 0") {
		t.Errorf("found %q", got)
	}
}

func TestExamineTellsNotTooMuch(t *testing.T) {
	x := newExamined(t)
	x.health = []MemberHealth{memberSays("m1", nil)}
	for i := range 40 {
		x.health = append(x.health, memberSays(fmt.Sprintf("n%02d", i), func(_ *MemberHealth, i *MemberInfo) { i.DiskFree = 1 << 30 }))
	}
	got := x.examine(t)
	if len(got) != maxFindings+1 || !strings.Contains(got[len(got)-1], "20 more of the same") {
		t.Errorf("found %d: %q", len(got), got)
	}
}

func TestMemberInfoIsBounded(t *testing.T) {
	i := MemberInfo{Admins: strings.Repeat("x", 4000), BackupEvery: 1 << 60, Now: time.Now(), BackupAt: time.Now(), Version: strings.Repeat("<", 4000), KEK: strings.Repeat("<", 4000), NotIssuingBecause: "x"}
	raw, err := i.Marshal()
	if err != nil || len(raw) > maxInfo {
		t.Fatalf("%d bytes, %v", len(raw), err)
	}
	got, err := ParseMemberInfo(raw)
	if err != nil || got.Admins != "" || got.BackupEvery > 1<<40 {
		t.Errorf("%+v, %v", got, err)
	}
	if got, err := ParseMemberInfo([]byte(`{"backup_every":-5,"admins":"` + strings.Repeat("y", 33) + `"}`)); err != nil || got.BackupEvery != 0 || got.Admins != "" {
		t.Errorf("%+v, %v", got, err)
	}
}

// An agent that no member has seen for a while is told of, unless a member that might have seen it cannot be asked.
func TestExamineAbsentAgents(t *testing.T) {
	x := newExamined(t)
	x.health = threeSay(nil)
	gone, _ := x.agent(t, "gone", "")
	banned, _ := x.agent(t, "banned", "")
	if err := x.state.BanAgent(testContext(t), banned.ID); err != nil {
		t.Fatal(err)
	}
	if got := x.examine(t); len(got) != 0 {
		t.Errorf("one that has just been attested: %q", got)
	}
	x.ahead.Store(int64(30 * time.Minute))
	x.health = threeSay(func(_ *MemberHealth, i *MemberInfo) { i.Now = time.Time{} })
	absent := func() (n int) {
		for _, f := range x.examine(t) {
			if strings.Contains(f, "connected to no member") {
				n++
				if !strings.HasPrefix(f, "warning agents agent "+gone.ID) {
					t.Errorf("found %q", f)
				}
			}
		}
		return n
	}
	if n := absent(); n != 1 {
		t.Errorf("%d are absent", n)
	}
	if err := x.state.PutMember(testContext(t), identity.Member{ID: "m2", Address: "127.0.0.1:1"}); err != nil {
		t.Fatal(err)
	}
	if n := absent(); n != 0 {
		t.Errorf("m2 cannot be asked, and %d are absent", n)
	}
}

// A rotation that somebody has to help is told of; one that takes its time is not.
func TestExamineRotations(t *testing.T) {
	var rotation identity.Rotation
	w := newWorld(t, func(c *Config) {
		c.Rotating.Rotations, c.Rotating.Writes = func() []identity.Rotation { return []identity.Rotation{rotation} }, rotationsOff{}
		c.Authorities, c.Outside = c.State.EntryReader.(*fakeState), c.State.EntryReader.(*fakeState)
	}) // not started: its leader would see to the rotation
	if err := w.state.PutMember(testContext(t), identity.Member{ID: "m1", Address: "127.0.0.1:1"}); err != nil {
		t.Fatal(err)
	}
	w.state.mu.Lock()
	w.state.authorities = append(w.state.authorities, identity.Authority{ID: "next", Kind: identity.AuthorityX509, State: identity.AuthorityPrepared, Sequence: 50})
	w.state.mu.Unlock()
	stuck := func(phase identity.RotationPhase, age time.Duration) (out []string) {
		rotation = identity.Rotation{Kind: identity.AuthorityX509, New: "next", Phase: phase, StartedAt: time.Now().Add(-age), PhaseAt: time.Now().Add(-age)}
		x := &examination{Server: w.srv, now: time.Now(), check: "rotation", out: &adminv1.ExamineResponse{}, left: map[string]int{}}
		x.stuck(testContext(t))
		for _, f := range x.out.Findings {
			out = append(out, f.Severity+" "+f.Where+": "+f.What)
		}
		return out
	}
	if got := stuck(identity.RotationActivate, time.Minute); len(got) != 0 {
		t.Errorf("a new one: %q", got)
	}
	if got := stuck(identity.RotationActivate, 2*time.Hour); len(got) != 1 || !strings.Contains(got[0], "in its phase activate it has waited for 2h0m0s for m1") {
		t.Errorf("an old one: %q", got)
	}
	w.srv.rotations.say(identity.AuthorityX509, "the key cannot be made")
	if got := stuck(identity.RotationActivate, time.Minute); len(got) != 1 || !strings.Contains(got[0], "the key cannot be made") {
		t.Errorf("one that fails: %q", got)
	}
	if got := stuck(identity.RotationDone, time.Minute); len(got) != 0 {
		t.Errorf("one that has ended: %q", got)
	}
}

// rotationsOff writes nothing.
type rotationsOff struct{ RotationWriter }

// A partner that cannot be read is told of: as a notice first, for the next attempt may do.
func TestExaminePartners(t *testing.T) {
	w, f := newFederatedWorld(t) // not started: what is known of partners is the test's
	examine := func() (out []string) {
		x := &examination{Server: w.srv, now: time.Now(), check: "federation", out: &adminv1.ExamineResponse{}, left: map[string]int{}}
		x.partners(testContext(t))
		for _, found := range x.out.Findings {
			out = append(out, found.Severity+" "+found.Where+": "+found.What)
		}
		return out
	}
	if got := examine(); len(got) != 0 {
		t.Errorf("without partners: %q", got)
	}
	f.mu.Lock()
	f.all["other.org"] = identity.Federation{TrustDomain: "other.org"}
	f.mu.Unlock()
	if got := examine(); len(got) != 1 || !strings.HasPrefix(got[0], "error trust domain other.org: there is no bundle") {
		t.Errorf("without a bundle: %q", got)
	}
	f.mu.Lock()
	f.bundles["other.org"] = foreignBundle(t, "other.org", 3)
	f.mu.Unlock()
	for _, row := range []struct {
		status identity.FederationStatus
		want   string
	}{
		{identity.FederationStatus{LastSuccess: time.Now()}, ""},
		{identity.FederationStatus{Failures: 1, LastError: "no route"}, "notice trust domain other.org: its bundle endpoint cannot be read, 1 times"},
		{identity.FederationStatus{Failures: 7, LastError: "no route", LastSuccess: time.Now().Add(-time.Hour)}, "warning trust domain other.org: its bundle endpoint cannot be read, 7 times in a row (it was read last at"},
		{identity.FederationStatus{Warning: "its sequence went back"}, "warning trust domain other.org: what it publishes is odd"},
	} {
		f.mu.Lock()
		f.status["other.org"] = row.status
		f.mu.Unlock()
		got := examine()
		if (len(got) == 1) != (row.want != "") || row.want != "" && !strings.HasPrefix(got[0], row.want) {
			t.Errorf("%+v: found %q", row.status, got)
		}
	}
}
