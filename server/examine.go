package server

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	adminv1 "countersign.io/countersign/api/admin/v1"
	"countersign.io/countersign/identity"
)

// checkupService examines the installation.
type checkupService struct {
	adminv1.UnimplementedCheckupServer
	*Server
}

// Clock tells the time of this member.
func (s checkupService) Clock(context.Context, *adminv1.ClockRequest) (*adminv1.ClockResponse, error) {
	return &adminv1.ClockResponse{Now: timestamppb.New(s.cfg.Now())}, nil
}

// How much something may be off before somebody should look after it.
const (
	// clockWarn and clockError bound what two clocks may differ by: new SVIDs begin 10 s before they are made (backdate), so that
	// from there on others refuse them.
	clockWarn, clockError = 2 * time.Second, 10 * time.Second
	// lifeWarn and lifeError are the parts of an authority's life that may be left. One under an upstream is renewed by itself
	// at its half: what has lifeUpstream left was not.
	lifeWarn, lifeError, lifeUpstream = 0.15, 0.04, 0.33
	// lastHours before the end of an authority what it signs is cut short.
	lastHours = identity.MaxX509TTL
	// diskWarn is the part of a member's disk that should be free.
	diskWarn = 0.1
	// oldBackups is how many intervals old the newest scheduled backup may be.
	oldBackups = 2
	// ackTime is how long an agent may take to acknowledge a bundle.
	ackTime = 5 * time.Second
	// maxFindings of one check are told one by one.
	maxFindings = 20
	// absentTime is how long an agent may be away: nodes restart.
	absentTime = 10 * time.Minute
	// rotationTime is how long a phase of a rotation may wait for somebody.
	rotationTime = 30 * time.Minute
)

const (
	isError   = "error"
	isWarning = "warning"
	isNotice  = "notice"
)

// examination is what the checks of one Examine share.
type examination struct {
	*Server
	now       time.Time
	healths   []MemberHealth
	infos     map[string]MemberInfo
	asked     time.Duration // how long asking the members took
	healthErr error
	check     string
	out       *adminv1.ExamineResponse
	left      map[string]int // findings of a check that were not told
}

func (x *examination) find(severity, where, what, todo string) {
	n := 0
	for _, f := range x.out.Findings {
		if f.Check == x.check {
			n++
		}
	}
	if n >= maxFindings {
		x.left[x.check]++
		return
	}
	x.out.Findings = append(x.out.Findings, &adminv1.Finding{Severity: severity, Check: x.check, Where: where, What: what, Todo: todo})
}

// Examine makes all the checks. What it cannot find out is a finding too, and no reason not to tell the rest.
func (s checkupService) Examine(ctx context.Context, _ *adminv1.ExamineRequest) (*adminv1.ExamineResponse, error) {
	x := &examination{Server: s.Server, infos: map[string]MemberInfo{}, left: map[string]int{},
		out: &adminv1.ExamineResponse{MemberId: s.cfg.MemberID, TrustDomain: s.cfg.TrustDomain.Name()}}
	began := s.cfg.Now()
	x.healths, x.healthErr = s.cfg.Cluster.Health(ctx)
	x.now = s.cfg.Now()
	x.asked = max(x.now.Sub(began), 0)
	for _, h := range x.healths {
		if info, err := ParseMemberInfo(h.Info); err == nil && h.Reachable && len(h.Info) > 0 {
			x.infos[h.ID] = info
		}
	}
	for _, c := range []struct {
		name string
		run  func(context.Context)
	}{
		{"members", x.members}, {"issuing", x.issuing}, {"clock", x.clocks}, {"versions", x.versions}, {"disk", x.disks}, {"authorities", x.authorities},
		{"seal", x.sealed}, {"kek", x.keks}, {"backups", x.backups}, {"admins", x.admins}, {"rotation", x.stuck}, {"federation", x.partners}, {"agents", x.agentsBehind},
	} {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		x.check = c.name
		c.run(ctx)
		x.out.Examined = append(x.out.Examined, c.name)
		if n := x.left[c.name]; n > 0 {
			x.out.Findings = append(x.out.Findings, &adminv1.Finding{Severity: isWarning, Check: c.name, Where: "cluster", What: fmt.Sprintf("%d more of the same", n), Todo: "see to the first ones, and check again"})
		}
	}
	return x.out, nil
}

func (x *examination) members(context.Context) {
	if x.healthErr != nil {
		x.find(isError, "cluster", "the members cannot be asked: "+x.healthErr.Error(), "see countersign cluster status")
		return
	}
	agreed, leader, voters, up := agreedIndex(x.healths), false, 0, 0
	for _, h := range x.healths {
		leader = leader || h.Leader
		if h.Voter {
			voters++
			if h.Reachable {
				up++
			}
		}
		lag := agreed - min(agreed, h.Applied)
		if !h.Reachable {
			lag = 0
		}
		if why := unhealthy(h, x.infos[h.ID], lag); why != "" {
			severity := isError
			if h.Reachable && !h.Voter {
				severity = isNotice
			}
			x.find(severity, "member "+h.ID, why, "see its log and countersign cluster status; if it is lost for good, countersign cluster remove "+h.ID)
		}
	}
	switch {
	case !leader:
		x.find(isError, "cluster", "no member leads: nothing can be changed, and issuance ends after max_staleness", "bring up members until a majority can reach each other; if that is lost for good, see countersign cluster recover --help")
	case voters == 1:
		x.find(isNotice, "cluster", "there is one member: if it is down, nothing is issued", "let two more join: countersign token create --server")
	case voters%2 == 0:
		x.find(isNotice, "cluster", fmt.Sprintf("%d members survive no more losses than %d", voters, voters-1), "let one more join, or remove one")
	case up-quorum(voters) == 0:
		x.find(isWarning, "cluster", "no further member may fail: there would be no leader", "bring up the members that are down")
	}
}

func (x *examination) issuing(context.Context) {
	if err := x.Ready(); err != nil {
		x.find(isError, "member "+x.cfg.MemberID, "it does not issue: "+err.Error(), "do what that says")
	}
	degraded := x.upstream.say()
	if x.cfg.Degraded != nil {
		degraded = append(degraded, x.cfg.Degraded()...)
	}
	for _, d := range degraded { // of the authorities' ends the check of theirs says more
		x.find(isWarning, "member "+x.cfg.MemberID, d, "see to it before it stops issuance")
	}
	if err := x.cfg.Audit.Ready(); err != nil {
		x.find(isError, "member "+x.cfg.MemberID, "its audit log takes no records, so it decides nothing: "+err.Error(), "see docs/AUDIT.md")
	}
}

// clocks compares what the members said with the time before and after they were asked: what lies between cannot be told apart from
// the time that the answer took.
func (x *examination) clocks(context.Context) {
	for id, info := range x.infos {
		if info.Now.IsZero() || id == x.cfg.MemberID {
			continue
		}
		off := time.Duration(0)
		if late := info.Now.Sub(x.now); late > 0 {
			off = late
		} else if early := x.now.Add(-x.asked).Sub(info.Now); early > 0 {
			off = -early
		}
		if d := off.Abs(); d >= clockWarn {
			severity := isWarning
			if d >= clockError {
				severity = isError
			}
			x.find(severity, "member "+id, fmt.Sprintf("its clock is %v %s that of %s", d.Round(100*time.Millisecond), map[bool]string{true: "ahead of", false: "behind"}[off > 0], x.cfg.MemberID),
				"run NTP on both machines: what one issues the other's agents may refuse")
		}
	}
}

func (x *examination) versions(context.Context) {
	by := map[string][]string{}
	for id, info := range x.infos {
		by[info.Version] = append(by[info.Version], id)
	}
	if len(by) > 1 {
		var all []string
		for v, ids := range by {
			slices.Sort(ids)
			all = append(all, v+" on "+strings.Join(ids, ", "))
		}
		slices.Sort(all)
		x.find(isWarning, "cluster", "members run different versions: "+strings.Join(all, "; "), "upgrade all to the newest, one at a time (docs/OPERATIONS.md)")
	}
	if have := x.cfg.State.Level(); have < x.cfg.Level {
		x.find(isWarning, "cluster", fmt.Sprintf("the cluster works at level %d, and this version knows %d", have, x.cfg.Level), "upgrade or remove the members that hold it back: countersign cluster status")
	}
}

func (x *examination) disks(context.Context) {
	for id, info := range x.infos {
		if info.DiskTotal > 0 && float64(info.DiskFree) < diskWarn*float64(info.DiskTotal) {
			x.find(isWarning, "member "+id, fmt.Sprintf("its disk has %d%% free (%d MiB)", info.DiskFree*100/info.DiskTotal, info.DiskFree>>20), "make room: on a full disk nothing is recorded, and so nothing decided")
		}
	}
}

func (x *examination) authorities(context.Context) {
	active := map[identity.AuthorityKind]bool{}
	for _, a := range x.cfg.State.Authorities() {
		if a.State == identity.AuthorityRevoked { // its key is gone, and its record there for people to see
			continue
		}
		where := fmt.Sprintf("%s authority %s", a.Kind, a.ID)
		if a.State == identity.AuthorityActive {
			active[a.Kind] = true
			left, life := a.NotAfter.Sub(x.now), a.NotAfter.Sub(a.NotBefore)
			todo := "rotate it: countersign bundle rotate --kind " + string(a.Kind)
			if a.Upstream != "" {
				todo = "it should have been renewed by " + a.Upstream + ": see whether that answers (countersign status)"
			}
			warn := lifeWarn
			if a.Upstream != "" {
				warn = lifeUpstream
			}
			switch part := float64(left) / float64(max(life, 1)); {
			case left <= 0:
				x.find(isError, where, "it ended at "+a.NotAfter.UTC().Format(time.RFC3339)+": nothing can be issued under it", todo)
			case part < lifeError || left < lastHours && life > 4*lastHours:
				x.find(isError, where, "it ends in "+left.Round(time.Minute).String()+", and what it signs with it", todo)
			case part < warn:
				x.find(isWarning, where, "it ends in "+left.Round(time.Hour).String(), todo)
			}
		}
		if len(a.SealedKey) == 0 && a.KeyURI == "" {
			x.find(isError, where, "its key is neither sealed nor elsewhere", "give the authority up, and report this")
		}
		if len(a.SealedKey) > 0 && x.cfg.SealTerm != nil {
			if _, ok := x.cfg.SealTerm(a.SealedKey); !ok {
				x.find(isError, where, "its key is not sealed as this version seals", "give the authority up: what is not sealed may have been read")
			}
		}
	}
	for _, k := range []identity.AuthorityKind{identity.AuthorityX509, identity.AuthorityJWT} {
		if !active[k] {
			x.find(isError, "cluster", "there is no active "+string(k)+" authority", "see the leader's log")
		}
	}
}

func (x *examination) sealed(ctx context.Context) {
	c := &x.cfg.Sealing
	if !c.on() {
		return
	}
	active, ok := x.activeTerm()
	if ok {
		old := 0
		for _, a := range x.cfg.State.Authorities() {
			if n, sealed := c.TermOf(a.SealedKey); len(a.SealedKey) > 0 && sealed && n != active.Number {
				old++
			}
		}
		if old > 0 {
			x.find(isWarning, "cluster", fmt.Sprintf("%d keys are sealed under an old data key", old), "countersign seal rewrap")
		}
	}
	for _, t := range c.Terms() {
		if age := x.now.Sub(t.CreatedAt); t.State == identity.SealPending && age > 10*time.Minute {
			x.find(isWarning, "data key "+strconv.FormatUint(uint64(t.Number), 10), fmt.Sprintf("members are waited for since %v; %s have it", age.Round(time.Minute), strings.Join(t.Holders, ", ")), "bring up the others, or remove them; countersign seal status names them")
		}
	}
	for _, m := range x.sealReports(ctx) {
		if m.Problem == "" && ok && !slices.Contains(m.Terms, active.Number) {
			x.find(isError, "member "+m.Id, fmt.Sprintf("it does not have data key %d, which is active", active.Number), "see its log: it should have fetched it")
		}
	}
}

// keks looks where the members' key-encryption keys are. A file protects against nobody who has the disk it is on.
func (x *examination) keks(context.Context) {
	for id, info := range x.infos {
		if strings.HasPrefix(info.KEK, "file:") {
			x.find(isWarning, "member "+id, "its key-encryption key is a file on its machine ("+info.KEK+"): whoever has the disk has both", "name an HSM, a KMS, or Vault in seal.key, or put the file on another disk (docs/SEALING.md)")
		}
	}
}

func (x *examination) backups(context.Context) {
	some := false
	for id, info := range x.infos {
		if info.BackupEvery <= 0 {
			continue
		}
		some = true
		every := time.Duration(info.BackupEvery) * time.Second
		switch age := x.now.Sub(info.BackupAt); {
		case info.BackupAt.IsZero() && x.now.Sub(info.StartedAt) > oldBackups*every:
			x.find(isError, "member "+id, "it has made no backup, though it should every "+every.String(), "see its log, and countersign status there")
		case !info.BackupAt.IsZero() && age > oldBackups*every+time.Minute:
			x.find(isError, "member "+id, fmt.Sprintf("its newest backup is %v old, and it should make one every %v", age.Round(time.Second), every), "see its log, and countersign status there")
		}
	}
	if !some && len(x.infos) > 0 {
		x.find(isWarning, "cluster", "no member makes backups by itself", "set backup.dir on one or more members, or call countersign backup save from a timer (then --ignore backups)")
	}
}

// admins looks whether the members name the same admins: each goes by its own configuration.
func (x *examination) admins(context.Context) {
	own, ok := x.infos[x.cfg.MemberID]
	if !ok {
		return
	}
	for id, info := range x.infos {
		if info.Admins != own.Admins && info.Level >= own.Level {
			x.find(isWarning, "member "+id, "admin.ids of its configuration differ from those of "+x.cfg.MemberID, "name the same admins on every member: one that does not know them may give their identities away")
		}
	}
}

// agentsBehind looks at all agents, by what every member tells of those that it has.
func (x *examination) agentsBehind(ctx context.Context) {
	behind, c := x.laggards(ctx)
	if len(behind) > 0 { // a bundle that has just changed is on its way
		if !sleep(ctx, ackTime) {
			return
		}
		again, now := x.laggards(ctx)
		maps.DeleteFunc(again, func(id string, _ uint64) bool { _, before := behind[id]; return !before })
		behind, c = again, now
	}
	want := x.cfg.State.Bundle().Sequence
	for _, id := range slices.Sorted(maps.Keys(behind)) {
		x.find(isWarning, "agent "+id, fmt.Sprintf("it has acknowledged bundle %d, and the trust domain is at %d: its workloads may not trust what is new", behind[id], want), "see the agent's log; countersign agent evict makes it attest again")
	}
	if len(c.failed) > 0 { // who is connected to those is not known: they are findings themselves
		return
	}
	for _, a := range x.agentIDs() {
		if a.Banned || c.parties[a.ID].connected {
			continue
		}
		last := a.AttestedAt
		for _, at := range []time.Time{c.parties[a.ID].seen, c.oldest} { // a member that has just started has seen nobody before
			if at.After(last) {
				last = at
			}
		}
		if x.now.Sub(last) > absentTime {
			x.find(isWarning, "agent "+a.ID, "it is connected to no member, at least since "+last.UTC().Format(time.RFC3339), "start it; if its node is gone, countersign agent evict "+a.ID)
		}
	}
}

// laggards are the connected agents that have not acknowledged the present bundle.
func (x *examination) laggards(ctx context.Context) (map[string]uint64, census) {
	out := map[string]uint64{}
	c := x.takeCensus(ctx, identity.AuthorityX509, "")
	want := x.cfg.State.Bundle().Sequence
	for id, p := range c.parties {
		if p.connected && p.sequence < want {
			out[id] = p.sequence
		}
	}
	return out, c
}
