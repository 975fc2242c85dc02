//go:build azure

package seal

import (
	"context"
	"fmt"
	"os"
	"strings"

	"github.com/hashicorp/go-kms-wrapping/wrappers/azurekeyvault/v2"
)

// openAzure takes VAULT/KEY?environment=AzurePublicCloud.
func openAzure(ctx context.Context, rest string) (KEK, error) {
	name, config, err := splitURI(rest, "environment")
	vault, key, ok := strings.Cut(name, "/")
	if err != nil || !ok || vault == "" || key == "" || strings.Contains(key, "/") {
		return nil, fmt.Errorf("azurekeyvault:%s: want azurekeyvault:VAULT/KEY", rest)
	}
	// The wrapper would take these before the URI; the other variables, which say who we are, it should have.
	for _, env := range []string{azurekeyvault.EnvAzureKeyVaultWrapperVaultName, azurekeyvault.EnvVaultAzureKeyVaultVaultName, azurekeyvault.EnvAzureKeyVaultWrapperKeyName, azurekeyvault.EnvVaultAzureKeyVaultKeyName} {
		if os.Getenv(env) != "" {
			return nil, fmt.Errorf("azurekeyvault:%s: the environment variable %s would name another key: unset it", rest, env)
		}
	}
	config["vault_name"], config["key_name"] = vault, key
	return openCloud(ctx, "azurekeyvault:"+rest, azurekeyvault.NewWrapper(), config)
}
