package main

import (
	"context"
	"crypto/x509"
	"fmt"
	"os"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	adminv1 "countersign.io/countersign/api/admin/v1"
	"countersign.io/countersign/audit"
	"countersign.io/countersign/cmd/internal/cli"
	"countersign.io/countersign/identity"
)

func (a *admin) auditVerify() *cobra.Command {
	var bundle string
	var collected, unsigned bool
	cmd := &cobra.Command{
		Use: "verify [FOLDER | FILE]", Short: "Name the first record that was altered, dropped or moved, if any",
		Long: `Verify checks the chain of a member's records, and the signatures of its checkpoints against the trust bundle: with a folder or a
file, those, without any member running; without, the log of the member on this machine. It fails if anything is wrong.

What is behind the last checkpoint is chained and not signed: whoever owns the disk could have changed it.`,
		Example: `  countersign bundle show --format pem > bundle.pem     # of the time of the records, or of several times together
  countersign audit verify --bundle bundle.pem /var/lib/countersign/audit
  countersign audit verify                               # the member on this machine, by its own bundle
  countersign audit verify --bundle bundle.pem --collected /var/log/collected.jsonl`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c := audit.VerifyConfig{Collected: collected}
			if bundle != "" {
				pool, err := bundleFile(bundle)
				if err != nil {
					return err
				}
				c.Roots = pool
			} else if len(args) > 0 && !unsigned {
				return fmt.Errorf("%w: name the trust bundle (--bundle FILE, from countersign bundle show --format pem), or say --no-signatures to check the chain alone", identity.ErrInvalid)
			}
			rep, err := a.verify(cmd, args, c, unsigned)
			if err != nil {
				return err
			}
			if err := a.out.Print(cmd.OutOrStdout(), &rep, func() cli.Table { return verifyTable(&rep, unsigned) }); err != nil {
				return err
			}
			if n := uint64(len(rep.Faults)) + rep.More; n > 0 {
				return fmt.Errorf("the audit log is not what was written: %d faults, the first: %s", n, rep.Faults[0])
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&bundle, "bundle", "", "PEM certificates that the checkpoints' signatures must lead to")
	cmd.Flags().BoolVar(&unsigned, "no-signatures", false, "do not check signatures")
	cmd.Flags().BoolVar(&collected, "collected", false, "the lines are from a collector: some may be there twice, and a member without files begins anew at each start")
	return cmd
}

func bundleFile(path string) (*x509.CertPool, error) {
	raw, err := readInput(path)
	if err != nil {
		return nil, fmt.Errorf("reading --bundle: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(raw) {
		return nil, fmt.Errorf("%w: --bundle %s holds no PEM certificate", identity.ErrInvalid, path)
	}
	return pool, nil
}

func (a *admin) verify(cmd *cobra.Command, paths []string, c audit.VerifyConfig, unsigned bool) (audit.Report, error) {
	if len(paths) == 0 {
		return a.verifyOnline(cmd, c, unsigned)
	}
	if info, err := os.Stat(paths[0]); err == nil && info.IsDir() {
		return audit.VerifyDir(paths[0], c)
	}
	return audit.VerifyFiles(paths, c)
}

// verifyOnline checks what the member itself shows of its log. A member that lies could show another: read its disk for that.
func (a *admin) verifyOnline(cmd *cobra.Command, c audit.VerifyConfig, unsigned bool) (audit.Report, error) {
	if c.Roots == nil && !unsigned {
		err := a.call(cmd, func(ctx context.Context, client adminv1.AdminClient) error {
			res, err := client.GetBundle(ctx, &adminv1.Empty{})
			if err != nil {
				return err
			}
			c.Roots = x509.NewCertPool()
			for _, der := range res.Bundle.X509Authorities {
				cert, err := x509.ParseCertificate(der)
				if err != nil {
					return fmt.Errorf("parsing the bundle: %w", err)
				}
				c.Roots.AddCert(cert)
			}
			return nil
		})
		if err != nil {
			return audit.Report{}, err
		}
	}
	c.Whole = true
	v, n := audit.NewVerifier(c), 0
	err := a.auditStream(cmd, &adminv1.AuditQuery{}, func(line string) error {
		n++
		v.Line("the member's log", n, []byte(line))
		return nil
	})
	if err != nil {
		return audit.Report{}, err
	}
	return v.Done(), nil
}

func verifyTable(r *audit.Report, unsigned bool) cli.Table {
	checkpoints := strconv.FormatUint(r.Checkpoints, 10)
	if unsigned {
		checkpoints += " (signatures not checked)"
	}
	t := cli.Table{Rows: [][]string{
		{"member", orDash(r.Member)}, {"records", fmt.Sprintf("%d (%d to %d)", r.Records, r.First, r.Last)},
		{"time", r.Begins.UTC().Format(time.RFC3339) + " to " + r.Ends.UTC().Format(time.RFC3339)},
		{"checkpoints", checkpoints}, {"signed up to", fmt.Sprintf("record %d; %d are behind it", r.Signed, r.Unsigned)},
	}}
	if r.Removed > 0 {
		t.Rows = append(t.Rows, []string{"retention", fmt.Sprintf("took away the records up to %d", r.Removed)})
	}
	if r.Torn > 0 {
		t.Rows = append(t.Rows, []string{"torn", fmt.Sprintf("the last line has no end (%d bytes): a write under way, or a crash", r.Torn)})
	}
	if len(r.Faults) == 0 {
		t.Rows = append(t.Rows, []string{"result", "nothing altered, dropped or moved"})
	}
	for _, f := range r.Faults {
		t.Rows = append(t.Rows, []string{"FAULT", f.String()})
	}
	if r.More > 0 {
		t.Rows = append(t.Rows, []string{"FAULT", fmt.Sprintf("and %d more", r.More)})
	}
	return t
}
