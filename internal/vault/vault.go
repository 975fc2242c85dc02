// Package vault is a small client of the HTTP API of Vault and OpenBao, as much as a seal and an upstream authority
// need: it logs in, keeps its token alive, and calls. The seal asks the transit engine, ca/upstream the PKI engine.
//
// What the server says is bounded and never trusted: an answer has a size and a time, a redirect is refused, and a
// token, a secret ID or a service account's token is in no error.
package vault

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"
)

// What a caller branches on.
var (
	// ErrInvalid: the configuration or the request is wrong, or the answer is not what the API promises.
	ErrInvalid = errors.New("invalid input")
	// ErrDenied: the server knows us, or does not, and says no.
	ErrDenied = errors.New("permission denied")
	// ErrNotFound: there is nothing at the path, such as an engine that is mounted elsewhere.
	ErrNotFound = errors.New("not found")
	// ErrUnavailable: the server cannot be reached, is sealed, or is too busy; trying again is right.
	ErrUnavailable = errors.New("unavailable")
)

const (
	maxAnswer      = 1 << 20  // bytes; a chain of certificates is some KiB
	maxSecret      = 16 << 10 // bytes of a file with a token or a secret ID
	defaultTimeout = 20 * time.Second
	maxMessage     = 500 // bytes of what the server says that go into an error
)

// Config is how to reach a server, and as whom: exactly one of TokenFile, AppRole, Kubernetes.
type Config struct {
	Address    string // https://host:port
	CAFile     string // PEM; empty: the system's roots
	Namespace  string
	TokenFile  string // a token, which is renewed; nobody else may read the file
	AppRole    *AppRole
	Kubernetes *Kubernetes

	Timeout time.Duration    // of one call; 0: 20 s
	Now     func() time.Time // nil: time.Now
}

// AppRole logs in by AppRole. An empty Mount is "approle".
type AppRole struct {
	Mount        string
	RoleID       string
	SecretIDFile string // nobody else may read it
}

// Kubernetes logs in by this pod's service account token. An empty Mount is "kubernetes".
type Kubernetes struct {
	Mount     string
	Role      string
	TokenPath string
}

// Client calls one server. It is safe for concurrent use.
type Client struct {
	cfg  Config
	base *url.URL
	http *http.Client

	turn  chan struct{} // held, by its one element, while session changes
	token session       // guarded by turn
}

// New checks the configuration, reads CAFile, and starts nothing: it logs in at the first call. Errors wrap ErrInvalid.
func New(cfg Config) (*Client, error) {
	base, err := cfg.check()
	if err != nil {
		return nil, fmt.Errorf("making the Vault client: %w", err)
	}
	if cfg.Timeout == 0 {
		cfg.Timeout = defaultTimeout
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	tlsConf := &tls.Config{MinVersion: tls.VersionTLS12}
	if cfg.CAFile != "" {
		if tlsConf.RootCAs, err = loadRoots(cfg.CAFile); err != nil {
			return nil, fmt.Errorf("making the Vault client: %w", err)
		}
	}
	c := &Client{cfg: cfg, base: base, turn: make(chan struct{}, 1)}
	c.http = &http.Client{
		Timeout: cfg.Timeout,
		// A redirect would carry the token to whoever the answer names.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Transport: &http.Transport{
			TLSClientConfig: tlsConf, ForceAttemptHTTP2: true, MaxIdleConns: 4, IdleConnTimeout: time.Minute,
			DialContext:         (&net.Dialer{Timeout: 10 * time.Second}).DialContext,
			TLSHandshakeTimeout: 10 * time.Second, MaxResponseHeaderBytes: 64 << 10,
		},
	}
	return c, nil
}

func (c *Config) check() (*url.URL, error) {
	var errs []error
	fault := func(format string, args ...any) {
		errs = append(errs, fmt.Errorf("%w: "+format, append([]any{ErrInvalid}, args...)...))
	}
	base, err := url.Parse(c.Address)
	if err != nil || base.Scheme != "https" || base.Host == "" || base.User != nil || base.RawQuery != "" || base.Fragment != "" || strings.Trim(base.Path, "/") != "" {
		// It is not repeated: it might hold a password.
		fault("the address must be https://host:port and no more")
	}
	ways := 0
	for _, set := range []bool{c.TokenFile != "", c.AppRole != nil, c.Kubernetes != nil} {
		if set {
			ways++
		}
	}
	if ways != 1 {
		fault("name exactly one way to log in, a token file, AppRole or Kubernetes (%d are set)", ways)
	}
	if a := c.AppRole; a != nil && (a.RoleID == "" || a.SecretIDFile == "") {
		fault("AppRole needs a role ID and a secret ID file")
	}
	if k := c.Kubernetes; k != nil && (k.Role == "" || k.TokenPath == "") {
		fault("Kubernetes needs a role and a token path")
	}
	return base, errors.Join(errs...)
}

func loadRoots(path string) (*x509.CertPool, error) {
	raw, err := readFile(path, maxAnswer)
	if err != nil {
		return nil, fmt.Errorf("%w: reading the CA file: %v", ErrInvalid, err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(raw) {
		return nil, fmt.Errorf("%w: CA file %s holds no PEM certificate", ErrInvalid, path)
	}
	return pool, nil
}

// String names the server, for people: never who logs in.
func (c *Client) String() string {
	if c.cfg.Namespace != "" {
		return c.base.Host + "/" + strings.Trim(c.cfg.Namespace, "/")
	}
	return c.base.Host
}

// Do calls path (such as "pki/cert/ca_chain", without /v1/) with in as JSON, unless it is nil, and decodes the
// answer's data into out, unless that is nil. It logs in first where there is no live token, and once more where the
// server does not know the token any longer. Errors wrap ErrInvalid, ErrDenied, ErrNotFound or ErrUnavailable.
func (c *Client) Do(ctx context.Context, method, path string, in, out any) error {
	token, err := c.login(ctx, "")
	if err == nil {
		err = c.call(ctx, method, path, token, in, &answer{Data: out})
		if errors.Is(err, ErrDenied) {
			var fresh string
			if fresh, err = c.login(ctx, token); err == nil {
				err = c.call(ctx, method, path, fresh, in, &answer{Data: out})
			}
		}
	}
	if err != nil {
		return fmt.Errorf("asking Vault at %s: %s %s: %w", c, method, path, err)
	}
	return nil
}

// answer is every answer of the API, as far as we read it.
type answer struct {
	Errors []string `json:"errors"`
	Auth   *auth    `json:"auth"`
	Data   any      `json:"data"`
}

// call makes one call. token may be empty: logging in needs none.
func (c *Client) call(ctx context.Context, method, path, token string, in any, out *answer) error {
	var body []byte
	if in != nil {
		var err error
		if body, err = json.Marshal(in); err != nil {
			return fmt.Errorf("%w: encoding the request: %v", ErrInvalid, err)
		}
		defer clear(body)
	}
	u := c.base.JoinPath("v1", path)
	if strings.Contains(path, "..") || strings.ContainsAny(path, "?#") {
		return fmt.Errorf("%w: path %q", ErrInvalid, path)
	}
	req, err := http.NewRequestWithContext(ctx, method, u.String(), bytes.NewReader(body))
	if err != nil {
		return fmt.Errorf("%w: making the request: %v", ErrInvalid, err)
	}
	req.Header.Set("X-Vault-Request", "true")
	if token != "" {
		req.Header.Set("X-Vault-Token", token)
	}
	if c.cfg.Namespace != "" {
		req.Header.Set("X-Vault-Namespace", c.cfg.Namespace)
	}
	if in != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return fmt.Errorf("%w: %s", ErrUnavailable, redact(unwrapURL(err).Error(), token))
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	defer clear(raw)
	if err != nil {
		return fmt.Errorf("%w: reading the answer: %s", ErrUnavailable, redact(err.Error(), token))
	}
	if len(raw) > maxAnswer {
		return fmt.Errorf("%w: an answer of more than %d bytes", ErrInvalid, maxAnswer)
	}
	if resp.StatusCode >= 300 {
		return statusError(resp.StatusCode, raw, token, secretsOf(in))
	}
	if resp.StatusCode == http.StatusNoContent || out.Data == nil && len(bytes.TrimSpace(raw)) == 0 {
		return nil
	}
	// The decoder's errors may quote the answer, which may hold a secret: they are not passed on.
	if err := json.Unmarshal(raw, out); err != nil {
		return fmt.Errorf("%w: the answer is not the JSON that the API promises: is this Vault?", ErrInvalid)
	}
	return nil
}

// unwrapURL drops the method and the URL, which the caller says in its own words.
func unwrapURL(err error) error {
	var u *url.Error
	if errors.As(err, &u) {
		return u.Err
	}
	return err
}

func statusError(code int, raw []byte, secrets ...any) error {
	var a answer
	said := ""
	if json.Unmarshal(raw, &a) == nil && len(a.Errors) > 0 {
		said = ": " + redact(strings.Join(a.Errors, "; "), secrets...)
	}
	kind, hint := ErrInvalid, ""
	switch {
	case code < 400:
		return fmt.Errorf("%w: it answers with a redirect (%d), which is not followed: name the address of the active server, or of a load balancer that finds it", ErrUnavailable, code)
	case code == http.StatusForbidden || code == http.StatusUnauthorized:
		kind = ErrDenied
	case code == http.StatusNotFound:
		kind = ErrNotFound
	case code == http.StatusServiceUnavailable:
		kind, hint = ErrUnavailable, " (is it sealed?)"
	case code >= 500 || code == http.StatusTooManyRequests || code == http.StatusPreconditionFailed:
		kind = ErrUnavailable
	}
	return fmt.Errorf("%w: status %d%s%s", kind, code, hint, said)
}

// redact takes what must not be told out of what the server said, and bounds it.
func redact(s string, secrets ...any) string {
	for _, x := range secrets {
		switch x := x.(type) {
		case string:
			if x != "" {
				s = strings.ReplaceAll(s, x, "[redacted]")
			}
		case []string:
			for _, y := range x {
				s = redact(s, y)
			}
		}
	}
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, s)
	if len(s) > maxMessage {
		s = strings.ToValidUTF8(s[:maxMessage], "") + "..."
	}
	return s
}

// secretsOf is what a login sends.
func secretsOf(in any) []string {
	if m, ok := in.(map[string]string); ok {
		return []string{m["secret_id"], m["jwt"], m["plaintext"]}
	}
	return nil
}

// readSecret reads a file with a secret. Who else may read or change it is refused, but for the group's reading, by
// which Kubernetes hands secrets to users other than root.
func readSecret(path string, private bool) (string, error) {
	if st, err := os.Stat(path); err == nil && private && st.Mode().Perm()&0o027 != 0 {
		return "", fmt.Errorf("%w: %s can be read or changed by others (mode %04o): chmod 0600", ErrInvalid, path, st.Mode().Perm())
	}
	raw, err := readFile(path, maxSecret)
	if err != nil {
		return "", fmt.Errorf("%w: %v", ErrUnavailable, err)
	}
	defer clear(raw)
	s := string(bytes.TrimSpace(raw))
	if s == "" || strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r >= 0x7f }) {
		return "", fmt.Errorf("%w: %s does not hold one token", ErrInvalid, path)
	}
	return s, nil
}

func readFile(path string, most int64) ([]byte, error) {
	st, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() { // before opening it: a FIFO would block
		return nil, fmt.Errorf("%s is not a regular file", path)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, most+1))
	if err == nil && int64(len(raw)) > most {
		clear(raw)
		err = fmt.Errorf("%s is larger than %d bytes", path, most)
	}
	return raw, err
}
