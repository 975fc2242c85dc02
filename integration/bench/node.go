package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"countersign.io/countersign/integration/cluster"
)

const identities = 5000

// lineWriter hands out what a child prints, line by line.
type lineWriter struct {
	rest  string
	lines chan string
}

// Write is called by one goroutine, the one that reads the child's pipe.
func (w *lineWriter) Write(p []byte) (int, error) {
	w.rest += string(p)
	for {
		line, rest, ok := strings.Cut(w.rest, "\n")
		if !ok {
			return len(p), nil
		}
		w.rest = rest
		select {
		case w.lines <- line:
		default: // nobody will read so many
		}
	}
}

// agentStart measures an agent of 5,000 pods: how long until all have their SVIDs, and how much memory it holds then.
func (b *bench) agentStart(ctx context.Context, s *stage) error {
	tokens, err := s.podTokens()
	if err != nil {
		return err
	}
	rounds := b.n(3, 1)
	var took []float64
	for i := range rounds {
		seconds, m, err := s.startNode(ctx, tokens, i, i == rounds-1 && b.only.MatchString("agent-memory"))
		if err != nil {
			return err
		}
		took = append(took, seconds)
		b.sample("AgentStart5000", identities, seconds, "s")
		if m.rss > 0 {
			b.sample("AgentMemory5000Identities", identities, m.rss, "rss-MiB", m.anon, "anon-MiB", m.peak, "peak-MiB")
			r := b.result("agent-memory")
			r.add(check{got: m.rss, bar: 60, moonshot: 40}, "5,000: %.0f MiB", m.rss)
			r.note("5,000 identities with a stream each, 10 s after the last was had: %.1f MiB, of which %.1f are its own; peak %.1f MiB", m.rss, m.anon, m.peak)
		}
	}
	if b.only.MatchString("agent-start") {
		t, r := spreadOf(took), b.result("agent-start")
		r.add(check{got: t.p50, bar: 2.5, moonshot: 1}, "%.1f s", t.p50)
		r.note("%.1f to %.1f s of %d starts, the agent, the member and its callers sharing the cores", t.min, t.max, len(took))
	}
	return nil
}

// podTokens writes the tokens of as many pods as there are identities, and returns their folder.
func (s *stage) podTokens() (string, error) {
	tokens := filepath.Join(s.c.Dir, "pods")
	if err := os.Mkdir(tokens, 0o700); err != nil {
		return "", fmt.Errorf("making a folder: %w", err)
	}
	for i := range identities {
		token, err := s.iss.Token("shop", fmt.Sprintf("app-%d", i), "node-1")
		if err != nil {
			return "", err
		}
		if err := os.WriteFile(filepath.Join(tokens, strconv.Itoa(i)), []byte(token), 0o600); err != nil {
			return "", fmt.Errorf("writing a token: %w", err)
		}
	}
	return tokens, nil
}

// startNode runs the program node once. With rest, it looks at its memory a while later.
func (s *stage) startNode(ctx context.Context, tokens string, round int, rest bool) (seconds float64, m memory, err error) {
	seconds, p, done, err := s.runNode(ctx, tokens, "many-"+strconv.Itoa(round))
	if err != nil {
		return 0, m, err
	}
	defer done()
	if rest {
		pause(ctx, 10*time.Second)
		m, err = memoryOf(p.PID())
	}
	return seconds, m, err
}

// runNode starts the program node and waits until all its callers have their SVIDs.
func (s *stage) runNode(ctx context.Context, tokens, name string) (seconds float64, p *cluster.Process, done func(), err error) {
	raw, err := s.c.Admin(ctx, "token", "create", "--agent", "--kube-node", kubeCluster+"/node-1")
	if err != nil {
		return 0, nil, nil, err
	}
	join := filepath.Join(s.c.Dir, name+".join")
	if err := os.WriteFile(join, []byte(raw), 0o600); err != nil {
		return 0, nil, nil, fmt.Errorf("writing the join token: %w", err)
	}
	state := cluster.StateDir(s.c.Dir, name)
	if state == "none" {
		state = ""
	}
	out := &lineWriter{lines: make(chan string, 64)}
	p, err = s.c.Start(name, nil, out, filepath.Join(s.bin, "node"), "-join", join, "-tokens", tokens,
		"-callers", strconv.Itoa(identities), "-state", state)
	if err != nil {
		return 0, nil, nil, err
	}
	done = func() {
		p.Stop()
		if state != "" {
			os.RemoveAll(state)
		}
	}
	defer func() {
		if err != nil {
			done()
		}
	}()
	timeout := time.NewTimer(90 * time.Second)
	defer timeout.Stop()
	select {
	case line := <-out.lines:
		if seconds, err = strconv.ParseFloat(line, 64); err != nil {
			return 0, nil, nil, fmt.Errorf("the agent said: %s", line)
		}
		return seconds, p, done, nil
	case <-p.Done():
		return 0, nil, nil, errors.New("the agent ended")
	case <-timeout.C:
		return 0, nil, nil, errors.New("not all callers had an SVID after 90 s")
	case <-ctx.Done():
		return 0, nil, nil, ctx.Err()
	}
}

// memberMemory looks at members that have nothing to do, right after they have come up.
func (b *bench) memberMemory(ctx context.Context, s *stage) error {
	pause(ctx, time.Duration(b.n(10, 4))*time.Second)
	var all []float64
	for _, m := range s.c.Members {
		x, err := memoryOf(m.PID())
		if err != nil {
			return err
		}
		b.sample("MemberMemoryIdle", 1, x.rss, "rss-MiB", x.anon, "anon-MiB", x.peak, "peak-MiB")
		b.result("member-memory").note("%s: %.1f MiB, of which %.1f are its own and the rest mapped files", m.Name, x.rss, x.anon)
		all = append(all, x.rss)
	}
	largest := spreadOf(all).max
	b.result("member-memory").add(check{got: largest, bar: 60, moonshot: 40}, "%.0f MiB (the largest of three)", largest)
	return nil
}
