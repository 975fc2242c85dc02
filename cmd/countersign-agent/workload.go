package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"countersign.io/countersign/api"
	"countersign.io/countersign/cmd/internal/cli"
	"countersign.io/countersign/config"
	"countersign.io/countersign/identity"
)

// workload is what every command that speaks to the Workload API needs.
type workload struct {
	endpoint string
	timeout  time.Duration
	out      cli.Output
}

func (w *workload) flags(cmd *cobra.Command) {
	cmd.PersistentFlags().StringVar(&w.endpoint, "endpoint", "", "Workload API: unix:///PATH or tcp://IP:PORT (default $SPIFFE_ENDPOINT_SOCKET, "+config.DefaultAgentSocket+", or that of countersign dev)")
	cmd.PersistentFlags().DurationVar(&w.timeout, "timeout", 10*time.Second, "how long a call may take")
	w.out.Flag(cmd)
}

// connect opens a client and calls f; errors of the Workload API come back as sentinels.
func (w *workload) connect(ctx context.Context, f func(*workloadapi.Client) error) error {
	addr, err := endpoint(w.endpoint)
	if err != nil {
		return err
	}
	client, err := workloadapi.New(ctx, workloadapi.WithAddr(addr))
	if err != nil {
		return fmt.Errorf("connecting to %s: %w", addr, err)
	}
	defer client.Close()
	err = api.FromStatus(f(client))
	switch {
	case errors.Is(err, identity.ErrUnavailable):
		return cli.Asking("agent", addr, "", err)
	case errors.Is(err, identity.ErrDenied):
		return fmt.Errorf("the agent at %s: %w", addr, err)
	}
	return err
}

// completeTime is how long somebody at the prompt waits for names.
const completeTime = 2 * time.Second

// completeIDs asks the agent for the caller's identities. If it does not answer in time there are none: a shell cannot show an error.
func (w *workload) completeIDs(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
	ctx, cancel := context.WithTimeout(cmd.Context(), completeTime)
	defer cancel()
	var out []string
	_ = w.connect(ctx, func(c *workloadapi.Client) error {
		x, err := c.FetchX509Context(ctx)
		if err != nil {
			return err
		}
		for _, s := range x.SVIDs {
			out = append(out, s.ID.String())
		}
		return nil
	})
	return out, cobra.ShellCompDirectiveNoFileComp
}

// endpoint finds the Workload API: as told, by the environment, or the first socket that is there.
func endpoint(told string) (string, error) {
	from := "--endpoint"
	if told == "" {
		told, from = os.Getenv("SPIFFE_ENDPOINT_SOCKET"), "SPIFFE_ENDPOINT_SOCKET"
	}
	if told != "" {
		if err := checkEndpoint(told); err != nil {
			return "", fmt.Errorf("%s: %w", from, err)
		}
		return told, nil
	}
	candidates := []string{config.DefaultAgentSocket}
	if home, err := os.UserHomeDir(); err == nil {
		candidates = append(candidates, filepath.Join(home, ".countersign", "dev", "agent.sock"))
	}
	for _, c := range candidates {
		if _, err := os.Stat(c); err == nil || !errors.Is(err, fs.ErrNotExist) {
			return "unix://" + c, nil
		}
	}
	return "", fmt.Errorf("%w: no agent is running here: looked for %s; set SPIFFE_ENDPOINT_SOCKET=unix:///PATH or start countersign dev", identity.ErrUnavailable, strings.Join(candidates, " and "))
}

// checkEndpoint accepts what the SPIFFE Workload Endpoint standard, section 4, does: unix:///absolute/path, or
// tcp://IP:port, with nothing else in the URI.
func checkEndpoint(s string) error {
	u, err := url.Parse(s)
	bad := func(why string) error {
		return fmt.Errorf("%w: endpoint %q: %s: want unix:///absolute/path or tcp://IP:port", identity.ErrInvalid, s, why)
	}
	if err != nil {
		return bad("not a URI")
	}
	if u.User != nil || u.RawQuery != "" || u.ForceQuery || u.Fragment != "" || strings.Contains(s, "#") || u.Opaque != "" {
		return bad("user information, query, fragment and opaque parts are not allowed")
	}
	switch u.Scheme {
	case "unix":
		if u.Host != "" {
			return bad("a unix endpoint has no authority")
		}
		if !filepath.IsAbs(u.Path) || u.Path == "/" {
			return bad("the path is not absolute")
		}
		if strings.ContainsRune(u.Path, 0) {
			return bad("no path holds a zero byte")
		}
	case "tcp":
		host, port, err := net.SplitHostPort(u.Host)
		if n, badPort := strconv.ParseUint(port, 10, 16); err != nil || badPort != nil || n == 0 {
			return bad("no port")
		}
		if net.ParseIP(host) == nil {
			return bad("the host is not an IP address")
		}
		if u.Path != "" {
			return bad("a tcp endpoint has no path")
		}
	default:
		return bad("unknown scheme")
	}
	return nil
}
