//go:build aws

package kmskey

import (
	"context"
	"crypto"

	kmsapi "go.step.sm/crypto/kms/apiv1"
	"go.step.sm/crypto/kms/awskms"
)

func openAWS(ctx context.Context, uri string) (crypto.Signer, error) {
	km, err := awskms.New(ctx, kmsapi.Options{URI: uri})
	return signerOf(uri, km, err)
}
