package kube

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"countersign.io/countersign/identity"
)

// Verify checks a service account token and returns what it proves. In this order: form and limits, times, issuer and
// audience, signature by the cluster's keys (where it has any), pod not known to be gone or finished, TokenReview (where the
// cluster asks for it), and the API server's word on a pod that the watch does not know. A malformed token wraps identity.ErrInvalid; one that is not accepted
// identity.ErrUnauthenticated; and when nobody can tell, because keys or API server are out of reach,
// identity.ErrUnavailable.
func (v *Verifier) Verify(ctx context.Context, raw []byte) (*Claims, error) {
	t, err := parseToken(raw)
	if err != nil {
		return nil, err
	}
	if err := t.claims.checkTimes(v.cfg.Now()); err != nil {
		return nil, err
	}
	c, err := v.clusterOf(ctx, t)
	if err != nil {
		return nil, err
	}
	claims := t.claims.proven(c.Name)
	if err := c.checkGone(claims); err != nil {
		return nil, err
	}
	if c.TokenReview {
		if err := c.review(ctx, t); err != nil {
			return nil, err
		}
	}
	// After TokenReview too: it accepts the token of a pod that has finished.
	if c.api != nil {
		if err := c.checkPod(ctx, claims); err != nil {
			return nil, err
		}
	}
	// Once more: an API server answers from a cache, and the watch may have told us while we waited for it.
	if err := c.checkGone(claims); err != nil {
		return nil, err
	}
	return claims, nil
}

// clusterOf finds the one cluster whose token it is: by issuer and audience, then by key.
func (v *Verifier) clusterOf(ctx context.Context, t *token) (*cluster, error) {
	set := v.clusters.Load()
	var candidates []*cluster
	var wanted []string
	for _, c := range set.byIssuer[t.claims.Issuer] {
		wanted = append(wanted, fmt.Sprintf("%q", c.Audience))
		if c.Audience != "" && t.claims.Audience.Contains(c.Audience) {
			candidates = append(candidates, c)
		}
	}
	slices.Sort(wanted)
	switch {
	case len(wanted) == 0:
		return nil, refused(badIssuer, "its issuer %s is not that of any of the %d registered kube clusters: compare with countersign kube list", short(t.claims.Issuer), len(set.all))
	case len(candidates) == 0:
		return nil, refused(badAudience, "it is for audience %s, not for %s: set the audience of the pod's serviceAccountToken volume", short(strings.Join(t.claims.Audience, " ")), strings.Join(slices.Compact(wanted), " or "))
	}
	fits := t.fitting(candidates)
	if len(fits) == 0 {
		refreshMissing(ctx, candidates, t.kid)
		fits = t.fitting(candidates)
	}
	switch len(fits) {
	case 0:
		return nil, t.whyNot(ctx, candidates)
	case 1:
		return fits[0], nil
	}
	return nil, fmt.Errorf("verifying service account token: %w: its key belongs to kube clusters %q and %q alike: register a cluster once, or give each its own audience", identity.ErrPrecondition, fits[0].Name, fits[1].Name)
}

// fitting are the candidates whose keys signed the token, or the one that has no keys and will be asked by TokenReview.
func (t *token) fitting(candidates []*cluster) []*cluster {
	var out []*cluster
	for _, c := range candidates {
		if c.fault == nil && (c.keys == nil || c.keys.signed(t)) {
			out = append(out, c)
		}
	}
	return out
}

// refreshMissing asks for the newest keys of each candidate that does not know the kid, side by side: one that hangs must
// not delay another more than it must. How it ended is in each key source.
func refreshMissing(ctx context.Context, candidates []*cluster, kid string) {
	var wg sync.WaitGroup
	for _, c := range candidates {
		if c.fault == nil && c.keys != nil && len(c.keys.find(kid)) == 0 {
			wg.Go(func() { _ = c.keys.refresh(ctx) })
		}
	}
	wg.Wait()
}

// whyNot says why no candidate fits. A candidate that cannot tell outweighs one that says no: the token may be its.
func (t *token) whyNot(ctx context.Context, candidates []*cluster) error {
	var no error
	for _, c := range candidates {
		if c.fault != nil {
			return fmt.Errorf("verifying service account token: %w: kube cluster %q cannot verify any: %v", identity.ErrUnavailable, c.Name, c.fault)
		}
		if len(c.keys.find(t.kid)) > 0 {
			no = refused(badKey, "it is not signed by key %s of kube cluster %q: it was changed on the way, or is of another cluster with the same issuer", short(t.kid), c.Name)
			continue
		}
		if ctx.Err() != nil {
			return fmt.Errorf("verifying service account token: %w: waiting for the JWKS of kube cluster %q: %w", identity.ErrUnavailable, c.Name, ctx.Err())
		}
		n, fault := c.keys.status()
		switch {
		case fault != nil:
			return fmt.Errorf("verifying service account token: key %s is not known yet: %w", short(t.kid), fault)
		case no == nil && c.keys.url == "":
			no = refused(badKey, "its key %s is not among the %d in the offline JWKS of kube cluster %q: if the cluster has new keys, register it again with them", short(t.kid), n, c.Name)
		case no == nil:
			no = refused(badKey, "its key %s is not among the %d that kube cluster %q publishes", short(t.kid), n, c.Name)
		}
	}
	return no
}

// checkGone refuses the token of a pod that the watch saw go or finish.
func (c *cluster) checkGone(claims *Claims) error {
	if c.api == nil || !c.api.pods.isGone(claims.PodUID, c.api.cfg.Now()) {
		return nil
	}
	return errGone(claims)
}

func errGone(claims *Claims) error {
	return refused(podGone, "pod %s/%s (UID %s) of kube cluster %q is gone or has finished", claims.Namespace, claims.PodName, claims.PodUID, claims.Cluster)
}

// checkPod asks the API server about a pod that the watch does not know, for it may have gone before the watch began or
// be too new. When the API server does not answer, what was verified before decides alone: that is what keys are for.
func (c *cluster) checkPod(ctx context.Context, claims *Claims) error {
	if !c.api.pods.suspect(claims.PodUID) {
		return nil
	}
	exists, err := c.api.podExists(ctx, claims.Namespace, claims.PodName, claims.PodUID)
	switch {
	case err != nil && errors.Is(ctx.Err(), context.Canceled):
		return fmt.Errorf("%w: asking kube cluster %q about pod %s/%s: %w", identity.ErrUnavailable, c.Name, claims.Namespace, claims.PodName, ctx.Err())
	case err != nil:
		c.api.cfg.Log.Debug("cannot ask a kube cluster about a pod; its token decides", "cluster", c.Name, "error", err)
		return nil
	case !exists:
		c.api.pods.remove(claims.PodUID) // so that its token costs one question, however often it is shown
		return errGone(claims)
	}
	return nil
}
