package federation

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"time"

	"golang.org/x/crypto/acme"
	"golang.org/x/crypto/acme/autocert"

	"countersign.io/countersign/identity"
)

// ACMEConfig is a certificate from an ACME CA (RFC 8555).
type ACMEConfig struct {
	Directory string   // https URL
	Hosts     []string // what the certificates are for, each in one of its own
	Email     string   // for the CA's notices; empty: none
	// Roots vouch for the directory; nil: the system's.
	Roots *x509.CertPool
	// Cache keeps the account's key, and the certificates with theirs: nobody else may read it.
	Cache autocert.Cache
	Log   *slog.Logger
}

// ACME gets certificates and renews them 30 days, or a third of a shorter life, before their end. It answers the CA's
// challenges on the public port itself (tls-alpn-01) or on a plain HTTP port (http-01).
type ACME struct {
	cfg ACMEConfig
	m   *autocert.Manager
}

const (
	acmeCall       = 30 * time.Second
	acmeRetryFirst = 10 * time.Second
	acmeRetryMost  = 10 * time.Minute
	acmeLook       = time.Hour
)

// NewACME checks the configuration and asks nobody. Who configures a directory has accepted its terms of service.
func NewACME(cfg ACMEConfig) (*ACME, error) {
	if err := identity.CheckBundleURL(cfg.Directory); err != nil {
		return nil, fmt.Errorf("ACME directory: %w", err)
	}
	if len(cfg.Hosts) == 0 || cfg.Cache == nil || cfg.Log == nil {
		return nil, fmt.Errorf("%w: ACME needs hosts, a cache and a log", identity.ErrInvalid)
	}
	transport := &http.Transport{Proxy: http.ProxyFromEnvironment, TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: cfg.Roots}, TLSHandshakeTimeout: acmeCall}
	return &ACME{cfg: cfg, m: &autocert.Manager{
		Prompt: autocert.AcceptTOS, Cache: cfg.Cache, HostPolicy: autocert.HostWhitelist(cfg.Hosts...), Email: cfg.Email,
		Client: &acme.Client{DirectoryURL: cfg.Directory, UserAgent: "countersign", HTTPClient: &http.Client{Transport: transport, Timeout: acmeCall}},
	}}, nil
}

// Protocols are what the port must speak for the challenges.
func (a *ACME) Protocols() []string { return []string{acme.ALPNProto} }

// Certificate answers a handshake; who names no host gets the first one's.
func (a *ACME) Certificate(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	if hello.ServerName == "" || !slices.Contains(a.cfg.Hosts, strings.ToLower(strings.TrimSuffix(hello.ServerName, "."))) {
		named := *hello
		named.ServerName = a.cfg.Hosts[0]
		hello = &named
	}
	return a.m.GetCertificate(hello)
}

// Challenges answers http-01, on plain HTTP, and nothing else.
func (a *ACME) Challenges() http.Handler { return a.m.HTTPHandler(http.NotFoundHandler()) }

// Run gets the certificates at once, so that nobody's first handshake waits, says what fails, and tries again, until ctx ends.
func (a *ACME) Run(ctx context.Context) error {
	wait := acmeRetryFirst
	for {
		var failed error
		for _, host := range a.cfg.Hosts {
			// What a browser of today offers: the manager then takes a key on P-256.
			hello := &tls.ClientHelloInfo{ServerName: host, SignatureSchemes: []tls.SignatureScheme{tls.ECDSAWithP256AndSHA256},
				SupportedCurves: []tls.CurveID{tls.CurveP256}, CipherSuites: []uint16{tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256}}
			if _, err := a.m.GetCertificate(hello); err != nil {
				failed = err
				a.cfg.Log.Error("cannot get a certificate from the ACME CA: trying again", "host", host, "directory", a.cfg.Directory, "error", cut(err.Error(), 500), "in", wait)
			}
		}
		next := acmeLook
		if failed != nil {
			next, wait = wait, min(2*wait, acmeRetryMost)
		} else {
			wait = acmeRetryFirst
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(next):
		}
	}
}
