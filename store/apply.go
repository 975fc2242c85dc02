package store

import (
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

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

	authorities []*identity.Authority // all of them, when not nil
	bundle      *identity.Bundle

	members        []*identity.Member // all of them
	membersChanged bool
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
	a := applier{state: state{tx}, td: s.td}
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
	index   uint64    // of the command at hand
	now     time.Time // its proposer's
	changes []change
}

func (a *applier) apply(e raft.Entry) ([]byte, error) {
	c, err := decodeCommand(e.Data)
	if err != nil {
		return nil, err
	}
	a.index, a.now = e.Index, c.Time.UTC()
	switch c.Type {
	case createEntry:
		return run(c, a.createEntry)
	case updateEntry:
		return run(c, a.updateEntry)
	case deleteEntry:
		return run(c, a.deleteEntryByID)
	case putKubeCluster:
		return run(c, a.putKubeCluster)
	case deleteKubeCluster:
		return run(c, a.deleteKubeCluster)
	case createJoinToken:
		return run(c, a.createJoinToken)
	case useJoinToken:
		return run(c, a.useJoinToken)
	case putAgent:
		return run(c, a.putAgent)
	case banAgent:
		return run(c, a.banAgent)
	case evictAgent:
		return run(c, a.evictAgent)
	case createAuthority:
		return run(c, a.createAuthority)
	case putMember:
		return run(c, a.putMember)
	case removeMember:
		return run(c, a.removeMember)
	case sweep:
		return run(c, a.sweep)
	}
	return nil, fmt.Errorf("%w (command %q)", errUnknownCommand, c.Type)
}

// run decodes the command's data, applies it and encodes the result. The error is for faults of this member.
func run[T any](c command, f func(*T) (any, error)) ([]byte, error) {
	data := new(T)
	if err := decodeStrict(c.Data, data); err != nil {
		return nil, fmt.Errorf("%w (%s: %v)", errUnknownCommand, c.Type, err)
	}
	v, err := f(data)
	if err != nil {
		raw, ok := refusal(err)
		if !ok {
			return nil, err
		}
		return raw, nil
	}
	return success(v)
}

func (a *applier) changed(c change) {
	c.revision = a.index
	a.changes = append(a.changes, c)
}
