package raft

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math"
	"time"

	hraft "github.com/hashicorp/raft"
)

// ErrCorrupt is wrapped when what is on disk is not what was written there.
var ErrCorrupt = errors.New("damaged on disk")

// A log record, version 1, big endian:
//
//	0  version
//	1  type of the entry
//	2  term            8 bytes
//	10 appended at     8 bytes, Unix nanoseconds, 0 for the zero time
//	18 extensions      4 bytes of length, then the bytes
//	.. data            the rest
//	-4 CRC-32C of index (8 bytes) and all of the above
//
// bbolt checks only its meta pages, so the sum is what notices a flipped bit; the index is summed too, so
// that a whole record at another's place is noticed.
const (
	recordVersion = 1
	recordFixed   = 1 + 1 + 8 + 8 + 4
	recordSum     = 4
)

func castagnoli() *crc32.Table { return crc32.MakeTable(crc32.Castagnoli) }

func sum(key, data []byte) uint32 {
	return crc32.Update(crc32.Checksum(key, castagnoli()), castagnoli(), data)
}

func indexKey(index uint64) []byte {
	return binary.BigEndian.AppendUint64(make([]byte, 0, 8), index)
}

// marshalRecord encodes an entry for the place of its index.
func marshalRecord(l *hraft.Log) ([]byte, error) {
	if uint64(len(l.Extensions)) > math.MaxUint32 {
		return nil, fmt.Errorf("encoding log entry %d: extensions of %d bytes", l.Index, len(l.Extensions))
	}
	b := make([]byte, 0, recordFixed+len(l.Extensions)+len(l.Data)+recordSum)
	b = append(b, recordVersion, byte(l.Type))
	b = binary.BigEndian.AppendUint64(b, l.Term)
	at := int64(0)
	if !l.AppendedAt.IsZero() {
		at = l.AppendedAt.UnixNano()
	}
	b = binary.BigEndian.AppendUint64(b, uint64(at))
	b = binary.BigEndian.AppendUint32(b, uint32(len(l.Extensions)))
	b = append(b, l.Extensions...)
	b = append(b, l.Data...)
	return binary.BigEndian.AppendUint32(b, sum(indexKey(l.Index), b)), nil
}

// parseRecord decodes the record found at index into l. The bytes are copied: b may be a page of bbolt.
func parseRecord(index uint64, b []byte, l *hraft.Log) error {
	if len(b) < recordFixed+recordSum {
		return fmt.Errorf("log entry %d: %d bytes are too few for a record: %w", index, len(b), ErrCorrupt)
	}
	body, tail := b[:len(b)-recordSum], b[len(b)-recordSum:]
	if sum(indexKey(index), body) != binary.BigEndian.Uint32(tail) {
		return fmt.Errorf("log entry %d: its checksum does not match: %w", index, ErrCorrupt)
	}
	// The sum holds, so from here on a mismatch is a newer writer, not damage.
	if body[0] != recordVersion {
		return fmt.Errorf("log entry %d: record version %d, this program reads version %d; run the newer program", index, body[0], recordVersion)
	}
	ext := uint64(binary.BigEndian.Uint32(body[18:22]))
	if ext > uint64(len(body)-recordFixed) {
		return fmt.Errorf("log entry %d: extensions of %d bytes in a record of %d: %w", index, ext, len(b), ErrCorrupt)
	}
	*l = hraft.Log{Index: index, Term: binary.BigEndian.Uint64(body[2:10]), Type: hraft.LogType(body[1])}
	if at := int64(binary.BigEndian.Uint64(body[10:18])); at != 0 {
		l.AppendedAt = time.Unix(0, at).UTC()
	}
	rest := body[recordFixed:]
	if ext > 0 {
		l.Extensions = append([]byte(nil), rest[:ext]...)
	}
	if len(rest) > int(ext) {
		l.Data = append([]byte(nil), rest[ext:]...)
	}
	return nil
}

// A stable value (term, vote), version 1: version, bytes, CRC-32C of key and the former.

func marshalStable(key, val []byte) []byte {
	b := make([]byte, 0, 1+len(val)+recordSum)
	b = append(append(b, recordVersion), val...)
	return binary.BigEndian.AppendUint32(b, sum(key, b))
}

func parseStable(key, b []byte) ([]byte, error) {
	if len(b) < 1+recordSum || sum(key, b[:len(b)-recordSum]) != binary.BigEndian.Uint32(b[len(b)-recordSum:]) {
		return nil, fmt.Errorf("raft's %q: its checksum does not match: %w", key, ErrCorrupt)
	}
	if b[0] != recordVersion {
		return nil, fmt.Errorf("raft's %q: record version %d, this program reads version %d; run the newer program", key, b[0], recordVersion)
	}
	return append([]byte(nil), b[1:len(b)-recordSum]...), nil
}
