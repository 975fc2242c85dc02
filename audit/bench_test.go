package audit

import (
	"context"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func cpuTime() time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// benchmarkRecord measures what a caller waits for, and what CPU the process spends for each record, the writes and syncs
// included.
func benchmarkRecord(b *testing.B, callers, batch int) {
	dir, err := os.MkdirTemp(".", "bench-*") // the disk, not a tmpfs
	if err != nil {
		b.Fatal(err)
	}
	defer os.RemoveAll(dir)
	s := newSigner(b, "m1")
	l := start(b, filepath.Join(dir, "audit"), func(c *Config) { c.Sign, c.Reserve = s.sign, 1<<20 })
	var next atomic.Int64
	waits := make([][]time.Duration, callers)
	runtime.GC()
	cpu := cpuTime()
	b.ResetTimer()
	var wg sync.WaitGroup
	for c := range callers {
		wg.Go(func() {
			events := make([]Event, batch)
			for {
				i := int(next.Add(int64(batch)))
				if i > b.N+batch {
					return
				}
				for k := range events {
					events[k] = event(i + k)
				}
				t := time.Now()
				if err := l.Record(context.Background(), events...); err != nil {
					b.Error(err)
					return
				}
				waits[c] = append(waits[c], time.Since(t))
			}
		})
	}
	wg.Wait()
	b.StopTimer()
	used := cpuTime() - cpu
	all := slices.Concat(waits...)
	slices.Sort(all)
	b.ReportMetric(float64(used.Nanoseconds())/float64(b.N)/1000, "cpu-us/record")
	b.ReportMetric(float64(all[len(all)/2].Microseconds())/1000, "p50-ms")
	b.ReportMetric(float64(all[len(all)*99/100].Microseconds())/1000, "p99-ms")
	l.stop()
}

func BenchmarkRecord(b *testing.B) {
	b.Run("callers=1", func(b *testing.B) { benchmarkRecord(b, 1, 1) })
	b.Run("callers=8", func(b *testing.B) { benchmarkRecord(b, 8, 1) })
	b.Run("callers=64", func(b *testing.B) { benchmarkRecord(b, 64, 1) })
	b.Run("callers=8,batch=50", func(b *testing.B) { benchmarkRecord(b, 8, 50) })
}

// BenchmarkEncode is the part of the caller: the line but for its place in the chain.
func BenchmarkEncode(b *testing.B) {
	e := event(1)
	e.Time = time.Now()
	var buf []byte
	b.ReportAllocs()
	for b.Loop() {
		buf = appendBody(buf[:0], "m1", &e, nil)
	}
	b.SetBytes(int64(len(buf)))
}
