package federation

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"net/http"
	"reflect"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"countersign.io/countersign/identity"
)

func (p *partner) oidc() OIDCConfig {
	return OIDCConfig{Issuer: "https://ca.partner.org/a", Bundle: p.bundle, MaxAge: 5 * time.Minute, Log: quiet()}
}

func publicDER(t testing.TB, key any) []byte {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func TestDiscovery(t *testing.T) {
	p := newPartner(t, "partner.org")
	h, err := NewDiscovery(p.oidc())
	if err != nil {
		t.Fatal(err)
	}
	r := ask(t, h, http.MethodGet)
	var doc map[string]any
	if err := json.Unmarshal(body(t, r), &doc); err != nil || r.StatusCode != http.StatusOK || r.Header.Get("Content-Type") != "application/json" || r.Header.Get("Access-Control-Allow-Origin") != "*" {
		t.Fatalf("%d %v %v", r.StatusCode, r.Header, err)
	}
	if doc["issuer"] != "https://ca.partner.org/a" || doc["jwks_uri"] != "https://ca.partner.org/a/keys" || doc["authorization_endpoint"] != nil ||
		!reflect.DeepEqual(doc["response_types_supported"], []any{"id_token"}) || !reflect.DeepEqual(doc["subject_types_supported"], []any{"public"}) {
		t.Errorf("%v", doc)
	}
	for issuer, want := range map[string][2]string{
		"https://ca.partner.org":        {DiscoveryPath, KeysPath},
		"https://ca.partner.org:8444/a": {"/a" + DiscoveryPath, "/a" + KeysPath},
	} {
		if d, k := OIDCPaths(issuer); d != want[0] || k != want[1] {
			t.Errorf("%s: %s and %s", issuer, d, k)
		}
	}
	bad := p.oidc()
	bad.Issuer += "/"
	if _, err := NewDiscovery(bad); err == nil {
		t.Error("an issuer with a slash at its end")
	}
}

// TestKeys: what is not a JWT key of the trust domain's is not there, and what is has the use and the algorithm that libraries ask for.
func TestKeys(t *testing.T) {
	p := newPartner(t, "partner.org")
	h := NewKeys(p.oidc())
	keys := func(header ...string) (set jose.JSONWebKeySet, r *http.Response) {
		t.Helper()
		r = ask(t, h, http.MethodGet, header...)
		if r.StatusCode != http.StatusOK {
			return set, r
		}
		raw := body(t, r)
		if bytes.Contains(raw, []byte("svid")) || bytes.Contains(raw, []byte("x5c")) || bytes.Contains(raw, []byte("spiffe")) {
			t.Errorf("it is SPIFFE's: %s", raw)
		}
		if err := json.Unmarshal(raw, &set); err != nil {
			t.Fatal(err)
		}
		return set, r
	}
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	edwards, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p.change(func(b *identity.Bundle) {
		b.JWT = map[string][]byte{"k1": b.JWT["k1"], "rsa": publicDER(t, rsaKey.Public()), "p384": publicDER(t, p384.Public()), "other": publicDER(t, edwards)}
	})
	set, r := keys()
	got := map[string]string{}
	for _, k := range set.Keys {
		if k.Use != "sig" || !k.IsPublic() || !k.Valid() {
			t.Errorf("%+v", k)
		}
		got[k.KeyID] = k.Algorithm
	}
	if want := map[string]string{"k1": "ES256", "rsa": "RS256", "p384": "ES384"}; !reflect.DeepEqual(got, want) {
		t.Errorf("%v", got)
	}
	if c := r.Header.Get("Cache-Control"); c != "public, must-revalidate, max-age=300" {
		t.Error(c)
	}
	if PublishAhead(p.oidc().MaxAge) <= 5*time.Minute {
		t.Error("a key may sign before those who keep the keys for that long have it")
	}
	etag := r.Header.Get("ETag")
	if _, r := keys("If-None-Match", etag); r.StatusCode != http.StatusNotModified {
		t.Errorf("the same again: %d", r.StatusCode)
	}
	p.change(func(b *identity.Bundle) { b.Sequence++; b.JWT = nil })
	if set, r := keys("If-None-Match", etag); r.StatusCode != http.StatusOK || len(set.Keys) != 0 {
		t.Errorf("all keys are gone: %d %+v", r.StatusCode, set)
	}
	if raw := body(t, ask(t, h, http.MethodGet)); string(raw) != `{"keys":[]}` {
		t.Errorf("without keys: %s", raw)
	}
	if r := ask(t, h, http.MethodPost); r.StatusCode != http.StatusMethodNotAllowed {
		t.Errorf("POST: %d", r.StatusCode)
	}
	p.change(func(b *identity.Bundle) { b.Sequence++; b.JWT = map[string][]byte{"k": {1}} })
	if r := ask(t, h, http.MethodGet); r.StatusCode != http.StatusServiceUnavailable {
		t.Errorf("a key that cannot be read: %d", r.StatusCode)
	}
	p.change(func(b *identity.Bundle) { b.Sequence = 0 })
	if r := ask(t, h, http.MethodGet); r.StatusCode != http.StatusServiceUnavailable {
		t.Errorf("without a bundle: %d", r.StatusCode)
	}
}
