package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"countersign.io/countersign/internal/durable"
)

// scheduled is a schedule whose time passes when it waits.
type scheduled struct {
	*schedule
	clock time.Time
	waits []time.Duration
	left  int // how often it may wait
	fail  error
	told  []string
}

func newScheduled(t *testing.T, times int) *scheduled {
	t.Helper()
	s := &scheduled{clock: time.Date(2027, 1, 2, 3, 4, 5, 600, time.UTC), left: times}
	s.schedule = newSchedule(filepath.Join(t.TempDir(), "backups"), "ca-1", time.Hour, 3, func(_ context.Context, w io.Writer) error {
		if _, err := fmt.Fprintf(w, "backup of %s", s.clock); err != nil {
			return err
		}
		return s.fail
	}, func(file string, err error) { s.told = append(s.told, fmt.Sprint(filepath.Base(file), " ", err)) }, slog.New(slog.DiscardHandler))
	s.now = func() time.Time { return s.clock }
	s.jitter = func(time.Duration) time.Duration { return 0 }
	s.sleep = func(_ context.Context, d time.Duration) bool {
		s.waits = append(s.waits, d)
		s.clock = s.clock.Add(d)
		s.left--
		return s.left >= 0
	}
	return s
}

func (s *scheduled) names(t *testing.T) (out []string) {
	t.Helper()
	list, err := os.ReadDir(s.dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range list {
		out = append(out, e.Name())
	}
	return out
}

func TestScheduleKeepsTheNewest(t *testing.T) {
	s := newScheduled(t, 5)
	if err := durable.PrivateDir(s.dir); err != nil {
		t.Fatal(err)
	}
	others := []string{
		"countersign-ca-1-20200101T000000Z.backup.old", "countersign-ca-1-x-20200101T000000Z.backup", "countersign-ca-2-20200101T000000Z.backup",
		"countersign-ca-1-20200101T000000Z.backup2", "countersign-ca-1-2020-01-01.backup", "notes", ".countersign-ca-2-20200101T000000Z.backup.1.tmp",
	}
	for _, name := range append([]string{"countersign-ca-1-20200101T000000Z.backup", ".countersign-ca-1-20200101T000000Z.backup.123.tmp"}, others...) {
		if err := os.WriteFile(filepath.Join(s.dir, name), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Run(context.Background()); err != nil {
		t.Fatal(err)
	}
	want := append(others, "countersign-ca-1-20270102T050405Z.backup", "countersign-ca-1-20270102T060405Z.backup", "countersign-ca-1-20270102T070405Z.backup")
	slices.Sort(want)
	if got := s.names(t); !slices.Equal(got, want) {
		t.Errorf("the folder holds\n%s, want\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	// The oldest was overdue: the first came at once.
	if !slices.Equal(s.waits, []time.Duration{0, time.Hour, time.Hour, time.Hour, time.Hour, time.Hour}) {
		t.Errorf("it waited %v", s.waits)
	}
	if info, err := os.Stat(filepath.Join(s.dir, want[len(want)-2])); err != nil || info.Mode() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	if err := s.Health(); err != nil {
		t.Error(err)
	}
}

// A restart neither makes one more nor skips one.
func TestScheduleAfterARestart(t *testing.T) {
	for name, c := range map[string]struct {
		newest string
		want   time.Duration
	}{
		"none":              {"", 0},
		"a while ago":       {"countersign-ca-1-20270102T024405Z.backup", 40 * time.Minute},
		"long ago":          {"countersign-ca-1-20260102T024405Z.backup", 0},
		"in the future":     {"countersign-ca-1-20280102T024405Z.backup", time.Hour},
		"another member's":  {"countersign-ca-2-20270102T024405Z.backup", 0},
		"an unfinished one": {".countersign-ca-1-20270102T024405Z.backup.1.tmp", 0},
	} {
		s := newScheduled(t, 0)
		if err := durable.PrivateDir(s.dir); err != nil {
			t.Fatal(err)
		}
		if c.newest != "" {
			if err := os.WriteFile(filepath.Join(s.dir, c.newest), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if err := s.Run(context.Background()); err != nil {
			t.Fatal(err)
		}
		if got := s.waits[0].Round(time.Second); got != c.want {
			t.Errorf("%s: it waits %v, want %v", name, got, c.want)
		}
	}
}

func TestScheduleJitters(t *testing.T) {
	s := newSchedule("/absent", "ca-1", time.Hour, 3, nil, nil, slog.New(slog.DiscardHandler))
	seen := map[time.Duration]bool{}
	for range 20 {
		j := s.jitter(time.Minute)
		if j < 0 || j > time.Minute {
			t.Fatalf("jitter %v", j)
		}
		seen[j] = true
	}
	if len(seen) < 10 {
		t.Errorf("20 jitters took %d values", len(seen))
	}
}

// TestScheduleFails: what cannot be made leaves the earlier ones, no part of a file, an error in the health, and is tried again.
func TestScheduleFails(t *testing.T) {
	s := newScheduled(t, 2)
	if err := s.Run(context.Background()); err != nil {
		t.Fatal(err)
	}
	before := s.names(t)
	s.left, s.waits, s.fail = 4, nil, fmt.Errorf("writing: %w", unix.ENOSPC)
	s.clock = s.clock.Add(time.Hour)
	if err := s.Run(context.Background()); err != nil {
		t.Fatal(err)
	}
	if after := s.names(t); !slices.Equal(before, after) {
		t.Errorf("%v became %v", before, after)
	}
	if err := s.Health(); !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), "the newest is of 2027-01-02T04:04:05Z") {
		t.Errorf("health: %v", err)
	}
	if len(s.told) != 6 || s.told[1] != before[1]+" <nil>" || !strings.Contains(s.told[5], "no space left") {
		t.Errorf("it told %v", s.told)
	}
	if !slices.Equal(s.waits[1:], []time.Duration{time.Minute, 2 * time.Minute, 4 * time.Minute, 8 * time.Minute}) {
		t.Errorf("it tried again after %v", s.waits)
	}
	s.left, s.fail = 1, nil
	if err := s.Run(context.Background()); err != nil {
		t.Fatal(err)
	}
	if err := s.Health(); err != nil {
		t.Errorf("after it went well: %v", err)
	}
	if n := len(s.names(t)); n != len(before)+1 {
		t.Errorf("%d backups after %d and one", n, len(before))
	}
}

func TestScheduleFolder(t *testing.T) {
	s := newScheduled(t, 1)
	s.dir = filepath.Join(t.TempDir(), "absent", "below")
	if err := s.Run(context.Background()); err != nil {
		t.Fatal(err)
	}
	if err := s.Health(); !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "backup.dir") {
		t.Errorf("no folder above: %v", err)
	}
	s = newScheduled(t, 1)
	if err := os.Mkdir(s.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := s.Run(context.Background()); err != nil {
		t.Fatal(err)
	}
	if err := s.Health(); !errors.Is(err, durable.ErrLoose) || len(s.names(t)) != 0 {
		t.Errorf("a folder that others may read: %v, %v", err, s.names(t))
	}
}

// The one just made is kept even if the clock has stepped back.
func TestScheduleClockStepsBack(t *testing.T) {
	s := newScheduled(t, 3)
	if err := s.Run(context.Background()); err != nil {
		t.Fatal(err)
	}
	s.clock = s.clock.Add(-24 * time.Hour)
	made := s.name(s.clock)
	if err := s.try(context.Background(), s.clock); err != nil {
		t.Fatal(err)
	}
	if got := s.names(t); len(got) != 3 || !slices.Contains(got, made) {
		t.Errorf("%v: want %s among them", got, made)
	}
}

// hungFile takes nothing until it is let go.
type hungFile struct {
	newBackup
	let     chan struct{}
	aborted chan struct{}
}

func (f hungFile) Write(p []byte) (int, error) { <-f.let; return len(p), nil }
func (f hungFile) Abort()                      { f.newBackup.Abort(); close(f.aborted) }

// A file system that hangs keeps no state from being let go of, is said, and no second backup is begun meanwhile.
func TestScheduleGivesUp(t *testing.T) {
	s := newScheduled(t, 0)
	s.limit, s.grace = 50*time.Millisecond, 10*time.Millisecond
	hung := hungFile{let: make(chan struct{}), aborted: make(chan struct{})}
	s.create = func(path string) (newBackup, error) {
		f, err := createBackup(path)
		hung.newBackup = f
		return hung, err
	}
	released, calls := 0, 0
	s.save = func(_ context.Context, w io.Writer) error {
		defer func() { released++ }()
		calls++
		for {
			if _, err := w.Write(make([]byte, 64<<10)); err != nil {
				return err
			}
		}
	}
	begun := s.clock
	err := s.try(context.Background(), begun)
	if err == nil || !strings.Contains(err.Error(), "not done after 50ms") || !strings.Contains(err.Error(), "hangs") || released != 1 {
		t.Fatalf("%v, let go of %d", err, released)
	}
	s.clock = begun.Add(time.Hour)
	if err := s.Health(); err == nil || !strings.Contains(err.Error(), "running since 2027-01-02T03:04:05Z") {
		t.Errorf("health: %v", err)
	}
	if err := s.try(context.Background(), s.clock); err == nil || !strings.Contains(err.Error(), "runs since 2027-01-02T03:04:05Z hangs") || calls != 1 {
		t.Errorf("another one: %v, after %d", err, calls)
	}
	close(hung.let)
	<-hung.aborted
	if got := s.names(t); len(got) != 0 {
		t.Errorf("it left %v", got)
	}
	s.save, s.create, s.limit = func(_ context.Context, w io.Writer) error { _, err := w.Write([]byte("whole")); return err }, createBackup, time.Minute
	for err = s.try(context.Background(), s.clock); err != nil && strings.Contains(err.Error(), "hangs"); err = s.try(context.Background(), s.clock) {
		time.Sleep(time.Millisecond) // until the old one has gone
	}
	if got := s.names(t); err != nil || len(got) != 1 {
		t.Errorf("afterwards: %v, %v", err, got)
	}
}

func TestScheduleEndsWithItsContext(t *testing.T) {
	s := newScheduled(t, 9)
	ctx, cancel := context.WithCancel(context.Background())
	s.save = func(context.Context, io.Writer) error { cancel(); return ctx.Err() }
	if err := s.Run(ctx); err != nil {
		t.Fatal(err)
	}
	if err := s.Health(); err != nil || len(s.names(t)) != 0 {
		t.Errorf("%v, %v", err, s.names(t))
	}
	done := make(chan bool)
	go func() { done <- sleepFor(ctx, time.Hour) }()
	if <-done {
		t.Error("it slept past its context")
	}
}
