package federation

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"reflect"
	"strings"
	"testing"
	"time"

	"countersign.io/countersign/identity"
)

func (p *partner) client(change ...func(*ClientConfig)) *Client {
	cfg := ClientConfig{WebRoots: p.webRoots(), Deadline: 20 * time.Second}
	for _, f := range change {
		f(&cfg)
	}
	return NewClient(cfg)
}

// other serves anything by TLS, with the partner's endpoint certificate or another one.
func (p *partner) other(h http.Handler, cert *tls.Certificate, conf ...func(*tls.Config)) string {
	p.t.Helper()
	s := httptest.NewUnstartedServer(h)
	s.Config.ErrorLog = nil
	s.TLS = &tls.Config{Certificates: []tls.Certificate{*cert}}
	for _, f := range conf {
		f(s.TLS)
	}
	s.Config.ErrorLog = discardLog()
	s.StartTLS()
	p.t.Cleanup(s.Close)
	return s.URL
}

// TestConformance22BothProfiles: a client speaks https_web and https_spiffe, by TLS as Mozilla has it (SPIFFE Federation section 5).
func TestConformance22BothProfiles(t *testing.T) {
	p := newPartner(t, "partner.org")
	url := p.serve(p.svid(p.endpointID()), "/bundle", p.endpoint(90*time.Second))
	for _, profile := range []string{identity.ProfileWeb, identity.ProfileSPIFFE} {
		b, err := p.client().Fetch(t.Context(), p.relationship(profile, url))
		if err != nil {
			t.Fatalf("%s: %v", profile, err)
		}
		want := *p.bundle()
		want.RefreshHint = 90 * time.Second
		if !reflect.DeepEqual(b, &want) {
			t.Errorf("%s: %+v", profile, b)
		}
	}
	old := p.other(http.NotFoundHandler(), p.svid(p.endpointID()), func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS10, tls.VersionTLS11 })
	if _, err := p.client().Fetch(t.Context(), p.relationship(identity.ProfileWeb, old)); err == nil || !strings.Contains(err.Error(), "protocol version") {
		t.Errorf("TLS 1.1: %v", err)
	}
}

// TestConformance23NothingInferred: URL, profile and trust domain are given, and the document's own word for none of them counts
// (SPIFFE Federation sections 5.1 and 7.2).
func TestConformance23NothingInferred(t *testing.T) {
	p := newPartner(t, "partner.org")
	url := p.serve(p.svid(p.endpointID()), "/bundle", p.endpoint(time.Minute))
	for name, change := range map[string]func(*identity.Federation){
		"no trust domain": func(f *identity.Federation) { f.TrustDomain = "" },
		"no URL":          func(f *identity.Federation) { f.URL = "" },
		"no profile":      func(f *identity.Federation) { f.Profile = "" },
		"no endpoint ID":  func(f *identity.Federation) { f.EndpointID = "" },
	} {
		f := p.relationship(identity.ProfileSPIFFE, url)
		change(&f)
		if _, err := p.client().Fetch(t.Context(), f); !errors.Is(err, identity.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// The endpoint serves what it serves: it is taken for the bundle of the trust domain that the relationship names, so keys
	// that say themselves that they are another's are refused.
	f := p.relationship(identity.ProfileWeb, url)
	f.TrustDomain = "other.org"
	if _, err := p.client().Fetch(t.Context(), f); !errors.Is(err, identity.ErrInvalid) || !strings.Contains(err.Error(), "partner.org, not of trust domain \"other.org\"") {
		t.Errorf("another trust domain's keys: %v", err)
	}
}

// TestConformance24Redirects: https without user and password all the way, GET gets the newest, and a redirect's target satisfies
// the same rules (SPIFFE Federation sections 5.2.1 and 5.2.2).
func TestConformance24Redirects(t *testing.T) {
	p, stranger := newPartner(t, "partner.org"), newPartner(t, "stranger.org")
	cert := p.svid(p.endpointID())
	good := p.serve(cert, "/bundle", p.endpoint(time.Minute))
	plainHTTP := httptest.NewServer(p.endpoint(time.Minute))
	t.Cleanup(plainHTTP.Close)
	mux := http.NewServeMux()
	to := func(path, url string) { mux.Handle(path, http.RedirectHandler(url, http.StatusFound)) }
	to("/once", good)
	to("/temporary", "/once")
	to("/third", "/temporary")
	to("/fourth", "/third")
	to("/loop", "/loop")
	to("/plain", plainHTTP.URL+"/bundle")
	to("/user", strings.Replace(good, "https://", "https://user:secret@", 1))
	to("/file", "file:///etc/passwd")
	to("/stranger", p.other(p.endpoint(time.Minute), stranger.svid(stranger.endpointID())))
	to("/namesake", p.other(p.endpoint(time.Minute), stranger.svid(p.endpointID())))
	to("/sibling", p.other(p.endpoint(time.Minute), p.svid("spiffe://partner.org/countersign/other")))
	base := p.other(mux, cert)
	for _, profile := range []string{identity.ProfileWeb, identity.ProfileSPIFFE} {
		for path, says := range map[string]string{
			"/once": "", "/temporary": "", "/third": "", "/fourth": "more than 3 redirects", "/loop": "more than 3 redirects",
			"/plain": "want https://", "/user": "user or a password", "/file": "want https://", "/stranger": "certificate", "/namesake": "certificate", "/sibling": "the endpoint is",
		} {
			if profile == identity.ProfileWeb && path == "/sibling" {
				says = "" // for the web it is the same host
			}
			if profile == identity.ProfileSPIFFE && (path == "/stranger" || path == "/namesake") {
				says = map[string]string{"/stranger": "the endpoint is spiffe://stranger.org", "/namesake": "does not verify by the bundle"}[path]
			}
			b, err := p.client().Fetch(t.Context(), p.relationship(profile, base+path))
			switch {
			case says == "" && err != nil:
				t.Errorf("%s %s: %v", profile, path, err)
			case says != "" && (err == nil || !strings.Contains(err.Error(), says)):
				t.Errorf("%s %s: %v, %v: want %q", profile, path, b, err, says)
			case err != nil && strings.Contains(err.Error(), "secret"):
				t.Errorf("%s %s: a password in %v", profile, path, err)
			}
		}
	}
	for _, bad := range []string{"http://127.0.0.1/bundle", "https://u:p@127.0.0.1/bundle", "ftp://x", "https://"} {
		if _, err := p.client().Fetch(t.Context(), p.relationship(identity.ProfileWeb, bad)); !errors.Is(err, identity.ErrInvalid) {
			t.Errorf("%s: %v", bad, err)
		}
	}
}

// TestConformance25ExactEndpointID: https_spiffe takes the endpoint's ID, exactly, and verifies by the newest bundle that there is
// of its trust domain, the bootstrap bundle at first (SPIFFE Federation sections 5.2.2.2 and 5.2.2.4).
func TestConformance25ExactEndpointID(t *testing.T) {
	p, other := newPartner(t, "partner.org"), newPartner(t, "other.org")
	expired := func(c *x509.Certificate) {
		c.NotBefore, c.NotAfter = time.Now().Add(-2*time.Hour), time.Now().Add(-time.Minute)
	}
	for name, c := range map[string]struct {
		cert *tls.Certificate
		says string
	}{
		"the endpoint":                   {p.svid(p.endpointID()), ""},
		"a sibling":                      {p.svid("spiffe://partner.org/countersign/bundle-endpoint2"), "not spiffe://partner.org/countersign/bundle-endpoint"},
		"below it":                       {p.svid("spiffe://partner.org/countersign/bundle-endpoint/x"), "the endpoint is"},
		"the trust domain":               {p.svid("spiffe://partner.org"), ""},
		"another trust domain":           {other.svid(other.endpointID()), "the endpoint is spiffe://other.org"},
		"its name by another authority":  {other.svid(p.endpointID()), "does not verify"},
		"expired":                        {p.svid(p.endpointID(), expired), "does not verify"},
		"no SVID, but a web certificate": {p.svid(p.endpointID(), func(c *x509.Certificate) { c.URIs = nil }), "no SVID"},
		"two IDs":                        {p.svid(p.endpointID(), func(c *x509.Certificate) { c.URIs = append(c.URIs, c.URIs[0]) }), "no SVID"},
		"a CA": {p.svid(p.endpointID(), func(c *x509.Certificate) {
			c.IsCA, c.BasicConstraintsValid, c.KeyUsage = true, true, x509.KeyUsageCertSign
		}), "does not verify"},
	} {
		url := p.other(p.endpoint(time.Minute), c.cert)
		_, err := p.client().Fetch(t.Context(), p.relationship(identity.ProfileSPIFFE, url+"/bundle"))
		if name == "the trust domain" {
			c.says = "the endpoint"
		}
		switch {
		case c.says == "" && err != nil:
			t.Errorf("%s: %v", name, err)
		case c.says != "" && (!errors.Is(err, identity.ErrUnauthenticated) || !strings.Contains(err.Error(), c.says)):
			t.Errorf("%s: %v: want %q", name, err, c.says)
		}
	}
	// The newest bundle decides, and nothing else: not the one before, and not the web's authorities.
	url := p.serve(p.svid(p.endpointID()), "/bundle", p.endpoint(time.Minute))
	newer, _ := p.newRoot("partner.org")
	f := p.relationship(identity.ProfileSPIFFE, url)
	f.Bundle = &identity.FederatedBundle{Sequence: 8, X509: [][]byte{newer.Raw}}
	if _, err := p.client().Fetch(t.Context(), f); !errors.Is(err, identity.ErrUnauthenticated) {
		t.Errorf("an authority that the newest bundle has no more: %v", err)
	}
	for _, f.Bundle = range []*identity.FederatedBundle{nil, {Sequence: 9}} {
		if _, err := p.client().Fetch(t.Context(), f); !errors.Is(err, identity.ErrPrecondition) || !strings.Contains(err.Error(), "pin its bundle") {
			t.Errorf("without an authority: %v", err)
		}
	}
}

// bad are partners that are no good, each with what is said of it.
func badPartners(t *testing.T, p *partner) map[string]struct{ url, says string } {
	cert := p.svid(p.endpointID())
	answer := func(code int, body string) string {
		return p.other(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(code)
			io.WriteString(w, body)
		}), cert)
	}
	endless := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		chunk := bytes.Repeat([]byte(" "), 1<<16)
		for range 100 << 20 / len(chunk) {
			if _, err := w.Write(chunk); err != nil {
				return
			}
		}
	})
	slow := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, `{"keys":[`)
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	})
	silent := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	zipped := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Encoding", "gzip")
		z := gzip.NewWriter(w)
		io.WriteString(z, `{"keys":[]}`)
		z.Close()
	})
	headers := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		for i := range 200 {
			w.Header().Set(fmt.Sprint("X-", i), strings.Repeat("x", 1000))
		}
	})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() { // it accepts, and says nothing at all
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			t.Cleanup(func() { c.Close() })
		}
	}()
	gone, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	gone.Close()
	foreign, _ := p.newRoot("other.org")
	return map[string]struct{ url, says string }{
		"garbage":                     {answer(200, "\x00\x01\x02 garbage"), "no JSON Web Key Set"},
		"a login page":                {answer(200, "<html>"), "no JSON Web Key Set"},
		"nothing":                     {answer(200, ""), "no JSON Web Key Set"},
		"half a document":             {answer(200, `{"keys":[{"kty":"EC","use":"x50`), "no JSON Web Key Set"},
		"100 MiB":                     {p.other(endless, cert), "more than 1048576 bytes"},
		"a slow body":                 {p.other(slow, cert), "unavailable"},
		"silence after the handshake": {p.other(silent, cert), "unavailable"},
		"silence":                     {"https://" + l.Addr().String(), "unavailable"},
		"nobody there":                {"https://" + gone.Addr().String(), "unavailable"},
		"compressed":                  {p.other(zipped, cert), "UTF-8"},
		"headers without end":         {p.other(headers, cert), "unavailable"},
		"not found":                   {answer(404, "{}"), "404"},
		"broken":                      {answer(500, `{"keys":[]}`), "500"},
		"no content":                  {answer(204, ""), "204"},
		"not modified":                {answer(304, ""), "304"},
		"other trust domain's keys":   {answer(200, `{"keys":[`+x509Key(foreign.Raw)+`]}`), "other.org"},
	}
}

// TestBadPartner: whatever a partner does, it ends in time, with an error that says what is wrong, and without a bundle.
func TestBadPartner(t *testing.T) {
	p := newPartner(t, "partner.org")
	c := p.client(func(c *ClientConfig) { c.Deadline = 2 * time.Second })
	for name, bad := range badPartners(t, p) {
		t.Run(name, func(t *testing.T) {
			for _, profile := range []string{identity.ProfileWeb, identity.ProfileSPIFFE} {
				b, err := c.Fetch(t.Context(), p.relationship(profile, bad.url))
				if b != nil || err == nil || !strings.Contains(err.Error(), bad.says) || len(err.Error()) > 1000 {
					t.Errorf("%s: %v, %v: want %q", profile, b, err, bad.says)
				}
				if !errors.Is(err, identity.ErrInvalid) && !errors.Is(err, identity.ErrUnavailable) {
					t.Errorf("%s: %v wraps no sentinel", profile, err)
				}
			}
		})
	}
	// Of the web: a certificate of another host, of nobody's authority, or that has expired.
	stranger := newPartner(t, "stranger.org")
	for name, cert := range map[string]*tls.Certificate{
		"another host":      p.svid(p.endpointID(), func(c *x509.Certificate) { c.IPAddresses, c.DNSNames = nil, []string{"elsewhere.org"} }),
		"another authority": stranger.svid(p.endpointID()),
		"expired": p.svid(p.endpointID(), func(c *x509.Certificate) {
			c.NotBefore, c.NotAfter = time.Now().Add(-2*time.Hour), time.Now().Add(-time.Minute)
		}),
	} {
		if _, err := c.Fetch(t.Context(), p.relationship(identity.ProfileWeb, p.other(p.endpoint(time.Minute), cert))); !errors.Is(err, identity.ErrUnauthenticated) {
			t.Errorf("%s: %v", name, err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.Fetch(ctx, p.relationship(identity.ProfileWeb, "https://127.0.0.1:1")); err == nil {
		t.Error("fetched by one who gave up")
	}
}
