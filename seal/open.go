package seal

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"path/filepath"
	"strings"
)

// ErrKEK says that a key-encryption key cannot be had as its URI names it: a mistake of the configuration, or a key, a
// token or a module that is not there.
var ErrKEK = errors.New("the key-encryption key cannot be used")

// Vault is what transit: keys need of a Vault or OpenBao. *vault.Client is one.
type Vault interface {
	// Do sends in as JSON and reads the answer's data into out. It MUST log in by itself, MUST NOT put secrets into errors,
	// and its error MUST wrap vault.ErrInvalid where the request was refused for what is in it.
	Do(ctx context.Context, method, path string, in, out any) error
}

// Options are what some kinds of key need beside their URI.
type Options struct {
	Vault Vault // for transit: keys
	// MustExist: a key file that is absent is an error, and not made. Keys elsewhere are made by the first Wrap only.
	MustExist bool
}

// OpenKEK opens the key-encryption key that uri names:
//
//	file:/abs/path             32 bytes in a file, see OpenFileKEK
//	pkcs11:...                 an AES-256 key in a PKCS#11 token (RFC 7512); see package internal/hsm. Needs a build with cgo
//	transit:MOUNT/KEY          a key of the transit engine of Vault or OpenBao
//	awskms:KEY?region=R        a key of AWS KMS; only in builds with the tag aws
//	gcpkms:projects/P/locations/L/keyRings/R/cryptoKeys/K    of Google Cloud KMS; tag gcp
//	azurekeyvault:VAULT/KEY    an RSA key of Azure Key Vault; tag azure
//
// It may not ask the key's service yet. No secret is in a URI: the clouds' credentials are the machine's, a token's PIN is
// in a file. Errors wrap ErrKEK.
func OpenKEK(ctx context.Context, uri string, o Options) (KEK, error) {
	scheme, rest, ok := strings.Cut(uri, ":")
	if !ok {
		return nil, fmt.Errorf("opening %q: %w: want a URI such as file:/path, pkcs11:... or transit:MOUNT/KEY", uri, ErrKEK)
	}
	var k KEK
	var err error
	switch scheme {
	case "file":
		k, err = openFileURI(uri, o.MustExist)
	case "pkcs11":
		k, err = openPKCS11(uri)
	case "transit":
		k, err = openTransit(rest, o.Vault)
	case "awskms":
		k, err = openAWS(ctx, rest)
	case "gcpkms":
		k, err = openGCP(ctx, rest)
	case "azurekeyvault":
		k, err = openAzure(ctx, rest)
	default:
		return nil, fmt.Errorf("opening a key-encryption key: %w: keys of the kind %q are unknown: use file, pkcs11, transit, awskms, gcpkms or azurekeyvault", ErrKEK, scheme)
	}
	if err != nil {
		return nil, fmt.Errorf("opening a key-encryption key: %w: %w", ErrKEK, err)
	}
	return k, nil
}

func openFileURI(uri string, mustExist bool) (KEK, error) {
	u, err := url.Parse(uri)
	if err != nil || u.Host != "" || u.RawQuery != "" || u.Fragment != "" || !filepath.IsAbs(u.Path) {
		return nil, fmt.Errorf("%q: want file:/absolute/path", uri)
	}
	return openFileKEK(u.Path, mustExist)
}

// untagged is the error of a kind of key that this build leaves out.
func untagged(kind, tag string) error {
	return fmt.Errorf("this build has no %s: keys: build it with -tags %s", kind, tag)
}
