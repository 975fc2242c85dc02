package controller

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/events"
	"k8s.io/client-go/util/workqueue"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"countersign.io/countersign/controller/v1alpha1"
	"countersign.io/countersign/identity"
)

// The pauses after which what failed is tried again.
const (
	retryFirst = 100 * time.Millisecond
	retryMost  = 30 * time.Second
)

// wordedAgain is how often a resource may be written anew because nobody can be asked still, in other words: each member has its own
// address, and each connection its own port.
const wordedAgain = 5 * time.Minute

// maker makes by the admin API what resources of one kind ask for.
type maker[T client.Object] interface {
	// put brings what there is to what the resource asks for. It sets what the status tells beside the condition, and returns what that says
	// if all is well.
	put(ctx context.Context, obj T) (good string, err error)
	// end takes away what the resource of that name made. There may be none any more, or never have been one.
	end(ctx context.Context, name string) error
}

// follower is what the kinds have in common: a finalizer keeps a resource until what it made is gone, and its condition says what came
// of it.
type follower[T client.Object] struct {
	maker[T]
	client client.Client // which reads what is kept here
	live   client.Reader // which asks the API server
	events events.EventRecorder
	every  time.Duration // between two looks at a resource of which nothing was heard
	blank  func() T
	status func(T) *v1alpha1.Status
	words  *wording
}

func followIdentities(c client.Client, live client.Reader, r events.EventRecorder, every time.Duration, m maker[*v1alpha1.WorkloadIdentity]) *follower[*v1alpha1.WorkloadIdentity] {
	return &follower[*v1alpha1.WorkloadIdentity]{m, c, live, r, every, func() *v1alpha1.WorkloadIdentity { return &v1alpha1.WorkloadIdentity{} },
		func(w *v1alpha1.WorkloadIdentity) *v1alpha1.Status { return &w.Status.Status }, newWording()}
}

func followFederations(c client.Client, live client.Reader, r events.EventRecorder, every time.Duration, m maker[*v1alpha1.FederatedTrustDomain]) *follower[*v1alpha1.FederatedTrustDomain] {
	return &follower[*v1alpha1.FederatedTrustDomain]{m, c, live, r, every, func() *v1alpha1.FederatedTrustDomain { return &v1alpha1.FederatedTrustDomain{} },
		func(f *v1alpha1.FederatedTrustDomain) *v1alpha1.Status { return &f.Status.Status }, newWording()}
}

func followClusters(c client.Client, live client.Reader, r events.EventRecorder, every time.Duration, m maker[*v1alpha1.KubeCluster]) *follower[*v1alpha1.KubeCluster] {
	return &follower[*v1alpha1.KubeCluster]{m, c, live, r, every, func() *v1alpha1.KubeCluster { return &v1alpha1.KubeCluster{} },
		func(k *v1alpha1.KubeCluster) *v1alpha1.Status { return &k.Status }, newWording()}
}

// wording notes when resources of which nobody can be asked were worded anew.
type wording struct {
	now  func() time.Time
	mu   sync.Mutex
	last map[string]time.Time // by name
}

func newWording() *wording { return &wording{now: time.Now, last: map[string]time.Time{}} }

// due reports whether it is time to word it anew, which then counts as done.
func (w *wording) due(name string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	last, ok := w.last[name]
	if now := w.now(); !ok || now.Sub(last) >= wordedAgain {
		w.last[name] = now
		return true
	}
	return false
}

func (w *wording) forget(name string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.last, name)
}

// options are those of a follower's queue.
func options() controller.Options {
	return controller.Options{RateLimiter: workqueue.NewTypedItemExponentialFailureRateLimiter[reconcile.Request](retryFirst, retryMost)}
}

// Reconcile is reconcile.Reconciler's.
func (f *follower[T]) Reconcile(ctx context.Context, req ctrl.Request) (ctrl.Result, error) {
	obj := f.blank()
	err := f.client.Get(ctx, req.NamespacedName, obj)
	if apierrors.IsNotFound(err) { // or what is kept here is of the past: an API server that is behind may have been read
		err = f.live.Get(ctx, req.NamespacedName, obj)
	}
	if apierrors.IsNotFound(err) { // it went without its finalizer: by force, or it made nothing
		f.words.forget(req.Name)
		return ctrl.Result{}, f.end(ctx, req.Name)
	} else if err != nil {
		return ctrl.Result{}, err
	}
	ending := !obj.GetDeletionTimestamp().IsZero()
	if ending && !controllerutil.ContainsFinalizer(obj, finalizer) {
		return ctrl.Result{}, nil // it is somebody else who keeps it
	}
	if !ending {
		if err := f.hold(ctx, obj); err != nil {
			return ctrl.Result{}, gone(err)
		}
	}
	before := obj.DeepCopyObject().(client.Object)
	var good string
	if ending {
		if err = f.end(ctx, obj.GetName()); err == nil {
			return ctrl.Result{}, f.release(ctx, obj)
		}
		err = fmt.Errorf("taking away what it made: %w", err)
	} else {
		good, err = f.put(ctx, obj)
	}
	if serr := f.settle(ctx, obj, before, err, good); serr != nil {
		return ctrl.Result{}, serr
	}
	return f.again(err)
}

// again says when to look at it again: what waiting may mend soon, the rest with the next round.
func (f *follower[T]) again(err error) (ctrl.Result, error) {
	if reason, _ := outcome(err); reason == reasonFailed && !errors.Is(err, errStale) {
		return ctrl.Result{}, err // with the queue's growing pause
	}
	return ctrl.Result{RequeueAfter: f.every}, nil
}

// settle sets the condition of obj, and writes its status if it is another than before's.
func (f *follower[T]) settle(ctx context.Context, obj T, before client.Object, err error, good string) error {
	st := f.status(obj)
	reason, status := outcome(err)
	message := good
	st.LastError = ""
	old := meta.FindStatusCondition(st.Conditions, conditionReady)
	if !errors.Is(err, identity.ErrUnavailable) {
		f.words.forget(obj.GetName())
	}
	if err != nil {
		message = cut(err.Error())
		if errors.Is(err, identity.ErrUnavailable) && old != nil && old.Reason == reason && old.Message != message && old.ObservedGeneration == obj.GetGeneration() && !f.words.due(obj.GetName()) {
			message = old.Message
		}
		st.LastError = message
	}
	news := old == nil || old.Reason != reason || old.Message != message
	st.ObservedGeneration = obj.GetGeneration()
	meta.SetStatusCondition(&st.Conditions, metav1.Condition{Type: conditionReady, Status: status, Reason: reason, Message: message, ObservedGeneration: obj.GetGeneration()})
	if news && err != nil {
		f.events.Eventf(obj, nil, corev1.EventTypeWarning, reason, "Reconcile", "%s", message)
	}
	if reflect.DeepEqual(client.Object(obj), before) {
		return nil
	}
	return gone(f.client.Status().Patch(ctx, obj, client.MergeFrom(before)))
}

// hold puts the finalizer on before anything is made.
func (f *follower[T]) hold(ctx context.Context, obj T) error {
	if controllerutil.ContainsFinalizer(obj, finalizer) {
		return nil
	}
	before := obj.DeepCopyObject().(client.Object)
	controllerutil.AddFinalizer(obj, finalizer)
	return f.client.Patch(ctx, obj, client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{}))
}

// release lets a resource go once what it made is gone.
func (f *follower[T]) release(ctx context.Context, obj T) error {
	f.words.forget(obj.GetName())
	before := obj.DeepCopyObject().(client.Object)
	controllerutil.RemoveFinalizer(obj, finalizer)
	return gone(f.client.Patch(ctx, obj, client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{})))
}
