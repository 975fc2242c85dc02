package kube

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"countersign.io/countersign/identity"
)

// keyServer serves a JWKS at /keys without asking for credentials.
type keyServer struct {
	*httptest.Server
	fetches atomic.Int64
	mu      sync.Mutex
	h       http.HandlerFunc
}

func newKeyServer(t *testing.T) *keyServer {
	t.Helper()
	k := &keyServer{}
	k.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		k.fetches.Add(1)
		k.mu.Lock()
		h := k.h
		k.mu.Unlock()
		h(w, r)
	}))
	k.Config.ErrorLog = log.New(io.Discard, "", 0)
	k.StartTLS()
	t.Cleanup(func() { k.CloseClientConnections(); k.Close() })
	return k
}

func (k *keyServer) serve(h http.HandlerFunc) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.h = h
}

func (k *keyServer) publish(b []byte) {
	k.serve(func(w http.ResponseWriter, r *http.Request) { w.Write(b) })
}

func (k *keyServer) cluster(name string) identity.KubeCluster {
	return identity.KubeCluster{Name: name, Issuer: testIssuer, Audience: testAudience, JWKSURL: k.URL + "/keys",
		CAPEM: (&fakeAPI{Server: k.Server}).caPEM()}
}

func TestFetchedJWKS(t *testing.T) {
	c := newClock()
	one, two := newIssuer(t, "key-1", c.now), newIssuer(t, "key-2", c.now)
	k := newKeyServer(t)
	k.publish(jwksOf(t, one))
	r := newRig(t, c.now)
	r.set(t, k.cluster("east"))
	for range 3 {
		if _, err := r.Verify(t.Context(), one.token(t)); err != nil {
			t.Fatal(err)
		}
	}
	if n := k.fetches.Load(); n != 1 {
		t.Errorf("%d fetches for one key", n)
	}

	// The cluster gets a new key: seen at once, if the last fetch is not of just now.
	k.publish(jwksOf(t, two))
	if _, err := r.Verify(t.Context(), two.token(t)); !errors.Is(err, identity.ErrUnauthenticated) || !strings.Contains(err.Error(), `"key-2" is not among the 1`) {
		t.Errorf("within the interval: %v", err)
	}
	c.add(10 * time.Second)
	if _, err := r.Verify(t.Context(), two.token(t)); err != nil {
		t.Errorf("new key: %v", err)
	}
	// The old one is published no longer.
	if _, err := r.Verify(t.Context(), one.token(t)); !errors.Is(err, identity.ErrUnauthenticated) {
		t.Errorf("withdrawn key: %v", err)
	}

	// The endpoint is down: known keys stay in use, unknown ones cannot be judged.
	k.serve(func(w http.ResponseWriter, r *http.Request) { http.Error(w, "down", http.StatusServiceUnavailable) })
	c.add(10 * time.Second)
	if _, err := r.Verify(t.Context(), one.token(t)); !errors.Is(err, identity.ErrUnavailable) || errors.Is(err, identity.ErrUnauthenticated) {
		t.Errorf("unknown key while down: %v", err)
	}
	if _, err := r.Verify(t.Context(), two.token(t)); err != nil {
		t.Errorf("known key while down: %v", err)
	}
	if s := r.Status(); len(s) != 1 || s[0].Keys != 1 || s[0].JWKSFault == nil || s[0].Fault != nil {
		t.Errorf("status %+v", s)
	}
	// An unchanged cluster keeps its keys, whatever else of it changes.
	same := k.cluster("east")
	same.DefaultID = identity.DefaultKubeID
	r.set(t, same)
	if _, err := r.Verify(t.Context(), two.token(t)); err != nil {
		t.Errorf("after registering anew: %v", err)
	}
}

func TestUnknownKidFlood(t *testing.T) {
	c := newClock()
	i := newIssuer(t, "key-1", c.now)
	k := newKeyServer(t)
	k.publish(jwksOf(t, i))
	r := newRig(t, c.now)
	r.set(t, k.cluster("east"))
	const intervals = 3
	for n := range intervals {
		var wg sync.WaitGroup
		for m := range 200 {
			stranger := &issuer{kid: fmt.Sprintf("key-%d-%d", n, m), key: i.key, alg: i.alg, now: c.now}
			tok := stranger.token(t)
			wg.Go(func() {
				if _, err := r.Verify(t.Context(), tok); !errors.Is(err, identity.ErrUnauthenticated) {
					t.Errorf("unknown kid: %v", err)
				}
			})
		}
		wg.Wait()
		if _, err := r.Verify(t.Context(), i.token(t)); err != nil {
			t.Errorf("a good token during the flood: %v", err)
		}
		c.add(10 * time.Second)
	}
	if got := k.fetches.Load(); got != intervals {
		t.Errorf("%d fetches, want one in each of %d intervals", got, intervals)
	}
}

func TestHostileJWKSEndpoint(t *testing.T) {
	c := newClock()
	i := newIssuer(t, "key-1", c.now)
	elsewhere := newKeyServer(t)
	elsewhere.publish(jwksOf(t, i))
	for name, row := range map[string]struct {
		h    http.HandlerFunc
		says string
	}{
		"garbage": {func(w http.ResponseWriter, r *http.Request) { w.Write([]byte("<html>hello</html>")) }, "not a JWKS"},
		"no keys": {func(w http.ResponseWriter, r *http.Request) { w.Write([]byte("{}")) }, "none of the 0 keys"},
		"private": {func(w http.ResponseWriter, r *http.Request) {
			w.Write([]byte(`{"keys":[{"kty":"oct","k":"AAAA","kid":"key-1"}]}`))
		}, "private or symmetric"},
		"100 MiB": {endless(100 << 20), "larger than 1048576 bytes"},
		"too many": {func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprintf(w, `{"keys":[{}%s]}`, strings.Repeat(",{}", 256))
		}, "257 keys"},
		"redirects": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, elsewhere.URL+"/keys", http.StatusFound)
		}, "redirects (302)"},
		"forbidden": {func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(403) }, "service-account-issuer-discovery"},
		"breaks off": {func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", "100")
			w.Write([]byte("{"))
		}, "EOF"},
		"hangs":                {func(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() }, "deadline exceeded"},
		"hangs after the head": {func(w http.ResponseWriter, r *http.Request) { w.(http.Flusher).Flush(); <-r.Context().Done() }, "deadline exceeded"},
	} {
		t.Run(name, func(t *testing.T) {
			k := newKeyServer(t)
			k.serve(row.h)
			r := newRig(t, c.now, func(cfg *Config) {
				if strings.HasPrefix(name, "hangs") {
					cfg.RequestTimeout = 100 * time.Millisecond
				}
			})
			good := newIssuer(t, "good-1", c.now)
			r.set(t, k.cluster("east"), offline("west", jwksOf(t, good)))
			tok := i.token(t)
			_, err := r.Verify(t.Context(), tok)
			if !errors.Is(err, identity.ErrUnavailable) || !strings.Contains(err.Error(), row.says) || !strings.Contains(err.Error(), `"east"`) {
				t.Errorf("%v does not say %q", err, row.says)
			}
			noLeak(t, err.Error()+r.log.String(), tok)
			if got, err := r.Verify(t.Context(), good.token(t)); err != nil || got.Cluster != "west" {
				t.Errorf("the other cluster of that issuer: %+v, %v", got, err)
			}
		})
	}
	if n := elsewhere.fetches.Load(); n != 0 {
		t.Errorf("the redirect was followed %d times", n)
	}
}

func endless(n int) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		w.Write([]byte(`{"keys":[`))
		chunk := bytes.Repeat([]byte(" "), 1<<16)
		for range n / len(chunk) {
			if _, err := w.Write(chunk); err != nil {
				return
			}
		}
	}
}

func TestFetchUntrustedServer(t *testing.T) {
	c := newClock()
	i := newIssuer(t, "key-1", c.now)
	k := newKeyServer(t)
	k.publish(jwksOf(t, i))
	r := newRig(t, c.now)
	cl := k.cluster("east")
	cl.CAPEM = nil
	r.set(t, cl)
	if _, err := r.Verify(t.Context(), i.token(t)); !errors.Is(err, identity.ErrUnavailable) || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("a JWKS from a server under no trusted root: %v", err)
	}
}

// A caller who leaves does not take the fetch along for those who wait for it too.
func TestFetchOutlivesItsFirstCaller(t *testing.T) {
	c := newClock()
	i := newIssuer(t, "key-1", c.now)
	k := newKeyServer(t)
	entered, release := make(chan struct{}, 1), make(chan struct{})
	k.serve(func(w http.ResponseWriter, r *http.Request) {
		entered <- struct{}{}
		<-release
		w.Write(jwksOf(t, i))
	})
	r := newRig(t, c.now)
	r.set(t, k.cluster("east"))
	tok := i.token(t)
	ctx, cancel := context.WithCancel(t.Context())
	first, second := make(chan error, 1), make(chan error, 1)
	go func() { _, err := r.Verify(ctx, tok); first <- err }()
	<-entered
	go func() { _, err := r.Verify(t.Context(), tok); second <- err }()
	cancel()
	if err := <-first; !errors.Is(err, identity.ErrUnavailable) || !errors.Is(err, context.Canceled) {
		t.Errorf("the one who left: %v", err)
	}
	close(release)
	if err := <-second; err != nil {
		t.Errorf("the one who stayed: %v", err)
	}
	if n := k.fetches.Load(); n != 1 {
		t.Errorf("%d fetches", n)
	}
}

// A JWKS behind the API server is fetched with the kubeconfig's credentials and CA, and those go nowhere else.
func TestJWKSThroughAPIServer(t *testing.T) {
	c := newClock()
	i := newIssuer(t, "key-1", c.now)
	api := newFakeAPI(t)
	api.mu.Lock()
	api.jwks = func(w http.ResponseWriter, r *http.Request) {
		if api.allowed(w, r, "jwks") {
			w.Write(jwksOf(t, i))
		}
	}
	api.mu.Unlock()
	for _, u := range []string{api.URL + "/openid/v1/jwks", "https://kubernetes.default.svc/openid/v1/jwks", "https://kubernetes.default.svc.cluster.local/openid/v1/jwks"} {
		r := newRig(t, c.now)
		r.set(t, identity.KubeCluster{Name: "east", Issuer: testIssuer, Audience: testAudience, JWKSURL: u, Kubeconfig: api.kubeconfig(t)})
		if _, err := r.Verify(t.Context(), i.token(t)); err != nil {
			t.Errorf("%s: %v", u, err)
		}
	}

	k := newKeyServer(t)
	k.serve(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "" {
			t.Error("credentials of the API server were sent elsewhere")
		}
		w.Write(jwksOf(t, i))
	})
	cl := k.cluster("east")
	cl.Kubeconfig = api.kubeconfig(t)
	r := newRig(t, c.now)
	r.set(t, cl)
	if _, err := r.Verify(t.Context(), i.token(t)); err != nil {
		t.Error(err)
	}

	// A redirect of the API server is not followed either.
	api.mu.Lock()
	api.jwks = func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, k.URL+"/keys", http.StatusFound) }
	api.mu.Unlock()
	r = newRig(t, c.now)
	r.set(t, identity.KubeCluster{Name: "east", Issuer: testIssuer, Audience: testAudience, JWKSURL: api.URL + "/openid/v1/jwks", Kubeconfig: api.kubeconfig(t)})
	if _, err := r.Verify(t.Context(), i.token(t)); !errors.Is(err, identity.ErrUnavailable) || !strings.Contains(err.Error(), "redirects") {
		t.Errorf("redirect: %v", err)
	}
}
