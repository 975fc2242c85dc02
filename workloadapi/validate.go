package workloadapi

import (
	"crypto"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"countersign.io/countersign/identity"
)

// clockSkew is how far another member's clock may be ahead when it says from when a token holds. There is none
// for the end of a token's life.
const clockSkew = 10 * time.Second

// parseID accepts a SPIFFE ID (SPIFFE-ID sections 2 to 2.3).
func parseID(s string) (spiffeid.ID, error) {
	if len(s) > 2048 {
		return spiffeid.ID{}, fmt.Errorf("%w: SPIFFE ID of %d bytes: at the most 2048", identity.ErrInvalid, len(s))
	}
	id, err := spiffeid.FromString(s)
	if err != nil {
		return spiffeid.ID{}, fmt.Errorf("%w: SPIFFE ID %q: %v", identity.ErrInvalid, s, err)
	}
	if n := len(id.TrustDomain().Name()); n > 255 {
		return spiffeid.ID{}, fmt.Errorf("%w: trust domain name of %d bytes: at the most 255", identity.ErrInvalid, n)
	}
	return id, nil
}

func checkAudience(aud string) error {
	if aud == "" {
		return fmt.Errorf("%w: the audience is empty: name who is to accept the token (Workload API section 4.5)", identity.ErrInvalid)
	}
	if len(aud) > identity.MaxAudienceBytes {
		return fmt.Errorf("%w: audience of %d bytes: at the most %d", identity.ErrInvalid, len(aud), identity.MaxAudienceBytes)
	}
	return nil
}

// validateJWT checks a JWT-SVID for the audience (JWT-SVID standard) and returns whose it is and all its
// claims. keys are those of a trust domain by kid, nil when it is not trusted. Errors wrap ErrInvalid and never
// quote the token.
func validateJWT(token, audience string, now time.Time, keys func(spiffeid.TrustDomain) map[string]crypto.PublicKey) (spiffeid.ID, map[string]any, error) {
	id, claims, err := validate(token, audience, now, keys)
	if err != nil {
		return spiffeid.ID{}, nil, fmt.Errorf("%w: JWT-SVID not valid: %v", identity.ErrInvalid, err)
	}
	return id, claims, nil
}

func validate(token, audience string, now time.Time, keys func(spiffeid.TrustDomain) map[string]crypto.PublicKey) (spiffeid.ID, map[string]any, error) {
	var none spiffeid.ID
	if len(token) > identity.MaxTokenBytes {
		return none, nil, fmt.Errorf("it has %d bytes: at the most %d", len(token), identity.MaxTokenBytes)
	}
	if err := checkHeader(token); err != nil {
		return none, nil, err
	}
	// Sections 2.1 and 5.1: compact serialization, and no algorithm but these.
	tok, err := jwt.ParseSigned(token, []jose.SignatureAlgorithm{jose.RS256, jose.RS384, jose.RS512,
		jose.ES256, jose.ES384, jose.ES512, jose.PS256, jose.PS384, jose.PS512})
	if err != nil {
		return none, nil, fmt.Errorf("parsing it: %v", err)
	}
	var unverified struct {
		Subject string `json:"sub"`
	}
	if err := tok.UnsafeClaimsWithoutVerification(&unverified); err != nil {
		return none, nil, fmt.Errorf("reading its claims: %v", err)
	}
	id, err := parseID(unverified.Subject) // it only chooses the keys until the signature is verified
	if err != nil {
		return none, nil, fmt.Errorf("its sub: %v", err)
	}
	of := keys(id.TrustDomain())
	if of == nil {
		return none, nil, fmt.Errorf("there is no bundle for its trust domain %q", id.TrustDomain().Name())
	}
	kid := tok.Headers[0].KeyID
	if kid == "" {
		return none, nil, fmt.Errorf("it has no kid")
	}
	key, ok := of[kid]
	if !ok {
		return none, nil, fmt.Errorf("its kid is not of a key of trust domain %q: it may be signed with a key that was revoked", id.TrustDomain().Name())
	}
	var claims jwt.Claims
	all := map[string]any{}
	if err := tok.Claims(key, &claims, &all); err != nil {
		return none, nil, fmt.Errorf("verifying it: %v", err)
	}
	switch {
	case !slices.Contains(claims.Audience, audience): // section 3.2
		return none, nil, fmt.Errorf("it is for another audience than %q", audience)
	case claims.Expiry == nil: // section 3.3
		return none, nil, fmt.Errorf("it has no exp")
	case !now.Before(claims.Expiry.Time()):
		return none, nil, fmt.Errorf("it expired at %s", claims.Expiry.Time().UTC().Format(time.RFC3339))
	case claims.NotBefore != nil && now.Add(clockSkew).Before(claims.NotBefore.Time()):
		return none, nil, fmt.Errorf("it holds from %s only", claims.NotBefore.Time().UTC().Format(time.RFC3339))
	}
	return id, all, nil
}

// checkHeader refuses every header but alg, kid and typ (section 2), and other types than section 2.3 names.
func checkHeader(token string) error {
	first, _, _ := strings.Cut(token, ".")
	raw, err := base64.RawURLEncoding.DecodeString(first)
	if err != nil {
		return fmt.Errorf("its header is not base64url: it must be in compact serialization")
	}
	var header map[string]json.RawMessage
	if err := json.Unmarshal(raw, &header); err != nil {
		return fmt.Errorf("its header is not a JSON object")
	}
	for name := range header {
		if name != "alg" && name != "kid" && name != "typ" {
			return fmt.Errorf("its header has %q: only alg, kid and typ are allowed", name)
		}
	}
	if typ, ok := header["typ"]; ok && string(typ) != `"JWT"` && string(typ) != `"JOSE"` {
		return fmt.Errorf("its typ is neither JWT nor JOSE")
	}
	return nil
}
