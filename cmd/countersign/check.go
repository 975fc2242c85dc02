package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	adminv1 "countersign.io/countersign/api/admin/v1"
	"countersign.io/countersign/cmd/internal/cli"
	"countersign.io/countersign/config"
	"countersign.io/countersign/identity"
)

// The severities, as the member names them.
const (
	isError   = "error"
	isWarning = "warning"
	isNotice  = "notice"
)

// checkReport is what check prints.
type checkReport struct {
	TrustDomain string        `json:"trust_domain,omitempty"`
	Member      string        `json:"member,omitempty"`
	Examined    []string      `json:"examined"`
	Findings    []findingJSON `json:"findings"`
	Ignored     int           `json:"ignored,omitempty"`
}

type findingJSON struct {
	Severity string `json:"severity"`
	Check    string `json:"check"`
	Where    string `json:"where"`
	What     string `json:"what"`
	Todo     string `json:"todo"`
}

func (r *checkReport) find(severity, check, where, what, todo string) {
	r.Findings = append(r.Findings, findingJSON{severity, check, where, what, todo})
}

func checkCommand(a *admin) *cobra.Command {
	var file string
	var ignore []string
	cmd := &cobra.Command{
		Use: "check", Short: "Examine a running installation: what is wrong, and what to do", Args: cobra.NoArgs,
		Long: `Examine a running installation: the members and what they think of each other, clocks, versions, disks, the authorities' ends, the seal, backups,
agents that lag behind; and on a member's own machine, with its configuration (-c, or /etc/countersign/server.yaml if it can be read), who may read and write its files.

Each finding says how bad it is (error, warning, notice), what, where, and what to do. The exit code is 0 if there is none but notices, 1 if there is, and 5 if no
member answers. What you know of and accept you leave out with --ignore and the word in the column CHECK.`,
		Example: `  countersign check
  countersign check -c /etc/countersign/server.yaml -o json
  countersign check --member ca-1.example.org:8443 --ignore kek,backups`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			r := &checkReport{Examined: []string{}, Findings: []findingJSON{}}
			c, err := checkConfig(file, len(a.members()) > 0)
			if err != nil {
				return err
			}
			if c != nil {
				examineFiles(r, c)
			}
			if !cmd.Flag("timeout").Changed {
				a.timeout = time.Minute // a member that is down is waited for, and agents get their time
			}
			stop := working(cmd.ErrOrStderr(), "examining")
			asked := a.examine(cmd, r)
			stop()
			r.order(ignore)
			if err := a.printReport(cmd, r); err != nil {
				return err
			}
			if asked != nil {
				return asked
			}
			return r.verdict()
		},
	}
	a.flags(cmd)
	cmd.Flags().StringVarP(&file, "config", "c", "", "configuration of the member on this machine, whose files are examined (default "+config.DefaultServerFile+" if it can be read)")
	cmd.Flags().StringSliceVar(&ignore, "ignore", nil, "leave out what these checks find, such as kek (repeatable)")
	return cmd
}

// checkConfig reads the configuration of the member here; nil: there is none to be read, and it was not asked for.
func checkConfig(file string, remote bool) (*localConfig, error) {
	told := file != ""
	if !told {
		if file = config.DefaultServerFile; remote {
			return nil, nil
		}
	}
	c, err := config.LoadServer(file)
	if err != nil {
		if told {
			return nil, fmt.Errorf("%w: %w", identity.ErrInvalid, err)
		}
		return nil, nil
	}
	return &localConfig{file, c}, nil
}

// examine asks the member. The clock is asked for by itself: what Examine takes its time for must not count.
func (a *admin) examine(cmd *cobra.Command, r *checkReport) error {
	return a.connect(cmd, func(ctx context.Context, conn *grpc.ClientConn) error {
		c := adminv1.NewCheckupClient(conn)
		if _, err := c.Clock(ctx, &adminv1.ClockRequest{}); err != nil { // the connection is made by it
			return err
		}
		before := time.Now()
		clock, err := c.Clock(ctx, &adminv1.ClockRequest{})
		if err != nil {
			return err
		}
		compareClocks(r, before, clock.Now.AsTime(), time.Now())
		res, err := c.Examine(ctx, &adminv1.ExamineRequest{})
		if err != nil {
			return err
		}
		r.TrustDomain, r.Member = res.TrustDomain, res.MemberId
		r.Examined = append(r.Examined, res.Examined...)
		for _, f := range res.Findings {
			r.find(f.Severity, f.Check, f.Where, f.What, f.Todo)
		}
		return nil
	})
}

// compareClocks takes a member's time, told between before and after.
func compareClocks(r *checkReport, before, told, after time.Time) {
	r.Examined = append(r.Examined, "clock-here")
	off := time.Duration(0)
	switch {
	case told.Before(before):
		off = told.Sub(before)
	case told.After(after):
		off = told.Sub(after)
	}
	d := off.Abs()
	if d < 2*time.Second {
		return
	}
	severity := isWarning
	if d >= 10*time.Second {
		severity = isError
	}
	r.find(severity, "clock-here", "this machine", fmt.Sprintf("its clock is %v %s the member's", d.Round(100*time.Millisecond), map[bool]string{true: "behind", false: "ahead of"}[off > 0]),
		"run NTP on both: SVIDs are refused where they have not begun yet, or have ended")
}

// order puts the worst first and takes out what is to be ignored.
func (r *checkReport) order(ignore []string) {
	r.Findings = slices.DeleteFunc(r.Findings, func(f findingJSON) bool {
		out := slices.Contains(ignore, f.Check)
		if out {
			r.Ignored++
		}
		return out
	})
	rank := map[string]int{isError: 0, isWarning: 1, isNotice: 2}
	slices.SortStableFunc(r.Findings, func(a, b findingJSON) int {
		if d := rank[a.Severity] - rank[b.Severity]; d != 0 {
			return d
		}
		return strings.Compare(a.Check+a.Where, b.Check+b.Where)
	})
	slices.Sort(r.Examined)
	r.Examined = slices.Compact(r.Examined)
}

// verdict is an error, so that scripts see it, if somebody should look after something.
func (r *checkReport) verdict() error {
	n := map[string]int{}
	for _, f := range r.Findings {
		n[f.Severity]++
	}
	if n[isError]+n[isWarning] == 0 {
		return nil
	}
	return fmt.Errorf("%d errors and %d warnings: each says what to do", n[isError], n[isWarning])
}

func (a *admin) printReport(cmd *cobra.Command, r *checkReport) error {
	return a.out.Print(cmd.OutOrStdout(), r, func() cli.Table {
		if len(r.Findings) == 0 {
			return cli.Table{Rows: [][]string{{"nothing found; examined: " + strings.Join(r.Examined, ", ")}}}
		}
		t := cli.Table{Header: []string{"SEVERITY", "CHECK", "WHERE", "WHAT", "WHAT TO DO"}}
		for _, f := range r.Findings {
			t.Rows = append(t.Rows, []string{f.Severity, f.Check, oneLine(f.Where), oneLine(f.What), oneLine(f.Todo)})
		}
		return t
	})
}

func oneLine(s string) string { return clean(strings.ReplaceAll(s, "\n", "; ")) }
