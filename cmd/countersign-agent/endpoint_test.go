package main

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	wapi "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"countersign.io/countersign/cmd/internal/cli"
	"countersign.io/countersign/identity"
)

// TestConformance27EndpointSocket: SPIFFE Workload Endpoint, section 4: a client honours SPIFFE_ENDPOINT_SOCKET, a URI of
// scheme unix with an absolute path and no authority, or tcp with an IP address and a port; no other component may be set.
func TestConformance27EndpointSocket(t *testing.T) {
	for uri, ok := range map[string]bool{
		"unix:///run/agent.sock":           true,
		"unix:/run/agent.sock":             true, // the same URI, its authority left out
		"unix:///run/with%20space":         true,
		"tcp://127.0.0.1:8000":             true,
		"tcp://[::1]:8000":                 true,
		"tcp://10.0.0.1:65535":             true,
		"unix://run/agent.sock":            false, // run is an authority
		"unix:run/agent.sock":              false, // not absolute
		"unix://":                          false,
		"unix:///":                         false,
		"unix:":                            false,
		"unix:///run/agent.sock?a=b":       false,
		"unix:///run/agent.sock?":          false,
		"unix:///run/agent.sock#a":         false,
		"unix:///run/agent.sock#":          false,
		"unix://user@/run/agent.sock":      false,
		"unix://localhost/run/agent.sock":  false,
		"unix:///run/a%00b":                false, // no path of the system's
		"unix-abstract:agent":              false,
		"tcp://127.0.0.1":                  false, // no port
		"tcp://127.0.0.1:":                 false,
		"tcp://127.0.0.1:0":                false,
		"tcp://127.0.0.1:65536":            false,
		"tcp://127.0.0.1:http":             false,
		"tcp://localhost:8000":             false, // a name is no IP address
		"tcp://:8000":                      false,
		"tcp://[::1%25eth0]:8000":          false,
		"tcp://127.0.0.1:8000/":            false,
		"tcp://127.0.0.1:8000/path":        false,
		"tcp://127.0.0.1:8000?a=b":         false,
		"tcp://127.0.0.1:8000#a":           false,
		"tcp://user@127.0.0.1:8000":        false,
		"tcp://user:password@10.0.0.1:800": false,
		"tcp:127.0.0.1:8000":               false,
		"http://127.0.0.1:8000":            false,
		"UNIX:///run/agent.sock":           true, // RFC 3986, section 3.1: schemes have no case
		"/run/agent.sock":                  false,
		"agent.sock":                       false,
		" unix:///run/agent.sock":          false,
		"unix:///run/agent.sock\n":         false,
		"%":                                false,
	} {
		t.Setenv("SPIFFE_ENDPOINT_SOCKET", uri)
		got, err := endpoint("")
		if ok && (err != nil || got != uri) {
			t.Errorf("%q: %q, %v", uri, got, err)
		}
		if !ok && (!errors.Is(err, identity.ErrInvalid) || !strings.Contains(err.Error(), "SPIFFE_ENDPOINT_SOCKET") || !strings.Contains(err.Error(), "want unix:///absolute/path or tcp://IP:port")) {
			t.Errorf("%q: got %q, %v, want a refusal that says what is right", uri, got, err)
		}
	}
	t.Run("used", endpointUsed)
}

// endpointUsed shows that the variable leads to the server, over both schemes, and that the flag goes before it.
func endpointUsed(t *testing.T) {
	sock := filepath.Join(t.TempDir(), "s")
	unix, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g := grpc.NewServer()
	wapi.RegisterSpiffeWorkloadAPIServer(g, deny{})
	for _, l := range []net.Listener{unix, tcp} {
		go func() { _ = g.Serve(l) }()
	}
	defer g.Stop()
	for _, uri := range []string{"unix://" + sock, "tcp://" + tcp.Addr().String()} {
		t.Setenv("SPIFFE_ENDPOINT_SOCKET", uri)
		if code, _, errOut := command("fetch", "x509"); code != cli.ExitDenied || !strings.Contains(errOut, "not you") || !strings.Contains(errOut, uri) {
			t.Errorf("%s: exit code %d: %s", uri, code, errOut)
		}
		t.Setenv("SPIFFE_ENDPOINT_SOCKET", "unix:///absent")
		if code, _, errOut := command("fetch", "x509", "--endpoint", uri); code != cli.ExitDenied {
			t.Errorf("--endpoint %s: exit code %d: %s", uri, code, errOut)
		}
	}
	if code, _, errOut := command("fetch", "x509", "--endpoint", "localhost:1"); code != cli.ExitUsage || !strings.Contains(errOut, "--endpoint") {
		t.Errorf("exit code %d: %s", code, errOut)
	}
	t.Setenv("SPIFFE_ENDPOINT_SOCKET", "unix:///absent")
	if code, _, errOut := command("fetch", "x509", "--timeout", "1s"); code != cli.ExitUnavailable || !strings.Contains(errOut, "is it running") {
		t.Errorf("nobody there: exit code %d: %s", code, errOut)
	}
}

type deny struct {
	wapi.UnimplementedSpiffeWorkloadAPIServer
}

func (deny) FetchX509SVID(*wapi.X509SVIDRequest, grpc.ServerStreamingServer[wapi.X509SVIDResponse]) error {
	return status.Error(codes.PermissionDenied, "not you")
}

// TestEndpointOfDev: without a variable, the sockets of a daemon and of countersign dev are looked for.
func TestEndpointOfDev(t *testing.T) {
	home := t.TempDir()
	t.Setenv("HOME", home)
	t.Setenv("SPIFFE_ENDPOINT_SOCKET", "")
	if _, err := os.Lstat("/run/countersign/agent.sock"); err == nil {
		t.Skip("an agent runs on this machine")
	}
	sock := filepath.Join(home, ".countersign", "dev", "agent.sock")
	if _, err := endpoint(""); !errors.Is(err, identity.ErrUnavailable) || !strings.Contains(err.Error(), sock) {
		t.Errorf("nothing there: %v", err)
	}
	if err := os.MkdirAll(filepath.Dir(sock), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(sock, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := endpoint(""); err != nil || got != "unix://"+sock {
		t.Errorf("got %q, %v", got, err)
	}
}

// FuzzEndpoint: what is accepted has the form of section 4, and a client not ours accepts it too.
func FuzzEndpoint(f *testing.F) {
	if seeds, err := filepath.Glob("testdata/fuzz/FuzzEndpoint/*"); err != nil || len(seeds) < 4 {
		f.Fatalf("found %d seeds: %v", len(seeds), err)
	}
	f.Fuzz(func(t *testing.T, uri string) {
		err := checkEndpoint(uri)
		if err != nil {
			if !errors.Is(err, identity.ErrInvalid) {
				t.Errorf("%q: %v", uri, err)
			}
			return
		}
		if err := workloadapi.ValidateAddress(uri); err != nil {
			t.Errorf("%q is accepted, and go-spiffe says: %v", uri, err)
		}
		if strings.ContainsAny(uri, "?#@\x00\n ") && !strings.HasPrefix(strings.ToLower(uri), "unix:/") {
			t.Errorf("%q is accepted", uri)
		}
		scheme, rest, _ := strings.Cut(uri, ":")
		switch strings.ToLower(scheme) {
		case "unix":
			if path := strings.TrimPrefix(rest, "//"); !strings.HasPrefix(path, "/") || len(path) < 2 {
				t.Errorf("%q is accepted: no absolute path", uri)
			}
		case "tcp":
			host, port, err := net.SplitHostPort(strings.TrimPrefix(rest, "//"))
			if n, bad := strconv.ParseUint(port, 10, 16); err != nil || bad != nil || n == 0 || net.ParseIP(host) == nil {
				t.Errorf("%q is accepted: no IP address and port", uri)
			}
		default:
			t.Errorf("%q is accepted: scheme %q", uri, scheme)
		}
	})
}
