package store

import (
	"bytes"
	"fmt"
	"maps"
	"slices"

	"countersign.io/countersign/identity"
)

// loader fills the tables of an empty state from a snapshot's records. What follows from them it writes at the end and in
// the order of its keys: within one transaction bbolt takes keys out of order in quadratic time.
type loader struct {
	state
	recordChecker
	rules    map[string]string // see bucketRules
	tokenIDs map[string]string
	expiry   map[string]string
}

func newLoader(t state) *loader {
	return &loader{state: t, rules: make(map[string]string), tokenIDs: make(map[string]string), expiry: make(map[string]string)}
}

// load stores a record as it is.
func (l *loader) load(k kind, key string, value []byte) error {
	v, err := l.decode(k, key, value)
	if err != nil {
		return err
	}
	switch r := v.(type) {
	case *entryRecord:
		rule := string(ruleKey(&r.Entry))
		if owner, ok := l.rules[rule]; ok {
			return fmt.Errorf("entry %s duplicates entry %s", r.ID, owner)
		}
		l.rules[rule] = r.ID
		if !r.ExpiresAt.IsZero() {
			l.expiry[string(expiryKey(r.ExpiresAt, k, r.ID))] = ""
		}
	case *identity.JoinToken:
		if _, ok := l.tokenIDs[r.ID]; ok {
			return fmt.Errorf("two join tokens %s", r.ID)
		}
		l.tokenIDs[r.ID] = string(r.Hash)
		l.expiry[string(tokenExpiryKey(r))] = ""
	}
	return l.table(k).Put([]byte(key), bytes.Clone(value)) // bbolt keeps it until the transaction ends
}

// recordChecker goes through a snapshot's records, and knows what level they need.
type recordChecker struct {
	level  uint32 // that the records say; 0: none, which is 1
	needed uint32
}

// decode gives a record as a pointer to its type.
func (c *recordChecker) decode(k kind, key string, value []byte) (any, error) {
	switch k {
	case kindEntry:
		return decodeRecord(key, value, func(r *entryRecord) (string, error) {
			c.needed = max(c.needed, levelOfEntry(&r.Entry))
			return r.ID, r.check()
		})
	case kindKubeCluster:
		return decodeRecord(key, value, func(r *identity.KubeCluster) (string, error) {
			c.needed = max(c.needed, levelOfKube(r))
			return r.Name, nil
		})
	case kindJoinToken:
		return decodeRecord(key, value, func(r *identity.JoinToken) (string, error) { return string(r.Hash), checkToken(r) })
	case kindAgent:
		return decodeRecord(key, value, func(r *identity.Agent) (string, error) {
			if !r.FirstAt.IsZero() {
				c.needed = max(c.needed, level2)
			}
			return r.ID, nil
		})
	case kindAuthority:
		return decodeRecord(key, value, func(r *identity.Authority) (string, error) {
			c.needed = max(c.needed, levelOfAuthority(r))
			return authorityKey(r), nil
		})
	case kindMember:
		return decodeRecord(key, value, func(r *identity.Member) (string, error) { return r.ID, nil })
	case kindCluster:
		return decodeRecord(key, value, func(r *clusterRecord) (string, error) {
			c.level = r.Level
			return clusterKey, r.check()
		})
	case kindSealTerm:
		c.needed = max(c.needed, level2)
		return decodeRecord(key, value, func(r *identity.SealTerm) (string, error) {
			return sealTermKey(r.Number), checkSealTerm(r.Number, r.KeyID)
		})
	case kindForeign:
		c.needed = max(c.needed, level2)
		return decodeRecord(key, value, func(r *identity.Foreign) (string, error) { return r.Source, nil })
	case kindRotation:
		c.needed = max(c.needed, level2)
		return decodeRecord(key, value, func(r *identity.Rotation) (string, error) { return string(r.Kind), r.Check() })
	case kindFederation:
		c.needed = max(c.needed, level2)
		return decodeRecord(key, value, func(r *identity.Federation) (string, error) { return r.TrustDomain, checkFederationRecord(r) })
	}
	return nil, fmt.Errorf("unknown kind of record %d: it may be a newer version's", k)
}

// end is called after the last record.
func (c *recordChecker) end() error {
	if have := max(c.level, 1); c.needed > have {
		return fmt.Errorf("%w: the snapshot has level %d, and records in it that level %d brought", identity.ErrInvalid, have, c.needed)
	}
	return nil
}

// decodeRecord checks a record with a func that returns its key.
func decodeRecord[T any](key string, value []byte, check func(*T) (string, error)) (*T, error) {
	v := new(T)
	if err := decodeStrict(value, v); err != nil {
		return nil, err
	}
	own, err := check(v)
	if err != nil {
		return nil, err
	}
	if own != key {
		return nil, fmt.Errorf("the record of %q has the key %q", own, key)
	}
	return v, nil
}

func (l *loader) finish() error {
	for bucket, rows := range map[string]map[string]string{bucketRules: l.rules, bucketTokenIDs: l.tokenIDs, bucketExpiry: l.expiry} {
		for _, key := range slices.Sorted(maps.Keys(rows)) {
			if err := l.tx.Bucket([]byte(bucket)).Put([]byte(key), []byte(rows[key])); err != nil {
				return fmt.Errorf("restoring %s: %w", bucket, err)
			}
		}
	}
	return nil
}
