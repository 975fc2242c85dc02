package identity

import (
	"errors"
	"strings"
	"testing"
)

func TestCheckIssuer(t *testing.T) {
	for _, s := range []string{"https://example.org", "https://example.org:8444", "https://127.0.0.1:1", "https://[2001:db8::1]:8444", "https://example.org/a/b-c._~"} {
		if err := CheckIssuer(s); err != nil {
			t.Errorf("%s: %v", s, err)
		}
	}
	for name, s := range map[string]string{
		"nothing":      "",
		"http":         "http://example.org",
		"a name":       "example.org",
		"a slash":      "https://example.org/",
		"upper case":   "https://Example.org",
		"a query":      "https://example.org?x=1",
		"no query":     "https://example.org?",
		"a fragment":   "https://example.org#x",
		"no fragment":  "https://example.org#",
		"a password":   "https://user:secret@example.org",
		"an escape":    "https://example.org/%41",
		"a pattern":    "https://example.org/{x}",
		"a space":      "https://example.org/a b",
		"empty":        "https://example.org//a",
		"up":           "https://example.org/../a",
		"far too long": "https://example.org/" + strings.Repeat("a", MaxFederatedURL),
	} {
		if err := CheckIssuer(s); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		} else if strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: the error has the password", name)
		}
	}
}
