package controller

import (
	"context"
	"errors"
	"reflect"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/events"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"

	"countersign.io/countersign/controller/v1alpha1"
	"countersign.io/countersign/identity"
)

// The condition of every resource, and its reasons.
const (
	conditionReady = "Ready"

	reasonReady    = "Ready"
	reasonRefused  = "Refused"  // it asks for what is not allowed, or is wrong
	reasonConflict = "Conflict" // what it asks for is somebody else's, who was first
	reasonDenied   = "Denied"   // the controller may not do it
	reasonFailed   = "Failed"   // it will be tried again
)

// finalizer keeps a resource until what it made is gone.
const finalizer = "countersign.io/made"

// maxMessage is what a condition's message may have.
const maxMessage = 1024

var errConflict = errors.New("conflict")

// outcome says what came of a resource.
func outcome(err error) (reason string, status metav1.ConditionStatus) {
	switch {
	case err == nil:
		return reasonReady, metav1.ConditionTrue
	case errors.Is(err, errConflict), errors.Is(err, identity.ErrExists):
		return reasonConflict, metav1.ConditionFalse
	case errors.Is(err, identity.ErrInvalid):
		return reasonRefused, metav1.ConditionFalse
	case errors.Is(err, identity.ErrDenied), errors.Is(err, identity.ErrUnauthenticated):
		return reasonDenied, metav1.ConditionFalse
	}
	return reasonFailed, metav1.ConditionFalse
}

// again says when to look at it again: what waiting may mend soon, the rest with the next round.
func again(err error, every time.Duration) (ctrl.Result, error) {
	if reason, _ := outcome(err); reason == reasonFailed && !errors.Is(err, errStale) {
		return ctrl.Result{}, err // with the queue's growing pause
	}
	return ctrl.Result{RequeueAfter: every}, nil
}

// writer writes statuses and events.
type writer struct {
	client client.Client
	events events.EventRecorder
}

// settle sets the condition in st, which must be obj's, and writes the status if it is another than in before.
func (w *writer) settle(ctx context.Context, obj, before client.Object, st *v1alpha1.Status, err error, good string) error {
	reason, status := outcome(err)
	message := good
	st.LastError = ""
	if err != nil {
		message = cut(err.Error())
		st.LastError = message
	}
	old := meta.FindStatusCondition(st.Conditions, conditionReady)
	news := old == nil || old.Reason != reason || old.Message != message
	st.ObservedGeneration = obj.GetGeneration()
	meta.SetStatusCondition(&st.Conditions, metav1.Condition{Type: conditionReady, Status: status, Reason: reason, Message: message, ObservedGeneration: obj.GetGeneration()})
	if news && err != nil {
		w.events.Eventf(obj, nil, corev1.EventTypeWarning, reason, "Reconcile", "%s", message)
	}
	if reflect.DeepEqual(obj, before) {
		return nil
	}
	return gone(w.client.Status().Patch(ctx, obj, client.MergeFrom(before)))
}

// gone takes it for no fault that an object is not there any more.
func gone(err error) error {
	if apierrors.IsNotFound(err) {
		return nil
	}
	return err
}

func cut(s string) string {
	if len(s) > maxMessage {
		return s[:maxMessage-3] + "..."
	}
	return s
}

// hold puts the finalizer on before anything is made.
func (w *writer) hold(ctx context.Context, obj client.Object) error {
	if controllerutil.ContainsFinalizer(obj, finalizer) {
		return nil
	}
	before := obj.DeepCopyObject().(client.Object)
	controllerutil.AddFinalizer(obj, finalizer)
	return w.client.Patch(ctx, obj, client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{}))
}

// release lets a resource go once what it made is gone.
func (w *writer) release(ctx context.Context, obj client.Object) error {
	if !controllerutil.ContainsFinalizer(obj, finalizer) {
		return nil
	}
	before := obj.DeepCopyObject().(client.Object)
	controllerutil.RemoveFinalizer(obj, finalizer)
	return gone(w.client.Patch(ctx, obj, client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{})))
}
