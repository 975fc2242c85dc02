package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"countersign.io/countersign/api"
	"countersign.io/countersign/cmd/internal/cli"
	"countersign.io/countersign/identity"
)

func watchCommand(w *workload) *cobra.Command {
	var dir, run string
	cmd := &cobra.Command{
		Use: "watch", Short: "Print every change of the caller's X.509-SVIDs and bundles until interrupted, or keep them in files", Args: cobra.NoArgs,
		Long: `Print every change of the caller's X.509-SVIDs and bundles until interrupted.

With --write they are kept in files, for programs that read files: svid.pem, key.pem (0600) and bundle.pem of the default identity, and
bundle-DOMAIN.pem of each trust domain that it federates with. All change at once: they are links through the link ..data. After each
change --run is run by the shell, such as to have a server read them again.`,
		Example: `  countersign-agent watch
  countersign-agent watch -o json | jq .svids[0].serial
  countersign-agent watch --write /run/web --run 'nginx -s reload'`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if run != "" && dir == "" {
				return fmt.Errorf("%w: --run goes with --write", identity.ErrInvalid)
			}
			return w.connect(cmd.Context(), func(c *workloadapi.Client) error {
				pw := &printer{out: cmd.OutOrStdout(), json: w.out.JSON(), errOut: cmd.ErrOrStderr()}
				if dir != "" {
					ctx, stop := context.WithCancel(cmd.Context())
					defer stop()
					p := &publisher{printer: printer{out: pw.out, json: pw.json, errOut: pw.errOut}, ctx: ctx, dir: dir, run: run, stop: stop}
					err := c.WatchX509Context(ctx, p)
					if p.fail != nil {
						return p.fail
					}
					if cmd.Context().Err() != nil {
						return nil
					}
					return err
				}
				err := c.WatchX509Context(cmd.Context(), pw)
				if cmd.Context().Err() != nil {
					return nil // interrupted, as asked
				}
				return err
			})
		},
	}
	w.flags(cmd)
	cmd.Flags().StringVar(&dir, "write", "", "keep svid.pem, key.pem and bundle.pem of the default identity in this folder")
	cmd.Flags().StringVar(&run, "run", "", "run this by the shell after each change of the files")
	return cmd
}

// printer prints one line an update. The client calls it from one goroutine, the mutex guards against its successor.
type printer struct {
	mu          sync.Mutex
	out, errOut io.Writer
	json        bool
}

func (p *printer) OnX509ContextUpdate(x *workloadapi.X509Context) {
	p.mu.Lock()
	defer p.mu.Unlock()
	rows := x509Rows(x.SVIDs)
	if p.json {
		_ = json.NewEncoder(p.out).Encode(map[string]any{"time": time.Now().UTC(), "svids": rows})
		return
	}
	for _, r := range rows {
		fmt.Fprintf(p.out, "%s  %s  serial %s  until %s\n", time.Now().Format("15:04:05.000"), r.SPIFFEID, r.Serial, r.NotAfter.Format(time.RFC3339))
	}
}

func (p *printer) OnX509ContextWatchError(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	fmt.Fprintf(p.errOut, "%s  %v (trying again)\n", time.Now().Format("15:04:05.000"), api.FromStatus(err))
}

func validateCommand(w *workload) *cobra.Command {
	var audience string
	cmd := &cobra.Command{
		Use: "validate --audience NAME [TOKEN-FILE]", Short: "Validate a JWT-SVID, read from a file or standard input", Args: cobra.MaximumNArgs(1),
		Example: "  countersign-agent fetch jwt --audience me -o json | jq -r '.[0].token' | countersign-agent validate --audience me",
		RunE: func(cmd *cobra.Command, args []string) error {
			if audience == "" {
				return fmt.Errorf("%w: --audience is needed: whom the token must be for", identity.ErrInvalid)
			}
			in := cmd.InOrStdin()
			if len(args) == 1 && args[0] != "-" {
				f, err := os.Open(args[0])
				if err != nil {
					return fmt.Errorf("%w: %v", identity.ErrInvalid, err)
				}
				defer f.Close()
				in = f
			}
			data, err := io.ReadAll(io.LimitReader(in, identity.MaxTokenBytes+1))
			if err != nil {
				return fmt.Errorf("reading the token: %w", err)
			}
			if len(data) > identity.MaxTokenBytes {
				return fmt.Errorf("%w: the token is larger than %d bytes", identity.ErrInvalid, identity.MaxTokenBytes)
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), w.timeout)
			defer cancel()
			return w.connect(ctx, func(c *workloadapi.Client) error {
				svid, err := c.ValidateJWTSVID(ctx, strings.TrimSpace(string(data)), audience)
				if err != nil {
					return err
				}
				row := map[string]any{"spiffe_id": svid.ID.String(), "expires_at": svid.Expiry.UTC(), "claims": svid.Claims}
				return w.out.Print(cmd.OutOrStdout(), row, func() cli.Table {
					return cli.Table{Rows: [][]string{{"valid", svid.ID.String()}, {"expires", svid.Expiry.UTC().Format(time.RFC3339)}, {"audience", strings.Join(svid.Audience, ", ")}}}
				})
			})
		},
	}
	w.flags(cmd)
	cmd.Flags().StringVar(&audience, "audience", "", "whom the token must be for")
	return cmd
}

func healthCommand() *cobra.Command {
	var addr string
	cmd := &cobra.Command{
		Use: "health", Short: "Ask the local agent whether it is ready; exit code 0 if so", Args: cobra.NoArgs,
		Example: "  countersign-agent health",
		RunE: func(cmd *cobra.Command, _ []string) error {
			client := http.Client{Timeout: 5 * time.Second}
			res, err := client.Get("http://" + addr + "/ready")
			if err != nil {
				return fmt.Errorf("%w: no agent answers at %s: %v", identity.ErrUnavailable, addr, err)
			}
			defer res.Body.Close()
			body, err := io.ReadAll(io.LimitReader(res.Body, 4096))
			if err != nil {
				return fmt.Errorf("%w: reading the answer of %s: %v", identity.ErrUnavailable, addr, err)
			}
			fmt.Fprintln(cmd.OutOrStdout(), strings.TrimSpace(string(body)))
			if res.StatusCode != http.StatusOK {
				return fmt.Errorf("%w: the agent is not ready", identity.ErrUnavailable)
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&addr, "address", "127.0.0.1:8081", "the agent's health address")
	return cmd
}
