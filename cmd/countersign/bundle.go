package main

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"strconv"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"

	"countersign.io/countersign/api"
	adminv1 "countersign.io/countersign/api/admin/v1"
	workloadv1 "countersign.io/countersign/api/workload/v1"
	"countersign.io/countersign/cmd/internal/cli"
	"countersign.io/countersign/federation"
	"countersign.io/countersign/identity"
	"countersign.io/countersign/workloadapi"
)

func bundleCommand(a *admin) *cobra.Command {
	cmd := &cobra.Command{
		Use: "bundle", Short: "What the trust domain vouches for, what others do, and how authorities are replaced",
		Long: `What the trust domain vouches for (show), what the trust domains do that it federates with (list, show, set, delete, count), and how
its authorities are replaced (rotate, and each step by itself). docs/ROTATION.md and docs/FEDERATION.md say more.`,
	}
	a.flags(cmd)
	cmd.AddCommand(bundleShow(a), bundleList(a), bundleCount(a), bundleSet(a), federationDelete(a, "bundle"))
	cmd.AddCommand(trustCommands(a)...)
	return cmd
}

// bundleOf gets the bundle of a trust domain; the own one for an empty name, with the CA pin.
func bundleOf(ctx context.Context, conn *grpc.ClientConn, name string) (b *workloadv1.Bundle, pin string, err error) {
	own, err := adminv1.NewAdminClient(conn).GetBundle(ctx, &adminv1.Empty{})
	if err != nil || name == "" || name == own.Bundle.GetTrustDomain() {
		return own.GetBundle(), own.GetCaPin(), err
	}
	f, err := adminv1.NewFederationClient(conn).GetFederation(ctx, &adminv1.NameRequest{Name: name})
	if err == nil && f.Bundle == nil {
		err = fmt.Errorf("%w: there is no bundle of %s yet: countersign federation show %s says why", identity.ErrNotFound, name, name)
	}
	return f.GetBundle(), "", err
}

func bundleShow(a *admin) *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use: "show [TRUST-DOMAIN]", Short: "Show the trust bundle and the CA pin that agents need, or a federated bundle", Args: cobra.MaximumNArgs(1),
		Example: `  countersign bundle show
  countersign bundle show --format pem > bundle.pem
  countersign bundle show --format spiffe > bundle.json
  countersign bundle show partner.org --format jwks`,
		ValidArgsFunction: a.completeFederations,
		RunE: func(cmd *cobra.Command, args []string) error {
			write, ok := bundleFormats()[format]
			if format != "" && !ok {
				return fmt.Errorf("%w: --format %q: want pem, jwks or spiffe", identity.ErrInvalid, format)
			}
			return a.connect(cmd, func(ctx context.Context, conn *grpc.ClientConn) error {
				b, pin, err := bundleOf(ctx, conn, append(args, "")[0])
				if err != nil {
					return err
				}
				if write == nil {
					return a.out.Print(cmd.OutOrStdout(), &adminv1.BundleResponse{Bundle: b, CaPin: pin}, func() cli.Table { return bundleTable(b, pin) })
				}
				return write(cmd.OutOrStdout(), b)
			})
		},
	}
	cmd.Flags().StringVar(&format, "format", "", "pem: the X.509 authorities alone; jwks: the JWT keys alone; spiffe: the bundle as the SPIFFE standard writes it")
	_ = cmd.RegisterFlagCompletionFunc("format", cobra.FixedCompletions([]string{"pem", "jwks", "spiffe"}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

func bundleFormats() map[string]func(io.Writer, *workloadv1.Bundle) error {
	return map[string]func(io.Writer, *workloadv1.Bundle) error{
		"pem": func(w io.Writer, b *workloadv1.Bundle) error {
			for _, der := range b.X509Authorities {
				if err := pem.Encode(w, &pem.Block{Type: "CERTIFICATE", Bytes: der}); err != nil {
					return fmt.Errorf("writing the bundle: %w", err)
				}
			}
			return nil
		},
		"jwks":   writeJWKS,
		"spiffe": writeSPIFFE,
	}
}

// writeJWKS writes the JWT keys as common libraries take them: with a use of sig, where the SPIFFE one is refused.
func writeJWKS(w io.Writer, b *workloadv1.Bundle) error {
	set := jose.JSONWebKeySet{Keys: []jose.JSONWebKey{}}
	for _, k := range b.JwtAuthorities {
		pub, err := x509.ParsePKIXPublicKey(k.PublicKey)
		if err != nil {
			return fmt.Errorf("parsing JWT key %s: %w", k.Kid, err)
		}
		set.Keys = append(set.Keys, jose.JSONWebKey{Key: pub, KeyID: k.Kid, Use: "sig"})
	}
	data, err := json.MarshalIndent(set, "", "  ")
	if err != nil {
		return fmt.Errorf("encoding the JWKS: %w", err)
	}
	_, err = fmt.Fprintln(w, string(data))
	return err
}

func writeSPIFFE(w io.Writer, b *workloadv1.Bundle) error {
	parsed, err := api.BundleFromWire(b)
	if err != nil {
		return err
	}
	doc, err := workloadapi.MarshalBundle(parsed)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(w, string(doc))
	return err
}

func bundleTable(b *workloadv1.Bundle, pin string) cli.Table {
	t := cli.Table{Rows: [][]string{
		{"trust domain", b.TrustDomain}, {"sequence", strconv.FormatUint(b.Sequence, 10)},
		{"refresh hint", (time.Duration(b.RefreshHintSeconds) * time.Second).String()},
	}}
	if pin != "" {
		t.Rows = append(t.Rows, []string{"ca pin", pin})
	}
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

// federations lists the relationships with other trust domains.
func (a *admin) federations(cmd *cobra.Command) (*workloadv1.Bundle, []*adminv1.FederationRelationship, error) {
	var own *workloadv1.Bundle
	var others []*adminv1.FederationRelationship
	err := a.connect(cmd, func(ctx context.Context, conn *grpc.ClientConn) (err error) {
		if own, _, err = bundleOf(ctx, conn, ""); err != nil {
			return err
		}
		res, err := adminv1.NewFederationClient(conn).ListFederations(ctx, &adminv1.Empty{})
		others = res.GetFederations()
		return err
	})
	return own, others, err
}

// bundleRow is one line of bundle list.
type bundleRow struct {
	TrustDomain string    `json:"trust_domain"`
	Own         bool      `json:"own"`
	Sequence    uint64    `json:"sequence"`
	X509        int       `json:"x509_authorities"`
	JWT         int       `json:"jwt_authorities"`
	TakenAt     time.Time `json:"taken_at,omitzero"` // of a federated one: since when it is this one
	Pinned      bool      `json:"pinned,omitempty"`
}

func bundleList(a *admin) *cobra.Command {
	return &cobra.Command{
		Use: "list", Short: "List the bundles that workloads may be given: the own one and those of federated trust domains", Args: cobra.NoArgs,
		Example: "  countersign bundle list\n  countersign bundle list -o json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			own, others, err := a.federations(cmd)
			if err != nil {
				return err
			}
			rows := []bundleRow{{TrustDomain: own.TrustDomain, Own: true, Sequence: own.Sequence, X509: len(own.X509Authorities), JWT: len(own.JwtAuthorities)}}
			for _, f := range others {
				rows = append(rows, bundleRow{TrustDomain: f.TrustDomain, Sequence: f.Sequence, X509: int(f.X509Authorities), JWT: int(f.JwtAuthorities), TakenAt: api.TimeFromWire(f.TakenAt), Pinned: f.Pinned})
			}
			return a.out.Print(cmd.OutOrStdout(), rows, func() cli.Table {
				t := cli.Table{Header: []string{"TRUST DOMAIN", "SEQUENCE", "X509", "JWT", "SINCE", "FROM"}}
				for i, r := range rows {
					from, since := "own", "-"
					switch {
					case r.Own:
					case r.TakenAt.IsZero():
						from = "none yet"
					case r.Pinned:
						from, since = "pinned", timeCell(others[i-1].TakenAt)
					default:
						from, since = "fetched", timeCell(others[i-1].TakenAt)
					}
					t.Rows = append(t.Rows, []string{r.TrustDomain, strconv.FormatUint(r.Sequence, 10), strconv.Itoa(r.X509), strconv.Itoa(r.JWT), since, from})
				}
				return t
			})
		},
	}
}

func bundleCount(a *admin) *cobra.Command {
	return &cobra.Command{
		Use: "count", Short: "Count the bundles, the own one included", Args: cobra.NoArgs,
		Example: "  countersign bundle count",
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, others, err := a.federations(cmd)
			if err != nil {
				return err
			}
			n := 1
			for _, f := range others {
				if f.TakenAt != nil {
					n++
				}
			}
			return a.out.Print(cmd.OutOrStdout(), map[string]int{"bundles": n}, func() cli.Table { return cli.Table{Rows: [][]string{{strconv.Itoa(n)}}} })
		},
	}
}

func bundleSet(a *admin) *cobra.Command {
	var file, format string
	var dry bool
	cmd := &cobra.Command{
		Use: "set TRUST-DOMAIN --file FILE", Short: "Pin the bundle of a federated trust domain, in place of the one that is there", Args: cobra.ExactArgs(1),
		Long: `Pin the bundle of a federated trust domain in place of the one that is there, whatever its sequence: for one whose endpoint cannot be
reached, or that was set up anew. A newer one that its endpoint publishes takes its place. The trust domain must be federated with
(countersign federation create); with --format pem it has the X.509 authorities only, and keeps the JWT keys that are there.`,
		Example: `  countersign bundle set partner.org --file partner.json
  countersign bundle set partner.org --file roots.pem --format pem --dry-run`,
		ValidArgsFunction: a.completeFederations,
		RunE: func(cmd *cobra.Command, args []string) error {
			td, err := spiffeid.TrustDomainFromString(args[0])
			if err != nil {
				return fmt.Errorf("%w: trust domain %q: %v", identity.ErrInvalid, args[0], err)
			}
			if file == "" {
				return fmt.Errorf("%w: --file is needed: the bundle to pin; - is standard input", identity.ErrInvalid)
			}
			raw, err := readInput(file)
			if err != nil {
				return err
			}
			return a.connect(cmd, func(ctx context.Context, conn *grpc.ClientConn) error {
				c := adminv1.NewFederationClient(conn)
				old, err := c.GetFederation(ctx, &adminv1.NameRequest{Name: td.Name()})
				if err != nil {
					return err
				}
				b, err := readBundle(td, raw, format, old.Bundle)
				if err != nil {
					return fmt.Errorf("reading --file %s: %w", file, err)
				}
				res, err := c.UpdateFederation(ctx, &adminv1.PutFederationRequest{
					TrustDomain: td.Name(), Url: old.Url, Profile: old.Profile, EndpointId: old.EndpointId, Revision: old.Revision, Bundle: b, DryRun: dry,
				})
				if err != nil {
					return err
				}
				return a.out.Print(cmd.OutOrStdout(), res, func() cli.Table {
					t := bundleTable(b, "")
					if dry {
						t.Rows = append(t.Rows, []string{"dry run", "nothing was changed"})
					}
					return t
				})
			})
		},
	}
	cmd.Flags().StringVar(&file, "file", "", "the bundle to pin; - is standard input")
	cmd.Flags().StringVar(&format, "format", "spiffe", "of the file: spiffe, or pem")
	cmd.Flags().BoolVar(&dry, "dry-run", false, "show what would be trusted, and change nothing")
	return cmd
}

// readBundle reads a bundle for another trust domain.
func readBundle(td spiffeid.TrustDomain, raw []byte, format string, old *workloadv1.Bundle) (*workloadv1.Bundle, error) {
	switch format {
	case "spiffe":
		b, err := federation.Parse(td, raw)
		return api.BundleToWire(b), err
	case "pem":
	default:
		return nil, fmt.Errorf("%w: --format %q: want spiffe or pem", identity.ErrInvalid, format)
	}
	out := &workloadv1.Bundle{TrustDomain: td.Name(), Sequence: old.GetSequence(), RefreshHintSeconds: old.GetRefreshHintSeconds(), JwtAuthorities: old.GetJwtAuthorities()}
	for len(bytes.TrimSpace(raw)) > 0 {
		block, rest := pem.Decode(raw)
		if block == nil || block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("%w: after %d certificates comes something else: want PEM certificates and nothing else", identity.ErrInvalid, len(out.X509Authorities))
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil || !cert.IsCA {
			return nil, fmt.Errorf("%w: certificate %d is not a certificate authority's (%v)", identity.ErrInvalid, len(out.X509Authorities)+1, err)
		}
		out.X509Authorities, raw = append(out.X509Authorities, block.Bytes), rest
	}
	if len(out.X509Authorities) == 0 {
		return nil, fmt.Errorf("%w: there is no certificate in it", identity.ErrInvalid)
	}
	return out, nil
}
