package kube

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"reflect"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"
	lru "github.com/hashicorp/golang-lru/v2"
	"golang.org/x/sync/singleflight"

	"countersign.io/countersign/identity"
)

// Limits of a JWKS; that of a real cluster has two or three keys in 2 KiB.
const (
	maxJWKSBytes = 1 << 20
	maxJWKSKeys  = 256
	minRSABits   = 2048
	maxRSABits   = 8192
)

// keySet holds the keys of one JWKS by their kid. It is immutable.
type keySet map[string][]jose.JSONWebKey

// keySource is where the keys of one cluster come from: a JWKS held offline, or one fetched when an unknown kid is shown
// and now and then.
type keySource struct {
	cfg         Config
	cluster     string
	offline     []byte
	url         string // empty: offline
	caPEM       []byte
	kubeconfig  string
	api         *apiServer // may be nil
	http        *http.Client
	fetchFlight singleflight.Group

	mu    sync.Mutex
	keys  keySet
	seen  *lru.Cache[[sha256.Size]byte, struct{}] // SHA-256 of tokens that keys signed; replaced with keys
	tried time.Time                               // start of the last fetch
	fault error                                   // of the last fetch
}

// maxSeen bounds the tokens whose signature is remembered: 100 bytes each. A pod shows one token for most of an hour, at every
// JWT-SVID and renewal, and a signature of the same bytes under the same keys does not change; all else is checked each time.
const maxSeen = 8192

// use takes keys into use. What the keys before had signed is forgotten with them.
func (s *keySource) use(keys keySet) {
	seen, _ := lru.New[[sha256.Size]byte, struct{}](maxSeen) // fails only for a size that is not positive
	s.keys, s.seen = keys, seen
}

// signed reports whether one of the keys signed the token.
func (s *keySource) signed(t *token) bool {
	s.mu.Lock()
	keys, seen := s.keys[t.kid], s.seen
	s.mu.Unlock()
	if len(keys) == 0 {
		return false
	}
	sum := sha256.Sum256([]byte(t.raw))
	if _, ok := seen.Get(sum); ok {
		return true
	}
	if !t.signedBy(keys) {
		return false
	}
	seen.Add(sum, struct{}{})
	return true
}

// newKeySource returns an error where the registration is at fault; it fetches nothing.
func newKeySource(cfg Config, k *identity.KubeCluster, api *apiServer) (*keySource, error) {
	s := &keySource{cfg: cfg, cluster: k.Name, offline: k.JWKS, url: k.JWKSURL, caPEM: k.CAPEM, kubeconfig: k.Kubeconfig, api: api}
	if len(k.JWKS) > 0 {
		keys, err := parseJWKS(k.JWKS)
		if err != nil {
			return nil, fmt.Errorf("reading JWKS of kube cluster %q: %w: %v: give the output of kubectl get --raw /openid/v1/jwks", k.Name, identity.ErrInvalid, err)
		}
		s.url = ""
		s.use(keys)
		return s, nil
	}
	u, err := url.Parse(k.JWKSURL)
	if err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil {
		return nil, fmt.Errorf("%w: kube cluster %q: its JWKS URL is not of the form https://HOST/PATH without user and password", identity.ErrInvalid, k.Name)
	}
	t := &tls.Config{MinVersion: tls.VersionTLS12}
	if len(k.CAPEM) > 0 {
		t.RootCAs = x509.NewCertPool()
		if !t.RootCAs.AppendCertsFromPEM(k.CAPEM) {
			return nil, fmt.Errorf("%w: kube cluster %q: its CA for the JWKS URL holds no PEM certificate", identity.ErrInvalid, k.Name)
		}
	}
	s.http = &http.Client{
		CheckRedirect: refuseRedirect,
		Transport: &http.Transport{
			Proxy: http.ProxyFromEnvironment, TLSClientConfig: t, ForceAttemptHTTP2: true,
			MaxIdleConns: 1, IdleConnTimeout: 30 * time.Second, MaxResponseHeaderBytes: 64 << 10,
		},
	}
	return s, nil
}

// refuseRedirect: keys from elsewhere are not the cluster's, and credentials must not travel.
func refuseRedirect(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }

// madeFrom reports whether the source would be made the same from k; a nil source never.
func (s *keySource) madeFrom(k *identity.KubeCluster) bool {
	return s != nil && bytes.Equal(s.offline, k.JWKS) && (len(s.offline) > 0 || s.url == k.JWKSURL) &&
		bytes.Equal(s.caPEM, k.CAPEM) && s.kubeconfig == k.Kubeconfig
}

func (s *keySource) find(kid string) []jose.JSONWebKey {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.keys[kid]
}

func (s *keySource) status() (keys int, fault error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, k := range s.keys {
		keys += len(k)
	}
	return keys, s.fault
}

// refresh fetches the JWKS unless that was tried less than FetchInterval ago, and returns how the last try ended. All who
// ask while a fetch is under way wait for that one.
func (s *keySource) refresh(ctx context.Context) error {
	if s.url == "" {
		return nil
	}
	// The fetch is not the first asker's alone, so it does not end with his context; it ends by itself in RequestTimeout.
	done := s.fetchFlight.DoChan("", func() (any, error) { return nil, s.fetchOnce() })
	select {
	case <-ctx.Done():
		return fmt.Errorf("%w: waiting for the JWKS of kube cluster %q: %w", identity.ErrUnavailable, s.cluster, ctx.Err())
	case r := <-done:
		return r.Err
	}
}

func (s *keySource) fetchOnce() error {
	s.mu.Lock()
	now := s.cfg.Now()
	if since := now.Sub(s.tried); !s.tried.IsZero() && since >= 0 && since < s.cfg.FetchInterval {
		defer s.mu.Unlock()
		return s.fault
	}
	s.tried = now
	s.mu.Unlock()

	ctx, cancel := context.WithTimeout(context.Background(), s.cfg.RequestTimeout)
	defer cancel()
	keys, err := s.fetch(ctx)
	if err != nil {
		err = fmt.Errorf("%w: fetching JWKS of kube cluster %q: %v", identity.ErrUnavailable, s.cluster, err)
		s.cfg.Log.Warn("cannot fetch the keys of a kube cluster; those known stay in use", "cluster", s.cluster, "error", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fault = err
	if err == nil {
		// Keys that are no longer published are no longer trusted. When nothing can be fetched the old ones stay for as
		// long as that lasts: pods must be able to renew while the API server is down.
		if !reflect.DeepEqual(s.keys, keys) {
			s.use(keys)
		}
	}
	return err
}

func (s *keySource) fetch(ctx context.Context) (keySet, error) {
	client, from := s.http, s.url
	if s.api != nil {
		if c, err := s.api.client(); err == nil {
			if via, ok := c.serves(s.url); ok {
				client, from = c.http, via
			}
		}
	}
	shown := identity.RedactURL(from)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, from, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", "application/jwk-set+json, application/json")
	req.Header.Set("User-Agent", userAgent)
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	switch {
	case resp.StatusCode >= 300 && resp.StatusCode < 400:
		return nil, fmt.Errorf("%s redirects (%d), which is not followed: give the final URL", shown, resp.StatusCode)
	case resp.StatusCode == http.StatusUnauthorized || resp.StatusCode == http.StatusForbidden:
		return nil, fmt.Errorf("%s answers %d: give the cluster a kubeconfig of this API server whose user has ClusterRole system:service-account-issuer-discovery, or hold the JWKS offline", shown, resp.StatusCode)
	case resp.StatusCode != http.StatusOK:
		return nil, fmt.Errorf("%s answers %d, not 200", shown, resp.StatusCode)
	}
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxJWKSBytes+1))
	if err == nil {
		err = ctx.Err() // a server that sees us leave may end its answer in good order, and short
	}
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", shown, err)
	}
	keys, err := parseJWKS(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", shown, err)
	}
	return keys, nil
}

// run fetches at once, so that the first pod need not wait, and then every RefreshInterval.
func (s *keySource) run(ctx context.Context) {
	t := time.NewTicker(s.cfg.RefreshInterval)
	defer t.Stop()
	for {
		_ = s.refresh(ctx) // logged, and kept for status, where it happens
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
	}
}

// parseJWKS reads a JWK Set (RFC 7517 section 5). Keys of a kind that it does not know are passed over, as the RFC
// wants; private and symmetric ones make the whole set suspect. No error repeats any of it.
func parseJWKS(b []byte) (keySet, error) {
	if len(b) > maxJWKSBytes {
		return nil, fmt.Errorf("the JWKS is larger than %d bytes", maxJWKSBytes)
	}
	var raw struct {
		Keys []json.RawMessage `json:"keys"`
	}
	if err := json.Unmarshal(b, &raw); err != nil {
		return nil, errors.New("it is not a JWKS (JSON with a list of keys)")
	}
	if len(raw.Keys) > maxJWKSKeys {
		return nil, fmt.Errorf("the JWKS has %d keys, at the most %d", len(raw.Keys), maxJWKSKeys)
	}
	keys := make(keySet)
	for i, r := range raw.Keys {
		var k jose.JSONWebKey
		if k.UnmarshalJSON(r) != nil {
			continue
		}
		if _, symmetric := k.Key.([]byte); symmetric || k.Valid() && !k.IsPublic() {
			return nil, fmt.Errorf("key %d of the JWKS is private or symmetric: publish public keys only, and replace that one", i+1)
		}
		if !k.Valid() || k.KeyID == "" || k.Use != "" && k.Use != "sig" || !usable(k.Key) {
			continue
		}
		keys[k.KeyID] = append(keys[k.KeyID], k)
	}
	if len(keys) == 0 {
		return nil, fmt.Errorf("none of the %d keys of the JWKS is usable: want RSA (%d bits or more) or ECDSA keys with a kid", len(raw.Keys), minRSABits)
	}
	return keys, nil
}

func usable(key any) bool {
	switch k := key.(type) {
	case *rsa.PublicKey:
		return k.N.BitLen() >= minRSABits && k.N.BitLen() <= maxRSABits && k.E >= 3 && k.E&1 == 1
	case *ecdsa.PublicKey:
		return true
	}
	return false
}

// signedBy reports whether one of the keys signed the token, with the algorithm that the key is published for.
func (t *token) signedBy(keys []jose.JSONWebKey) bool {
	for _, k := range keys {
		if k.Algorithm != "" && k.Algorithm != string(t.alg) {
			continue
		}
		if _, err := t.jws.Verify(k.Key); err == nil {
			return true
		}
	}
	return false
}
