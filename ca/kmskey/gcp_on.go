//go:build gcp

package kmskey

import (
	"context"
	"crypto"
	"strings"

	kmsapi "go.step.sm/crypto/kms/apiv1"
	"go.step.sm/crypto/kms/cloudkms"
)

func openGCP(ctx context.Context, uri string) (crypto.Signer, error) {
	km, err := cloudkms.New(ctx, kmsapi.Options{URI: "cloudkms:"})
	return signerOf(strings.TrimPrefix(uri, "cloudkms:"), km, err)
}
