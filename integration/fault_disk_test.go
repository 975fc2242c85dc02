//go:build integration

package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"countersign.io/countersign/integration/cluster"
)

// inject makes a member's system calls fail for a while. The member may go on or give up; one that gave up is started again, as a
// supervisor does, once the disk works again. It says which of the two happened.
func (r *faultRun) inject(m *cluster.Member, lasting time.Duration, paths []string, faults ...string) (gaveUp bool) {
	r.t.Helper()
	log := filepath.Join(r.Dir, fmt.Sprintf("strace-%d", r.n))
	before := len(lastWords(m, 1<<20))
	tracer, err := r.Inject(r.faultWorld.ctx, m.Process, log, paths, faults...)
	if err != nil {
		r.t.Skipf("no injection by strace here: %v", err)
	}
	select {
	case <-m.Done():
	case <-time.After(lasting):
	}
	tracer.Stop()
	if out, err := os.ReadFile(log); err != nil || !strings.Contains(string(out), "INJECTED") && !strings.Contains(string(out), "DELAYED") {
		r.t.Errorf("nothing was injected: %v", err)
	}
	wait := time.Duration(0)
	if strings.Contains(lastWords(m, 1<<20)[before:], "raft node stops") {
		wait = 15 * time.Second // it may be handing over
	}
	select {
	case <-m.Done():
		return true
	case <-time.After(wait):
	}
	if wait > 0 {
		m.Signal(syscall.SIGQUIT) // its log has what it hangs on
		<-m.Done()
		r.t.Fatalf("%s said that it stops, and did not end: %s", m.Name, lastWords(m, 400))
	}
	return false
}

// lastWords are a member's last warnings and errors.
func lastWords(m *cluster.Member, n int) string {
	log, err := os.ReadFile(filepath.Join(m.Dir, "log"))
	if err != nil {
		return err.Error()
	}
	var out []string
	for line := range strings.Lines(string(log)) {
		if strings.Contains(line, "level=ERROR") || strings.Contains(line, "level=WARN") || !strings.HasPrefix(line, "time=") {
			out = append(out, strings.TrimSpace(line))
		}
	}
	return strings.Join(out[max(0, len(out)-n):], "\n")
}

// TestFaultDisk has the disk of one member fail, be full, and be slow, by strace.
func TestFaultDisk(t *testing.T) {
	f := newFaultWorld(t, 10*time.Minute, "", nil)
	for _, who := range []string{"leader", "follower"} {
		for _, c := range []struct {
			what   string
			faults []string
		}{
			{"EIO of every fsync", []string{"fdatasync:error=EIO", "fsync:error=EIO"}},
			{"EIO of every write", []string{"pwrite64:error=EIO"}},
			{"ENOSPC of every write and fsync", []string{"pwrite64:error=ENOSPC", "fdatasync:error=ENOSPC"}},
			{"EIO of one fsync", []string{"fdatasync:error=EIO:when=3"}},
		} {
			runFault(t, f, fmt.Sprintf("%s of the %s", c.what, who), func(t *testing.T, r *faultRun) {
				leader, others := r.roles()
				m := leader
				if who == "follower" {
					m = others[0]
				}
				// It may stop, so nothing is expected of it; of the others everything is.
				r.stands[m.Name].down()
				gaveUp := r.inject(m, 4*time.Second, nil, c.faults...)
				t.Logf("%s gave up: %v; its last words: %s", m.Name, gaveUp, lastWords(m, 3))
				r.healed()
				if gaveUp {
					if m.Code() == 0 {
						t.Error("it ended with exit code 0")
					}
					r.restart(m)
					return
				}
				untilReady(t, r.faultWorld.ctx, m.Process, m.Health)
				r.stands[m.Name].up(r.faultWorld.ctx)
			})
		}
		runFault(t, f, fmt.Sprintf("slow disk: each fsync of the %s takes 200 ms more", who), func(t *testing.T, r *faultRun) {
			leader, others := r.roles()
			m := leader
			if who == "follower" {
				m = others[0]
			}
			if r.inject(m, 6*time.Second, nil, "fdatasync:delay_enter=200000", "fsync:delay_enter=200000") {
				t.Errorf("%s gave up: %s", m.Name, lastWords(m, 5))
			}
		})
	}
}

// TestFaultDiskFull fills the disk under a member's data, for real, and frees it again.
func TestFaultDiskFull(t *testing.T) {
	needRoot(t)
	mounted := func(m *cluster.Member) error {
		data := filepath.Join(m.Dir, "data")
		if err := os.Mkdir(data, 0o700); err != nil {
			return err
		}
		if err := syscall.Mount("tmpfs", data, "tmpfs", 0, "size=96m,mode=0700"); err != nil {
			return fmt.Errorf("mounting a tmpfs: %w", err)
		}
		t.Cleanup(func() { _ = syscall.Unmount(data, syscall.MNT_DETACH) })
		return nil
	}
	probe := t.TempDir()
	if err := syscall.Mount("tmpfs", probe, "tmpfs", 0, "size=1m"); err != nil {
		t.Skipf("no tmpfs can be mounted here: %v", err)
	}
	_ = syscall.Unmount(probe, 0)
	f := newFaultWorld(t, 6*time.Minute, "", mounted)
	for _, who := range []string{"leader", "follower"} {
		runFault(t, f, "full disk of the "+who, func(t *testing.T, r *faultRun) {
			leader, others := r.roles()
			m := leader
			if who == "follower" {
				m = others[0]
			}
			r.stands[m.Name].down()
			filler := filepath.Join(m.Dir, "data", "filler")
			fill(t, filler)
			began := time.Now()
			for time.Since(began) < 8*time.Second && !m.Exited() {
				r.hold(100 * time.Millisecond)
				fill(t, filler)
			}
			t.Logf("%s gave up: %v; its last words: %s", m.Name, m.Exited(), lastWords(m, 3))
			if err := os.Remove(filler); err != nil {
				t.Fatal(err)
			}
			r.healed()
			if m.Exited() {
				r.restart(m)
				return
			}
			untilReady(t, r.faultWorld.ctx, m.Process, m.Health)
			r.stands[m.Name].up(r.faultWorld.ctx)
		})
	}
}

// fill takes every free byte.
func fill(t *testing.T, path string) {
	t.Helper()
	out, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	for size := 1 << 20; size > 0; {
		if _, err := out.Write(make([]byte, size)); err != nil {
			size /= 2
		}
	}
}
