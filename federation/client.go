package federation

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"
	"unicode"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"countersign.io/countersign/identity"
)

// ClientConfig configures a Client.
type ClientConfig struct {
	// WebRoots vouch for endpoints of profile https_web; nil: the system's.
	WebRoots *x509.CertPool
	// Deadline is how long one fetch may take, with all redirects; 0: 30 s.
	Deadline time.Duration
	Now      func() time.Time // nil: time.Now
	// Dial makes a connection; nil: TCP, by way of the proxy that the environment names.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
}

// Client fetches bundles of other trust domains.
type Client struct{ cfg ClientConfig }

// maxRedirects is for endpoints that have moved, not for a chase.
const maxRedirects = 3

// NewClient makes a client.
func NewClient(cfg ClientConfig) *Client {
	if cfg.Deadline <= 0 {
		cfg.Deadline = 30 * time.Second
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return &Client{cfg}
}

// Fetch gets the newest bundle that the endpoint of a relationship has. Who may answer is decided by the relationship alone: by
// https_web whoever has a certificate of the web's for the host, by https_spiffe whoever has an SVID of exactly the endpoint's
// ID that the newest bundle here verifies, wherever a redirect leads (SPIFFE Federation, section 5.2). The errors wrap
// identity.ErrUnavailable, or ErrInvalid for what the endpoint answered, or ErrUnauthenticated for who did.
func (c *Client) Fetch(ctx context.Context, f identity.Federation) (*identity.Bundle, error) {
	if err := identity.CheckFederation(spiffeid.TrustDomain{}, &f); err != nil {
		return nil, err
	}
	td, err := spiffeid.TrustDomainFromString(f.TrustDomain)
	if err != nil {
		return nil, fmt.Errorf("%w: trust domain: %w", identity.ErrInvalid, err)
	}
	conf, who, err := c.tls(td, &f)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, c.cfg.Deadline)
	defer cancel()
	raw, err := c.get(ctx, f.URL, conf)
	if err != nil {
		if why := who.refused(); why != nil {
			return nil, fmt.Errorf("%w: %w", identity.ErrUnauthenticated, why)
		}
		return nil, err
	}
	return Parse(td, raw)
}

func (c *Client) get(ctx context.Context, from string, conf *tls.Config) ([]byte, error) {
	t := &http.Transport{
		Proxy: http.ProxyFromEnvironment, DialContext: c.cfg.Dial, TLSClientConfig: conf, DisableKeepAlives: true,
		DisableCompression:  true, // a few KiB of it would be gigabytes
		TLSHandshakeTimeout: c.cfg.Deadline, ResponseHeaderTimeout: c.cfg.Deadline, MaxResponseHeaderBytes: 64 << 10,
	}
	defer t.CloseIdleConnections()
	client := &http.Client{Transport: t, CheckRedirect: func(req *http.Request, via []*http.Request) error {
		req.Header.Del("Referer") // where the bundle is read is not the next host's to know
		if len(via) > maxRedirects {
			return fmt.Errorf("%w: more than %d redirects", identity.ErrInvalid, maxRedirects)
		}
		if err := identity.CheckBundleURL(req.URL.String()); err != nil {
			return fmt.Errorf("a redirect: %w", err)
		}
		return nil
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, from, nil)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", identity.ErrInvalid, plain(err))
	}
	req.Header.Set("User-Agent", "countersign")
	req.Header.Set("Accept", "application/json")
	resp, err := client.Do(req)
	if err != nil {
		return nil, unanswered(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%w: the endpoint answers %d %s", identity.ErrUnavailable, resp.StatusCode, http.StatusText(resp.StatusCode))
	}
	raw, err := io.ReadAll(io.LimitReader(resp.Body, MaxDocument+1))
	if err == nil {
		err = ctx.Err() // the connection that is closed then may seem to end well
	}
	if err != nil {
		return nil, fmt.Errorf("reading the document: %w", unanswered(err))
	}
	if len(raw) > MaxDocument {
		return nil, fmt.Errorf("%w: the endpoint's document has more than %d bytes", identity.ErrInvalid, MaxDocument)
	}
	return raw, nil
}

// unanswered keeps the sentinel of what this package refused; all else may be better the next time. The URL, which may be one
// that a redirect made up, with a password in it, is not repeated.
func unanswered(err error) error {
	var of *url.Error
	if errors.As(err, &of) {
		err = of.Err
	}
	if errors.Is(err, identity.ErrInvalid) || errors.Is(err, identity.ErrUnauthenticated) {
		return err
	}
	var bad *tls.CertificateVerificationError
	if errors.As(err, &bad) {
		return fmt.Errorf("%w: %w", identity.ErrUnauthenticated, plain(err))
	}
	return fmt.Errorf("%w: %w", identity.ErrUnavailable, plain(err))
}

// verdict is why an endpoint's SVID was refused. One fetch runs one handshake after the other.
type verdict struct{ err error }

func (v *verdict) refused() error { return v.err }

// tls is who may answer. There is no session cache: each connection is verified by the newest bundle.
func (c *Client) tls(td spiffeid.TrustDomain, f *identity.Federation) (*tls.Config, *verdict, error) {
	conf, who := Intermediate(), &verdict{}
	if f.Profile == identity.ProfileWeb {
		conf.RootCAs, conf.Time = c.cfg.WebRoots, c.cfg.Now
		return conf, who, nil
	}
	want, err := spiffeid.FromString(f.EndpointID)
	if err != nil {
		return nil, nil, fmt.Errorf("%w: endpoint ID: %w", identity.ErrInvalid, err)
	}
	if f.Bundle == nil || len(f.Bundle.X509) == 0 {
		return nil, nil, fmt.Errorf("%w: there is no X.509 authority of %q to know its endpoint by: pin its bundle (countersign federation update %s --bundle-file)", identity.ErrPrecondition, f.TrustDomain, f.TrustDomain)
	}
	roots := x509bundle.New(td)
	for i, der := range f.Bundle.X509 {
		root, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, nil, fmt.Errorf("%w: X.509 authority %d of %q: %w", identity.ErrInvalid, i+1, f.TrustDomain, err)
		}
		roots.AddX509Authority(root)
	}
	conf.InsecureSkipVerify = true // an SVID has no host name: VerifyPeerCertificate verifies
	conf.VerifyPeerCertificate = func(raw [][]byte, _ [][]*x509.Certificate) error {
		who.err = verifyEndpoint(raw, roots, want, c.cfg.Now())
		return who.err
	}
	return conf, who, nil
}

func verifyEndpoint(raw [][]byte, roots *x509bundle.Bundle, want spiffeid.ID, now time.Time) error {
	if len(raw) == 0 {
		return errors.New("the endpoint shows no certificate")
	}
	leaf, err := x509.ParseCertificate(raw[0])
	if err != nil {
		return fmt.Errorf("parsing the endpoint's certificate: %w", err)
	}
	id, err := x509svid.IDFromCert(leaf)
	if err != nil {
		return fmt.Errorf("the endpoint's certificate is no SVID: %w", plain(err))
	}
	if id != want { // before the chain: it is what an operator can mend
		return fmt.Errorf("the endpoint is %s, not %s", cut(id.String(), 300), want)
	}
	if _, _, err := x509svid.ParseAndVerify(raw, roots, x509svid.WithTime(now)); err != nil {
		return fmt.Errorf("the endpoint's SVID does not verify by the bundle of %q that is held here: %w", want.TrustDomain().Name(), plain(err))
	}
	return nil
}

// oneLine is a text that may be shown on a terminal.
func oneLine(s string) string {
	return cut(strings.Map(func(r rune) rune {
		if r == unicode.ReplacementChar || !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, s), 500)
}
