// Package seal encrypts what rests on disk, in the Raft log, in snapshots and in backups. It has two tiers.
// A Keyring holds the data keys: it is the same on every member and reaches a joiner inside the
// authenticated join. A KEK, which may be different on each member, wraps the keyring for that member's disk,
// so that a stolen disk or backup yields nothing without it. The package does not know what it seals: the
// caller's additional data binds a ciphertext to its place.
//
// Everything is AES-256-GCM with a random 96-bit nonce: one key is good for 2^32 messages.
package seal

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"errors"
	"fmt"
)

// ErrOpen says that a ciphertext does not open: it was made under another key, belongs to another place, or was
// altered. Which of them cannot be told.
var ErrOpen = errors.New("the ciphertext does not open with this key in this place")

// KEK is a key encryption key: a file here, a KMS or an HSM elsewhere.
type KEK interface {
	// URI names the key in errors and beside what it wrapped. It MUST NOT hold a secret.
	URI() string
	// Wrap encrypts plaintext and authenticates ad with it. It MUST NOT keep plaintext.
	Wrap(ctx context.Context, plaintext, ad []byte) ([]byte, error)
	// Unwrap MUST fail with an error wrapping ErrOpen unless ciphertext came from Wrap under this key and with this ad.
	Unwrap(ctx context.Context, ciphertext, ad []byte) ([]byte, error)
}

const keyBytes = 32 // AES-256

// newAEAD is AES-256-GCM that draws a nonce for each Seal and puts it in front of the ciphertext.
func newAEAD(key []byte) (cipher.AEAD, error) {
	if len(key) != keyBytes {
		return nil, fmt.Errorf("key of %d bytes: want %d", len(key), keyBytes)
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, fmt.Errorf("preparing AES: %w", err)
	}
	return cipher.NewGCMWithRandomNonce(block)
}

// bind is what is authenticated beside the ciphertext: the header, whose length is fixed for its first byte, and
// then the caller's data. Without the header in it, an attacker could relabel a ciphertext's format or key version.
func bind(header, ad []byte) []byte {
	out := make([]byte, 0, len(header)+len(ad))
	return append(append(out, header...), ad...)
}
