package store

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"countersign.io/countersign/identity"
)

// What a Writer refuses before it proposes. Unlike Apply's own rules, these may change between versions.

// maxNameBytes bounds the IDs that are one path segment.
const maxNameBytes = 128

func checkName(what, s string) error {
	if len(s) > maxNameBytes {
		return fmt.Errorf("%w: %s of %d bytes: at the most %d", identity.ErrInvalid, what, len(s), maxNameBytes)
	}
	if err := spiffeid.ValidatePathSegment(s); err != nil {
		return fmt.Errorf("%w: %s %q: want letters, digits, dots, hyphens and underscores", identity.ErrInvalid, what, s)
	}
	return nil
}

// checkEntry brings the selectors into order as well.
func (w *Writer) checkEntry(e *identity.Entry) error {
	e.Selectors = identity.SortSelectors(slices.Clone(e.Selectors))
	return errors.Join(checkName("entry ID", e.ID), identity.CheckEntry(w.store.td, e))
}

func checkNewToken(t *identity.JoinToken) error {
	errs := []error{checkName("join token ID", t.ID)}
	if len(t.Hash) != sha256.Size {
		errs = append(errs, fmt.Errorf("%w: join token %s: hash of %d bytes, not %d", identity.ErrInvalid, t.ID, len(t.Hash), sha256.Size))
	}
	if t.Purpose != identity.JoinAgent && t.Purpose != identity.JoinServer {
		errs = append(errs, fmt.Errorf("%w: join token purpose %q: want %s or %s", identity.ErrInvalid, t.Purpose, identity.JoinAgent, identity.JoinServer))
	}
	if t.ExpiresAt.IsZero() {
		errs = append(errs, fmt.Errorf("%w: join token %s never expires: give it an end", identity.ErrInvalid, t.ID))
	}
	return errors.Join(errs...)
}

func (w *Writer) checkAgent(a *identity.Agent) error {
	id, err := spiffeid.FromString(a.ID)
	if err != nil || id.TrustDomain() != w.store.td || identity.RoleOf(id) != identity.RoleAgent {
		return fmt.Errorf("%w: agent ID %q: want one of trust domain %q below /%s/agent/", identity.ErrInvalid, a.ID, w.store.td.Name(), identity.ReservedPath)
	}
	if a.Kind == "" {
		return fmt.Errorf("%w: agent %s has no kind", identity.ErrInvalid, a.ID)
	}
	return nil
}

func checkAuthority(a *identity.Authority) error {
	errs := []error{checkName("authority ID", a.ID)}
	bad := func(what string) {
		errs = append(errs, fmt.Errorf("%w: authority %s %s: %s", identity.ErrInvalid, a.Kind, a.ID, what))
	}
	switch a.Kind {
	case identity.AuthorityX509:
		if len(a.Cert) == 0 {
			bad("no certificate")
		}
	case identity.AuthorityJWT:
	default:
		bad("unknown kind")
	}
	switch a.State {
	case identity.AuthorityPrepared, identity.AuthorityActive, identity.AuthorityRetiring:
	default:
		bad(fmt.Sprintf("unknown state %q", a.State))
	}
	if len(a.PublicKey) == 0 || len(a.SealedKey) == 0 {
		bad("no public key, or no sealed private key")
	}
	return errors.Join(errs...)
}

func (w *Writer) checkMember(m *identity.Member) error {
	errs := []error{checkName("member ID", m.ID)}
	if m.Address == "" || len(m.Address) > 512 {
		errs = append(errs, fmt.Errorf("%w: member %s: address of %d bytes: want host:port", identity.ErrInvalid, m.ID, len(m.Address)))
	}
	return errors.Join(errs...)
}
