//go:build integration

package integration

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"countersign.io/countersign/integration/cluster"
)

const clientID = "spiffe://" + trustDomain + "/clients/one"

// tool runs a program that is not ours and returns all it prints; the environment is this process's and extra.
func (w *world) tool(stdin string, extra []string, argv ...string) (string, error) {
	w.t.Helper()
	if _, err := exec.LookPath(argv[0]); err != nil {
		w.t.Skipf("needs %s: make integration installs it", argv[0])
	}
	ctx, cancel := context.WithTimeout(w.ctx, 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Stdin, cmd.Env = strings.NewReader(stdin), append(os.Environ(), extra...)
	out, err := cmd.CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

// TestClientsNode is a client in another language, on another gRPC and TLS implementation, made from the public .proto.
func TestClientsNode(t *testing.T) {
	w := newWorld(t, 1, shortTTL)
	a := w.agent()
	dir, err := w.tool("", nil, "go", "list", "-m", "-f", "{{.Dir}}", "github.com/spiffe/go-spiffe/v2")
	if err != nil {
		t.Fatalf("%v: %s", err, dir)
	}
	if _, err := os.Stat("testdata/node/node_modules"); err != nil {
		t.Skipf("%v: make integration installs it", err)
	}
	node := func(args ...string) string {
		t.Helper()
		out, err := w.tool("", nil, append([]string{"node", "testdata/node/client.js", a.Socket, filepath.Join(dir, "proto/spiffe/workload/workload.proto")}, args...)...)
		if err != nil || !strings.HasSuffix(out, "done") {
			t.Fatalf("%v: %s", err, out)
		}
		return out
	}
	t.Log(node("denied"))
	w.createEntry(append(uidSelectors(), "--id", clientID)...)
	t.Log(node("identity", clientID))
}

// TestClientsOpenSSL has openssl judge our certificates, strictly, and talk to go-spiffe with them.
func TestClientsOpenSSL(t *testing.T) {
	w := newWorld(t, 1, "")
	a := w.agent()
	w.createEntry(append(uidSelectors(), "--id", clientID, "--dns", "one.test")...)
	dir := filepath.Join(w.Dir, "pem")
	if out, err := w.tool("", []string{"SPIFFE_ENDPOINT_SOCKET=" + a.Endpoint()}, filepath.Join(bin, "countersign-agent"), "fetch", "x509", "--write", dir); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	svid, key, bundle := filepath.Join(dir, "svid.pem"), filepath.Join(dir, "key.pem"), filepath.Join(dir, "bundle.pem")
	for _, purpose := range []string{"sslserver", "sslclient"} {
		out, err := w.tool("", nil, "openssl", "verify", "-x509_strict", "-purpose", purpose, "-verify_hostname", "one.test", "-CAfile", bundle, "-untrusted", svid, svid)
		if err != nil || !strings.HasSuffix(out, ": OK") {
			t.Errorf("openssl verify as %s: %v: %s", purpose, err, out)
		}
	}
	if out, err := w.tool("", nil, "openssl", "verify", "-no-CAfile", "-no-CApath", "-no-CAstore", "-untrusted", svid, svid); err == nil {
		t.Errorf("openssl verify without our bundle: %s", out)
	}
	text, err := w.tool("", nil, "openssl", "x509", "-in", svid, "-noout", "-ext", "subjectAltName,basicConstraints,keyUsage,extendedKeyUsage")
	if err != nil || !strings.Contains(text, "URI:"+clientID) || !strings.Contains(text, "CA:FALSE") {
		t.Errorf("openssl x509: %v: %s", err, text)
	}
	t.Log(text)

	addr, handshakes := goSpiffeServer(w, a)
	dial := func(args ...string) (string, error) {
		return w.tool("ping\n", nil, append([]string{"openssl", "s_client", "-connect", addr, "-brief", "-verify_return_error", "-ign_eof", "-CAfile", bundle}, args...)...)
	}
	out, err := dial("-cert", svid, "-key", key, "-cert_chain", svid, "-verify_hostname", "one.test")
	if err != nil || !strings.Contains(out, "Verification: OK") || !strings.Contains(out, "ping") {
		t.Errorf("openssl s_client: %v: %s", err, out)
	}
	if err := <-handshakes; err != nil {
		t.Errorf("go-spiffe refused openssl: %v", err)
	}
	if out, err := dial(); err == nil && strings.Contains(out, "ping") {
		t.Errorf("openssl without a certificate: %s", out)
	}
	if err := <-handshakes; err == nil {
		t.Error("go-spiffe accepted a client without a certificate")
	}
}

// goSpiffeServer echoes one line to each client with clientID, and tells how each handshake went.
func goSpiffeServer(w *world, a *cluster.Agent) (string, <-chan error) {
	w.t.Helper()
	source, err := workloadapi.NewX509Source(w.ctx, workloadapi.WithClientOptions(workloadapi.WithAddr(a.Endpoint())))
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { source.Close() })
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { l.Close() })
	handshakes := make(chan error, 16)
	conf := tlsconfig.MTLSServerConfig(source, source, tlsconfig.AuthorizeID(spiffeid.RequireFromString(clientID)))
	go func() {
		for {
			raw, err := l.Accept()
			if err != nil {
				return
			}
			conn := tls.Server(raw, conf)
			_ = conn.SetDeadline(time.Now().Add(30 * time.Second))
			err = conn.HandshakeContext(w.ctx)
			handshakes <- err
			if err == nil {
				_, _ = io.CopyN(conn, conn, 5)
			}
			conn.Close()
		}
	}()
	return l.Addr().String(), handshakes
}

// rotations counts the different certificates that were seen of each side.
type rotations struct {
	mu      sync.Mutex
	serials map[string]map[string]bool
	done    int // handshakes
	jwts    int
}

func (r *rotations) saw(side string, c *x509.Certificate) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.serials[side] == nil {
		r.serials[side] = map[string]bool{}
	}
	r.serials[side][c.SerialNumber.Text(16)] = true
}

func (r *rotations) add(counter *int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	*counter++
}

// fewest is over both sides.
func (r *rotations) fewest() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return min(len(r.serials["client"]), len(r.serials["server"])) - 1
}

// TestClientsRotations runs go-spiffe's sources through 50 rotations under load: no handshake may fail, and no JWT-SVID.
func TestClientsRotations(t *testing.T) {
	const want, dialers = 50, 4
	w := newWorld(t, 3, shortTTL+"jwt_ttl: 10s\n")
	a := w.agent()
	w.createEntry(append(uidSelectors(), "--id", clientID)...)
	ctx, cancel := context.WithCancel(w.ctx)
	defer cancel()
	opts := workloadapi.WithClientOptions(workloadapi.WithAddr(a.Endpoint()))
	var sources [2]*workloadapi.X509Source
	for i := range sources {
		var err error
		if sources[i], err = workloadapi.NewX509Source(ctx, opts); err != nil {
			t.Fatal(err)
		}
		defer sources[i].Close()
	}
	jwts, err := workloadapi.NewJWTSource(ctx, opts)
	if err != nil {
		t.Fatal(err)
	}
	defer jwts.Close()

	r := &rotations{serials: map[string]map[string]bool{}}
	authorize := tlsconfig.AuthorizeID(spiffeid.RequireFromString(clientID))
	l, err := tls.Listen("tcp", "127.0.0.1:0", tlsconfig.MTLSServerConfig(sources[0], sources[0], authorize))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go echo(l, r)
	conf := tlsconfig.MTLSClientConfig(sources[1], sources[1], authorize)
	var wg sync.WaitGroup
	loop := func(pause time.Duration, what string, once func() error) {
		wg.Go(func() {
			tick := time.NewTicker(pause)
			defer tick.Stop()
			for ctx.Err() == nil {
				if err := once(); err != nil && ctx.Err() == nil {
					t.Errorf("%s: %v", what, err)
					cancel()
				}
				<-tick.C
			}
		})
	}
	for range dialers {
		loop(10*time.Millisecond, "handshake", func() error { return roundTrip(ctx, l.Addr().String(), conf, r) })
	}
	loop(50*time.Millisecond, "JWT-SVID", func() error {
		svid, err := jwts.FetchJWTSVID(ctx, jwtsvid.Params{Audience: "load"})
		if err != nil {
			return err
		}
		if _, err := jwtsvid.ParseAndValidate(svid.Marshal(), jwts, []string{"load"}); err != nil {
			return err
		}
		r.add(&r.jwts)
		return nil
	})
	for tick := time.NewTicker(100 * time.Millisecond); r.fewest() < want && ctx.Err() == nil; <-tick.C {
	}
	if w.ctx.Err() != nil {
		t.Errorf("only %d rotations: %v", r.fewest(), w.ctx.Err())
	}
	cancel()
	wg.Wait()
	r.mu.Lock()
	defer r.mu.Unlock()
	t.Logf("%d handshakes and %d JWT-SVIDs through %d and %d rotations", r.done, r.jwts, len(r.serials["client"])-1, len(r.serials["server"])-1)
}

func echo(l net.Listener, r *rotations) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer conn.Close()
			_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
			var b [4]byte
			if _, err := io.ReadFull(conn, b[:]); err != nil {
				return // the dialer tells
			}
			r.saw("client", conn.(*tls.Conn).ConnectionState().PeerCertificates[0])
			_, _ = conn.Write(b[:])
		}()
	}
}

// roundTrip is one full handshake, and four bytes there and back.
func roundTrip(ctx context.Context, addr string, conf *tls.Config, r *rotations) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	raw, err := (&tls.Dialer{Config: conf}).DialContext(ctx, "tcp", addr)
	if err != nil {
		return err
	}
	defer raw.Close()
	conn := raw.(*tls.Conn)
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := conn.Write([]byte("ping")); err != nil {
		return err
	}
	var b [4]byte
	if _, err := io.ReadFull(conn, b[:]); err != nil {
		return fmt.Errorf("the server ended the connection: %w", err)
	}
	r.saw("server", conn.ConnectionState().PeerCertificates[0])
	r.add(&r.done)
	return nil
}
