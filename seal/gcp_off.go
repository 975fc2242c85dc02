//go:build !gcp

package seal

import "context"

func openGCP(context.Context, string) (KEK, error) { return nil, untagged("gcpkms", "gcp") }
