package clidoc

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

func tree() *cobra.Command {
	root := &cobra.Command{Use: "tool", Short: "A tool"}
	group := &cobra.Command{Use: "group", Short: "A group"}
	group.PersistentFlags().String("shared", "x", "what | all have")
	for _, name := range []string{"a", "b", "c", "d"} {
		c := &cobra.Command{Use: name + " NAME", Short: "Does " + name, Example: "  tool group " + name + " x\n  tool group " + name + " y", Run: func(*cobra.Command, []string) {}}
		if name == "b" {
			c.Flags().BoolP("own", "o", false, "only here")
		}
		group.AddCommand(c)
	}
	group.AddCommand(&cobra.Command{Use: "secret", Hidden: true, Run: func(*cobra.Command, []string) {}})
	root.AddCommand(group)
	return root
}

func TestMarkdown(t *testing.T) {
	got := Markdown(tree())
	for _, want := range []string{"## tool\n", "### tool group b\n\n    tool group b NAME", "Does b.", "| `-o, --own` | only here |", "    tool group b x\n    tool group b y\n", `| what \| all have (default x) |`} {
		if !strings.Contains(got, want) {
			t.Errorf("%q is not in\n%s", want, got)
		}
	}
	if strings.Count(got, "--shared") != 1 || strings.Contains(got, "secret") {
		t.Errorf("got\n%s", got)
	}
}

func TestReplace(t *testing.T) {
	page := "head\n<!-- begin x -->\nold\n<!-- end x -->\ntail\n"
	got, err := Replace(page, "x", "new\n")
	if err != nil || got != "head\n<!-- begin x -->\nnew\n<!-- end x -->\ntail\n" {
		t.Errorf("%q, %v", got, err)
	}
	for _, bad := range []string{"", "<!-- begin x -->\n", "<!-- end x -->\n<!-- begin x -->\n"} {
		if _, err := Replace(bad, "x", "new"); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
}

func TestMan(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "man1")
	t.Setenv("SOURCE_DATE_EPOCH", "1800000000")
	if err := Man(tree(), "v9", dir); err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(filepath.Join(dir, "tool-group-b.1"))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{".TH", "TOOL", "Jan 2027", "Countersign v9", ".SH EXAMPLE"} {
		if !strings.Contains(string(raw), want) {
			t.Errorf("%q is not in\n%s", want, raw)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "tool-group-secret.1")); err == nil {
		t.Error("a hidden command has a page")
	}
}
