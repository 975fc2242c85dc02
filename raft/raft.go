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
	"path/filepath"
	"sync"
	"sync/atomic"

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
	// ErrRefused: the leader refused the request (a change of the membership, a command that Config.Check does
	// not let pass); nothing was changed, and trying again is useless.
	ErrRefused = errors.New("refused by the leader")
	// ErrClosed: the node is closing or closed; nothing was changed.
	ErrClosed = errors.New("raft node closed")
)

// MaxCommand is the largest command, in bytes, that Propose takes.
const MaxCommand = 4 << 20

// Node is one member's part of the replicated log. All methods can be called concurrently.
type Node struct {
	cfg  Config
	self hraft.ServerID
	log  *slog.Logger

	// Made by Open in this order, undone by Close in reverse.
	lock      interface{ Close() error }
	logs      *logStore
	disk      *failStop // logs, as raft writes it
	fsm       *fsm
	mux       *mux
	transport *transport
	raft      *hraft.Raft

	fresh *freshness
	lead  leadership
	out   dialer   // the connection to the leader for forwarded requests
	peers contacts // connections to each member, for what members ask each other
	book  *book    // where each member was last
	gone  removal  // whether this member was removed
	door  door     // who was a member

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
	n.peers.init(n)
	n.gone.init()
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
	n.book = newBook(cfg.ID)
	n.loadBook()
	n.fsm = newFSM(cfg.Machine, n.fail)
	restore, err := checkStart(n.logs, snaps, n.fsm)
	if err != nil {
		return nil, fmt.Errorf("checking raft folder %s: %w", cfg.Dir, err)
	}
	n.mux = newMux(n)
	n.transport = newTransport(n)
	n.fsm.onApplied, n.fsm.onConfigured = n.transport.applied, n.configured
	if err := n.start(snaps, restore); err != nil {
		return nil, err
	}
	return n, nil
}

// start makes the raft and the goroutines around it.
func (n *Node) start(snaps *snapshots, restore bool) error {
	notify := make(chan bool, 16)
	conf := n.cfg.hraft(restore, notify)
	if n.cfg.Bootstrap {
		if err := bootstrap(conf, n.logs, snaps, n.transport, n.cfg.Address); err != nil {
			return fmt.Errorf("bootstrapping raft: %w", err)
		}
	}
	n.disk = &failStop{logStore: n.logs, fail: n.fail}
	r, err := hraft.NewRaft(conf, n.fsm, n.disk, n.disk, snaps, n.transport)
	if err != nil {
		return fmt.Errorf("starting raft: %w", errors.Join(err, n.fsm.restoreFailure()))
	}
	n.disk.running.Store(true)
	n.raft = r
	n.fresh = newFreshness(r, n.fsm, n.logs)
	n.door.begin(n.Members())
	n.spawn(n.watchDoor)
	n.spawn(n.mux.accept)
	n.spawn(func() { n.watchLeadership(notify) })
	n.spawn(n.keepInTouch)
	n.spawn(func() { n.checkSnapshots(snaps) })
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
	if n.raft.State() != hraft.Leader || n.disk.isBroken() { // then it may be without the goroutine that would
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
	n.peers.close()
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
