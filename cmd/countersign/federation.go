package main

import (
	"context"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	"countersign.io/countersign/api"
	adminv1 "countersign.io/countersign/api/admin/v1"
	"countersign.io/countersign/cmd/internal/cli"
	"countersign.io/countersign/federation"
	"countersign.io/countersign/identity"
)

func federationCommand(a *admin) *cobra.Command {
	cmd := &cobra.Command{
		Use: "federation", Short: "Trust other trust domains, and be trusted by them",
		Long: `Trust other trust domains: fetch their bundles, at the hint that they give, and hand them to the workloads whose entries
federate with them (entry create --federates-with).

The usual way is one string each way: "invite" here, "accept" there, and what that prints back here. docs/FEDERATION.md says
what each side then trusts the other for.`,
	}
	a.flags(cmd)
	cmd.AddCommand(federationInvite(a), federationAccept(a), federationPut(a, false), federationPut(a, true), federationDelete(a, "federation"), federationList(a), federationShow(a), federationRefresh(a))
	return cmd
}

// callFederation is call for the service of federation.
func (a *admin) callFederation(cmd *cobra.Command, f func(context.Context, adminv1.FederationClient) error) error {
	return a.connect(cmd, func(ctx context.Context, c *grpc.ClientConn) error { return f(ctx, adminv1.NewFederationClient(c)) })
}

func federationInvite(a *admin) *cobra.Command {
	var profile string
	cmd := &cobra.Command{
		Use: "invite", Short: "Print what another trust domain needs to trust this one", Args: cobra.NoArgs,
		Long: `Print a token with this trust domain's name, where its bundle is read, who serves it, and the bundle as it is now. There is
no secret in it, but whoever changes it on the way is trusted in place of this trust domain: send it by a way that both sides
trust. The other side gives it to "countersign federation accept".`,
		Example: "  countersign federation invite > to-partner\n  countersign federation invite --profile https_web",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.callFederation(cmd, func(ctx context.Context, c adminv1.FederationClient) error {
				token, e, err := ownInvite(ctx, c, profile)
				if err != nil {
					return err
				}
				return a.out.Print(cmd.OutOrStdout(), map[string]string{"token": token, "trust_domain": e.TrustDomain, "url": e.Url, "profile": e.Profile, "endpoint_id": e.EndpointId},
					func() cli.Table { return cli.Table{Rows: [][]string{{token}}} })
			})
		},
	}
	profileFlag(cmd, &profile, "how partners reach this trust domain's bundle: https_spiffe or https_web (default https_spiffe, if it is served)")
	return cmd
}

func profileFlag(cmd *cobra.Command, into *string, usage string) {
	cmd.Flags().StringVar(into, "profile", "", usage)
	_ = cmd.RegisterFlagCompletionFunc("profile", cobra.FixedCompletions([]string{identity.ProfileSPIFFE, identity.ProfileWeb}, cobra.ShellCompDirectiveNoFileComp))
}

// ownInvite is the token of the trust domain that is asked.
func ownInvite(ctx context.Context, c adminv1.FederationClient, profile string) (string, *adminv1.BundleEndpoint, error) {
	e, err := c.DescribeEndpoint(ctx, &adminv1.DescribeEndpointRequest{Profile: profile})
	if err != nil {
		return "", nil, err
	}
	b, err := api.BundleFromWire(e.Bundle)
	if err != nil {
		return "", nil, err
	}
	i := federation.Invite{TrustDomain: e.TrustDomain, URL: e.Url, Profile: e.Profile, EndpointID: e.EndpointId, Bundle: b}
	token, err := i.Format()
	return token, e, err
}

func federationAccept(a *admin) *cobra.Command {
	var replace, dryRun, quiet bool
	var profile string
	cmd := &cobra.Command{
		Use: "accept TOKEN", Short: "Trust the trust domain that made an invite, and print the token for the way back", Args: cobra.ExactArgs(1),
		Long: `Trust the trust domain that made an invite: its bundle is pinned as the invite has it, and refreshed from then on. What is
printed is the token by which the other side trusts this one; its "accept" needs --no-token, for then both do.

"-" reads the token from standard input.`,
		Example: `  countersign federation accept csf1.eyJ0cnVz... > to-partner
  countersign federation accept - --no-token < from-partner
  countersign federation accept - --dry-run -o yaml < from-partner`,
		RunE: func(cmd *cobra.Command, args []string) error {
			i, err := readInvite(cmd.InOrStdin(), args[0])
			if err != nil {
				return err
			}
			req := &adminv1.PutFederationRequest{TrustDomain: i.TrustDomain, Url: i.URL, Profile: i.Profile, EndpointId: i.EndpointID, Bundle: api.BundleToWire(i.Bundle), DryRun: dryRun}
			return a.callFederation(cmd, func(ctx context.Context, c adminv1.FederationClient) error {
				var token string
				if !quiet && !dryRun { // before anything is changed: who has no endpoint is to know now
					if token, _, err = ownInvite(ctx, c, profile); err != nil {
						return fmt.Errorf("making the token for the way back (--no-token leaves it out): %w", err)
					}
				}
				put := c.CreateFederation
				if replace {
					if _, err := c.GetFederation(ctx, &adminv1.NameRequest{Name: i.TrustDomain}); err == nil {
						put = c.UpdateFederation
					}
				}
				res, err := put(ctx, req)
				if err != nil {
					return err
				}
				if token == "" {
					return a.out.Print(cmd.OutOrStdout(), res, func() cli.Table { return relationshipTable(res) })
				}
				fmt.Fprintf(cmd.ErrOrStderr(), "%s is trusted now, by its bundle of sequence %d. For it to trust this trust domain, give it this token: countersign federation accept --no-token TOKEN\n", res.TrustDomain, res.Sequence)
				return a.out.Print(cmd.OutOrStdout(), map[string]string{"token": token, "trust_domain": res.TrustDomain}, func() cli.Table { return cli.Table{Rows: [][]string{{token}}} })
			})
		},
	}
	cmd.Flags().BoolVar(&replace, "replace", false, "the trust domain is federated with already: pin what the invite says in place of what is there")
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "show what would be trusted, and change nothing")
	cmd.Flags().BoolVar(&quiet, "no-token", false, "print no token for the way back")
	profileFlag(cmd, &profile, "of the token for the way back: https_spiffe or https_web")
	return cmd
}

func readInvite(stdin io.Reader, arg string) (*federation.Invite, error) {
	if arg == "-" {
		raw, err := io.ReadAll(io.LimitReader(stdin, federation.MaxInvite+64))
		if err != nil {
			return nil, fmt.Errorf("reading the invite: %w", err)
		}
		arg = string(raw)
	}
	return federation.ParseInvite(strings.TrimSpace(arg))
}

// federationPut is create and update.
func federationPut(a *admin, update bool) *cobra.Command {
	req := &adminv1.PutFederationRequest{}
	var bundleFile, invite string
	cmd := &cobra.Command{
		Use: "create TRUST-DOMAIN", Short: "Trust another trust domain by parameters", Args: cobra.ExactArgs(1),
		Long: `Trust another trust domain by parameters: where its bundle is read, how the endpoint is known, and, where profile
https_spiffe needs it, its bundle as it is now, which whoever runs it gives by a way that both sides trust.`,
		Example: `  countersign federation create partner.org --profile https_web --url https://spiffe.partner.org/bundle
  countersign federation create partner.org --profile https_spiffe --url https://spiffe.partner.org:8443 \
      --endpoint-id spiffe://partner.org/spire/server --bundle-file partner.json`,
	}
	if update {
		cmd.Use, cmd.Short = "update TRUST-DOMAIN", "Change the named parameters of a federation"
		cmd.Long = `Change the named parameters of a federation. --bundle-file, or --invite, pins a bundle in place of the last good one,
whatever its sequence: for a partner whose trust domain was set up anew.`
		cmd.Example = `  countersign federation update partner.org --url https://bundle.partner.org/bundle
  countersign federation update partner.org --bundle-file partner.json --dry-run`
		cmd.ValidArgsFunction = a.completeFederations
		cmd.Flags().StringVar(&invite, "invite", "", "a new token of the partner's, or - for standard input: all it says, and its bundle")
	}
	f := cmd.Flags()
	f.StringVar(&req.Url, "url", "", "where the bundle is read (https)")
	profileFlag(cmd, &req.Profile, "how the endpoint is known: https_spiffe or https_web")
	f.StringVar(&req.EndpointId, "endpoint-id", "", "https_spiffe: the SPIFFE ID that the endpoint has")
	f.StringVar(&bundleFile, "bundle-file", "", "the bundle to pin, in SPIFFE format (JWKS); - is standard input")
	f.BoolVar(&req.DryRun, "dry-run", false, "show what would be trusted, and change nothing")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		req.TrustDomain = args[0]
		if bundleFile != "" {
			raw, err := readInput(bundleFile)
			if err != nil {
				return err
			}
			td, err := spiffeid.TrustDomainFromString(args[0])
			if err != nil {
				return fmt.Errorf("%w: trust domain %q: %v", identity.ErrInvalid, args[0], err)
			}
			b, err := federation.Parse(td, raw)
			if err != nil {
				return fmt.Errorf("reading --bundle-file: %w", err)
			}
			req.Bundle = api.BundleToWire(b)
		}
		return a.callFederation(cmd, func(ctx context.Context, c adminv1.FederationClient) error {
			put := c.CreateFederation
			if update {
				put = c.UpdateFederation
				if err := mergeFederation(ctx, cmd, c, req, invite); err != nil {
					return err
				}
			}
			res, err := put(ctx, req)
			if err != nil {
				return err
			}
			return a.out.Print(cmd.OutOrStdout(), res, func() cli.Table { return relationshipTable(res) })
		})
	}
	return cmd
}

// mergeFederation completes an update with what is there. The revision goes back: a change by somebody else in between is refused.
func mergeFederation(ctx context.Context, cmd *cobra.Command, c adminv1.FederationClient, req *adminv1.PutFederationRequest, invite string) error {
	old, err := c.GetFederation(ctx, &adminv1.NameRequest{Name: req.TrustDomain})
	if err != nil {
		return err
	}
	req.Revision = old.Revision
	if invite != "" {
		i, err := readInvite(cmd.InOrStdin(), invite)
		if err != nil {
			return err
		}
		if i.TrustDomain != req.TrustDomain {
			return fmt.Errorf("%w: the invite is of %q, not of %q", identity.ErrInvalid, i.TrustDomain, req.TrustDomain)
		}
		req.Url, req.Profile, req.EndpointId, req.Bundle = i.URL, i.Profile, i.EndpointID, api.BundleToWire(i.Bundle)
		return nil
	}
	changed := cmd.Flags().Changed
	if !changed("url") {
		req.Url = old.Url
	}
	if !changed("profile") {
		req.Profile = old.Profile
	}
	if !changed("endpoint-id") && req.Profile == identity.ProfileSPIFFE {
		req.EndpointId = old.EndpointId
	}
	return nil
}

// federationDelete is below federation, and below bundle, where the bundles are.
func federationDelete(a *admin, group string) *cobra.Command {
	var dryRun bool
	cmd := &cobra.Command{
		Use: "delete TRUST-DOMAIN", Short: "Trust another trust domain no longer: its bundle is gone from every agent at once", Args: cobra.ExactArgs(1),
		Example: fmt.Sprintf("  countersign %s delete partner.org --dry-run\n  countersign %[1]s delete partner.org", group), ValidArgsFunction: a.completeFederations,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.callFederation(cmd, func(ctx context.Context, c adminv1.FederationClient) error {
				res, err := c.DeleteFederation(ctx, &adminv1.DeleteFederationRequest{TrustDomain: args[0], DryRun: dryRun})
				if err != nil {
					return err
				}
				verb := "is trusted no longer"
				if dryRun {
					verb = "would be trusted no longer"
				}
				return a.out.Print(cmd.OutOrStdout(), res, func() cli.Table {
					return cli.Table{Rows: [][]string{{fmt.Sprintf("%s %s; entries that federate with it: %d", args[0], verb, res.Entries)}}}
				})
			})
		},
	}
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "say whom it would concern, and change nothing")
	return cmd
}

func federationList(a *admin) *cobra.Command {
	return &cobra.Command{
		Use: "list", Short: "List the trust domains that are federated with, and how each stands", Args: cobra.NoArgs,
		Example: "  countersign federation list\n  countersign federation list -o json | jq '.federations[] | select(.status.last_error)'",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.callFederation(cmd, func(ctx context.Context, c adminv1.FederationClient) error {
				res, err := c.ListFederations(ctx, &adminv1.Empty{})
				if err != nil {
					return err
				}
				return a.out.Print(cmd.OutOrStdout(), res, func() cli.Table { return federationTable(res.Federations...) })
			})
		},
	}
}

func federationShow(a *admin) *cobra.Command {
	return &cobra.Command{
		Use: "show TRUST-DOMAIN", Short: "Show all that is known of one", Args: cobra.ExactArgs(1),
		Example: "  countersign federation show partner.org -o yaml", ValidArgsFunction: a.completeFederations,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.callFederation(cmd, func(ctx context.Context, c adminv1.FederationClient) error {
				res, err := c.GetFederation(ctx, &adminv1.NameRequest{Name: args[0]})
				if err != nil {
					return err
				}
				return a.out.Print(cmd.OutOrStdout(), res, func() cli.Table { return relationshipTable(res) })
			})
		},
	}
}

func federationRefresh(a *admin) *cobra.Command {
	return &cobra.Command{
		Use: "refresh TRUST-DOMAIN", Short: "Fetch a partner's bundle now", Args: cobra.ExactArgs(1),
		Long:    "Fetch a partner's bundle now, and say what is wrong if that fails: the last good bundle stays.",
		Example: "  countersign federation refresh partner.org", ValidArgsFunction: a.completeFederations,
		RunE: func(cmd *cobra.Command, args []string) error {
			if !cmd.Flags().Changed("timeout") {
				a.timeout = time.Minute // the partner may be slow
			}
			return a.callFederation(cmd, func(ctx context.Context, c adminv1.FederationClient) error {
				res, err := c.RefreshFederation(ctx, &adminv1.NameRequest{Name: args[0]})
				if err != nil {
					return err
				}
				return a.out.Print(cmd.OutOrStdout(), res, func() cli.Table { return federationTable(res) })
			})
		},
	}
}

func (a *admin) completeFederations(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	return a.completeBy(cmd, args, func(ctx context.Context, conn *grpc.ClientConn) (out []string, err error) {
		res, err := adminv1.NewFederationClient(conn).ListFederations(ctx, &adminv1.Empty{})
		for _, f := range res.GetFederations() {
			out = append(out, f.TrustDomain+"\t"+f.Url)
		}
		return out, err
	})
}

func federationTable(all ...*adminv1.FederationRelationship) cli.Table {
	t := cli.Table{Header: []string{"TRUST DOMAIN", "PROFILE", "SEQUENCE", "X509", "JWT", "REFRESHED", "NEXT", "STATE"}}
	for _, f := range all {
		sequence := "-"
		if f.TakenAt != nil {
			sequence = strconv.FormatUint(f.Sequence, 10)
		}
		t.Rows = append(t.Rows, []string{f.TrustDomain, f.Profile, sequence, strconv.Itoa(int(f.X509Authorities)), strconv.Itoa(int(f.JwtAuthorities)),
			ago(f.Status.GetLastSuccess()), in(f.Status.GetNextRefresh()), federationState(f)})
	}
	return t
}

// federationState says in words how a relationship stands.
func federationState(f *adminv1.FederationRelationship) string {
	st := f.Status
	switch {
	case st == nil:
		return "not known: " + f.StatusUnknownBecause
	case st.LastError != "":
		return fmt.Sprintf("%d failures: %s", st.Failures, st.LastError)
	case st.Warning != "":
		return "warning: " + st.Warning
	case st.LastSuccess == nil:
		return "not asked yet"
	}
	return "ok"
}

func ago(t *timestamppb.Timestamp) string {
	if t == nil {
		return "-"
	}
	return time.Since(t.AsTime()).Round(time.Second).String() + " ago"
}

func in(t *timestamppb.Timestamp) string {
	if t == nil {
		return "-"
	}
	return "in " + max(0, time.Until(t.AsTime())).Round(time.Second).String()
}

func relationshipTable(f *adminv1.FederationRelationship) cli.Table {
	t := cli.Table{Rows: [][]string{{"trust domain", f.TrustDomain}, {"url", f.Url}, {"profile", f.Profile}}}
	if f.EndpointId != "" {
		t.Rows = append(t.Rows, []string{"endpoint ID", f.EndpointId})
	}
	if f.TakenAt == nil {
		t.Rows = append(t.Rows, []string{"bundle", "none yet"})
	} else {
		how := "fetched"
		if f.Pinned {
			how = "pinned"
		}
		t.Rows = append(t.Rows, []string{"bundle", fmt.Sprintf("sequence %d, %s %s", f.Sequence, how, timeCell(f.TakenAt))},
			[]string{"authorities", fmt.Sprintf("%d X.509, %d JWT", f.X509Authorities, f.JwtAuthorities)})
	}
	if f.RefreshHint != nil {
		t.Rows = append(t.Rows, []string{"refresh hint", f.RefreshHint.AsDuration().String()})
	}
	if f.Entries > 0 {
		t.Rows = append(t.Rows, []string{"entries", strconv.Itoa(int(f.Entries))})
	}
	if f.Status != nil || f.StatusUnknownBecause != "" {
		t.Rows = append(t.Rows, []string{"refreshed", ago(f.Status.GetLastSuccess())}, []string{"next", in(f.Status.GetNextRefresh())}, []string{"state", federationState(f)})
	}
	return t
}
