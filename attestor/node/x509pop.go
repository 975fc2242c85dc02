package node

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"time"

	"countersign.io/countersign/identity"
)

// Limits of an x509pop exchange.
const (
	ChallengeBytes = 32
	maxChain       = 8
	maxCertBytes   = 16 << 10
	maxSignature   = 1 << 10 // RSA-8192
	minRSABits     = 2048
	maxRSABits     = 8192
)

// popDomain keeps a signature made here from meaning anything elsewhere. The NUL ends it, so that nothing of what
// follows can be taken for a part of it.
const popDomain = "countersign x509pop 1\x00"

// Challenge makes the random bytes that one x509pop proof must cover. The caller uses it for one proof, once.
func Challenge() []byte {
	b := make([]byte, ChallengeBytes)
	rand.Read(b) // never fails (crypto/rand)
	return b
}

// popMessage is what is signed. It has a fixed length after the domain, so no two (challenge, key) pairs give the same bytes.
// The SVID's public key is in it: who relays a challenge to a node gets a proof for the node's key, not for his own.
func popMessage(challenge, publicKey []byte) []byte {
	h := sha256.Sum256(publicKey)
	m := append([]byte(popDomain), challenge...)
	return append(m, h[:]...)
}

// SignX509Pop is the client's half: the proof that it holds the certificate's key, for one challenge and for the
// public key (PKIX, DER) that the agent's SVID is to have. The key is RSA (PSS), ECDSA or Ed25519.
func SignX509Pop(key crypto.Signer, challenge, publicKey []byte) ([]byte, error) {
	if len(challenge) != ChallengeBytes {
		return nil, fmt.Errorf("proving the x509pop key: %w: a challenge of %d bytes, not %d: is this a Countersign member?", identity.ErrInvalid, len(challenge), ChallengeBytes)
	}
	if err := checkPopKey(key.Public()); err != nil {
		return nil, fmt.Errorf("proving the x509pop key: %w", err)
	}
	m := popMessage(challenge, publicKey)
	digest := sha256.Sum256(m)
	var sig []byte
	var err error
	switch key.Public().(type) {
	case ed25519.PublicKey:
		sig, err = key.Sign(rand.Reader, m, crypto.Hash(0))
	case *rsa.PublicKey:
		sig, err = key.Sign(rand.Reader, digest[:], &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash, Hash: crypto.SHA256})
	default:
		sig, err = key.Sign(rand.Reader, digest[:], crypto.SHA256)
	}
	if err != nil {
		return nil, fmt.Errorf("proving the x509pop key: %w", err)
	}
	return sig, nil
}

func checkPopKey(pub crypto.PublicKey) error {
	switch k := pub.(type) {
	case ed25519.PublicKey, *ecdsa.PublicKey:
		return nil
	case *rsa.PublicKey:
		if n := k.N.BitLen(); n < minRSABits || n > maxRSABits {
			return fmt.Errorf("%w: its RSA key has %d bits: want %d to %d", identity.ErrInvalid, n, minRSABits, maxRSABits)
		}
		return nil
	}
	return fmt.Errorf("%w: its key is a %T: want RSA, ECDSA or Ed25519", identity.ErrInvalid, pub)
}

// VerifyX509Pop is the member's half. The chain (DER, leaf first) must lead to one of the roots, be valid at now and be
// good for client authentication; the signature must be the leaf key's over challenge and publicKey (PKIX, DER, of
// the SVID to be). It returns the leaf's common name as it stands (see NodeNameFromCN before taking it for a node)
// and, in hex, the SHA-256 of what of the leaf is signed: the signature itself is not in it, since anybody can turn
// an ECDSA signature into another good one, and a banned agent would be a new one. Malformed input wraps identity.ErrInvalid, a proof that does not hold
// identity.ErrUnauthenticated, a member without roots identity.ErrPrecondition.
func VerifyX509Pop(chain [][]byte, roots *x509.CertPool, challenge, publicKey, signature []byte, now time.Time) (cn, fingerprint string, err error) {
	leaf, err := VerifyX509PopChain(chain, roots, now)
	if err != nil {
		return "", "", err
	}
	if len(challenge) != ChallengeBytes || len(publicKey) == 0 || len(publicKey) > identity.MaxPublicKeyBytes || len(signature) == 0 || len(signature) > maxSignature {
		return "", "", fmt.Errorf("verifying x509pop proof: %w: challenge of %d, public key of %d, signature of %d bytes", identity.ErrInvalid, len(challenge), len(publicKey), len(signature))
	}
	m := popMessage(challenge, publicKey)
	digest := sha256.Sum256(m)
	ok := false
	switch k := leaf.PublicKey.(type) {
	case ed25519.PublicKey:
		ok = ed25519.Verify(k, m, signature)
	case *ecdsa.PublicKey:
		ok = ecdsa.VerifyASN1(k, digest[:], signature)
	case *rsa.PublicKey:
		ok = rsa.VerifyPSS(k, crypto.SHA256, digest[:], signature, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash}) == nil
	}
	if !ok {
		return "", "", fmt.Errorf("verifying x509pop proof: %w: the signature is not by the key of the certificate of %q over this challenge and public key: does the agent's key file belong to its certificate?", identity.ErrUnauthenticated, leaf.Subject.CommonName)
	}
	h := sha256.Sum256(leaf.RawTBSCertificate)
	return leaf.Subject.CommonName, hex.EncodeToString(h[:]), nil
}

// VerifyX509PopChain does the checks of VerifyX509Pop on the certificates alone, so that a member can refuse a stranger
// before it makes a challenge.
func VerifyX509PopChain(chain [][]byte, roots *x509.CertPool, now time.Time) (*x509.Certificate, error) {
	if roots == nil || roots.Equal(x509.NewCertPool()) {
		return nil, fmt.Errorf("verifying x509pop certificate: %w: this member has no x509pop roots: add the CA of the nodes' certificates to its configuration", identity.ErrPrecondition)
	}
	if len(chain) == 0 || len(chain) > maxChain {
		return nil, fmt.Errorf("verifying x509pop certificate: %w: a chain of %d certificates: want 1 to %d", identity.ErrInvalid, len(chain), maxChain)
	}
	certs := make([]*x509.Certificate, len(chain))
	for i, der := range chain {
		if len(der) > maxCertBytes {
			return nil, fmt.Errorf("verifying x509pop certificate: %w: certificate %d has %d bytes: at the most %d", identity.ErrInvalid, i+1, len(der), maxCertBytes)
		}
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("verifying x509pop certificate: %w: certificate %d: %v", identity.ErrInvalid, i+1, err)
		}
		// Of each, before any signature is checked: under a stranger's RSA key of 100000 bits that takes long.
		if err := checkPopKey(c.PublicKey); err != nil {
			return nil, fmt.Errorf("verifying x509pop certificate: certificate %d: %w", i+1, err)
		}
		certs[i] = c
	}
	leaf := certs[0]
	if leaf.IsCA || leaf.KeyUsage != 0 && leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0 {
		return nil, fmt.Errorf("verifying x509pop certificate: %w: the certificate of %q is a CA's or not for signatures: want a leaf with key usage digitalSignature", identity.ErrUnauthenticated, leaf.Subject.CommonName)
	}
	pool := x509.NewCertPool()
	for _, c := range certs[1:] {
		pool.AddCert(c)
	}
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: pool, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil {
		return nil, fmt.Errorf("verifying x509pop certificate: %w: the certificate of %q: %v: want one under the x509pop roots of this member, valid now, for client authentication", identity.ErrUnauthenticated, leaf.Subject.CommonName, err)
	}
	return leaf, nil
}
