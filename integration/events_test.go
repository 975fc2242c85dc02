package integration

import (
	"bytes"
	"context"
	"encoding/json"
	"sync"
	"testing"
)

// eventLog is a workload's output as it comes.
type eventLog struct {
	mu      sync.Mutex // guards all below
	rest    []byte
	svids   int
	ok, bad int
	errs    []string
	changed chan struct{} // closed and replaced at each write
}

func newEventLog() *eventLog { return &eventLog{changed: make(chan struct{})} }

func (e *eventLog) Write(data []byte) (int, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.rest = append(e.rest, data...)
	for {
		line, rest, found := bytes.Cut(e.rest, []byte("\n"))
		if !found {
			break
		}
		e.rest = rest
		var ev struct {
			Event, Error string
			OK, Failed   int
		}
		if json.Unmarshal(line, &ev) != nil {
			e.errs = append(e.errs, string(line))
			continue
		}
		switch ev.Event {
		case "svid":
			e.svids++
		case "count":
			e.ok, e.bad = ev.OK, ev.Failed
		case "failed":
			e.bad = ev.Failed
			e.errs = append(e.errs, ev.Error)
		case "error":
			e.errs = append(e.errs, ev.Error)
		}
	}
	close(e.changed)
	e.changed = make(chan struct{})
	return len(data), nil
}

// seen is how many handshakes went well and how many SVIDs there were.
func (e *eventLog) seen() (ok, svids int) { e.mu.Lock(); defer e.mu.Unlock(); return e.ok, e.svids }

func (e *eventLog) failures() int    { e.mu.Lock(); defer e.mu.Unlock(); return e.bad }
func (e *eventLog) errors() []string { e.mu.Lock(); defer e.mu.Unlock(); return e.errs }

// wait returns once ok holds, which is called under the lock.
func (e *eventLog) wait(t *testing.T, ctx context.Context, what string, ok func(*eventLog) bool) {
	t.Helper()
	for {
		e.mu.Lock()
		done, changed, errs := ok(e), e.changed, e.errs
		e.mu.Unlock()
		if done {
			return
		}
		select {
		case <-changed:
		case <-ctx.Done():
			t.Fatalf("waiting for %s: %v; the workload said %v", what, ctx.Err(), errs)
		}
	}
}

func parseJSON(t *testing.T, text string, into any) {
	t.Helper()
	if err := json.Unmarshal([]byte(text), into); err != nil {
		t.Fatalf("reading %q: %v", text, err)
	}
}
