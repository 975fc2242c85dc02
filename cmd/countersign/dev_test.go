package main

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"countersign.io/countersign/cmd/internal/cli"
	"countersign.io/countersign/identity"
)

// session is a person at a shell, in a home of its own. Commands of this package run in process, the agent's as a process.
type session struct {
	t                                  *testing.T
	ctx                                context.Context
	bin, home                          string
	listen, health, agentHealth, other string
	out, err                           string // of the last command
	dev                                *exec.Cmd
	devOut, devErr                     bytes.Buffer
}

func newSession(t *testing.T) *session {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Minute)
	t.Cleanup(cancel)
	s := &session{t: t, ctx: ctx, bin: t.TempDir()}
	if out, err := exec.CommandContext(ctx, "go", "build", "-o", s.bin, ".", "../countersign-agent").CombinedOutput(); err != nil {
		t.Fatalf("building: %v: %s", err, out)
	}
	var err error
	if s.home, err = os.MkdirTemp("", "cs-"); err != nil { // short: sockets live in it
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(s.home) })
	t.Setenv("HOME", s.home)
	t.Setenv("COUNTERSIGN_ADMIN_SOCKET", "")
	t.Setenv("SPIFFE_ENDPOINT_SOCKET", "")
	for _, a := range []*string{&s.listen, &s.health, &s.agentHealth, &s.other} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close() // only now, so that they differ
		*a = l.Addr().String()
	}
	return s
}

// run runs a command line and checks its exit code, that it shows no private key, and that a failure is explained.
func (s *session) run(code int, line string, stdin ...string) {
	s.t.Helper()
	argv := strings.Fields(line)
	var out, errOut bytes.Buffer
	got := 0
	if argv[0] == "countersign" {
		got = run(s.ctx, argv[1:], &out, &errOut)
	} else {
		cmd := exec.CommandContext(s.ctx, filepath.Join(s.bin, argv[0]), argv[1:]...)
		cmd.Dir, cmd.Stdin, cmd.Stdout, cmd.Stderr = s.home, strings.NewReader(strings.Join(stdin, "")), &out, &errOut
		if err := cmd.Run(); err != nil {
			exit := (*exec.ExitError)(nil)
			if !errors.As(err, &exit) {
				s.t.Fatalf("%s: %v", line, err)
			}
			got = exit.ExitCode()
		}
	}
	s.out, s.err = out.String(), errOut.String()
	s.noKeys()
	switch {
	case got != code:
		s.t.Errorf("%s: exit code %d, want %d: %s", line, got, code, s.err)
	case code != 0 && strings.Count(s.err, "\n") == 0:
		s.t.Errorf("%s: it fails and says nothing", line)
	}
}

// ok is a command that succeeds and prints all of that.
func (s *session) ok(line string, want ...string) {
	s.t.Helper()
	s.run(cli.ExitOK, line)
	s.says(line, s.out, want)
}

// fails is a command that ends with the code and says all of that.
func (s *session) fails(code int, line string, want ...string) {
	s.t.Helper()
	s.run(code, line)
	s.says(line, s.err, want)
}

func (s *session) says(line, text string, want []string) {
	s.t.Helper()
	for _, w := range want {
		if !regexp.MustCompile(w).MatchString(text) {
			s.t.Errorf("%s: %q is not in %s", line, w, text)
		}
	}
}

var longBase64 = regexp.MustCompile(`[A-Za-z0-9+/_-]{40,}={0,2}`)

// noKeys fails if what was printed last holds a private key, in any of the forms that Go knows.
func (s *session) noKeys() {
	s.t.Helper()
	if holdsKey(s.out) || holdsKey(s.err) {
		s.t.Fatalf("a private key is printed")
	}
}

func holdsKey(text string) bool {
	if strings.Contains(text, "PRIVATE KEY") {
		return true
	}
	for _, b64 := range longBase64.FindAllString(text, -1) {
		b64 = strings.TrimRight(b64, "=")
		for _, enc := range []*base64.Encoding{base64.RawStdEncoding, base64.RawURLEncoding} {
			der, err := enc.DecodeString(b64)
			if err != nil {
				continue
			}
			if _, err := x509.ParsePKCS8PrivateKey(der); err == nil {
				return true
			}
			if _, err := x509.ParseECPrivateKey(der); err == nil {
				return true
			}
			if _, err := x509.ParsePKCS1PrivateKey(der); err == nil {
				return true
			}
		}
	}
	return false
}

// formats checks that an answer comes as a table, as JSON and as YAML, and that the latter two say the same.
func (s *session) formats(line string) {
	s.t.Helper()
	if s.ok(line + " -o table"); strings.TrimSpace(s.out) == "" {
		s.t.Errorf("%s: the table is empty", line)
	}
	var j, y any
	s.ok(line + " -o yaml")
	if err := yaml.Unmarshal([]byte(s.out), &y); err != nil {
		s.t.Errorf("%s: not YAML: %v", line, err)
	}
	s.ok(line + " -o json")
	if err := json.Unmarshal([]byte(s.out), &j); err != nil {
		s.t.Errorf("%s: not JSON: %v", line, err)
	}
	if a, b := shape(j), shape(y); !reflect.DeepEqual(a, b) {
		s.t.Errorf("%s: the JSON is %v and the YAML %v", line, a, b)
	}
}

// shape is a value without what may change between two calls.
func shape(v any) any {
	switch v := v.(type) {
	case map[string]any:
		out := map[string]any{}
		for k, x := range v {
			out[k] = shape(x)
		}
		return out
	case []any:
		out := make([]any, len(v))
		for i, x := range v {
			out[i] = shape(x)
		}
		return out
	case int, float64:
		return "number"
	}
	return fmt.Sprintf("%T", v)
}

// field is a text in the JSON printed last, such as 0.token.
func (s *session) field(path string) string {
	s.t.Helper()
	var v any
	if err := json.Unmarshal([]byte(s.out), &v); err != nil {
		s.t.Fatalf("not JSON: %v: %s", err, s.out)
	}
	for k := range strings.SplitSeq(path, ".") {
		switch x := v.(type) {
		case map[string]any:
			v = x[k]
		case []any:
			if i, err := strconv.Atoi(k); err == nil && i < len(x) {
				v = x[i]
			}
		}
	}
	text, ok := v.(string)
	if !ok {
		s.t.Fatalf("there is no %s in %s", path, s.out)
	}
	return text
}

// ready waits until /ready says so.
func (s *session) ready(address string) {
	s.t.Helper()
	for {
		req, err := http.NewRequestWithContext(s.ctx, http.MethodGet, "http://"+address+"/ready", nil)
		if err != nil {
			s.t.Fatal(err)
		}
		res, err := http.DefaultClient.Do(req)
		if err == nil {
			res.Body.Close()
			if res.StatusCode == http.StatusOK {
				return
			}
		}
		select {
		case <-s.ctx.Done():
			s.t.Fatalf("%s is not ready: %v", address, s.ctx.Err())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// startDev starts countersign dev as a process and waits until both halves are ready.
func (s *session) startDev(flags ...string) {
	s.t.Helper()
	s.devOut.Reset()
	s.devErr.Reset()
	s.dev = exec.CommandContext(s.ctx, filepath.Join(s.bin, "countersign"), append([]string{"dev", "--listen", s.listen, "--health", s.health, "--agent-health", s.agentHealth}, flags...)...)
	s.dev.Stdout, s.dev.Stderr = &s.devOut, &s.devErr
	s.dev.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := s.dev.Start(); err != nil {
		s.t.Fatal(err)
	}
	dev := s.dev
	s.t.Cleanup(func() {
		_ = dev.Process.Kill()
		_ = dev.Wait() // an error where stopDev has waited: what matters is that it writes no more
	})
	s.ready(s.health)
	s.ready(s.agentHealth)
}

// stopDev ends it by a signal, which is no error.
func (s *session) stopDev(sig os.Signal) {
	s.t.Helper()
	if err := s.dev.Process.Signal(sig); err != nil {
		s.t.Fatal(err)
	}
	if err := s.dev.Wait(); err != nil {
		s.t.Errorf("%v: %v: %s", sig, err, s.devErr.String())
	}
	s.out, s.err = s.devOut.String(), s.devErr.String()
	s.noKeys()
}

// watches checks that a command prints a line and goes on until it is interrupted, which is no error.
func (s *session) watches(line string, want string) {
	s.t.Helper()
	argv := strings.Fields(line)
	cmd := exec.CommandContext(s.ctx, filepath.Join(s.bin, argv[0]), argv[1:]...)
	out, err := cmd.StdoutPipe()
	if err != nil {
		s.t.Fatal(err)
	}
	var errOut bytes.Buffer
	cmd.Stderr = &errOut
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	var got []byte
	for buf := make([]byte, 4096); !bytes.Contains(got, []byte("\n")); {
		n, err := out.Read(buf)
		if got = append(got, buf[:n]...); err != nil {
			break
		}
	}
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		s.t.Error(err)
	}
	rest, _ := io.ReadAll(out)
	if err := cmd.Wait(); err != nil {
		s.t.Errorf("%s, interrupted: %v: %s", line, err, errOut.String())
	}
	s.out, s.err = string(got)+string(rest), errOut.String()
	s.noKeys()
	s.says(line, s.out, []string{want})
}

// file puts a file into the home.
func (s *session) file(name, text string) string {
	s.t.Helper()
	path := filepath.Join(s.home, name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		s.t.Fatal(err)
	}
	return path
}

// pemFile checks the permissions and the kind of a file.
func (s *session) pemFile(path string, mode os.FileMode, kind string) {
	s.t.Helper()
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != mode {
		s.t.Errorf("%s: %v, %v, want mode %v", path, info, err, mode)
		return
	}
	raw, err := os.ReadFile(path)
	if err != nil {
		s.t.Fatal(err)
	}
	if block, _ := pem.Decode(raw); block == nil || block.Type != kind {
		s.t.Errorf("%s is not a %s", path, kind)
	}
}

const testJWKS = `{"keys":[{"kty":"EC","kid":"1","use":"sig","alg":"ES256","crv":"P-256",` +
	`"x":"MKBCTNIcKUSDii11ySs3526iDZ8AiTo7Tu6KPAqv7D4","y":"4Etl6SRW2YiLUrN5vfvVHuhp7x8PxltmWWlbbM4IFyM"}]}`

// TestDev is a session with countersign dev from nothing to the end, with every command, its formats and its exit codes.
func TestDev(t *testing.T) {
	s := newSession(t)
	s.fails(cli.ExitUnavailable, "countersign status", "no member is running here.*--socket")
	s.fails(cli.ExitUnavailable, "countersign-agent fetch x509", "no agent is running here.*countersign dev")
	s.fails(cli.ExitUnavailable, "countersign-agent health --address "+s.agentHealth, "no agent answers at")

	s.startDev()
	s.ok("countersign-agent health --address "+s.agentHealth, "^ready\n$")
	s.workload()
	s.jwt()
	s.operator()
	s.entries()
	s.agents()
	s.kube()
	s.tokens()
	s.direct()
	s.metrics()

	// A second one gets in nobody's way.
	s.fails(cli.ExitFailure, fmt.Sprintf("countersign dev --listen %s --health %s --agent-health %s", s.listen, s.health, s.agentHealth), "address already in use")
	s.fails(cli.ExitFailure, fmt.Sprintf("countersign dev --listen %s --health 127.0.0.1:0 --agent-health 127.0.0.1:0", s.other), "is the server running already")

	// Losing the last identity.
	s.ok("countersign entry list -o json")
	s.ok("countersign entry delete " + s.field("entries.0.id"))
	s.fails(cli.ExitDenied, "countersign-agent fetch x509", "the agent at unix://.*agent.sock")
	s.fails(cli.ExitDenied, "countersign-agent fetch jwt --audience me")
	s.stopDev(os.Interrupt)
	if !strings.Contains(s.out, "Countersign is running") || s.err != "" {
		t.Errorf("dev said %q and complained %q", s.out, s.err)
	}

	// It starts again on what it left, and stops on SIGTERM too.
	s.startDev("--log", "info")
	s.ok("countersign-agent fetch x509", "spiffe://dev.test/user/")
	s.stopDev(syscall.SIGTERM)
	if !strings.Contains(s.err, "member started") || strings.Contains(s.err, "cs1.") {
		t.Errorf("dev logged %q", s.err)
	}
	s.fails(cli.ExitUnavailable, "countersign-agent fetch x509 --timeout 2s", "is running")
	s.fails(cli.ExitUnavailable, "countersign status", "is running")
}

func (s *session) workload() {
	s.ok("countersign-agent fetch x509", "spiffe://dev.test/user/")
	s.formats("countersign-agent fetch x509")
	dir := filepath.Join(s.home, "svid")
	s.ok("countersign-agent fetch x509 --write "+dir, "spiffe://dev.test/user/")
	s.pemFile(filepath.Join(dir, "key.pem"), 0o600, "PRIVATE KEY")
	s.pemFile(filepath.Join(dir, "svid.pem"), 0o644, "CERTIFICATE")
	s.pemFile(filepath.Join(dir, "bundle.pem"), 0o644, "CERTIFICATE")
	s.formats("countersign-agent fetch bundles")
	s.watches("countersign-agent watch", "spiffe://dev.test/user/.*serial [0-9a-f]+  until")
	s.watches("countersign-agent watch -o json", `"spiffe_id":"spiffe://dev.test/user/`)
	s.fails(cli.ExitUsage, "countersign-agent fetch x509 --endpoint unix://host/path", "--endpoint", "no authority")
}

func (s *session) jwt() {
	s.formats("countersign-agent fetch jwt --audience me")
	s.fails(cli.ExitUsage, "countersign-agent fetch jwt", "--audience is needed")
	s.fails(cli.ExitUsage, "countersign-agent fetch jwt --audience me --id nonsense", "--id")
	s.fails(cli.ExitDenied, "countersign-agent fetch jwt --audience me --id spiffe://dev.test/not-mine")
	s.ok("countersign-agent fetch jwt --audience me,you -o json")
	token := s.field("0.token")
	file := s.file("token", token+"\n")
	s.ok("countersign-agent validate --audience you "+file, "valid +spiffe://dev.test/user/")
	s.formats("countersign-agent validate --audience me " + file)
	for _, line := range []string{"countersign-agent validate --audience me", "countersign-agent validate --audience me -"} {
		s.run(cli.ExitOK, line, token)
		s.says(line, s.out, []string{"valid +spiffe://dev.test/user/"})
	}
	s.fails(cli.ExitUsage, "countersign-agent validate --audience other "+file)
	s.fails(cli.ExitUsage, "countersign-agent validate --audience me "+s.file("tampered", token[:len(token)-8]+"AAAAAAAA"))
	if strings.Contains(s.err, token[:len(token)-8]) {
		s.t.Error("a refused token is printed")
	}
	s.fails(cli.ExitUsage, "countersign-agent validate --audience me", "is empty")
	s.fails(cli.ExitUsage, "countersign-agent validate "+file, "--audience is needed")
	s.fails(cli.ExitUsage, "countersign-agent validate --audience me absent", "no such file")
	s.fails(cli.ExitUsage, "countersign-agent validate --audience me "+s.file("big", strings.Repeat("x", identity.MaxTokenBytes+1)), "larger than")
}

func (s *session) operator() {
	s.formats("countersign status")
	s.ok("countersign status", "issuing +yes", "leader +dev", "trust domain +dev.test")
	s.formats("countersign bundle show")
	s.formats("countersign cluster status")
	s.ok("countersign cluster status", "healthy +yes", "leader +dev", "members that may fail +0", "level +2", "NAME +ADDRESS", "dev +.* leader +yes +yes +[0-9]+ +0 ")
	s.formats("countersign cluster members")
	s.fails(cli.ExitFailure, "countersign cluster remove dev", "last member with a vote")
	s.fails(cli.ExitNotFound, "countersign cluster remove nobody", "the members are dev")
	s.fails(cli.ExitFailure, "countersign cluster transfer-leader", "no other member with a vote")
	s.ok("countersign bundle show", "sha256:[0-9a-f]{64}")
	s.ok("countersign bundle show --format pem", "^-----BEGIN CERTIFICATE-----")
	s.fails(cli.ExitUsage, "countersign bundle show --format der", "want pem")
	s.fails(cli.ExitUnavailable, "countersign status --socket "+filepath.Join(s.home, "absent.sock"), "is it running", "absent.sock")
}

func (s *session) entries() {
	s.formats("countersign entry list")
	const create = "countersign entry create -s unix:path:/bin/true -s agent:kind:join_token --id spiffe://dev.test/true"
	s.ok(create + " --x509-ttl 10m --dns true.test --hint truth --expires-in 1h -o json")
	id := s.field("id")
	s.formats("countersign entry show " + id)
	s.ok("countersign entry show "+id, "spiffe://dev.test/true +agent:kind:join_token unix:path:/bin/true +10m0s +default +20")
	s.formats("countersign entry update " + id + " --x509-ttl 20m")
	s.ok("countersign entry show "+id+" -o json", `"x509_ttl": "1200s"`, `"hint": "truth"`, `"true.test"`)
	s.fails(cli.ExitFailure, create, "already exists", id)
	s.fails(cli.ExitUsage, "countersign entry create -s unix:path:/bin/true --id spiffe://dev.test/true", "selector")
	s.fails(cli.ExitUsage, "countersign entry create -s nonsense --id spiffe://dev.test/x", "nonsense")
	s.fails(cli.ExitUsage, "countersign entry create -s agent:kind:join_token --id spiffe://other.test/x", "other.test")
	s.fails(cli.ExitUsage, "countersign entry create -s agent:kind:join_token --id spiffe://dev.test/{k8s:nothing}", "nothing")
	s.fails(cli.ExitUsage, "countersign entry update "+id+" --id nonsense", "nonsense")
	for _, verb := range []string{"show absent", "update absent --hint x", "delete absent"} {
		s.fails(cli.ExitNotFound, "countersign entry "+verb, "absent")
	}
	s.ok("countersign __complete entry show x", "spiffe://dev.test/true")
	s.ok("countersign entry delete " + id)
	s.fails(cli.ExitNotFound, "countersign entry show "+id)
}

func (s *session) agents() {
	s.formats("countersign agent list")
	id := s.field("agents.0.id")
	s.formats("countersign agent show " + id)
	s.ok("countersign agent show "+id, "join_token .*connected")
	s.ok("countersign __complete agent show x", id)
	for _, verb := range []string{"show", "ban", "evict"} {
		s.fails(cli.ExitNotFound, "countersign agent "+verb+" spiffe://dev.test/countersign/agent/join/absent", "absent")
	}
}

func (s *session) kube() {
	jwks := s.file("jwks.json", testJWKS)
	s.formats("countersign kube add --replace test --issuer https://kube.test --agent-account countersign/agent --jwks-file " + jwks)
	s.fails(cli.ExitFailure, "countersign kube add test --issuer https://kube.test --jwks-file "+jwks, "already exists")
	s.formats("countersign kube list")
	s.ok("countersign kube list", `test +https://kube.test +countersign +jwks \(held\)`)
	for file, why := range map[string]string{"absent.json": "absent.json", s.home: "not a regular file", s.file("big.json", strings.Repeat(" ", maxInput+1)): "larger than"} {
		s.fails(cli.ExitUsage, "countersign kube add other --issuer https://other.test --jwks-file "+file, why)
	}
	s.fails(cli.ExitUsage, "countersign kube add other", "issuer")
	s.ok("countersign kube delete test")
	s.fails(cli.ExitNotFound, "countersign kube delete test", "test")
}

func (s *session) tokens() {
	s.formats("countersign token create --agent")
	s.ok("countersign token create --server", `^cs1\.\S+\n$`)
	for line, why := range map[string]string{
		"": "--server or --agent", "--server --agent": "--server or --agent", "--agent --kube-node nonsense": "CLUSTER/NODE",
		"--agent --ttl 48h": "TTL", "--agent extra": "extra",
	} {
		s.fails(cli.ExitUsage, "countersign token create "+line, why)
	}
	s.fails(cli.ExitNotFound, "countersign token create --agent --kube-node absent/node", "kube add")
}

// direct asks without an agent, by what is no pod's token.
func (s *session) direct() {
	s.ok("countersign bundle show -o json")
	flags := " --direct --server " + s.listen + " --ca-pin " + s.field("ca_pin") + " --token-path "
	s.fails(cli.ExitUsage, "countersign-agent fetch x509"+flags+"absent", "absent")
	s.ok("countersign-agent fetch jwt --audience me -o json")
	token := s.field("0.token")
	file := s.file("pod", token)
	for _, line := range []string{"countersign-agent fetch x509" + flags + file, "countersign-agent fetch jwt --audience me" + flags + file} {
		if s.fails(cli.ExitDenied, line); strings.Contains(s.err, token) {
			s.t.Errorf("%s: the token is printed", line)
		}
	}
}
