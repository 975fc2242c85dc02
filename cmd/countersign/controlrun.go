package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"k8s.io/klog/v2"

	"countersign.io/countersign/api"
	adminv1 "countersign.io/countersign/api/admin/v1"
	"countersign.io/countersign/attestor/kube"
	"countersign.io/countersign/cmd/internal/cli"
	"countersign.io/countersign/config"
	"countersign.io/countersign/controller"
	"countersign.io/countersign/federation"
	"countersign.io/countersign/identity"
)

func controllerCommand(a *admin) *cobra.Command {
	cmd := &cobra.Command{Use: "controller", Short: "Follow custom resources of a Kubernetes cluster"}
	a.flags(cmd)
	var kubeconfig, cluster, lease string
	var log config.Log
	run := &cobra.Command{
		Use: "run", Short: "Follow WorkloadIdentity, FederatedTrustDomain and KubeCluster resources until it is interrupted", Args: cobra.NoArgs,
		Long: `Follow the custom resources of a Kubernetes cluster until it is interrupted, as the member that leads does with
kubernetes.resources: true. This is for clusters that the members do not live in. With --member it is an admin by its SVID, which it
takes anew before it ends: WorkloadIdentity needs the role operator, the other two need security (docs/ADMIN.md); what needs a role
that it does not have is refused, and its resource says so. Where a member cannot be asked, another one is; where none can, or the API
server cannot, it waits, and says so. What waiting does not mend ends it at once: another cluster's name, rights that it lacks.`,
		Example: `  countersign controller run --kubeconfig in-cluster --cluster edge --member ca-1.example.org:8443 --leader-election countersign`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			rc, err := kube.RESTConfig(kubeconfig)
			if err != nil {
				return fmt.Errorf("%w: %v", identity.ErrInvalid, err)
			}
			logger := cli.Logger(cmd.ErrOrStderr(), log)
			conn := newLasting(a, logger)
			defer conn.Close()
			klog.SetSlogLogger(logger) // what the Kubernetes client has to say
			cfg := controller.Config{
				REST: rc, Cluster: cluster, Resources: true, ParseBundle: federation.Parse, LeaderElection: lease,
				Admin: adminv1.NewAdminClient(conn), Federation: adminv1.NewFederationClient(conn), Log: logger,
			}
			return startController(cmd.Context(), cfg, func(ctx context.Context, k identity.KubeCluster) error { return kube.CheckSame(ctx, kubeconfig, k) }, controller.Run)
		},
	}
	f := run.Flags()
	f.StringVar(&kubeconfig, "kubeconfig", "in-cluster", "path of a kubeconfig, or in-cluster")
	f.StringVar(&cluster, "cluster", "", "the name under which the Kubernetes cluster is registered")
	f.StringVar(&lease, "leader-election", "", "namespace of a Lease by which one of several controllers works at a time (default: there is but this one)")
	f.StringVar(&log.Level, "log-level", "info", "debug, info, warn or error")
	f.StringVar(&log.Format, "log-format", "text", "text or json")
	_ = run.MarkFlagRequired("cluster") // fails for a flag that is not there only
	cmd.AddCommand(run)
	return cmd
}

// startController begins once it knows the trust domain, and that the API server is the one that the members know by that name.
func startController(ctx context.Context, cfg controller.Config, check func(context.Context, identity.KubeCluster) error, run func(context.Context, controller.Config) error) error {
	err := untilReached(ctx, cfg.Log, "no member can be asked: see that --member names members, that they run, and that an agent is here", func() (err error) {
		cfg.TrustDomain, err = meetMember(ctx, cfg.Admin)
		return err
	})
	if err == nil {
		err = untilReached(ctx, cfg.Log, "it cannot be told whether this is the API server of the cluster of that name", func() error {
			return checkRegistered(ctx, cfg.Admin, cfg.Cluster, check)
		})
	}
	if ctx.Err() != nil {
		return nil // it was told to end
	}
	if err != nil {
		return err
	}
	cfg.Log.Info("controller started", "kube_cluster", cfg.Cluster, "trust_domain", cfg.TrustDomain.Name(), "version", version)
	err = untilReached(ctx, cfg.Log, "the API server cannot be asked", func() error { return run(ctx, cfg) })
	if ctx.Err() != nil && errors.Is(err, identity.ErrUnavailable) {
		return nil
	}
	return err
}

// untilReached does f again while somebody cannot be asked: whoever starts this process may be quicker than whoever starts members, agents
// and API servers. It says what it waits for when that is news.
func untilReached(ctx context.Context, log *slog.Logger, lacking string, f func() error) error {
	said := ""
	for wait := controlRetryFirst; ; wait = min(2*wait, controlRetryMost) {
		err := f()
		if !errors.Is(err, identity.ErrUnavailable) || ctx.Err() != nil {
			return err
		}
		if text := err.Error(); text != said {
			log.Warn(lacking+"; trying again", "error", err)
			said = text
		}
		if !sleepFor(ctx, wait) {
			return err
		}
	}
}

func meetMember(ctx context.Context, c adminv1.AdminClient) (spiffeid.TrustDomain, error) {
	st, err := c.Status(ctx, &adminv1.Empty{})
	if err != nil {
		return spiffeid.TrustDomain{}, fmt.Errorf("asking a member: %w", api.FromStatus(err))
	}
	td, err := spiffeid.TrustDomainFromString(st.TrustDomain)
	if err != nil {
		return td, fmt.Errorf("%w: the member's trust domain: %v", identity.ErrInvalid, err)
	}
	return td, nil
}

// checkRegistered wants the kube cluster registered under that name, and the API server to be its: by another's name, resources here would
// give identities to pods there.
func checkRegistered(ctx context.Context, c adminv1.AdminClient, name string, check func(context.Context, identity.KubeCluster) error) error {
	var names []string
	for page := (&adminv1.ListRequest{}); ; {
		res, err := c.ListKubeClusters(ctx, page)
		if err != nil {
			return fmt.Errorf("listing the kube clusters: %w", api.FromStatus(err))
		}
		for _, k := range res.KubeClusters {
			if names = append(names, k.Name); k.Name == name {
				if err := check(ctx, *api.KubeClusterFromWire(k)); err != nil {
					return fmt.Errorf("--cluster %s: %w", name, err)
				}
				return nil
			}
		}
		if page.PageToken = res.NextPageToken; page.PageToken == "" {
			break
		}
	}
	slices.Sort(names)
	return fmt.Errorf("%w: --cluster %s: no kube cluster of that name is registered (there are: %s): correct it, or register it first (countersign kube add %s)", identity.ErrNotFound, name, strings.Join(names, ", "), name)
}
