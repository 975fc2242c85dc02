package identity

import (
	"fmt"
	"log/slog"
)

// What holds a secret prints without it, in whatever form it gets into a log or an error.

// String is the evidence without its token.
func (e Evidence) String() string {
	return fmt.Sprintf("evidence of %d selectors and a token of %d bytes", len(e.Selectors), len(e.Token))
}

// String is the SVID without its key.
func (s X509SVID) String() string {
	return fmt.Sprintf("X.509-SVID of %s until %s", s.ID, s.NotAfter.UTC().Format("2006-01-02T15:04:05Z"))
}

// String is the SVID without its token.
func (s JWTSVID) String() string {
	return fmt.Sprintf("JWT-SVID of %s until %s", s.ID, s.ExpiresAt.UTC().Format("2006-01-02T15:04:05Z"))
}

// GoString is String: %#v must not show a secret either.
func (e Evidence) GoString() string { return e.String() }

// GoString is String.
func (s X509SVID) GoString() string { return s.String() }

// GoString is String.
func (s JWTSVID) GoString() string { return s.String() }

// LogValue is String.
func (e Evidence) LogValue() slog.Value { return slog.StringValue(e.String()) }

// LogValue is String.
func (s X509SVID) LogValue() slog.Value { return slog.StringValue(s.String()) }

// LogValue is String.
func (s JWTSVID) LogValue() slog.Value { return slog.StringValue(s.String()) }
