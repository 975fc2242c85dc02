package main

import (
	"context"
	"strconv"

	"github.com/spf13/cobra"

	adminv1 "countersign.io/countersign/api/admin/v1"
	"countersign.io/countersign/cmd/internal/cli"
)

func statusCommand(a *admin) *cobra.Command {
	cmd := &cobra.Command{
		Use: "status", Short: "Show the cluster as the local member sees it", Args: cobra.NoArgs,
		Example: "  countersign status\n  countersign status -o json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.call(cmd, func(ctx context.Context, c adminv1.AdminClient) error {
				res, err := c.Status(ctx, &adminv1.Empty{})
				if err != nil {
					return err
				}
				return a.out.Print(cmd.OutOrStdout(), res, func() cli.Table { return statusTable(res) })
			})
		},
	}
	a.flags(cmd)
	return cmd
}

func statusTable(s *adminv1.StatusResponse) cli.Table {
	issuing := "yes"
	if !s.Issuing {
		issuing = "no: " + s.NotIssuingBecause
	}
	t := cli.Table{Rows: [][]string{
		{"trust domain", s.TrustDomain}, {"this member", s.MemberId}, {"version", s.Version}, {"leader", orDash(s.LeaderId)},
		{"issuing", issuing}, {"revision", strconv.FormatUint(s.Revision, 10)}, {"bundle sequence", strconv.FormatUint(s.BundleSequence, 10)},
		{"agents here", strconv.Itoa(int(s.AgentsConnected))},
	}}
	for _, d := range s.Degraded {
		t.Rows = append(t.Rows, []string{"degraded", d})
	}
	for _, m := range s.Members {
		role := "non-voter"
		switch {
		case m.Leader:
			role = "leader"
		case m.Voter:
			role = "follower"
		}
		t.Rows = append(t.Rows, []string{"member " + m.Id, m.Address + " (" + role + ")"})
	}
	return t
}
