// Command countersign is the server: a member of the CA cluster, the commands that operate it, and a
// development mode that needs no configuration.
package main

import (
	"context"
	"io"
	"os"

	"github.com/spf13/cobra"

	"countersign.io/countersign/cmd/internal/cli"
)

// version is set by the linker.
var version = "dev"

func main() { os.Exit(cli.Main(run)) }

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	root := newRoot()
	root.SetContext(ctx)
	return cli.Execute(root, args, stdout, stderr)
}

func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:   "countersign",
		Short: "A certificate authority and workload identity server",
		Long: `Countersign gives every workload a short-lived SPIFFE identity, proven by the workload itself.

Start with "countersign dev", then in another terminal "countersign-agent fetch x509".`,
		Version: version,
	}
	a := &admin{}
	root.AddCommand(serverCommand(), devCommand(), tokenCommand(a), kubeCommand(a), entryCommand(a), agentCommand(a), bundleCommand(a), statusCommand(a), sealCommand(a), authorityCommand(a), federationCommand(a), clusterCommand(a), backupCommand(a), auditCommand(a), x509Command(a), jwtCommand(a), checkCommand(a), controllerCommand(a), installCommand())
	return root
}
