package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	adminv1 "countersign.io/countersign/api/admin/v1"
	"countersign.io/countersign/cmd/internal/cli"
)

func clusterCommand(a *admin) *cobra.Command {
	cmd := &cobra.Command{Use: "cluster", Short: "See and care for the members of the CA cluster"}
	a.flags(cmd)
	status := &cobra.Command{
		Use: "status", Short: "Ask every member how it stands", Args: cobra.NoArgs,
		Long: `Ask every member how it stands, and say what somebody should look after. It works without a leader too, and then says so.

The exit code is 0 if all is well, 1 if something is not, 5 if no member answers here.`,
		Example: "  countersign cluster status\n  countersign cluster status -o json | jq '.members[] | select(.healthy | not)'",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.call(cmd, func(ctx context.Context, c adminv1.AdminClient) error {
				res, err := c.ClusterStatus(ctx, &adminv1.Empty{})
				if err != nil {
					return err
				}
				if err := a.out.Print(cmd.OutOrStdout(), res, func() cli.Table { return clusterTable(res) }); err != nil {
					return err
				}
				if !a.out.JSON() {
					if err := a.out.Print(cmd.OutOrStdout(), res, func() cli.Table { return memberTable(res) }); err != nil {
						return err
					}
				}
				return health(res)
			})
		},
	}
	members := &cobra.Command{
		Use: "members", Short: "List the members as the local one knows them", Args: cobra.NoArgs,
		Example: "  countersign cluster members",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.call(cmd, func(ctx context.Context, c adminv1.AdminClient) error {
				res, err := c.Status(ctx, &adminv1.Empty{})
				if err != nil {
					return err
				}
				return a.out.Print(cmd.OutOrStdout(), res.Members, func() cli.Table {
					t := cli.Table{Header: []string{"NAME", "ADDRESS", "ROLE"}}
					for _, m := range res.Members {
						t.Rows = append(t.Rows, []string{m.Id, m.Address, role(m.Voter, m.Leader)})
					}
					return t
				})
			})
		},
	}
	var dry *bool
	remove := &cobra.Command{
		Use: "remove NAME", Short: "Remove a member for good", Args: cobra.ExactArgs(1), ValidArgsFunction: a.completeMembers,
		Long: `Remove a member for good. Its data is of no use to it any more: to take part again it needs an empty data_dir and a new
join token. A removal after which no majority of members would be up is refused.

Whoever has the removed member's disk and its key-encryption key can still open the authorities' keys: see docs/OPERATIONS.md.`,
		Example: "  countersign cluster remove ca-3 --dry-run\n  countersign cluster remove ca-3",
		RunE: func(cmd *cobra.Command, args []string) error {
			if *dry {
				return a.preview(cmd, func(ctx context.Context, c adminv1.PreviewClient) (*adminv1.PreviewResponse, error) {
					return c.RemoveMember(ctx, &adminv1.NameRequest{Name: args[0]})
				})
			}
			return a.call(cmd, func(ctx context.Context, c adminv1.AdminClient) error {
				if _, err := c.RemoveMember(ctx, &adminv1.NameRequest{Name: args[0]}); err != nil {
					return err
				}
				_, err := fmt.Fprintf(cmd.ErrOrStderr(), "%s is no member any more: stop it, and empty its data_dir\n", args[0])
				return err
			})
		},
	}
	dry = dryRun(remove)
	transfer := &cobra.Command{
		Use: "transfer-leader [NAME]", Short: "Let another member lead", Args: cobra.MaximumNArgs(1), ValidArgsFunction: a.completeMembers,
		Long:    "Let another member lead: the named one, or whoever is most up to date. A member that is stopped does this by itself.",
		Example: "  countersign cluster transfer-leader\n  countersign cluster transfer-leader ca-2",
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.call(cmd, func(ctx context.Context, c adminv1.AdminClient) error {
				_, err := c.TransferLeader(ctx, &adminv1.NameRequest{Name: strings.Join(args, "")})
				return err
			})
		},
	}
	cmd.AddCommand(status, members, remove, transfer, recoverCommand())
	return cmd
}

func role(voter, leader bool) string {
	switch {
	case leader:
		return "leader"
	case voter:
		return "follower"
	}
	return "non-voter"
}

// health is an error, so that scripts see it, if somebody should look after the cluster.
func health(s *adminv1.ClusterStatusResponse) error {
	if s.Healthy {
		return nil
	}
	var why []string
	if s.LeaderId == "" {
		why = append(why, "no member leads: nothing can be changed until a majority of members is up and connected")
	}
	for _, m := range s.Members {
		if !m.Healthy {
			why = append(why, m.Id+": "+m.UnhealthyBecause)
		}
	}
	return errors.New("the cluster is not well: " + strings.Join(why, "; "))
}

func clusterTable(s *adminv1.ClusterStatusResponse) cli.Table {
	healthy := "yes"
	if !s.Healthy {
		healthy = "no"
	}
	return cli.Table{Rows: [][]string{
		{"trust domain", s.TrustDomain}, {"leader", orDash(s.LeaderId)}, {"healthy", healthy},
		{"members that may fail", strconv.Itoa(int(s.FailureTolerance))}, {"level", strconv.Itoa(int(s.Level))},
	}}
}

func memberTable(s *adminv1.ClusterStatusResponse) cli.Table {
	t := cli.Table{Header: []string{"NAME", "ADDRESS", "ROLE", "HEALTHY", "ISSUING", "APPLIED", "LAG", "VERSION", "LEVEL", "DISK FREE", "UP"}}
	yes := map[bool]string{true: "yes", false: "no"}
	for _, m := range s.Members {
		row := []string{m.Id, m.Address, role(m.Voter, m.Leader), yes[m.Healthy], yes[m.Issuing], strconv.FormatUint(m.AppliedIndex, 10), strconv.FormatUint(m.Lag, 10), orDash(m.Version), "-", "-", "-"}
		if m.Level > 0 {
			row[8] = strconv.Itoa(int(m.Level))
		} else { // it did not answer
			row[4], row[5], row[6] = "-", "-", "-"
		}
		if m.Level > 0 && m.Version == "" { // of a version that tells nothing of itself
			row[4] = "-"
		}
		if m.DiskTotal > 0 {
			row[9] = fmt.Sprintf("%s (%d%%)", size(m.DiskFree), m.DiskFree*100/m.DiskTotal)
		}
		if m.StartedAt != nil {
			row[10] = time.Since(m.StartedAt.AsTime()).Round(time.Second).String()
		}
		t.Rows = append(t.Rows, row)
	}
	return t
}

// size is a number of bytes as people read it.
func size(n uint64) string {
	f, unit := float64(n), "B"
	for _, next := range []string{"KiB", "MiB", "GiB", "TiB"} {
		if f < 1024 {
			break
		}
		f, unit = f/1024, next
	}
	return strconv.FormatFloat(f, 'f', 1, 64) + " " + unit
}
