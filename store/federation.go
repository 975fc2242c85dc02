package store

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"time"
	"unicode/utf8"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"countersign.io/countersign/identity"
)

type (
	putFederationData struct {
		Federation identity.Federation `json:"federation"` // with a bundle: that one is pinned, whatever there was
		Replace    bool                `json:"replace,omitempty"`
		IfRevision uint64              `json:"if_revision,omitempty"` // 0: any
	}
	putFederatedBundleData struct {
		TrustDomain string                   `json:"trust_domain"`
		Of          uint64                   `json:"of"` // revision of the relationship that it was fetched by
		Bundle      identity.FederatedBundle `json:"bundle"`
	}
)

// federation is a relationship as reads see it: its bundle is made once.
type federation struct {
	*identity.Federation
	bundle *identity.Bundle // nil: none
}

func newFederation(f *identity.Federation) *federation {
	out := &federation{Federation: f}
	if td, err := spiffeid.TrustDomainFromString(f.TrustDomain); err == nil && f.Bundle != nil {
		out.bundle = f.Bundle.Bundle(td)
	}
	return out
}

// checkFederationRecord is the least that reads rely on, of a snapshot's record too.
func checkFederationRecord(f *identity.Federation) error {
	if err := checkKey("trust domain", f.TrustDomain); err != nil {
		return err
	}
	if _, err := spiffeid.TrustDomainFromString(f.TrustDomain); err != nil {
		return fmt.Errorf("%w: trust domain %q: %v", identity.ErrInvalid, f.TrustDomain, err)
	}
	return nil
}

// putFederation makes a relationship, or replaces all that one says. The own trust domain is refused: its bundle comes from
// its authorities. Without a bundle in the command the one that there is stays: it is the same trust domain's, wherever it is read.
func (a *applier) putFederation(d *putFederationData) (any, error) {
	f := &d.Federation
	if err := checkFederationRecord(f); err != nil {
		return nil, err
	}
	if f.TrustDomain == a.td.Name() {
		return nil, fmt.Errorf("%w: %q is the own trust domain", identity.ErrInvalid, f.TrustDomain)
	}
	all, err := all[identity.Federation](a.state, kindFederation)
	if err != nil {
		return nil, err
	}
	var old *identity.Federation
	if i := slices.IndexFunc(all, func(o *identity.Federation) bool { return o.TrustDomain == f.TrustDomain }); i >= 0 {
		old = all[i]
	}
	switch {
	case old == nil && d.IfRevision != 0:
		return nil, fmt.Errorf("%w: no federation with %q", identity.ErrNotFound, f.TrustDomain)
	case old != nil && !d.Replace:
		return nil, fmt.Errorf("%w: federation with %q: update it, or delete it first", identity.ErrExists, f.TrustDomain)
	case old != nil && d.IfRevision != 0 && d.IfRevision != old.Revision:
		return nil, fmt.Errorf("%w: the federation with %q is at revision %d, not %d: somebody changed it meanwhile; read it again", identity.ErrPrecondition, f.TrustDomain, old.Revision, d.IfRevision)
	case old == nil && len(all) >= identity.MaxFederations:
		return nil, fmt.Errorf("%w: there are %d federations already: delete one that is no more", identity.ErrExhausted, identity.MaxFederations)
	}
	f.CreatedAt, f.Revision = a.now, a.index
	if f.Bundle != nil {
		f.Bundle.TakenAt, f.Bundle.Pinned, f.Bundle.Revision = a.now, true, a.index
	}
	if old != nil {
		f.CreatedAt = old.CreatedAt
		if f.Bundle == nil {
			f.Bundle = old.Bundle
		}
	}
	if err := put(a.state, kindFederation, f.TrustDomain, f); err != nil {
		return nil, err
	}
	a.changed(change{putFederation: f})
	return f, nil
}

func (a *applier) deleteFederation(d *keyData) (any, error) {
	if err := checkKey("trust domain", d.Key); err != nil {
		return nil, err
	}
	if a.table(kindFederation).Get([]byte(d.Key)) == nil {
		return nil, fmt.Errorf("%w: no federation with %q", identity.ErrNotFound, d.Key)
	}
	if err := a.table(kindFederation).Delete([]byte(d.Key)); err != nil {
		return nil, err
	}
	a.changed(change{deleteFederation: d.Key})
	return nil, nil
}

// putFederatedBundle takes what was fetched by a relationship as it still is, unless it is older than what there is: who asked
// an endpoint that lags, or was the leader a moment ago, must not bring back what the partner revoked.
func (a *applier) putFederatedBundle(d *putFederatedBundleData) (any, error) {
	if err := checkKey("trust domain", d.TrustDomain); err != nil {
		return nil, err
	}
	old, err := get[identity.Federation](a.state, kindFederation, d.TrustDomain)
	switch {
	case err != nil:
		return nil, err
	case old == nil:
		return nil, fmt.Errorf("%w: no federation with %q", identity.ErrNotFound, d.TrustDomain)
	case old.Revision != d.Of:
		return nil, fmt.Errorf("%w: the federation with %q was changed while its bundle was fetched", identity.ErrPrecondition, d.TrustDomain)
	}
	b := &d.Bundle
	if err := old.CheckNext(b.Sequence); err != nil {
		return nil, err
	}
	if was := old.Bundle; was != nil {
		b.TakenAt, b.Pinned, b.Revision = was.TakenAt, was.Pinned, was.Revision
		if same(b, was) {
			return old, nil
		}
	}
	b.TakenAt, b.Pinned, b.Revision = a.now, false, a.index
	now := *old
	now.Bundle = b
	if err := put(a.state, kindFederation, now.TrustDomain, &now); err != nil {
		return nil, err
	}
	a.changed(change{putFederation: &now})
	return &now, nil
}

// Federations returns the relationships, by trust domain.
func (s *Store) Federations() []identity.Federation {
	s.mu.RLock()
	out := make([]identity.Federation, 0, len(s.view.federations))
	for _, f := range s.view.federations {
		out = append(out, *f.Federation)
	}
	s.mu.RUnlock()
	slices.SortFunc(out, func(a, b identity.Federation) int { return cmp.Compare(a.TrustDomain, b.TrustDomain) })
	return out
}

// Federated returns the bundle of another trust domain; nil if there is no relationship, or none yet. The same pointer means the
// same content.
func (s *Store) Federated(trustDomain string) *identity.Bundle {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if f := s.view.federations[trustDomain]; f != nil {
		return f.bundle
	}
	return nil
}

// PutFederation makes a relationship, or replaces one if told to: ErrExists otherwise. A bundle in it is pinned, whatever its
// sequence; without one the last good one stays. ErrPrecondition: ifRevision is not zero and not the relationship's any more.
func (w *Writer) PutFederation(ctx context.Context, now time.Time, f identity.Federation, replace bool, ifRevision uint64) (identity.Federation, error) {
	err := identity.CheckFederation(w.store.td, &f)
	if f.Bundle != nil {
		b := *f.Bundle
		f.Bundle = &b
		err = errors.Join(err, checkFederatedBundle(f.TrustDomain, f.Bundle))
	}
	if err == nil {
		err = w.need(level2, putFederation)
	}
	if err != nil {
		return identity.Federation{}, err
	}
	f.Revision, f.CreatedAt = 0, time.Time{}
	return propose[identity.Federation](ctx, w, putFederation, now, putFederationData{Federation: f, Replace: replace, IfRevision: ifRevision})
}

// DeleteFederation ends a relationship, and forgets its bundle; ErrNotFound.
func (w *Writer) DeleteFederation(ctx context.Context, trustDomain string) error {
	return w.do2(ctx, deleteFederation, time.Time{}, keyData{trustDomain})
}

// PutFederatedBundle keeps what was fetched by the relationship as of a revision. ErrPrecondition: it was changed since, or the
// bundle is older than the one that there is. ErrNotFound. The same bundle again changes nothing.
func (w *Writer) PutFederatedBundle(ctx context.Context, now time.Time, trustDomain string, of uint64, b identity.FederatedBundle) error {
	if err := checkFederatedBundle(trustDomain, &b); err != nil {
		return err
	}
	return w.do2(ctx, putFederatedBundle, now, putFederatedBundleData{TrustDomain: trustDomain, Of: of, Bundle: b})
}

// checkFederatedBundle brings the authorities into order as well.
func checkFederatedBundle(td string, b *identity.FederatedBundle) error {
	var errs []error
	bad := func(format string, args ...any) {
		errs = append(errs, fmt.Errorf("%w: bundle of %q: "+format, append([]any{identity.ErrInvalid, td}, args...)...))
	}
	if len(b.X509) > identity.MaxFederatedX509 || len(b.JWT) > identity.MaxFederatedJWT {
		bad("%d X.509 and %d JWT authorities: at the most %d and %d", len(b.X509), len(b.JWT), identity.MaxFederatedX509, identity.MaxFederatedJWT)
		return errors.Join(errs...)
	}
	if b.RefreshHint < 0 || b.RefreshHint > math.MaxInt64/2 {
		bad("a refresh hint of %v", b.RefreshHint)
	}
	b.X509 = slices.SortedFunc(slices.Values(b.X509), bytes.Compare)
	b.X509 = slices.CompactFunc(b.X509, bytes.Equal)
	size := 0
	for i, der := range b.X509 {
		size += len(der)
		if err := checkCA(der); err != nil {
			bad("X.509 authority %d: %v", i+1, err)
		}
	}
	for kid, der := range b.JWT {
		size += len(kid) + len(der)
		if kid == "" || len(kid) > identity.MaxFederatedKeyID || !utf8.ValidString(kid) {
			bad("a key ID of %d bytes: want 1 to %d, in UTF-8", len(kid), identity.MaxFederatedKeyID)
		}
		if err := checkPublicKey(der); err != nil {
			bad("key %q: %v", kid, err)
		}
	}
	if size > identity.MaxFederatedBytes {
		bad("%d bytes: at the most %d", size, identity.MaxFederatedBytes)
	}
	return errors.Join(errs...)
}
