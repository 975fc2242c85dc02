package raft

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"time"

	hraft "github.com/hashicorp/raft"
	bolt "go.etcd.io/bbolt"

	"countersign.io/countersign/internal/durable"
)

// RecoverConfig is what Recover needs.
type RecoverConfig struct {
	// Dir is the member's raft folder, and ID the member. Address is where the members to come will dial it.
	Dir, ID, Address string
	// Confirm, if set, is shown what was found before anything is changed; its error ends Recover.
	Confirm func(Recovery) error
}

// Recovery is what a member's folder holds.
type Recovery struct {
	// Members are those of the cluster as this member last knew it.
	Members []Member
	// Last is the index of its last entry, Term the term of that entry, Snapshot the index of the newest
	// snapshot, 0 if none.
	Last, Term, Snapshot uint64
}

// Recover makes the member in a folder a cluster of one, for when the other members are lost for good. Nothing
// may use the folder meanwhile: the error then wraps durable.ErrLocked.
//
// All of the member's data stays. That includes the entries at the end of its log that it does not know to be
// committed: they come into force, also those that no one was told of. What was acknowledged and had not
// reached this member is lost; of several survivors the one with the highest Term and Last is the one to take.
//
// The other members of old MUST NOT be started again with their folders: they form the old cluster if they are
// a majority. This member, and those that join it, refuse what comes in a term from before, so that they cannot
// overwrite it.
//
// A crash leaves the folder as it was or recovered. Doing it again changes nothing. Errors wrap ErrForeign when
// the folder is another member's, ErrCorrupt when it is damaged, fs.ErrNotExist when there is no log in it.
func Recover(cfg RecoverConfig) error {
	if err := recoverFolder(cfg, func(string) error { return nil }); err != nil {
		return fmt.Errorf("recovering raft folder %s: %w", cfg.Dir, err)
	}
	return nil
}

// recoverFolder is Recover. step is called after each step; if it fails, that is where a crash was.
func recoverFolder(cfg RecoverConfig, step func(string) error) (err error) {
	if !validAddress(cfg.ID, cfg.Address) {
		return fmt.Errorf("id %q and address %q: both are needed, at most 1 KiB together, in printable characters", cfg.ID, cfg.Address)
	}
	path := filepath.Join(cfg.Dir, "log.db")
	if _, err := os.Stat(path); err != nil { // before a lock file is made in a wrong folder
		return fmt.Errorf("this is no raft folder: %w", err)
	}
	if err := durable.PrivateDir(cfg.Dir); err != nil {
		return err
	}
	lock, err := durable.Lock(filepath.Join(cfg.Dir, "lock"))
	if err != nil {
		return fmt.Errorf("%w; end the member first", err)
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	logs, err := openLogStore(path, cfg.ID)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, logs.Close()) }()
	found, old, err := survey(cfg.Dir, logs)
	if err != nil {
		return err
	}
	if err := step("surveyed"); err != nil {
		return err
	}
	sole := hraft.Configuration{Servers: []hraft.Server{{
		Suffrage: hraft.Voter, ID: hraft.ServerID(cfg.ID), Address: hraft.ServerAddress(cfg.Address),
	}}}
	if slices.Equal(old.Servers, sole.Servers) {
		return nil // it is one already
	}
	if cfg.Confirm != nil {
		if err := cfg.Confirm(found); err != nil {
			return err
		}
	}
	term, err := logs.GetUint64([]byte("CurrentTerm"))
	if err != nil {
		return err
	}
	// The change of the membership is an entry like that of a leader of a later term, so the log says what was
	// done. It counts as soon as it is in the log, and its only voter commits it.
	err = logs.recover(&hraft.Log{
		Index: found.Last + 1, Term: nextEra(max(term, found.Term), time.Now()), Type: hraft.LogConfiguration, Data: hraft.EncodeConfiguration(sole),
	})
	if err != nil {
		return err
	}
	return step("written")
}

// survey says what a folder holds, and checks that it is all there.
func survey(dir string, logs *logStore) (found Recovery, members hraft.Configuration, err error) {
	snaps, err := openSnapshots(dir, newHCLog(slog.New(slog.DiscardHandler), slog.LevelError, nil))
	if err != nil {
		return found, members, err
	}
	list, err := snaps.List()
	if err != nil {
		return found, members, fmt.Errorf("listing snapshots: %w", err)
	}
	var errs []error
	for _, meta := range list {
		_, r, err := snaps.Open(meta.ID)
		if err == nil {
			r.Close()
			found.Snapshot, found.Last, found.Term, members = meta.Index, meta.Index, meta.Term, meta.Configuration
			break
		}
		errs = append(errs, fmt.Errorf("snapshot %s: %w", meta.ID, err))
	}
	if err := errors.Join(errs...); err != nil && found.Snapshot == 0 {
		return found, members, fmt.Errorf("%w: %w", err, ErrCorrupt)
	}
	last, err := logs.LastIndex()
	if err != nil {
		return found, members, err
	}
	if err := reaches(logs, last, found.Snapshot); err != nil {
		return found, members, err
	}
	if last > found.Last {
		found.Last, found.Term = last, logs.lastTerm(0)
	}
	if c, ok, err := logs.lastConfiguration(); err != nil {
		return found, members, err
	} else if ok {
		members = c
	}
	if found.Last == 0 || len(members.Servers) == 0 {
		return found, members, errors.New("the folder holds nothing of a cluster: this member never joined one")
	}
	for _, s := range members.Servers {
		found.Members = append(found.Members, Member{ID: string(s.ID), Address: string(s.Address), Voter: s.Suffrage == hraft.Voter})
	}
	return found, members, nil
}

// lastConfiguration is the newest configuration in the log.
func (s *logStore) lastConfiguration() (c hraft.Configuration, ok bool, err error) {
	err = s.db.View(func(tx *bolt.Tx) error {
		cur := tx.Bucket(bucketLog()).Cursor()
		for k, v := cur.Last(); k != nil; k, v = cur.Prev() {
			if len(v) < recordFixed || hraft.LogType(v[1]) != hraft.LogConfiguration {
				continue
			}
			var l hraft.Log
			if err := parseRecord(binary.BigEndian.Uint64(k), v, &l); err != nil {
				return err
			}
			if c, err = decodeConfiguration(l.Data); err != nil {
				return fmt.Errorf("log entry %d: %w", l.Index, err)
			}
			ok = true
			return nil
		}
		return nil
	})
	return c, ok, err
}

// decodeConfiguration is hraft's, which panics on what it cannot read.
func decodeConfiguration(b []byte) (c hraft.Configuration, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("reading a configuration: %v: %w", p, ErrCorrupt)
		}
	}()
	return hraft.DecodeConfiguration(b), nil
}

// recover stores a configuration and its term, all or nothing.
func (s *logStore) recover(l *hraft.Log) error {
	v, err := marshalRecord(l)
	if err != nil {
		return err
	}
	err = s.db.Update(func(tx *bolt.Tx) error {
		term := []byte("CurrentTerm")
		if err := tx.Bucket(bucketStable()).Put(term, marshalStable(term, fmt.Append(nil, l.Term))); err != nil {
			return err
		}
		return tx.Bucket(bucketLog()).Put(indexKey(l.Index), v)
	})
	if err != nil {
		return fmt.Errorf("storing the new configuration: %w", err)
	}
	return nil
}

// RestoreSnapshot makes a raft folder in which this member, at its address, is a cluster of one whose state is
// the snapshot that write writes: one of the state machine's, with the index of its last entry. The
// folder above dir must exist; dir must be absent or empty.
//
// The cluster begins at a term made of now, which MUST be later than at any restore before: this member, and those
// that join it, then refuse what comes in a term of the cluster that the snapshot is of.
//
// The folder appears at once and whole: a crash or error before leaves dir as it was, and at most a folder
// beside it (dir with ".restoring" added) that the next call removes. Errors wrap durable.ErrLocked when a
// process uses dir, fs.ErrExist when something is in it, and write's.
func RestoreSnapshot(dir, id, address string, index uint64, now time.Time, write func(io.Writer) error) error {
	if err := restoreFolder(dir, id, address, index, nextEra(0, now), write, func(string) error { return nil }); err != nil {
		return errors.Join(fmt.Errorf("restoring a snapshot into %s: %w", dir, err), os.RemoveAll(dir+".restoring"))
	}
	return nil
}

// restoreFolder is RestoreSnapshot. step is called after each step; if it fails, that is where a crash was.
func restoreFolder(dir, id, address string, index, term uint64, write func(io.Writer) error, step func(string) error) error {
	if !validAddress(id, address) || index == 0 || term == 0 {
		return fmt.Errorf("id %q, address %q, index %d, term %d: all are needed, the first two at most 1 KiB together, in printable characters", id, address, index, term)
	}
	if err := vacant(dir); err != nil {
		return err
	}
	work := dir + ".restoring"
	if err := os.RemoveAll(work); err != nil {
		return err
	}
	if err := os.Mkdir(work, 0o700); err != nil {
		return err
	}
	if err := step("folder"); err != nil {
		return err
	}
	if err := writeSnapshot(work, id, address, index, term, write, step); err != nil {
		return err
	}
	logs, err := openLogStore(filepath.Join(work, "log.db"), id)
	if err != nil {
		return err
	}
	err = logs.SetUint64([]byte("CurrentTerm"), term)
	if err = errors.Join(err, logs.Close()); err != nil {
		return err
	}
	if err := step("log"); err != nil {
		return err
	}
	if err := syncDir(work); err != nil {
		return err
	}
	if err := os.Rename(work, dir); err != nil { // over an empty folder if there is one
		return err
	}
	if err := step("renamed"); err != nil {
		return err
	}
	return syncDir(filepath.Dir(dir))
}

func writeSnapshot(work, id, address string, index, term uint64, write func(io.Writer) error, step func(string) error) error {
	snaps, err := openSnapshots(work, newHCLog(slog.New(slog.DiscardHandler), slog.LevelError, nil))
	if err != nil {
		return err
	}
	_, encoder := hraft.NewInmemTransport("") // for the list of members that old versions of raft read
	sink, err := snaps.Create(hraft.SnapshotVersionMax, index, term, hraft.Configuration{Servers: []hraft.Server{{
		Suffrage: hraft.Voter, ID: hraft.ServerID(id), Address: hraft.ServerAddress(address),
	}}}, index, encoder)
	if err != nil {
		return fmt.Errorf("creating the snapshot: %w", err)
	}
	if err := step("created"); err != nil {
		return err
	}
	if err := write(sink); err != nil {
		sink.Cancel()
		return fmt.Errorf("writing the snapshot: %w", err)
	}
	if err := step("written"); err != nil {
		return err
	}
	if err := sink.Close(); err != nil {
		return fmt.Errorf("writing the snapshot: %w", err)
	}
	if err := step("closed"); err != nil {
		return err
	}
	_, r, err := snaps.Open(sink.ID()) // compares the checksum with what is there
	if err != nil {
		return fmt.Errorf("reading the snapshot back: %w", err)
	}
	return r.Close()
}

// vacant checks that nothing is in a folder, and nobody uses it.
func vacant(dir string) error {
	entries, err := os.ReadDir(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case len(entries) == 0:
		return nil
	}
	if slices.ContainsFunc(entries, func(e fs.DirEntry) bool { return e.Name() == "lock" }) {
		lock, err := durable.Lock(filepath.Join(dir, "lock"))
		if err != nil {
			return fmt.Errorf("%w; end the member first", err)
		}
		lock.Close()
	}
	return fmt.Errorf("the folder holds %d files or folders, %s among them; move it away first: %w", len(entries), entries[0].Name(), fs.ErrExist)
}

func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}
