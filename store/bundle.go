package store

import (
	"bytes"
	"cmp"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"countersign.io/countersign/identity"
)

// refreshHint is how often a consumer should read the bundle again (SPIFFE Trust Domain and Bundle, section 4.1.2).
const refreshHint = 5 * time.Minute

// vouched is what the bundle is made of, and the bundle.
type vouched struct {
	authorities []*identity.Authority
	foreign     []*identity.Foreign
	bundle      *identity.Bundle
}

func loadVouched(t state, td spiffeid.TrustDomain, level uint32) (*vouched, error) {
	v := new(vouched)
	var err error
	if v.authorities, err = all[identity.Authority](t, kindAuthority); err != nil {
		return nil, err
	}
	if v.foreign, err = all[identity.Foreign](t, kindForeign); err != nil {
		return nil, err
	}
	v.bundle = makeBundle(td, level, v.authorities, v.foreign)
	v.bundle.Sequence = t.counter(metaSequence)
	return v, nil
}

func (a *applier) vouched() (*vouched, error) { return loadVouched(a.state, a.td, a.level) }

// vouchedChanged is called after the tables changed, with what there was before. It counts the bundle's sequence up exactly
// when what is published of the bundle changed: whether a key still signs is not.
func (a *applier) vouchedChanged(before *vouched) error {
	after, err := a.vouched()
	if err != nil {
		return err
	}
	if !same(published(before.bundle), published(after.bundle)) {
		after.bundle.Sequence++
		if err := a.setCounter(metaSequence, after.bundle.Sequence); err != nil {
			return err
		}
	}
	a.changed(change{vouched: after})
	return nil
}

func published(b *identity.Bundle) *identity.Bundle {
	p := *b
	p.Ending = nil
	return &p
}

// makeBundle holds every authority that somebody may rely on, and what other clusters of the trust domain publish. From level
// 2 on an authority below an upstream is there by its root, and by all that the upstream vouched for when it signed unless that has
// told since what it vouches for now: what it gives up must not stay. The roots are a sorted set; at level 1 they are in the order
// of the authorities.
func makeBundle(td spiffeid.TrustDomain, level uint32, authorities []*identity.Authority, foreign []*identity.Foreign) *identity.Bundle {
	b := &identity.Bundle{TrustDomain: td, RefreshHint: refreshHint, JWT: make(map[string][]byte)}
	told := slices.ContainsFunc(foreign, func(f *identity.Foreign) bool { return f.Source == identity.SourceUpstream && len(f.X509) > 0 })
	for _, r := range authorities {
		if !r.State.Vouched() {
			continue
		}
		if level >= level2 && (r.State == identity.AuthorityRetiring || r.State == identity.AuthorityTainted) {
			b.Ending = append(b.Ending, identity.Ending{ID: r.ID, Tainted: r.State == identity.AuthorityTainted, Spread: r.Spread})
		}
		switch {
		case r.Kind == identity.AuthorityX509 && len(r.Roots) > 0 && told:
			b.X509 = append(b.X509, r.Roots[0])
		case r.Kind == identity.AuthorityX509 && len(r.Roots) > 0:
			b.X509 = append(b.X509, r.Roots...)
		case r.Kind == identity.AuthorityX509:
			b.X509 = append(b.X509, r.Cert)
		case r.Kind == identity.AuthorityJWT:
			b.JWT[r.ID] = r.PublicKey
		}
	}
	for _, f := range foreign {
		b.X509 = append(b.X509, f.X509...)
		for _, k := range f.JWT {
			if _, taken := b.JWT[k.ID]; !taken { // a key of the same ID is the same key: see putForeign
				b.JWT[k.ID] = k.PublicKey
			}
		}
	}
	if level >= level2 {
		slices.SortFunc(b.X509, bytes.Compare)
		b.X509 = slices.CompactFunc(b.X509, bytes.Equal)
		slices.SortFunc(b.Ending, func(a, b identity.Ending) int { return cmp.Compare(a.ID, b.ID) })
	}
	return b
}

// Foreign returns what other clusters of the trust domain publish, by source.
func (s *Store) Foreign() []identity.Foreign {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return values(s.view.foreign)
}
