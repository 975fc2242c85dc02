// Package controller makes what custom resources of Kubernetes ask for: WorkloadIdentity becomes entries, FederatedTrustDomain a
// federation, KubeCluster a registered kube cluster; and it publishes the trust domain's bundle as ConfigMaps and a ClusterTrustBundle.
//
// It runs in the member that leads, or on its own. Either way it changes nothing but by the admin API, so that the checks, the roles and the
// audit log are those of operators. What it makes is marked as its own (managed_by), and it touches nothing else; what is changed
// by hand of its own is put back. What it refuses says why in the resource's condition Ready, and in an event.
package controller

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/go-logr/logr"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	authzv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/leaderelection/resourcelock"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/config"
	ctrllog "sigs.k8s.io/controller-runtime/pkg/log"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"

	adminv1 "countersign.io/countersign/api/admin/v1"
	"countersign.io/countersign/controller/v1alpha1"
	"countersign.io/countersign/identity"
)

// Config is what a controller needs.
type Config struct {
	REST        *rest.Config // of the kube cluster whose resources these are
	TrustDomain spiffeid.TrustDomain
	Cluster     string // the name under which that kube cluster is registered
	// Resources says whether custom resources are followed; Bundle what is published. At least one of the two.
	Resources bool
	Bundle    BundleConfig

	Admin      adminv1.AdminClient
	Federation adminv1.FederationClient
	// ParseBundle reads another trust domain's bundle in the SPIFFE format; needed with Resources.
	ParseBundle func(td spiffeid.TrustDomain, raw []byte) (*identity.Bundle, error)
	// Watch calls f with a Reset at once and then with every change of the trust domain's state, as store.Watch does; nil: nobody
	// tells, and the state is read again every Resync.
	Watch  func(ctx context.Context, f func([]identity.Change)) error
	Resync time.Duration // 0: one minute

	// LeaderElection is for several controllers of their own: the namespace of their Lease; empty: there is but this one.
	LeaderElection string
	Log            *slog.Logger
}

// BundleConfig is where the bundle is published; without Current nowhere.
type BundleConfig struct {
	Current   func() *identity.Bundle
	Data      func(*identity.Bundle) (map[string]string, error) // of the ConfigMaps
	Roots     string                                            // the key of Data with the X.509 authorities, PEM
	ConfigMap string                                            // name; empty: none
	Namespace string                                            // that always has one
	// Namespaces selects others that have one; nil: no others.
	Namespaces labels.Selector
	// ClusterTrustBundle says whether there is one, where the API server has the kind.
	ClusterTrustBundle bool
}

const (
	defaultResync = time.Minute
	// releaseTime is how long what is under way may take before the Lease is given back. The process ends with Run.
	releaseTime = 5 * time.Second
	// leaseRenew is how long renewing the Lease is tried before this controller gives up; another takes over 15 s after it was renewed last.
	leaseRenew = 10 * time.Second
)

func (c *Config) check() error {
	switch {
	case c.REST == nil || c.Log == nil || c.TrustDomain.IsZero() || c.Cluster == "":
		return fmt.Errorf("%w: making the controller: REST, Log, TrustDomain and Cluster must be set", identity.ErrInvalid)
	case c.Resources && (c.Admin == nil || c.Federation == nil || c.ParseBundle == nil):
		return fmt.Errorf("%w: making the controller: Admin, Federation and ParseBundle must be set", identity.ErrInvalid)
	case c.Bundle.Current != nil && (c.Bundle.Data == nil || c.Bundle.ConfigMap != "" && c.Bundle.Namespace == ""):
		return fmt.Errorf("%w: making the controller: Bundle is not whole", identity.ErrInvalid)
	}
	return nil
}

// Run does its work until ctx ends; it then returns nil.
func Run(ctx context.Context, cfg Config) error {
	if cfg.Resync == 0 {
		cfg.Resync = defaultResync
	}
	if err := cfg.check(); err != nil {
		return err
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	mgr, err := newManager(&cfg)
	if err != nil {
		return fmt.Errorf("%w: making the client of kube cluster %q: %v", identity.ErrUnavailable, cfg.Cluster, err)
	}
	changes := newFeed(cfg.Watch)
	if cfg.Resources {
		if err = checkKube(ctx, mgr.GetClient(), &cfg); err == nil {
			err = addResources(ctx, mgr, &cfg, changes)
		}
	}
	if err == nil && cfg.Bundle.Current != nil {
		err = addBundle(ctx, mgr, &cfg, changes)
	}
	if err == nil {
		err = mgr.Add(changes)
	}
	if ctx.Err() != nil {
		return nil
	}
	if err != nil {
		return fmt.Errorf("starting the controllers of kube cluster %q: %w", cfg.Cluster, err)
	}
	go func() {
		select {
		case <-mgr.Elected():
			cfg.Log.Info("this controller works now", "kube_cluster", cfg.Cluster, "resources", cfg.Resources, "lease", cfg.LeaderElection)
		case <-ctx.Done():
		}
	}()
	if err := mgr.Start(ctx); err != nil && !errors.Is(err, context.Canceled) {
		return fmt.Errorf("running the controllers of kube cluster %q: %w", cfg.Cluster, err)
	}
	return nil
}

// Scheme knows the kinds that the controllers use.
func Scheme() *runtime.Scheme {
	s := runtime.NewScheme()
	v1alpha1.AddToScheme(s)
	_ = corev1.AddToScheme(s) // fails for types that are registered twice only
	s.AddKnownTypes(authzv1.SchemeGroupVersion, &authzv1.SelfSubjectAccessReview{})
	metav1.AddToGroupVersion(s, authzv1.SchemeGroupVersion)
	metav1.AddToGroupVersion(s, corev1.SchemeGroupVersion)
	return s
}

func newManager(cfg *Config) (ctrl.Manager, error) {
	log := logr.FromSlogHandler(cfg.Log.Handler())
	ctrllog.SetLogger(log) // the first one counts; without any, the library complains
	yes := true
	no := time.Duration(0)
	opts := ctrl.Options{
		Scheme: Scheme(), Logger: log, Metrics: metricsserver.Options{BindAddress: "0"}, HealthProbeBindAddress: "0",
		// Each term of a leader has a manager of its own.
		Controller:              config.Controller{SkipNameValidation: &yes, CacheSyncTimeout: 10 * time.Minute},
		GracefulShutdownTimeout: &no,
		Cache:                   cacheOptions(&cfg.Bundle),
	}
	if cfg.LeaderElection != "" {
		lock, err := leaseLock(cfg)
		if err != nil {
			return nil, err
		}
		grace := releaseTime // then the Lease is given back, and the next one need not wait until it ends
		opts.LeaderElection, opts.LeaderElectionResourceLockInterface = true, lock
		renew := leaseRenew
		opts.RenewDeadline = &renew
		opts.LeaderElectionReleaseOnCancel, opts.GracefulShutdownTimeout = true, &grace
	}
	return ctrl.NewManager(cfg.REST, opts)
}

// leaseLock is the Lease of several controllers. It writes no events, for which the controller would need a right more.
func leaseLock(cfg *Config) (resourcelock.Interface, error) {
	host, err := os.Hostname()
	if err != nil {
		return nil, fmt.Errorf("finding this host's name: %w", err)
	}
	who := resourcelock.ResourceLockConfig{Identity: host + "_" + rand.Text()}
	return resourcelock.NewFromKubeconfig(resourcelock.LeasesResourceLock, cfg.LeaderElection, leaseName, who, rest.CopyConfig(cfg.REST), leaseRenew)
}

// cacheOptions keep ConfigMaps to the ones of our name, which is also all that the members may read.
func cacheOptions(b *BundleConfig) cache.Options {
	only := cache.ByObject{Field: fields.OneTermEqualSelector("metadata.name", b.ConfigMap)}
	if b.Namespaces == nil {
		only.Namespaces = map[string]cache.Config{b.Namespace: {}}
	}
	out := cache.Options{DefaultTransform: cache.TransformStripManagedFields()}
	if b.Current != nil && b.ConfigMap != "" {
		out.ByObject = map[client.Object]cache.ByObject{&corev1.ConfigMap{}: only}
	}
	return out
}
