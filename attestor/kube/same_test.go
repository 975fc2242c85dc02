package kube

import (
	"errors"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"countersign.io/countersign/identity"
)

// TestCheckSame: a registration is taken for another cluster's where the issuer, or the keys, say so; and nobody is let through where the
// API server does not tell.
func TestCheckSame(t *testing.T) {
	here, other, twin := newIssuer(t, "here", time.Now), newIssuer(t, "other", time.Now), newIssuer(t, "here", time.Now)
	f := newFakeAPI(t)
	served := string(jwksOf(t, here, other))
	f.jwks = func(w http.ResponseWriter, r *http.Request) {
		if !f.allowed(w, r, "keys") {
			return
		}
		if !strings.Contains(r.Header.Get("Accept"), "application/jwk-set+json") { // it has this alone
			w.WriteHeader(http.StatusNotAcceptable)
			return
		}
		w.Header().Set("Content-Type", "application/jwk-set+json")
		_, _ = w.Write([]byte(served))
	}
	config := f.kubeconfig(t)
	check := func(what string, k identity.KubeCluster, want error, says string) {
		t.Helper()
		err := CheckSame(t.Context(), config, k)
		if !errors.Is(err, want) || err != nil && !strings.Contains(err.Error(), says) || err != nil && strings.Contains(err.Error(), f.token) {
			t.Errorf("%s: %v; want %v that says %q", what, err, want, says)
		}
	}
	by := func(issuer string, keys []byte) identity.KubeCluster {
		return identity.KubeCluster{Name: "edge", Issuer: issuer, JWKS: keys}
	}
	check("without keys", by(testIssuer, nil), nil, "")
	check("by its keys", by(testIssuer, jwksOf(t, here)), nil, "")
	check("by one of them, of several", by(testIssuer, jwksOf(t, newIssuer(t, "old", time.Now), other)), nil, "")
	check("another issuer", by("https://elsewhere", jwksOf(t, here)), identity.ErrPrecondition, "another cluster's")
	check("other keys", by(testIssuer, jwksOf(t, newIssuer(t, "new", time.Now))), identity.ErrPrecondition, "other keys")
	check("another key of the same name", by(testIssuer, jwksOf(t, twin)), identity.ErrPrecondition, "other keys")
	check("a registration that is garbage", by(testIssuer, []byte("{")), identity.ErrPrecondition, "keys")
	served = "garbage"
	check("an API server that serves garbage", by(testIssuer, jwksOf(t, here)), identity.ErrUnavailable, "JSON")
	f.setRefuse("keys", http.StatusForbidden)
	check("no right to its keys", by(testIssuer, jwksOf(t, here)), identity.ErrDenied, "system:service-account-issuer-discovery")
	f.setRefuse("discovery", http.StatusForbidden)
	check("no right to its issuer", by(testIssuer, nil), identity.ErrDenied, "/.well-known/openid-configuration")
	f.setRefuse("discovery", http.StatusInternalServerError)
	check("a broken one", by(testIssuer, nil), identity.ErrUnavailable, "to know it by")
	config = filepath.Join(t.TempDir(), "none")
	check("no kubeconfig", by(testIssuer, nil), identity.ErrInvalid, "none")
}
