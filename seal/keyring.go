package seal

import (
	"cmp"
	"crypto/cipher"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"sync"
)

const (
	keyringMagic  = "CSKR\x01" // the last byte is the version of the format
	termBytes     = 4 + keyBytes
	maxTerms      = 1000
	sealFormat    = 1
	sealedHeader  = 1 + 4                  // format, term
	sealedMinimum = sealedHeader + 12 + 16 // and nonce, tag
)

// term is one data key. It never changes once it is in a keyring.
type term struct {
	number uint32
	key    [keyBytes]byte
	aead   cipher.AEAD
}

// Keyring is the set of data keys. One of them, the active one, seals; all of them open. It is safe for concurrent use.
type Keyring struct {
	mu     sync.RWMutex
	terms  []*term // ascending, never empty; guarded by mu
	active uint32  // one of terms; guarded by mu
}

// NewKeyring makes a keyring with one random key, term 1, which is active.
func NewKeyring() (*Keyring, error) {
	t, err := newTerm(1)
	if err != nil {
		return nil, fmt.Errorf("making a keyring: %w", err)
	}
	return &Keyring{terms: []*term{t}, active: 1}, nil
}

func newTerm(number uint32) (*term, error) {
	t := &term{number: number}
	rand.Read(t.key[:])
	var err error
	if t.aead, err = newAEAD(t.key[:]); err != nil {
		return nil, err
	}
	return t, nil
}

// ParseKeyring reads what Plain wrote. It copies: the caller should clear plain. Which key is the active one is for the
// cluster to say: until Activate is called it is the lowest, which every member has.
func ParseKeyring(plain []byte) (*Keyring, error) {
	body, ok := cutPrefix(plain, keyringMagic)
	if !ok {
		return nil, errors.New("parsing keyring: not a keyring of a format that this version knows")
	}
	if len(body) == 0 || len(body)%termBytes != 0 || len(body)/termBytes > maxTerms {
		return nil, fmt.Errorf("parsing keyring: %d bytes are not 1 to %d keys: it is truncated or damaged", len(body), maxTerms)
	}
	k := &Keyring{}
	for last := uint32(0); len(body) > 0; body = body[termBytes:] {
		t := &term{number: binary.BigEndian.Uint32(body)}
		if t.number <= last {
			return nil, fmt.Errorf("parsing keyring: key %d after key %d: it is damaged", t.number, last)
		}
		last = t.number
		copy(t.key[:], body[4:termBytes])
		var err error
		if t.aead, err = newAEAD(t.key[:]); err != nil {
			return nil, fmt.Errorf("parsing keyring: key %d: %w", t.number, err)
		}
		k.terms = append(k.terms, t)
	}
	k.active = k.terms[0].number
	return k, nil
}

func cutPrefix(b []byte, prefix string) ([]byte, bool) {
	if len(b) < len(prefix) || string(b[:len(prefix)]) != prefix {
		return nil, false
	}
	return b[len(prefix):], true
}

// Plain is every key in the clear, for the authenticated join and for wrapping only. The caller clears it.
func (k *Keyring) Plain() []byte {
	k.mu.RLock()
	defer k.mu.RUnlock()
	out := make([]byte, 0, len(keyringMagic)+len(k.terms)*termBytes)
	out = append(out, keyringMagic...)
	for _, t := range k.terms {
		out = binary.BigEndian.AppendUint32(out, t.number)
		out = append(out, t.key[:]...)
	}
	return out
}

// Seal encrypts plaintext under the active key. ad says where the ciphertext belongs: Open wants the same.
func (k *Keyring) Seal(plaintext, ad []byte) ([]byte, error) {
	k.mu.RLock()
	t := k.find(k.active)
	k.mu.RUnlock()
	out := make([]byte, sealedHeader, sealedMinimum+len(plaintext))
	out[0] = sealFormat
	binary.BigEndian.PutUint32(out[1:], t.number)
	return t.aead.Seal(out, nil, plaintext, bind(out, ad)), nil
}

// Open decrypts what Seal made in the same place. The error wraps ErrOpen and says which key it would have taken.
func (k *Keyring) Open(ciphertext, ad []byte) ([]byte, error) {
	if len(ciphertext) < sealedMinimum {
		return nil, fmt.Errorf("opening sealed data: %d bytes are too few: %w", len(ciphertext), ErrOpen)
	}
	header, body := ciphertext[:sealedHeader], ciphertext[sealedHeader:]
	number, ok := TermOf(ciphertext)
	if !ok {
		return nil, fmt.Errorf("opening sealed data: format %d is unknown to this version: %w", header[0], ErrOpen)
	}
	k.mu.RLock()
	t := k.find(number)
	k.mu.RUnlock()
	if t == nil {
		return nil, fmt.Errorf("opening sealed data: the keyring has no key %d: %w", number, ErrOpen)
	}
	plain, err := t.aead.Open(nil, nil, body, bind(header, ad))
	if err != nil {
		return nil, fmt.Errorf("opening sealed data under key %d: %w", number, ErrOpen)
	}
	return plain, nil
}

// find returns the key of that number, or nil. The caller holds mu.
func (k *Keyring) find(number uint32) *term {
	i, ok := slices.BinarySearchFunc(k.terms, number, func(t *term, n uint32) int { return cmp.Compare(t.number, n) })
	if !ok {
		return nil
	}
	return k.terms[i]
}

// String, GoString and LogValue keep the keys out of logs and error messages.
func (k *Keyring) String() string {
	k.mu.RLock()
	defer k.mu.RUnlock()
	return fmt.Sprintf("keyring of %d keys", len(k.terms))
}

// GoString is String.
func (k *Keyring) GoString() string { return k.String() }

// LogValue is String.
func (k *Keyring) LogValue() slog.Value { return slog.StringValue(k.String()) }

// Format writes String whatever the verb: a keyring is mutable now, and package fmt would walk into it for %x.
func (k *Keyring) Format(f fmt.State, _ rune) { io.WriteString(f, k.String()) }
