package raft

import (
	"context"
	"log/slog"
	"math"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	hraft "github.com/hashicorp/raft"
	autopilot "github.com/hashicorp/raft-autopilot"
)

const (
	// caughtUp is how many entries a member may lack to count as caught up.
	caughtUp = 256
	// minVoters is how many voters a removal of the dead must leave.
	minVoters = 3
)

// care looks after the membership while this member leads, with raft-autopilot: it gives a member that has been
// in touch and caught up for StableFor its vote, and removes one that was out of reach for RemoveDeadAfter.
// Autopilot decides; what it decides on, and each change it makes, goes through here.
type care struct {
	n     *Node
	every time.Duration

	started atomic.Bool // the first round is over

	mu    sync.Mutex
	seen  map[hraft.ServerID]*contact
	asked time.Time // end of the last round of questions

	unmoved map[hraft.ServerID]string // new addresses that could not be taken over, as logged
}

// contact is what is known of one member since this member leads.
type contact struct {
	address hraft.ServerAddress
	failing time.Time // the end of the first of the rounds in a row that it did not answer in; zero: it answered
	failed  time.Time // the end of the last of them
	down    bool      // as logged
}

// watchOver runs autopilot until the reign ends.
func (n *Node) watchOver(reign context.Context) {
	c := &care{n: n, every: max(10*time.Millisecond, min(n.cfg.StableFor/4, time.Second/2)), seen: map[hraft.ServerID]*contact{}, unmoved: map[hraft.ServerID]string{}}
	pilot := autopilot.New(careRaft{c}, c,
		autopilot.WithUpdateInterval(c.every), autopilot.WithReconcileInterval(c.every),
		autopilot.WithPromoter(&promoter{}), autopilot.WithLogger(newHCLog(n.log, slog.LevelWarn, func() bool { return reign.Err() != nil })))
	pilot.Start(reign)
	<-reign.Done()
	<-pilot.Stop()
	n.peers.only(nil)
}

// AutopilotConfig implements autopilot.ApplicationIntegration.
func (c *care) AutopilotConfig() *autopilot.Config {
	return &autopilot.Config{
		CleanupDeadServers:      c.n.cfg.RemoveDeadAfter > 0,
		LastContactThreshold:    max(2*time.Second, 4*c.n.cfg.HeartbeatTimeout),
		MaxTrailingLogs:         caughtUp,
		MinQuorum:               minVoters,
		ServerStabilizationTime: c.n.cfg.StableFor,
	}
}

// NotifyState implements autopilot.ApplicationIntegration.
func (c *care) NotifyState(*autopilot.State) {}

// FetchServerStats implements autopilot.ApplicationIntegration: it asks all at once. It takes more time than
// autopilot gives it (half a round): one hung member must not make the others look bad.
func (c *care) FetchServerStats(ctx context.Context, servers map[hraft.ServerID]*autopilot.Server) map[hraft.ServerID]*autopilot.ServerStats {
	if !c.started.Swap(true) {
		// Autopilot's start waits for this, a second at the most, and complains: so the first round asks nobody.
		out := map[hraft.ServerID]*autopilot.ServerStats{}
		for id := range servers {
			out[id] = &autopilot.ServerStats{LastContact: math.MaxInt64}
		}
		return out
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), healthWait)
	defer cancel()
	defer context.AfterFunc(c.n.ctx, cancel)()
	term := c.n.logs.lastTerm(c.n.raft.CurrentTerm())
	var mu sync.Mutex
	var wg sync.WaitGroup
	out := map[hraft.ServerID]*autopilot.ServerStats{}
	moved := map[hraft.ServerID]string{}
	for id, s := range servers {
		wg.Go(func() {
			at := c.n.cfg.Address
			stats := &autopilot.ServerStats{LastContact: math.MaxInt64} // else autopilot goes on with the last it had
			if id == c.n.self {
				stats = &autopilot.ServerStats{LastTerm: term, LastIndex: c.n.fsm.appliedIndex()}
			} else if w, err := c.n.askWord(ctx, Member{ID: string(id), Address: string(s.Address)}); err != nil {
				at = ""
			} else {
				at = w.Address
				stats = &autopilot.ServerStats{LastContact: w.Contact, LastTerm: w.LastTerm, LastIndex: w.Applied}
				if w.old { // it says only how far it is
					stats.LastContact, stats.LastTerm = 0, term
				}
			}
			mu.Lock()
			defer mu.Unlock()
			out[id] = stats
			if at != "" && at != string(s.Address) {
				moved[id] = at
			}
		})
	}
	wg.Wait()
	for id, at := range moved {
		c.readdress(id, at)
	}
	c.note(time.Now(), servers, out)
	return out
}

// readdress puts the address that a member says it has, over a connection that is the member's for sure, into the
// configuration. Two members that have swapped their addresses cannot get there one by one: raft takes no
// address twice. They are in touch all the same, by the book; it is only said once.
func (c *care) readdress(id hraft.ServerID, address string) {
	n := c.n
	n.changing.Lock()
	defer n.changing.Unlock()
	if !slices.ContainsFunc(n.Members(), func(m Member) bool { return m.ID == string(id) && m.Address != address }) {
		return
	}
	// For a voter this changes the address and leaves the vote.
	err := n.await(n.raft.AddNonvoter(id, hraft.ServerAddress(address), 0, n.cfg.RPCTimeout))
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case err == nil:
		n.log.Info("member has a new address", "member", id, "address", address)
		delete(c.unmoved, id)
	case c.unmoved[id] != address:
		n.log.Warn("taking over a member's new address failed; it is tried again", "member", id, "address", address, "error", err)
		c.unmoved[id] = address
	}
}

// note keeps since when a member has not answered. Time in which nobody was asked does not count: a leader that
// was suspended for an hour knows nothing about that hour.
func (c *care) note(now time.Time, servers map[hraft.ServerID]*autopilot.Server, stats map[hraft.ServerID]*autopilot.ServerStats) {
	c.mu.Lock()
	defer c.mu.Unlock()
	gap := !c.asked.IsZero() && since(c.asked, now) > 2*(healthWait+c.every)+time.Second
	c.asked = now
	for id := range c.seen {
		if servers[id] == nil {
			delete(c.seen, id)
		}
	}
	for id, s := range servers {
		k := c.seen[id]
		if k == nil || k.address != s.Address { // one that was added again, or moved, gets its time anew
			k = &contact{address: s.Address}
			c.seen[id] = k
		}
		switch answered := stats[id] != nil && stats[id].LastContact != math.MaxInt64; {
		case answered:
			if k.down {
				c.n.log.Info("member answers again", "member", id)
			}
			k.failing, k.failed, k.down = time.Time{}, time.Time{}, false
		case k.failing.IsZero() || gap:
			k.failing, k.failed = now, now
		default:
			k.failed = now
			if !k.down && k.failed.Sub(k.failing) > 4*c.n.cfg.HeartbeatTimeout {
				k.down = true
				c.n.log.Warn("member does not answer", "member", id, "address", s.Address)
			}
		}
	}
}

// dead tells whether a member was out of reach for RemoveDeadAfter, by questions it did not answer.
func (c *care) dead(id hraft.ServerID) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	k := c.seen[id]
	return k != nil && c.n.cfg.RemoveDeadAfter > 0 && !k.failing.IsZero() && k.failed.Sub(k.failing) >= c.n.cfg.RemoveDeadAfter
}

// answers tells whether a member answered in the last round.
func (c *care) answers(id hraft.ServerID) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	k := c.seen[id]
	return k != nil && k.failing.IsZero()
}

// KnownServers implements autopilot.ApplicationIntegration: all of the configuration.
func (c *care) KnownServers() map[hraft.ServerID]*autopilot.Server {
	out := map[hraft.ServerID]*autopilot.Server{}
	for _, m := range c.n.Members() {
		id := hraft.ServerID(m.ID)
		s := &autopilot.Server{
			ID: id, Name: m.ID, Address: hraft.ServerAddress(m.Address), NodeStatus: autopilot.NodeAlive,
			RaftVersion: 3, IsLeader: id == c.n.self,
		}
		if m.Voter { // of those that have no vote, any may go: none is needed
			s.NodeType = autopilot.NodeVoter
		}
		if c.dead(id) {
			s.NodeStatus = autopilot.NodeFailed
		}
		out[id] = s
	}
	return out
}

// RemoveFailedServer implements autopilot.ApplicationIntegration. Autopilot has seen to it that a majority and
// minVoters stay; what it saw may have changed, so both are looked at again, under the lock that every change takes.
func (c *care) RemoveFailedServer(s *autopilot.Server) {
	n := c.n
	n.changing.Lock()
	defer n.changing.Unlock()
	found, voters, up := Member{}, 0, 0
	for _, m := range n.Members() {
		if m.ID == string(s.ID) {
			found = m
		}
		if m.Voter {
			voters++
			if m.ID == n.cfg.ID || c.answers(hraft.ServerID(m.ID)) {
				up++
			}
		}
	}
	switch {
	case found.ID == "" || found.ID == n.cfg.ID || !c.dead(s.ID):
		return
	case up < voters/2+1: // the leader may be the one that is cut off
		return
	case found.Voter && voters-1 < minVoters:
		return
	}
	if err := n.await(n.raft.RemoveServer(s.ID, 0, n.cfg.RPCTimeout)); err != nil {
		n.log.Warn("removing a member that is gone failed", "member", s.ID, "error", err)
		return
	}
	n.log.Warn("member did not answer for too long and was removed; to join again it needs an empty data folder",
		"member", s.ID, "address", s.Address, "after", n.cfg.RemoveDeadAfter)
}

// promoter is autopilot's own but for two things. It lets a new leader give a vote only after StableFor too,
// where autopilot's takes everyone for stable at first. And it removes only who is known to have failed: members
// that the list did not have are no reason.
type promoter struct{ autopilot.StablePromoter }

// CalculatePromotionsAndDemotions implements autopilot.Promoter.
func (promoter) CalculatePromotionsAndDemotions(c *autopilot.Config, s *autopilot.State) autopilot.RaftChanges {
	var changes autopilot.RaftChanges
	now := time.Now()
	for id, server := range s.Servers {
		if server.State == autopilot.RaftNonVoter && server.Health.IsStable(now, c.ServerStabilizationTime) {
			changes.Promotions = append(changes.Promotions, id)
		}
	}
	return changes
}

// FilterFailedServerRemovals implements autopilot.Promoter.
func (promoter) FilterFailedServerRemovals(_ *autopilot.Config, _ *autopilot.State, failed *autopilot.FailedServers) *autopilot.FailedServers {
	failed.StaleVoters, failed.StaleNonVoters = nil, nil
	return failed
}

// careRaft is what autopilot may do to raft: give a vote.
type careRaft struct{ c *care }

// AddVoter implements autopilot.Raft.
func (r careRaft) AddVoter(id hraft.ServerID, address hraft.ServerAddress, _ uint64, _ time.Duration) hraft.IndexFuture {
	return decided{err: r.c.n.giveVote(Member{ID: string(id), Address: string(address)})}
}

// AddNonvoter implements autopilot.Raft, which does not call it.
func (careRaft) AddNonvoter(hraft.ServerID, hraft.ServerAddress, uint64, time.Duration) hraft.IndexFuture {
	return decided{err: ErrRefused}
}

// DemoteVoter implements autopilot.Raft; this promoter demotes nobody.
func (careRaft) DemoteVoter(hraft.ServerID, uint64, time.Duration) hraft.IndexFuture {
	return decided{err: ErrRefused}
}

// RemoveServer implements autopilot.Raft; removals go through RemoveFailedServer.
func (careRaft) RemoveServer(hraft.ServerID, uint64, time.Duration) hraft.IndexFuture {
	return decided{err: ErrRefused}
}

// LeadershipTransferToServer implements autopilot.Raft; this promoter prefers no leader.
func (careRaft) LeadershipTransferToServer(hraft.ServerID, hraft.ServerAddress) hraft.Future {
	return decided{err: ErrRefused}
}

// LastIndex implements autopilot.Raft. What members are compared by is what they have applied. Autopilot takes 0
// for a cluster that does not exist.
func (r careRaft) LastIndex() uint64 { return max(1, r.c.n.fsm.appliedIndex()) }

// Leader implements autopilot.Raft.
func (r careRaft) Leader() hraft.ServerAddress {
	address, _ := r.c.n.raft.LeaderWithID()
	return address
}

// GetConfiguration implements autopilot.Raft.
func (r careRaft) GetConfiguration() hraft.ConfigurationFuture { return r.c.n.raft.GetConfiguration() }

// Stats implements autopilot.Raft, which reads one of them.
func (r careRaft) Stats() map[string]string {
	return map[string]string{"last_log_term": strconv.FormatUint(r.c.n.logs.lastTerm(r.c.n.raft.CurrentTerm()), 10)}
}

// State implements autopilot.Raft.
func (r careRaft) State() hraft.RaftState { return r.c.n.raft.State() }

// decided is a future that is past.
type decided struct{ err error }

// Error implements hraft.Future.
func (d decided) Error() error { return d.err }

// Index implements hraft.IndexFuture.
func (decided) Index() uint64 { return 0 }
