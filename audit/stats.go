package audit

import (
	"maps"
	"time"
)

// Count is what events are counted by.
type Count struct {
	Action  Action
	Outcome Outcome
}

// Stats are numbers of this run.
type Stats struct {
	Events   map[Count]uint64 // that are durable; those that one record stands for count each
	Failures uint64           // writes that failed
	Waiting  int              // calls that wait for the writer
	Writing  time.Duration    // how long the write under way has taken; 0: there is none
}

// Stats waits for nothing but a lock that is held for moments.
func (l *Log) Stats() Stats {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := Stats{Events: maps.Clone(l.counts), Failures: l.failures, Waiting: len(l.queue)}
	if !l.busy.IsZero() {
		s.Writing = time.Since(l.busy)
	}
	return s
}
