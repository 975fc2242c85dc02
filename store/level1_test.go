package store

import (
	"bufio"
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"countersign.io/countersign/raft"
)

// level1 is a log that the version before levels wrote, with what it answered (testdata/level1: 700 random commands).
func level1(t testing.TB) (log []raft.Entry, answers []string) {
	t.Helper()
	f, err := os.Open(filepath.Join("testdata", "level1", "log.jsonl"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		var line struct {
			Index   uint64 `json:"index"`
			Command string `json:"command"`
			Answer  string `json:"answer"`
		}
		if err := json.Unmarshal(lines.Bytes(), &line); err != nil {
			t.Fatal(err)
		}
		log = append(log, raft.Entry{Index: line.Index, Term: 1, Data: append([]byte{1}, line.Command...)})
		answers = append(answers, line.Answer)
	}
	if len(log) < 500 {
		t.Fatalf("%d commands", len(log))
	}
	return log, answers
}

// Until every member runs this version, it is the version before: the same answers, the same snapshot to the byte, the same
// bundle, and no mark in the folder that the other would not know.
func TestLevel1IsTheVersionBefore(t *testing.T) {
	golden := func(name string) []byte {
		t.Helper()
		raw, err := os.ReadFile(filepath.Join("testdata", "level1", name))
		if err != nil {
			t.Fatal(err)
		}
		return raw
	}
	log, answers := level1(t)
	dir := stateDir(t)
	s := openAt(t, dir)
	for i, res := range s.ApplyBatch(log) {
		if string(res) != answers[i] {
			t.Errorf("entry %d answers %s, and once answered %s", log[i].Index, res, answers[i])
		}
	}
	want := golden("snapshot")
	if !bytes.Equal(snapshotOf(t, s), want) {
		t.Error("the snapshot is another one than the version before took")
	}
	again := openAt(t, stateDir(t))
	if err := again.Restore(bytes.NewReader(want)); err != nil {
		t.Fatal(err)
	}
	checkConsistent(t, again)
	for _, s := range []*Store{s, again} {
		bundle, err := json.Marshal(s.Bundle())
		if err != nil || !bytes.Equal(append(bundle, '\n'), golden("bundle.json")) || s.Level() != 1 {
			t.Errorf("level %d, bundle %s, %v", s.Level(), bundle, err)
		}
	}
	if !bytes.Equal(snapshotOf(t, again), want) {
		t.Error("a restored store gives another snapshot")
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(filepath.Join(dir, markerFile))
	var m struct {
		Format int    `json:"format"`
		Size   int64  `json:"size"`
		CRC32C uint32 `json:"crc32c"`
	}
	if err != nil || decodeStrict(raw, &m) != nil || m.Format != 1 {
		t.Errorf("the marker is %s, %v", raw, err)
	}
}
