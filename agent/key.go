package agent

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"fmt"
	"runtime"

	"countersign.io/countersign/identity"
)

// KeyType is the kind of key that the agent makes for workloads.
type KeyType string

// The key types.
const (
	KeyP256    KeyType = "ec-p256" // the default
	KeyP384    KeyType = "ec-p384"
	KeyEd25519 KeyType = "ed25519"
	KeyRSA2048 KeyType = "rsa-2048"
)

func (t KeyType) check() error {
	switch t {
	case KeyP256, KeyP384, KeyEd25519, KeyRSA2048:
		return nil
	}
	return fmt.Errorf("%w: key type %q: want %s, %s, %s or %s", identity.ErrInvalid, string(t), KeyP256, KeyP384, KeyEd25519, KeyRSA2048)
}

func (t KeyType) make() (key crypto.Signer, err error) {
	switch t {
	case KeyP384:
		return ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	case KeyEd25519:
		_, key, err = ed25519.GenerateKey(rand.Reader)
		return key, err
	case KeyRSA2048:
		return rsa.GenerateKey(rand.Reader, 2048)
	}
	return ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
}

// keysAtOnce is how many keys may be made at once: RSA takes a core for a tenth of a second, and one must stay free.
func keysAtOnce() int { return max(1, runtime.GOMAXPROCS(0)-1) }

// keyPair is a new key as bytes: nothing parsed is kept for longer than it takes.
type keyPair struct {
	private []byte // PKCS #8 DER
	public  []byte // PKIX DER
}

func (t KeyType) makePair() (keyPair, error) {
	key, err := t.make()
	if err != nil {
		return keyPair{}, fmt.Errorf("making a %s key: %w", t, err)
	}
	var p keyPair
	if p.private, err = x509.MarshalPKCS8PrivateKey(key); err != nil {
		return keyPair{}, fmt.Errorf("encoding a %s key: %w", t, err)
	}
	if p.public, err = x509.MarshalPKIXPublicKey(key.Public()); err != nil {
		return keyPair{}, fmt.Errorf("encoding a %s public key: %w", t, err)
	}
	return p, nil
}
