package seal

import (
	"context"
	"errors"
	"fmt"

	"countersign.io/countersign/internal/hsm"
)

// tokenKEK is an AES-256 key in a PKCS#11 token. The first Wrap makes it, if the token has none; Unwrap never does.
type tokenKEK struct{ key *hsm.AES }

func openPKCS11(uri string) (KEK, error) {
	u, err := hsm.ParseURI(uri)
	if err != nil {
		return nil, err
	}
	key, err := hsm.OpenAES(u)
	if err != nil {
		return nil, fmt.Errorf("opening %s: %w", u, err)
	}
	return &tokenKEK{key}, nil
}

// URI is the key's, without a PIN.
func (k *tokenKEK) URI() string { return k.key.URI() }

// Wrap implements KEK.
func (k *tokenKEK) Wrap(_ context.Context, plaintext, ad []byte) ([]byte, error) {
	out, err := k.key.Encrypt(plaintext, ad)
	if err != nil {
		return nil, fmt.Errorf("wrapping with %s: %w", k.URI(), err)
	}
	return out, nil
}

// Unwrap implements KEK.
func (k *tokenKEK) Unwrap(_ context.Context, ciphertext, ad []byte) ([]byte, error) {
	out, err := k.key.Decrypt(ciphertext, ad)
	if errors.Is(err, hsm.ErrOpen) {
		return nil, fmt.Errorf("unwrapping with %s: %w: %w", k.URI(), ErrOpen, err)
	}
	if err != nil {
		return nil, fmt.Errorf("unwrapping with %s: %w", k.URI(), err)
	}
	return out, nil
}
