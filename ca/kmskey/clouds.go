//go:build aws || gcp || azure

package kmskey

import (
	"crypto"
	"fmt"

	kmsapi "go.step.sm/crypto/kms/apiv1"

	"countersign.io/countersign/identity"
)

// signerOf asks a cloud's KMS for its signer of the key. The connection stays open for as long as the signer is used: the
// clouds' clients hold no session.
func signerOf(key string, km kmsapi.KeyManager, err error) (crypto.Signer, error) {
	if err != nil {
		return nil, fmt.Errorf("%w: %w", identity.ErrUnavailable, err)
	}
	s, err := km.CreateSigner(&kmsapi.CreateSignerRequest{SigningKey: key})
	if err != nil {
		return nil, fmt.Errorf("%w: %w", identity.ErrUnavailable, err)
	}
	return s, nil
}
