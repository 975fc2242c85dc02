package audit

import (
	"context"
	"fmt"
	"io"
	"strconv"
	"sync"
	"time"
)

const (
	// maxBacklog is how many bytes wait for an output that does not take them; what comes then is not given to it.
	maxBacklog = 8 << 20
	firstWait  = 100 * time.Millisecond
	mostWait   = 10 * time.Second
)

// Line is one record on its way to an output.
type Line struct {
	Time    time.Time
	Action  Action
	Outcome Outcome
	Text    []byte // without its end; it must not be changed
}

// Sink takes lines somewhere.
type Sink interface {
	// Write must return nil only once the lines have been handed over, and an error soon after ctx ended. After an error it is
	// called with the same lines again.
	Write(ctx context.Context, lines []Line) error
	// Close undoes what Write opened.
	Close() error
}

// Output is a Sink, and whether decisions wait for it.
type Output struct {
	Name     string
	Required bool
	Sink     Sink
}

// output gives what is durable to a sink, in order.
type output struct {
	Output
	l    *Log
	wake chan struct{}

	mu      sync.Mutex
	queue   []*batch // the first is the one that the sink has
	bytes   int
	problem error
	lost    span // records that were not given, since the last one that was
}

type batch struct {
	lines       []Line
	bytes       int
	calls       []*call
	first, last uint64
	at          time.Time
}

func newOutput(l *Log, o Output) *output {
	return &output{Output: o, l: l, wake: make(chan struct{}, 1)}
}

// give queues a batch. It never blocks: a sink that is too far behind misses it, and its calls fail if they need it.
func (o *output) give(b *batch) {
	b.at = time.Now()
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.bytes+b.bytes > maxBacklog {
		if o.lost.first == 0 {
			o.lost.first = b.first
		}
		o.lost.last = b.last
		if o.Required {
			o.l.missed(b.calls, o.Name)
		}
		return
	}
	o.queue = append(o.queue, b)
	o.bytes += b.bytes
	select {
	case o.wake <- struct{}{}:
	default:
	}
}

// missed fails the calls that a required output did not get.
func (l *Log) missed(calls []*call, name string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range calls {
		if c.done == nil || c.ended {
			continue
		}
		l.settle(c, unrecorded(name+" is too far behind"))
		l.withdraw(c)
	}
}

// ready says why a required output is not fit to be waited for.
func (o *output) ready(deadline time.Duration) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.problem != nil {
		return o.problem
	}
	if len(o.queue) > 0 {
		if d := time.Since(o.queue[0].at); d > deadline {
			return fmt.Errorf("%s has not taken a record for %v", o.Name, d.Round(time.Second))
		}
	}
	return nil
}

// run hands over batches until ctx ends.
func (o *output) run(ctx context.Context) {
	defer o.Sink.Close()
	wait := firstWait
	for {
		o.mu.Lock()
		var b *batch
		if len(o.queue) > 0 {
			b = o.queue[0]
		}
		o.mu.Unlock()
		if b == nil {
			select {
			case <-ctx.Done():
				return
			case <-o.wake:
			}
			continue
		}
		err := o.Sink.Write(ctx, b.lines)
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			o.wrote(b)
			wait = firstWait
			continue
		}
		o.failed(err)
		t := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			t.Stop()
			return
		case <-t.C:
		}
		wait = min(2*wait, o.l.cfg.mostWait)
	}
}

// wrote confirms a batch. What the sink missed is noted before it counts as caught up: who waits for that may then end the log.
func (o *output) wrote(b *batch) {
	o.mu.Lock()
	was, lost := o.problem, o.lost
	if len(o.queue) > 1 {
		lost = span{} // told once it has caught up
	}
	again := was != nil || lost.first > 0
	if again {
		o.noteRecovery(was, lost)
	}
	o.queue = o.queue[1:]
	o.bytes -= b.bytes
	if len(o.queue) == 0 {
		o.queue = nil // or what was handed over would stay in memory
		o.lost = span{}
	}
	o.problem = nil
	o.mu.Unlock()
	if again {
		o.l.cfg.Log.Info("an audit sink takes records again", "sink", o.Name, "missed_from", lost.first, "missed_to", lost.last)
	}
	if o.Required {
		o.l.mu.Lock()
		for _, c := range b.calls {
			o.l.confirmed(c)
		}
		o.l.mu.Unlock()
	}
}

// noteRecovery is called with o.mu held; the log's own lock is inside of it.
func (o *output) noteRecovery(was error, lost span) {
	e := Event{Action: LogRecovered, Outcome: OK, Who: Who{Kind: "self"}, Details: Details{{"sink", o.Name}}}
	if was != nil {
		e.Reason = was.Error()
	}
	if lost.first > 0 {
		e.Details = append(e.Details, Detail{"missed_from", strconv.FormatUint(lost.first, 10)}, Detail{"missed_to", strconv.FormatUint(lost.last, 10)})
	}
	o.l.Note(o.Name, e)
}

// failed notes why a batch could not be handed over, once.
func (o *output) failed(err error) {
	err = fmt.Errorf("%s does not take records: %w", o.Name, err)
	o.mu.Lock()
	first := o.problem == nil
	o.problem = err
	o.mu.Unlock()
	if !first {
		return
	}
	o.l.cfg.Log.Error("an audit sink does not take records", "sink", o.Name, "required", o.Required, "error", err)
	o.l.Note(o.Name, Event{Action: LogFailed, Outcome: Failed, Who: Who{Kind: "self"}, Reason: err.Error(), Details: Details{{"sink", o.Name}, {"required", strconv.FormatBool(o.Required)}}})
}

// drain waits until all is handed over, the sink fails, or the time is up.
func (o *output) drain(end <-chan time.Time) {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		o.mu.Lock()
		idle := len(o.queue) == 0 || o.problem != nil
		o.mu.Unlock()
		if idle {
			return
		}
		select {
		case <-end:
			return
		case <-tick.C:
		}
	}
}

// Stream is a Sink that writes lines to w, such as standard output. What a hung w holds up is this sink alone.
func Stream(w io.Writer) Sink { return stream{w} }

type stream struct{ w io.Writer }

// Write writes the lines in one piece, so that others' lines do not get between.
func (s stream) Write(_ context.Context, lines []Line) error {
	var b []byte
	for _, l := range lines {
		b = append(append(b, l.Text...), '\n')
	}
	_, err := s.w.Write(b)
	return err
}

// Close leaves w open: it is its owner's.
func (stream) Close() error { return nil }
