package store

import (
	"bytes"
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

// formatVersion is that of the folder. A newer one is refused. The format of state.db itself is the level of what it holds,
// so that an older version, which could not keep that, has it rebuilt, and stops where it does not understand the log.
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
		return fmt.Errorf("%w: %s is the state of trust domain %q, says its %s, and this member is of %q: give it another data folder, or correct trust_domain",
			identity.ErrInvalid, dir, have.TrustDomain, headerFile, want.TrustDomain)
	case have.Format > formatVersion:
		return fmt.Errorf("%w: %s has format %d, and this version reads up to %d: run the newer version that wrote it",
			identity.ErrInvalid, path, have.Format, formatVersion)
	}
	if same, err := canonical(raw, have); err != nil || !same || have.Format < formatVersion {
		return errors.Join(err, fmt.Errorf("%w: %s is damaged: it does not read as it was written; remove the folder's contents to have them rebuilt from the raft log", identity.ErrInvalid, path))
	}
	return nil
}

// canonical reports whether v was read from exactly what writeJSON writes of it: JSON forgives a flipped bit in a name.
func canonical(raw []byte, v any) (bool, error) {
	want, err := encodeJSON(v)
	return bytes.Equal(raw, want), err
}

func encodeJSON(v any) ([]byte, error) {
	raw, err := json.Marshal(v)
	return append(raw, '\n'), err
}

// marker vouches for state.db as a clean shutdown left it. The checksum finds accidents, wherever in the file they are
// (bbolt itself has none over its pages), and in the marker; it is no defence against somebody who can write here. Of 1 GiB
// it takes less than half a second when the file is in memory, and what the disk takes to read it otherwise.
type marker struct {
	Format int    `json:"format"` // the level
	Size   int64  `json:"size"`
	CRC32C uint32 `json:"crc32c"` // of the file and, from format 2 on, of the format in a byte
}

func verifyMarker(dir string) (ok bool, why string) {
	raw, err := durable.ReadPrivateFile(filepath.Join(dir, markerFile), 4096)
	if errors.Is(err, os.ErrNotExist) {
		return false, "it was not closed cleanly"
	}
	if err != nil {
		return false, "its clean-shutdown marker cannot be read: " + err.Error()
	}
	var want marker
	if err := json.Unmarshal(raw, &want); err != nil {
		return false, "its clean-shutdown marker is damaged"
	}
	if want.Format < 1 || want.Format > Level {
		return false, fmt.Sprintf("it has format %d, and this version knows 1 to %d: a newer version wrote it, or its clean-shutdown marker is damaged", want.Format, Level)
	}
	if same, err := canonical(raw, want); err != nil || !same {
		return false, "its clean-shutdown marker is damaged"
	}
	have, err := measure(filepath.Join(dir, dbFile), want.Format)
	switch {
	case err != nil:
		return false, "it cannot be read: " + err.Error()
	case want.Size != have.Size:
		return false, fmt.Sprintf("it is %d bytes long, not %d: it, or its clean-shutdown marker, is damaged", have.Size, want.Size)
	case want.CRC32C != have.CRC32C:
		return false, "its checksum does not match: it, or its clean-shutdown marker, is damaged"
	}
	return true, ""
}

func writeMarker(dir string, level uint32) error {
	m, err := measure(filepath.Join(dir, dbFile), int(level))
	if err != nil {
		return fmt.Errorf("writing the clean-shutdown marker: %w", err)
	}
	return writeJSON(filepath.Join(dir, markerFile), m)
}

func measure(path string, format int) (marker, error) {
	f, err := os.Open(path)
	if err != nil {
		return marker{}, err
	}
	defer f.Close()
	h := crc32.New(crc32.MakeTable(crc32.Castagnoli))
	n, err := io.CopyBuffer(struct{ io.Writer }{h}, struct{ io.Reader }{f}, make([]byte, 1<<20))
	if format >= level2 {
		h.Write([]byte{byte(format)})
	}
	return marker{Format: format, Size: n, CRC32C: h.Sum32()}, err
}

func writeJSON(path string, v any) error {
	raw, err := encodeJSON(v)
	if err != nil {
		return err
	}
	if err := durable.WriteFile(path, raw, 0o600); err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	return nil
}
