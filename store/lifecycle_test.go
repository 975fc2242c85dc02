package store

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"countersign.io/countersign/identity"
	"countersign.io/countersign/internal/durable"
	"countersign.io/countersign/raft"
)

// closed leaves a cleanly closed state with one entry.
func closed(t *testing.T) (dir string, db []byte) {
	t.Helper()
	dir = stateDir(t)
	s := openAt(t, dir)
	must[identity.Entry](t)(s.Writer(&directLog{s: s}).CreateEntry(t.Context(), now, entryFor("a", "/a", "k8s:ns:x")))
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	db, err := os.ReadFile(filepath.Join(dir, dbFile))
	if err != nil {
		t.Fatal(err)
	}
	return dir, db
}

func write(t *testing.T, path string, data []byte) {
	t.Helper()
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// Whatever happened to the file, the store is either whole or empty, and says which.
func TestOpenAfterFault(t *testing.T) {
	for _, c := range []struct {
		name  string
		fault func(t *testing.T, dir string, db []byte)
		why   string // empty: the state is kept
	}{
		{"none", func(*testing.T, string, []byte) {}, ""},
		{"no marker", func(t *testing.T, dir string, _ []byte) {
			if err := os.Remove(filepath.Join(dir, markerFile)); err != nil {
				t.Fatal(err)
			}
		}, "not closed cleanly"},
		{"damaged marker", func(t *testing.T, dir string, _ []byte) { write(t, filepath.Join(dir, markerFile), []byte("{")) }, "marker is damaged"},
		{"marker of another format", func(t *testing.T, dir string, db []byte) {
			m, err := measure(filepath.Join(dir, dbFile), 1)
			if err != nil {
				t.Fatal(err)
			}
			m.Format = 0
			raw, _ := json.Marshal(m)
			write(t, filepath.Join(dir, markerFile), raw)
		}, "format 0"},
		{"truncated", func(t *testing.T, dir string, db []byte) { write(t, filepath.Join(dir, dbFile), db[:len(db)/2]) }, "bytes long, not"},
		{"empty", func(t *testing.T, dir string, db []byte) { write(t, filepath.Join(dir, dbFile), nil) }, "0 bytes long"},
		{"corrupt page", func(t *testing.T, dir string, db []byte) {
			db[len(db)/2] ^= 0x40
			write(t, filepath.Join(dir, dbFile), db)
		}, "checksum"},
		{"corrupt meta page", func(t *testing.T, dir string, db []byte) {
			clear(db[:64])
			write(t, filepath.Join(dir, dbFile), db)
		}, "checksum"},
		{"stale temporary file", func(t *testing.T, dir string, _ []byte) { write(t, filepath.Join(dir, ".clean.json.1.tmp"), nil) }, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir, db := closed(t)
			c.fault(t, dir, db)
			var log bytes.Buffer
			s, err := Open(Config{Dir: dir, TrustDomain: td, Log: slog.New(slog.NewTextHandler(&log, nil))})
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			index, err := s.AppliedIndex()
			_, kept := s.Entry("a")
			if want := c.why == ""; err != nil || kept != want || (index == 1) != want {
				t.Errorf("index %d, %v, entry kept: %v; want kept: %v", index, err, kept, want)
			}
			if !strings.Contains(log.String(), c.why) || (c.why == "") != (log.Len() == 0) {
				t.Errorf("the log says %q", &log)
			}
			checkConsistent(t, s)
		})
	}
}

func TestOpenRefuses(t *testing.T) {
	open := func(dir string, td spiffeid.TrustDomain) error {
		s, err := Open(Config{Dir: dir, TrustDomain: td})
		if err == nil {
			s.Close()
		}
		return err
	}
	t.Run("another trust domain", func(t *testing.T) {
		for _, crashed := range []bool{false, true} {
			dir, _ := closed(t)
			if crashed {
				os.Remove(filepath.Join(dir, markerFile))
			}
			wantErr(t, open(dir, spiffeid.RequireTrustDomainFromString("other.org")), identity.ErrInvalid, `of trust domain "example.org"`, `of "other.org"`, "another data folder")
			if s := openAt(t, dir); !crashed && s.Revision() != 1 {
				t.Error("the refusal cost the state")
			}
		}
	})
	t.Run("newer format", func(t *testing.T) {
		dir, _ := closed(t)
		write(t, filepath.Join(dir, headerFile), []byte(`{"format":2,"trust_domain":"example.org","more":"things"}`))
		wantErr(t, open(dir, td), identity.ErrInvalid, "format 2", "up to 1", "newer version")
	})
	t.Run("damaged header", func(t *testing.T) {
		dir, _ := closed(t)
		write(t, filepath.Join(dir, headerFile), []byte("{"))
		wantErr(t, open(dir, td), identity.ErrInvalid, headerFile, "remove")
	})
	t.Run("in use", func(t *testing.T) {
		dir := stateDir(t)
		openAt(t, dir)
		if err := open(dir, td); !errors.Is(err, durable.ErrLocked) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("loose permissions", func(t *testing.T) {
		dir, _ := closed(t)
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := open(dir, td); !errors.Is(err, durable.ErrLoose) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("no config", func(t *testing.T) {
		wantErr(t, open("", td), identity.ErrInvalid)
		wantErr(t, open(stateDir(t), spiffeid.TrustDomain{}), identity.ErrInvalid)
	})
}

// A crash is a process that did not get to Close.
func TestCrashIsRebuilt(t *testing.T) {
	dir, _ := closed(t)
	s := openAt(t, dir)
	snap := snapshotOf(t, s)
	s.lock.Close() // as the kernel does
	again := openAt(t, dir)
	if index, _ := again.AppliedIndex(); index != 0 {
		t.Fatalf("a state that was not closed counts: index %d", index)
	}
	if err := again.Restore(bytes.NewReader(snap)); err != nil {
		t.Fatal(err)
	}
	if index, _ := again.AppliedIndex(); index != 1 {
		t.Errorf("rebuilt to %d", index)
	}
}

// After a failed restore raft has a snapshot that this state lacks: it must not count at the next start.
func TestFailedRestoreIsRebuilt(t *testing.T) {
	dir, _ := closed(t)
	s := openAt(t, dir)
	if err := s.Restore(strings.NewReader("cs")); err == nil {
		t.Fatal("restored rubbish")
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if index, _ := openAt(t, dir).AppliedIndex(); index != 0 {
		t.Errorf("index %d", index)
	}
}

// A transaction that fails leaves nothing, stops the store, and is rebuilt.
func TestDiskFaultStops(t *testing.T) {
	dir, _ := closed(t)
	s := openAt(t, dir)
	s.db.Close()
	cmd, err := encodeCommand(deleteEntry, now, keyData{"a"})
	if err != nil {
		t.Fatal(err)
	}
	if res := s.ApplyBatch([]raft.Entry{{Index: 2, Data: cmd}}); len(res) != 0 {
		t.Errorf("answered %q", res)
	}
	if _, ok := s.Entry("a"); !ok || s.Revision() != 1 {
		t.Error("the failed batch is visible")
	}
	if err := s.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "stopped applying") {
		t.Errorf("Run says %v", err)
	}
	s.Close()
	if index, _ := openAt(t, dir).AppliedIndex(); index != 0 {
		t.Errorf("index %d", index)
	}
}

// A record that the code cannot read is this member's fault, not a refusal of the command.
func TestDamagedRecordStops(t *testing.T) {
	s, w, _ := newStore(t)
	must[identity.Entry](t)(w.CreateEntry(t.Context(), now, entryFor("a", "/a", "k8s:ns:x")))
	tx, err := s.db.Begin(true)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(state{tx}.table(kindEntry).Put([]byte("a"), []byte("{")), tx.Commit()); err != nil {
		t.Fatal(err)
	}
	if err := w.DeleteEntry(t.Context(), "a"); err == nil || s.Err() == nil || !strings.Contains(s.Err().Error(), `entries "a"`) {
		t.Errorf("got %v; the store says %v", err, s.Err())
	}
	if s.Revision() != 1 {
		t.Error("it went on")
	}
}

func TestRunEndsWithContext(t *testing.T) {
	s := openAt(t, stateDir(t))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestCloseTwice(t *testing.T) {
	s := openAt(t, stateDir(t))
	for range 2 {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
	if _, err := s.Snapshot(); err == nil {
		t.Error("a snapshot of a closed store")
	}
	if page, next := s.Entries("", 0); page != nil || next != "" {
		t.Error("a listing of a closed store")
	}
}
