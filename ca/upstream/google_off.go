//go:build !gcp

package upstream

import (
	"context"
	"crypto/x509"
	"fmt"
	"time"

	"countersign.io/countersign/identity"
)

// GoogleConfig names an authority of Google's Certificate Authority Service.
type GoogleConfig struct {
	Authority   string // projects/P/locations/L/caPools/C/certificateAuthorities/A
	Credentials string // a service account's file; empty: those of the machine
}

// Google is an authority of Google's Certificate Authority Service, in builds with the tag gcp.
type Google struct{}

// NewGoogle says that this build has no such thing.
func NewGoogle(context.Context, GoogleConfig) (*Google, error) {
	return nil, fmt.Errorf("%w: ca.upstream.google: this build has no Google client: build it with -tags gcp", identity.ErrPrecondition)
}

// String is here so that both builds have the same type.
func (*Google) String() string { return "google" }

// Sign is never called.
func (*Google) Sign(context.Context, *x509.CertificateRequest, time.Duration) ([]byte, [][]byte, [][]byte, error) {
	_, err := NewGoogle(context.Background(), GoogleConfig{})
	return nil, nil, nil, err
}

// Follow is never called.
func (g *Google) Follow(context.Context, <-chan identity.Below, func(*identity.Above, error)) error {
	_, _, _, err := g.Sign(context.Background(), nil, 0)
	return err
}
