//go:build cgo

package hsm

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/miekg/pkcs11"

	"countersign.io/countersign/internal/durable"
)

// maxPIN bounds the file with the PIN.
const maxPIN = 1024

// module is a loaded PKCS#11 module. It is never unloaded, see the package comment.
type module struct {
	ctx      *pkcs11.Ctx
	uri      URI
	patience time.Duration
}

func load(u URI) (*module, error) {
	// The loader's own message is lost in pkcs11.New.
	if _, err := os.Stat(u.Module); err != nil {
		return nil, fmt.Errorf("%w: its module: %w: install it, or mend module-path", ErrToken, err)
	}
	ctx := pkcs11.New(u.Module)
	if ctx == nil {
		return nil, fmt.Errorf("%w: %s is not a PKCS#11 module of this machine's kind", ErrToken, u.Module)
	}
	return &module{ctx: ctx, uri: u, patience: patience}, nil
}

// session is one login to a token.
type session struct {
	*module
	slot   uint
	handle pkcs11.SessionHandle
}

// patience is how long a token may take over one operation, logging in included.
const patience = 20 * time.Second

// use runs f in a session of its own that is logged in, and gives up on a token that does not answer: nobody can end a call
// into a module, but who waits for it must not hang with it. Then what f returns is lost.
func use[T any](m *module, f func(*session) (T, error)) (T, error) {
	type result struct {
		value T
		err   error
	}
	done := make(chan result, 1)
	go func() {
		var r result
		r.err = m.with(func(s *session) (err error) {
			r.value, err = f(s)
			return err
		})
		done <- r
	}()
	timer := time.NewTimer(m.patience)
	defer timer.Stop()
	select {
	case r := <-done:
		return r.value, r.err
	case <-timer.C:
		var none T
		return none, fmt.Errorf("%w: %s has not answered for %v", ErrToken, m.uri.token(), m.patience)
	}
}

// with runs f in a session of its own that is logged in.
func (m *module) with(f func(*session) error) (err error) {
	if err := m.ctx.Initialize(); err != nil && !is(err, pkcs11.CKR_CRYPTOKI_ALREADY_INITIALIZED) {
		return fmt.Errorf("%w: initialising %s: %w", ErrToken, m.uri.Module, err)
	}
	s := &session{module: m}
	if s.slot, err = m.findToken(); err != nil {
		return err
	}
	if s.handle, err = m.ctx.OpenSession(s.slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION); err != nil {
		return fmt.Errorf("%w: opening a session with %s: %w", ErrToken, m.uri.token(), err)
	}
	// The last session's end logs out, so that no logout of ours ends another's work.
	defer func() {
		if e := m.ctx.CloseSession(s.handle); e != nil && err == nil {
			err = fmt.Errorf("%w: closing the session with %s: %w", ErrToken, m.uri.token(), e)
		}
	}()
	if err := s.login(); err != nil {
		return err
	}
	return f(s)
}

func is(err error, code uint) bool {
	var e pkcs11.Error
	return errors.As(err, &e) && uint(e) == code
}

func (m *module) findToken() (uint, error) {
	slots, err := m.ctx.GetSlotList(true)
	if err != nil {
		return 0, fmt.Errorf("%w: listing the slots of %s: %w", ErrToken, m.uri.Module, err)
	}
	var found []uint
	for _, slot := range slots {
		info, err := m.ctx.GetTokenInfo(slot)
		if err != nil {
			continue // another token's trouble
		}
		u := m.uri
		if info.Flags&pkcs11.CKF_TOKEN_INITIALIZED == 0 {
			continue
		}
		if u.Slot != nil && *u.Slot == slot || u.Token != "" && u.Token == info.Label || u.Serial != "" && u.Serial == info.SerialNumber {
			found = append(found, slot)
		}
	}
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		return 0, fmt.Errorf("%w: %s shows no %s (in %d slots): is it plugged in and initialised, and may this user see it?", ErrToken, m.uri.Module, m.uri.token(), len(slots))
	}
	return 0, fmt.Errorf("%w: %s shows %d tokens like %s: name one by its serial", ErrToken, m.uri.Module, len(found), m.uri.token())
}

func (s *session) login() error {
	info, err := s.ctx.GetTokenInfo(s.slot)
	if err != nil {
		return fmt.Errorf("%w: reading about %s: %w", ErrToken, s.uri.token(), err)
	}
	if s.uri.PINSource == "" {
		if info.Flags&pkcs11.CKF_LOGIN_REQUIRED != 0 {
			return fmt.Errorf("%w is missing: %s wants one: put it into a file (0600) and add pin-source=/path to the URI", ErrPIN, s.uri.token())
		}
		return nil
	}
	raw, err := durable.ReadPrivateFile(s.uri.PINSource, maxPIN)
	if err != nil {
		return fmt.Errorf("%w cannot be read: pin-source: %w", ErrPIN, err)
	}
	defer clear(raw)
	pin := bytes.TrimRight(raw, "\r\n")
	if len(pin) == 0 {
		return fmt.Errorf("%w is missing: %s is empty", ErrPIN, s.uri.PINSource)
	}
	err = s.ctx.Login(s.handle, pkcs11.CKU_USER, string(pin))
	switch {
	case err == nil || is(err, pkcs11.CKR_USER_ALREADY_LOGGED_IN):
		return nil
	case is(err, pkcs11.CKR_PIN_LOCKED):
		return fmt.Errorf("%w is locked, after too many wrong ones: unlock %s with its tools", ErrPIN, s.uri.token())
	case is(err, pkcs11.CKR_PIN_INCORRECT), is(err, pkcs11.CKR_PIN_INVALID), is(err, pkcs11.CKR_PIN_LEN_RANGE), is(err, pkcs11.CKR_PIN_EXPIRED):
		return fmt.Errorf("%w in %s is refused by %s: %w", ErrPIN, s.uri.PINSource, s.uri.token(), err)
	case is(err, pkcs11.CKR_USER_PIN_NOT_INITIALIZED):
		return fmt.Errorf("%w was never set: %s has only its officer's: set a user's PIN", ErrPIN, s.uri.token())
	}
	return fmt.Errorf("%w: logging in to %s: %w", ErrToken, s.uri.token(), err)
}

// find returns the objects of a class that have the URI's label and ID.
func (s *session) find(class uint) ([]pkcs11.ObjectHandle, error) {
	want := []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_CLASS, class)}
	if s.uri.Object != "" {
		want = append(want, pkcs11.NewAttribute(pkcs11.CKA_LABEL, s.uri.Object))
	}
	if len(s.uri.ID) > 0 {
		want = append(want, pkcs11.NewAttribute(pkcs11.CKA_ID, s.uri.ID))
	}
	if err := s.ctx.FindObjectsInit(s.handle, want); err != nil {
		return nil, fmt.Errorf("%w: looking for key %s in %s: %w", ErrToken, s.uri.key(), s.uri.token(), err)
	}
	found, _, err := s.ctx.FindObjects(s.handle, 8)
	if e := s.ctx.FindObjectsFinal(s.handle); err == nil {
		err = e
	}
	if err != nil {
		return nil, fmt.Errorf("%w: looking for key %s in %s: %w", ErrToken, s.uri.key(), s.uri.token(), err)
	}
	return found, nil
}

// one returns the one key of the class; ErrNoKey, ErrKeyType.
func (s *session) one(class uint) (pkcs11.ObjectHandle, error) {
	found, err := s.find(class)
	switch {
	case err != nil:
		return 0, err
	case len(found) == 1:
		return found[0], nil
	case len(found) > 1:
		return 0, fmt.Errorf("%w: %s has %d keys %s: add id=... to the URI, or remove all but one", ErrKeyType, s.uri.token(), len(found), s.uri.key())
	}
	for _, other := range []uint{pkcs11.CKO_SECRET_KEY, pkcs11.CKO_PRIVATE_KEY, pkcs11.CKO_PUBLIC_KEY, pkcs11.CKO_CERTIFICATE, pkcs11.CKO_DATA} {
		if found, err := s.find(other); err == nil && len(found) > 0 && other != class {
			return 0, fmt.Errorf("%w: key %s of %s is %s", ErrKeyType, s.uri.key(), s.uri.token(), className(other))
		}
	}
	return 0, fmt.Errorf("%w: key %s of %s: restore it from the token's backup, or mend the URI", ErrNoKey, s.uri.key(), s.uri.token())
}

func className(class uint) string {
	switch class {
	case pkcs11.CKO_SECRET_KEY:
		return "a secret key"
	case pkcs11.CKO_PRIVATE_KEY, pkcs11.CKO_PUBLIC_KEY:
		return "a key pair"
	case pkcs11.CKO_CERTIFICATE:
		return "a certificate"
	}
	return "a data object"
}

// number reads a CK_ULONG attribute.
func (s *session) number(o pkcs11.ObjectHandle, attr uint) (uint, bool) {
	got, err := s.ctx.GetAttributeValue(s.handle, o, []*pkcs11.Attribute{pkcs11.NewAttribute(attr, nil)})
	if err != nil || len(got) != 1 {
		return 0, false
	}
	switch b := got[0].Value; len(b) {
	case 4:
		return uint(binary.NativeEndian.Uint32(b)), true
	case 8:
		return uint(binary.NativeEndian.Uint64(b)), true
	}
	return 0, false
}
