package store

import (
	"encoding/json"
	"errors"
	"fmt"

	"countersign.io/countersign/identity"
)

// result is what applying a command answers, on the wire between members too.
type result struct {
	Code    string          `json:"code,omitempty"` // empty: done
	Message string          `json:"message,omitempty"`
	Data    json.RawMessage `json:"data,omitempty"`
}

// codes names the sentinels that a command can end with.
func codes() []struct {
	name string
	err  error
} {
	return []struct {
		name string
		err  error
	}{
		{"invalid", identity.ErrInvalid},
		{"unauthenticated", identity.ErrUnauthenticated},
		{"denied", identity.ErrDenied},
		{"not_found", identity.ErrNotFound},
		{"exists", identity.ErrExists},
		{"precondition", identity.ErrPrecondition},
		{"exhausted", identity.ErrExhausted},
		{"unavailable", identity.ErrUnavailable},
	}
}

// refusal encodes an error that wraps a sentinel; ok is false for any other, which is a fault of this member
// rather than of the command.
func refusal(err error) (raw []byte, ok bool) {
	for _, c := range codes() {
		if errors.Is(err, c.err) {
			raw, merr := json.Marshal(result{Code: c.name, Message: err.Error()})
			return raw, merr == nil
		}
	}
	return nil, false
}

func success(data any) ([]byte, error) {
	if data == nil {
		return []byte("{}"), nil
	}
	raw, err := json.Marshal(data)
	if err != nil {
		return nil, err
	}
	return json.Marshal(result{Data: raw})
}

// decodeResult gives back the data, or an error that wraps the sentinel again. Fields it does not know are
// ignored: the answer may come from a newer member.
func decodeResult(raw []byte, data any) error {
	var r result
	if err := json.Unmarshal(raw, &r); err != nil {
		return fmt.Errorf("%w: decoding the answer to a command: %v", identity.ErrUnavailable, err)
	}
	if r.Code != "" {
		for _, c := range codes() {
			if c.name == r.Code {
				return &commandError{sentinel: c.err, message: r.Message}
			}
		}
		return fmt.Errorf("%w: the command was refused (%s): %s", identity.ErrPrecondition, r.Code, r.Message)
	}
	if data == nil {
		return nil
	}
	if err := json.Unmarshal(r.Data, data); err != nil {
		return fmt.Errorf("%w: decoding the answer to a command: %v", identity.ErrUnavailable, err)
	}
	return nil
}

// commandError keeps the message, which already names the sentinel, from being doubled.
type commandError struct {
	sentinel error
	message  string
}

func (e *commandError) Error() string { return e.message }
func (e *commandError) Unwrap() error { return e.sentinel }
