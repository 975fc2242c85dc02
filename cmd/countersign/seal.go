package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	adminv1 "countersign.io/countersign/api/admin/v1"
	"countersign.io/countersign/cmd/internal/cli"
)

func sealCommand(a *admin) *cobra.Command {
	cmd := &cobra.Command{
		Use: "seal", Short: "See and change the keys that everything secret rests under",
		Long: `Everything secret rests under data keys, which all members share; each member's data keys rest under a key-encryption key
of its own, seal.key. docs/SEALING.md says more.`,
	}
	a.flags(cmd)
	status := &cobra.Command{
		Use: "status", Short: "Show the data keys, what is sealed under each, and what every member has", Args: cobra.NoArgs,
		Example: "  countersign seal status\n  countersign seal status -o json | jq .values_old",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.call(cmd, func(ctx context.Context, c adminv1.AdminClient) error {
				res, err := c.SealStatus(ctx, &adminv1.Empty{})
				if err != nil {
					return err
				}
				if a.out.String() != "table" {
					return a.out.Print(cmd.OutOrStdout(), res, nil)
				}
				for _, t := range sealTables(res) {
					if err := a.out.Print(cmd.OutOrStdout(), res, func() cli.Table { return t }); err != nil {
						return err
					}
				}
				return nil
			})
		},
	}
	var dry *bool
	rotate := &cobra.Command{
		Use: "rotate", Short: "Make a new data key and seal everything anew under it", Args: cobra.NoArgs,
		Long: `Make a new data key, give it to every member, and seal everything anew under it. Issuance goes on meanwhile. Every member
on the list must get the key first: one that is down is waited for, or removed (countersign cluster remove). When the command
ends early, by --timeout (5m unless it is given) or Ctrl-C, the rotation goes on; run it again to watch it.

Older data keys stay, to open old logs, snapshots and backups.`,
		Example: "  countersign seal rotate --dry-run\n  countersign seal rotate\n  countersign seal rotate --timeout 10m -o json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if *dry {
				return a.preview(cmd, func(ctx context.Context, c adminv1.PreviewClient) (*adminv1.PreviewResponse, error) {
					return c.RotateSeal(ctx, &adminv1.Empty{})
				})
			}
			return sealProgress(cmd, a, func(ctx context.Context, c adminv1.AdminClient) (grpc.ServerStreamingClient[adminv1.SealProgress], error) {
				return c.RotateSeal(ctx, &adminv1.Empty{})
			})
		},
	}
	dry = dryRun(rotate)
	rewrap := &cobra.Command{
		Use: "rewrap", Short: "Wrap this member's data keys anew, and seal anew what is under an old one", Args: cobra.NoArgs,
		Long: `Wrap the data keys of the member that is asked under its present seal.key again, such as after a new version of that key
in its KMS, and seal anew what is still under an old data key. To change seal.key itself, name the old one in seal.old_keys and
restart the member: it wraps its data keys under the new one by itself.`,
		Example: "  countersign seal rewrap",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return sealProgress(cmd, a, func(ctx context.Context, c adminv1.AdminClient) (grpc.ServerStreamingClient[adminv1.SealProgress], error) {
				return c.RewrapSeal(ctx, &adminv1.Empty{})
			})
		},
	}
	cmd.AddCommand(status, rotate, rewrap)
	return cmd
}

// sealProgress prints a change's steps as they come: lines, or one JSON or YAML document for each.
func sealProgress(cmd *cobra.Command, a *admin, start func(context.Context, adminv1.AdminClient) (grpc.ServerStreamingClient[adminv1.SealProgress], error)) error {
	if f := cmd.Flag("timeout"); f != nil && !f.Changed {
		a.timeout = 5 * time.Minute // a member may have to come back first
	}
	return a.call(cmd, func(ctx context.Context, c adminv1.AdminClient) error {
		stream, err := start(ctx, c)
		if err != nil {
			return err
		}
		for {
			p, err := stream.Recv()
			if errors.Is(err, io.EOF) {
				return nil
			}
			if ctx.Err() != nil {
				return fmt.Errorf("stopped watching: %w: what was begun goes on by itself: countersign seal status shows how far it is, and the same command watches it again", ctx.Err())
			}
			if err != nil {
				return err
			}
			if a.out.String() == "table" {
				_, err = fmt.Fprintln(cmd.OutOrStdout(), progressLine(p))
			} else {
				err = a.out.Print(cmd.OutOrStdout(), p, nil)
			}
			if err != nil {
				return fmt.Errorf("writing the progress: %w", err)
			}
		}
	})
}

func progressLine(p *adminv1.SealProgress) string {
	out := p.Phase
	if p.Total > 0 {
		out += fmt.Sprintf(" %d/%d", p.Done, p.Total)
	}
	if p.Detail != "" {
		out += ": " + p.Detail
	}
	if len(p.WaitingFor) > 0 && !strings.Contains(p.Detail, "waiting for") {
		out += " (waiting for " + strings.Join(p.WaitingFor, ", ") + ")"
	}
	return out
}

func sealTables(s *adminv1.SealStatusResponse) []cli.Table {
	terms := cli.Table{Header: []string{"DATA KEY", "STATE", "VALUES", "KEY ID", "MADE"}}
	for _, t := range s.Terms {
		state := t.State
		if len(t.Holders) > 0 && t.State == "pending" {
			state += " (held by " + strings.Join(t.Holders, ", ") + ")"
		}
		terms.Rows = append(terms.Rows, []string{strconv.Itoa(int(t.Number)), state, strconv.FormatUint(t.Values, 10), t.KeyId, t.CreatedAt.AsTime().UTC().Format(time.RFC3339)})
	}
	members := cli.Table{Header: []string{"MEMBER", "DATA KEYS", "KEY-ENCRYPTION KEY"}}
	for _, m := range s.Members {
		kek := m.Kek
		if m.Problem != "" {
			kek = m.Problem
		}
		members.Rows = append(members.Rows, []string{m.Id, ranges(m.Terms), orDash(kek)})
	}
	old := cli.Table{Rows: [][]string{{"sealed values", strconv.FormatUint(s.Values, 10)}, {"under an old data key", strconv.FormatUint(s.ValuesOld, 10)}}}
	return []cli.Table{terms, members, old}
}

// ranges writes 1,2,3,7 as 1-3, 7.
func ranges(terms []uint32) string {
	var out []string
	for i := 0; i < len(terms); {
		j := i
		for j+1 < len(terms) && terms[j+1] == terms[j]+1 {
			j++
		}
		if j == i {
			out = append(out, fmt.Sprint(terms[i]))
		} else {
			out = append(out, fmt.Sprintf("%d-%d", terms[i], terms[j]))
		}
		i = j + 1
	}
	return orDash(strings.Join(out, ", "))
}
