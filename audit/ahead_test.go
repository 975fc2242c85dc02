package audit

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
)

// TestZerosAheadAreNoPart: they are there while the log runs, and gone from a file that is full or closed.
func TestZerosAheadAreNoPart(t *testing.T) {
	dir := privateDir(t)
	l := start(t, dir, func(c *Config) { c.MaxSize = MaxLine })
	record(t, l.Log, 250)
	files, err := listFiles(dir)
	if err != nil || len(files) < 2 {
		t.Fatalf("%v %v", files, err)
	}
	tail := func(first uint64) int {
		t.Helper()
		raw, err := os.ReadFile(filepath.Join(dir, fileName(first)))
		if err != nil {
			t.Fatal(err)
		}
		return len(raw) - len(bytes.TrimRight(raw, "\x00"))
	}
	if n := tail(files[len(files)-1]); n == 0 {
		t.Error("nothing is written ahead")
	}
	if n := tail(files[0]); n != 0 {
		t.Errorf("%d zeros are left in a full file", n)
	}
	if rep := wantClean(t, dir, nil); rep.Records != 251 || rep.Torn != 0 {
		t.Errorf("while it runs: %+v", rep)
	}
	if got := l.durable(t, IssueX509); len(got) != 250 {
		t.Errorf("a query finds %d records", len(got))
	}
	l.stop()
	if n := tail(files[len(files)-1]); n != 0 {
		t.Errorf("%d zeros are left in a closed file", n)
	}
}

// TestCrashLeavesZeros: what a crash leaves of a group behind the last whole line, by which sectors got to the disk.
func TestCrashLeavesZeros(t *testing.T) {
	line := append(encode(event(1), nil), '\n')
	group := bytes.Repeat(line, 8)
	fill := func(at int) int { return sector - at%sector } // zeros up to the next sector
	for name, tc := range map[string]struct {
		left    func(size int) []byte
		cut     bool
		damaged bool
	}{
		"zeros":                       {left: func(int) []byte { return make([]byte, ahead) }},
		"one zero":                    {left: func(int) []byte { return make([]byte, 1) }},
		"half a line":                 {left: func(int) []byte { return line[:100] }, cut: true},
		"half a line before zeros":    {left: func(int) []byte { return append(bytes.Clone(line[:100]), make([]byte, ahead)...) }, cut: true},
		"all but the first sector":    {left: func(at int) []byte { return append(make([]byte, fill(at)), group[fill(at):]...) }, cut: true},
		"the last line alone":         {left: func(at int) []byte { return append(make([]byte, fill(at)+7*sector), line[100:]...) }, cut: true},
		"a byte in the zeros":         {left: func(int) []byte { b := make([]byte, ahead); b[ahead/3] = 4; return b }, cut: true},
		"zeros where a line was":      {left: func(at int) []byte { return append(make([]byte, fill(at)-1), group...) }, damaged: true},
		"a sector of a line and more": {left: func(at int) []byte { return append(append(bytes.Clone(line[:fill(at)%200]), 0), group...) }, damaged: true},
		"more than was ever in flight": {left: func(at int) []byte {
			return append(make([]byte, fill(at)), bytes.Repeat(group, 1+maxBytes/len(group))...)
		}, damaged: true},
	} {
		t.Run(name, func(t *testing.T) {
			dir := privateDir(t)
			l := start(t, dir)
			record(t, l.Log, 3)
			l.stop()
			path := filepath.Join(dir, fileName(1))
			raw, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			left := tc.left(len(raw))
			if err := os.WriteFile(path, append(raw, left...), 0o600); err != nil {
				t.Fatal(err)
			}
			l = start(t, dir)
			record(t, l.Log, 2)
			l.stop()
			if tc.damaged {
				if find2(t, dir) == "" {
					t.Error("the log does not say that it found damage")
				}
				if rep, err := VerifyDir(dir, VerifyConfig{}); err != nil || len(rep.Faults) == 0 {
					t.Errorf("%+v %v", rep, err)
				}
				return
			}
			if rep := wantClean(t, dir, nil); rep.Torn != 0 || rep.Records != 9 {
				t.Errorf("%+v", rep)
			}
			want := ""
			if tc.cut {
				want = strconv.Itoa(len(bytes.TrimRight(left, "\x00")))
			}
			if got := find(t, dir, LogOpened)[1].Details.Get("cut_bytes"); got != want {
				t.Errorf("cut %q bytes, want %q", got, want)
			}
		})
	}
}

// TestVerifyAndQueryWhileWriting: whoever reads along sees whole lines, never the zeros between.
func TestVerifyAndQueryWhileWriting(t *testing.T) {
	dir := privateDir(t)
	l := start(t, dir, func(c *Config) { c.MaxSize = 4 * MaxLine })
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			for i := range 150 {
				if err := l.Record(context.Background(), event(w), event(i), event(i)); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	written := make(chan struct{})
	go func() { wg.Wait(); close(written) }()
	for done := false; !done; {
		select {
		case <-written:
			done = true
		default:
		}
		wantClean(t, dir, nil)
		l.durable(t, IssueX509)
	}
	l.stop()
	wantClean(t, dir, nil)
}

// TestNoRoomAhead: the records have theirs.
func TestNoRoomAhead(t *testing.T) {
	dir := privateDir(t)
	f := &faulty{limited: true, room: 2 * MaxLine}
	l := start(t, dir, func(c *Config) { c.open, c.Reserve = f.open, MaxLine; f.room += margin })
	record(t, l.Log, 20)
	l.stop()
	if rep := wantClean(t, dir, nil); rep.Records != 22 {
		t.Errorf("%+v", rep)
	}
	if n := len(find(t, dir, LogFull)); n != 0 {
		t.Error("it says that the disk is full")
	}
}
