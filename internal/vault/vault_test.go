package vault

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// fake answers as the documented API does, as far as a test needs it.
type fake struct {
	*httptest.Server
	mu      sync.Mutex
	now     time.Time
	tokens  map[string]time.Duration // live ones and their lives
	calls   []string
	handle  func(w http.ResponseWriter, r *http.Request) bool // before anything else; true: it answered
	logins  int
	renewed int
	life    time.Duration
}

func newFake(t *testing.T) *fake {
	f := &fake{now: time.Date(2026, 7, 1, 12, 0, 0, 0, time.UTC), tokens: map[string]time.Duration{"s.root": 0}, life: time.Hour}
	f.Server = httptest.NewTLSServer(f)
	t.Cleanup(f.Close)
	return f
}

func (f *fake) time() time.Time {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.now
}

func (f *fake) add(d time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.now = f.now.Add(d)
}

func (f *fake) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = append(f.calls, r.Method+" "+r.URL.Path)
	if f.handle != nil && f.handle(w, r) {
		return
	}
	refuse := func(code int, why string) {
		w.WriteHeader(code)
		_ = json.NewEncoder(w).Encode(map[string]any{"errors": []string{why}})
	}
	grant := func(token string) {
		_ = json.NewEncoder(w).Encode(map[string]any{"auth": map[string]any{"client_token": token, "lease_duration": int(f.life / time.Second), "renewable": true}})
	}
	if strings.HasSuffix(r.URL.Path, "/login") {
		var in map[string]string
		_ = json.NewDecoder(r.Body).Decode(&in)
		if in["role_id"] == "r" && in["secret_id"] == "sid-1" || in["role"] == "cs" && in["jwt"] == "jwt-1" {
			f.logins++
			token := fmt.Sprintf("s.login%d", f.logins)
			f.tokens[token] = f.life
			grant(token)
			return
		}
		refuse(400, "invalid secret id "+in["secret_id"]+in["jwt"])
		return
	}
	token := r.Header.Get("X-Vault-Token")
	life, ok := f.tokens[token]
	switch {
	case !ok:
		refuse(403, "permission denied for "+token)
	case r.URL.Path == "/v1/auth/token/lookup-self":
		_ = json.NewEncoder(w).Encode(map[string]any{"data": map[string]any{"ttl": int(life / time.Second), "renewable": life > 0}})
	case r.URL.Path == "/v1/auth/token/renew-self":
		f.renewed++
		grant(token)
	case r.URL.Path == "/v1/echo":
		_ = json.NewEncoder(w).Encode(map[string]any{"data": map[string]any{"namespace": r.Header.Get("X-Vault-Namespace")}})
	default:
		refuse(404, "no handler for route")
	}
}

func write(t *testing.T, name, text string, mode os.FileMode) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
	return path
}

func (f *fake) config(t *testing.T) Config {
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: f.Certificate().Raw})
	return Config{Address: f.URL, CAFile: write(t, "ca.pem", string(ca), 0o644), Now: f.time, TokenFile: write(t, "token", "s.root\n", 0o600)}
}

func (f *fake) client(t *testing.T, change ...func(*Config)) *Client {
	t.Helper()
	cfg := f.config(t)
	for _, c := range change {
		c(&cfg)
	}
	c, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func echo(c *Client) error {
	return c.Do(context.Background(), http.MethodGet, "echo", nil, nil)
}

func mustEcho(t *testing.T, c *Client) {
	t.Helper()
	if err := echo(c); err != nil {
		t.Fatal(err)
	}
}

func wantErr(t *testing.T, err, kind error, secrets ...string) {
	t.Helper()
	if !errors.Is(err, kind) {
		t.Fatalf("got %v; want one that wraps %q", err, kind)
	}
	for _, s := range append(secrets, "s.root", "s.login", "sid-", "jwt-") {
		if strings.Contains(err.Error(), s) {
			t.Errorf("the error tells %q: %v", s, err)
		}
	}
}

func TestTokenFile(t *testing.T) {
	f := newFake(t)
	c := f.client(t, func(c *Config) { c.Namespace = "team/a" })
	var out struct{ Namespace string }
	if err := c.Do(context.Background(), http.MethodGet, "echo", nil, &out); err != nil || out.Namespace != "team/a" {
		t.Fatalf("%+v, %v", out, err)
	}
	if !strings.HasSuffix(c.String(), "/team/a") {
		t.Errorf("it is called %s", c)
	}
	err := c.Do(context.Background(), http.MethodPost, "nowhere", map[string]string{"a": "b"}, nil)
	wantErr(t, err, ErrNotFound)
	if !strings.Contains(err.Error(), "POST nowhere") || !strings.Contains(err.Error(), "no handler for route") {
		t.Errorf("it does not say what failed: %v", err)
	}
}

func approle(t *testing.T, secret string) func(*Config) {
	return func(c *Config) {
		c.TokenFile, c.AppRole = "", &AppRole{RoleID: "r", SecretIDFile: write(t, "secret", secret, 0o600)}
	}
}

func TestAppRole(t *testing.T) {
	f := newFake(t)
	mustEcho(t, f.client(t, approle(t, "sid-1")))
	if f.calls[0] != "POST /v1/auth/approle/login" {
		t.Errorf("called %v", f.calls)
	}
	wantErr(t, echo(f.client(t, approle(t, "sid-wrong"))), ErrInvalid)
}

func TestKubernetes(t *testing.T) {
	f := newFake(t)
	login := func(mount, jwt string) *Client {
		return f.client(t, func(c *Config) {
			c.TokenFile, c.Kubernetes = "", &Kubernetes{Mount: mount, Role: "cs", TokenPath: write(t, "jwt", jwt, 0o644)}
		})
	}
	mustEcho(t, login("k8s/prod", "jwt-1"))
	if f.calls[0] != "POST /v1/auth/k8s/prod/login" {
		t.Errorf("called %v", f.calls)
	}
	wantErr(t, echo(login("", "jwt-wrong")), ErrInvalid)
}

func TestTokenIsRenewedAtHalfItsLife(t *testing.T) {
	f := newFake(t)
	c := f.client(t, approle(t, "sid-1"))
	mustEcho(t, c)
	f.add(29 * time.Minute)
	mustEcho(t, c)
	if f.renewed != 0 {
		t.Fatal("renewed too early")
	}
	f.add(2 * time.Minute)
	mustEcho(t, c)
	mustEcho(t, c)
	if f.renewed != 1 || f.logins != 1 {
		t.Fatalf("renewed %d times, logged in %d times", f.renewed, f.logins)
	}
	// Run does the same where nobody calls.
	f.add(31 * time.Minute)
	if wait := c.look(context.Background()); wait < minLook || wait > maxLook || f.renewed != 2 {
		t.Fatalf("renewed %d times, looks again in %v", f.renewed, wait)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := c.Run(ctx); err != nil {
		t.Fatal(err)
	}
}

func TestTokenThatCannotBeRenewedAnyLonger(t *testing.T) {
	f := newFake(t)
	c := f.client(t, approle(t, "sid-1"))
	mustEcho(t, c)
	// The server is away at half-life: the token serves on.
	f.add(31 * time.Minute)
	f.handle = func(w http.ResponseWriter, r *http.Request) bool {
		if strings.HasSuffix(r.URL.Path, "/renew-self") {
			w.WriteHeader(503)
			return true
		}
		return false
	}
	mustEcho(t, c)
	// It has ended: log in anew.
	f.add(time.Hour)
	mustEcho(t, c)
	if f.logins != 2 {
		t.Fatalf("logged in %d times", f.logins)
	}
	// At the end of its greatest life the server renews it for what is left only: log in at half of that.
	f.handle = nil
	f.add(31 * time.Minute)
	f.life = 29 * time.Minute
	mustEcho(t, c)
	f.add(15 * time.Minute)
	f.life = time.Hour
	mustEcho(t, c)
	if f.logins != 3 {
		t.Fatalf("logged in %d times", f.logins)
	}
}

func TestDeniedLogsInOnceMore(t *testing.T) {
	f := newFake(t)
	c := f.client(t, approle(t, "sid-1"))
	mustEcho(t, c)
	f.mu.Lock()
	delete(f.tokens, "s.login1") // revoked
	f.mu.Unlock()
	mustEcho(t, c)
	if f.logins != 2 {
		t.Fatalf("logged in %d times", f.logins)
	}
	f.handle = func(w http.ResponseWriter, r *http.Request) bool {
		if r.URL.Path != "/v1/echo" {
			return false
		}
		w.WriteHeader(403)
		fmt.Fprintf(w, `{"errors":["no: %s"]}`, r.Header.Get("X-Vault-Token"))
		return true
	}
	f.calls = nil
	wantErr(t, echo(c), ErrDenied)
	if len(f.calls) != 3 {
		t.Errorf("it should ask, log in and ask once more: %v", f.calls)
	}
	// A token from a file that was replaced.
	c = f.client(t)
	f.handle = nil
	mustEcho(t, c)
	f.mu.Lock()
	delete(f.tokens, "s.root")
	f.tokens["s.other"] = 0
	f.mu.Unlock()
	wantErr(t, echo(c), ErrDenied)
	if err := os.WriteFile(c.cfg.TokenFile, []byte("s.other"), 0o600); err != nil {
		t.Fatal(err)
	}
	mustEcho(t, c)
}

func TestHostileAnswers(t *testing.T) {
	for name, row := range map[string]struct {
		handle func(w http.ResponseWriter, r *http.Request)
		kind   error
	}{
		"garbage":     {func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "<html>"+r.Header.Get("X-Vault-Token")) }, ErrInvalid},
		"wrong types": {func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, `{"data":["s.root"]}`) }, ErrInvalid},
		"100 MiB": {func(w http.ResponseWriter, _ *http.Request) {
			chunk := strings.Repeat("a", 1<<20)
			for range 100 {
				if _, err := io.WriteString(w, chunk); err != nil {
					return
				}
			}
		}, ErrInvalid},
		"redirect": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "/v1/elsewhere", http.StatusTemporaryRedirect)
		}, ErrUnavailable},
		"sealed": {func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(503)
			fmt.Fprint(w, `{"errors":["Vault is sealed"]}`)
		}, ErrUnavailable},
		"busy":     {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(429) }, ErrUnavailable},
		"hangs up": {func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, ErrUnavailable},
		"tells": {func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(400)
			_ = json.NewEncoder(w).Encode(map[string]any{"errors": []string{"a\x1b[31m" + r.Header.Get("X-Vault-Token") + strings.Repeat("x", 10000)}})
		}, ErrInvalid},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFake(t)
			c := f.client(t)
			mustEcho(t, c)
			f.handle = func(w http.ResponseWriter, r *http.Request) bool { row.handle(w, r); return true }
			var out struct{ A string }
			err := c.Do(context.Background(), http.MethodGet, "echo", nil, &out)
			wantErr(t, err, row.kind, "\x1b")
			if len(err.Error()) > 2*maxMessage {
				t.Errorf("an error of %d bytes", len(err.Error()))
			}
			for _, call := range f.calls {
				if strings.Contains(call, "elsewhere") {
					t.Error("it followed the redirect")
				}
			}
		})
	}
}

func TestSlowAnswer(t *testing.T) {
	f := newFake(t)
	c := f.client(t, func(c *Config) { c.Timeout = 200 * time.Millisecond })
	mustEcho(t, c)
	release := make(chan struct{})
	t.Cleanup(func() { close(release) })
	slow := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(200)
		w.(http.Flusher).Flush()
		<-release
	}))
	t.Cleanup(slow.CloseClientConnections)
	c.base.Host = slow.Listener.Addr().String()
	c.http.Transport.(*http.Transport).TLSClientConfig.RootCAs.AddCert(slow.Certificate())
	wantErr(t, echo(c), ErrUnavailable)
	// A caller that gives up does not wait for another's login.
	c.turn <- struct{}{}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	wantErr(t, c.Do(ctx, http.MethodGet, "echo", nil, nil), ErrUnavailable)
}

func TestOnlyTheNamedCAIsTrusted(t *testing.T) {
	f := newFake(t)
	mustEcho(t, f.client(t))
	wantErr(t, echo(f.client(t, func(c *Config) { c.CAFile = "" })), ErrUnavailable)
}

func TestNewRefuses(t *testing.T) {
	f := newFake(t)
	for name, change := range map[string]func(*Config){
		"http":          func(c *Config) { c.Address = "http://127.0.0.1:8200" },
		"password":      func(c *Config) { c.Address = "https://me:sid-1@127.0.0.1:8200" },
		"path":          func(c *Config) { c.Address = "https://127.0.0.1:8200/v1" },
		"no way":        func(c *Config) { c.TokenFile = "" },
		"two ways":      func(c *Config) { c.AppRole = &AppRole{RoleID: "r", SecretIDFile: "/x"} },
		"half approle":  func(c *Config) { c.TokenFile, c.AppRole = "", &AppRole{RoleID: "r"} },
		"half kube":     func(c *Config) { c.TokenFile, c.Kubernetes = "", &Kubernetes{Role: "r"} },
		"no CA file":    func(c *Config) { c.CAFile += "x" },
		"empty CA file": func(c *Config) { c.CAFile = write(t, "ca", "", 0o600) },
	} {
		cfg := f.config(t)
		change(&cfg)
		_, err := New(cfg)
		if err == nil {
			t.Errorf("%s: accepted", name)
			continue
		}
		wantErr(t, err, ErrInvalid)
	}
}

func TestBadSecretFiles(t *testing.T) {
	f := newFake(t)
	dir := t.TempDir()
	for name, row := range map[string]struct {
		path string
		kind error
	}{
		"absent":    {filepath.Join(dir, "none"), ErrUnavailable},
		"others":    {write(t, "token", "s.root", 0o644), ErrInvalid},
		"empty":     {write(t, "token", "\n", 0o600), ErrInvalid},
		"two lines": {write(t, "token", "s.root\ns.root", 0o600), ErrInvalid},
		"large":     {write(t, "token", strings.Repeat("s", maxSecret+1), 0o600), ErrUnavailable},
		"folder":    {dir, ErrInvalid},
	} {
		t.Run(name, func(t *testing.T) {
			wantErr(t, echo(f.client(t, func(c *Config) { c.TokenFile = row.path })), row.kind)
		})
	}
}

func TestPathsStayBelowTheAPI(t *testing.T) {
	c := newFake(t).client(t)
	for _, path := range []string{"../sys/seal", "pki/x?y", "pki#"} {
		wantErr(t, c.Do(context.Background(), http.MethodGet, path, nil, nil), ErrInvalid)
	}
}
