// Package api is the wire: the .proto files by service and version, the code generated from them, and the
// conversion between wire messages and the values of package identity. It decides nothing.
package api

import (
	"context"
	"errors"
	"fmt"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"countersign.io/countersign/identity"
)

// table is the one mapping between sentinel errors and gRPC codes, in both directions.
func table() []struct {
	err  error
	code codes.Code
} {
	return []struct {
		err  error
		code codes.Code
	}{
		{identity.ErrInvalid, codes.InvalidArgument},
		{identity.ErrUnauthenticated, codes.Unauthenticated},
		{identity.ErrDenied, codes.PermissionDenied},
		{identity.ErrNotFound, codes.NotFound},
		{identity.ErrExists, codes.AlreadyExists},
		{identity.ErrPrecondition, codes.FailedPrecondition},
		{identity.ErrExhausted, codes.ResourceExhausted},
		{identity.ErrUnavailable, codes.Unavailable},
		{context.DeadlineExceeded, codes.DeadlineExceeded},
		{context.Canceled, codes.Canceled},
	}
}

// Code is the gRPC code of an error; Internal for one that wraps no sentinel.
func Code(err error) codes.Code {
	if err == nil {
		return codes.OK
	}
	for _, row := range table() {
		if errors.Is(err, row.err) {
			return row.code
		}
	}
	if s, ok := status.FromError(err); ok {
		return s.Code()
	}
	return codes.Internal
}

// ToStatus turns an error into what goes over the wire. The text of an error that wraps no sentinel stays here:
// it was not written for strangers.
func ToStatus(err error) error {
	if err == nil {
		return nil
	}
	code := Code(err)
	if code == codes.Internal {
		return status.Error(codes.Internal, "internal error: see the log of the process that answered")
	}
	return status.Error(code, err.Error())
}

// FromStatus turns an error of a call into one that wraps the sentinel of its code.
func FromStatus(err error) error {
	s, ok := status.FromError(err)
	if err == nil || !ok {
		return err
	}
	return FromCode(s.Code(), s.Message())
}

// FromCode is the error for a code and its message; nil for OK.
func FromCode(code codes.Code, message string) error {
	if code == codes.OK {
		return nil
	}
	for _, row := range table() {
		if row.code == code {
			return &remoteError{sentinel: row.err, message: message}
		}
	}
	return fmt.Errorf("%s: %s", code, message)
}

// remoteError keeps the other side's message, which already names the sentinel, from being doubled.
type remoteError struct {
	sentinel error
	message  string
}

func (e *remoteError) Error() string {
	if e.message == "" {
		return e.sentinel.Error()
	}
	return e.message
}
func (e *remoteError) Unwrap() error { return e.sentinel }
