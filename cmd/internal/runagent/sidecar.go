package runagent

import (
	"context"
	"fmt"
	"log/slog"
	"net"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"

	"countersign.io/countersign/agent"
	"countersign.io/countersign/attestor"
	"countersign.io/countersign/cmd/internal/cli"
	"countersign.io/countersign/identity"
	"countersign.io/countersign/workloadapi"
)

// Sidecar is what a pod's own agent is told by flags.
type Sidecar struct {
	Servers     []string // host:port of members
	TrustDomain string
	CAPin       string // or BundleFile
	BundleFile  string
	TokenPath   string // of this pod's token, as the kubelet keeps it
	Socket      string // in a volume of this pod
	Health      string // host:port
	KeyType     string
	Version     string
	Log         *slog.Logger
	Ready       func() // nil, or called once the socket is open
}

// RunSidecar serves the Workload API to one pod, from inside of it, until ctx ends. Whoever reaches the socket is the pod.
func RunSidecar(ctx context.Context, c Sidecar) error {
	token := func() ([]byte, error) { return cli.ReadFile(c.TokenPath, identity.MaxTokenBytes) }
	conf, err := c.agentConfig()
	if err != nil {
		return err
	}
	conf.Pod = token
	a, err := agent.New(conf)
	if err != nil {
		return err
	}
	key := attestor.VolumeKey("", c.Socket)
	pod := func(context.Context) (*attestor.Workload, error) {
		raw, err := token()
		if err != nil { // what is held is served all the same
			c.Log.Warn("cannot read the pod's token", "path", c.TokenPath, "error", err)
		}
		return &attestor.Workload{Key: key, Evidence: identity.Evidence{Token: raw}}, nil
	}
	api, err := workloadapi.New(workloadapi.Config{Path: c.Socket, Source: a, Pod: pod, Log: c.Log})
	if err != nil {
		return err
	}
	defer api.Close() // harmless after its Run
	health, err := net.Listen("tcp", c.Health)
	if err != nil {
		return fmt.Errorf("listening for health (--health %s): %w: end what uses the port, or name another", c.Health, err)
	}
	numbers, err := newMetrics(c.Version, a, nil, a.Ready, c.Log)
	if err != nil {
		health.Close()
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return a.Run(ctx) })
	g.Go(func() error { return api.Run(ctx) })
	g.Go(func() error { return cli.ServeHealth(ctx, health, a.Ready, numbers) })
	if c.Ready != nil {
		c.Ready()
	}
	return g.Wait()
}

func (c *Sidecar) agentConfig() (agent.Config, error) {
	conf := agent.Config{Servers: c.Servers, Pin: c.CAPin, KeyType: agent.KeyType(c.KeyType), Version: c.Version, Log: c.Log}
	var err error
	if conf.TrustDomain, err = spiffeid.TrustDomainFromString(c.TrustDomain); err != nil {
		return conf, fmt.Errorf("%w: --trust-domain: %v", identity.ErrInvalid, err)
	}
	if (c.CAPin == "") == (c.BundleFile == "") {
		return conf, fmt.Errorf("%w: name what verifies the members: --bundle-file (or $COUNTERSIGN_BUNDLE_FILE), or --ca-pin ($COUNTERSIGN_CA_PIN), one of the two", identity.ErrInvalid)
	}
	if c.BundleFile != "" {
		conf.Roots = func() ([][]byte, error) { return cli.ReadBundle(c.BundleFile) }
		if _, err := conf.Roots(); err != nil {
			return conf, fmt.Errorf("reading --bundle-file: %w", err)
		}
	}
	return conf, nil
}
