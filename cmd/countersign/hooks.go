//go:build !faults

package main

import "time"

// hooks is what tests of faults may turn, in a build of their own (tag faults).
type hooks struct {
	now               func() time.Time
	snapshotThreshold uint64
	trailingLogs      uint64
	snapshotInterval  time.Duration
}

func newHooks() hooks { return hooks{now: time.Now} }
