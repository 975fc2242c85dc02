//go:build cgo

package hsm

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/asn1"
	"errors"
	"fmt"
	"io"
	"math/big"

	"github.com/miekg/pkcs11"
)

// signer is a P-256 key in a token.
type signer struct {
	m   *module
	pub *ecdsa.PublicKey
}

// OpenSigner finds a P-256 key pair; ErrNoKey, ErrKeyType. Its private half stays in the token. The signer may be used for
// as long as the process lives: each signature has a session of its own.
func OpenSigner(u URI) (crypto.Signer, error) {
	m, err := load(u)
	if err != nil {
		return nil, err
	}
	pub, err := use(m, findPair)
	if err != nil {
		return nil, err
	}
	return &signer{m, pub}, nil
}

// CreateSigner makes a P-256 key pair that the token does not give away. One that is there already, with the URI's label
// and ID, is ErrExists.
func CreateSigner(u URI) (crypto.Signer, error) {
	m, err := load(u)
	if err != nil {
		return nil, err
	}
	pub, err := use(m, func(s *session) (*ecdsa.PublicKey, error) {
		if _, err := s.one(pkcs11.CKO_PRIVATE_KEY); err == nil {
			return nil, fmt.Errorf("%w: %s of %s: choose another label, or open it", ErrExists, u.key(), u.token())
		} else if !errors.Is(err, ErrNoKey) {
			return nil, err
		}
		if err := makePair(s); err != nil {
			return nil, err
		}
		return findPair(s)
	})
	if err != nil {
		return nil, err
	}
	return &signer{m, pub}, nil
}

func p256OID() asn1.ObjectIdentifier { return asn1.ObjectIdentifier{1, 2, 840, 10045, 3, 1, 7} }

func makePair(s *session) error {
	params, err := asn1.Marshal(p256OID())
	if err != nil {
		return err
	}
	id := s.uri.ID
	if len(id) == 0 {
		id = make([]byte, 16)
		rand.Read(id)
	}
	common := func(more ...*pkcs11.Attribute) []*pkcs11.Attribute {
		return append(more, pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_EC), pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true),
			pkcs11.NewAttribute(pkcs11.CKA_LABEL, s.uri.Object), pkcs11.NewAttribute(pkcs11.CKA_ID, id))
	}
	_, _, err = s.ctx.GenerateKeyPair(s.handle, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_EC_KEY_PAIR_GEN, nil)},
		common(pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY), pkcs11.NewAttribute(pkcs11.CKA_VERIFY, true), pkcs11.NewAttribute(pkcs11.CKA_EC_PARAMS, params)),
		common(pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY), pkcs11.NewAttribute(pkcs11.CKA_SIGN, true), pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true),
			pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, true), pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, false)))
	if err != nil {
		return fmt.Errorf("%w: making P-256 key %s in %s: %w", ErrToken, s.uri.key(), s.uri.token(), err)
	}
	return nil
}

// findPair checks the pair and reads its public half.
func findPair(s *session) (*ecdsa.PublicKey, error) {
	private, err := s.one(pkcs11.CKO_PRIVATE_KEY)
	if err != nil {
		return nil, err
	}
	public, err := s.one(pkcs11.CKO_PUBLIC_KEY)
	if err != nil {
		return nil, fmt.Errorf("reading the public half: %w", err)
	}
	wrong := fmt.Errorf("%w: key %s of %s is not on P-256", ErrKeyType, s.uri.key(), s.uri.token())
	if kind, ok := s.number(private, pkcs11.CKA_KEY_TYPE); !ok || kind != pkcs11.CKK_EC {
		return nil, wrong
	}
	got, err := s.ctx.GetAttributeValue(s.handle, public, []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_EC_PARAMS, nil), pkcs11.NewAttribute(pkcs11.CKA_EC_POINT, nil),
	})
	if err != nil || len(got) != 2 {
		return nil, fmt.Errorf("%w: reading key %s of %s: %w", ErrToken, s.uri.key(), s.uri.token(), errors.Join(err))
	}
	var oid asn1.ObjectIdentifier
	if rest, err := asn1.Unmarshal(got[0].Value, &oid); err != nil || len(rest) > 0 || !oid.Equal(p256OID()) {
		return nil, wrong
	}
	point := got[1].Value // a DER OCTET STRING, but of some tokens the bare point
	var inner []byte
	if rest, err := asn1.Unmarshal(point, &inner); err == nil && len(rest) == 0 {
		point = inner
	}
	pub, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), point)
	if err != nil {
		return nil, wrong
	}
	return pub, nil
}

// Public returns an *ecdsa.PublicKey.
func (k *signer) Public() crypto.PublicKey { return k.pub }

// Sign signs a digest inside the token, and gives out no signature that does not verify.
func (k *signer) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if opts == nil || opts.HashFunc() == 0 || opts.HashFunc().Size() != len(digest) {
		return nil, errors.New("signing in a token: want a digest and what made it")
	}
	digest = bytes.Clone(digest)
	raw, err := use(k.m, func(s *session) ([]byte, error) {
		h, err := s.one(pkcs11.CKO_PRIVATE_KEY)
		if err != nil {
			return nil, err
		}
		if err := s.ctx.SignInit(s.handle, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_ECDSA, nil)}, h); err != nil {
			return nil, fmt.Errorf("%w: signing in %s: %w", ErrToken, s.uri.token(), err)
		}
		// CKM_ECDSA takes what fits the curve; a longer digest is cut by the caller (FIPS 186-5 section 6.4.1).
		sig, err := s.ctx.Sign(s.handle, digest[:min(len(digest), 32)])
		if err != nil {
			return nil, fmt.Errorf("%w: signing in %s: %w", ErrToken, s.uri.token(), err)
		}
		return sig, nil
	})
	if err != nil {
		return nil, err
	}
	if len(raw) != 64 {
		return nil, fmt.Errorf("%w: it gave a signature of %d bytes, not 64", ErrToken, len(raw))
	}
	sig, err := asn1.Marshal(struct{ R, S *big.Int }{new(big.Int).SetBytes(raw[:32]), new(big.Int).SetBytes(raw[32:])})
	if err != nil {
		return nil, err
	}
	if !ecdsa.VerifyASN1(k.pub, digest, sig) {
		return nil, fmt.Errorf("%w: key %s of %s signs with another key than its public half says", ErrKeyType, k.m.uri.key(), k.m.uri.token())
	}
	return sig, nil
}
