package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// startControllers starts the controller manager and the scheduler. They notice a lost node quickly, so that tests need not wait.
func (n *Node) startControllers(ctx context.Context) error {
	kubenode := filepath.Join(n.conf.Bin, "kubenode")
	common := func(name string) []string {
		file := n.path("pki/" + name + ".kubeconfig")
		return []string{
			"--kubeconfig=" + file, "--authentication-kubeconfig=" + file, "--authorization-kubeconfig=" + file,
			"--leader-elect=false", "--bind-address=127.0.0.1", "--cert-dir=" + n.path(name+"-certs"),
		}
	}
	controllers := append([]string{kubenode, "kube-controller-manager"}, common("controller-manager")...)
	if err := n.daemon(ctx, "controllers", append(controllers,
		"--use-service-account-credentials", "--service-account-private-key-file="+n.path("pki/sa.key"), "--root-ca-file="+n.path("pki/ca.crt"),
		"--allocate-node-cidrs=false", "--flex-volume-plugin-dir="+n.path("flex"),
		"--node-monitor-period=1s", "--node-monitor-grace-period=10s",
	)...); err != nil {
		return err
	}
	return n.daemon(ctx, "scheduler", append([]string{kubenode, "kube-scheduler"}, common("scheduler")...)...)
}

// startRuntime starts containerd with runc and the bridge plugin.
func (n *Node) startRuntime(ctx context.Context) error {
	// Machines without CAP_SYS_RESOURCE refuse runc a lower OOM score than its own: restrict_oom_score_adj.
	config := fmt.Sprintf(`version = 2
root = %[1]q
state = "/run/containerd"
[grpc]
  address = %[2]q
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = %[3]q
  disable_apparmor = true
  restrict_oom_score_adj = true
  max_concurrent_downloads = 1
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = %[4]q
    conf_dir = %[5]q
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      BinaryName = %[6]q
      SystemdCgroup = false
`, n.path("cd"), n.path("cri.sock"), PauseImage, n.conf.deb("lib/cni"), n.path("cni"), n.conf.deb("sbin/runc"))
	sandbox, err := n.sandboxConfig()
	if err != nil {
		return err
	}
	config += sandbox
	network := fmt.Sprintf(`{"cniVersion": "0.4.0", "name": "pods", "plugins": [{"type": "bridge", "bridge": %q, "isGateway": true, "ipam": {
  "type": "host-local", "dataDir": %q, "ranges": [[{"subnet": %q, "rangeStart": "10.88.0.10"}]], "routes": [{"dst": "0.0.0.0/0"}]}}]}
`, Bridge, n.path("ipam"), subnet)
	if err := errors.Join(writeFile(n.path("containerd.toml"), config, 0o644), writeFile(n.path("cni/pods.conflist"), network, 0o644)); err != nil {
		return err
	}
	if err := n.daemon(ctx, "containerd", n.conf.deb("bin/containerd"), "-c", n.path("containerd.toml")); err != nil {
		return err
	}
	if err := n.poll(ctx, "containerd", func() error { _, err := n.ctr(ctx, "version"); return err }); err != nil {
		return err
	}
	return n.Build(ctx, Image{Name: PauseImage, Programs: []string{n.conf.Pause}, Entrypoint: []string{"/" + filepath.Base(n.conf.Pause), "pause"}})
}

// StartKubelet starts the kubelet, also one that was stopped before; one that runs is left alone.
func (n *Node) StartKubelet(ctx context.Context) error {
	if n.hold.runs("kubelet") {
		return nil
	}
	pki := n.path("pki")
	config := fmt.Sprintf(`apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
failCgroupV1: false
cgroupDriver: cgroupfs
cgroupRoot: /%[1]s
enforceNodeAllocatable: [pods]
containerRuntimeEndpoint: unix://%[2]s
address: 0.0.0.0
tlsCertFile: %[3]s/kubelet.crt
tlsPrivateKeyFile: %[3]s/kubelet.key
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: %[3]s/ca.crt}}
authorization: {mode: Webhook}
clusterDNS: [%[4]s]
clusterDomain: cluster.local
resolvConf: ""
maxPods: 300
oomScoreAdj: 0
podLogsDir: %[5]s
volumePluginDir: %[6]s/volumeplugins
failSwapOn: false
makeIPTablesUtilChains: false
imageGCHighThresholdPercent: 100
evictionHard: {nodefs.available: "0%%", nodefs.inodesFree: "0%%", imagefs.available: "0%%", memory.available: "50Mi"}
syncFrequency: 10s
nodeStatusUpdateFrequency: 2s
`, n.group, n.path("cri.sock"), pki, DNSService, n.path("podlogs"), KubeletDir)
	if err := writeFile(n.path("kubelet.yaml"), config, 0o644); err != nil {
		return err
	}
	return n.daemon(ctx, "kubelet", filepath.Join(n.conf.Bin, "kubenode"), "kubelet", "--config="+n.path("kubelet.yaml"),
		"--kubeconfig="+n.path("pki/kubelet.kubeconfig"), "--hostname-override="+Name, "--node-ip="+Address)
}

// groups are the folders of this node in each cgroup hierarchy.
func (n *Node) groups() ([]string, error) {
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return nil, err
	}
	var out []string
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); len(f) > 3 && (f[2] == "cgroup" || f[2] == "cgroup2") {
			out = append(out, filepath.Join(f[1], n.group))
		}
	}
	return out, nil
}

// makeGroups makes what the kubelet wants to find, and a group for the daemons' share of the processors. In version 1, a new group of
// cpuset has no processors until it is told.
func (n *Node) makeGroups() error {
	groups, err := n.groups()
	if err != nil {
		return err
	}
	for _, g := range groups {
		if err := os.Mkdir(g, 0o755); err != nil {
			return fmt.Errorf("making a control group: %w", err)
		}
		if _, err := os.Stat(filepath.Join(g, "cpu.shares")); err == nil {
			n.slice = filepath.Join(g, "system")
			// The whole node before what else is on the machine.
			if err := errors.Join(os.Mkdir(n.slice, 0o755), os.WriteFile(filepath.Join(g, "cpu.shares"), []byte("8192"), 0)); err != nil {
				return fmt.Errorf("making a control group: %w", err)
			}
		}
		for _, f := range []string{"cpuset.cpus", "cpuset.mems"} {
			all, err := os.ReadFile(filepath.Join(filepath.Dir(g), f))
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err := errors.Join(err, os.WriteFile(filepath.Join(g, f), all, 0)); err != nil {
				return fmt.Errorf("making a control group: %w", err)
			}
		}
	}
	return nil
}

// removeGroups ends whatever is still in the groups, all of it ours, and removes them.
func (n *Node) removeGroups() error {
	groups, err := n.groups()
	if err != nil {
		return err
	}
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		left := ""
		for _, g := range groups {
			var dirs []string
			_ = filepath.WalkDir(g, func(path string, d fs.DirEntry, err error) error {
				if err == nil && d.IsDir() {
					dirs = append(dirs, path)
				}
				return nil
			})
			for _, d := range slices.Backward(dirs) {
				procs, _ := os.ReadFile(filepath.Join(d, "cgroup.procs"))
				for pid := range strings.FieldsSeq(string(procs)) {
					if p, err := strconv.Atoi(pid); err == nil && p > 0 {
						_ = syscall.Kill(p, syscall.SIGKILL)
					}
				}
				if err := syscall.Rmdir(d); err != nil && !errors.Is(err, fs.ErrNotExist) {
					left = d
				}
			}
		}
		if left == "" {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("cannot remove control group %s", left)
		}
	}
}
