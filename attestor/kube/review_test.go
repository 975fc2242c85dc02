package kube

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	authv1 "k8s.io/api/authentication/v1"

	"countersign.io/countersign/identity"
)

func (f *fakeAPI) cluster(t *testing.T, jwks []byte) identity.KubeCluster {
	return identity.KubeCluster{Name: "east", Issuer: testIssuer, Audience: testAudience, JWKS: jwks, TokenReview: true, Kubeconfig: f.kubeconfig(t)}
}

func TestTokenReview(t *testing.T) {
	c := newClock()
	i := newIssuer(t, "key-1", c.now)
	edit := func(e func(*authv1.TokenReview)) func(*authv1.TokenReview) {
		return func(tr *authv1.TokenReview) { agree(tr); e(tr) }
	}
	extra := func(key string, v ...string) func(*authv1.TokenReview) {
		return edit(func(tr *authv1.TokenReview) { tr.Status.User.Extra[key] = v })
	}
	for name, row := range map[string]struct {
		answer func(*authv1.TokenReview)
		says   string // empty: accepted
	}{
		"agrees": {agree, ""},
		"pod deleted": {func(tr *authv1.TokenReview) {
			tr.Status.Error = "[invalid bearer token, service account token has been invalidated]"
		}, "invalidated"},
		"says nothing":            {func(tr *authv1.TokenReview) {}, "does not accept"},
		"authenticated and error": {edit(func(tr *authv1.TokenReview) { tr.Status.Error = "odd" }), "does not accept"},
		"not authenticated":       {edit(func(tr *authv1.TokenReview) { tr.Status.Authenticated = false }), "does not accept"},
		"ignores audiences":       {edit(func(tr *authv1.TokenReview) { tr.Status.Audiences = nil }), "confirm audience"},
		"another audience":        {edit(func(tr *authv1.TokenReview) { tr.Status.Audiences = []string{"api"} }), "confirm audience"},
		"another user":            {edit(func(tr *authv1.TokenReview) { tr.Status.User.Username = "system:serviceaccount:prod:admin" }), "user name"},
		"another account's UID":   {edit(func(tr *authv1.TokenReview) { tr.Status.User.UID = "sa-uid-2" }), "service account UID"},
		"another pod":             {extra(extraPodName, "web-1"), "pod name"},
		"another pod of the name": {extra(extraPodUID, "2"), "pod UID"},
		"no pod":                  {extra(extraPodUID), "pod UID"},
		"two pods":                {extra(extraPodUID, testUID, "2"), "pod UID"},
		"another node":            {extra(extraNodeName, "node-2"), "node name"},
		"no node":                 {extra(extraNodeName), "node name"},
		"another node's UID":      {extra(extraNodeUID, "node-uid-2"), "node UID"},
		"no extras":               {edit(func(tr *authv1.TokenReview) { tr.Status.User.Extra = nil }), "pod name"},
		"repeats the token":       {func(tr *authv1.TokenReview) { tr.Status.Error = "bad token " + tr.Spec.Token }, "withheld"},
		"repeats a part":          {func(tr *authv1.TokenReview) { tr.Status.Error = "bad token " + tr.Spec.Token[100:140] }, "withheld"},
		"long error":              {func(tr *authv1.TokenReview) { tr.Status.Error = strings.Repeat("no ", 100000) }, "does not accept"},
	} {
		for _, source := range []string{"alone", "with JWKS"} {
			t.Run(name+" "+source, func(t *testing.T) {
				api := newFakeAPI(t)
				api.setReview(row.answer)
				var jwks []byte
				if source == "with JWKS" {
					jwks = jwksOf(t, i)
				}
				r := newRig(t, c.now)
				r.set(t, api.cluster(t, jwks))
				tok := i.token(t)
				claims, err := r.Verify(t.Context(), tok)
				if api.reviews.Load() != 1 {
					t.Errorf("%d reviews", api.reviews.Load())
				}
				if row.says == "" {
					if err != nil || claims.PodUID != testUID || claims.Cluster != "east" {
						t.Fatalf("%+v, %v", claims, err)
					}
					return
				}
				if !errors.Is(err, identity.ErrUnauthenticated) || !strings.Contains(err.Error(), row.says) {
					t.Fatalf("%v does not say %q", err, row.says)
				}
				if len(err.Error()) > 700 {
					t.Errorf("an error of %d bytes", len(err.Error()))
				}
				noLeak(t, err.Error()+r.log.String(), tok)
			})
		}
	}
}

// What the keys or the form rule out is not shown to the API server.
func TestTokenReviewNotAskedForForgeries(t *testing.T) {
	c := newClock()
	i, other := newIssuer(t, "key-1", c.now), newIssuer(t, "key-1", c.now)
	api := newFakeAPI(t)
	api.setReview(agree)
	r := newRig(t, c.now)
	r.set(t, api.cluster(t, jwksOf(t, i)))
	for _, tok := range [][]byte{other.token(t), i.token(t, func(c map[string]any) { c["aud"] = "api" }), i.token(t, func(c map[string]any) { c["iss"] = "https://else.example" })} {
		if _, err := r.Verify(t.Context(), tok); !errors.Is(err, identity.ErrUnauthenticated) {
			t.Errorf("%v", err)
		}
	}
	if n := api.reviews.Load(); n != 0 {
		t.Errorf("%d reviews", n)
	}
}

func TestTokenReviewFails(t *testing.T) {
	c := newClock()
	i := newIssuer(t, "key-1", c.now)
	for name, row := range map[string]struct {
		prepare func(*fakeAPI)
		says    string
	}{
		"forbidden":    {func(f *fakeAPI) { f.setRefuse("review", 403) }, "system:auth-delegator"},
		"unauthorized": {func(f *fakeAPI) { f.setRefuse("review", 401) }, "were refused: renew them"},
		"not found":    {func(f *fakeAPI) { f.setRefuse("review", 404) }, "asking for a TokenReview"},
		"down":         {func(f *fakeAPI) { f.Close() }, "is the API server up"},
	} {
		t.Run(name, func(t *testing.T) {
			api := newFakeAPI(t)
			api.setReview(agree)
			r := newRig(t, c.now)
			r.set(t, api.cluster(t, jwksOf(t, i)))
			row.prepare(api)
			tok := i.token(t)
			_, err := r.Verify(t.Context(), tok)
			if !errors.Is(err, identity.ErrUnavailable) || errors.Is(err, identity.ErrUnauthenticated) || !strings.Contains(err.Error(), row.says) || !strings.Contains(err.Error(), `"east"`) {
				t.Fatalf("%v does not say %q", err, row.says)
			}
			noLeak(t, err.Error()+r.log.String(), tok)
			if strings.Contains(err.Error()+r.log.String(), api.token) {
				t.Error("the member's own credentials were told")
			}
		})
	}
}

func TestTokenReviewHangs(t *testing.T) {
	c := newClock()
	i := newIssuer(t, "key-1", c.now)
	api := newFakeAPI(t)
	release := make(chan struct{})
	entered := make(chan struct{}, 1)
	api.setReview(func(tr *authv1.TokenReview) { entered <- struct{}{}; <-release })
	t.Cleanup(func() { close(release) })
	r := newRig(t, c.now, func(cfg *Config) { cfg.RequestTimeout = 100 * time.Millisecond })
	r.set(t, api.cluster(t, jwksOf(t, i)))
	_, err := r.Verify(t.Context(), i.token(t))
	if !errors.Is(err, identity.ErrUnavailable) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
}

// Credentials that come late, or change, are found without a restart.
func TestKubeconfigHeals(t *testing.T) {
	c := newClock()
	i := newIssuer(t, "key-1", c.now)
	api := newFakeAPI(t)
	api.setReview(agree)
	good, err := os.ReadFile(api.kubeconfig(t))
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "late")
	cl := api.cluster(t, nil)
	cl.Kubeconfig = path
	r := newRig(t, c.now)
	if err := r.SetClusters([]identity.KubeCluster{cl}); err == nil || !strings.Contains(err.Error(), path) {
		t.Fatalf("missing kubeconfig: %v", err)
	}
	write := func(b []byte) {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		c.add(time.Second)
	}
	verify := func(want error) {
		t.Helper()
		if _, err := r.Verify(t.Context(), i.token(t)); !errors.Is(err, want) {
			t.Fatalf("%v, want %v", err, want)
		}
	}
	verify(identity.ErrUnavailable)
	write([]byte(strings.Replace(string(good), api.token, "an-old-and-longer-credential", 1)))
	verify(identity.ErrUnavailable)
	if s := r.Status(); s[0].APIFault == nil || !strings.Contains(s[0].APIFault.Error(), "refused") {
		t.Errorf("status %+v", s)
	}
	write(good)
	verify(nil)
	if s := r.Status(); s[0].APIFault != nil {
		t.Errorf("status %+v", s)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	verify(nil) // what was read of it is not undone
}
