package controller

import (
	"context"
	"slices"
	"sync"

	"k8s.io/client-go/util/workqueue"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
	"sigs.k8s.io/controller-runtime/pkg/source"

	"countersign.io/countersign/identity"
)

// feed passes on the changes of the trust domain's state.
type feed struct {
	watch func(ctx context.Context, f func([]identity.Change)) error

	mu   sync.Mutex
	subs []func([]identity.Change)
}

func newFeed(watch func(context.Context, func([]identity.Change)) error) *feed {
	return &feed{watch: watch}
}

// on has f called with each change from now on, in order. Nobody may call it once the feed runs.
func (f *feed) on(sub func([]identity.Change)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.subs = append(f.subs, sub)
}

// Start is manager.Runnable's.
func (f *feed) Start(ctx context.Context) error {
	if f.watch == nil {
		<-ctx.Done()
		return nil
	}
	err := f.watch(ctx, func(changes []identity.Change) {
		f.mu.Lock()
		defer f.mu.Unlock()
		for _, sub := range f.subs {
			sub(changes)
		}
	})
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// kicker is a source of requests that are not caused by an object of Kubernetes.
type kicker struct {
	mu      sync.Mutex
	waiting []string // for the queue
	queue   workqueue.TypedRateLimitingInterface[reconcile.Request]
}

func (k *kicker) source() source.Source {
	return source.Func(func(_ context.Context, q workqueue.TypedRateLimitingInterface[reconcile.Request]) error {
		k.mu.Lock()
		defer k.mu.Unlock()
		k.queue = q
		for _, name := range k.waiting {
			q.Add(requestFor(name))
		}
		k.waiting = nil
		return nil
	})
}

// kick asks for a name.
func (k *kicker) kick(name string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.queue == nil {
		if !slices.Contains(k.waiting, name) {
			k.waiting = append(k.waiting, name)
		}
		return
	}
	k.queue.Add(requestFor(name))
}
