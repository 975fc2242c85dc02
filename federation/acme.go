package federation

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
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
	// HTTP: challenges may come by http-01, too. Somebody must serve Challenges where the CA looks for them, on port 80.
	HTTP bool
	// Cache keeps the account's key, and the certificates with theirs: nobody else may read it.
	Cache autocert.Cache
	Log   *slog.Logger
}

// ACME gets certificates and renews them 30 days, or a third of a shorter life, before their end. It answers the CA's
// challenges on the public port itself (tls-alpn-01) or on a plain HTTP port (http-01).
type ACME struct {
	cfg        ACMEConfig
	m          *autocert.Manager
	challenges http.Handler // nil: by tls-alpn-01 only
}

const (
	acmeCall = 30 * time.Second
	// acmeRetryFirst is more than the minute for which autocert answers by its last failure.
	acmeRetryFirst = 65 * time.Second
	acmeRetryMost  = 15 * time.Minute
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
	a := &ACME{cfg: cfg, m: &autocert.Manager{
		Prompt: autocert.AcceptTOS, Cache: cfg.Cache, HostPolicy: autocert.HostWhitelist(cfg.Hosts...), Email: cfg.Email,
		Client: &acme.Client{DirectoryURL: cfg.Directory, UserAgent: "countersign", HTTPClient: &http.Client{Transport: &orderURLs{next: transport, of: map[string]string{}}, Timeout: acmeCall}},
	}}
	if cfg.HTTP { // before the first order: it says which challenges there are
		inner := a.m.HTTPHandler(http.NotFoundHandler())
		a.challenges = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if host, _, err := net.SplitHostPort(r.Host); err == nil { // the port may be mapped
				r.Host = host
			}
			inner.ServeHTTP(w, r)
		})
	}
	return a, nil
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

// overdue is an error for a certificate that should have been renewed long ago: what renews it tells nobody why it cannot.
func overdue(leaf *x509.Certificate, now time.Time) error {
	if leaf == nil {
		return nil
	}
	life := leaf.NotAfter.Sub(leaf.NotBefore)
	if left := leaf.NotAfter.Sub(now); left < min(life/6, 15*24*time.Hour) {
		return fmt.Errorf("%w: the certificate of %v ends at %s and is not renewed", identity.ErrUnavailable, leaf.DNSNames, leaf.NotAfter.UTC().Format(time.RFC3339))
	}
	return nil
}

// Challenges answers http-01, on plain HTTP, and nothing else.
func (a *ACME) Challenges() http.Handler { return a.challenges }

// Run gets the certificates at once, so that nobody's first handshake waits, says what fails, and tries again, until ctx ends.
func (a *ACME) Run(ctx context.Context) error {
	wait := acmeRetryFirst
	for {
		var failed error
		for _, host := range a.cfg.Hosts {
			// What a browser of today offers: the manager then takes a key on P-256.
			hello := &tls.ClientHelloInfo{ServerName: host, SignatureSchemes: []tls.SignatureScheme{tls.ECDSAWithP256AndSHA256},
				SupportedCurves: []tls.CurveID{tls.CurveP256}, CipherSuites: []uint16{tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256}}
			c, err := a.m.GetCertificate(hello)
			if err == nil {
				err = overdue(c.Leaf, time.Now())
			}
			if err != nil {
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

// orderURLs adds to the answer to a finalization where its order is: x/crypto/acme reads it there, and RFC 8555 (section 7.4)
// does not make a CA say it again.
type orderURLs struct {
	next http.RoundTripper

	mu sync.Mutex
	of map[string]string // URL of the finalization -> of the order
}

const (
	maxACMEAnswer = 1 << 20
	maxOrders     = 64 // remembered
)

// RoundTrip reads new orders, and completes answers to their finalization.
func (o *orderURLs) RoundTrip(req *http.Request) (*http.Response, error) {
	res, err := o.next.RoundTrip(req)
	if err != nil || req.Method != http.MethodPost {
		return res, err
	}
	if location := res.Header.Get("Location"); res.StatusCode == http.StatusCreated && location != "" {
		raw, err := io.ReadAll(io.LimitReader(res.Body, maxACMEAnswer))
		res.Body.Close()
		if err != nil {
			return nil, err
		}
		res.Body = io.NopCloser(bytes.NewReader(raw))
		var order struct {
			Finalize string `json:"finalize"`
		}
		if json.Unmarshal(raw, &order) == nil && order.Finalize != "" {
			o.remember(order.Finalize, location)
		}
		return res, nil
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if url := o.of[req.URL.String()]; url != "" && res.Header.Get("Location") == "" {
		res.Header.Set("Location", url)
	}
	return res, nil
}

func (o *orderURLs) remember(finalize, order string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.of) >= maxOrders {
		clear(o.of)
	}
	o.of[finalize] = order
}
