//go:build gcp

package seal

import (
	"context"
	"fmt"
	"strings"

	wrapping "github.com/hashicorp/go-kms-wrapping/v2"
	"github.com/hashicorp/go-kms-wrapping/wrappers/gcpckms/v2"
)

// openGCP takes projects/P/locations/L/keyRings/R/cryptoKeys/K?credentials=/path.
func openGCP(ctx context.Context, rest string) (KEK, error) {
	key, config, err := splitURI(rest, "credentials")
	p := strings.Split(key, "/")
	if err != nil || len(p) != 8 || p[0] != "projects" || p[2] != "locations" || p[4] != "keyRings" || p[6] != "cryptoKeys" {
		return nil, fmt.Errorf("gcpkms:%s: want gcpkms:projects/P/locations/L/keyRings/R/cryptoKeys/K", rest)
	}
	config["project"], config["region"], config["key_ring"], config["crypto_key"] = p[1], p[3], p[5], p[7]
	return openCloud(ctx, "gcpkms:"+rest, gcpckms.NewWrapper(), config, wrapping.WithDisallowEnvVars(true))
}
