package seal

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"countersign.io/countersign/internal/vault"
)

// transitServer is a transit engine as far as it is used here, behind the HTTP API and TLS that Vault has: it answers in Vault's
// forms, with status 400 for what does not open.
func transitServer(t *testing.T, token string) *httptest.Server {
	aead := func(key string) cipher.AEAD {
		block, err := aes.NewCipher([]byte((key + strings.Repeat("*", 32))[:32]))
		if err != nil {
			t.Error(err)
		}
		a, err := cipher.NewGCMWithRandomNonce(block)
		if err != nil {
			t.Error(err)
		}
		return a
	}
	srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		answer := func(code int, v any) {
			w.WriteHeader(code)
			_ = json.NewEncoder(w).Encode(v)
		}
		if r.Header.Get("X-Vault-Token") != token {
			answer(http.StatusForbidden, map[string]any{"errors": []string{"permission denied"}})
			return
		}
		var in map[string]string
		_ = json.NewDecoder(r.Body).Decode(&in)
		ad, _ := base64.StdEncoding.DecodeString(in["associated_data"])
		op, key, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/v1/transit/"), "/")
		switch {
		case strings.HasPrefix(r.URL.Path, "/v1/auth/token/"):
			answer(http.StatusOK, map[string]any{"data": map[string]any{"ttl": 3600, "renewable": false}, "auth": map[string]any{"client_token": token, "lease_duration": 3600}})
		case op == "encrypt" && key != "":
			plain, err := base64.StdEncoding.DecodeString(in["plaintext"])
			if err != nil {
				answer(http.StatusBadRequest, map[string]any{"errors": []string{"failed to base64-decode plaintext"}})
				return
			}
			answer(http.StatusOK, map[string]any{"data": map[string]any{"ciphertext": "vault:v1:" + base64.StdEncoding.EncodeToString(aead(key).Seal(nil, nil, plain, ad))}})
		case op == "decrypt" && key != "":
			raw, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(in["ciphertext"], "vault:v1:"))
			var plain []byte
			if err == nil {
				plain, err = aead(key).Open(nil, nil, raw, ad)
			}
			if err != nil {
				answer(http.StatusBadRequest, map[string]any{"errors": []string{"cipher: message authentication failed"}})
				return
			}
			answer(http.StatusOK, map[string]any{"data": map[string]any{"plaintext": base64.StdEncoding.EncodeToString(plain)}})
		default:
			answer(http.StatusNotFound, map[string]any{"errors": []string{}})
		}
	}))
	t.Cleanup(srv.Close)
	return srv
}

// TestTransitKEKOverHTTP goes through the real client.
func TestTransitKEKOverHTTP(t *testing.T) {
	ctx := context.Background()
	const token = "s.the-token-of-the-test"
	srv := transitServer(t, token)
	dir := t.TempDir()
	caFile, tokenFile := filepath.Join(dir, "ca.pem"), filepath.Join(dir, "token")
	if err := os.WriteFile(caFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(tokenFile, []byte(token), 0o600); err != nil {
		t.Fatal(err)
	}
	open := func(uri, tokenFile string) KEK {
		t.Helper()
		v, err := vault.New(vault.Config{Address: srv.URL, CAFile: caFile, TokenFile: tokenFile})
		if err != nil {
			t.Fatal(err)
		}
		k, err := OpenKEK(ctx, uri, Options{Vault: v})
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	testKEK(t, open("transit:transit/kek", tokenFile), open("transit:transit/kek", tokenFile), open("transit:transit/other", tokenFile))
	wrapped, err := open("transit:transit/kek", tokenFile).Wrap(ctx, []byte("x"), nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(tokenFile+"2", []byte("s.another-token"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = open("transit:transit/kek", tokenFile+"2").Unwrap(ctx, wrapped, nil)
	if !errors.Is(err, vault.ErrDenied) || errors.Is(err, ErrOpen) || strings.Contains(err.Error(), "another-token") {
		t.Errorf("a token that is refused: %v", err)
	}
	if _, err := open("transit:elsewhere/kek", tokenFile).Unwrap(ctx, wrapped, nil); !errors.Is(err, vault.ErrNotFound) {
		t.Errorf("another mount: %v", err)
	}
	srv.Close()
	if _, err := open("transit:transit/kek", tokenFile).Unwrap(ctx, wrapped, nil); !errors.Is(err, vault.ErrUnavailable) || errors.Is(err, ErrOpen) {
		t.Errorf("a server that is gone: %v", err)
	}
}
