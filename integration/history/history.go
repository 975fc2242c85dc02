// Package history records what clients of a cluster asked and were told, and says afterwards whether one cluster can have
// told them that: whether reads and writes are linearizable, acknowledged writes are there, and serials are used once.
package history

import (
	"fmt"
	"math"
	"slices"
	"sync"
	"time"

	"github.com/anishathalye/porcupine"
)

// Kind of an operation on an entry.
type Kind string

// The operations on an entry.
const (
	Create Kind = "create"
	Update Kind = "update"
	Delete Kind = "delete"
	Get    Kind = "get"
)

// Result of an operation.
type Result string

// The results. An operation that was refused before anything happened is none: it is dropped.
const (
	OK       Result = "ok"
	Exists   Result = "exists"    // create: there is one, named in the answer
	NotFound Result = "not found" // update, delete, get: there is none of that ID
	Conflict Result = "conflict"  // update: of another revision than the one that was read
	Unknown  Result = "unknown"   // it may have happened, and may yet
)

// Input is what is asked of one register: the entry of one SPIFFE ID and one set of selectors, of which there is never
// more than one. Its content is Hint, another one in each write.
type Input struct {
	Kind       Kind
	Key        string // names the register
	ID         string // of the entry; not for create
	IfRevision uint64 // update: 0 for any
	Hint       string // create, update
}

// Output is what was answered.
type Output struct {
	Result   Result
	ID       string // create: of the entry that was made, or is there
	Revision uint64 // ok, but for delete
	Hint     string // get
}

// Recorder collects operations of many clients. All methods can be called concurrently.
type Recorder struct {
	start time.Time
	mu    sync.Mutex // guards ops
	ops   []porcupine.Operation
}

// NewRecorder starts a history.
func NewRecorder() *Recorder { return &Recorder{start: time.Now()} }

// Begin notes that a client asks now. The func that it returns takes the answer; if it is not called, nothing was asked.
func (r *Recorder) Begin(client int, in Input) func(Output) {
	call := time.Since(r.start)
	return func(out Output) {
		end := time.Since(r.start)
		if out.Result == Unknown {
			end = math.MaxInt64 // from its call on, or never, which is the same as after everything else
		}
		r.mu.Lock()
		defer r.mu.Unlock()
		r.ops = append(r.ops, porcupine.Operation{ClientId: client, Input: in, Call: int64(call), Output: out, Return: int64(end)})
	}
}

// Len is the number of operations.
func (r *Recorder) Len() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.ops)
}

// Verdict of a check.
type Verdict struct {
	Linearizable bool
	Unchecked    bool   // it took too long to tell
	Why          string // not linearizable: an operation that fits nowhere, with those around it
}

// Check says whether the operations can have been one after the other, each between its call and its answer. limit bounds
// the search, which is exponential in the worst case.
func (r *Recorder) Check(limit time.Duration) Verdict {
	r.mu.Lock()
	ops := slices.Clone(r.ops)
	r.mu.Unlock()
	if why := outOfOrder(ops); why != "" {
		return Verdict{Why: why}
	}
	deadline := time.Now().Add(limit)
	v := Verdict{Linearizable: true}
	for _, part := range partition(ops) {
		switch porcupine.CheckOperationsTimeout(register(), part, max(time.Until(deadline), time.Millisecond)) {
		case porcupine.Illegal:
			return Verdict{Why: blame(part, deadline)}
		case porcupine.Unknown:
			v = Verdict{Unchecked: true, Why: fmt.Sprintf("%d operations on %s", len(part), part[0].Input.(Input).Key)}
		}
	}
	return v
}

// outOfOrder finds two acknowledged writes, to whatever registers, the second asked after the first was answered, whose
// revisions are the other way round: the log has one order for all.
func outOfOrder(ops []porcupine.Operation) string {
	var writes []porcupine.Operation
	for _, o := range ops {
		if out := o.Output.(Output); out.Result == OK && out.Revision > 0 && o.Input.(Input).Kind != Get {
			writes = append(writes, o)
		}
	}
	byReturn := slices.Clone(writes)
	slices.SortFunc(byReturn, func(a, b porcupine.Operation) int { return int(a.Return - b.Return) })
	slices.SortFunc(writes, func(a, b porcupine.Operation) int { return int(a.Call - b.Call) })
	highest, next := porcupine.Operation{}, 0
	for _, o := range writes {
		for ; next < len(byReturn) && byReturn[next].Return < o.Call; next++ {
			if highest.Output == nil || byReturn[next].Output.(Output).Revision > highest.Output.(Output).Revision {
				highest = byReturn[next]
			}
		}
		if highest.Output != nil && highest.Output.(Output).Revision >= o.Output.(Output).Revision {
			return fmt.Sprintf("a later write has a lower revision: %s, then %s", describe(highest), describe(o))
		}
	}
	return ""
}

func partition(ops []porcupine.Operation) [][]porcupine.Operation {
	at := map[string]int{}
	var out [][]porcupine.Operation
	for _, o := range ops {
		key := o.Input.(Input).Key
		i, ok := at[key]
		if !ok {
			i = len(out)
			at[key], out = i, append(out, nil)
		}
		out[i] = append(out[i], o)
	}
	return out
}

// blame finds the shortest beginning of a register's history that is not linearizable, and shows its end.
func blame(part []porcupine.Operation, deadline time.Time) string {
	slices.SortFunc(part, func(a, b porcupine.Operation) int {
		return int(min(a.Return, math.MaxInt64-1) - min(b.Return, math.MaxInt64-1))
	})
	n, _ := slices.BinarySearchFunc(part, true, func(o porcupine.Operation, _ bool) int {
		// Those answered later than o may have happened before it was: they are there with an unknown outcome.
		var known []porcupine.Operation
		for _, p := range part {
			if p.Return > o.Return && p.Call < o.Return {
				p.Output, p.Return = Output{Result: Unknown}, math.MaxInt64
			}
			if p.Return <= o.Return || p.Return == math.MaxInt64 && p.Call < o.Return {
				known = append(known, p)
			}
		}
		if porcupine.CheckOperationsTimeout(register(), known, max(time.Until(deadline), time.Second)) == porcupine.Illegal {
			return 0
		}
		return -1
	})
	n = min(n, len(part)-1)
	text := "not linearizable by " + describe(part[n]) + "; before it"
	for _, o := range part[max(0, n-8):n] {
		text += "\n  " + describe(o)
	}
	return text
}

func describe(o porcupine.Operation) string {
	in, out := o.Input.(Input), o.Output.(Output)
	end := "?"
	if out.Result != Unknown {
		end = time.Duration(o.Return).Round(time.Microsecond).String()
	}
	return fmt.Sprintf("[%v-%s] client %d %s %s id=%s if=%d hint=%q: %s id=%s revision=%d hint=%q",
		time.Duration(o.Call).Round(time.Microsecond), end, o.ClientId, in.Kind, in.Key, in.ID, in.IfRevision, in.Hint, out.Result, out.ID, out.Revision, out.Hint)
}

// entry is a register's state.
type entry struct {
	there    bool
	id       string // empty: made by a write whose answer is lost, so any
	revision uint64 // 0: likewise
	hint     string
	highest  uint64 // revision that was known, which never comes again
}

// register is the model. What a lost answer would have told is taken from the first answer that tells it.
func register() porcupine.Model {
	return porcupine.Model{
		Init: func() any { return entry{} },
		Step: func(state, input, output any) (bool, any) {
			return step(state.(entry), input.(Input), output.(Output))
		},
	}
}

func step(e entry, in Input, out Output) (bool, any) {
	mine := e.there && (e.id == "" || e.id == in.ID)
	if out.Result == NotFound && in.Kind != Create {
		return !e.there || e.id == "" || e.id != in.ID, e
	}
	switch in.Kind {
	case Create:
		return create(e, in, out)
	case Get:
		fits := e.revision == out.Revision || e.revision == 0 && out.Revision > e.highest
		if out.Result != OK || !mine || !fits || e.hint != out.Hint {
			return false, e
		}
		return true, entry{there: true, id: in.ID, revision: out.Revision, hint: e.hint, highest: out.Revision}
	case Update:
		fits := in.IfRevision == 0 || e.revision == 0 || e.revision == in.IfRevision
		switch {
		case out.Result == Unknown && mine && fits:
			return true, entry{there: true, id: in.ID, hint: in.Hint, highest: e.highest}
		case out.Result == Unknown:
			return true, e
		case out.Result == Conflict:
			e.id = in.ID
			return mine && in.IfRevision != 0 && (e.revision == 0 || e.revision != in.IfRevision), e
		}
		return out.Result == OK && mine && fits && out.Revision > e.highest, entry{there: true, id: in.ID, revision: out.Revision, hint: in.Hint, highest: out.Revision}
	case Delete:
		if mine {
			return out.Result == OK || out.Result == Unknown, entry{highest: e.highest}
		}
		return out.Result == Unknown, e
	}
	return false, e
}

func create(e entry, in Input, out Output) (bool, any) {
	switch out.Result {
	case OK:
		return !e.there && out.Revision > e.highest, entry{there: true, id: out.ID, revision: out.Revision, hint: in.Hint, highest: out.Revision}
	case Exists:
		known := e.id == "" || e.id == out.ID
		e.id = out.ID
		return e.there && known, e
	case Unknown:
		if !e.there {
			return true, entry{there: true, hint: in.Hint, highest: e.highest}
		}
		return true, e
	}
	return false, e
}
