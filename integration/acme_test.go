//go:build integration

package integration

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"countersign.io/countersign/federation"
	"countersign.io/countersign/identity"
	"countersign.io/countersign/integration/cluster"
)

const acmeHost = "bundle.acme.test"

// startPebble starts an ACME CA that looks for challenges at the ports; it returns its address and its folder.
func startPebble(t *testing.T, tlsPort, httpPort string) (address, dir string, proc *cluster.Process) {
	t.Helper()
	program, err := filepath.Abs("pebble/bin/pebbled")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(program); err != nil {
		t.Fatalf("Pebble is not built: make integration does it: %v", err)
	}
	dir = t.TempDir()
	c := &cluster.Cluster{Dir: dir}
	t.Cleanup(c.Close)
	r, w := io.Pipe()
	proc, err = c.Start("pebbled", []string{"PEBBLE_VA_NOSLEEP=1"}, w, program, "-dir", dir, "-tls-port", tlsPort, "-http-port", httpPort, "-validity", "30s")
	if err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(r)
	found := make(chan string, 1)
	go func() { // to its end, or the process would stand still
		for lines.Scan() {
			if strings.HasPrefix(lines.Text(), "127.0.0.1:") {
				found <- lines.Text()
			}
		}
	}()
	select {
	case address = <-found:
	case <-time.After(time.Minute):
		t.Fatal("Pebble does not start")
	}
	return address, dir, proc
}

// TestACME: a member gets its web certificate from an ACME CA, by each kind of challenge, renews it, and keeps it over a restart;
// a partner reads the bundle by https_web.
func TestACME(t *testing.T) {
	for _, challenge := range []string{"tls-alpn-01", "http-01"} {
		t.Run(challenge, func(t *testing.T) { testACME(t, challenge == "http-01") })
	}
}

func testACME(t *testing.T, byHTTP bool) {
	public, plain, nowhere := freeAddress(t), freeAddress(t), freeAddress(t)
	port := func(a string) string { _, p, _ := net.SplitHostPort(a); return p }
	tlsPort, more := port(public), ""
	if byHTTP {
		tlsPort, more = port(nowhere), ", http_listen: '"+plain+"'"
	}
	address, dir, pebble := startPebble(t, tlsPort, port(plain))
	w := newWorld(t, 1, fmt.Sprintf("public: {listen: '%s', url: 'https://%s:%s', tls: {acme: {directory: 'https://%s/dir', email: ops@acme.test, ca_file: %s%s}}}\n",
		public, acmeHost, port(public), address, filepath.Join(dir, "ca.pem"), more))
	root, err := os.ReadFile(filepath.Join(dir, "root.pem"))
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(root) {
		t.Fatal("no root")
	}
	leaf := func() (*x509.Certificate, error) {
		d := tls.Dialer{Config: &tls.Config{ServerName: acmeHost, RootCAs: roots}}
		ctx, cancel := context.WithTimeout(w.ctx, 20*time.Second)
		defer cancel()
		c, err := d.DialContext(ctx, "tcp", public)
		if err != nil {
			return nil, err
		}
		defer c.Close()
		return c.(*tls.Conn).ConnectionState().PeerCertificates[0], nil
	}
	var first *x509.Certificate
	w.eventually("the certificate is there", func() (err error) { first, err = leaf(); return err })

	// A partner that resolves the name, and knows the CA, reads the bundle.
	client := federation.NewClient(federation.ClientConfig{WebRoots: roots, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, public)
	}})
	var invite struct {
		TrustDomain string `json:"trust_domain"`
		URL         string
		Profile     string
		EndpointID  string `json:"endpoint_id"`
	}
	parseJSON(t, w.admin("federation", "invite", "-o", "json"), &invite)
	if invite.Profile != identity.ProfileWeb || invite.EndpointID != "" {
		t.Errorf("the invite says %+v", invite)
	}
	b, err := client.Fetch(w.ctx, identity.Federation{TrustDomain: trustDomain, URL: invite.URL, Profile: invite.Profile})
	if err != nil || b.Sequence == 0 || len(b.X509) != 1 || b.RefreshHint != identity.DefaultRefreshHint {
		t.Errorf("%+v, %v", b, err)
	}
	if _, err := client.Fetch(w.ctx, identity.Federation{TrustDomain: trustDomain, URL: strings.Replace(invite.URL, acmeHost, "other.acme.test", 1), Profile: invite.Profile}); !errors.Is(err, identity.ErrUnauthenticated) {
		t.Errorf("under another name: %v", err)
	}

	// It is renewed in time, and no handshake fails meanwhile.
	w.eventually("the certificate is renewed", func() error {
		now, err := leaf()
		if err != nil {
			t.Errorf("a handshake: %v", err)
		} else if !bytes.Equal(now.Raw, first.Raw) {
			first = now
			return nil
		}
		return errors.New("it is the same")
	})
	// The account and the certificates are the member's own.
	files, err := filepath.Glob(filepath.Join(w.Members[0].Dir, "data", "acme", "*"))
	if err != nil || len(files) < 2 {
		t.Errorf("%q, %v", files, err)
	}
	for _, f := range files {
		if info, err := os.Stat(f); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", f, info.Mode(), err)
		}
	}
	// A restart needs no CA.
	pebble.Kill()
	w.Members[0].Kill()
	if err := w.RestartMember(w.ctx, w.Members[0]); err != nil {
		t.Fatal(err)
	}
	now, err := leaf()
	if err != nil || !bytes.Equal(now.Raw, first.Raw) && now.NotBefore.Before(first.NotBefore) {
		t.Errorf("after a restart: %v", err)
	}
}
