package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"sync"
	"time"

	"countersign.io/countersign/integration/cluster"
)

// pod is one running workload and what it has reported.
type pod struct {
	*cluster.Process
	name  string
	stage *stage

	mu      sync.Mutex // guards the rest: Write comes from the child's pipe
	rest    []byte
	svids   int
	ok, bad int
	changed chan struct{} // closed and replaced at each report
}

func newPod(s *stage, name string) *pod {
	return &pod{name: name, stage: s, changed: make(chan struct{})}
}

// Write takes the workload's output, a JSON line an event.
func (p *pod) Write(data []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.rest = append(p.rest, data...)
	for {
		i := bytes.IndexByte(p.rest, '\n')
		if i < 0 {
			break
		}
		p.line(p.rest[:i])
		p.rest = p.rest[i+1:]
	}
	close(p.changed)
	p.changed = make(chan struct{})
	return len(data), nil
}

func (p *pod) line(line []byte) {
	var e struct {
		Event, ID, Serial, Error string
		OK, Failed               int
	}
	if json.Unmarshal(line, &e) != nil {
		p.stage.say("pod "+p.name, "%s", line)
		return
	}
	switch e.Event {
	case "svid":
		p.svids++
		what := "rotated: "
		if p.svids == 1 {
			what = "is " + e.ID + ", "
		}
		p.stage.say("pod "+p.name, "%sserial %.12s...", what, e.Serial)
	case "first":
		p.ok = max(p.ok, 1)
	case "count":
		p.ok, p.bad = e.OK, e.Failed
	case "failed":
		p.bad = e.Failed
		p.stage.say("pod "+p.name, "HANDSHAKE FAILED: %s", e.Error)
	case "error":
		p.stage.say("pod "+p.name, "%s", e.Error)
	}
}

func (p *pod) handshakes() int { p.mu.Lock(); defer p.mu.Unlock(); return p.ok }
func (p *pod) failures() int   { p.mu.Lock(); defer p.mu.Unlock(); return p.bad }

// rotations is -1 before the first SVID.
func (p *pod) rotations() int { p.mu.Lock(); defer p.mu.Unlock(); return p.svids - 1 }

func (p *pod) wait(ctx context.Context, done func() bool) error {
	deadline := time.NewTimer(15 * time.Second)
	defer deadline.Stop()
	for {
		p.mu.Lock()
		changed := p.changed
		p.mu.Unlock()
		if done() {
			return nil
		}
		select {
		case <-changed:
		case <-p.Done():
			return fmt.Errorf("pod %s ended", p.name)
		case <-deadline.C:
			return fmt.Errorf("pod %s has nothing to show after 15 s", p.name)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
