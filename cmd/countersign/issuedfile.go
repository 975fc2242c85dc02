package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"time"

	"countersign.io/countersign/internal/durable"
)

// issuedFile is issued.json: until when something may be live that this member signed, by the ID of the authority. A rotation
// revokes no authority before. It has nothing secret.
type issuedFile struct {
	Version int             `json:"version"`
	Until   json.RawMessage `json:"until"`
	CRC32C  uint32          `json:"crc32c"` // of the former's bytes
}

func (d *dataDir) saveIssued(until map[string]time.Time) error {
	list, err := json.Marshal(until)
	if err != nil {
		return fmt.Errorf("encoding until when what was signed lasts: %w", err)
	}
	raw, err := json.Marshal(issuedFile{Version: 1, Until: list, CRC32C: crc32.Checksum(list, crc32.MakeTable(crc32.Castagnoli))})
	if err != nil {
		return fmt.Errorf("encoding until when what was signed lasts: %w", err)
	}
	if err := durable.WriteFile(d.file("issued.json"), raw, 0o600); err != nil {
		return fmt.Errorf("saving until when what was signed lasts: %w", err)
	}
	return nil
}

// loadIssued returns nil and why where that is not known: of a member that an earlier release ran, or that was restored.
func (d *dataDir) loadIssued() (map[string]time.Time, error) {
	raw, err := durable.ReadPrivateFile(d.file("issued.json"), maxStateFile)
	if err != nil {
		return nil, err
	}
	var f issuedFile
	until := map[string]time.Time{}
	err = json.Unmarshal(raw, &f)
	switch {
	case err != nil:
	case f.Version != 1:
		err = fmt.Errorf("it has version %d", f.Version)
	case f.CRC32C != crc32.Checksum(f.Until, crc32.MakeTable(crc32.Castagnoli)):
		err = errors.New("its checksum does not match")
	default:
		err = json.Unmarshal(f.Until, &until)
	}
	if err != nil {
		return nil, fmt.Errorf("%s is damaged, or of a newer release: %w", d.file("issued.json"), err)
	}
	return until, nil
}

// issuedUntil is loadIssued for the server: a member that does not know goes on, and a rotation waits for what it may have signed.
func (m *member) issuedUntil() map[string]time.Time {
	until, err := m.data.loadIssued()
	if err != nil {
		m.log.Warn("it is not known until when what this member signed lasts: a rotation waits for what it may be", "error", err)
	}
	return until
}
