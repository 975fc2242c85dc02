package backup

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"

	"countersign.io/countersign/identity"
	"countersign.io/countersign/seal"
)

const (
	magic      = "countersign-backup\n"
	maxHeader  = 16 << 10
	maxWrapped = 16 << 10 // a KMS adds some hundred bytes
	keyBytes   = 32
	sumBytes   = 4
)

// MaxPreamble is the most bytes that come before the first chunk.
const MaxPreamble = len(magic) + 4 + maxHeader + sumBytes + 2 + maxWrapped + sumBytes

// preamble is what precedes the chunks.
type preamble struct {
	header  Header
	raw     []byte // the header as it is in the file
	wrapped []byte
	hash    [sha256.Size]byte // of the whole preamble
	end     int64
}

func sum(b []byte) []byte {
	return binary.BigEndian.AppendUint32(nil, crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)))
}

// wrapAD binds the file key to the header: nobody can give a backup another trust domain or date.
func wrapAD(h *Header, raw []byte) []byte {
	hash := sha256.Sum256(raw)
	return append([]byte("countersign/1|"+h.TrustDomain+"|backup|"), hash[:]...)
}

// newWriter draws a file key and writes the preamble.
func newWriter(ctx context.Context, w io.Writer, kek seal.KEK, h Header) (*writer, error) {
	if err := h.check(); err != nil {
		return nil, fmt.Errorf("%w: header: %v", identity.ErrInvalid, err)
	}
	raw, err := json.Marshal(h)
	if err != nil {
		return nil, fmt.Errorf("encoding the header: %w", err)
	}
	key := make([]byte, keyBytes)
	defer clear(key)
	rand.Read(key)
	wrapped, err := kek.Wrap(ctx, key, wrapAD(&h, raw))
	if err != nil {
		return nil, fmt.Errorf("wrapping the file key under %s: %w", kek.URI(), err)
	}
	if len(raw) > maxHeader || len(wrapped) > maxWrapped {
		return nil, fmt.Errorf("%w: a header of %d and a wrapped key of %d bytes: want at the most %d each", identity.ErrInvalid, len(raw), len(wrapped), maxHeader)
	}
	out := append([]byte(magic), binary.BigEndian.AppendUint32(nil, uint32(len(raw)))...)
	out = append(out, raw...)
	out = append(out, sum(out)...)
	block := append(binary.BigEndian.AppendUint16(nil, uint16(len(wrapped))), wrapped...)
	out = append(append(out, block...), sum(block)...)
	if _, err := w.Write(out); err != nil {
		return nil, fmt.Errorf("writing the header: %w", err)
	}
	aead, err := newAEAD(key)
	if err != nil {
		return nil, err
	}
	hash := sha256.Sum256(out)
	return &writer{w: w, aead: aead, ad: hash[:], left: h.Size, buf: make([]byte, 0, chunkBytes+tagBytes)}, nil
}

// readPreamble reads and checks what can be checked without a key.
func readPreamble(in *counted) (*preamble, error) {
	p := &preamble{}
	all, err := take(in, nil, len(magic))
	if i := firstDifference(all, []byte(magic)); i < len(all) {
		return nil, &DamageError{From: int64(i), To: int64(i) + 1, Reason: fmt.Sprintf("a backup begins with %q, and this file does not", magic)}
	}
	if err != nil {
		return nil, err
	}
	if all, err = take(in, all, 4); err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint32(all[len(magic):])
	if n > maxHeader {
		return nil, &DamageError{From: int64(len(magic)), To: in.n, Reason: fmt.Sprintf("a header of %d bytes, more than %d", n, maxHeader)}
	}
	if all, err = take(in, all, int(n)); err != nil {
		return nil, err
	}
	p.raw = all[len(all)-int(n):]
	want := sum(all)
	if all, err = take(in, all, sumBytes); err != nil {
		return nil, err
	}
	if !bytes.Equal(all[len(all)-sumBytes:], want) {
		return nil, &DamageError{From: int64(len(magic)), To: in.n, Reason: "the header's checksum does not match"}
	}
	if err := p.parse(); err != nil {
		return nil, err
	}
	if err := p.readWrapped(in, all); err != nil {
		return nil, err
	}
	p.end = in.n
	return p, nil
}

// parse reads the header, whose checksum has matched: what is wrong with it now was written so.
func (p *preamble) parse() error {
	from := int64(len(magic) + 4)
	var any struct{ Format int }
	if err := json.Unmarshal(p.raw, &any); err != nil {
		return &DamageError{From: from, To: from + int64(len(p.raw)), Reason: "the header is not JSON: " + err.Error()}
	}
	if any.Format > Format {
		return fmt.Errorf("%w: the backup has format %d, and this release reads up to %d: use the release that made it, or a newer one", identity.ErrPrecondition, any.Format, Format)
	}
	d := json.NewDecoder(bytes.NewReader(p.raw))
	d.DisallowUnknownFields()
	err := d.Decode(&p.header)
	if err == nil {
		if _, more := d.Token(); !errors.Is(more, io.EOF) {
			err = errors.New("something follows it")
		}
	}
	if err == nil && p.header.Format != Format {
		err = fmt.Errorf("format is %d", p.header.Format)
	}
	if err == nil {
		err = p.header.check()
	}
	if err != nil {
		return &DamageError{From: from, To: from + int64(len(p.raw)), Reason: "the header: " + err.Error()}
	}
	return nil
}

func (p *preamble) readWrapped(in *counted, all []byte) error {
	from := len(all)
	all, err := take(in, all, 2)
	if err != nil {
		return err
	}
	n := int(binary.BigEndian.Uint16(all[from:]))
	if n > maxWrapped {
		return &DamageError{From: int64(from), To: in.n, Reason: fmt.Sprintf("a wrapped key of %d bytes, more than %d", n, maxWrapped)}
	}
	if all, err = take(in, all, n); err != nil {
		return err
	}
	want := sum(all[from:])
	p.wrapped = all[from+2:]
	if all, err = take(in, all, sumBytes); err != nil {
		return err
	}
	if !bytes.Equal(all[len(all)-sumBytes:], want) {
		return &DamageError{From: int64(from), To: in.n, Reason: "the checksum of the wrapped key does not match"}
	}
	p.hash = sha256.Sum256(all)
	return nil
}

// open unwraps the file key.
func (p *preamble) open(ctx context.Context, in *counted, kek seal.KEK) (*reader, error) {
	key, err := kek.Unwrap(ctx, p.wrapped, wrapAD(&p.header, p.raw))
	if err != nil && !errors.Is(err, seal.ErrOpen) {
		return nil, fmt.Errorf("opening the backup with %s: %w", kek.URI(), err)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: opening the backup: it was sealed under %s, and %s does not open it: name that key (--key), or one that is its copy: %w", identity.ErrPrecondition, p.header.Key, kek.URI(), err)
	}
	defer clear(key)
	if len(key) != keyBytes {
		return nil, fmt.Errorf("%w: the backup's file key has %d bytes, not %d", identity.ErrInvalid, len(key), keyBytes)
	}
	aead, err := newAEAD(key)
	if err != nil {
		return nil, err
	}
	return newReader(in, aead, p.hash[:], p.header.FileSize(p.end)), nil
}

// take appends exactly n more bytes to what was read; of a shorter file, what there is.
func take(in *counted, all []byte, n int) ([]byte, error) {
	at := len(all)
	all = append(all, make([]byte, n)...)
	got, err := io.ReadFull(in, all[at:])
	switch {
	case errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF):
		if in.n == 0 {
			return all[:at+got], &DamageError{Reason: "the file is empty"}
		}
		return all[:at+got], &DamageError{From: in.n, To: in.n, Reason: "the file ends here, within its header"}
	case err != nil:
		return all[:at+got], fmt.Errorf("reading the backup at byte %d: %w", in.n, err)
	}
	return all, nil
}

// firstDifference is where a differs from b, or len(a).
func firstDifference(a, b []byte) int {
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return len(a)
}
