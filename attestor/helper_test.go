package attestor

import (
	"bufio"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// The test binary plays the callers: started again with these variables set, it connects and then obeys
// the lines of its standard input. Each line is answered by one line.
const (
	helperSocket = "ATTESTOR_TEST_SOCKET"     // connect here first
	helperFD     = "ATTESTOR_TEST_FD"         // executed with the connection already at this descriptor
	helperRace   = "GORACE=atexit_sleep_ms=0" // the race detector's second at every exit adds up
)

func TestMain(m *testing.M) {
	if os.Getenv(helperSocket)+os.Getenv(helperFD) != "" {
		if err := helper(); err != nil {
			fmt.Println("error:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func helper() error {
	fd := -1
	connect := func(path string) (err error) {
		if fd, err = unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0); err != nil {
			return err
		}
		return unix.Connect(fd, &unix.SockaddrUnix{Name: path})
	}
	if path := os.Getenv(helperSocket); path != "" && path != "later" {
		if err := connect(path); err != nil {
			return err
		}
	}
	if s := os.Getenv(helperFD); s != "" {
		fmt.Sscan(s, &fd)
	}
	fmt.Println("ok")
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		f := strings.Fields(in.Text())
		var err error
		switch f[0] {
		case "connect":
			err = connect(f[1])
		case "chroot":
			if err = unix.Chroot(f[1]); err == nil {
				err = os.Chdir("/")
			}
		case "bind":
			if err = unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err == nil {
				err = unix.Mount(f[1], f[2], "", unix.MS_BIND, "")
			}
		case "exec": // the connection stays open; whoever is executed answers
			env := []string{helperRace, fmt.Sprintf("%s=%d", helperFD, fd)}
			if fd < 0 {
				env = []string{helperRace, helperSocket + "=later"}
			}
			err = syscall.Exec(f[1], f[1:2], env)
		case "exit":
			os.Exit(0)
		}
		if err != nil {
			return err
		}
		fmt.Println("ok")
	}
	return in.Err()
}

// caller is a process at the other end of a connection.
type caller struct {
	t    *testing.T
	cmd  *exec.Cmd
	in   io.WriteCloser
	out  *bufio.Reader
	conn *net.UnixConn // our end
}

type callerOptions struct {
	binary     string // default: the test binary
	namespaces bool   // in a user and mount namespace of its own, or as root
	later      bool   // do not connect yet: see connect
}

func startCaller(t *testing.T, o callerOptions) *caller {
	t.Helper()
	if o.binary == "" {
		o.binary = testBinary(t)
	}
	c := &caller{t: t, cmd: exec.Command(o.binary)}
	if o.namespaces {
		c.cmd.SysProcAttr = namespaces(0)
	}
	var err error
	if c.in, err = c.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	stdout, err := c.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	c.out = bufio.NewReader(stdout)
	accept := func() {}
	c.cmd.Env = []string{helperRace, helperSocket + "=later"}
	if !o.later {
		var path string
		path, accept = c.listen()
		c.cmd.Env = []string{helperRace, helperSocket + "=" + path}
	}
	if err := c.cmd.Start(); err != nil {
		if o.namespaces {
			t.Skipf("needs root, or user namespaces for ordinary users: %v", err)
		}
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.cmd.Process.Kill()
		c.cmd.Wait()
	})
	c.answer()
	accept()
	return c
}

// namespaces gives a process a mount namespace and others of its own. An ordinary user needs a user
// namespace for that.
func namespaces(flags uintptr) *syscall.SysProcAttr {
	a := &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS | flags}
	if os.Getuid() != 0 {
		a.Cloneflags |= syscall.CLONE_NEWUSER
		a.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
		a.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}
	}
	return a
}

func (c *caller) listen() (path string, accept func()) {
	c.t.Helper()
	dir, err := os.MkdirTemp("", "peer") // t.TempDir is too long for a socket's path
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { os.RemoveAll(dir) })
	path = filepath.Join(dir, "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { l.Close() })
	return path, func() {
		c.t.Helper()
		if c.conn, err = l.AcceptUnix(); err != nil {
			c.t.Fatal(err)
		}
		c.t.Cleanup(func() { c.conn.Close() })
	}
}

func (c *caller) connect() {
	c.t.Helper()
	path, accept := c.listen()
	c.do("connect %s", path)
	accept()
}

// do has the caller do something and waits until it has.
func (c *caller) do(format string, args ...any) {
	c.t.Helper()
	fmt.Fprintf(c.in, format+"\n", args...)
	c.answer()
}

func (c *caller) answer() {
	c.t.Helper()
	if line, err := c.out.ReadString('\n'); line != "ok\n" {
		c.t.Fatalf("the caller answered %q, %v", line, err)
	}
}

// exit ends the caller; what remains is a zombie until reaped.
func (c *caller) exit(reap bool) {
	c.t.Helper()
	fmt.Fprintln(c.in, "exit")
	if _, err := io.Copy(io.Discard, c.out); err != nil {
		c.t.Fatal(err)
	}
	if reap {
		if err := c.cmd.Wait(); err != nil {
			c.t.Fatal(err)
		}
		return
	}
	var info unix.Siginfo
	if err := unix.Waitid(unix.P_PID, c.cmd.Process.Pid, &info, unix.WEXITED|unix.WNOWAIT, nil); err != nil {
		c.t.Fatal(err)
	}
}

func (c *caller) peer() *Peer {
	c.t.Helper()
	p, err := PeerFromConn(c.conn)
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { p.Close() })
	return p
}

func testBinary(t *testing.T) string {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return exe
}

// copyBinary makes another file of the test binary.
func copyBinary(t *testing.T, to string) string {
	t.Helper()
	data, err := os.ReadFile(testBinary(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(to, data, 0o755); err != nil {
		t.Fatal(err)
	}
	return to
}

func writeFile(t *testing.T, path string, data []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, data, 0o644); err != nil {
		t.Fatal(err)
	}
}

func symlink(t *testing.T, target, path string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(target, path); err != nil {
		t.Fatal(err)
	}
}

const (
	podA = "2c48913c-b29f-11e7-9350-020968147796"
	podB = "7f2e1a0d-3b5c-4d6e-8f90-a1b2c3d4e5f6"
)

// podToken is a token as the API server makes them, with a signature that nobody here looks at.
func podToken(t testing.TB, podUID string) []byte {
	t.Helper()
	claims, err := json.Marshal(map[string]any{
		"aud": []string{"countersign"}, "iss": "https://kubernetes.default.svc", "exp": 1790000000,
		"sub": "system:serviceaccount:default:web",
		"kubernetes.io": map[string]any{
			"namespace":      "default",
			"node":           map[string]string{"name": "node-1", "uid": "11111111-2222-3333-4444-555555555555"},
			"pod":            map[string]string{"name": "web-0", "uid": podUID},
			"serviceaccount": map[string]string{"name": "web", "uid": "66666666-7777-8888-9999-000000000000"},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	b64 := base64.RawURLEncoding.EncodeToString
	return []byte(b64([]byte(`{"alg":"RS256","kid":"k"}`)) + "." + b64(claims) + "." + b64(make([]byte, 256)))
}
