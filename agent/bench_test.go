package agent

import (
	"context"
	"fmt"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	nodev1 "countersign.io/countersign/api/node/v1"
)

// BenchmarkStart is an agent's start with so many workloads that ask at once: keys, questions, answers verified. The
// fake member signs in the same process, with x509.CreateCertificate twice over.
func BenchmarkStart(b *testing.B) {
	for _, n := range []int{1, 5000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			c := newCluster(b)
			c.member("a")
			for i := range n {
				c.grant(fmt.Sprint(i), testGrant{entry: fmt.Sprint("e", i), id: fmt.Sprintf("spiffe://example.org/ns/default/sa/%d", i)})
			}
			for b.Loop() {
				a := run(b, c.config())
				before := heapBytes()
				began := time.Now()
				var wg sync.WaitGroup
				ctx, cancel := context.WithTimeout(b.Context(), time.Minute)
				for i := range n {
					wg.Go(func() {
						if _, err := a.Current(ctx, caller(fmt.Sprint(i))); err != nil {
							b.Error(err)
						}
					})
				}
				wg.Wait()
				cancel()
				b.ReportMetric(time.Since(began).Seconds(), "s/start")
				c.locked(func() { c.tokens, c.batches, c.acks, c.watched = nil, nil, nil, map[uint64]*nodev1.Watch_Workload{} })
				b.ReportMetric(float64(heapBytes()-before)/float64(n), "heap-B/identity")
				a.halt()
			}
		})
	}
}

func heapBytes() int64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// BenchmarkRestore is a restart with so many SVIDs in the state dir.
func BenchmarkRestore(b *testing.B) {
	const n = 5000
	c := newCluster(b)
	m := c.member("a")
	cfg := c.config()
	cfg.StateDir = memoryDir(b)
	a := run(b, cfg)
	var wg sync.WaitGroup
	for i := range n {
		c.grant(fmt.Sprint(i), web())
		wg.Go(func() { current(b, a.Agent, caller(fmt.Sprint(i))) })
	}
	wg.Wait()
	a.halt()
	m.stop()
	for b.Loop() {
		a := run(b, cfg)
		current(b, a.Agent, caller("0"))
		if got := a.Status().Workloads; got != n {
			b.Fatalf("%d workloads", got)
		}
		a.halt()
	}
}

func BenchmarkCurrent(b *testing.B) {
	c := newCluster(b)
	c.member("a")
	c.grant("web", web())
	a := run(b, c.config())
	current(b, a.Agent, caller("web"))
	for b.Loop() {
		if _, err := a.Current(b.Context(), caller("web")); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkFetchJWT(b *testing.B) {
	c := newCluster(b)
	c.member("a")
	c.grant("web", web())
	a := run(b, c.config())
	for b.Loop() {
		if _, err := a.FetchJWT(b.Context(), caller("web"), []string{"db"}, spiffeid.ID{}); err != nil {
			b.Fatal(err)
		}
	}
}
