package main

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"countersign.io/countersign/api"
	adminv1 "countersign.io/countersign/api/admin/v1"
	workloadv1 "countersign.io/countersign/api/workload/v1"
	"countersign.io/countersign/cmd/internal/cli"
	"countersign.io/countersign/identity"
	"countersign.io/countersign/workloadapi"
)

func bundleCommand(a *admin) *cobra.Command {
	cmd := &cobra.Command{Use: "bundle", Short: "What the trust domain vouches for"}
	a.flags(cmd)
	var format string
	show := &cobra.Command{
		Use: "show", Short: "Show the trust bundle and the CA pin that agents need", Args: cobra.NoArgs,
		Example: `  countersign bundle show
  countersign bundle show --format pem > bundle.pem
  countersign bundle show --format spiffe > bundle.json`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if format != "" && format != "pem" && format != "spiffe" {
				return fmt.Errorf("%w: --format %q: want pem or spiffe", identity.ErrInvalid, format)
			}
			return a.call(cmd, func(ctx context.Context, c adminv1.AdminClient) error {
				res, err := c.GetBundle(ctx, &adminv1.Empty{})
				if err != nil {
					return err
				}
				if format == "pem" {
					for _, der := range res.Bundle.X509Authorities {
						if err := pem.Encode(cmd.OutOrStdout(), &pem.Block{Type: "CERTIFICATE", Bytes: der}); err != nil {
							return fmt.Errorf("writing the bundle: %w", err)
						}
					}
					return nil
				}
				if format == "spiffe" {
					b, err := api.BundleFromWire(res.Bundle)
					if err != nil {
						return err
					}
					doc, err := workloadapi.MarshalBundle(b)
					if err != nil {
						return err
					}
					_, err = fmt.Fprintln(cmd.OutOrStdout(), string(doc))
					return err
				}
				return a.out.Print(cmd.OutOrStdout(), res, func() cli.Table { return bundleTable(res.Bundle, res.CaPin) })
			})
		},
	}
	show.Flags().StringVar(&format, "format", "", "pem: the X.509 authorities alone; spiffe: the bundle as the SPIFFE standard writes it")
	cmd.AddCommand(show)
	cmd.AddCommand(trustCommands(a)...)
	return cmd
}

func bundleTable(b *workloadv1.Bundle, pin string) cli.Table {
	t := cli.Table{Rows: [][]string{
		{"trust domain", b.TrustDomain}, {"sequence", strconv.FormatUint(b.Sequence, 10)},
		{"refresh hint", (time.Duration(b.RefreshHintSeconds) * time.Second).String()}, {"ca pin", pin},
	}}
	for _, der := range b.X509Authorities {
		if cert, err := x509.ParseCertificate(der); err == nil {
			t.Rows = append(t.Rows, []string{"x509 authority", fmt.Sprintf("%x until %s", cert.SubjectKeyId, cert.NotAfter.UTC().Format(time.RFC3339))})
		}
	}
	for _, k := range b.JwtAuthorities {
		t.Rows = append(t.Rows, []string{"jwt authority", k.Kid})
	}
	return t
}

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
