package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"countersign.io/countersign/backup"
	"countersign.io/countersign/identity"
	"countersign.io/countersign/internal/durable"
)

// schedule makes a backup now and then, and keeps the newest. Each member that is configured to does so by itself, at a
// time of its own.
type schedule struct {
	dir    string
	member string
	every  time.Duration
	keep   int // complete backups of this member
	save   func(context.Context, io.Writer) error
	log    *slog.Logger
	told   func(file string, err error) // of each one that was made, or was not

	now    func() time.Time
	sleep  func(context.Context, time.Duration) bool // reports whether ctx lasted
	jitter func(most time.Duration) time.Duration
	create func(path string) (newBackup, error)
	limit  time.Duration // of one backup
	grace  time.Duration // after that, until what is not done is said to hang

	mu     sync.Mutex
	since  time.Time // when the one was begun that is being made, or hangs; zero: none
	fault  error     // of the last try
	newest time.Time // complete one; zero: none
}

const (
	backupTimeFormat = "20060102T150405Z"
	backupSuffix     = ".backup"
	retryBackup      = time.Minute
	// A backup holds on to the state as it was at its beginning, and the state's file grows meanwhile.
	leastLimit, mostLimit = 5 * time.Minute, time.Hour
	hangGrace             = 5 * time.Second
)

func newSchedule(dir, member string, every time.Duration, keep int, save func(context.Context, io.Writer) error, told func(string, error), log *slog.Logger) *schedule {
	return &schedule{
		dir: dir, member: member, every: every, keep: keep, save: save, told: told, log: log,
		now: time.Now, sleep: sleepFor, jitter: func(most time.Duration) time.Duration { return rand.N(most + 1) },
		create: createBackup, limit: max(min(every, mostLimit), leastLimit), grace: hangGrace,
	}
}

func sleepFor(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

// Run makes backups until ctx ends. A member goes on without them: what keeps them from being made is in its log and its health.
func (s *schedule) Run(ctx context.Context) error {
	wait := s.first()
	for failures := 0; s.sleep(ctx, wait); {
		at := s.now()
		err := s.try(ctx, at)
		if ctx.Err() != nil {
			return nil
		}
		s.told(filepath.Join(s.dir, s.name(at)), err)
		s.mu.Lock()
		s.fault = err
		s.mu.Unlock()
		if err != nil {
			wait = min(retryBackup<<min(failures, 10), s.every)
			failures++
			s.log.Error("a scheduled backup failed, earlier ones are kept", "dir", s.dir, "error", err, "again_in", wait)
			continue
		}
		failures = 0
		// Members that were started together do not stay together.
		wait = s.every - s.jitter(s.every/10)
	}
	return nil
}

// first is how long the first backup of this run waits: a restart neither skips one nor makes one more.
func (s *schedule) first() time.Duration {
	list, err := s.complete()
	due := s.now()
	if err == nil && len(list) > 0 {
		at := list[len(list)-1].at
		due = at.Add(s.every)
		s.mu.Lock()
		s.newest = at
		s.mu.Unlock()
	}
	// A newest one of the future is of a clock that was wrong, then or now.
	return min(max(due.Sub(s.now()), 0), s.every) + s.jitter(min(s.every/10, time.Minute))
}

// Newest is how often backups are made, and of when the newest is; zero: there is none.
func (s *schedule) Newest() (every time.Duration, at time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.every, s.newest
}

// Health says why backups are not made as they should be; nil if they are.
func (s *schedule) Health() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fault == nil {
		if s.since.IsZero() || s.now().Sub(s.since) < s.limit/4 {
			return nil
		}
		return fmt.Errorf("the scheduled backup is slow: running since %s, it will be given up after %v", s.since.UTC().Format(time.RFC3339), s.limit)
	}
	newest := "there is none"
	if !s.newest.IsZero() {
		newest = "the newest is of " + s.newest.UTC().Format(time.RFC3339)
	}
	return fmt.Errorf("the last scheduled backup failed (%s): %w", newest, s.fault)
}

// try makes one backup, and gives up after limit. A file system can hang for ever, and no context ends that: so what it does is
// done beside, and gets from here what it writes. When time is up the state is let go of, whatever the file does.
func (s *schedule) try(ctx context.Context, at time.Time) error {
	s.mu.Lock()
	hangs := s.since
	if hangs.IsZero() {
		s.since = at
	}
	s.mu.Unlock()
	if !hangs.IsZero() {
		return fmt.Errorf("%w: the one that runs since %s hangs: look at the file system of %s", identity.ErrUnavailable, hangs.UTC().Format(time.RFC3339), s.dir)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, s.limit, fmt.Errorf("%w: it was not done after %v: is the file system of %s slow?", identity.ErrUnavailable, s.limit, s.dir))
	defer cancel()
	r, w := io.Pipe()
	stop := context.AfterFunc(ctx, func() { r.CloseWithError(context.Cause(ctx)) })
	defer stop()
	open, done := make(chan struct{}), make(chan error, 1)
	go func() {
		err := s.once(ctx, at, open, r)
		s.mu.Lock()
		s.since = time.Time{}
		s.mu.Unlock()
		done <- err
	}()
	select {
	case <-open:
		w.CloseWithError(s.save(ctx, w)) // nil: it is whole
	case err := <-done:
		return err
	case <-ctx.Done():
	}
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
	}
	t := time.NewTimer(s.grace)
	defer t.Stop()
	select {
	case err := <-done:
		return err
	case <-t.C:
		return fmt.Errorf("%w, and it hangs", context.Cause(ctx))
	}
}

// newBackup is a file that has its name once it is whole.
type newBackup interface {
	io.Writer
	Commit() error
	Abort()
}

func createBackup(path string) (newBackup, error) { return backup.Create(path, false) }

// once writes what content gives into one backup and then removes what is too many; open is closed when it wants that. After an error all that
// was there is there still.
func (s *schedule) once(ctx context.Context, at time.Time, open chan<- struct{}, content *io.PipeReader) (err error) {
	defer func() { content.CloseWithError(err) }()
	if err := durable.PrivateDir(s.dir); err != nil {
		return fmt.Errorf("backup.dir: %w", err)
	}
	if err := s.tidy(); err != nil {
		return err
	}
	path := filepath.Join(s.dir, s.name(at))
	f, err := s.create(path)
	if errors.Is(err, identity.ErrExists) {
		return nil // within one second of another: it was made
	}
	if err != nil {
		return err
	}
	defer f.Abort()
	close(open)
	if _, err := io.Copy(f, content); err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return fmt.Errorf("writing %s: %w", path, err)
	}
	if err := f.Commit(); err != nil {
		return err
	}
	s.mu.Lock()
	s.newest = at
	s.mu.Unlock()
	s.log.Info("scheduled backup made", "file", path)
	return s.retain(path)
}

func (s *schedule) name(at time.Time) string {
	return "countersign-" + s.member + "-" + at.UTC().Format(backupTimeFormat) + backupSuffix
}

// timed is a complete backup of this member.
type timed struct {
	path string
	at   time.Time
}

// complete lists what bears a final name, which only a whole one does; the oldest first.
func (s *schedule) complete() ([]timed, error) {
	list, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, fmt.Errorf("listing backups: %w", err)
	}
	var out []timed
	for _, e := range list {
		if at, ok := s.timeOf(e.Name()); ok && e.Type().IsRegular() {
			out = append(out, timed{filepath.Join(s.dir, e.Name()), at})
		}
	}
	slices.SortFunc(out, func(a, b timed) int { return a.at.Compare(b.at) })
	return out, nil
}

// timeOf parses exactly what name writes: the folder may hold what is not ours, or another member's.
func (s *schedule) timeOf(name string) (time.Time, bool) {
	rest, ok := strings.CutPrefix(name, "countersign-"+s.member+"-")
	if !ok {
		return time.Time{}, false
	}
	if rest, ok = strings.CutSuffix(rest, backupSuffix); !ok {
		return time.Time{}, false
	}
	at, err := time.Parse(backupTimeFormat, rest)
	return at, err == nil && s.name(at) == name
}

// retain removes the oldest, and never the one just made, whatever the clock says.
func (s *schedule) retain(made string) error {
	list, err := s.complete()
	if err != nil {
		return err
	}
	list = slices.DeleteFunc(list, func(t timed) bool { return t.path == made })
	var errs []error
	for _, t := range list[:max(len(list)-(s.keep-1), 0)] {
		if err := os.Remove(t.path); err != nil {
			errs = append(errs, fmt.Errorf("removing an old backup: %w", err))
			continue
		}
		s.log.Info("old backup removed", "file", t.path)
	}
	return errors.Join(errs...)
}

// tidy removes what a crash left unfinished.
func (s *schedule) tidy() error {
	list, err := os.ReadDir(s.dir)
	if err != nil {
		return fmt.Errorf("listing backups: %w", err)
	}
	for _, e := range list {
		name, ok := strings.CutPrefix(e.Name(), ".")
		i := strings.Index(name, backupSuffix+".")
		if !ok || i < 0 || !strings.HasSuffix(name, ".tmp") {
			continue
		}
		if _, ours := s.timeOf(name[:i+len(backupSuffix)]); ours {
			if err := os.Remove(filepath.Join(s.dir, e.Name())); err != nil {
				return fmt.Errorf("removing an unfinished backup: %w", err)
			}
		}
	}
	return nil
}
