package raft

import (
	"errors"
	"fmt"
	"log/slog"
	"math"
	"slices"
	"sync"
	"testing"
	"time"

	hraft "github.com/hashicorp/raft"
	autopilot "github.com/hashicorp/raft-autopilot"
)

// TestVoteNeedsStability: a new member gets its vote only after it was in touch and caught up for StableFor, also
// from a leader that has just come to lead.
func TestVoteNeedsStability(t *testing.T) {
	t.Parallel()
	const stable = 1500 * time.Millisecond
	c := newCluster(t, 1, func(c *Config) { c.StableFor = stable })
	first := c.members[0]
	start := time.Now()
	c.join("m2")
	c.voting(2)
	if took := time.Since(start); took < stable {
		t.Errorf("it voted after %v", took)
	}
	// One that cannot keep up gets none until it does.
	slow := &member{name: "m3", dir: t.TempDir() + "/m3", machine: &machine{gate: make(chan struct{})}}
	c.start(slow, false)
	c.add(first, "m3", slow.address)
	var wg sync.WaitGroup // at once: one by one they take as many syncs
	for i := range caughtUp + 20 {
		wg.Go(func() {
			if _, err := first.Propose(within(t), []byte(fmt.Sprint(i))); err != nil && !errors.Is(err, ErrUnknownOutcome) {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	time.Sleep(2 * stable) // nothing may happen meanwhile: this can only miss a fault, not make one up
	if m := first.Members(); len(m) != 3 || m[2].Voter {
		t.Fatalf("a member that is behind has a vote: %+v", m)
	}
	slow.machine.mu.Lock()
	gate := slow.machine.gate
	slow.machine.gate = nil
	slow.machine.mu.Unlock()
	close(gate)
	c.members = append(c.members, slow)
	c.voting(3)
}

// TestRemoveDead: the dead are removed one after the other while a majority and three voters stay, voters or not;
// then no more.
func TestRemoveDead(t *testing.T) {
	t.Parallel()
	const after = 4 * time.Second
	c := newCluster(t, 5, func(c *Config) { c.RemoveDeadAfter = after })
	for _, left := range []int{4, 3} {
		dead := c.follower()
		start := time.Now()
		dead.crash()
		c.members = c.others(dead)
		c.voting(left)
		if took := time.Since(start); took < after {
			t.Errorf("removed after %v", took)
		}
		c.propose(c.leader(), fmt.Sprint(left))
	}
	// A joiner without a vote that is gone is removed, whatever the number of voters.
	c.add(c.leader(), "ghost", "127.0.0.1:1")
	dead := c.follower()
	dead.crash()
	c.members = c.others(dead)
	eventually(t, "the ghost is gone", func() bool { return len(c.leader().Members()) == 3 })
	time.Sleep(after + 2*time.Second) // can only miss a fault
	if m := c.leader().Members(); len(m) != 3 {
		t.Errorf("fewer than three voters are left: %+v", m)
	}
	c.propose(c.leader(), "two of three")
}

// TestPartitionRemovesNobody: who has no quorum removes nobody, also when it is healed long after.
func TestPartitionRemovesNobody(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 5, func(c *Config) { c.RemoveDeadAfter = 4 * time.Second })
	for _, m := range c.members {
		c.isolate(m, true)
	}
	eventually(t, "nobody leads", func() bool {
		return !slices.ContainsFunc(c.members, func(m *member) bool { return m.IsLeader() })
	})
	time.Sleep(6 * time.Second) // can only miss a fault
	for _, m := range c.members {
		if got := len(m.Members()); got != 5 {
			t.Errorf("%s knows %d members", m.name, got)
		}
	}
	for _, m := range c.members {
		c.isolate(m, false)
	}
	c.voting(5)
	c.propose(c.leader(), "healed")
	c.same("healed")
}

// TestRemovalLooksAgain: each rule holds at the moment of the removal, whatever autopilot thought before.
func TestRemovalLooksAgain(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 4, func(c *Config) { c.RemoveDeadAfter = time.Hour })
	leader := c.leader()
	now := time.Now()
	gone := &contact{failing: now.Add(-2 * time.Hour), failed: now}
	fine := &contact{}
	try := func(id string, dead ...string) int {
		k := &care{n: leader.Node, seen: map[hraft.ServerID]*contact{}}
		for _, m := range leader.Members() {
			k.seen[hraft.ServerID(m.ID)] = fine
		}
		for _, d := range dead {
			k.seen[hraft.ServerID(d)] = gone
		}
		k.RemoveFailedServer(&autopilot.Server{ID: hraft.ServerID(id)})
		return len(leader.Members())
	}
	var rest []string
	for _, o := range c.others(leader) {
		rest = append(rest, o.name)
	}
	for what, got := range map[string]int{
		"one that answers":      try(rest[0]),
		"the leader itself":     try(leader.name, leader.name),
		"a stranger":            try("nobody"),
		"one of too many":       try(rest[0], rest[0], rest[1]),
		"one of far too many":   try(rest[0], rest...),
		"another than the dead": try(rest[1], rest[0]),
	} {
		if got != 4 {
			t.Errorf("%s: %d members are left", what, got)
		}
	}
	if got := try(rest[0], rest[0]); got != 3 {
		t.Errorf("one of four: %d members are left", got)
	}
	if got := try(rest[1], rest[1]); got != 3 {
		t.Errorf("one of three: %d members are left", got)
	}
	// A leader that has lost its place without knowing.
	if got := (&care{n: leader.Node, seen: map[hraft.ServerID]*contact{}}); got.dead("m1") || got.answers("m1") {
		t.Error("something is known of one who was never asked")
	}
}

// TestDead: a member is dead by unanswered questions, not by time in which none was asked.
func TestDead(t *testing.T) {
	t.Parallel()
	type round struct {
		at       int // seconds
		answered bool
		address  string
	}
	for name, tc := range map[string]struct {
		rounds []round
		want   bool
	}{
		"never asked":             {nil, false},
		"answers":                 {[]round{{0, true, "a"}, {3, true, "a"}, {6, true, "a"}, {9, true, "a"}, {12, true, "a"}}, false},
		"silent too short":        {[]round{{0, true, "a"}, {3, false, "a"}, {6, false, "a"}, {9, false, "a"}}, false},
		"silent":                  {[]round{{0, true, "a"}, {3, false, "a"}, {6, false, "a"}, {9, false, "a"}, {12, false, "a"}, {14, false, "a"}}, true},
		"silent from the start":   {[]round{{0, false, "a"}, {3, false, "a"}, {6, false, "a"}, {9, false, "a"}, {11, false, "a"}}, true},
		"answers in between":      {[]round{{0, false, "a"}, {3, false, "a"}, {6, true, "a"}, {9, false, "a"}, {12, false, "a"}}, false},
		"the leader slept":        {[]round{{0, false, "a"}, {3, false, "a"}, {3600, false, "a"}}, false},
		"the leader slept before": {[]round{{0, false, "a"}, {3600, false, "a"}, {3603, false, "a"}, {3606, false, "a"}, {3609, false, "a"}, {3611, false, "a"}}, true},
		"it moved":                {[]round{{0, false, "a"}, {4, false, "a"}, {8, false, "a"}, {11, false, "b"}}, false},
	} {
		k := &care{
			n:     &Node{cfg: Config{RemoveDeadAfter: 10 * time.Second, HeartbeatTimeout: time.Second}, log: slog.New(slog.DiscardHandler)},
			every: time.Second, seen: map[hraft.ServerID]*contact{},
		}
		start := time.Now()
		for _, r := range tc.rounds {
			stats := &autopilot.ServerStats{LastContact: math.MaxInt64}
			if r.answered {
				stats = &autopilot.ServerStats{}
			}
			k.note(start.Add(time.Duration(r.at)*time.Second),
				map[hraft.ServerID]*autopilot.Server{"x": {ID: "x", Address: hraft.ServerAddress(r.address)}},
				map[hraft.ServerID]*autopilot.ServerStats{"x": stats})
		}
		if got := k.dead("x"); got != tc.want {
			t.Errorf("%s: dead %v", name, got)
		}
	}
}
