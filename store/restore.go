package store

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"io"
	"strings"

	"go.etcd.io/bbolt"

	"countersign.io/countersign/identity"
)

// Restore replaces the state with that of a snapshot, in one transaction: a snapshot that is truncated, damaged, of
// another trust domain or of a newer version changes nothing. After such an error the state is behind what raft
// believes it to be, so the next start rebuilds it.
func (s *Store) Restore(r io.Reader) error {
	s.applying.Lock()
	defer s.applying.Unlock()
	err := s.Err()
	if err == nil {
		err = s.restore(r)
	}
	if err != nil {
		s.discard = true
		return fmt.Errorf("restoring a snapshot: %w", err)
	}
	return nil
}

func (s *Store) restore(r io.Reader) error {
	tx, err := s.db.Begin(true)
	if err != nil {
		return err
	}
	defer tx.Rollback() // does nothing once committed
	if err := clearBuckets(tx); err != nil {
		return err
	}
	if err := newSnapshotReader(r).load(state{tx}, s.td.Name()); err != nil {
		return err
	}
	v, err := loadView(tx, s.td)
	if err != nil {
		return err
	}
	if err := tx.Commit(); err != nil {
		return err
	}
	s.applied = v.revision
	s.replace(v)
	return nil
}

func clearBuckets(tx *bbolt.Tx) error {
	var names [][]byte
	err := tx.ForEach(func(name []byte, _ *bbolt.Bucket) error {
		names = append(names, bytes.Clone(name))
		return nil
	})
	for _, name := range names {
		err = errors.Join(err, tx.DeleteBucket(name))
	}
	return errors.Join(err, createBuckets(tx))
}

// snapshotReader knows where it is, for its errors.
type snapshotReader struct {
	r     io.Reader
	hash  hash.Hash
	buf   []byte
	sum   [4]byte
	off   int64 // read so far
	start int64 // of the block at hand
	crc   uint32
}

func newSnapshotReader(r io.Reader) *snapshotReader {
	return &snapshotReader{r: bufio.NewReaderSize(r, 1<<16), hash: sha256.New()}
}

func (in *snapshotReader) bad(format string, args ...any) error {
	return fmt.Errorf("%w: snapshot damaged at offset %d: "+format, append([]any{identity.ErrInvalid, in.start}, args...)...)
}

// read gets exactly n bytes, n being bounded by the caller. They are there until the next read.
func (in *snapshotReader) read(n int) ([]byte, error) {
	if n > len(in.buf) {
		in.buf = make([]byte, max(n, 4096))
	}
	return in.buf[:n], in.fill(in.buf[:n])
}

func (in *snapshotReader) fill(p []byte) error {
	got, err := io.ReadFull(in.r, p)
	in.off += int64(got)
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		return fmt.Errorf("%w: snapshot truncated at offset %d", identity.ErrInvalid, in.off)
	}
	if err != nil {
		return fmt.Errorf("reading at offset %d: %w", in.off, err)
	}
	in.hash.Write(p)
	in.crc = crc32.Update(in.crc, crc32.MakeTable(crc32.Castagnoli), p)
	return nil
}

func (in *snapshotReader) begin() { in.start, in.crc = in.off, 0 }

func (in *snapshotReader) checkCRC() error {
	want := in.crc
	err := in.fill(in.sum[:]) // the block stays in buf
	if err == nil && binary.BigEndian.Uint32(in.sum[:]) != want {
		err = in.bad("checksum mismatch")
	}
	return err
}

func (in *snapshotReader) load(t state, td string) error {
	h, err := in.header()
	if err != nil {
		return err
	}
	if h.trustDomain != td {
		return fmt.Errorf("%w: the snapshot is of trust domain %q, and this member is of %q", identity.ErrInvalid, h.trustDomain, td)
	}
	if err := errors.Join(t.setCounter(metaApplied, h.revision), t.setCounter(metaSequence, h.sequence)); err != nil {
		return err
	}
	l := newLoader(t)
	if err := in.each(l.load); err != nil {
		return err
	}
	return errors.Join(l.end(), l.finish())
}

// each calls f for every record, whose checksum is right by then, and checks the end of the snapshot. The value is f's only
// during the call.
func (in *snapshotReader) each(f func(k kind, key string, value []byte) error) error {
	var lastKind kind
	var lastKey string
	for {
		in.begin()
		p, err := in.read(1)
		if err != nil {
			return err
		}
		k := kind(p[0])
		if k == kindEnd {
			return in.trailer()
		}
		key, value, err := in.record()
		if err != nil {
			return err
		}
		if k < lastKind || k == lastKind && key <= lastKey {
			return in.bad("records out of order")
		}
		lastKind, lastKey = k, key
		if err := f(k, key, value); err != nil {
			return in.bad("%s", strings.TrimPrefix(err.Error(), identity.ErrInvalid.Error()+": "))
		}
	}
}

// snapshotHeader is what a snapshot begins with.
type snapshotHeader struct {
	trustDomain        string
	revision, sequence uint64
}

func (in *snapshotReader) header() (snapshotHeader, error) {
	p, err := in.read(len(snapshotMagic) + 4)
	if err != nil {
		return snapshotHeader{}, err
	}
	if string(p[:len(snapshotMagic)]) != snapshotMagic {
		return snapshotHeader{}, in.bad("this is not a snapshot of the state")
	}
	if v := binary.BigEndian.Uint32(p[len(snapshotMagic):]); v != snapshotVersion {
		return snapshotHeader{}, fmt.Errorf("%w: the snapshot has format %d, and this version reads %d: upgrade this member to the version of the others", identity.ErrInvalid, v, snapshotVersion)
	}
	in.begin()
	if p, err = in.read(4); err != nil {
		return snapshotHeader{}, err
	}
	n := binary.BigEndian.Uint32(p)
	if n > 255 { // SPIFFE-ID section 2.1
		return snapshotHeader{}, in.bad("trust domain of %d bytes", n)
	}
	if p, err = in.read(int(n) + 16); err != nil {
		return snapshotHeader{}, err
	}
	h := snapshotHeader{trustDomain: string(p[:n]), revision: binary.BigEndian.Uint64(p[n:]), sequence: binary.BigEndian.Uint64(p[n+8:])}
	return h, in.checkCRC()
}

func (in *snapshotReader) record() (key string, value []byte, err error) {
	p, err := in.read(6)
	if err != nil {
		return "", nil, err
	}
	klen, vlen := binary.BigEndian.Uint16(p), binary.BigEndian.Uint32(p[2:])
	if klen == 0 || klen > maxKeyBytes || vlen > maxValueBytes {
		return "", nil, in.bad("a record with a key of %d and a value of %d bytes", klen, vlen)
	}
	p, err = in.read(int(klen) + int(vlen))
	if err != nil {
		return "", nil, err
	}
	return string(p[:klen]), p[klen:], in.checkCRC()
}

func (in *snapshotReader) trailer() error {
	want := in.hash.Sum(nil)
	have, err := in.read(sha256.Size)
	if err != nil {
		return err
	}
	if !bytes.Equal(have, want) {
		return in.bad("the SHA-256 of what comes before does not match")
	}
	switch _, err := io.ReadFull(in.r, make([]byte, 1)); err {
	case io.EOF:
		return nil
	case nil:
		return in.bad("data after the end")
	default:
		return fmt.Errorf("reading at offset %d: %w", in.off, err)
	}
}
