package store

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"countersign.io/countersign/identity"
)

func (a *applier) createEntry(e *identity.Entry) (any, error) {
	r := &entryRecord{Created: a.index, Entry: *e}
	r.CreatedAt, r.ExpiresAt, r.Revision = a.now, e.ExpiresAt.UTC(), a.index
	a.since(&r.Entry, nil)
	if err := errors.Join(r.check(), a.mayBe(e)); err != nil {
		return nil, err
	}
	if a.table(kindEntry).Get([]byte(r.ID)) != nil {
		return nil, fmt.Errorf("%w: entry %s: choose another ID, or update that one", identity.ErrExists, r.ID)
	}
	if err := a.checkRule(&r.Entry); err != nil {
		return nil, err
	}
	if err := put(a.state, kindEntry, r.ID, r); err != nil {
		return nil, err
	}
	if err := a.indexEntry(r); err != nil {
		return nil, err
	}
	a.changed(change{putEntry: r})
	return &r.Entry, nil
}

// since is for the state to say, and only where every member keeps it.
func (a *applier) since(e, old *identity.Entry) {
	if e.PowerSince = (time.Time{}); a.level >= level2 {
		e.Since(old, a.now)
	}
}

func (a *applier) mayBe(e *identity.Entry) error {
	return needLevel(a.level, levelOfEntry(e), "a downstream entry, an admin's role, a managed entry, or a selector of labels or owners,")
}

func (a *applier) checkRule(e *identity.Entry) error {
	if owner := a.ruleOwner(e); owner != "" && owner != e.ID {
		return fmt.Errorf("%w: entry %s has the same selectors and the same SPIFFE ID %s: update that one", identity.ErrExists, owner, e.SPIFFEID)
	}
	return nil
}

func (a *applier) entry(id string) (*entryRecord, error) {
	r, err := get[entryRecord](a.state, kindEntry, id)
	if err == nil && r == nil {
		err = fmt.Errorf("%w: entry %s: list the entries to see which there are", identity.ErrNotFound, id)
	}
	return r, err
}

// updateEntry keeps the entry's place among those of a workload and its creation time. One that changes nothing
// gives the entry as it stands, with its revision: agents need not hear of it.
func (a *applier) updateEntry(d *updateEntryData) (any, error) {
	old, err := a.entry(d.Entry.ID)
	if err != nil {
		return nil, err
	}
	if d.IfRevision != 0 && d.IfRevision != old.Revision {
		return nil, fmt.Errorf("%w: entry %s is at revision %d, not %d: somebody changed it meanwhile; read it again",
			identity.ErrPrecondition, old.ID, old.Revision, d.IfRevision)
	}
	r := &entryRecord{Created: old.Created, Entry: d.Entry}
	r.CreatedAt, r.ExpiresAt, r.Revision = old.CreatedAt, d.Entry.ExpiresAt.UTC(), old.Revision
	a.since(&r.Entry, &old.Entry)
	if err := errors.Join(r.check(), a.mayBe(&d.Entry)); err != nil {
		return nil, err
	}
	if err := a.checkRule(&r.Entry); err != nil {
		return nil, err
	}
	if same(r, old) {
		return &old.Entry, nil
	}
	r.Revision = a.index
	if err := put(a.state, kindEntry, r.ID, r); err != nil {
		return nil, err
	}
	if err := errors.Join(a.unindexEntry(old), a.indexEntry(r)); err != nil {
		return nil, err
	}
	a.changed(change{putEntry: r})
	return &r.Entry, nil
}

// same compares as stored.
func same(a, b any) bool {
	x, errX := json.Marshal(a)
	y, errY := json.Marshal(b)
	return errX == nil && errY == nil && bytes.Equal(x, y)
}

func (a *applier) deleteEntryByID(d *keyData) (any, error) {
	r, err := a.entry(d.Key)
	if err != nil {
		return nil, err
	}
	return nil, a.removeEntry(r)
}

func (a *applier) removeEntry(r *entryRecord) error {
	if err := errors.Join(a.table(kindEntry).Delete([]byte(r.ID)), a.unindexEntry(r)); err != nil {
		return err
	}
	a.changed(change{deleteEntry: r.ID})
	return nil
}

// sweep removes what expired by the proposer's clock.
func (a *applier) sweep(d *sweepData) (any, error) {
	var res sweepResult
	err := a.due(a.now, d.Limit, func(k kind, key string) error {
		res.Removed++
		switch k {
		case kindEntry:
			r, err := a.entry(key)
			if err != nil {
				return fmt.Errorf("the expiry index is damaged: %v", err)
			}
			return a.removeEntry(r)
		case kindJoinToken:
			j, err := get[identity.JoinToken](a.state, k, key)
			if err != nil || j == nil {
				return fmt.Errorf("the expiry index is damaged: join token: %v", err)
			}
			return a.deleteToken(j)
		}
		return fmt.Errorf("the expiry index is damaged: kind %d", k)
	})
	if err == nil && a.level >= level2 {
		var n int
		n, err = a.sweepVouched(d.Limit - res.Removed)
		res.Removed += n
	}
	return res, err
}
