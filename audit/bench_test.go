package audit

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
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

// events are made before the clock runs: what they hold is there anyway when something is issued.
func events() []Event {
	out := make([]Event, 4096)
	for i := range out {
		out[i] = event(i)
	}
	return out
}

// memberHeap is about what a member that does nothing else has alive: with less, the collector ran many times as often as in a member.
const memberHeap = 16 << 20

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
	ready, heap := events(), make([]byte, memberHeap)
	defer runtime.KeepAlive(heap)
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
					events[k] = ready[(i+k)%len(ready)]
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
	reportRecords(b, used, b.N, all)
	l.stop()
}

// reportRecords reports what CPU each record took, and how long its callers waited.
func reportRecords(b *testing.B, cpu time.Duration, records int, waits []time.Duration) {
	slices.Sort(waits)
	b.ReportMetric(float64(cpu.Nanoseconds())/float64(records)/1000, "cpu-us/record")
	b.ReportMetric(float64(waits[len(waits)/2].Microseconds())/1000, "p50-ms")
	b.ReportMetric(float64(waits[len(waits)*99/100].Microseconds())/1000, "p99-ms")
}

// benchmarkSync is what the disk alone takes for a record: one write into zeros that are there, and one sync. No log can wait less.
func benchmarkSync(b *testing.B) {
	f, err := os.CreateTemp(".", "bench-*")
	if err != nil {
		b.Fatal(err)
	}
	defer os.Remove(f.Name())
	defer f.Close()
	if _, err := f.Write(make([]byte, 1<<20)); err != nil {
		b.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		b.Fatal(err)
	}
	line := make([]byte, 640)
	var all []time.Duration
	cpu := cpuTime()
	for i := 0; b.Loop(); i++ {
		t := time.Now()
		if _, err := f.WriteAt(line, int64(i%1600*len(line))); err != nil {
			b.Fatal(err)
		}
		if err := unix.Fdatasync(int(f.Fd())); err != nil {
			b.Fatal(err)
		}
		all = append(all, time.Since(t))
	}
	used := cpuTime() - cpu
	reportRecords(b, used, len(all), all)
}

func BenchmarkRecord(b *testing.B) {
	b.Run("sync alone", benchmarkSync)
	b.Run("callers=1", func(b *testing.B) { benchmarkRecord(b, 1, 1) })
	b.Run("callers=8", func(b *testing.B) { benchmarkRecord(b, 8, 1) })
	b.Run("callers=16", func(b *testing.B) { benchmarkRecord(b, 16, 1) })
	b.Run("callers=24", func(b *testing.B) { benchmarkRecord(b, 24, 1) })
	b.Run("callers=32", func(b *testing.B) { benchmarkRecord(b, 32, 1) })
	b.Run("callers=64", func(b *testing.B) { benchmarkRecord(b, 64, 1) })
	b.Run("callers=8,batch=50", func(b *testing.B) { benchmarkRecord(b, 8, 50) })
}

// BenchmarkIssuance is what the log adds to issuing: callers that sign, one record for each signature, against the same callers
// without a log. Their rate is what the cores give, so it is the most that a member can issue.
func BenchmarkIssuance(b *testing.B) {
	for _, callers := range []int{8, 64} {
		for _, batch := range []int{1, 50} {
			b.Run(fmt.Sprintf("callers=%d,batch=%d", callers, batch), func(b *testing.B) { benchmarkIssuance(b, callers, batch) })
		}
	}
}

func benchmarkIssuance(b *testing.B, callers, batch int) {
	dir, err := os.MkdirTemp(".", "bench-*") // the disk, not a tmpfs
	if err != nil {
		b.Fatal(err)
	}
	defer os.RemoveAll(dir)
	s := newSigner(b, "m1")
	l := start(b, filepath.Join(dir, "audit"), func(c *Config) { c.Sign, c.Reserve = s.sign, 1<<20 })
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		b.Fatal(err)
	}
	digest := sha256.Sum256([]byte("a certificate"))
	ready, heap := events(), make([]byte, memberHeap)
	defer runtime.KeepAlive(heap)
	issue := func(record func(context.Context, ...Event) error) (cpu time.Duration, p99 time.Duration) {
		var next atomic.Int64
		waits := make([][]time.Duration, callers)
		runtime.GC()
		before := cpuTime()
		var wg sync.WaitGroup
		for c := range callers {
			wg.Go(func() {
				events := make([]Event, batch)
				for {
					i := int(next.Add(int64(batch)))
					if i > b.N+batch {
						return
					}
					t := time.Now()
					for k := range events {
						if _, err := key.Sign(rand.Reader, digest[:], crypto.SHA256); err != nil {
							b.Error(err)
							return
						}
						events[k] = ready[(i+k)%len(ready)]
					}
					if err := record(context.Background(), events...); err != nil {
						b.Error(err)
						return
					}
					waits[c] = append(waits[c], time.Since(t))
				}
			})
		}
		wg.Wait()
		all := slices.Concat(waits...)
		slices.Sort(all)
		return cpuTime() - before, all[len(all)*99/100]
	}
	b.ResetTimer()
	without, p99Without := issue(func(context.Context, ...Event) error { return nil })
	with, p99 := issue(l.Record)
	b.StopTimer()
	b.ReportMetric(float64((with-without).Nanoseconds())/float64(b.N)/1000, "added-cpu-us/record")
	b.ReportMetric(float64((p99-p99Without).Microseconds())/1000, "added-p99-ms")
	b.ReportMetric(float64(p99Without.Microseconds())/1000, "p99-without-ms")
	b.ReportMetric(float64(without.Nanoseconds())/float64(b.N)/1000, "cpu-us/signature")
	l.stop()
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
