//go:build integration

package integration

import (
	"testing"
	"time"

	"countersign.io/countersign/integration/cluster"
)

// cut loses what each of one side sends to each of the other, in that direction only; a nil member is this machine with its
// agent and clients.
func (r *faultRun) cut(from, to []*cluster.Member) { r.wires(from, to, r.Net.Cut) }

func (r *faultRun) mend(from, to []*cluster.Member) { r.wires(from, to, r.Net.Mend) }

func (r *faultRun) wires(from, to []*cluster.Member, do func(from, to string) error) {
	r.t.Helper()
	name := func(m *cluster.Member) string {
		if m == nil {
			return ""
		}
		return m.Name
	}
	for _, a := range from {
		for _, b := range to {
			if err := do(name(a), name(b)); err != nil {
				r.t.Fatal(err)
			}
		}
	}
}

// TestFaultPartition cuts the members' network in every way that three can be cut. Nobody is told: what is sent is lost. A
// member that is cut off from the others issues on for max_staleness, which is more than any of this takes; it cannot write.
func TestFaultPartition(t *testing.T) {
	f := newFaultWorld(t, 8*time.Minute, "", nil)
	const lasting = 5 * time.Second
	during := func(r *faultRun, writers ...*cluster.Member) {
		r.mu.Lock()
		before := clone(r.wrote)
		r.mu.Unlock()
		r.hold(lasting)
		r.mu.Lock()
		defer r.mu.Unlock()
		for _, m := range writers {
			if r.wrote[m.Name] == before[m.Name] {
				r.t.Errorf("%s acknowledged no write while it was with the majority", m.Name)
			}
		}
	}
	type side = []*cluster.Member
	runFault(t, f, "partition: the leader alone, two followers together", func(t *testing.T, r *faultRun) {
		leader, others := r.roles()
		r.cut(side{leader}, others)
		r.cut(others, side{leader})
		during(r, others...)
		r.mend(side{leader}, others)
		r.mend(others, side{leader})
	})
	runFault(t, f, "partition: one follower alone", func(t *testing.T, r *faultRun) {
		leader, others := r.roles()
		rest := side{leader, others[1]}
		r.cut(side{others[0]}, rest)
		r.cut(rest, side{others[0]})
		during(r, rest...)
		r.mend(side{others[0]}, rest)
		r.mend(rest, side{others[0]})
	})
	runFault(t, f, "partition: all three alone", func(t *testing.T, r *faultRun) {
		all := f.Members
		for i := range all {
			r.cut(side{all[i]}, side{all[(i+1)%3], all[(i+2)%3]})
		}
		r.hold(lasting)
		for i := range all {
			r.mend(side{all[i]}, side{all[(i+1)%3], all[(i+2)%3]})
		}
	})
	runFault(t, f, "one way: what the leader sends is lost", func(t *testing.T, r *faultRun) {
		leader, others := r.roles()
		r.cut(side{leader}, others)
		during(r, others...)
		r.mend(side{leader}, others)
	})
	runFault(t, f, "one way: what is sent to the leader is lost", func(t *testing.T, r *faultRun) {
		leader, others := r.roles()
		r.cut(others, side{leader})
		during(r, others...)
		r.mend(others, side{leader})
	})
	runFault(t, f, "one way: what a follower sends is lost", func(t *testing.T, r *faultRun) {
		leader, others := r.roles()
		r.cut(side{others[0]}, side{leader, others[1]})
		during(r, leader, others[1])
		r.mend(side{others[0]}, side{leader, others[1]})
	})
	runFault(t, f, "the wire between the leader and one follower is cut", func(t *testing.T, r *faultRun) {
		leader, others := r.roles()
		r.cut(side{leader}, side{others[0]})
		r.cut(side{others[0]}, side{leader})
		during(r, others[1])
		r.mend(side{leader}, side{others[0]})
		r.mend(side{others[0]}, side{leader})
	})
	runFault(t, f, "the member that the agent uses cannot be reached by it", func(t *testing.T, r *faultRun) {
		// Which one it is does not show: each in turn, both ways.
		for _, m := range f.Members {
			r.stands[m.Name].down()
			r.cut(side{nil}, side{m})
			r.cut(side{m}, side{nil})
			r.hold(lasting / 2)
			r.mend(side{nil}, side{m})
			r.mend(side{m}, side{nil})
			r.stands[m.Name].up(r.faultWorld.ctx)
			r.hold(lasting / 2)
		}
	})
}
