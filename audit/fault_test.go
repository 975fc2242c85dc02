package audit

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"countersign.io/countersign/identity"
)

// faulty makes files that fail, or hang, when told to.
type faulty struct {
	syncs   atomic.Int64
	mu      sync.Mutex
	err     error // of a write or a sync
	partial int   // bytes that a failing write writes
	onSync  bool
	room    int64 // bytes that may be written yet, if limited
	limited bool
	reserve string // the file that gives its room when it goes, as on a real disk; "" once it has
	gate    chan struct{}
	noOpen  bool
}

func (f *faulty) open(path string, flag int) (disk, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.noOpen {
		return nil, syscall.EIO
	}
	d, err := openOS(path, flag)
	if err != nil {
		return nil, err
	}
	return &faultyFile{disk: d, f: f}, nil
}

func (f *faulty) hang() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.gate = make(chan struct{})
}

func (f *faulty) release() {
	f.mu.Lock()
	defer f.mu.Unlock()
	close(f.gate)
	f.gate = nil
}

func (f *faulty) set(g func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	g()
}

type faultyFile struct {
	disk
	f *faulty
}

func (d *faultyFile) WriteAt(p []byte, at int64) (int, error) {
	d.f.mu.Lock()
	defer d.f.mu.Unlock()
	if d.f.limited {
		d.f.regain()
		if int64(len(p)) > d.f.room {
			n, _ := d.disk.WriteAt(p[:d.f.room], at)
			return n, syscall.ENOSPC
		}
		d.f.room -= int64(len(p))
	}
	if d.f.err != nil && !d.f.onSync {
		n, _ := d.disk.WriteAt(p[:min(len(p), d.f.partial)], at)
		return n, d.f.err
	}
	return d.disk.WriteAt(p, at)
}

// regain gives the room of a reserve that is gone; f.mu is held.
func (f *faulty) regain() {
	if _, err := os.Lstat(f.reserve); f.reserve != "" && errors.Is(err, os.ErrNotExist) {
		f.room, f.reserve = f.room+4000, ""
	}
}

func (d *faultyFile) Allocate(size int64) error {
	d.f.mu.Lock()
	defer d.f.mu.Unlock()
	if d.f.limited && size > d.f.room {
		return syscall.ENOSPC
	}
	return d.disk.Allocate(size)
}

func (d *faultyFile) Sync() error {
	d.f.mu.Lock()
	gate, err := d.f.gate, d.f.err
	if !d.f.onSync {
		err = nil
	}
	d.f.mu.Unlock()
	if gate != nil {
		<-gate
	}
	d.f.syncs.Add(1)
	if err != nil {
		return err
	}
	return d.disk.Sync()
}

// TestDiskFails: whether the bytes got there or not, what failed is not in the log, nothing is decided meanwhile, and it goes
// on by itself.
func TestDiskFails(t *testing.T) {
	for name, set := range map[string]func(*faulty){
		"write refused":             func(f *faulty) { f.err = syscall.EIO },
		"write torn":                func(f *faulty) { f.err, f.partial = syscall.EIO, 100 },
		"write whole, error anyhow": func(f *faulty) { f.err, f.partial = syscall.EIO, 1<<20 },
		"sync fails":                func(f *faulty) { f.err, f.onSync = syscall.EIO, true },
		"and no new handle":         func(f *faulty) { f.err, f.onSync, f.noOpen = syscall.EIO, true, true },
	} {
		t.Run(name, func(t *testing.T) {
			dir := privateDir(t)
			f := &faulty{}
			l := start(t, dir, func(c *Config) { c.open = f.open })
			record(t, l.Log, 3)
			f.set(func() { set(f) })
			for range 2 {
				if err := l.Record(context.Background(), Event{Action: IssueJWT, Outcome: OK}); !errors.Is(err, identity.ErrUnavailable) {
					t.Fatalf("recorded: %v", err)
				}
				if err := l.Ready(); !errors.Is(err, identity.ErrUnavailable) {
					t.Fatalf("ready: %v", err)
				}
			}
			f.set(func() { f.err, f.noOpen = nil, false })
			eventually(t, "it goes on by itself", func() bool { return l.Ready() == nil })
			record(t, l.Log, 3)
			l.stop()
			wantClean(t, dir, nil)
			if n := len(find(t, dir, IssueJWT)); n != 0 {
				t.Errorf("%d records of what was refused", n)
			}
			if n := len(find(t, dir, LogRecovered)); n != 1 {
				t.Errorf("%d records of the recovery", n)
			}
			if n := len(find(t, dir, IssueX509)); n != 6 {
				t.Errorf("%d records: want 6", n)
			}
		})
	}
}

// TestHungSync: nobody waits longer than the deadline, memory is bounded, and what got into the log after its caller gave up is
// withdrawn.
func TestHungSync(t *testing.T) {
	dir := privateDir(t)
	f := &faulty{}
	l := start(t, dir, func(c *Config) { c.open, c.Deadline = f.open, 500*time.Millisecond })
	f.hang()
	var wg sync.WaitGroup
	for i := range 3 {
		wg.Go(func() {
			if err := l.Record(context.Background(), event(i), event(i)); !errors.Is(err, identity.ErrUnavailable) {
				t.Errorf("recorded: %v", err)
			}
		})
	}
	wg.Wait()
	eventually(t, "it says so", func() bool { return l.Ready() != nil })
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	for i := range 2 * maxQueue {
		if err := l.Record(ctx, event(i)); err == nil {
			t.Fatal("recorded")
		}
		l.Note("x", Event{Action: AttestNode, Outcome: Refused, Who: Who{Kind: "agent", ID: strconv.Itoa(i)}})
	}
	l.mu.Lock()
	n, bytes := len(l.queue), l.bytes
	l.mu.Unlock()
	if n > maxQueue/2 || bytes > maxBytes/2 {
		t.Fatalf("%d calls wait", n)
	}
	f.release()
	eventually(t, "it goes on by itself", func() bool { return l.Record(context.Background(), event(1)) == nil })
	l.stop()
	wantClean(t, dir, nil)
	in, withdrawn := map[uint64]bool{}, map[uint64]bool{}
	for _, r := range find(t, dir, IssueX509) {
		in[r.Seq] = true
	}
	for _, r := range find(t, dir, LogWithdrawn) {
		first, _ := strconv.ParseUint(r.Details.Get("first"), 10, 64)
		last, _ := strconv.ParseUint(r.Details.Get("last"), 10, 64)
		for s := first; s <= last; s++ {
			withdrawn[s] = true
			if !in[s] {
				t.Errorf("record %d is withdrawn and is not an issuance", s)
			}
		}
	}
	if len(in)-len(withdrawn) != 1 || len(withdrawn) == 0 {
		t.Fatalf("%d issuances in the log, %d withdrawn: want one that stands", len(in), len(withdrawn))
	}
}

// TestHungForGood: the member stops all the same.
func TestHungForGood(t *testing.T) {
	f := &faulty{}
	l := start(t, privateDir(t), func(c *Config) { c.open, c.Deadline, c.stopTime = f.open, 10*time.Millisecond, 50*time.Millisecond })
	f.hang()
	if err := l.Record(context.Background(), event(1)); err == nil {
		t.Fatal("recorded")
	}
	if err := l.stop(); !errors.Is(err, identity.ErrUnavailable) {
		t.Fatalf("stopped with %v", err)
	}
	if err := l.Record(context.Background(), event(1)); !errors.Is(err, identity.ErrUnavailable) {
		t.Fatal(err)
	}
	f.release()
}

// TestFullDisk: the reserve is for saying so, and for refusals.
func TestFullDisk(t *testing.T) {
	dir := privateDir(t)
	f := &faulty{}
	l := start(t, dir, func(c *Config) { c.open = f.open })
	record(t, l.Log, 2)
	reserve := filepath.Join(dir, reserveName)
	f.set(func() { f.limited, f.room, f.reserve = true, 100, reserve })
	if err := l.Record(context.Background(), event(1)); !errors.Is(err, identity.ErrUnavailable) {
		t.Fatalf("recorded: %v", err)
	}
	if err := l.Ready(); err == nil || !bytes.Contains([]byte(err.Error()), []byte("full")) {
		t.Fatalf("ready: %v", err)
	}
	l.Note("PermissionDenied", Event{Action: IssueX509, Outcome: Refused, Reason: "on a full disk"})
	eventually(t, "the refusal is recorded in the reserve's room", func() bool { return len(l.durable(t, IssueX509)) == 3 })
	f.set(func() { f.limited = false })
	eventually(t, "it goes on by itself", func() bool { return l.Ready() == nil })
	record(t, l.Log, 1)
	if info, err := os.Stat(reserve); err != nil || info.Size() != MaxLine {
		t.Fatalf("the reserve: %v %v", info, err)
	}
	l.stop()
	wantClean(t, dir, nil)
	if len(find(t, dir, LogRecovered)) == 0 {
		t.Error("nothing says that it went on")
	}
	refused := 0
	for _, r := range find(t, dir, IssueX509) {
		if r.Outcome == Refused {
			refused++
		}
	}
	if refused != 1 {
		t.Errorf("%d refusals in the log", refused)
	}
}

// TestTornTail: a crash in the middle of a record. It is cut, and the next run says so.
func TestTornTail(t *testing.T) {
	for _, left := range []int{1, 50, 300} {
		dir := privateDir(t)
		l := start(t, dir)
		record(t, l.Log, 3)
		l.stop()
		path := filepath.Join(dir, fileName(1))
		raw, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		all := lines(t, dir)
		last := all[len(all)-1]
		if err := os.WriteFile(path, append(raw, last[:min(left, len(last)-1)]...), 0o600); err != nil {
			t.Fatal(err)
		}
		if rep := wantClean(t, dir, nil); rep.Torn == 0 {
			t.Error("verify does not see the torn line")
		}
		l = start(t, dir)
		record(t, l.Log, 1)
		l.stop()
		rep := wantClean(t, dir, nil)
		opened := find(t, dir, LogOpened)
		if rep.Torn != 0 || opened[0].Details.Get("cut_bytes") != "" || opened[1].Details.Get("cut_bytes") != strconv.Itoa(min(left, len(last)-1)) {
			t.Fatalf("%+v", opened[1])
		}
	}
}

// TestCrashLeavesEmptyFile: right after it was begun.
func TestCrashLeavesEmptyFile(t *testing.T) {
	dir := privateDir(t)
	l := start(t, dir)
	record(t, l.Log, 3)
	l.stop()
	n := uint64(len(lines(t, dir)))
	if err := os.WriteFile(filepath.Join(dir, fileName(n+1)), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	l = start(t, dir)
	record(t, l.Log, 1)
	l.stop()
	if rep := wantClean(t, dir, nil); rep.Last != n+3 {
		t.Fatalf("%+v", rep)
	}
}

// TestDamagedFile: nothing is taken away, the log goes on, and verify names the line.
func TestDamagedFile(t *testing.T) {
	for _, line := range []int{0, 2} {
		dir := privateDir(t)
		l := start(t, dir)
		record(t, l.Log, 4)
		l.stop()
		path := filepath.Join(dir, fileName(1))
		all := lines(t, dir)
		all[line] = append(bytes.Repeat([]byte{0}, len(all[line])-1), '\n')
		if err := os.WriteFile(path, bytes.Join(all, nil), 0o600); err != nil {
			t.Fatal(err)
		}
		l = start(t, dir)
		record(t, l.Log, 1)
		l.stop()
		rep, err := VerifyDir(dir, VerifyConfig{})
		if err != nil || len(rep.Faults) == 0 {
			t.Fatalf("%+v %v", rep, err)
		}
		if f := rep.Faults[0]; line == 2 && (f.Line != 3 || f.Seq != 3 || f.Kind != Altered) || line == 0 && f.Kind != Unreadable {
			t.Errorf("%+v", rep.Faults)
		}
		if o := find2(t, dir); o == "" {
			t.Error("the log does not say that it found damage")
		}
	}
}

// find2 is what the newest file's LogOpened says of damage; the others may not be readable.
func find2(t *testing.T, dir string) string {
	t.Helper()
	files, _ := listFiles(dir)
	raw, err := os.ReadFile(filepath.Join(dir, fileName(files[len(files)-1])))
	if err != nil {
		t.Fatal(err)
	}
	r, err := Parse(bytes.SplitAfter(raw, []byte{'\n'})[0])
	if err != nil || r.Action != LogOpened {
		t.Fatalf("%v %v", r, err)
	}
	return r.Details.Get("damaged")
}
