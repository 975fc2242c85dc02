package identity

import (
	"fmt"
	"log/slog"
	"strings"
)

// What holds a secret prints without it, in whatever form it gets into a log or an error.

// RedactURL is a URL, or what was meant to be one, for messages: without user and password, and without what is behind a question mark.
func RedactURL(s string) string {
	head := s
	if i := strings.IndexAny(s, "?#"); i >= 0 {
		head = s[:i]
	}
	scheme, rest, ok := strings.Cut(head, "://")
	if !ok {
		scheme, rest = "", head
	} else {
		scheme += "://"
	}
	switch at := strings.LastIndexByte(s, '@'); {
	case at < 0:
		return head
	case at >= len(head): // a password with a question mark in it, perhaps
		return scheme + "..."
	}
	return scheme + rest[strings.LastIndexByte(rest, '@')+1:]
}

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
