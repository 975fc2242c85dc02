package main

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"google.golang.org/protobuf/types/known/timestamppb"

	"countersign.io/countersign/api"
	adminv1 "countersign.io/countersign/api/admin/v1"
	workloadv1 "countersign.io/countersign/api/workload/v1"
	"countersign.io/countersign/ca"
	"countersign.io/countersign/cmd/internal/cli"
	"countersign.io/countersign/identity"
)

// testDomain is a trust domain with one member.
type testDomain struct {
	td   spiffeid.TrustDomain
	ca   *ca.CA
	root []byte
}

func newTestDomain(t *testing.T, name string) *testDomain {
	t.Helper()
	d := &testDomain{td: spiffeid.RequireTrustDomainFromString(name)}
	var err error
	if d.ca, err = ca.New(ca.Config{TrustDomain: d.td, MemberName: "m1"}); err != nil {
		t.Fatal(err)
	}
	a, der, err := ca.NewX509Authority(d.td, time.Hour, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	d.root, a.SealedKey = a.Cert, []byte("x")
	if err := d.ca.SetAuthorities([]identity.Authority{a}, func(identity.Authority) (crypto.Signer, error) {
		k, err := x509.ParsePKCS8PrivateKey(der)
		return k.(crypto.Signer), err
	}); err != nil {
		t.Fatal(err)
	}
	return d
}

func (d *testDomain) svid(t *testing.T, path string) *tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p, err := d.ca.PrepareX509(identity.Issuance{ID: spiffeid.RequireFromPath(d.td, path), PublicKey: key.Public()})
	if err != nil {
		t.Fatal(err)
	}
	svid, err := p.Issue()
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Certificate{Certificate: svid.Chain, PrivateKey: key}
}

// write is what mint --write does.
func (d *testDomain) write(t *testing.T, c *tls.Certificate, root []byte) (dir string) {
	t.Helper()
	dir = t.TempDir()
	der, err := x509.MarshalPKCS8PrivateKey(c.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string][]byte{"svid.pem": pemOf(c.Certificate), "bundle.pem": pemOf([][]byte{root}), "key.pem": pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// presents is the address of something that shows a certificate and then says nothing.
func presents(t *testing.T, c *tls.Certificate, alpn ...string) string {
	t.Helper()
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{*c}, NextProtos: alpn, ClientAuth: tls.RequireAnyClientCert})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				_ = c.(*tls.Conn).Handshake()
			}()
		}
	}()
	return l.Addr().String()
}

// Who is asked must be a member, of one's own cluster: others are told nothing.
func TestRemoteAsksMembersOnly(t *testing.T) {
	d, other := newTestDomain(t, "example.org"), newTestDomain(t, "other.org")
	member, err := d.ca.MemberCertificate()
	if err != nil {
		t.Fatal(err)
	}
	stranger, err := other.ca.MemberCertificate()
	if err != nil {
		t.Fatal(err)
	}
	dir := d.write(t, d.svid(t, "/ops/alice"), d.root)
	for name, row := range map[string]struct {
		address string
		code    int
		says    string
	}{
		"a member":           {presents(t, member, api.ALPNAdmin), cli.ExitUnavailable, "as spiffe://example.org/ops/alice"}, // it hangs up
		"a workload":         {presents(t, d.svid(t, "/web"), api.ALPNAdmin), cli.ExitDenied, "which is not a member"},
		"another's member":   {presents(t, stranger, api.ALPNAdmin), cli.ExitDenied, "not authenticated"},
		"an older version":   {presents(t, member, "h2"), cli.ExitFailure, "version is older"},
		"nothing there":      {freeAddress(t), cli.ExitUnavailable, "connecting to the member"},
		"no host and port":   {"ca-1", cli.ExitUsage, "want host:port"},
		"one without a name": {presents(t, member), cli.ExitFailure, "version is older"},
	} {
		code, out, errOut := command("status", "--member", row.address, "--svid", dir, "--timeout", "5s")
		if code != row.code || !strings.Contains(errOut, row.says) || out != "" {
			t.Errorf("%s: exit code %d: %s%s", name, code, out, errOut)
		}
	}
	// Of several the first that is a member.
	code, _, errOut := command("status", "--member", freeAddress(t)+","+presents(t, d.svid(t, "/web"), api.ALPNAdmin), "--svid", dir)
	if code == 0 || !strings.Contains(errOut, "connecting to the member") || !strings.Contains(errOut, "which is not a member") {
		t.Errorf("exit code %d: %s", code, errOut)
	}
}

func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func TestRemoteFiles(t *testing.T) {
	d := newTestDomain(t, "example.org")
	dir := d.write(t, d.svid(t, "/ops/alice"), d.root)
	other := d.write(t, d.svid(t, "/ops/bob"), d.root)
	loose := d.write(t, d.svid(t, "/ops/carol"), d.root)
	if err := os.Chmod(filepath.Join(loose, "key.pem"), 0o640); err != nil {
		t.Fatal(err)
	}
	in := func(dir, name string) string { return filepath.Join(dir, name) }
	address := freeAddress(t)
	for name, row := range map[string]struct {
		args []string
		says string
	}{
		"another's key":    {[]string{"--member", address, "--svid", in(dir, "svid.pem"), "--svid-key", in(other, "key.pem"), "--svid-bundle", in(dir, "bundle.pem")}, "with key"},
		"loose key":        {[]string{"--member", address, "--svid", loose}, "key.pem"},
		"no key":           {[]string{"--member", address, "--svid", in(dir, "svid.pem")}, "--svid-key"},
		"no such folder":   {[]string{"--member", address, "--svid", in(dir, "no")}, "--svid-key"},
		"a key alone":      {[]string{"--member", address, "--svid-key", in(dir, "key.pem")}, "go with --svid"},
		"not a bundle":     {[]string{"--member", address, "--svid", dir, "--svid-bundle", in(dir, "key.pem")}, "--svid-bundle"},
		"not a socket":     {[]string{"--member", address, "--socket", "http://x"}, "Workload API socket"},
		"without a member": {[]string{"--svid", dir}, "name it with --member"},
	} {
		if code, out, errOut := command(append([]string{"status"}, row.args...)...); code != cli.ExitUsage || !strings.Contains(errOut, row.says) || out != "" {
			t.Errorf("%s: exit code %d: %s%s", name, code, out, errOut)
		}
	}
	t.Setenv("SPIFFE_ENDPOINT_SOCKET", "unix://"+in(dir, "none"))
	if code, _, errOut := command("status", "--member", address); code != cli.ExitUnavailable || !strings.Contains(errOut, "Workload API") {
		t.Errorf("without an agent: exit code %d: %s", code, errOut)
	}
	// The environment names members only where no socket is named.
	t.Setenv("COUNTERSIGN_MEMBER", "a:1,b:2")
	a := &admin{}
	if got := a.members(); len(got) != 2 || got[1] != "b:2" {
		t.Errorf("by the environment: %v", got)
	}
	a.socket = "/run/x"
	if got := a.members(); got != nil {
		t.Errorf("with a socket: %v", got)
	}
}

func TestMintKeepsTheKey(t *testing.T) {
	key, err := mintKey("ec-p256")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := mintKey("rot13"); cli.ExitCode(err) != cli.ExitUsage {
		t.Errorf("got %v", err)
	}
	if code, _, errOut := command("x509", "mint", "--id", "spiffe://example.org/x"); code != cli.ExitUsage || !strings.Contains(errOut, "where is the private key to go") {
		t.Errorf("exit code %d: %s", code, errOut)
	}
	for _, args := range [][]string{{"x509", "mint", "--write", t.TempDir()}, {"jwt", "mint", "--id", "spiffe://example.org/x"}, {"jwt", "mint", "--audience", "a"}} {
		if code, _, errOut := command(args...); code != cli.ExitUsage || !strings.Contains(errOut, "needed") {
			t.Errorf("%v: exit code %d: %s", args, code, errOut)
		}
	}
	d := newTestDomain(t, "example.org")
	dir := filepath.Join(t.TempDir(), "new")
	svid := d.svid(t, "/x")
	m, err := mintedOf(mintRequest("spiffe://example.org/x"), mintResponse(svid.Certificate, d.root), key, dir, false)
	if err != nil {
		t.Fatal(err)
	}
	if m.PrivateKey != "" || m.Certificate != "" {
		t.Error("the key is in what is printed")
	}
	for name, mode := range map[string]os.FileMode{"key.pem": 0o600, "svid.pem": 0o644, "bundle.pem": 0o644} {
		if info, err := os.Stat(filepath.Join(dir, name)); err != nil || info.Mode().Perm() != mode {
			t.Errorf("%s: %v, %v", name, info, err)
		}
	}
	if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("%v, %v", info, err)
	}
	if m, err = mintedOf(mintRequest("spiffe://example.org/x"), mintResponse(svid.Certificate, d.root), key, "", true); err != nil || !strings.Contains(m.PrivateKey, "PRIVATE KEY") || len(m.Files) != 0 {
		t.Errorf("%+v, %v", m, err)
	}
	// Without permission to write nothing is told.
	if err := os.WriteFile(filepath.Join(dir, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := mintedOf(mintRequest("x"), mintResponse(svid.Certificate, d.root), key, filepath.Join(dir, "file", "sub"), false); err == nil {
		t.Error("written below a file")
	}
}

func mintRequest(id string) *adminv1.MintX509Request { return &adminv1.MintX509Request{SpiffeId: id} }

func mintResponse(chain [][]byte, root []byte) *adminv1.MintX509Response {
	return &adminv1.MintX509Response{Chain: chain, Bundle: &workloadv1.Bundle{X509Authorities: [][]byte{root}}, NotAfter: timestamppb.Now()}
}
