package node

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"reflect"
	"strings"
	"testing"

	"countersign.io/countersign/identity"
)

func goodToken() Token {
	secret, _ := NewSecret()
	return Token{Addresses: []string{"ca-1.example.org:8443", "[2001:db8::1]:8443", "10.0.0.3:1"}, Pin: Pin([]byte("spki")), Secret: secret, Purpose: identity.JoinAgent}
}

func TestSecret(t *testing.T) {
	a, hash := NewSecret()
	b, _ := NewSecret()
	if a == b || len(a) != 43 || len(hash) != 32 || strings.Contains(a, string(hash)) {
		t.Errorf("secrets of %d characters, hash of %d bytes, equal: %v", len(a), len(hash), a == b)
	}
	if err := CheckSecret(a); err != nil {
		t.Error(err)
	}
	if !SecretMatches(a, hash) || SecretMatches(b, hash) || SecretMatches("", hash) || SecretMatches(a, nil) || SecretMatches(a, hash[:31]) {
		t.Error("secrets match wrongly")
	}
	for _, s := range []string{"", "x", a[:42], a + "A", a[:42] + "=", strings.Repeat("A", 1<<20)} {
		if err := CheckSecret(s); !errors.Is(err, identity.ErrInvalid) || len(err.Error()) > 300 {
			t.Errorf("secret of %d characters: %v", len(s), err)
		}
	}
}

func TestTokenRoundTrip(t *testing.T) {
	for _, purpose := range []string{identity.JoinAgent, identity.JoinServer} {
		in := goodToken()
		in.Purpose = purpose
		s, err := FormatToken(in)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.HasPrefix(s, "cs1.") {
			t.Errorf("no version prefix: %.8s", s)
		}
		out, err := ParseToken(" " + s + "\n")
		if err != nil || !reflect.DeepEqual(in, out) {
			t.Errorf("read %v, %v", out, err)
		}
	}
}

func TestTokenNeverPrintsItsSecret(t *testing.T) {
	tok := goodToken()
	var log bytes.Buffer
	slog.New(slog.NewJSONHandler(&log, nil)).Info("token", "value", tok, "pointer", &tok)
	_, err := json.Marshal(tok)
	if err == nil {
		t.Error("encoded as JSON")
	}
	all := fmt.Sprintf("%v %+v %#v %s %q %v %v %s", tok, tok, tok, tok, tok, &tok, err, log.String())
	if strings.Contains(all, tok.Secret) {
		t.Error("the secret was printed")
	}
	if !strings.Contains(all, "ca-1.example.org:8443") {
		t.Error("nothing else was printed either")
	}
}

func TestTokenRefuses(t *testing.T) {
	enc := func(v any) string {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return "cs1." + base64.RawURLEncoding.EncodeToString(b)
	}
	good := goodToken()
	edit := func(e func(*tokenJSON)) string {
		w := tokenJSON(good)
		e(&w)
		return enc(w)
	}
	whole, err := FormatToken(good)
	if err != nil {
		t.Fatal(err)
	}
	many := make([]string, 17)
	for i := range many {
		many[i] = "a:1"
	}
	for name, row := range map[string]struct{ in, says string }{
		"empty":                {"", "cs1."},
		"other version":        {"cs2." + whole[4:], "cs1."},
		"cut":                  {whole[:len(whole)-5], "token"},
		"one character wrong":  {whole[:20] + "!" + whole[21:], "base64url"},
		"1 MiB":                {"cs1." + strings.Repeat("A", 1<<20), "at the most 4096"},
		"1 MiB of space":       {strings.Repeat(" ", 1<<20) + whole, "at the most 4096"},
		"not JSON":             {"cs1." + base64.RawURLEncoding.EncodeToString([]byte("hello")), "content"},
		"a list":               {enc([]string{good.Secret}), "content"},
		"unknown field":        {enc(map[string]any{"addresses": good.Addresses, "pin": good.Pin, "secret": good.Secret, "purpose": "agent", "x": 1}), "content"},
		"trailing":             {whole + base64.RawURLEncoding.EncodeToString([]byte("{}")), "token"},
		"no addresses":         {edit(func(w *tokenJSON) { w.Addresses = nil }), "0 addresses"},
		"too many addresses":   {edit(func(w *tokenJSON) { w.Addresses = many }), "17 addresses"},
		"address without port": {edit(func(w *tokenJSON) { w.Addresses = []string{"a:1", "host"} }), "address 2"},
		"port 0":               {edit(func(w *tokenJSON) { w.Addresses = []string{"host:0"} }), "address 1"},
		"port by name":         {edit(func(w *tokenJSON) { w.Addresses = []string{"host:https"} }), "address 1"},
		"control characters":   {edit(func(w *tokenJSON) { w.Addresses = []string{"ho\nst:1"} }), "address 1"},
		"pin missing":          {edit(func(w *tokenJSON) { w.Pin = "" }), "CA pin"},
		"pin too short":        {edit(func(w *tokenJSON) { w.Pin = w.Pin[:70] }), "CA pin"},
		"pin in capitals":      {edit(func(w *tokenJSON) { w.Pin = "sha256:" + strings.Repeat("AB", 32) }), "CA pin"},
		"secret missing":       {edit(func(w *tokenJSON) { w.Secret = "" }), "secret"},
		"secret too short":     {edit(func(w *tokenJSON) { w.Secret = "AAAA" }), "secret"},
		"purpose unknown":      {edit(func(w *tokenJSON) { w.Purpose = "admin" }), "purpose"},
	} {
		t.Run(name, func(t *testing.T) {
			tok, err := ParseToken(row.in)
			if !errors.Is(err, identity.ErrInvalid) || !strings.Contains(err.Error(), row.says) {
				t.Fatalf("%v, %v does not say %q", tok, err, row.says)
			}
			if tok.Secret != "" || strings.Contains(err.Error(), good.Secret) || len(row.in) > 40 && strings.Contains(err.Error(), row.in[20:36]) || len(err.Error()) > 400 {
				t.Errorf("the error tells too much: %.400s", err)
			}
		})
	}
	long := good
	long.Addresses = nil
	for i := range 16 {
		long.Addresses = append(long.Addresses, fmt.Sprintf("%s%02d:8443", strings.Repeat("a", 240), i))
	}
	if s, err := FormatToken(long); !errors.Is(err, identity.ErrInvalid) || s != "" {
		t.Errorf("a token too long to be read was made: %v", err)
	}
	bad := good
	bad.Pin = "x"
	if s, err := FormatToken(bad); !errors.Is(err, identity.ErrInvalid) || s != "" {
		t.Errorf("a token that cannot be read was made: %v", err)
	}
}

func FuzzParseJoinToken(f *testing.F) {
	seeds, err := os.ReadDir("testdata/fuzz/FuzzParseJoinToken")
	if err != nil || len(seeds) < 3 {
		f.Fatalf("fuzz seeds: %d found, %v", len(seeds), err)
	}
	f.Fuzz(func(t *testing.T, in string) {
		tok, err := ParseToken(in)
		if err != nil {
			if !errors.Is(err, identity.ErrInvalid) || len(err.Error()) > 400 {
				t.Fatalf("error: %v", err)
			}
			return
		}
		out, err := FormatToken(tok)
		if err != nil {
			// JSON escapes may make it longer than what was read.
			if len(in) < MaxTokenString/2 {
				t.Fatalf("formatting what was parsed: %v", err)
			}
			return
		}
		again, err := ParseToken(out)
		if err != nil || !reflect.DeepEqual(tok, again) {
			t.Fatalf("%v, then %v, %v", tok, again, err)
		}
	})
}
