package kube

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"countersign.io/countersign/identity"
)

// changePod replaces what the API server says of a pod.
func (f *fakeAPI) changePod(uid string, edit func(*metav1.PartialObjectMetadata)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.revision++
	p := f.pods[uid]
	edit(&p)
	p.ResourceVersion = strconv.Itoa(f.revision)
	f.pods[uid] = p
	f.send(podEvent{"MODIFIED", p})
}

func labelled(l map[string]string) func(*metav1.PartialObjectMetadata) {
	return func(m *metav1.PartialObjectMetadata) { m.Labels = l }
}

func controlledBy(apiVersion, kind, name, uid string) func(*metav1.PartialObjectMetadata) {
	yes := true
	return func(m *metav1.PartialObjectMetadata) {
		m.OwnerReferences = []metav1.OwnerReference{{APIVersion: apiVersion, Kind: kind, Name: name, UID: types.UID(uid), Controller: &yes}}
	}
}

func interestIn(i identity.Interest) map[string]identity.Interest {
	return map[string]identity.Interest{"east": i}
}

func claimsOf(n int) *Claims {
	return &Claims{Cluster: "east", Namespace: "prod", PodName: fmt.Sprint("web-", n), PodUID: podUID(n)}
}

// awaitKnown waits until the verifier knows the facts by itself.
func (r *rig) awaitKnown(t *testing.T, changed <-chan string, n int, want ...identity.Selector) {
	t.Helper()
	identity.SortSelectors(want)
	limit := time.After(deadline)
	for {
		got, ok := r.KnownFacts("east", "prod", podUID(n))
		if ok && slices.Equal(got, want) {
			return
		}
		select {
		case <-changed:
		case <-limit:
			t.Fatalf("knows %v (%t), want %v; log: %s", got, ok, want, r.log)
		}
	}
}

func TestFactsFromTheWatch(t *testing.T) {
	i := newIssuer(t, "key-1", time.Now)
	api := newFakeAPI(t)
	for n := range 3 {
		api.addPod(fmt.Sprint("web-", n), podUID(n))
	}
	api.changePod(podUID(0), labelled(map[string]string{"app": "web", "secret": "not-named", "empty": ""}))
	r := newRig(t, time.Now)
	r.set(t, api.watched(t, jwksOf(t, i)))
	_, changed := r.runTelling(t)
	await(t, api.watching, "the watch")
	if _, ok := r.KnownFacts("east", "prod", podUID(0)); ok {
		t.Error("facts are known that nothing names")
	}
	if a := r.clusters.Load().all[0].api; a.pods.size != 0 || a.pods.live[podUID(0)] != nil {
		t.Error("labels are kept that nothing names")
	}

	r.SetInterest(interestIn(identity.Interest{PodLabels: []string{"app", "empty"}}))
	app := []identity.Selector{"k8s:pod-label:app:web", "k8s:pod-label-key:app", "k8s:pod-label:empty:", "k8s:pod-label-key:empty"}
	r.awaitKnown(t, changed, 0, app...)
	r.awaitKnown(t, changed, 1)
	await(t, api.watching, "the watch of the labels")
	if got, err := r.Facts(t.Context(), claimsOf(0)); err != nil || len(got) != 4 {
		t.Errorf("facts %v, %v", got, err)
	}
	// A label comes, changes and goes; another one, that nothing names, is no news.
	api.changePod(podUID(1), labelled(map[string]string{"app": "web"}))
	r.awaitKnown(t, changed, 1, "k8s:pod-label:app:web", "k8s:pod-label-key:app")
	api.changePod(podUID(1), labelled(map[string]string{"app": "db"}))
	r.awaitKnown(t, changed, 1, "k8s:pod-label:app:db", "k8s:pod-label-key:app")
	for len(changed) > 0 {
		<-changed
	}
	api.changePod(podUID(1), labelled(map[string]string{"app": "db", "other": "x"}))
	api.changePod(podUID(1), labelled(nil))
	if got := await(t, changed, "the change"); got != podUID(1) {
		t.Errorf("changed: %s", got)
	}
	r.awaitKnown(t, changed, 1)
	if len(changed) > 0 {
		t.Error("told of a label that nothing names")
	}
	// Another label is named: what is known says nothing of it until the list was read again.
	r.SetInterest(interestIn(identity.Interest{PodLabels: []string{"other"}}))
	await(t, api.watching, "the watch of the other label")
	api.changePod(podUID(2), labelled(map[string]string{"other": "y"}))
	r.awaitKnown(t, changed, 2, "k8s:pod-label:other:y", "k8s:pod-label-key:other")
	// Nothing is named any longer, and nothing kept.
	r.SetInterest(nil)
	await(t, api.watching, "the watch without labels")
	a := r.clusters.Load().all[0].api
	a.pods.mu.RLock()
	defer a.pods.mu.RUnlock()
	if a.pods.size != 0 || a.pods.live[podUID(2)] != nil {
		t.Errorf("%d bytes are kept that nothing names", a.pods.size)
	}
}

func TestFactsOfNamespacesAndOwners(t *testing.T) {
	i := newIssuer(t, "key-1", time.Now)
	api := newFakeAPI(t)
	api.namespaces.set("prod", podUID(100), labelled(map[string]string{"env": "prod"}))
	api.replicaSets.set("web-abc", podUID(200), controlledBy("apps/v1", "Deployment", "web", podUID(300)))
	for n, o := range []func(*metav1.PartialObjectMetadata){
		controlledBy("apps/v1", "ReplicaSet", "web-abc", podUID(200)),
		controlledBy("apps/v1", "StatefulSet", "db", podUID(301)),
		controlledBy("evil.io/v1", "Deployment", "web", podUID(302)), // not Kubernetes' Deployment
		controlledBy("apps/v1", "ReplicaSet", "web-abc", podUID(201)),
		func(m *metav1.PartialObjectMetadata) { // an owner that does not control
			m.OwnerReferences = []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "StatefulSet", Name: "db", UID: types.UID(podUID(301))}}
		},
		controlledBy("argoproj.io/v1alpha1", "Rollout", "canary", podUID(303)),
	} {
		api.addPod(fmt.Sprint("web-", n), podUID(n))
		api.changePod(podUID(n), o)
	}
	r := newRig(t, time.Now)
	r.set(t, api.watched(t, jwksOf(t, i)))
	r.SetInterest(interestIn(identity.Interest{NamespaceLabels: []string{"env"}, Owners: true}))
	_, changed := r.runTelling(t)
	env := []identity.Selector{"k8s:ns-label:env:prod", "k8s:ns-label-key:env"}
	r.awaitKnown(t, changed, 0, append(env, "k8s:pod-owner:ReplicaSet:web-abc", "k8s:pod-owner:Deployment:web")...)
	r.awaitKnown(t, changed, 1, append(env, "k8s:pod-owner:StatefulSet:db")...)
	r.awaitKnown(t, changed, 2, env...)
	r.awaitKnown(t, changed, 4, env...)
	r.awaitKnown(t, changed, 5, append(env, "k8s:pod-owner:Rollout:canary")...)
	// A pod that names a ReplicaSet of another UID is not that one's, whatever its name.
	if _, ok := r.KnownFacts("east", "prod", podUID(3)); ok {
		t.Error("a ReplicaSet that nobody has seen is known")
	}
	if got, err := r.Facts(t.Context(), claimsOf(3)); err != nil || !slices.Equal(got, env) {
		t.Errorf("facts %v, %v: want those of the namespace", got, err)
	}
	// The namespace's labels change: all of its pods are told of.
	for len(changed) > 0 {
		<-changed
	}
	api.namespaces.set("prod", podUID(100), labelled(map[string]string{"env": "test"}))
	if got := await(t, changed, "the change"); got != "prod" {
		t.Errorf("changed: %s", got)
	}
	r.awaitKnown(t, changed, 1, "k8s:ns-label:env:test", "k8s:ns-label-key:env", "k8s:pod-owner:StatefulSet:db")
	// The ReplicaSet is orphaned: it is nobody's.
	api.replicaSets.set("web-abc", podUID(200), func(*metav1.PartialObjectMetadata) {})
	if got := await(t, changed, "the change"); got != podUID(0) {
		t.Errorf("changed: %s", got)
	}
	r.awaitKnown(t, changed, 0, "k8s:ns-label:env:test", "k8s:ns-label-key:env", "k8s:pod-owner:ReplicaSet:web-abc")
	// One that is seen only after a pod of its was asked about.
	api.replicaSets.set("web-abd", podUID(201), controlledBy("apps/v1", "Deployment", "web", podUID(300)))
	r.awaitKnown(t, changed, 3, "k8s:ns-label:env:test", "k8s:ns-label-key:env", "k8s:pod-owner:ReplicaSet:web-abc", "k8s:pod-owner:Deployment:web")
}

// TestFactsAreAskedFor: a new pod must not miss its entry because the watch is late, and what cannot be told is not guessed.
func TestFactsAreAskedFor(t *testing.T) {
	c := newClock()
	i := newIssuer(t, "key-1", c.now)
	api := newFakeAPI(t)
	api.addPod("web-0", podUID(0))
	api.changePod(podUID(0), labelled(map[string]string{"app": "web"}))
	api.namespaces.set("prod", podUID(100), labelled(map[string]string{"env": "prod"}))
	r := newRig(t, c.now)
	want := identity.Interest{PodLabels: []string{"app"}, NamespaceLabels: []string{"env"}}
	r.set(t, api.watched(t, jwksOf(t, i)))
	if _, err := r.Facts(t.Context(), claimsOf(0)); !errors.Is(err, identity.ErrUnavailable) {
		t.Errorf("before the verifier was told what is named: %v", err)
	}
	r.SetInterest(interestIn(want))
	all := []identity.Selector{"k8s:ns-label-key:env", "k8s:ns-label:env:prod", "k8s:pod-label-key:app", "k8s:pod-label:app:web"}
	if got, err := r.Facts(t.Context(), claimsOf(0)); err != nil || !slices.Equal(got, all) {
		t.Errorf("without a watch: %v, %v", got, err)
	}
	if _, ok := r.KnownFacts("east", "prod", podUID(0)); ok {
		t.Error("known without a watch")
	}
	for _, tc := range []struct{ what, refuse string }{{"the pod", "get pods"}, {"the namespace", "get namespaces"}} {
		api.setRefuse(tc.refuse, 403)
		if _, err := r.Facts(t.Context(), claimsOf(0)); !errors.Is(err, identity.ErrUnavailable) || !strings.Contains(err.Error(), "allow the user") {
			t.Errorf("%s cannot be asked for: %v", tc.what, err)
		}
		api.setRefuse(tc.refuse, 0)
	}
	// Another pod of that name, or none.
	other := claimsOf(0)
	other.PodUID = podUID(7)
	for _, c := range []*Claims{other, claimsOf(5)} {
		if _, err := r.Facts(t.Context(), c); !errors.Is(err, identity.ErrUnauthenticated) {
			t.Errorf("pod %s with UID %s: %v", c.PodName, c.PodUID, err)
		}
	}
	// The watch is lost: what it told counts for as long as tokens last, and no longer.
	_, changed := r.runTelling(t)
	r.awaitKnown(t, changed, 0, all...)
	for _, what := range []string{"list pods", "watch pods", "get pods", "list namespaces", "watch namespaces", "get namespaces"} {
		api.setRefuse(what, 500)
	}
	api.dropWatches()
	for s := r.Status()[0]; s.Watching; s = r.Status()[0] {
		await(t, time.After(time.Millisecond), "")
	}
	if got, err := r.Facts(t.Context(), claimsOf(0)); err != nil || !slices.Equal(got, all) {
		t.Errorf("just after the watch was lost: %v, %v", got, err)
	}
	c.add(factsLast + time.Second)
	if _, err := r.Facts(t.Context(), claimsOf(0)); !errors.Is(err, identity.ErrUnavailable) {
		t.Errorf("long after the watch was lost: %v", err)
	}
	if _, ok := r.KnownFacts("east", "prod", podUID(0)); ok {
		t.Error("known long after the watch was lost")
	}
}

func TestFactsWithoutKubeconfig(t *testing.T) {
	i := newIssuer(t, "key-1", time.Now)
	r := newRig(t, time.Now)
	r.set(t, offline("east", jwksOf(t, i)))
	r.SetInterest(interestIn(identity.Interest{PodLabels: []string{"app"}}))
	if _, err := r.Facts(t.Context(), claimsOf(0)); !errors.Is(err, identity.ErrUnavailable) || !strings.Contains(err.Error(), "kubeconfig") {
		t.Errorf("a cluster without a kubeconfig: %v", err)
	}
	if _, ok := r.KnownFacts("east", "prod", podUID(0)); ok {
		t.Error("known of a cluster without a kubeconfig")
	}
}

func TestTooManyLabels(t *testing.T) {
	i := newIssuer(t, "key-1", time.Now)
	api := newFakeAPI(t)
	var keys []string
	many := map[string]string{}
	for n := range maxLabels + 1 {
		keys = append(keys, fmt.Sprint("k", n))
		many[keys[n]] = "v"
	}
	api.addPod("web-0", podUID(0))
	api.changePod(podUID(0), labelled(many))
	r := newRig(t, time.Now)
	r.set(t, api.watched(t, jwksOf(t, i)))
	r.SetInterest(interestIn(identity.Interest{PodLabels: keys}))
	if _, err := r.Facts(t.Context(), claimsOf(0)); !errors.Is(err, identity.ErrPrecondition) {
		t.Errorf("a pod with %d labels that are named: %v", len(many), err)
	}
	delete(many, "k0")
	api.changePod(podUID(0), labelled(many))
	if got, err := r.Facts(t.Context(), claimsOf(0)); err != nil || len(got) != 2*maxLabels {
		t.Errorf("%d facts, %v", len(got), err)
	}
}
