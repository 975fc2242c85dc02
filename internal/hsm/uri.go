// Package hsm uses keys inside PKCS#11 tokens: an AES-256 key that wraps, a P-256 key that signs. Each operation logs in,
// does its work and closes its session: nothing is held that a token's restart or removal could break, and the PIN is
// in memory only meanwhile.
//
// The module is loaded once for the process and stays initialised: PKCS#11 has one state per process and module, so a
// part that finalises it would take it from all others. That, and a library that panics where a token fails, is why
// this speaks PKCS#11 itself.
package hsm

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"net/url"
	"path/filepath"
	"strconv"
	"strings"
)

// What a caller branches on.
var (
	// ErrURI: the URI does not say what is needed, or says it twice.
	ErrURI = errors.New("malformed PKCS#11 URI")
	// ErrNoKey: the token is there, the key is not.
	ErrNoKey = errors.New("the token has no such key")
	// ErrKeyType: there is an object of that name which is not a key that can be used so.
	ErrKeyType = errors.New("the token's key is of another kind")
	// ErrExists: a key is to be made that is there.
	ErrExists = errors.New("the token has the key already")
	// ErrOpen: the token refused a ciphertext.
	ErrOpen = errors.New("the ciphertext does not open with the token's key")
	// ErrPIN: the PIN is missing, or the token refused it. It is in no error.
	ErrPIN = errors.New("the token's PIN")
	// ErrToken: the module or the token is not there, or failed.
	ErrToken = errors.New("the PKCS#11 token cannot be used")
)

// maxURI bounds a URI; real ones have some 150 bytes.
const maxURI = 4096

// URI is a key in a token, as RFC 7512 writes it, as far as it is understood here.
type URI struct {
	Module    string // path of the module; module-path
	Token     string // label of the token
	Serial    string // of the token
	Slot      *uint  // slot-id
	Object    string // label of the key
	ID        []byte // CKA_ID of the key; empty: any
	PINSource string // path of a file with the PIN; empty: the token wants no login
}

// ParseURI reads pkcs11:token=T;object=K?module-path=/M&pin-source=/P. The module is needed, and a label or an ID of the
// key, and one of token, serial and slot-id. A PIN in the URI (pin-value) is refused: it would be in configuration files and error
// messages. The error wraps ErrURI and does not repeat the URI.
func ParseURI(s string) (URI, error) {
	u, err := parseURI(s)
	if err != nil {
		return URI{}, fmt.Errorf("%w: %w", ErrURI, err)
	}
	return u, nil
}

func parseURI(s string) (URI, error) {
	var u URI
	rest, ok := strings.CutPrefix(s, "pkcs11:")
	if !ok || len(s) > maxURI {
		return u, fmt.Errorf("want pkcs11:token=TOKEN;object=KEY?module-path=/path/of/module.so&pin-source=/path/of/pin, at the most %d bytes", maxURI)
	}
	path, query, _ := strings.Cut(rest, "?")
	seen := map[string]bool{}
	// RFC 7512 section 2.3: ';' parts the path, '&' the query. Attributes of the one are taken in the other: several tools write them so.
	for _, attr := range append(strings.Split(path, ";"), strings.Split(query, "&")...) {
		if attr == "" {
			continue
		}
		name, raw, ok := strings.Cut(attr, "=")
		if !ok {
			return u, errors.New("an attribute without a value")
		}
		value, err := url.PathUnescape(raw)
		if err != nil || strings.ContainsRune(value, 0) && name != "id" {
			return u, fmt.Errorf("the value of %q is not percent-encoded text", clip(name))
		}
		if seen[name] {
			return u, fmt.Errorf("%q is there twice", clip(name))
		}
		seen[name] = true
		if err := u.set(name, value); err != nil {
			return u, err
		}
	}
	return u, u.check()
}

func (u *URI) set(name, value string) error {
	switch name {
	case "module-path":
		u.Module = value
	case "token":
		u.Token = value
	case "serial":
		u.Serial = value
	case "slot-id":
		n, err := strconv.ParseUint(value, 10, 32)
		if err != nil || strconv.FormatUint(n, 10) != value {
			return errors.New("slot-id is not a number")
		}
		slot := uint(n)
		u.Slot = &slot
	case "object":
		u.Object = value
	case "id":
		u.ID = []byte(value)
	case "pin-source":
		u.PINSource = strings.TrimPrefix(value, "file:")
	case "pin-value":
		return errors.New("a PIN (pin-value) does not belong into a URI: put it into a file (0600) and name that as pin-source=/path")
	case "type":
		if value != "secret-key" && value != "private" {
			return fmt.Errorf("type %q: want secret-key or private, or leave it out", clip(value))
		}
	default:
		return fmt.Errorf("attribute %q is not understood: use token, serial, slot-id, object, id, module-path, pin-source", clip(name))
	}
	return nil
}

// clip bounds what of a malformed URI is repeated.
func clip(s string) string { return s[:min(len(s), 32)] }

func (u *URI) check() error {
	tokens := 0
	for _, named := range []bool{u.Token != "", u.Serial != "", u.Slot != nil} {
		if named {
			tokens++
		}
	}
	switch {
	case u.Module == "":
		return errors.New("module-path is missing: name the token's PKCS#11 module, such as /usr/lib/softhsm/libsofthsm2.so")
	case !filepath.IsAbs(u.Module):
		return fmt.Errorf("module-path %q is not absolute", clip(u.Module))
	case tokens != 1:
		return errors.New("name the token by exactly one of token, serial and slot-id")
	case u.Object == "" && len(u.ID) == 0:
		return errors.New("name the key, as object=LABEL")
	case u.PINSource != "" && !filepath.IsAbs(u.PINSource):
		return errors.New("pin-source is not an absolute path")
	}
	return nil
}

// SameKey reports whether both name one key: by token, serial, object and id. Module, PIN and slot are of one machine.
func (u URI) SameKey(o URI) bool {
	return u.Token == o.Token && u.Serial == o.Serial && u.Object == o.Object && bytes.Equal(u.ID, o.ID)
}

// String is the URI in one form of the many it may have been written in. It holds no secret.
func (u URI) String() string {
	var path, query []string
	add := func(to *[]string, name, value string) {
		if value != "" {
			*to = append(*to, name+"="+escape(value))
		}
	}
	add(&path, "token", u.Token)
	add(&path, "serial", u.Serial)
	if u.Slot != nil {
		add(&path, "slot-id", strconv.FormatUint(uint64(*u.Slot), 10))
	}
	add(&path, "object", u.Object)
	add(&path, "id", string(u.ID))
	add(&query, "module-path", u.Module)
	add(&query, "pin-source", u.PINSource)
	return "pkcs11:" + strings.Join(path, ";") + "?" + strings.Join(query, "&")
}

// escape percent-encodes all that RFC 7512 does not take as it is in either part.
func escape(s string) string {
	var b strings.Builder
	for i := range len(s) {
		c := s[i]
		if c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte("-_.~/", c) >= 0 {
			b.WriteByte(c)
		} else {
			b.WriteString("%" + strings.ToUpper(hex.EncodeToString([]byte{c})))
		}
	}
	return b.String()
}

// Key names the key in errors.
func (u URI) key() string {
	if u.Object != "" {
		return strconv.Quote(u.Object)
	}
	return "with id " + hex.EncodeToString(u.ID)
}

func (u URI) token() string {
	switch {
	case u.Token != "":
		return "token " + strconv.Quote(u.Token)
	case u.Serial != "":
		return "the token with serial " + strconv.Quote(u.Serial)
	}
	return "slot " + strconv.FormatUint(uint64(*u.Slot), 10)
}
