package main

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// userHz is how many units of CPU time Linux reports per second, on every architecture (sysconf(_SC_CLK_TCK)).
const userHz = 100

// cpu is the CPU time that the processes have used, user and system, all threads, as the kernel accounts for it.
func cpu(pids ...int) (time.Duration, error) {
	var ticks int64
	for _, pid := range pids {
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			return 0, fmt.Errorf("reading CPU time: %w", err)
		}
		// Behind the name, which may hold anything, comes field 3; utime and stime are 14 and 15.
		f := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
		if len(f) < 13 {
			return 0, fmt.Errorf("reading CPU time: /proc/%d/stat has %d fields", pid, len(f))
		}
		for _, s := range f[11:13] {
			n, err := strconv.ParseInt(s, 10, 64)
			if err != nil {
				return 0, fmt.Errorf("reading CPU time: %w", err)
			}
			ticks += n
		}
	}
	return time.Duration(ticks) * time.Second / userHz, nil
}

// memory is what a process has in RAM, in MiB: all of it, and the part that is its own and not of a file.
type memory struct{ rss, anon, peak float64 }

func memoryOf(pid int) (memory, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return memory{}, fmt.Errorf("reading memory: %w", err)
	}
	var m memory
	for line := range strings.SplitSeq(string(data), "\n") {
		f := strings.Fields(line)
		if len(f) != 3 {
			continue
		}
		kib, err := strconv.ParseFloat(f[1], 64)
		if err != nil {
			continue
		}
		switch f[0] {
		case "VmRSS:":
			m.rss = kib / 1024
		case "RssAnon:":
			m.anon = kib / 1024
		case "VmHWM:":
			m.peak = kib / 1024
		}
	}
	if m.rss == 0 {
		return m, fmt.Errorf("reading memory: /proc/%d/status has no VmRSS", pid)
	}
	return m, nil
}

// stolen is the share of the machine's CPU time since boot that it waited for its host, and all CPU time.
func stolen() (steal, total float64) {
	data, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, 0
	}
	line, _, _ := strings.Cut(string(data), "\n")
	for i, s := range strings.Fields(line) {
		n, err := strconv.ParseFloat(s, 64)
		if err != nil || i > 8 { // guest time is part of user time
			continue
		}
		total += n
		if i == 8 {
			steal = n
		}
	}
	return steal, total
}

// spread is what is told of many samples.
type spread struct{ p50, p99, min, max float64 }

func spreadOf(samples []float64) spread {
	if len(samples) == 0 {
		return spread{}
	}
	s := slices.Sorted(slices.Values(samples))
	at := func(q float64) float64 { return s[min(int(q*float64(len(s))), len(s)-1)] }
	return spread{p50: at(0.5), p99: at(0.99), min: s[0], max: s[len(s)-1]}
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
func us(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }

// meter tells what a P-256 signature costs while something else is measured: two hardware threads of one core, or a host that
// is shared, make every figure of CPU time larger when others are busy, and this one alike.
type meter struct {
	stop    chan struct{}
	samples chan []float64
}

func startMeter() *meter {
	m := &meter{stop: make(chan struct{}), samples: make(chan []float64, 1)}
	go func() {
		runtime.LockOSThread() // its CPU time is this goroutine's alone
		defer runtime.UnlockOSThread()
		var samples []float64
		defer func() { m.samples <- samples }()
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return
		}
		var sum [32]byte
		tick := time.NewTicker(25 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-m.stop:
				return
			case <-tick.C:
			}
			const rounds = 8
			var before, after unix.Timespec
			if unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &before) != nil {
				return
			}
			for range rounds {
				_, _ = ecdsa.SignASN1(rand.Reader, key, sum[:])
			}
			if unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &after) != nil {
				return
			}
			samples = append(samples, us(time.Duration(after.Nano()-before.Nano()))/rounds)
		}
	}()
	return m
}

// signature ends the measurement: microseconds of CPU per signature, the median; 0 if it could not be told.
func (m *meter) signature() float64 {
	close(m.stop)
	return spreadOf(<-m.samples).p50
}
