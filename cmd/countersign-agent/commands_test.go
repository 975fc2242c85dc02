package main

import (
	"bytes"
	"context"
	"net"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"countersign.io/countersign/cmd/internal/cli"
)

// each calls f with every command of ours, below and with the root.
func each(c *cobra.Command, f func(*cobra.Command)) {
	f(c)
	for _, sub := range c.Commands() {
		each(sub, f)
	}
}

func command(args ...string) (code int, out, errOut string) {
	var o, e bytes.Buffer
	code = run(context.Background(), args, &o, &e)
	return code, o.String(), e.String()
}

// TestCommands checks what a person relies on: every command says what it is for and how it is called, and a mistyped one is
// refused as a usage error.
func TestCommands(t *testing.T) {
	n := 0
	each(newRoot(), func(c *cobra.Command) {
		n++
		path := c.CommandPath()
		args := strings.Fields(path)[1:]
		with := func(more ...string) []string { return append(append([]string{}, args...), more...) }
		if c.Short == "" || strings.HasSuffix(c.Short, ".") {
			t.Errorf("%s: Short %q: want a phrase", path, c.Short)
		}
		if c.Runnable() && !strings.Contains(c.Example, path) {
			t.Errorf("%s: its example does not show it: %q", path, c.Example)
		}
		code, out, errOut := command(with("--help")...)
		if code != cli.ExitOK || !strings.Contains(out, "Usage:") || c.Example != "" && !strings.Contains(out, c.Example) || errOut != "" {
			t.Errorf("%s --help: exit code %d: %s%s", path, code, out, errOut)
		}
		usage := func(why string, args ...string) {
			if code, out, errOut := command(args...); code != cli.ExitUsage || !strings.Contains(errOut, why) || out != "" || strings.Count(errOut, "\n") != 1 {
				t.Errorf("%v: exit code %d: %s%s", args, code, out, errOut)
			}
		}
		usage("see "+path+" --help", with("--no-such-flag")...)
		if c.HasSubCommands() {
			usage(`unknown command "bogus": see `+path+" --help", with("bogus")...)
		} else {
			usage("see "+path+" --help", with("too", "many", "words")...)
		}
		if f := c.Flags().Lookup("output"); f != nil || c.InheritedFlags().Lookup("output") != nil {
			usage("want table, json or yaml", with("-o", "xml")...)
		}
	})
	if n < 8 {
		t.Errorf("found only %d commands", n)
	}
}

func TestCompletionScripts(t *testing.T) {
	for _, shell := range []string{"bash", "zsh", "fish", "powershell"} {
		if code, out, errOut := command("completion", shell); code != cli.ExitOK || !strings.Contains(out, "countersign-agent") || errOut != "" {
			t.Errorf("%s: exit code %d: %.100s%s", shell, code, out, errOut)
		}
	}
	if code, out, _ := command("__complete", "fetch", "x509", "-o", ""); code != cli.ExitOK || !strings.Contains(out, "yaml") {
		t.Errorf("completing -o: exit code %d: %s", code, out)
	}
}

// Nobody at the prompt waits for an agent that does not answer, or reads an error.
func TestCompletionDoesNotWait(t *testing.T) {
	sock := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for _, path := range []string{sock, sock + ".none"} {
		code, out, _ := command("__complete", "fetch", "jwt", "--timeout", "10m", "--endpoint", "unix://"+path, "--id", "")
		if code != cli.ExitOK || strings.TrimSpace(out) != ":4" {
			t.Errorf("exit code %d: %q", code, out)
		}
	}
}
