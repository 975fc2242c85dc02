package store

import (
	"context"
	"fmt"
	"time"

	"countersign.io/countersign/identity"
)

// The writes that level 2 brought. Below it each is ErrPrecondition.

func (w *Writer) need(level uint32, what string) error {
	return needLevel(w.store.Level(), level, what)
}

// do2 is do for a command of level 2.
func (w *Writer) do2(ctx context.Context, typ string, now time.Time, data any) error {
	if err := w.need(level2, typ); err != nil {
		return err
	}
	return w.do(ctx, typ, now, data)
}

// AdmitAgent spends the agent join token with that SHA-256 and records the agent, in one command: an agent that is refused
// costs no token. Errors are those of UseJoinToken and PutAgent; ErrDenied as well when the token vouches for another
// node than the agent speaks for.
func (w *Writer) AdmitAgent(ctx context.Context, now time.Time, hash []byte, a identity.Agent) (identity.Agent, error) {
	if err := w.need(level2, "admitting an agent in one command"); err != nil {
		return identity.Agent{}, err
	}
	if err := w.checkAgent(&a); err != nil {
		return identity.Agent{}, err
	}
	return propose[identity.Agent](ctx, w, admitAgent, now, admitAgentData{Hash: hash, Agent: a})
}

// PutSealTerm announces a data key of the seal, by its number (from 1 on) and its key ID (16 bytes): it is pending until every
// member has it. ErrPrecondition while another one is pending, or when there is one of that number or above; saying the
// same again while it is pending is no error.
func (w *Writer) PutSealTerm(ctx context.Context, now time.Time, number uint32, keyID []byte) error {
	if err := checkSealTerm(number, keyID); err != nil {
		return err
	}
	return w.do2(ctx, putSealTerm, now, putSealTermData{Number: number, KeyID: keyID})
}

// AckSealTerm says that the member keeps the key of the term that this member's state has under that number: compare its
// key ID before. ErrNotFound: no such term or member. Of a term that is not pending any more it changes nothing.
func (w *Writer) AckSealTerm(ctx context.Context, number uint32, member string) error {
	if err := w.need(level2, ackSealTerm); err != nil {
		return err
	}
	for _, t := range w.store.SealTerms() {
		if t.Number == number {
			return w.do(ctx, ackSealTerm, time.Time{}, ackSealTermData{Number: number, KeyID: t.KeyID, Member: member})
		}
	}
	return fmt.Errorf("%w: seal term %d", identity.ErrNotFound, number)
}

// ActivateSealTerm makes a pending term the one that seals, and retires the one before. ErrPrecondition: members (named) have
// not said that they keep its key.
func (w *Writer) ActivateSealTerm(ctx context.Context, number uint32) error {
	return w.do2(ctx, activateSealTerm, time.Time{}, sealTermData{number})
}

// DropSealTerm forgets a term; ErrPrecondition: it is the active one. The caller knows that nothing is sealed under it.
func (w *Writer) DropSealTerm(ctx context.Context, number uint32) error {
	return w.do2(ctx, dropSealTerm, time.Time{}, sealTermData{number})
}

// ResealAuthority replaces the ciphertext of an authority's key by another one of the same key. ErrPrecondition: ifRevision is
// not zero and not the authority's revision any more, or its key is not sealed here. ErrNotFound.
func (w *Writer) ResealAuthority(ctx context.Context, kind identity.AuthorityKind, id string, sealedKey []byte, ifRevision uint64) error {
	return w.do2(ctx, resealAuthority, time.Time{}, resealData{Kind: kind, ID: id, SealedKey: sealedKey, IfRevision: ifRevision})
}

// PrepareAuthority stores an authority that is in the bundle and does not sign yet, and returns it; its state must be
// AuthorityPrepared. ErrExists: there is one of that kind and ID, or another cluster's key has the ID.
func (w *Writer) PrepareAuthority(ctx context.Context, now time.Time, a identity.Authority) (identity.Authority, error) {
	if err := w.checkAuthority(&a); err != nil {
		return identity.Authority{}, err
	}
	if a.State != identity.AuthorityPrepared {
		return identity.Authority{}, fmt.Errorf("%w: authority %s: state %q, want %q", identity.ErrInvalid, a.ID, a.State, identity.AuthorityPrepared)
	}
	if err := w.need(level2, prepareAuthority); err != nil {
		return identity.Authority{}, err
	}
	return propose[identity.Authority](ctx, w, prepareAuthority, now, a)
}

// ActivateAuthority makes a prepared authority the one that signs, and the one before a retiring one, at once; with back it
// is one that signed before and is not revoked. Of the active one it is no error; ErrPrecondition of any other, ErrNotFound.
func (w *Writer) ActivateAuthority(ctx context.Context, now time.Time, kind identity.AuthorityKind, id string, back bool) error {
	return w.do2(ctx, activateAuthority, now, activateData{Kind: kind, ID: id, Back: back})
}

// TaintAuthority gives up a retiring authority: what it signed is to be replaced, within spread. If it is compromised, what it and
// others have vouched for the next ones is forgotten. ErrPrecondition of any other, ErrNotFound; of a tainted one it changes
// nothing else.
func (w *Writer) TaintAuthority(ctx context.Context, now time.Time, kind identity.AuthorityKind, id string, spread time.Duration, compromised bool) error {
	return w.do2(ctx, taintAuthority, now, taintData{Kind: kind, ID: id, Spread: spread, Compromised: compromised})
}

// RevokeAuthority takes a retiring or tainted authority out of the bundle, for good. ErrPrecondition of one that signs or is
// prepared, ErrNotFound; of a revoked one it changes nothing.
func (w *Writer) RevokeAuthority(ctx context.Context, now time.Time, kind identity.AuthorityKind, id string) error {
	return w.do2(ctx, revokeAuthority, now, authorityData{Kind: kind, ID: id})
}

// PutRotation begins a rotation (ifRevision 0), or replaces the one that has that revision, and returns it. ErrPrecondition: one
// is under way, or it has moved on.
func (w *Writer) PutRotation(ctx context.Context, now time.Time, r identity.Rotation, ifRevision uint64) (identity.Rotation, error) {
	if err := r.Check(); err != nil {
		return identity.Rotation{}, err
	}
	if err := w.need(level2, putRotation); err != nil {
		return identity.Rotation{}, err
	}
	return propose[identity.Rotation](ctx, w, putRotation, now, putRotationData{Rotation: r, IfRevision: ifRevision})
}

// DropAuthority removes an authority that is prepared, or whose NotAfter has passed at now; ErrPrecondition otherwise, ErrNotFound.
func (w *Writer) DropAuthority(ctx context.Context, now time.Time, kind identity.AuthorityKind, id string) error {
	return w.do2(ctx, dropAuthority, now, authorityData{Kind: kind, ID: id})
}

// PutForeign replaces what another cluster of the trust domain publishes in the bundle; with nothing in it the source is
// forgotten. ErrExists: a key has the ID of another key, of an authority here or of a third cluster. ErrExhausted: too many
// sources.
func (w *Writer) PutForeign(ctx context.Context, f identity.Foreign) error {
	if err := w.checkForeign(&f); err != nil {
		return err
	}
	return w.do2(ctx, putForeign, time.Time{}, f)
}
