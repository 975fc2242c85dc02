package federation

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"countersign.io/countersign/identity"
)

func TestDocumentRoundTrip(t *testing.T) {
	p := newPartner(t, "partner.org")
	second, _ := p.newRoot("")
	p.change(func(b *identity.Bundle) {
		b.X509 = append(b.X509, second.Raw)
		if bytes.Compare(b.X509[0], b.X509[1]) > 0 {
			b.X509[0], b.X509[1] = b.X509[1], b.X509[0]
		}
		b.JWT["k2"] = publicKey(t)
		b.RefreshHint = time.Minute
	})
	raw, err := Marshal(p.bundle(), time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	got, err := Parse(p.td, raw)
	if err != nil || !reflect.DeepEqual(got, p.bundle()) {
		t.Errorf("%+v, %v", got, err)
	}
}

func jwk(t testing.TB, k jose.JSONWebKey) string {
	t.Helper()
	raw, err := k.MarshalJSON()
	if err != nil {
		t.Fatal(err)
	}
	return string(raw)
}

func x509Key(der ...[]byte) string {
	var all []string
	for _, d := range der {
		all = append(all, base64.StdEncoding.EncodeToString(d))
	}
	raw, _ := json.Marshal(map[string]any{"kty": "EC", "use": "x509-svid", "x5c": all})
	return string(raw)
}

// What a document has that nobody here knows is ignored; what is known must be right, or nothing of it counts.
func TestParse(t *testing.T) {
	p := newPartner(t, "partner.org")
	ec := newKey(t)
	good := jwk(t, jose.JSONWebKey{Key: ec.Public(), KeyID: "a", Use: "jwt-svid"})
	rsa1024 := &rsa.PublicKey{N: new(big.Int).SetBit(big.NewInt(12345), 1023, 1), E: 65537}
	leaf := p.svid(p.endpointID()).Leaf
	foreign, _ := p.newRoot("other.org")
	root := x509Key(p.root.Raw)
	keys := func(k ...string) string { return `{"keys":[` + strings.Join(k, ",") + `]}` }
	for name, doc := range map[string]string{
		"empty, all revoked":         `{"keys":[]}`,
		"unknown parameters":         `{"keys":[],"spiffe_colour":"red","x":{"y":[1]}}`,
		"unknown use":                keys(`{"kty":"EC","use":"sig","crv":"nonsense"}`),
		"no use":                     keys(`{"kty":"EC"}`),
		"wit-svid, of no use here":   keys(`{"kty":"EC","use":"wit-svid","kid":"w"}`),
		"unknown type":               keys(`{"kty":"AKP","use":"x509-svid","x5c":["!"]}`),
		"a symmetric key":            keys(`{"kty":"oct","use":"jwt-svid","kid":"s","k":"AAAA"}`),
		"a type that is not a text?": keys(`{"use":"jwt-svid"}`),
		"good ones":                  keys(good, root),
		"the same twice":             keys(good, good, root, root),
		"sequence of 64 bits":        `{"keys":[],"spiffe_sequence":18446744073709551615}`,
		"white space after it":       "{\"keys\":[]}\n ",
	} {
		if b, err := Parse(p.td, []byte(doc)); err != nil || b == nil || b.TrustDomain != p.td {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, c := range map[string]struct{ doc, says string }{
		"nothing":                       {"", "no JSON Web Key Set"},
		"garbage":                       {"\x00\x01garbage", "no JSON Web Key Set"},
		"HTML":                          {"<html>login</html>", "no JSON Web Key Set"},
		"a list":                        {"[]", "no JSON Web Key Set"},
		"no keys":                       {`{"spiffe_sequence":1}`, `no "keys"`},
		"null keys":                     {`{"keys":null}`, `no "keys"`},
		"keys of another type":          {`{"keys":{}}`, "no JSON Web Key Set"},
		"a key of another type":         {`{"keys":["x"]}`, "key 1"},
		"not UTF-8":                     {"{\"keys\":[],\"x\":\"\xff\"}", "UTF-8"},
		"something after it":            {`{"keys":[]}{"keys":[]}`, "after its end"},
		"negative sequence":             {`{"keys":[],"spiffe_sequence":-1}`, "spiffe_sequence"},
		"broken sequence":               {`{"keys":[],"spiffe_sequence":1.5}`, "spiffe_sequence"},
		"sequence beyond 64 bits":       {`{"keys":[],"spiffe_sequence":18446744073709551616}`, "spiffe_sequence"},
		"sequence as text":              {`{"keys":[],"spiffe_sequence":"1"}`, "spiffe_sequence"},
		"negative hint":                 {`{"keys":[],"spiffe_refresh_hint":-5}`, "refresh hint"},
		"a hint beyond reason":          {`{"keys":[],"spiffe_refresh_hint":9000000000000000000}`, "refresh hint"},
		"broken hint":                   {`{"keys":[],"spiffe_refresh_hint":0.5}`, "spiffe_refresh_hint"},
		"x509 without a certificate":    {keys(`{"kty":"EC","use":"x509-svid"}`), "exactly one"},
		"x509 with a JWT's parameters":  {keys(strings.Replace(good, "jwt-svid", "x509-svid", 1)), "exactly one"},
		"x509 with two certificates":    {keys(x509Key(p.root.Raw, p.root.Raw)), "exactly one"},
		"x509 with broken base64":       {keys(`{"kty":"EC","use":"x509-svid","x5c":["*"]}`), "certificate"},
		"x509 with no certificate":      {keys(x509Key([]byte("no certificate"))), "certificate"},
		"x509 of a leaf":                {keys(x509Key(leaf.Raw)), "not a CA's"},
		"x509 of another trust domain":  {keys(x509Key(foreign.Raw)), "other.org"},
		"jwt without kid":               {keys(jwk(t, jose.JSONWebKey{Key: ec.Public(), Use: "jwt-svid"})), "kid"},
		"jwt with a huge kid":           {keys(jwk(t, jose.JSONWebKey{Key: ec.Public(), Use: "jwt-svid", KeyID: strings.Repeat("k", 300)})), "kid of 300 bytes"},
		"jwt with a private key":        {keys(jwk(t, jose.JSONWebKey{Key: ec, KeyID: "a", Use: "jwt-svid"})), "not a public key"},
		"jwt off the curve":             {keys(`{"kty":"EC","use":"jwt-svid","kid":"a","crv":"P-256","x":"AAAA","y":"AAAA"}`), "key 1"},
		"jwt with weak RSA":             {keys(jwk(t, jose.JSONWebKey{Key: rsa1024, KeyID: "a", Use: "jwt-svid"})), "1024 bits"},
		"two jwt keys of one kid":       {keys(good, jwk(t, jose.JSONWebKey{Key: newKey(t).Public(), KeyID: "a", Use: "jwt-svid"})), "two keys"},
		"a good one and a bad one":      {keys(root, `{"kty":"EC","use":"x509-svid"}`), "key 2"},
		"more keys than anybody's":      {keys(strings.Repeat(`{"kty":"x"},`, maxKeys) + `{"kty":"x"}`), "keys: at the most"},
		"too large":                     {`{"keys":[]` + strings.Repeat(" ", MaxDocument) + `}`, "more than 1048576 bytes"},
		"more certificates than agents": {keys(manyRoots(p)...), "at the most"},
	} {
		b, err := Parse(p.td, []byte(c.doc))
		if !errors.Is(err, identity.ErrInvalid) || b != nil && err == nil || err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: got %v, want %q", name, err, c.says)
		} else if len(err.Error()) > 1000 {
			t.Errorf("%s: an error of %d bytes", name, len(err.Error()))
		}
	}
}

func manyRoots(p *partner) []string {
	var out []string
	for range identity.MaxFederatedX509 + 1 {
		c, _ := p.newRoot("")
		out = append(out, x509Key(c.Raw))
	}
	return out
}

// TestConformance19UnknownKeysIgnored: keys is always present, an empty one means that all are revoked (Trust Domain and Bundle
// section 4.1.3), and what has an unknown type or use is ignored (section 4.2).
func TestConformance19UnknownKeysIgnored(t *testing.T) {
	p := newPartner(t, "partner.org")
	b, err := Parse(p.td, []byte(`{"keys":[{"kty":"EC","use":"something-svid","kid":"x"},{"kty":"PQC","use":"jwt-svid"},`+x509Key(p.root.Raw)+`]}`))
	if err != nil || len(b.X509) != 1 || len(b.JWT) != 0 {
		t.Errorf("%+v, %v", b, err)
	}
	if b, err = Parse(p.td, []byte(`{"keys":[]}`)); err != nil || len(b.X509)+len(b.JWT) != 0 {
		t.Errorf("%+v, %v", b, err)
	}
	if _, err = Parse(p.td, []byte(`{}`)); err == nil {
		t.Error("a document without keys was taken")
	}
}

func TestMarshalRefuses(t *testing.T) {
	for _, b := range []*identity.Bundle{{X509: [][]byte{[]byte("x")}}, {JWT: map[string][]byte{"k": []byte("x")}}} {
		if _, err := Marshal(b, time.Minute); err == nil {
			t.Errorf("%+v was written", b)
		}
	}
}

// FuzzParse: whatever a partner publishes, what is taken comes back the same when it is published again.
func FuzzParse(f *testing.F) {
	seeds, err := filepath.Glob(filepath.Join("testdata", "fuzz", "FuzzParse", "*"))
	if err != nil || len(seeds) < 4 {
		f.Fatalf("%d seeds, %v", len(seeds), err)
	}
	p := newPartner(f, "partner.org")
	raw, err := Marshal(p.bundle(), time.Minute)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(raw)
	f.Fuzz(func(t *testing.T, raw []byte) {
		b, err := Parse(p.td, raw)
		if err != nil {
			if !errors.Is(err, identity.ErrInvalid) || len(err.Error()) > 2000 {
				t.Fatalf("%v", err)
			}
			return
		}
		again, err := Marshal(b, b.RefreshHint)
		if err != nil {
			t.Fatal(err)
		}
		b2, err := Parse(p.td, again)
		if err != nil || !reflect.DeepEqual(b, b2) {
			t.Fatalf("%+v became %+v, %v", b, b2, err)
		}
	})
}

// TestSeeds writes the fuzzers' seeds anew with COUNTERSIGN_SEEDS=1, and otherwise sees that they are there.
func TestSeeds(t *testing.T) {
	dir := filepath.Join("testdata", "fuzz", "FuzzParse")
	if os.Getenv("COUNTERSIGN_SEEDS") != "" {
		p := newPartner(t, "partner.org")
		var key crypto.Signer = newKey(t)
		rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
		if err != nil {
			t.Fatal(err)
		}
		for name, doc := range map[string]string{
			"x509":  `{"keys":[` + x509Key(p.root.Raw) + `],"spiffe_sequence":12,"spiffe_refresh_hint":300}`,
			"jwt":   `{"keys":[` + jwk(t, jose.JSONWebKey{Key: key.Public(), KeyID: "a", Use: "jwt-svid"}) + `],"spiffe_sequence":1}`,
			"rsa":   `{"keys":[` + jwk(t, jose.JSONWebKey{Key: rsaKey.Public(), KeyID: "r", Use: "jwt-svid"}) + `]}`,
			"empty": `{"keys":[]}`, "unknown": `{"keys":[{"kty":"AKP","use":"wit-svid"},{"use":"x"}],"more":[1,{"a":null}]}`,
		} {
			if err := os.MkdirAll(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, name), fmt.Appendf(nil, "go test fuzz v1\n[]byte(%q)\n", doc), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	if seeds, err := os.ReadDir(dir); err != nil || len(seeds) < 4 {
		t.Errorf("%d seeds, %v", len(seeds), err)
	}
}
