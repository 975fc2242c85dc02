package seal

import (
	"crypto/cipher"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
)

const (
	keyringMagic  = "CSKR\x01" // the last byte is the version of the format
	termBytes     = 4 + keyBytes
	maxTerms      = 255
	sealFormat    = 1
	sealedHeader  = 1 + 4                  // format, term
	sealedMinimum = sealedHeader + 12 + 16 // and nonce, tag
)

// term is one data key. Terms rise by rotation; the highest seals, all of them open.
type term struct {
	number uint32
	key    [keyBytes]byte
	aead   cipher.AEAD
}

// Keyring is the set of data keys. It never changes once made, and is safe for concurrent use.
type Keyring struct {
	terms []term // ascending, never empty
}

// NewKeyring makes a keyring with one random key.
func NewKeyring() (*Keyring, error) {
	t := term{number: 1}
	rand.Read(t.key[:])
	var err error
	if t.aead, err = newAEAD(t.key[:]); err != nil {
		return nil, fmt.Errorf("making a keyring: %w", err)
	}
	return &Keyring{terms: []term{t}}, nil
}

// ParseKeyring reads what Plain wrote. It copies: the caller should clear plain.
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
		t := term{number: binary.BigEndian.Uint32(body)}
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
	out := make([]byte, 0, len(keyringMagic)+len(k.terms)*termBytes)
	out = append(out, keyringMagic...)
	for i := range k.terms {
		out = binary.BigEndian.AppendUint32(out, k.terms[i].number)
		out = append(out, k.terms[i].key[:]...)
	}
	return out
}

// Seal encrypts plaintext under the newest key. ad says where the ciphertext belongs: Open wants the same.
func (k *Keyring) Seal(plaintext, ad []byte) ([]byte, error) {
	t := &k.terms[len(k.terms)-1]
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
	if header[0] != sealFormat {
		return nil, fmt.Errorf("opening sealed data: format %d is unknown to this version: %w", header[0], ErrOpen)
	}
	number := binary.BigEndian.Uint32(header[1:])
	for i := range k.terms {
		if k.terms[i].number != number {
			continue
		}
		plain, err := k.terms[i].aead.Open(nil, nil, body, bind(header, ad))
		if err != nil {
			return nil, fmt.Errorf("opening sealed data under key %d: %w", number, ErrOpen)
		}
		return plain, nil
	}
	return nil, fmt.Errorf("opening sealed data: the keyring has no key %d: %w", number, ErrOpen)
}

// String, GoString and LogValue keep the keys out of logs and error messages.
func (k *Keyring) String() string       { return fmt.Sprintf("keyring of %d keys", len(k.terms)) }
func (k *Keyring) GoString() string     { return k.String() }
func (k *Keyring) LogValue() slog.Value { return slog.StringValue(k.String()) }
