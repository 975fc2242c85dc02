package controller

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	authzv1 "k8s.io/api/authorization/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	"countersign.io/countersign/controller/v1alpha1"
	"countersign.io/countersign/federation"
	"countersign.io/countersign/identity"
)

// TestCheckKube: what the controller cannot do without is asked for one by one, and all that is lacking is said at once.
func TestCheckKube(t *testing.T) {
	allowed := func(right) bool { return true }
	var fault error
	var asked []string
	kinds := meta.NewDefaultRESTMapper(nil)
	for kind := range plurals() {
		kinds.Add(schema.GroupVersionKind{Group: v1alpha1.Group, Version: v1alpha1.Version, Kind: kind}, meta.RESTScopeRoot)
	}
	api := func() client.Client {
		return fake.NewClientBuilder().WithScheme(Scheme()).WithRESTMapper(kinds).WithInterceptorFuncs(interceptor.Funcs{
			Create: func(_ context.Context, _ client.WithWatch, obj client.Object, _ ...client.CreateOption) error {
				r := obj.(*authzv1.SelfSubjectAccessReview)
				a := r.Spec.ResourceAttributes
				one := right{a.Verb, a.Group, a.Resource, a.Namespace, a.Name}
				if a.Subresource != "" {
					one.resource += "/" + a.Subresource
				}
				asked = append(asked, one.String())
				r.Status.Allowed = allowed(one)
				return fault
			},
		}).Build()
	}
	check := func(what string, cfg *Config, want error, says ...string) {
		t.Helper()
		err := checkKube(t.Context(), api(), cfg)
		if !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", what, err, want)
		}
		for _, s := range says {
			if err != nil && !strings.Contains(err.Error(), s) {
				t.Errorf("%s: it does not say %q: %v", what, s, err)
			}
		}
	}
	alone, several := &Config{}, &Config{LeaderElection: "cs"}
	check("all", several, nil)
	for _, want := range []string{
		"watch workloadidentities.countersign.io", "patch kubeclusters.countersign.io", "patch federatedtrustdomains/status.countersign.io",
		"create leases.coordination.k8s.io in namespace cs", "update leases.coordination.k8s.io countersign-controller in namespace cs",
	} {
		if !slices.Contains(asked, want) {
			t.Errorf("it did not ask for %q: %q", want, asked)
		}
	}
	allowed = func(r right) bool { return r.resource != "leases" }
	check("no leases", several, identity.ErrDenied, "create leases.coordination.k8s.io in namespace cs; get leases", "docs/KUBERNETES.md")
	check("no leases needed", alone, nil)
	allowed = func(r right) bool { return r.verb != "patch" }
	check("may only read", alone, identity.ErrDenied, "patch workloadidentities.", "patch kubeclusters/status")
	fault = errors.New("connection refused")
	check("no API server", alone, identity.ErrUnavailable, "connection refused")
	fault = apierrors.NewForbidden(schema.GroupResource{}, "", errors.New("no"))
	check("nobody may ask", alone, nil)

	// An API server without our kinds.
	none := fake.NewClientBuilder().WithScheme(Scheme()).WithRESTMapper(meta.NewDefaultRESTMapper(nil)).Build()
	if err := checkKube(t.Context(), none, alone); !errors.Is(err, identity.ErrPrecondition) || !strings.Contains(err.Error(), "deploy/chart/crds") {
		t.Errorf("no kinds: %v", err)
	}
}

// TestRunWithoutKube: an API server that cannot be asked at the start is worth waiting for, and the error says so.
func TestRunWithoutKube(t *testing.T) {
	cfg := Config{
		REST: &rest.Config{Host: "http://127.0.0.1:1"}, TrustDomain: spiffeid.RequireTrustDomainFromString("example.org"), Cluster: "main", Resources: true,
		Admin: &fakeMember{}, Federation: &fakeFederation{}, ParseBundle: federation.Parse, Log: slog.New(slog.DiscardHandler),
	}
	if err := Run(t.Context(), cfg); !errors.Is(err, identity.ErrUnavailable) {
		t.Error(err)
	}
}
