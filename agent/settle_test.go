package agent

import (
	"context"
	"testing"
	"testing/synctest"
	"time"
)

// TestSettling: a burst is tidied up after once, when it is over, and a trickle never.
func TestSettling(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &Agent{}
		a.burst.init()
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- a.runSettler(ctx) }()
		for range settleBurst - 1 {
			a.burst.answered()
		}
		time.Sleep(time.Hour)
		if n := a.burst.answers.Load(); n != settleBurst-1 {
			t.Errorf("a trickle was taken for a burst: %d answers are left", n)
		}
		for range 3 { // as long as answers come, it is not over
			a.burst.answered()
			time.Sleep(settleQuiet - time.Millisecond)
		}
		if n := a.burst.answers.Load(); n != settleBurst+2 {
			t.Errorf("tidied up in the middle of a burst: %d answers are left", n)
		}
		time.Sleep(2*settleQuiet + time.Second)
		if n := a.burst.answers.Load(); n != 0 {
			t.Errorf("not tidied up after a burst: %d answers are left", n)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}
