package workloadapi

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"

	"countersign.io/countersign/identity"
)

// JWT-SVID sections 2 to 2.3: no header but alg, kid, typ; no other algorithm; typ JWT or JOSE or absent. (The
// signing side is package ca's 13 and 14.)
func TestValidateHeaders(t *testing.T) {
	d := newDomain("example.org")
	good := "spiffe://example.org/web"
	check := func(token string) error {
		_, _, err := validateJWT(token, "test", time.Now(), keysOf(d))
		return err
	}
	for name, header := range map[string]map[string]any{"JWT": nil, "JOSE": {"typ": "JOSE"}, "no typ": {"typ": nil}} {
		if err := check(d.token(good, nil, header)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, header := range map[string]map[string]any{
		"typ jwt": {"typ": "jwt"}, "typ at+jwt": {"typ": "at+jwt"}, "typ empty": {"typ": ""}, "cty": {"cty": "JWT"}, "x5u": {"x5u": "https://example.org"},
		"private": {"mine": 1}, "jku": {"jku": "https://example.org"},
	} {
		if err := check(d.token(good, nil, header)); !errors.Is(err, identity.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// By hand what no library signs: none, and HMAC keyed with what everybody knows, the public key.
	payload := strings.Split(d.token(good, nil, nil), ".")[1]
	b64 := base64.RawURLEncoding.EncodeToString
	for name, header := range map[string]string{
		"none": `{"alg":"none","kid":"kid-1"}`, "HS256": `{"alg":"HS256","kid":"kid-1","typ":"JWT"}`, "EdDSA": `{"alg":"EdDSA","kid":"kid-1"}`,
		"alg twice": `{"alg":"none","alg":"ES256","kid":"kid-1"}`, "no alg": `{"kid":"kid-1"}`, "crit": `{"alg":"ES256","kid":"kid-1","crit":["b64"],"b64":false}`,
		"alg a number": `{"alg":5,"kid":"kid-1"}`, "a list": `[]`, "null": `null`,
	} {
		signed := b64([]byte(header)) + "." + payload
		mac := hmac.New(sha256.New, d.bundle().JWT["kid-1"])
		mac.Write([]byte(signed))
		for _, sig := range []string{"", b64(mac.Sum(nil))} {
			if err := check(signed + "." + sig); !errors.Is(err, identity.ErrInvalid) {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
	// One algorithm's signature under another's name.
	token := d.token(good, nil, nil)
	for _, alg := range []jose.SignatureAlgorithm{jose.ES384, jose.RS256, jose.PS256} {
		if err := check(b64([]byte(`{"alg":"`+string(alg)+`","kid":"kid-1"}`)) + token[strings.Index(token, "."):]); !errors.Is(err, identity.ErrInvalid) {
			t.Errorf("ES256 as %s: %v", alg, err)
		}
	}
}

// FuzzValidateJWTSVID looks for a token that is accepted here and not by go-spiffe, which has its own parser's rules.
func FuzzValidateJWTSVID(f *testing.F) {
	seeds, err := os.ReadDir("testdata/fuzz/FuzzValidateJWTSVID")
	if err != nil || len(seeds) == 0 {
		f.Fatalf("no seeds: %v", err)
	}
	d := newDomain("example.org")
	token := d.token("spiffe://example.org/web", nil, nil)
	parts := strings.Split(token, ".")
	f.Add(token, "test")
	f.Add(parts[0]+"."+parts[1]+".", "test")
	f.Add(d.token("spiffe://example.org/web", map[string]any{"exp": 1e300, "nbf": -1}, nil), "test")
	f.Add(d.token("spiffe://other.org/web", map[string]any{"aud": ""}, map[string]any{"typ": "x"}), "")
	bundle := jwtbundle.FromJWTAuthorities(d.td, jwtKeys(d.bundle()))
	f.Fuzz(func(t *testing.T, token, audience string) {
		id, claims, err := validateJWT(token, audience, time.Now(), keysOf(d))
		if err != nil {
			if !errors.Is(err, identity.ErrInvalid) || claims != nil || !id.IsZero() {
				t.Fatalf("refused with %v, %v, %v", id, claims, err)
			}
			return
		}
		theirs, err := jwtsvid.ParseAndValidate(token, bundle, []string{audience})
		if err != nil || theirs.ID != id {
			t.Fatalf("accepted as %s; go-spiffe says %v, %v", id, theirs, err)
		}
	})
}
