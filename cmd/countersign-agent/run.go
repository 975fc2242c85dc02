package main

import (
	"github.com/spf13/cobra"

	"countersign.io/countersign/cmd/internal/cli"
	"countersign.io/countersign/cmd/internal/runagent"
	"countersign.io/countersign/config"
)

func runCommand() *cobra.Command {
	var file, devPods string
	cmd := &cobra.Command{
		Use: "run -c FILE", Short: "Run the node agent", Args: cobra.NoArgs,
		Long: `Run the node agent until it is interrupted: it proves its node to a member, and serves the SPIFFE Workload API on a Unix
socket. docs/CONFIG.md lists the settings.`,
		Example: `  countersign-agent run -c /etc/countersign/agent.yaml

  # agent.yaml
  version: 1
  trust_domain: example.org
  servers: [ca-1.example.org:8443]
  ca_pin: sha256:...          # countersign bundle show
  attest: {kube: {cluster: prod}}`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := config.LoadAgent(file)
			if err != nil {
				return err
			}
			return runagent.Run(cmd.Context(), c, runagent.Options{Version: version, Log: cli.Logger(cmd.ErrOrStderr(), c.Log), DevPods: devPods})
		},
	}
	cmd.Flags().StringVarP(&file, "config", "c", "/etc/countersign/agent.yaml", "configuration file")
	cmd.Flags().StringVar(&devPods, "insecure-dev-pods", "", "development only: a process is the pod whose token, in this folder, its COUNTERSIGN_DEV_POD names")
	return cmd
}
