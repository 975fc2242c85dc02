package main

import (
	"context"
	"fmt"
	"strconv"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	adminv1 "countersign.io/countersign/api/admin/v1"
	"countersign.io/countersign/ca/kmskey"
	"countersign.io/countersign/ca/upstream"
	"countersign.io/countersign/cmd/internal/cli"
	"countersign.io/countersign/config"
	"countersign.io/countersign/identity"
	"countersign.io/countersign/internal/vault"
	"countersign.io/countersign/server"
)

// upstream makes the configured upstream, or none. It asks nobody: a member starts whether the upstream answers or not.
func (m *member) upstream(ctx context.Context) (server.Upstream, error) {
	switch u := m.c.CA.Upstream; {
	case u.Disk != nil:
		return upstream.NewDisk(upstream.DiskConfig{
			CertFile: u.Disk.CertFile, KeyFile: u.Disk.KeyFile, RootsFile: u.Disk.RootsFile, OpenKey: kmskey.Open, Now: m.hooks.now,
		})
	case u.Vault != nil:
		client, err := vault.New(vaultConfig(&u.Vault.Vault))
		if err != nil {
			return nil, fmt.Errorf("%w: ca.upstream.vault: %w", identity.ErrInvalid, err)
		}
		return upstream.NewVault(client, u.Vault.PKI)
	case u.Countersign != nil:
		return upstream.NewCountersign(upstream.CountersignConfig{TrustDomain: m.td, Servers: u.Countersign.Servers, Socket: u.Countersign.Socket})
	case u.Google != nil:
		return upstream.NewGoogle(ctx, upstream.GoogleConfig{Authority: u.Google.Authority, Credentials: u.Google.Credentials})
	}
	return nil, nil
}

// isDownstream reports whether the ID is of a cluster below ours.
func (m *member) isDownstream(id spiffeid.ID) bool {
	_, ok := m.store.Downstream(id.String())
	return ok
}

// isAdmin reports whether the ID has an admin's power.
func (m *member) isAdmin(id spiffeid.ID) bool {
	s := m.serving.Load()
	return s != nil && s.IsAdmin(id)
}

// adminRoles are the admins by configuration, which has been checked.
func (m *member) adminRoles() map[spiffeid.ID]identity.AdminRole {
	out := map[spiffeid.ID]identity.AdminRole{}
	for _, a := range m.c.Admin.IDs {
		if id, err := spiffeid.FromString(a.ID); err == nil {
			out[id] = identity.AdminRole(a.Role)
		}
	}
	return out
}

func vaultConfig(v *config.Vault) vault.Config {
	out := vault.Config{Address: v.Address, CAFile: v.CAFile, Namespace: v.Namespace, TokenFile: v.TokenFile}
	if a := v.AppRole; a != nil {
		out.AppRole = &vault.AppRole{Mount: a.Mount, RoleID: a.RoleID, SecretIDFile: a.SecretIDFile}
	}
	if k := v.Kubernetes; k != nil {
		out.Kubernetes = &vault.Kubernetes{Mount: k.Mount, Role: k.Role, TokenPath: k.TokenPath}
	}
	return out
}

// notes are for health: what somebody should see to, though the member issues.
func (m *member) notes() []string {
	if s := m.serving.Load(); s != nil {
		return s.Degraded()
	}
	return nil
}

func authorityCommand(a *admin) *cobra.Command {
	cmd := &cobra.Command{Use: "authority", Short: "See and replace the keys that the trust domain vouches for"}
	a.flags(cmd)
	list := &cobra.Command{
		Use: "list", Short: "List the authorities: what signs, what is next, what is still trusted", Args: cobra.NoArgs,
		Example: "  countersign authority list\n  countersign authority list -o json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.call(cmd, func(ctx context.Context, c adminv1.AdminClient) error {
				res, err := c.ListAuthorities(ctx, &adminv1.Empty{})
				if err != nil {
					return err
				}
				return a.out.Print(cmd.OutOrStdout(), res, func() cli.Table { return authorityTable(res) })
			})
		},
	}
	cmd.AddCommand(list, taintCommand(a, "authority"))
	return cmd
}

func authorityTable(res *adminv1.ListAuthoritiesResponse) cli.Table {
	t := cli.Table{Header: []string{"ID", "KIND", "STATE", "UNTIL", "KEY", "UPSTREAM"}}
	for _, a := range res.Authorities {
		key := a.Key
		if a.SealTerm != 0 {
			key += " (term " + strconv.FormatUint(uint64(a.SealTerm), 10) + ")"
		}
		t.Rows = append(t.Rows, []string{a.Id, a.Kind, a.State, timeCell(a.NotAfter), key, orDash(a.Upstream)})
	}
	return t
}

// rootsOf is what an x509 authority adds to the bundle.
func rootsOf(a *identity.Authority) [][]byte {
	if len(a.Roots) > 0 {
		return a.Roots
	}
	return [][]byte{a.Cert}
}
