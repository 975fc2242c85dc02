package store

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.etcd.io/bbolt"

	"countersign.io/countersign/identity"
	"countersign.io/countersign/raft"
)

// Log is where commands become the state. Propose returns what ApplyBatch answered for the command, after it was
// applied on this member too, so that a read that follows sees the write. An error means that the command may or may
// not have been applied, unless the error says otherwise.
type Log interface {
	Propose(ctx context.Context, cmd []byte) ([]byte, error)
}

// Writer changes the state through the log. Its methods check their input, wait for the command to be applied, and
// wrap an identity sentinel in their errors; a log that cannot be reached is identity.ErrUnavailable, and the cause is
// wrapped as well.
type Writer struct {
	store *Store
	log   Log
}

// Writer makes a Writer that proposes to the log.
func (s *Store) Writer(log Log) *Writer { return &Writer{store: s, log: log} }

// propose answers with the command's result, decoded to T.
func propose[T any](ctx context.Context, w *Writer, typ string, now time.Time, data any) (T, error) {
	var out T
	cmd, err := encodeCommand(typ, now, data)
	if err != nil {
		return out, err
	}
	raw, err := w.log.Propose(ctx, cmd)
	if err != nil {
		if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
			return out, fmt.Errorf("proposing %s: %w", typ, err)
		}
		if errors.Is(err, raft.ErrRefused) { // the leader runs an older version: see Check
			return out, fmt.Errorf("%w: proposing %s: %w", identity.ErrPrecondition, typ, err)
		}
		return out, fmt.Errorf("%w: proposing %s: %w", identity.ErrUnavailable, typ, err)
	}
	if _, none := any(out).(nothing); none {
		return out, decodeResult(raw, nil)
	}
	err = decodeResult(raw, &out)
	return out, err
}

// nothing is the result of a command that answers with success alone.
type nothing struct{}

func (w *Writer) do(ctx context.Context, typ string, now time.Time, data any) error {
	_, err := propose[nothing](ctx, w, typ, now, data)
	return err
}

// CreateEntry stores a new entry under the ID that the caller chose, and returns it with its creation time and
// revision. ErrExists: the ID is taken, or another entry (named) has the same selectors and SPIFFE ID.
func (w *Writer) CreateEntry(ctx context.Context, now time.Time, e identity.Entry) (identity.Entry, error) {
	if err := w.checkEntry(&e); err != nil {
		return identity.Entry{}, err
	}
	if e.Expired(now) {
		return identity.Entry{}, fmt.Errorf("%w: the entry expires at %s, which is past", identity.ErrInvalid, e.ExpiresAt.Format(time.RFC3339))
	}
	return propose[identity.Entry](ctx, w, createEntry, now, e)
}

// UpdateEntry replaces all that an entry says but its ID and creation time. ErrPrecondition: ifRevision is not zero
// and not the entry's revision any more.
func (w *Writer) UpdateEntry(ctx context.Context, now time.Time, e identity.Entry, ifRevision uint64) (identity.Entry, error) {
	if err := w.checkEntry(&e); err != nil {
		return identity.Entry{}, err
	}
	return propose[identity.Entry](ctx, w, updateEntry, now, updateEntryData{Entry: e, IfRevision: ifRevision})
}

// DeleteEntry removes an entry; ErrNotFound.
func (w *Writer) DeleteEntry(ctx context.Context, id string) error {
	return w.do(ctx, deleteEntry, time.Time{}, keyData{id})
}

// PutKubeCluster registers a kube cluster, or replaces the one of the same name if told to; ErrExists otherwise.
func (w *Writer) PutKubeCluster(ctx context.Context, k identity.KubeCluster, replace bool) (identity.KubeCluster, error) {
	if err := identity.CheckKubeCluster(w.store.td, &k); err != nil {
		return identity.KubeCluster{}, err
	}
	if err := w.need(levelOfKube(&k), "a managed kube cluster"); err != nil {
		return identity.KubeCluster{}, err
	}
	return propose[identity.KubeCluster](ctx, w, putKubeCluster, time.Time{}, putKubeClusterData{KubeCluster: k, Replace: replace})
}

// DeleteKubeCluster removes a registration, and evicts the agents that were attested by that cluster's tokens; ErrNotFound.
func (w *Writer) DeleteKubeCluster(ctx context.Context, name string) error {
	return w.do(ctx, deleteKubeCluster, time.Time{}, keyData{name})
}

// CreateJoinToken remembers a join secret by its hash.
func (w *Writer) CreateJoinToken(ctx context.Context, t identity.JoinToken) error {
	if err := checkNewToken(&t); err != nil {
		return err
	}
	return w.do(ctx, createJoinToken, time.Time{}, t)
}

// UseJoinToken admits the bearer of the secret with that SHA-256, once. ErrUnauthenticated: there is no such token or it
// has expired; ErrPrecondition: it was used; ErrDenied: it is for another purpose (and is not used up).
func (w *Writer) UseJoinToken(ctx context.Context, now time.Time, hash []byte, purpose string) (identity.JoinToken, error) {
	return propose[identity.JoinToken](ctx, w, useJoinToken, now, useJoinTokenData{Hash: hash, Purpose: purpose})
}

// PutAgent records an attested agent, new or again; ErrDenied if it is banned. The record's Banned is ignored.
func (w *Writer) PutAgent(ctx context.Context, a identity.Agent) (identity.Agent, error) {
	if err := w.checkAgent(&a); err != nil {
		return identity.Agent{}, err
	}
	return propose[identity.Agent](ctx, w, putAgent, time.Time{}, a)
}

// BanAgent keeps an agent out for good; banning again does nothing. ErrNotFound.
func (w *Writer) BanAgent(ctx context.Context, id string) error {
	return w.do(ctx, banAgent, time.Time{}, keyData{id})
}

// EvictAgent forgets an agent, which must attest again. ErrNotFound; ErrPrecondition: it is banned.
func (w *Writer) EvictAgent(ctx context.Context, id string) error {
	return w.do(ctx, evictAgent, time.Time{}, keyData{id})
}

// CreateAuthority stores an authority, its key already sealed, and returns the one to use: the active one of that
// kind if there was one.
func (w *Writer) CreateAuthority(ctx context.Context, a identity.Authority) (identity.Authority, error) {
	if err := w.checkAuthority(&a); err != nil {
		return identity.Authority{}, err
	}
	return propose[identity.Authority](ctx, w, createAuthority, time.Time{}, a)
}

// PutMember registers a member or its new address.
func (w *Writer) PutMember(ctx context.Context, m identity.Member) error {
	if err := w.checkMember(&m); err != nil {
		return err
	}
	return w.do(ctx, putMember, time.Time{}, m)
}

// RemoveMember removes a member's registration; ErrNotFound.
func (w *Writer) RemoveMember(ctx context.Context, id string) error {
	return w.do(ctx, removeMember, time.Time{}, keyData{id})
}

// sweepBatch bounds the removals of one command.
const sweepBatch = 500

// Sweep removes the entries that have expired at now and the join tokens that expired a day before; from level 2 on the
// retiring authorities and the other clusters' JWT keys that have expired, too. It costs no write when there is nothing to remove. Call it on the leader, every minute or so.
func (w *Writer) Sweep(ctx context.Context, now time.Time) error {
	for w.store.anyDue(now) {
		res, err := propose[sweepResult](ctx, w, sweep, now, sweepData{Limit: sweepBatch})
		if err != nil {
			return err
		}
		if res.Removed == 0 {
			return nil
		}
	}
	return nil
}

func (s *Store) anyDue(now time.Time) bool {
	s.mu.RLock()
	ended := s.view.level >= level2 && s.view.sweepable(now)
	s.mu.RUnlock()
	if ended {
		return true
	}
	found := errors.New("found")
	return s.db.View(func(tx *bbolt.Tx) error {
		return state{tx}.due(now, 1, func(kind, string) error { return found })
	}) == found
}
