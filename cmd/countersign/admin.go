package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	adminv1 "countersign.io/countersign/api/admin/v1"
	"countersign.io/countersign/cmd/internal/cli"
	"countersign.io/countersign/identity"
)

// maxInput bounds what an operator's file may hold.
const maxInput = 1 << 20

func tokenCommand(a *admin) *cobra.Command {
	cmd := &cobra.Command{Use: "token", Short: "Make one-time tokens by which members and agents join"}
	a.flags(cmd)
	var server, agent bool
	var node string
	var ttl time.Duration
	create := &cobra.Command{
		Use:   "create --server | --agent",
		Short: "Print a token: addresses, the CA's pin and a one-time secret",
		Example: `  countersign token create --server > /run/join          # for a new member: join_token_file: /run/join
  countersign token create --agent --kube-node prod/node-7  # the agent there may speak for that node's pods
  countersign token create --agent --ttl 1h`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if server == agent {
				return fmt.Errorf("%w: say --server or --agent", identity.ErrInvalid)
			}
			req := &adminv1.CreateTokenRequest{Purpose: identity.JoinAgent, Ttl: durationpb.New(ttl)}
			if server {
				req.Purpose = identity.JoinServer
			}
			if node != "" {
				cluster, name, ok := strings.Cut(node, "/")
				if !ok || server {
					return fmt.Errorf("%w: --kube-node %q: want CLUSTER/NODE, with --agent", identity.ErrInvalid, node)
				}
				req.KubeCluster, req.KubeNode = cluster, name
			}
			return a.call(cmd, func(ctx context.Context, c adminv1.AdminClient) error {
				res, err := c.CreateToken(ctx, req)
				if err != nil {
					return err
				}
				// The bare token, so that it can be piped into a file.
				return a.out.Print(cmd.OutOrStdout(), res, func() cli.Table { return cli.Table{Rows: [][]string{{res.Token}}} })
			})
		},
	}
	create.Flags().BoolVar(&server, "server", false, "the token admits a member of the CA cluster")
	create.Flags().BoolVar(&agent, "agent", false, "the token admits a node agent")
	create.Flags().StringVar(&node, "kube-node", "", "CLUSTER/NODE: you vouch that the agent runs on this Kubernetes node")
	create.Flags().DurationVar(&ttl, "ttl", 10*time.Minute, "how long the token can be used (at the most 24h)")
	cmd.AddCommand(create)
	return cmd
}

func kubeCommand(a *admin) *cobra.Command {
	cmd := &cobra.Command{Use: "kube", Short: "Register the Kubernetes clusters whose pods get identities"}
	a.flags(cmd)
	var k adminv1.KubeCluster
	var jwksFile, caFile string
	var dryAdd, dryDelete *bool
	add := &cobra.Command{
		Use:   "add NAME",
		Short: "Register a kube cluster",
		Long: `Register a kube cluster. Its tokens are verified by signature (--jwks-file, --jwks-url), by asking its API server
(--token-review with --kubeconfig), or both. With --kubeconfig members also watch its pods, so that a deleted pod's identity
ends within a second.`,
		Example: `  countersign kube add prod --issuer https://kubernetes.default.svc.cluster.local --kubeconfig in-cluster --token-review
  kubectl get --raw /openid/v1/jwks > jwks.json
  countersign kube add edge --issuer https://edge.example.org --jwks-file jwks.json --default-id '/edge/ns/{k8s:ns}/sa/{k8s:sa}'`,
		Args: cobra.ExactArgs(1), ValidArgsFunction: a.completeKube, // one that is there is for --replace
		RunE: func(cmd *cobra.Command, args []string) error {
			k.Name = args[0]
			var err error
			if k.Jwks, err = readInput(jwksFile); err != nil {
				return err
			}
			if k.CaPem, err = readInput(caFile); err != nil {
				return err
			}
			if *dryAdd {
				return a.preview(cmd, func(ctx context.Context, c adminv1.PreviewClient) (*adminv1.PreviewResponse, error) {
					return c.AddKubeCluster(ctx, &k)
				})
			}
			return a.call(cmd, func(ctx context.Context, c adminv1.AdminClient) error {
				res, err := c.AddKubeCluster(ctx, &k)
				if err != nil {
					return err
				}
				return a.out.Print(cmd.OutOrStdout(), res, func() cli.Table { return kubeTable(res) })
			})
		},
	}
	dryAdd = dryRun(add)
	f := add.Flags()
	f.StringVar(&k.Issuer, "issuer", "", "the exact issuer of its service account tokens")
	f.StringVar(&k.Audience, "audience", "countersign", "the audience our tokens must be bound to")
	f.StringVar(&jwksFile, "jwks-file", "", "a JSON Web Key Set to verify signatures with, without network")
	f.StringVar(&k.JwksUrl, "jwks-url", "", "where members fetch the JSON Web Key Set (https)")
	f.StringVar(&caFile, "ca-file", "", "PEM certificates trusted for --jwks-url (default the system's)")
	f.StringVar(&k.Kubeconfig, "kubeconfig", "", "a kubeconfig's path on each member, or in-cluster")
	f.BoolVar(&k.TokenReview, "token-review", false, "ask the API server about every token")
	f.StringSliceVar(&k.AgentAccounts, "agent-account", nil, "NAMESPACE/SERVICEACCOUNT whose pods may be node agents (repeatable)")
	f.StringVar(&k.DefaultId, "default-id", "", "path template for pods without an entry (default "+identity.DefaultKubeID+", if no other cluster has that)")
	f.BoolVar(&k.NoDefaultId, "no-default-id", false, "a pod without an entry has no identity")
	f.BoolVar(&k.Replace, "replace", false, "replace a cluster of the same name")
	list := &cobra.Command{
		Use: "list", Short: "List the registered kube clusters", Args: cobra.NoArgs,
		Example: "  countersign kube list -o yaml",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.call(cmd, func(ctx context.Context, c adminv1.AdminClient) error {
				res, err := c.ListKubeClusters(ctx, &adminv1.ListRequest{})
				if err != nil {
					return err
				}
				return a.out.Print(cmd.OutOrStdout(), res, func() cli.Table { return kubeTable(res.KubeClusters...) })
			})
		},
	}
	del := &cobra.Command{
		Use: "delete NAME", Short: "Forget a kube cluster: its pods and agents get nothing more", Args: cobra.ExactArgs(1),
		Example: "  countersign kube delete edge --dry-run\n  countersign kube delete edge", ValidArgsFunction: a.completeKube,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.named(cmd, *dryDelete, args[0], func(ctx context.Context, c adminv1.AdminClient, r *adminv1.NameRequest) error {
				_, err := c.DeleteKubeCluster(ctx, r)
				return err
			}, func(ctx context.Context, c adminv1.PreviewClient, r *adminv1.NameRequest) (*adminv1.PreviewResponse, error) {
				return c.DeleteKubeCluster(ctx, r)
			})
		},
	}
	dryDelete = dryRun(del)
	cmd.AddCommand(add, list, del)
	return cmd
}

func kubeTable(ks ...*adminv1.KubeCluster) cli.Table {
	t := cli.Table{Header: []string{"NAME", "ISSUER", "AUDIENCE", "VERIFIED BY", "DEFAULT ID"}}
	for _, k := range ks {
		var by []string
		if len(k.Jwks) > 0 {
			by = append(by, "jwks (held)")
		}
		if k.JwksUrl != "" {
			by = append(by, "jwks (url)")
		}
		if k.TokenReview {
			by = append(by, "token review")
		}
		t.Rows = append(t.Rows, []string{k.Name, k.Issuer, k.Audience, strings.Join(by, ", "), orDash(k.DefaultId)})
	}
	return t
}

func agentCommand(a *admin) *cobra.Command {
	cmd := &cobra.Command{Use: "agent", Short: "See and judge node agents"}
	a.flags(cmd)
	var dryBan, dryEvict *bool
	list := &cobra.Command{
		Use: "list", Short: "List the attested agents", Args: cobra.NoArgs, Example: "  countersign agent list",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.call(cmd, func(ctx context.Context, c adminv1.AdminClient) error {
				all := &adminv1.ListAgentsResponse{}
				for page := (&adminv1.ListRequest{}); ; page.PageToken = all.NextPageToken {
					res, err := c.ListAgents(ctx, page)
					if err != nil {
						return err
					}
					all.Agents, all.NextPageToken = append(all.Agents, res.Agents...), res.NextPageToken
					if all.NextPageToken == "" {
						break
					}
				}
				return a.out.Print(cmd.OutOrStdout(), all, func() cli.Table { return agentTable(all.Agents...) })
			})
		},
	}
	show := &cobra.Command{
		Use: "show SPIFFE-ID", Short: "Show one agent", Args: cobra.ExactArgs(1),
		Example: "  countersign agent show spiffe://example.org/countersign/agent/kube/prod/node-7 -o yaml",
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.call(cmd, func(ctx context.Context, c adminv1.AdminClient) error {
				res, err := c.GetAgent(ctx, &adminv1.NameRequest{Name: args[0]})
				if err != nil {
					return err
				}
				return a.out.Print(cmd.OutOrStdout(), res, func() cli.Table { return agentTable(res) })
			})
		},
	}
	ban := &cobra.Command{
		Use: "ban SPIFFE-ID", Short: "Shut an agent out for good: it cannot attest again", Args: cobra.ExactArgs(1),
		Example: "  countersign agent ban spiffe://example.org/countersign/agent/kube/prod/node-7",
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.named(cmd, *dryBan, args[0], func(ctx context.Context, c adminv1.AdminClient, r *adminv1.NameRequest) error {
				_, err := c.BanAgent(ctx, r)
				return err
			}, func(ctx context.Context, c adminv1.PreviewClient, r *adminv1.NameRequest) (*adminv1.PreviewResponse, error) {
				return c.BanAgent(ctx, r)
			})
		},
	}
	dryBan = dryRun(ban)
	evict := &cobra.Command{
		Use: "evict SPIFFE-ID", Short: "Forget an agent: it must attest again", Args: cobra.ExactArgs(1),
		Example: "  countersign agent evict spiffe://example.org/countersign/agent/join/1f3a",
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.named(cmd, *dryEvict, args[0], func(ctx context.Context, c adminv1.AdminClient, r *adminv1.NameRequest) error {
				_, err := c.EvictAgent(ctx, r)
				return err
			}, func(ctx context.Context, c adminv1.PreviewClient, r *adminv1.NameRequest) (*adminv1.PreviewResponse, error) {
				return c.EvictAgent(ctx, r)
			})
		},
	}
	dryEvict = dryRun(evict)
	for _, c := range []*cobra.Command{show, ban, evict} {
		c.ValidArgsFunction = a.completeAgents
	}
	cmd.AddCommand(list, show, ban, evict)
	return cmd
}

func agentTable(agents ...*adminv1.Agent) cli.Table {
	t := cli.Table{Header: []string{"ID", "KIND", "NODE", "ATTESTED", "STATE", "WORKLOADS", "ACKED"}}
	for _, g := range agents {
		state := "away"
		switch {
		case g.Banned:
			state = "banned"
		case g.Connected:
			state = "connected"
		}
		node := g.KubeNode
		if node != "" {
			node = g.KubeCluster + "/" + node
		}
		t.Rows = append(t.Rows, []string{g.Id, g.Kind, orDash(node), timeCell(g.AttestedAt), state, strconv.Itoa(int(g.Workloads)), strconv.FormatUint(g.AckedRevision, 10)})
	}
	return t
}

func timeCell(t *timestamppb.Timestamp) string {
	if t == nil {
		return "-"
	}
	return t.AsTime().UTC().Format(time.RFC3339)
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// readInput reads a small file an operator named; "-" is standard input, "" nothing.
func readInput(path string) ([]byte, error) {
	switch path {
	case "":
		return nil, nil
	case "-":
		data, err := io.ReadAll(io.LimitReader(os.Stdin, maxInput+1))
		if err == nil && len(data) > maxInput {
			err = fmt.Errorf("%w: standard input is larger than %d bytes", identity.ErrInvalid, maxInput)
		}
		return data, err
	}
	data, err := cli.ReadFile(path, maxInput)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", identity.ErrInvalid, err)
	}
	return data, nil
}
