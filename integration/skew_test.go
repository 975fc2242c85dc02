//go:build integration

package integration

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
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

// oldCommit is the release before levels: what a cluster is upgraded from.
const oldCommit = "ec5118c"

// buildOld builds the release before this one from the repository's history.
func buildOld(t *testing.T) string {
	t.Helper()
	src, out := t.TempDir(), t.TempDir()
	if err := exec.Command("git", "-C", "..", "cat-file", "-e", oldCommit+"^{commit}").Run(); err != nil {
		t.Skipf("commit %s is not in this clone (a shallow one, or no git): %v", oldCommit, err)
	}
	if msg, err := exec.Command("sh", "-ec", `git -C .. archive "$1" | tar -x -C "$2"`, "sh", oldCommit, src).CombinedOutput(); err != nil {
		t.Fatalf("unpacking %s: %v: %s", oldCommit, err, msg)
	}
	if err := cluster.Build(t.Context(), src, out, raceEnabled); err != nil {
		t.Fatal(err)
	}
	return out
}

// buildFuture builds this tree as if it knew one level more.
func buildFuture(t *testing.T) string {
	t.Helper()
	dir, err := filepath.Abs("..")
	if err != nil {
		t.Fatal(err)
	}
	file, out := filepath.Join(dir, "store", "level.go"), t.TempDir()
	src, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	future := bytes.Replace(src, []byte("const Level = 2\n"), []byte("const Level = 3\n"), 1)
	if bytes.Equal(src, future) {
		t.Fatal("store/level.go does not say const Level = 2 any more: raise what this test makes of it")
	}
	writeFile(t, filepath.Join(out, "level.go"), future)
	overlay, err := json.Marshal(map[string]any{"Replace": map[string]string{file: filepath.Join(out, "level.go")}})
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, filepath.Join(out, "overlay.json"), overlay)
	args := []string{"build", "-overlay", filepath.Join(out, "overlay.json"), "-o", out + "/"}
	if raceEnabled {
		args = append(args, "-race")
	}
	cmd := exec.CommandContext(t.Context(), "go", append(args, "./cmd/countersign", "./cmd/countersign-agent")...)
	cmd.Dir = dir
	if msg, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("building the future: %v: %s", err, msg)
	}
	return out
}

// levelIs waits until a member of the version that bin has says so.
func (f *faults) levelIs(m *cluster.Member, bin string, level int) {
	f.t.Helper()
	f.eventually(fmt.Sprintf("the cluster is at level %d", level), func() error {
		s, err := clusterStatusOf(f.world.ctx, bin, m)
		if err != nil {
			return err
		}
		if s.Level != level {
			return fmt.Errorf("%+v", s)
		}
		return nil
	})
}

// skewed is a cluster of three members of one version under load, an agent of it, and one of another.
func skewed(t *testing.T, from, to string) (f *faults, other *cluster.Agent) {
	t.Helper()
	w := newWorldOf(t, from, 3, "")
	t.Cleanup(func() { soundLogs(t, w.Dir) })
	f = &faults{world: w}
	w.createEntry("-s", "k8s:ns:shop", "--id", "spiffe://"+trustDomain+"/shop/{k8s:sa}", "--x509-ttl", "30s")
	w.createEntry(append(uidSelectors(), "--id", "spiffe://"+trustDomain+"/me")...)
	f.agent = w.agent()
	w.Bin = to
	other = w.agent()
	w.Bin = from
	for _, m := range w.Members {
		untilVoter(t, w, m.Name)
	}
	f.load = startLoad(w, f.agent)
	f.progress()
	return f, other
}

// works checks the account, and that the other version's agent is served.
func (f *faults) works(t *testing.T, other *cluster.Agent) {
	t.Helper()
	f.check(t)
	f.eventually("the agent of the other version serves", func() error {
		got, err := f.world.fetch(other)
		if err == nil && got == "" {
			err = errors.New("nothing")
		}
		return err
	})
}

// TestSkew runs two versions in one cluster: this one with the one before, and with one that is yet to come.
func TestSkew(t *testing.T) {
	t.Parallel()
	old := buildOld(t)
	t.Run("from the release before", func(t *testing.T) {
		f, other := skewed(t, old, bin)
		a, b, c := f.Members[0], f.Members[1], f.Members[2]
		f.swap(t, a, bin)
		f.levelIs(a, bin, 1)
		f.works(t, other)
		// What an older version could not read is refused, and says so; what only it lacks the command for, too.
		for _, args := range [][]string{
			{"entry", "create", "--downstream", "-s", "k8s:ns:ca", "--id", "spiffe://" + trustDomain + "/ca"},
			{"seal", "rotate"},
		} {
			if _, err := a.Admin(f.world.ctx, bin, args...); err == nil || !strings.Contains(err.Error(), "until every member runs this version") {
				t.Errorf("%v at level 1: %v", args, err)
			}
		}
		if _, err := b.Admin(f.world.ctx, bin, "cluster", "status"); err == nil || !strings.Contains(err.Error(), "runs a version that cannot do this") {
			t.Errorf("asking an old member: %v", err)
		}
		f.swap(t, b, bin)
		f.levelIs(b, bin, 1)
		// Back, as long as one is old still: nothing that the old one cannot read was written.
		f.swap(t, a, old)
		f.works(t, other)
		f.swap(t, b, old)
		f.works(t, other)
		for _, m := range []*cluster.Member{b, a} {
			f.swap(t, m, bin)
			f.levelIs(m, bin, 1)
		}
		f.works(t, other)
		// A new joiner at level 1, and the old leader goes last or not, as it happened.
		f.swap(t, c, bin)
		f.levelIs(c, bin, 2)
		f.works(t, other)
		f.load.stop()
		f.load.wg.Wait()
		f.check(t)
		s, err := clusterStatusOf(f.world.ctx, bin, a)
		if err != nil || !s.Healthy || s.FailureTolerance != 1 || slices.ContainsFunc(s.Members, func(m clusterMember) bool {
			return m.Level != 2
		}) {
			t.Errorf("%+v, %v", s, err)
		}
		f.tooOld(t, old, "level 2", "knows level 1")

		// The other way round it stops, says why, and has spoilt nothing.
		c.Stop()
		p := &place{Cluster: f.Cluster, Member: c}
		var out bytes.Buffer
		proc, err := f.Start(c.Name, nil, &out, filepath.Join(old, "countersign"), "server", "run", "-c", filepath.Join(p.Member.Dir, "server.yaml"))
		if err != nil {
			t.Fatal(err)
		}
		select {
		case <-proc.Done():
			if proc.Code() == 0 || !strings.Contains(out.String(), "upgrade this member") && !strings.Contains(out.String(), "newer") && !strings.Contains(out.String(), "this version") {
				t.Errorf("the old version ends with code %d and says: %s", proc.Code(), out.String())
			}
			t.Logf("the old version says: %s", out.String())
		case <-f.world.ctx.Done():
			t.Errorf("the old version goes on with a state of level 2: %s", out.String())
		}
		proc.Kill()
		f.Bin = bin
		if err := f.RestartMember(f.world.ctx, c); err != nil {
			t.Fatal(err)
		}
		f.works(t, other)
	})
	t.Run("an old member joins while one is old", func(t *testing.T) {
		w := newWorldOf(t, old, 1, "")
		t.Cleanup(func() { soundLogs(t, w.Dir) })
		w.Bin = bin
		if _, err := w.StartMember(w.ctx); err != nil {
			t.Fatal(err)
		}
		untilVoter(t, w, "ca-2")
		w.Bin = old
		if _, err := w.StartMember(w.ctx); err != nil {
			t.Fatal(err)
		}
		untilVoter(t, w, "ca-3")
		c := &care{w}
		c.status(w.Members[1], "two versions are well together", func(s *clusterStatus) bool {
			return s.Healthy && s.Level == 1 && len(s.Members) == 3 && s.Members[0].Level == 1 && s.Members[1].Level == 2 && s.Members[0].Version == ""
		})
		c.run(w.Members[1], 0, "cluster status", "level", "ca-1")
	})
	t.Run("snapshots between the two", func(t *testing.T) {
		snapshots(t, old)
	})
	t.Run("to a release to come", func(t *testing.T) {
		future := buildFuture(t)
		f, other := skewed(t, bin, future)
		for i, m := range f.Members {
			f.levelIs(m, bin, 2)
			f.swap(t, m, future)
			if i == 0 {
				f.swap(t, m, bin)
				f.works(t, other)
				f.swap(t, m, future)
			}
			f.works(t, other)
		}
		f.levelIs(f.Members[0], bin, 3)
		f.load.stop()
		f.load.wg.Wait()
		f.works(t, other)
		f.tooOld(t, bin, "level 3", "knows level 2")
	})
}

// snapshots brings new members up from snapshots of the other version, in both directions: what they need is in the log no
// more.
func snapshots(t *testing.T, old string) {
	w := newWorldOf(t, old, 1, "")
	t.Cleanup(func() { soundLogs(t, w.Dir) })
	c := &care{w}
	join := func(bin string) *cluster.Member {
		w.Bin = bin
		m, err := w.StartMember(w.ctx)
		if err != nil {
			t.Fatal(err)
		}
		untilVoter(t, w, m.Name)
		return m
	}
	a, b := w.Members[0], join(bin)
	var wg sync.WaitGroup
	for i := range 64 {
		api, done, err := w.Members[i%2].AdminConn()
		if err != nil {
			t.Fatal(err)
		}
		defer done()
		wg.Go(func() {
			for n := range 360 {
				e := &adminv1.Entry{SpiffeId: fmt.Sprintf("spiffe://%s/%d/%d", trustDomain, i, n), Selectors: []string{fmt.Sprint("unix:uid:", 1e6+i*1000+n), "agent:kind:join_token"}}
				if _, err := api.CreateEntry(w.ctx, e); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	for _, m := range w.Members {
		for deadline := time.Now().Add(2 * time.Minute); ; {
			if found, _ := filepath.Glob(filepath.Join(m.Dir, "data", "raft", "snapshots", "*", "meta.json")); len(found) > 0 {
				break
			}
			if time.Now().After(deadline) || !pause(w.ctx, 100*time.Millisecond) {
				t.Fatalf("%s made no snapshot", m.Name)
			}
		}
	}
	leads := func(m *cluster.Member) {
		w.eventually(m.Name+" leads", func() error {
			switch l := w.Leader(w.ctx); {
			case l == m:
				return nil
			case l == a: // which cannot be asked to, but does when it stops
				a.Stop()
				w.Bin = old
				return errors.Join(errors.New("restarted the old one"), w.RestartMember(w.ctx, a))
			case l == nil:
				return errors.New("nobody does")
			}
			_, err := b.Admin(w.ctx, bin, "cluster", "transfer-leader", m.Name)
			return errors.Join(errors.New("asked"), err)
		})
	}
	same := func(m *cluster.Member) {
		l := &load{w: w}
		want, err := l.list(1)
		if err != nil || len(want) < 64*360 {
			t.Fatalf("%d entries, %v", len(want), err)
		}
		w.eventually(m.Name+" has all", func() error {
			got, err := l.list(slices.Index(w.Members, m))
			if err == nil && len(got) != len(want) {
				err = fmt.Errorf("%d of %d", len(got), len(want))
			}
			return err
		})
		if found, _ := filepath.Glob(filepath.Join(m.Dir, "data", "raft", "snapshots", "*", "meta.json")); len(found) == 0 {
			t.Errorf("%s got no snapshot", m.Name)
		}
	}
	leads(b)
	same(join(old))
	leads(a)
	same(join(bin))
	s := c.status(b, "all are well", func(s *clusterStatus) bool { return s.Healthy && len(s.Members) == 4 })
	if s.Level != 1 {
		t.Errorf("level %d", s.Level)
	}
}

// tooOld tries to join with binaries that know too little.
func (f *faults) tooOld(t *testing.T, old string, words ...string) {
	t.Helper()
	p := newPlace(t, "ca-9", "")
	p.Cluster.Bin = old
	token := f.admin("token", "create", "--server")
	said := p.notStarted(t, p.joinFile(t, token), exitFailure, append([]string{`member "ca-9"`, "install the version that the members run"}, words...)...)
	t.Logf("it is told: %s", said)
	if s, err := clusterStatusOf(f.world.ctx, f.Bin, f.Members[0]); err != nil || len(s.Members) != 3 {
		t.Errorf("afterwards: %+v, %v", s, err)
	}
}
