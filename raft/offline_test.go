package raft

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"countersign.io/countersign/internal/durable"
)

// survivor is a cluster of three of which one member is left, stopped.
func survivor(t *testing.T) (*cluster, *member, []*member) {
	t.Helper()
	c := newCluster(t, 3, nil)
	for i := range 5 {
		c.propose(c.members[i%3], fmt.Sprint(i))
	}
	c.same("0", "4")
	m := c.follower()
	rest := c.others(m)
	for _, o := range c.members {
		o.crash()
	}
	return c, m, rest
}

// alone starts the member as the only one, and writes on it.
func (c *cluster) alone(m *member, cmd string) {
	c.t.Helper()
	c.members = []*member{m}
	c.start(m, false)
	c.propose(m, cmd)
	c.voting(1)
}

// TestRecover: one of three goes on alone, keeps what was acknowledged, and the others join it again.
func TestRecover(t *testing.T) {
	t.Parallel()
	c, m, rest := survivor(t)
	var shown Recovery
	cfg := RecoverConfig{Dir: m.dir, ID: m.name, Address: m.address, Confirm: func(r Recovery) error { shown = r; return nil }}
	refused := errors.New("operator says no")
	if err := Recover(RecoverConfig{Dir: m.dir, ID: m.name, Address: m.address, Confirm: func(Recovery) error { return refused }}); !errors.Is(err, refused) {
		t.Errorf("not confirmed: %v", err)
	}
	if err := Recover(cfg); err != nil {
		t.Fatal(err)
	}
	if len(shown.Members) != 3 || shown.Last == 0 || shown.Term == 0 {
		t.Errorf("shown %+v", shown)
	}
	shown = Recovery{}
	if err := Recover(cfg); err != nil || shown.Last != 0 {
		t.Errorf("again: %v, asked with %+v", err, shown)
	}
	c.alone(m, "alone")
	c.same("0", "1", "2", "3", "4", "alone")

	// The others, started with what they had, are the old cluster: it does not touch this one.
	old := &cluster{t: t, net: c.net, members: rest}
	for _, o := range rest {
		old.start(o, false)
	}
	eventually(t, "the old cluster goes on, or its members learn that they are no longer any", func() bool {
		ctx, cancel := context.WithTimeout(within(t), time.Second)
		defer cancel()
		_, err := rest[0].Propose(ctx, []byte("of the old cluster"))
		return err == nil || gone(rest[0]) && gone(rest[1])
	})
	c.propose(m, "still alone")
	if m.machine.has("of the old cluster") != 0 {
		t.Error("the old cluster wrote here")
	}
	// With empty folders they join again.
	for _, o := range rest {
		o.crash()
	}
	for _, o := range rest {
		if err := os.RemoveAll(o.dir); err != nil {
			t.Fatal(err)
		}
		o.machine = &machine{}
		c.members = append(c.members, o)
		c.start(o, false)
		c.add(m, o.name, o.address)
	}
	c.voting(3)
	c.propose(rest[1], "three again")
	c.same("0", "alone", "still alone", "three again")
}

// TestRecoverFromSnapshot: also when the log holds nothing but what came after a snapshot, or nothing at all.
func TestRecoverFromSnapshot(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3, func(c *Config) { c.TrailingLogs = 1 })
	c.propose(c.members[0], "a")
	m := c.follower()
	eventually(t, "it has it", func() bool { return m.machine.has("a") == 1 })
	if err := m.raft.Snapshot().Error(); err != nil {
		t.Fatal(err)
	}
	for _, o := range c.members {
		o.crash()
	}
	m.machine = &machine{}
	var shown Recovery
	if err := Recover(RecoverConfig{Dir: m.dir, ID: m.name, Address: m.address, Confirm: func(r Recovery) error { shown = r; return nil }}); err != nil {
		t.Fatal(err)
	}
	if shown.Snapshot == 0 || len(shown.Members) != 3 {
		t.Errorf("shown %+v", shown)
	}
	c.alone(m, "b")
	c.same("a", "b")
}

// TestRecoverCrash: wherever it is interrupted, the folder is the old one or the new one, and trying again works.
func TestRecoverCrash(t *testing.T) {
	t.Parallel()
	c, m, _ := survivor(t)
	crash := errors.New("crash")
	cfg := RecoverConfig{Dir: m.dir, ID: m.name, Address: m.address}
	var steps []string
	for _, at := range []string{"surveyed", "written"} {
		err := recoverFolder(cfg, func(s string) error {
			steps = append(steps, s)
			if s == at {
				return crash
			}
			return nil
		})
		if !errors.Is(err, crash) {
			t.Fatalf("%s: %v", at, err)
		}
		asked := false
		cfg.Confirm = func(Recovery) error { asked = true; return errors.New("just looking") }
		if err := Recover(cfg); asked != (at == "surveyed") || (err == nil) == asked {
			t.Errorf("after a crash at %s: %v", at, err)
		}
		cfg.Confirm = nil
	}
	if !slices.Equal(steps, []string{"surveyed", "surveyed", "written"}) {
		t.Errorf("steps %v", steps)
	}
	c.alone(m, "x")
	c.same("0", "4", "x")
}

func TestRecoverRefuses(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1, nil)
	m := c.members[0]
	c.propose(m, "x")
	cfg := RecoverConfig{Dir: m.dir, ID: m.name, Address: "127.0.0.1:1"}
	if err := Recover(cfg); !errors.Is(err, durable.ErrLocked) {
		t.Errorf("running: %v", err)
	}
	m.Close()
	other := cfg
	other.ID = "m2"
	if err := Recover(other); !errors.Is(err, ErrForeign) {
		t.Errorf("another's folder: %v", err)
	}
	empty := cfg
	empty.Dir = t.TempDir()
	if err := Recover(empty); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no raft folder: %v", err)
	}
	if names, _ := os.ReadDir(empty.Dir); len(names) > 0 {
		t.Errorf("it left %v in a wrong folder", names)
	}
	for _, bad := range []RecoverConfig{{Dir: m.dir}, {Dir: m.dir, ID: "m1"}, {Dir: m.dir, ID: "m\x001", Address: "x"}} {
		if err := Recover(bad); err == nil {
			t.Errorf("%+v: no error", bad)
		}
	}
	// A member that never joined has nothing to recover.
	never := &member{name: "never", dir: filepath.Join(t.TempDir(), "never"), machine: &machine{}}
	c.start(never, false)
	never.Close()
	if err := Recover(RecoverConfig{Dir: never.dir, ID: "never", Address: "127.0.0.1:1"}); !contains(err, "never joined") {
		t.Errorf("never joined: %v", err)
	}
	// A new address is taken, and the member comes up with it.
	if err := Recover(cfg); err != nil {
		t.Fatal(err)
	}
	c.start(m, false)
	c.propose(m, "y")
	c.same("x", "y")
}

// saved is a snapshot of the test's state machine, as a backup would hold it.
func saved(index uint64, state ...string) func(io.Writer) error {
	return func(w io.Writer) error {
		return json.NewEncoder(w).Encode(&machine{State: state, Applied: index})
	}
}

func TestRestoreSnapshot(t *testing.T) {
	t.Parallel()
	c := &cluster{t: t, net: newNetwork()}
	m := &member{name: "m1", dir: filepath.Join(t.TempDir(), "m1"), address: "", machine: &machine{}}
	if err := RestoreSnapshot(m.dir, "m1", "127.0.0.1:1", 1000, time.Unix(7, 0), saved(1000, "a", "b")); err != nil {
		t.Fatal(err)
	}
	c.alone(m, "c")
	if all := m.machine.all(); !slices.Equal(all, []string{"a", "b", "c"}) {
		t.Errorf("state %q", all)
	}
	if m.AppliedIndex() <= 1000 || m.raft.CurrentTerm() <= 7<<eraBits {
		t.Errorf("entry %d in term %d", m.AppliedIndex(), m.raft.CurrentTerm())
	}
	if err := RestoreSnapshot(m.dir, "m1", m.address, 1, time.Now(), saved(1)); !errors.Is(err, durable.ErrLocked) {
		t.Errorf("running: %v", err)
	}
	joined := c.join("m2")
	c.voting(2)
	c.propose(joined, "d")
	c.same("a", "b", "c", "d")
	m.Close()
	if err := RestoreSnapshot(m.dir, "m1", m.address, 1, time.Now(), saved(1)); !errors.Is(err, fs.ErrExist) {
		t.Errorf("not empty: %v", err)
	}
	for _, bad := range []func() error{
		func() error { return RestoreSnapshot(t.TempDir()+"/x", "", "a:1", 1, time.Now(), saved(1)) },
		func() error { return RestoreSnapshot(t.TempDir()+"/x", "m1", "", 1, time.Now(), saved(1)) },
		func() error { return RestoreSnapshot(t.TempDir()+"/x", "m1", "a:1", 0, time.Now(), saved(1)) },
		func() error { return RestoreSnapshot(t.TempDir()+"/x/y", "m1", "a:1", 1, time.Now(), saved(1)) },
	} {
		if bad() == nil {
			t.Error("no error")
		}
	}
}

// TestRestoreSnapshotCrash: interrupted anywhere, or with a writer that fails after any byte, the folder is absent
// or whole, and trying again works.
func TestRestoreSnapshotCrash(t *testing.T) {
	t.Parallel()
	crash := errors.New("crash")
	var steps []string
	if err := restoreFolder(filepath.Join(t.TempDir(), "m"), "m1", "a:1", 5, 2, saved(5, "a"), func(s string) error { steps = append(steps, s); return nil }); err != nil {
		t.Fatal(err)
	}
	if len(steps) != 6 {
		t.Fatalf("steps %v", steps)
	}
	check := func(t *testing.T, dir string, whole bool) {
		t.Helper()
		_, err := os.Stat(dir)
		if whole != (err == nil) {
			t.Fatalf("folder: %v", err)
		}
		if !whole {
			if err := RestoreSnapshot(dir, "m1", "127.0.0.1:1", 5, time.Now(), saved(5, "a")); err != nil {
				t.Fatalf("again: %v", err)
			}
		}
		if _, err := os.Stat(dir + ".restoring"); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("left behind: %v", err)
		}
		c := &cluster{t: t, net: newNetwork()}
		m := &member{name: "m1", dir: dir, machine: &machine{}}
		c.alone(m, "b")
		c.same("a", "b")
		m.Close()
	}
	for _, at := range steps {
		t.Run(at, func(t *testing.T) {
			t.Parallel()
			dir := filepath.Join(t.TempDir(), "m")
			err := restoreFolder(dir, "m1", "127.0.0.1:1", 5, 2, saved(5, "a"), func(s string) error {
				if s == at {
					return crash
				}
				return nil
			})
			if !errors.Is(err, crash) {
				t.Fatal(err)
			}
			check(t, dir, at == "renamed")
		})
	}
	for _, after := range []int{0, 1, 10} {
		t.Run(fmt.Sprint("write fails after ", after), func(t *testing.T) {
			t.Parallel()
			dir := filepath.Join(t.TempDir(), "m")
			err := RestoreSnapshot(dir, "m1", "127.0.0.1:1", 5, time.Now(), func(w io.Writer) error {
				if _, err := w.Write(make([]byte, after)); err != nil {
					return err
				}
				return crash
			})
			if !errors.Is(err, crash) {
				t.Fatal(err)
			}
			if names, _ := os.ReadDir(filepath.Dir(dir)); len(names) > 0 {
				t.Errorf("left behind: %v", names)
			}
			check(t, dir, false)
		})
	}
}
