package ca

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"strings"
	"time"

	casapi "github.com/smallstep/certificates/cas/apiv1"
	"github.com/smallstep/certificates/cas/softcas"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	kmsapi "go.step.sm/crypto/kms/apiv1"
	"go.step.sm/crypto/kms/softkms"
	"go.step.sm/crypto/x509util"

	"countersign.io/countersign/identity"
)

// The algorithms of a JWT authority.
const (
	ES256 = "ES256"
	RS256 = "RS256"
)

// checkTrustDomain refuses the few trust domain names that SPIFFE allows and RFC 5280 section 4.2.1.10 cannot put
// into a URI name constraint: certificates under such an issuer verify nowhere.
func checkTrustDomain(td spiffeid.TrustDomain) error {
	name := td.Name()
	switch {
	case td.IsZero():
		return fmt.Errorf("%w: no trust domain", identity.ErrInvalid)
	case net.ParseIP(name) != nil:
		return fmt.Errorf("%w: trust domain %q is an IP address, which certificates cannot be constrained to: use a name such as example.org", identity.ErrInvalid, name)
	case strings.HasPrefix(name, "."), strings.HasSuffix(name, "."), strings.Contains(name, ".."):
		return fmt.Errorf("%w: trust domain %q has an empty label, which certificates cannot be constrained to: use a name such as example.org", identity.ErrInvalid, name)
	}
	return nil
}

// NewX509Authority makes a root of the trust domain: P-256, self-signed, valid from shortly before now until now+ttl.
// The record is active and has no SealedKey: seal pkcs8 (PKCS #8 DER) into it, and clear pkcs8.
func NewX509Authority(td spiffeid.TrustDomain, ttl time.Duration, now time.Time) (a identity.Authority, pkcs8 []byte, err error) {
	return newX509Authority(td, kmsapi.ECDSAWithSHA256, ttl, now)
}

// NewX509AuthorityAt makes a root of the trust domain, as NewX509Authority does, with a key that stays where it is: in
// the KMS or HSM at uri, which every member must be able to use. It must be P-256 or P-384. The record is active. Errors
// wrap identity.ErrInvalid where the key or the URI is at fault, and else what the signer says.
func NewX509AuthorityAt(td spiffeid.TrustDomain, signer crypto.Signer, uri string, ttl time.Duration, now time.Time) (identity.Authority, error) {
	a, err := newX509AuthorityAt(td, signer, uri, ttl, now)
	if err != nil {
		return identity.Authority{}, fmt.Errorf("making an x509 authority with the key at %s: %w", uri, err)
	}
	return a, nil
}

func newX509AuthorityAt(td spiffeid.TrustDomain, signer crypto.Signer, uri string, ttl time.Duration, now time.Time) (a identity.Authority, err error) {
	if err := checkAuthorityTTL(td, ttl); err != nil {
		return a, err
	}
	if uri == "" || signer == nil {
		return a, fmt.Errorf("%w: no key, or no URI to find it by", identity.ErrInvalid)
	}
	pub := signer.Public()
	if !isEC(pub) {
		return a, fmt.Errorf("%w: it is a %T that is not P-256 or P-384: make another key", identity.ErrInvalid, pub)
	}
	tmpl := rootTemplate(td, ttl, now)
	if tmpl.SubjectKeyId, err = x509util.GenerateSubjectKeyID(pub); err != nil {
		return a, fmt.Errorf("%w: identifying the key: %v", identity.ErrInvalid, err)
	}
	// x509 verifies the signature, so that a KMS that signs with another key is found out here.
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, pub, signer)
	if err != nil {
		return a, fmt.Errorf("signing: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return a, fmt.Errorf("parsing what was signed: %w", err)
	}
	if err := asError(Lint(td, cert, KindRoot)); err != nil {
		return a, err
	}
	a = x509Record(cert)
	a.KeyURI = uri
	if a.PublicKey, err = x509.MarshalPKIXPublicKey(pub); err != nil {
		return identity.Authority{}, fmt.Errorf("encoding its public key: %w", err)
	}
	return a, nil
}

// x509Record is an active authority's record, without its key.
func x509Record(cert *x509.Certificate) identity.Authority {
	return identity.Authority{
		ID:        hex.EncodeToString(cert.SubjectKeyId),
		Kind:      identity.AuthorityX509,
		State:     identity.AuthorityActive,
		Cert:      cert.Raw,
		NotBefore: cert.NotBefore,
		NotAfter:  cert.NotAfter,
	}
}

func checkAuthorityTTL(td spiffeid.TrustDomain, ttl time.Duration) error {
	if err := checkTrustDomain(td); err != nil {
		return err
	}
	if ttl < identity.MinTTL {
		return fmt.Errorf("%w: TTL %v: at least %v", identity.ErrInvalid, ttl, identity.MinTTL)
	}
	return nil
}

func rootTemplate(td spiffeid.TrustDomain, ttl time.Duration, now time.Time) *x509.Certificate {
	return caTemplate(td, td.Name(), now.Add(-backdate), now.Add(ttl))
}

func newX509Authority(td spiffeid.TrustDomain, alg kmsapi.SignatureAlgorithm, ttl time.Duration, now time.Time) (a identity.Authority, pkcs8 []byte, err error) {
	if err := checkAuthorityTTL(td, ttl); err != nil {
		return a, nil, fmt.Errorf("making an x509 authority: %w", err)
	}
	tmpl := rootTemplate(td, ttl, now)
	resp, err := createCA(&casapi.CreateCertificateAuthorityRequest{
		Type: casapi.RootCA, Template: tmpl, Lifetime: ttl,
		CreateKey: &kmsapi.CreateKeyRequest{SignatureAlgorithm: alg},
	})
	if err != nil {
		return a, nil, fmt.Errorf("making an x509 authority: %w", err)
	}
	defer forget(resp.PrivateKey)
	// Nobody trusts the key yet, so here the lint may come after the signature.
	if err := asError(Lint(td, resp.Certificate, KindRoot)); err != nil {
		return a, nil, fmt.Errorf("making an x509 authority: %w", err)
	}
	return newAuthority(x509Record(resp.Certificate), resp.PublicKey, resp.PrivateKey)
}

// NewJWTAuthority makes a JWT signing key of the trust domain for alg, ES256 or RS256 (RSA-2048), to be used from
// now until now+ttl. The record is active and has no SealedKey: seal pkcs8 (PKCS #8 DER) into it, and clear pkcs8.
func NewJWTAuthority(alg string, ttl time.Duration, now time.Time) (a identity.Authority, pkcs8 []byte, err error) {
	req := &kmsapi.CreateKeyRequest{SignatureAlgorithm: kmsapi.ECDSAWithSHA256}
	switch alg {
	case ES256:
	case RS256:
		req.SignatureAlgorithm, req.Bits = kmsapi.SHA256WithRSA, minRSABits
	default:
		return a, nil, fmt.Errorf("making a JWT authority: %w: algorithm %q: want %s or %s", identity.ErrInvalid, alg, ES256, RS256)
	}
	if ttl < identity.MinTTL {
		return a, nil, fmt.Errorf("making a JWT authority: %w: TTL %v: at least %v", identity.ErrInvalid, ttl, identity.MinTTL)
	}
	keys, err := softkms.New(context.Background(), kmsapi.Options{})
	if err != nil {
		return a, nil, fmt.Errorf("making a JWT authority: %w", err)
	}
	resp, err := keys.CreateKey(req)
	if err != nil {
		return a, nil, fmt.Errorf("making a JWT authority: making its key: %w", err)
	}
	defer forget(resp.PrivateKey)
	return newAuthority(identity.Authority{
		Kind:      identity.AuthorityJWT,
		NotBefore: now.Add(-backdate).UTC().Truncate(time.Second),
		NotAfter:  now.Add(ttl).UTC().Truncate(time.Second),
	}, resp.PublicKey, resp.PrivateKey)
}

// newAuthority completes an active authority's record with its key. A jwt authority's ID comes from the key.
func newAuthority(a identity.Authority, pub crypto.PublicKey, priv crypto.PrivateKey) (identity.Authority, []byte, error) {
	var err error
	a.State = identity.AuthorityActive
	if a.PublicKey, err = x509.MarshalPKIXPublicKey(pub); err != nil {
		return identity.Authority{}, nil, fmt.Errorf("encoding the authority's public key: %w", err)
	}
	if a.Kind == identity.AuthorityJWT {
		sum := sha256.Sum256(a.PublicKey)
		a.ID = hex.EncodeToString(sum[:16])
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(priv)
	if err != nil {
		return identity.Authority{}, nil, fmt.Errorf("encoding the authority's key: %w", err)
	}
	return a, pkcs8, nil
}

// forget clears a key that was only needed to be sealed. It must be ours alone: nobody signs with it afterwards. Go
// may hold further copies that cannot be reached.
func forget(key crypto.PrivateKey) {
	switch key := key.(type) {
	case *ecdsa.PrivateKey:
		//lint:ignore SA1019 there is no other way to clear it
		clear(key.D.Bits())
	case *rsa.PrivateKey:
		clear(key.D.Bits())
		for _, p := range append([]*big.Int{key.Precomputed.Dp, key.Precomputed.Dq, key.Precomputed.Qinv}, key.Primes...) {
			if p != nil {
				clear(p.Bits())
			}
		}
	}
}

// caTemplate is a CA certificate of the trust domain: its SPIFFE ID has no path (X509-SVID section 3.2). The subject
// is there because RFC 5280 section 4.1.2.6 wants a CA to have one, and its serial number is random, so that verifiers
// that look issuers up by name are never between two. softcas changes a template, so make one for each use.
func caTemplate(td spiffeid.TrustDomain, name string, notBefore, notAfter time.Time) *x509.Certificate {
	var unique [8]byte
	rand.Read(unique[:])
	return &x509.Certificate{
		SerialNumber: newSerial(),
		Subject: pkix.Name{
			Organization: []string{"Countersign"},
			CommonName:   name[:min(len(name), 64)], // RFC 5280 appendix A: ub-common-name
			SerialNumber: hex.EncodeToString(unique[:]),
		},
		NotBefore:             notBefore.UTC().Truncate(time.Second),
		NotAfter:              notAfter.UTC().Truncate(time.Second),
		KeyUsage:              x509.KeyUsageCertSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		URIs:                  []*url.URL{td.ID().URL()},
	}
}

// newSerial is a random positive number of 128 bits.
func newSerial() *big.Int {
	for {
		var b [16]byte
		rand.Read(b[:])
		if n := new(big.Int).SetBytes(b[:]); n.BitLen() >= minSerialBits {
			return n
		}
	}
}

func createCA(req *casapi.CreateCertificateAuthorityRequest) (*casapi.CreateCertificateAuthorityResponse, error) {
	keys, err := softkms.New(context.Background(), kmsapi.Options{})
	if err != nil {
		return nil, err
	}
	cas, err := softcas.New(context.Background(), casapi.Options{IsCreator: true, KeyManager: keys})
	if err != nil {
		return nil, err
	}
	return cas.CreateCertificateAuthority(req)
}

// openSigner yields an authority's signer, checked to be the one that the record names.
func openSigner(a *identity.Authority, pub crypto.PublicKey, open func(identity.Authority) (crypto.Signer, error)) (crypto.Signer, error) {
	if open == nil {
		return nil, fmt.Errorf("%w: nothing can open its key", identity.ErrInvalid)
	}
	signer, err := open(*a)
	if err != nil {
		return nil, fmt.Errorf("opening its key: %w", err)
	}
	if signer == nil {
		return nil, fmt.Errorf("%w: opening its key gave none", identity.ErrInvalid)
	}
	if p, ok := signer.Public().(interface{ Equal(crypto.PublicKey) bool }); !ok || !p.Equal(pub) {
		return nil, fmt.Errorf("%w: its key is not the one of its record", identity.ErrInvalid)
	}
	return signer, nil
}

func isEC(pub crypto.PublicKey) bool {
	k, ok := pub.(*ecdsa.PublicKey)
	return ok && (k.Curve == elliptic.P256() || k.Curve == elliptic.P384())
}
