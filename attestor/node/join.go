package node

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"

	"countersign.io/countersign/identity"
)

// Limits of a join token string.
const (
	MaxTokenString = 4096 // bytes of the string
	MaxAddresses   = 16
	maxAddress     = 261 // a DNS name of 253 bytes, brackets, colon and port
)

const (
	tokenPrefix = "cs1."
	pinPrefix   = "sha256:"
	secretBytes = 32
)

// NewSecret makes a join secret of 256 random bits, in base64url, and the hash that the cluster keeps of it. A
// secret of that size needs no salt and no slow hash.
func NewSecret() (secret string, hash []byte) {
	b := make([]byte, secretBytes)
	rand.Read(b) // never fails (crypto/rand)
	secret = base64.RawURLEncoding.EncodeToString(b)
	clear(b)
	return secret, HashSecret(secret)
}

// HashSecret is the SHA-256 of the secret as written: what identity.JoinToken.Hash holds.
func HashSecret(secret string) []byte {
	h := sha256.Sum256([]byte(secret))
	return h[:]
}

// SecretMatches compares a secret with a hash of HashSecret in constant time.
func SecretMatches(secret string, hash []byte) bool {
	return subtle.ConstantTimeCompare(HashSecret(secret), hash) == 1
}

// CheckSecret reports whether the string has the form of a secret that NewSecret made, so that a member need not
// look up anything else.
func CheckSecret(secret string) error {
	b, err := base64.RawURLEncoding.Strict().DecodeString(secret)
	if err != nil || len(b) != secretBytes {
		return fmt.Errorf("%w: the join secret is not 43 characters of base64url: copy the whole token again", identity.ErrInvalid)
	}
	clear(b)
	return nil
}

// Token is what a join token string carries: all that a newcomer needs for its first contact. It prints without
// its secret.
type Token struct {
	Addresses []string // of members, host:port; the first to answer serves
	Pin       string   // CA pin: sha256:HEX of the root's SubjectPublicKeyInfo
	Secret    string   // one-time
	Purpose   string   // identity.JoinAgent or identity.JoinServer
}

// tokenJSON is the wire form: another type, so that Token's own methods cannot write the secret by accident.
type tokenJSON struct {
	Addresses []string `json:"addresses"`
	Pin       string   `json:"pin"`
	Secret    string   `json:"secret"`
	Purpose   string   `json:"purpose"`
}

// String is the token without its secret.
func (t Token) String() string {
	return fmt.Sprintf("join token for %s of %s at %s", t.Purpose, t.Pin, strings.Join(t.Addresses, ","))
}

// GoString is String: %#v must not show the secret either.
func (t Token) GoString() string { return t.String() }

// LogValue is String.
func (t Token) LogValue() slog.Value { return slog.StringValue(t.String()) }

// MarshalJSON refuses: FormatToken is the one way to write a secret.
func (t Token) MarshalJSON() ([]byte, error) {
	return nil, errors.New("encoding join token: use FormatToken")
}

// FormatToken writes the token as one string, "cs1." and base64url of JSON, after the checks of ParseToken.
func FormatToken(t Token) (string, error) {
	if err := checkToken(t); err != nil {
		return "", fmt.Errorf("making join token: %w", err)
	}
	b, err := json.Marshal(tokenJSON(t))
	if err != nil {
		return "", fmt.Errorf("making join token: %w", err)
	}
	s := tokenPrefix + base64.RawURLEncoding.EncodeToString(b)
	if len(s) > MaxTokenString {
		return "", fmt.Errorf("making join token: %w: it has %d bytes, at the most %d: give fewer addresses", identity.ErrInvalid, len(s), MaxTokenString)
	}
	return s, nil
}

// ParseToken reads a join token string; surrounding white space is ignored. Its errors wrap identity.ErrInvalid and
// never contain any part of the string.
func ParseToken(s string) (Token, error) {
	fail := func(what string) (Token, error) {
		return Token{}, fmt.Errorf("reading join token: %w: %s: copy the whole token that countersign token create printed", identity.ErrInvalid, what)
	}
	if len(s) > MaxTokenString+64 {
		return fail(fmt.Sprintf("it has %d bytes, at the most %d", len(s), MaxTokenString))
	}
	s = strings.TrimSpace(s)
	if len(s) > MaxTokenString {
		return fail(fmt.Sprintf("it has %d bytes, at the most %d", len(s), MaxTokenString))
	}
	rest, ok := strings.CutPrefix(s, tokenPrefix)
	if !ok {
		return fail("it does not start with " + tokenPrefix)
	}
	b, err := base64.RawURLEncoding.Strict().DecodeString(rest)
	if err != nil {
		return fail("it is not base64url: it was cut or changed")
	}
	defer clear(b)
	var w tokenJSON
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&w); err != nil { // err may quote the input
		return fail("its content is not what a join token holds")
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return fail("it has trailing content")
	}
	t := Token(w)
	if err := checkToken(t); err != nil {
		return Token{}, fmt.Errorf("reading join token: %w", err)
	}
	return t, nil
}

func checkToken(t Token) error {
	if n := len(t.Addresses); n == 0 || n > MaxAddresses {
		return fmt.Errorf("%w: %d addresses: want 1 to %d", identity.ErrInvalid, n, MaxAddresses)
	}
	for i, a := range t.Addresses {
		if err := checkAddress(a); err != nil {
			return fmt.Errorf("%w: address %d: want host:port, such as ca-1.example.org:8443", identity.ErrInvalid, i+1)
		}
	}
	if err := CheckPin(t.Pin); err != nil {
		return err
	}
	if t.Purpose != identity.JoinAgent && t.Purpose != identity.JoinServer {
		return fmt.Errorf("%w: the token's purpose is neither %s nor %s", identity.ErrInvalid, identity.JoinAgent, identity.JoinServer)
	}
	return CheckSecret(t.Secret)
}

func checkAddress(a string) error {
	if len(a) > maxAddress || strings.ContainsFunc(a, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return identity.ErrInvalid
	}
	host, port, err := net.SplitHostPort(a)
	if err != nil || host == "" {
		return identity.ErrInvalid
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return identity.ErrInvalid
	}
	return nil
}

// Pin is the CA pin of a root's SubjectPublicKeyInfo (x509.Certificate.RawSubjectPublicKeyInfo).
func Pin(spki []byte) string {
	h := sha256.Sum256(spki)
	return pinPrefix + hex.EncodeToString(h[:])
}

// maxShown is more than any member shows: each costs signatures to be checked.
const maxShown = 16

// PinnedRoots are those of the CA certificates that a member shows which may be believed by a pin: what has the pinned key, and what
// that key, or another one that is believed, has signed and that is valid at now. So who has pinned the key of a root can
// verify the roots after it, even when the certificate of the first has ended: a pin names a key. Anybody can make another certificate of
// the pinned key; that gains nothing, since the leaf must be signed by it, or by a key that it signed.
func PinnedRoots(shown []*x509.Certificate, pin string, now time.Time) []*x509.Certificate {
	shown = shown[:min(len(shown), maxShown)]
	var believed []*x509.Certificate
	for _, c := range shown {
		if c.IsCA && subtle.ConstantTimeCompare([]byte(Pin(c.RawSubjectPublicKeyInfo)), []byte(pin)) == 1 {
			believed = append(believed, c)
		}
	}
	for i := 0; i < len(believed); i++ { // it grows
		for _, c := range shown {
			if c.IsCA && !c.Equal(believed[i]) && !slices.ContainsFunc(believed, c.Equal) && !now.Before(c.NotBefore) && !now.After(c.NotAfter) && c.CheckSignatureFrom(believed[i]) == nil {
				believed = append(believed, c)
			}
		}
	}
	return believed
}

// CheckPin reports whether the string has the form that Pin makes.
func CheckPin(pin string) error {
	h, ok := strings.CutPrefix(pin, pinPrefix)
	b, err := hex.DecodeString(h)
	if !ok || err != nil || len(b) != sha256.Size || strings.ToLower(h) != h {
		return fmt.Errorf("%w: the CA pin is not sha256: and 64 lower-case hexadecimal digits", identity.ErrInvalid)
	}
	return nil
}
