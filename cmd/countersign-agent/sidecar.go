package main

import (
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"countersign.io/countersign/cmd/internal/cli"
	"countersign.io/countersign/cmd/internal/runagent"
	"countersign.io/countersign/config"
	"countersign.io/countersign/identity"
)

// defaultSidecarSocket is in a folder of its own: the volume itself is everybody's to write.
const defaultSidecarSocket = "/run/countersign/pod/agent.sock"

func sidecarCommand() *cobra.Command {
	c := runagent.Sidecar{Version: version}
	var level, format string
	cmd := &cobra.Command{
		Use: "sidecar", Short: "Serve the Workload API to one pod, from inside of it", Args: cobra.NoArgs,
		Long: `Serve the SPIFFE Workload API to the pod that this runs in, by the pod's own projected token: no agent on the node, no host access.
Whoever reaches the socket is the pod, whatever process it is: keep the socket in a volume of this pod alone. docs/KUBERNETES.md shows
the container. Each flag can be set by an environment variable: --bundle-file by COUNTERSIGN_BUNDLE_FILE, and so on.`,
		Example: `  countersign-agent sidecar --servers countersign.countersign.svc:8443 --trust-domain example.org --bundle-file /etc/countersign/bundle.pem`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := fromEnvironment(cmd, os.LookupEnv); err != nil {
				return err
			}
			if len(c.Servers) == 0 || c.TrustDomain == "" {
				return fmt.Errorf("%w: --servers (or $COUNTERSIGN_SERVERS) and --trust-domain (or $COUNTERSIGN_TRUST_DOMAIN) are needed", identity.ErrInvalid)
			}
			c.Log = cli.Logger(cmd.ErrOrStderr(), config.Log{Level: level, Format: format})
			return runagent.RunSidecar(cmd.Context(), c)
		},
	}
	f := cmd.Flags()
	f.StringSliceVar(&c.Servers, "servers", nil, "members, host:port, separated by commas; the others are learnt")
	f.StringVar(&c.TrustDomain, "trust-domain", "", "trust domain, such as example.org")
	f.StringVar(&c.BundleFile, "bundle-file", "", "file with the trust domain's X.509 authorities (PEM) or its bundle (SPIFFE JSON), read again at each first contact")
	f.StringVar(&c.CAPin, "ca-pin", "", "in place of --bundle-file: sha256:HEX of the CA's public key (countersign bundle show)")
	f.StringVar(&c.TokenPath, "token-path", config.DefaultTokenPath, "this pod's projected service account token")
	f.StringVar(&c.Socket, "socket", defaultSidecarSocket, "the Workload API socket")
	f.StringVar(&c.Health, "health", "127.0.0.1:8081", "host:port of /live, /ready and /metrics, plain HTTP")
	f.StringVar(&c.KeyType, "key-type", "ec-p256", "of the pod's keys: ec-p256, ec-p384, ed25519 or rsa-2048")
	f.StringVar(&level, "log", "info", "debug, info, warn or error")
	f.StringVar(&format, "log-format", "text", "text or json")
	return cmd
}

// fromEnvironment sets each flag that is not on the command line from the variable of its name.
func fromEnvironment(cmd *cobra.Command, lookup func(string) (string, bool)) error {
	for _, name := range []string{"servers", "trust-domain", "bundle-file", "ca-pin", "token-path", "socket", "health", "key-type", "log", "log-format"} {
		variable := "COUNTERSIGN_" + strings.ToUpper(strings.ReplaceAll(name, "-", "_"))
		if v, ok := lookup(variable); ok && v != "" && !cmd.Flags().Changed(name) {
			if err := cmd.Flags().Set(name, v); err != nil {
				return fmt.Errorf("%w: $%s: %v", identity.ErrInvalid, variable, err)
			}
		}
	}
	return nil
}
