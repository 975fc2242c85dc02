package store

import (
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"countersign.io/countersign/identity"
	"countersign.io/countersign/internal/durable"
)

// The files of the state folder.
const (
	headerFile = "format.json" // whose state this is, and how it is written: fsynced before anything else
	dbFile     = "state.db"
	markerFile = "clean.json" // state.db is whole: there only between a clean shutdown and the next start
)

// formatVersion is that of state.db. Older ones are rebuilt; newer ones are refused.
const formatVersion = 1

type header struct {
	Format      int    `json:"format"`
	TrustDomain string `json:"trust_domain"`
}

// checkHeader outlives crashes, unlike state.db, so that a folder of another trust domain is never taken for an empty one.
func checkHeader(dir string, td spiffeid.TrustDomain) error {
	path := filepath.Join(dir, headerFile)
	want := header{Format: formatVersion, TrustDomain: td.Name()}
	raw, err := durable.ReadPrivateFile(path, 4096)
	if errors.Is(err, os.ErrNotExist) {
		return writeJSON(path, want)
	}
	if err != nil {
		return fmt.Errorf("reading the state's header: %w", err)
	}
	var have header
	if err := json.Unmarshal(raw, &have); err != nil {
		return fmt.Errorf("%w: %s is damaged (%v): remove the folder's contents to have them rebuilt from the raft log", identity.ErrInvalid, path, err)
	}
	switch {
	case have.TrustDomain != want.TrustDomain:
		return fmt.Errorf("%w: %s is the state of trust domain %q, and this member is of %q: give it another data folder, or correct trust_domain",
			identity.ErrInvalid, dir, have.TrustDomain, want.TrustDomain)
	case have.Format > formatVersion:
		return fmt.Errorf("%w: %s has format %d, and this version reads up to %d: run the newer version that wrote it",
			identity.ErrInvalid, dir, have.Format, formatVersion)
	case have.Format < formatVersion: // the marker's format makes verifyMarker discard the file
		return writeJSON(path, want)
	}
	return nil
}

// marker vouches for state.db as a clean shutdown left it. The checksum finds accidents (bbolt itself has none
// over its pages); it is no defence against somebody who can write here.
type marker struct {
	Format int    `json:"format"`
	Size   int64  `json:"size"`
	CRC32C uint32 `json:"crc32c"`
}

func verifyMarker(dir string) (ok bool, why string) {
	raw, err := durable.ReadPrivateFile(filepath.Join(dir, markerFile), 4096)
	if err != nil {
		return false, "it was not closed cleanly"
	}
	var want marker
	if err := json.Unmarshal(raw, &want); err != nil {
		return false, "its clean-shutdown marker is damaged"
	}
	have, err := measure(filepath.Join(dir, dbFile))
	switch {
	case err != nil:
		return false, "it cannot be read: " + err.Error()
	case want.Format != have.Format:
		return false, fmt.Sprintf("it has format %d, not %d", want.Format, have.Format)
	case want.Size != have.Size:
		return false, fmt.Sprintf("it is %d bytes long, not %d", have.Size, want.Size)
	case want.CRC32C != have.CRC32C:
		return false, "its checksum does not match"
	}
	return true, ""
}

func writeMarker(dir string) error {
	m, err := measure(filepath.Join(dir, dbFile))
	if err != nil {
		return fmt.Errorf("writing the clean-shutdown marker: %w", err)
	}
	return writeJSON(filepath.Join(dir, markerFile), m)
}

func measure(path string) (marker, error) {
	f, err := os.Open(path)
	if err != nil {
		return marker{}, err
	}
	defer f.Close()
	h := crc32.New(crc32.MakeTable(crc32.Castagnoli))
	n, err := io.CopyBuffer(struct{ io.Writer }{h}, struct{ io.Reader }{f}, make([]byte, 1<<20))
	return marker{Format: formatVersion, Size: n, CRC32C: h.Sum32()}, err
}

func writeJSON(path string, v any) error {
	raw, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if err := durable.WriteFile(path, append(raw, '\n'), 0o600); err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	return nil
}
