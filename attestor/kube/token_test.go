package kube

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"log/slog"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"countersign.io/countersign/identity"
)

func TestVerifyOffline(t *testing.T) {
	c := newClock()
	for _, i := range []*issuer{newIssuer(t, "ec-1", c.now), newRSAIssuer(t, "rsa-1", c.now)} {
		r := newRig(t, c.now)
		r.set(t, offline("east", jwksOf(t, i)))
		got, err := r.Verify(t.Context(), append(i.token(t), '\n'))
		if err != nil {
			t.Fatal(err)
		}
		want := Claims{Cluster: "east", Namespace: "prod", ServiceAccount: "web", PodName: "web-0", PodUID: testUID, NodeName: "node-1", NodeUID: "node-uid-1", ExpiresAt: time.Unix(c.now().Add(time.Hour).Unix(), 0)}
		if *got != want {
			t.Errorf("claims %+v, want %+v", *got, want)
		}
		sel := got.Selectors()
		wantSel := []identity.Selector{"k8s:cluster:east", "k8s:node-name:node-1", "k8s:ns:prod", "k8s:pod-name:web-0", "k8s:pod-uid:" + testUID, "k8s:sa:web"}
		if !slices.Equal(sel, wantSel) {
			t.Errorf("selectors %v, want %v", sel, wantSel)
		}
		for _, s := range sel {
			if _, err := identity.ParseSelector(string(s)); err != nil || !s.Proven() {
				t.Errorf("selector %s: %v, proven %v", s, err, s.Proven())
			}
		}
	}
}

func TestVerifyPSS(t *testing.T) {
	c := newClock()
	i := newRSAIssuer(t, "rsa-1", c.now)
	i.alg = jose.PS256
	r := newRig(t, c.now)
	r.set(t, offline("east", jwksOf(t, i)))
	if _, err := r.Verify(t.Context(), i.token(t)); err != nil {
		t.Fatal(err)
	}
	// The same key, but with an algorithm that it is not published for.
	if _, err := r.Verify(t.Context(), sign(t, jose.RS256, i.kid, i.key, i.claims())); !errors.Is(err, identity.ErrUnauthenticated) {
		t.Fatalf("another algorithm of the key: %v", err)
	}
}

func raw(header, payload, signature string) []byte {
	e := base64.RawURLEncoding.EncodeToString
	return []byte(e([]byte(header)) + "." + e([]byte(payload)) + "." + e([]byte(signature)))
}

func TestVerifyRefuses(t *testing.T) {
	c := newClock()
	i := newIssuer(t, "key-1", c.now)
	other := newIssuer(t, "key-1", c.now) // same kid, another key
	unknown := newIssuer(t, "key-9", c.now)
	rsaIssuer := newRSAIssuer(t, "key-rsa", c.now)
	spki, err := x509.MarshalPKIXPublicKey(rsaIssuer.key.Public())
	if err != nil {
		t.Fatal(err)
	}
	public := pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: spki})
	b, err := json.Marshal(i.claims())
	if err != nil {
		t.Fatal(err)
	}
	payload := string(b)
	set := func(key string, v any) func(map[string]any) {
		return func(c map[string]any) { c[key] = v }
	}
	setKube := func(key string, v any) func(map[string]any) {
		return func(c map[string]any) { kubeClaim(c)[key] = v }
	}
	at := func(d time.Duration) int64 { return c.now().Add(d).Unix() }
	good := i.token(t)
	parts := strings.Split(string(good), ".")
	otherParts := strings.Split(string(i.token(t, forPod("web-1", "other"))), ".")

	for name, row := range map[string]struct {
		token []byte
		is    error
		says  string
	}{
		"expired":                  {i.token(t, set("exp", at(-11*time.Second))), identity.ErrUnauthenticated, "expired at 2026-03-01T11:59:49Z"},
		"no expiry":                {i.token(t, func(c map[string]any) { delete(c, "exp") }), identity.ErrUnauthenticated, "no expiry"},
		"expiry that overflows":    {i.token(t, set("exp", 1e300)), identity.ErrInvalid, "claims"},
		"not yet valid":            {i.token(t, set("nbf", at(11*time.Second))), identity.ErrUnauthenticated, "not valid before"},
		"issued in the future":     {i.token(t, set("iat", at(11*time.Second))), identity.ErrUnauthenticated, "to come"},
		"payload swapped":          {[]byte(parts[0] + "." + otherParts[1] + "." + parts[2]), identity.ErrUnauthenticated, "not signed by key"},
		"signature changed":        {raw(`{"alg":"ES256","kid":"key-1"}`, payload, strings.Repeat("x", 64)), identity.ErrUnauthenticated, "not signed by key"},
		"signature missing":        {raw(`{"alg":"ES256","kid":"key-1"}`, payload, ""), identity.ErrUnauthenticated, "not signed by key"},
		"signature cut":            {good[:len(good)-4], identity.ErrUnauthenticated, "not signed by key"},
		"same kid, other key":      {other.token(t), identity.ErrUnauthenticated, "not signed by key"},
		"alg none":                 {raw(`{"alg":"none","kid":"key-1"}`, payload, ""), identity.ErrUnauthenticated, `algorithm "none"`},
		"alg missing":              {raw(`{"kid":"key-1"}`, payload, "x"), identity.ErrUnauthenticated, `algorithm ""`},
		"HS256 with public key":    {sign(t, jose.HS256, "key-rsa", public, i.claims()), identity.ErrUnauthenticated, `algorithm "HS256"`},
		"HS256 with DER key":       {sign(t, jose.HS256, "key-rsa", spki, i.claims()), identity.ErrUnauthenticated, `algorithm "HS256"`},
		"long alg":                 {raw(`{"alg":"`+strings.Repeat("A", 5000)+`","kid":"key-1"}`, payload, "x"), identity.ErrUnauthenticated, "algorithm"},
		"key in the header":        {raw(`{"alg":"ES256","kid":"key-1","jwk":{"kty":"oct","k":"AAAA"}}`, payload, strings.Repeat("x", 64)), nil, ""},
		"critical extension":       {raw(`{"alg":"ES256","kid":"key-1","crit":["exp"],"exp":1}`, payload, strings.Repeat("x", 64)), identity.ErrUnauthenticated, ""},
		"EC alg with RSA key":      {raw(`{"alg":"ES256","kid":"key-rsa"}`, payload, strings.Repeat("x", 64)), identity.ErrUnauthenticated, "not signed by key"},
		"wrong audience":           {i.token(t, set("aud", []string{"https://kubernetes.default.svc"})), identity.ErrUnauthenticated, `not for "countersign"`},
		"no audience":              {i.token(t, func(c map[string]any) { delete(c, "aud") }), identity.ErrUnauthenticated, "audience"},
		"wrong issuer":             {i.token(t, set("iss", "https://evil.example")), identity.ErrUnauthenticated, "issuer"},
		"no issuer":                {i.token(t, func(c map[string]any) { delete(c, "iss") }), identity.ErrUnauthenticated, "no issuer"},
		"unknown kid":              {unknown.token(t), identity.ErrUnauthenticated, "offline JWKS"},
		"no kid":                   {sign(t, i.alg, "", i.key, i.claims()), identity.ErrUnauthenticated, "no key ID"},
		"1 MiB":                    {bytes.Repeat([]byte("A"), 1<<20), identity.ErrInvalid, "1048576 bytes"},
		"1 MiB of claims":          {i.token(t, set("x", strings.Repeat("A", 1<<20))), identity.ErrInvalid, "at the most 16384"},
		"empty":                    {nil, identity.ErrInvalid, "empty"},
		"white space":              {[]byte(" \n"), identity.ErrInvalid, "empty"},
		"not a token":              {[]byte("hello"), identity.ErrInvalid, "three parts"},
		"encrypted (JWE)":          {[]byte("a.b.c.d.e"), identity.ErrInvalid, "three parts"},
		"white space inside":       {[]byte(parts[0] + "." + parts[1][:8] + "\r\n" + parts[1][8:] + "." + parts[2]), identity.ErrInvalid, "base64url"},
		"not base64":               {[]byte("a.b.c"), identity.ErrInvalid, "compact JWS"},
		"payload is no JSON":       {raw(`{"alg":"ES256","kid":"key-1"}`, "hello", "x"), identity.ErrInvalid, "claims"},
		"claims twice":             {raw(`{"alg":"ES256","kid":"key-1"}`, `{"iss":"a","iss":"b"}`, "x"), identity.ErrInvalid, "claims"},
		"no kubernetes claim":      {i.token(t, func(c map[string]any) { delete(c, "kubernetes.io") }), identity.ErrUnauthenticated, "no kubernetes.io claim"},
		"no pod":                   {i.token(t, func(c map[string]any) { delete(kubeClaim(c), "pod") }), identity.ErrUnauthenticated, "not bound to a pod"},
		"bound to a secret":        {i.token(t, func(c map[string]any) { delete(kubeClaim(c), "pod") }, setKube("secret", map[string]any{"name": "s", "uid": "u"})), identity.ErrUnauthenticated, "not bound to a pod"},
		"pod without UID":          {i.token(t, forPod("web-0", "")), identity.ErrUnauthenticated, "not bound to a pod"},
		"no node":                  {i.token(t, func(c map[string]any) { delete(kubeClaim(c), "node") }), identity.ErrUnauthenticated, "1.30"},
		"node without name":        {i.token(t, setKube("node", map[string]any{"uid": "u"})), identity.ErrUnauthenticated, "node"},
		"subject of another":       {i.token(t, set("sub", "system:serviceaccount:prod:admin")), identity.ErrUnauthenticated, "subject"},
		"namespace with a slash":   {i.token(t, setKube("namespace", "a/b"), set("sub", "system:serviceaccount:a/b:web")), identity.ErrUnauthenticated, "namespace"},
		"pod name leading outside": {i.token(t, forPod("../../secrets", "u")), identity.ErrUnauthenticated, "pod name"},
		"pod UID with a colon":     {i.token(t, forPod("web-0", "a:b")), identity.ErrUnauthenticated, "pod UID"},
		"node name with controls":  {i.token(t, setKube("node", map[string]any{"name": "a\nb"})), identity.ErrUnauthenticated, "node name"},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, c.now)
			r.set(t, offline("east", jwksOf(t, i, rsaIssuer)))
			claims, err := r.Verify(t.Context(), row.token)
			if err == nil || claims != nil {
				t.Fatalf("accepted: %+v", claims)
			}
			if row.is != nil && !errors.Is(err, row.is) {
				t.Errorf("%v is not %v", err, row.is)
			}
			if !strings.Contains(err.Error(), row.says) {
				t.Errorf("%q does not say %q", err, row.says)
			}
			if len(err.Error()) > 700 {
				t.Errorf("an error of %d bytes", len(err.Error()))
			}
			noLeak(t, err.Error()+r.log.String(), row.token)
		})
	}
}

func TestVerifyLeeway(t *testing.T) {
	c := newClock()
	i := newIssuer(t, "key-1", c.now)
	r := newRig(t, c.now)
	r.set(t, offline("east", jwksOf(t, i)))
	tok := i.token(t)
	c.add(-9 * time.Second)
	if _, err := r.Verify(t.Context(), tok); err != nil {
		t.Errorf("9 s early: %v", err)
	}
	c.add(9*time.Second + time.Hour + 9*time.Second)
	if _, err := r.Verify(t.Context(), tok); err != nil {
		t.Errorf("9 s late: %v", err)
	}
	c.add(time.Second)
	if _, err := r.Verify(t.Context(), tok); !errors.Is(err, identity.ErrUnauthenticated) {
		t.Errorf("10 s late: %v", err)
	}
}

func TestTwoClustersOfOneIssuer(t *testing.T) {
	c := newClock()
	east, west := newIssuer(t, "east-key", c.now), newIssuer(t, "west-key", c.now)
	r := newRig(t, c.now)
	r.set(t, offline("east", jwksOf(t, east)), offline("west", jwksOf(t, west)))
	for want, i := range map[string]*issuer{"east": east, "west": west} {
		got, err := r.Verify(t.Context(), i.token(t))
		if err != nil || got.Cluster != want {
			t.Errorf("%s: %+v, %v", want, got, err)
		}
	}
	// The same kid on both: the signature tells.
	east.kid, west.kid = "same", "same"
	r.set(t, offline("east", jwksOf(t, east)), offline("west", jwksOf(t, west)))
	for want, i := range map[string]*issuer{"east": east, "west": west} {
		got, err := r.Verify(t.Context(), i.token(t))
		if err != nil || got.Cluster != want {
			t.Errorf("%s with the same kid: %+v, %v", want, got, err)
		}
	}
	// The same key on both: nobody can tell.
	r.set(t, offline("east", jwksOf(t, east)), offline("west", jwksOf(t, east)))
	if _, err := r.Verify(t.Context(), east.token(t)); !errors.Is(err, identity.ErrPrecondition) || !strings.Contains(err.Error(), `"east" and "west"`) {
		t.Errorf("same key: %v", err)
	}
	// The same key, but told apart by audience.
	w := offline("west", jwksOf(t, east))
	w.Audience = "west"
	r.set(t, offline("east", jwksOf(t, east)), w)
	got, err := r.Verify(t.Context(), east.token(t, func(c map[string]any) { c["aud"] = "west" }))
	if err != nil || got.Cluster != "west" {
		t.Errorf("by audience: %+v, %v", got, err)
	}
}

func TestSetClustersFaults(t *testing.T) {
	c := newClock()
	i, j := newIssuer(t, "key-1", c.now), newIssuer(t, "key-2", c.now)
	api := newFakeAPI(t)
	review := func(name, issuer, kubeconfig string) identity.KubeCluster {
		return identity.KubeCluster{Name: name, Issuer: issuer, Audience: testAudience, TokenReview: true, Kubeconfig: kubeconfig}
	}
	private, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: i.key, KeyID: "k"}}})
	if err != nil {
		t.Fatal(err)
	}
	notConfig := t.TempDir() + "/secret"
	if err := os.WriteFile(notConfig, []byte("hunter2-hunter2-hunter2"), 0o600); err != nil {
		t.Fatal(err)
	}
	insecure := t.TempDir() + "/insecure"
	if err := os.WriteFile(insecure, []byte(`{"apiVersion":"v1","kind":"Config","clusters":[{"name":"c","cluster":{"server":"https://127.0.0.1:1","insecure-skip-tls-verify":true}}],"contexts":[{"name":"x","context":{"cluster":"c","user":""}}],"current-context":"x"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	plain := t.TempDir() + "/plain"
	if err := os.WriteFile(plain, []byte(`{"apiVersion":"v1","kind":"Config","clusters":[{"name":"c","cluster":{"server":"http://127.0.0.1:1"}}],"contexts":[{"name":"x","context":{"cluster":"c","user":""}}],"current-context":"x"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	empty := t.TempDir() + "/empty"
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	withURL := offline("bad", nil)
	withURL.JWKSURL = "https://user:hunter2@example.org/keys"
	withCA := offline("bad", nil)
	withCA.JWKSURL, withCA.CAPEM = "https://example.org/keys", []byte("hunter2")
	badOwnIssuer := func(k identity.KubeCluster) identity.KubeCluster { k.Issuer = "https://bad"; return k }

	for name, row := range map[string]struct {
		bad  identity.KubeCluster
		says string
	}{
		"kubeconfig missing":    {review("bad", "https://bad", "/nonexistent/kubeconfig"), "/nonexistent/kubeconfig: no such file"},
		"kubeconfig a folder":   {review("bad", "https://bad", t.TempDir()), "not a regular file"},
		"kubeconfig a device":   {review("bad", "https://bad", "/dev/zero"), "not a regular file"},
		"kubeconfig is none":    {review("bad", "https://bad", notConfig), "it is not one"},
		"kubeconfig empty":      {review("bad", "https://bad", empty), "no configuration"},
		"kubeconfig insecure":   {review("bad", "https://bad", insecure), "insecure-skip-tls-verify"},
		"kubeconfig plain http": {review("bad", "https://bad", plain), "not an https URL"},
		"not in a cluster":      {review("bad", "https://bad", "in-cluster"), "in-cluster"},
		"review only, shared":   {review("bad", testIssuer, api.kubeconfig(t)), "same issuer"},
		"private key":           {badOwnIssuer(offline("bad", private)), "private or symmetric"},
		"symmetric key":         {badOwnIssuer(offline("bad", []byte(`{"keys":[{"kty":"oct","kid":"a","k":"aHVudGVyMg"}]}`))), "private or symmetric"},
		"no keys":               {badOwnIssuer(offline("bad", []byte(`{"keys":[]}`))), "none of the 0 keys"},
		"not JSON":              {badOwnIssuer(offline("bad", []byte(`hunter2`))), "not a JWKS"},
		"keys of unknown kinds": {badOwnIssuer(offline("bad", []byte(`{"keys":[{"kty":"AKP","kid":"a"},{"kty":"EC"}]}`))), "none of the 2 keys"},
		"no way at all":         {badOwnIssuer(offline("bad", nil)), "no way to verify"},
		"URL with a password":   {badOwnIssuer(withURL), "without user and password"},
		"CA that is none":       {badOwnIssuer(withCA), "no PEM certificate"},
		"name twice":            {offline("good", jwksOf(t, j)), "given twice"},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, c.now)
			err := r.SetClusters([]identity.KubeCluster{offline("good", jwksOf(t, i)), row.bad})
			if err == nil || !strings.Contains(err.Error(), row.says) || !strings.Contains(err.Error(), `"`+row.bad.Name+`"`) {
				t.Fatalf("%v does not name the cluster and say %q", err, row.says)
			}
			if strings.Contains(err.Error(), "hunter2") {
				t.Errorf("the error quotes what was read: %v", err)
			}
			if got, err := r.Verify(t.Context(), i.token(t)); err != nil || got.Cluster != "good" {
				t.Errorf("the other cluster: %+v, %v", got, err)
			}
			if row.bad.Name == "good" {
				return
			}
			_, err = r.Verify(t.Context(), j.token(t, func(c map[string]any) { c["iss"] = row.bad.Issuer }))
			if !errors.Is(err, identity.ErrUnavailable) || !strings.Contains(err.Error(), row.says) {
				t.Errorf("a token of the faulty cluster: %v", err)
			}
		})
	}
}

func TestNewRefuses(t *testing.T) {
	if _, err := New(Config{}); err == nil {
		t.Error("made without a log and a clock")
	}
	r := newRig(t, time.Now)
	if err := r.Run(t.Context(), Events{}); err == nil {
		t.Error("ran without gone")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := r.Run(ctx, Events{func(string, string) {}, func(string, string, string) {}}); err != nil {
		t.Errorf("ended by its context: %v", err)
	}
}

func TestCheckAgent(t *testing.T) {
	k := &identity.KubeCluster{Name: "east", AgentAccounts: []string{"countersign/agent"}}
	if err := CheckAgent(k, &Claims{Cluster: "east", Namespace: "countersign", ServiceAccount: "agent"}); err != nil {
		t.Error(err)
	}
	for _, c := range []Claims{{Cluster: "west", Namespace: "countersign", ServiceAccount: "agent"}, {Cluster: "east", Namespace: "prod", ServiceAccount: "agent"}, {Cluster: "east"}} {
		if err := CheckAgent(k, &c); !errors.Is(err, identity.ErrDenied) {
			t.Errorf("%+v: %v", c, err)
		}
	}
}

func BenchmarkVerifyOffline(b *testing.B) {
	c := newClock()
	for _, alg := range []string{"ES256", "RS256"} {
		b.Run(alg, func(b *testing.B) {
			i := newIssuer(b, "key-1", c.now)
			if alg == "RS256" {
				i = newRSAIssuer(b, "key-1", c.now)
			}
			v, err := New(Config{Log: slog.New(slog.DiscardHandler), Now: c.now})
			if err != nil {
				b.Fatal(err)
			}
			if err := v.SetClusters([]identity.KubeCluster{offline("east", jwksOf(b, i))}); err != nil {
				b.Fatal(err)
			}
			tok := i.token(b)
			for b.Loop() {
				if _, err := v.Verify(context.Background(), tok); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func FuzzParseToken(f *testing.F) {
	seeds, err := os.ReadDir("testdata/fuzz/FuzzParseToken")
	if err != nil || len(seeds) < 3 {
		f.Fatalf("fuzz seeds: %d found, %v", len(seeds), err)
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		tok, err := parseToken(in)
		if err == nil == (tok == nil) {
			t.Fatalf("token %v with error %v", tok != nil, err)
		}
		if err != nil {
			if !errors.Is(err, identity.ErrInvalid) && !errors.Is(err, identity.ErrUnauthenticated) {
				t.Fatalf("an error without sentinel: %v", err)
			}
			noLeak(t, err.Error(), in)
			return
		}
		for _, s := range tok.claims.proven("east").Selectors() {
			if _, err := identity.ParseSelector(string(s)); err != nil {
				t.Fatal(err)
			}
		}
		if again, err := parseToken([]byte(tok.raw)); err != nil || again.claims.Subject != tok.claims.Subject {
			t.Fatalf("parsing what was parsed: %v", err)
		}
	})
}

func FuzzParseJWKS(f *testing.F) {
	seeds, err := os.ReadDir("testdata/fuzz/FuzzParseJWKS")
	if err != nil || len(seeds) < 2 {
		f.Fatalf("fuzz seeds: %d found, %v", len(seeds), err)
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		keys, err := parseJWKS(in)
		if err == nil == (len(keys) == 0) {
			t.Fatalf("%d keys with error %v", len(keys), err)
		}
		for kid, ks := range keys {
			for _, k := range ks {
				if kid == "" || !k.IsPublic() || !usable(k.Key) {
					t.Fatalf("key %q was let through", kid)
				}
			}
		}
	})
}
