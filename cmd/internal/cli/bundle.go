package cli

import (
	"bytes"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"

	"github.com/go-jose/go-jose/v4"

	"countersign.io/countersign/identity"
)

const (
	// MaxBundleBytes bounds a bundle's file or ConfigMap, maxBundleRoots what is in it: each costs signatures to be checked.
	MaxBundleBytes = 1 << 20
	maxBundleRoots = 64
)

// ReadBundle reads the X.509 authorities (DER) of a trust domain from a file: PEM certificates, or a bundle in the SPIFFE
// format (SPIFFE Trust Domain and Bundle, section 4).
func ReadBundle(path string) ([][]byte, error) {
	raw, err := ReadFile(path, MaxBundleBytes)
	if err != nil {
		return nil, err
	}
	roots, err := ParseRoots(raw)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return roots, nil
}

// ParseRoots reads the X.509 authorities (DER) from PEM or a SPIFFE bundle. One fault refuses all: half a bundle would verify half of the
// members. Its errors wrap identity.ErrInvalid.
func ParseRoots(raw []byte) ([][]byte, error) {
	raw = bytes.TrimSpace(raw)
	if len(raw) > MaxBundleBytes {
		return nil, fmt.Errorf("%w: the bundle has %d bytes: at the most %d", identity.ErrInvalid, len(raw), MaxBundleBytes)
	}
	parse := rootsFromPEM
	if bytes.HasPrefix(raw, []byte("{")) {
		parse = rootsFromSPIFFE
	}
	roots, err := parse(raw)
	if err != nil {
		return nil, fmt.Errorf("%w: reading the bundle: %v", identity.ErrInvalid, err)
	}
	if len(roots) == 0 || len(roots) > maxBundleRoots {
		return nil, fmt.Errorf("%w: the bundle has %d X.509 authorities: want 1 to %d; countersign bundle show --format pem prints it", identity.ErrInvalid, len(roots), maxBundleRoots)
	}
	for i, der := range roots {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("%w: X.509 authority %d of the bundle: %v", identity.ErrInvalid, i+1, err)
		}
		if !c.IsCA {
			return nil, fmt.Errorf("%w: certificate %d of the bundle (%s) is no authority: give the CA's, not a leaf", identity.ErrInvalid, i+1, c.Subject)
		}
	}
	return roots, nil
}

func rootsFromPEM(raw []byte) (roots [][]byte, err error) {
	for len(bytes.TrimSpace(raw)) > 0 {
		var b *pem.Block
		if b, raw = pem.Decode(raw); b == nil {
			return nil, fmt.Errorf("there is something that is neither PEM nor SPIFFE JSON behind %d certificates", len(roots))
		}
		if b.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("it holds a PEM block of type %q: want certificates alone", b.Type)
		}
		roots = append(roots, b.Bytes)
	}
	return roots, nil
}

func rootsFromSPIFFE(raw []byte) (roots [][]byte, err error) {
	var doc struct {
		Keys []json.RawMessage `json:"keys"`
	}
	if err := json.Unmarshal(raw, &doc); err != nil {
		return nil, fmt.Errorf("it is not a SPIFFE bundle (JSON with a list of keys)")
	}
	for i, r := range doc.Keys {
		var use struct {
			Use string `json:"use"`
		}
		if json.Unmarshal(r, &use) != nil || use.Use != "x509-svid" { // the JWT keys, and what a later standard adds
			continue
		}
		var k jose.JSONWebKey
		if err := k.UnmarshalJSON(r); err != nil || len(k.Certificates) != 1 {
			return nil, fmt.Errorf("key %d of use x509-svid does not hold exactly one certificate (x5c)", i+1)
		}
		roots = append(roots, k.Certificates[0].Raw)
	}
	return roots, nil
}
