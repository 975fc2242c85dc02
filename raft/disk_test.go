package raft

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	hraft "github.com/hashicorp/raft"
	bolt "go.etcd.io/bbolt"

	"countersign.io/countersign/internal/durable"
)

func contains(err error, s string) bool { return err != nil && strings.Contains(err.Error(), s) }

// TestRestart: each kind of stop, of each kind of member, with and without a snapshot.
func TestRestart(t *testing.T) {
	t.Parallel()
	for _, crash := range []bool{false, true} {
		for _, snap := range []bool{false, true} {
			t.Run(fmt.Sprintf("crash=%v/snapshot=%v", crash, snap), func(t *testing.T) {
				t.Parallel()
				c := newCluster(t, 3, func(c *Config) { c.TrailingLogs = 4 })
				var want []string
				write := func(n int) {
					for range n {
						cmd := fmt.Sprint("w", len(want))
						c.propose(c.members[len(want)%3], cmd)
						want = append(want, cmd)
					}
				}
				write(20)
				for _, leads := range []bool{true, false} {
					m := c.leader()
					if !leads {
						m = c.follower()
					}
					if snap {
						if err := m.raft.Snapshot().Error(); err != nil && !errors.Is(err, hraft.ErrNothingNewToSnapshot) {
							t.Fatal(err)
						}
					}
					write(3)
					eventually(t, "it has all", func() bool { return len(m.machine.all()) == len(want) })
					if crash {
						m.crash()
						m.machine = &machine{} // the state is discarded
					} else {
						m.Close()
						m.machine.entries = nil
					}
					if others := c.others(m); true {
						c.propose(others[0], fmt.Sprint("w", len(want)))
						want = append(want, fmt.Sprint("w", len(want)))
					}
					c.start(m, m.name == "m1")
					eventually(t, "it has all again", func() bool { return len(m.machine.all()) == len(want) })
					if restored := m.machine.restores > 0; restored != (crash && snap) {
						t.Errorf("restored from a snapshot: %v", restored)
					}
					if !crash && len(m.machine.entries) > 3 {
						t.Errorf("a machine that kept its state got %d entries again", len(m.machine.entries))
					}
					c.voting(3)
					write(3)
				}
				c.same(want...)
			})
		}
	}
}

// TestWholeClusterRestarts: all at once, states discarded.
func TestWholeClusterRestarts(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3, nil)
	for i := range 10 {
		c.propose(c.members[i%3], fmt.Sprint(i))
	}
	for _, m := range c.members {
		m.crash()
		m.machine = &machine{}
	}
	for _, m := range c.members {
		c.start(m, true)
	}
	for _, m := range c.members {
		m.settled(within(t))
	}
	c.propose(c.members[1], "again")
	c.same("0", "9", "again")
}

// TestSnapshotToLaggard: a member whose log the others have forgotten gets a snapshot over the network, and
// what is committed while it is sent comes after it.
func TestSnapshotToLaggard(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3, func(c *Config) { c.TrailingLogs = 1 })
	late := c.follower()
	c.propose(late, "early")
	late.crash()
	var want []string
	for i := range 50 {
		cmd := fmt.Sprint("missed", i)
		c.propose(c.leader(), cmd)
		want = append(want, cmd)
	}
	for _, m := range c.others(late) {
		if err := m.raft.Snapshot().Error(); err != nil {
			t.Fatal(err)
		}
	}
	c.propose(c.leader(), "after the snapshot")
	c.start(late, false)
	eventually(t, "it has all", func() bool { return late.machine.has("after the snapshot") == 1 })
	if late.machine.restores != 1 {
		t.Errorf("restored %d times", late.machine.restores)
	}
	c.same(append(want, "early", "after the snapshot")...)

	// It starts again from the folder that a received snapshot left: the log may have a gap below it.
	late.crash()
	late.machine = &machine{}
	c.start(late, false)
	c.propose(late, "once more")
	c.same(append(want, "early", "once more")...)
}

// TestSnapshotWhileWriting: snapshots are taken by themselves under writes, and a new member starts from one.
func TestSnapshotWhileWriting(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1, func(c *Config) {
		c.SnapshotThreshold, c.SnapshotInterval, c.TrailingLogs = 20, 20*time.Millisecond, 5
	})
	m := c.members[0]
	i := 0
	eventually(t, "the log is compacted", func() bool {
		c.propose(m, fmt.Sprint(i))
		i++
		first, err := m.logs.FirstIndex()
		return err == nil && first > 1
	})
	joined := c.join("m2")
	c.voting(2)
	c.propose(joined, "last")
	if joined.machine.restores == 0 {
		t.Error("the new member did not start from a snapshot")
	}
	c.same("0", "last")
}

// damaged stops a cluster of one with some entries, lets damage change its folder, and returns Open's error.
func damaged(t *testing.T, snapshot bool, damage func(t *testing.T, m *member)) (map[string]uint64, error) {
	t.Helper()
	c := newCluster(t, 1, func(c *Config) { c.TrailingLogs = 2 })
	m := c.members[0]
	for i := range 10 {
		c.propose(m, fmt.Sprint("command-", i))
	}
	if snapshot {
		if err := m.raft.Snapshot().Error(); err != nil {
			t.Fatal(err)
		}
		c.propose(m, "after")
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	indexes := map[string]uint64{"last": m.raft.LastIndex()}
	for _, e := range m.machine.entries {
		indexes[string(e.Data)] = e.Index
	}
	damage(t, m)
	return indexes, c.tryStart(m, true)
}

// edit changes the log file through bbolt, as a bug or a bad disk that bbolt does not notice would.
func edit(t *testing.T, m *member, f func(log *bolt.Bucket, tx *bolt.Tx) error) {
	t.Helper()
	db, err := bolt.Open(filepath.Join(m.dir, "log.db"), 0o600, &bolt.Options{Timeout: patience})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if err := db.Update(func(tx *bolt.Tx) error { return f(tx.Bucket(bucketLog()), tx) }); err != nil {
		t.Fatal(err)
	}
}

// TestDamage: whatever happened to the folder, Open says what and changes nothing; it never drops an entry.
func TestDamage(t *testing.T) {
	t.Parallel()
	last := func(b *bolt.Bucket) (key, val []byte) {
		k, v := b.Cursor().Last()
		return bytes.Clone(k), bytes.Clone(v)
	}
	for _, tc := range []struct {
		name     string
		snapshot bool
		damage   func(t *testing.T, m *member)
		wraps    error
		want     string // {last} is the last index, {x} that of command x
	}{
		{"last record torn", false, func(t *testing.T, m *member) {
			edit(t, m, func(b *bolt.Bucket, _ *bolt.Tx) error { k, v := last(b); return b.Put(k, v[:len(v)-3]) })
		}, ErrCorrupt, "log entry {last}: its checksum"},
		{"last record torn to nothing", false, func(t *testing.T, m *member) {
			edit(t, m, func(b *bolt.Bucket, _ *bolt.Tx) error { k, _ := last(b); return b.Put(k, []byte{}) })
		}, ErrCorrupt, "log entry {last}: 0 bytes"},
		{"a byte flipped in the file", false, func(t *testing.T, m *member) {
			path := filepath.Join(m.dir, "log.db")
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			n := 0
			for at := 0; ; at++ { // in every copy: bbolt keeps old pages
				i := bytes.Index(b[at:], []byte("command-4"))
				if i < 0 {
					break
				}
				at += i
				b[at+3] ^= 0x10
				n++
			}
			if n == 0 {
				t.Fatal("the command is not in the file")
			}
			if err := os.WriteFile(path, b, 0o600); err != nil {
				t.Fatal(err)
			}
		}, ErrCorrupt, "log entry {command-4}: its checksum"},
		{"two records swapped", false, func(t *testing.T, m *member) {
			edit(t, m, func(b *bolt.Bucket, _ *bolt.Tx) error {
				v5, v6 := bytes.Clone(b.Get(indexKey(5))), bytes.Clone(b.Get(indexKey(6)))
				return errors.Join(b.Put(indexKey(5), v6), b.Put(indexKey(6), v5))
			})
		}, ErrCorrupt, "log entry 5: its checksum"},
		{"a record gone from the middle", false, func(t *testing.T, m *member) {
			m.machine = &machine{}
			edit(t, m, func(b *bolt.Bucket, _ *bolt.Tx) error { return b.Delete(indexKey(5)) })
		}, ErrCorrupt, "the log starts at entry 6"},
		{"a strange key", false, func(t *testing.T, m *member) {
			edit(t, m, func(b *bolt.Bucket, _ *bolt.Tx) error { return b.Put([]byte("zz"), []byte("x")) })
		}, ErrCorrupt, "log key 7a7a"},
		{"the vote changed", false, func(t *testing.T, m *member) {
			edit(t, m, func(_ *bolt.Bucket, tx *bolt.Tx) error {
				b := tx.Bucket(bucketStable())
				v := bytes.Clone(b.Get([]byte("LastVoteTerm")))
				v[1] ^= 1
				return b.Put([]byte("LastVoteTerm"), v)
			})
		}, ErrCorrupt, "LastVoteTerm"},
		{"a record of a newer program", false, func(t *testing.T, m *member) {
			edit(t, m, func(b *bolt.Bucket, _ *bolt.Tx) error {
				k, v := last(b)
				v[0] = 2
				return b.Put(k, resum(k, v))
			})
		}, nil, "run the newer program"},
		{"a log of a newer program", false, func(t *testing.T, m *member) {
			edit(t, m, func(_ *bolt.Bucket, tx *bolt.Tx) error {
				return tx.Bucket(bucketMeta()).Put([]byte("format"), []byte("2"))
			})
		}, nil, "run the newer program"},
		{"the file truncated", false, func(t *testing.T, m *member) {
			if err := os.Truncate(filepath.Join(m.dir, "log.db"), 8192); err != nil {
				t.Fatal(err)
			}
		}, nil, "log.db"},
		{"the file is not a database", false, func(t *testing.T, m *member) {
			if err := os.WriteFile(filepath.Join(m.dir, "log.db"), bytes.Repeat([]byte("x"), 1<<16), 0o600); err != nil {
				t.Fatal(err)
			}
		}, nil, "log.db"},
		{"another member's folder", false, func(t *testing.T, m *member) { m.name = "m7" }, ErrForeign, `member "m1", this is member "m7"`},
		{"the log gone, the state there", false, func(t *testing.T, m *member) {
			if err := os.Remove(filepath.Join(m.dir, "log.db")); err != nil {
				t.Fatal(err)
			}
		}, ErrCorrupt, "the state machine has entry"},
		{"the snapshot gone", true, func(t *testing.T, m *member) {
			m.machine = &machine{}
			if err := os.RemoveAll(filepath.Join(m.dir, "snapshots")); err != nil {
				t.Fatal(err)
			}
		}, ErrCorrupt, "entries are missing"},
		{"the snapshot flipped", true, func(t *testing.T, m *member) {
			m.machine = &machine{}
			flipSnapshot(t, m)
		}, ErrCorrupt, "CRC mismatch"},
		{"loose folder", false, func(t *testing.T, m *member) {
			if err := os.Chmod(m.dir, 0o755); err != nil {
				t.Fatal(err)
			}
		}, durable.ErrLoose, "chmod 0700"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			indexes, err := damaged(t, tc.snapshot, tc.damage)
			want := tc.want
			for name, index := range indexes {
				want = strings.ReplaceAll(want, "{"+name+"}", fmt.Sprint(index))
			}
			if err == nil || tc.wraps != nil && !errors.Is(err, tc.wraps) || !contains(err, want) {
				t.Fatalf("open: %v; want %q, wrapping %v", err, want, tc.wraps)
			}
		})
	}
}

// resum gives a changed record a sum that fits.
func resum(key, v []byte) []byte {
	body := v[:len(v)-recordSum]
	s := sum(key, body)
	return append(bytes.Clone(body), byte(s>>24), byte(s>>16), byte(s>>8), byte(s))
}

func flipSnapshot(t *testing.T, m *member) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(m.dir, "snapshots", "*", "state.bin"))
	if err != nil || len(files) == 0 {
		t.Fatalf("snapshots: %v, %v", files, err)
	}
	b, err := os.ReadFile(files[len(files)-1])
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)/2] ^= 1
	if err := os.WriteFile(files[len(files)-1], b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestDamagedSnapshotFallsBack: with the older snapshot and a log that reaches back to it nothing is lost.
func TestDamagedSnapshotFallsBack(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1, nil) // keeps the log
	m := c.members[0]
	for i := range 2 {
		c.propose(m, fmt.Sprint(i))
		if err := m.raft.Snapshot().Error(); err != nil {
			t.Fatal(err)
		}
	}
	c.propose(m, "2")
	m.crash()
	m.machine = &machine{}
	flipSnapshot(t, m)
	c.start(m, false)
	c.propose(m, "3")
	c.same("0", "1", "2", "3")
}

// TestUnfinishedSnapshot: what a crash left half written is removed.
func TestUnfinishedSnapshot(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1, nil)
	m := c.members[0]
	m.crash()
	left := filepath.Join(m.dir, "snapshots", "2-7-99.tmp")
	if err := os.MkdirAll(left, 0o700); err != nil {
		t.Fatal(err)
	}
	c.start(m, false)
	if _, err := os.Stat(left); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("it is still there: %v", err)
	}
}

func TestFolderInUse(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1, nil)
	m := c.members[0]
	twin := &member{name: m.name, dir: m.dir, machine: &machine{}}
	if err := c.tryStart(twin, true); !errors.Is(err, durable.ErrLocked) {
		t.Fatalf("opened twice: %v", err)
	}
	c.propose(m, "unharmed")
	m.Close()
	twin.machine = m.machine
	c.start(twin, true)
}

// TestBareTerm: a crash between the two writes of a bootstrap is healed by the next.
func TestBareTerm(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "m1")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	s, err := openLogStore(filepath.Join(dir, "log.db"), "m1")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.SetUint64([]byte("CurrentTerm"), 1); err != nil {
		t.Fatal(err)
	}
	s.Close()
	c := &cluster{t: t, net: newNetwork()}
	m := &member{name: "m1", dir: dir, machine: &machine{}}
	c.members = append(c.members, m)
	c.start(m, true)
	c.propose(m, "alive")
}

func TestPermissions(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1, nil)
	m := c.members[0]
	c.propose(m, "x")
	if err := m.raft.Snapshot().Error(); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{".", "log.db", "lock", "snapshots"} {
		info, err := os.Stat(filepath.Join(m.dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s: mode %v", name, info.Mode())
		}
	}
}
