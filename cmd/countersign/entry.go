package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	adminv1 "countersign.io/countersign/api/admin/v1"
	"countersign.io/countersign/cmd/internal/cli"
	"countersign.io/countersign/identity"
)

func entryCommand(a *admin) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "entry",
		Short: "Say which workloads get which SPIFFE IDs",
		Long: `An entry gives a SPIFFE ID to every workload that has all of its selectors. Pods need none: without an entry a pod is
spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/SERVICEACCOUNT.

Selectors: ` + strings.Join(identity.SelectorNames(), ", ") + `.
Placeholders such as {k8s:ns} in the ID and the DNS names are filled from the workload's selectors.`,
	}
	a.flags(cmd)
	cmd.AddCommand(entryCreate(a), entryUpdate(a), entryList(a), entryShow(a), entryDelete(a))
	return cmd
}

// entryFlags are the fields of an entry; expires is relative, because that is how a person thinks of it.
type entryFlags struct {
	e                *adminv1.Entry
	x509, jwt, after time.Duration
	dry              *bool
}

func (f *entryFlags) add(a *admin, cmd *cobra.Command) {
	f.e, f.dry = &adminv1.Entry{}, dryRun(cmd)
	p := cmd.Flags()
	p.StringSliceVarP(&f.e.Selectors, "selector", "s", nil, "type:name:value that the workload must have (repeatable: all must match)")
	p.StringVar(&f.e.SpiffeId, "id", "", "the SPIFFE ID, or a template of it")
	p.DurationVar(&f.x509, "x509-ttl", 0, "lifetime of X.509-SVIDs (default the trust domain's)")
	p.DurationVar(&f.jwt, "jwt-ttl", 0, "lifetime of JWT-SVIDs (default the trust domain's)")
	p.StringSliceVar(&f.e.DnsNames, "dns", nil, "DNS name in the certificate, or a template (repeatable)")
	p.StringVar(&f.e.Hint, "hint", "", "a hint for workloads with several identities")
	p.StringSliceVar(&f.e.FederatesWith, "federates-with", nil, "foreign trust domain whose bundle the workload gets (repeatable)")
	p.StringVar(&f.e.AdminRole, "admin-role", "", "the identity may administer the cluster as reader, operator or security (docs/ADMIN.md)")
	p.BoolVar(&f.e.Admin, "admin", false, "the same as --admin-role security")
	p.BoolVar(&f.e.Downstream, "downstream", false, "the identity is a CA cluster below this one: it may have an authority signed")
	p.DurationVar(&f.after, "expires-in", 0, "the entry ends after this time")
	_ = cmd.RegisterFlagCompletionFunc("admin-role", cobra.FixedCompletions([]string{"reader", "operator", "security"}, cobra.ShellCompDirectiveNoFileComp))
	_ = cmd.RegisterFlagCompletionFunc("federates-with", func(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
		return a.completeFederations(cmd, nil, "")
	})
	_ = cmd.RegisterFlagCompletionFunc("selector", func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		var out []string
		for _, n := range identity.SelectorNames() {
			out = append(out, n+":")
		}
		return out, cobra.ShellCompDirectiveNoSpace | cobra.ShellCompDirectiveNoFileComp
	})
}

func (f *entryFlags) times() {
	if f.x509 != 0 {
		f.e.X509Ttl = durationpb.New(f.x509)
	}
	if f.jwt != 0 {
		f.e.JwtTtl = durationpb.New(f.jwt)
	}
	if f.after != 0 {
		f.e.ExpiresAt = timestamppb.New(time.Now().Add(f.after))
	}
}

func entryCreate(a *admin) *cobra.Command {
	var f entryFlags
	cmd := &cobra.Command{
		Use: "create", Short: "Create an entry", Args: cobra.NoArgs,
		Example: `  countersign entry create -s k8s:ns:prod -s k8s:sa:web --id spiffe://example.org/web --dns web.prod.svc
  countersign entry create -s k8s:cluster:edge --id 'spiffe://example.org/edge/{k8s:ns}/{k8s:sa}'
  countersign entry create -s k8s:ns:ops -s k8s:sa:deployer --id spiffe://example.org/deployer --admin-role operator
  countersign entry create -s unix:user:postgres -s agent:kind:join_token --id spiffe://example.org/db --x509-ttl 30m`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			f.times()
			if *f.dry {
				return a.preview(cmd, func(ctx context.Context, c adminv1.PreviewClient) (*adminv1.PreviewResponse, error) {
					return c.CreateEntry(ctx, f.e)
				})
			}
			return a.call(cmd, func(ctx context.Context, c adminv1.AdminClient) error {
				res, err := c.CreateEntry(ctx, f.e)
				if err != nil {
					return err
				}
				warn(cmd, res)
				return a.out.Print(cmd.OutOrStdout(), res, func() cli.Table { return entryTable(res) })
			})
		},
	}
	f.add(a, cmd)
	return cmd
}

func entryUpdate(a *admin) *cobra.Command {
	var f entryFlags
	cmd := &cobra.Command{
		Use: "update ENTRY-ID", Short: "Change the named fields of an entry", Args: cobra.ExactArgs(1),
		Example:           "  countersign entry update 7c1e0f --x509-ttl 30m --dns web.prod.svc,web.prod.svc.cluster.local",
		ValidArgsFunction: a.completeEntries,
		RunE: func(cmd *cobra.Command, args []string) error {
			f.times()
			return a.connect(cmd, func(ctx context.Context, conn *grpc.ClientConn) error {
				c := adminv1.NewAdminClient(conn)
				e, err := c.GetEntry(ctx, &adminv1.NameRequest{Name: args[0]})
				if err != nil {
					return err
				}
				f.merge(cmd, e)
				if *f.dry {
					return a.previewOn(ctx, cmd, conn, func(ctx context.Context, c adminv1.PreviewClient) (*adminv1.PreviewResponse, error) {
						return c.UpdateEntry(ctx, e)
					})
				}
				// e.Revision goes back: a change by somebody else in between is refused, not overwritten.
				res, err := c.UpdateEntry(ctx, e)
				if err != nil {
					return err
				}
				warn(cmd, res)
				return a.out.Print(cmd.OutOrStdout(), res, func() cli.Table { return entryTable(res) })
			})
		},
	}
	f.add(a, cmd)
	return cmd
}

// merge copies the flags that were given.
func (f *entryFlags) merge(cmd *cobra.Command, e *adminv1.Entry) {
	for name, set := range map[string]func(){
		"selector":       func() { e.Selectors = f.e.Selectors },
		"id":             func() { e.SpiffeId = f.e.SpiffeId },
		"x509-ttl":       func() { e.X509Ttl = f.e.X509Ttl },
		"jwt-ttl":        func() { e.JwtTtl = f.e.JwtTtl },
		"dns":            func() { e.DnsNames = f.e.DnsNames },
		"hint":           func() { e.Hint = f.e.Hint },
		"federates-with": func() { e.FederatesWith = f.e.FederatesWith },
		"admin":          func() { e.Admin = f.e.Admin },
		"admin-role":     func() { e.AdminRole, e.Admin = f.e.AdminRole, false },
		"downstream":     func() { e.Downstream = f.e.Downstream },
		"expires-in":     func() { e.ExpiresAt = f.e.ExpiresAt },
	} {
		if cmd.Flags().Changed(name) {
			set()
		}
	}
}

func entryList(a *admin) *cobra.Command {
	return &cobra.Command{
		Use: "list", Short: "List the entries", Args: cobra.NoArgs, Example: "  countersign entry list -o json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.call(cmd, func(ctx context.Context, c adminv1.AdminClient) error {
				all := &adminv1.ListEntriesResponse{}
				for page := (&adminv1.ListRequest{}); ; page.PageToken = all.NextPageToken {
					res, err := c.ListEntries(ctx, page)
					if err != nil {
						return err
					}
					all.Entries, all.NextPageToken = append(all.Entries, res.Entries...), res.NextPageToken
					if all.NextPageToken == "" {
						break
					}
				}
				return a.out.Print(cmd.OutOrStdout(), all, func() cli.Table { return entryTable(all.Entries...) })
			})
		},
	}
}

func entryShow(a *admin) *cobra.Command {
	return &cobra.Command{
		Use: "show ENTRY-ID", Short: "Show one entry", Args: cobra.ExactArgs(1), Example: "  countersign entry show 7c1e0f -o yaml",
		ValidArgsFunction: a.completeEntries,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.call(cmd, func(ctx context.Context, c adminv1.AdminClient) error {
				res, err := c.GetEntry(ctx, &adminv1.NameRequest{Name: args[0]})
				if err != nil {
					return err
				}
				warn(cmd, res)
				return a.out.Print(cmd.OutOrStdout(), res, func() cli.Table { return entryTable(res) })
			})
		},
	}
}

// warn says what of an entry has no effect yet, beside the answer, which a script may read.
func warn(cmd *cobra.Command, e *adminv1.Entry) {
	for _, w := range e.Warnings {
		fmt.Fprintln(cmd.ErrOrStderr(), "warning:", w)
	}
}

func entryDelete(a *admin) *cobra.Command {
	var dry *bool
	cmd := &cobra.Command{
		Use: "delete ENTRY-ID", Short: "Delete an entry: its workloads lose the identity at once", Args: cobra.ExactArgs(1),
		Example: "  countersign entry delete 7c1e0f --dry-run\n  countersign entry delete 7c1e0f", ValidArgsFunction: a.completeEntries,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.named(cmd, *dry, args[0], func(ctx context.Context, c adminv1.AdminClient, r *adminv1.NameRequest) error {
				_, err := c.DeleteEntry(ctx, r)
				return err
			}, func(ctx context.Context, c adminv1.PreviewClient, r *adminv1.NameRequest) (*adminv1.PreviewResponse, error) {
				return c.DeleteEntry(ctx, r)
			})
		},
	}
	dry = dryRun(cmd)
	return cmd
}

func entryTable(entries ...*adminv1.Entry) cli.Table {
	t := cli.Table{Header: []string{"ID", "SPIFFE ID", "SELECTORS", "X509 TTL", "JWT TTL", "EXPIRES", "POWER"}}
	ttl := func(d *durationpb.Duration) string {
		if d == nil {
			return "default"
		}
		return d.AsDuration().String()
	}
	for _, e := range entries {
		t.Rows = append(t.Rows, []string{e.Id, e.SpiffeId, strings.Join(e.Selectors, " "), ttl(e.X509Ttl), ttl(e.JwtTtl), timeCell(e.ExpiresAt), orDash(strings.Join(powers(e), " "))})
	}
	return t
}

// powers are what an identity may do beyond what workloads may.
func powers(e *adminv1.Entry) (out []string) {
	switch {
	case e.AdminRole != "":
		out = append(out, "admin:"+e.AdminRole)
	case e.Admin:
		out = append(out, "admin:"+string(identity.AdminSecurity))
	}
	if e.Downstream {
		out = append(out, "downstream")
	}
	return out
}
