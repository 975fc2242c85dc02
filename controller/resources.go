package controller

import (
	"context"
	"strings"

	"k8s.io/apimachinery/pkg/runtime/schema"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"countersign.io/countersign/controller/v1alpha1"
	"countersign.io/countersign/identity"
)

// addResources adds the controllers of the custom resources.
func addResources(ctx context.Context, mgr ctrl.Manager, cfg *Config, changes *feed) error {
	c, live, recorder := mgr.GetClient(), mgr.GetAPIReader(), mgr.GetEventRecorder("countersign")
	ids := &identities{cfg: cfg, client: c, reader: live, entries: newMirror(cfg.Admin, cfg.Watch != nil, cfg.Resync/2)}
	var idKick, fedKick, kubeKick kicker

	// Any other resource of the kind may have been in conflict with the one that changed.
	everyIdentity := handler.EnqueueRequestsFromMapFunc(func(ctx context.Context, changed client.Object) []reconcile.Request {
		all := &v1alpha1.WorkloadIdentityList{}
		if err := mgr.GetClient().List(ctx, all); err != nil {
			return nil
		}
		var out []reconcile.Request
		for i := range all.Items {
			if all.Items[i].Name != changed.GetName() {
				out = append(out, reconcile.Request{NamespacedName: client.ObjectKeyFromObject(&all.Items[i])})
			}
		}
		return out
	})
	asked := builder.WithPredicates(specOnly()) // a status that we wrote ourselves asks for nothing
	following := func(name string, obj client.Object, kick *kicker) *builder.Builder {
		return ctrl.NewControllerManagedBy(mgr).Named(name).For(obj, asked).WatchesRawSource(kick.source()).WithOptions(options())
	}
	err := following("workloadidentity", &v1alpha1.WorkloadIdentity{}, &idKick).Watches(&v1alpha1.WorkloadIdentity{}, everyIdentity, asked).
		Complete(followIdentities(c, live, recorder, cfg.Resync, ids))
	if err == nil {
		err = following("federatedtrustdomain", &v1alpha1.FederatedTrustDomain{}, &fedKick).
			Complete(followFederations(c, live, recorder, min(cfg.Resync, statusEvery), &federations{cfg}))
	}
	if err == nil {
		err = following("kubecluster", &v1alpha1.KubeCluster{}, &kubeKick).Complete(followClusters(c, live, recorder, cfg.Resync, &clusters{cfg}))
	}
	if err != nil {
		return err
	}
	changes.on(func(all []identity.Change) {
		owners, others := ids.entries.take(all)
		for _, o := range owners {
			if name, ok := strings.CutPrefix(o, ids.owner("")); ok {
				idKick.kick(name)
			}
		}
		kickAll := func(k *kicker, kind string) {
			for _, name := range names(ctx, mgr.GetClient(), kind) {
				k.kick(name)
			}
		}
		var clusters, federations bool
		for _, c := range all {
			clusters = clusters || c.KubeCluster != "" || c.Reset
			federations = federations || c.Federation != "" || c.Reset
		}
		if others || clusters {
			kickAll(&idKick, "WorkloadIdentityList")
		}
		if clusters {
			kickAll(&kubeKick, "KubeClusterList")
		}
		if federations {
			kickAll(&fedKick, "FederatedTrustDomainList")
		}
	})
	return nil
}

// names are those of a kind's objects that are known already.
func names(ctx context.Context, c client.Client, kind string) []string {
	obj, err := Scheme().New(schema.GroupVersionKind{Group: v1alpha1.Group, Version: v1alpha1.Version, Kind: kind})
	if err != nil {
		return nil
	}
	var out []string
	switch list := obj.(type) {
	case *v1alpha1.WorkloadIdentityList:
		if c.List(ctx, list) == nil {
			for i := range list.Items {
				out = append(out, list.Items[i].Name)
			}
		}
	case *v1alpha1.KubeClusterList:
		if c.List(ctx, list) == nil {
			for i := range list.Items {
				out = append(out, list.Items[i].Name)
			}
		}
	case *v1alpha1.FederatedTrustDomainList:
		if c.List(ctx, list) == nil {
			for i := range list.Items {
				out = append(out, list.Items[i].Name)
			}
		}
	}
	return out
}

// specOnly lets through what changes what a resource asks for, or that it goes.
func specOnly() predicate.Predicate {
	return predicate.Funcs{UpdateFunc: func(e event.UpdateEvent) bool {
		return e.ObjectOld.GetGeneration() != e.ObjectNew.GetGeneration() || (e.ObjectOld.GetDeletionTimestamp() == nil) != (e.ObjectNew.GetDeletionTimestamp() == nil)
	}}
}
