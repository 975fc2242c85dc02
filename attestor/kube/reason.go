package kube

import (
	"errors"

	"countersign.io/countersign/identity"
)

// reason is why a token was not accepted, in one clause that names nothing of what is registered.
type reason string

const (
	badForm     reason = "it is not a well-formed token of a pod's service account"
	notBound    reason = "it is not bound to a pod and its node"
	expired     reason = "it has expired"
	notYetValid reason = "it is not valid yet"
	badIssuer   reason = "its issuer is unknown here"
	badAudience reason = "it is for the wrong audience"
	badKey      reason = "it is not signed by a known key of its issuer"
	podGone     reason = "its pod is gone or has finished"
	notBacked   reason = "its API server does not stand behind it"
)

// reasoned carries the reason; its text is that of the error alone.
type reasoned struct {
	error
	why reason
}

func (e *reasoned) Unwrap() error { return e.error }

// Reason is what a stranger may be told of an error of Verify: the error's own text, with its audiences, hosts and paths, is for
// those who have proved who they are, and for the log.
func Reason(err error) string {
	var r *reasoned
	switch {
	case errors.As(err, &r):
		return string(r.why)
	case errors.Is(err, identity.ErrInvalid):
		return string(badForm)
	case errors.Is(err, identity.ErrUnavailable):
		return "nobody can tell at the moment whether it is good: try again, or another member"
	case errors.Is(err, identity.ErrPrecondition):
		return "it could be of more than one kube cluster"
	}
	return "it is not accepted"
}
