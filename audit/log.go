// Package audit is the member's memory of what it decided: who asked, for what, what came of it, and by which rule. A decision
// takes effect only once its record is durable: Record is called before a key signs, and fails when the record cannot be had.
//
// Records are lines of JSON, each with the hash of the one before, so that none can be changed, left out or moved without the
// next one showing it. Checkpoints sign the chain with the member's own SVID; what is behind the last checkpoint rests on the
// disk alone. Verifier checks all of that with nothing but the lines and the trust bundle.
//
// One goroutine writes: whoever waits is written together, with one sync. The files come first; other outputs are given
// what is durable there, each on a goroutine of its own, so that the one that hangs holds up nobody but those who must wait for it.
// docs/AUDIT.md is the format and what operators do with it.
package audit

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"syscall"
	"time"

	"countersign.io/countersign/identity"
)

// Config is what a Log is made of. Zero values stand for the defaults, where one is named.
type Config struct {
	Member string // name of this member, in every record

	// Dir is the folder of the files, 0700, made if absent; empty: none.
	Dir       string
	MaxSize   int64         // bytes of one file; default 64 MiB
	Keep      time.Duration // how long a full file is kept; default 90 days
	KeepBytes int64         // how much all files may have; 0: 80 % of the file system that holds Dir
	Reserve   int64         // bytes held back on the disk, to tell what happened when it is full; default 8 MiB

	Outputs []Output
	// Deadline is how long a decision waits for its record; default 2 s.
	Deadline time.Duration

	// Sign signs a checkpoint (SHA-256 of what it is given) with the key of the first certificate of chain (DER). nil: there are no
	// checkpoints. An error means: not now.
	Sign              func([]byte) (sig []byte, chain [][]byte, err error)
	CheckpointRecords uint64        // after so many records, with the next ones or within a second; default 1000
	CheckpointEvery   time.Duration // after so long, if there are any; default 1 minute

	Now func() time.Time // of records; default time.Now
	Log *slog.Logger     // default: none

	open     func(path string, flag int) (disk, error) // tests make disks that fail
	space    func(dir string) (bytes int64, err error) // the size of the file system; default fileSystem
	stopTime time.Duration                             // default stopTime
	mostWait time.Duration                             // default mostWait
}

const (
	maxQueue = 4096    // calls that wait for the writer
	maxBytes = 8 << 20 // of their records
	maxGroup = 1 << 20 // bytes that are written and synced at once
	stopTime = 5 * time.Second
	// diskShare is how much of the file system the files may have, in percent, unless told otherwise: the oldest go before it is full,
	// for then nothing can be decided any more.
	diskShare = 80
)

// Log records events. It is safe for concurrent use.
type Log struct {
	cfg     Config
	files   *files // nil: there are none
	outputs []*output
	wake    chan struct{} // tells the writer that there is something
	flood   flood

	mu        sync.Mutex
	queue     []*call
	bytes     int
	withdrawn []span
	problem   error     // why nothing can be recorded; nil
	full      bool      // the problem is a full disk: what is refused is recorded still
	told      bool      // the process's log was told of the problem
	busy      time.Time // since when the files are being written; zero: they are not
	durable   chan struct{}
	counts    map[Count]uint64
	failures  uint64
	around    int  // callers that may be back in moments
	gathering bool // the writer waits for them; it ends with a word on complete

	// The writer's.
	found      found
	head       head
	unsigned   uint64 // records since the last checkpoint
	checked    time.Time
	swept      time.Time
	unsignable bool
	text       []byte // of the last group, to be used again
	timer      *time.Timer
	complete   chan struct{}
}

// span are records, by number.
type span struct{ first, last uint64 }

// call is one call of Record, or a note that nobody waits for. All but the records is guarded by Log.mu.
type call struct {
	buf   []byte // the records' bodies, one after another
	meta  []meta
	one   [1]meta       // meta's array for the most frequent kind: of one record
	done  chan struct{} // closed once it is settled; nil: nobody waits
	err   error
	ended bool
	gone  bool   // the caller gave up
	first uint64 // number of the first record, once it is durable in the files
	need  int    // outputs that must still confirm
	own   bool   // the log's own: nobody else's if it cannot be written
}

type meta struct {
	end     int // in buf
	time    time.Time
	action  Action
	outcome Outcome
	count   uint64 // how many events it stands for
}

// New checks the configuration, opens the files and finds where the chain ends. Nothing is recorded before Run.
func New(c Config) (*Log, error) {
	def(&c.MaxSize, 64<<20)
	def(&c.Keep, 90*24*time.Hour)
	def(&c.Reserve, 8<<20)
	def(&c.Deadline, 2*time.Second)
	def(&c.stopTime, stopTime)
	def(&c.mostWait, mostWait)
	def(&c.CheckpointRecords, 1000)
	def(&c.CheckpointEvery, time.Minute)
	if c.space == nil {
		c.space = fileSystem
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	required := c.Dir != ""
	for _, o := range c.Outputs {
		required = required || o.Required
		if o.Sink == nil || o.Name == "" {
			return nil, fmt.Errorf("opening the audit log: %w: an output without a name or a sink", identity.ErrInvalid)
		}
	}
	switch {
	case c.Member == "":
		return nil, fmt.Errorf("opening the audit log: %w: the member has no name", identity.ErrInvalid)
	case !required:
		return nil, fmt.Errorf("opening the audit log: %w: no output is required: a decision must wait for one at least", identity.ErrInvalid)
	case c.MaxSize < MaxLine || c.KeepBytes < 0 || c.Reserve < MaxLine || c.Keep < 0 || c.Deadline < 0:
		return nil, fmt.Errorf("opening the audit log: %w: max_size and reserve must be at least %d bytes, and nothing negative", identity.ErrInvalid, MaxLine)
	}
	l := &Log{cfg: c, wake: make(chan struct{}, 1), complete: make(chan struct{}, 1), timer: time.NewTimer(time.Hour), durable: make(chan struct{}), counts: map[Count]uint64{}, problem: errors.New("it has not been opened yet")}
	l.flood.init()
	if c.Dir != "" {
		var err error
		if l.files, l.found, err = openFiles(&c); err != nil {
			return nil, fmt.Errorf("opening the audit log: %w", err)
		}
		l.head = l.found.head
		if l.cfg.KeepBytes == 0 {
			size, err := c.space(c.Dir)
			if err != nil {
				l.files.close()
				return nil, fmt.Errorf("opening the audit log: how large its file system is: %w", err)
			}
			l.cfg.KeepBytes = size / 100 * diskShare
		}
	}
	for _, o := range c.Outputs {
		l.outputs = append(l.outputs, newOutput(l, o))
	}
	return l, nil
}

func def[T comparable](p *T, v T) {
	var zero T
	if *p == zero {
		*p = v
	}
}

// Record returns once the events are durable in the files and handed to every other output that is required. Any error means that
// what the events announce must not be done; it wraps identity.ErrUnavailable. Events that turn out to be in the log all the
// same are withdrawn by a later record.
func (l *Log) Record(ctx context.Context, events ...Event) error {
	if len(events) == 0 {
		return nil
	}
	c := l.newCall(events)
	c.done = make(chan struct{})
	if err := l.enqueue(c); err != nil {
		return err
	}
	t := time.NewTimer(l.cfg.Deadline)
	defer t.Stop()
	select {
	case <-c.done:
		return c.err
	case <-t.C:
		return l.abandon(c, fmt.Sprintf("no sink had it within %v", l.cfg.Deadline))
	case <-ctx.Done():
		return l.abandon(c, "the caller gave up")
	}
}

func unrecorded(why any) error {
	return fmt.Errorf("%w: this member's audit log cannot record it, so it is not done: %v", identity.ErrUnavailable, why)
}

func (l *Log) newCall(events []Event) *call {
	c := &call{buf: make([]byte, 0, 640*len(events))}
	if c.meta = c.one[:0]; len(events) > 1 {
		c.meta = make([]meta, 0, len(events))
	}
	for i := range events {
		c.add(l, &events[i], nil)
	}
	return c
}

func (c *call) add(l *Log, e *Event, cp *Checkpoint) {
	if e.Time.IsZero() {
		e.Time = l.cfg.Now()
	}
	c.buf = appendBody(c.buf, l.cfg.Member, e, cp)
	c.meta = append(c.meta, meta{end: len(c.buf), time: e.Time, action: e.Action, outcome: e.Outcome, count: max(1, e.Count)})
}

// decides reports whether anything is to come of a call: of all but refusals and failures.
func (c *call) decides() bool {
	return slices.ContainsFunc(c.meta, func(m meta) bool { return m.outcome != Refused && m.outcome != Failed })
}

func (l *Log) enqueue(c *call) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.problem != nil && c.done != nil && (!l.full || c.decides()) {
		return unrecorded(l.problem)
	}
	most, bytes := maxQueue, maxBytes
	if c.done == nil {
		most, bytes = maxQueue/2, maxBytes/2 // notes leave room for those who wait
	}
	if len(l.queue) >= most || l.bytes+len(c.buf) > bytes {
		return unrecorded("too many records wait to be written")
	}
	l.queue = append(l.queue, c)
	l.bytes += len(c.buf)
	switch {
	case !l.gathering:
		l.poke()
	case l.gathered():
		l.gathering = false
		l.complete <- struct{}{}
	}
	return nil
}

func (l *Log) poke() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// abandon ends the wait for a call, unless it has ended by itself in this moment.
func (l *Log) abandon(c *call, why string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if c.ended {
		return c.err
	}
	c.ended, c.gone = true, true
	if i := slices.Index(l.queue, c); i >= 0 {
		l.queue = slices.Delete(l.queue, i, i+1)
		l.bytes -= len(c.buf)
	} else if c.first > 0 {
		l.withdraw(c)
	} // else it is being written: settle withdraws it
	return unrecorded(why)
}

// withdraw has the next group say that a call's records came to nothing; l.mu is held.
func (l *Log) withdraw(c *call) {
	l.withdrawn = append(l.withdrawn, span{c.first, c.first + uint64(len(c.meta)) - 1})
	l.poke()
}

// settle ends a call; l.mu is held.
func (l *Log) settle(c *call, err error) {
	if c.ended {
		return
	}
	c.ended, c.err = true, err
	if c.done != nil {
		close(c.done)
	}
}

// confirmed counts one output that has a call's records; l.mu is held.
func (l *Log) confirmed(c *call) {
	if c.need--; c.need == 0 {
		l.settle(c, nil)
	}
}

// Ready says why no decision can be recorded now; nil if one can.
func (l *Log) Ready() error {
	l.mu.Lock()
	problem, busy := l.problem, l.busy
	l.mu.Unlock()
	if problem == nil && !busy.IsZero() {
		if d := time.Since(busy); d > l.cfg.Deadline {
			problem = fmt.Errorf("a write to %s has hung for %v", l.cfg.Dir, d.Round(time.Second))
		}
	}
	for _, o := range l.outputs {
		if problem == nil && o.Required {
			problem = o.ready(l.cfg.Deadline)
		}
	}
	if problem != nil {
		return fmt.Errorf("%w: this member's audit log cannot record decisions: %v", identity.ErrUnavailable, problem)
	}
	return nil
}

// Degraded says which of the sinks that no decision waits for do not take records.
func (l *Log) Degraded() []string {
	var out []string
	for _, o := range l.outputs {
		if err := o.ready(l.cfg.Deadline); err != nil && !o.Required {
			out = append(out, "audit: "+err.Error())
		}
	}
	return out
}

// Run writes until ctx ends, then what is left, and closes the files and the outputs. What hangs is left behind.
func (l *Log) Run(ctx context.Context) error {
	outputs, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	var wg sync.WaitGroup
	for _, o := range l.outputs {
		wg.Go(func() { o.run(outputs) })
	}
	wrote := make(chan struct{})
	go func() {
		l.write(ctx)
		close(wrote)
	}()
	<-ctx.Done()
	end := time.NewTimer(l.cfg.stopTime)
	defer end.Stop()
	select {
	case <-wrote:
	case <-end.C:
		l.refuse(errors.New("the member has stopped"))
		return fmt.Errorf("%w: closing the audit log: a write to %s hangs", identity.ErrUnavailable, l.cfg.Dir)
	}
	for _, o := range l.outputs {
		o.drain(end.C)
	}
	stop()
	idle := make(chan struct{})
	go func() {
		wg.Wait()
		close(idle)
	}()
	select {
	case <-idle:
	case <-time.After(time.Second):
	}
	if l.files != nil {
		return l.files.close()
	}
	return nil
}

// refuse makes everything fail from now on.
func (l *Log) refuse(why error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.problem, l.full = why, false
	for _, c := range l.queue {
		l.settle(c, unrecorded(why))
	}
	l.queue, l.bytes = nil, 0
}

func isFull(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}
