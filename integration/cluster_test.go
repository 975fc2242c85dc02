package integration

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	adminv1 "countersign.io/countersign/api/admin/v1"
	"countersign.io/countersign/integration/cluster"
)

// clusterStatus is what cluster status says, whatever its exit code.
type clusterStatus struct {
	LeaderID         string `json:"leader_id"`
	Level            int
	FailureTolerance int `json:"failure_tolerance"`
	Healthy          bool
	Members          []clusterMember
}

type clusterMember struct {
	ID, Address      string
	Voter, Leader    bool
	Healthy, Issuing bool
	UnhealthyBecause string `json:"unhealthy_because"`
	Version          string
	Level            int
	DiskFree         string `json:"disk_free"`
}

func clusterStatusOf(ctx context.Context, bin string, m *cluster.Member) (*clusterStatus, error) {
	cmd := exec.CommandContext(ctx, filepath.Join(bin, "countersign"), "cluster", "status", "-o", "json", "--socket", m.Socket)
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.Output()
	s := &clusterStatus{}
	if perr := json.Unmarshal(out, s); perr != nil {
		return nil, fmt.Errorf("%w: %s", errors.Join(err, perr), errs.String())
	}
	if (err == nil) != s.Healthy {
		return nil, fmt.Errorf("healthy is %t, and the command ends with %v: %s", s.Healthy, err, errs.String())
	}
	return s, nil
}

// care is a world whose members are looked after.
type care struct{ *world }

func newCare(t *testing.T, members int, yaml string) *care {
	t.Helper()
	c := &care{worldOf(t, members, yaml)}
	for _, m := range c.Members {
		untilVoter(t, c.world, m.Name)
	}
	return c
}

// status asks a member until its answer is right.
func (c *care) status(m *cluster.Member, what string, ok func(*clusterStatus) bool) *clusterStatus {
	c.t.Helper()
	var s *clusterStatus
	c.eventually(what, func() (err error) {
		if s, err = clusterStatusOf(c.ctx, bin, m); err == nil && !ok(s) {
			err = fmt.Errorf("%+v", s)
		}
		return err
	})
	return s
}

func well(n int) func(*clusterStatus) bool {
	return func(s *clusterStatus) bool {
		return s.Healthy && len(s.Members) == n && s.FailureTolerance == (n-1)/2 && s.Level == 2
	}
}

// run runs an operator's command on a member, and checks its exit code and what it says.
func (c *care) run(m *cluster.Member, code int, line string, words ...string) string {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.ctx, time.Minute)
	defer cancel()
	var out bytes.Buffer
	cmd := exec.CommandContext(ctx, filepath.Join(bin, "countersign"), strings.Fields(line)...)
	cmd.Env = append(os.Environ(), "COUNTERSIGN_ADMIN_SOCKET="+m.Socket)
	cmd.Stdout, cmd.Stderr = &out, &out
	_ = cmd.Run() // its code says it
	if got := cmd.ProcessState.ExitCode(); got != code {
		c.t.Errorf("%s on %s: exit code %d, want %d: %s", line, m.Name, got, code, out.String())
	}
	for _, w := range words {
		if !strings.Contains(out.String(), w) {
			c.t.Errorf("%s on %s: %q is not in what it said: %s", line, m.Name, w, out.String())
		}
	}
	return out.String()
}

func (c *care) leader() (*cluster.Member, []*cluster.Member) {
	c.t.Helper()
	f := &faults{world: c.world}
	return f.leaderAnd()
}

// TestClusterCare is what an operator does with members: look, let another lead, remove, and let it join again.
func TestClusterCare(t *testing.T) {
	t.Parallel()
	c := newCare(t, 3, "")
	first := c.status(c.Members[1], "the cluster is well", well(3))
	for _, m := range first.Members {
		if !m.Voter || !m.Issuing || m.Level != 2 || m.Version == "" || m.DiskFree == "" {
			t.Errorf("%+v", m)
		}
	}
	c.run(c.Members[1], 0, "cluster status", "healthy", "NAME", "ca-1", "ca-3", "follower", "leader", "GiB")
	c.run(c.Members[2], 0, "cluster members", "ca-1", c.Members[0].Address)

	leader, others := c.leader()
	c.run(others[0], 0, "cluster transfer-leader "+others[1].Name)
	c.status(leader, others[1].Name+" leads", func(s *clusterStatus) bool { return s.LeaderID == others[1].Name })
	c.run(leader, 0, "cluster transfer-leader")
	c.run(leader, 3, "cluster transfer-leader ca-9", "ca-1, ca-2, ca-3")
	out := c.run(leader, 0, "__complete cluster remove c", "ca-1\t", "ca-2\t", "ca-3\t")
	if strings.Contains(out, "server.yaml") {
		t.Errorf("completing names: %s", out)
	}

	// One is killed: status says so, and no other may go.
	leader, others = c.leader()
	dead, left := others[0], others[1]
	dead.Kill()
	c.status(left, dead.Name+" is missed", func(s *clusterStatus) bool {
		i := slices.IndexFunc(s.Members, func(m clusterMember) bool { return m.ID == dead.Name })
		return !s.Healthy && s.FailureTolerance == 0 && s.LeaderID != "" && !s.Members[i].Healthy && strings.Contains(s.Members[i].UnhealthyBecause, "cannot be reached")
	})
	c.run(left, 1, "cluster status", "the cluster is not well", dead.Name+": it cannot be reached")
	c.run(left, 1, "cluster remove "+leader.Name, "must be up to decide anything", dead.Name+" cannot be reached")
	c.run(left, 3, "cluster remove ca-9", "the members are")
	c.run(left, 0, "cluster remove "+dead.Name, "empty its data_dir")
	c.status(leader, "two are left", well(2))

	// It does not know yet: it comes up, learns it, says what to do, and issues nothing.
	p := &place{Cluster: c.Cluster, Member: dead}
	var log lockedBuffer
	proc, err := c.Start(dead.Name, nil, &log, filepath.Join(bin, "countersign"), "server", "run", "-c", filepath.Join(p.Member.Dir, "server.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	c.eventually("the removed member says so", func() error {
		code, why, err := readiness(c.ctx, dead.Health)
		if err == nil && (code != http.StatusServiceUnavailable || !strings.Contains(why, "removed from the cluster") || !strings.Contains(why, "empty data_dir and join")) {
			err = fmt.Errorf("%d %s: %s", code, why, log.String())
		}
		return err
	})
	proc.Stop()
	if proc.Code() != 0 {
		t.Errorf("stopped, the removed member ends with code %d", proc.Code())
	}
	// With its data it stays out; without, and with a new token, it is a member again under its old name.
	c.status(leader, "it did not come back", well(2))
	removeAll(t, p.data(""))
	change(t, filepath.Join(p.Member.Dir, "server.yaml"), func(b []byte) []byte {
		return append(withoutLine(b, "join_token_file"), []byte(p.joinFile(t, c.admin("token", "create", "--server")))...)
	})
	if err := c.RestartMember(c.ctx, dead); err != nil {
		t.Fatal(err)
	}
	c.status(leader, "all are well", well(3))

	// A member may remove itself, and the leader too.
	leader, others = c.leader()
	c.run(leader, 0, "cluster remove "+leader.Name)
	c.status(others[0], "two are left", well(2))
	c.notReady(leader.Health, "removed from the cluster")
	leader.Stop()
}

// lockedBuffer collects a process's output while the test looks at it.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func withoutLine(b []byte, word string) []byte {
	var out []byte
	for line := range bytes.Lines(b) {
		if !bytes.Contains(line, []byte(word)) {
			out = append(out, line...)
		}
	}
	return out
}

// TestClusterWithoutQuorum: what is asked when nothing can be decided answers, and says so; a read that must know all does not.
func TestClusterWithoutQuorum(t *testing.T) {
	t.Parallel()
	c := newCare(t, 3, "")
	left := c.Members[2]
	for _, m := range c.Members[:2] {
		m.Kill()
	}
	c.status(left, "nobody leads", func(s *clusterStatus) bool { return !s.Healthy && s.LeaderID == "" && len(s.Members) == 3 })
	c.run(left, 1, "cluster status", "no member leads", "ca-1: it cannot be reached")
	c.run(left, 0, "cluster members", "ca-1", "ca-2")
	c.run(left, 0, "status", "leader")
	c.run(left, 5, "kube list", "--stale")
	c.run(left, 0, "kube list --stale", "test")
	c.run(left, 5, "cluster remove ca-1", "no leader")
	c.run(left, 5, "cluster transfer-leader ca-3")
}

// TestClusterAddresses: all members are stopped and come back elsewhere, with the new address of one of them for a hint.
func TestClusterAddresses(t *testing.T) {
	t.Parallel()
	c := newCare(t, 3, "")
	c.createEntry(append(uidSelectors(), "--id", "spiffe://"+trustDomain+"/me")...)
	before := c.agent()
	if _, err := c.fetch(before); err != nil {
		t.Fatal(err)
	}
	for _, m := range c.Members {
		m.Stop()
	}
	from := map[string]string{}
	for _, m := range c.Members {
		from[m.Name], m.Address = m.Address, freeAddress(t)
	}
	for i, m := range c.Members {
		change(t, filepath.Join(m.Dir, "server.yaml"), func(b []byte) []byte {
			b = bytes.ReplaceAll(b, []byte("listen: "+from[m.Name]), []byte("listen: "+m.Address))
			if i > 0 {
				b = append(b, []byte("cluster: {peers: ["+c.Members[0].Address+"]}\n")...)
			}
			return b
		})
	}
	c.together(t, c.Members)
	c.status(c.Members[1], "the members found each other, and the leader took up where they are", func(s *clusterStatus) bool {
		return well(3)(s) && !slices.ContainsFunc(c.Members, func(m *cluster.Member) bool {
			return !slices.ContainsFunc(s.Members, func(x clusterMember) bool { return x.ID == m.Name && x.Address == m.Address })
		})
	})
	// What agents are told follows; one that starts now learns all by its token.
	c.eventually("a token names the new addresses", func() error {
		token := c.admin("token", "create", "--agent")
		for name, old := range from {
			for _, a := range parsedToken(t, token).Addresses {
				if a == old {
					return fmt.Errorf("it names %s, where %s was", a, name)
				}
			}
		}
		return nil
	})
	if _, err := c.fetch(c.agent()); err != nil {
		t.Error(err)
	}
	// One that knows the old ones only serves what it has. It is told one new address, and learns the others.
	if _, err := c.fetch(before); err != nil {
		t.Error(err)
	}
	c.notReady(before.Health)
	if cluster.StateDir(c.Dir, before.Name) == "none" {
		t.Log("this machine has no tmpfs: an agent that restarts must attest again")
		return
	}
	before.Stop()
	change(t, filepath.Join(before.Dir, "agent.yaml"), func(b []byte) []byte { return append(b, []byte("servers: ["+c.Members[2].Address+"]\n")...) })
	if err := c.RestartAgent(c.ctx, before); err != nil {
		t.Fatal(err)
	}
	if c.connectedTo() == nil {
		t.Error("it is connected to none")
	}
	c.Members[2].Stop()
	if err := c.RestartMember(c.ctx, c.Members[2]); err != nil {
		t.Fatal(err)
	}
	untilReady(t, c.ctx, before.Process, before.Health)
}

// together starts members at the same time: alone, none is ready.
func (c *care) together(t *testing.T, members []*cluster.Member) {
	t.Helper()
	var wg sync.WaitGroup
	for _, m := range members {
		wg.Go(func() {
			if err := c.RestartMember(c.ctx, m); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		t.FailNow()
	}
}

// TestClusterRollingRestarts restarts the members in every order, with the cluster in use: nothing fails.
func TestClusterRollingRestarts(t *testing.T) {
	t.Parallel()
	w := worldOf(t, 3, "")
	for _, m := range w.Members {
		untilVoter(t, w, m.Name)
	}
	f := &faults{world: w, agent: w.agent()}
	w.createEntry("-s", "k8s:ns:shop", "--id", "spiffe://"+trustDomain+"/shop/{k8s:sa}")
	w.createEntry(append(uidSelectors(), "--id", "spiffe://"+trustDomain+"/me")...)
	f.load = startLoad(w, f.agent)
	f.progress()
	for _, order := range [][]int{{0, 1, 2}, {0, 2, 1}, {1, 0, 2}, {1, 2, 0}, {2, 0, 1}, {2, 1, 0}} {
		t.Run(fmt.Sprint(order), func(t *testing.T) {
			for _, i := range order {
				f.swap(t, w.Members[i], bin)
			}
			f.check(t)
		})
	}
}

// TestClusterLeaderKilled prints how long it takes from the leader's death to the next write, which the benchmarks measure.
func TestClusterLeaderKilled(t *testing.T) {
	t.Parallel()
	c := newCare(t, 3, "")
	var took []time.Duration
	for n := range 3 {
		leader, others := c.leader()
		api, done, err := others[0].AdminConn()
		if err != nil {
			t.Fatal(err)
		}
		leader.Kill()
		began := time.Now()
		c.eventually("a write goes through", func() error {
			ctx, cancel := context.WithTimeout(c.ctx, 20*time.Second)
			defer cancel()
			_, err := api.CreateEntry(ctx, &adminv1.Entry{SpiffeId: fmt.Sprintf("spiffe://%s/killed-%d-%d", trustDomain, n, time.Now().UnixNano()), Selectors: []string{fmt.Sprint("unix:uid:", n), "agent:kind:join_token"}})
			return err
		})
		took = append(took, time.Since(began).Round(time.Millisecond))
		done()
		if err := c.RestartMember(c.ctx, leader); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("from the leader's death to the next write: %v", took)
}

// TestClusterJoinsAndLeaves lets members come and go a hundred times: what stays is what was there.
func TestClusterJoinsAndLeaves(t *testing.T) {
	t.Parallel()
	total, atOnce := 100, 5
	if testing.Short() || raceEnabled {
		total = 20
	}
	c := newCare(t, 3, "")
	before := c.status(c.Members[0], "the cluster is well", well(3))
	for n := 0; n < total; n += atOnce {
		places := make([]*place, atOnce)
		tokens := make([]string, atOnce)
		var wg sync.WaitGroup
		for i := range places {
			places[i] = newPlace(t, fmt.Sprintf("guest-%d", (n+i)%17), "") // names come again, and are others'
			tokens[i] = c.admin("token", "create", "--server")
			places[i].configure(t, places[i].joinFile(t, tokens[i]))
			wg.Go(func() {
				if err := places[i].RestartMember(c.ctx, places[i].Member); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if t.Failed() {
			t.FailNow()
		}
		if n%4 == 0 { // some before they have a vote, some after
			c.status(c.Members[0], "the guests have their votes", well(3+atOnce))
		}
		for i, p := range places {
			at := c.Members[(n+i)%3]
			if i%2 == 0 {
				p.Process.Stop()
			}
			c.eventually("the guest is removed", func() error {
				_, err := at.Admin(c.ctx, bin, "cluster", "remove", p.Name())
				return err
			})
			p.Process.Kill()
		}
		// A token that admitted one admits nobody else.
		if n == 0 {
			newPlace(t, "thief", "").notJoined(t, tokens[0], exitFailure, "was used at", "make another one")
		}
	}
	after := c.status(c.Members[0], "the cluster is as before", func(s *clusterStatus) bool { return well(3)(s) })
	names := func(s *clusterStatus) (out []string) {
		for _, m := range s.Members {
			out = append(out, m.ID+" "+m.Address)
		}
		slices.Sort(out)
		return out
	}
	if !slices.Equal(names(before), names(after)) {
		t.Errorf("the members were %v and are %v", names(before), names(after))
	}
	// Nor do agents and newcomers hear of those who left.
	for _, a := range parsedToken(t, c.admin("token", "create", "--agent")).Addresses {
		if !slices.ContainsFunc(c.Members, func(m *cluster.Member) bool { return m.Address == a }) {
			t.Errorf("a token names %s, which is none of the members'", a)
		}
	}
}

// TestClusterRecover brings a cluster up from one of three, and keeps the operator from doing that by mistake.
func TestClusterRecover(t *testing.T) {
	t.Parallel()
	c := newCare(t, 3, "")
	id := c.createEntry("-s", "unix:uid:4242", "-s", "agent:kind:join_token", "--id", "spiffe://"+trustDomain+"/kept")
	left, others := c.Members[1], []*cluster.Member{c.Members[0], c.Members[2]}
	c.eventually("the member that is left has the entry", func() error {
		_, err := left.Admin(c.ctx, bin, "entry", "show", id)
		return err
	})
	file := filepath.Join(left.Dir, "server.yaml")
	recoverBy := func(code int, stdin string, args []string, words ...string) string {
		t.Helper()
		var out bytes.Buffer
		cmd := exec.CommandContext(c.ctx, filepath.Join(bin, "countersign"), append([]string{"cluster", "recover", "-c", file}, args...)...)
		cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &out
		_ = cmd.Run()
		if got := cmd.ProcessState.ExitCode(); got != code {
			t.Errorf("recover %v: exit code %d, want %d: %s", args, got, code, out.String())
		}
		for _, w := range words {
			if !strings.Contains(out.String(), w) {
				t.Errorf("recover %v: %q is not in what it said: %s", args, w, out.String())
			}
		}
		return out.String()
	}
	recoverBy(1, "ca-2\n", nil, "the member is running", "another process uses folder")
	for _, m := range append(others, left) {
		m.Kill()
	}
	recoverBy(1, "", nil, "not confirmed", "nothing was changed", "ca-1", others[0].Address, "ca-3", "given up", "split brain", "ca-2")
	recoverBy(1, "yes\n", nil, "not confirmed")
	recoverBy(1, "", []string{"--confirm", "ca-1"}, "not confirmed")
	t.Log(recoverBy(0, "ca-2\n", nil, "countersign server run"))
	if err := c.RestartMember(c.ctx, left); err != nil {
		t.Fatal(err)
	}
	c.status(left, "it leads alone", well(1))
	if out := c.run(left, 0, "entry show "+id); !strings.Contains(out, "/kept") {
		t.Errorf("the entry is gone: %s", out)
	}
	// The others join again, with empty folders and new tokens.
	for _, m := range others {
		removeAll(t, filepath.Join(m.Dir, "data"))
		token, err := left.Admin(c.ctx, bin, "token", "create", "--server")
		if err != nil {
			t.Fatal(err)
		}
		p := &place{Cluster: c.Cluster, Member: m}
		change(t, filepath.Join(m.Dir, "server.yaml"), func(b []byte) []byte {
			return append(withoutLine(b, "join_token_file"), []byte(p.joinFile(t, token))...)
		})
		if err := c.RestartMember(c.ctx, m); err != nil {
			t.Fatal(err)
		}
	}
	c.status(left, "there are three again", well(3))
	if _, err := os.Stat(filepath.Join(left.Dir, "data", "member.json")); errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
	// On a folder that has no member, or another's.
	file = filepath.Join(t.TempDir(), "server.yaml")
	writeFile(t, file, fmt.Appendf(nil, "version: 1\ntrust_domain: %s\nname: x\ndata_dir: %s\nadvertise: 127.0.0.1:1\n", trustDomain, filepath.Join(filepath.Dir(file), "none")))
	recoverBy(1, "", []string{"--confirm", "x"}, "holds no member")
}

// TestClusterTwoOfOne: a copy of a member's folder does not run beside it, in one place or the other.
func TestClusterTwoOfOne(t *testing.T) {
	t.Parallel()
	c := newCare(t, 3, "")
	m := c.Members[2]
	m.Stop()
	p := newPlace(t, m.Name, filepath.Join(m.Dir, "data"))
	if err := c.RestartMember(c.ctx, m); err != nil {
		t.Fatal(err)
	}
	p.notStarted(t, "", exitFailure, `a member named "ca-3" runs at `+m.Address, "is a copy of its folder", "join under another name")
	c.status(c.Members[0], "the cluster is as it was", func(s *clusterStatus) bool {
		return well(3)(s) && slices.ContainsFunc(s.Members, func(x clusterMember) bool { return x.ID == m.Name && x.Address == m.Address })
	})
	// A name that is taken is none for a newcomer, and the folder of one cluster is of no use to another.
	joiner := newPlace(t, m.Name, "")
	joiner.notJoined(t, c.admin("token", "create", "--server"), exitFailure, `member "ca-3"`, "choose another name", "cluster remove")
	m.Stop()
	elsewhere := newPlace(t, m.Name, filepath.Join(m.Dir, "data"))
	elsewhere.yaml = strings.Replace(elsewhere.yaml, "trust_domain: "+trustDomain, "trust_domain: other.test", 1)
	elsewhere.notStarted(t, "", exitFailure, `trust domain "process.test", not "other.test"`)
}

// TestClusterRemovesTheDead: who is away for long is removed by itself, and only as long as three voters are left.
func TestClusterRemovesTheDead(t *testing.T) {
	if testing.Short() {
		t.Skip("a member must be away for a minute to be removed")
	}
	t.Parallel()
	c := newCare(t, 4, "cluster: {remove_dead_after: 1m}\n")
	c.status(c.Members[0], "all are well", func(s *clusterStatus) bool { return s.Healthy && len(s.Members) == 4 })
	c.Members[3].Kill()
	gone := func(s *clusterStatus) bool { return s.Healthy && len(s.Members) == 3 }
	for deadline := time.Now().Add(3 * time.Minute); ; {
		s, err := clusterStatusOf(c.ctx, bin, c.Members[0])
		if err == nil && gone(s) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the dead member is still there: %+v, %v", s, err)
		}
		if !pause(c.ctx, 500*time.Millisecond) {
			t.Fatal(c.ctx.Err())
		}
	}
	c.eventually("agents hear no more of it", func() error {
		if k := parsedToken(t, c.admin("token", "create", "--agent")); slices.Contains(k.Addresses, c.Members[3].Address) {
			return fmt.Errorf("%v", k.Addresses)
		}
		return nil
	})
}
