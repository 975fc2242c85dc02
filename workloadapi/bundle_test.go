package workloadapi

import (
	"crypto/ecdh"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc/codes"

	"countersign.io/countersign/identity"
)

type document struct {
	Keys        []map[string]any `json:"keys"`
	Sequence    json.Number      `json:"spiffe_sequence"`
	RefreshHint json.Number      `json:"spiffe_refresh_hint"`
}

func parseDocument(t *testing.T, data []byte) document {
	t.Helper()
	var d document
	if err := json.Unmarshal(data, &d); err != nil {
		t.Fatalf("%v in %s", err, data)
	}
	return d
}

// jwks is what FetchJWTBundles serves for the fixture's trust domain.
func (f *fixture) jwks() []byte {
	f.t.Helper()
	m, err := must(f.client("web").FetchJWTBundles(f.ctx(), &workload.JWTBundlesRequest{})).Recv()
	if err != nil {
		f.t.Fatal(err)
	}
	return m.Bundles["spiffe://example.org"]
}

// X509-SVID section 6.1: use=x509-svid, no kid, exactly one certificate in x5c. (Section 6.2.2 of the Workload
// API keeps such keys out of what it serves as JWKS: see 35.)
func TestConformance12X509KeysInABundle(t *testing.T) {
	d := newDomain("example.org")
	b := d.bundle()
	b.X509 = append(b.X509, newDomain("example.org").ca.Raw)
	data, err := MarshalBundle(b)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, k := range parseDocument(t, data).Keys {
		if k["use"] != "x509-svid" {
			continue
		}
		n++
		if _, ok := k["kid"]; ok || len(k["x5c"].([]any)) != 1 {
			t.Errorf("got %v", k)
		}
	}
	parsed, err := spiffebundle.Parse(d.td, data)
	if err != nil || n != 2 || len(parsed.X509Authorities()) != 2 || len(parsed.JWTAuthorities()) != 1 {
		t.Errorf("%d X.509 keys; go-spiffe reads %v, %v", n, parsed, err)
	}
	b.X509[1] = []byte("no certificate")
	if _, err := MarshalBundle(b); err == nil {
		t.Error("an authority that is no certificate was published")
	}
}

// JWT-SVID section 6.1: use=jwt-svid and a kid on every key; section 2.2 as go-spiffe reads it: the token carries
// its kid.
func TestConformance16JWTKeysHaveKid(t *testing.T) {
	f := start(t)
	u := f.d.update(f.d.svid("/web", ""))
	u.Bundles[f.d.td].JWT["kid-0"] = must(x509.MarshalPKIXPublicKey(must(rsa.GenerateKey(rand.Reader, 2048)).Public()))
	f.source.set("web", u)
	doc := parseDocument(t, f.jwks())
	for i, kid := range []string{"kid-0", "kid-1"} {
		if doc.Keys[i]["kid"] != kid || doc.Keys[i]["use"] != "jwt-svid" {
			t.Errorf("key %d: %v", i, doc.Keys[i])
		}
	}
	set, err := f.spiffe().FetchJWTBundles(f.ctx())
	if err != nil {
		t.Fatal(err)
	}
	if b, ok := set.Get(f.d.td); !ok || !b.HasJWTAuthority("kid-0") || !b.HasJWTAuthority("kid-1") {
		t.Error("go-spiffe does not find the keys")
	}
	_, err = f.client("web").ValidateJWTSVID(f.ctx(), &workload.ValidateJWTSVIDRequest{Audience: "test",
		Svid: f.d.token("spiffe://example.org/web", nil, map[string]any{"kid": ""})})
	wantCode(t, err, codes.InvalidArgument)
}

// Trust Domain and Bundle section 4.1.1: spiffe_sequence is an integer of 64 bits that changes with the content.
func TestConformance17Sequence(t *testing.T) {
	f := start(t)
	u := f.d.update(f.d.svid("/web", ""))
	u.Bundles[f.d.td].Sequence = 1<<53 + 1 // which a float cannot hold
	f.source.set("web", u)
	stream := must(f.client("web").FetchJWTBundles(f.ctx(), &workload.JWTBundlesRequest{}))
	m := must(stream.Recv())
	if got := parseDocument(t, m.Bundles["spiffe://example.org"]).Sequence; got != "9007199254740993" {
		t.Errorf("got %s", got)
	}
	next := f.d.update(f.d.svid("/web", ""))
	next.Bundles[f.d.td].Sequence = 1<<53 + 2
	f.source.set("web", next)
	m = must(stream.Recv())
	b, err := spiffebundle.Parse(f.d.td, m.Bundles["spiffe://example.org"])
	if err != nil {
		t.Fatal(err)
	}
	if n, ok := b.SequenceNumber(); !ok || n != 1<<53+2 {
		t.Errorf("go-spiffe reads %d", n)
	}
}

// Trust Domain and Bundle section 4.1.2: spiffe_refresh_hint is an integer of seconds.
func TestConformance18RefreshHint(t *testing.T) {
	f := start(t)
	for hint, want := range map[time.Duration]json.Number{5 * time.Minute: "300", 1500 * time.Millisecond: "2", 0: ""} {
		u := f.d.update(f.d.svid("/web", ""))
		u.Bundles[f.d.td].RefreshHint = hint
		f.source.set("web", u)
		if got := parseDocument(t, f.jwks()).RefreshHint; got != want {
			t.Errorf("%v: got %s", hint, got)
		}
	}
}

// Trust Domain and Bundle section 4.1.3: keys is always present, and empty means that all are revoked; section
// 4.2: keys of an unknown type are ignored.
func TestConformance19Keys(t *testing.T) {
	f := start(t)
	token := f.d.token("spiffe://example.org/web", nil, nil)
	validate := func() error {
		_, err := f.client("web").ValidateJWTSVID(f.ctx(), &workload.ValidateJWTSVIDRequest{Audience: "test", Svid: token})
		return err
	}
	u := f.d.update(f.d.svid("/web", ""))
	x25519 := must(ecdh.X25519().GenerateKey(rand.Reader)).PublicKey()
	u.Bundles[f.d.td].JWT["odd"] = must(x509.MarshalPKIXPublicKey(x25519))
	u.Bundles[f.d.td].JWT["broken"] = []byte{1, 2, 3}
	f.source.set("web", u)
	if doc := parseDocument(t, f.jwks()); len(doc.Keys) != 1 || doc.Keys[0]["kid"] != "kid-1" {
		t.Errorf("with keys of an unknown type: %v", doc.Keys)
	}
	if err := validate(); err != nil {
		t.Errorf("a key of a known type beside one of an unknown type: %v", err)
	}
	for name, keys := range map[string]map[string][]byte{"none": nil, "only unknown": {"odd": u.Bundles[f.d.td].JWT["odd"]}} {
		revoked := f.d.update(f.d.svid("/web", ""))
		revoked.Bundles[f.d.td].JWT = keys
		f.source.set("web", revoked)
		data := f.jwks()
		if doc := parseDocument(t, data); doc.Keys == nil || len(doc.Keys) != 0 {
			t.Errorf("%s: %s", name, data)
		}
		if _, err := f.spiffe().FetchJWTBundles(f.ctx()); err != nil {
			t.Errorf("%s: go-spiffe: %v", name, err)
		}
		wantCode(t, validate(), codes.InvalidArgument)
	}
	data, err := MarshalBundle(&identity.Bundle{TrustDomain: f.d.td})
	if err != nil || string(data) != `{"keys":[]}` {
		t.Errorf("an empty bundle: %s, %v", data, err)
	}
}

// Workload API section 6.2.2: the JWKS holds JWT keys only.
func TestConformance35JWTKeysOnly(t *testing.T) {
	f := start(t)
	doc := parseDocument(t, f.jwks())
	if len(doc.Keys) != 1 {
		t.Errorf("%d keys", len(doc.Keys))
	}
	for _, k := range doc.Keys {
		if _, ok := k["x5c"]; ok || k["use"] != "jwt-svid" {
			t.Errorf("got %v", k)
		}
	}
}
