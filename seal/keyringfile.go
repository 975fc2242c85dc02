package seal

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"countersign.io/countersign/internal/durable"
)

const (
	keyringFileFormat = 1
	maxKeyringFile    = 64 << 10
)

// keyringFile is the keyring as it rests. KEK is told to the operator when the key does not fit, and decides
// nothing: a key file that moved still fits.
type keyringFile struct {
	Format      int    `json:"format"`
	TrustDomain string `json:"trust_domain"`
	KEK         string `json:"kek"`
	Wrapped     []byte `json:"wrapped"`
}

func keyringAD(td spiffeid.TrustDomain) []byte {
	return []byte("countersign/1|" + td.Name() + "|keyring")
}

// SaveKeyring writes the keyring to path (mode 0600), wrapped under kek and bound to the trust domain. A crash
// leaves the old file or the new one.
func SaveKeyring(ctx context.Context, path string, kek KEK, td spiffeid.TrustDomain, k *Keyring) error {
	plain := k.Plain()
	defer clear(plain)
	wrapped, err := kek.Wrap(ctx, plain, keyringAD(td))
	if err != nil {
		return fmt.Errorf("saving keyring %s: wrapping it under %s: %w", path, kek.URI(), err)
	}
	data, err := json.Marshal(keyringFile{Format: keyringFileFormat, TrustDomain: td.Name(), KEK: kek.URI(), Wrapped: wrapped})
	if err != nil {
		return fmt.Errorf("saving keyring %s: %w", path, err)
	}
	if err := durable.WriteFile(path, append(data, '\n'), 0o600); err != nil {
		return fmt.Errorf("saving keyring %s: %w", path, err)
	}
	return nil
}

// LoadKeyring reads what SaveKeyring wrote. The error wraps fs.ErrNotExist where there is no file, and ErrOpen
// where kek does not fit.
func LoadKeyring(ctx context.Context, path string, kek KEK, td spiffeid.TrustDomain) (*Keyring, error) {
	data, err := durable.ReadPrivateFile(path, maxKeyringFile)
	if err != nil {
		return nil, fmt.Errorf("loading keyring %s: %w", path, err)
	}
	f, err := parseKeyringFile(data)
	if err != nil {
		return nil, fmt.Errorf("loading keyring %s: %w", path, err)
	}
	if f.TrustDomain != td.Name() {
		return nil, fmt.Errorf("loading keyring %s: it belongs to trust domain %q, not %q: use that trust domain or another data folder", path, f.TrustDomain, td.Name())
	}
	plain, err := kek.Unwrap(ctx, f.Wrapped, keyringAD(td))
	if err != nil {
		return nil, fmt.Errorf("loading keyring %s: it was wrapped under %s and %s does not open it: restore that key, or empty the data folder and join again: %w", path, f.KEK, kek.URI(), err)
	}
	defer clear(plain)
	k, err := ParseKeyring(plain)
	if err != nil {
		return nil, fmt.Errorf("loading keyring %s: %w", path, err)
	}
	return k, nil
}

func parseKeyringFile(data []byte) (*keyringFile, error) {
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	var f keyringFile
	if err := d.Decode(&f); err != nil {
		return nil, fmt.Errorf("reading it as JSON: it is truncated or damaged: %w", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("data follows its end: it is damaged")
	}
	if f.Format != keyringFileFormat {
		return nil, fmt.Errorf("format %d is unknown to this version: want %d", f.Format, keyringFileFormat)
	}
	return &f, nil
}
