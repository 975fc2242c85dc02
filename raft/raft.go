// Package raft replicates a log of opaque commands between the members and drives one state machine with
// it: the log and the snapshots on disk, the members' transport, membership, and the forwarding of writes to
// the leader, so that a write can be made on any member. It does not know what the commands mean.
//
// hashicorp/raft is the consensus; this package decides what it leaves open. In the order of a start:
//
//   - Open checks every record of the log before raft reads one (logstore.go), and refuses a folder that
//     belongs to another member, that another process uses, or whose state machine knows more than the log.
//   - Members speak over connections that are authenticated before they come here. The first byte tells
//     raft's own RPCs from forwarded requests (listen.go, forward.go, serve.go).
//   - A new member is added without a vote and gets one when it has caught up (members.go), so that a joiner
//     that never comes up cannot take the quorum of a small cluster with it.
//   - Staleness counts from the last moment at which this member had applied all that a leader had
//     committed, not from the last heartbeat: a member that is connected but behind is stale (fresh.go).
//
// DESIGN.md in this folder argues the parts where correctness is not obvious.
package raft

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	hraft "github.com/hashicorp/raft"

	"countersign.io/countersign/internal/durable"
)

var (
	// ErrNoLeader: no leader took the request in time; nothing was changed, and trying again is right.
	ErrNoLeader = errors.New("no leader")
	// ErrUnknownOutcome: the request was sent and the answer is lost; it may or may not have been carried
	// out, now or a little later. Read before trying again.
	ErrUnknownOutcome = errors.New("unknown outcome")
	// ErrTooLarge: the command has more than MaxCommand bytes; nothing was changed.
	ErrTooLarge = errors.New("command too large")
	// ErrRefused: the leader refused a change of the membership; nothing was changed.
	ErrRefused = errors.New("membership change refused")
	// ErrClosed: the node is closing or closed; nothing was changed.
	ErrClosed = errors.New("raft node closed")
)

// MaxCommand is the largest command, in bytes, that Propose takes.
const MaxCommand = 4 << 20

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
	// Dial makes an authenticated connection to another member.
	Dial func(ctx context.Context, address string) (net.Conn, error)
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

	// SnapshotThreshold is how many log entries make a snapshot worth taking; default 8192.
	SnapshotThreshold uint64
	// SnapshotInterval is how often that is checked (up to twice this, at random); default 30 s.
	SnapshotInterval time.Duration
	// TrailingLogs is how many entries stay in the log behind a snapshot, for followers that lag; default 10240.
	TrailingLogs uint64

	commitTimeout time.Duration // raft's fallback for what pipeline.go does; default 50 ms, longer in its test
}

// Node is one member's part of the replicated log. All methods can be called concurrently.
type Node struct {
	cfg  Config
	self hraft.ServerID
	log  *slog.Logger

	// Made by Open in this order, undone by Close in reverse.
	lock      interface{ Close() error }
	logs      *logStore
	fsm       *fsm
	mux       *mux
	transport *transport
	raft      *hraft.Raft

	fresh *freshness
	lead  leadership
	out   dialer // the connection to the leader for forwarded requests

	ctx    context.Context // ends when Close stops the goroutines
	cancel context.CancelFunc
	wg     sync.WaitGroup // the node's own goroutines
	wgMu   sync.Mutex     // held to start one, and to end ctx

	changing sync.Mutex // held over a look at the membership and the change that follows from it

	failOnce sync.Once
	failed   chan struct{} // closed when the node has stopped by itself
	failure  error         // set before failed is closed

	inflight  gauge // requests given to raft or being answered
	serving   gauge // connections with other members' requests
	closing   atomic.Bool
	goodbye   chan struct{} // closed when the others shall ask elsewhere
	closeOnce sync.Once
	closeErr  error
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
	def(&c.SnapshotInterval, 30*time.Second)
	def(&c.commitTimeout, 50*time.Millisecond)
	if c.SnapshotThreshold == 0 {
		c.SnapshotThreshold = 8192
	}
	if c.TrailingLogs == 0 {
		c.TrailingLogs = 10240
	}
	need(c.HeartbeatTimeout >= 20*time.Millisecond, "HeartbeatTimeout is below 20ms")
	need(c.LeaseTimeout >= 5*time.Millisecond && c.LeaseTimeout <= c.HeartbeatTimeout, "LeaseTimeout is not between 5ms and HeartbeatTimeout")
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

// Open starts the node: it takes the folder, checks the log, brings the state machine up to the newest
// snapshot if it is behind it, and joins in. The caller closes it with Close.
//
// Errors wrap durable.ErrLocked when another process uses the folder, durable.ErrLoose for loose
// permissions, ErrCorrupt naming the entry when the log is damaged, and ErrForeign when the folder is another member's.
func Open(cfg Config) (_ *Node, err error) {
	cfg, err = cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	n := &Node{
		cfg: cfg, self: hraft.ServerID(cfg.ID), log: cfg.Log,
		failed: make(chan struct{}), goodbye: make(chan struct{}),
	}
	n.ctx, n.cancel = context.WithCancel(context.Background())
	n.inflight.init()
	n.serving.init()
	n.lead.init()
	n.out.init(n)
	defer func() {
		if err != nil {
			n.undo()
		}
	}()
	if err := durable.PrivateDir(cfg.Dir); err != nil {
		return nil, fmt.Errorf("opening raft folder: %w", err)
	}
	if n.lock, err = durable.Lock(filepath.Join(cfg.Dir, "lock")); err != nil {
		return nil, fmt.Errorf("opening raft folder: %w", err)
	}
	if n.logs, err = openLogStore(filepath.Join(cfg.Dir, "log.db"), cfg.ID); err != nil {
		return nil, fmt.Errorf("opening raft log: %w", err)
	}
	snaps, err := openSnapshots(cfg.Dir, newHCLog(cfg.Log, slog.LevelError, nil))
	if err != nil {
		return nil, fmt.Errorf("opening raft snapshots: %w", err)
	}
	n.fsm = newFSM(cfg.Machine, n.fail)
	restore, err := checkStart(n.logs, snaps, n.fsm)
	if err != nil {
		return nil, fmt.Errorf("checking raft folder %s: %w", cfg.Dir, err)
	}
	n.mux = newMux(n)
	n.transport = newTransport(n)
	n.fsm.onApplied = n.transport.applied
	if err := n.start(snaps, restore); err != nil {
		return nil, err
	}
	return n, nil
}

// start makes the raft and the goroutines around it.
func (n *Node) start(snaps hraft.SnapshotStore, restore bool) error {
	notify := make(chan bool, 16)
	conf := n.cfg.hraft(restore, notify)
	if n.cfg.Bootstrap {
		if err := bootstrap(conf, n.logs, snaps, n.transport, n.cfg.Address); err != nil {
			return fmt.Errorf("bootstrapping raft: %w", err)
		}
	}
	r, err := hraft.NewRaft(conf, n.fsm, n.logs, n.logs, snaps, n.transport)
	if err != nil {
		return fmt.Errorf("starting raft: %w", errors.Join(err, n.fsm.restoreFailure()))
	}
	n.raft = r
	n.fresh = newFreshness(r, n.fsm, n.logs)
	n.spawn(n.transport.pump)
	n.spawn(n.mux.accept)
	n.spawn(func() { n.watchLeadership(notify) })
	n.watchLeader()
	return nil
}

// spawn runs f in a goroutine that Close waits for, unless the node is closing already.
func (n *Node) spawn(f func()) {
	n.wgMu.Lock()
	defer n.wgMu.Unlock()
	if n.ctx.Err() == nil {
		n.wg.Go(f)
	}
}

// await waits for raft's answer, or for the end of the node: raft leaves some questions open when it shuts down.
func (n *Node) await(f hraft.Future) error {
	done := make(chan error, 1)
	go func() { done <- f.Error() }()
	select {
	case err := <-done:
		return err
	case <-n.ctx.Done():
		return ErrClosed
	}
}

// bootstrap writes the configuration of a cluster of one, if the folder is empty.
func bootstrap(conf *hraft.Config, logs *logStore, snaps hraft.SnapshotStore, t hraft.Transport, address string) error {
	// A crash between the two writes of an earlier bootstrap leaves term 1 and no entry: nothing was voted
	// for and nobody else knows of it, so it is done again rather than refused for ever.
	if err := logs.forgetBareTerm(); err != nil {
		return err
	}
	err := hraft.BootstrapCluster(conf, logs, logs, snaps, t, hraft.Configuration{Servers: []hraft.Server{{
		Suffrage: hraft.Voter, ID: conf.LocalID, Address: hraft.ServerAddress(address),
	}}})
	if errors.Is(err, hraft.ErrCantBootstrap) {
		return nil
	}
	return err
}

// fail records why the node cannot go on; Run returns it.
func (n *Node) fail(err error) {
	n.failOnce.Do(func() {
		n.log.Error("raft node stops", "error", err)
		n.failure = err
		close(n.failed)
	})
}

// Run waits until ctx ends (nil) or the node cannot go on by itself: the state machine stopped, or the
// listener failed. It closes nothing.
func (n *Node) Run(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return nil
	case <-n.ctx.Done():
		return ErrClosed
	case <-n.failed:
		return fmt.Errorf("running raft: %w", n.failure)
	}
}

// Close hands leadership over, if this member has it, and stops. Requests that are under way get their
// answer first, new ones ErrClosed; other members' wait for the next leader. Close takes at most a few
// heartbeat timeouts when the others answer.
func (n *Node) Close() error {
	n.closeOnce.Do(func() {
		n.closing.Store(true)
		if n.raft != nil {
			// 1. What this leader took, it answers: afterwards nobody is left with an unknown outcome.
			n.inflight.drain(2 * n.cfg.HeartbeatTimeout)
			// 2. The connections still work: the next leader may need this member's vote.
			n.handOver()
			// 3. What was sent here in the meantime is answered (not executed) before the connection goes.
			close(n.goodbye)
			n.serving.drain(n.cfg.HeartbeatTimeout)
		}
		n.closeErr = n.undo()
	})
	return n.closeErr
}

// handOver gives leadership to the most advanced other voter, if there is one.
func (n *Node) handOver() {
	if n.raft.State() != hraft.Leader {
		return
	}
	others := 0
	for _, m := range n.Members() {
		if m.Voter && m.ID != n.cfg.ID {
			others++
		}
	}
	if others == 0 {
		return
	}
	if err := n.raft.LeadershipTransfer().Error(); err != nil {
		n.log.Warn("handing over leadership failed, the others will elect", "error", err)
	}
}

// undo undoes Open in reverse, from wherever it got to.
func (n *Node) undo() error {
	n.wgMu.Lock()
	n.cancel()
	n.wgMu.Unlock()
	n.out.close()
	if n.raft != nil {
		stopped := n.raft.Shutdown()
		// Raft's goroutines may be in an exchange with a member that does not answer: end it.
		n.mux.Close()
		if err := stopped.Error(); err != nil {
			n.log.Warn("stopping raft failed", "error", err)
		}
	}
	if n.transport != nil {
		n.transport.Close()
	} else if n.cfg.Listener != nil {
		n.cfg.Listener.Close()
	}
	n.wg.Wait()
	var errs []error
	if n.logs != nil {
		errs = append(errs, n.logs.Close())
	}
	if n.lock != nil {
		errs = append(errs, n.lock.Close())
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("closing raft: %w", err)
	}
	return nil
}
