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

// LoadKeyring reads what SaveKeyring wrote, opening it with kek or else with the first of old that fits, and returns the
// one that did: where that is not kek, SaveKeyring again. The error wraps fs.ErrNotExist where there is no file, and
// ErrOpen where no key fits. A key that cannot be asked (its service is down, its token absent) is an error too, of all.
func LoadKeyring(ctx context.Context, path string, kek KEK, td spiffeid.TrustDomain, old ...KEK) (*Keyring, KEK, error) {
	data, err := durable.ReadPrivateFile(path, maxKeyringFile)
	if err != nil {
		return nil, nil, fmt.Errorf("loading keyring %s: %w", path, err)
	}
	f, err := parseKeyringFile(data)
	if err != nil {
		return nil, nil, fmt.Errorf("loading keyring %s: %w", path, err)
	}
	if f.TrustDomain != td.Name() {
		return nil, nil, fmt.Errorf("loading keyring %s: it belongs to trust domain %q, not %q: use that trust domain or another data folder", path, f.TrustDomain, td.Name())
	}
	var errs []error
	for _, by := range append([]KEK{kek}, old...) {
		plain, err := by.Unwrap(ctx, f.Wrapped, keyringAD(td))
		if err != nil {
			errs = append(errs, fmt.Errorf("%s does not open it: %w", by.URI(), err))
			continue
		}
		k, err := ParseKeyring(plain)
		clear(plain)
		if err != nil {
			return nil, nil, fmt.Errorf("loading keyring %s: %w", path, err)
		}
		return k, by, nil
	}
	return nil, nil, fmt.Errorf("loading keyring %s: it was wrapped under %s: restore that key (or name it in seal.old_keys), or empty the data folder and join again: %w", path, f.KEK, errors.Join(errs...))
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
