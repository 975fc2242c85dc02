package identity

import (
	"bytes"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// However they are printed, in a log as well, alone or within something else.
func TestSecretsDoNotPrint(t *testing.T) {
	const secret = "a secret"
	id := spiffeid.RequireFromString("spiffe://example.org/web")
	x := X509SVID{ID: id, Key: []byte(secret)}
	for name, v := range map[string]any{
		"evidence": Evidence{Token: []byte(secret)}, "X.509-SVID": x, "JWT-SVID": JWTSVID{ID: id, Token: secret},
		"update": Update{SVIDs: []X509SVID{x}}, "pointers": []*X509SVID{&x}, "in a struct": struct{ E Evidence }{Evidence{Token: []byte(secret)}},
	} {
		var log bytes.Buffer
		slog.New(slog.NewTextHandler(&log, nil)).Info("x", "v", v)
		out := fmt.Sprintf("%v %+v %#v %s %s", v, v, v, v, log.String())
		for _, bad := range []string{secret, fmt.Sprint([]byte(secret)), strings.Trim(fmt.Sprintf("%#v", []byte(secret)), "[]byte{}")} {
			if strings.Contains(out, bad) {
				t.Errorf("%s: %s", name, out)
			}
		}
	}
}

func TestRedactURL(t *testing.T) {
	for in, want := range map[string]string{
		"":                                      "",
		"https://host/keys":                     "https://host/keys",
		"http://user:geheim@host:1/keys":        "http://host:1/keys",
		"http://user:ge@geheim@host":            "http://host",
		"http://user:geheim?x@host":             "http://...",
		"https://host/keys?token=geheim":        "https://host/keys",
		"https://host/keys?token=geheim@geheim": "https://...",
		"https://host/keys#geheim":              "https://host/keys",
		"user:geheim@host":                      "host",
		"/etc/kubeconfig":                       "/etc/kubeconfig",
	} {
		if got := RedactURL(in); got != want {
			t.Errorf("%q is shown as %q, want %q", in, got, want)
		}
	}
	td := spiffeid.RequireTrustDomainFromString("example.org")
	err := CheckKubeCluster(td, &KubeCluster{Name: "c1", Issuer: "i", Audience: "a", JWKSURL: "http://user:geheim@host", Kubeconfig: "https://user:geheim@host"})
	if err == nil || strings.Contains(err.Error(), "geheim") || strings.Contains(err.Error(), "user") {
		t.Errorf("%v", err)
	}
}
