//go:build aws || gcp || azure

package seal

import (
	"bytes"
	"context"
	"errors"
	"testing"

	wrapping "github.com/hashicorp/go-kms-wrapping/v2"
)

// fakeCloud is a KMS that encrypts a key by a mask.
type fakeCloud struct {
	wrapping.Wrapper
	mask byte
}

func (f fakeCloud) xor(b []byte) []byte {
	out := bytes.Clone(b)
	for i := range out {
		out[i] ^= f.mask
	}
	return out
}

func (f fakeCloud) Encrypt(_ context.Context, plain []byte, o ...wrapping.Option) (*wrapping.BlobInfo, error) {
	env, err := wrapping.EnvelopeEncrypt(plain, o...)
	if err != nil {
		return nil, err
	}
	return &wrapping.BlobInfo{Ciphertext: env.Ciphertext, Iv: env.Iv, KeyInfo: &wrapping.KeyInfo{WrappedKey: f.xor(env.Key)}}, nil
}

func (f fakeCloud) Decrypt(_ context.Context, b *wrapping.BlobInfo, o ...wrapping.Option) ([]byte, error) {
	return wrapping.EnvelopeDecrypt(&wrapping.EnvelopeInfo{Ciphertext: b.Ciphertext, Iv: b.Iv, Key: f.xor(b.KeyInfo.WrappedKey)}, o...)
}

func TestCloudKEK(t *testing.T) {
	ctx := context.Background()
	k := &cloudKEK{"test:", fakeCloud{mask: 7}}
	b, err := k.Wrap(ctx, []byte("keys"), []byte("place"))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := k.Unwrap(ctx, b, []byte("place")); err != nil || string(got) != "keys" {
		t.Errorf("unwrapped %q, %v", got, err)
	}
	for name, err := range map[string]error{
		"another key":   second((&cloudKEK{"test:", fakeCloud{mask: 8}}).Unwrap(ctx, b, []byte("place"))),
		"another place": second(k.Unwrap(ctx, b, []byte("else"))),
		"garbage":       second(k.Unwrap(ctx, []byte("garbage"), []byte("place"))),
		"empty":         second(k.Unwrap(ctx, nil, []byte("place"))),
		"truncated":     second(k.Unwrap(ctx, b[:len(b)-1], []byte("place"))),
	} {
		if !errors.Is(err, ErrOpen) {
			t.Errorf("%s: %v, want ErrOpen", name, err)
		}
	}
}

func TestSplitURI(t *testing.T) {
	for s, want := range map[string]string{
		"alias/x?region=eu": "alias/x", "arn:aws:kms:eu:1:key/2": "arn:aws:kms:eu:1:key/2", "projects/p/locations/l/keyRings/r/cryptoKeys/k": "projects/p/locations/l/keyRings/r/cryptoKeys/k",
	} {
		if name, _, err := splitURI(s, "region"); err != nil || name != want {
			t.Errorf("%s: %q, %v", s, name, err)
		}
	}
	for _, s := range []string{"", "?region=eu", "k?secret=x", "k?region=a&region=b", "k#f", "//host/k", "k%zz"} {
		if name, _, err := splitURI(s, "region"); err == nil {
			t.Errorf("%q was taken as %q", s, name)
		}
	}
}
