package store

import (
	"bytes"
	"errors"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"go.etcd.io/bbolt"

	"countersign.io/countersign/identity"
	"countersign.io/countersign/raft"
)

// needSeeds fails where the corpus that belongs to the code is not there: fuzzing would start from nothing, and be green.
func needSeeds(f *testing.F) {
	f.Helper()
	seeds, err := os.ReadDir(filepath.Join("testdata", "fuzz", f.Name()))
	if err != nil || len(seeds) < 3 {
		f.Fatalf("%d seeds, %v", len(seeds), err)
	}
}

// Whatever a command says, it is applied, refused or unknown; it is never a fault of the member, and two members agree.
func FuzzCommand(f *testing.F) {
	needSeeds(f)
	for _, e := range randomCommands(rand.New(rand.NewPCG(9, 1)), 60) {
		f.Add(e.Data)
	}
	s := openAt(f, stateDir(f))
	s.ApplyBatch(randomCommands(rand.New(rand.NewPCG(3, 1)), 300))
	f.Fuzz(func(t *testing.T, raw []byte) {
		if c, err := decodeCommand(raw); err == nil {
			again, err := encodeCommand(c.Type, c.Time, c.Data)
			if err != nil {
				t.Skip() // a time that is out of range in UTC
			}
			if d, err := decodeCommand(again); err != nil || d.Type != c.Type || !d.Time.Equal(c.Time) {
				t.Fatalf("%q became %q: %v", raw, again, err)
			}
		} else if !errors.Is(err, errUnknownCommand) {
			t.Fatal(err)
		}
		apply := func() ([]byte, []change) {
			tx, err := s.db.Begin(true)
			if err != nil {
				t.Fatal(err)
			}
			defer tx.Rollback()
			a, err := newApplier(tx, td)
			if err != nil {
				t.Fatal(err)
			}
			res, err := a.apply(raft.Entry{Index: s.applied + 1, Data: raw})
			if err != nil && !errors.Is(err, errUnknownCommand) {
				t.Fatalf("%q stops this member: %v", raw, err)
			}
			if _, err := loadView(tx, td); err != nil {
				t.Fatalf("%q leaves a state that cannot be read: %v", raw, err)
			}
			return res, a.changes
		}
		first, changes := apply()
		second, same := apply()
		if !bytes.Equal(first, second) || !reflect.DeepEqual(changes, same) {
			t.Fatalf("%q answers %q and %q", raw, first, second)
		}
		if first != nil && decodeResult(first, nil) != nil && len(changes) > 0 {
			t.Fatalf("%q was refused (%s) and changed something", raw, first)
		}
	})
}

// What Restore accepts it gives back, byte for byte; anything else changes nothing.
func FuzzRestore(f *testing.F) {
	needSeeds(f)
	s := openAt(f, stateDir(f))
	f.Fuzz(func(t *testing.T, raw []byte) { fuzzRestore(t, s, raw) })
}

// As FuzzRestore, past the checksums.
func FuzzRestoreRecord(f *testing.F) {
	needSeeds(f)
	s := openAt(f, stateDir(f))
	f.Fuzz(func(t *testing.T, k byte, key, value []byte, k2 byte, key2, value2 []byte) {
		if len(key) > maxKeyBytes || len(key2) > maxKeyBytes {
			t.Skip() // more than the writer of the test can write
		}
		fuzzRestore(t, s, writeSnapshot(record{kind(k), string(key), string(value)}, record{kind(k2), string(key2), string(value2)}))
	})
}

func fuzzRestore(t *testing.T, s *Store, raw []byte) {
	before := snapshotOf(t, s)
	want := raw
	if err := s.Restore(bytes.NewReader(raw)); err != nil {
		want = before
	}
	if got := snapshotOf(t, s); !bytes.Equal(got, want) {
		t.Fatalf("restored %q, got %q", want, got)
	}
	checkConsistent(t, s)
}

// What Inspect accepts can be restored and rewritten, and what is rewritten can be inspected; what it refuses can be neither.
func FuzzInspect(f *testing.F) {
	needSeeds(f)
	f.Fuzz(func(t *testing.T, raw []byte) { fuzzInspect(t, raw) })
}

// As FuzzInspect, past the checksums.
func FuzzRewriteRecord(f *testing.F) {
	needSeeds(f)
	f.Fuzz(func(t *testing.T, k byte, key, value []byte, k2 byte, key2, value2 []byte) {
		if len(key) > maxKeyBytes || len(key2) > maxKeyBytes {
			t.Skip() // more than the writer of the test can write
		}
		fuzzInspect(t, writeSnapshot(record{kind(k), string(key), string(value)}, record{kind(k2), string(key2), string(value2)}))
	})
}

func fuzzInspect(t *testing.T, raw []byte) {
	sum, err := Inspect(bytes.NewReader(raw))
	var out bytes.Buffer
	o := RewriteOptions{Now: restoreTime, Revision: sum.Revision}
	got, rewriteErr := Rewrite(&out, bytes.NewReader(raw), o)
	if err != nil {
		if rewriteErr == nil {
			t.Fatalf("refused (%v), and rewritten: %q", err, raw)
		}
		return
	}
	if rewriteErr != nil {
		if sum.Sequence == math.MaxUint64 || strings.Contains(rewriteErr.Error(), "year") {
			return
		}
		t.Fatalf("%q: %v", raw, rewriteErr)
	}
	again, err := Inspect(bytes.NewReader(out.Bytes()))
	if err != nil || again != got || again.Sequence <= sum.Sequence || again.Revision != sum.Revision {
		t.Fatalf("%q was rewritten to %+v, %v; was told %+v", raw, again, err, got)
	}
	if sum.TrustDomain != td.Name() {
		return
	}
	s := openAt(t, stateDir(t))
	if err := s.Restore(bytes.NewReader(out.Bytes())); err != nil && !strings.Contains(err.Error(), "duplicates entry") && !strings.Contains(err.Error(), "two join tokens") {
		t.Fatalf("%q: %v", raw, err)
	}
	err = s.db.View(func(tx *bbolt.Tx) error {
		tokens, err := all[identity.JoinToken](state{tx}, kindJoinToken)
		for _, j := range tokens {
			if j.UsedAt.IsZero() {
				t.Fatalf("%q: token %s admits again", raw, j.ID)
			}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}
