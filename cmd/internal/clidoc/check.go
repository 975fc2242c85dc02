package clidoc

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"countersign.io/countersign/cmd/internal/cli"
)

// Flags are those of the tests that write what they check.
type Flags struct {
	Update             *bool
	ManDir, ManVersion *string
}

// NewFlags defines them; a test's main package calls it once.
func NewFlags() Flags {
	return Flags{
		Update:     flag.Bool("update", false, "write docs/CLI.md anew"),
		ManDir:     flag.String("man", "", "write the man pages into this folder"),
		ManVersion: flag.String("manversion", "dev", "of the man pages"),
	}
}

const cliPage = "../../docs/CLI.md" // from the folder of a command

// CheckPage: docs/CLI.md says what the commands say of themselves.
func CheckPage(t *testing.T, root *cobra.Command, f Flags) {
	t.Helper()
	raw, err := os.ReadFile(cliPage)
	if err != nil {
		t.Fatal(err)
	}
	page, err := Replace(string(raw), root.Name(), Markdown(root))
	if err != nil {
		t.Fatal(err)
	}
	codes := "| code | meaning |\n| --- | --- |\n"
	for _, c := range cli.ExitCodes() {
		codes += fmt.Sprintf("| %d | %s |\n", c.Code, c.Meaning)
	}
	if page, err = Replace(page, "exit codes", codes); err != nil {
		t.Fatal(err)
	}
	if page == string(raw) {
		return
	}
	if !*f.Update {
		t.Fatalf("docs/CLI.md is not current: go test ./cmd/%s -update", root.Name())
	}
	if err := os.WriteFile(cliPage, []byte(page), 0o644); err != nil {
		t.Fatal(err)
	}
}

// CheckMan writes the man pages, for make man into its folder.
func CheckMan(t *testing.T, root *cobra.Command, f Flags) {
	t.Helper()
	dir := *f.ManDir
	if dir == "" {
		dir = t.TempDir()
	}
	if err := Man(root, *f.ManVersion, dir); err != nil {
		t.Fatal(err)
	}
	for _, c := range Leaves(root) {
		page, err := os.ReadFile(filepath.Join(dir, strings.ReplaceAll(c.CommandPath(), " ", "-")+".1"))
		if err != nil || !strings.HasPrefix(string(page), ".nh\n.TH") || !strings.Contains(string(page), ".SH EXAMPLE") {
			t.Errorf("%s: %v", c.CommandPath(), err)
		}
	}
}

// CheckWhole: what every command that does something must have. There are at least so many, and those of printNothing, by their paths, run
// until they are interrupted, or say all by their exit codes.
func CheckWhole(t *testing.T, root *cobra.Command, least int, printNothing ...string) {
	t.Helper()
	leaves := Leaves(root)
	if len(leaves) < least {
		t.Fatalf("only %d commands", len(leaves))
	}
	for _, c := range leaves {
		path := c.CommandPath()
		if c.Short == "" || c.Example == "" || c.Args == nil || c.RunE == nil {
			t.Errorf("%s: Short %q, Example %q, Args %t, RunE %t", path, c.Short, c.Example, c.Args != nil, c.RunE != nil)
		}
		c.InheritedFlags() // merges what parents have into c.Flags
		has := c.Flags().Lookup("output") != nil
		if prints := !slices.Contains(printNothing, path); prints != has {
			t.Errorf("%s: it has -o: %t", path, has)
		}
		if use := strings.Fields(c.Use); len(use) > 1 && slices.Contains([]string{"NAME", "[NAME]", "ENTRY-ID", "SPIFFE-ID"}, use[1]) && c.ValidArgsFunction == nil {
			t.Errorf("%s: the shell does not complete its names", path)
		}
	}
}
