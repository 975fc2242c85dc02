//go:build integration

package integration

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"countersign.io/countersign/integration/cluster"
)

// roles are the leader and the others, once there is a leader.
func (f *faultWorld) roles() (leader *cluster.Member, others []*cluster.Member) {
	f.t.Helper()
	f.eventually("there is a leader", func() error {
		if leader = f.Leader(f.ctx); leader == nil {
			return errors.New("none")
		}
		return nil
	})
	for _, m := range f.Members {
		if m != leader {
			others = append(others, m)
		}
	}
	return leader, others
}

// restart starts a member that is down, as a supervisor would, and counts upon it again.
func (r *faultRun) restart(m *cluster.Member) {
	r.t.Helper()
	if err := r.RestartMember(r.faultWorld.ctx, m); err != nil {
		r.t.Fatal(err)
	}
	r.stands[m.Name].up(r.faultWorld.ctx)
}

// TestFaultKill kills each kind of process, again and again.
func TestFaultKill(t *testing.T) {
	f := newFaultWorld(t, 8*time.Minute, "", nil)
	const rounds = 3
	for _, who := range []string{"leader", "follower"} {
		runFault(t, f, "kill -9 of the "+who+", 3 times", func(t *testing.T, r *faultRun) {
			for range rounds {
				leader, others := r.roles()
				m := leader
				if who == "follower" {
					m = others[0]
				}
				r.stands[m.Name].down()
				m.Kill()
				r.progress("with one killed")
				r.hold(time.Second)
				r.healed()
				r.restart(m)
				r.progress("with all again")
			}
		})
	}
	runFault(t, f, "kill -9 of the agent, 3 times", func(t *testing.T, r *faultRun) {
		for range rounds {
			r.agentUp.down()
			r.agent.Kill()
			r.progress("without the agent")
			r.hold(time.Second)
			r.healed()
			if err := r.RestartAgent(r.faultWorld.ctx, r.agent); err != nil {
				t.Fatal(err)
			}
			r.agentUp.up(r.faultWorld.ctx)
		}
	})
	runFault(t, f, "kill -9 of all members at once", func(t *testing.T, r *faultRun) {
		r.agentUp.down() // without a member it has no new JWT-SVIDs; its workloads keep theirs
		for _, m := range r.Members {
			r.stands[m.Name].down()
			m.Signal(syscall.SIGKILL)
		}
		for _, m := range r.Members {
			<-m.Done()
		}
		r.healed()
		for _, m := range r.Members {
			if err := r.LaunchMember(m); err != nil {
				t.Fatal(err)
			}
		}
		for _, m := range r.Members {
			if err := r.WaitReady(r.faultWorld.ctx, m); err != nil {
				t.Fatal(err)
			}
			r.stands[m.Name].up(r.faultWorld.ctx)
		}
		untilReady(t, r.faultWorld.ctx, r.agent.Process, r.agent.Health)
		r.agentUp.up(r.faultWorld.ctx)
	})
	runFault(t, f, "SIGSTOP of the leader for 5 s, then SIGCONT", func(t *testing.T, r *faultRun) {
		m, _ := r.roles()
		r.stands[m.Name].down()
		m.Pause(5 * time.Second)
		r.healed()
		untilReady(t, r.faultWorld.ctx, m.Process, m.Health)
		r.stands[m.Name].up(r.faultWorld.ctx)
	})
	runFault(t, f, "slow member: the leader stopped for 300 ms of each 600 ms", func(t *testing.T, r *faultRun) {
		m, _ := r.roles()
		for range 12 {
			m.Pause(300 * time.Millisecond)
			time.Sleep(300 * time.Millisecond)
		}
	})
	runFault(t, f, "every member restarted in turn", func(t *testing.T, r *faultRun) {
		for _, m := range r.Members {
			r.stands[m.Name].down()
			m.Stop()
			if m.Code() != 0 {
				t.Errorf("%s: exit code %d", m.Name, m.Code())
			}
			r.healed()
			r.restart(m)
		}
	})
}

// TestFaultReplace has a member lose its log, which it says, and puts a new one of the same name into its place.
func TestFaultReplace(t *testing.T) {
	f := newFaultWorld(t, 5*time.Minute, "", nil)
	runFault(t, f, "a follower's log torn in half; the member removed and joined again", func(t *testing.T, r *faultRun) {
		leader, others := r.roles()
		m := others[0]
		r.stands[m.Name].down()
		m.Kill()
		// Half of what is in it: bbolt makes its file grow in steps, and what is behind the last page is zeros.
		change(t, filepath.Join(m.Dir, "data/raft/log.db"), func(b []byte) []byte { return half(bytes.TrimRight(b, "\x00")) })
		if err := r.LaunchMember(m); err != nil {
			t.Fatal(err)
		}
		select {
		case <-m.Done():
		case <-time.After(30 * time.Second):
			t.Fatal("it runs on half a log")
		}
		if said, err := os.ReadFile(filepath.Join(m.Dir, "log")); err != nil || m.Code() <= 0 || !strings.Contains(string(said), "log.db") {
			t.Errorf("exit code %d, %v; it said: %s", m.Code(), err, said[max(0, len(said)-1000):])
		}
		if _, err := leader.Admin(r.faultWorld.ctx, bin, "cluster", "remove", m.Name); err != nil {
			t.Fatal(err)
		}
		token, err := leader.Admin(r.faultWorld.ctx, bin, "token", "create", "--server")
		if err != nil {
			t.Fatal(err)
		}
		if err := os.RemoveAll(filepath.Join(m.Dir, "data")); err != nil {
			t.Fatal(err)
		}
		join := filepath.Join(m.Dir, "join")
		writeFile(t, join, []byte(token))
		change(t, filepath.Join(m.Dir, "server.yaml"), func(yaml []byte) []byte {
			if strings.Contains(string(yaml), "join_token_file:") {
				return yaml
			}
			return append(yaml, "join_token_file: "+join+"\n"...)
		})
		r.healed()
		r.restart(m)
	})
}
