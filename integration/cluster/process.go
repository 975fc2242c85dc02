package cluster

import (
	"fmt"
	"io"
	"os/exec"
	"runtime"
	"syscall"
)

// Process is a child that is always waited for.
type Process struct {
	Name string
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended
}

// run starts the child from a thread that lives as long as it does: the kernel's death signal follows the thread that
// forked, not the process.
func (p *Process) run(log io.Closer) error {
	started := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		defer close(p.done)
		if log != nil {
			defer log.Close()
		}
		if err := p.cmd.Start(); err != nil {
			started <- fmt.Errorf("starting %s: %w", p.Name, err)
			return
		}
		started <- nil
		_ = p.cmd.Wait() // how it ended is in ProcessState
	}()
	return <-started
}

// PID of the process.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Exited reports whether it has ended.
func (p *Process) Exited() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Signal sends a signal to the process; one that has ended is no error.
func (p *Process) Signal(s syscall.Signal) { _ = p.cmd.Process.Signal(s) }

// Kill is kill -9, and waits for the end.
func (p *Process) Kill() {
	p.Signal(syscall.SIGKILL)
	<-p.done
}

// Stop asks the process to end, and waits for it.
func (p *Process) Stop() {
	p.Signal(syscall.SIGTERM)
	<-p.done
}

// Code is the exit code of a process that has ended; -1 after a signal.
func (p *Process) Code() int { return p.cmd.ProcessState.ExitCode() }

// CPU is the user and system time in seconds that an ended process used.
func (p *Process) CPU() float64 {
	s := p.cmd.ProcessState
	return s.UserTime().Seconds() + s.SystemTime().Seconds()
}
