// Package issuer makes up service account tokens, for the demo, tests and measurements.
package issuer

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
)

// Issuer stands in for a kube API server: it makes the tokens that one would project into pods. Development only: whoever
// holds it can be any pod of its cluster.
type Issuer struct {
	URL      string
	JWKSFile string
	Tokens   string // folder of the pods' tokens
	signer   jose.Signer
}

// New makes an issuer whose keys and tokens live in dir.
func New(dir string) (*Issuer, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("making the issuer's key: %w", err)
	}
	i := &Issuer{URL: "https://issuer.demo.test", JWKSFile: filepath.Join(dir, "jwks.json"), Tokens: filepath.Join(dir, "tokens")}
	jwks, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: "demo", Algorithm: "ES256", Use: "sig"}}})
	if err != nil {
		return nil, fmt.Errorf("encoding the issuer's key: %w", err)
	}
	if err := os.WriteFile(i.JWKSFile, jwks, 0o600); err != nil {
		return nil, fmt.Errorf("writing the issuer's key: %w", err)
	}
	if err := os.Mkdir(i.Tokens, 0o700); err != nil {
		return nil, fmt.Errorf("making the tokens' folder: %w", err)
	}
	i.signer, err = jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: key, KeyID: "demo"}}, nil)
	if err != nil {
		return nil, fmt.Errorf("making the issuer: %w", err)
	}
	return i, nil
}

// Pod makes up a pod and returns the file that holds its token.
func (i *Issuer) Pod(ns, sa, node string) (string, error) {
	token, err := i.Token(ns, sa, node)
	if err != nil {
		return "", err
	}
	file := filepath.Join(i.Tokens, sa)
	if err := os.WriteFile(file, []byte(token), 0o600); err != nil {
		return "", fmt.Errorf("writing a token: %w", err)
	}
	return file, nil
}

// Token makes up a pod and returns its token.
func (i *Issuer) Token(ns, sa, node string) (string, error) {
	var id [16]byte
	rand.Read(id[:])
	h := hex.EncodeToString(id[:])
	uid := func(n int) string { return fmt.Sprintf("%s-%04d-4000-8000-%s", h[:8], n, h[8:20]) }
	now := time.Now()
	claims := map[string]any{
		"iss": i.URL, "aud": []string{"countersign"}, "sub": "system:serviceaccount:" + ns + ":" + sa,
		"iat": now.Unix(), "nbf": now.Unix(), "exp": now.Add(time.Hour).Unix(),
		"kubernetes.io": map[string]any{
			"namespace":      ns,
			"pod":            map[string]string{"name": sa + "-0", "uid": uid(1)},
			"node":           map[string]string{"name": node, "uid": uid(2)},
			"serviceaccount": map[string]string{"name": sa, "uid": uid(3)},
		},
	}
	token, err := jwt.Signed(i.signer).Claims(claims).Serialize()
	if err != nil {
		return "", fmt.Errorf("signing a token: %w", err)
	}
	return token, nil
}
