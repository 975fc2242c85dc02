package backup

import (
	"crypto/aes"
	"crypto/cipher"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

const (
	chunkBytes = 16 << 10
	tagBytes   = 16
)

func newAEAD(key []byte) (cipher.AEAD, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, fmt.Errorf("preparing AES: %w", err)
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		return nil, fmt.Errorf("preparing GCM: %w", err)
	}
	return aead, nil
}

// nonce is the chunk's number and whether it is the last.
func nonce(number uint64, last bool) []byte {
	n := make([]byte, 12)
	binary.BigEndian.PutUint64(n[3:], number)
	if last {
		n[11] = 1
	}
	return n
}

// writer seals what is written to it.
type writer struct {
	w      io.Writer
	aead   cipher.AEAD
	ad     []byte
	buf    []byte // of the chunk that is filling up; room for the tag behind it
	number uint64
	left   int64 // bytes that the header promises and that are still to come
	err    error // the first, which stays
}

var errLength = errors.New("the payload is not as long as was announced")

func (w *writer) Write(p []byte) (int, error) {
	if w.err == nil && int64(len(p)) > w.left {
		w.err = errLength
	}
	n := 0
	for w.err == nil && n < len(p) {
		// A full chunk waits for what comes after it: the last one is sealed as the last.
		if len(w.buf) == chunkBytes {
			w.flush(false)
			continue
		}
		k := min(chunkBytes-len(w.buf), len(p)-n)
		w.buf = append(w.buf, p[n:n+k]...)
		n += k
		w.left -= int64(k)
	}
	return n, w.err
}

func (w *writer) flush(last bool) {
	sealed := w.aead.Seal(w.buf[:0], nonce(w.number, last), w.buf, w.ad)
	_, w.err = w.w.Write(sealed)
	w.number++
	w.buf = w.buf[:0]
}

// close seals the last chunk. A payload that is too short is an error, and the file is then without an end.
func (w *writer) close() error {
	if w.err == nil && w.left != 0 {
		w.err = errLength
	}
	if w.err == nil {
		w.flush(true)
	}
	return w.err
}

func (w *writer) clear() { clear(w.buf[:cap(w.buf)]) }

// reader opens the chunks. It gives no byte of a chunk before that chunk is authenticated.
type reader struct {
	in     *counted
	aead   cipher.AEAD
	ad     []byte
	size   int64  // of the whole file
	buf    []byte // of one chunk
	plain  []byte // what of buf is opened and not yet given
	number uint64
	err    error // the first, which stays; io.EOF after the last chunk
}

func newReader(in *counted, aead cipher.AEAD, ad []byte, size int64) *reader {
	return &reader{in: in, aead: aead, ad: ad, size: size, buf: make([]byte, chunkBytes+tagBytes)}
}

// Read implements io.Reader. io.EOF means that the file was whole.
func (r *reader) Read(p []byte) (int, error) {
	for len(r.plain) == 0 && r.err == nil {
		r.err = r.next()
	}
	if len(r.plain) == 0 {
		return 0, r.err
	}
	n := copy(p, r.plain)
	clear(r.plain[:n]) // the keyring is in the first chunk
	r.plain = r.plain[n:]
	return n, nil
}

// next opens one chunk. How long it is follows from the size that the authenticated header says.
func (r *reader) next() error {
	from := r.in.n
	if from == r.size {
		return r.end()
	}
	n := min(int64(len(r.buf)), r.size-from)
	last := from+n == r.size
	got, err := io.ReadFull(r.in, r.buf[:n])
	switch {
	case errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF):
		return &DamageError{From: from + int64(got), To: from + int64(got), Reason: fmt.Sprintf("the file ends here, and lacks the %d bytes that follow", r.size-from-int64(got))}
	case err != nil:
		return fmt.Errorf("reading the backup at byte %d: %w", r.in.n, err)
	}
	plain, err := r.aead.Open(r.buf[:0], nonce(r.number, last), r.buf[:n], r.ad)
	if err != nil {
		return &DamageError{From: from, To: from + n, Reason: "these are not the bytes that were written here"}
	}
	r.number++
	r.plain = plain
	return nil
}

func (r *reader) end() error {
	var b [1]byte
	switch _, err := io.ReadFull(r.in, b[:]); {
	case errors.Is(err, io.EOF):
		return io.EOF
	case err != nil:
		return fmt.Errorf("reading the backup at byte %d: %w", r.in.n, err)
	}
	return &DamageError{From: r.size, To: r.size, Reason: "the backup ends before this byte, and the file goes on"}
}
