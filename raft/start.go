package raft

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/hashicorp/go-hclog"
	hraft "github.com/hashicorp/raft"

	"countersign.io/countersign/internal/durable"
)

// keepSnapshots: the newest, and one to fall back on.
const keepSnapshots = 2

// openSnapshots opens the folder of snapshots and removes what a crash left half written there.
func openSnapshots(dir string, log hclog.Logger) (hraft.SnapshotStore, error) {
	path := filepath.Join(dir, "snapshots") // the name is hashicorp/raft's
	if err := durable.PrivateDir(path); err != nil {
		return nil, err
	}
	names, err := os.ReadDir(path)
	if err != nil {
		return nil, err
	}
	for _, e := range names {
		if strings.HasSuffix(e.Name(), ".tmp") {
			if err := os.RemoveAll(filepath.Join(path, e.Name())); err != nil {
				return nil, fmt.Errorf("removing unfinished snapshot: %w", err)
			}
		}
	}
	return hraft.NewFileSnapshotStoreWithLogger(dir, keepSnapshots, log)
}

// checkStart compares what the state machine has with what the folder has, and says whether the machine must
// be restored from a snapshot. It refuses what raft would panic on or, worse, go on with:
//
//	machine A     snapshot S    log F..L
//	0             any           F <= S+1      restore S (if any), then the log
//	A < S         S             F <= S+1      restore S: the machine is whole, and old
//	A >= S        S             F <= S+1      keep the machine; of the log it takes what is beyond A
//	A > max(S,L)  -             -             refused: the folder is not the one the machine was driven from
//	any           S             F > S+1       refused: entries are missing
//
// When the newest snapshot is damaged an older one will do if the log reaches back to it.
func checkStart(logs *logStore, snaps hraft.SnapshotStore, f *fsm) (restore bool, err error) {
	applied, err := f.machine.AppliedIndex()
	if err != nil {
		return false, fmt.Errorf("reading the state machine's index: %w", err)
	}
	list, err := snaps.List()
	if err != nil {
		return false, fmt.Errorf("listing snapshots: %w", err)
	}
	newest := uint64(0)
	if len(list) > 0 {
		newest = list[0].Index
	}
	last, err := logs.LastIndex()
	if err != nil {
		return false, err
	}
	if applied > max(newest, last) {
		return false, fmt.Errorf("the state machine has entry %d, the log ends at %d: the raft folder was emptied or is an older copy; restore both from one backup, or remove this member and join it again with an empty folder: %w",
			applied, max(newest, last), ErrCorrupt)
	}
	if applied > 0 && applied >= newest {
		f.advance(applied)
		return false, reaches(logs, last, newest)
	}
	if len(list) == 0 {
		return false, reaches(logs, last, 0)
	}
	var errs []error
	for _, meta := range list {
		_, r, err := snaps.Open(meta.ID) // verifies the snapshot's checksum
		if err == nil {
			r.Close()
			return true, reaches(logs, last, meta.Index)
		}
		errs = append(errs, fmt.Errorf("snapshot %s: %w", meta.ID, err))
	}
	return false, fmt.Errorf("%w; remove this member and join it again with an empty folder: %w", errors.Join(errs...), ErrCorrupt)
}

// reaches checks that the log holds everything after the given index, as far as it goes.
func reaches(logs *logStore, last, index uint64) error {
	if last <= index || logs.runFrom <= index+1 {
		return nil
	}
	return fmt.Errorf("the log starts at entry %d, but the snapshot before it ends at %d: entries are missing; remove this member and join it again with an empty folder: %w",
		logs.runFrom, index, ErrCorrupt)
}
