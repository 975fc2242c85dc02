package controller

import (
	"errors"
	"fmt"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

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

// asked words the failure of a question that is the same for every resource: no resource is refused for it, whatever it is.
func asked(err error) error {
	if reason, _ := outcome(err); reason == reasonRefused || reason == reasonConflict {
		return fmt.Errorf("%w: %v", identity.ErrUnavailable, err)
	}
	return err
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
