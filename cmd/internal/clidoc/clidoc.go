// Package clidoc writes a command tree down: as a part of docs/CLI.md, and as man pages. Only tests and the makefile use it, so that
// neither binary carries it.
package clidoc

import (
	"cmp"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
	"github.com/spf13/pflag"
)

// Leaves are the commands that do something, in order, but those that cobra adds.
func Leaves(root *cobra.Command) (out []*cobra.Command) {
	for _, c := range root.Commands() {
		switch {
		case c.Hidden || c.Name() == "help" || c.Name() == "completion":
		case c.HasSubCommands():
			out = append(out, Leaves(c)...)
		default:
			out = append(out, c)
		}
	}
	return out
}

// commonTo is how many commands must have a flag from above them, in the same words, for it to be written down once.
const commonTo = 4

// Markdown is the tree as a chapter: flags that many commands share first, then each command.
func Markdown(root *cobra.Command) string {
	var b strings.Builder
	leaves := Leaves(root)
	counts := map[string]int{}
	flags := map[string]*pflag.Flag{}
	for _, c := range leaves {
		c.InheritedFlags().VisitAll(func(f *pflag.Flag) {
			counts[line(f)]++
			flags[line(f)] = f
		})
	}
	fmt.Fprintf(&b, "## %s\n\n%s\n\n### Flags that many commands share\n\n", root.Name(), sentence(cmp.Or(root.Long, root.Short)))
	var common []string
	for l, n := range counts {
		if n >= commonTo {
			common = append(common, l)
		}
	}
	slices.Sort(common)
	b.WriteString("| flag | |\n| --- | --- |\n")
	for _, l := range common {
		b.WriteString(row(flags[l]))
	}
	for _, c := range leaves {
		c.InheritedFlags() // merges what parents have into c.Flags
		fmt.Fprintf(&b, "\n### %s\n\n    %s\n\n%s\n", c.CommandPath(), c.UseLine(), sentence(cmp.Or(c.Long, c.Short)))
		var own []string
		c.Flags().VisitAll(func(f *pflag.Flag) {
			if counts[line(f)] < commonTo && !f.Hidden {
				own = append(own, row(f))
			}
		})
		if len(own) > 0 {
			b.WriteString("\n| flag | |\n| --- | --- |\n" + strings.Join(own, ""))
		}
		if c.Example != "" {
			b.WriteString("\n" + indent(c.Example) + "\n")
		}
	}
	return b.String()
}

func line(f *pflag.Flag) string {
	return f.Name + "\x00" + f.Shorthand + "\x00" + f.DefValue + "\x00" + f.Usage
}

func row(f *pflag.Flag) string {
	name := "--" + f.Name
	kind, usage := pflag.UnquoteUsage(f)
	if kind != "" {
		name += " " + kind
	}
	if f.Shorthand != "" {
		name = "-" + f.Shorthand + ", " + name
	}
	switch f.DefValue {
	case "", "false", "0", "0s", "[]":
	default:
		usage += " (default " + f.DefValue + ")"
	}
	return fmt.Sprintf("| `%s` | %s |\n", name, strings.ReplaceAll(strings.ReplaceAll(usage, "|", "\\|"), "\n", " "))
}

func sentence(s string) string {
	if !strings.HasSuffix(s, ".") && !strings.Contains(s, "\n") {
		s += "."
	}
	return s
}

// indent makes a code block of an example, whose lines have two spaces already.
func indent(s string) string {
	lines := strings.Split(s, "\n")
	for i, l := range lines {
		if l != "" {
			lines[i] = "  " + l
		}
	}
	return strings.Join(lines, "\n")
}

// Replace puts a chapter into its place in a page: between the marks that name it.
func Replace(page, name, chapter string) (string, error) {
	begin, end := "<!-- begin "+name+" -->\n", "<!-- end "+name+" -->\n"
	head, rest, ok := strings.Cut(page, begin)
	_, tail, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		return "", fmt.Errorf("the page lacks the marks %q and %q", strings.TrimSpace(begin), strings.TrimSpace(end))
	}
	return head + begin + chapter + end + tail, nil
}

// Man writes a man page for each command into a folder. $SOURCE_DATE_EPOCH sets its date.
func Man(root *cobra.Command, version, dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("making the folder of the man pages: %w", err)
	}
	root.DisableAutoGenTag = true
	return doc.GenManTree(root, &doc.GenManHeader{Section: "1", Source: "Countersign " + version, Manual: "Countersign"}, dir)
}
