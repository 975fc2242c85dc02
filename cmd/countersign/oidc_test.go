package main

import (
	"crypto/tls"
	"encoding/json"
	"io"
	"net/http"
	"testing"
	"time"

	"countersign.io/countersign/federation"
	"countersign.io/countersign/identity"
)

// TestOIDCIsServed: where there is an issuer, behind its own path, and a rotation waits for who keeps the keys; else nothing of it.
func TestOIDCIsServed(t *testing.T) {
	// It is the documents that are looked at, not the certificate, which is an SVID here.
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}, Timeout: time.Minute}
	get := func(s *side, path string, into any) int {
		t.Helper()
		res, err := client.Get("https://" + s.public + path)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		raw, err := io.ReadAll(res.Body)
		if err != nil {
			t.Fatal(err)
		}
		if res.StatusCode == http.StatusOK {
			if err := json.Unmarshal(raw, into); err != nil {
				t.Fatalf("%s: %v", raw, err)
			}
		}
		return res.StatusCode
	}
	var found struct {
		Issuer string `json:"issuer"`
		Keys   string `json:"jwks_uri"`
	}
	var keys struct {
		Keys []map[string]any `json:"keys"`
	}
	with := newSide(t, "with.test", "public: {listen: PUBLIC}\noidc: {issuer: 'https://id.with.test/a', max_age: 1m}\n")
	if code := get(with, "/a"+federation.DiscoveryPath, &found); code != http.StatusOK || found.Issuer != "https://id.with.test/a" || found.Keys != "https://id.with.test/a/keys" {
		t.Errorf("%d %+v", code, found)
	}
	if code := get(with, "/a"+federation.KeysPath, &keys); code != http.StatusOK || len(keys.Keys) != 1 || keys.Keys[0]["use"] != "sig" || keys.Keys[0]["kid"] == "" {
		t.Errorf("%d %v", code, keys)
	}
	if code := get(with, federation.KeysPath, &keys); code != http.StatusNotFound {
		t.Errorf("without the issuer's path: %d", code)
	}
	without := newSide(t, "without.test", "public: {listen: PUBLIC}\n")
	for _, path := range []string{federation.DiscoveryPath, federation.KeysPath} {
		if code := get(without, path, &keys); code != http.StatusNotFound {
			t.Errorf("%s without an issuer: %d", path, code)
		}
	}
	for _, c := range []struct {
		s    *side
		kind identity.AuthorityKind
		want time.Duration
	}{{with, identity.AuthorityJWT, 2 * time.Minute}, {with, identity.AuthorityX509, 0}, {without, identity.AuthorityJWT, 0}} {
		m := &member{c: c.s.c}
		if got := m.publishAhead(c.kind); got != c.want {
			t.Errorf("%s of %s waits for %v", c.kind, c.s.td, got)
		}
	}
}
