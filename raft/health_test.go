package raft

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	hraft "github.com/hashicorp/raft"
)

// TestOnlyTheOneDialed: a member whose certificate is another's is not spoken to, whoever notices.
func TestOnlyTheOneDialed(t *testing.T) {
	t.Parallel()
	var loose atomic.Bool
	c := newCluster(t, 3, func(c *Config) {
		dial := c.Dial
		c.Dial = func(ctx context.Context, id, address string) (net.Conn, error) {
			if loose.Load() {
				id = ""
			}
			return dial(ctx, id, address)
		}
	})
	m := c.members[0]
	// The network refuses, as TLS does.
	if _, err := m.connect(within(t), peerAddress{"m2", c.members[2].address}); !contains(err, "the certificate is that of") {
		t.Errorf("dialing m2 where m3 is: %v", err)
	}
	// Dial that does not check: the peer is looked at again.
	loose.Store(true)
	if _, err := m.connect(within(t), peerAddress{"m2", c.members[2].address}); !errors.Is(err, errOther) {
		t.Errorf("dialing m2 where m3 is, unchecked: %v", err)
	}
	if _, err := m.connect(within(t), peerAddress{"m3", c.members[2].address}); err != nil {
		t.Errorf("dialing m3: %v", err)
	}
}

// TestCheck: what the leader's check refuses never comes into the log, whoever proposes it.
func TestCheck(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3, func(c *Config) {
		c.Check = func(cmd []byte) error {
			if strings.HasPrefix(string(cmd), "bad") {
				return fmt.Errorf("no %q here", cmd)
			}
			return nil
		}
	})
	c.propose(c.leader(), "good")
	for _, m := range c.members {
		before := c.leader().raft.LastIndex()
		_, err := m.Propose(within(t), []byte("bad "+m.name))
		if !errors.Is(err, ErrRefused) || !contains(err, `no "bad `+m.name) {
			t.Errorf("%s: %v", m.name, err)
		}
		if after := c.leader().raft.LastIndex(); after != before {
			t.Errorf("%s: the log grew from %d to %d", m.name, before, after)
		}
	}
	c.propose(c.follower(), "good too")
	c.same("good", "good too")
}

func TestReadBarrier(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3, nil)
	for i := range 10 {
		cmd := fmt.Sprint(i)
		c.propose(c.members[i%3], cmd)
		for _, m := range c.members {
			if err := m.ReadBarrier(within(t)); err != nil {
				t.Fatalf("%s: %v", m.name, err)
			}
			if m.machine.has(cmd) != 1 {
				t.Fatalf("%s: barrier returned before %s was applied", m.name, cmd)
			}
		}
	}
	// It costs no entry.
	before := c.leader().raft.LastIndex()
	for _, m := range c.members {
		if err := m.ReadBarrier(within(t)); err != nil {
			t.Fatal(err)
		}
	}
	if after := c.leader().raft.LastIndex(); after != before {
		t.Errorf("the log grew from %d to %d", before, after)
	}
}

// TestReadBarrierOfExLeader: cut off from the others it never says that it is up to date, also not in the lease,
// in which it still takes itself for the leader.
func TestReadBarrierOfExLeader(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3, func(c *Config) { c.LeaderWait = 2 * time.Second })
	old := c.leader()
	c.propose(old, "before")
	c.isolate(old, true)
	if _, err := old.readIndex(); !errors.Is(err, errNotExecuted) {
		t.Errorf("read index of a leader that was cut off: %v", err)
	}
	rest := c.others(old)
	eventually(t, "the others have a leader", func() bool { return rest[0].IsLeader() || rest[1].IsLeader() })
	c.propose(rest[0], "unseen")
	if err := old.ReadBarrier(within(t)); !errors.Is(err, ErrNoLeader) || errors.Is(err, ErrUnknownOutcome) {
		t.Errorf("barrier of an ex-leader: %v", err)
	}
	if old.machine.has("unseen") != 0 {
		t.Fatal("not cut off")
	}
	c.isolate(old, false)
	eventually(t, "a barrier on the ex-leader", func() bool { return old.ReadBarrier(within(t)) == nil })
	if old.machine.has("unseen") != 1 {
		t.Error("a read after the barrier is stale")
	}
	// A term in which others voted is no longer confirmed, even if this member still led.
	if yes, _ := c.leader().confirm(within(t), c.leader().raft.CurrentTerm()-1); yes {
		t.Error("an old term is confirmed")
	}
}

func TestTransferLeader(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3, nil)
	for range 2 {
		for _, to := range c.members {
			by := c.members[0]
			if err := by.TransferLeader(within(t), to.name); err != nil {
				t.Fatalf("to %s: %v", to.name, err)
			}
			eventually(t, to.name+" leads", func() bool { return to.IsLeader() })
			c.propose(by, "x"+to.name+fmt.Sprint(to.raft.CurrentTerm()))
		}
	}
	former := c.leader()
	if err := c.follower().TransferLeader(within(t), ""); err != nil {
		t.Fatal(err)
	}
	eventually(t, "another leads", func() bool { return c.leader() != former })
	for _, to := range []string{"nobody", strings.Repeat("x", 2000)} {
		if err := c.members[1].TransferLeader(within(t), to); !errors.Is(err, ErrRefused) {
			t.Errorf("to %.10s: %v", to, err)
		}
	}
	lone := newCluster(t, 1, nil).members[0]
	if err := lone.TransferLeader(within(t), ""); !errors.Is(err, ErrRefused) {
		t.Errorf("of a cluster of one: %v", err)
	}
	if err := lone.TransferLeader(within(t), "m1"); err != nil {
		t.Errorf("to itself: %v", err)
	}
}

func TestHealth(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3, func(c *Config) {
		c.Info = func() []byte { return []byte("info of " + c.ID) }
	})
	c.propose(c.leader(), "x")
	for _, m := range c.members {
		eventually(t, "all are well at "+m.name, func() bool {
			all, err := m.Health(within(t))
			if err != nil || len(all) != 3 {
				t.Fatalf("%v, %v", all, err)
			}
			for _, h := range all {
				if !h.Reachable || h.Applied == 0 || h.Last < h.Applied || h.Commit < h.Applied || h.LastContact > 5*time.Second ||
					string(h.Info) != "info of "+h.ID || !h.Voter {
					return false
				}
			}
			return FailureTolerance(all) == 1
		})
	}
	dead, asked := c.follower(), c.leader()
	dead.crash()
	all, err := asked.Health(within(t))
	if err != nil || len(all) != 3 {
		t.Fatalf("%v, %v", all, err)
	}
	for _, h := range all {
		if h.Reachable == (h.ID == dead.name) || (h.Problem == "") != h.Reachable {
			t.Errorf("%+v", h)
		}
	}
	if got := FailureTolerance(all); got != 0 {
		t.Errorf("failure tolerance %d", got)
	}
	// Without a leader it works as well.
	for _, m := range c.members {
		if m != dead && m != asked {
			m.crash()
		}
	}
	all, err = asked.Health(within(t))
	if err != nil || len(all) != 3 || FailureTolerance(all) != -1 {
		t.Errorf("%v, %v", all, err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := asked.Health(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	asked.Close()
	if _, err := asked.Health(within(t)); !errors.Is(err, ErrClosed) {
		t.Errorf("closed: %v", err)
	}
}

// TestHealthOfHungMember: one that takes connections and says nothing costs a bounded time.
func TestHealthOfHungMember(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1, nil)
	m := c.members[0]
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := m.AddMember(within(t), "hung", l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	all, err := m.Health(within(t))
	if err != nil || len(all) != 2 || all[1].Reachable || all[1].Problem == "" {
		t.Errorf("%+v, %v", all, err)
	}
}

// TestStrangerIsRefused: who is no member (any more) gets nothing done, whatever its certificate says.
func TestStrangerIsRefused(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3, nil)
	out := c.follower()
	leader := c.leader()
	if err := leader.RemoveMember(within(t), out.name); err != nil {
		t.Fatal(err)
	}
	l, err := out.connect(within(t), peerAddress{leader.name, leader.address})
	if err != nil {
		t.Fatal(err)
	}
	for _, req := range []request{{kindPropose, []byte("evil")}, {kindAdd, []byte("x\x00127.0.0.1:9")}, {kindRemove, []byte(leader.name)}, {kindTransfer, nil}, {kindReadIndex, nil}} {
		if _, err := l.ask(within(t), req); !errors.Is(err, ErrRefused) {
			t.Errorf("%d: %v", req.kind, err)
		}
	}
	c.members = c.others(out)
	c.propose(leader, "fine")
	if leader.machine.has("evil") != 0 {
		t.Error("a stranger's command was carried out")
	}
}

// TestCommandUpTo: what a reader waits for is a command, also when the newest committed entry is none.
func TestCommandUpTo(t *testing.T) {
	t.Parallel()
	s, err := openLogStore(t.TempDir()+"/log.db", "m1")
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	var logs []*hraft.Log
	for i, typ := range []hraft.LogType{hraft.LogCommand, hraft.LogNoop, hraft.LogCommand, hraft.LogConfiguration, hraft.LogBarrier, hraft.LogCommand, hraft.LogNoop} {
		logs = append(logs, &hraft.Log{Index: uint64(i + 11), Term: uint64(i), Type: typ})
	}
	if got, err := s.commandUpTo(5); got != 0 || err != nil {
		t.Errorf("empty: %d, %v", got, err)
	}
	if err := s.StoreLogs(logs); err != nil {
		t.Fatal(err)
	}
	for upTo, want := range map[uint64]uint64{10: 0, 11: 11, 12: 11, 13: 13, 15: 13, 16: 16, 17: 16, 99: 16} {
		if got, err := s.commandUpTo(upTo); got != want || err != nil {
			t.Errorf("up to %d: %d, %v; want %d", upTo, got, err, want)
		}
	}
	if s.lastTerm(99) != 6 {
		t.Errorf("last term %d", s.lastTerm(99))
	}
}
