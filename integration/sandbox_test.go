//go:build integration

package integration

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"countersign.io/countersign/integration/cluster"
)

// tokenVolume is where a pod has its token.
const tokenVolume = "/var/run/secrets/countersign.io"

// static builds what runs inside of pods, where there is no C library.
var static = sync.OnceValues(func() (string, error) {
	dir := filepath.Join(bin, "static")
	cmd := exec.Command("go", "build", "-o", dir+"/", "./cmd/countersign", "./cmd/countersign-agent", "./integration/workload", "./integration/pod", "./integration/node/hold")
	cmd.Dir, cmd.Env = "..", append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building: %w\n%s", err, out)
	}
	self, err := os.ReadFile(filepath.Join(dir, "pod"))
	if err != nil {
		return "", err
	}
	return dir, os.WriteFile(filepath.Join(dir, "other"), self, 0o755) // for callers that execute another file
})

// kubelet plays the kubelet and the container runtime of one node, for one test: pods are processes in mount namespaces and
// control groups of their own. Everything ends with the test.
type kubelet struct {
	t       *testing.T
	ctx     context.Context
	c       *cluster.Cluster
	socket  string // of the agent, alone in its folder with the agent's own files
	bin     string
	cgroups []string // this node's folder in each hierarchy
}

func newKubelet(t *testing.T, ctx context.Context, c *cluster.Cluster, socket string) *kubelet {
	t.Helper()
	needRoot(t)
	dir, err := static()
	if err != nil {
		t.Fatal(err)
	}
	n := &kubelet{t: t, ctx: ctx, c: c, socket: socket, bin: dir}
	name := "cs-it-" + random(4)
	for _, h := range hierarchies(t) {
		dir := filepath.Join(h, name)
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Logf("no control group: %v", err)
			continue
		}
		n.cgroups = append(n.cgroups, dir)
		t.Cleanup(func() { removeCgroup(t, dir) })
	}
	if len(n.cgroups) == 0 {
		t.Skip("needs a cgroup hierarchy in which this process may make groups")
	}
	return n
}

// hierarchies are this process's own groups in a version 1 hierarchy that limits nothing here, in systemd's, and in
// version 2, as far as the machine has them.
func hierarchies(t *testing.T) []string {
	t.Helper()
	own := map[string]string{}
	groups, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(groups)) {
		if f := strings.SplitN(strings.TrimSpace(line), ":", 3); len(f) == 3 {
			own[f[1]] = f[2]
		}
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for line := range strings.Lines(string(mounts)) {
		f := strings.Fields(line)
		if len(f) < 4 {
			continue
		}
		options := strings.Split(f[3], ",")
		which := ""
		switch {
		case f[2] == "cgroup2":
		case f[2] == "cgroup" && slices.Contains(options, "pids"):
			which = "pids"
		case f[2] == "cgroup" && slices.Contains(options, "name=systemd"):
			which = "name=systemd"
		default:
			continue
		}
		if path, ok := own[which]; ok {
			out = append(out, filepath.Join(f[1], path))
		}
	}
	return out
}

// removeCgroup ends whatever is still in the groups, all of it ours, and removes them.
func removeCgroup(t *testing.T, dir string) {
	deadline := time.Now().Add(10 * time.Second)
	for {
		var dirs []string
		_ = filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				dirs = append(dirs, path)
			}
			return nil
		})
		for _, d := range slices.Backward(dirs) {
			procs, _ := os.ReadFile(filepath.Join(d, "cgroup.procs"))
			for pid := range strings.FieldsSeq(string(procs)) {
				if p, err := strconv.Atoi(pid); err == nil {
					_ = syscall.Kill(p, syscall.SIGKILL)
				}
			}
			_ = syscall.Rmdir(d)
		}
		if _, err := os.Stat(dir); os.IsNotExist(err) {
			return
		}
		if time.Now().After(deadline) {
			t.Errorf("cannot remove control group %s", dir)
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func random(n int) string {
	b := make([]byte, n)
	rand.Read(b)
	return hex.EncodeToString(b)
}

// sandbox is one container of a pod: its volume with the token, its control groups, and what runs in it.
type sandbox struct {
	n       *kubelet
	dir     string
	cgroups []string
	proc    bool // the host's /proc inside, as with hostPID
}

// sandbox makes a container for the pod of that UID with the token in place. The driver names the control groups: cgroupfs or systemd;
// "none" leaves the container's processes outside of any pod.
func (n *kubelet) sandbox(uid, driver, token string) *sandbox {
	n.t.Helper()
	s := &sandbox{n: n, dir: filepath.Join(n.c.Dir, "pod-"+random(4))}
	for _, d := range []string{"volume", "root"} {
		if err := os.MkdirAll(filepath.Join(s.dir, d), 0o755); err != nil {
			n.t.Fatal(err)
		}
	}
	container := random(32)
	for _, c := range n.cgroups {
		switch driver {
		case "cgroupfs":
			c = filepath.Join(c, "kubepods", "besteffort", "pod"+uid, container)
		case "systemd":
			slice := "kubepods-burstable-pod" + strings.ReplaceAll(uid, "-", "_") + ".slice"
			c = filepath.Join(c, "kubepods.slice", "kubepods-burstable.slice", slice, "cri-containerd-"+container+".scope")
		default:
			continue
		}
		if err := os.MkdirAll(c, 0o755); err != nil {
			n.t.Fatal(err)
		}
		s.cgroups = append(s.cgroups, c)
	}
	if token != "" {
		s.put(token)
	}
	return s
}

func (s *sandbox) volume(name string) string { return filepath.Join(s.dir, "volume", name) }

// put writes the token as the kubelet does, the first time and each time it renews it: token -> ..data/token, ..data -> a
// folder of this moment, replaced by renaming.
func (s *sandbox) put(token string) {
	s.n.t.Helper()
	now := "..2026_" + random(4)
	old, _ := os.Readlink(s.volume("..data"))
	steps := []func() error{
		func() error { return os.Mkdir(s.volume(now), 0o755) },
		func() error { return os.WriteFile(filepath.Join(s.volume(now), "token"), []byte(token), 0o644) },
		func() error { return os.Symlink(now, s.volume("..data_tmp")) },
		func() error { return os.Rename(s.volume("..data_tmp"), s.volume("..data")) },
		func() error {
			if _, err := os.Lstat(s.volume("token")); err == nil {
				return nil
			}
			return os.Symlink("..data/token", s.volume("token"))
		},
		func() error {
			if old == "" {
				return nil
			}
			return os.RemoveAll(s.volume(old))
		},
	}
	for _, step := range steps {
		if err := step(); err != nil {
			s.n.t.Fatal(err)
		}
	}
}

// start runs a program of the static ones inside.
func (s *sandbox) start(out interface{ Write([]byte) (int, error) }, program string, args ...string) *cluster.Process {
	s.n.t.Helper()
	argv := []string{filepath.Join(s.n.bin, "pod"), "-root", filepath.Join(s.dir, "root")}
	for _, c := range s.cgroups {
		argv = append(argv, "-cgroup", c)
	}
	argv = append(argv, "-mount", s.n.bin+":/bin", "-mount", s.volume(".")+":"+tokenVolume, "-mount", filepath.Dir(s.n.socket)+":/run/countersign")
	if s.proc {
		argv = append(argv, "-proc")
	}
	argv = append(append(argv, "--", "/bin/"+program), args...)
	p, err := s.n.c.Start(program, []string{"SPIFFE_ENDPOINT_SOCKET=unix:///run/countersign/agent.sock"}, out, argv...)
	if err != nil {
		s.n.t.Fatal(err)
	}
	return p
}

// run waits for the program's end, a minute at the most, and returns its output.
func (s *sandbox) run(program string, args ...string) string {
	s.n.t.Helper()
	out := newLines()
	p := s.start(out, program, args...)
	select {
	case <-p.Done():
	case <-time.After(time.Minute):
		p.Kill()
		s.n.t.Fatalf("%s %v hangs: %s", program, args, out.tail(10))
	}
	return out.tail(20)
}

// ask asks once for an X.509-SVID: "identity ID", or "refused CODE MESSAGE" with the gRPC code.
func (s *sandbox) ask() string { s.n.t.Helper(); return s.connect("stay") }

// connect asks on a connection that was opened before, and does something else between; see the pod command.
func (s *sandbox) connect(then string) string {
	s.n.t.Helper()
	return s.run("pod", "connect", "/run/countersign/agent.sock", then)
}

// watch holds a stream open, printing each update.
func (s *sandbox) watch() *lines {
	s.n.t.Helper()
	out := newLines()
	s.start(out, "countersign-agent", "watch")
	return out
}

// lines is a process's output as it comes.
type lines struct {
	mu      sync.Mutex // guards both
	text    string
	changed chan struct{} // closed and replaced at each write
}

func newLines() *lines { return &lines{changed: make(chan struct{})} }

func (l *lines) Write(data []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.text += string(data)
	close(l.changed)
	l.changed = make(chan struct{})
	return len(data), nil
}

// all are the whole lines so far.
func (l *lines) all() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	all := strings.Split(l.text, "\n")
	return all[:len(all)-1]
}

func (l *lines) tail(n int) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	all := strings.Split(strings.TrimSpace(l.text), "\n")
	return strings.Join(all[max(0, len(all)-n):], "\n")
}

func (l *lines) wait(t *testing.T, ctx context.Context, what string, ok func([]string) bool) {
	t.Helper()
	limit := time.NewTimer(90 * time.Second)
	defer limit.Stop()
	for {
		l.mu.Lock()
		changed := l.changed
		l.mu.Unlock()
		if ok(l.all()) {
			return
		}
		select {
		case <-changed:
		case <-limit.C:
			t.Fatalf("waiting for %s: nothing after 90 s; so far:\n%s", what, l.tail(20))
		case <-ctx.Done():
			t.Fatalf("waiting for %s: %v; so far:\n%s", what, ctx.Err(), l.tail(20))
		}
	}
}

// contains reports whether a line has the text.
func contains(lines []string, text string) bool { return count(lines, text) > 0 }

func count(lines []string, text string) int {
	n := 0
	for _, l := range lines {
		if strings.Contains(l, text) {
			n++
		}
	}
	return n
}
