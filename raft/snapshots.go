package raft

import (
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/hashicorp/go-hclog"
	hraft "github.com/hashicorp/raft"

	"countersign.io/countersign/internal/durable"
)

// keepSnapshots: the newest, and one to fall back on.
const keepSnapshots = 2

// snapshots is hraft's store of snapshots in files. Hraft has a checksum over the state, but none over meta.json,
// where the snapshot's place in the log and the members are: a flipped bit there would change either unseen. So
// meta.sum is put beside it. One that is absent is no fault: an older program wrote none, and neither did one that
// crashed in between.
type snapshots struct {
	*hraft.FileSnapshotStore
	path    string
	damaged map[string]error // by name; found when the folder was opened, never changed after
}

var _ hraft.SnapshotStore = (*snapshots)(nil)

// openSnapshots opens the folder of snapshots, removes what a crash left half written there, and checks what is not
// part of the state.
func openSnapshots(dir string, log hclog.Logger) (*snapshots, error) {
	path := filepath.Join(dir, "snapshots") // the name is hashicorp/raft's
	if err := durable.PrivateDir(path); err != nil {
		return nil, err
	}
	names, err := os.ReadDir(path)
	if err != nil {
		return nil, err
	}
	s := &snapshots{path: path, damaged: map[string]error{}}
	for _, e := range names {
		switch {
		case strings.HasSuffix(e.Name(), ".tmp"):
			if err := os.RemoveAll(filepath.Join(path, e.Name())); err != nil {
				return nil, fmt.Errorf("removing unfinished snapshot: %w", err)
			}
		case e.IsDir():
			if err := s.checkMeta(e.Name()); err != nil {
				s.damaged[e.Name()] = fmt.Errorf("snapshot %s: %w", e.Name(), err)
			}
		}
	}
	s.FileSnapshotStore, err = hraft.NewFileSnapshotStoreWithLogger(dir, keepSnapshots, log)
	return s, err
}

// has tells whether the snapshot is still there.
func (s *snapshots) has(name string) bool {
	_, err := os.Stat(filepath.Join(s.path, name))
	return err == nil
}

const maxMeta = 1 << 20

// checkMeta checks the files beside the state of a snapshot.
func (s *snapshots) checkMeta(name string) error {
	meta, err := readFile(filepath.Join(s.path, name, "meta.json"), maxMeta)
	if err != nil {
		return fmt.Errorf("%w: %w", err, ErrCorrupt)
	}
	var m hraft.SnapshotMeta
	if err := json.Unmarshal(meta, &m); err != nil {
		return fmt.Errorf("meta.json: %w: %w", err, ErrCorrupt)
	}
	if m.ID != name || !strings.HasPrefix(name, fmt.Sprintf("%d-%d-", m.Term, m.Index)) {
		return fmt.Errorf("meta.json is that of snapshot %q, of entry %d in term %d: %w", m.ID, m.Index, m.Term, ErrCorrupt)
	}
	sum, err := readFile(filepath.Join(s.path, name, "meta.sum"), 64)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("%w: %w", err, ErrCorrupt)
	}
	if string(sum) != metaSum(meta) {
		return fmt.Errorf("meta.json and its checksum in meta.sum do not match: %w", ErrCorrupt)
	}
	return nil
}

// metaSum is what is in meta.sum.
func metaSum(meta []byte) string {
	return fmt.Sprintf("crc32c %08x\n", crc32.Checksum(meta, castagnoli()))
}

// readFile reads a file that must not be longer than limit.
func readFile(path string, limit int64) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if info.Size() > limit {
		return nil, fmt.Errorf("%s has %d bytes, the limit is %d", filepath.Base(path), info.Size(), limit)
	}
	return os.ReadFile(path)
}

// damage is all damage that was found on opening, nil if none.
func (s *snapshots) damage() error {
	var errs []error
	for _, err := range s.damaged {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// List implements hraft.SnapshotStore, without what is damaged.
func (s *snapshots) List() ([]*hraft.SnapshotMeta, error) {
	all, err := s.FileSnapshotStore.List()
	if err != nil {
		return nil, err
	}
	out := all[:0]
	for _, m := range all {
		if s.damaged[m.ID] == nil {
			out = append(out, m)
		}
	}
	return out, nil
}

// Create implements hraft.SnapshotStore.
func (s *snapshots) Create(v hraft.SnapshotVersion, index, term uint64, c hraft.Configuration, at uint64, t hraft.Transport) (hraft.SnapshotSink, error) {
	sink, err := s.FileSnapshotStore.Create(v, index, term, c, at, t)
	if err != nil {
		return nil, err
	}
	return &snapshotSink{SnapshotSink: sink, s: s}, nil
}

// snapshotSink adds meta.sum once the snapshot is in its place.
type snapshotSink struct {
	hraft.SnapshotSink
	s         *snapshots
	cancelled bool
	closed    bool
}

// Cancel implements hraft.SnapshotSink.
func (k *snapshotSink) Cancel() error {
	k.cancelled = true
	return k.SnapshotSink.Cancel()
}

// Close implements hraft.SnapshotSink.
func (k *snapshotSink) Close() error {
	if err := k.SnapshotSink.Close(); err != nil || k.cancelled || k.closed {
		return err
	}
	k.closed = true
	dir := filepath.Join(k.s.path, k.ID())
	meta, err := readFile(filepath.Join(dir, "meta.json"), maxMeta)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // a newer one has pushed it out already
	}
	if err == nil {
		err = durable.WriteFile(filepath.Join(dir, "meta.sum"), []byte(metaSum(meta)), 0o600)
	}
	if err != nil {
		return fmt.Errorf("writing the checksum of a snapshot: %w", err)
	}
	return nil
}
