// Command containerd-shim-runsc-v1 is gVisor's shim for containerd as it is, but for one thing: it also starts on a machine without
// CAP_SYS_RESOURCE. For tests.
package main

import (
	"fmt"
	"os"
	"slices"

	"github.com/containerd/containerd/pkg/userns"
	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/shim/v1/cli"
)

func main() {
	if slices.Contains(os.Args[1:], "start") && !mayLowerScores() {
		if err := forgiveScores(); err != nil {
			fmt.Fprintln(os.Stderr, "containerd-shim-runsc-v1:", err)
			os.Exit(1)
		}
	}
	cli.Main()
}

// mayLowerScores reports whether this process can give another a lower OOM score than its own.
func mayLowerScores() bool {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	err := unix.Capget(&header, &data[0])
	return err == nil && data[0].Effective&(1<<unix.CAP_SYS_RESOURCE) != 0
}

// forgiveScores has containerd's library, which forgives a refused score within a user namespace only, take this process for one in such a
// namespace: it asks the kernel once and remembers, and for that once finds another file.
func forgiveScores() error {
	const asked = "/proc/self/uid_map"
	f, err := os.CreateTemp("", "uid_map-")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.WriteString("0 0 1\n")
	if err := f.Close(); err != nil {
		return err
	}
	if err != nil {
		return err
	}
	if err := unix.Mount(f.Name(), asked, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mounting over %s: %w", asked, err)
	}
	userns.RunningInUserNS()
	if err := unix.Unmount(asked, 0); err != nil {
		return fmt.Errorf("unmounting %s: %w", asked, err)
	}
	return nil
}
