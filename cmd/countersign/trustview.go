package main

import (
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	adminv1 "countersign.io/countersign/api/admin/v1"
	"countersign.io/countersign/cmd/internal/cli"
)

// printRotations shows how rotations stand.
func (a *admin) printRotations(cmd *cobra.Command, res *adminv1.RotationList) error {
	if a.out.String() != "table" {
		return a.out.Print(cmd.OutOrStdout(), res, nil)
	}
	if len(res.Rotations) == 0 {
		fmt.Fprintln(cmd.OutOrStdout(), "no authority was ever rotated")
	}
	for i, r := range res.Rotations {
		if i > 0 {
			fmt.Fprintln(cmd.OutOrStdout())
		}
		if err := a.out.Print(cmd.OutOrStdout(), res, func() cli.Table { return rotationTable(r) }); err != nil {
			return err
		}
	}
	return nil
}

func rotationTable(r *adminv1.Rotation) cli.Table {
	t := cli.Table{Rows: [][]string{
		{"kind", r.Kind}, {"phase", r.Phase + " (" + phaseWords(r.Phase) + ")"}, {"new authority", orDash(r.NewAuthority)}, {"old authority", orDash(r.OldAuthority)},
		{"why", r.Why}, {"started", timeCell(r.StartedAt)}, {"in this phase since", timeCell(r.PhaseAt)},
	}}
	add := func(name, value string) { t.Rows = append(t.Rows, []string{name, value}) }
	if r.DryRun {
		add("dry run", "nothing was changed")
	}
	if r.NotBefore != nil {
		add("signs at the earliest", timeCell(r.NotBefore))
	}
	if r.Deadline != nil {
		add("goes on at the latest", timeCell(r.Deadline))
	}
	if len(r.Ignore) > 0 {
		add("does not wait for", strings.Join(r.Ignore, " "))
	}
	if r.Problem != "" {
		add("problem", r.Problem)
	}
	t.Rows = append(t.Rows, gateRows(r.Gate)...)
	return t
}

func gateRows(g *adminv1.Gate) [][]string {
	if g == nil {
		return nil
	}
	rows := [][]string{{"ready", fmt.Sprintf("%d of %d", g.Ready, g.Total)}}
	if g.Svids > 0 {
		rows = append(rows, []string{"SVIDs under the old one", strconv.FormatUint(g.Svids, 10)})
	}
	for _, w := range g.Waiting {
		rows = append(rows, []string{"waits for", waitingWords(w)})
	}
	if g.More > 0 {
		rows = append(rows, []string{"waits for", fmt.Sprintf("%d more", g.More)})
	}
	return rows
}

func waitingWords(w *adminv1.Gate_Waiting) string {
	s := w.Name + ": " + w.Because
	if w.Until != nil {
		s += " (until " + timeCell(w.Until) + ")"
	}
	return s
}

func phaseWords(phase string) string {
	switch phase {
	case "prepare":
		return "the new authority is to be made"
	case "activate":
		return "everyone is to trust it before it signs"
	case "revoke":
		return "it signs; nothing live may be left under the old one"
	case "done":
		return "the old one is trusted no longer"
	case "rolledback":
		return "the new one is gone"
	}
	return "?"
}

// rotationProgress shows a rotation: on a terminal a bar for the phase and the names that it waits for, elsewhere a line whenever
// something changes.
type rotationProgress struct {
	w     io.Writer
	bar   bool
	lines int // of the last picture
	last  string
}

func newRotationProgress(w io.Writer) *rotationProgress {
	f, ok := w.(*os.File)
	return &rotationProgress{w: w, bar: ok && isTerminal(f)}
}

// shownNames is how many names a picture has.
const shownNames = 5

func (p *rotationProgress) show(r *adminv1.Rotation) {
	if !p.bar {
		if line := rotationLine(r); line != p.last {
			p.last = line
			fmt.Fprintln(p.w, line)
		}
		return
	}
	p.erase()
	picture := rotationPicture(r)
	for _, line := range picture {
		fmt.Fprintln(p.w, line)
	}
	p.lines = len(picture)
}

// erase takes the last picture off the terminal.
func (p *rotationProgress) erase() {
	if p.lines > 0 {
		fmt.Fprintf(p.w, "\x1b[%dA\x1b[J", p.lines)
		p.lines = 0
	}
}

func (p *rotationProgress) note(line string) {
	p.erase()
	fmt.Fprintln(p.w, line)
}

// end leaves the last picture.
func (p *rotationProgress) end() { p.lines = 0 }

func rotationLine(r *adminv1.Rotation) string {
	line := r.Kind + " " + r.Phase
	if g := r.Gate; g != nil {
		line += fmt.Sprintf(" %d/%d", g.Ready, g.Total)
		if g.Svids > 0 {
			line += fmt.Sprintf(", %d SVIDs under the old authority", g.Svids)
		}
		for _, w := range g.Waiting[:min(len(g.Waiting), shownNames)] {
			line += "; waits for " + waitingWords(w)
		}
		if more := len(g.Waiting) - shownNames + int(g.More); more > 0 {
			line += fmt.Sprintf("; and %d more", more)
		}
	}
	if r.Problem != "" {
		line += "; " + r.Problem
	}
	return line
}

// rotationPicture has a line for each phase, those that are over full.
func rotationPicture(r *adminv1.Rotation) []string {
	const width = 30
	var out []string
	over := true
	for _, phase := range []string{"prepare", "activate", "revoke"} {
		part, words := 0.0, ""
		switch {
		case r.Phase == phase:
			over = false
			if g := r.Gate; g != nil && g.Total > 0 {
				part, words = float64(g.Ready)/float64(g.Total), fmt.Sprintf("%d of %d", g.Ready, g.Total)
				if g.Svids > 0 {
					words += fmt.Sprintf(", %d SVIDs left", g.Svids)
				}
			}
		case over:
			part, words = 1, "done"
		}
		n := int(part * width)
		out = append(out, fmt.Sprintf("%-9s [%s%s] %s", phase, strings.Repeat("#", n), strings.Repeat(".", width-n), words))
	}
	if g := r.Gate; g != nil {
		for _, w := range g.Waiting[:min(len(g.Waiting), shownNames)] {
			out = append(out, "  waits for "+waitingWords(w))
		}
		if more := len(g.Waiting) - shownNames + int(g.More); more > 0 {
			out = append(out, fmt.Sprintf("  and %d more", more))
		}
	}
	if r.Problem != "" {
		out = append(out, "  "+r.Problem)
	}
	return out
}
