package ca

import (
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"time"

	"countersign.io/countersign/identity"
)

// maxVouched bounds what leads from the pins of earlier roots to the present one: every handshake of a member carries it.
const maxVouched = 4

// Vouch has a self-signed authority vouch for the key of the next one, for whoever knows nothing but the hash of the old key, or of one
// before: the result is for the record's Vouched. It is no part of any SVID, and in no bundle. signer is the old one's. Errors wrap
// identity.ErrInvalid where one of the two is no self-signed x509 authority.
func Vouch(old *identity.Authority, signer crypto.Signer, next *identity.Authority, now time.Time) ([][]byte, error) {
	fail := func(err error) ([][]byte, error) {
		return nil, fmt.Errorf("having authority %s vouch for %s: %w", old.ID, next.ID, err)
	}
	parent, err := x509.ParseCertificate(old.Cert)
	if err != nil {
		return fail(fmt.Errorf("%w: parsing the old certificate: %v", identity.ErrInvalid, err))
	}
	fresh, err := x509.ParseCertificate(next.Cert)
	if err != nil {
		return fail(fmt.Errorf("%w: parsing the new certificate: %v", identity.ErrInvalid, err))
	}
	if len(old.Roots)+len(next.Roots) > 0 {
		return fail(fmt.Errorf("%w: below an upstream its roots are what is pinned", identity.ErrInvalid))
	}
	tmpl := &x509.Certificate{
		SerialNumber: newSerial(), Subject: fresh.Subject, SubjectKeyId: fresh.SubjectKeyId, URIs: fresh.URIs,
		NotBefore: now.Add(-backdate).UTC().Truncate(time.Second), NotAfter: fresh.NotAfter,
		KeyUsage: x509.KeyUsageCertSign, BasicConstraintsValid: true, IsCA: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, fresh.PublicKey, signer) // it verifies the signature
	if err != nil {
		return fail(err)
	}
	before := old.Vouched
	if len(before) == 0 {
		before = [][]byte{old.Cert}
	}
	out := append([][]byte{der}, before...)
	return out[:min(len(out), maxVouched)], nil
}
