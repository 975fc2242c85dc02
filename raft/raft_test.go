package raft

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

func TestProposeAnywhere(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3, nil)
	var want []string
	for round := range 5 {
		for _, m := range c.members {
			cmd := fmt.Sprintf("%s-%d", m.name, round)
			c.propose(m, cmd)
			want = append(want, cmd)
		}
	}
	c.same(want...)
}

func TestProposeManyAtOnce(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3, nil)
	var wg sync.WaitGroup
	var mu sync.Mutex
	var want []string
	for i := range 96 {
		wg.Go(func() {
			m := c.members[i%3]
			for j := range 10 {
				cmd := fmt.Sprintf("%d-%d", i, j)
				got, err := m.Propose(within(t), []byte(cmd))
				if errors.Is(err, ErrUnknownOutcome) {
					continue // a busy machine may change leaders
				}
				if err != nil || string(got) != "done:"+cmd {
					t.Errorf("%s: %q, %v", cmd, got, err)
					return
				}
				if m.machine.has(cmd) != 1 {
					t.Errorf("%s: not visible where it was written", cmd)
				}
				mu.Lock()
				want = append(want, cmd)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	c.same(want...)
}

// TestOneMember: a cluster of one leads, closes without anyone to hand over to, and starts again.
func TestOneMember(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1, nil)
	m := c.members[0]
	c.propose(m, "a")
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	if err := m.Close(); err != nil {
		t.Fatalf("second close: %v", err)
	}
	if _, err := m.Propose(within(t), []byte("b")); !errors.Is(err, ErrClosed) {
		t.Fatalf("after close: %v", err)
	}
	if err := m.Run(within(t)); !errors.Is(err, ErrClosed) {
		t.Fatalf("run after close: %v", err)
	}
	c.start(m, true) // bootstrap again is ignored
	c.propose(m, "b")
	c.same("a", "b")
}

func TestTooLarge(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3, nil)
	big := make([]byte, MaxCommand+1)
	for _, m := range c.members {
		if _, err := m.Propose(within(t), big); !errors.Is(err, ErrTooLarge) {
			t.Errorf("%s: %v", m.name, err)
		}
	}
}

func TestNoLeader(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3, func(c *Config) { c.LeaderWait = 3 * time.Second })
	m := c.members[0]
	for _, o := range c.others(m) {
		o.crash()
	}
	eventually(t, "the last member knows no leader", func() bool { id, _ := m.Leader(); return id == "" })
	if _, err := m.Propose(within(t), []byte("x")); !errors.Is(err, ErrNoLeader) || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("after the wait: %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := m.Propose(ctx, []byte("x")); !errors.Is(err, ErrNoLeader) || !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	if err := m.Barrier(within(t)); !errors.Is(err, ErrNoLeader) {
		t.Errorf("barrier: %v", err)
	}
	if err := m.AddMember(within(t), "m9", "127.0.0.1:1"); !errors.Is(err, ErrNoLeader) {
		t.Errorf("add: %v", err)
	}
	if m.machine.has("x") != 0 {
		t.Error("applied without a quorum")
	}
}

// TestLeaderKilled: writes on the other members during the failover are carried out once or not at all, and
// what was acknowledged stays.
func TestLeaderKilled(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3, nil)
	old := c.leader()
	rest := c.others(old)
	var mu sync.Mutex
	var acked []string
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for j := 0; ; j++ {
				select {
				case <-stop:
					return
				default:
				}
				cmd := fmt.Sprintf("%d-%d", i, j)
				_, err := rest[i%2].Propose(within(t), []byte(cmd))
				if err == nil {
					mu.Lock()
					acked = append(acked, cmd)
					mu.Unlock()
				} else if !errors.Is(err, ErrUnknownOutcome) {
					t.Errorf("%s: %v", cmd, err)
				}
			}
		})
	}
	count := func() int { mu.Lock(); defer mu.Unlock(); return len(acked) }
	eventually(t, "some writes", func() bool { return count() > 50 })
	old.crash()
	before := count()
	eventually(t, "writes after the failover", func() bool { return count() > before+50 })
	close(stop)
	wg.Wait()
	old.machine = &machine{} // a crash discards the state
	c.start(old, false)
	c.same(acked...)
	seen := map[string]bool{}
	for _, s := range old.machine.all() {
		if seen[s] {
			t.Errorf("%s was carried out twice", s)
		}
		seen[s] = true
	}
}

// TestCloseHandsOver: closing the leader leaves no unknown outcome, and another leads without an election timeout.
func TestCloseHandsOver(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3, nil)
	old := c.leader()
	rest := c.others(old)
	term := old.raft.CurrentTerm()
	var failed atomic.Pointer[error]
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for j := 0; ; j++ {
				select {
				case <-stop:
					return
				default:
				}
				if _, err := rest[i%2].Propose(within(t), fmt.Appendf(nil, "%d-%d", i, j)); err != nil {
					failed.Store(&err)
				}
			}
		})
	}
	eventually(t, "some writes", func() bool { return len(rest[0].machine.all()) > 50 })
	if err := old.Close(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a new leader", func() bool { return rest[0].IsLeader() || rest[1].IsLeader() })
	close(stop)
	wg.Wait()
	got := rest[0].raft.CurrentTerm()
	if got < term+1 {
		t.Errorf("term %d after %d", got, term)
	}
	if err := failed.Load(); err != nil && got == term+1 { // beyond that, a starved machine has elected as well
		t.Errorf("write during a hand-over: %v", *err)
	}
}

// TestPreVote: a member that was cut off comes back without forcing an election. Without pre-vote it would
// return with a term that its failed candidacies had raised.
func TestPreVote(t *testing.T) {
	t.Parallel()
	logged := &syncBuffer{}
	c := newCluster(t, 3, func(c *Config) {
		if c.ID == "m3" {
			c.Log = slog.New(slog.NewTextHandler(logged, nil))
		}
	})
	cut := c.members[2]
	for cut.IsLeader() {
		cut.raft.LeadershipTransfer().Error()
		c.leader()
	}
	leader := c.leader()
	term := cut.raft.CurrentTerm()
	c.isolate(cut, true)
	eventually(t, "several failed campaigns", func() bool {
		return strings.Count(logged.String(), "Election timeout reached") >= 3
	})
	if got := cut.raft.CurrentTerm(); got != term {
		t.Fatalf("the isolated member raised its term from %d to %d", term, got)
	}
	c.isolate(cut, false)
	c.propose(cut, "back")
	if !leader.IsLeader() || leader.raft.CurrentTerm() != term {
		t.Fatalf("the return of a member cost the leader its place (term %d, was %d)", leader.raft.CurrentTerm(), term)
	}
}

func TestLeadership(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3, nil)
	type event struct {
		name  string
		start bool
	}
	events := make(chan event, 64)
	ctx, cancel := context.WithCancel(within(t))
	var wg sync.WaitGroup
	for _, m := range c.members {
		wg.Go(func() {
			m.Leadership(ctx, func(ctx context.Context) {
				events <- event{m.name, true}
				<-ctx.Done()
				events <- event{m.name, false}
			})
		})
	}
	first := <-events
	if !first.start {
		t.Fatalf("first event %v", first)
	}
	old := c.leader()
	c.propose(old, "before")
	c.isolate(old, true)
	running := map[string]bool{first.name: true}
	for e := range events {
		running[e.name] = e.start
		if e.start && e.name != old.name {
			for _, m := range c.members {
				if m.name == e.name && m.machine.has("before") != 1 {
					t.Error("a leader started before it had applied the earlier writes")
				}
			}
		}
		if !running[old.name] && len(running) > 1 {
			break // the old one was told, and another started
		}
	}
	cancel()
	wg.Wait()
}

func TestStaleness(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3, nil)
	c.propose(c.leader(), "x")
	for _, m := range c.members {
		eventually(t, m.name+" is fresh", func() bool { return m.Staleness() < time.Second })
	}
	if leader := c.leader(); leader.Staleness() != 0 && leader.IsLeader() {
		t.Errorf("leader: %v", leader.Staleness())
	}

	t.Run("never heard", func(t *testing.T) {
		lone := &member{name: "lone", dir: t.TempDir() + "/lone", machine: &machine{}}
		c.start(lone, false)
		if got := lone.Staleness(); got != Never {
			t.Errorf("%v", got)
		}
		lone.Close()
	})

	t.Run("partitioned leader", func(t *testing.T) {
		old := c.leader()
		c.isolate(old, true)
		eventually(t, "it steps down", func() bool { return old.Staleness() > 0 })
		first := old.Staleness()
		eventually(t, "it grows", func() bool { return old.Staleness() > first+time.Second })
		if old.IsLeader() {
			t.Error("still says that it leads")
		}
		c.isolate(old, false)
		eventually(t, "it is fresh again", func() bool { return old.Staleness() < time.Second })
	})

	t.Run("partitioned follower", func(t *testing.T) {
		f := c.follower()
		c.isolate(f, true)
		eventually(t, "it grows", func() bool { return f.Staleness() > 1500*time.Millisecond })
		c.isolate(f, false)
		eventually(t, "it is fresh again", func() bool { return f.Staleness() < time.Second })
	})

	// Connected, heartbeats and all, but the state does not move: a ban would not be known here.
	t.Run("follower that does not apply", func(t *testing.T) {
		f := c.follower()
		gate := make(chan struct{})
		f.machine.mu.Lock()
		f.machine.gate = gate
		f.machine.mu.Unlock()
		c.propose(c.leader(), "unseen")
		eventually(t, "it grows", func() bool { return f.Staleness() > 1500*time.Millisecond })
		if contact := time.Since(f.raft.LastContact()); contact > time.Second {
			t.Logf("no contact for %v: the machine is busy, the test shows little", contact)
		}
		f.machine.mu.Lock()
		f.machine.gate = nil
		f.machine.mu.Unlock()
		close(gate)
		eventually(t, "it is fresh again", func() bool { return f.Staleness() < time.Second })
	})
}

func TestBarrier(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3, nil)
	for i := range 10 {
		cmd := fmt.Sprint(i)
		c.propose(c.members[0], cmd)
		for _, m := range c.members {
			m.settled(within(t))
			if m.machine.has(cmd) != 1 {
				t.Fatalf("%s: barrier returned before %s was applied", m.name, cmd)
			}
		}
	}
}

func TestMembership(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1, nil)
	first := c.members[0]

	// A member that never comes up costs the cluster of one nothing.
	if err := first.AddMember(within(t), "ghost", "127.0.0.1:1"); err != nil {
		t.Fatal(err)
	}
	if err := first.AddMember(within(t), "ghost", "127.0.0.1:1"); err != nil {
		t.Fatalf("again: %v", err)
	}
	c.propose(first, "with a ghost")
	if m := first.Members(); len(m) != 2 || m[1].Voter || m[1].ID != "ghost" || m[1].Leader || !m[0].Leader || !m[0].Voter {
		t.Fatalf("members %+v", m)
	}
	if err := first.RemoveMember(within(t), "ghost"); err != nil {
		t.Fatal(err)
	}

	second := c.join("m2")
	third := c.join("m3")
	c.voting(3)
	c.propose(third, "three")

	// Refused: the address is taken; nothing changes.
	if err := second.AddMember(within(t), "thief", third.address); !errors.Is(err, ErrRefused) {
		t.Errorf("address taken: %v", err)
	}
	for _, bad := range [][2]string{{"", "x"}, {"x", ""}, {"a\x00b", "x"}} {
		if err := first.AddMember(within(t), bad[0], bad[1]); !errors.Is(err, ErrRefused) {
			t.Errorf("%q: %v", bad, err)
		}
	}
	if err := first.RemoveMember(within(t), ""); !errors.Is(err, ErrRefused) {
		t.Errorf("remove nobody: %v", err)
	}
	if err := first.RemoveMember(within(t), "stranger"); err != nil {
		t.Errorf("remove a stranger: %v", err)
	}
	c.voting(3)

	// Removing the leader, through another member.
	leader := c.leader()
	rest := c.others(leader)
	if err := rest[0].RemoveMember(within(t), leader.name); err != nil && !errors.Is(err, ErrUnknownOutcome) {
		t.Fatal(err)
	}
	c.members = rest
	c.voting(2)
	c.propose(rest[0], "two")
	c.propose(rest[1], "still two")
	eventually(t, "the removed member is stale", func() bool { return leader.Staleness() > time.Second })
	if leader.IsLeader() {
		t.Error("the removed member says that it leads")
	}
	leader.Close()

	// Down to one, and not to none.
	gone := rest[1]
	gone.Close()
	// Two voters, one down: no quorum to remove it with. So it comes back and is removed while up.
	c.start(gone, false)
	if err := rest[0].RemoveMember(within(t), gone.name); err != nil && !errors.Is(err, ErrUnknownOutcome) {
		t.Fatal(err)
	}
	c.members = rest[:1]
	c.voting(1)
	c.propose(rest[0], "one")
	if err := rest[0].RemoveMember(within(t), rest[0].name); !errors.Is(err, ErrRefused) {
		t.Errorf("removing the last voter: %v", err)
	}
}

// TestAddressChange: a member that moved is found again under its new address, and keeps its vote.
func TestAddressChange(t *testing.T) {
	changesAddress(t)
	t.Parallel()
	c := newCluster(t, 3, nil)
	m := c.follower()
	m.Close()
	m.address = ""
	c.start(m, false)
	c.add(c.leader(), m.name, m.address)
	c.voting(3)
	c.propose(m, "moved")
	c.same("moved")
}

func TestMachineStops(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3, nil)
	f := c.follower()
	f.machine.mu.Lock()
	f.machine.refuse = "from the future"
	f.machine.mu.Unlock()
	c.propose(c.leader(), "known")
	c.propose(c.leader(), "from the future")
	if err := f.Run(within(t)); !errors.Is(err, errStopped) {
		t.Fatalf("run: %v", err)
	}
	c.propose(c.leader(), "later")
	if f.machine.has("later") != 0 {
		t.Error("applied an entry beyond the one it stopped at")
	}
	if err := f.raft.Snapshot().Error(); !errors.Is(err, errStopped) && err == nil {
		t.Error("took a snapshot of a stopped machine: the log would forget what it has not applied")
	}
	f.Close()
	f.machine.mu.Lock()
	f.machine.refuse = "" // the program was updated
	f.machine.mu.Unlock()
	c.start(f, false)
	c.same("known", "from the future", "later")
}

func TestRun(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1, nil)
	m := c.members[0]
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := m.Run(ctx); err != nil {
		t.Errorf("ended: %v", err)
	}
	m.cfg.Listener.Close()
	if err := m.Run(within(t)); err == nil || errors.Is(err, ErrClosed) {
		t.Errorf("listener gone: %v", err)
	}
}

func TestConfig(t *testing.T) {
	t.Parallel()
	if _, err := Open(Config{HeartbeatTimeout: time.Millisecond, LeaseTimeout: time.Second}); err == nil {
		t.Fatal("opened nothing")
	} else {
		for _, want := range []string{"ID", "Address", "Dir", "Machine", "Listener", "Dial", "HeartbeatTimeout is below", "LeaseTimeout"} {
			if !contains(err, want) {
				t.Errorf("%v does not mention %s", err, want)
			}
		}
	}
}
