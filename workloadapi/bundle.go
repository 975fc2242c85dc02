package workloadapi

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/go-jose/go-jose/v4"

	"countersign.io/countersign/identity"
)

// bundleDocument is the SPIFFE bundle format (Trust Domain and Bundle section 4). Keys is never nil: an empty
// array says that all keys are revoked, and an absent one is an error.
type bundleDocument struct {
	Keys        []jose.JSONWebKey `json:"keys"`
	Sequence    uint64            `json:"spiffe_sequence,omitempty"`
	RefreshHint int64             `json:"spiffe_refresh_hint,omitempty"` // seconds
}

// MarshalBundle is the bundle's SPIFFE document: X.509 and JWT authorities, sequence and refresh hint. It is
// the same bytes for the same bundle. The Workload API serves its JWT keys only.
func MarshalBundle(b *identity.Bundle) ([]byte, error) {
	var keys []jose.JSONWebKey
	for i, der := range b.X509 {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("%w: bundle of %q: parsing X.509 authority %d: %v", identity.ErrInvalid, b.TrustDomain.Name(), i, err)
		}
		// X509-SVID section 6.1: exactly one certificate, and no kid.
		keys = append(keys, jose.JSONWebKey{Key: cert.PublicKey, Certificates: []*x509.Certificate{cert}, Use: "x509-svid"})
	}
	return marshalJWKS(b, append(keys, jwtJWKs(jwtKeys(b))...))
}

func marshalJWKS(b *identity.Bundle, keys []jose.JSONWebKey) ([]byte, error) {
	doc := bundleDocument{Keys: append([]jose.JSONWebKey{}, keys...), Sequence: b.Sequence,
		RefreshHint: int64((b.RefreshHint + time.Second - 1) / time.Second)}
	out, err := json.Marshal(doc)
	if err != nil {
		return nil, fmt.Errorf("marshalling the bundle of %q: %w", b.TrustDomain.Name(), err)
	}
	return out, nil
}

// jwtKeys are the keys that can verify a JWT-SVID. One of a type that is unknown here is left out: a bundle may
// hold such keys, and the others stay good (Trust Domain and Bundle section 4.2).
func jwtKeys(b *identity.Bundle) map[string]crypto.PublicKey {
	keys := make(map[string]crypto.PublicKey, len(b.JWT))
	for kid, der := range b.JWT {
		if kid == "" { // JWT-SVID section 6.1
			continue
		}
		key, err := x509.ParsePKIXPublicKey(der)
		if err != nil {
			continue
		}
		switch key.(type) {
		case *ecdsa.PublicKey, *rsa.PublicKey:
			keys[kid] = key
		}
	}
	return keys
}

func jwtJWKs(keys map[string]crypto.PublicKey) []jose.JSONWebKey {
	var out []jose.JSONWebKey
	for _, kid := range slices.Sorted(maps.Keys(keys)) {
		out = append(out, jose.JSONWebKey{Key: keys[kid], KeyID: kid, Use: "jwt-svid"})
	}
	return out
}
