// Command countersign-agent is the node agent, and what a workload or an operator runs against its socket.
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
		Use:     "countersign-agent",
		Short:   "The node agent, and commands that use its SPIFFE Workload API",
		Version: version,
	}
	w := &workload{}
	root.AddCommand(runCommand(), sidecarCommand(), fetchCommand(w), watchCommand(w), validateCommand(w), healthCommand())
	return root
}
