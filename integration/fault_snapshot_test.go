//go:build integration

package integration

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"countersign.io/countersign/integration/cluster"
)

// hooked builds a member whose clock and snapshots the environment sets.
var hooked = sync.OnceValues(func() (string, error) {
	args := []string{"build", "-tags", "faults", "-o", filepath.Join(bin, "faults") + "/"}
	if raceEnabled {
		args = append(args, "-race")
	}
	cmd := exec.Command("go", append(args, "./cmd/countersign")...)
	cmd.Dir = ".."
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building: %w\n%s", err, out)
	}
	return filepath.Join(bin, "faults", "countersign"), nil
})

// newHookedWorld is newFaultWorld of members that take a snapshot every second or two, if there is anything new, and whose clock
// is wrong by what is in the file "clock" of their folder.
func newHookedWorld(t *testing.T) *faultWorld {
	t.Helper()
	needTools(t, "ip", "strace")
	program, err := hooked()
	if err != nil {
		t.Fatal(err)
	}
	return newFaultWorld(t, 8*time.Minute, "", func(m *cluster.Member) error {
		m.Bin, m.Env = program, []string{"COUNTERSIGN_FAULT_SNAPSHOTS=20 20 500ms", "COUNTERSIGN_FAULT_CLOCK=" + filepath.Join(m.Dir, "clock")}
		return nil
	})
}

// killAt kills a member as it makes a system call, in a snapshot; where is what it was about.
func (r *faultRun) killAt(m *cluster.Member, fault string, trigger func()) (where string) {
	r.t.Helper()
	log := filepath.Join(r.Dir, fmt.Sprintf("strace-%d", r.n))
	tracer, err := r.Inject(r.faultWorld.ctx, m.Process, log, nil, strings.Replace(fault, ":", ":signal=KILL:", 1))
	if err != nil {
		r.t.Skipf("no injection by strace here: %v", err)
	}
	trigger()
	select {
	case <-m.Done():
	case <-time.After(20 * time.Second):
		r.t.Errorf("%s: never reached", fault)
		tracer.Stop()
		m.Kill()
		return ""
	}
	<-tracer.Done()
	out, err := os.ReadFile(log)
	if err != nil {
		r.t.Fatal(err)
	}
	for line := range strings.Lines(string(out)) {
		if strings.Contains(line, "+++ killed") || strings.Contains(line, "--- SIG") || strings.Contains(line, "resumed") {
			continue
		}
		where = strings.TrimSpace(line)
	}
	return where
}

// killWhen kills a member as soon as there is something new of that name in its folder of snapshots. Each fsync takes long
// meanwhile, so that what is looked for is there for a while.
func (r *faultRun) killWhen(m *cluster.Member, pattern string) (where string) {
	r.t.Helper()
	tracer, err := r.Inject(r.faultWorld.ctx, m.Process, filepath.Join(r.Dir, fmt.Sprintf("strace-%d", r.n)), nil, "fsync:delay_enter=200000")
	if err != nil {
		r.t.Skipf("no injection by strace here: %v", err)
	}
	look := func() []string {
		found, err := filepath.Glob(filepath.Join(m.Dir, "data/raft/snapshots", pattern))
		if err != nil {
			r.t.Fatal(err)
		}
		return found
	}
	old := look()
	r.eventually("there is "+pattern, func() error {
		for _, f := range look() {
			if !slices.Contains(old, f) {
				where = f
				return nil
			}
		}
		return errors.New("not yet")
	})
	m.Kill()
	<-tracer.Done()
	return where
}

// TestFaultSnapshot kills a member at each step of taking a snapshot, and of getting one from the leader.
func TestFaultSnapshot(t *testing.T) {
	f := newHookedWorld(t)
	runFault(t, f, "kill -9 at each step of taking a snapshot", func(t *testing.T, r *faultRun) {
		for i, step := range []string{"mkdirat:when=1", "*.tmp/meta.json", "*.tmp/state.bin", "renameat:when=1", "*[0-9]", "unlinkat:when=1"} {
			leader, others := r.roles()
			m := leader
			if i%2 == 1 {
				m = others[0]
			}
			r.stands[m.Name].down()
			if strings.Contains(step, "*") {
				t.Logf("%s: killed when there was %s", step, r.killWhen(m, step))
			} else {
				t.Logf("%s: killed at %s", step, r.killAt(m, step, func() {}))
			}
			r.healed()
			r.restart(m)
			r.progress("after " + step)
		}
	})
	runFault(t, f, "kill -9 at each step of getting a snapshot from the leader", func(t *testing.T, r *faultRun) {
		for _, step := range []string{"mkdirat:when=1", "fsync:when=1", "renameat:when=1", "fsync:when=2", "fdatasync:when=3"} {
			leader, others := r.roles()
			m, rest := others[0], []*cluster.Member{leader, others[1]}
			side := []*cluster.Member{m}
			r.cut(side, rest)
			r.cut(rest, side)
			r.hold(2500 * time.Millisecond) // the others' logs now begin after its end
			r.stands[m.Name].down()
			t.Logf("%s: killed at %s", step, r.killAt(m, step, func() {
				r.mend(side, rest)
				r.mend(rest, side)
			}))
			r.healed()
			r.restart(m)
			r.progress("after " + step)
		}
	})
}

// TestFaultClock steps the clock of one member, as its own time source shows it.
func TestFaultClock(t *testing.T) {
	f := newHookedWorld(t)
	for _, who := range []string{"leader", "follower"} {
		for _, step := range []time.Duration{-2 * time.Hour, -10 * time.Second, 2 * time.Hour} {
			runFault(t, f, fmt.Sprintf("clock of the %s wrong by %v", who, step), func(t *testing.T, r *faultRun) {
				leader, others := r.roles()
				m := leader
				if who == "follower" {
					m = others[0]
				}
				// What it issues has its times, so nothing is expected of it but that it does no harm.
				r.stands[m.Name].down()
				clock := filepath.Join(m.Dir, "clock")
				writeFile(t, clock, []byte(step.String()))
				r.hold(4 * time.Second)
				if err := os.Remove(clock); err != nil {
					t.Fatal(err)
				}
				r.healed()
				untilReady(t, r.faultWorld.ctx, m.Process, m.Health)
				r.stands[m.Name].up(r.faultWorld.ctx)
			})
		}
	}
}
