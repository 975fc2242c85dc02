package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/user"
	"path/filepath"
	"strconv"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"countersign.io/countersign/api"
	adminv1 "countersign.io/countersign/api/admin/v1"
	"countersign.io/countersign/cmd/internal/cli"
	"countersign.io/countersign/cmd/internal/runagent"
	"countersign.io/countersign/config"
	"countersign.io/countersign/identity"
	"countersign.io/countersign/internal/durable"
)

func devCommand() *cobra.Command {
	d := &dev{}
	cmd := &cobra.Command{
		Use: "dev", Short: "Run a member and an agent in one process, for development", Args: cobra.NoArgs,
		Long: `Run a whole trust domain in one process: one member, one agent, everything in one folder, and an entry that gives every
process of yours an identity. For development: one member is no cluster, and your processes are not told apart.`,
		Example: `  countersign dev
  countersign-agent fetch x509            # in another terminal
  countersign entry create -s unix:path:/usr/bin/curl -s agent:kind:join_token --id spiffe://dev.test/curl`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return d.run(cmd.Context(), cmd.OutOrStdout(), cli.Logger(cmd.ErrOrStderr(), config.Log{Level: d.level, Format: "text"}))
		},
	}
	f := cmd.Flags()
	f.StringVar(&d.dir, "data", "", "folder for everything (default ~/.countersign/dev)")
	f.StringVar(&d.trustDomain, "trust-domain", "dev.test", "trust domain")
	f.StringVar(&d.listen, "listen", "127.0.0.1:18443", "TLS port of the member")
	f.StringVar(&d.health, "health", "127.0.0.1:18080", "/live and /ready of the member")
	f.StringVar(&d.agentHealth, "agent-health", "127.0.0.1:18081", "/live and /ready of the agent")
	f.StringVar(&d.level, "log", "error", "debug, info, warn or error")
	return cmd
}

type dev struct{ dir, trustDomain, listen, health, agentHealth, level string }

func (d *dev) run(ctx context.Context, out io.Writer, log *slog.Logger) error {
	if d.dir == "" {
		var err error
		if d.dir, err = devDataDir(); err != nil {
			return err
		}
	}
	dir, err := filepath.Abs(d.dir)
	if err != nil {
		return fmt.Errorf("finding --data: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o700); err != nil {
		return fmt.Errorf("making the data folder: %w", err)
	}
	if err := durable.PrivateDir(dir); err != nil {
		return fmt.Errorf("making the data folder: %w", err)
	}
	server, err := config.ParseServer("(countersign dev)", fmt.Appendf(nil, `version: 1
trust_domain: %q
name: dev
data_dir: %q
listen: %q
admin_socket: %q
health: %q
log: {level: %q}
`, d.trustDomain, filepath.Join(dir, "data"), d.listen, filepath.Join(dir, "admin.sock"), d.health, d.level))
	if err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	up := make(chan struct{})
	g.Go(func() error { return runMember(ctx, server, log, func() { close(up) }) })
	g.Go(func() error {
		select {
		case <-ctx.Done():
			return nil
		case <-up:
		}
		return d.agent(ctx, dir, server.AdminSocket, out, log)
	})
	return g.Wait()
}

// agent runs the agent half once the member issues.
func (d *dev) agent(ctx context.Context, dir, socket string, out io.Writer, log *slog.Logger) error {
	token := filepath.Join(dir, "join")
	if err := d.prepare(ctx, socket, token); err != nil {
		return err
	}
	agent, err := config.ParseAgent("(countersign dev)", fmt.Appendf(nil, `version: 1
trust_domain: %q
attest: {join_token_file: %q}
socket: %q
state_dir: none
health: %q
`, d.trustDomain, token, filepath.Join(dir, "agent.sock"), d.agentHealth))
	if err != nil {
		return err
	}
	return runagent.Run(ctx, agent, runagent.Options{Version: version, Log: log, Ready: func() {
		fmt.Fprintf(out, `Countersign is running, for development, in %s.

  countersign-agent fetch x509
  countersign status
  export SPIFFE_ENDPOINT_SOCKET=unix://%s      # for any SPIFFE library

Interrupt (Ctrl-C) to stop.
`, dir, agent.Socket)
	}})
}

// prepare makes the agent's join token and the entry for the user's own processes.
func (d *dev) prepare(ctx context.Context, socket, tokenFile string) error {
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return fmt.Errorf("connecting to the member: %w", err)
	}
	defer conn.Close()
	c := adminv1.NewAdminClient(conn)
	res, err := c.CreateToken(ctx, &adminv1.CreateTokenRequest{Purpose: identity.JoinAgent})
	if err != nil {
		return fmt.Errorf("making the agent's join token: %w", api.FromStatus(err))
	}
	if err := durable.WriteFile(tokenFile, []byte(res.Token), 0o600); err != nil {
		return fmt.Errorf("saving the agent's join token: %w", err)
	}
	name := "uid-" + strconv.Itoa(os.Getuid())
	if u, err := user.Current(); err == nil {
		if spiffeid.ValidatePathSegment(u.Username) == nil {
			name = u.Username
		}
	}
	_, err = c.CreateEntry(ctx, &adminv1.Entry{
		SpiffeId:  "spiffe://" + d.trustDomain + "/user/" + name,
		Selectors: []string{"unix:uid:" + strconv.Itoa(os.Getuid()), "agent:kind:join_token"},
	})
	if err = api.FromStatus(err); err != nil && !errors.Is(err, identity.ErrExists) {
		return fmt.Errorf("making your processes' entry: %w", err)
	}
	return nil
}
