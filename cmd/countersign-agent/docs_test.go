package main

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"countersign.io/countersign/cmd/internal/cli"
	"countersign.io/countersign/cmd/internal/clidoc"
)

var (
	update     = flag.Bool("update", false, "write docs/CLI.md anew")
	manDir     = flag.String("man", "", "write the man pages into this folder")
	manVersion = flag.String("manversion", "dev", "of the man pages")
)

const cliPage = "../../docs/CLI.md"

// TestCLIPage: docs/CLI.md says what the commands say of themselves.
func TestCLIPage(t *testing.T) {
	raw, err := os.ReadFile(cliPage)
	if err != nil {
		t.Fatal(err)
	}
	root := newRoot()
	page, err := clidoc.Replace(string(raw), root.Name(), clidoc.Markdown(root))
	if err != nil {
		t.Fatal(err)
	}
	codes := "| code | meaning |\n| --- | --- |\n"
	for _, c := range cli.ExitCodes() {
		codes += fmt.Sprintf("| %d | %s |\n", c.Code, c.Meaning)
	}
	if page, err = clidoc.Replace(page, "exit codes", codes); err != nil {
		t.Fatal(err)
	}
	if page == string(raw) {
		return
	}
	if !*update {
		t.Fatalf("docs/CLI.md is not current: go test ./cmd/%s -update", root.Name())
	}
	if err := os.WriteFile(cliPage, []byte(page), 0o644); err != nil {
		t.Fatal(err)
	}
}

// TestManPages writes them, for make man into its folder.
func TestManPages(t *testing.T) {
	dir := *manDir
	if dir == "" {
		dir = t.TempDir()
	}
	root := newRoot()
	if err := clidoc.Man(root, *manVersion, dir); err != nil {
		t.Fatal(err)
	}
	for _, c := range clidoc.Leaves(root) {
		page, err := os.ReadFile(filepath.Join(dir, strings.ReplaceAll(c.CommandPath(), " ", "-")+".1"))
		if err != nil || !strings.HasPrefix(string(page), ".nh\n.TH") || !strings.Contains(string(page), ".SH EXAMPLE") {
			t.Errorf("%s: %v", c.CommandPath(), err)
		}
	}
}

// TestEveryCommandIsWhole: what every command that does something must have.
func TestEveryCommandIsWhole(t *testing.T) {
	leaves := clidoc.Leaves(newRoot())
	if len(leaves) < leastCommands {
		t.Fatalf("only %d commands", len(leaves))
	}
	for _, c := range leaves {
		path := c.CommandPath()
		if c.Short == "" || c.Example == "" || c.Args == nil || c.RunE == nil {
			t.Errorf("%s: Short %q, Example %q, Args %t, RunE %t", path, c.Short, c.Example, c.Args != nil, c.RunE != nil)
		}
		c.InheritedFlags() // merges what parents have into c.Flags
		has := c.Flags().Lookup("output") != nil
		if prints := !slices.Contains(strings.Fields(printNothing), strings.ReplaceAll(path, " ", "/")); prints != has {
			t.Errorf("%s: it has -o: %t", path, has)
		}
		if use := strings.Fields(c.Use); len(use) > 1 && slices.Contains([]string{"NAME", "[NAME]", "ENTRY-ID", "SPIFFE-ID"}, use[1]) && c.ValidArgsFunction == nil {
			t.Errorf("%s: the shell does not complete its names", path)
		}
	}
}

const (
	leastCommands = 6
	// printNothing run until they are interrupted, or say all by their exit code.
	printNothing = "countersign-agent/run countersign-agent/health"
)
