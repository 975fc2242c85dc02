package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"time"
)

// progress tells how far a long work has come: a bar on a terminal, now and then a line elsewhere.
type progress struct {
	w     io.Writer
	what  string
	bar   bool
	first time.Time
	last  time.Time
	shown bool
	done  int64
	all   int64
}

const (
	barEvery  = 100 * time.Millisecond
	lineEvery = 5 * time.Second
)

func newProgress(w io.Writer, what string) *progress {
	f, ok := w.(*os.File)
	now := time.Now()
	return &progress{w: w, what: what, bar: ok && isTerminal(f), first: now, last: now}
}

// at notes that done of all bytes are done; all is 0 while it is not known.
func (p *progress) at(done, all int64) {
	p.done, p.all = done, all
	every := lineEvery
	if p.bar {
		every = barEvery
	}
	if now := time.Now(); now.Sub(p.last) >= every {
		p.last = now
		p.show(now)
	}
}

func (p *progress) show(now time.Time) {
	p.shown = true
	rate := float64(p.done) / (1 << 20) / max(now.Sub(p.first).Seconds(), 0.001)
	if !p.bar {
		fmt.Fprintf(p.w, "%s: %s of %s, %.0f MiB/s\n", p.what, bytesOf(p.done), bytesOf(p.all), rate)
		return
	}
	const width = 30
	part := 0.0
	if p.all > 0 {
		part = min(float64(p.done)/float64(p.all), 1)
	}
	n := int(part * width)
	fmt.Fprintf(p.w, "\r%s [%s%s] %3.0f%% %s %.0f MiB/s \x1b[K", p.what, strings.Repeat("#", n), strings.Repeat(".", width-n), 100*part, bytesOf(p.done), rate)
}

// end leaves a terminal's line for what is printed next.
func (p *progress) end() {
	if p.bar && p.shown {
		p.show(time.Now())
		fmt.Fprintln(p.w)
	}
}

// rewound reads f from its beginning and tells how far it is.
func (p *progress) rewound(f *os.File) (io.Reader, error) {
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return nil, fmt.Errorf("reading the backup: %w", err)
	}
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("reading the backup: %w", err)
	}
	return &watched{r: f, p: p, all: info.Size()}, nil
}

// watched is a reader with progress.
type watched struct {
	r   io.Reader
	p   *progress
	n   int64
	all int64
}

func (r *watched) Read(b []byte) (int, error) {
	n, err := r.r.Read(b)
	r.n += int64(n)
	r.p.at(r.n, r.all)
	return n, err
}

// working says that something is being waited for whose end nobody can foresee: on a terminal at once, elsewhere a line now and then.
// The func that it returns ends that.
func working(w io.Writer, what string) (stop func()) {
	f, ok := w.(*os.File)
	return workingEvery(w, what, ok && isTerminal(f), barEvery, lineEvery)
}

func workingEvery(w io.Writer, what string, bar bool, quick, slow time.Duration) (stop func()) {
	every := slow
	if bar {
		every = quick
	}
	ended, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		tick := time.NewTicker(every)
		defer tick.Stop()
		began, shown := time.Now(), false
		for {
			select {
			case <-ended:
				if bar && shown {
					fmt.Fprint(w, "\r\x1b[K")
				}
				return
			case <-tick.C:
			}
			shown = true
			if since := time.Since(began); bar {
				fmt.Fprintf(w, "\r%s: %.1f s \x1b[K", what, since.Seconds())
			} else {
				fmt.Fprintf(w, "%s: %.0f s\n", what, since.Seconds())
			}
		}
	}()
	return func() {
		close(ended)
		<-done
	}
}
