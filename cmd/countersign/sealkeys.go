package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"

	"countersign.io/countersign/api"
	memberv1 "countersign.io/countersign/api/member/v1"
	"countersign.io/countersign/ca/kmskey"
	"countersign.io/countersign/config"
	"countersign.io/countersign/identity"
	"countersign.io/countersign/seal"
	"countersign.io/countersign/server"
)

// maxKeyring bounds another member's answer: a full keyring has some 36 KiB.
const maxKeyring = 64 << 10

// sealKeys are a member's data keys and the file they rest in, wrapped. A key is in the file before it is in use.
type sealKeys struct {
	ring *seal.Keyring
	path string
	td   spiffeid.TrustDomain
	kek  seal.KEK

	mu sync.Mutex // held while the keyring changes
}

// KeyID implements server.SealKeys.
func (k *sealKeys) KeyID(number uint32) ([]byte, bool) { return k.ring.KeyID(number) }

// Activate implements server.SealKeys.
func (k *sealKeys) Activate(number uint32) error { return k.ring.Activate(number) }

// change edits a copy of the keyring and saves that. A crash, or an error, leaves file and keyring as they were, or the
// file with what the keyring has yet to get: then the next change, or the next start, brings it.
func (k *sealKeys) change(ctx context.Context, edit func(*seal.Keyring) error) error {
	plain := k.ring.Plain()
	defer clear(plain)
	c, err := seal.ParseKeyring(plain)
	if err != nil {
		return err
	}
	if err := c.Activate(k.ring.Active()); err != nil {
		return err
	}
	if err := edit(c); err != nil {
		return err
	}
	return seal.SaveKeyring(ctx, k.path, k.kek, k.td, c)
}

// Generate implements server.SealKeys.
func (k *sealKeys) Generate(ctx context.Context) (number uint32, keyID []byte, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	var made *seal.Keyring
	err = k.change(ctx, func(c *seal.Keyring) error {
		made = c
		number, keyID, err = c.Generate()
		return err
	})
	if err == nil {
		_, err = k.ring.Merge(made)
	}
	if err != nil {
		return 0, nil, fmt.Errorf("making a data key: %w", err)
	}
	return number, keyID, nil
}

// Take implements server.SealKeys.
func (k *sealKeys) Take(ctx context.Context, plain []byte, number uint32, keyID []byte) (bool, error) {
	other, err := seal.ParseKeyring(plain)
	if err != nil {
		return false, fmt.Errorf("reading another member's keyring: %w", err)
	}
	if id, ok := other.KeyID(number); !ok || !bytes.Equal(id, keyID) {
		return false, nil
	}
	if err := other.Activate(number); err != nil {
		return false, err
	}
	for _, n := range other.Terms() {
		if n != number {
			if err := other.Drop(n); err != nil {
				return false, err
			}
		}
	}
	replace := func(r *seal.Keyring) error {
		if id, ok := r.KeyID(number); ok && !bytes.Equal(id, keyID) {
			if err := r.Drop(number); err != nil {
				return err
			}
		}
		_, err := r.Merge(other)
		return err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.change(ctx, replace); err != nil {
		return false, fmt.Errorf("keeping data key %d: %w", number, err)
	}
	return true, replace(k.ring)
}

// Forget implements server.SealKeys.
func (k *sealKeys) Forget(ctx context.Context, number uint32, keyID []byte) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	// The one that the cluster took may have been fetched meanwhile, and others told that it is kept here.
	if id, ok := k.ring.KeyID(number); ok && !bytes.Equal(id, keyID) {
		return nil
	}
	if err := k.change(ctx, func(c *seal.Keyring) error { return c.Drop(number) }); err != nil {
		return fmt.Errorf("forgetting data key %d: %w", number, err)
	}
	return k.ring.Drop(number)
}

// Rewrap wraps the keyring's file anew.
func (k *sealKeys) Rewrap(ctx context.Context) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.change(ctx, func(*seal.Keyring) error { return nil })
}

// openKEKs opens seal.key, and seal.old_keys where there is a keyring that they may be needed for. Of those, what cannot be
// opened is told only if the keyring opens with none.
func (d *dataDir) openKEKs(ctx context.Context, c *config.Server) (seal.KEK, []seal.KEK, error) {
	o, err := sealOptions(c)
	if err != nil {
		return nil, nil, err
	}
	_, statErr := os.Stat(d.file("keyring"))
	exists := !errors.Is(statErr, fs.ErrNotExist)
	// A key file that is gone must not be made anew: it would not open what is there.
	o.MustExist = exists && len(c.Seal.OldKeys) == 0
	kek, err := seal.OpenKEK(ctx, cmp.Or(c.Seal.Key, "file:"+d.file("kek")), o)
	if exists && errors.Is(err, fs.ErrNotExist) {
		return nil, nil, fmt.Errorf("%w: seal.key: %w: the keyring needs the key that it was wrapped under: restore that key, or empty the data folder and join again", identity.ErrPrecondition, err)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("%w: seal.key: %w", identity.ErrPrecondition, err)
	}
	var old []seal.KEK
	if !exists {
		return kek, nil, nil
	}
	o.MustExist = true
	for _, uri := range c.Seal.OldKeys {
		k, err := seal.OpenKEK(ctx, uri, o)
		if err != nil {
			k = absentKEK{uri, err}
		}
		old = append(old, k)
	}
	return kek, old, nil
}

// absentKEK is an old key that could not be opened: most often because it is needed no more and was destroyed.
type absentKEK struct {
	uri string
	err error
}

// URI names the key.
func (k absentKEK) URI() string { return k.uri }

// Wrap fails.
func (k absentKEK) Wrap(context.Context, []byte, []byte) ([]byte, error) { return nil, k.err }

// Unwrap fails.
func (k absentKEK) Unwrap(context.Context, []byte, []byte) ([]byte, error) { return nil, k.err }

// openKeyring reads the data keys, and wraps them under seal.key at once where an old key opened them.
func (d *dataDir) openKeyring(ctx context.Context, kek seal.KEK, old []seal.KEK) error {
	ring, by, err := seal.LoadKeyring(ctx, d.file("keyring"), kek, d.td, old...)
	if err != nil {
		return fmt.Errorf("%w: opening the keyring: %w", identity.ErrPrecondition, err)
	}
	d.keyring = ring
	d.keys = &sealKeys{ring: ring, path: d.file("keyring"), td: d.td, kek: kek}
	if by == kek {
		return nil
	}
	if err := d.keys.Rewrap(ctx); err != nil {
		return fmt.Errorf("wrapping the keyring, which %s opened, under seal.key: %w", by.URI(), err)
	}
	return nil
}

// sealing is the life of the data keys as the server sees it.
func (m *member) sealing(w server.SealWriter) server.Sealing {
	return server.Sealing{
		Terms: m.store.SealTerms, Writes: w, Keys: m.data.keys, Active: m.data.keyring.Active, TermOf: seal.TermOf,
		Open: m.data.keyring.Open, Rewrap: m.data.keys.Rewrap, Fetch: m.fetchKeyring,
	}
}

// fetchKeyring asks another member, that very one, for its data keys.
func (m *member) fetchKeyring(ctx context.Context, from identity.Member) ([]byte, error) {
	conn, err := m.dialMember(ctx, from)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	res, err := memberv1.NewMemberClient(conn).Keyring(ctx, &memberv1.KeyringRequest{}, grpc.MaxCallRecvMsgSize(maxKeyring))
	if err != nil {
		return nil, api.FromStatus(err)
	}
	return res.Keyring, nil
}

// kmsTime bounds what is asked of a KMS or HSM.
const kmsTime = 30 * time.Second

// x509Key opens ca.key, or makes it; nil if there is none.
func (m *member) x509Key() func(context.Context) (crypto.Signer, string, error) {
	uri := m.c.CA.Key
	if uri == "" {
		return nil
	}
	return func(ctx context.Context) (crypto.Signer, string, error) {
		ctx, cancel := context.WithTimeout(ctx, kmsTime)
		defer cancel()
		key, err := kmskey.OpenOrCreate(ctx, uri)
		if err != nil {
			return nil, "", fmt.Errorf("opening ca.key: %w", err)
		}
		return key, uri, nil
	}
}

// openKeyAt opens an authority's key in a KMS or HSM by this member's own ca.key. The record is the word of the member that made
// the authority, so it must not choose what is opened here, least of all the module that is loaded: it names the same key, or nothing is.
func (m *member) openKeyAt(a identity.Authority) (crypto.Signer, error) {
	own := m.c.CA.Key
	if own == "" {
		return nil, fmt.Errorf("%w: the key of %s authority %s is in a KMS or HSM: set ca.key to what the other members have there (countersign authority list shows where it is), with this machine's module and PIN file", identity.ErrPrecondition, a.Kind, a.ID)
	}
	own, err := m.keyFor(&a)
	if err != nil {
		return nil, err
	}
	key, err := openKMS(own)
	if err != nil {
		return nil, err
	}
	if pub, err := x509.MarshalPKIXPublicKey(key.Public()); err != nil || !bytes.Equal(pub, a.PublicKey) {
		return nil, fmt.Errorf("%w: the key at ca.key is not the one of %s authority %s: the token has another key of that name", identity.ErrPrecondition, a.Kind, a.ID)
	}
	return key, nil
}
