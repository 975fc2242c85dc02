package server

import (
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"countersign.io/countersign/identity"
)

// Strangers must not fill the log; what agents are refused, and what fails inside, is still seen, and so is how much is not.
func TestStrangersDoNotFillTheLog(t *testing.T) {
	w := newWorld(t)
	now := time.Now()
	w.srv.cfg.Now = func() time.Time { return now } // no time passes
	denied := fmt.Errorf("%w: no", identity.ErrDenied)
	lines := func(kind kind, level string) int {
		n := 0
		for line := range strings.Lines(w.log.String()) {
			if strings.Contains(line, "call refused") && strings.Contains(line, "level="+level) && strings.Contains(line, "caller=\""+kind.String()) {
				n++
			}
		}
		return n
	}
	const calls = 10 * strangerBurst
	for range calls {
		for _, k := range []kind{guest, workload, agent} {
			if err := w.srv.report(caller{kind: k}, "/x", denied); err == nil {
				t.Fatal("a refusal became a success")
			}
		}
	}
	if n := lines(guest, "INFO") + lines(workload, "INFO"); n != strangerBurst {
		t.Errorf("%d lines about strangers: want %d", n, strangerBurst)
	}
	if n := lines(agent, "INFO"); n != calls {
		t.Errorf("%d lines about agents: want all %d", n, calls)
	}
	for range calls {
		w.srv.report(caller{kind: guest}, "/x", io.EOF)
	}
	if n := lines(guest, "ERROR"); n != strangerBurst {
		t.Errorf("%d lines about faults: want %d, whatever was refused before", n, strangerBurst)
	}
	now = now.Add(time.Second)
	w.srv.report(caller{kind: guest}, "/x", denied)
	if want := fmt.Sprintf("left_out_before=%d", 2*calls-strangerBurst); !strings.Contains(w.log.String(), want) {
		t.Errorf("the log does not say %s", want)
	}
}
