//go:build !azure

package seal

import "context"

func openAzure(context.Context, string) (KEK, error) { return nil, untagged("azurekeyvault", "azure") }
