package kube

import (
	"bytes"
	"errors"
	"testing"
	"time"

	"countersign.io/countersign/identity"
)

// TestSeenTokens: that a signature was good is remembered; nothing else is, and not for longer than its key.
func TestSeenTokens(t *testing.T) {
	c := newClock()
	one, two := newIssuer(t, "key-1", c.now), newIssuer(t, "key-2", c.now)
	k := newKeyServer(t)
	k.publish(jwksOf(t, one))
	r := newRig(t, c.now)
	r.set(t, k.cluster("east"))
	token := one.token(t)
	for range 2 {
		if _, err := r.Verify(t.Context(), token); err != nil {
			t.Fatal(err)
		}
	}
	changed := bytes.Clone(token)
	changed[len(changed)-3] ^= 1
	if _, err := r.Verify(t.Context(), changed); err == nil {
		t.Error("a changed signature was taken for the one that was seen")
	}
	// Its key is withdrawn: the memory of its signature goes with it.
	k.publish(jwksOf(t, two))
	c.add(10 * time.Second)
	if _, err := r.Verify(t.Context(), two.token(t)); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Verify(t.Context(), token); !errors.Is(err, identity.ErrUnauthenticated) {
		t.Errorf("seen under a key that was withdrawn: %v", err)
	}
	// It comes back, and the token is good again until it expires.
	k.publish(jwksOf(t, one, two))
	c.add(10 * time.Second)
	if _, err := r.Verify(t.Context(), token); err != nil {
		t.Errorf("under the key that came back: %v", err)
	}
	c.add(2 * time.Hour)
	if _, err := r.Verify(t.Context(), token); !errors.Is(err, identity.ErrUnauthenticated) {
		t.Errorf("expired: %v", err)
	}
	// The registration is for another audience now.
	c.add(-2 * time.Hour)
	other := k.cluster("east")
	other.Audience = "somebody-else"
	r.set(t, other)
	if _, err := r.Verify(t.Context(), token); !errors.Is(err, identity.ErrUnauthenticated) {
		t.Errorf("for another audience: %v", err)
	}
}

func BenchmarkVerifySeen(b *testing.B) {
	c := newClock()
	i := newIssuer(b, "key-1", c.now)
	r := newRig(b, c.now)
	r.set(b, offline("east", jwksOf(b, i)))
	token := i.token(b)
	for b.Loop() {
		if _, err := r.Verify(b.Context(), token); err != nil {
			b.Fatal(err)
		}
	}
}
