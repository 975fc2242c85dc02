package server

import (
	"bytes"
	"context"
	"encoding/hex"
	"fmt"
	"slices"
	"time"

	"crypto/x509"

	"countersign.io/countersign/identity"
)

// This file is what a cluster below another one owes to its rotations: it says when everyone here trusts what the one above has
// prepared, replaces its own authority when the one that signed it ends, and says when nothing here is under that any more.

// parentOf is the ID of the authority above that signed an authority.
func parentOf(a *identity.Authority) string {
	cert, err := x509.ParseCertificate(a.Cert)
	if err != nil {
		return ""
	}
	return hex.EncodeToString(cert.AuthorityKeyId)
}

// below is what this cluster tells the one above.
func (u *upstreamLoop) below() identity.Below {
	b := identity.Below{Acked: u.acked}
	for _, a := range u.cfg.State.Authorities() {
		switch {
		case !a.State.Vouched():
		case a.Kind == identity.AuthorityJWT:
			b.Keys = append(b.Keys, identity.JWTKey{ID: a.ID, PublicKey: a.PublicKey, NotAfter: a.NotAfter})
		case a.Kind == identity.AuthorityX509:
			if id := parentOf(&a); id != "" {
				b.Uses = append(b.Uses, id)
			}
		}
	}
	b.Uses = merged(b.Uses, nil)
	return b
}

// tellAbove gives the upstream what it is to know of this cluster, if that has changed.
func (u *upstreamLoop) tellAbove() {
	b := u.below()
	same := func(a, b identity.JWTKey) bool {
		return a.ID == b.ID && bytes.Equal(a.PublicKey, b.PublicKey) && a.NotAfter.Equal(b.NotAfter)
	}
	if u.keys == nil || len(b.Keys) == 0 || u.sent != nil && u.sent.Acked == b.Acked && slices.Equal(u.sent.Uses, b.Uses) && slices.EqualFunc(u.sent.Keys, b.Keys, same) {
		return
	}
	select { // the newest is all that counts
	case <-u.keys:
	default:
	}
	u.keys <- b
	u.sent = &b
}

// acknowledge notes when everyone here has what the cluster above has told; it reports whether somebody is waited for.
func (u *upstreamLoop) acknowledge(ctx context.Context) (waits bool) {
	if u.awaited <= u.acked {
		return false
	}
	now := u.cfg.Now()
	g := u.bundleGate(u.takeCensus(ctx, identity.AuthorityX509, ""), u.awaitedOwn, now)
	if !g.open() {
		return true
	}
	u.acked = u.awaited
	return false
}

// followEnd begins a rotation when the authority above that signed ours ends.
func (u *upstreamLoop) followEnd(ctx context.Context, active *identity.Authority, now time.Time) error {
	u.mu.Lock()
	above := u.now
	u.mu.Unlock()
	if above == nil || len(above.Ending) == 0 || active == nil || !u.rotates() || u.rotating(identity.AuthorityX509) || now.Before(u.retryAt) {
		return nil
	}
	parent := parentOf(active)
	i := slices.IndexFunc(above.Ending, func(e identity.Ending) bool { return e.ID == parent })
	if i < 0 {
		return nil
	}
	r := identity.Rotation{
		Kind: identity.AuthorityX509, Old: active.ID, Phase: identity.RotationPrepare, StartedAt: now, PhaseAt: now, AckDeadline: defaultAckDeadline,
		Taint: above.Ending[i].Tainted, Why: "the authority above it, " + parent + ", ends",
	}
	if r.Taint {
		r.AckDeadline, r.UseDeadline = hastyAckDeadline, hastyUseDeadline
	}
	// Should the next one be signed by it as well, that is not asked for again and again.
	u.hasty++
	u.retryAt = now.Add(min(upstreamRetryFirst<<min(u.hasty, 12), hastyMost))
	if _, err := u.putRotation(ctx, r, 0); err != nil {
		return fmt.Errorf("following the cluster above: %w", err)
	}
	return nil
}
