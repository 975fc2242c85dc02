package integration

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	workloadv1 "countersign.io/countersign/api/workload/v1"
	"countersign.io/countersign/integration/cluster"
)

// faults is a cluster under load, with two workloads that shake hands all the time.
type faults struct {
	*world
	*load
	agent  *cluster.Agent
	client *eventLog
}

func newFaults(t *testing.T) *faults {
	t.Helper()
	w := worldOf(t, 3, "")
	f := &faults{world: w, agent: w.agent()}
	w.createEntry("-s", "k8s:ns:shop", "--id", "spiffe://"+trustDomain+"/shop/{k8s:sa}", "--x509-ttl", "30s") // to be renewed on the way
	w.createEntry(append(uidSelectors(), "--id", "spiffe://"+trustDomain+"/me")...)
	addr := freeAddress(t)
	id := func(sa string) string { return "spiffe://" + trustDomain + "/shop/" + sa }
	start := func(sa string, args ...string) *eventLog {
		token, err := w.iss.Pod("shop", sa, "node-1")
		if err != nil {
			t.Fatal(err)
		}
		log := newEventLog()
		argv := append([]string{filepath.Join(bin, "workload")}, args...)
		if _, err := w.Start(sa, []string{"SPIFFE_ENDPOINT_SOCKET=" + f.agent.Endpoint(), "COUNTERSIGN_DEV_POD=" + token}, io.Writer(log), argv...); err != nil {
			t.Fatal(err)
		}
		log.wait(t, w.ctx, "the SVID of "+sa, func(e *eventLog) bool { return e.svids >= 1 })
		return log
	}
	server := start("backend", "-listen", addr, "-peer", id("frontend"))
	f.client = start("frontend", "-dial", addr, "-peer", id("backend"))
	f.client.wait(t, w.ctx, "handshakes", func(e *eventLog) bool { return e.ok >= 1 })
	f.load = startLoad(w, f.agent)
	t.Cleanup(func() {
		handshakes, frontend := f.client.seen()
		_, backend := server.seen()
		t.Logf("%d handshakes, %d SVIDs of the frontend, %d of the backend", handshakes, frontend, backend)
	})
	return f
}

// verify is the end of each fault: nothing is lost, nothing failed that should not, the workloads noticed nothing.
func (f *faults) verify(t *testing.T) {
	t.Helper()
	f.check(t)
	f.client.mu.Lock()
	ok := f.client.ok
	f.client.mu.Unlock()
	f.client.wait(t, f.world.ctx, "handshakes", func(e *eventLog) bool { return e.ok > ok })
	if f.client.failures() > 0 {
		t.Errorf("%d handshakes failed: %v", f.client.failures(), f.client.errors())
	}
}

func (f *faults) stand(m *cluster.Member) *stand {
	for _, s := range f.members {
		if s.name == m.Name {
			return s
		}
	}
	panic("no such member: " + m.Name)
}

// leaderAnd is the leader and the others.
func (f *faults) leaderAnd() (leader *cluster.Member, others []*cluster.Member) {
	f.t.Helper()
	f.eventually("there is a leader", func() error {
		if leader = f.Leader(f.world.ctx); leader == nil {
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

func (f *faults) restart(t *testing.T, m *cluster.Member) {
	t.Helper()
	if err := f.RestartMember(f.world.ctx, m); err != nil {
		t.Fatal(err)
	}
	f.stand(m).up(f.load.ctx)
	f.progress()
}

// TestFaults lets things go wrong one after the other, with the cluster in use all the time: no acknowledged entry is lost, none
// that was refused is there, no surviving member fails to issue, the agent finds its way, and no handshake fails.
func TestFaults(t *testing.T) {
	t.Parallel()
	f := newFaults(t)
	for round := range 2 {
		t.Run(fmt.Sprintf("kill -9, round %d", round+1), func(t *testing.T) {
			leader, others := f.leaderAnd()
			for _, m := range []*cluster.Member{leader, others[round%len(others)]} {
				f.stand(m).down()
				m.Kill()
				f.progress()
				f.restart(t, m)
			}
			f.load.agent.down()
			f.agent.Kill()
			f.progress()
			if err := f.RestartAgent(f.world.ctx, f.agent); err != nil {
				t.Fatal(err)
			}
			f.load.agent.up(f.load.ctx)
			f.progress()
			f.verify(t)
		})
	}
	t.Run("the leader is stopped for a while", func(t *testing.T) {
		leader, _ := f.leaderAnd()
		f.stand(leader).down()
		leader.Signal(syscall.SIGSTOP)
		f.progress()
		leader.Signal(syscall.SIGCONT)
		untilReady(t, f.world.ctx, leader.Process, leader.Health)
		f.stand(leader).up(f.load.ctx)
		f.progress()
		f.verify(t)
	})
	t.Run("rolling restart", func(t *testing.T) {
		for _, m := range f.Members {
			f.stand(m).down()
			m.Stop()
			if m.Code() != 0 {
				t.Errorf("%s: exit code %d", m.Name, m.Code())
			}
			f.progress()
			f.restart(t, m)
		}
		f.verify(t)
	})
	t.Run("all are killed at once", func(t *testing.T) {
		f.load.agent.down() // without a member it has no new JWT-SVIDs; its workloads go on
		for _, m := range f.Members {
			f.stand(m).down()
		}
		for _, m := range f.Members {
			m.Signal(syscall.SIGKILL)
		}
		var wg sync.WaitGroup
		for _, m := range f.Members {
			<-m.Done()
		}
		for _, m := range f.Members { // together: alone, none is ready
			wg.Go(func() {
				if err := f.RestartMember(f.world.ctx, m); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		for _, m := range f.Members {
			f.stand(m).up(f.load.ctx)
		}
		untilReady(t, f.world.ctx, f.agent.Process, f.agent.Health)
		f.load.agent.up(f.load.ctx)
		f.progress()
		f.verify(t)
	})
	f.load.stop()
	f.load.wg.Wait()
	f.check(t)
	// Nothing is under way any more: all three have the same.
	first, err := f.list(0)
	if err != nil {
		t.Fatal(err)
	}
	for i := range f.Members {
		f.eventually("the members have the same entries", func() error {
			got, err := f.list(i)
			if err != nil {
				return err
			}
			if len(got) != len(first) {
				return fmt.Errorf("%s has %d, %s %d", f.Members[i].Name, len(got), f.Members[0].Name, len(first))
			}
			for id := range first {
				if got[id] != first[id] {
					return fmt.Errorf("%s: %s is %q, not %q", f.Members[i].Name, id, got[id], first[id])
				}
			}
			return nil
		})
	}
}

// TestFaultsQuorumLost kills two of three: the third issues on until max_staleness, says why it then does not, and issues again
// when the others are back. It is a follower the first time, and the leader the second.
func TestFaultsQuorumLost(t *testing.T) {
	t.Parallel()
	const stale = 6 * time.Second
	w := worldOf(t, 3, "max_staleness: "+stale.String()+"\n")
	l := newLoad(w)
	t.Cleanup(l.stop)
	f := &faults{world: w, load: l}
	for _, who := range []string{"a follower", "the leader"} {
		t.Run(who+" is left", func(t *testing.T) {
			leader, others := f.leaderAnd()
			left, dead := others[0], []*cluster.Member{leader, others[1]}
			if who == "the leader" {
				left, dead = leader, others
			}
			for _, m := range dead {
				m.Signal(syscall.SIGKILL)
			}
			for _, m := range dead {
				<-m.Done()
			}
			killed := time.Now()
			var writers sync.WaitGroup
			for range 8 {
				writers.Go(func() {
					if _, _, id := l.create(slices.Index(w.Members, left)); id != "" {
						t.Errorf("%s acknowledged a write without a quorum", left.Name)
					}
				})
			}
			l.until(t, left, killed, stale)
			w.notReady(left.Health, "has not heard from a leader", "max_staleness")
			out, err := left.Admin(w.ctx, bin, "status")
			if err != nil || !strings.Contains(out, "has not heard from a leader") {
				t.Errorf("status: %v: %s", err, out)
			}
			writers.Wait()
			if who == "a follower" && len(l.refused) == 0 {
				t.Error("no write was refused for want of a leader")
			}
			var wg sync.WaitGroup
			for _, m := range dead {
				wg.Go(func() {
					if err := w.RestartMember(w.ctx, m); err != nil {
						t.Error(err)
					}
				})
			}
			wg.Wait()
			for _, m := range w.Members {
				untilReady(t, w.ctx, m.Process, m.Health)
				w.eventually(m.Name+" issues again", func() error { return l.once(m) })
			}
			l.check(t)
		})
	}
}

// until issues from one member until it does not, and checks when and how it ends.
func (l *load) until(t *testing.T, m *cluster.Member, killed time.Time, stale time.Duration) {
	t.Helper()
	conn, err := l.client.Dial(m.Address)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	c := workloadv1.NewWorkloadClient(conn)
	_, public, err := cluster.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	// A leader needs its lease's time to see that it is none, and a loaded machine its own: more than that it must not take.
	const slack = 5 * time.Second
	issued := 0
	for {
		began := time.Now()
		ctx, cancel := context.WithTimeout(l.w.ctx, 30*time.Second)
		_, err := cluster.Issue(ctx, c, l.token, public)
		cancel()
		after := began.Sub(killed)
		switch {
		case err == nil && after > stale+slack:
			t.Fatalf("%s issues %v after the last leader died, more than max_staleness (%v)", m.Name, after, stale)
		case err == nil:
			issued++
			time.Sleep(10 * time.Millisecond)
			continue
		}
		if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "has not heard from a leader") || !strings.Contains(err.Error(), "ask another member") {
			t.Errorf("%s: got %v, want Unavailable and the reason", m.Name, err)
		}
		if issued == 0 || after < stale/2 {
			t.Errorf("%s stopped issuing %v after the last leader died, with max_staleness %v", m.Name, after, stale)
		}
		t.Logf("%s issued %d more in %v", m.Name, issued, after.Round(time.Millisecond))
		return
	}
}

// TestFaultsHealthBeforeReady: a member that cannot be ready, because the others are away, is live and says why.
func TestFaultsHealthBeforeReady(t *testing.T) {
	t.Parallel()
	w := worldOf(t, 2, "")
	for _, m := range w.Members {
		untilVoter(t, w, m.Name)
	}
	w.Members[0].Stop()
	m := w.Members[1]
	m.Kill()
	p := &place{Cluster: w.Cluster, Member: m}
	proc, err := w.Start(m.Name, nil, io.Discard, filepath.Join(bin, "countersign"), "server", "run", "-c", filepath.Join(p.Member.Dir, "server.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	w.notReady(m.Health, "has not heard from a leader since it started")
	res, err := http.Get("http://" + m.Health + "/live")
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	if res.StatusCode != http.StatusOK {
		t.Errorf("/live: %s", res.Status)
	}
	proc.Stop()
	if proc.Code() != 0 {
		t.Errorf("stopped: exit code %d", proc.Code())
	}
}

// swap restarts a member with the binaries in a folder.
func (f *faults) swap(t *testing.T, m *cluster.Member, bin string) {
	t.Helper()
	f.stand(m).down()
	m.Stop()
	if m.Code() != 0 {
		t.Errorf("%s: exit code %d", m.Name, m.Code())
	}
	f.progress()
	f.Bin = bin
	f.restart(t, m)
}
