package raft

import (
	"errors"
	"fmt"
)

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
func checkStart(logs *logStore, snaps *snapshots, f *fsm) (restore bool, err error) {
	defer func() {
		if damage := snaps.damage(); err != nil && damage != nil {
			err = fmt.Errorf("%w (%w)", err, damage)
		}
	}()
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
		if damage := snaps.damage(); damage != nil && (last == 0 || logs.runFrom > 1) {
			return false, fmt.Errorf("no snapshot can be read; remove this member and join it again with an empty folder: %w", ErrCorrupt)
		}
		return false, reaches(logs, last, 0)
	}
	var errs []error
	for _, meta := range list {
		_, r, err := snaps.Open(meta.ID) // verifies the snapshot's checksum
		if err == nil {
			r.Close()
			if err := reaches(logs, last, meta.Index); err != nil {
				return true, errors.Join(append(errs, err)...)
			}
			return true, nil
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

// checkSnapshots verifies the snapshots that the start had no need to read, since the state machine has their state:
// another member may need them, or this one next time. What is damaged is said, and replaced by a new one.
func (n *Node) checkSnapshots(snaps *snapshots) {
	damage := snaps.damage()
	list, err := snaps.List()
	if err != nil {
		n.log.Warn("listing snapshots failed", "error", err)
	}
	for _, meta := range list {
		_, r, err := snaps.Open(meta.ID)
		switch {
		case err == nil:
			r.Close()
		case !snaps.has(meta.ID): // a newer one has pushed it out meanwhile
		default:
			damage = errors.Join(damage, fmt.Errorf("snapshot %s: %w: %w", meta.ID, err, ErrCorrupt))
		}
	}
	if damage == nil || n.ctx.Err() != nil {
		return
	}
	n.log.Error("a snapshot is damaged on disk; the state is whole, and a new snapshot is taken; look after the disk", "error", damage)
	if err := n.await(n.raft.Snapshot()); err != nil && n.ctx.Err() == nil {
		n.log.Warn("taking a new snapshot in the place of a damaged one failed; the next will be taken in its time", "error", err)
	}
}
