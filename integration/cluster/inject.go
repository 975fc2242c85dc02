package cluster

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// Inject makes system calls of a running process fail or wait, with strace: faults are its -e inject= expressions, such as
// "fdatasync:error=EIO". paths, if any, are the only files that are meant. It returns when it is in effect; Stop on what it
// returns ends it, and so does the end of p. What was injected is in the file log.
func (c *Cluster) Inject(ctx context.Context, p *Process, log string, paths []string, faults ...string) (*Process, error) {
	argv := []string{"strace", "-f", "-qq", "-y", "-o", log, "-p", fmt.Sprint(p.PID())}
	for _, path := range paths {
		argv = append(argv, "-P", path)
	}
	calls := make([]string, len(faults))
	for i, f := range faults {
		calls[i], _, _ = strings.Cut(f, ":")
	}
	argv = append(argv, "-e", "trace="+strings.Join(calls, ","))
	for _, f := range faults {
		argv = append(argv, "-e", "inject="+f)
	}
	out, err := os.Create(log + ".err")
	if err != nil {
		return nil, fmt.Errorf("starting strace: %w", err)
	}
	tracer, err := c.launch("strace", nil, out, out, argv...)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for !traced(p.PID()) {
		select {
		case <-tracer.Done():
			said, _ := os.ReadFile(log + ".err")
			return nil, fmt.Errorf("strace ended: %s", said)
		case <-p.Done():
			return tracer, nil
		case <-ctx.Done():
			tracer.Kill()
			return nil, fmt.Errorf("waiting for strace: %w", ctx.Err())
		case <-time.After(5 * time.Millisecond):
		}
	}
	return tracer, nil
}

// traced reports whether every thread of a process is.
func traced(pid int) bool {
	files, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	for _, f := range files {
		status, err := os.ReadFile(f)
		if err == nil && strings.Contains(string(status), "TracerPid:\t0\n") {
			return false
		}
	}
	return len(files) > 0
}

// Pause stops a process for a while, as a machine does that swaps.
func (p *Process) Pause(d time.Duration) {
	p.Signal(syscall.SIGSTOP)
	time.Sleep(d)
	p.Signal(syscall.SIGCONT)
}
