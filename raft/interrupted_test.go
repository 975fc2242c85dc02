package raft

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// TestSnapshotInterrupted: a crash at any step of taking a snapshot leaves a folder that opens, has everything, and
// serves; what is half done is gone.
func TestSnapshotInterrupted(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1, func(c *Config) { c.TrailingLogs = 1 })
	m := c.members[0]
	c.propose(m, "a")
	if err := m.raft.Snapshot().Error(); err != nil {
		t.Fatal(err)
	}
	c.propose(m, "b")
	m.Close()
	before := filepath.Join(t.TempDir(), "before") // as it was when the second was begun
	if err := os.CopyFS(before, os.DirFS(m.dir)); err != nil {
		t.Fatal(err)
	}
	c.start(m, false)
	m.settled(within(t))
	if err := m.raft.Snapshot().Error(); err != nil {
		t.Fatal(err)
	}
	m.Close()
	list, err := filepath.Glob(filepath.Join(m.dir, "snapshots", "*"))
	if err != nil || len(list) != 2 {
		t.Fatalf("%v, %v", list, err)
	}
	newest := list[1]
	if a, b := snapshotIndex(t, list[0]), snapshotIndex(t, list[1]); a > b {
		newest = list[0]
	}
	part := func(t *testing.T, dir, name string, files map[string]float64) {
		t.Helper()
		to := filepath.Join(dir, "snapshots", name)
		if err := os.MkdirAll(to, 0o700); err != nil {
			t.Fatal(err)
		}
		for file, share := range files {
			b, err := os.ReadFile(filepath.Join(newest, strings.TrimPrefix(strings.TrimSuffix(file, ".9.tmp"), ".")))
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(to, file), b[:int(float64(len(b))*share)], 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	name := filepath.Base(newest)
	for what, shape := range map[string]struct {
		name  string
		files map[string]float64
	}{
		"folder made":             {name + ".tmp", nil},
		"meta half written":       {name + ".tmp", map[string]float64{"meta.json": 0.5}},
		"created":                 {name + ".tmp", map[string]float64{"meta.json": 1, "state.bin": 0}},
		"state half written":      {name + ".tmp", map[string]float64{"meta.json": 1, "state.bin": 0.5}},
		"written, not synced":     {name + ".tmp", map[string]float64{"meta.json": 0, "state.bin": 1}},
		"synced, not renamed":     {name + ".tmp", map[string]float64{"meta.json": 1, "state.bin": 1}},
		"renamed":                 {name, map[string]float64{"meta.json": 1, "state.bin": 1}},
		"checksum half written":   {name, map[string]float64{"meta.json": 1, "state.bin": 1, ".meta.sum.9.tmp": 0.5}},
		"checksum in its place":   {name, map[string]float64{"meta.json": 1, "state.bin": 1, "meta.sum": 1}},
		"as if nothing was begun": {"", nil},
	} {
		for _, whole := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/state=%v", what, whole), func(t *testing.T) {
				t.Parallel()
				c := &cluster{t: t, net: newNetwork()}
				twin := &member{name: "m1", dir: filepath.Join(t.TempDir(), "m1"), machine: &machine{}}
				if err := os.CopyFS(twin.dir, os.DirFS(before)); err != nil {
					t.Fatal(err)
				}
				if shape.name != "" {
					part(t, twin.dir, shape.name, shape.files)
				}
				if err := errors.Join(os.Chmod(twin.dir, 0o700), os.Chmod(filepath.Join(twin.dir, "snapshots"), 0o700)); err != nil {
					t.Fatal(err)
				}
				if whole {
					twin.machine.State, twin.machine.Applied = slices.Clone(m.machine.State), m.machine.Applied
				}
				c.alone(twin, "c")
				if all := twin.machine.all(); !slices.Equal(all, []string{"a", "b", "c"}) {
					t.Errorf("state %q", all)
				}
				eventually(t, "the next snapshot", func() bool { // not until what follows a change of address is applied
					if _, err := twin.Propose(within(t), []byte("d")); err != nil {
						t.Fatal(err)
					}
					return twin.raft.Snapshot().Error() == nil
				})
				if left, err := filepath.Glob(filepath.Join(twin.dir, "snapshots", "*.tmp")); err != nil || len(left) > 0 {
					t.Errorf("left behind: %v, %v", left, err)
				}
			})
		}
	}
}

func snapshotIndex(t *testing.T, path string) (index uint64) {
	t.Helper()
	var term, at uint64
	if _, err := fmt.Sscanf(filepath.Base(path), "%d-%d-%d", &term, &index, &at); err != nil {
		t.Fatal(err)
	}
	return index
}

// flaky fails in the middle of writing its snapshots out.
type flaky struct {
	*machine
	after int
}

type torn struct {
	Snapshot
	after int
}

var errTorn = errors.New("no space left on device")

func (s torn) WriteTo(w io.Writer) (int64, error) {
	n, err := w.Write(make([]byte, s.after))
	return int64(n), errors.Join(err, errTorn)
}

func (f *flaky) Snapshot() (Snapshot, error) {
	s, err := f.machine.Snapshot()
	return torn{s, f.after}, err
}

// TestSnapshotFails: a snapshot that cannot be written costs nothing but itself.
func TestSnapshotFails(t *testing.T) {
	t.Parallel()
	for _, after := range []int{0, 1, 100_000} {
		m := &member{name: "m1", dir: filepath.Join(t.TempDir(), "m1"), machine: &machine{}}
		c := &cluster{t: t, net: newNetwork(), members: []*member{m}}
		c.tune = func(cfg *Config) { cfg.Machine = &flaky{m.machine, after} }
		c.start(m, true)
		c.propose(m, "a")
		if err := m.raft.Snapshot().Error(); !contains(err, errTorn.Error()) {
			t.Errorf("after %d: %v", after, err)
		}
		c.propose(m, "b")
		m.crash()
		m.machine = &machine{}
		c.tune = nil
		c.start(m, false)
		c.propose(m, "c")
		c.same("a", "b", "c")
		if err := m.raft.Snapshot().Error(); err != nil {
			t.Error(err)
		}
		m.Close()
	}
}

// TestUnreadSnapshotDamaged: a snapshot that the start does not need is checked all the same.
func TestUnreadSnapshotDamaged(t *testing.T) {
	t.Parallel()
	logged := &syncBuffer{}
	c := newCluster(t, 1, func(c *Config) { c.Log = slog.New(slog.NewTextHandler(logged, nil)) })
	m := c.members[0]
	i := 0
	eventually(t, "a snapshot that ends with an entry of the machine's", func() bool { // and not with the barrier of a new leader
		c.propose(m, fmt.Sprint(i))
		i++
		if err := m.raft.Snapshot().Error(); err != nil {
			t.Fatal(err)
		}
		applied, err := m.machine.AppliedIndex()
		return err == nil && applied == m.raft.LastIndex()
	})
	m.Close() // the state stays
	flipSnapshot(t, m)
	c.start(m, false)
	eventually(t, "the damage is named", func() bool {
		return strings.Contains(logged.String(), "a snapshot is damaged on disk") && strings.Contains(logged.String(), "CRC mismatch")
	})
	c.propose(m, "last")
	c.same("0", "last")
}
