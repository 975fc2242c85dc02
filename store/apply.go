package store

import (
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.etcd.io/bbolt"

	"countersign.io/countersign/identity"
	"countersign.io/countersign/raft"
)

// change is what a command did, in the terms of the view and of its watchers.
type change struct {
	revision uint64

	putEntry    *entryRecord
	deleteEntry string // ID

	agent     *identity.Agent
	agentGone bool // banned (the record stays) or evicted (it does not)

	putKube    *identity.KubeCluster
	deleteKube string

	vouched *vouched // all of it, when not nil

	members        []*identity.Member // all of them
	membersChanged bool

	seal        []*identity.SealTerm // all of them
	sealChanged bool

	rotations        []*identity.Rotation // all of them, when not nil
	putFederation    *identity.Federation
	deleteFederation string

	level uint32 // when not 0
}

// ApplyBatch applies committed commands in order, in one transaction, and returns one result per entry. Entries
// at or below AppliedIndex were applied before a restart; their results are nil. It returns fewer results than entries
// when the store stops: at a command it does not know (what came before it stands), or because of the disk.
func (s *Store) ApplyBatch(entries []raft.Entry) [][]byte {
	s.applying.Lock()
	defer s.applying.Unlock()
	if s.Err() != nil {
		return nil
	}
	b, err := s.applyAll(entries)
	if err != nil {
		s.discard = true
		s.stop(err)
		return nil
	}
	if b.applied > s.applied {
		s.applied = b.applied
		s.publish(b.changes, b.applied)
	}
	if b.unknown != nil {
		s.stop(b.unknown)
	}
	return b.results
}

// batch is what applying entries came to.
type batch struct {
	results [][]byte
	changes []change
	applied uint64
	unknown error // why it went no further than results
}

// applyAll commits what it can. After an error nothing is committed.
func (s *Store) applyAll(entries []raft.Entry) (batch, error) {
	b := batch{applied: s.applied, results: make([][]byte, 0, len(entries))}
	tx, err := s.db.Begin(true)
	if err != nil {
		return b, fmt.Errorf("beginning a transaction: %w", err)
	}
	defer tx.Rollback() // does nothing once committed
	a, err := newApplier(tx, s.td)
	if err != nil {
		return b, err
	}
	for _, e := range entries {
		if e.Index <= b.applied {
			b.results = append(b.results, nil)
			continue
		}
		res, err := a.apply(e)
		if errors.Is(err, errUnknownCommand) {
			b.unknown = fmt.Errorf("log entry %d is %w", e.Index, err)
			break
		}
		if err != nil {
			return b, fmt.Errorf("applying log entry %d: %w", e.Index, err)
		}
		b.results, b.applied = append(b.results, res), e.Index
	}
	b.changes = a.changes
	if b.applied > s.applied {
		if err := errors.Join(a.setCounter(metaApplied, b.applied), tx.Commit()); err != nil {
			return b, fmt.Errorf("committing up to log entry %d: %w", b.applied, err)
		}
	}
	return b, nil
}

// AppliedIndex is the log index of the last applied command; 0 for an empty store.
func (s *Store) AppliedIndex() (uint64, error) {
	s.applying.Lock()
	defer s.applying.Unlock()
	return s.applied, nil
}

// applier runs the commands of one batch. A command checks everything before it changes anything: one that is
// refused leaves no trace but its index.
type applier struct {
	state
	td      spiffeid.TrustDomain
	level   uint32    // of the cluster, as of the command at hand
	index   uint64    // of the command at hand
	now     time.Time // its proposer's
	changes []change
}

func newApplier(tx *bbolt.Tx, td spiffeid.TrustDomain) (*applier, error) {
	a := &applier{state: state{tx}, td: td}
	var err error
	if a.level, err = a.state.level(); err != nil {
		return nil, fmt.Errorf("reading the cluster's level: %w", err)
	}
	return a, nil
}

func (a *applier) apply(e raft.Entry) ([]byte, error) {
	c, h, err := decode(e.Data)
	if err != nil {
		return nil, err
	}
	a.index, a.now = e.Index, c.Time.UTC()
	v, err := h.apply(a, c.Data)
	if err == nil {
		return success(v)
	}
	if raw, ok := refusal(err); ok {
		return raw, nil
	}
	return nil, err
}

func (a *applier) changed(c change) {
	c.revision = a.index
	a.changes = append(a.changes, c)
}
