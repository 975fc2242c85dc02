package node

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// Handlers of a RuntimeClass for gVisor, where Config.Sandbox says where it is: pods may connect to sockets of the host's, or, as
// runsc has it unless it is told otherwise, they may not.
const (
	RunscOpen   = "runsc"
	RunscClosed = "runsc-closed"
)

// sandboxConfig writes gVisor's configuration, and returns what containerd's says of it.
func (n *Node) sandboxConfig() (string, error) {
	if n.conf.Sandbox == "" {
		return "", nil
	}
	config := ""
	for handler, sockets := range map[string]string{RunscOpen: "open", RunscClosed: "none"} {
		file := n.path(handler + ".toml")
		if err := writeFile(file, fmt.Sprintf("binary_name = %q\n[runsc_config]\n  host-uds = %q\n  platform = \"systrap\"\n",
			n.runsc(), sockets), 0o644); err != nil {
			return "", err
		}
		config += fmt.Sprintf(`  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.%[1]s]
    runtime_type = "io.containerd.runsc.v1"
    pod_annotations = ["dev.gvisor.*"]
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.%[1]s.options]
      TypeUrl = "io.containerd.runsc.v1.options"
      ConfigPath = %[2]q
`, handler, file)
	}
	return config, nil
}

func (n *Node) runsc() string { return filepath.Join(n.conf.Sandbox, "runsc") }

// ErrNoSandbox is what TrySandbox returns where there is no gVisor, or none that this machine can run.
var ErrNoSandbox = errors.New("no gVisor here")

// TrySandbox runs one program in gVisor without Kubernetes, to tell a machine that cannot run it from a fault.
func (n *Node) TrySandbox(ctx context.Context) error {
	if n.conf.Sandbox == "" {
		return fmt.Errorf("%w: make integration builds it", ErrNoSandbox)
	}
	dir, err := os.MkdirTemp(n.conf.Dir, "try-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if out, err := n.Run(ctx, "", n.runsc(), "--root", dir, "--platform", "systrap", "--ignore-cgroups", "--network", "none", "do", "true"); err != nil {
		return fmt.Errorf("%w: runsc does not run on this machine: %w: %s", ErrNoSandbox, err, tail([]byte(out)))
	}
	return nil
}
