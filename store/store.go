// Package store is the replicated state: entries, kube clusters, agents, join tokens, authorities, members, the terms of the
// seal, and what other clusters of the trust domain publish.
//
// A write is a command that a Writer proposes to the log; every member's Store applies the same commands in the
// same order (it is the raft package's StateMachine). Apply knows no clock, no randomness and no network: what
// it needs is in the command, so that the same log gives the same bytes on every member. Two rules follow.
// What a command may say is checked by the Writer, before it is in the log: such checks may change between
// versions. What Apply itself refuses depends on the state and the command alone and is part of the command
// version: changing it means a new version, or a new Level. And a command that this version does not know stops the store:
// a member that skipped it would have another state than its peers, without anybody noticing. So that members of two versions
// can be in one cluster, what the newer one adds waits for the cluster's level.
//
// On disk the state is a bbolt file without fsyncs. A crash throws it away, and raft rebuilds it from its newest
// snapshot and its log; only a clean shutdown leaves a marker that makes the file count. In memory are the decoded
// values and the match index, changed under a short lock after the transaction is committed. What reads return is
// shared and immutable: never modify it.
package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"sync"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.etcd.io/bbolt"

	"countersign.io/countersign/identity"
	"countersign.io/countersign/internal/durable"
	"countersign.io/countersign/raft"
)

var _ raft.StateMachine = (*Store)(nil)

// Config is what a Store needs.
type Config struct {
	Dir         string // of the state alone; made (0700) if absent
	TrustDomain spiffeid.TrustDomain
	Log         *slog.Logger // nil: silent
}

// Store is the state of one member. Its methods may be called from any goroutine.
type Store struct {
	dir  string
	td   spiffeid.TrustDomain
	log  *slog.Logger
	db   *bbolt.DB
	lock io.Closer

	// applying is held over one batch, restore or close: writers are one at a time.
	applying sync.Mutex
	applied  uint64 // index of the last applied command; guarded by applying
	discard  bool   // the file must not count at the next start; guarded by applying

	mu       sync.RWMutex // guards what follows; never held over I/O
	view     *view
	watchers map[*watcher]struct{}
	fault    error // why the store stopped applying

	stopped   chan struct{} // closed when fault is set
	closed    chan struct{}
	closeOnce sync.Once
	closeErr  error
}

// Open takes the folder's lock and loads the state that a clean shutdown left there. A state that was not closed
// cleanly, or that is damaged, is discarded: the store is then empty (AppliedIndex 0) and raft fills it again. A
// folder of another trust domain or of a newer version is an error.
func Open(c Config) (*Store, error) {
	if c.Dir == "" || c.TrustDomain.IsZero() {
		return nil, fmt.Errorf("%w: the store needs a folder and a trust domain", identity.ErrInvalid)
	}
	s := &Store{
		dir: c.Dir, td: c.TrustDomain, log: c.Log,
		watchers: make(map[*watcher]struct{}), stopped: make(chan struct{}), closed: make(chan struct{}),
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if err := durable.PrivateDir(c.Dir); err != nil {
		return nil, fmt.Errorf("opening the state folder: %w", err)
	}
	lock, err := durable.Lock(filepath.Join(c.Dir, "lock"))
	if err != nil {
		return nil, fmt.Errorf("opening the state folder: %w", err)
	}
	s.lock = lock
	if err := s.open(); err != nil {
		if s.db != nil {
			s.db.Close()
		}
		lock.Close()
		return nil, fmt.Errorf("opening the state in %s: %w", c.Dir, err)
	}
	return s, nil
}

func (s *Store) open() error {
	if err := checkHeader(s.dir, s.td); err != nil {
		return err
	}
	path := filepath.Join(s.dir, dbFile)
	clean, why := verifyMarker(s.dir)
	if !clean {
		if _, err := os.Lstat(path); err == nil {
			s.log.Warn("discarding the state: it will be rebuilt from the snapshot and the log", "file", path, "reason", why)
		}
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("discarding the state (%s): %w", why, err)
		}
	}
	// From here on the file may differ from what the marker vouches for. A crash before the removal is on disk
	// does no harm: the marker has the file's checksum.
	if err := os.Remove(filepath.Join(s.dir, markerFile)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("removing the clean-shutdown marker: %w", err)
	}
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{
		NoSync: true, NoGrowSync: true, NoFreelistSync: true, FreelistType: bbolt.FreelistMapType,
		// A write that has to grow the mapping waits for every open read, such as a snapshot being streamed.
		// This much address space (it costs no memory) keeps that from happening.
		InitialMmapSize: 1 << 30,
	})
	if err != nil {
		return fmt.Errorf("opening %s: %w; remove the folder's contents to have them rebuilt from the raft log", path, err)
	}
	s.db = db
	if err := db.Update(createBuckets); err != nil {
		return fmt.Errorf("preparing %s: %w", path, err)
	}
	return db.View(func(tx *bbolt.Tx) error {
		v, err := loadView(tx, s.td)
		if err != nil {
			return fmt.Errorf("loading %s: %w; remove the folder's contents to have them rebuilt from the raft log", path, err)
		}
		s.view, s.applied = v, v.revision
		return nil
	})
}

// Run waits until ctx ends (nil) or the store has stopped applying, and says why. A member must not go on then: it
// would not notice bans.
func (s *Store) Run(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return nil
	case <-s.stopped:
		return s.Err()
	}
}

// Err says why the store stopped applying; nil while it applies.
func (s *Store) Err() error {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.fault
}

// stop makes the store apply nothing any more.
func (s *Store) stop(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fault != nil {
		return
	}
	s.fault = fmt.Errorf("the store has stopped applying: %w", err)
	close(s.stopped)
	s.log.Error("the store has stopped applying", "error", err)
}

// Close waits for the batch being applied and for snapshots not yet released, ends all watches, and leaves the state
// for the next Open. Close raft first.
func (s *Store) Close() error {
	s.closeOnce.Do(func() {
		close(s.closed)
		s.applying.Lock()
		defer s.applying.Unlock()
		s.closeErr = errors.Join(s.closeState(), s.lock.Close())
	})
	return s.closeErr
}

// closeState writes the marker last: a crash or an error before it only costs the rebuild.
func (s *Store) closeState() error {
	if err := s.db.Sync(); err != nil {
		s.discard = true
		return errors.Join(fmt.Errorf("syncing the state: %w", err), s.db.Close())
	}
	if err := s.db.Close(); err != nil {
		return fmt.Errorf("closing the state: %w", err)
	}
	if s.discard {
		return nil
	}
	return writeMarker(s.dir, s.Level())
}
