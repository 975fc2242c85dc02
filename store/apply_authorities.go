package store

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"time"

	"countersign.io/countersign/identity"
)

type (
	resealData struct {
		Kind       identity.AuthorityKind `json:"kind"`
		ID         string                 `json:"id"`
		SealedKey  []byte                 `json:"sealed_key"`
		IfRevision uint64                 `json:"if_revision,omitempty"` // 0: any
	}
	authorityData struct {
		Kind identity.AuthorityKind `json:"kind"`
		ID   string                 `json:"id"`
	}
	activateData struct {
		Kind identity.AuthorityKind `json:"kind"`
		ID   string                 `json:"id"`
		Back bool                   `json:"back,omitempty"` // one that signed before signs again
	}
	taintData struct {
		Kind   identity.AuthorityKind `json:"kind"`
		ID     string                 `json:"id"`
		Spread time.Duration          `json:"spread,omitempty"`
		// Compromised: its word for others is worth nothing.
		Compromised bool `json:"compromised,omitempty"`
	}
)

// maxSpread bounds how long the replacing of what a tainted authority signed may be put off.
const maxSpread = time.Hour

// createAuthority answers with the active authority of the kind if there is one: two leaders in a row that both
// made one end up with the same.
func (a *applier) createAuthority(r *identity.Authority) (any, error) {
	before, err := a.checkNewAuthority(r)
	if err != nil {
		return nil, err
	}
	for _, b := range before.authorities {
		if b.Kind == r.Kind && b.State == identity.AuthorityActive {
			return b, nil
		}
		if b.Kind == r.Kind && b.ID == r.ID {
			break // the answers stay those of level 1
		}
	}
	return a.addAuthority(before, r)
}

func (a *applier) checkNewAuthority(r *identity.Authority) (*vouched, error) {
	err := errors.Join(checkKey("authority ID", r.ID), checkKey("authority kind", string(r.Kind)))
	if err == nil {
		err = needLevel(a.level, levelOfAuthority(r), "an authority below an upstream, or with its key elsewhere,")
	}
	if err != nil {
		return nil, err
	}
	return a.vouched()
}

func (a *applier) addAuthority(before *vouched, r *identity.Authority) (any, error) {
	for _, b := range before.authorities {
		if b.Kind == r.Kind && b.ID == r.ID {
			return nil, fmt.Errorf("%w: authority %s", identity.ErrExists, authorityKey(r))
		}
	}
	if r.Kind == identity.AuthorityJWT {
		for _, f := range before.foreign {
			if err := clash(f, r.ID, r.PublicKey); err != nil {
				return nil, err
			}
		}
	}
	r.NotBefore, r.NotAfter, r.Revision = r.NotBefore.UTC(), r.NotAfter.UTC(), a.index
	if err := put(a.state, kindAuthority, authorityKey(r), r); err != nil {
		return nil, err
	}
	return r, a.vouchedChanged(before)
}

func (a *applier) prepareAuthority(r *identity.Authority) (any, error) {
	if r.State != identity.AuthorityPrepared {
		return nil, fmt.Errorf("%w: authority %s is to be prepared, and its state is %q", identity.ErrInvalid, authorityKey(r), r.State)
	}
	before, err := a.checkNewAuthority(r)
	if err != nil {
		return nil, err
	}
	r.PreparedAt, r.Sequence = a.now, before.bundle.Sequence
	if !vouchesFor(before.bundle, r) {
		r.Sequence++ // what vouchedChanged will make it
	}
	return a.addAuthority(before, r)
}

// vouchesFor reports whether the bundle has all that an authority adds to it.
func vouchesFor(b *identity.Bundle, r *identity.Authority) bool {
	if r.Kind == identity.AuthorityJWT {
		_, ok := b.JWT[r.ID]
		return ok
	}
	certs := r.Roots
	if len(certs) == 0 {
		certs = [][]byte{r.Cert}
	}
	certs = certs[:1] // what it signs is verified by this one
	for _, c := range certs {
		if !slices.ContainsFunc(b.X509, func(x []byte) bool { return bytes.Equal(x, c) }) {
			return false
		}
	}
	return true
}

func (v *vouched) authority(kind identity.AuthorityKind, id string) (*identity.Authority, error) {
	for _, r := range v.authorities {
		if r.Kind == kind && r.ID == id {
			return r, nil
		}
	}
	return nil, fmt.Errorf("%w: authority %s/%s", identity.ErrNotFound, kind, id)
}

// activateAuthority has one active authority of the kind at every moment: both changes are one command.
func (a *applier) activateAuthority(d *activateData) (any, error) {
	before, err := a.vouched()
	if err != nil {
		return nil, err
	}
	r, err := before.authority(d.Kind, d.ID)
	switch {
	case err != nil:
		return nil, err
	case r.State == identity.AuthorityActive:
		return r, nil
	case r.State == identity.AuthorityPrepared && !d.Back:
	case d.Back && (r.State == identity.AuthorityRetiring || r.State == identity.AuthorityTainted):
	case d.Back:
		return nil, fmt.Errorf("%w: authority %s is %s: only what signed before, and is not revoked, can sign again", identity.ErrPrecondition, authorityKey(r), r.State)
	default:
		return nil, fmt.Errorf("%w: authority %s is %s: only a prepared one becomes active; prepare another one", identity.ErrPrecondition, authorityKey(r), r.State)
	}
	now := *r
	now.State, now.Revision, now.ActivatedAt = identity.AuthorityActive, a.index, a.now
	now.RetiredAt, now.TaintedAt, now.Spread = time.Time{}, time.Time{}, 0
	if err := storable(now); err != nil {
		return nil, err
	}
	for _, b := range before.authorities {
		if b.Kind != d.Kind || b.State != identity.AuthorityActive {
			continue
		}
		old := *b
		old.State, old.Revision, old.RetiredAt = identity.AuthorityRetiring, a.index, a.now
		if err := put(a.state, kindAuthority, authorityKey(&old), old); err != nil {
			return nil, err
		}
	}
	return a.replaceAuthority(before, &now)
}

// replaceAuthority puts an authority in the place of what it was before.
func (a *applier) replaceAuthority(before *vouched, r *identity.Authority) (any, error) {
	r.Revision = a.index
	if err := put(a.state, kindAuthority, authorityKey(r), r); err != nil {
		return nil, err
	}
	return r, a.vouchedChanged(before)
}

// taintAuthority gives up an authority that signs no longer. One that signs cannot be: nobody could replace what it signed.
func (a *applier) taintAuthority(d *taintData) (any, error) {
	if d.Spread < 0 || d.Spread > maxSpread {
		return nil, fmt.Errorf("%w: a spread of %v: want 0 to %v", identity.ErrInvalid, d.Spread, maxSpread)
	}
	before, err := a.vouched()
	if err != nil {
		return nil, err
	}
	r, err := before.authority(d.Kind, d.ID)
	switch {
	case err != nil:
		return nil, err
	case r.State == identity.AuthorityTainted && !d.Compromised:
		return r, nil
	case r.State != identity.AuthorityRetiring && r.State != identity.AuthorityTainted:
		return nil, fmt.Errorf("%w: authority %s is %s: only a retiring one is tainted; activate another one first", identity.ErrPrecondition, authorityKey(r), r.State)
	}
	if d.Compromised { // each of those that vouch for others does so by way of the last one that signed
		for _, b := range before.authorities {
			if b.Kind != d.Kind || len(b.Vouched) == 0 {
				continue
			}
			b := *b
			b.Vouched, b.Revision = nil, a.index
			if err := put(a.state, kindAuthority, authorityKey(&b), b); err != nil {
				return nil, err
			}
			if b.ID == r.ID {
				r = &b
			}
		}
	}
	now := *r
	now.State, now.TaintedAt, now.Spread = identity.AuthorityTainted, a.now, d.Spread
	return a.replaceAuthority(before, &now)
}

// revokeAuthority takes an authority that signs no longer out of the bundle, and its key out of the state.
func (a *applier) revokeAuthority(d *authorityData) (any, error) {
	before, err := a.vouched()
	if err != nil {
		return nil, err
	}
	r, err := before.authority(d.Kind, d.ID)
	switch {
	case err != nil:
		return nil, err
	case r.State == identity.AuthorityRevoked:
		return r, nil
	case r.State != identity.AuthorityRetiring && r.State != identity.AuthorityTainted:
		return nil, fmt.Errorf("%w: authority %s is %s: only a retiring or tainted one is revoked; activate another one first", identity.ErrPrecondition, authorityKey(r), r.State)
	}
	now := *r
	now.State, now.RevokedAt, now.SealedKey = identity.AuthorityRevoked, a.now, nil
	return a.replaceAuthority(before, &now)
}

func (a *applier) resealAuthority(d *resealData) (any, error) {
	before, err := a.vouched()
	if err != nil {
		return nil, err
	}
	r, err := before.authority(d.Kind, d.ID)
	switch {
	case err != nil:
		return nil, err
	case d.IfRevision != 0 && d.IfRevision != r.Revision:
		return nil, fmt.Errorf("%w: authority %s is at revision %d, not %d: somebody changed it meanwhile; read it again",
			identity.ErrPrecondition, authorityKey(r), r.Revision, d.IfRevision)
	case len(r.SealedKey) == 0 || len(d.SealedKey) == 0:
		return nil, fmt.Errorf("%w: authority %s has no sealed key, or would have none: what is elsewhere is not sealed here", identity.ErrPrecondition, authorityKey(r))
	case bytes.Equal(r.SealedKey, d.SealedKey):
		return r, nil
	}
	now := *r
	now.SealedKey = d.SealedKey
	return a.replaceAuthority(before, &now)
}

func (a *applier) dropAuthority(d *authorityData) (any, error) {
	before, err := a.vouched()
	if err != nil {
		return nil, err
	}
	r, err := before.authority(d.Kind, d.ID)
	if err != nil {
		return nil, err
	}
	if r.State != identity.AuthorityPrepared && a.now.Before(r.NotAfter) {
		return nil, fmt.Errorf("%w: authority %s is %s until %s: what it signed counts until then",
			identity.ErrPrecondition, authorityKey(r), r.State, r.NotAfter.Format(time.RFC3339))
	}
	if err := a.table(kindAuthority).Delete([]byte(authorityKey(r))); err != nil {
		return nil, err
	}
	return nil, a.vouchedChanged(before)
}

// sweepVouched removes retiring authorities and other clusters' keys that have ended by the proposer's clock.
func (a *applier) sweepVouched(limit int) (removed int, err error) {
	before, err := a.vouched()
	if err != nil {
		return 0, err
	}
	for _, r := range before.authorities {
		if removed < limit && ended(r, a.now) {
			removed++
			err = errors.Join(err, a.table(kindAuthority).Delete([]byte(authorityKey(r))))
		}
	}
	for _, f := range before.foreign {
		kept := *f
		kept.JWT = nil
		for _, k := range f.JWT {
			if removed < limit && !a.now.Before(k.NotAfter) {
				removed++
				continue
			}
			kept.JWT = append(kept.JWT, k)
		}
		if len(kept.JWT) < len(f.JWT) {
			err = errors.Join(err, a.storeForeign(&kept))
		}
	}
	if removed > 0 && err == nil {
		err = a.vouchedChanged(before)
	}
	return removed, err
}

func ended(r *identity.Authority, now time.Time) bool {
	switch r.State {
	case identity.AuthorityRetiring, identity.AuthorityTainted, identity.AuthorityRevoked:
		return !now.Before(r.NotAfter)
	}
	return false
}

// sweepable reports whether sweepVouched would find something.
func (v *vouched) sweepable(now time.Time) bool {
	for _, r := range v.authorities {
		if ended(r, now) {
			return true
		}
	}
	for _, f := range v.foreign {
		for _, k := range f.JWT {
			if !now.Before(k.NotAfter) {
				return true
			}
		}
	}
	return false
}
