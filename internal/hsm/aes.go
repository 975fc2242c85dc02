//go:build cgo

package hsm

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"

	"github.com/miekg/pkcs11"
)

const (
	aesBytes  = 32
	nonceSize = 12
	tagBits   = 128
	// aesFormat is the first byte of what AES encrypts: AES-256-GCM with the nonce's length, the nonce, ciphertext and tag.
	aesFormat = 1
)

// AES is an AES-256 key in a token, used in GCM (CKM_AES_GCM): what is encrypted is authenticated with its place, in one
// operation that every HSM of the last ten years has. CKM_AES_KEY_WRAP_PAD would wrap keys of the token only on some, and
// binds nothing to its place; CBC with an HMAC would take two keys that must not be parted.
type AES struct{ m *module }

// OpenAES loads the module, finds the token and logs in, so that what is wrong is said at once. The key need not be there:
// Encrypt makes it.
func OpenAES(u URI) (*AES, error) {
	m, err := load(u)
	if err != nil {
		return nil, err
	}
	k := &AES{m}
	if _, err := use(m, k.find); err != nil && !errors.Is(err, ErrNoKey) {
		return nil, err
	}
	return k, nil
}

// URI names the key.
func (k *AES) URI() string { return k.m.uri.String() }

func (k *AES) find(s *session) (pkcs11.ObjectHandle, error) {
	h, err := s.one(pkcs11.CKO_SECRET_KEY)
	if err != nil {
		return 0, err
	}
	kind, ok1 := s.number(h, pkcs11.CKA_KEY_TYPE)
	size, ok2 := s.number(h, pkcs11.CKA_VALUE_LEN)
	if !ok1 || kind != pkcs11.CKK_AES || ok2 && size != aesBytes {
		return 0, fmt.Errorf("%w: key %s of %s is not an AES-256 key", ErrKeyType, s.uri.key(), s.uri.token())
	}
	return h, nil
}

// make generates the key: it stays in the token, which does not show it to anyone.
func (k *AES) make(s *session) (pkcs11.ObjectHandle, error) {
	id := s.uri.ID
	if len(id) == 0 {
		id = make([]byte, 16)
		rand.Read(id)
	}
	h, err := s.ctx.GenerateKey(s.handle, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_KEY_GEN, nil)}, []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY),
		pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES),
		pkcs11.NewAttribute(pkcs11.CKA_VALUE_LEN, aesBytes),
		pkcs11.NewAttribute(pkcs11.CKA_LABEL, s.uri.Object),
		pkcs11.NewAttribute(pkcs11.CKA_ID, id),
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true),
		pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true),
		pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, true),
		pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, false),
		pkcs11.NewAttribute(pkcs11.CKA_ENCRYPT, true),
		pkcs11.NewAttribute(pkcs11.CKA_DECRYPT, true),
		pkcs11.NewAttribute(pkcs11.CKA_WRAP, false),
		pkcs11.NewAttribute(pkcs11.CKA_UNWRAP, false),
	})
	if err != nil {
		return 0, fmt.Errorf("%w: making AES key %s in %s: %w", ErrToken, s.uri.key(), s.uri.token(), err)
	}
	// Another member with the same token may have made one too. Two of one name would stop both for good: better neither.
	if _, err := k.find(s); err != nil {
		return 0, fmt.Errorf("making key %s in %s: somebody else did at the same time: %w", s.uri.key(), s.uri.token(), errors.Join(err, s.ctx.DestroyObject(s.handle, h)))
	}
	return h, nil
}

// Encrypt encrypts plaintext and authenticates ad with it, inside the token. It makes the key if the token has none.
func (k *AES) Encrypt(plaintext, ad []byte) ([]byte, error) {
	plaintext = bytes.Clone(plaintext) // the caller clears its own, perhaps before a token that hangs has read it
	return use(k.m, func(s *session) ([]byte, error) {
		defer clear(plaintext)
		h, err := k.find(s)
		if errors.Is(err, ErrNoKey) {
			h, err = k.make(s)
		}
		if err != nil {
			return nil, err
		}
		nonce := make([]byte, nonceSize)
		rand.Read(nonce)
		params := pkcs11.NewGCMParams(nonce, ad, tagBits)
		defer params.Free()
		if err := s.ctx.EncryptInit(s.handle, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_GCM, params)}, h); err != nil {
			if is(err, pkcs11.CKR_KEY_TYPE_INCONSISTENT) || is(err, pkcs11.CKR_KEY_FUNCTION_NOT_PERMITTED) {
				return nil, fmt.Errorf("%w: key %s of %s may not encrypt by AES-GCM: %w", ErrKeyType, s.uri.key(), s.uri.token(), err)
			}
			return nil, fmt.Errorf("%w: encrypting in %s: %w", ErrToken, s.uri.token(), err)
		}
		body, err := s.ctx.Encrypt(s.handle, plaintext)
		if err != nil {
			return nil, fmt.Errorf("%w: encrypting in %s: %w", ErrToken, s.uri.token(), err)
		}
		// Some tokens take a nonce of their own and say so here.
		if used := params.IV(); len(used) > 0 {
			nonce = used
		}
		if len(nonce) > 255 {
			return nil, fmt.Errorf("%w: %s took a nonce of %d bytes", ErrToken, s.uri.token(), len(nonce))
		}
		return append(append([]byte{aesFormat, byte(len(nonce))}, nonce...), body...), nil
	})
}

// Decrypt opens what Encrypt made under this key with this ad; ErrOpen.
func (k *AES) Decrypt(ciphertext, ad []byte) ([]byte, error) {
	if len(ciphertext) < 2 || ciphertext[0] != aesFormat || ciphertext[1] == 0 || len(ciphertext) < 2+int(ciphertext[1])+tagBits/8 {
		return nil, fmt.Errorf("%w: it is none of a token's", ErrOpen)
	}
	nonce, body := ciphertext[2:2+int(ciphertext[1])], ciphertext[2+int(ciphertext[1]):]
	return use(k.m, func(s *session) ([]byte, error) {
		h, err := k.find(s)
		if err != nil {
			return nil, err
		}
		params := pkcs11.NewGCMParams(nonce, ad, tagBits)
		defer params.Free()
		if err := s.ctx.DecryptInit(s.handle, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_GCM, params)}, h); err != nil {
			return nil, fmt.Errorf("%w: decrypting in %s: %w", ErrToken, s.uri.token(), err)
		}
		plain, err := s.ctx.Decrypt(s.handle, body)
		switch {
		case err == nil:
			return plain, nil
		case is(err, pkcs11.CKR_DEVICE_ERROR), is(err, pkcs11.CKR_DEVICE_REMOVED), is(err, pkcs11.CKR_DEVICE_MEMORY), is(err, pkcs11.CKR_HOST_MEMORY),
			is(err, pkcs11.CKR_TOKEN_NOT_PRESENT), is(err, pkcs11.CKR_SESSION_CLOSED), is(err, pkcs11.CKR_SESSION_HANDLE_INVALID), is(err, pkcs11.CKR_USER_NOT_LOGGED_IN):
			return nil, fmt.Errorf("%w: decrypting in %s: %w", ErrToken, s.uri.token(), err)
		}
		// Tokens differ in what they call a wrong tag; SoftHSM says general error.
		return nil, fmt.Errorf("%w: key %s of %s: %w", ErrOpen, s.uri.key(), s.uri.token(), err)
	})
}
