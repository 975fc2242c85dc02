package seal

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
)

func TestActiveTermSealsAllOpen(t *testing.T) {
	k := keyring(t)
	old, err := k.Seal([]byte("old"), nil)
	if err != nil {
		t.Fatal(err)
	}
	number, id, err := k.Generate()
	if err != nil || number != 2 || len(id) != keyIDBytes {
		t.Fatalf("generated %d, %x, %v", number, id, err)
	}
	still, err := k.Seal([]byte("still"), nil)
	if n, ok := TermOf(still); err != nil || !ok || n != 1 {
		t.Errorf("sealed under %d before it was activated, %v", n, err)
	}
	if err := k.Activate(2); err != nil {
		t.Fatal(err)
	}
	newer, err := k.Seal([]byte("new"), nil)
	if n, ok := TermOf(newer); err != nil || !ok || n != 2 {
		t.Errorf("sealed under %d, %v; want 2", n, err)
	}
	for want, b := range map[string][]byte{"old": old, "still": still, "new": newer} {
		if got, err := k.Open(b, nil); err != nil || string(got) != want {
			t.Errorf("opening %s: %q, %v", want, got, err)
		}
	}
	if err := k.Activate(3); !errors.Is(err, ErrTerm) || k.Active() != 2 {
		t.Errorf("activated what is not there: %v, active %d", err, k.Active())
	}
	// After a restart it is the lowest that seals, until the cluster's word is known.
	again, err := ParseKeyring(k.Plain())
	if err != nil || again.Active() != 1 || !slices.Equal(again.Terms(), []uint32{1, 2}) {
		t.Errorf("parsed: active %d, terms %v, %v", again.Active(), again.Terms(), err)
	}
	if got, ok := again.KeyID(2); !ok || !bytes.Equal(got, id) {
		t.Errorf("the key's ID changed: %x, %v", got, ok)
	}
}

func TestKeyID(t *testing.T) {
	k := keyring(t)
	id, ok := k.KeyID(1)
	if !ok || bytes.Contains(k.Plain(), id) {
		t.Errorf("ID %x, %v", id, ok)
	}
	if _, ok := k.KeyID(2); ok {
		t.Error("an ID of a key that is not there")
	}
	other, _ := keyring(t).KeyID(1)
	if bytes.Equal(other, id) {
		t.Error("two keys have one ID")
	}
}

func TestMerge(t *testing.T) {
	a := keyring(t)
	b, err := ParseKeyring(a.Plain())
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if _, _, err := a.Generate(); err != nil {
			t.Fatal(err)
		}
	}
	if added, err := b.Merge(a); err != nil || added != 2 || !bytes.Equal(a.Plain(), b.Plain()) {
		t.Errorf("merged %d, %v", added, err)
	}
	if added, err := b.Merge(a); err != nil || added != 0 {
		t.Errorf("merged again: %d, %v", added, err)
	}
	if b.Active() != 1 {
		t.Errorf("merging activated %d", b.Active())
	}
	// Dropping in one keyring leaves the other's key as it was.
	if err := a.Drop(3); err != nil {
		t.Fatal(err)
	}
	if bytes.Equal(b.terms[2].key[:], make([]byte, keyBytes)) {
		t.Error("the key was cleared in the other keyring")
	}
	// Another key of a number that is there is refused, whole.
	c, err := ParseKeyring(keyring(t).Plain())
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := c.Generate(); err != nil {
		t.Fatal(err)
	}
	before := keyring(t)
	kept := before.Plain()
	if added, err := before.Merge(c); !errors.Is(err, ErrTerm) || added != 0 || !bytes.Equal(before.Plain(), kept) {
		t.Errorf("merged a conflicting keyring: %d, %v", added, err)
	}
}

func TestDrop(t *testing.T) {
	k := keyring(t)
	sealed, err := k.Seal([]byte("x"), nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := k.Drop(1); !errors.Is(err, ErrTerm) {
		t.Errorf("dropped the active key: %v", err)
	}
	if err := k.Drop(2); !errors.Is(err, ErrTerm) {
		t.Errorf("dropped what is not there: %v", err)
	}
	if _, _, err := k.Generate(); err != nil {
		t.Fatal(err)
	}
	if err := k.Activate(2); err != nil {
		t.Fatal(err)
	}
	if err := k.Drop(1); err != nil {
		t.Fatal(err)
	}
	if _, err := k.Open(sealed, nil); !errors.Is(err, ErrOpen) {
		t.Errorf("opened under a dropped key: %v", err)
	}
}

func TestKeyringIsBounded(t *testing.T) {
	k := keyring(t)
	for range maxTerms - 1 {
		if _, _, err := k.Generate(); err != nil {
			t.Fatal(err)
		}
	}
	if _, _, err := k.Generate(); err == nil {
		t.Error("generated more keys than a keyring holds")
	}
	if _, err := ParseKeyring(k.Plain()); err != nil {
		t.Errorf("a full keyring does not parse: %v", err)
	}
	last := keyring(t)
	last.terms[0].number, last.active = ^uint32(0), ^uint32(0)
	if _, _, err := last.Generate(); err == nil {
		t.Error("numbers ran over")
	}
}

func TestTermOfRefuses(t *testing.T) {
	good, err := keyring(t).Seal(nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string][]byte{"nil": nil, "short": good[:len(good)-1], "format": append([]byte{9}, good[1:]...)} {
		if n, ok := TermOf(b); ok {
			t.Errorf("%s: term %d", name, n)
		}
	}
}

func TestTermsChangeWhileInUse(t *testing.T) {
	k := keyring(t)
	var wg sync.WaitGroup
	stop := make(chan struct{})
	for range 4 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				b, err := k.Seal([]byte("x"), nil)
				if err != nil {
					t.Error(err)
				}
				if n, _ := TermOf(b); n != 1 {
					if _, err := k.Open(b, nil); err != nil && !errors.Is(err, ErrOpen) {
						t.Error(err)
					}
				}
				_ = fmt.Sprint(k, k.Terms(), k.Plain())
			}
		})
	}
	for range 50 {
		n, _, err := k.Generate()
		if err != nil {
			t.Fatal(err)
		}
		other, err := ParseKeyring(k.Plain())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := k.Merge(other); err != nil {
			t.Fatal(err)
		}
		if err := k.Activate(n); err != nil {
			t.Fatal(err)
		}
		if err := k.Drop(n - 1); err != nil {
			t.Fatal(err)
		}
	}
	close(stop)
	wg.Wait()
}
