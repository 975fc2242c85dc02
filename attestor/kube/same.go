package kube

import (
	"context"
	"crypto"
	"encoding/json"
	"fmt"
	"net/http"
	"time"

	"github.com/go-jose/go-jose/v4"
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"countersign.io/countersign/identity"
)

// sameTimeout is how long an API server may take to say who issues its tokens.
const sameTimeout = 15 * time.Second

// CheckSame says why the API server of a kubeconfig cannot be the one that a kube cluster was registered for; nil: nothing speaks
// against it. It compares the issuer of tokens and, where the registration holds keys, those. Clusters that have the same issuer, and are
// registered without keys, cannot be told apart. Errors: ErrPrecondition where it is another one, ErrUnavailable where nobody can tell.
func CheckSame(ctx context.Context, kubeconfig string, k identity.KubeCluster) error {
	client, err := newAPIClient(kubeconfig)
	if err != nil {
		return fmt.Errorf("%w: %v", identity.ErrInvalid, err)
	}
	ctx, cancel := context.WithTimeout(ctx, sameTimeout)
	defer cancel()
	var doc struct {
		Issuer string `json:"issuer"`
	}
	if err := client.ask(ctx, "/.well-known/openid-configuration", &doc); err != nil {
		return err
	}
	if doc.Issuer != k.Issuer {
		return fmt.Errorf("%w: kube cluster %q is registered with issuer %q, and this API server's is %q: it is another cluster's; name the one that it is registered as", identity.ErrPrecondition, k.Name, k.Issuer, doc.Issuer)
	}
	if len(k.JWKS) == 0 {
		return nil
	}
	held, err := parseJWKS(k.JWKS)
	if err != nil {
		return fmt.Errorf("%w: kube cluster %q: the keys that it is registered with: %v", identity.ErrPrecondition, k.Name, err)
	}
	var raw json.RawMessage
	if err := client.ask(ctx, "/openid/v1/jwks", &raw); err != nil {
		return err
	}
	served, err := parseJWKS(raw)
	if err != nil {
		return fmt.Errorf("%w: the API server's keys: %v", identity.ErrUnavailable, err)
	}
	if !held.shares(served) {
		return fmt.Errorf("%w: kube cluster %q is registered with other keys than this API server has: it is another cluster's, or its keys were replaced: name the one that it is registered as, or register it anew", identity.ErrPrecondition, k.Name)
	}
	return nil
}

// ask reads what every account may read, unless the cluster's administrator took that away.
func (c *apiClient) ask(ctx context.Context, path string, out any) error {
	err := c.call(ctx, http.MethodGet, path, nil, out)
	switch {
	case err == nil:
		return nil
	case apierrors.IsForbidden(err), apierrors.IsUnauthorized(err):
		return fmt.Errorf("%w: reading %s of the API server, to know it by: %v: its account needs get on that path (ClusterRole system:service-account-issuer-discovery)", identity.ErrDenied, path, err)
	}
	return fmt.Errorf("%w: reading %s of the API server, to know it by: %v", identity.ErrUnavailable, path, err)
}

// shares reports whether a key is in both.
func (s keySet) shares(o keySet) bool {
	for kid, keys := range s {
		for _, a := range keys {
			for _, b := range o[kid] {
				if equalKeys(a, b) {
					return true
				}
			}
		}
	}
	return false
}

func equalKeys(a, b jose.JSONWebKey) bool {
	k, ok := a.Key.(interface{ Equal(x crypto.PublicKey) bool })
	return ok && k.Equal(b.Key)
}
