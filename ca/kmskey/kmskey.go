// Package kmskey opens P-256 signing keys that are not ours to hold: in a PKCS#11 token, or in a cloud's KMS. They sign for
// an authority whose key must never be in memory, on disk or in a backup, sealed or not.
package kmskey

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"errors"
	"fmt"
	"strings"

	"countersign.io/countersign/identity"
	"countersign.io/countersign/internal/hsm"
)

// Open returns the signer of the P-256 key that uri names:
//
//	pkcs11:token=T;object=K?module-path=/M&pin-source=/P    needs a build with cgo; sessions last for one signature each
//	awskms:key-id=K;region=R                 builds with the tag aws
//	cloudkms:projects/P/locations/L/keyRings/R/cryptoKeys/K/cryptoKeyVersions/N    tag gcp
//	azurekms:name=K;vault=V                  tag azure
//
// Errors wrap identity.ErrInvalid (the URI, or a key of another kind), ErrNotFound (no such key), ErrUnavailable (its
// service, token or PIN). They name the key, and hold no secret.
func Open(ctx context.Context, uri string) (crypto.Signer, error) {
	s, err := open(ctx, uri)
	if err != nil {
		return nil, fmt.Errorf("opening the key at %s: %w", show(uri), err)
	}
	if pub, ok := s.Public().(*ecdsa.PublicKey); !ok || pub.Curve != elliptic.P256() {
		return nil, fmt.Errorf("opening the key at %s: %w: it is not an ECDSA key on P-256", show(uri), identity.ErrInvalid)
	}
	return s, nil
}

// Create makes a P-256 key at uri, which must name none yet, and returns its signer. Only tokens can be asked to: in a
// cloud, who may use a key is to be settled before it is there.
func Create(_ context.Context, uri string) (crypto.Signer, error) {
	scheme, _, _ := strings.Cut(uri, ":")
	if scheme != "pkcs11" {
		return nil, fmt.Errorf("making a key at %s: %w: make it with the cloud's own tools (ECDSA on P-256, to sign), let every member use it, and name it here", show(uri), identity.ErrInvalid)
	}
	u, err := hsm.ParseURI(uri)
	if err != nil {
		return nil, fmt.Errorf("making a key at %s: %w", show(uri), sentinel(err))
	}
	s, err := hsm.CreateSigner(u)
	if err != nil {
		return nil, fmt.Errorf("making a key at %s: %w", show(uri), sentinel(err))
	}
	return s, nil
}

// CheckSame refuses a URI that others wrote (theirs) unless it names the key that own does. Only the attributes that say which key
// it is count: what theirs says of files, a module that would be loaded above all, is neither used nor compared. The error wraps identity.ErrPrecondition.
func CheckSame(own, theirs string) error {
	same := own == theirs
	if a, err := hsm.ParseURI(own); err == nil && !same {
		b, err := hsm.ParseURI(theirs)
		same = err == nil && a.SameKey(b)
	}
	if !same {
		return fmt.Errorf("%w: %q is not the key at %q: the URIs must be equal, those of tokens in token, serial, object and id", identity.ErrPrecondition, show(own), show(theirs))
	}
	return nil
}

// OpenOrCreate opens the key, and makes it where there is none and it can be made.
func OpenOrCreate(ctx context.Context, uri string) (crypto.Signer, error) {
	s, err := Open(ctx, uri)
	if scheme, _, _ := strings.Cut(uri, ":"); !errors.Is(err, identity.ErrNotFound) || scheme != "pkcs11" {
		return s, err
	}
	if s, err = Create(ctx, uri); errors.Is(err, identity.ErrExists) { // somebody else did
		return Open(ctx, uri)
	}
	return s, err
}

func open(ctx context.Context, uri string) (crypto.Signer, error) {
	scheme, _, _ := strings.Cut(uri, ":")
	switch scheme {
	case "pkcs11":
		u, err := hsm.ParseURI(uri)
		if err != nil {
			return nil, sentinel(err)
		}
		s, err := hsm.OpenSigner(u)
		if err != nil {
			return nil, sentinel(err)
		}
		return s, nil
	case "awskms":
		return openAWS(ctx, uri)
	case "cloudkms":
		return openGCP(ctx, uri)
	case "azurekms":
		return openAzure(ctx, uri)
	}
	return nil, fmt.Errorf("%w: keys of the kind %q are unknown: use pkcs11, awskms, cloudkms or azurekms", identity.ErrInvalid, scheme)
}

// sentinel wraps what a caller branches on around a token's error.
func sentinel(err error) error {
	kind := identity.ErrUnavailable
	switch {
	case errors.Is(err, hsm.ErrURI), errors.Is(err, hsm.ErrKeyType):
		kind = identity.ErrInvalid
	case errors.Is(err, hsm.ErrExists):
		kind = identity.ErrExists
	case errors.Is(err, hsm.ErrNoKey):
		kind = identity.ErrNotFound
	}
	return fmt.Errorf("%w: %w", kind, err)
}

// show is the URI for messages: without its query, where somebody may have put what does not belong there.
func show(uri string) string {
	base, _, _ := strings.Cut(uri, "?")
	if i := strings.Index(base, "pin-value="); i >= 0 {
		base = base[:i] + "..."
	}
	return base
}

// untagged is the error of a kind of key that this build leaves out.
func untagged(kind, tag string) error {
	return fmt.Errorf("%w: this build has no %s: keys: build it with -tags %s", identity.ErrInvalid, kind, tag)
}
