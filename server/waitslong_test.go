package server

import (
	"slices"
	"strings"
	"testing"
	"time"

	"countersign.io/countersign/identity"
)

// TestRotationThatWaitsDegrades: nobody watches a rotation for days, and health says whom it waits for.
func TestRotationThatWaitsDegrades(t *testing.T) {
	r := newRotor(t)
	gone := r.node("gone")
	degraded := func() bool {
		return slices.ContainsFunc(r.srv.Degraded(), func(s string) bool {
			return strings.Contains(s, "x509 authority has waited in phase activate") && strings.Contains(s, gone.ID) && strings.Contains(s, "--ignore")
		})
	}
	r.begin(identity.AuthorityX509, func(x *identity.Rotation) { x.AckDeadline = 0 })
	r.led(identity.AuthorityX509)
	r.led(identity.AuthorityX509)
	r.at(identity.AuthorityX509, identity.RotationActivate)
	if degraded() {
		t.Error("at once")
	}
	r.now = r.now.Add(longWait + time.Hour + time.Minute)
	r.led(identity.AuthorityX509)
	if !degraded() {
		t.Errorf("it does not say so: %q", r.srv.Degraded())
	}
	x := r.rotation(identity.AuthorityX509)
	x.Ignore = []string{gone.ID}
	if _, err := r.state.PutRotation(t.Context(), r.now, x, x.Revision); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		r.now = r.now.Add(ackSettle)
		r.led(identity.AuthorityX509)
	}
	if degraded() {
		t.Errorf("it still says so: %q", r.srv.Degraded())
	}
}
