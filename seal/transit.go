package seal

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"strings"

	"countersign.io/countersign/internal/vault"
)

var transitName = regexp.MustCompile(`^[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*$`)

// transitKEK is a key of Vault's transit engine. Vault encrypts with AES-256-GCM (its usual kind of key) and authenticates
// ad; the key never leaves it. Vault makes a key that is not there at the first encryption, if its policy lets us.
type transitKEK struct {
	vault      Vault
	mount, key string
}

func openTransit(rest string, v Vault) (KEK, error) {
	i := strings.LastIndexByte(rest, '/')
	if i <= 0 || !transitName.MatchString(rest) || strings.Contains(rest, "..") {
		return nil, fmt.Errorf("%q: want transit:MOUNT/KEY, such as transit:transit/countersign", "transit:"+rest)
	}
	if v == nil {
		return nil, fmt.Errorf("transit:%s: how to reach Vault is not configured: set seal.vault", rest)
	}
	return &transitKEK{vault: v, mount: rest[:i], key: rest[i+1:]}, nil
}

// URI is transit:MOUNT/KEY.
func (k *transitKEK) URI() string { return "transit:" + k.mount + "/" + k.key }

// Wrap implements KEK. What it returns is Vault's text, "vault:v1:...".
func (k *transitKEK) Wrap(ctx context.Context, plaintext, ad []byte) ([]byte, error) {
	var out struct {
		Ciphertext string `json:"ciphertext"`
	}
	in := map[string]string{"plaintext": base64.StdEncoding.EncodeToString(plaintext), "associated_data": base64.StdEncoding.EncodeToString(ad)}
	if err := k.vault.Do(ctx, http.MethodPost, k.mount+"/encrypt/"+k.key, in, &out); err != nil {
		return nil, fmt.Errorf("wrapping with %s: %w", k.URI(), err)
	}
	if !strings.HasPrefix(out.Ciphertext, "vault:") {
		return nil, fmt.Errorf("wrapping with %s: Vault answered without a ciphertext: is %s a transit engine?", k.URI(), k.mount)
	}
	return []byte(out.Ciphertext), nil
}

// Unwrap implements KEK.
func (k *transitKEK) Unwrap(ctx context.Context, ciphertext, ad []byte) ([]byte, error) {
	if !strings.HasPrefix(string(ciphertext), "vault:") {
		return nil, fmt.Errorf("unwrapping with %s: no ciphertext of Vault's: %w", k.URI(), ErrOpen)
	}
	var out struct {
		Plaintext string `json:"plaintext"`
	}
	in := map[string]string{"ciphertext": string(ciphertext), "associated_data": base64.StdEncoding.EncodeToString(ad)}
	if err := k.vault.Do(ctx, http.MethodPost, k.mount+"/decrypt/"+k.key, in, &out); err != nil {
		// Vault says 400 for a ciphertext of another key or place, for a damaged one, and for a key that is not there.
		if errors.Is(err, vault.ErrInvalid) {
			return nil, fmt.Errorf("unwrapping with %s: %w: %w", k.URI(), ErrOpen, err)
		}
		return nil, fmt.Errorf("unwrapping with %s: %w", k.URI(), err)
	}
	plain, err := base64.StdEncoding.DecodeString(out.Plaintext)
	if err != nil {
		return nil, fmt.Errorf("unwrapping with %s: Vault's answer is not base64", k.URI())
	}
	return plain, nil
}
