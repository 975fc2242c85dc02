package main

import (
	"context"
	"crypto/x509"
	"fmt"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"countersign.io/countersign/agent"
	"countersign.io/countersign/cmd/internal/cli"
	"countersign.io/countersign/config"
	"countersign.io/countersign/identity"
)

// direct asks a member without an agent: for pods where no agent can run.
type direct struct {
	on        bool
	servers   []string
	pin       string
	bundle    string
	tokenPath string
}

func (d *direct) flags(cmd *cobra.Command) {
	f := cmd.Flags()
	f.BoolVar(&d.on, "direct", false, "agentless: ask a member, by this pod's own token")
	f.StringSliceVar(&d.servers, "server", nil, "with --direct: a member, host:port (repeatable)")
	f.StringVar(&d.pin, "ca-pin", "", "with --direct: sha256:HEX of the CA's public key (countersign bundle show)")
	f.StringVar(&d.bundle, "bundle-file", "", "with --direct, instead of --ca-pin: file with the trust domain's X.509 authorities (PEM) or its bundle (SPIFFE JSON)")
	cmd.MarkFlagsMutuallyExclusive("ca-pin", "bundle-file")
	f.StringVar(&d.tokenPath, "token-path", config.DefaultTokenPath, "with --direct: this pod's service account token")
}

func (d *direct) config() (agent.DirectConfig, error) {
	token, err := cli.ReadFile(d.tokenPath, identity.MaxTokenBytes)
	if err != nil {
		return agent.DirectConfig{}, fmt.Errorf("%w: reading the pod's token: %v", identity.ErrInvalid, err)
	}
	c := agent.DirectConfig{Servers: d.servers, Pin: d.pin, Token: token}
	if d.bundle != "" {
		c.Roots = func() ([][]byte, error) { return cli.ReadBundle(d.bundle) }
	}
	return c, nil
}

func (d *direct) x509(ctx context.Context) (*workloadapi.X509Context, error) {
	conf, err := d.config()
	if err != nil {
		return nil, err
	}
	defer clear(conf.Token)
	u, err := agent.Direct(ctx, conf)
	if err != nil {
		return nil, err
	}
	out := &workloadapi.X509Context{Bundles: x509bundle.NewSet()}
	for _, s := range u.SVIDs {
		var chain []byte
		for _, der := range s.Chain {
			chain = append(chain, der...)
		}
		svid, err := x509svid.ParseRaw(chain, s.Key)
		if err != nil {
			return nil, fmt.Errorf("reading the SVID: %w", err)
		}
		svid.Hint = s.Hint
		out.SVIDs = append(out.SVIDs, svid)
	}
	for td, b := range u.Bundles {
		xb := x509bundle.New(td)
		for _, der := range b.X509 {
			cert, err := x509.ParseCertificate(der)
			if err != nil {
				return nil, fmt.Errorf("reading the bundle of %s: %w", td, err)
			}
			xb.AddX509Authority(cert)
		}
		out.Bundles.Add(xb)
	}
	return out, nil
}

func (d *direct) jwt(ctx context.Context, audience []string, id spiffeid.ID) ([]jwtRow, error) {
	conf, err := d.config()
	if err != nil {
		return nil, err
	}
	defer clear(conf.Token)
	svids, _, err := agent.DirectJWT(ctx, conf, audience, id)
	if err != nil {
		return nil, err
	}
	rows := make([]jwtRow, len(svids))
	for i, s := range svids {
		rows[i] = jwtRow{SPIFFEID: s.ID.String(), Hint: s.Hint, ExpiresAt: s.ExpiresAt.UTC(), Token: s.Token}
	}
	return rows, nil
}
