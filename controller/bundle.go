package controller

import (
	"context"
	"fmt"
	"maps"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime/schema"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"countersign.io/countersign/identity"
)

// The signer that the ClusterTrustBundle speaks for.
const bundleSigner = "countersign.io/bundle"

const (
	managedLabel     = "app.kubernetes.io/managed-by"
	managedValue     = "countersign"
	domainAnnotation = "countersign.io/trust-domain"
	// everywhere is the request for the ClusterTrustBundle, which has no namespace; no namespace has such a name.
	everywhere = "*"
)

// bundles publishes the trust domain's bundle, and puts back what somebody changes. That it is published acknowledges nothing: who reads
// it there is nobody that a rotation knows of, and a rotation waits for none of them.
type bundles struct {
	cfg    *Config
	client client.Client
	cache  client.Reader            // of namespaces
	trust  *schema.GroupVersionKind // of ClusterTrustBundle; nil: none is published
}

// addBundle adds the controller that publishes the bundle.
func addBundle(ctx context.Context, mgr ctrl.Manager, cfg *Config, changes *feed) error {
	b := &cfg.Bundle
	r := &bundles{cfg: cfg, client: mgr.GetClient(), cache: mgr.GetCache()}
	if b.ClusterTrustBundle {
		gvk, err := trustBundleKind(mgr.GetRESTMapper())
		if err != nil {
			return err
		}
		r.trust = gvk
	}
	var kick kicker
	c := ctrl.NewControllerManagedBy(mgr).Named("bundle").WatchesRawSource(kick.source())
	if b.ConfigMap != "" {
		c = c.Watches(&corev1.ConfigMap{}, handler.EnqueueRequestsFromMapFunc(func(_ context.Context, o client.Object) []reconcile.Request {
			return []reconcile.Request{requestFor(o.GetNamespace())}
		}), builder.WithPredicates(predicate.NewPredicateFuncs(func(o client.Object) bool { return o.GetName() == b.ConfigMap })))
	}
	if b.ConfigMap != "" && b.Namespaces != nil {
		c = c.WatchesMetadata(&corev1.Namespace{}, handler.EnqueueRequestsFromMapFunc(func(_ context.Context, o client.Object) []reconcile.Request {
			return []reconcile.Request{requestFor(o.GetName())}
		}))
	}
	if r.trust != nil {
		obj := r.trustObject()
		c = c.Watches(obj, handler.EnqueueRequestsFromMapFunc(func(context.Context, client.Object) []reconcile.Request {
			return []reconcile.Request{requestFor(everywhere)}
		}), builder.WithPredicates(predicate.NewPredicateFuncs(func(o client.Object) bool { return o.GetName() == obj.GetName() })))
	}
	if err := c.Complete(r); err != nil {
		return err
	}
	kick.kick(b.Namespace) // the namespaces that have one already, and those that are to, come by their watches
	kick.kick(everywhere)
	all := func() {
		kick.kick(b.Namespace)
		kick.kick(everywhere)
		if b.Namespaces == nil {
			return
		}
		list := &metav1.PartialObjectMetadataList{}
		list.SetGroupVersionKind(corev1.SchemeGroupVersion.WithKind("NamespaceList"))
		if err := mgr.GetCache().List(ctx, list, client.MatchingLabelsSelector{Selector: b.Namespaces}); err == nil {
			for i := range list.Items {
				kick.kick(list.Items[i].Name)
			}
		}
	}
	changes.on(func(cs []identity.Change) {
		for _, c := range cs {
			if c.Bundle || c.Reset {
				all()
				return
			}
		}
	})
	return nil
}

func requestFor(name string) reconcile.Request {
	r := reconcile.Request{}
	r.Name = name
	return r
}

// trustBundleKind is the newest version that the API server has; nil: it has none.
func trustBundleKind(m meta.RESTMapper) (*schema.GroupVersionKind, error) {
	found, err := m.RESTMapping(schema.GroupKind{Group: "certificates.k8s.io", Kind: "ClusterTrustBundle"}, "v1", "v1beta1", "v1alpha1")
	switch {
	case meta.IsNoMatchError(err) || apierrors.IsNotFound(err):
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("asking for ClusterTrustBundles: %w", err)
	}
	return &found.GroupVersionKind, nil
}

// Reconcile is reconcile.Reconciler's. The request names a namespace, or everywhere.
func (r *bundles) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
	b := r.cfg.Bundle.Current()
	if b == nil || len(b.X509) == 0 {
		return reconcile.Result{}, nil // its first is a change
	}
	data, err := r.cfg.Bundle.Data(b)
	if err != nil {
		return reconcile.Result{}, fmt.Errorf("encoding the bundle: %w", err)
	}
	if req.Name == everywhere {
		return reconcile.Result{}, r.publishTrust(ctx, data)
	}
	if r.cfg.Bundle.ConfigMap == "" {
		return reconcile.Result{}, nil
	}
	wanted, err := r.wanted(ctx, req.Name)
	if err != nil {
		return reconcile.Result{}, err
	}
	return reconcile.Result{}, r.publish(ctx, req.Name, wanted, data)
}

// wanted reports whether a namespace is to have the ConfigMap.
func (r *bundles) wanted(ctx context.Context, namespace string) (bool, error) {
	b := &r.cfg.Bundle
	if namespace == b.Namespace {
		return true, nil
	}
	if b.Namespaces == nil {
		return false, nil
	}
	ns := &metav1.PartialObjectMetadata{}
	ns.SetGroupVersionKind(corev1.SchemeGroupVersion.WithKind("Namespace"))
	if err := r.cache.Get(ctx, client.ObjectKey{Name: namespace}, ns); err != nil {
		return false, client.IgnoreNotFound(err)
	}
	return ns.DeletionTimestamp.IsZero() && b.Namespaces.Matches(labels.Set(ns.Labels)), nil
}

// publish makes one ConfigMap, mends it, or takes it away. One that says that it is another trust domain's is left alone: two
// installations would write over each other for ever.
func (r *bundles) publish(ctx context.Context, namespace string, wanted bool, data map[string]string) error {
	name, td := r.cfg.Bundle.ConfigMap, r.cfg.TrustDomain.Name()
	have := &corev1.ConfigMap{}
	err := r.client.Get(ctx, client.ObjectKey{Namespace: namespace, Name: name}, have)
	there := err == nil
	if client.IgnoreNotFound(err) != nil {
		return err
	}
	if whose := have.Annotations[domainAnnotation]; there && whose != "" && whose != td {
		r.cfg.Log.Warn("a ConfigMap for the trust bundle is another trust domain's, and left as it is", "namespace", namespace, "config_map", name, "trust_domain", whose)
		return nil
	}
	switch {
	case !wanted && there && have.Labels[managedLabel] == managedValue && have.Annotations[domainAnnotation] == td:
		return client.IgnoreNotFound(r.client.Delete(ctx, have))
	case !wanted:
		return nil
	case !there:
		return r.client.Create(ctx, &corev1.ConfigMap{
			ObjectMeta: metav1.ObjectMeta{
				Namespace: namespace, Name: name, Labels: map[string]string{managedLabel: managedValue}, Annotations: map[string]string{domainAnnotation: td},
			},
			Data: data,
		})
	case maps.Equal(have.Data, data) && len(have.BinaryData) == 0 && have.Labels[managedLabel] == managedValue && have.Annotations[domainAnnotation] == td:
		return nil
	}
	next := have.DeepCopy()
	next.Data, next.BinaryData = data, nil
	next.Labels, next.Annotations = with(next.Labels, managedLabel, managedValue), with(next.Annotations, domainAnnotation, td)
	return r.client.Update(ctx, next)
}

func with(m map[string]string, key, value string) map[string]string {
	out := maps.Clone(m)
	if out == nil {
		out = map[string]string{}
	}
	out[key] = value
	return out
}

// trustObject is the ClusterTrustBundle without its contents. Its name begins with the signer's, as the API server wants it.
func (r *bundles) trustObject() *unstructured.Unstructured {
	out := &unstructured.Unstructured{}
	out.SetGroupVersionKind(*r.trust)
	out.SetName(TrustBundleName(r.cfg.TrustDomain.Name()))
	return out
}

// TrustBundleName is the name of a trust domain's ClusterTrustBundle: that of its signer, and then the trust domain, with '-' for '_',
// which no name may have.
func TrustBundleName(td string) string {
	return strings.ReplaceAll(bundleSigner, "/", ":") + ":" + strings.ReplaceAll(td, "_", "-")
}

func (r *bundles) publishTrust(ctx context.Context, data map[string]string) error {
	if r.trust == nil {
		return nil
	}
	roots := data[r.cfg.Bundle.Roots]
	have := r.trustObject()
	err := r.client.Get(ctx, client.ObjectKeyFromObject(have), have)
	if client.IgnoreNotFound(err) != nil {
		return err
	}
	spec := map[string]any{"signerName": bundleSigner, "trustBundle": roots}
	if err != nil {
		next := r.trustObject()
		next.SetLabels(map[string]string{managedLabel: managedValue})
		next.SetAnnotations(map[string]string{domainAnnotation: r.cfg.TrustDomain.Name()})
		next.Object["spec"] = spec
		return r.client.Create(ctx, next)
	}
	if got, _, _ := unstructured.NestedString(have.Object, "spec", "trustBundle"); got == roots {
		return nil
	}
	next := have.DeepCopy()
	next.Object["spec"] = spec
	return r.client.Update(ctx, next)
}
