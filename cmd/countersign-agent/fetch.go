package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"countersign.io/countersign/cmd/internal/cli"
	"countersign.io/countersign/identity"
	"countersign.io/countersign/internal/durable"
)

func fetchCommand(w *workload) *cobra.Command {
	cmd := &cobra.Command{Use: "fetch", Short: "Fetch SVIDs or bundles as the calling workload"}
	w.flags(cmd)
	cmd.AddCommand(fetchX509(w), fetchJWT(w), fetchBundles(w))
	return cmd
}

// x509Row is one X.509-SVID as printed: never its key.
type x509Row struct {
	SPIFFEID string    `json:"spiffe_id"`
	Hint     string    `json:"hint,omitempty"`
	Serial   string    `json:"serial"`
	NotAfter time.Time `json:"not_after"`
	DNSNames []string  `json:"dns_names,omitempty"`
}

func x509Rows(svids []*x509svid.SVID) []x509Row {
	rows := make([]x509Row, len(svids))
	for i, s := range svids {
		leaf := s.Certificates[0]
		rows[i] = x509Row{SPIFFEID: s.ID.String(), Hint: s.Hint, Serial: fmt.Sprintf("%032x", leaf.SerialNumber), NotAfter: leaf.NotAfter.UTC(), DNSNames: leaf.DNSNames}
	}
	return rows
}

func x509Table(rows []x509Row) cli.Table {
	t := cli.Table{Header: []string{"SPIFFE ID", "SERIAL", "NOT AFTER", "HINT"}}
	for _, r := range rows {
		t.Rows = append(t.Rows, []string{r.SPIFFEID, r.Serial, r.NotAfter.Format(time.RFC3339), r.Hint})
	}
	return t
}

func fetchX509(w *workload) *cobra.Command {
	var dir string
	var d direct
	cmd := &cobra.Command{
		Use: "x509", Short: "Fetch the caller's X.509-SVIDs", Args: cobra.NoArgs,
		Example: `  countersign-agent fetch x509
  countersign-agent fetch x509 --write /run/web           # svid.pem, key.pem (0600), bundle.pem
  countersign-agent fetch x509 --direct --server ca:8443 --ca-pin sha256:... --token-path /var/run/secrets/countersign.io/token`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), w.timeout)
			defer cancel()
			show := func(x *workloadapi.X509Context) error {
				if dir != "" {
					if err := writeX509(dir, x); err != nil {
						return err
					}
				}
				rows := x509Rows(x.SVIDs)
				return w.out.Print(cmd.OutOrStdout(), rows, func() cli.Table { return x509Table(rows) })
			}
			if d.on {
				x, err := d.x509(ctx)
				if err != nil {
					return err
				}
				return show(x)
			}
			return w.connect(ctx, func(c *workloadapi.Client) error {
				x, err := c.FetchX509Context(ctx)
				if err != nil {
					return err
				}
				return show(x)
			})
		},
	}
	cmd.Flags().StringVar(&dir, "write", "", "write svid.pem, key.pem and bundle.pem of the default identity into this folder")
	d.flags(cmd)
	return cmd
}

func fetchJWT(w *workload) *cobra.Command {
	var audience []string
	var id string
	var d direct
	cmd := &cobra.Command{
		Use: "jwt --audience NAME", Short: "Fetch the caller's JWT-SVIDs", Args: cobra.NoArgs,
		Example: `  countersign-agent fetch jwt --audience reports
  countersign-agent fetch jwt --audience reports -o json`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if len(audience) == 0 {
				return fmt.Errorf("%w: --audience is needed: who is to accept the token", identity.ErrInvalid)
			}
			params := jwtsvid.Params{Audience: audience[0], ExtraAudiences: audience[1:]}
			if id != "" {
				var err error
				if params.Subject, err = spiffeid.FromString(id); err != nil {
					return fmt.Errorf("%w: --id: %v", identity.ErrInvalid, err)
				}
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), w.timeout)
			defer cancel()
			show := func(rows []jwtRow) error {
				return w.out.Print(cmd.OutOrStdout(), rows, func() cli.Table {
					t := cli.Table{Header: []string{"SPIFFE ID", "EXPIRES", "TOKEN"}}
					for _, r := range rows {
						t.Rows = append(t.Rows, []string{r.SPIFFEID, r.ExpiresAt.Format(time.RFC3339), r.Token})
					}
					return t
				})
			}
			if d.on {
				rows, err := d.jwt(ctx, audience, params.Subject)
				if err != nil {
					return err
				}
				return show(rows)
			}
			return w.connect(ctx, func(c *workloadapi.Client) error {
				svids, err := c.FetchJWTSVIDs(ctx, params)
				if err != nil {
					return err
				}
				rows := make([]jwtRow, len(svids))
				for i, s := range svids {
					rows[i] = jwtRow{SPIFFEID: s.ID.String(), Hint: s.Hint, ExpiresAt: s.Expiry.UTC(), Token: s.Marshal()}
				}
				return show(rows)
			})
		},
	}
	cmd.Flags().StringSliceVar(&audience, "audience", nil, "who is to accept the token (repeatable)")
	cmd.Flags().StringVar(&id, "id", "", "only this SPIFFE ID (default all)")
	_ = cmd.RegisterFlagCompletionFunc("id", w.completeIDs)
	d.flags(cmd)
	return cmd
}

// jwtRow is one JWT-SVID as printed. The token is what the caller asked for.
type jwtRow struct {
	SPIFFEID  string    `json:"spiffe_id"`
	Hint      string    `json:"hint,omitempty"`
	ExpiresAt time.Time `json:"expires_at"`
	Token     string    `json:"token"`
}

func fetchBundles(w *workload) *cobra.Command {
	return &cobra.Command{
		Use: "bundles", Short: "Fetch the bundles that the caller trusts", Args: cobra.NoArgs,
		Example: "  countersign-agent fetch bundles -o json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), w.timeout)
			defer cancel()
			return w.connect(ctx, func(c *workloadapi.Client) error {
				xs, err := c.FetchX509Bundles(ctx)
				if err != nil {
					return err
				}
				js, err := c.FetchJWTBundles(ctx)
				if err != nil {
					return err
				}
				type row struct {
					TrustDomain string   `json:"trust_domain"`
					X509        [][]byte `json:"x509_authorities"`
					JWT         []string `json:"jwt_authorities"`
				}
				var rows []row
				for _, b := range xs.Bundles() {
					r := row{TrustDomain: b.TrustDomain().Name()}
					for _, cert := range b.X509Authorities() {
						r.X509 = append(r.X509, cert.Raw)
					}
					if jb, ok := js.Get(b.TrustDomain()); ok {
						for kid := range jb.JWTAuthorities() {
							r.JWT = append(r.JWT, kid)
						}
					}
					rows = append(rows, r)
				}
				return w.out.Print(cmd.OutOrStdout(), rows, func() cli.Table {
					t := cli.Table{Header: []string{"TRUST DOMAIN", "X509 AUTHORITIES", "JWT AUTHORITIES"}}
					for _, r := range rows {
						t.Rows = append(t.Rows, []string{r.TrustDomain, strconv.Itoa(len(r.X509)), strconv.Itoa(len(r.JWT))})
					}
					return t
				})
			})
		},
	}
}

// writeX509 writes the default identity as PEM, each file whole or not at all; the key is for its owner alone.
func writeX509(dir string, x *workloadapi.X509Context) error {
	files, err := publishedX509(x)
	if err != nil {
		return err
	}
	defer clear(files[0].Data) // the key
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("making the folder: %w", err)
	}
	for _, f := range files {
		if err := durable.WriteFile(filepath.Join(dir, f.Name), f.Data, f.Mode); err != nil {
			return err
		}
	}
	return nil
}
