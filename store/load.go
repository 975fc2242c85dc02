package store

import (
	"fmt"
	"maps"
	"slices"

	"countersign.io/countersign/identity"
)

// loader fills the tables of an empty state from a snapshot's records. What follows from them it writes at the end and in
// the order of its keys: within one transaction bbolt takes keys out of order in quadratic time.
type loader struct {
	state
	rules    map[string]string // see bucketRules
	tokenIDs map[string]string
	expiry   map[string]string
}

func newLoader(t state) *loader {
	return &loader{state: t, rules: make(map[string]string), tokenIDs: make(map[string]string), expiry: make(map[string]string)}
}

// load stores a record as it is.
func (l *loader) load(k kind, key string, value []byte) error {
	switch k {
	case kindEntry:
		return load(l.state, k, key, value, func(r *entryRecord) (string, error) {
			rule := string(ruleKey(&r.Entry))
			if owner, ok := l.rules[rule]; ok {
				return "", fmt.Errorf("entry %s duplicates entry %s", r.ID, owner)
			}
			l.rules[rule] = r.ID
			if !r.ExpiresAt.IsZero() {
				l.expiry[string(expiryKey(r.ExpiresAt, k, r.ID))] = ""
			}
			return r.ID, r.check()
		})
	case kindKubeCluster:
		return load(l.state, k, key, value, func(r *identity.KubeCluster) (string, error) { return r.Name, nil })
	case kindJoinToken:
		return load(l.state, k, key, value, func(r *identity.JoinToken) (string, error) {
			if _, ok := l.tokenIDs[r.ID]; ok {
				return "", fmt.Errorf("two join tokens %s", r.ID)
			}
			l.tokenIDs[r.ID] = string(r.Hash)
			l.expiry[string(tokenExpiryKey(r))] = ""
			return string(r.Hash), checkToken(r)
		})
	case kindAgent:
		return load(l.state, k, key, value, func(r *identity.Agent) (string, error) { return r.ID, nil })
	case kindAuthority:
		return load(l.state, k, key, value, func(r *identity.Authority) (string, error) { return authorityKey(r), nil })
	case kindMember:
		return load(l.state, k, key, value, func(r *identity.Member) (string, error) { return r.ID, nil })
	}
	return fmt.Errorf("unknown kind of record %d: it may be a newer version's", k)
}

// load checks a record with a func that returns its key.
func load[T any](t state, k kind, key string, value []byte, check func(*T) (string, error)) error {
	v := new(T)
	if err := decodeStrict(value, v); err != nil {
		return err
	}
	own, err := check(v)
	if err != nil {
		return err
	}
	if own != key {
		return fmt.Errorf("the record of %q has the key %q", own, key)
	}
	return t.table(k).Put([]byte(key), value)
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
