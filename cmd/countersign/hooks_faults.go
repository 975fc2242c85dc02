//go:build faults

package main

import (
	"fmt"
	"os"
	"strings"
	"time"
)

// hooks is what tests of faults turn. This build is for them alone: who can set its environment can set its clock.
type hooks struct {
	now               func() time.Time
	snapshotThreshold uint64
	trailingLogs      uint64
	snapshotInterval  time.Duration
}

// newHooks reads COUNTERSIGN_FAULT_CLOCK, a file with a duration by which this member's clock is wrong and which is read again
// and again; and COUNTERSIGN_FAULT_SNAPSHOTS, "THRESHOLD TRAILING INTERVAL" of raft's snapshots. What cannot be read is not set.
func newHooks() hooks {
	h := hooks{now: time.Now}
	if file := os.Getenv("COUNTERSIGN_FAULT_CLOCK"); file != "" {
		h.now = func() time.Time {
			raw, err := os.ReadFile(file)
			off, parseErr := time.ParseDuration(strings.TrimSpace(string(raw)))
			if err != nil || parseErr != nil {
				return time.Now()
			}
			return time.Now().Round(0).Add(off) // without the monotonic clock, which no step changes
		}
	}
	var interval string
	if n, _ := fmt.Sscan(os.Getenv("COUNTERSIGN_FAULT_SNAPSHOTS"), &h.snapshotThreshold, &h.trailingLogs, &interval); n == 3 {
		h.snapshotInterval, _ = time.ParseDuration(interval)
	}
	return h
}
