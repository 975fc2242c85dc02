//go:build azure

package kmskey

import (
	"context"
	"crypto"

	kmsapi "go.step.sm/crypto/kms/apiv1"
	"go.step.sm/crypto/kms/azurekms"
)

func openAzure(ctx context.Context, uri string) (crypto.Signer, error) {
	km, err := azurekms.New(ctx, kmsapi.Options{URI: uri})
	return signerOf(uri, km, err)
}
