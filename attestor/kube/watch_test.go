package kube

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"countersign.io/countersign/identity"
)

// run starts the verifier and returns what it says is gone; the test's end stops it and waits.
func (r *rig) run(t *testing.T) <-chan string {
	t.Helper()
	gone, _ := r.runTelling(t)
	return gone
}

// runTelling returns as well of which pods, or namespaces, other facts are known.
func (r *rig) runTelling(t *testing.T) (gone, changed chan string) {
	t.Helper()
	gone, changed = make(chan string, 1000), make(chan string, 1000)
	done := make(chan error, 1)
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		done <- r.Run(ctx, Events{
			Gone:    func(cluster, uid string) { gone <- cluster + "/" + uid },
			Changed: func(_, ns, uid string) { changed <- cmp.Or(uid, ns) },
		})
	}()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("Run: %v", err)
			}
		case <-time.After(deadline):
			t.Error("Run did not end")
		}
	})
	return gone, changed
}

func await[T any](t *testing.T, c <-chan T, what string) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(deadline):
		t.Fatalf("waited for %s in vain", what)
		panic("unreachable")
	}
}

func (f *fakeAPI) watched(t *testing.T, jwks []byte) identity.KubeCluster {
	c := f.cluster(t, jwks)
	c.TokenReview = false
	return c
}

func podUID(n int) string { return fmt.Sprintf("6a1f1b6c-0c1e-4b39-9d0a-%012d", n) }

func TestWatchTellsDeletedPod(t *testing.T) {
	i := newIssuer(t, "key-1", time.Now)
	api := newFakeAPI(t)
	for n := range 5 { // more than a page
		api.addPod(fmt.Sprintf("web-%d", n), podUID(n))
	}
	r := newRig(t, time.Now)
	r.set(t, api.watched(t, jwksOf(t, i)))
	gone := r.run(t)
	await(t, api.watching, "the watch")
	toks := make([][]byte, 5)
	for n := range toks {
		toks[n] = i.token(t, forPod(fmt.Sprintf("web-%d", n), podUID(n)))
		if _, err := r.Verify(t.Context(), toks[n]); err != nil {
			t.Fatal(err)
		}
	}
	api.deletePod(podUID(3))
	if got := await(t, gone, "the callback"); got != "east/"+podUID(3) {
		t.Errorf("gone: %s", got)
	}
	if _, err := r.Verify(t.Context(), toks[3]); !errors.Is(err, identity.ErrUnauthenticated) || !strings.Contains(err.Error(), "is gone") {
		t.Errorf("token of the deleted pod: %v", err)
	}
	if _, err := r.Verify(t.Context(), toks[2]); err != nil {
		t.Errorf("token of another pod: %v", err)
	}
	if s := r.Status()[0]; !s.Watching || s.Pods != 4 || s.APIFault != nil {
		t.Errorf("status %+v", s)
	}
	// A pod that comes, and goes.
	api.addPod("late", podUID(9))
	api.deletePod(podUID(9))
	if got := await(t, gone, "the callback"); got != "east/"+podUID(9) {
		t.Errorf("gone: %s", got)
	}
	// Registering the cluster anew with another default keeps the watch and the tombstones.
	lists := api.lists.Load()
	again := r.clusters.Load().all[0].KubeCluster
	again.DefaultID = identity.DefaultKubeID
	r.set(t, again)
	if _, err := r.Verify(t.Context(), toks[3]); !errors.Is(err, identity.ErrUnauthenticated) {
		t.Errorf("after registering anew: %v", err)
	}
	if api.lists.Load() != lists {
		t.Error("the watch began anew")
	}
}

// A pod that has finished is still there, and nothing of it runs: whoever shows its token is somebody else.
func TestWatchTellsFinishedPod(t *testing.T) {
	for _, review := range []bool{false, true} {
		t.Run(fmt.Sprintf("TokenReview %v", review), func(t *testing.T) {
			i := newIssuer(t, "key-1", time.Now)
			api := newFakeAPI(t)
			api.addPod("web-0", testUID)
			api.addPod("web-1", podUID(1))
			api.setReview(agree) // the API server itself goes on accepting it
			r := newRig(t, time.Now, func(c *Config) { c.MaxTombstones = 1 })
			c := api.watched(t, jwksOf(t, i))
			c.TokenReview = review
			r.set(t, c)
			gone := r.run(t)
			await(t, api.watching, "the watch")
			tok := i.token(t)
			if _, err := r.Verify(t.Context(), tok); err != nil {
				t.Fatal(err)
			}
			refused := func(when string) {
				t.Helper()
				if _, err := r.Verify(t.Context(), tok); !errors.Is(err, identity.ErrUnauthenticated) || !strings.Contains(err.Error(), "has finished") {
					t.Errorf("%s: %v", when, err)
				}
			}
			api.finishPod(testUID)
			if got := await(t, gone, "the callback"); got != "east/"+testUID {
				t.Errorf("gone: %s", got)
			}
			refused("finished")
			api.dropWatches()
			await(t, api.watching, "the next watch")
			refused("after the next list")
			api.deletePod(podUID(1)) // whose tombstone takes the place of the other's
			await(t, gone, "the callback")
			refused("with its tombstone forgotten")
		})
	}
}

// A pod that is to end and whose end nobody confirms, as when its node is lost: its tokens end a minute after its grace period.
func TestWatchEndsPodThatShouldHaveEnded(t *testing.T) {
	clock := newClock()
	i := newIssuer(t, "key-1", clock.now)
	api := newFakeAPI(t)
	api.addPod("web-0", testUID)
	r := newRig(t, clock.now)
	r.set(t, api.watched(t, jwksOf(t, i)))
	gone := r.run(t)
	await(t, api.watching, "the watch")
	tok := i.token(t)
	api.changePod(testUID, func(m *metav1.PartialObjectMetadata) {
		at := metav1.NewTime(clock.now().Add(30 * time.Second)) // with its grace period
		m.DeletionTimestamp = &at
	})
	api.addPod("late", podUID(9))
	api.deletePod(podUID(9))
	await(t, gone, "the callback") // so the change has been seen
	for _, w := range []struct {
		after time.Duration
		good  bool
	}{{0, true}, {89 * time.Second, true}, {time.Second, false}} {
		clock.add(w.after)
		_, err := r.Verify(t.Context(), tok)
		if w.good != (err == nil) || err != nil && !errors.Is(err, identity.ErrUnauthenticated) {
			t.Errorf("at %v: %v", clock.now(), err)
		}
	}
	// The same from a list, and when asked for.
	api.dropWatches()
	await(t, api.watching, "the next watch")
	if _, err := r.Verify(t.Context(), tok); !errors.Is(err, identity.ErrUnauthenticated) {
		t.Errorf("after the next list: %v", err)
	}
	if there, err := r.clusters.Load().all[0].api.podExists(t.Context(), "prod", "web-0", testUID); err != nil || there {
		t.Errorf("asked for: %v, %v", there, err)
	}
}

func TestWatchRestartNoticesVanishedPods(t *testing.T) {
	i := newIssuer(t, "key-1", time.Now)
	api := newFakeAPI(t)
	for n := range 3 {
		api.addPod(fmt.Sprintf("web-%d", n), podUID(n))
	}
	r := newRig(t, time.Now)
	r.set(t, api.watched(t, jwksOf(t, i)))
	gone := r.run(t)
	await(t, api.watching, "the watch")
	tok := i.token(t, forPod("web-1", podUID(1)))
	if _, err := r.Verify(t.Context(), tok); err != nil {
		t.Fatal(err)
	}

	api.setRefuse("list pods", 500)
	api.setRefuse("watch pods", 500)
	api.dropWatches()
	api.deletePod(podUID(1)) // nobody watches
	api.setRefuse("list pods", 0)
	api.setRefuse("watch pods", 0)
	if got := await(t, gone, "the re-list"); got != "east/"+podUID(1) {
		t.Errorf("gone: %s", got)
	}
	if _, err := r.Verify(t.Context(), tok); !errors.Is(err, identity.ErrUnauthenticated) {
		t.Errorf("token of the vanished pod: %v", err)
	}
	await(t, api.watching, "the next watch")
	api.deletePod(podUID(2))
	if got := await(t, gone, "the callback after the restart"); got != "east/"+podUID(2) {
		t.Errorf("gone: %s", got)
	}
	select {
	case got := <-gone:
		t.Errorf("told once too often: %s", got)
	default:
	}

	// A cluster restored from a backup has the pod again.
	api.addPod("web-1", podUID(1))
	api.dropWatches()
	await(t, api.watching, "the watch after the backup")
	if _, err := r.Verify(t.Context(), tok); err != nil {
		t.Errorf("a pod that is there again: %v", err)
	}
}

// An API server that falls silent without hanging up, and does not end the watch when it said that it would.
func TestWatchOfSilentAPIServer(t *testing.T) {
	i := newIssuer(t, "key-1", time.Now)
	api := newFakeAPI(t)
	api.addPod("web-1", podUID(1))
	r := newRig(t, time.Now, func(c *Config) { c.WatchTime = 20 * time.Millisecond })
	r.set(t, api.watched(t, jwksOf(t, i)))
	gone := r.run(t)
	await(t, api.watching, "the watch")
	api.silent.Store(true)
	api.deletePod(podUID(1)) // nobody is told
	if got := await(t, gone, "the next list"); got != "east/"+podUID(1) {
		t.Errorf("gone: %s", got)
	}
}

// A list that never ends must not fill the memory that all clusters share.
func TestListWithoutEnd(t *testing.T) {
	i := newIssuer(t, "key-1", time.Now)
	api := newFakeAPI(t)
	api.addPod("web-1", podUID(1))
	api.endless.Store(true)
	r := newRig(t, time.Now)
	r.set(t, api.watched(t, jwksOf(t, i)))
	r.run(t)
	for limit := time.Now().Add(deadline); ; time.Sleep(time.Millisecond) {
		if s := r.Status()[0]; s.APIFault != nil && strings.Contains(s.APIFault.Error(), "does not end") {
			break
		}
		if time.Now().After(limit) {
			t.Fatalf("after %d pages: %+v", api.lists.Load(), r.Status())
		}
	}
}

// A pod that went before the watch began has no tombstone: the API server is asked.
func TestWatchAsksAboutUnknownPods(t *testing.T) {
	i := newIssuer(t, "key-1", time.Now)
	api := newFakeAPI(t)
	api.addPod("web-0", podUID(0))
	api.addPod("web-1", podUID(1))
	r := newRig(t, time.Now, func(c *Config) { c.MaxTombstones = 1 })
	r.set(t, api.watched(t, jwksOf(t, i)))
	tok := i.token(t, forPod("web-9", podUID(9)))
	if _, err := r.Verify(t.Context(), tok); err != nil {
		t.Errorf("before there is a watch the signature decides: %v", err)
	}
	gone := r.run(t)
	await(t, api.watching, "the watch")
	api.deletePod(podUID(1))
	await(t, gone, "the callback") // so the watch is known to be up
	if _, err := r.Verify(t.Context(), tok); !errors.Is(err, identity.ErrUnauthenticated) || !strings.Contains(err.Error(), "is gone") {
		t.Errorf("unknown pod: %v", err)
	}
	if _, err := r.Verify(t.Context(), i.token(t, forPod("web-0", podUID(8)))); !errors.Is(err, identity.ErrUnauthenticated) {
		t.Errorf("earlier pod of the same name: %v", err)
	}
	// Its tombstone was pushed out by another: still refused.
	api.deletePod(podUID(0))
	await(t, gone, "the callback")
	if _, err := r.Verify(t.Context(), i.token(t, forPod("web-1", podUID(1)))); !errors.Is(err, identity.ErrUnauthenticated) {
		t.Errorf("forgotten tombstone: %v", err)
	}
	// What was answered once is not asked again.
	gets := api.gets.Load()
	if _, err := r.Verify(t.Context(), i.token(t, forPod("web-0", podUID(8)))); !errors.Is(err, identity.ErrUnauthenticated) {
		t.Errorf("once more: %v", err)
	}
	if n := api.gets.Load() - gets; n > 1 { // with one tombstone it may have been pushed out
		t.Errorf("asked %d times", n)
	}
	// The API server does not answer, or not us: the signature decides.
	api.setRefuse("get pods", 403)
	if _, err := r.Verify(t.Context(), i.token(t, forPod("web-7", podUID(7)))); err != nil {
		t.Errorf("while nobody can be asked: %v", err)
	}
}

func TestWatchForbidden(t *testing.T) {
	i := newIssuer(t, "key-1", time.Now)
	bad, good := newFakeAPI(t), newFakeAPI(t)
	bad.setRefuse("list pods", 403)
	good.addPod("web-0", podUID(0))
	r := newRig(t, time.Now)
	b := bad.watched(t, jwksOf(t, i))
	b.Name = "bad"
	g := good.watched(t, jwksOf(t, i))
	g.Issuer = "https://good"
	r.set(t, b, g)
	gone := r.run(t)
	await(t, good.watching, "the good cluster's watch")
	good.deletePod(podUID(0))
	if got := await(t, gone, "the callback"); got != "east/"+podUID(0) {
		t.Errorf("gone: %s", got)
	}
	if _, err := r.Verify(t.Context(), i.token(t)); err != nil {
		t.Errorf("a cluster whose pods cannot be watched: %v", err)
	}
	for bad.lists.Load() < 2 { // the first failure is recorded before the second try
		await(t, time.After(time.Millisecond), "")
	}
	s := r.Status()
	if s[0].Cluster != "bad" || s[0].Watching || s[0].APIFault == nil || !strings.Contains(s[0].APIFault.Error(), "list on pods") {
		t.Errorf("status %+v", s[0])
	}
	if !strings.Contains(r.log.String(), "cannot watch the pods") {
		t.Error("not logged")
	}
}

func TestRunFollowsSetClusters(t *testing.T) {
	i := newIssuer(t, "key-1", time.Now)
	api := newFakeAPI(t)
	api.addPod("web-0", podUID(0))
	keys := newKeyServer(t)
	keys.publish(jwksOf(t, i))
	r := newRig(t, time.Now)
	gone := r.run(t)
	r.set(t, api.watched(t, jwksOf(t, i)))
	await(t, api.watching, "the watch of a cluster that came later")
	r.set(t)
	for n := 1; n > 0; { // the watch ends
		await(t, time.After(time.Millisecond), "")
		api.mu.Lock()
		n = len(api.streams)
		api.mu.Unlock()
	}
	if _, err := r.Verify(t.Context(), i.token(t)); !errors.Is(err, identity.ErrUnauthenticated) || !strings.Contains(err.Error(), "any of the 0 registered") {
		t.Errorf("a cluster no longer registered: %v", err)
	}
	// Keys are fetched ahead of the first token.
	r.set(t, keys.cluster("west"))
	for keys.fetches.Load() == 0 {
		await(t, time.After(time.Millisecond), "")
	}
	if err := r.Run(t.Context(), Events{func(string, string) {}, func(string, string, string) {}}); err == nil {
		t.Error("ran twice")
	}
	select {
	case g := <-gone:
		t.Errorf("gone: %s", g)
	default:
	}
}
