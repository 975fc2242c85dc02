package kube

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"strings"
	"testing"
	"time"

	authv1 "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"countersign.io/countersign/identity"
)

func (f *fakeAPI) serveGetConfigMap(w http.ResponseWriter, r *http.Request) {
	if !f.allowed(w, r, "get configmaps") {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	c := f.configMaps[r.PathValue("ns")+"/"+r.PathValue("name")]
	if c == nil {
		f.status(w, http.StatusNotFound, metav1.StatusReasonNotFound, "no such ConfigMap")
		return
	}
	json.NewEncoder(w).Encode(c)
}

func (f *fakeAPI) serveCreateConfigMap(w http.ResponseWriter, r *http.Request) {
	if !f.allowed(w, r, "create configmaps") {
		return
	}
	var c configMap
	if err := json.NewDecoder(r.Body).Decode(&c); err != nil {
		f.status(w, http.StatusBadRequest, metav1.StatusReasonBadRequest, err.Error())
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	key := r.PathValue("ns") + "/" + c.Name
	if f.configMaps[key] != nil {
		f.status(w, http.StatusConflict, metav1.StatusReasonAlreadyExists, "there is one")
		return
	}
	f.configMaps[key] = &c
	w.WriteHeader(http.StatusCreated)
	json.NewEncoder(w).Encode(c)
}

// home is that of the StatefulSet web in namespace prod, whose pods run as account web.
func (f *fakeAPI) home(t *testing.T, i *issuer, edits ...func(*HomeConfig)) *Home {
	t.Helper()
	cfg := HomeConfig{
		Cluster: "east", Kubeconfig: f.kubeconfig(t), Namespace: "prod", StatefulSet: "web", Now: i.now,
		OwnToken: func() ([]byte, error) { return i.token(t, forMembers, forPod("web-1", "uid-of-web-1")), nil },
	}
	for _, e := range edits {
		e(&cfg)
	}
	h, err := NewHome(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func forMembers(c map[string]any) { c["aud"] = []string{MemberAudience} }

// believe is a TokenReview that stands behind whatever the token says, as an API server does behind what it signed.
func believe(tr *authv1.TokenReview) {
	t, err := parseToken([]byte(tr.Spec.Token))
	if err != nil {
		return
	}
	k := &t.claims.Kubernetes
	tr.Status = authv1.TokenReviewStatus{
		Authenticated: true, Audiences: tr.Spec.Audiences,
		User: authv1.UserInfo{Username: t.claims.username(), UID: k.ServiceAccount.UID, Extra: map[string]authv1.ExtraValue{
			extraPodName: {k.Pod.Name}, extraPodUID: {k.Pod.UID}, extraNodeName: {k.Node.Name}, extraNodeUID: {k.Node.UID},
		}},
	}
}

func TestVerifyMember(t *testing.T) {
	c := newClock()
	i := newIssuer(t, "key-1", c.now)
	other := func(ns, account string) func(map[string]any) {
		return func(m map[string]any) {
			kubeClaim(m)["namespace"] = ns
			kubeClaim(m)["serviceaccount"] = map[string]any{"name": account, "uid": "sa-uid-1"}
			m["sub"] = "system:serviceaccount:" + ns + ":" + account
		}
	}
	for name, row := range map[string]struct {
		edits []func(map[string]any)
		asks  string // the member's name; empty: web-0
		api   func(*fakeAPI)
		is    error // nil: admitted
		says  string
	}{
		"the pod itself":          {},
		"of another account":      {edits: []func(map[string]any){other("prod", "intruder")}, is: identity.ErrDenied, says: "intruder"},
		"of another namespace":    {edits: []func(map[string]any){other("shop", "web")}, is: identity.ErrDenied, says: "namespace"},
		"for pods' audience":      {edits: []func(map[string]any){func(m map[string]any) { m["aud"] = []string{testAudience} }}, is: identity.ErrUnauthenticated, says: "audience"},
		"for two audiences":       {edits: []func(map[string]any){func(m map[string]any) { m["aud"] = []string{MemberAudience, "vault"} }}, is: identity.ErrUnauthenticated, says: "alone"},
		"of a pod not of the set": {edits: []func(map[string]any){forPod("cron-0", testUID)}, asks: "cron-0", is: identity.ErrDenied, says: "StatefulSet web"},
		"of a pod named alike":    {edits: []func(map[string]any){forPod("web-00", testUID)}, asks: "web-00", is: identity.ErrDenied, says: "StatefulSet web"},
		"of a set named alike":    {edits: []func(map[string]any){forPod("web-x-0", testUID)}, asks: "web-x-0", is: identity.ErrDenied, says: "StatefulSet web"},
		"for another member":      {asks: "web-1", is: identity.ErrDenied, says: "its own name"},
		"of the pod before":       {edits: []func(map[string]any){forPod("web-0", "uid-of-old")}, is: identity.ErrUnauthenticated, says: "is gone"},
		"of a pod that is gone":   {api: func(f *fakeAPI) { f.deletePod(testUID) }, is: identity.ErrUnauthenticated, says: "is gone"},
		"of a pod being deleted":  {api: func(f *fakeAPI) { f.terminate(testUID) }, is: identity.ErrUnauthenticated, says: "being deleted"},
		"expired":                 {edits: []func(map[string]any){func(m map[string]any) { m["exp"] = c.now().Add(-time.Hour).Unix() }}, is: identity.ErrUnauthenticated, says: "expired"},
		"refused by the API server": {api: func(f *fakeAPI) {
			f.setReview(func(tr *authv1.TokenReview) { tr.Status.Error = "invalidated" })
		}, is: identity.ErrUnauthenticated, says: "invalidated"},
		"whose audience the API server ignores": {api: func(f *fakeAPI) {
			f.setReview(func(tr *authv1.TokenReview) { believe(tr); tr.Status.Audiences = nil })
		}, is: identity.ErrUnauthenticated, says: "audience"},
		"while TokenReview is down":      {api: func(f *fakeAPI) { f.setRefuse("review", http.StatusInternalServerError) }, is: identity.ErrUnavailable, says: "TokenReview"},
		"while TokenReview is forbidden": {api: func(f *fakeAPI) { f.setRefuse("review", http.StatusForbidden) }, is: identity.ErrUnavailable, says: "system:auth-delegator"},
		"while the pod cannot be asked":  {api: func(f *fakeAPI) { f.setRefuse("get pods", http.StatusForbidden) }, is: identity.ErrUnavailable, says: "get on pods"},
	} {
		t.Run(name, func(t *testing.T) {
			api := newFakeAPI(t)
			api.setReview(believe)
			api.addPod("web-0", testUID)
			if row.api != nil {
				row.api(api)
			}
			raw := i.token(t, append([]func(map[string]any){forMembers}, row.edits...)...)
			asks := row.asks
			if asks == "" {
				asks = "web-0"
			}
			claims, err := api.home(t, i).VerifyMember(context.Background(), raw, asks)
			if row.is == nil {
				if err != nil || claims.PodName != "web-0" || claims.PodUID != testUID || claims.Cluster != "east" {
					t.Fatalf("%+v, %v", claims, err)
				}
				if api.reviews.Load() != 1 || api.gets.Load() != 1 {
					t.Errorf("%d reviews and %d questions about the pod: it must ask, each time", api.reviews.Load(), api.gets.Load())
				}
				return
			}
			if !errors.Is(err, row.is) || !strings.Contains(err.Error(), row.says) {
				t.Fatalf("error %v: want %v with %q", err, row.is, row.says)
			}
			if strings.Contains(err.Error(), string(raw[len(raw)-20:])) {
				t.Errorf("the error repeats the token")
			}
		})
	}
}

func (f *fakeAPI) terminate(uid string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	p := f.pods[uid]
	now := metav1.Now()
	p.DeletionTimestamp = &now
	f.pods[uid] = p
}

// TestVerifyMemberNeedsItsOwn: a member that cannot tell its own account admits nobody, and one without a StatefulSet neither.
func TestVerifyMemberNeedsItsOwn(t *testing.T) {
	i := newIssuer(t, "key-1", newClock().now)
	api := newFakeAPI(t)
	api.setReview(believe)
	api.addPod("web-0", testUID)
	raw := i.token(t, forMembers)
	for says, edit := range map[string]func(*HomeConfig){
		"no such file":            func(c *HomeConfig) { c.OwnToken = func() ([]byte, error) { return nil, errors.New("no such file") } },
		"join_token_path":         func(c *HomeConfig) { c.OwnToken = func() ([]byte, error) { return []byte("x"), nil } },
		"kubernetes.stateful_set": func(c *HomeConfig) { c.StatefulSet = "" },
	} {
		if _, err := api.home(t, i, edit).VerifyMember(context.Background(), raw, "web-0"); !errors.Is(err, identity.ErrPrecondition) || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v", says, err)
		}
	}
	if n := api.reviews.Load(); n != 0 {
		t.Errorf("the token was shown to the API server %d times for nothing", n)
	}
	h := api.home(t, i)
	if err := h.CheckOwn("web-1"); err != nil {
		t.Error(err)
	}
	if err := h.CheckOwn("web-2"); !errors.Is(err, identity.ErrPrecondition) || !strings.Contains(err.Error(), "web-1") {
		t.Errorf("another name: %v", err)
	}
	if err := api.home(t, i, func(c *HomeConfig) { c.Namespace = "shop" }).CheckOwn("web-1"); !errors.Is(err, identity.ErrPrecondition) {
		t.Errorf("another namespace: %v", err)
	}
}

func TestPublishedBundle(t *testing.T) {
	i := newIssuer(t, "key-1", newClock().now)
	api := newFakeAPI(t)
	h, ctx := api.home(t, i), context.Background()
	if _, err := h.Bundle(ctx); !errors.Is(err, identity.ErrNotFound) {
		t.Fatalf("without one: %v", err)
	}
	if err := h.CreateBundle(ctx, PublishedBundle{TrustDomain: "example.org", Data: map[string]string{BundlePEM: "roots"}}); err != nil {
		t.Fatal(err)
	}
	if b, err := h.Bundle(ctx); err != nil || b.TrustDomain != "example.org" || b.Data[BundlePEM] != "roots" {
		t.Fatalf("%+v, %v", b, err)
	}
	if err := h.CreateBundle(ctx, PublishedBundle{TrustDomain: "other.org"}); !errors.Is(err, identity.ErrExists) {
		t.Errorf("over another: %v", err)
	}
	if b, err := h.Bundle(ctx); err != nil || b.TrustDomain != "example.org" {
		t.Errorf("it was overwritten: %+v, %v", b, err)
	}
	for what, code := range map[string]int{"get configmaps": http.StatusForbidden, "create configmaps": http.StatusForbidden, "discovery": http.StatusInternalServerError} {
		api.setRefuse(what, code)
	}
	if _, err := h.Bundle(ctx); !errors.Is(err, identity.ErrUnavailable) || !strings.Contains(err.Error(), "get on configmaps in namespace prod") {
		t.Errorf("forbidden to read: %v", err)
	}
	if err := h.CreateBundle(ctx, PublishedBundle{}); !errors.Is(err, identity.ErrUnavailable) || !strings.Contains(err.Error(), "create on configmaps") {
		t.Errorf("forbidden to create: %v", err)
	}
	if _, err := h.Issuer(ctx); !errors.Is(err, identity.ErrUnavailable) {
		t.Errorf("no discovery: %v", err)
	}
	api.setRefuse("discovery", 0)
	if iss, err := h.Issuer(ctx); err != nil || iss != testIssuer {
		t.Errorf("issuer %q, %v", iss, err)
	}
}

func TestOrdinal(t *testing.T) {
	for pod, want := range map[string]int{"web-0": 0, "web-12": 12, "web-": -1, "web": -1, "web-01": -1, "web--1": -1, "web-1x": -1, "webb-1": -1, "web-a-1": -1, "web-99999": -1} {
		n, ok := Ordinal("web", pod)
		if ok != (want >= 0) || ok && n != want {
			t.Errorf("%s: %d, %v", pod, n, ok)
		}
	}
	if _, ok := Ordinal("", "-1"); ok {
		t.Error("no StatefulSet has pods")
	}
}
