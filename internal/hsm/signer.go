//go:build cgo

package hsm

import (
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
	k := &signer{m: m}
	if err := m.with(k.find); err != nil {
		return nil, err
	}
	return k, nil
}

// CreateSigner makes a P-256 key pair that the token does not give away. One that is there already, with the URI's label
// and ID, is ErrExists.
func CreateSigner(u URI) (crypto.Signer, error) {
	m, err := load(u)
	if err != nil {
		return nil, err
	}
	k := &signer{m: m}
	err = m.with(func(s *session) error {
		if _, err := s.one(pkcs11.CKO_PRIVATE_KEY); err == nil {
			return fmt.Errorf("%w: %s of %s: choose another label, or open it", ErrExists, u.key(), u.token())
		} else if !errors.Is(err, ErrNoKey) {
			return err
		}
		if err := k.make(s); err != nil {
			return err
		}
		return k.find(s)
	})
	if err != nil {
		return nil, err
	}
	return k, nil
}

func p256OID() asn1.ObjectIdentifier { return asn1.ObjectIdentifier{1, 2, 840, 10045, 3, 1, 7} }

func (k *signer) make(s *session) error {
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

// find checks the pair and reads its public half.
func (k *signer) find(s *session) error {
	private, err := s.one(pkcs11.CKO_PRIVATE_KEY)
	if err != nil {
		return err
	}
	public, err := s.one(pkcs11.CKO_PUBLIC_KEY)
	if err != nil {
		return fmt.Errorf("reading the public half: %w", err)
	}
	wrong := fmt.Errorf("%w: key %s of %s is not on P-256", ErrKeyType, s.uri.key(), s.uri.token())
	if kind, ok := s.number(private, pkcs11.CKA_KEY_TYPE); !ok || kind != pkcs11.CKK_EC {
		return wrong
	}
	got, err := s.ctx.GetAttributeValue(s.handle, public, []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_EC_PARAMS, nil), pkcs11.NewAttribute(pkcs11.CKA_EC_POINT, nil),
	})
	if err != nil || len(got) != 2 {
		return fmt.Errorf("%w: reading key %s of %s: %w", ErrToken, s.uri.key(), s.uri.token(), errors.Join(err))
	}
	var oid asn1.ObjectIdentifier
	if rest, err := asn1.Unmarshal(got[0].Value, &oid); err != nil || len(rest) > 0 || !oid.Equal(p256OID()) {
		return wrong
	}
	point := got[1].Value // a DER OCTET STRING, but of some tokens the bare point
	var inner []byte
	if rest, err := asn1.Unmarshal(point, &inner); err == nil && len(rest) == 0 {
		point = inner
	}
	pub, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), point)
	if err != nil {
		return wrong
	}
	k.pub = pub
	return nil
}

// Public returns an *ecdsa.PublicKey.
func (k *signer) Public() crypto.PublicKey { return k.pub }

// Sign signs a digest inside the token, and gives out no signature that does not verify.
func (k *signer) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if opts == nil || opts.HashFunc() == 0 || opts.HashFunc().Size() != len(digest) {
		return nil, errors.New("signing in a token: want a digest and what made it")
	}
	var raw []byte
	err := k.m.with(func(s *session) error {
		h, err := s.one(pkcs11.CKO_PRIVATE_KEY)
		if err != nil {
			return err
		}
		if err := s.ctx.SignInit(s.handle, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_ECDSA, nil)}, h); err != nil {
			return fmt.Errorf("%w: signing in %s: %w", ErrToken, s.uri.token(), err)
		}
		// CKM_ECDSA takes what fits the curve; a longer digest is cut by the caller (FIPS 186-5 section 6.4.1).
		raw, err = s.ctx.Sign(s.handle, digest[:min(len(digest), 32)])
		if err != nil {
			return fmt.Errorf("%w: signing in %s: %w", ErrToken, s.uri.token(), err)
		}
		return nil
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
