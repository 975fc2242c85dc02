// Package upstream holds the authorities that a trust domain's own can be put below: files on disk, the PKI engine of
// Vault or OpenBao, another Countersign cluster of the same trust domain, and Google's Certificate Authority Service
// (build tag gcp). Each signs a request for an intermediate certificate authority and tells what it vouches for; none is
// trusted to do it right: package ca verifies what they sign. docs/UPSTREAM.md says what each needs.
package upstream

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"slices"
	"time"

	"countersign.io/countersign/identity"
)

const (
	// pollEvery is how often an upstream that does not tell by itself is asked for its roots, and so how soon it is noticed
	// that it is gone.
	pollEvery = 15 * time.Second
	// maxPEM bounds a file or an answer with certificates, in bytes.
	maxPEM          = 1 << 20
	maxCertificates = 32
	// pathLength is what an authority below gets where the one above has no limit: room for the members' issuers, and for
	// a cluster below with its issuers.
	pathLength = 2
)

// parsePEM reads certificates and nothing else: a private key next to them would be a mistake that somebody should hear of.
func parsePEM(what string, raw []byte) ([]*x509.Certificate, error) {
	if len(raw) > maxPEM {
		return nil, fmt.Errorf("%w: %s has more than %d bytes", identity.ErrInvalid, what, maxPEM)
	}
	var out []*x509.Certificate
	for rest := bytes.TrimSpace(raw); len(rest) > 0; rest = bytes.TrimSpace(rest) {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			if len(out) > 0 && !bytes.Contains(rest, []byte("-----BEGIN")) {
				break // a comment at the end
			}
			return nil, fmt.Errorf("%w: %s holds something that is not PEM", identity.ErrInvalid, what)
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("%w: %s holds a %q: certificates only", identity.ErrInvalid, what, block.Type)
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%w: certificate %d of %s: %v", identity.ErrInvalid, len(out)+1, what, err)
		}
		if out = append(out, c); len(out) > maxCertificates {
			return nil, fmt.Errorf("%w: %s holds more than %d certificates", identity.ErrInvalid, what, maxCertificates)
		}
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("%w: %s holds no certificate", identity.ErrInvalid, what)
	}
	return out, nil
}

func selfSigned(c *x509.Certificate) bool {
	return c.IsCA && bytes.Equal(c.RawIssuer, c.RawSubject) && c.CheckSignatureFrom(c) == nil
}

// split tells roots from what leads to them, each once, in DER.
func split(certs []*x509.Certificate) (chain, roots [][]byte) {
	for _, c := range certs {
		to := &chain
		if selfSigned(c) {
			to = &roots
		}
		if !slices.ContainsFunc(*to, func(der []byte) bool { return bytes.Equal(der, c.Raw) }) {
			*to = append(*to, c.Raw)
		}
	}
	return chain, roots
}

// poll asks for the roots now, then whenever wake says so, and every now and then; and tells what is new, and errors.
func poll(ctx context.Context, wake <-chan struct{}, roots func(context.Context) ([][]byte, error), tell func(*identity.Above, error)) {
	var last [][]byte
	for failed := true; ; {
		got, err := roots(ctx)
		if ctx.Err() != nil {
			return
		}
		if err == nil && len(got) == 0 {
			err = fmt.Errorf("%w: it tells no root", identity.ErrInvalid)
		}
		switch {
		case err != nil:
			tell(nil, err)
			failed = true
		case failed || !slices.EqualFunc(got, last, bytes.Equal):
			tell(&identity.Above{Foreign: identity.Foreign{Source: identity.SourceUpstream, X509: got}}, nil)
			failed, last = false, got
		}
		timer := time.NewTimer(pollEvery)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-wake:
			timer.Stop()
		case <-timer.C:
		}
	}
}
