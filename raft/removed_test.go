package raft

import (
	"errors"
	"testing"
	"time"
)

func gone(m *member) bool {
	select {
	case <-m.Removed():
		return true
	default:
		return false
	}
}

// TestRemoved: a member learns that it was removed while it was up, while it was down, and again after a restart;
// nobody else does, and then it asks for no vote.
func TestRemoved(t *testing.T) {
	t.Parallel()
	for _, kind := range []string{"up", "down", "leader"} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			c := newCluster(t, 3, nil)
			m := c.follower()
			if kind == "leader" {
				m = c.leader()
			}
			if kind == "down" {
				m.crash()
			}
			rest := c.others(m)
			if err := rest[0].RemoveMember(within(t), m.name); err != nil && !errors.Is(err, ErrUnknownOutcome) {
				t.Fatal(err)
			}
			if kind == "down" {
				c.start(m, false)
			}
			eventually(t, "it knows", func() bool { return gone(m) })
			c.members = rest
			c.voting(2)
			m.Close()
			c.start(m, false)
			eventually(t, "it knows again", func() bool { return gone(m) })
			c.propose(rest[0], "x")
			// It would force one after the other. A starved machine has elections of its own, but a quiet second comes.
			eventually(t, "nobody forces an election", func() bool {
				term := rest[0].raft.CurrentTerm()
				time.Sleep(time.Second) // can only miss a fault
				return rest[0].raft.CurrentTerm() == term
			})
			for _, o := range rest {
				if gone(o) {
					t.Errorf("%s takes itself for removed", o.name)
				}
			}
			// Added again, with the folder it has, it is one again once it starts anew.
			c.add(rest[0], m.name, m.address)
			m.Close()
			c.start(m, false)
			c.members = append(rest, m)
			c.voting(3)
			c.propose(m, "back")
			if gone(m) {
				t.Error("takes itself for removed though it was added again")
			}
		})
	}
}

// TestNotRemoved: neither a lie nor an old truth makes a member give up.
func TestNotRemoved(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3, nil)
	m := c.follower()
	for peer, w := range map[string]word{"m9": {ID: "m9", Gone: true}, "": {ID: "m1", Gone: true}, c.leader().name: {}} {
		m.hear(peer, w)
		if gone(m) {
			t.Fatalf("believed %q: %+v", peer, w)
		}
	}
	// Only a leader that a quorum confirms says so.
	leader := c.leader()
	eventually(t, "the leader knows who is no member", func() bool { leader = c.leader(); return leader.lacks(within(t), "stranger") })
	if lacks := leader.lacks(within(t), m.name); lacks {
		t.Error("the leader says that a member is none")
	}
	if lacks := m.lacks(within(t), "stranger"); lacks && m != leader {
		t.Error("a follower says who is no member")
	}
	c.isolate(leader, true)
	if lacks := leader.lacks(within(t), "stranger"); lacks {
		t.Error("a leader that is cut off says who is no member")
	}
	// One that was not added yet is not one that was removed.
	lone := &member{name: "lone", dir: t.TempDir() + "/lone", machine: &machine{}}
	c.start(lone, false)
	lone.hear("m1", word{ID: "m1", Gone: true})
	if gone(lone) {
		t.Error("one that never was a member takes itself for removed")
	}
	sole := newCluster(t, 1, nil).members[0]
	sole.hear("m1", word{ID: "m1", Gone: true})
	if gone(sole) {
		t.Error("the only member takes itself for removed")
	}
}
