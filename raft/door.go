package raft

import (
	"slices"
	"sync"
	"time"

	hraft "github.com/hashicorp/raft"
)

// patienceWith is how many heartbeat timeouts without any leader make a member that was removed credible again: by
// then those that are still members have elected.
const patienceWith = 4

// door keeps out who is no member any more: a certificate outlives a removal.
type door struct {
	mu    sync.Mutex
	open  bool              // this member's raft has started
	known map[string]bool   // the members of the last committed configuration; nil before the first
	went  map[string]uint64 // those that were removed since, and the term of that entry
}

// configured takes a configuration that is committed, with the term of its entry, and says who went by it.
func (d *door) configured(term uint64, conf hraft.Configuration) (went []string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	now := map[string]bool{}
	for _, s := range conf.Servers {
		now[string(s.ID)] = true
		delete(d.went, string(s.ID))
	}
	for id := range d.known {
		if !now[id] {
			went = append(went, id)
			if d.went == nil {
				d.went = map[string]uint64{}
			}
			d.went[id] = term
		}
	}
	d.known = now
	if !d.open {
		return nil // nobody has a connection yet
	}
	return went
}

// begin says who the members were before the first configuration that comes.
func (d *door) begin(members []Member) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.open = true
	if d.known != nil || len(members) == 0 {
		return
	}
	d.known = map[string]bool{}
	for _, m := range members {
		d.known[m.ID] = true
	}
}

func (d *door) removedIn(id string) (term uint64, ok bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	term, ok = d.went[id]
	return term, ok
}

// configured is called with each configuration that is committed, in order; also while an old log is replayed, so
// who went by it may have come back, and lead, in a later term.
func (n *Node) configured(term uint64, data []byte) {
	conf, err := decodeConfiguration(data)
	if err != nil {
		n.log.Error("the entry of a change of the membership makes no sense", "error", err)
		return
	}
	for _, id := range n.door.configured(term, conf) {
		if !slices.ContainsFunc(n.Members(), func(m Member) bool { return m.ID == id }) && id != n.cfg.ID {
			n.mux.part(id, term, time.Now().Add(n.cfg.HeartbeatTimeout))
		}
	}
}

// watchDoor ends connections of members that went, and of those that came while no leader was known and that the
// leader known since does not have.
func (n *Node) watchDoor() {
	tick := time.NewTicker(max(5*time.Millisecond, n.cfg.HeartbeatTimeout/2))
	defer tick.Stop()
	for {
		select {
		case <-n.ctx.Done():
			return
		case now := <-tick.C:
			n.mux.sweep(now, n.outcast)
		}
	}
}

// outcast tells whether a member's raft connection is refused. That a member is not in the configuration is not
// enough to know: it may have been added since, and lead. It is
//
//   - while this member is the only one with a vote: any change would have to come from itself;
//   - while this member leads, or heard of a leader within a heartbeat timeout, and that is another. A leader that
//     this member does not know as a member yet gets in once the former is silent.
//
// Of a member that this one saw being removed more is asked: a longer silence, and then a term above that of its removal.
func (n *Node) outcast(peer string) bool {
	members := n.Members()
	if peer == "" || peer == n.cfg.ID || len(members) == 0 || slices.ContainsFunc(members, func(m Member) bool { return m.ID == peer }) {
		return false
	}
	if !slices.ContainsFunc(members, func(m Member) bool { return (m.ID == n.cfg.ID) != m.Voter }) {
		return true
	}
	removed, went := n.door.removedIn(peer)
	silence := n.cfg.HeartbeatTimeout
	if went {
		silence *= patienceWith
	}
	if n.contact() > silence { // before looking at who leads: an append names its leader first
		return false
	}
	_, leader := n.raft.LeaderWithID()
	return string(leader) != peer || went && n.raft.CurrentTerm() <= removed
}

// part ends the raft connections from a member that was removed in this term, unless it leads in a later one. The others
// end at the given time: there may be answers under way on them, to the member's wish to be removed for one.
func (m *mux) part(peer string, term uint64, at time.Time) {
	m.mu.Lock()
	var ended []*trackedConn
	for c := range m.conns {
		switch {
		case c.peer != peer || c.leads > term:
		case c.accepted && c.kind == connRaft:
			ended = append(ended, c)
		case c.until.IsZero():
			c.until = at
		}
	}
	m.mu.Unlock()
	for _, c := range ended {
		c.Close()
	}
}

// sweep ends the connections whose time has come, and the raft connections of outcasts.
func (m *mux) sweep(now time.Time, outcast func(peer string) bool) {
	peers := map[string]bool{}
	m.mu.Lock()
	for c := range m.conns {
		if c.accepted && c.kind == connRaft {
			peers[c.peer] = false
		}
	}
	m.mu.Unlock()
	for peer := range peers {
		peers[peer] = outcast(peer)
	}
	m.mu.Lock()
	var ended []*trackedConn
	for c := range m.conns {
		if !c.until.IsZero() && now.After(c.until) || c.accepted && c.kind == connRaft && peers[c.peer] {
			ended = append(ended, c)
		}
	}
	m.mu.Unlock()
	for _, c := range ended {
		c.Close()
	}
}
