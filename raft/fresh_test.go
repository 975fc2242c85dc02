package raft

import (
	"testing"
	"time"
)

// TestSuspendedMachineIsStale: time passes for a member that is suspended, though its monotonic clock stands still.
func TestSuspendedMachineIsStale(t *testing.T) {
	now := time.Now()
	if d := since(now, now.Add(time.Minute)); d != time.Minute {
		t.Errorf("a minute awake: %v", d)
	}
	// As after a resume: the wall clock is an hour on, the monotonic one is not.
	before := now.Add(-time.Hour).Round(0)
	if d := since(before, now); d != time.Hour {
		t.Errorf("an hour asleep: %v", d)
	}
	if d := since(now.Add(time.Hour), now); d != 0 {
		t.Errorf("a clock that was set back: %v, want 0", d)
	}
}
