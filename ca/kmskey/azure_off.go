//go:build !azure

package kmskey

import (
	"context"
	"crypto"
)

func openAzure(context.Context, string) (crypto.Signer, error) {
	return nil, untagged("azurekms", "azure")
}
