package ca

import (
	"errors"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"countersign.io/countersign/identity"
)

// Every member's endpoint has the same ID, which a partner compares exactly, and the certificate follows time and issuer.
func TestEndpointCertificate(t *testing.T) {
	r := newRig(t)
	want, err := identity.BundleEndpointID(r.td)
	if err != nil {
		t.Fatal(err)
	}
	verify := func() []byte {
		t.Helper()
		cert, err := r.EndpointCertificate()
		if err != nil {
			t.Fatal(err)
		}
		id, _, err := x509svid.ParseAndVerify(cert.Certificate, r.bundle(t, r.x), x509svid.WithTime(r.clock.now()))
		if err != nil || id != want {
			t.Fatalf("%s, %v", id, err)
		}
		if identity.RoleOf(id) != identity.RoleWorkload {
			t.Errorf("%s has a role in the cluster", id)
		}
		return cert.Certificate[0]
	}
	first := verify()
	if string(verify()) != string(first) {
		t.Error("each handshake gets a certificate of its own")
	}
	r.clock.add(31 * time.Minute)
	second := verify()
	if string(second) == string(first) {
		t.Error("it is not made anew at half-life")
	}
	if err := r.set(r.j); err != nil {
		t.Fatal(err)
	}
	if _, err := r.EndpointCertificate(); !errors.Is(err, identity.ErrUnavailable) {
		t.Errorf("without an authority: %v", err)
	}
}
