// Package cli is what both commands share towards a person: output formats, exit codes, logs and signals.
package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"countersign.io/countersign/config"
	"countersign.io/countersign/identity"
)

// Output is the -o flag: parsing refuses an unknown format, before any work is done.
type Output struct{ format string }

// Flag adds -o to a command.
func (o *Output) Flag(cmd *cobra.Command) {
	o.format = "table"
	cmd.PersistentFlags().VarP(o, "output", "o", "output format: table, json or yaml")
	_ = cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"table", "json", "yaml"}, cobra.ShellCompDirectiveNoFileComp))
}

// String is the format.
func (o *Output) String() string { return o.format }

// Type names the flag's values in a command's help.
func (o *Output) Type() string { return "format" }

// Set takes the flag's value.
func (o *Output) Set(format string) error {
	switch format {
	case "table", "json", "yaml":
		o.format = format
		return nil
	}
	return errors.New("want table, json or yaml")
}

// Table is a human answer: a header and rows.
type Table struct {
	Header []string
	Rows   [][]string
}

// Print writes v, a proto message or a plain value, as json or yaml; or the table.
func (o *Output) Print(w io.Writer, v any, table func() Table) error {
	if o.format == "table" {
		t := table()
		tw := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
		if len(t.Header) > 0 {
			fmt.Fprintln(tw, strings.Join(t.Header, "\t"))
		}
		for _, r := range t.Rows {
			fmt.Fprintln(tw, strings.Join(r, "\t"))
		}
		return tw.Flush()
	}
	data, err := marshal(v)
	if err != nil {
		return err
	}
	if o.format == "yaml" {
		// JSON is YAML: going through a node keeps the order of the fields.
		var n yaml.Node
		if err := yaml.Unmarshal(data, &n); err != nil {
			return fmt.Errorf("converting to yaml: %w", err)
		}
		blockStyle(&n)
		data, err = yaml.Marshal(&n)
		if err != nil {
			return fmt.Errorf("converting to yaml: %w", err)
		}
		_, err = w.Write(data)
		return err
	}
	_, err = fmt.Fprintln(w, string(data))
	return err
}

func marshal(v any) ([]byte, error) {
	if m, ok := v.(proto.Message); ok {
		data, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(m)
		if err != nil {
			return nil, fmt.Errorf("converting to json: %w", err)
		}
		v = json.RawMessage(data) // re-indented below: protojson's own spacing is random on purpose
	}
	return json.MarshalIndent(v, "", "  ")
}

func blockStyle(n *yaml.Node) {
	n.Style = 0
	for _, c := range n.Content {
		blockStyle(c)
	}
}

// Logger writes to w as the configuration says.
func Logger(w io.Writer, c config.Log) *slog.Logger {
	var level slog.Level
	if err := level.UnmarshalText([]byte(c.Level)); err != nil {
		level = slog.LevelInfo
	}
	opts := &slog.HandlerOptions{Level: level}
	if c.Format == "json" {
		return slog.New(slog.NewJSONHandler(w, opts))
	}
	return slog.New(slog.NewTextHandler(w, opts))
}

// Exit codes, stable for scripts.
const (
	ExitOK          = 0
	ExitFailure     = 1
	ExitUsage       = 2 // the command line or input is wrong
	ExitNotFound    = 3
	ExitDenied      = 4 // not authenticated or not permitted
	ExitUnavailable = 5 // try again
)

// Code is an exit code and what it means.
type Code struct {
	Code    int
	Meaning string
}

// ExitCodes are all of them, for docs/CLI.md.
func ExitCodes() []Code {
	return []Code{
		{ExitOK, "done; of `cluster status` and `check`: all is well"},
		{ExitFailure, "it failed, and the message says why; of `cluster status` and `check`: somebody should look after something; of `audit verify`: a record was altered"},
		{ExitUsage, "the command line, a file or a value is wrong: nothing was done"},
		{ExitNotFound, "what was named is not there"},
		{ExitDenied, "not authenticated, or not permitted"},
		{ExitUnavailable, "nobody answers, or cannot decide now: try again, or another member"},
	}
}

// ExitCode maps an error to a stable exit code.
func ExitCode(err error) int {
	switch {
	case err == nil:
		return ExitOK
	case errors.Is(err, identity.ErrInvalid):
		return ExitUsage
	case errors.Is(err, identity.ErrNotFound):
		return ExitNotFound
	case errors.Is(err, identity.ErrDenied), errors.Is(err, identity.ErrUnauthenticated):
		return ExitDenied
	case errors.Is(err, identity.ErrUnavailable):
		return ExitUnavailable
	}
	return ExitFailure
}

// Execute runs a root command and prints the error as one line with the next step.
func Execute(root *cobra.Command, args []string, stdout, stderr io.Writer) int {
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	root.SilenceErrors = true
	root.SilenceUsage = true
	root.SetFlagErrorFunc(usage)
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd(args...)
	strict(root)
	err := root.Execute()
	if err != nil {
		fmt.Fprintf(stderr, "%s: %v\n", root.Name(), err)
	}
	return ExitCode(err)
}

func usage(c *cobra.Command, err error) error {
	return fmt.Errorf("%w: %v: see %s --help", identity.ErrInvalid, err, c.CommandPath())
}

// strict makes every fault of the command line a usage error. Cobra by itself answers a mistyped subcommand with the
// group's help and success, which a script takes for done.
func strict(c *cobra.Command) {
	if c.HasSubCommands() && !c.Runnable() {
		c.Args, c.DisableFlagsInUseLine, c.SuggestionsMinimumDistance = cobra.ArbitraryArgs, true, 2
		c.RunE = func(c *cobra.Command, args []string) error {
			if len(args) == 0 {
				return c.Help()
			}
			msg := fmt.Sprintf("unknown command %q", args[0])
			if near := c.SuggestionsFor(args[0]); len(near) > 0 {
				msg += ", perhaps " + strings.Join(near, " or ")
			}
			return usage(c, errors.New(msg))
		}
	}
	if check := c.Args; check != nil {
		c.Args = func(c *cobra.Command, args []string) error {
			if err := check(c, args); err != nil {
				return usage(c, err)
			}
			return nil
		}
	}
	for _, sub := range c.Commands() {
		strict(sub)
	}
}

// JSON reports whether machine-readable lines are wanted of a command that streams.
func (o *Output) JSON() bool { return o.format != "table" }
