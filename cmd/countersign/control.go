package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"k8s.io/apimachinery/pkg/labels"

	adminv1 "countersign.io/countersign/api/admin/v1"
	"countersign.io/countersign/attestor/kube"
	"countersign.io/countersign/cmd/internal/cli"
	"countersign.io/countersign/config"
	"countersign.io/countersign/controller"
	"countersign.io/countersign/federation"
	"countersign.io/countersign/identity"
)

// The pauses of a controller that could not start: the API server may be away for long.
const (
	controlRetryFirst = time.Second
	controlRetryMost  = time.Minute
)

// control does what the leader does in its kube cluster, by custom resources and with the bundle, until ctx ends. What it does by the
// admin API is done on this member's own socket, and recorded as any operator's call there.
func (m *member) control(ctx context.Context) {
	k := m.c.Kubernetes
	if k.Cluster == "" || !m.issues(ctx) {
		return
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	if k.Bundle.ConfigMap != config.BundleOff || k.Bundle.ClusterTrustBundle != config.BundleOff {
		wg.Go(func() { m.controlBy(ctx, "publishing the bundle", m.publishing) })
	}
	if k.Resources { // apart, so that custom resources that the API server does not know keep nobody from the bundle
		wg.Go(func() { m.controlBy(ctx, "following custom resources", m.following) })
	}
}

// issues waits until this member may serve: one that began a cluster, and does not know yet whether it is the one, publishes nothing.
func (m *member) issues(ctx context.Context) bool {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for m.server.Ready() != nil || m.data.isUnclaimed() {
		select {
		case <-ctx.Done():
			return false
		case <-tick.C:
		}
	}
	return true
}

func (m *member) controlBy(ctx context.Context, doing string, run func(context.Context) error) {
	for wait := controlRetryFirst; ; wait = min(2*wait, controlRetryMost) {
		began := time.Now()
		err := run(ctx)
		if ctx.Err() != nil {
			return
		}
		if time.Since(began) > controlRetryMost {
			wait = controlRetryFirst
		}
		m.log.Warn(doing+" in the kube cluster has ended: trying again", "kube_cluster", m.c.Kubernetes.Cluster, "error", err)
		t := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			t.Stop()
			return
		case <-t.C:
		}
	}
}

func (m *member) controllerConfig() (controller.Config, error) {
	k := m.c.Kubernetes
	rc, err := kube.RESTConfig(k.Kubeconfig)
	if err != nil {
		return controller.Config{}, err
	}
	return controller.Config{REST: rc, TrustDomain: m.td, Cluster: k.Cluster, Watch: m.store.Watch, Log: m.log}, nil
}

func (m *member) publishing(ctx context.Context) error {
	cfg, err := m.controllerConfig()
	if err != nil {
		return err
	}
	k := m.c.Kubernetes
	cfg.Bundle = controller.BundleConfig{
		Current: m.store.Bundle, Data: bundleData, Roots: kube.BundlePEM, Namespace: k.Namespace,
		ClusterTrustBundle: k.Bundle.ClusterTrustBundle != config.BundleOff,
	}
	if k.Bundle.ConfigMap != config.BundleOff {
		cfg.Bundle.ConfigMap = k.Bundle.ConfigMap
	}
	if cfg.Bundle.Namespaces, err = namespacesOf(k.Bundle.Namespaces); err != nil {
		return err
	}
	return controller.Run(ctx, cfg)
}

// namespacesOf is nil where none are chosen.
func namespacesOf(selector string) (labels.Selector, error) {
	if selector == "" {
		return nil, nil
	}
	s, err := labels.Parse(selector)
	if err != nil {
		return nil, fmt.Errorf("%w: kubernetes.bundle.namespaces %q: %v", identity.ErrInvalid, selector, err)
	}
	return s, nil
}

func (m *member) following(ctx context.Context) error {
	cfg, err := m.controllerConfig()
	if err != nil {
		return err
	}
	var l link
	conn, err := l.failed.dial("unix:"+m.c.AdminSocket, insecure.NewCredentials())
	if err != nil {
		return err
	}
	defer conn.Close()
	cfg.Resources, cfg.ParseBundle = true, federation.Parse
	cfg.Admin, cfg.Federation = adminv1.NewAdminClient(conn), adminv1.NewFederationClient(conn)
	return controller.Run(ctx, cfg)
}

func controllerCommand(a *admin) *cobra.Command {
	cmd := &cobra.Command{Use: "controller", Short: "Follow custom resources of a Kubernetes cluster"}
	a.flags(cmd)
	var kubeconfig, cluster, lease string
	var log config.Log
	run := &cobra.Command{
		Use: "run", Short: "Follow WorkloadIdentity, FederatedTrustDomain and KubeCluster resources until it is interrupted", Args: cobra.NoArgs,
		Long: `Follow the custom resources of a Kubernetes cluster until it is interrupted, as the member that leads does with
kubernetes.resources: true. This is for clusters that the members do not live in. With --member it is an admin by its SVID:
WorkloadIdentity needs the role operator, the other two need security (docs/ADMIN.md).`,
		Example: `  countersign controller run --kubeconfig in-cluster --cluster edge --member ca-1.example.org:8443 --leader-election countersign`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			rc, err := kube.RESTConfig(kubeconfig)
			if err != nil {
				return fmt.Errorf("%w: %v", identity.ErrInvalid, err)
			}
			conn, err := a.lasting(cmd.Context())
			if err != nil {
				return err
			}
			defer conn.Close()
			cfg := controller.Config{
				REST: rc, Cluster: cluster, Resources: true, ParseBundle: federation.Parse, LeaderElection: lease,
				Admin: adminv1.NewAdminClient(conn), Federation: adminv1.NewFederationClient(conn), Log: cli.Logger(cmd.ErrOrStderr(), log),
			}
			st, err := cfg.Admin.Status(cmd.Context(), &adminv1.Empty{})
			if err != nil {
				return (&link{where: "--member", remote: true}).explain(err)
			}
			if cfg.TrustDomain, err = spiffeid.TrustDomainFromString(st.TrustDomain); err != nil {
				return fmt.Errorf("%w: the member's trust domain: %v", identity.ErrInvalid, err)
			}
			cfg.Log.Info("controller started", "kube_cluster", cluster, "trust_domain", st.TrustDomain, "version", version)
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

// lasting is a connection for a process that runs on: each time that it connects anew it gets its SVID anew, since those end.
func (a *admin) lasting(ctx context.Context) (*grpc.ClientConn, error) {
	servers := a.members()
	if len(servers) == 0 {
		l, err := a.dial(ctx)
		if err != nil {
			return nil, err
		}
		return l.conn, nil
	}
	var l link
	return l.failed.dial("passthrough:///"+servers[0], insecure.NewCredentials(), // TLS is the dialer's
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxAnswer)),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			source, err := a.remote.source(ctx, a.socket)
			if err != nil {
				return nil, err
			}
			dialer := &tls.Dialer{NetDialer: &net.Dialer{Timeout: dialTime}, Config: source.tls()}
			var errs []error
			for _, s := range servers {
				c, err := dialOnce(ctx, dialer, s)
				if err == nil {
					return c, nil
				}
				errs = append(errs, err)
			}
			return nil, errors.Join(errs...)
		}))
}
