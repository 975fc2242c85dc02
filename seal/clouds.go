//go:build aws || gcp || azure

package seal

import (
	"context"
	"fmt"
	"net/url"

	wrapping "github.com/hashicorp/go-kms-wrapping/v2"
	"google.golang.org/protobuf/proto"
)

// cloudKEK is a key of a cloud's KMS. go-kms-wrapping draws a key for each message, encrypts by AES-256-GCM under it, here,
// with ad authenticated, and has the KMS encrypt that key: the KMS sees neither plaintext nor ad.
type cloudKEK struct {
	uri     string
	wrapper wrapping.Wrapper
}

// openCloud configures the wrapper, which asks its KMS about the key. The clouds' usual environment variables and machine
// credentials apply; which key it is, only the URI says.
func openCloud(ctx context.Context, uri string, w wrapping.Wrapper, config map[string]string, more ...wrapping.Option) (KEK, error) {
	if _, err := w.SetConfig(ctx, append(more, wrapping.WithConfigMap(config))...); err != nil {
		return nil, fmt.Errorf("opening %s: %w", uri, err)
	}
	return &cloudKEK{uri, w}, nil
}

// URI names the key.
func (k *cloudKEK) URI() string { return k.uri }

// Wrap implements KEK.
func (k *cloudKEK) Wrap(ctx context.Context, plaintext, ad []byte) ([]byte, error) {
	blob, err := k.wrapper.Encrypt(ctx, plaintext, wrapping.WithAad(ad))
	if err != nil {
		return nil, fmt.Errorf("wrapping with %s: %w", k.uri, err)
	}
	out, err := proto.Marshal(blob)
	if err != nil {
		return nil, fmt.Errorf("wrapping with %s: %w", k.uri, err)
	}
	return out, nil
}

// Unwrap implements KEK. The clouds do not tell a refusal of the ciphertext from one of the caller in one way: the error
// wraps ErrOpen for both, and says what the cloud said.
func (k *cloudKEK) Unwrap(ctx context.Context, ciphertext, ad []byte) ([]byte, error) {
	blob := &wrapping.BlobInfo{}
	if err := proto.Unmarshal(ciphertext, blob); err != nil || blob.KeyInfo == nil || len(blob.KeyInfo.WrappedKey) == 0 {
		return nil, fmt.Errorf("unwrapping with %s: no ciphertext of a cloud's: %w", k.uri, ErrOpen)
	}
	plain, err := k.wrapper.Decrypt(ctx, blob, wrapping.WithAad(ad))
	if err != nil {
		return nil, fmt.Errorf("unwrapping with %s: %w: %w", k.uri, ErrOpen, err)
	}
	return plain, nil
}

// splitURI parts NAME?a=b, where only the attributes named may be given.
func splitURI(rest string, allowed ...string) (name string, attrs map[string]string, err error) {
	u, err := url.Parse("x:" + rest)
	if err != nil || u.Fragment != "" || u.Host != "" || u.User != nil {
		return "", nil, fmt.Errorf("the URI is malformed")
	}
	name = u.Opaque
	if name == "" {
		name = u.Path
	}
	if name, err = url.PathUnescape(name); err != nil || name == "" {
		return "", nil, fmt.Errorf("the URI names no key")
	}
	attrs = map[string]string{}
	query, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		return "", nil, fmt.Errorf("the URI is malformed")
	}
	for k, v := range query {
		known := false
		for _, a := range allowed {
			known = known || a == k
		}
		if !known || len(v) != 1 {
			return "", nil, fmt.Errorf("%q in the URI is not understood, or there twice: it may have %v", k, allowed)
		}
		attrs[k] = v[0]
	}
	return name, attrs, nil
}
