//go:build !cgo

package hsm

import (
	"crypto"
	"fmt"
)

func errNoCgo() error {
	return fmt.Errorf("%w: this build has no PKCS#11: build it with CGO_ENABLED=1", ErrToken)
}

// AES is an AES-256 key in a token; this build has none.
type AES struct{ uri URI }

// OpenAES fails: this build has no cgo, without which no module can be loaded.
func OpenAES(URI) (*AES, error) { return nil, errNoCgo() }

// URI names the key.
func (k *AES) URI() string { return k.uri.String() }

// Encrypt fails.
func (k *AES) Encrypt(_, _ []byte) ([]byte, error) { return nil, errNoCgo() }

// Decrypt fails.
func (k *AES) Decrypt(_, _ []byte) ([]byte, error) { return nil, errNoCgo() }

// OpenSigner fails: this build has no cgo.
func OpenSigner(URI) (crypto.Signer, error) { return nil, errNoCgo() }

// CreateSigner fails: this build has no cgo.
func CreateSigner(URI) (crypto.Signer, error) { return nil, errNoCgo() }
