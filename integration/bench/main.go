// Command bench measures what docs/BENCHMARKS.md shows: it starts real members and agents, makes them do what a user feels or
// pays for, and reads what it cost from the processes' own accounting. It prints a line in the format of Go benchmarks for each
// sample, for benchstat, and at the end one table with every figure beside its bar.
//
//	go run ./integration/bench                    every row, and writes docs/BENCHMARKS.md
//	go run ./integration/bench -only 'jwt|memory' the rows whose key matches
//	go run ./integration/bench -quick             fewer and shorter samples
//
// The load runs on the same machine as what it measures. CPU figures are of the measured process alone; latencies are what a
// client sees that shares the cores with all of them.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"

	"countersign.io/countersign/integration/cluster"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// bench is one run. Its methods are for one goroutine but where they say otherwise.
type bench struct {
	root, dir, bin string
	quick          bool
	only           *regexp.Regexp
	started        time.Time
	stdout, stderr io.Writer

	rows    []*row
	stages  int // how many clusters there have been
	results map[string]*result
}

// group is some rows that are measured together, on one stage.
type group struct {
	keys []string
	run  func(context.Context, *stage) error
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	// A pod that is measured is this program too.
	if len(args) == 1 && args[0] == "play-pod" {
		return exit(stderr, playPod(ctx, stdout))
	}
	b := &bench{stdout: stdout, stderr: stderr, started: time.Now(), rows: table(), results: map[string]*result{}}
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.SetOutput(stderr)
	only := flags.String("only", "", "measure only the rows whose key matches this expression; docs/BENCHMARKS.md is not written")
	flags.BoolVar(&b.quick, "quick", false, "fewer and shorter samples; docs/BENCHMARKS.md is not written")
	if err := flags.Parse(args); err != nil {
		return 2
	}
	var err error
	if b.only, err = regexp.Compile(*only); err != nil {
		fmt.Fprintln(stderr, "-only:", err)
		return 2
	}
	failed, err := b.measure(ctx)
	if err != nil {
		return exit(stderr, err)
	}
	m := describe(ctx, b.started)
	b.print(stdout, m)
	if *only == "" && !b.quick && !failed {
		if err := b.write(filepath.Join(b.root, "docs", "BENCHMARKS.md"), m); err != nil {
			return exit(stderr, err)
		}
	}
	if failed {
		fmt.Fprintln(stderr, "\nat least one measurement failed")
		return 1
	}
	return 0
}

func exit(stderr io.Writer, err error) int {
	if err != nil {
		fmt.Fprintln(stderr, "bench:", err)
		return 1
	}
	return 0
}

// measure builds the binaries and takes every measurement that is asked for. One that fails does not keep the
// others from being taken.
func (b *bench) measure(ctx context.Context) (failed bool, err error) {
	if b.root, err = moduleRoot(); err != nil {
		return false, err
	}
	if b.dir, err = os.MkdirTemp("", "cs-bench-"); err != nil {
		return false, fmt.Errorf("making a folder: %w", err)
	}
	defer os.RemoveAll(b.dir)
	b.bin = filepath.Join(b.dir, "bin")
	b.say("building")
	if err := b.build(ctx); err != nil {
		return false, err
	}
	for _, s := range []struct {
		yaml   string
		groups []group
	}{
		// Each stage is a cluster of its own: what one leaves behind must not weigh on the next.
		{"", []group{
			{[]string{"member-memory"}, b.memberMemory},
			{[]string{"cached-x509", "cached-jwt", "agent-memory"}, b.cached},
			{[]string{"entry-created", "entry-deleted"}, b.push},
			{[]string{"first-svid"}, b.firstSVID},
			{[]string{"x509-batch", "x509-single", "jwt"}, b.issuance},
			{[]string{"agent-start", "agent-memory"}, b.agentStart},
			{[]string{"failover-write", "failover-issue"}, b.failover},
		}},
		{"", []group{
			{[]string{"commits"}, b.commits},
			{[]string{"flat"}, b.flat},
		}},
		{"", []group{{[]string{"taint"}, b.taint}}},
		{fleetYAML, []group{{[]string{"fleet"}, b.fleet}}},
	} {
		failed = b.stage(ctx, s.yaml, s.groups) || failed
		if ctx.Err() != nil {
			return true, ctx.Err()
		}
	}
	return b.kubePods(ctx) || failed, nil
}

// build makes the binaries as make build does, and the program that stands in for a large node.
func (b *bench) build(ctx context.Context) error {
	if err := os.Setenv("CGO_ENABLED", "0"); err != nil {
		return fmt.Errorf("building: %w", err)
	}
	if err := cluster.Build(ctx, b.root, b.bin, false); err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "go", "build", "-o", b.bin+"/", "./integration/bench/node")
	cmd.Dir = b.root
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("building: %w\n%s", err, out)
	}
	return nil
}

// stage starts a cluster for the groups that are asked for, if any, and runs them.
func (b *bench) stage(ctx context.Context, yaml string, groups []group) (failed bool) {
	var wanted []group
	for _, g := range groups {
		for _, k := range g.keys {
			if b.only.MatchString(k) {
				wanted = append(wanted, g)
				break
			}
		}
	}
	if len(wanted) == 0 {
		return false
	}
	b.stages++
	b.say("starting three members")
	s, err := newStage(ctx, b, yaml)
	if err != nil {
		b.fail(wanted, err)
		return true
	}
	defer s.close()
	for _, g := range wanted {
		b.say("measuring %s", strings.Join(g.keys, ", "))
		if err := g.run(ctx, s); err != nil {
			b.fail([]group{g}, err)
			s.logs()
			failed = true
		}
		if ctx.Err() != nil {
			return true
		}
	}
	return failed
}

func (b *bench) fail(groups []group, err error) {
	for _, g := range groups {
		for _, k := range g.keys {
			b.result(k).err = err
		}
		b.say("FAILED %s: %v", strings.Join(g.keys, ", "), err)
	}
}

// say tells whoever waits what is going on. It may be called from any goroutine.
func (b *bench) say(format string, args ...any) {
	fmt.Fprintf(b.stderr, "%6.1fs  %s\n", time.Since(b.started).Seconds(), fmt.Sprintf(format, args...))
}

// n is how many samples to take.
func (b *bench) n(full, quick int) int {
	if b.quick {
		return quick
	}
	return full
}

func moduleRoot() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", fmt.Errorf("finding the project: %w", err)
	}
	for ; dir != "/"; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
	}
	return "", errors.New("run the benchmarks inside the project's folder")
}
