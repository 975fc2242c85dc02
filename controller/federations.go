package controller

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"countersign.io/countersign/api"
	adminv1 "countersign.io/countersign/api/admin/v1"
	"countersign.io/countersign/controller/v1alpha1"
	"countersign.io/countersign/identity"
)

// statusEvery is how often the refreshing of bundles is looked at, of which no change tells.
const statusEvery = 15 * time.Second

// federations makes a federation of each FederatedTrustDomain.
type federations struct{ cfg *Config }

func (r *federations) owner(name string) string {
	return "federatedtrustdomain/" + r.cfg.Cluster + "/" + name
}

// find returns nil where there is none.
func (r *federations) find(ctx context.Context, td string) (*adminv1.FederationRelationship, error) {
	got, err := r.cfg.Federation.GetFederation(ctx, &adminv1.NameRequest{Name: td})
	switch err = api.FromStatus(err); {
	case errors.Is(err, identity.ErrNotFound):
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("reading the federation with %s: %w", td, err)
	}
	return got, nil
}

// end deletes what the resource made, whatever trust domain that was with.
func (r *federations) end(ctx context.Context, name string) error {
	res, err := r.cfg.Federation.ListFederations(ctx, &adminv1.Empty{})
	if err != nil {
		return fmt.Errorf("listing the federations: %w", api.FromStatus(err))
	}
	for _, f := range res.Federations {
		if f.ManagedBy != r.owner(name) {
			continue
		}
		_, err := r.cfg.Federation.DeleteFederation(ctx, &adminv1.DeleteFederationRequest{TrustDomain: f.TrustDomain})
		if err = api.FromStatus(err); err != nil && !errors.Is(err, identity.ErrNotFound) {
			return fmt.Errorf("deleting the federation with %s: %w", f.TrustDomain, err)
		}
	}
	return nil
}

func (r *federations) put(ctx context.Context, f *v1alpha1.FederatedTrustDomain) (string, error) {
	got, err := r.federate(ctx, f)
	if err != nil {
		return "", err
	}
	return "identities of " + f.Spec.TrustDomain + " are verified", r.tell(f, got)
}

// federate makes the federation, or brings it to what is asked for. The bundle is pinned once for each initialBundle: what was fetched
// since is newer.
func (r *federations) federate(ctx context.Context, f *v1alpha1.FederatedTrustDomain) (*adminv1.FederationRelationship, error) {
	s := &f.Spec
	req := &adminv1.PutFederationRequest{
		TrustDomain: s.TrustDomain, Url: s.BundleEndpointURL, Profile: s.Profile, EndpointId: s.EndpointSPIFFEID, ManagedBy: r.owner(f.Name),
	}
	got, err := r.find(ctx, s.TrustDomain)
	if err != nil {
		return nil, err
	}
	if got != nil && got.ManagedBy != r.owner(f.Name) {
		who := "an operator made it"
		if got.ManagedBy != "" {
			who = "it is of " + got.ManagedBy
		}
		return nil, fmt.Errorf("%w: there is a federation with %s already, and %s: delete that one first", errConflict, s.TrustDomain, who)
	}
	pin := ""
	if s.InitialBundle != "" {
		sum := sha256.Sum256([]byte(s.InitialBundle))
		pin = hex.EncodeToString(sum[:])
	}
	if pin != "" && (got == nil || pin != f.Status.PinnedBundle) {
		td, err := spiffeid.TrustDomainFromString(s.TrustDomain)
		if err != nil {
			return nil, fmt.Errorf("%w: trustDomain: %v", identity.ErrInvalid, err)
		}
		b, err := r.cfg.ParseBundle(td, []byte(s.InitialBundle))
		if err != nil {
			return nil, fmt.Errorf("initialBundle: %w", err)
		}
		req.Bundle = api.BundleToWire(b)
	}
	switch {
	case got == nil:
		got, err = r.cfg.Federation.CreateFederation(ctx, req)
	case req.Bundle != nil || got.Url != req.Url || got.Profile != req.Profile || got.EndpointId != req.EndpointId:
		req.Revision = got.Revision
		got, err = r.cfg.Federation.UpdateFederation(ctx, req)
	}
	if err != nil {
		return nil, fmt.Errorf("federating with %s: %w", s.TrustDomain, api.FromStatus(err))
	}
	f.Status.PinnedBundle = pin
	return got, nil
}

// tell takes over how the refreshing stands; an endpoint that cannot be read is the resource's last error.
func (r *federations) tell(f *v1alpha1.FederatedTrustDomain, got *adminv1.FederationRelationship) error {
	f.Status.Sequence = int64(got.Sequence)
	st := got.Status
	if st == nil {
		return nil
	}
	last := api.TimeFromWire(st.LastSuccess)
	// To the minute, so that a resource is not written each time that its partner is asked.
	if have := f.Status.LastRefresh; !last.IsZero() && (have == nil || last.Sub(have.Time) >= time.Minute || last.Before(have.Time)) {
		at := metav1.NewTime(last.Truncate(time.Second))
		f.Status.LastRefresh = &at
	}
	if st.LastError != "" && st.Failures > 0 {
		since := ""
		if !last.IsZero() {
			since = " since " + last.UTC().Format(time.RFC3339)
		}
		return fmt.Errorf("%w: its bundle could not be refreshed%s: %s", errStale, since, st.LastError)
	}
	return nil
}

// errStale is a failure that the member tries to mend by itself.
var errStale = errors.New("stale")
