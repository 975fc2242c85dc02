//go:build aws

package seal

import (
	"context"
	"fmt"

	wrapping "github.com/hashicorp/go-kms-wrapping/v2"
	"github.com/hashicorp/go-kms-wrapping/wrappers/awskms/v2"
)

// openAWS takes KEY?region=R&endpoint=E: a key's ID, ARN or alias/NAME.
func openAWS(ctx context.Context, rest string) (KEK, error) {
	key, config, err := splitURI(rest, "region", "endpoint")
	if err != nil {
		return nil, fmt.Errorf("awskms:%s: %w: want awskms:KEY?region=R", rest, err)
	}
	config["kms_key_id"] = key
	return openCloud(ctx, "awskms:"+rest, awskms.NewWrapper(), config, wrapping.WithDisallowEnvVars(true))
}
