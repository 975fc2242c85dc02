package controller

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"google.golang.org/protobuf/proto"

	"countersign.io/countersign/api"
	adminv1 "countersign.io/countersign/api/admin/v1"
	"countersign.io/countersign/controller/v1alpha1"
	"countersign.io/countersign/identity"
)

// clusters registers a kube cluster for each KubeCluster, under its name.
type clusters struct{ cfg *Config }

func (r *clusters) owner(name string) string { return "kubecluster/" + r.cfg.Cluster + "/" + name }

// all returns the registered cluster of that name, nil if there is none, and the others.
func (r *clusters) all(ctx context.Context, name string) (found *adminv1.KubeCluster, others []*adminv1.KubeCluster, err error) {
	for page := (&adminv1.ListRequest{PageSize: 1000}); ; {
		res, err := r.cfg.Admin.ListKubeClusters(ctx, page)
		if err != nil {
			return nil, nil, asked(fmt.Errorf("listing the kube clusters: %w", api.FromStatus(err)))
		}
		for _, k := range res.KubeClusters {
			if k.Name == name {
				found = k
			} else {
				others = append(others, k)
			}
		}
		if page.PageToken = res.NextPageToken; page.PageToken == "" {
			return found, others, nil
		}
	}
}

func (r *clusters) end(ctx context.Context, name string) error {
	found, _, err := r.all(ctx, name)
	if err != nil || found == nil || found.ManagedBy != r.owner(name) {
		return err
	}
	_, err = r.cfg.Admin.DeleteKubeCluster(ctx, &adminv1.NameRequest{Name: name})
	if err = api.FromStatus(err); err != nil && !errors.Is(err, identity.ErrNotFound) {
		return fmt.Errorf("deleting kube cluster %s: %w", name, err)
	}
	return nil
}

func (r *clusters) put(ctx context.Context, k *v1alpha1.KubeCluster) (string, error) {
	return "its pods' tokens are verified", r.register(ctx, k)
}

func (r *clusters) register(ctx context.Context, k *v1alpha1.KubeCluster) error {
	s := &k.Spec
	want := &adminv1.KubeCluster{
		Name: k.Name, Issuer: s.Issuer, Audience: s.Audience, Jwks: []byte(s.JWKS), JwksUrl: s.JWKSURL, CaPem: []byte(s.CAPEM), Kubeconfig: s.Kubeconfig,
		TokenReview: s.TokenReview, AgentAccounts: s.AgentAccounts, DefaultId: s.DefaultID, NoDefaultId: s.NoDefaultID, ManagedBy: r.owner(k.Name),
	}
	found, others, err := r.all(ctx, k.Name)
	if err != nil {
		return err
	}
	if found != nil && found.ManagedBy != want.ManagedBy {
		who := "an operator registered it"
		if found.ManagedBy != "" {
			who = "it is of " + found.ManagedBy
		}
		return fmt.Errorf("%w: there is a kube cluster %s already, and %s: choose another name, or delete that one first", errConflict, k.Name, who)
	}
	// That two clusters are to have the same identities is an operator's decision (countersign kube add --default-id), not this resource's.
	if shape := pathOf("spiffe://x" + s.DefaultID); s.DefaultID != "" {
		i := slices.IndexFunc(others, func(o *adminv1.KubeCluster) bool {
			other := pathOf("spiffe://x" + o.DefaultId)
			return o.DefaultId != "" && (below(shape, other) || below(other, shape))
		})
		if i >= 0 {
			return fmt.Errorf("%w: defaultID %s could give the IDs of pods of kube cluster %s, which have %s: begin it with something else", errConflict, s.DefaultID, others[i].Name, others[i].DefaultId)
		}
	}
	if found != nil {
		have := proto.Clone(found).(*adminv1.KubeCluster)
		have.Revision, have.Replace = 0, false
		if want.DefaultId == "" && !want.NoDefaultId {
			want.DefaultId = identity.DefaultKubeID
		}
		if proto.Equal(have, want) {
			return nil
		}
		if s.DefaultID == "" {
			want.DefaultId = ""
		}
	}
	want.Replace = found != nil
	if _, err := r.cfg.Admin.AddKubeCluster(ctx, want); err != nil {
		return fmt.Errorf("registering it: %w", api.FromStatus(err))
	}
	return nil
}
