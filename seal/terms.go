package seal

import (
	"cmp"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
)

// ErrTerm says that a data key cannot be had, or not be had in this way.
var ErrTerm = errors.New("no such data key")

// keyIDLabel is what KeyID authenticates: a key never signs it for any other purpose.
const keyIDLabel = "countersign/1|seal key id"

// keyIDBytes is the length of a KeyID. Two of 2^64 random keys would share one.
const keyIDBytes = 16

// TermOf returns the number of the key that a ciphertext says it was sealed under; false if it is none of Seal's.
func TermOf(ciphertext []byte) (uint32, bool) {
	if len(ciphertext) < sealedMinimum || ciphertext[0] != sealFormat {
		return 0, false
	}
	return binary.BigEndian.Uint32(ciphertext[1:sealedHeader]), true
}

// Terms are the numbers of all keys, ascending.
func (k *Keyring) Terms() []uint32 {
	k.mu.RLock()
	defer k.mu.RUnlock()
	out := make([]uint32, len(k.terms))
	for i, t := range k.terms {
		out[i] = t.number
	}
	return out
}

// Active is the number of the key that seals.
func (k *Keyring) Active() uint32 {
	k.mu.RLock()
	defer k.mu.RUnlock()
	return k.active
}

// Activate makes another key the one that seals. The error wraps ErrTerm.
func (k *Keyring) Activate(number uint32) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.find(number) == nil {
		return fmt.Errorf("activating data key %d: the keyring does not have it: %w", number, ErrTerm)
	}
	k.active = number
	return nil
}

// Generate adds a random key, numbered above all others, that opens and does not seal before Activate.
func (k *Keyring) Generate() (number uint32, keyID []byte, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	last := k.terms[len(k.terms)-1].number
	if len(k.terms) >= maxTerms || last == ^uint32(0) {
		return 0, nil, fmt.Errorf("generating a data key: the keyring has %d keys, up to number %d: it is full", len(k.terms), last)
	}
	t, err := newTerm(last + 1)
	if err != nil {
		return 0, nil, fmt.Errorf("generating a data key: %w", err)
	}
	k.terms = append(k.terms, t)
	return t.number, t.id(), nil
}

// id tells a key from others, and tells nothing of it: HMAC-SHA256 of a fixed label under the key, cut short.
func (t *term) id() []byte {
	h := hmac.New(sha256.New, t.key[:])
	h.Write([]byte(keyIDLabel))
	return h.Sum(nil)[:keyIDBytes]
}

// KeyID is what the cluster keeps of a key, to recognise it: 16 bytes, the same on every member, from which the key
// cannot be found. False: the keyring does not have that key.
func (k *Keyring) KeyID(number uint32) ([]byte, bool) {
	k.mu.RLock()
	defer k.mu.RUnlock()
	t := k.find(number)
	if t == nil {
		return nil, false
	}
	return t.id(), true
}

// Merge adds the keys of other that k lacks, and changes nothing else. A key of the same number that is another one is
// an error, and then nothing is added. It says how many it added.
func (k *Keyring) Merge(other *Keyring) (added int, err error) {
	if k == other {
		return 0, nil
	}
	var theirs []*term // copies: Drop clears the key in its own keyring
	other.mu.RLock()
	for _, t := range other.terms {
		c := *t
		theirs = append(theirs, &c)
	}
	other.mu.RUnlock()
	k.mu.Lock()
	defer k.mu.Unlock()
	var fresh []*term
	for _, t := range theirs {
		own := k.find(t.number)
		if own == nil {
			fresh = append(fresh, t)
		} else if subtle.ConstantTimeCompare(own.key[:], t.key[:]) != 1 {
			return 0, fmt.Errorf("merging keyrings: data key %d is another one here: %w", t.number, ErrTerm)
		}
	}
	if len(k.terms)+len(fresh) > maxTerms {
		return 0, fmt.Errorf("merging keyrings: %d keys are more than %d", len(k.terms)+len(fresh), maxTerms)
	}
	k.terms = append(k.terms, fresh...)
	slices.SortFunc(k.terms, func(a, b *term) int { return cmp.Compare(a.number, b.number) })
	return len(fresh), nil
}

// Drop forgets a key, for good: what is sealed under it does not open here any more. The active one cannot be dropped.
// The error wraps ErrTerm.
func (k *Keyring) Drop(number uint32) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	t := k.find(number)
	switch {
	case t == nil:
		return fmt.Errorf("dropping data key %d: the keyring does not have it: %w", number, ErrTerm)
	case number == k.active:
		return fmt.Errorf("dropping data key %d: it is the one that seals: %w", number, ErrTerm)
	}
	k.terms = slices.DeleteFunc(k.terms, func(o *term) bool { return o == t })
	clear(t.key[:])
	return nil
}
