// Package node starts a whole Kubernetes of one node for tests: API server, controller manager, scheduler, kubelet, containerd,
// runc and the bridge plugin, all real, and a name server for headless services. They run in PID, mount and network namespaces
// of their own, so that they touch nothing of the machine's but control groups, and end with the process that started them. It
// needs root, iproute2, and what integration/run builds and unpacks.
//
// There is no kube-proxy: of all services with an address of their own, only "kubernetes" and the name server work.
package node

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
)

// Name is what the API server calls the node.
const Name = "node-1"

// KubeletDir is the kubelet's folder, as the node sees it.
const KubeletDir = "/var/lib/kubelet"

// PauseImage is the one that keeps a pod's namespaces.
const PauseImage = "node.test/pause:1"

// Config says where what a node is made of is.
type Config struct {
	Dir   string // of this node, empty, with a path of 40 characters at the most: sockets live in it
	Bin   string // has kubeapi and kubenode
	Debs  string // has the files of the packages containerd, runc and containernetworking-plugins
	Hold  string // the command hold, built
	Pause string // a static program that waits, for PauseImage
	// Sandbox has runsc and containerd-shim-runsc-v1, gVisor's, for the handlers RunscOpen and RunscClosed of a RuntimeClass; empty: neither.
	Sandbox string
	// Issuer of service account tokens; the API server's flags beyond the usual.
	Issuer   string
	APIFlags []string
}

// Node is a Kubernetes of one node. Its methods can be called concurrently.
type Node struct {
	URL  string       // of the API server, within the node
	HTTP *http.Client // reaches it as its administrator

	conf  Config
	group string // name of the control groups that its pods are in
	slice string // folder of the control groups of its daemons; empty: there are none
	hold  *holder

	mu    sync.Mutex // guards kinds
	kinds map[string]map[string]kind

	stop context.CancelFunc // of what runs in this process
	done sync.WaitGroup
}

// Start starts a node and waits until it is ready for pods. What it started ends with Close, or with this process.
func Start(ctx context.Context, conf Config) (*Node, error) {
	if len(conf.Dir) > 40 {
		return nil, fmt.Errorf("starting a node: the path %s is too long for sockets", conf.Dir)
	}
	for _, f := range []string{filepath.Join(conf.Bin, "kubeapi"), filepath.Join(conf.Bin, "kubenode"), conf.deb("bin/containerd")} {
		if _, err := os.Stat(f); err != nil {
			return nil, fmt.Errorf("starting a node: %w: make integration builds and unpacks it", err)
		}
	}
	n := &Node{conf: conf, group: "cs-it-" + filepath.Base(conf.Dir), kinds: map[string]map[string]kind{}, URL: "https://" + Address}
	var background context.Context
	background, n.stop = context.WithCancel(context.Background())
	if err := n.start(ctx, background); err != nil {
		return nil, errors.Join(fmt.Errorf("starting a node: %w", err), n.Close())
	}
	return n, nil
}

// deb is a file of a Debian package.
func (c Config) deb(name string) string { return filepath.Join(c.Debs, "usr", name) }

func (n *Node) start(ctx, background context.Context) error {
	if err := os.MkdirAll(n.path("log"), 0o755); err != nil {
		return err
	}
	log, err := os.Create(n.path("log/hold"))
	if err != nil {
		return err
	}
	defer log.Close()
	if n.hold, err = newHolder(n.conf.Hold, n.conf.Dir, log); err != nil {
		return err
	}
	if err := n.makeGroups(); err != nil {
		return err
	}
	if err := n.StartAPI(ctx); err != nil {
		return err
	}
	if n.HTTP, err = n.administrator(); err != nil {
		return err
	}
	if err := n.serveNames(background); err != nil {
		return err
	}
	for _, start := range []func(context.Context) error{n.startControllers, n.startRuntime, n.StartKubelet} {
		if err := start(ctx); err != nil {
			return err
		}
	}
	if err := WaitFor(ctx, n, "/api/v1/nodes", Name, "the node is ready", Ready); err != nil {
		return err
	}
	// A controller makes it, and without it no pod can be made there.
	any := func(*corev1.ServiceAccount) bool { return true }
	return WaitFor(ctx, n, "/api/v1/namespaces/default/serviceaccounts", "default", "there is the service account default", any)
}

// Ready reports whether a node says so.
func Ready(n *corev1.Node) bool {
	for _, c := range n.Status.Conditions {
		if c.Type == corev1.NodeReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}

// Dir is the node's folder.
func (n *Node) Dir() string { return n.conf.Dir }

func (n *Node) path(name string) string { return filepath.Join(n.conf.Dir, name) }

// Close ends everything and removes the control groups; the folder is the caller's.
func (n *Node) Close() error {
	n.stop()
	if n.hold != nil {
		n.hold.close()
	}
	n.done.Wait()
	return n.removeGroups()
}

// Log is the last part of what a daemon wrote.
func (n *Node) Log(name string) string {
	data, _ := os.ReadFile(n.path("log/" + name))
	return string(data[max(0, len(data)-6000):])
}

// daemon starts a program in the node.
func (n *Node) daemon(ctx context.Context, name string, argv ...string) error {
	if n.slice != "" {
		// As systemd does: a group for each daemon, beside that of all pods. Without, each of their many processes had as large a share of
		// the processors as all pods together, those of members and agents among them.
		argv = append([]string{"/bin/sh", "-ec", `mkdir -p "$0"; echo 0 > "$0/cgroup.procs"; exec "$@"`, filepath.Join(n.slice, name)}, argv...)
	}
	path := n.conf.deb("bin") + ":" + n.conf.deb("sbin") + ":" + os.Getenv("PATH")
	if n.conf.Sandbox != "" {
		path = n.conf.Sandbox + ":" + path // containerd finds a shim there by its name
	}
	if _, err := n.hold.ask(ctx, Request{Name: name, Argv: argv, Env: []string{"PATH=" + path}, Log: n.path("log/" + name)}); err != nil {
		return fmt.Errorf("starting %s: %w", name, err)
	}
	return nil
}

// Run runs a program in the node's namespaces to its end.
func (n *Node) Run(ctx context.Context, stdin string, argv ...string) (string, error) {
	out, err := n.hold.ask(ctx, Request{Argv: argv, Stdin: stdin})
	if err != nil {
		return out, fmt.Errorf("%s: %w", strings.Join(argv, " "), err)
	}
	return out, nil
}

// StartAPI starts the API server, also one that was stopped before; one that runs is left alone.
func (n *Node) StartAPI(ctx context.Context) error {
	if n.hold.runs("api") {
		return nil
	}
	argv := []string{filepath.Join(n.conf.Bin, "kubeapi"), "-dir", n.conf.Dir, "-port", "443", "-bind", "0.0.0.0", "-address", Address, "-node", Name}
	if n.conf.Issuer != "" {
		argv = append(argv, "-issuer", n.conf.Issuer)
	}
	log := n.path("log/api")
	before, _ := os.Stat(log)
	if err := n.daemon(ctx, "api", append(append(argv, "--"), n.conf.APIFlags...)...); err != nil {
		return err
	}
	return n.poll(ctx, "the API server", func() error {
		data, err := os.ReadFile(log)
		if err != nil {
			return err
		}
		if before != nil {
			data = data[min(before.Size(), int64(len(data))):]
		}
		if !strings.Contains("\n"+string(data), "\nREADY\n") {
			return fmt.Errorf("it does not say READY: %s", tail(data))
		}
		return nil
	})
}

// StopAPI ends the API server at once, and its etcd with it.
func (n *Node) StopAPI(ctx context.Context) error { return n.hold.kill(ctx, "api") }

// HangAPI has the API server answer nobody, and ContinueAPI has it go on.
func (n *Node) HangAPI(ctx context.Context) error { return n.signal(ctx, "api", unix.SIGSTOP) }

// ContinueAPI undoes HangAPI.
func (n *Node) ContinueAPI(ctx context.Context) error { return n.signal(ctx, "api", unix.SIGCONT) }

// StopKubelet is the node's loss, as far as the API server can tell: pods run on, and nobody speaks for them.
func (n *Node) StopKubelet(ctx context.Context) error { return n.hold.kill(ctx, "kubelet") }

func (n *Node) signal(ctx context.Context, name string, s syscall.Signal) error {
	_, err := n.hold.ask(ctx, Request{Name: name, Signal: int(s)})
	return err
}

// poll asks again until there is no error, for what no event tells; a minute at the most.
func (n *Node) poll(ctx context.Context, what string, ok func() error) error {
	return n.pollFor(ctx, time.Minute, what, ok)
}

func (n *Node) pollFor(ctx context.Context, limit time.Duration, what string, ok func() error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		err := ok()
		var stop final
		if err == nil || errors.As(err, &stop) {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting for %s: %w: %w", what, ctx.Err(), err)
		case <-tick.C:
		}
	}
}

func tail(data []byte) string { return string(data[max(0, len(data)-2000):]) }

// Enter calls f on a thread in the node's network namespace: sockets that are made there stay there.
func (n *Node) Enter(f func() error) error {
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		if err := unix.Setns(int(n.hold.net.Fd()), unix.CLONE_NEWNET); err != nil {
			result <- fmt.Errorf("entering the node's network: %w", err)
			return
		}
		result <- f()
	}()
	return <-result
}

func writeFile(name, text string, mode os.FileMode) error {
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return err
	}
	return os.WriteFile(name, []byte(text), mode)
}

// Import gives the node images: archives of this machine.
func (n *Node) Import(ctx context.Context, archives ...string) error {
	for _, a := range archives {
		if _, err := n.ctr(ctx, "images", "import", "--digests", a); err != nil {
			return err
		}
	}
	return nil
}

// Build makes images and imports them.
func (n *Node) Build(ctx context.Context, images ...Image) error {
	for _, i := range images {
		file := n.path("image.tar")
		f, err := os.Create(file)
		if err != nil {
			return err
		}
		if err := errors.Join(i.Write(f), f.Close(), n.Import(ctx, file), os.Remove(file)); err != nil {
			return err
		}
	}
	return nil
}

// Volumes makes so many persistent volumes of the node's disk, for claims without a storage class.
func (n *Node) Volumes(ctx context.Context, count int) error {
	var manifest strings.Builder
	for i := range count {
		dir := n.path(fmt.Sprintf("volume-%d", i))
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
		fmt.Fprintf(&manifest, `---
apiVersion: v1
kind: PersistentVolume
metadata: {name: volume-%d}
spec:
  capacity: {storage: 10Gi}
  accessModes: [ReadWriteOnce]
  persistentVolumeReclaimPolicy: Retain
  local: {path: %q}
  nodeAffinity: {required: {nodeSelectorTerms: [{matchExpressions: [{key: kubernetes.io/hostname, operator: In, values: [%s]}]}]}}
`, i, dir, Name)
	}
	return n.Apply(ctx, manifest.String())
}

func (n *Node) ctr(ctx context.Context, args ...string) (string, error) {
	return n.Run(ctx, "", append([]string{n.conf.deb("bin/ctr"), "-a", n.path("cri.sock"), "-n", "k8s.io"}, args...)...)
}

var _ io.Closer = (*Node)(nil)
