package store

import (
	"bytes"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// A byte that flips anywhere in state.db or in its marker while the member is down is named in the log, and the state is
// rebuilt: it is then what a member has that replayed the log.
func TestFlippedByteIsFound(t *testing.T) {
	log := randomCommands(rand.New(rand.NewPCG(21, 1)), 300)
	ref := openAt(t, stateDir(t))
	ref.ApplyBatch(log)
	want := snapshotOf(t, ref)

	dir := stateDir(t)
	s := openAt(t, dir)
	s.ApplyBatch(log)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	files := map[string][]byte{dbFile: nil, markerFile: nil, headerFile: nil}
	for name := range files {
		raw, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		files[name] = raw
	}
	size, page := len(files[dbFile]), os.Getpagesize()
	if size < 8*page {
		t.Fatalf("state.db has %d bytes", size)
	}
	rnd := rand.New(rand.NewPCG(22, 1))
	flip := func(name string, at int) {
		t.Helper()
		for n, raw := range files {
			bad := bytes.Clone(raw)
			if n == name {
				bad[at] ^= 1 << rnd.IntN(8)
			}
			write(t, filepath.Join(dir, n), bad)
		}
		var told bytes.Buffer
		s, err := Open(Config{Dir: dir, TrustDomain: td, Log: slog.New(slog.NewTextHandler(&told, nil))})
		if err != nil {
			t.Fatalf("byte %d of %s: %v", at, name, err)
		}
		defer s.Close()
		if index, err := s.AppliedIndex(); err != nil || index != 0 {
			t.Fatalf("byte %d of %s: opened at %d, %v", at, name, index, err)
		}
		if !strings.Contains(told.String(), filepath.Join(dir, dbFile)) || !strings.Contains(told.String(), "rebuilt") || !strings.Contains(told.String(), "damaged") {
			t.Fatalf("byte %d of %s: the log says %q", at, name, &told)
		}
		if name == markerFile && at%8 != 0 {
			return // empty is empty
		}
		s.ApplyBatch(log)
		if !bytes.Equal(snapshotOf(t, s), want) {
			t.Fatalf("byte %d of %s: rebuilt to another state", at, name)
		}
	}
	for p := 0; p < size; p += page { // each page, at its head and somewhere
		flip(dbFile, p)
		flip(dbFile, p+rnd.IntN(page))
	}
	for at := range files[markerFile] {
		flip(markerFile, at)
	}

	// The header is of the folder, and what it says cannot be had from the log: an operator is told.
	for n, raw := range files {
		write(t, filepath.Join(dir, n), raw)
	}
	for at := range files[headerFile] {
		bad := bytes.Clone(files[headerFile])
		bad[at] ^= 1 << rnd.IntN(8)
		write(t, filepath.Join(dir, headerFile), bad)
		if s, err := Open(Config{Dir: dir, TrustDomain: td}); err == nil {
			s.Close()
			t.Fatalf("byte %d of %s was not found", at, headerFile)
		} else if !strings.Contains(err.Error(), dir) {
			t.Fatalf("byte %d of %s: %v", at, headerFile, err)
		}
	}
	write(t, filepath.Join(dir, headerFile), files[headerFile])
	if again := openAt(t, dir); !bytes.Equal(snapshotOf(t, again), want) {
		t.Error("the undamaged folder does not open to the state it had")
	}
}

// What level 2 brought must not be opened by the version before, which would go on without it.
func TestMarkerSaysTheLevel(t *testing.T) {
	for level, raise := range map[string]bool{`{"format":1,`: false, `{"format":2,`: true} {
		dir := stateDir(t)
		s := openAt(t, dir)
		if raise {
			if err := s.Writer(&directLog{s: s}).SetLevel(t.Context(), 2); err != nil {
				t.Fatal(err)
			}
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		raw, err := os.ReadFile(filepath.Join(dir, markerFile))
		if err != nil || !strings.HasPrefix(string(raw), level) {
			t.Errorf("the marker is %s, %v; want %s", raw, err, level)
		}
		if raise {
			write(t, filepath.Join(dir, markerFile), bytes.Replace(raw, []byte("2"), []byte("1"), 1))
			if index, _ := openAt(t, dir).AppliedIndex(); index != 0 {
				t.Error("a state of level 2 was taken for one of level 1")
			}
		}
	}
}
