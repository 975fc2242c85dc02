package main

import (
	"context"
	"fmt"
	"sync"
	"time"

	"google.golang.org/grpc/credentials/insecure"
	"k8s.io/apimachinery/pkg/labels"

	adminv1 "countersign.io/countersign/api/admin/v1"
	"countersign.io/countersign/attestor/kube"
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
		if !sleepFor(ctx, wait) {
			return
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
