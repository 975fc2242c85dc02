package raft

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	hraft "github.com/hashicorp/raft"
)

// contents is all that a log says.
type contents struct {
	First, Last, LastTerm, Command uint64
	Entries                        []hraft.Log
	Term, VoteTerm                 uint64
	Candidate                      string
}

// readLog opens a log as Open does and reads it to the end.
func readLog(path string) (c contents, err error) {
	s, err := openLogStore(path, "m1")
	if err != nil {
		return c, err
	}
	defer s.Close()
	c = contents{First: s.first, Last: s.last, LastTerm: s.term, Command: s.command}
	for i := c.First; i > 0 && i <= c.Last; i++ {
		var l hraft.Log
		if err := s.GetLog(i, &l); err != nil {
			return c, err
		}
		c.Entries = append(c.Entries, l)
	}
	term, err1 := s.GetUint64([]byte("CurrentTerm"))
	vote, err2 := s.GetUint64([]byte("LastVoteTerm"))
	candidate, err3 := s.Get([]byte("LastVoteCand"))
	c.Term, c.VoteTerm, c.Candidate = term, vote, string(candidate)
	return c, errors.Join(err1, err2, err3)
}

// someLog writes a log as raft does: appended to one by one and many at once, compacted, an end replaced.
func someLog(t *testing.T, dir string, entries int) string {
	t.Helper()
	path := filepath.Join(dir, "log.db")
	s, err := openLogStore(path, "m1")
	if err != nil {
		t.Fatal(err)
	}
	next := uint64(1)
	add := func(n int, size int) {
		var logs []*hraft.Log
		for range n {
			logs = append(logs, &hraft.Log{Index: next, Term: 3, Data: bytes.Repeat([]byte{byte(next)}, size)})
			next++
		}
		if err := s.StoreLogs(logs); err != nil {
			t.Fatal(err)
		}
	}
	must := func(err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	must(s.SetUint64([]byte("CurrentTerm"), 3))
	must(s.SetUint64([]byte("LastVoteTerm"), 3))
	must(s.Set([]byte("LastVoteCand"), []byte("m1")))
	add(entries/2, 100)
	add(1, 10000) // goes over more than one page
	for range 10 {
		add(1, 50)
	}
	must(s.DeleteRange(1, uint64(entries/5)))
	must(s.DeleteRange(next-5, next-1))
	next -= 5
	add(entries/2, 70)
	must(s.Close())
	return path
}

// TestEveryPage: a byte flipped anywhere in a log, in every page at several places, and in every byte of what
// leads to the records, is noticed with the page or entry, or makes no difference. Nothing panics.
func TestEveryPage(t *testing.T) {
	t.Parallel()
	path := someLog(t, t.TempDir(), 300)
	want, err := readLog(path)
	if err != nil {
		t.Fatal(err)
	}
	if len(want.Entries) < 200 || want.First < 10 || want.Candidate != "m1" {
		t.Fatalf("entries %d to %d", want.First, want.Last)
	}
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	const pageSize = 4096
	if len(good)%pageSize != 0 || len(good) < 16*pageSize {
		t.Fatalf("a file of %d bytes", len(good))
	}
	var offsets []int
	for page := 0; page < len(good); page += pageSize {
		for at := range 48 { // the header, the first entries of the page
			offsets = append(offsets, page+at)
		}
		for range 20 {
			offsets = append(offsets, page+rand.IntN(pageSize))
		}
	}
	work := filepath.Join(t.TempDir(), "log.db")
	noticed, harmless := 0, 0
	for _, at := range offsets {
		b := bytes.Clone(good)
		b[at] ^= 1 << rand.IntN(8)
		if err := os.WriteFile(work, b, 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := readLog(work)
		switch {
		case err != nil && named(err):
			noticed++
		case err != nil:
			t.Errorf("byte %d of page %d: %v", at%pageSize, at/pageSize, err)
		case reflect.DeepEqual(got, want):
			harmless++
		default:
			t.Errorf("byte %d of page %d: unseen, entries %d to %d instead of %d to %d", at%pageSize, at/pageSize, got.First, got.Last, want.First, want.Last)
		}
	}
	t.Logf("%d flips in %d pages: %d noticed, %d in bytes that are not used", len(offsets), len(good)/pageSize, noticed, harmless)
	if noticed < len(offsets)/4 {
		t.Errorf("only %d were noticed: the log is not in the file that was damaged", noticed)
	}
}

// named tells whether an error names the file, and says what in it is damaged.
func named(err error) bool {
	if !strings.Contains(err.Error(), "log.db") {
		return false
	}
	if errors.Is(err, ErrForeign) { // the name of the member is what was hit
		return true
	}
	for _, what := range []string{"page ", "log entry ", "raft's \"", "log key ", "meta key ", "format", "bucket", "cut off"} {
		if strings.Contains(err.Error(), what) {
			return errors.Is(err, ErrCorrupt) || strings.Contains(err.Error(), "run the newer program")
		}
	}
	return false
}

// TestTornLog: a log that ends early, wherever, is not taken for a shorter one.
func TestTornLog(t *testing.T) {
	t.Parallel()
	path := someLog(t, t.TempDir(), 100)
	want, err := readLog(path)
	if err != nil {
		t.Fatal(err)
	}
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	work := filepath.Join(t.TempDir(), "log.db")
	for i := range 200 {
		cut := 1 + rand.IntN(len(good)-1)
		if i < 40 {
			cut = len(good) - 1 - i*512
		}
		b := bytes.Clone(good[:max(cut, 1)])
		if i%2 == 1 { // torn, with the length already there
			b = append(b, make([]byte, len(good)-len(b))...)
		}
		if err := os.WriteFile(work, b, 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := readLog(work)
		if err == nil && !reflect.DeepEqual(got, want) {
			t.Errorf("cut at %d (filled up: %v): unseen, last entry %d instead of %d", cut, i%2 == 1, got.Last, want.Last)
		}
		if err != nil && (!errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), "log.db")) {
			t.Errorf("cut at %d: %v", cut, err)
		}
	}
}

// TestPagesOfAnyLog: no log that was written is taken for a damaged one, however it came about.
func TestPagesOfAnyLog(t *testing.T) {
	t.Parallel()
	for i, n := range []int{0, 2, 7, 40, 150, 1000, 3000} {
		dir := t.TempDir()
		path := someLog(t, dir, n)
		if _, err := readLog(path); err != nil {
			t.Errorf("log %d: %v", i, err)
		}
		s, err := openLogStore(path, "m1")
		if err != nil {
			t.Fatal(err)
		}
		if err := s.DeleteRange(s.first, s.last); err != nil {
			t.Fatal(err)
		}
		s.Close()
		if c, err := readLog(path); err != nil || c.Last != 0 || c.Term != 3 {
			t.Errorf("log %d, emptied: %+v, %v", i, c, err)
		}
	}
}

// TestFlippedFolder: a byte flipped anywhere in a member's folder. It opens with all that was acknowledged, or says
// which file is damaged.
func TestFlippedFolder(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1, func(c *Config) { c.TrailingLogs, c.HeartbeatTimeout = 4, 50*time.Millisecond })
	m := c.members[0]
	var want []string
	write := func(n int) {
		for range n {
			want = append(want, fmt.Sprint("command-", len(want)))
			c.propose(m, want[len(want)-1])
		}
	}
	for range 2 {
		write(10)
		if err := m.raft.Snapshot().Error(); err != nil {
			t.Fatal(err)
		}
	}
	write(5)
	m.Close()
	var files []string
	err := filepath.WalkDir(m.dir, func(path string, d os.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() && d.Name() != "lock" {
			files = append(files, path)
		}
		return err
	})
	if err != nil || len(files) < 5 {
		t.Fatalf("%v, %v", files, err)
	}
	opened, refused := 0, 0
	work := t.TempDir()
	for _, path := range files {
		for try := range 6 {
			dir := filepath.Join(work, fmt.Sprint(opened+refused))
			if err := os.CopyFS(dir, os.DirFS(m.dir)); err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(os.Chmod(dir, 0o700), os.Chmod(filepath.Join(dir, "snapshots"), 0o700), os.Chmod(filepath.Join(dir, "peers.json"), 0o600)); err != nil && !errors.Is(err, os.ErrNotExist) {
				t.Fatal(err)
			}
			relative, err := filepath.Rel(m.dir, path)
			if err != nil {
				t.Fatal(err)
			}
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			at := rand.IntN(len(b))
			b[at] ^= 1 << rand.IntN(8)
			if err := os.WriteFile(filepath.Join(dir, relative), b, 0o600); err != nil {
				t.Fatal(err)
			}
			twin := &member{name: m.name, dir: dir, machine: &machine{}}
			if try%2 == 1 { // its state is whole: less has to be read
				twin.machine.State, twin.machine.Applied = m.machine.State, m.machine.Applied
			}
			if err := c.tryStart(twin, false); err != nil {
				refused++
				if !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrForeign) && !strings.Contains(err.Error(), "newer program") || !namesFile(err, relative) {
					t.Errorf("%s, byte %d: %v", relative, at, err)
				}
				continue
			}
			opened++
			twin.settled(within(t))
			if got := twin.machine.all(); !reflect.DeepEqual(got, want) {
				t.Errorf("%s, byte %d: state %q", relative, at, got)
			}
			if got := twin.Members(); len(got) != 1 || got[0].ID != "m1" || got[0].Address != m.address && got[0].Address != twin.address {
				t.Errorf("%s, byte %d: members %v", relative, at, got)
			}
			twin.Close()
		}
	}
	t.Logf("%d opened with everything, %d refused", opened, refused)
}

// namesFile tells whether an error says which file, or which snapshot, is damaged.
func namesFile(err error, relative string) bool {
	name := filepath.Base(relative)
	if strings.HasPrefix(relative, "snapshots") {
		name = filepath.Base(filepath.Dir(relative))
	}
	return strings.Contains(err.Error(), name)
}
