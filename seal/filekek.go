package seal

import (
	"context"
	"crypto/cipher"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"path/filepath"

	"countersign.io/countersign/internal/durable"
)

// fileKEKFormat is the first byte of what a file KEK wraps.
const fileKEKFormat = 1

type fileKEK struct {
	uri  string
	aead cipher.AEAD
}

// OpenFileKEK reads the 32-byte key at path, and makes one (mode 0600, random) where there is none. A file that
// others may read, or of another length, is refused. Two processes must not make the same key at once: the caller
// holds the lock of the folder. A crash leaves either no key or a whole one.
func OpenFileKEK(path string) (KEK, error) { return openFileKEK(path, false) }

func openFileKEK(path string, mustExist bool) (KEK, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return nil, fmt.Errorf("opening key file %q: %w", path, err)
	}
	key, err := durable.ReadPrivateFile(abs, keyBytes+1)
	if errors.Is(err, fs.ErrNotExist) && !mustExist {
		key = make([]byte, keyBytes)
		rand.Read(key)
		err = durable.WriteFile(abs, key, 0o600)
	}
	defer clear(key)
	if err != nil {
		return nil, fmt.Errorf("opening key file %s: %w", abs, err)
	}
	if len(key) != keyBytes {
		return nil, fmt.Errorf("opening key file %s: it does not hold the %d bytes of a key: restore it from its copy", abs, keyBytes)
	}
	aead, err := newAEAD(key)
	if err != nil {
		return nil, fmt.Errorf("opening key file %s: %w", abs, err)
	}
	return &fileKEK{uri: (&url.URL{Scheme: "file", Path: abs}).String(), aead: aead}, nil
}

// URI is file://PATH.
func (k *fileKEK) URI() string { return k.uri }

// Wrap implements KEK.
func (k *fileKEK) Wrap(_ context.Context, plaintext, ad []byte) ([]byte, error) {
	header := []byte{fileKEKFormat}
	return k.aead.Seal(header, nil, plaintext, bind(header, ad)), nil
}

// Unwrap implements KEK.
func (k *fileKEK) Unwrap(_ context.Context, ciphertext, ad []byte) ([]byte, error) {
	if len(ciphertext) == 0 || ciphertext[0] != fileKEKFormat {
		return nil, fmt.Errorf("unwrapping with %s: unknown format: %w", k.uri, ErrOpen)
	}
	plain, err := k.aead.Open(nil, nil, ciphertext[1:], bind(ciphertext[:1], ad))
	if err != nil {
		return nil, fmt.Errorf("unwrapping with %s: %w", k.uri, ErrOpen)
	}
	return plain, nil
}
