package kube

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/metadata"

	"countersign.io/countersign/identity"
)

const (
	listPage = 500
	maxPods  = 500_000 // of one cluster: three times what Kubernetes is tested with, and 50 MiB
	// A pod that has finished stays until somebody removes it, and nothing of it runs any more: its identity ends as with a deleted
	// one's. The watch tells of it when it no longer matches this.
	unfinished = "status.phase!=Succeeded,status.phase!=Failed"
	endLeeway  = time.Minute // that tokens of a pod outlive its grace period, where nobody confirms its end
)

// Events is what Run tells. Both must not block for long.
type Events struct {
	// Gone is called for each pod that ended, after its tokens are refused already: once per pod.
	Gone func(cluster, podUID string)
	// Changed is called when other facts are known of a pod than before, or of all pods of a namespace: podUID is then empty. It may
	// be called when nothing changed.
	Changed func(cluster, namespace, podUID string)
}

// Run watches the pods of every cluster that has a kubeconfig, and what else entries name of them, and keeps fetched keys fresh,
// following SetClusters and SetInterest, until ctx ends; it then returns nil.
func (v *Verifier) Run(ctx context.Context, tell Events) error {
	if tell.Gone == nil || tell.Changed == nil {
		return errors.New("running kube verifier: Gone and Changed must be set")
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
				want[c.api] = func(ctx context.Context) { c.api.run(ctx, tell) }
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

// table takes what a watch of one kind of object tells.
type table interface {
	begin()                                 // a list begins
	listed(m *metav1.PartialObjectMetadata) // one of the list
	len() int                               // how many different ones the list had so far
	commit()                                // the list is complete: what it did not have is gone
	put(m *metav1.PartialObjectMetadata)    // it came, or changed
	drop(m *metav1.PartialObjectMetadata)   // it went
	setState(watching bool, fault error) (news bool)
}

// resources are the kinds of objects that are watched, by their names.
func resources() map[string]schema.GroupVersionResource {
	return map[string]schema.GroupVersionResource{
		"pods":        {Version: "v1", Resource: "pods"},
		"namespaces":  {Version: "v1", Resource: "namespaces"},
		"replicasets": {Group: "apps", Version: "v1", Resource: "replicasets"},
	}
}

// run watches the pods, and namespaces and ReplicaSets while an entry names what they say, until ctx ends.
func (a *apiServer) run(ctx context.Context, tell Events) {
	var wg sync.WaitGroup
	defer wg.Wait()
	always := func(*interest) bool { return true }
	for _, w := range []struct {
		resource string
		wanted   func(*interest) bool
		table    func(*interest) table
		forget   func()
	}{
		{"pods", always, func(i *interest) table { return &podTable{a: a, want: i, tell: tell} }, func() {}},
		{"namespaces", func(i *interest) bool { return i != nil && len(i.namespaces) > 0 }, func(i *interest) table { return &namespaceTable{a: a, want: i, tell: tell} }, a.namespaces.clear},
		{"replicasets", func(i *interest) bool { return i != nil && i.owners }, func(i *interest) table {
			return &replicaSetTable{a: a, want: i, tell: tell, news: make(map[string]struct{})}
		}, a.replicaSets.clear},
	} {
		wg.Go(func() {
			for ctx.Err() == nil {
				want, other := a.wanted()
				if !w.wanted(want) {
					w.forget()
					select {
					case <-ctx.Done():
					case <-other:
					}
					continue
				}
				wctx, stop := context.WithCancel(ctx)
				wg.Go(func() {
					select {
					case <-wctx.Done():
					case <-other:
						stop()
					}
				})
				a.watch(wctx, w.resource, w.table(want))
				stop()
			}
		})
	}
}

// watch follows one kind of object until ctx ends.
func (a *apiServer) watch(ctx context.Context, resource string, to table) {
	wait := a.cfg.RetryInterval
	defer to.setState(false, nil)
	for {
		progress, err := a.listAndWatch(ctx, resource, to)
		if ctx.Err() != nil {
			return
		}
		if to.setState(false, err) {
			a.cfg.Log.Warn("cannot watch the "+resource+" of a kube cluster; what ends or changes there is noticed late", "cluster", a.cluster, "error", err)
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
func (a *apiServer) listAndWatch(ctx context.Context, resource string, to table) (progress bool, err error) {
	client, err := a.client()
	if err != nil {
		return false, err
	}
	from, only := client.meta.Resource(resources()[resource]), ""
	if resource == "pods" {
		only = unfinished
	}
	revision, err := a.list(ctx, from, only, to)
	if err != nil {
		return false, a.failure(client, "listing the "+resource, "list on "+resource, err, "")
	}
	for {
		next, err := a.follow(ctx, from, only, revision, to)
		if next != revision {
			progress = true
		}
		if apierrors.IsResourceExpired(err) || apierrors.IsGone(err) { // the API server no longer has that revision
			return progress, nil
		}
		if err != nil {
			return progress, a.failure(client, "watching the "+resource, "watch on "+resource, err, "")
		}
		if next == revision { // closed without a word: not to be asked again at once
			return progress, nil
		}
		revision = next
	}
}

// list reads the objects page by page: those that match the field selector.
func (a *apiServer) list(ctx context.Context, from metadata.Getter, only string, to table) (revision string, err error) {
	to.begin()
	opts := metav1.ListOptions{Limit: listPage, FieldSelector: only}
	for {
		pctx, cancel := context.WithTimeout(ctx, a.cfg.ListTimeout)
		page, err := from.List(pctx, opts)
		cancel()
		if err != nil {
			return "", err
		}
		before := to.len()
		for i := range page.Items {
			to.listed(&page.Items[i])
		}
		revision, opts.Continue = page.ResourceVersion, page.Continue
		if opts.Continue == "" {
			break
		}
		if n := to.len(); n == before || n > maxPods {
			return "", fmt.Errorf("the list does not end: there is more after %d objects, at the most %d", n, maxPods)
		}
	}
	to.commit()
	return revision, nil
}

// follow watches from the revision until the API server closes the watch, and returns the last revision seen.
func (a *apiServer) follow(ctx context.Context, from metadata.Getter, only, revision string, to table) (string, error) {
	// At random, so that members do not all come back at once. An API server that neither speaks nor ends the watch when it was
	// asked to would keep us believing that no pod ends.
	last := a.cfg.WatchTime + rand.N(a.cfg.WatchTime)
	ctx, cancel := context.WithTimeout(ctx, last+a.cfg.WatchTime/10)
	defer cancel()
	seconds := int64(last/time.Second) + 1
	w, err := from.Watch(ctx, metav1.ListOptions{FieldSelector: only, ResourceVersion: revision, AllowWatchBookmarks: true, TimeoutSeconds: &seconds})
	if err != nil {
		return revision, err
	}
	defer w.Stop()
	to.setState(true, nil)
	for ev := range w.ResultChan() {
		if ev.Type == watch.Error {
			return revision, apierrors.FromObject(ev.Object)
		}
		m, ok := ev.Object.(*metav1.PartialObjectMetadata)
		if !ok {
			return revision, fmt.Errorf("%w: a watch event with a %T", identity.ErrUnavailable, ev.Object)
		}
		revision = m.ResourceVersion
		switch ev.Type {
		case watch.Bookmark:
		case watch.Deleted:
			to.drop(m)
		default:
			to.put(m)
		}
	}
	return revision, nil
}
