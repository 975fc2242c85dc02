package main

import (
	"strings"
	"sync"
	"testing"
	"time"
)

// lines is a writer that tells of each write.
type lines struct {
	mu  sync.Mutex
	all strings.Builder
	n   chan struct{}
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	l.all.Write(p)
	l.mu.Unlock()
	select {
	case l.n <- struct{}{}:
	default:
	}
	return len(p), nil
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.all.String()
}

func TestWorking(t *testing.T) {
	for _, bar := range []bool{true, false} {
		w := &lines{n: make(chan struct{}, 1)}
		stop := workingEvery(w, "asking", bar, time.Millisecond, time.Millisecond)
		<-w.n
		stop()
		got := w.String()
		if !strings.Contains(got, "asking: 0") || strings.Contains(got, "\x1b") != bar || strings.HasSuffix(got, "\n") == bar {
			t.Errorf("bar %t: %q", bar, got)
		}
		if bar && !strings.HasSuffix(got, "\r\x1b[K") {
			t.Errorf("the terminal's line is left as it was: %q", got)
		}
	}
	w := &lines{n: make(chan struct{}, 1)}
	workingEvery(w, "asking", false, time.Hour, time.Hour)()
	if got := w.String(); got != "" {
		t.Errorf("what is done at once says %q", got)
	}
}
