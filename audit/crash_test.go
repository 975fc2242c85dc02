package audit

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

const crashEnv = "COUNTERSIGN_AUDIT_CRASH_DIR"

// TestMain is also the process that TestKilledAnywhere kills.
func TestMain(m *testing.M) {
	if dir := os.Getenv(crashEnv); dir != "" {
		if err := recordForever(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// recordForever tells the number of each event once it is recorded.
func recordForever(dir string) error {
	l, err := New(Config{Member: "m1", Dir: dir, Reserve: MaxLine, MaxSize: MaxLine, Deadline: time.Minute})
	if err != nil {
		return err
	}
	go l.Run(context.Background())
	for l.Ready() != nil {
	}
	var mu sync.Mutex
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			for i := 0; ; i++ {
				id := fmt.Sprintf("%d-%d-%d", os.Getpid(), w, i)
				if l.Record(context.Background(), Event{Action: IssueX509, Outcome: OK, RequestID: id}) != nil {
					return
				}
				mu.Lock()
				fmt.Println(id)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	return nil
}

// TestKilledAnywhere: what was acknowledged is there after kill -9, and the chain is whole over all runs.
func TestKilledAnywhere(t *testing.T) {
	dir := privateDir(t)
	told := map[string]bool{}
	for run := range 8 {
		cmd := exec.Command(os.Args[0], "-test.run=^$")
		cmd.Env = append(os.Environ(), crashEnv+"="+dir)
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		s := bufio.NewScanner(out)
		for n := 0; s.Scan(); n++ {
			told[s.Text()] = true
			if n == 30+37*run {
				if err := cmd.Process.Signal(syscall.SIGKILL); err != nil {
					t.Fatal(err)
				}
			}
		}
		cmd.Wait()
	}
	l := start(t, dir)
	l.stop()
	wantClean(t, dir, nil)
	there := map[string]bool{}
	for _, r := range find(t, dir, IssueX509) {
		there[r.RequestID] = true
	}
	if len(told) < 200 {
		t.Fatalf("only %d were acknowledged", len(told))
	}
	for id := range told {
		if !there[id] {
			// The last line of a killed process may be cut short.
			if parts := strings.Split(id, "-"); len(parts) != 3 {
				continue
			} else if _, err := strconv.Atoi(parts[2]); err != nil {
				continue
			}
			t.Errorf("%s was acknowledged, and is not in the log", id)
		}
	}
}
