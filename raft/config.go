package raft

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"time"

	hraft "github.com/hashicorp/raft"
)

// Config is what a node needs. The zero value of each timing field means its default.
type Config struct {
	// ID names this member for all time. Address is where the others dial it.
	ID, Address string
	// Dir is this node's own folder, made with mode 0700 if absent; the folder above it must exist.
	Dir string
	// Machine is driven by the log, from inside Open on.
	Machine StateMachine
	// Listener gives authenticated connections of other members. The node owns it: Close closes it.
	Listener net.Listener
	// Dial makes an authenticated connection to the member with this id at the address. It MUST fail when
	// another answers there; an empty id takes whichever member answers.
	Dial func(ctx context.Context, id, address string) (net.Conn, error)
	// Peer names the authenticated member at the other end of a connection from Listener or Dial; "" if it
	// is not known. Nil knows nobody: then no member's word on its own address is taken.
	Peer func(net.Conn) string
	// Info is what this member tells the others of itself, at most MaxInfo bytes; Health shows it. It is
	// called often and MUST NOT wait. Nil tells nothing.
	Info func() []byte
	// Check is asked on the leader before a command goes into the log. A command that it returns an error
	// for is refused (ErrRefused, with that error's text) and changes nothing. Nil lets all pass.
	Check func(cmd []byte) error
	// Peers are addresses where other members may be found, in case all that is known of them is out of date.
	Peers []string
	// Bootstrap makes this member the first of a new cluster if its folder is empty, and is ignored otherwise.
	Bootstrap bool
	// Log gets raft's warnings and errors. Nil discards them.
	Log *slog.Logger

	// HeartbeatTimeout is how long a follower waits for a leader before it asks for votes; the actual wait
	// is random between this and twice this. At least 20 ms; default 500 ms. The election timeout is the same.
	HeartbeatTimeout time.Duration
	// LeaseTimeout is how long a leader goes on without hearing from a quorum; not above HeartbeatTimeout,
	// which is the default.
	LeaseTimeout time.Duration
	// LeaderWait bounds how long a request waits for a leader to take it; default 10 s.
	LeaderWait time.Duration
	// RPCTimeout bounds one exchange with another member, and connecting; default 5 s.
	RPCTimeout time.Duration

	// StableFor is how long a new member must have been in touch and caught up before it gets its vote;
	// default 2 s.
	StableFor time.Duration
	// RemoveDeadAfter is how long a member must have been out of the leader's reach to be removed, so long as
	// a majority and three voters stay; a new leader counts anew. 0 removes nobody; else at least ten HeartbeatTimeouts.
	RemoveDeadAfter time.Duration

	// SnapshotThreshold is how many log entries make a snapshot worth taking; default 8192.
	SnapshotThreshold uint64
	// SnapshotInterval is how often that is checked (up to twice this, at random); default 30 s.
	SnapshotInterval time.Duration
	// TrailingLogs is how many entries stay in the log behind a snapshot, for followers that lag; default 10240.
	TrailingLogs uint64

	protocol      uint32        // what it speaks on forwarding connections; older in the test of that
	commitTimeout time.Duration // raft's fallback for what pipeline.go does; default 50 ms, longer in its test
}

// withDefaults validates and fills in what is zero.
func (c Config) withDefaults() (Config, error) {
	var errs []error
	need := func(ok bool, what string) {
		if !ok {
			errs = append(errs, errors.New(what))
		}
	}
	need(c.ID != "", "ID is empty")
	need(c.Address != "", "Address is empty")
	need(c.Dir != "", "Dir is empty")
	need(c.Machine != nil, "Machine is nil")
	need(c.Listener != nil, "Listener is nil")
	need(c.Dial != nil, "Dial is nil")
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	def := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	def(&c.HeartbeatTimeout, 500*time.Millisecond)
	def(&c.LeaseTimeout, c.HeartbeatTimeout)
	def(&c.LeaderWait, 10*time.Second)
	def(&c.RPCTimeout, 5*time.Second)
	def(&c.StableFor, 2*time.Second)
	def(&c.SnapshotInterval, 30*time.Second)
	def(&c.commitTimeout, 50*time.Millisecond)
	if c.protocol == 0 {
		c.protocol = protocol
	}
	if c.SnapshotThreshold == 0 {
		c.SnapshotThreshold = 8192
	}
	if c.TrailingLogs == 0 {
		c.TrailingLogs = 10240
	}
	need(c.HeartbeatTimeout >= 20*time.Millisecond, "HeartbeatTimeout is below 20ms")
	need(c.LeaseTimeout >= 5*time.Millisecond && c.LeaseTimeout <= c.HeartbeatTimeout, "LeaseTimeout is not between 5ms and HeartbeatTimeout")
	need(c.StableFor > 0, "StableFor is negative")
	need(c.RemoveDeadAfter == 0 || c.RemoveDeadAfter >= 10*c.HeartbeatTimeout, "RemoveDeadAfter is below ten times HeartbeatTimeout")
	need(c.LeaderWait > 0 && c.RPCTimeout > 0, "LeaderWait or RPCTimeout is negative")
	if err := errors.Join(errs...); err != nil {
		return c, fmt.Errorf("checking raft configuration: %w", err)
	}
	return c, nil
}

func (c Config) hraft(restore bool, notify chan<- bool) *hraft.Config {
	h := hraft.DefaultConfig()
	h.LocalID = hraft.ServerID(c.ID)
	h.HeartbeatTimeout = c.HeartbeatTimeout
	h.ElectionTimeout = c.HeartbeatTimeout
	h.LeaderLeaseTimeout = c.LeaseTimeout
	h.CommitTimeout = c.commitTimeout
	h.SnapshotThreshold = c.SnapshotThreshold
	h.SnapshotInterval = c.SnapshotInterval
	h.TrailingLogs = c.TrailingLogs
	// A removed member goes on as a follower without a vote: its state is then stale, which Staleness says.
	h.ShutdownOnRemove = false
	h.NoLegacyTelemetry = true
	h.NoSnapshotRestoreOnStart = !restore
	h.NotifyCh = notify
	h.Logger = newHCLog(c.Log, slog.LevelError, nil)
	return h
}
