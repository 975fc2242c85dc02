package audit

import (
	"bytes"
	"context"
	"errors"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"countersign.io/countersign/identity"
)

// TestCheckpointGoesWithTheGroup: one that is due costs no sync of its own while there is something to record, and waits for nothing
// while there is not.
func TestCheckpointGoesWithTheGroup(t *testing.T) {
	dir, s, d := privateDir(t), newSigner(t, "m1"), &faulty{}
	l := start(t, dir, func(c *Config) {
		c.open, c.Sign, c.CheckpointRecords, c.CheckpointEvery = d.open, s.sign, 10, time.Hour
	})
	const groups = 50
	before := d.syncs.Load()
	for range groups {
		record(t, l.Log, 10)
	}
	if n := d.syncs.Load() - before; n > groups*3/2 { // some may be a second's tick's
		t.Errorf("%d syncs for %d groups with a checkpoint each", n, groups)
	}
	eventually(t, "the last group is signed too", func() bool {
		return len(l.durable(t, LogCheckpoint)) == groups
	})
	l.stop()
	wantClean(t, dir, s)
}

// TestCheckpointsGroupFails: a checkpoint whose group cannot be written is made anew, and covers what is there.
func TestCheckpointsGroupFails(t *testing.T) {
	for name, onSync := range map[string]bool{"write": false, "sync": true} {
		t.Run(name, func(t *testing.T) {
			dir, s, d := privateDir(t), newSigner(t, "m1"), &faulty{}
			l := start(t, dir, func(c *Config) {
				c.open, c.Sign, c.CheckpointRecords, c.CheckpointEvery = d.open, s.sign, 10, time.Hour
			})
			for round := range 3 {
				record(t, l.Log, 10) // a checkpoint is due now
				d.set(func() { d.err, d.onSync, d.partial = syscall.EIO, onSync, 200 })
				if err := l.Record(context.Background(), Event{Action: IssueJWT, Outcome: OK}); !errors.Is(err, identity.ErrUnavailable) {
					t.Fatalf("round %d: recorded: %v", round, err)
				}
				d.set(func() { d.err = nil })
				eventually(t, "it goes on by itself", func() bool { return l.Ready() == nil })
			}
			record(t, l.Log, 10)
			l.stop()
			wantClean(t, dir, s)
			if n := len(find(t, dir, IssueX509)); n != 40 {
				t.Errorf("%d records: want 40", n)
			}
			if n := len(find(t, dir, IssueJWT)); n != 0 {
				t.Errorf("%d records of what was refused", n)
			}
			if n := len(find(t, dir, LogCheckpoint)); n < 3 {
				t.Errorf("%d checkpoints", n)
			}
		})
	}
}

// TestMoreAheadUnderLoad: what is used up within a second is followed by twice as much, up to a bound; what is not, by the least.
func TestMoreAheadUnderLoad(t *testing.T) {
	dir := filepath.Join(privateDir(t), "audit")
	s, _, err := openFiles(&Config{Dir: dir, MaxSize: 64 << 20, Reserve: MaxLine, Now: time.Now})
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	line := append(bytes.Repeat([]byte{'x'}, 32<<10-1), '\n')
	extend := func() int64 {
		t.Helper()
		for room := s.room; s.room == room; {
			if err := s.append(line); err != nil {
				t.Fatal(err)
			}
		}
		return s.room - s.size
	}
	for i, want := range []int64{ahead, 2 * ahead, 4 * ahead, 8 * ahead, mostAhead, mostAhead} {
		if i > 0 {
			s.wrote = time.Now().Add(time.Hour) // however slow this is
		}
		if got := extend(); got != want {
			t.Errorf("extension %d has %d bytes, want %d", i, got, want)
		}
	}
	s.wrote = time.Now().Add(-2 * time.Second)
	if got := extend(); got != ahead {
		t.Errorf("after a while %d bytes, want %d", got, ahead)
	}
}
