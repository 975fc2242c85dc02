package store

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"time"

	"go.etcd.io/bbolt"

	"countersign.io/countersign/identity"
)

// entryRecord is an entry with the index of the command that created it, which orders a workload's entries.
type entryRecord struct {
	Created uint64 `json:"created"`
	identity.Entry
}

// kind numbers the tables in snapshots: never change one.
type kind byte

const (
	kindEnd kind = iota // of a snapshot
	kindEntry
	kindKubeCluster
	kindJoinToken
	kindAgent
	kindAuthority
	kindMember

	// From level 2 on.
	kindCluster
	kindSealTerm
	kindForeign
	kindRotation
	kindFederation
)

// bucket is where the kind's records are, by the key that the loader's check returns for each.
func (k kind) bucket() []byte {
	switch k {
	case kindEntry:
		return []byte("entries")
	case kindKubeCluster:
		return []byte("kube_clusters")
	case kindJoinToken:
		return []byte("join_tokens")
	case kindAgent:
		return []byte("agents")
	case kindAuthority:
		return []byte("authorities")
	case kindMember:
		return []byte("members")
	case kindCluster:
		return []byte("cluster")
	case kindSealTerm:
		return []byte("seal_terms")
	case kindForeign:
		return []byte("foreign")
	case kindRotation:
		return []byte("rotations")
	case kindFederation:
		return []byte("federations")
	}
	return nil
}

// kinds are those of the tables, whose contents are the state, in the order of snapshots.
func kinds() []kind {
	return []kind{kindEntry, kindKubeCluster, kindJoinToken, kindAgent, kindAuthority, kindMember, kindCluster, kindSealTerm, kindForeign, kindRotation, kindFederation}
}

// The buckets that follow from the tables, and so are not in snapshots.
const (
	bucketRules    = "entries_by_rule" // hash of selectors and ID template -> entry ID
	bucketTokenIDs = "join_tokens_by_id"
	bucketExpiry   = "expiry" // see expiryKey -> nothing
)

// bucketMeta holds counters, 8 bytes big-endian each.
const (
	bucketMeta   = "meta"
	metaApplied  = "applied"
	metaSequence = "bundle_sequence"
)

// maxKeyBytes is above what a Writer lets through (a SPIFFE ID of 2048 bytes) and below what bbolt takes.
const maxKeyBytes = 4096

// tokenMemory is for how long after its expiry a join token is remembered, so that using one again is told from
// using one that never was.
const tokenMemory = 24 * time.Hour

func createBuckets(tx *bbolt.Tx) error {
	names := [][]byte{[]byte(bucketMeta), []byte(bucketRules), []byte(bucketTokenIDs), []byte(bucketExpiry)}
	for _, k := range kinds() {
		names = append(names, k.bucket())
	}
	for _, name := range names {
		if _, err := tx.CreateBucketIfNotExists(name); err != nil {
			return err
		}
	}
	return nil
}

// state is one transaction, seen as typed tables. An error of its methods that wraps no identity sentinel means
// that the file is damaged or the disk fails.
type state struct{ tx *bbolt.Tx }

func (t state) table(k kind) *bbolt.Bucket { return t.tx.Bucket(k.bucket()) }

// get returns nil when there is no such key.
func get[T any](t state, k kind, key string) (*T, error) {
	raw := t.table(k).Get([]byte(key))
	if raw == nil {
		return nil, nil
	}
	v := new(T)
	if err := decodeStrict(raw, v); err != nil {
		return nil, fmt.Errorf("reading %s %q: %w", k.bucket(), key, err)
	}
	return v, nil
}

func put(t state, k kind, key string, v any) error {
	raw, err := json.Marshal(v)
	if err != nil { // a time out of the years 0 to 9999, and nothing else
		return fmt.Errorf("%w: %v", identity.ErrInvalid, err)
	}
	return t.table(k).Put([]byte(key), raw)
}

// storable is for a command that puts two records: it checks both before it puts the first.
func storable(v any) error {
	if _, err := json.Marshal(v); err != nil {
		return fmt.Errorf("%w: %v", identity.ErrInvalid, err)
	}
	return nil
}

func checkKey(what, key string) error {
	if key == "" || len(key) > maxKeyBytes {
		return fmt.Errorf("%w: %s of %d bytes: want 1 to %d", identity.ErrInvalid, what, len(key), maxKeyBytes)
	}
	return nil
}

func (t state) counter(name string) uint64 {
	if raw := t.tx.Bucket([]byte(bucketMeta)).Get([]byte(name)); len(raw) == 8 {
		return binary.BigEndian.Uint64(raw)
	}
	return 0
}

func (t state) setCounter(name string, v uint64) error {
	return t.tx.Bucket([]byte(bucketMeta)).Put([]byte(name), binary.BigEndian.AppendUint64(nil, v))
}

// check is the least that the tables rely on; it never gets stricter or looser within a command version.
func (r *entryRecord) check() error {
	if err := checkKey("entry ID", r.ID); err != nil {
		return err
	}
	if len(r.Selectors) == 0 || !slices.IsSorted(r.Selectors) || len(slices.Compact(slices.Clone(r.Selectors))) != len(r.Selectors) {
		return fmt.Errorf("%w: entry %s: its selectors are not a sorted set", identity.ErrInvalid, r.ID)
	}
	return nil
}

// ruleKey is equal for entries that are duplicates of each other.
func ruleKey(e *identity.Entry) []byte {
	h := sha256.New()
	var n [8]byte
	write := func(s string) {
		h.Write(binary.BigEndian.AppendUint64(n[:0], uint64(len(s))))
		h.Write([]byte(s))
	}
	write(e.SPIFFEID)
	for _, s := range e.Selectors {
		write(string(s))
	}
	return h.Sum(nil)
}

// ruleOwner is the ID of the entry with the same selectors and ID template; empty if there is none.
func (t state) ruleOwner(e *identity.Entry) string {
	return string(t.tx.Bucket([]byte(bucketRules)).Get(ruleKey(e)))
}

func (t state) indexEntry(r *entryRecord) error {
	err := t.tx.Bucket([]byte(bucketRules)).Put(ruleKey(&r.Entry), []byte(r.ID))
	if err == nil && !r.ExpiresAt.IsZero() {
		err = t.expiry().Put(expiryKey(r.ExpiresAt, kindEntry, r.ID), nil)
	}
	return err
}

func (t state) unindexEntry(r *entryRecord) error {
	err := t.tx.Bucket([]byte(bucketRules)).Delete(ruleKey(&r.Entry))
	if err == nil && !r.ExpiresAt.IsZero() {
		err = t.expiry().Delete(expiryKey(r.ExpiresAt, kindEntry, r.ID))
	}
	return err
}

func (t state) putToken(j *identity.JoinToken) error {
	if err := put(t, kindJoinToken, string(j.Hash), j); err != nil {
		return err
	}
	return errors.Join(
		t.tx.Bucket([]byte(bucketTokenIDs)).Put([]byte(j.ID), j.Hash),
		t.expiry().Put(tokenExpiryKey(j), nil))
}

func (t state) deleteToken(j *identity.JoinToken) error {
	return errors.Join(
		t.table(kindJoinToken).Delete(j.Hash),
		t.tx.Bucket([]byte(bucketTokenIDs)).Delete([]byte(j.ID)),
		t.expiry().Delete(tokenExpiryKey(j)))
}

func tokenExpiryKey(j *identity.JoinToken) []byte {
	return expiryKey(j.ExpiresAt.Add(tokenMemory), kindJoinToken, string(j.Hash))
}

func checkToken(j *identity.JoinToken) error {
	if len(j.Hash) != sha256.Size {
		return fmt.Errorf("%w: join token %s: hash of %d bytes, not %d", identity.ErrInvalid, j.ID, len(j.Hash), sha256.Size)
	}
	return checkKey("join token ID", j.ID)
}

func authorityKey(a *identity.Authority) string { return string(a.Kind) + "/" + a.ID }

func (t state) expiry() *bbolt.Bucket { return t.tx.Bucket([]byte(bucketExpiry)) }

// expiryKey sorts by the first whole second at which the record is to be swept.
func expiryKey(at time.Time, k kind, key string) []byte {
	sec := at.Unix()
	if at.Nanosecond() > 0 {
		sec++
	}
	out := binary.BigEndian.AppendUint64(nil, uint64(sec)^(1<<63)) // flips the sign, so that bytes sort as numbers do
	return append(append(out, byte(k)), key...)
}

// due calls f for what expired by now, oldest first, at the most limit times.
func (t state) due(now time.Time, limit int, f func(k kind, key string) error) error {
	end := binary.BigEndian.AppendUint64(nil, uint64(min(now.Unix(), math.MaxInt64-1)+1)^(1<<63))
	var found [][]byte
	c := t.expiry().Cursor()
	for k, _ := c.First(); k != nil && len(found) < limit && bytes.Compare(k, end) < 0; k, _ = c.Next() {
		found = append(found, bytes.Clone(k)) // not removed under the cursor
	}
	for _, k := range found {
		if err := f(kind(k[8]), string(k[9:])); err != nil {
			return err
		}
	}
	return nil
}

// all decodes a table in key order.
func all[T any](t state, k kind) ([]*T, error) {
	var out []*T
	err := t.table(k).ForEach(func(key, raw []byte) error {
		v := new(T)
		if err := decodeStrict(raw, v); err != nil {
			return fmt.Errorf("reading %s %q: %w", k.bucket(), key, err)
		}
		out = append(out, v)
		return nil
	})
	return out, err
}
