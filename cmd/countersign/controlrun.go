package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

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
that it does not have is refused, and its resource says so. Where a member cannot be asked, another one is; where none can, it waits.`,
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
			if cfg.TrustDomain, err = meetMember(cmd.Context(), cfg.Admin, cfg.Log); err == nil {
				err = checkRegistered(cmd.Context(), cfg.Admin, cluster, kubeconfig)
			}
			if cmd.Context().Err() != nil {
				return nil // it was told to end
			}
			if err != nil {
				return err
			}
			cfg.Log.Info("controller started", "kube_cluster", cluster, "trust_domain", cfg.TrustDomain.Name(), "version", version)
			return controller.Run(cmd.Context(), cfg)
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

// meetMember asks a member for its trust domain. While none can be asked it tries again: whoever starts this process may be quicker than
// whoever starts members, and agents.
func meetMember(ctx context.Context, c adminv1.AdminClient, log *slog.Logger) (spiffeid.TrustDomain, error) {
	for wait := controlRetryFirst; ; wait = min(2*wait, controlRetryMost) {
		st, err := c.Status(ctx, &adminv1.Empty{})
		if err == nil {
			td, err := spiffeid.TrustDomainFromString(st.TrustDomain)
			if err != nil {
				return td, fmt.Errorf("%w: the member's trust domain: %v", identity.ErrInvalid, err)
			}
			return td, nil
		}
		if err = api.FromStatus(err); !errors.Is(err, identity.ErrUnavailable) || ctx.Err() != nil {
			return spiffeid.TrustDomain{}, fmt.Errorf("asking a member: %w", err)
		}
		log.Warn("no member can be asked: see that --member names members, that they run, and that an agent is here; trying again", "wait", wait, "error", err)
		t := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			t.Stop()
			return spiffeid.TrustDomain{}, fmt.Errorf("asking a member was interrupted: %w", err)
		case <-t.C:
		}
	}
}

// checkRegistered wants the kube cluster registered under that name, and the API server to be its: by another's name, resources here would
// give identities to pods there.
func checkRegistered(ctx context.Context, c adminv1.AdminClient, name, kubeconfig string) error {
	res, err := c.ListKubeClusters(ctx, &adminv1.ListRequest{})
	if err != nil {
		return fmt.Errorf("listing the kube clusters: %w", api.FromStatus(err))
	}
	var names []string
	for _, k := range res.KubeClusters {
		if names = append(names, k.Name); k.Name == name {
			if err := kube.CheckSame(ctx, kubeconfig, *api.KubeClusterFromWire(k)); err != nil {
				return fmt.Errorf("--cluster %s: %w", name, err)
			}
			return nil
		}
	}
	slices.Sort(names)
	return fmt.Errorf("%w: --cluster %s: no kube cluster of that name is registered (there are: %s): correct it, or register it first (countersign kube add %s)", identity.ErrNotFound, name, strings.Join(names, ", "), name)
}
