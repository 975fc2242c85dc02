package federation

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"countersign.io/countersign/identity"
)

// MaxDocument bounds a bundle document, in bytes. Real ones are a few KiB.
const MaxDocument = 1 << 20

const (
	useX509 = "x509-svid"
	useJWT  = "jwt-svid"
)

// document is the SPIFFE bundle format (SPIFFE Trust Domain and Bundle, section 4).
type document struct {
	Keys        []jose.JSONWebKey `json:"keys"` // never null: it must be there (section 4.1.3)
	Sequence    uint64            `json:"spiffe_sequence"`
	RefreshHint int64             `json:"spiffe_refresh_hint"` // seconds
}

// Marshal writes the document of a bundle. The same bundle gives the same bytes, on every member.
func Marshal(b *identity.Bundle, hint time.Duration) ([]byte, error) {
	doc := document{Keys: []jose.JSONWebKey{}, Sequence: b.Sequence, RefreshHint: int64((hint + time.Second - 1) / time.Second)}
	for i, der := range b.X509 {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("writing the bundle's document: X.509 authority %d: %w", i+1, err)
		}
		doc.Keys = append(doc.Keys, jose.JSONWebKey{Key: c.PublicKey, Certificates: []*x509.Certificate{c}, Use: useX509})
	}
	for _, kid := range slices.Sorted(maps.Keys(b.JWT)) {
		key, err := x509.ParsePKIXPublicKey(b.JWT[kid])
		if err != nil {
			return nil, fmt.Errorf("writing the bundle's document: JWT authority %q: %w", kid, err)
		}
		doc.Keys = append(doc.Keys, jose.JSONWebKey{Key: key, KeyID: kid, Use: useJWT})
	}
	raw, err := json.Marshal(doc)
	if err != nil {
		return nil, fmt.Errorf("writing the bundle's document: %w", err)
	}
	return raw, nil
}

// Parse reads the document of another trust domain's bundle. What it does not know, it ignores: other parameters, keys of
// another type or another use. What it knows must be right: one fault refuses the whole, since a bundle that is taken in part
// is another bundle. Its errors wrap identity.ErrInvalid.
func Parse(td spiffeid.TrustDomain, raw []byte) (*identity.Bundle, error) {
	b, err := parse(td, raw)
	if err != nil {
		return nil, fmt.Errorf("%w: the bundle's document: %w", identity.ErrInvalid, err)
	}
	return b, nil
}

func parse(td spiffeid.TrustDomain, raw []byte) (*identity.Bundle, error) {
	if len(raw) > MaxDocument {
		return nil, fmt.Errorf("it has more than %d bytes", MaxDocument)
	}
	if !utf8.Valid(raw) {
		return nil, errors.New("it is not UTF-8")
	}
	var doc struct {
		Keys        *[]json.RawMessage `json:"keys"`
		Sequence    *uint64            `json:"spiffe_sequence"`
		RefreshHint *int64             `json:"spiffe_refresh_hint"`
	}
	dec := json.NewDecoder(bytes.NewReader(raw))
	if err := dec.Decode(&doc); err != nil {
		return nil, fmt.Errorf("it is no JSON Web Key Set: %w", plain(err))
	}
	if _, err := dec.Token(); err != io.EOF {
		return nil, errors.New("there is something after its end")
	}
	if doc.Keys == nil {
		return nil, errors.New(`it has no "keys": a trust domain that revokes all of them says so with an empty list`)
	}
	if len(*doc.Keys) > maxKeys {
		return nil, fmt.Errorf("it has %d keys: at the most %d", len(*doc.Keys), maxKeys)
	}
	b := &identity.Bundle{TrustDomain: td, JWT: map[string][]byte{}}
	if doc.Sequence != nil {
		b.Sequence = *doc.Sequence
	}
	if doc.RefreshHint != nil {
		if *doc.RefreshHint < 0 || *doc.RefreshHint > maxHintSeconds {
			return nil, fmt.Errorf("a refresh hint of %d s", *doc.RefreshHint)
		}
		b.RefreshHint = time.Duration(*doc.RefreshHint) * time.Second
	}
	for i, k := range *doc.Keys {
		if err := addKey(b, k); err != nil {
			return nil, fmt.Errorf("key %d: %w", i+1, err)
		}
	}
	slices.SortFunc(b.X509, bytes.Compare)
	b.X509 = slices.CompactFunc(b.X509, bytes.Equal)
	return b, CheckBounds(b)
}

const (
	maxKeys        = 4 * (identity.MaxFederatedX509 + identity.MaxFederatedJWT) // some may be of no use here
	maxHintSeconds = 10 * 365 * 24 * 3600
)

// CheckBounds refuses a bundle that is larger than every agent is to hold.
func CheckBounds(b *identity.Bundle) error {
	size := 0
	for _, der := range b.X509 {
		size += len(der)
	}
	for kid, der := range b.JWT {
		size += len(kid) + len(der)
	}
	if len(b.X509) > identity.MaxFederatedX509 || len(b.JWT) > identity.MaxFederatedJWT || size > identity.MaxFederatedBytes {
		return fmt.Errorf("it has %d X.509 and %d JWT authorities with %d bytes: at the most %d, %d and %d",
			len(b.X509), len(b.JWT), size, identity.MaxFederatedX509, identity.MaxFederatedJWT, identity.MaxFederatedBytes)
	}
	return nil
}

// addKey takes one key, or ignores it.
func addKey(b *identity.Bundle, raw json.RawMessage) error {
	var k struct {
		Type  string   `json:"kty"`
		Use   string   `json:"use"`
		Chain []string `json:"x5c"`
	}
	if err := json.Unmarshal(raw, &k); err != nil {
		return fmt.Errorf("it is no JSON Web Key: %w", plain(err))
	}
	if k.Type != "EC" && k.Type != "RSA" && (k.Type != "OKP" || k.Use != useX509) || k.Use != useX509 && k.Use != useJWT {
		return nil // section 4.2: unknown types and uses are ignored
	}
	if k.Use == useX509 {
		return addX509(b, k.Chain)
	}
	var jwk jose.JSONWebKey
	if err := jwk.UnmarshalJSON(raw); err != nil {
		return plain(err)
	}
	if !jwk.Valid() || !jwk.IsPublic() {
		return errors.New("it is not a public key")
	}
	return addJWT(b, &jwk)
}

// addX509 takes a root: exactly one certificate, of a CA, that names no other trust domain (X509-SVID, section 6.1; the key's
// other parameters repeat what is in the certificate, and are not read).
func addX509(b *identity.Bundle, chain []string) error {
	if len(chain) != 1 {
		return fmt.Errorf("a key for %s with %d certificates in x5c: want exactly one", useX509, len(chain))
	}
	der, err := base64.StdEncoding.Strict().DecodeString(chain[0])
	if err != nil {
		return fmt.Errorf("its certificate: %w", err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return fmt.Errorf("its certificate: %w", err)
	}
	if !c.BasicConstraintsValid || !c.IsCA || c.KeyUsage != 0 && c.KeyUsage&x509.KeyUsageCertSign == 0 {
		return errors.New("its certificate is not a CA's: trusted as it is, it would vouch for itself alone")
	}
	for _, u := range c.URIs {
		if u.Scheme != "spiffe" {
			continue
		}
		if id, err := spiffeid.FromURI(u); err != nil || id.TrustDomain() != b.TrustDomain {
			return fmt.Errorf("its certificate is that of %s, not of trust domain %q: the keys of different trust domains are never mixed", cut(u.String(), 300), b.TrustDomain.Name())
		}
	}
	b.X509 = append(b.X509, der)
	return nil
}

func addJWT(b *identity.Bundle, jwk *jose.JSONWebKey) error {
	if jwk.KeyID == "" || len(jwk.KeyID) > identity.MaxFederatedKeyID {
		return fmt.Errorf("a key for %s with a kid of %d bytes: want 1 to %d", useJWT, len(jwk.KeyID), identity.MaxFederatedKeyID)
	}
	switch key := jwk.Key.(type) {
	case *ecdsa.PublicKey:
		if key.Curve.Params().BitSize < 256 {
			return fmt.Errorf("key %q: a curve of %d bits", cut(jwk.KeyID, 100), key.Curve.Params().BitSize)
		}
	case *rsa.PublicKey:
		if n := key.N.BitLen(); n < 2048 || n > 8192 {
			return fmt.Errorf("key %q: RSA of %d bits: want 2048 to 8192", cut(jwk.KeyID, 100), n)
		}
	default:
		return fmt.Errorf("key %q: a %T signs no JWT-SVID", cut(jwk.KeyID, 100), jwk.Key)
	}
	der, err := x509.MarshalPKIXPublicKey(jwk.Key)
	if err != nil {
		return fmt.Errorf("key %q: %w", cut(jwk.KeyID, 100), err)
	}
	if old, ok := b.JWT[jwk.KeyID]; ok && !bytes.Equal(old, der) {
		return fmt.Errorf("two keys with the kid %q", cut(jwk.KeyID, 100))
	}
	b.JWT[jwk.KeyID] = der
	return nil
}

// plain is an error without what it quotes of the document, which may be of any length and hold anything.
func plain(err error) error { return errors.New(cut(err.Error(), 200)) }

func cut(s string, n int) string {
	if len(s) <= n {
		return s
	}
	return strings.ToValidUTF8(s[:n], "") + "..."
}
