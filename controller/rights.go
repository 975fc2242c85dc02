package controller

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	authzv1 "k8s.io/api/authorization/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"countersign.io/countersign/controller/v1alpha1"
	"countersign.io/countersign/identity"
)

// leaseName is that of the Lease by which one of several controllers works at a time.
const leaseName = "countersign-controller"

// plurals are the kinds that are followed, as the API server names them in paths.
func plurals() map[string]string {
	return map[string]string{"WorkloadIdentity": "workloadidentities", "FederatedTrustDomain": "federatedtrustdomains", "KubeCluster": "kubeclusters"}
}

// right is what the controller must be allowed at the API server.
type right struct{ verb, group, resource, namespace, name string }

func (r right) String() string {
	out := r.verb + " " + r.resource
	if r.group != "" {
		out += "." + r.group
	}
	if r.name != "" {
		out += " " + r.name
	}
	if r.namespace != "" {
		out += " in namespace " + r.namespace
	}
	return out
}

// rightsFor are those without which nothing goes on. Lacking others, such as to count pods, shows in the resources' conditions.
func rightsFor(cfg *Config) (out []right) {
	for _, plural := range slices.Sorted(maps.Values(plurals())) {
		for _, verb := range []string{"get", "list", "watch", "patch"} {
			out = append(out, right{verb: verb, group: v1alpha1.Group, resource: plural})
		}
		out = append(out, right{verb: "patch", group: v1alpha1.Group, resource: plural + "/status"})
	}
	if ns := cfg.LeaderElection; ns != "" {
		out = append(out, right{"create", "coordination.k8s.io", "leases", ns, ""},
			right{"get", "coordination.k8s.io", "leases", ns, leaseName}, right{"update", "coordination.k8s.io", "leases", ns, leaseName})
	}
	return out
}

// checkKube says at once what else would only show as a controller that does nothing: kinds that the API server does not know, and
// rights that the controller does not have there.
func checkKube(ctx context.Context, c client.Client, cfg *Config) error {
	for kind := range plurals() {
		_, err := c.RESTMapper().RESTMapping(schema.GroupKind{Group: v1alpha1.Group, Kind: kind}, v1alpha1.Version)
		switch {
		case meta.IsNoMatchError(err):
			return fmt.Errorf("%w: the API server does not know %s (%s/%s): apply the CustomResourceDefinitions first (deploy/chart/crds)", identity.ErrPrecondition, kind, v1alpha1.Group, v1alpha1.Version)
		case err != nil:
			return fmt.Errorf("%w: asking the API server what it knows: %v", identity.ErrUnavailable, err)
		}
	}
	var lacking []string
	for _, r := range rightsFor(cfg) {
		resource, sub, _ := strings.Cut(r.resource, "/")
		ask := &authzv1.SelfSubjectAccessReview{Spec: authzv1.SelfSubjectAccessReviewSpec{ResourceAttributes: &authzv1.ResourceAttributes{
			Verb: r.verb, Group: r.group, Resource: resource, Subresource: sub, Namespace: r.namespace, Name: r.name,
		}}}
		if err := c.Create(ctx, ask); apierrors.IsForbidden(err) {
			return nil // nobody may ask that there: what is lacking shows later
		} else if err != nil {
			return fmt.Errorf("%w: asking the API server for the controller's own rights: %v", identity.ErrUnavailable, err)
		}
		if !ask.Status.Allowed {
			lacking = append(lacking, r.String())
		}
	}
	if len(lacking) > 0 {
		return fmt.Errorf("%w: at the API server the controller's account may not: %s. docs/KUBERNETES.md lists what it needs; the chart gives that", identity.ErrDenied, strings.Join(lacking, "; "))
	}
	return nil
}
