package store

import (
	"bytes"
	"fmt"

	"countersign.io/countersign/identity"
)

// maxForeign bounds the sources, and so the bundle: every agent and every workload holds it. It is part of Apply's rules.
const maxForeign = 64

// putForeign replaces all that a source publishes; nothing deletes it. A key ID means one key in the whole trust domain:
// whoever could publish another key under an ID of ours, or of a third cluster, would make tokens fail that are good.
func (a *applier) putForeign(f *identity.Foreign) (any, error) {
	if err := checkKey("source", f.Source); err != nil {
		return nil, err
	}
	before, err := a.vouched()
	if err != nil {
		return nil, err
	}
	var old *identity.Foreign
	for _, b := range before.foreign {
		if b.Source == f.Source {
			old = b
			continue
		}
		for _, k := range f.JWT {
			if err := clash(b, k.ID, k.PublicKey); err != nil {
				return nil, err
			}
		}
	}
	if old == nil && len(before.foreign) >= maxForeign {
		return nil, fmt.Errorf("%w: %d clusters publish their keys here already: remove one that is no more", identity.ErrExhausted, len(before.foreign))
	}
	for _, r := range before.authorities {
		for _, k := range f.JWT {
			if r.Kind == identity.AuthorityJWT && r.ID == k.ID && !bytes.Equal(r.PublicKey, k.PublicKey) {
				return nil, fmt.Errorf("%w: key %s of %s is another key than the authority of that ID here", identity.ErrExists, k.ID, f.Source)
			}
		}
	}
	for i := range f.JWT {
		f.JWT[i].NotAfter = f.JWT[i].NotAfter.UTC()
	}
	if old != nil {
		f.Revision = old.Revision
		if same(f, old) {
			return old, nil
		}
	}
	if old == nil && empty(f) {
		return nil, nil
	}
	f.Revision = a.index
	if err := a.storeForeign(f); err != nil {
		return nil, err
	}
	return f, a.vouchedChanged(before)
}

func empty(f *identity.Foreign) bool { return len(f.X509) == 0 && len(f.JWT) == 0 }

// storeForeign keeps no record that says nothing.
func (a *applier) storeForeign(f *identity.Foreign) error {
	if empty(f) {
		return a.table(kindForeign).Delete([]byte(f.Source))
	}
	f.Revision = a.index
	return put(a.state, kindForeign, f.Source, f)
}

func clash(f *identity.Foreign, id string, key []byte) error {
	for _, k := range f.JWT {
		if k.ID == id && !bytes.Equal(k.PublicKey, key) {
			return fmt.Errorf("%w: key %s is another key than the one that %s publishes under that ID", identity.ErrExists, id, f.Source)
		}
	}
	return nil
}
