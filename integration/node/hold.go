package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// What the node's network looks like inside; two nodes can have the same, each in a namespace of its own.
const (
	Bridge     = "cni0"
	Address    = "10.88.0.1" // of the node
	subnet     = "10.88.0.0/16"
	APIService = "10.96.0.1"  // of the service kubernetes
	DNSService = "10.96.0.10" // of the name server
)

// Request is one thing asked of the command hold: to run Argv to its end, to start it under a Name, or to send a Signal to what
// runs under that name.
type Request struct {
	ID     int
	Name   string
	Argv   []string
	Env    []string
	Stdin  string
	Log    string
	Signal int
}

// Answer is what hold says to a request; or, with ID 0, that it is ready, or that what ran under a name has Ended.
type Answer struct {
	ID     int
	Error  string
	Output string
	Ended  string
}

// holder is the parent's side of hold.
type holder struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	net *os.File // the network namespace

	mu      sync.Mutex // guards the rest
	next    int
	waiting map[int]chan Answer
	ended   map[string]chan struct{} // by name; closed when it has ended
	gone    error                    // set once hold has ended
}

func newHolder(binary, dir string, log io.Writer) (*holder, error) {
	h := &holder{cmd: exec.Command(binary, dir), waiting: map[int]chan Answer{}, ended: map[string]chan struct{}{}}
	h.cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWNET, Setpgid: true}
	h.cmd.Stderr = log
	in, err := h.cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := h.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := h.cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting hold: %w", err)
	}
	h.in = in
	answers := json.NewDecoder(out)
	var ready Answer
	if err := answers.Decode(&ready); err != nil {
		h.close()
		return nil, fmt.Errorf("hold did not start: see its log")
	}
	if h.net, err = os.Open(fmt.Sprintf("/proc/%d/ns/net", h.cmd.Process.Pid)); err != nil {
		h.close()
		return nil, err
	}
	go h.read(answers)
	return h, nil
}

// close ends everything in the namespaces.
func (h *holder) close() {
	_ = h.cmd.Process.Kill()
	_ = h.cmd.Wait()
	h.in.Close()
	if h.net != nil {
		h.net.Close()
	}
}

func (h *holder) read(answers *json.Decoder) {
	for {
		var a Answer
		err := answers.Decode(&a)
		h.mu.Lock()
		if err != nil {
			h.gone = errors.New("the node has ended")
			for id, c := range h.waiting {
				c <- Answer{Error: h.gone.Error()}
				delete(h.waiting, id)
			}
			h.mu.Unlock()
			return
		}
		if a.Ended != "" {
			if c := h.ended[a.Ended]; c != nil {
				close(c)
				delete(h.ended, a.Ended)
			}
		} else if c := h.waiting[a.ID]; c != nil {
			c <- a
			delete(h.waiting, a.ID)
		}
		h.mu.Unlock()
	}
}

func (h *holder) ask(ctx context.Context, req Request) (string, error) {
	c := make(chan Answer, 1)
	h.mu.Lock()
	if h.gone != nil {
		h.mu.Unlock()
		return "", h.gone
	}
	h.next++
	req.ID = h.next
	h.waiting[req.ID] = c
	if req.Name != "" && req.Signal == 0 {
		h.ended[req.Name] = make(chan struct{})
	}
	err := json.NewEncoder(h.in).Encode(req)
	h.mu.Unlock()
	if err != nil {
		return "", fmt.Errorf("the node has ended: %w", err)
	}
	select {
	case a := <-c:
		if a.Error != "" {
			return a.Output, errors.New(a.Error)
		}
		return a.Output, nil
	case <-ctx.Done():
		return "", ctx.Err()
	}
}

func (h *holder) runs(name string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.ended[name] != nil
}

// kill ends a daemon at once, and waits for that.
func (h *holder) kill(ctx context.Context, name string) error {
	h.mu.Lock()
	ended := h.ended[name]
	h.mu.Unlock()
	if ended == nil {
		return nil
	}
	if _, err := h.ask(ctx, Request{Name: name, Signal: int(unix.SIGKILL)}); err != nil {
		return err
	}
	select {
	case <-ended:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
