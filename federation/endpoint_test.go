package federation

import (
	"bytes"
	"crypto/tls"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"

	"countersign.io/countersign/identity"
)

func ask(t testing.TB, h http.Handler, method string, header ...string) *http.Response {
	t.Helper()
	r := httptest.NewRequest(method, "https://example.org/bundle", nil)
	for i := 0; i+1 < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w.Result()
}

func body(t testing.TB, r *http.Response) []byte {
	t.Helper()
	raw, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func TestEndpointServesTheNewest(t *testing.T) {
	p := newPartner(t, "partner.org")
	h := p.endpoint(5 * time.Minute)
	first := ask(t, h, http.MethodGet)
	raw := body(t, first)
	if first.StatusCode != http.StatusOK || first.Header.Get("Content-Type") != "application/json" || first.Header.Get("Cache-Control") != "public, must-revalidate, max-age=60" {
		t.Fatalf("%d %v", first.StatusCode, first.Header)
	}
	// What the reference library makes of it.
	b, err := spiffebundle.Parse(p.td, raw)
	if err != nil {
		t.Fatal(err)
	}
	seq, _ := b.SequenceNumber()
	hint, _ := b.RefreshHint()
	if seq != 7 || hint != 5*time.Minute || len(b.X509Authorities()) != 1 || !b.X509Authorities()[0].Equal(p.root) || !b.HasJWTAuthority("k1") {
		t.Errorf("sequence %d, hint %v, %d X.509 authorities", seq, hint, len(b.X509Authorities()))
	}
	etag := first.Header.Get("ETag")
	again := ask(t, h, http.MethodGet, "If-None-Match", etag)
	if again.StatusCode != http.StatusNotModified || len(body(t, again)) != 0 {
		t.Errorf("the same again: %d", again.StatusCode)
	}
	head := ask(t, h, http.MethodHead)
	if head.StatusCode != http.StatusOK || head.Header.Get("ETag") != etag || len(body(t, head)) != 0 {
		t.Errorf("HEAD: %d %v", head.StatusCode, head.Header)
	}
	p.change(func(b *identity.Bundle) { b.Sequence = 8; b.JWT = map[string][]byte{"k2": b.JWT["k1"]} })
	changed := ask(t, h, http.MethodGet, "If-None-Match", etag)
	if changed.StatusCode != http.StatusOK || changed.Header.Get("ETag") == etag || !bytes.Contains(body(t, changed), []byte(`"spiffe_sequence":8`)) {
		t.Errorf("a changed bundle: %d", changed.StatusCode)
	}
	// Two members say the same, byte for byte: whoever asks them in turn sees no change where there is none.
	if other := body(t, ask(t, p.endpoint(5*time.Minute), http.MethodGet)); !bytes.Equal(other, body(t, ask(t, h, http.MethodGet))) {
		t.Error("another member's document differs")
	}
}

func TestEndpointRefuses(t *testing.T) {
	p := newPartner(t, "partner.org")
	h := p.endpoint(time.Minute)
	for _, method := range []string{http.MethodPost, http.MethodPut, http.MethodDelete, http.MethodOptions} {
		if r := ask(t, h, method); r.StatusCode != http.StatusMethodNotAllowed || r.Header.Get("Allow") != "GET, HEAD" {
			t.Errorf("%s: %d", method, r.StatusCode)
		}
	}
	p.change(func(b *identity.Bundle) { b.Sequence = 0 })
	if r := ask(t, h, http.MethodGet); r.StatusCode != http.StatusServiceUnavailable || r.Header.Get("ETag") != "" {
		t.Errorf("without a bundle: %d", r.StatusCode)
	}
	p.change(func(b *identity.Bundle) { b.Sequence = 9; b.X509 = [][]byte{[]byte("x")} })
	if r := ask(t, h, http.MethodGet); r.StatusCode != http.StatusServiceUnavailable {
		t.Errorf("with a bundle that cannot be written: %d", r.StatusCode)
	}
}

// A document is made once for each bundle, not once for each reader.
func BenchmarkEndpoint(b *testing.B) {
	p := newPartner(b, "partner.org")
	h := p.endpoint(time.Minute)
	for b.Loop() {
		ask(b, h, http.MethodGet)
	}
}

// TestConformance12X509Use, with 16 to 19: the bundle's document (X509-SVID section 6.1, JWT-SVID section 6.1, Trust Domain and
// Bundle sections 4.1 and 4.2).
func TestConformance12X509Use(t *testing.T) {
	p := newPartner(t, "partner.org")
	var doc struct {
		Keys []map[string]any `json:"keys"`
		Seq  json.Number      `json:"spiffe_sequence"`
		Hint json.Number      `json:"spiffe_refresh_hint"`
	}
	p.change(func(b *identity.Bundle) { b.Sequence = 1<<64 - 1 })
	raw, err := Marshal(p.bundle(), 1500*time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(raw, &doc); err != nil {
		t.Fatal(err)
	}
	if doc.Seq != "18446744073709551615" || doc.Hint != "2" {
		t.Errorf("sequence %s, hint %s: want all 64 bits, and whole seconds", doc.Seq, doc.Hint)
	}
	for _, k := range doc.Keys {
		_, hasKid := k["kid"]
		chain, _ := k["x5c"].([]any)
		switch k["use"] {
		case "x509-svid":
			if hasKid || len(chain) != 1 {
				t.Errorf("an x509-svid key: %v", k)
			}
		case "jwt-svid":
			if !hasKid || len(chain) != 0 {
				t.Errorf("a jwt-svid key: %v", k)
			}
		default:
			t.Errorf("use %v", k["use"])
		}
	}
	raw, err = Marshal(&identity.Bundle{TrustDomain: p.td, Sequence: 1}, time.Minute)
	if err != nil || !strings.Contains(string(raw), `"keys":[]`) {
		t.Errorf("a bundle without keys: %s, %v", raw, err)
	}
}

func dialPublic(t testing.TB, url string, conf *tls.Config) (tls.ConnectionState, error) {
	t.Helper()
	conf.InsecureSkipVerify = true
	c, err := tls.Dial("tcp", strings.TrimSuffix(strings.TrimPrefix(url, "https://"), "/bundle"), conf)
	if err != nil {
		return tls.ConnectionState{}, err
	}
	defer c.Close()
	return c.ConnectionState(), nil
}

// TestConformance22MozillaIntermediateServer: the endpoint's TLS is Mozilla's intermediate one, and asks for no client
// certificate (SPIFFE Federation sections 5, 5.2.1 and 5.2.2).
func TestConformance22MozillaIntermediateServer(t *testing.T) {
	p := newPartner(t, "partner.org")
	url := p.serve(p.svid(p.endpointID()), "/bundle", p.endpoint(time.Minute))
	for name, c := range map[string]struct {
		conf *tls.Config
		ok   bool
	}{
		"TLS 1.3":                    {&tls.Config{MinVersion: tls.VersionTLS13}, true},
		"TLS 1.2":                    {&tls.Config{MaxVersion: tls.VersionTLS12}, true},
		"TLS 1.1":                    {&tls.Config{MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS11}, false},
		"TLS 1.0":                    {&tls.Config{MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS10}, false},
		"without forward secrecy":    {&tls.Config{MaxVersion: tls.VersionTLS12, CipherSuites: []uint16{tls.TLS_RSA_WITH_AES_128_GCM_SHA256}}, false},
		"CBC":                        {&tls.Config{MaxVersion: tls.VersionTLS12, CipherSuites: []uint16{tls.TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA}}, false},
		"ChaCha20":                   {&tls.Config{MaxVersion: tls.VersionTLS12, CipherSuites: []uint16{tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256}}, true},
		"P-384":                      {&tls.Config{CurvePreferences: []tls.CurveID{tls.CurveP384}}, true},
		"P-521, which is not in it":  {&tls.Config{CurvePreferences: []tls.CurveID{tls.CurveP521}}, false},
		"post-quantum key agreement": {&tls.Config{CurvePreferences: []tls.CurveID{tls.X25519MLKEM768}}, true},
	} {
		asked := false
		c.conf.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			asked = true
			return &tls.Certificate{}, nil
		}
		if _, err := dialPublic(t, url, c.conf); (err == nil) != c.ok {
			t.Errorf("%s: %v", name, err)
		}
		if asked {
			t.Errorf("%s: the endpoint asks for a client certificate", name)
		}
	}
}
