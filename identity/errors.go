package identity

import "errors"

// The sentinel errors: what a caller branches on. Wrap one with a message that says what was wrong, where,
// and what to do; package api maps each to a gRPC code and back.
var (
	// ErrInvalid: the input is malformed or contradicts itself; the same call cannot succeed.
	ErrInvalid = errors.New("invalid input")
	// ErrUnauthenticated: the evidence was not accepted.
	ErrUnauthenticated = errors.New("not authenticated")
	// ErrDenied: the caller is known, and this is not its to have. A workload without identity gets this.
	ErrDenied = errors.New("permission denied")
	// ErrNotFound: there is no such thing.
	ErrNotFound = errors.New("not found")
	// ErrExists: there is such a thing already.
	ErrExists = errors.New("already exists")
	// ErrPrecondition: the state does not allow it (a token already used, a clean-up pending).
	ErrPrecondition = errors.New("precondition failed")
	// ErrExhausted: the caller is over its share.
	ErrExhausted = errors.New("over the limit")
	// ErrUnavailable: not now, perhaps at another member; trying again is right.
	ErrUnavailable = errors.New("unavailable")
)
