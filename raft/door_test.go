package raft

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	hraft "github.com/hashicorp/raft"
)

// rogue speaks raft over connections of a member, as it likes.
type rogue struct {
	*hraft.NetworkTransport
	name string
}

type rogueStream struct {
	net.Listener
	dial func(context.Context, string, string) (net.Conn, error)
}

func (s rogueStream) Dial(address hraft.ServerAddress, wait time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), wait)
	defer cancel()
	return dialAs(ctx, s.dial, string(address), connRaft)
}

func dialAs(ctx context.Context, dial func(context.Context, string, string) (net.Conn, error), address string, first ...byte) (net.Conn, error) {
	conn, err := dial(ctx, "", address)
	if err != nil {
		return nil, err
	}
	if _, err := conn.Write(first); err != nil {
		conn.Close()
		return nil, err
	}
	return conn, nil
}

func (c *cluster) rogue(name string) rogue {
	c.t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		c.t.Fatal(err)
	}
	r := rogue{hraft.NewNetworkTransportWithConfig(&hraft.NetworkTransportConfig{
		Stream: rogueStream{l, c.net.dial(name)}, MaxPool: 1, Timeout: patience, Logger: newHCLog(slog.New(slog.DiscardHandler), slog.LevelError, nil),
	}), name}
	c.t.Cleanup(func() { r.Close() })
	return r
}

func (r rogue) header(as string) hraft.RPCHeader {
	return hraft.RPCHeader{ProtocolVersion: hraft.ProtocolVersionMax, ID: []byte(as), Addr: []byte("127.0.0.1:1")}
}

// asks sends each kind of request in a name and at a term, and returns how many are answered.
func (r rogue) asks(to *member, as string, term uint64) (answered int) {
	at := hraft.ServerAddress(to.address)
	for _, err := range []error{
		r.RequestPreVote(to.self, at, &hraft.RequestPreVoteRequest{RPCHeader: r.header(as), Term: term}, new(hraft.RequestPreVoteResponse)),
		r.RequestVote(to.self, at, &hraft.RequestVoteRequest{RPCHeader: r.header(as), Term: term}, new(hraft.RequestVoteResponse)),
		// The first is a heartbeat.
		r.AppendEntries(to.self, at, &hraft.AppendEntriesRequest{RPCHeader: r.header(as), Term: term}, new(hraft.AppendEntriesResponse)),
		r.AppendEntries(to.self, at, &hraft.AppendEntriesRequest{RPCHeader: r.header(as), Term: term, PrevLogEntry: 1, PrevLogTerm: 1}, new(hraft.AppendEntriesResponse)),
		r.InstallSnapshot(to.self, at, &hraft.InstallSnapshotRequest{RPCHeader: r.header(as), SnapshotVersion: 1, Term: term},
			new(hraft.InstallSnapshotResponse), strings.NewReader("")),
	} {
		if err == nil {
			answered++
		}
	}
	return answered
}

// TestOtherName: requests count only in the name of the member whose connection they come on.
func TestOtherName(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3, nil)
	r := c.rogue("m2")
	for _, m := range []*member{c.members[0], c.members[2]} {
		if n := r.asks(m, "m2", 0); n != 5 { // term 0 is old, and answered so
			t.Errorf("%s answers %d of a member's own requests", m.name, n)
		}
		for _, as := range []string{"m1", "m3", "m9", ""} {
			if n := r.asks(m, as, 1000); n > 0 {
				t.Errorf("%s answers %d requests of m2 in the name of %q", m.name, n, as)
			}
		}
		if term := m.raft.CurrentTerm(); term >= 1000 {
			t.Errorf("%s took over term %d", m.name, term)
		}
	}
	c.propose(c.members[1], "x")
	c.same("x")
}

// ends tells whether the other side closes a connection.
func ends(conn net.Conn) bool {
	conn.SetReadDeadline(time.Now().Add(patience))
	_, err := io.Copy(io.Discard, conn)
	return !errors.Is(err, os.ErrDeadlineExceeded)
}

// TestShutOut: the connections of a member that is removed end, on every member; while there is a leader it gets no
// other, and disturbs nobody, until it is added again.
func TestShutOut(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 4, nil)
	m := c.follower()
	rest := c.others(m)
	m.crash()
	r := c.rogue(m.name)
	var open []net.Conn
	for _, o := range rest {
		if n := r.asks(o, m.name, 0); n != 5 {
			t.Errorf("%s answers %d of 5 requests of a member", o.name, n)
		}
		for _, kind := range []byte{connRaft, connForward} {
			conn, err := dialAs(within(t), c.net.dial(m.name), o.address, kind)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			open = append(open, conn)
		}
		eventually(t, "it has the connections", func() bool { f, _ := o.mux.count(m.name); return f[connRaft] >= 1 && f[connForward] >= 1 })
	}
	if err := rest[0].RemoveMember(within(t), m.name); err != nil {
		t.Fatal(err)
	}
	for i, conn := range open {
		if !ends(conn) {
			t.Errorf("connection %d stays open", i)
		}
	}
	c.members = rest
	c.voting(3)
	for _, o := range rest {
		eventually(t, "it knows who leads", func() bool { id, _ := o.Leader(); return id != "" && id != m.name })
		for _, peer := range []string{m.name, "never one"} {
			if !o.outcast(peer) {
				t.Errorf("%s lets %q in", o.name, peer)
			}
		}
		if o.outcast("") || o.outcast(rest[0].name) {
			t.Errorf("%s refuses a member", o.name)
		}
		if n := r.asks(o, m.name, 1000); n > 0 {
			t.Errorf("%s answers %d requests of a member that was removed", o.name, n)
		}
		if term := o.raft.CurrentTerm(); term >= 1000 {
			t.Errorf("%s took over term %d of a member that was removed", o.name, term)
		}
	}
	c.propose(rest[1], "x")
	c.add(rest[0], m.name, m.address)
	c.start(m, false)
	c.members = append(rest, m)
	c.voting(4)
	c.propose(m, "back")
	c.same("x", "back")
}

// TestUnknownLeader: a leader that was added while a member was cut off is none that it knows, and is let in.
func TestUnknownLeader(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3, nil)
	away := c.members[2]
	if away.IsLeader() {
		if err := away.TransferLeader(within(t), "m1"); err != nil {
			t.Fatal(err)
		}
	}
	c.isolate(away, true)
	c.members = c.members[:2]
	added := c.join("m4")
	c.net.set(true, "m3", "m4")
	c.voting(4)
	if err := added.TransferLeader(within(t), "m4"); err != nil {
		t.Fatal(err)
	}
	c.propose(added, "led by a stranger")
	eventually(t, "it hears of nobody, and would let in a leader that it does not know", func() bool { return !away.outcast("m4") })
	for _, o := range []string{"m1", "m2", "m4"} {
		c.net.set(false, "m3", o)
	}
	eventually(t, "it hears of the leader", func() bool { return away.machine.has("led by a stranger") == 1 })
	// One that knows nothing of any cluster lets everybody in: it waits for a leader.
	lone := &member{name: "lone", dir: filepath.Join(t.TempDir(), "lone"), machine: &machine{}}
	c.start(lone, false)
	if lone.outcast("m1") {
		t.Error("a joiner refuses its leader")
	}
}

// TestSneakedIn: a connection that a stranger made while nobody led ends once there is a leader.
func TestSneakedIn(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3, nil)
	m := c.members[0]
	c.isolate(m, true)
	eventually(t, "it hears of nobody", func() bool { return !m.outcast("stranger") })
	conn, err := dialAs(within(t), c.net.dial("stranger"), m.address, connRaft)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	eventually(t, "it has the connection", func() bool { kinds, _ := m.mux.count("stranger"); return kinds[connRaft] == 1 })
	c.isolate(m, false)
	if !ends(conn) {
		t.Error("a stranger's connection stays open")
	}
	c.voting(3)
}

// count is how many accepted connections there are from a member, of each kind and in all.
func (m *mux) count(peer string) (kinds map[byte]int, all int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	kinds = map[byte]int{}
	for c := range m.conns {
		if c.accepted && c.peer == peer {
			kinds[c.kind]++
			all++
		}
	}
	return kinds, all
}

// TestCrowd: a member that makes too many connections loses its oldest, and takes none from others.
func TestCrowd(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3, nil)
	to := c.leader()
	from := c.others(to)[0]
	for _, first := range [][]byte{{connRaft}, {connForward}, {}} {
		var mine []net.Conn
		for range 3 * maxPeerConns {
			conn, err := dialAs(within(t), c.net.dial(from.name), to.address, first...)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			mine = append(mine, conn)
		}
		for i := range maxPeerConns {
			if !ends(mine[i]) {
				t.Errorf("connection %d of %q stays open", i, first)
			}
		}
		eventually(t, "no more than the limit", func() bool {
			kinds, _ := to.mux.count(from.name)
			return kinds[connRaft] <= maxPeerConns && kinds[connForward] <= maxPeerConns && kinds[0] <= maxPeerConns
		})
	}
	for _, m := range c.members {
		c.propose(m, "by "+m.name)
	}
	c.same("by m1", "by m2", "by m3")
}

// TestRestoredIsSafe: members of the lost cluster that come back with their folders reach neither the restored member
// nor one that joined it, be it under a new name or an old one, and do not learn its term.
func TestRestoredIsSafe(t *testing.T) {
	t.Parallel()
	for _, second := range []string{"m4", "m3"} {
		t.Run(second, func(t *testing.T) {
			t.Parallel()
			c := newCluster(t, 3, func(c *Config) { c.TrailingLogs = 1 })
			c.propose(c.members[0], "before")
			c.same("before")
			former := c.members
			for _, o := range former {
				if err := o.raft.Snapshot().Error(); err != nil { // which an old leader could install
					t.Fatal(err)
				}
			}
			for _, o := range former {
				o.crash()
			}
			m := &member{name: "m1", address: former[0].address, dir: filepath.Join(t.TempDir(), "m1"), machine: &machine{}}
			if err := RestoreSnapshot(m.dir, m.name, m.address, 1<<40, time.Now(), saved(1<<40, "before")); err != nil {
				t.Fatal(err)
			}
			c.alone(m, "restored")
			joined := c.join(second)
			c.voting(2)
			c.propose(joined, "joined")

			old := &cluster{t: t, net: c.net, members: former[1:]}
			if second == "m3" {
				old.members = former[1:2]
			}
			for _, o := range old.members {
				old.start(o, false)
			}
			if second == "m4" {
				eventually(t, "the old cluster goes on, or its members learn that they are no longer any", func() bool {
					ctx, cancel := context.WithTimeout(within(t), time.Second)
					defer cancel()
					_, err := old.members[0].Propose(ctx, []byte("of the old cluster"))
					return err == nil || gone(old.members[0]) && gone(old.members[1])
				})
			}
			// The same at the worst moment: in the name of a member, which is let in whoever leads.
			for i, o := range c.members {
				r := c.rogue(c.members[1-i].name)
				for _, term := range []uint64{1, 1000, 1<<eraBits - 1} {
					if n := r.asks(o, r.name, term); n > 0 {
						t.Errorf("%s answers %d requests at term %d of the lost cluster", o.name, n, term)
					}
				}
				if n := r.asks(o, r.name, o.raft.CurrentTerm()-1); n != 5 {
					t.Errorf("%s answers %d of 5 requests at a term of its own era", o.name, n)
				}
			}
			for i := range 3 {
				c.propose(m, fmt.Sprint("still ", i))
			}
			c.same("before", "restored", "joined", "still 2")
			for _, o := range c.members {
				if o.machine.has("of the old cluster") != 0 {
					t.Errorf("the old cluster wrote on %s", o.name)
				}
			}
			for _, o := range old.members {
				if term := o.raft.CurrentTerm(); eraOf(term) != 0 {
					t.Errorf("%s of the old cluster learned term %d", o.name, term)
				}
			}
		})
	}
}

// TestNextEra: an era is above all terms before it and, where the clock is right, above those of any time before.
func TestNextEra(t *testing.T) {
	t.Parallel()
	now := time.Unix(1_800_000_000, 0)
	for _, term := range []uint64{0, 1, 1<<eraBits - 1, 1 << eraBits, nextEra(0, now), nextEra(0, now) + 5} {
		for _, at := range []time.Time{time.Unix(-5, 0), time.Unix(0, 0), now} {
			if next := nextEra(term, at); eraOf(next) <= eraOf(term) || next < uint64(max(0, at.Unix()))<<eraBits {
				t.Errorf("after %d at %v: %d", term, at, next)
			}
		}
	}
	if nextEra(7, now) != nextEra(0, now) || nextEra(0, now.Add(time.Second)) <= nextEra(0, now)+1<<eraBits-1 {
		t.Error("the time does not count")
	}
}
