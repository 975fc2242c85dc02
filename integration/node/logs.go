package node

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// Output is what one run of a container has written, to be read also when the pod has gone.
type Output struct {
	file *os.File
	text strings.Builder
}

// Output opens the log of a pod's container once it has begun to write.
func (n *Node) Output(ctx context.Context, p *corev1.Pod, container string) (*Output, error) {
	name := n.path(filepath.Join("podlogs", p.Namespace+"_"+p.Name+"_"+string(p.UID), container, "0.log"))
	var o *Output
	err := n.poll(ctx, "the log of "+p.Name, func() error {
		f, err := os.Open(name)
		if err == nil {
			o = &Output{file: f}
		}
		return err
	})
	return o, err
}

// Lines are the whole lines so far. The runtime puts before each the time, the stream and whether it is whole (F) or a part (P).
func (o *Output) Lines() ([]string, error) {
	if _, err := io.Copy(&o.text, o.file); err != nil {
		return nil, err
	}
	var out []string
	part := ""
	for s := bufio.NewScanner(strings.NewReader(o.text.String())); s.Scan(); {
		f := strings.SplitN(s.Text(), " ", 4)
		if len(f) < 4 {
			continue
		}
		if part += f[3]; f[2] == "F" {
			out, part = append(out, part), ""
		}
	}
	return out, nil
}

// Wait waits until the lines are as wanted; for as long as the context lasts, and two minutes at the most.
func (o *Output) Wait(ctx context.Context, what string, ok func(lines []string) bool) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		lines, err := o.Lines()
		if err != nil || ok(lines) {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting for %s: %w; so far:\n%s", what, ctx.Err(), strings.Join(lines[max(0, len(lines)-15):], "\n"))
		case <-tick.C:
		}
	}
}

// Close ends reading.
func (o *Output) Close() error { return o.file.Close() }
