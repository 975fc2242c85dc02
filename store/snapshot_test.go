package store

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"strings"
	"testing"
	"testing/iotest"

	"countersign.io/countersign/identity"
	"countersign.io/countersign/raft"
)

// filled is a store with something in every table.
func filled(t testing.TB) *Store {
	t.Helper()
	s := openAt(t, stateDir(t))
	s.ApplyBatch(randomCommands(rand.New(rand.NewPCG(3, 1)), 300))
	return s
}

func TestSnapshotFaults(t *testing.T) {
	good := snapshotOf(t, filled(t))
	s, w, _ := newStore(t)
	must[identity.Entry](t)(w.CreateEntry(t.Context(), now, entryFor("mine", "/mine", "k8s:ns:x")))
	before := snapshotOf(t, s)
	edit := func(f func([]byte) []byte) []byte { return f(bytes.Clone(good)) }
	middle := len(good) / 2
	fix := func(b []byte) []byte { // the header's checksum
		at := snapshotHeaderBytes - 4
		binary.BigEndian.PutUint32(b[at:], crc32.Checksum(b[12:at], crc32.MakeTable(crc32.Castagnoli)))
		return b
	}
	for _, c := range []struct {
		name string
		in   []byte
		want string
	}{
		{"empty", nil, "truncated at offset 0"},
		{"cut in the header", good[:20], "truncated at offset 20"},
		{"cut in a record", good[:middle], fmt.Sprint("truncated at offset ", middle)},
		{"cut before the hash", good[:len(good)-32], fmt.Sprint("truncated at offset ", len(good)-32)},
		{"cut in the hash", good[:len(good)-1], fmt.Sprint("truncated at offset ", len(good)-1)},
		{"something else", []byte("PK\x03\x04 a zip archive"), "not a snapshot"},
		{"bit in a counter", edit(func(b []byte) []byte { b[snapshotHeaderBytes-6] ^= 1; return b }), "damaged at offset 12: checksum"},
		{"bit in the first record", edit(func(b []byte) []byte { b[snapshotHeaderBytes+40] ^= 1; return b }), fmt.Sprintf("damaged at offset %d: ", snapshotHeaderBytes)},
		{"huge length", edit(func(b []byte) []byte { b[snapshotHeaderBytes+3] = 0xff; return b }), fmt.Sprintf("damaged at offset %d: a record with", snapshotHeaderBytes)},
		{"bit in the hash", edit(func(b []byte) []byte { b[len(b)-1] ^= 1; return b }), "SHA-256"},
		{"more at the end", append(bytes.Clone(good), 0), "data after the end"},
		{"newer format", edit(func(b []byte) []byte { b[11]++; return b }), "format 2, and this version reads 1: upgrade"},
		{"another trust domain", edit(func(b []byte) []byte { b[16] = 'f'; return fix(b) }), `of trust domain "fxample.org", and this member is of "example.org"`},
	} {
		t.Run(c.name, func(t *testing.T) {
			wantErr(t, s.Restore(iotest.OneByteReader(bytes.NewReader(c.in))), identity.ErrInvalid, c.want)
			if !bytes.Equal(snapshotOf(t, s), before) {
				t.Error("the state changed")
			}
			checkConsistent(t, s)
		})
	}
	if err := s.Restore(iotest.TimeoutReader(bytes.NewReader(good))); !errors.Is(err, iotest.ErrTimeout) {
		t.Errorf("a reader's error came back as %v", err)
	}
	if err := s.Restore(iotest.HalfReader(bytes.NewReader(good))); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(snapshotOf(t, s), good) {
		t.Error("restored something else")
	}
}

// Every single flipped bit is found, and changes nothing.
func TestSnapshotEveryByteCounts(t *testing.T) {
	src, w, _ := newStore(t)
	must[identity.Entry](t)(w.CreateEntry(t.Context(), now, entryFor("e", "/e", "k8s:ns:x")))
	good := snapshotOf(t, src)
	s := openAt(t, stateDir(t))
	for i := range good {
		bad := bytes.Clone(good)
		bad[i] ^= 1 << (i % 8)
		if err := s.Restore(bytes.NewReader(bad)); err == nil {
			t.Fatalf("a flipped bit in byte %d was not found", i)
		}
		if err := s.Restore(bytes.NewReader(good[:i])); err == nil {
			t.Fatalf("%d bytes of %d were taken for all", i, len(good))
		}
	}
	if s.Revision() != 0 {
		t.Error("something was restored")
	}
}

type record struct {
	kind       kind
	key, value string
}

// writeSnapshot makes one whose checksums are right, whatever its records are.
func writeSnapshot(records ...record) []byte {
	var b bytes.Buffer
	out := newSnapshotWriter(&b)
	out.header(td.Name(), 7, 1)
	for _, r := range records {
		out.record(r.kind, []byte(r.key), []byte(r.value))
	}
	out.trailer()
	return b.Bytes()
}

func TestSnapshotRecordFaults(t *testing.T) {
	entry := func(id, path, more string) record {
		return record{kindEntry, id, `{"created":1,"id":"` + id + `","selectors":["k8s:ns:x"],"spiffe_id":"spiffe://example.org` + path + `"` + more + `}`}
	}
	token := func(fill, id string) record {
		hash := strings.Repeat(fill, sha256.Size)
		return record{kindJoinToken, hash, fmt.Sprintf(`{"id":%q,"hash":%q,"purpose":"agent","expires_at":"2026-01-01T00:00:00Z"}`, id, base64.StdEncoding.EncodeToString([]byte(hash)))}
	}
	member := record{kindMember, "m", `{"id":"m","address":"h:1"}`}
	s := openAt(t, stateDir(t))
	if err := s.Restore(bytes.NewReader(writeSnapshot(entry("a", "/a", ""), member))); err != nil {
		t.Fatal(err)
	}
	checkConsistent(t, s)
	for _, c := range []struct {
		name    string
		records []record
		want    string
	}{
		{"unknown kind", []record{{99, "x", "{}"}}, "unknown kind of record 99"},
		{"unknown field", []record{entry("a", "/a", `,"wonder":1`)}, "wonder"},
		{"two values", []record{{kindMember, "m", `{"id":"m","address":"h:1"}{}`}}, "after the JSON"},
		{"no JSON", []record{{kindMember, "m", "x"}}, "invalid character"},
		{"key of another", []record{{kindMember, "n", member.value}}, `record of "m" has the key "n"`},
		{"kinds out of order", []record{member, entry("a", "/a", "")}, "out of order"},
		{"keys out of order", []record{entry("b", "/b", ""), entry("a", "/a", "")}, "out of order"},
		{"twice", []record{member, member}, "out of order"},
		{"duplicate entries", []record{entry("a", "/a", ""), entry("b", "/a", "")}, "duplicates entry a"},
		{"unsorted selectors", []record{{kindEntry, "a", `{"created":1,"id":"a","selectors":["k8s:ns:x","agent:id:x"],"spiffe_id":"x"}`}}, "sorted set"},
		{"same token ID twice", []record{token("A", "t"), token("B", "t")}, "two join tokens t"},
		{"token without hash", []record{{kindJoinToken, "t", `{"id":"t","hash":"AA==","purpose":"agent","expires_at":"2026-01-01T00:00:00Z"}`}}, "hash of 1 bytes"},
	} {
		t.Run(c.name, func(t *testing.T) {
			wantErr(t, s.Restore(bytes.NewReader(writeSnapshot(c.records...))), identity.ErrInvalid, c.want, "damaged at offset ")
			if _, ok := s.Entry("a"); !ok || len(s.Members()) != 1 {
				t.Error("the state changed")
			}
		})
	}
}

// A snapshot is the state of its moment, and neither stops writers nor is changed by them.
func TestSnapshotWhileWriting(t *testing.T) {
	log := randomCommands(rand.New(rand.NewPCG(5, 1)), 2000)
	s, ref := openAt(t, stateDir(t)), openAt(t, stateDir(t))
	s.ApplyBatch(log[:1000])
	ref.ApplyBatch(log[:1000])
	snap, err := s.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	for i := 1000; i < len(log); i += 10 { // would hang if writers waited for the snapshot
		s.ApplyBatch(log[i:min(i+10, len(log))])
	}
	var b bytes.Buffer
	if _, err := snap.WriteTo(&b); err != nil {
		t.Fatal(err)
	}
	snap.Release()
	if !bytes.Equal(b.Bytes(), snapshotOf(t, ref)) {
		t.Error("the snapshot has later writes")
	}
}

func TestSnapshotWriterFails(t *testing.T) {
	snap, err := filled(t).Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	defer snap.Release()
	full := errors.New("disk full")
	if _, err := snap.WriteTo(writerFunc(func([]byte) (int, error) { return 0, full })); !errors.Is(err, full) || !strings.Contains(err.Error(), "offset") {
		t.Errorf("got %v", err)
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// A command that this version does not know stops the store before it, for good, and no snapshot passes over it.
func TestUnknownCommandStops(t *testing.T) {
	good := func(index uint64, id string) raft.Entry {
		cmd, err := encodeCommand(createEntry, now, entryFor(id, "/"+id, "k8s:ns:x"))
		if err != nil {
			t.Fatal(err)
		}
		return raft.Entry{Index: index, Data: cmd}
	}
	for name, raw := range map[string]string{
		"type":               "\x01" + `{"type":"conquer","data":{}}`,
		"version":            "\x02" + `{"type":"create_entry","data":{}}`,
		"field":              "\x01" + `{"type":"create_entry","data":{},"priority":1}`,
		"field of data":      "\x01" + `{"type":"delete_entry","data":{"key":"a","reason":"x"}}`,
		"type of a field":    "\x01" + `{"type":"delete_entry","data":{"key":1}}`,
		"data after it":      "\x01" + `{"type":"delete_entry","data":{"key":"a"}} {}`,
		"no data":            "\x01" + `{"type":"delete_entry"}`,
		"not JSON":           "\x01hello",
		"nothing":            "",
		"version byte alone": "\x01",
	} {
		t.Run(name, func(t *testing.T) {
			dir := stateDir(t)
			s := openAt(t, dir)
			res := s.ApplyBatch([]raft.Entry{good(1, "a"), good(2, "b"), {Index: 4, Data: []byte(raw)}, good(5, "c")})
			if len(res) != 2 || string(res[0]) == "" || string(res[1]) == "" {
				t.Fatalf("%d results, want those of the two before it", len(res))
			}
			if res := s.ApplyBatch([]raft.Entry{good(5, "c")}); len(res) != 0 {
				t.Fatal("it went on")
			}
			if err := s.Run(t.Context()); !errors.Is(err, errUnknownCommand) || !strings.Contains(err.Error(), "log entry 4") || !strings.Contains(err.Error(), "upgrade") {
				t.Fatalf("Run says %v", err)
			}
			if _, err := s.Snapshot(); !errors.Is(err, errUnknownCommand) {
				t.Fatalf("Snapshot says %v", err)
			}
			if err := s.Restore(bytes.NewReader(nil)); !errors.Is(err, errUnknownCommand) {
				t.Fatalf("Restore says %v", err)
			}
			if index, _ := s.AppliedIndex(); index != 2 || s.Revision() != 2 {
				t.Fatalf("applied %d", index)
			}
			if _, ok := s.Entry("b"); !ok {
				t.Fatal("what came before is lost")
			}
		})
	}
}

func TestStateGoesOnAfterUpgrade(t *testing.T) {
	dir := stateDir(t)
	s := openAt(t, dir)
	w := s.Writer(&directLog{s: s})
	must[identity.Entry](t)(w.CreateEntry(t.Context(), now, entryFor("a", "/a", "k8s:ns:x")))
	s.ApplyBatch([]raft.Entry{{Index: 2, Data: []byte{commandVersion + 1}}})
	if s.Err() == nil {
		t.Fatal("it did not stop")
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if index, _ := openAt(t, dir).AppliedIndex(); index != 1 {
		t.Errorf("opened at %d, want 1, from where the log goes on", index)
	}
}
