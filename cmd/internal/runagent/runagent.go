// Package runagent wires a node agent together, for countersign-agent run and for countersign dev.
package runagent

import (
	"context"
	"crypto"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"

	"countersign.io/countersign/agent"
	"countersign.io/countersign/attestor"
	"countersign.io/countersign/attestor/node"
	"countersign.io/countersign/cmd/internal/cli"
	"countersign.io/countersign/config"
	"countersign.io/countersign/identity"
	"countersign.io/countersign/internal/durable"
	"countersign.io/countersign/workloadapi"
	"countersign.io/countersign/workloadapi/csi"
)

// Options are what the file does not say.
type Options struct {
	Version string
	Log     *slog.Logger
	// DevPods, if not empty, is a folder of service account tokens for processes that play pods. Development only.
	DevPods string
	// Ready, if not nil, is called once the Workload API socket is open.
	Ready func()
}

// Run is a node agent until ctx ends: identities from the members, the Workload API on a socket, health.
func Run(ctx context.Context, c *config.Agent, o Options) error {
	conf, err := agentConfig(c, o)
	if err != nil {
		return err
	}
	a, err := agent.New(conf)
	if err != nil {
		return err
	}
	attest := attestor.Config{TokenPath: c.Workload.TokenPath, SHA256: c.Workload.SHA256, Systemd: c.Workload.Systemd, Log: o.Log}
	if o.DevPods != "" {
		o.Log.Warn("development only: any process of this user may be any pod whose token lies in this folder", "folder", o.DevPods)
		attest.Locate = devPods(o.DevPods)
	}
	workloads, err := attestor.New(attest)
	if err != nil {
		return err
	}
	api, err := workloadapi.New(workloadapi.Config{Path: c.Socket, Source: a, Attestor: workloads, Log: o.Log})
	if err != nil {
		return err
	}
	defer api.Close() // harmless after its Run
	health, err := net.Listen("tcp", c.Health)
	if err != nil {
		return fmt.Errorf("listening for health (health: %s): %w: end what uses the port, or name another", c.Health, err)
	}
	ready := a.Ready
	var driver *csi.Driver // nil: there is none
	if c.CSI != nil {
		driver, err = csi.New(csi.Config{
			Socket: c.CSI.Socket, RegistrationDir: c.CSI.RegistrationDir, KubeletDir: c.CSI.KubeletDir, Dir: c.CSI.Dir, Node: c.CSI.Node,
			Audience: c.CSI.Audience, Version: o.Version, Source: a, Forget: a.Forget, API: api, Log: o.Log,
		})
		if err != nil {
			health.Close()
			return fmt.Errorf("starting the CSI driver (csi): %w", err)
		}
		ready = func() error { return errors.Join(a.Ready(), driver.Ready()) }
	}
	numbers, err := newMetrics(o.Version, a, driver, ready, o.Log)
	if err != nil {
		health.Close()
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	if driver != nil {
		g.Go(func() error { return driver.Run(ctx) })
	}
	g.Go(func() error { return a.Run(ctx) })
	g.Go(func() error { return api.Run(ctx) })
	g.Go(func() error { return cli.ServeHealth(ctx, health, ready, numbers) })
	if o.Ready != nil {
		o.Ready()
	}
	return g.Wait()
}

func agentConfig(c *config.Agent, o Options) (agent.Config, error) {
	conf := agent.Config{Servers: c.Servers, Pin: c.CAPin, KeyType: agent.KeyType(c.KeyType), Version: o.Version, Log: o.Log}
	if c.StateDir != "none" {
		conf.StateDir = c.StateDir
	}
	if c.TrustDomain != "" {
		td, err := spiffeid.TrustDomainFromString(c.TrustDomain)
		if err != nil {
			return conf, fmt.Errorf("%w: trust_domain: %v", identity.ErrInvalid, err)
		}
		conf.TrustDomain = td
	}
	if path := c.BundleFile; path != "" {
		conf.Roots = func() ([][]byte, error) { return cli.ReadBundle(path) }
		if _, err := conf.Roots(); err != nil {
			return conf, fmt.Errorf("reading bundle_file: %w", err)
		}
	}
	switch {
	case c.Attest.JoinTokenFile != "":
		return conf, joinToken(&conf, c)
	case c.Attest.Kube != nil:
		path := c.Attest.Kube.TokenPath
		// The kubelet's file may be readable by the pod's group: its mode is the pod's own affair.
		conf.Credential = agent.KubeToken(c.Attest.Kube.Cluster, func() ([]byte, error) { return cli.ReadFile(path, identity.MaxTokenBytes) })
	default:
		x := c.Attest.X509Pop
		conf.Credential = agent.X509Pop(func() ([][]byte, crypto.Signer, error) { return loadPair(x.CertFile, x.KeyFile) })
	}
	return conf, nil
}

// joinToken takes addresses and pin from the token where the file names none.
func joinToken(conf *agent.Config, c *config.Agent) error {
	raw, err := durable.ReadPrivateFile(c.Attest.JoinTokenFile, node.MaxTokenString+2)
	if err != nil {
		return fmt.Errorf("reading attest.join_token_file: %w", err)
	}
	t, err := node.ParseToken(strings.TrimSpace(string(raw)))
	if err != nil {
		return fmt.Errorf("reading attest.join_token_file %s: %w", c.Attest.JoinTokenFile, err)
	}
	if t.Purpose != identity.JoinAgent {
		return fmt.Errorf("%w: the token in %s admits a %s: make one with countersign token create --agent", identity.ErrInvalid, c.Attest.JoinTokenFile, t.Purpose)
	}
	if len(conf.Servers) == 0 {
		conf.Servers = t.Addresses
	}
	if conf.Pin == "" {
		conf.Pin = t.Pin
	}
	conf.Credential = agent.JoinToken(t.Secret)
	return nil
}

func loadPair(certFile, keyFile string) ([][]byte, crypto.Signer, error) {
	cert, err := cli.ReadFile(certFile, 64<<10)
	if err != nil {
		return nil, nil, err
	}
	key, err := durable.ReadPrivateFile(keyFile, 64<<10)
	if err != nil {
		return nil, nil, err
	}
	defer clear(key)
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %s and %s: %v", identity.ErrInvalid, certFile, keyFile, err)
	}
	signer, ok := pair.PrivateKey.(crypto.Signer)
	if !ok {
		return nil, nil, fmt.Errorf("%w: the key in %s cannot sign", identity.ErrInvalid, keyFile)
	}
	return pair.Certificate, signer, nil
}
