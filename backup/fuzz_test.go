package backup

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"countersign.io/countersign/identity"
	"countersign.io/countersign/seal"
)

// fixedKEK opens the seeds.
type fixedKEK struct{}

func (fixedKEK) URI() string { return "test:fixed" }
func (fixedKEK) Wrap(_ context.Context, plain, ad []byte) ([]byte, error) {
	aead, err := newAEAD(make([]byte, keyBytes))
	if err != nil {
		return nil, err
	}
	return aead.Seal(nil, make([]byte, 12), plain, ad), nil
}

func (fixedKEK) Unwrap(_ context.Context, b, ad []byte) ([]byte, error) {
	aead, err := newAEAD(make([]byte, keyBytes))
	if err != nil {
		return nil, err
	}
	plain, err := aead.Open(nil, make([]byte, 12), b, ad)
	if err != nil {
		return nil, seal.ErrOpen
	}
	return plain, nil
}

func (fixedKEK) Close() error { return nil }

// A fuzz test whose corpus is missing still passes: this one does not.
func TestFuzzSeedsExist(t *testing.T) {
	if files, err := os.ReadDir(filepath.Join("testdata", "fuzz", "FuzzOpen")); err != nil || len(files) < 3 {
		t.Errorf("FuzzOpen has %d seeds, %v", len(files), err)
	}
}

// FuzzOpen: whatever the file, it is read whole, or refused with a reason that the caller can tell.
func FuzzOpen(f *testing.F) {
	whole := save(f, fixedKEK{}, keyring(f), payload(300))
	f.Add(whole)
	f.Add(whole[:len(whole)/2])
	f.Fuzz(func(t *testing.T, file []byte) {
		h, chunks, headerErr := ReadHeader(bytes.NewReader(file))
		b, err := Open(t.Context(), bytes.NewReader(file), fixedKEK{}, spiffeid.TrustDomain{})
		if err == nil {
			_, err = io.Copy(io.Discard, b.State)
		}
		if err == nil {
			if headerErr != nil || h != b.Header || h.FileSize(chunks) != int64(len(file)) {
				t.Errorf("read whole, and the header is %+v, %v", h, headerErr)
			}
			return
		}
		if !errors.Is(err, identity.ErrInvalid) && !errors.Is(err, identity.ErrPrecondition) {
			t.Errorf("%v", err)
		}
		if headerErr == nil && (chunks > int64(len(file)) || chunks > int64(MaxPreamble)) {
			t.Errorf("the chunks begin at %d of %d", chunks, len(file))
		}
	})
}
