package audit

import (
	"fmt"
	"net/netip"
	"strconv"
	"sync"
	"time"
)

// Refusals must not fill the disk: whoever proved nothing can have as many as he likes. The first ones of each address and
// kind are recorded in full, more are counted, and the count is recorded at the end of the interval.
const (
	floodInterval = time.Minute
	// floodStranger are the records in full, for each address (a /64 of IPv6), action and kind of reason, in an interval;
	// floodKnown are those of an agent, a member or an operator.
	floodStranger = 5
	floodKnown    = 50
	// floodTotal are those of all strangers together.
	floodTotal = 600
	// floodKeys bounds the table, and so the counts that are recorded in an interval: what comes beyond it is counted together.
	floodKeys = 512
)

// Note records an event that nobody waits for: a refusal, or what this member sees happen. It never blocks. kind tells apart why
// things are refused or fail, such as an error code: it must not be of the caller's making. Refusals and failures that are too
// many are counted; with an empty kind they never are, but if they cannot be written.
func (l *Log) Note(kind string, e Event) {
	if e.Time.IsZero() {
		e.Time = l.cfg.Now()
	}
	if kind != "" && (e.Outcome == Refused || e.Outcome == Failed) && !l.flood.full(kind, &e) {
		return
	}
	if !l.note(e) {
		l.flood.count(kind, &e)
	}
}

func (l *Log) note(e Event) bool { return l.enqueue(l.newCall([]Event{e})) == nil }

// flood counts refusals.
type flood struct {
	mu       sync.Mutex
	counts   map[floodKey]*floodCount
	total    int       // recorded in full for strangers in this interval
	interval time.Time // when it began
}

type floodKey struct {
	who    Who // what several calls have in common
	action Action
	kind   string
}

type floodCount struct {
	began       time.Time
	full        int
	left        uint64 // only counted
	first, last time.Time
	outcome     Outcome
}

func (f *flood) init() { f.counts = map[floodKey]*floodCount{} }

func keyOf(kind string, e *Event) floodKey {
	k := floodKey{who: Who{Kind: e.Who.Kind, ID: e.Who.ID, UID: e.Who.UID}, action: e.Action, kind: kind}
	if !e.Who.proven() {
		k.who = Who{Kind: e.Who.Kind, Address: hostOf(e.Who.Address)}
	}
	return k
}

// hostOf is the address that counts as one: without its port, and of IPv6 the /64.
func hostOf(addr string) string {
	ap, err := netip.ParseAddrPort(addr)
	if err != nil {
		return ""
	}
	ip := ap.Addr().Unmap().WithZone("")
	if ip.Is6() {
		p, _ := ip.Prefix(64)
		return p.String()
	}
	return ip.String()
}

// full reports whether a refusal is to be recorded in full; if not, it is counted.
func (f *flood) full(kind string, e *Event) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	c := f.of(keyOf(kind, e), e.Time)
	proven := e.Who.proven()
	if e.Time.Sub(f.interval) >= floodInterval || e.Time.Before(f.interval) {
		f.interval, f.total = e.Time, 0
	}
	if proven && c.full < floodKnown || !proven && c.full < floodStranger && f.total < floodTotal {
		c.full++
		if !proven {
			f.total++
		}
		return true
	}
	c.add(e)
	return false
}

// count counts what could not be recorded.
func (f *flood) count(kind string, e *Event) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.of(keyOf(kind, e), e.Time).add(e)
}

// of is the count of a key; f.mu is held.
func (f *flood) of(k floodKey, now time.Time) *floodCount {
	c, ok := f.counts[k]
	if !ok && len(f.counts) >= floodKeys {
		k = floodKey{who: Who{Kind: k.who.Kind}, action: k.action, kind: "many"} // few: kinds and actions are ours
		c, ok = f.counts[k]
	}
	if !ok {
		c = &floodCount{began: now}
		f.counts[k] = c
	}
	return c
}

func (c *floodCount) add(e *Event) {
	if c.left == 0 {
		c.first = e.Time
	}
	c.left++
	c.last, c.outcome = e.Time, e.Outcome
}

// summarise records what was only counted, once its interval has ended, or all of it.
func (l *Log) summarise(all bool) {
	if l.stuck() {
		return // it is counted on
	}
	c := &call{}
	for _, e := range l.flood.due(l.cfg.Now(), all) {
		c.add(l, &e, nil)
	}
	if len(c.meta) > 0 {
		l.commit([]*call{c})
	}
}

// due are the summaries of the intervals that have ended, or of all.
func (f *flood) due(now time.Time, all bool) []Event {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []Event
	for k, c := range f.counts {
		if age := now.Sub(c.began); !all && age >= 0 && age < floodInterval {
			continue
		}
		delete(f.counts, k)
		if c.left == 0 {
			continue
		}
		out = append(out, Event{
			Action: k.action, Outcome: c.outcome, Who: k.who, Count: c.left, Time: now,
			Reason: fmt.Sprintf("more of the same kind (%s), which were counted only", k.kind),
			Details: Details{
				{"first", c.first.UTC().Format(timeFormat)}, {"last", c.last.UTC().Format(timeFormat)}, {"recorded_in_full", strconv.Itoa(c.full)},
			},
		})
	}
	return out
}
