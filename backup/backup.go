// Package backup is the file that a cluster can be brought back from: the keyring and a snapshot of the state, sealed
// together. It does not know what a state is.
//
// A file is, integers big-endian:
//
//	"countersign-backup\n"
//	header length uint32, header (JSON, readable by anybody), CRC-32C of all before uint32
//	wrapped length uint16, the file key wrapped under a key-encryption key, CRC-32C of this block uint32
//	chunks: each 16384 bytes of the payload (the last one 1 to 16384) sealed with AES-256-GCM under the file key
//
// and the payload is
//
//	keyring length uint32, keyring (see seal.Keyring.Plain), the state's snapshot to the end
//
// The order above up to the header's checksum is that of every format to come: a release can say of a newer file what it
// is. The checksums tell damage from a key that does not fit; they are no defence. That is the wrapping, whose
// additional data is the header's hash, and the chunks: a nonce is the chunk's number and whether it is the last, so
// that none can be altered, dropped, doubled, moved or put in from another file, and the additional data is the hash of
// all that precedes the first one. The header says how long the payload is; so a file that ends early is known as such
// even without the key.
//
// The file key is random, used for one file and never kept: counting nonces is safe. Whoever has the key-encryption key
// and the file has the trust domain.
package backup

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"countersign.io/countersign/identity"
	"countersign.io/countersign/seal"
)

// Format is the one that this release writes and reads.
const Format = 1

// maxKeyring is above the largest keyring that package seal makes: 1000 keys of 36 bytes.
const maxKeyring = 64 << 10

// Header is what anybody may know of a backup.
type Header struct {
	Format      int       `json:"format"`
	TrustDomain string    `json:"trust_domain"`
	Member      string    `json:"member"`  // who made it
	Version     string    `json:"version"` // of the release that made it
	Level       uint32    `json:"level"`   // of the cluster: what a release must know to read the state
	CreatedAt   time.Time `json:"created_at"`
	Revision    uint64    `json:"revision"`  // of the state
	Confirmed   bool      `json:"confirmed"` // a leader confirmed that the state lacked nothing that was acknowledged before
	Size        int64     `json:"size"`      // of the payload, in bytes
	Key         string    `json:"key"`       // URI of the key-encryption key that opens it
}

// FileSize is how long the whole file is whose chunks begin at the given offset.
func (h *Header) FileSize(chunks int64) int64 {
	return chunks + h.Size + (h.Size+chunkBytes-1)/chunkBytes*tagBytes
}

// check is of what every reader relies on. The error names the field.
func (h *Header) check() error {
	td, err := spiffeid.TrustDomainFromString(h.TrustDomain)
	switch {
	case err != nil || td.Name() != h.TrustDomain:
		return fmt.Errorf("trust_domain %q is none", h.TrustDomain)
	case h.Member == "" || len(h.Member) > 255:
		return fmt.Errorf("member has %d bytes", len(h.Member))
	case len(h.Version) > 255:
		return fmt.Errorf("version has %d bytes", len(h.Version))
	case h.CreatedAt.IsZero():
		return errors.New("created_at is missing")
	case h.Size < 5 || h.Size > 1<<50:
		return fmt.Errorf("size is %d", h.Size)
	case h.Key == "" || len(h.Key) > 4096:
		return fmt.Errorf("key has %d bytes", len(h.Key))
	}
	return nil
}

// DamageError says which bytes of a backup are not as they were written: those from From up to, not including, To. Where the
// two are equal, the file ends, or goes on, where it should not. It wraps identity.ErrInvalid.
type DamageError struct {
	From, To int64
	Reason   string
}

// Error names the bytes.
func (e *DamageError) Error() string {
	if e.To > e.From+1 {
		return fmt.Sprintf("the backup is damaged in bytes %d to %d: %s: take another one", e.From, e.To-1, e.Reason)
	}
	return fmt.Sprintf("the backup is damaged at byte %d: %s: take another one", e.From, e.Reason)
}

// Unwrap makes it an identity.ErrInvalid.
func (e *DamageError) Unwrap() error { return identity.ErrInvalid }

// Save writes a backup to w. state writes the snapshot, which must have exactly stateBytes bytes: it is counted before,
// because the header says how long the file is. Save sets the header's Format, Size and Key. It keeps nothing of
// the keyring.
func Save(ctx context.Context, w io.Writer, kek seal.KEK, h Header, keyring *seal.Keyring, stateBytes int64, state func(io.Writer) error) error {
	plain := keyring.Plain()
	defer clear(plain)
	h.Format, h.Key = Format, kek.URI()
	h.Size = 4 + int64(len(plain)) + stateBytes
	out, err := newWriter(ctx, w, kek, h)
	if err != nil {
		return fmt.Errorf("making a backup: %w", err)
	}
	defer out.clear()
	if _, err := out.Write(binary.BigEndian.AppendUint32(nil, uint32(len(plain)))); err != nil {
		return fmt.Errorf("writing the backup: %w", err)
	}
	if _, err := out.Write(plain); err != nil {
		return fmt.Errorf("writing the backup: %w", err)
	}
	if err := state(out); err != nil {
		return fmt.Errorf("writing the backup: %w", err)
	}
	if err := out.close(); err != nil {
		return fmt.Errorf("writing the backup: %w", err)
	}
	return nil
}

// Backup is a backup being read.
type Backup struct {
	Header  Header
	Keyring *seal.Keyring
	// State gives the snapshot to its end. What it has given is authentic; that the file is whole is known at io.EOF only.
	// Its errors are *DamageError, or those of reading the file.
	State io.Reader
}

// Open reads a backup's beginning. Its errors wrap *DamageError where the file is not as it was written, and
// seal.ErrOpen where kek does not fit. Of another trust domain than td (zero: any) it opens nothing.
func Open(ctx context.Context, r io.Reader, kek seal.KEK, td spiffeid.TrustDomain) (*Backup, error) {
	in := &counted{r: r}
	p, err := readPreamble(in)
	if err != nil {
		return nil, err
	}
	if !td.IsZero() && p.header.TrustDomain != td.Name() {
		return nil, fmt.Errorf("%w: the backup is of trust domain %q, not %q: take one of this trust domain, or correct trust_domain", identity.ErrPrecondition, p.header.TrustDomain, td.Name())
	}
	body, err := p.open(ctx, in, kek)
	if err != nil {
		return nil, err
	}
	plain, err := readKeyring(body)
	defer clear(plain)
	if err != nil {
		return nil, err
	}
	keyring, err := seal.ParseKeyring(plain)
	if err != nil {
		return nil, fmt.Errorf("%w: reading the backup's keyring: %w", identity.ErrInvalid, err)
	}
	return &Backup{Header: p.header, Keyring: keyring, State: body}, nil
}

func readKeyring(body *reader) ([]byte, error) {
	var n [4]byte
	if _, err := io.ReadFull(body, n[:]); err != nil {
		return nil, short(err)
	}
	length := binary.BigEndian.Uint32(n[:])
	if length > maxKeyring {
		return nil, fmt.Errorf("%w: the backup's keyring has %d bytes, more than %d: a newer release made it", identity.ErrInvalid, length, maxKeyring)
	}
	plain := make([]byte, length)
	if _, err := io.ReadFull(body, plain); err != nil {
		return plain, short(err)
	}
	return plain, nil
}

// short is for a payload that is authentic and yet too short.
func short(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("%w: the backup's payload ends within the keyring: it was made wrongly", identity.ErrInvalid)
	}
	return err
}

// ReadHeader reads what is readable without a key, and where the chunks begin. Nothing but a checksum vouches for it.
func ReadHeader(r io.Reader) (h Header, chunks int64, err error) {
	p, err := readPreamble(&counted{r: r})
	if err != nil {
		return Header{}, 0, err
	}
	return p.header, p.end, nil
}

// counted knows how much was read.
type counted struct {
	r io.Reader
	n int64
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
}
