package federation

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/acme/autocert"

	"countersign.io/countersign/identity"
)

type noCache struct{}

func (noCache) Get(context.Context, string) ([]byte, error) { return nil, autocert.ErrCacheMiss }
func (noCache) Put(context.Context, string, []byte) error   { return nil }
func (noCache) Delete(context.Context, string) error        { return nil }

func TestNewACMERefuses(t *testing.T) {
	good := ACMEConfig{Directory: "https://ca.test/dir", Hosts: []string{"ca.example.org"}, Cache: noCache{}, Log: quiet()}
	if _, err := NewACME(good); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*ACMEConfig){
		"plain HTTP": func(c *ACMEConfig) { c.Directory = "http://ca.test/dir" },
		"no hosts":   func(c *ACMEConfig) { c.Hosts = nil },
		"no cache":   func(c *ACMEConfig) { c.Cache = nil },
	} {
		c := good
		change(&c)
		if _, err := NewACME(c); !errors.Is(err, identity.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A certificate that nobody renews is said in time, of whatever lifetime.
func TestOverdue(t *testing.T) {
	now := time.Now()
	for _, life := range []time.Duration{6 * 24 * time.Hour, 90 * 24 * time.Hour, 365 * 24 * time.Hour} {
		threshold := min(life/3, 30*24*time.Hour) // when it is to be renewed
		for left, want := range map[time.Duration]bool{life: false, threshold: false, threshold * 9 / 10: false, threshold / 3: true, -time.Hour: true} {
			leaf := &x509.Certificate{NotBefore: now.Add(left - life), NotAfter: now.Add(left)}
			if err := overdue(leaf, now); (err != nil) != want {
				t.Errorf("a certificate of %v with %v left: %v", life, left, err)
			}
		}
	}
}

// A CA that does not say again where an order is, as it need not, is one that x/crypto/acme can work with.
func TestOrderURLs(t *testing.T) {
	finalized := 0
	mux := http.NewServeMux()
	mux.HandleFunc("POST /order", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Location", "https://ca.test/orders/1")
		w.WriteHeader(http.StatusCreated)
		fmt.Fprintf(w, `{"status":"pending","finalize":"http://%s/finalize/1"}`, r.Host)
	})
	mux.HandleFunc("POST /finalize/1", func(w http.ResponseWriter, r *http.Request) {
		if finalized++; finalized == 2 {
			w.Header().Set("Location", "https://ca.test/its-own-word")
		}
		io.WriteString(w, `{"status":"processing"}`)
	})
	mux.HandleFunc("POST /other", func(w http.ResponseWriter, r *http.Request) {})
	s := httptest.NewServer(mux)
	defer s.Close()
	client := &http.Client{Transport: &orderURLs{next: http.DefaultTransport, of: map[string]string{}}}
	post := func(path string) (location, body string) {
		t.Helper()
		res, err := client.Post(s.URL+path, "application/jose+json", strings.NewReader("x"))
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		raw, err := io.ReadAll(res.Body)
		if err != nil {
			t.Fatal(err)
		}
		return res.Header.Get("Location"), string(raw)
	}
	if location, _ := post("/finalize/1"); location != "" {
		t.Errorf("an order that was never made is at %q", location)
	}
	finalized = 0
	if location, body := post("/order"); location != "https://ca.test/orders/1" || !strings.Contains(body, "/finalize/1") {
		t.Errorf("%s %s", location, body)
	}
	if location, body := post("/finalize/1"); location != "https://ca.test/orders/1" || body != `{"status":"processing"}` {
		t.Errorf("%s %s", location, body)
	}
	if location, _ := post("/finalize/1"); location != "https://ca.test/its-own-word" {
		t.Errorf("the CA's own word became %s", location)
	}
	if location, _ := post("/other"); location != "" {
		t.Errorf("another answer leads to %s", location)
	}
}
