package ca

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/crypto/cryptobyte"
	"golang.org/x/crypto/cryptobyte/asn1"

	"countersign.io/countersign/identity"
)

// jwtSigner is the trust domain's shared JWT key. It never changes.
type jwtSigner struct {
	kid                 string
	publicKey           []byte // PKIX DER
	key                 crypto.Signer
	header              string // base64url, with the dot behind it
	notBefore, notAfter time.Time
}

func newJWTSigner(a *identity.Authority, open func(identity.Authority) (crypto.Signer, error)) (*jwtSigner, error) {
	pub, err := x509.ParsePKIXPublicKey(a.PublicKey)
	if err != nil {
		return nil, fmt.Errorf("%w: parsing its public key: %v", identity.ErrInvalid, err)
	}
	if a.ID == "" {
		return nil, fmt.Errorf("%w: it has no ID, which tokens carry as kid", identity.ErrInvalid)
	}
	alg, err := jwtAlgorithm(pub)
	if err != nil {
		return nil, err
	}
	key, err := openSigner(a, pub, open)
	if err != nil {
		return nil, err
	}
	header, err := json.Marshal(struct {
		Algorithm jose.SignatureAlgorithm `json:"alg"`
		KeyID     string                  `json:"kid"`
		Type      string                  `json:"typ"`
	}{alg, a.ID, "JWT"})
	if err != nil {
		return nil, fmt.Errorf("encoding the header of its tokens: %w", err)
	}
	return &jwtSigner{
		kid: a.ID, publicKey: a.PublicKey, key: key, header: base64.RawURLEncoding.EncodeToString(header) + ".", notBefore: a.NotBefore, notAfter: a.NotAfter,
	}, nil
}

// sign gives the compact serialization (RFC 7515 section 7.1). The library would encode the header anew each time, which costs
// half as much again as the signature.
func (s *jwtSigner) sign(c *claims) (string, error) {
	payload, err := json.Marshal(c)
	if err != nil {
		return "", fmt.Errorf("encoding the claims: %w", err)
	}
	b := make([]byte, 0, len(s.header)+base64.RawURLEncoding.EncodedLen(len(payload))+1+base64.RawURLEncoding.EncodedLen(512))
	b = append(b, s.header...)
	b = base64.RawURLEncoding.AppendEncode(b, payload)
	sum := sha256.Sum256(b)
	sig, err := s.key.Sign(rand.Reader, sum[:], crypto.SHA256)
	if err != nil {
		return "", err
	}
	if _, ok := s.key.Public().(*ecdsa.PublicKey); ok {
		if sig, err = rawSignature(sig); err != nil {
			return "", err
		}
	}
	return string(base64.RawURLEncoding.AppendEncode(append(b, '.'), sig)), nil
}

// rawSignature is the form of an ES256 signature in a token (RFC 7518 section 3.4): both numbers in 32 bytes each.
func rawSignature(der []byte) ([]byte, error) {
	var r, s big.Int
	in := cryptobyte.String(der)
	var seq cryptobyte.String
	if !in.ReadASN1(&seq, asn1.SEQUENCE) || !in.Empty() || !seq.ReadASN1Integer(&r) || !seq.ReadASN1Integer(&s) || !seq.Empty() {
		return nil, errors.New("the key's signature is not ECDSA's")
	}
	if r.Sign() <= 0 || s.Sign() <= 0 || r.BitLen() > 256 || s.BitLen() > 256 {
		return nil, errors.New("the key's signature is not one of P-256")
	}
	out := make([]byte, 64)
	r.FillBytes(out[:32])
	s.FillBytes(out[32:])
	return out, nil
}

// is reports whether the signer is the record's.
func (s *jwtSigner) is(a *identity.Authority) bool {
	return s != nil && s.kid == a.ID && bytes.Equal(s.publicKey, a.PublicKey) && s.notBefore.Equal(a.NotBefore) && s.notAfter.Equal(a.NotAfter)
}

// jwtAlgorithm is the alg that goes with a key; JWT-SVID section 2.1 has others, which we have no use for.
func jwtAlgorithm(pub crypto.PublicKey) (jose.SignatureAlgorithm, error) {
	if err := CheckPublicKey(pub); err != nil {
		return "", err
	}
	switch pub := pub.(type) {
	case *ecdsa.PublicKey:
		if pub.Curve == elliptic.P256() {
			return jose.ES256, nil
		}
	case *rsa.PublicKey:
		return jose.RS256, nil
	}
	return "", fmt.Errorf("%w: its key is neither P-256 (%s) nor RSA (%s)", identity.ErrInvalid, ES256, RS256)
}

// claims of a JWT-SVID (section 3), and no others; iss is for consumers that know nothing of SPIFFE. The audience is an array even when it has one value, so that
// consumers see one form.
type claims struct {
	Issuer   string   `json:"iss,omitempty"`
	Subject  string   `json:"sub"`
	Audience []string `json:"aud"`
	IssuedAt int64    `json:"iat"` // seconds since 1970
	Expiry   int64    `json:"exp"`
}

// PreparedJWT is a JWT-SVID that was checked and is not signed yet. It is good for one Issue.
type PreparedJWT struct {
	ca     *CA
	signer *jwtSigner
	claims claims
	svid   identity.JWTSVID
	used   atomic.Bool
}

// PrepareJWT checks a request without touching a key. The ID is one of the trust domain's workloads, the audience
// has 1 to identity.MaxAudiences values. A TTL of zero is the default; the token never outlives its key. Errors wrap
// identity.ErrInvalid, identity.ErrDenied (an ID of the cluster's own) or identity.ErrUnavailable (this member
// cannot sign now).
func (c *CA) PrepareJWT(id spiffeid.ID, audience []string, ttl time.Duration) (*PreparedJWT, error) {
	fail := func(err error) (*PreparedJWT, error) {
		return nil, fmt.Errorf("preparing JWT-SVID for %.200q: %w", id, err)
	}
	if err := c.checkID(id); err != nil {
		return fail(err)
	}
	if identity.RoleOf(id) != identity.RoleWorkload {
		return fail(fmt.Errorf("%w: members and agents have no tokens, which whoever sees them could replay", identity.ErrDenied))
	}
	if err := checkAudience(audience); err != nil {
		return fail(err)
	}
	ttl, err := checkTTL(ttl, c.cfg.JWTTTL, identity.MaxJWTTL)
	if err != nil {
		return fail(err)
	}
	now := c.cfg.Now()
	signer, err := c.state.Load().jwtAt(now)
	if err != nil {
		return nil, err
	}
	// Tokens carry whole seconds, so that is what we tell.
	issued := now.UTC().Truncate(time.Second)
	expires := earlier(now.Add(ttl), signer.notAfter).UTC().Truncate(time.Second)
	return &PreparedJWT{
		ca:     c,
		signer: signer,
		claims: claims{Issuer: c.cfg.JWTIssuer, Subject: id.String(), Audience: slices.Clone(audience), IssuedAt: issued.Unix(), Expiry: expires.Unix()},
		svid:   identity.JWTSVID{ID: id, IssuedAt: issued, ExpiresAt: expires},
	}, nil
}

// checkAudience: JWT-SVID section 3.2 wants one at least.
func checkAudience(audience []string) error {
	if len(audience) == 0 {
		return fmt.Errorf("%w: no audience: name who the token is for", identity.ErrInvalid)
	}
	if len(audience) > identity.MaxAudiences {
		return fmt.Errorf("%w: %d audiences: at the most %d", identity.ErrInvalid, len(audience), identity.MaxAudiences)
	}
	for _, a := range audience {
		if a == "" || len(a) > identity.MaxAudienceBytes || !utf8.ValidString(a) {
			return fmt.Errorf("%w: audience %.50q: want 1 to %d bytes of UTF-8", identity.ErrInvalid, a, identity.MaxAudienceBytes)
		}
	}
	return nil
}

// KeyID is the kid of the key that will sign, and ExpiresAt the token's end, for who records it before it is signed.
func (p *PreparedJWT) KeyID() string { return p.signer.kid }

// ExpiresAt is the end of the token's life.
func (p *PreparedJWT) ExpiresAt() time.Time { return p.svid.ExpiresAt }

// Issue signs what was prepared. Only the first call can succeed; the error of another wraps
// identity.ErrPrecondition, and identity.ErrUnavailable says that the trust domain gave the authority up since. The token has the compact serialization and no header but alg, kid and typ (JWT-SVID
// sections 1 and 2).
func (p *PreparedJWT) Issue() (identity.JWTSVID, error) {
	if p == nil || p.signer == nil {
		return identity.JWTSVID{}, errors.New("issuing JWT-SVID: it was not prepared")
	}
	if p.used.Swap(true) {
		return identity.JWTSVID{}, fmt.Errorf("issuing JWT-SVID for %s: %w: it was issued already", p.svid.ID, identity.ErrPrecondition)
	}
	if !p.ca.state.Load().vouched[p.signer.kid] {
		return identity.JWTSVID{}, fmt.Errorf("issuing JWT-SVID for %s: %w: authority %s is no longer trusted: try again", p.svid.ID, identity.ErrUnavailable, p.signer.kid)
	}
	token, err := p.signer.sign(&p.claims)
	if err != nil {
		return identity.JWTSVID{}, fmt.Errorf("issuing JWT-SVID for %s: signing: %w", p.svid.ID, err)
	}
	svid := p.svid
	svid.Token = token
	return svid, nil
}
