package ca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"fmt"

	"countersign.io/countersign/identity"
)

// What RSA keys are taken. The exponent's floor is that of NIST SP 800-89 section 5.3.3.
const (
	minRSABits     = 2048
	maxRSABits     = 4096
	minRSAExponent = 65537
)

// ParsePublicKey reads a PKIX SubjectPublicKeyInfo (DER, at the most identity.MaxPublicKeyBytes) and takes what
// CheckPublicKey takes. The error wraps identity.ErrInvalid.
func ParsePublicKey(der []byte) (crypto.PublicKey, error) {
	if len(der) > identity.MaxPublicKeyBytes {
		return nil, fmt.Errorf("%w: public key of %d bytes: at the most %d", identity.ErrInvalid, len(der), identity.MaxPublicKeyBytes)
	}
	pub, err := x509.ParsePKIXPublicKey(der)
	if err != nil {
		return nil, fmt.Errorf("%w: parsing public key: want a PKIX SubjectPublicKeyInfo in DER: %v", identity.ErrInvalid, err)
	}
	if err := CheckPublicKey(pub); err != nil {
		return nil, err
	}
	return pub, nil
}

// CheckPublicKey takes the keys that an X.509-SVID may have: ECDSA on P-256 or P-384 (a point of the curve),
// Ed25519, and RSA of 2048 to 4096 bits with an odd exponent from 65537 up. The error wraps identity.ErrInvalid.
func CheckPublicKey(pub crypto.PublicKey) error {
	switch pub := pub.(type) {
	case *ecdsa.PublicKey:
		if pub == nil || pub.Curve != elliptic.P256() && pub.Curve != elliptic.P384() {
			return fmt.Errorf("%w: public key: ECDSA keys must be on P-256 or P-384", identity.ErrInvalid)
		}
		//lint:ignore SA1019 only whether they are there: Bytes panics when they are not
		if pub.X == nil || pub.Y == nil {
			return fmt.Errorf("%w: public key: the ECDSA key has no point", identity.ErrInvalid)
		}
		if _, err := pub.Bytes(); err != nil { // checks that the point is on the curve, and not infinity
			return fmt.Errorf("%w: public key: %v", identity.ErrInvalid, err)
		}
	case ed25519.PublicKey:
		if len(pub) != ed25519.PublicKeySize {
			return fmt.Errorf("%w: public key: Ed25519 key of %d bytes, not %d", identity.ErrInvalid, len(pub), ed25519.PublicKeySize)
		}
	case *rsa.PublicKey:
		return checkRSA(pub)
	default:
		return fmt.Errorf("%w: public key of type %T: use ECDSA P-256 (the default) or P-384, Ed25519, or RSA-2048", identity.ErrInvalid, pub)
	}
	return nil
}

func checkRSA(pub *rsa.PublicKey) error {
	if pub == nil || pub.N == nil {
		return fmt.Errorf("%w: public key: the RSA key has no modulus", identity.ErrInvalid)
	}
	switch n := pub.N.BitLen(); {
	case pub.N.Sign() <= 0 || pub.N.Bit(0) == 0:
		return fmt.Errorf("%w: public key: the RSA modulus is not a positive odd number", identity.ErrInvalid)
	case n < minRSABits || n > maxRSABits || n%8 != 0:
		return fmt.Errorf("%w: public key: RSA of %d bits: want %d, 3072 or %d", identity.ErrInvalid, n, minRSABits, maxRSABits)
	case pub.E < minRSAExponent || pub.E%2 == 0:
		return fmt.Errorf("%w: public key: RSA exponent %d: want an odd one from %d up, such as 65537", identity.ErrInvalid, pub.E, minRSAExponent)
	}
	return nil
}
