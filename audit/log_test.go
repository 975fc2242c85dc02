package audit

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"countersign.io/countersign/identity"
)

func TestRecordsAreChainedSignedAndFound(t *testing.T) {
	dir, s := privateDir(t), newSigner(t, "m1")
	l := start(t, dir, func(c *Config) { c.Sign, c.CheckpointRecords = s.sign, 10 })
	record(t, l.Log, 25)
	if err := l.stop(); err != nil {
		t.Fatal(err)
	}
	rep := wantClean(t, dir, s)
	if rep.Records < 28 || rep.Checkpoints < 3 || rep.Unsigned != 0 || rep.Signed != rep.Last-1 {
		t.Fatalf("%+v", rep)
	}
	all := records(t, dir)
	if all[0].Action != LogOpened || all[len(all)-2].Action != LogClosed || all[len(all)-1].Action != LogCheckpoint {
		t.Fatal("it does not begin with opened, or end with closed and a checkpoint")
	}
	got := find(t, dir, IssueX509)[7]
	if got.RequestID != "q-7" || got.Subjects[0] != "spiffe://example.org/w/7" || got.EntryRevision != 3 || got.Details.Get("b") != "2" || got.Who.Address != "10.0.0.1:999" || !got.NotAfter.Equal(time.Unix(1800000000, 0)) {
		t.Fatalf("%+v", got)
	}
	for _, name := range []string{"", fileName(1), "lock", reserveName} {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil || info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%q: %v, %v", name, info.Mode(), err)
		}
	}
}

// TestChainGoesOnOverRestarts: and over files.
func TestChainGoesOnOverRestarts(t *testing.T) {
	dir := privateDir(t)
	for range 3 {
		l := start(t, dir, func(c *Config) { c.MaxSize = MaxLine })
		record(t, l.Log, 150)
		if err := l.stop(); err != nil {
			t.Fatal(err)
		}
	}
	if files, _ := listFiles(dir); len(files) < 3 {
		t.Fatalf("only %d files", len(files))
	}
	if rep := wantClean(t, dir, nil); rep.Records != 3*152 || rep.First != 1 || rep.Last != rep.Records {
		t.Fatalf("%+v", rep)
	}
}

// TestManyCallersShareOneSync: a group is one write.
func TestManyCallersShareOneSync(t *testing.T) {
	dir := privateDir(t)
	d := &faulty{}
	l := start(t, dir, func(c *Config) { c.open = d.open })
	d.hang()
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := l.Record(context.Background(), event(1)); err != nil {
			t.Error(err)
		}
	})
	eventually(t, "one is being written", func() bool { l.mu.Lock(); defer l.mu.Unlock(); return !l.busy.IsZero() && len(l.queue) == 0 })
	for i := range 100 {
		wg.Go(func() {
			if err := l.Record(context.Background(), event(i), event(i+1)); err != nil {
				t.Error(err)
			}
		})
	}
	eventually(t, "they wait", func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		return len(l.queue) == 100
	})
	before := d.syncs.Load()
	d.release()
	wg.Wait()
	if n := d.syncs.Load() - before; n > 3 {
		t.Fatalf("%d syncs for 100 calls", n)
	}
	l.stop()
	wantClean(t, dir, nil)
}

func TestNewRefuses(t *testing.T) {
	dir := privateDir(t)
	for name, c := range map[string]Config{
		"no member":           {Dir: dir},
		"no sink":             {Member: "m1"},
		"best effort only":    {Member: "m1", Outputs: []Output{{Name: "x", Sink: Stream(nil)}}},
		"nameless output":     {Member: "m1", Dir: dir, Outputs: []Output{{Sink: Stream(nil)}}},
		"a small file":        {Member: "m1", Dir: dir, MaxSize: 10},
		"no folder above":     {Member: "m1", Dir: filepath.Join(dir, "a", "b")},
		"a negative deadline": {Member: "m1", Dir: dir, Deadline: -1},
	} {
		if l, err := New(c); err == nil {
			t.Errorf("%s: no error", name)
			l.files.close()
		}
	}
	l, err := New(Config{Member: "m1", Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := New(Config{Member: "m1", Dir: dir}); err == nil {
		t.Error("two logs in one folder")
	}
	if err := l.Record(context.Background(), event(1)); !errors.Is(err, identity.ErrUnavailable) {
		t.Errorf("recorded before Run: %v", err)
	}
	if l.Ready() == nil {
		t.Error("ready before Run")
	}
	l.files.close()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := New(Config{Member: "m1", Dir: dir}); err == nil {
		t.Error("others can read the folder")
	}
}

func TestRetention(t *testing.T) {
	dir := privateDir(t)
	l := start(t, dir, func(c *Config) { c.MaxSize, c.KeepBytes = MaxLine, 3*MaxLine })
	for range 10 {
		record(t, l.Log, 120)
	}
	eventually(t, "old files go", func() bool { return len(l.durable(t, LogRemoved)) > 0 })
	l.stop()
	files, err := listFiles(dir)
	if err != nil || len(files) == 0 || files[0] == 1 {
		t.Fatalf("%v %v", files, err)
	}
	rep := wantClean(t, dir, nil)
	if rep.Removed != files[0]-1 {
		t.Fatalf("it says that %d were removed, the first file begins with %d", rep.Removed, files[0])
	}
	// One more that retention did not take.
	if err := os.Remove(filepath.Join(dir, fileName(files[0]))); err != nil {
		t.Fatal(err)
	}
	rep, err = VerifyDir(dir, VerifyConfig{})
	if err != nil || len(rep.Faults) != 1 || rep.Faults[0].Kind != Dropped || rep.Faults[0].Seq != files[0] || rep.Faults[0].To != files[1]-1 {
		t.Fatalf("%+v %v", rep.Faults, err)
	}
}

// TestRetentionKeepsRoomOnTheDisk: without a bound in bytes, the oldest files go before the file system is full.
func TestRetentionKeepsRoomOnTheDisk(t *testing.T) {
	for name, c := range map[string]struct {
		size int64
		want func(files []uint64) bool
	}{
		"a small disk":   {5 * MaxLine, func(files []uint64) bool { return len(files) > 2 && len(files) <= 4 && files[0] > 1 }},
		"a tiny one":     {100, func(files []uint64) bool { return len(files) == 2 }}, // the current one and the one before
		"a large one":    {1 << 40, func(files []uint64) bool { return len(files) > 4 && files[0] == 1 }},
		"one of no size": {0, func(files []uint64) bool { return len(files) > 4 && files[0] == 1 }},
	} {
		t.Run(name, func(t *testing.T) {
			dir := privateDir(t)
			l := start(t, dir, func(conf *Config) {
				conf.MaxSize, conf.space = MaxLine, func(string) (int64, error) { return c.size, nil }
			})
			for range 10 {
				record(t, l.Log, 120)
			}
			eventually(t, "what is beyond it goes", func() bool {
				files, err := listFiles(dir)
				return err == nil && c.want(files)
			})
			l.stop()
			wantClean(t, dir, nil)
		})
	}
	broken := Config{Member: "m1", Dir: privateDir(t), space: func(string) (int64, error) { return 0, os.ErrInvalid }}
	if _, err := New(broken); !errors.Is(err, os.ErrInvalid) {
		t.Errorf("a file system that does not answer: %v", err)
	}
	if size, err := fileSystem(t.TempDir()); err != nil || size <= 0 {
		t.Errorf("the file system of the tests has %d bytes, %v", size, err)
	}
}

func TestFloodsAreCounted(t *testing.T) {
	dir := privateDir(t)
	now := time.Now()
	l := start(t, dir, func(c *Config) { c.Now = func() time.Time { return now } }) // no interval ends before the log does
	refused := func(n int, who Who) {
		for i := range n {
			l.Note("Unauthenticated", Event{Action: AttestNode, Outcome: Refused, Who: who, Reason: fmt.Sprintf("made up %d", i)})
		}
	}
	for port := range 500 {
		refused(20, Who{Kind: "guest", Address: fmt.Sprintf("10.1.2.3:%d", port+1)})
	}
	refused(20, Who{Kind: "guest", Address: "[2001:db8::1]:1"})
	refused(20, Who{Kind: "guest", Address: "[2001:db8::2]:1"})
	refused(60, Who{Kind: "agent", ID: "spiffe://example.org/countersign/agent/a"})
	for i := range floodKeys + 5000 {
		refused(1, Who{Kind: "guest", Address: fmt.Sprintf("10.%d.%d.9:1", 100+i/256, i%256)})
	}
	for range 2 * floodKnown {
		l.Note("Unavailable", Event{Action: RenewAgent, Outcome: Failed, Who: Who{Kind: "agent", ID: "a"}})
	}
	for range floodKnown {
		l.Note("", Event{Action: RenewAgent, Outcome: Failed, Who: Who{Kind: "operator", UID: "0"}})
	}
	if n := len(l.flood.counts); n > floodKeys+10 {
		t.Fatalf("the table has %d keys", n)
	}
	l.stop()
	wantClean(t, dir, nil)
	if n := len(find(t, dir, RenewAgent)); n != 2*floodKnown+1 {
		t.Errorf("%d records of failures", n)
	}
	full, counted := map[string]int{}, map[string]uint64{}
	total, all := 0, uint64(0)
	for _, r := range find(t, dir, AttestNode) {
		who := r.Who.ID
		if r.Who.Kind == "guest" {
			who = hostOf(r.Who.Address)
			if r.Count > 0 {
				who = r.Who.Address
			}
		}
		all += max(r.Count, 1)
		if r.Count > 0 {
			counted[who] += r.Count
			continue
		}
		full[who]++
		if r.Who.Kind == "guest" {
			total++
		}
	}
	if full["10.1.2.3"] != floodStranger || counted["10.1.2.3"] != 10000-floodStranger {
		t.Errorf("one address: %d in full, %d counted", full["10.1.2.3"], counted["10.1.2.3"])
	}
	if full["2001:db8::/64"] != floodStranger || counted["2001:db8::/64"] != 40-floodStranger {
		t.Errorf("one network: %d in full, %d counted", full["2001:db8::/64"], counted["2001:db8::/64"])
	}
	agent := "spiffe://example.org/countersign/agent/a"
	if full[agent] != floodKnown || counted[agent] != 60-floodKnown {
		t.Errorf("an agent: %d in full, %d counted", full[agent], counted[agent])
	}
	if total > floodTotal {
		t.Errorf("strangers have %d records", total)
	}
	if want := uint64(10000 + 40 + 60 + floodKeys + 5000); all != want {
		t.Errorf("%d refusals in all: want %d", all, want)
	}
}

func TestQuery(t *testing.T) {
	dir := privateDir(t)
	l := start(t, dir, func(c *Config) { c.MaxSize = MaxLine })
	record(t, l.Log, 300)
	if err := l.Record(context.Background(), Event{Action: "admin.ban_agent", Outcome: Attempted, Who: Who{Kind: "operator", UID: "0"}, Subjects: []string{"spiffe://example.org/bad"}}); err != nil {
		t.Fatal(err)
	}
	query := func(q Query) (out []string) {
		t.Helper()
		if err := l.Query(context.Background(), q, func(line []byte) error { out = append(out, string(line)); return nil }); err != nil {
			t.Fatal(err)
		}
		return out
	}
	if got := query(Query{}); len(got) != 302 {
		t.Errorf("%d lines in all", len(got))
	}
	if got := query(Query{Tail: 2}); len(got) != 2 || !strings.Contains(got[1], "ban_agent") || !strings.Contains(got[0], "q-299") {
		t.Errorf("tail: %v", got)
	}
	if got := query(Query{Tail: 250, Filter: Filter{Actions: []Action{"issue."}}}); len(got) != 250 || !strings.Contains(got[0], `"q-50"`) {
		t.Errorf("tail over files: %d", len(got))
	}
	for name, tc := range map[string]struct {
		f Filter
		n int
	}{
		"action":  {Filter{Actions: []Action{"admin.ban_agent"}}, 1},
		"outcome": {Filter{Outcome: Attempted}, 1},
		"who":     {Filter{Who: "agent/kube"}, 300},
		"subject": {Filter{Subject: "example.org/bad"}, 1},
		"request": {Filter{Subject: "q-299"}, 1},
		"since":   {Filter{Since: time.Now().Add(time.Hour)}, 0},
		"until":   {Filter{Until: time.Now().Add(-time.Hour)}, 0},
		"both":    {Filter{Since: time.Now().Add(-time.Hour), Until: time.Now().Add(time.Hour)}, 302},
	} {
		if got := query(Query{Filter: tc.f}); len(got) != tc.n {
			t.Errorf("%s: %d records, want %d", name, len(got), tc.n)
		}
	}
	if err := l.Query(context.Background(), Query{Tail: MaxTail + 1}, nil); !errors.Is(err, identity.ErrInvalid) {
		t.Errorf("too long a tail: %v", err)
	}
	stop := errors.New("enough")
	if err := l.Query(context.Background(), Query{}, func([]byte) error { return stop }); !errors.Is(err, stop) {
		t.Errorf("the reader's error: %v", err)
	}
}

// TestFollowOverRotation: a slow reader loses nothing, and holds up nobody.
func TestFollowOverRotation(t *testing.T) {
	dir := privateDir(t)
	l := start(t, dir, func(c *Config) { c.MaxSize = MaxLine })
	record(t, l.Log, 5)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	v := NewVerifier(VerifyConfig{})
	gate := make(chan struct{})
	seen := make(chan uint64, 10000)
	done := make(chan error, 1)
	go func() {
		n := 0
		done <- l.Query(ctx, Query{Follow: true}, func(line []byte) error {
			if n++; n == 10 {
				<-gate
			}
			v.Line("stream", n, line)
			seen <- v.last.seq
			return nil
		})
	}()
	record(t, l.Log, 600) // while the reader stands
	close(gate)
	for last := uint64(0); last < 606; {
		select {
		case last = <-seen:
		case <-time.After(patience):
			t.Fatalf("only %d records came", last)
		}
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if r := v.Done(); r.Records != 606 || len(r.Faults) > 0 {
		t.Fatalf("%+v", r)
	}
}

func TestQueryWithoutFiles(t *testing.T) {
	l := start(t, "", func(c *Config) {
		c.Outputs = []Output{{Name: "stdout", Required: true, Sink: Stream(&strings.Builder{})}}
	})
	if err := l.Query(context.Background(), Query{}, nil); !errors.Is(err, identity.ErrPrecondition) {
		t.Fatal(err)
	}
}
