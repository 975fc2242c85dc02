package federation

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"

	"countersign.io/countersign/identity"
)

// What consumers of JWTs that know nothing of SPIFFE read, behind the issuer's URL: OpenID Connect Discovery 1.0, section 4, and
// the keys that it leads to.
const (
	DiscoveryPath = "/.well-known/openid-configuration"
	KeysPath      = "/keys"
)

// OIDCConfig configures the discovery document and the keys.
type OIDCConfig struct {
	// Issuer is the iss of the tokens: https, without a slash at its end.
	Issuer string
	// Bundle is as EndpointConfig has it.
	Bundle func() *identity.Bundle
	// MaxAge is how long consumers may keep the keys without asking again. A new key must be in the bundle for longer before it
	// signs: see PublishAhead.
	MaxAge time.Duration
	Log    *slog.Logger
}

// PublishAhead is how long a new key must be published before it signs, where consumers may keep the keys for maxAge: a cache on
// the way may have had them for as long already, and not every consumer counts that.
func PublishAhead(maxAge time.Duration) time.Duration { return 2 * maxAge }

// NewDiscovery makes the handler of DiscoveryPath. It says as much as is true: there is no authorization endpoint, and nobody logs in
// here.
func NewDiscovery(cfg OIDCConfig) (http.Handler, error) {
	if err := identity.CheckIssuer(cfg.Issuer); err != nil {
		return nil, fmt.Errorf("making the discovery document: %w", err)
	}
	raw, err := json.Marshal(struct {
		Issuer        string   `json:"issuer"`
		Keys          string   `json:"jwks_uri"`
		ResponseTypes []string `json:"response_types_supported"`
		SubjectTypes  []string `json:"subject_types_supported"`
		Algorithms    []string `json:"id_token_signing_alg_values_supported"`
		Claims        []string `json:"claims_supported"`
	}{
		cfg.Issuer, cfg.Issuer + KeysPath, []string{"id_token"}, []string{"public"}, []string{string(jose.ES256), string(jose.RS256)},
		[]string{"iss", "sub", "aud", "iat", "exp"},
	})
	if err != nil {
		return nil, fmt.Errorf("making the discovery document: %w", err)
	}
	return &endpoint{bundle: cfg.Bundle, log: cfg.Log, fresh: cfg.MaxAge, anyone: true, marshal: func(*identity.Bundle) ([]byte, error) { return raw, nil }}, nil
}

// NewKeys makes the handler of KeysPath: the trust domain's own JWT keys, prepared ones too, and no other. Common libraries refuse
// keys with the use that the SPIFFE bundle gives them, so here they are for signatures, with their algorithm.
func NewKeys(cfg OIDCConfig) http.Handler {
	return &endpoint{bundle: cfg.Bundle, log: cfg.Log, fresh: cfg.MaxAge, anyone: true, marshal: marshalKeys}
}

func marshalKeys(b *identity.Bundle) ([]byte, error) {
	set := jose.JSONWebKeySet{Keys: []jose.JSONWebKey{}}
	for _, kid := range slices.Sorted(maps.Keys(b.JWT)) {
		key, err := x509.ParsePKIXPublicKey(b.JWT[kid])
		if err != nil {
			return nil, fmt.Errorf("writing the keys: JWT authority %q: %w", kid, err)
		}
		alg, ok := algorithmOf(key)
		if !ok {
			continue // of a cluster below or above, and of no use to those who read this
		}
		set.Keys = append(set.Keys, jose.JSONWebKey{Key: key, KeyID: kid, Use: "sig", Algorithm: string(alg)})
	}
	raw, err := json.Marshal(set)
	if err != nil {
		return nil, fmt.Errorf("writing the keys: %w", err)
	}
	return raw, nil
}

func algorithmOf(key crypto.PublicKey) (jose.SignatureAlgorithm, bool) {
	switch k := key.(type) {
	case *rsa.PublicKey:
		return jose.RS256, true
	case *ecdsa.PublicKey:
		switch k.Curve {
		case elliptic.P256():
			return jose.ES256, true
		case elliptic.P384():
			return jose.ES384, true
		case elliptic.P521():
			return jose.ES512, true
		}
	}
	return "", false
}

// OIDCPaths are where the two documents of an issuer are served: behind its own path, if it has one.
func OIDCPaths(issuer string) (discovery, keys string) {
	_, rest, _ := strings.Cut(issuer, "://")
	_, path, ok := strings.Cut(rest, "/")
	if ok {
		path = "/" + path
	}
	return path + DiscoveryPath, path + KeysPath
}
