package attestor

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"countersign.io/countersign/identity"
)

// noPeerPIDFD is what a kernel before 6.5 answers.
func noPeerPIDFD(int) (int, error) { return -1, unix.ENOPROTOOPT }

// pinWays are the two ways to pin, where this kernel has them.
func pinWays(t *testing.T) map[string]func(int) (int, error) {
	ways := map[string]func(int) (int, error){"pidfd_open": noPeerPIDFD}
	c := startCaller(t, callerOptions{})
	if _, err := unix.PidfdOpen(c.cmd.Process.Pid, 0); err != nil {
		t.Skipf("needs Linux 5.3: %v", err)
	}
	raw, err := c.conn.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) {
		if pidfd, err := peerPIDFD(int(fd)); err == nil {
			unix.Close(pidfd)
			ways["SO_PEERPIDFD"] = peerPIDFD
		} else {
			t.Logf("not tested: SO_PEERPIDFD: %v", err)
		}
	})
	return ways
}

func TestPeer(t *testing.T) {
	for way, pidfdOf := range pinWays(t) {
		newPeer := func(t *testing.T) (*caller, *Peer) {
			c := startCaller(t, callerOptions{})
			p, err := pin(c.conn, pidfdOf)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { p.Close() })
			return c, p
		}
		t.Run(way+"/is the process that connected", func(t *testing.T) {
			c, p := newPeer(t)
			if p.PID() != c.cmd.Process.Pid || p.UID() != uint32(os.Geteuid()) || p.GID() != uint32(os.Getegid()) {
				t.Errorf("got PID %d, user %d, group %d", p.PID(), p.UID(), p.GID())
			}
			if err := errors.Join(p.Alive(), p.Unchanged()); err != nil {
				t.Error(err)
			}
		})
		for _, reap := range []bool{false, true} {
			t.Run(way+"/exits, reaped "+strconv.FormatBool(reap), func(t *testing.T) {
				c, p := newPeer(t)
				c.exit(reap)
				wantChanged(t, "Alive", p.Alive())
				wantChanged(t, "Unchanged", p.Unchanged())
			})
			t.Run(way+"/exited before it was pinned, reaped "+strconv.FormatBool(reap), func(t *testing.T) {
				c := startCaller(t, callerOptions{})
				c.exit(reap)
				_, err := pin(c.conn, pidfdOf)
				wantChanged(t, "pin", err)
			})
		}
		t.Run(way+"/executes another file", func(t *testing.T) {
			c, p := newPeer(t)
			c.do("exec %s", copyBinary(t, filepath.Join(t.TempDir(), "other")))
			if err := p.Alive(); err != nil {
				t.Error(err)
			}
			wantChanged(t, "Unchanged", p.Unchanged())
		})
		t.Run(way+"/executes the same file", func(t *testing.T) {
			c, p := newPeer(t)
			c.do("exec %s", testBinary(t))
			if err := p.Unchanged(); err != nil {
				t.Error(err)
			}
		})
		t.Run(way+"/is closed while in use", func(t *testing.T) {
			_, p := newPeer(t)
			var wg sync.WaitGroup
			for range 8 {
				wg.Go(func() {
					for range 50 {
						if err := p.Unchanged(); err != nil && !errors.Is(err, ErrPeerChanged) {
							t.Error(err)
						}
					}
				})
			}
			if err := p.Close(); err != nil {
				t.Error(err)
			}
			wg.Wait()
			wantChanged(t, "Alive", p.Alive())
			if err := p.Close(); err != nil {
				t.Errorf("second Close: %v", err)
			}
		})
	}
}

// A PID that was given to another process between connect and the look at it. The test runs again in a PID
// namespace of its own, where it may say which PID comes next.
func TestPeerPIDReused(t *testing.T) {
	const inside = "ATTESTOR_TEST_PID_NAMESPACE"
	if os.Getenv(inside) == "" {
		cmd := exec.Command(testBinary(t), "-test.run=^"+t.Name()+"$", "-test.v")
		cmd.Env = append(os.Environ(), inside+"=1")
		cmd.SysProcAttr = namespaces(syscall.CLONE_NEWPID)
		out, err := cmd.CombinedOutput()
		switch {
		case cmd.ProcessState == nil:
			t.Skipf("needs root, or user namespaces for ordinary users: %v", err)
		case err != nil:
			t.Fatalf("%v\n%s", err, out)
		case bytes.Contains(out, []byte("--- SKIP")):
			t.Skipf("%s", out)
		}
		return
	}
	if err := errors.Join(
		unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""),
		unix.Mount("proc", "/proc", "proc", 0, ""),
	); err != nil {
		t.Skipf("mounting a /proc of the new PID namespace: %v", err)
	}
	if _, ok := pinWays(t)["SO_PEERPIDFD"]; !ok {
		t.Skip("needs Linux 6.5")
	}
	c := startCaller(t, callerOptions{})
	c.exit(true)
	reuse(t, c.cmd.Process.Pid)
	_, err := PeerFromConn(c.conn)
	wantChanged(t, "PeerFromConn", err)
}

// reuse starts a process that gets the PID.
func reuse(t *testing.T, pid int) {
	t.Helper()
	for range 100 {
		if err := os.WriteFile("/proc/sys/kernel/ns_last_pid", []byte(strconv.Itoa(pid-1)), 0); err != nil {
			t.Skipf("choosing the next PID (needs a kernel with checkpoint/restore): %v", err)
		}
		if startCaller(t, callerOptions{later: true}).cmd.Process.Pid == pid {
			return
		}
	}
	t.Fatalf("PID %d went to others each time", pid)
}

// Without SO_PEERPIDFD at least the user of the process behind the PID must be the one that connected.
func TestPeerOfAnotherUser(t *testing.T) {
	c := startCaller(t, callerOptions{})
	p := &Peer{pid: c.cmd.Process.Pid, uid: uint32(os.Geteuid()) + 1, pidfd: -1, dir: -1}
	defer p.Close()
	wantChanged(t, "open", p.open())
}

func TestPeerWithoutPID(t *testing.T) {
	p := &Peer{pid: 0, pidfd: -1, dir: -1} // what SO_PEERCRED says of a process of another PID namespace
	if err := p.open(); !errors.Is(err, identity.ErrUnavailable) {
		t.Errorf("got %v, want ErrUnavailable", err)
	}
}

func wantChanged(t *testing.T, what string, err error) {
	t.Helper()
	if !errors.Is(err, ErrPeerChanged) || !errors.Is(err, identity.ErrDenied) {
		t.Errorf("%s: got %v, want ErrPeerChanged", what, err)
	}
}

func BenchmarkPeerUnchanged(b *testing.B) {
	fd, err := unix.PidfdOpen(os.Getpid(), 0)
	if err != nil {
		b.Skip(err)
	}
	p := &Peer{pid: os.Getpid(), uid: uint32(os.Geteuid()), pidfd: fd, dir: -1}
	defer p.Close()
	if err := p.open(); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if err := p.Unchanged(); err != nil {
			b.Fatal(err)
		}
	}
}
