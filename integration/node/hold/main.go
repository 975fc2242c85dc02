// Command hold is process 1 of a Kubernetes node for tests: of PID, mount and network namespaces of its own, in which it starts
// and ends programs as its parent says. It ends when the parent does, however that ends, since then its standard input does; and
// with process 1 the kernel ends everything in the namespaces: daemons, containers, mounts and network.
//
//	hold DIR < requests > answers        (a line of JSON each; see package node)
package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"countersign.io/countersign/integration/node"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "hold:", err)
		os.Exit(1)
	}
}

func run() error {
	if os.Getpid() != 1 || len(os.Args) != 2 {
		return errors.New("want to be process 1 of new namespaces, and the node's folder")
	}
	if err := mounts(os.Args[1]); err != nil {
		return err
	}
	if err := network(); err != nil {
		return err
	}
	h := &holder{out: json.NewEncoder(os.Stdout), children: map[string]*exec.Cmd{}, pids: map[int]bool{}}
	go h.reap()
	h.answer(node.Answer{})
	in := json.NewDecoder(bufio.NewReader(os.Stdin))
	for {
		var req node.Request
		if err := in.Decode(&req); err != nil {
			return nil // the parent has gone
		}
		go h.serve(req)
	}
}

// sysctls are what the kubelet insists on. It finds them in files laid over the machine's, which it therefore never writes.
func sysctls() map[string]string {
	return map[string]string{
		"vm/overcommit_memory": "1", "vm/panic_on_oom": "0", "kernel/panic": "10", "kernel/panic_on_oops": "1",
		"kernel/keys/root_maxkeys": "1000000", "kernel/keys/root_maxbytes": "25000000",
	}
}

// mounts makes a mount tree of the node's own: what is mounted in it reaches its containers, and not the machine. /run and
// /var/lib are empty, but for the kubelet's folder, which is one of the node's.
func mounts(dir string) error {
	kubelet := filepath.Join(dir, "kubelet")
	steps := []error{
		unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""),
		unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, ""),
		unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""),
		unix.Mount("tmpfs", "/run", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=755"),
		os.MkdirAll(kubelet, 0o755),
		unix.Mount("tmpfs", "/var/lib", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=755"),
		os.Mkdir("/var/lib/kubelet", 0o755),
		unix.Mount(kubelet, "/var/lib/kubelet", "", unix.MS_BIND, ""),
	}
	for key, value := range sysctls() {
		file := filepath.Join(dir, strings.ReplaceAll(key, "/", "-"))
		steps = append(steps, os.WriteFile(file, []byte(value+"\n"), 0o644), unix.Mount(file, filepath.Join("/proc/sys", key), "", unix.MS_BIND, ""))
	}
	if err := errors.Join(steps...); err != nil {
		return fmt.Errorf("making the node's mounts: %w", err)
	}
	return nil
}

// network makes the bridge that pods are on, up from the start by a pair of interfaces of its own, and the addresses of the
// services that are served without a kube-proxy: the API server's and the name server's.
func network() error {
	for _, args := range []string{
		"link set lo up",
		"link add " + node.Bridge + " type bridge", "addr add " + node.Address + "/16 dev " + node.Bridge, "link set " + node.Bridge + " up",
		"link add up0 type veth peer name up1", "link set up1 master " + node.Bridge, "link set up0 up", "link set up1 up",
		"route add default dev " + node.Bridge,
		"addr add " + node.APIService + "/32 dev lo", "addr add " + node.DNSService + "/32 dev lo",
	} {
		if out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput(); err != nil {
			return fmt.Errorf("ip %s: %w: %s", args, err, out)
		}
	}
	return nil
}

type holder struct {
	write sync.Mutex // guards out
	out   *json.Encoder

	mu       sync.Mutex // guards the rest
	children map[string]*exec.Cmd
	pids     map[int]bool // of programs that are waited for
}

func (h *holder) answer(a node.Answer) {
	h.write.Lock()
	defer h.write.Unlock()
	_ = h.out.Encode(a)
}

func (h *holder) serve(req node.Request) {
	a, err := h.do(req)
	a.ID = req.ID
	if err != nil {
		a.Error = err.Error()
	}
	h.answer(a)
}

func (h *holder) do(req node.Request) (node.Answer, error) {
	switch {
	case req.Signal != 0:
		h.mu.Lock()
		defer h.mu.Unlock()
		c := h.children[req.Name]
		if c == nil {
			return node.Answer{}, fmt.Errorf("%s does not run", req.Name)
		}
		return node.Answer{}, c.Process.Signal(syscall.Signal(req.Signal))
	case req.Name != "":
		return node.Answer{}, h.start(req)
	}
	var out, errs bytes.Buffer
	c := exec.Command(req.Argv[0], req.Argv[1:]...)
	c.Env, c.Stdin, c.Stdout, c.Stderr = append(os.Environ(), req.Env...), strings.NewReader(req.Stdin), &out, &errs
	if err := h.launch(c); err != nil {
		return node.Answer{}, err
	}
	if err := h.wait(c); err != nil {
		return node.Answer{Output: out.String()}, fmt.Errorf("%w: %s", err, errs.Bytes())
	}
	return node.Answer{Output: out.String()}, nil
}

// start starts a daemon, whose end is told.
func (h *holder) start(req node.Request) error {
	log, err := os.OpenFile(req.Log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	c := exec.Command(req.Argv[0], req.Argv[1:]...)
	c.Env, c.Stdout, c.Stderr = append(os.Environ(), req.Env...), log, log
	if err := h.launch(c); err != nil {
		return err
	}
	h.mu.Lock()
	h.children[req.Name] = c
	h.mu.Unlock()
	go func() {
		_ = h.wait(c)
		h.mu.Lock()
		if h.children[req.Name] == c {
			delete(h.children, req.Name)
		}
		h.mu.Unlock()
		h.answer(node.Answer{Ended: req.Name, Output: c.ProcessState.String()})
	}()
	return nil
}

func (h *holder) launch(c *exec.Cmd) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := c.Start(); err != nil {
		return err
	}
	h.pids[c.Process.Pid] = true
	return nil
}

func (h *holder) wait(c *exec.Cmd) error {
	err := c.Wait()
	h.mu.Lock()
	delete(h.pids, c.Process.Pid)
	h.mu.Unlock()
	return err
}

// reap takes leave of what others left behind, which process 1 inherits, such as the shims of containers that have ended. What
// is waited for is left to who waits.
func (h *holder) reap() {
	died := make(chan os.Signal, 16)
	signal.Notify(died, syscall.SIGCHLD)
	for range died {
		h.mu.Lock()
		children, _ := os.ReadFile("/proc/1/task/1/children")
		for child := range strings.FieldsSeq(string(children)) {
			if pid, err := strconv.Atoi(child); err == nil && !h.pids[pid] {
				_, _ = unix.Wait4(pid, nil, unix.WNOHANG, nil)
			}
		}
		h.mu.Unlock()
	}
}
