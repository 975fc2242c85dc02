package store

import (
	"bufio"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"hash"
	"hash/crc32"
	"io"

	"go.etcd.io/bbolt"

	"countersign.io/countersign/raft"
)

// A snapshot is, integers big-endian:
//
//	"cs-state", version uint32
//	length uint32, trust domain, revision uint64, bundle sequence uint64, CRC-32C of this block uint32
//	per record, by kind and key:
//	  kind uint8, key length uint16, value length uint32, key, value, CRC-32C of this record uint32
//	0 uint8, SHA-256 of all before
//
// The checksums per record say where a damage is, the hash that there is none.
const (
	snapshotMagic   = "cs-state"
	snapshotVersion = 1
	maxValueBytes   = 8 << 20
)

// snapshot is a read transaction: the state as of its beginning, whatever is written meanwhile.
type snapshot struct {
	tx *bbolt.Tx
	td string
}

// Snapshot captures the state as of the last applied command. It neither stops nor waits for writers. A store that
// has stopped applying gives none, because raft would then drop log entries that the snapshot lacks.
func (s *Store) Snapshot() (raft.Snapshot, error) {
	if err := s.Err(); err != nil {
		return nil, fmt.Errorf("taking a snapshot: %w", err)
	}
	tx, err := s.db.Begin(false)
	if err != nil {
		return nil, fmt.Errorf("taking a snapshot: %w", err)
	}
	return &snapshot{tx: tx, td: s.td.Name()}, nil
}

// Release ends the snapshot. Until then the file keeps what the snapshot needs, and Close waits.
func (n *snapshot) Release() { n.tx.Rollback() }

// WriteTo streams the snapshot. The same log gives the same bytes on every member.
func (n *snapshot) WriteTo(w io.Writer) (int64, error) {
	b := bufio.NewWriterSize(w, 1<<16)
	out := newSnapshotWriter(b)
	t := state{n.tx}
	out.header(n.td, t.counter(metaApplied), t.counter(metaSequence))
	for _, k := range kinds() {
		c := t.table(k).Cursor()
		for key, value := c.First(); key != nil && out.err == nil; key, value = c.Next() {
			out.record(k, key, value)
		}
	}
	out.trailer()
	if out.err == nil {
		out.err = b.Flush()
	}
	if out.err != nil {
		return out.n, fmt.Errorf("writing the snapshot at offset %d: %w", out.n, out.err)
	}
	return out.n, nil
}

// snapshotWriter keeps the first error.
type snapshotWriter struct {
	w     io.Writer
	hash  hash.Hash
	block []byte // the one being put together
	n     int64
	err   error
}

func newSnapshotWriter(w io.Writer) *snapshotWriter { return &snapshotWriter{w: w, hash: sha256.New()} }

func (o *snapshotWriter) header(td string, revision, sequence uint64) {
	o.write(binary.BigEndian.AppendUint32([]byte(snapshotMagic), snapshotVersion))
	o.block = binary.BigEndian.AppendUint32(o.block[:0], uint32(len(td)))
	o.block = append(o.block, td...)
	o.block = binary.BigEndian.AppendUint64(o.block, revision)
	o.block = binary.BigEndian.AppendUint64(o.block, sequence)
	o.writeBlock()
}

func (o *snapshotWriter) record(k kind, key, value []byte) {
	o.block = append(o.block[:0], byte(k))
	o.block = binary.BigEndian.AppendUint16(o.block, uint16(len(key)))
	o.block = binary.BigEndian.AppendUint32(o.block, uint32(len(value)))
	o.block = append(append(o.block, key...), value...)
	o.writeBlock()
}

func (o *snapshotWriter) trailer() {
	o.write([]byte{byte(kindEnd)})
	o.write(o.hash.Sum(nil))
}

func (o *snapshotWriter) writeBlock() {
	o.block = binary.BigEndian.AppendUint32(o.block, crc32.Checksum(o.block, crc32.MakeTable(crc32.Castagnoli)))
	o.write(o.block)
}

func (o *snapshotWriter) write(p []byte) {
	if o.err != nil {
		return
	}
	o.hash.Write(p)
	n, err := o.w.Write(p)
	o.n, o.err = o.n+int64(n), err
}
