package audit

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// This file is the one goroutine that writes.

// write is the writer's life.
func (l *Log) write(ctx context.Context) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	l.begin()
	for {
		l.drain()
		select {
		case <-ctx.Done():
			l.finish()
			return
		case <-l.wake:
		case <-tick.C:
			l.tend()
		}
	}
}

// begin takes the reserve and records the start.
func (l *Log) begin() {
	l.swept = time.Now() // and the first checkpoint is due as soon as there is something to sign with
	if l.files != nil {
		if err := l.files.takeReserve(); err != nil {
			l.broken(err, nil)
			l.mend()
			return
		}
	}
	if l.own(l.opened()) {
		l.mended()
	}
}

func (l *Log) opened() Event {
	e := Event{Action: LogOpened, Outcome: OK, Who: Who{Kind: "self"}}
	if f := l.found; f.cut > 0 {
		e.Reason = "the last run ended in the middle of a record, which was cut"
		e.Details = Details{{"cut_bytes", strconv.FormatInt(f.cut, 10)}, {"cut_sha256", f.cutHash}, {"cut_file", f.cutFile}}
	}
	if d := l.found.damage; d != "" {
		e.Outcome = Failed
		e.Reason = "a file is damaged, and was left as it is: countersign audit verify tells what is wrong with it"
		e.Details = append(e.Details, Detail{"damaged", d})
	}
	return e
}

// A sync costs the same for one as for many, so a group waits for the callers that are around: those of the group before, and those
// that came while it was synced. They are back in moments, or gatherTime is lost once. A caller alone waits for nobody, and a group of
// gatherBytes is worth its sync as it is.
const (
	gatherTime  = 500 * time.Microsecond // an idle process's timers are up to a millisecond late
	gatherBytes = 32 << 10
)

// gather reports whether it waited in vain.
func (l *Log) gather() bool {
	l.mu.Lock()
	if len(l.queue) == 0 || l.around < 2 || l.gathered() {
		l.mu.Unlock()
		return false
	}
	l.gathering = true
	l.mu.Unlock()
	l.timer.Reset(gatherTime)
	select {
	case <-l.complete:
		l.timer.Stop()
		return false
	case <-l.timer.C:
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.gathering {
		<-l.complete // in this moment
		return false
	}
	l.gathering = false
	return true
}

// gathered reports whether a group need not wait any longer; l.mu is held.
func (l *Log) gathered() bool { return len(l.queue) >= l.around || l.bytes >= gatherBytes }

// drain writes what waits, a group at a time.
func (l *Log) drain() {
	for {
		vain := l.gather()
		calls, withdrawn := l.take()
		if len(withdrawn) > 0 {
			c := &call{own: true}
			for _, s := range withdrawn {
				c.add(l, &Event{
					Action: LogWithdrawn, Outcome: Failed, Who: Who{Kind: "self"},
					Reason:  "whoever asked for these records had given up waiting: what they announce was not done",
					Details: Details{{"first", strconv.FormatUint(s.first, 10)}, {"last", strconv.FormatUint(s.last, 10)}},
				}, nil)
			}
			calls = append([]*call{c}, calls...)
		}
		if len(calls) == 0 {
			return
		}
		ok := l.commit(calls)
		l.mu.Lock()
		if l.around = len(calls); !vain {
			l.around += len(l.queue)
		}
		if !ok {
			l.withdrawn = append(withdrawn, l.withdrawn...)
		}
		l.mu.Unlock()
		if !ok {
			return
		}
	}
}

// take takes a group off the queue. While the log is broken there is nothing to take but what a full disk has room for.
func (l *Log) take() ([]*call, []span) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.problem != nil {
		l.queue = slices.DeleteFunc(l.queue, func(c *call) bool {
			if c.done == nil || l.full && !c.decides() {
				return false
			}
			l.bytes -= len(c.buf)
			l.settle(c, unrecorded(l.problem))
			return true
		})
		if !l.full {
			return nil, nil
		}
	}
	n, size := 0, 0
	for n < len(l.queue) && (n == 0 || size+len(l.queue[n].buf) <= maxGroup) {
		size += len(l.queue[n].buf)
		n++
	}
	calls := slices.Clone(l.queue[:n])
	l.queue = slices.Delete(l.queue, 0, n)
	l.bytes -= size
	spans := l.withdrawn
	l.withdrawn = nil
	return calls, spans
}

// own records something of the log itself; it reports whether that is durable in the files.
func (l *Log) own(e Event) bool { return l.commit([]*call{l.ownCall(e)}) }

func (l *Log) ownCall(e Event) *call {
	c := &call{own: true}
	c.add(l, &e, nil)
	return c
}

// commit writes a group; it reports whether that is durable in the files. If it is not, the callers know, and the chain is as
// it was. A checkpoint that is due goes with the group, before it, so that nobody waits for a sync of its own.
func (l *Log) commit(calls []*call) bool {
	size := 0
	if l.unsigned >= l.cfg.CheckpointRecords {
		size = MaxLine
	}
	for _, c := range calls {
		size += len(c.buf) + len(c.meta)*maxPrefix
	}
	l.rotate(int64(size))
	var signed *call
	if l.unsigned >= l.cfg.CheckpointRecords {
		if signed = l.signed(); signed != nil {
			calls = append([]*call{signed}, calls...)
		}
	}
	before := l.head.seq
	if err := l.put(calls); err != nil {
		l.broken(err, calls)
		l.mend()
		return false
	}
	if signed != nil {
		l.unsigned = l.head.seq - before - 1
	}
	return true
}

// maxPrefix is what put adds to a record, with the line's end.
const maxPrefix = 128

// maxKept bounds the text that the writer keeps between groups, in bytes.
const maxKept = 128 << 10

// put chains the records, makes them durable in the files and passes them on.
func (l *Log) put(calls []*call) error {
	size, n := 0, 0
	for _, c := range calls {
		size, n = size+len(c.buf)+len(c.meta)*maxPrefix, n+len(c.meta)
	}
	h := l.head
	var buf []byte
	var lines []Line
	if len(l.outputs) > 0 { // they keep both
		buf, lines = make([]byte, 0, size), make([]Line, 0, n)
	} else {
		buf = slices.Grow(l.text[:0], size)
	}
	for _, c := range calls {
		from := 0
		for _, m := range c.meta {
			start := len(buf)
			h.seq++
			buf = appendPrefix(buf, h.seq, &h.hash)
			buf = append(buf, c.buf[from:m.end]...)
			from = m.end
			h.hash = sha256.Sum256(buf[start:])
			if lines != nil {
				lines = append(lines, Line{Time: m.time, Action: m.action, Outcome: m.outcome, Text: buf[start:]})
			}
			buf = append(buf, '\n')
		}
	}
	if l.files != nil {
		if err := l.append(buf); err != nil {
			return err
		}
	}
	if l.text = nil; lines == nil && cap(buf) <= maxKept {
		l.text = buf
	}
	first := l.head.seq + 1
	l.head, l.unsigned = h, l.unsigned+uint64(n)
	l.confirm(calls, first)
	for _, o := range l.outputs {
		o.give(&batch{lines: lines, bytes: len(buf), calls: calls, first: first, last: h.seq})
	}
	return nil
}

func (l *Log) append(buf []byte) error {
	l.mu.Lock()
	l.busy = time.Now()
	l.mu.Unlock()
	err := l.files.append(buf)
	l.mu.Lock()
	l.busy = time.Time{}
	l.mu.Unlock()
	return err
}

// confirm tells the callers whom only the files kept waiting, and those who read along.
func (l *Log) confirm(calls []*call, first uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range calls {
		c.first = first
		first += uint64(len(c.meta))
		for _, m := range c.meta {
			l.counts[Count{m.action, m.outcome}] += m.count
		}
		c.need = 1
		for _, o := range l.outputs {
			if o.Required {
				c.need++
			}
		}
		if c.gone {
			l.withdraw(c)
		}
		l.confirmed(c)
	}
	close(l.durable)
	l.durable = make(chan struct{})
}

// broken notes why nothing can be recorded, and tells those whose records were to be. Notes, for which nobody waits, wait.
func (l *Log) broken(err error, calls []*call) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.full = l.full || isFull(err); l.full {
		err = errors.New("the disk with " + l.cfg.Dir + " is full: make room, and it goes on by itself")
	}
	if !l.told {
		l.told = true
		l.cfg.Log.Error("the audit log cannot be written: this member makes no decisions", "error", err)
	}
	l.problem = err
	l.failures++
	var notes []*call
	for _, c := range calls {
		if c.done == nil && !c.own {
			notes = append(notes, c)
			l.bytes += len(c.buf)
		}
		l.settle(c, unrecorded(err))
	}
	l.queue = append(notes, l.queue...)
}

// mended is the end of what broken began.
func (l *Log) mended() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.told {
		l.cfg.Log.Info("the audit log can be written again")
	}
	l.problem, l.full, l.told = nil, false, false
	l.poke()
}

// mend tries to get the log going again. It is called at once, and then every second.
func (l *Log) mend() {
	l.mu.Lock()
	problem, full := l.problem, l.full
	l.mu.Unlock()
	if problem == nil || l.files == nil {
		return
	}
	if err := l.files.reopen(); err != nil {
		return
	}
	if full {
		if _, err := os.Lstat(filepath.Join(l.cfg.Dir, reserveName)); err == nil {
			// The first thing to happen on a full disk: there is room now for what is refused.
			l.files.freeReserve()
			l.put([]*call{l.ownCall(Event{
				Action: LogFull, Outcome: Failed, Who: Who{Kind: "self"}, Reason: "the disk is full: decisions are refused until there is room; refusals are recorded while the reserve lasts",
				Details: Details{{"reserve_bytes", strconv.FormatInt(l.cfg.Reserve, 10)}},
			})})
			return
		}
		if l.files.takeReserve() != nil {
			return
		}
	}
	e := l.opened() // if nothing of this run could be recorded so far
	if l.head != l.found.head {
		e = Event{Action: LogRecovered, Outcome: OK, Who: Who{Kind: "self"}, Reason: problem.Error(), Details: Details{{"sink", "file"}}}
	}
	c := l.ownCall(e)
	if err := l.put([]*call{c}); err != nil {
		l.broken(err, nil)
		return
	}
	l.mended()
}

// rotate begins a new file if the group does not fit into this one.
func (l *Log) rotate(group int64) {
	if l.files == nil {
		return
	}
	if _, size := l.files.end(); size == 0 || size+group <= l.cfg.MaxSize {
		return
	}
	if l.unsigned > 0 {
		l.checkpoint()
	}
	if err := l.files.rotate(l.head.seq + 1); err != nil {
		l.cfg.Log.Warn("cannot begin a new audit file: the old one goes on", "error", err)
		return
	}
	l.swept = time.Time{} // the retention looks at it at the next tick
}

// checkpoint signs what is recorded so far. It begins no file: its place in the chain is in the signature.
func (l *Log) checkpoint() {
	c := l.signed()
	if c == nil {
		return
	}
	if err := l.put([]*call{c}); err != nil {
		l.broken(err, nil)
		l.mend()
		return
	}
	l.unsigned = 0
}

// signed makes a checkpoint over what is recorded so far; nil if there is nothing to sign with.
func (l *Log) signed() *call {
	l.checked = time.Now()
	if l.cfg.Sign == nil {
		l.unsigned = 0
		return nil
	}
	sig, chain, err := l.cfg.Sign(SignedBytes(l.cfg.Member, l.head.seq+1, hex.EncodeToString(l.head.hash[:])))
	size := len(sig)
	for _, der := range chain {
		size += len(der)
	}
	if err == nil && (len(sig) == 0 || len(chain) == 0 || size > MaxLine/2) {
		err = errors.New("no signature, no chain, or a chain too long")
	}
	if err != nil {
		if !l.unsignable {
			l.cfg.Log.Warn("cannot sign a checkpoint of the audit log: trying again", "error", err)
		}
		l.unsignable = true
		l.checked = l.checked.Add(5*time.Second - l.cfg.CheckpointEvery) // sooner than the next would be
		l.unsigned = min(l.unsigned, l.cfg.CheckpointRecords-1)          // at the next tick that is due
		return nil
	}
	l.unsignable = false
	c := &call{own: true}
	c.add(l, &Event{Action: LogCheckpoint, Outcome: OK, Who: Who{Kind: "self"}}, &Checkpoint{Signature: sig, Chain: chain})
	return c
}

// tend is what is done every second.
func (l *Log) tend() {
	l.mend()
	l.summarise(false)
	now := time.Now()
	if due := l.unsigned >= l.cfg.CheckpointRecords || l.unsigned > 0 && now.Sub(l.checked) >= l.cfg.CheckpointEvery; due && !l.stuck() {
		l.checkpoint()
	}
	if now.Sub(l.swept) >= time.Hour {
		l.swept = now
		l.sweep()
	}
}

// sweep takes old files away. That is recorded first: a crash between leaves a file too many, never one missing unexplained.
func (l *Log) sweep() {
	if l.files == nil || l.stuck() {
		return
	}
	names, upTo := l.files.expired(l.cfg.Now(), l.cfg.Keep, l.cfg.KeepBytes)
	if len(names) == 0 {
		return
	}
	shown := strings.Join(names[:min(len(names), 8)], " ")
	if !l.own(Event{
		Action: LogRemoved, Outcome: OK, Who: Who{Kind: "self"}, Subjects: names[:min(len(names), maxSubjects)],
		Details: Details{{"up_to", strconv.FormatUint(upTo, 10)}, {"files", strconv.Itoa(len(names))}},
	}) {
		return
	}
	for _, n := range names {
		if err := os.Remove(filepath.Join(l.cfg.Dir, n)); err != nil {
			l.cfg.Log.Warn("cannot take away an old audit file", "file", n, "error", err)
		}
	}
	l.cfg.Log.Info("took away old audit files", "files", shown, "up_to", upTo)
}

func (l *Log) stuck() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.problem != nil
}

// finish records the end, signed.
func (l *Log) finish() {
	l.summarise(true)
	l.drain()
	if !l.stuck() && l.own(Event{Action: LogClosed, Outcome: OK, Who: Who{Kind: "self"}}) {
		l.checkpoint()
	}
	l.refuse(errors.New("the member has stopped"))
}
