package store

import (
	"bytes"
	"fmt"
	"slices"
	"strings"

	"countersign.io/countersign/identity"
)

type (
	putSealTermData struct {
		Number uint32 `json:"number"`
		KeyID  []byte `json:"key_id"`
	}
	// ackSealTermData names the key, so that an answer that comes late does not count for another key of that number.
	ackSealTermData struct {
		Number uint32 `json:"number"`
		KeyID  []byte `json:"key_id"`
		Member string `json:"member"`
	}
	sealTermData struct {
		Number uint32 `json:"number"`
	}
)

// sealKeyIDBytes is what seal.Keyring.KeyID gives.
const sealKeyIDBytes = 16

// sealTermKey sorts as numbers do.
func sealTermKey(n uint32) string { return fmt.Sprintf("%010d", n) }

func checkSealTerm(number uint32, keyID []byte) error {
	if number == 0 || len(keyID) != sealKeyIDBytes {
		return fmt.Errorf("%w: seal term %d with a key ID of %d bytes: want a number from 1 on, and %d bytes", identity.ErrInvalid, number, len(keyID), sealKeyIDBytes)
	}
	return nil
}

func (a *applier) sealTerms() ([]*identity.SealTerm, error) {
	return all[identity.SealTerm](a.state, kindSealTerm)
}

func (a *applier) sealTerm(number uint32) (*identity.SealTerm, error) {
	t, err := get[identity.SealTerm](a.state, kindSealTerm, sealTermKey(number))
	if err == nil && t == nil {
		err = fmt.Errorf("%w: seal term %d", identity.ErrNotFound, number)
	}
	return t, err
}

func (a *applier) storeSealTerm(t *identity.SealTerm) error {
	t.Revision = a.index
	return put(a.state, kindSealTerm, sealTermKey(t.Number), t)
}

func (a *applier) sealChanged() error {
	terms, err := a.sealTerms()
	a.changed(change{seal: terms, sealChanged: true})
	return err
}

// putSealTerm may be said again: the proposer may not have heard the answer.
func (a *applier) putSealTerm(d *putSealTermData) (any, error) {
	if err := checkSealTerm(d.Number, d.KeyID); err != nil {
		return nil, err
	}
	terms, err := a.sealTerms()
	if err != nil {
		return nil, err
	}
	for _, t := range terms {
		switch {
		case t.State == identity.SealPending && t.Number == d.Number && bytes.Equal(t.KeyID, d.KeyID):
			return t, nil
		case t.State == identity.SealPending:
			return nil, fmt.Errorf("%w: seal term %d is pending: let it become active, or drop it", identity.ErrPrecondition, t.Number)
		case t.Number >= d.Number:
			return nil, fmt.Errorf("%w: seal term %d: there is a term %d already, and numbers only go up", identity.ErrPrecondition, d.Number, t.Number)
		}
	}
	t := &identity.SealTerm{Number: d.Number, KeyID: d.KeyID, State: identity.SealPending, CreatedAt: a.now}
	if err := a.storeSealTerm(t); err != nil {
		return nil, err
	}
	return t, a.sealChanged()
}

func (a *applier) ackSealTerm(d *ackSealTermData) (any, error) {
	t, err := a.sealTerm(d.Number)
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(t.KeyID, d.KeyID) {
		return nil, fmt.Errorf("%w: seal term %d has another key than the one that %s says it keeps", identity.ErrPrecondition, d.Number, d.Member)
	}
	if a.table(kindMember).Get([]byte(d.Member)) == nil {
		return nil, fmt.Errorf("%w: member %s", identity.ErrNotFound, d.Member)
	}
	if t.State != identity.SealPending || slices.Contains(t.Holders, d.Member) {
		return t, nil
	}
	t.Holders = append(t.Holders, d.Member)
	slices.Sort(t.Holders)
	if err := a.storeSealTerm(t); err != nil {
		return nil, err
	}
	return t, a.sealChanged()
}

// activateSealTerm waits for every member on the list: one that lacks the key could not open what is sealed next.
func (a *applier) activateSealTerm(d *sealTermData) (any, error) {
	t, err := a.sealTerm(d.Number)
	switch {
	case err != nil:
		return nil, err
	case t.State == identity.SealActive:
		return t, nil
	case t.State != identity.SealPending:
		return nil, fmt.Errorf("%w: seal term %d is %s: only a pending one becomes active", identity.ErrPrecondition, t.Number, t.State)
	}
	members, err := all[identity.Member](a.state, kindMember)
	if err != nil {
		return nil, err
	}
	var missing []string
	for _, m := range members {
		if !slices.Contains(t.Holders, m.ID) {
			missing = append(missing, m.ID)
		}
	}
	if len(missing) > 0 || len(members) == 0 {
		return nil, fmt.Errorf("%w: seal term %d waits for members to fetch its key: %s", identity.ErrPrecondition, t.Number, strings.Join(missing, ", "))
	}
	terms, err := a.sealTerms()
	if err != nil {
		return nil, err
	}
	for _, old := range terms {
		if old.State != identity.SealActive {
			continue
		}
		old.State = identity.SealRetired
		if err := a.storeSealTerm(old); err != nil {
			return nil, err
		}
	}
	t.State = identity.SealActive
	if err := a.storeSealTerm(t); err != nil {
		return nil, err
	}
	return t, a.sealChanged()
}

func (a *applier) dropSealTerm(d *sealTermData) (any, error) {
	t, err := a.sealTerm(d.Number)
	if err != nil {
		return nil, err
	}
	if t.State == identity.SealActive {
		return nil, fmt.Errorf("%w: seal term %d is active: make another one active first", identity.ErrPrecondition, t.Number)
	}
	if err := a.table(kindSealTerm).Delete([]byte(sealTermKey(t.Number))); err != nil {
		return nil, err
	}
	return nil, a.sealChanged()
}

// forgetHolder is called when a member goes: one that comes under its name has another disk.
func (a *applier) forgetHolder(member string) error {
	terms, err := a.sealTerms()
	if err != nil {
		return err
	}
	for _, t := range terms {
		i := slices.Index(t.Holders, member)
		if t.State != identity.SealPending || i < 0 {
			continue
		}
		t.Holders = slices.Delete(t.Holders, i, i+1)
		if err := a.storeSealTerm(t); err != nil {
			return err
		}
		if err := a.sealChanged(); err != nil {
			return err
		}
	}
	return nil
}

// SealTerms returns the data keys of the seal that the cluster knows of, by number.
func (s *Store) SealTerms() []identity.SealTerm {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return values(s.view.seal)
}
