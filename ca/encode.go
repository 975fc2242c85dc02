package ca

import (
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"math/big"
	"time"

	"golang.org/x/crypto/cryptobyte"
	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"
)

// The encoder writes the TBSCertificate of a leaf as x509.CreateCertificate would, byte for byte: that is tested and
// fuzzed. It is there because x509.CreateCertificate verifies each of its own signatures, which more than doubles
// the cost of a leaf, and because bytes that exist before the signature can be linted before it.

// DER that is the same in every leaf. Strings, because those cannot be written to.
const (
	// AlgorithmIdentifier ecdsa-with-SHA256.
	derECDSAWithSHA256 = "\x30\x0a\x06\x08\x2a\x86\x48\xce\x3d\x04\x03\x02"
	// Extensions: key usage (critical, digitalSignature), extended key usage (serverAuth, clientAuth), basic
	// constraints (critical, not a CA). Profile: X509-SVID sections 4.1, 4.3, 4.4.
	derLeafExtensions = "\x30\x0e\x06\x03\x55\x1d\x0f\x01\x01\xff\x04\x04\x03\x02\x07\x80" +
		"\x30\x1d\x06\x03\x55\x1d\x25\x04\x16\x30\x14\x06\x08\x2b\x06\x01\x05\x05\x07\x03\x01\x06\x08\x2b\x06\x01\x05\x05\x07\x03\x02" +
		"\x30\x0c\x06\x03\x55\x1d\x13\x01\x01\xff\x04\x02\x30\x00"
	derSubjectKeyID   = "\x06\x03\x55\x1d\x0e"             // OID
	derAuthorityKeyID = "\x06\x03\x55\x1d\x23"             // OID
	derSANCritical    = "\x06\x03\x55\x1d\x11\x01\x01\xff" // OID, critical: the subject is empty
)

// leaf is what differs from one leaf of an issuer to the next. The times are UTC and whole seconds.
type leaf struct {
	serial              *big.Int
	notBefore, notAfter time.Time
	publicKey           []byte // DER SubjectPublicKeyInfo
	keyID               []byte
	dnsNames            []string
	id                  string // SPIFFE ID
}

// leafEncoder holds what is the same in every leaf of an issuer.
type leafEncoder struct {
	issuerName []byte // DER
	authority  []byte // DER of the authority key identifier extension
}

func newLeafEncoder(issuer *x509.Certificate) *leafEncoder {
	var b cryptobyte.Builder
	b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddBytes([]byte(derAuthorityKeyID))
		b.AddASN1(cbasn1.OCTET_STRING, func(b *cryptobyte.Builder) {
			b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
				b.AddASN1(cbasn1.Tag(0).ContextSpecific(), func(b *cryptobyte.Builder) { b.AddBytes(issuer.SubjectKeyId) })
			})
		})
	})
	return &leafEncoder{issuerName: issuer.RawSubject, authority: b.BytesOrPanic()}
}

// encode writes a TBSCertificate (RFC 5280 section 4.1).
func (e *leafEncoder) encode(l *leaf) ([]byte, error) {
	b := cryptobyte.NewBuilder(make([]byte, 0, 1024))
	b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1(cbasn1.Tag(0).ContextSpecific().Constructed(), func(b *cryptobyte.Builder) { b.AddASN1Int64(2) }) // v3
		b.AddASN1BigInt(l.serial)
		b.AddBytes([]byte(derECDSAWithSHA256))
		b.AddBytes(e.issuerName)
		b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
			addTime(b, l.notBefore)
			addTime(b, l.notAfter)
		})
		b.AddASN1(cbasn1.SEQUENCE, func(*cryptobyte.Builder) {}) // no subject
		b.AddBytes(l.publicKey)
		b.AddASN1(cbasn1.Tag(3).ContextSpecific().Constructed(), func(b *cryptobyte.Builder) {
			b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) { e.addExtensions(b, l) })
		})
	})
	tbs, err := b.Bytes()
	if err != nil {
		return nil, fmt.Errorf("encoding the certificate: %w", err)
	}
	return tbs, nil
}

// addExtensions writes them in the order of x509.CreateCertificate.
func (e *leafEncoder) addExtensions(b *cryptobyte.Builder, l *leaf) {
	b.AddBytes([]byte(derLeafExtensions))
	b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddBytes([]byte(derSubjectKeyID))
		b.AddASN1(cbasn1.OCTET_STRING, func(b *cryptobyte.Builder) { b.AddASN1OctetString(l.keyID) })
	})
	b.AddBytes(e.authority)
	b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddBytes([]byte(derSANCritical))
		b.AddASN1(cbasn1.OCTET_STRING, func(b *cryptobyte.Builder) {
			b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
				for _, name := range l.dnsNames {
					b.AddASN1(cbasn1.Tag(2).ContextSpecific(), func(b *cryptobyte.Builder) { b.AddBytes([]byte(name)) })
				}
				b.AddASN1(cbasn1.Tag(6).ContextSpecific(), func(b *cryptobyte.Builder) { b.AddBytes([]byte(l.id)) })
			})
		})
	})
}

// addTime writes a Time: UTCTime through 2049, GeneralizedTime from then on (RFC 5280 section 4.1.2.5).
func addTime(b *cryptobyte.Builder, t time.Time) {
	if t.Year() < 2050 {
		b.AddASN1UTCTime(t)
	} else {
		b.AddASN1GeneralizedTime(t)
	}
}

// sign signs a TBSCertificate and wraps it into a Certificate, DER.
func (is *issuer) sign(tbs []byte) ([]byte, error) {
	digest := sha256.Sum256(tbs)
	signature, err := is.key.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		return nil, fmt.Errorf("signing: %w", err)
	}
	return wrapSigned(tbs, signature)
}

func wrapSigned(tbs, signature []byte) ([]byte, error) {
	b := cryptobyte.NewBuilder(make([]byte, 0, len(tbs)+len(signature)+32))
	b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddBytes(tbs)
		b.AddBytes([]byte(derECDSAWithSHA256))
		b.AddASN1BitString(signature)
	})
	der, err := b.Bytes()
	if err != nil {
		return nil, fmt.Errorf("wrapping the certificate: %w", err)
	}
	return der, nil
}
