// Command node is a node agent for measurements: package agent with callers that are made up, and nothing else that a
// countersign-agent does not have. Each caller takes its SVID and stays for updates. It prints the seconds from before the
// node's attestation until the last caller had its SVID, and goes on until it is ended.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"countersign.io/countersign/agent"
	"countersign.io/countersign/attestor/node"
	"countersign.io/countersign/identity"
	"countersign.io/countersign/integration/bench/caller"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	err := run(ctx, os.Args[1:])
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "node:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("node", flag.ContinueOnError)
	join := flags.String("join", "", "file of the join token")
	tokens := flags.String("tokens", "", "folder of the callers' tokens, named 0, 1, 2 ...")
	callers := flags.Int("callers", 1, "how many callers")
	state := flags.String("state", "", "state folder")
	if err := flags.Parse(args); err != nil {
		return err
	}
	raw, err := os.ReadFile(*join)
	if err != nil {
		return fmt.Errorf("reading the join token: %w", err)
	}
	t, err := node.ParseToken(strings.TrimSpace(string(raw)))
	if err != nil {
		return err
	}
	begin := time.Now()
	a, err := agent.New(agent.Config{Servers: t.Addresses, Pin: t.Pin, Credential: agent.JoinToken(t.Secret), StateDir: *state})
	if err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return a.Run(ctx) })
	live := make(chan struct{}, *callers)
	for i := range *callers {
		g.Go(func() error {
			err := call(ctx, a, filepath.Join(*tokens, strconv.Itoa(i)), live)
			if err != nil && ctx.Err() == nil {
				return fmt.Errorf("caller %d: %w", i, err)
			}
			return nil
		})
	}
	for range *callers {
		select {
		case <-live:
		case <-ctx.Done():
			return g.Wait()
		}
	}
	if _, err := fmt.Println(time.Since(begin).Seconds()); err != nil {
		return err
	}
	return g.Wait()
}

// call is one caller: it tells live when it has its SVID.
func call(ctx context.Context, a *agent.Agent, token string, live chan<- struct{}) error {
	attest := caller.Pod(filepath.Base(token), func() ([]byte, error) { return os.ReadFile(token) })
	first := true
	return a.Updates(ctx, attest, func(*identity.Update) error {
		if first {
			live <- struct{}{}
			first = false
		}
		return nil
	})
}
