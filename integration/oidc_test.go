//go:build integration

package integration

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/cryptosigner"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"countersign.io/countersign/integration/cluster"
)

// webPKI writes a certificate of 127.0.0.1, its key and the CA above it: ca.pem, web.pem, web.key.
func webPKI(t *testing.T, dir string) {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	write := func(name, kind string, der []byte) {
		must(os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o644))
	}
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(err)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(err)
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "web CA"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	leaf := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "127.0.0.1"}, NotBefore: ca.NotBefore, NotAfter: ca.NotAfter, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, ca, ca, caKey.Public(), caKey)
	must(err)
	write("ca.pem", "CERTIFICATE", der)
	der, err = x509.CreateCertificate(rand.Reader, leaf, ca, key.Public(), caKey)
	must(err)
	write("web.pem", "CERTIFICATE", der)
	der, err = x509.MarshalPKCS8PrivateKey(key)
	must(err)
	write("web.key", "PRIVATE KEY", der)
}

// openidc is a member that serves what consumers read, and an agent.
type openidc struct {
	*world
	agent  *cluster.Agent
	issuer string
	dir    string // that of webPKI, which others may read
}

func newOpenIDC(t *testing.T, more string) *openidc {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "cs-oidc-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil { // Apache gives up root
		t.Fatal(err)
	}
	webPKI(t, dir)
	o := &openidc{dir: dir, issuer: "https://" + freeAddress(t)}
	o.world = newWorld(t, 1, fmt.Sprintf("public: {listen: %q, url: %q, tls: {cert_file: %q, key_file: %q}}\n%s",
		strings.TrimPrefix(o.issuer, "https://"), o.issuer, filepath.Join(dir, "web.pem"), filepath.Join(dir, "web.key"), more))
	o.agent = o.world.agent()
	o.createEntry(append(uidSelectors(), "--id", clientID, "--jwt-ttl", "10s")...)
	return o
}

// fetch gets a JWT-SVID from the Workload API.
func (o *openidc) fetch(audience ...string) *jwtsvid.SVID {
	o.t.Helper()
	svid, err := workloadapi.FetchJWTSVID(o.ctx, jwtsvid.Params{Audience: audience[0], ExtraAudiences: audience[1:]}, workloadapi.WithAddr(o.agent.Endpoint()))
	if err != nil {
		o.t.Fatal(err)
	}
	return svid
}

// forged are tokens like a good one that must be refused, by what is wrong with them.
func (o *openidc) forged(good string) map[string]string {
	o.t.Helper()
	parsed, err := jose.ParseSignedCompact(good, []jose.SignatureAlgorithm{jose.ES256})
	if err != nil {
		o.t.Fatal(err)
	}
	kid := parsed.Signatures[0].Header.KeyID
	var claims map[string]any
	if err := json.Unmarshal(parsed.UnsafePayloadWithoutVerification(), &claims); err != nil {
		o.t.Fatal(err)
	}
	foreign, _, err := cluster.NewKey()
	if err != nil {
		o.t.Fatal(err)
	}
	sign := func(key crypto.Signer, kid string) string {
		s, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: cryptosigner.Opaque(key), KeyID: kid}}, (&jose.SignerOptions{}).WithType("JWT"))
		if err != nil {
			o.t.Fatal(err)
		}
		payload, err := json.Marshal(claims)
		if err != nil {
			o.t.Fatal(err)
		}
		signed, err := s.Sign(payload)
		if err != nil {
			o.t.Fatal(err)
		}
		compact, err := signed.CompactSerialize()
		if err != nil {
			o.t.Fatal(err)
		}
		return compact
	}
	parts := strings.Split(good, ".")
	claims["sub"] = "spiffe://" + trustDomain + "/somebody/else"
	altered, err := json.Marshal(claims)
	if err != nil {
		o.t.Fatal(err)
	}
	none := base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"none","typ":"JWT"}`))
	return map[string]string{
		"another trust domain's key under our kid": sign(foreign, kid),
		"another trust domain's key":               sign(foreign, "elsewhere"),
		"an altered subject":                       parts[0] + "." + base64.RawURLEncoding.EncodeToString(altered) + "." + parts[2],
		"no signature":                             none + "." + parts[1] + ".",
		"ours, for somebody else":                  o.fetch("another").Marshal(),
	}
}

// TestOIDCDocuments: what is served, and how long it may be kept.
func TestOIDCDocuments(t *testing.T) {
	o := newOpenIDC(t, "oidc: {max_age: 7s}\nfederation: {refresh_hint: 1s}\n")
	raw, err := os.ReadFile(filepath.Join(o.dir, "ca.pem"))
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(raw)
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}}, Timeout: 30 * time.Second}
	get := func(path string, into any) http.Header {
		t.Helper()
		res, err := client.Get(o.issuer + path)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		if err := json.NewDecoder(res.Body).Decode(into); err != nil || res.StatusCode != http.StatusOK {
			t.Fatalf("%s: %d, %v", path, res.StatusCode, err)
		}
		return res.Header
	}
	var keys jose.JSONWebKeySet
	head := get("/keys", &keys)
	if len(keys.Keys) != 1 || keys.Keys[0].Use != "sig" || keys.Keys[0].Algorithm != "ES256" || !strings.Contains(head.Get("Cache-Control"), "max-age=7") {
		t.Fatalf("%+v %v", keys, head)
	}
	// A prepared key is there before it signs, and signs no sooner than those who kept the keys without it have to ask again.
	prepared := time.Now()
	o.admin("bundle", "prepare", "--kind", "jwt")
	o.eventually("the prepared key is published", func() error {
		if get("/keys", &keys); len(keys.Keys) != 2 {
			return fmt.Errorf("%d keys", len(keys.Keys))
		}
		return nil
	})
	o.eventually("it signs", func() error {
		_, err := o.Admin(o.ctx, "bundle", "activate", "--kind", "jwt")
		return err
	})
	if d := time.Since(prepared); d < 14*time.Second {
		t.Errorf("the new key signs after %v", d)
	}
}

// TestOIDCJose is a consumer in another language: jose, from the npm registry.
func TestOIDCJose(t *testing.T) {
	if _, err := os.Stat("testdata/node/node_modules/jose"); err != nil {
		t.Skipf("%v: make integration installs it", err)
	}
	o := newOpenIDC(t, "")
	ask := func(audience string, tokens ...string) []string {
		t.Helper()
		out, err := o.tool(strings.Join(tokens, "\n")+"\n", []string{"NODE_EXTRA_CA_CERTS=" + filepath.Join(o.dir, "ca.pem")}, "node", "testdata/node/oidc.js", o.issuer, audience)
		lines := strings.Split(out, "\n")
		if err != nil || len(lines) != len(tokens)+1 || lines[len(tokens)] != "done" {
			t.Fatalf("%v: %s", err, out)
		}
		return lines[:len(tokens)]
	}
	var good *jwtsvid.SVID
	o.eventually("a JWT-SVID is accepted", func() error {
		good = o.fetch("api", "cache")
		if got := ask("api", good.Marshal()); got[0] != "ok "+clientID {
			return fmt.Errorf("%s", got[0])
		}
		return nil
	})
	forged := o.forged(good.Marshal())
	for what, token := range forged {
		if got := ask("api", token); !strings.HasPrefix(got[0], "refused ERR_J") {
			t.Errorf("%s: %s", what, got[0])
		}
	}
	o.eventually("it expires", func() error {
		if got := ask("api", good.Marshal()); got[0] != "refused ERR_JWT_EXPIRED" {
			return fmt.Errorf("%s", got[0])
		}
		return nil
	})
}

// TestOIDCApache is Apache with mod_auth_openidc, as a server whose callers show JWT-SVIDs.
func TestOIDCApache(t *testing.T) {
	const module = "/usr/lib/apache2/modules/mod_auth_openidc.so"
	if _, err := os.Stat(module); err != nil {
		t.Skipf("%v: make integration installs it", err)
	}
	o := newOpenIDC(t, "")
	addr := freeAddress(t)
	conf := filepath.Join(o.dir, "apache.conf")
	if err := os.WriteFile(conf, fmt.Appendf(nil, apacheConf, o.dir, addr, o.issuer, o.issuer), 0o644); err != nil {
		t.Fatal(err)
	}
	log, err := os.Create(filepath.Join(o.dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command("apache2", "-X", "-f", conf)
	cmd.Stdout, cmd.Stderr, cmd.SysProcAttr = log, log, &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if raw, err := os.ReadFile(log.Name()); err == nil && t.Failed() {
			t.Logf("%s", raw)
		}
	})
	ask := func(token string) (int, string, error) {
		req, err := http.NewRequestWithContext(o.ctx, http.MethodGet, "http://"+addr+"/", nil)
		if err != nil {
			return 0, "", err
		}
		if token != "" {
			req.Header.Set("Authorization", "Bearer "+token)
		}
		res, err := (&http.Client{Timeout: 30 * time.Second}).Do(req)
		if err != nil {
			return 0, "", err
		}
		defer res.Body.Close()
		_, _ = io.Copy(io.Discard, res.Body)
		return res.StatusCode, res.Header.Get("X-Caller"), nil
	}
	var good *jwtsvid.SVID
	o.eventually("a JWT-SVID is accepted", func() error {
		good = o.fetch("api", "cache")
		code, caller, err := ask(good.Marshal())
		if err == nil && (code != http.StatusOK || caller != clientID) {
			err = fmt.Errorf("%d %q", code, caller)
		}
		return err
	})
	forged := o.forged(good.Marshal())
	forged["no token"] = ""
	for what, token := range forged {
		if code, _, err := ask(token); err != nil || code != http.StatusUnauthorized {
			t.Errorf("%s: %d, %v", what, code, err)
		}
	}
	o.eventually("it expires", func() error {
		code, _, err := ask(good.Marshal())
		if err == nil && code != http.StatusUnauthorized {
			err = fmt.Errorf("%d", code)
		}
		return err
	})
}

// apacheConf is docs/OIDC.md's, with what stands around it.
const apacheConf = `Define dir %s
ServerName localhost
Listen %s
PidFile ${dir}/pid
DefaultRuntimeDir ${dir}
Mutex pthread
ErrorLog /dev/stderr
LogLevel warn
User www-data
Group www-data
LoadModule mpm_prefork_module /usr/lib/apache2/modules/mod_mpm_prefork.so
LoadModule authn_core_module /usr/lib/apache2/modules/mod_authn_core.so
LoadModule authz_core_module /usr/lib/apache2/modules/mod_authz_core.so
LoadModule authz_user_module /usr/lib/apache2/modules/mod_authz_user.so
LoadModule headers_module /usr/lib/apache2/modules/mod_headers.so
LoadModule status_module /usr/lib/apache2/modules/mod_status.so
LoadModule auth_openidc_module /usr/lib/apache2/modules/mod_auth_openidc.so

OIDCOAuthServerMetadataURL %s/.well-known/openid-configuration
OIDCOAuthSSLValidateServer On
OIDCCABundlePath ${dir}/ca.pem
OIDCOAuthTokenExpiryClaim exp absolute mandatory
OIDCOAuthRemoteUserClaim sub
<Location />
  SetHandler server-status
  AuthType oauth20
  <RequireAll>
    Require claim iss:%s
    Require claim aud:api
  </RequireAll>
  Header set X-Caller expr=%%{REMOTE_USER}
</Location>
`
