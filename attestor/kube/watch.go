package kube

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"

	"countersign.io/countersign/identity"
)

const (
	listPage = 500
	maxPods  = 500_000 // of one cluster: three times what Kubernetes is tested with, and 50 MiB
)

// podSet is what is known of a cluster's pods.
type podSet struct {
	mu       sync.RWMutex
	live     map[string]struct{} // UIDs; nil before the first list
	watching bool
	fault    error
	gone     *lru.Cache[string, struct{}]
}

func newPodSet(tombstones int) *podSet {
	gone, _ := lru.New[string, struct{}](max(tombstones, 1)) // fails for a size below 1 only
	return &podSet{gone: gone}
}

func (p *podSet) isGone(uid string) bool { return p.gone.Contains(uid) }

// suspect reports whether the pods are being watched and this one is not among them.
func (p *podSet) suspect(uid string) bool {
	p.mu.RLock()
	defer p.mu.RUnlock()
	_, live := p.live[uid]
	return p.watching && !live
}

func (p *podSet) status() (watching bool, pods int, fault error) {
	p.mu.RLock()
	defer p.mu.RUnlock()
	return p.watching, len(p.live), p.fault
}

// replace takes a full list and returns the UIDs that are no longer there.
func (p *podSet) replace(live map[string]struct{}) []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	var gone []string
	for uid := range p.live {
		if _, ok := live[uid]; !ok {
			p.gone.Add(uid, struct{}{})
			gone = append(gone, uid)
		}
	}
	// A UID comes back only when the cluster was restored from a backup.
	for _, uid := range p.gone.Keys() {
		if _, ok := live[uid]; ok {
			p.gone.Remove(uid)
		}
	}
	p.live = live
	return gone
}

func (p *podSet) add(uid string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.live) < maxPods { // the API server is asked about one that is left out
		p.live[uid] = struct{}{}
	}
	p.gone.Remove(uid)
}

func (p *podSet) remove(uid string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.live, uid)
	p.gone.Add(uid, struct{}{})
}

// setState reports whether the fault is news.
func (p *podSet) setState(watching bool, fault error) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	news := fault != nil && (p.fault == nil || p.fault.Error() != fault.Error())
	p.watching, p.fault = watching, fault
	return news
}

// Run watches the pods of every cluster that has a kubeconfig and keeps fetched keys fresh, following SetClusters, until
// ctx ends; it then returns nil. gone is called for each pod that ended, after its tokens are refused already: once per
// pod, from one goroutine per cluster. It must not block for long.
func (v *Verifier) Run(ctx context.Context, gone func(cluster, podUID string)) error {
	if gone == nil {
		return errors.New("running kube verifier: gone must be set")
	}
	if !v.running.CompareAndSwap(false, true) {
		return errors.New("running kube verifier: it runs already")
	}
	defer v.running.Store(false)
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	jobs := make(map[any]context.CancelFunc) // by *keySource or *apiServer
	for {
		want := make(map[any]func(context.Context))
		for _, c := range v.clusters.Load().all {
			if c.fault != nil {
				continue
			}
			if c.keys != nil && c.keys.url != "" {
				want[c.keys] = c.keys.run
			}
			if c.api != nil {
				want[c.api] = func(ctx context.Context) { c.api.watch(ctx, gone) }
			}
		}
		for k, stop := range jobs {
			if want[k] == nil {
				stop()
				delete(jobs, k)
			}
		}
		for k, job := range want {
			if jobs[k] == nil {
				jctx, stop := context.WithCancel(ctx)
				jobs[k] = stop
				wg.Go(func() { job(jctx) })
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-v.changed:
		}
	}
}

// watch follows the pods until ctx ends.
func (a *apiServer) watch(ctx context.Context, gone func(cluster, podUID string)) {
	wait := a.cfg.RetryInterval
	defer a.pods.setState(false, nil)
	for {
		progress, err := a.listAndWatch(ctx, func(uid string) { gone(a.cluster, uid) })
		if ctx.Err() != nil {
			return
		}
		if a.pods.setState(false, err) {
			a.cfg.Log.Warn("cannot watch the pods of a kube cluster; the end of a pod is noticed late", "cluster", a.cluster, "error", err)
		}
		if progress {
			wait = a.cfg.RetryInterval
		}
		t := time.NewTimer(wait/2 + rand.N(wait/2+1))
		select {
		case <-ctx.Done():
			t.Stop()
			return
		case <-t.C:
		}
		wait = min(2*wait, 32*a.cfg.RetryInterval)
	}
}

// listAndWatch returns when the watch must begin anew with a list; progress says that events came.
func (a *apiServer) listAndWatch(ctx context.Context, gone func(podUID string)) (progress bool, err error) {
	client, err := a.client()
	if err != nil {
		return false, err
	}
	revision, err := a.list(ctx, client, gone)
	if err != nil {
		return false, a.failure(client, "listing the pods", "list on pods", err, "")
	}
	for {
		next, err := a.follow(ctx, client, revision, gone)
		if next != revision {
			progress = true
		}
		if apierrors.IsResourceExpired(err) || apierrors.IsGone(err) { // the API server no longer has that revision
			return progress, nil
		}
		if err != nil {
			return progress, a.failure(client, "watching the pods", "watch on pods", err, "")
		}
		if next == revision { // closed without a word: not to be asked again at once
			return progress, nil
		}
		revision = next
	}
}

// list reads the pods page by page, keeping the UIDs alone, and tells which of those known before are gone.
func (a *apiServer) list(ctx context.Context, client *apiClient, gone func(podUID string)) (revision string, err error) {
	live := make(map[string]struct{})
	opts := metav1.ListOptions{Limit: listPage}
	for {
		pctx, cancel := context.WithTimeout(ctx, a.cfg.ListTimeout)
		page, err := client.pods.List(pctx, opts)
		cancel()
		if err != nil {
			return "", err
		}
		before := len(live)
		for i := range page.Items {
			if id := string(page.Items[i].UID); uid.MatchString(id) {
				live[id] = struct{}{}
			}
		}
		revision, opts.Continue = page.ResourceVersion, page.Continue
		if opts.Continue == "" {
			break
		}
		if len(live) == before || len(live) > maxPods {
			return "", fmt.Errorf("the list does not end: there is more after %d pods, at the most %d", len(live), maxPods)
		}
	}
	for _, uid := range a.pods.replace(live) {
		gone(uid)
	}
	return revision, nil
}

// follow watches from the revision until the API server closes the watch, and returns the last revision seen.
func (a *apiServer) follow(ctx context.Context, client *apiClient, revision string, gone func(podUID string)) (string, error) {
	// At random, so that members do not all come back at once. An API server that neither speaks nor ends the watch when it was
	// asked to would keep us believing that no pod ends.
	last := a.cfg.WatchTime + rand.N(a.cfg.WatchTime)
	ctx, cancel := context.WithTimeout(ctx, last+a.cfg.WatchTime/10)
	defer cancel()
	seconds := int64(last/time.Second) + 1
	w, err := client.pods.Watch(ctx, metav1.ListOptions{ResourceVersion: revision, AllowWatchBookmarks: true, TimeoutSeconds: &seconds})
	if err != nil {
		return revision, err
	}
	defer w.Stop()
	a.pods.setState(true, nil)
	for ev := range w.ResultChan() {
		if ev.Type == watch.Error {
			return revision, apierrors.FromObject(ev.Object)
		}
		pod, ok := ev.Object.(*metav1.PartialObjectMetadata)
		if !ok {
			return revision, fmt.Errorf("%w: a watch event with a %T", identity.ErrUnavailable, ev.Object)
		}
		revision = pod.ResourceVersion
		switch {
		case ev.Type == watch.Bookmark || !uid.MatchString(string(pod.UID)):
		case ev.Type == watch.Deleted:
			a.pods.remove(string(pod.UID))
			gone(string(pod.UID))
		default:
			a.pods.add(string(pod.UID))
		}
	}
	return revision, nil
}
