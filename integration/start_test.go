package integration

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"countersign.io/countersign/attestor/node"
	"countersign.io/countersign/integration/cluster"
)

// The exit codes that scripts rely on.
const (
	exitFailure     = 1
	exitUsage       = 2
	exitDenied      = 4
	exitUnavailable = 5
)

// place is where one more process is started by hand, on a folder that the test prepares.
type place struct {
	*cluster.Cluster
	*cluster.Member
	yaml string // of the member
}

// newPlace makes a place for the member of that name; its data are a copy of a folder, or absent.
func newPlace(t *testing.T, name, data string) *place {
	t.Helper()
	dir, err := os.MkdirTemp("", "cs-")
	if err != nil {
		t.Fatal(err)
	}
	p := &place{
		Cluster: &cluster.Cluster{Dir: dir, Bin: bin, TrustDomain: trustDomain},
		Member:  &cluster.Member{Name: name, Dir: dir, Socket: filepath.Join(dir, "admin.sock"), Address: freeAddress(t), Health: freeAddress(t)},
	}
	t.Cleanup(func() {
		p.Cluster.Close()
		soundLogs(t, dir)
		if log, err := os.ReadFile(filepath.Join(dir, "log")); err == nil && t.Failed() {
			t.Logf("%s", log)
		}
		os.RemoveAll(dir)
	})
	if data != "" {
		if out, err := exec.Command("cp", "-a", data, p.data("")).CombinedOutput(); err != nil {
			t.Fatalf("copying %s: %v: %s", data, err, out)
		}
	}
	p.yaml = fmt.Sprintf("version: 1\ntrust_domain: %s\nname: %s\ndata_dir: %s\nlisten: %s\nadmin_socket: %s\nhealth: %s\n",
		trustDomain, name, p.data(""), p.Address, p.Socket, p.Health)
	return p
}

// worldOf is newWorld, and at its end no process may have panicked or raced.
func worldOf(t *testing.T, members int, serverYAML string) *world {
	t.Helper()
	w := newWorld(t, members, serverYAML)
	t.Cleanup(func() { soundLogs(t, w.Dir) })
	return w
}

// soundLogs looks for what a process says that is broken itself: one that is killed has no exit code to tell.
func soundLogs(t *testing.T, dir string) {
	t.Helper()
	for _, pattern := range []string{"log", "*/log"} {
		files, err := filepath.Glob(filepath.Join(dir, pattern))
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			log, err := os.ReadFile(f)
			if err != nil {
				t.Error(err)
			}
			for _, broken := range []string{"DATA RACE", "panic: ", "fatal error: "} {
				if i := bytes.Index(log, []byte(broken)); i >= 0 {
					t.Errorf("%s says: %s", f, log[i:min(len(log), i+4000)])
				}
			}
		}
	}
}

func freeAddress(t *testing.T) string {
	t.Helper()
	a, err := cluster.FreeAddress()
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func (p *place) data(name string) string { return filepath.Join(p.Member.Dir, "data", name) }

// configure writes the member's configuration, with more lines.
func (p *place) configure(t *testing.T, more string) {
	t.Helper()
	writeFile(t, filepath.Join(p.Member.Dir, "server.yaml"), []byte(p.yaml+more))
}

// start starts the member, which must come up.
func (p *place) start(t *testing.T, ctx context.Context, more string) {
	t.Helper()
	p.configure(t, more)
	if err := p.RestartMember(ctx, p.Member); err != nil {
		t.Fatal(err)
	}
}

func writeFile(t *testing.T, path string, data []byte) {
	t.Helper()
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// change rewrites a file.
func change(t *testing.T, path string, edit func([]byte) []byte) {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, path, edit(data))
}

func flip(at int) func([]byte) []byte {
	return func(b []byte) []byte { b[at] ^= 0x40; return b }
}

func half(b []byte) []byte { return b[:len(b)/2] }

// refused runs a command that must end by itself, with that code and all those words, and returns what it said.
func (p *place) refused(t *testing.T, code int, words []string, argv ...string) string {
	t.Helper()
	var out bytes.Buffer
	argv[0] = filepath.Join(p.Cluster.Bin, argv[0])
	proc, err := p.Cluster.Start(filepath.Base(argv[0]), nil, &out, argv...)
	if err != nil {
		t.Fatal(err)
	}
	select {
	case <-proc.Done():
	case <-time.After(90 * time.Second):
		proc.Kill()
		t.Fatalf("%v started; it said: %s", argv, out.String())
	}
	said := out.String()
	if proc.Code() != code {
		t.Errorf("%v: exit code %d, want %d: %s", argv, proc.Code(), code, said)
	}
	for _, w := range words {
		if !strings.Contains(said, w) {
			t.Errorf("%v: %q is not in what it said: %s", argv, w, said)
		}
	}
	for _, never := range []string{"panic:", "goroutine ", "DATA RACE"} {
		if strings.Contains(said, never) {
			t.Errorf("%v: it said: %s", argv, said)
		}
	}
	return said
}

// notStarted is refused for the member.
func (p *place) notStarted(t *testing.T, more string, code int, words ...string) string {
	t.Helper()
	p.configure(t, more)
	return p.refused(t, code, words, "countersign", "server", "run", "-c", filepath.Join(p.Member.Dir, "server.yaml"))
}

// entries lists a member's entries by SPIFFE ID.
func (p *place) entries(t *testing.T, ctx context.Context) map[string]string {
	t.Helper()
	out, err := p.Member.Admin(ctx, bin, "entry", "list", "-o", "json")
	if err != nil {
		t.Fatal(err)
	}
	var list struct {
		Entries []struct {
			ID       string
			SPIFFEID string `json:"spiffe_id"`
		}
	}
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for _, e := range list.Entries {
		got[e.SPIFFEID] = e.ID
	}
	return got
}

// remains makes the folder of a member that ran once: it has three entries, and was stopped, or killed.
func remains(t *testing.T, ctx context.Context, kill bool) string {
	t.Helper()
	p := newPlace(t, "ca-1", "")
	p.start(t, ctx, "")
	for i := range 3 {
		if _, err := p.Member.Admin(ctx, bin, "entry", "create", "-s", fmt.Sprint("unix:uid:", i), "-s", "agent:kind:join_token", "--id", fmt.Sprintf("spiffe://%s/entry-%d", trustDomain, i)); err != nil {
			t.Fatal(err)
		}
	}
	if kill {
		p.Process.Kill()
	} else if p.Process.Stop(); p.Process.Code() != 0 {
		t.Errorf("stopped: exit code %d, want 0", p.Process.Code())
	}
	return p.data("")
}

func testContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 8*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// TestStartOnFoldersThatAreNotRight starts a member on the data folders that operators and broken disks leave.
func TestStartOnFoldersThatAreNotRight(t *testing.T) {
	t.Parallel()
	ctx := testContext(t)
	stopped, killed := remains(t, ctx, false), remains(t, ctx, true)
	const ok = -1
	for name, c := range map[string]struct {
		data    string
		prepare func(*testing.T, *place)
		more    string // configuration
		code    int
		says    []string
	}{
		"as it was stopped": {stopped, nil, "", ok, nil},
		"as it was killed":  {killed, nil, "", ok, []string{"discarding the state", "not closed cleanly"}},
		"loose permissions": {stopped, func(t *testing.T, p *place) { chmod(t, p.data(""), 0o755) }, "", exitFailure,
			[]string{"data_dir", "chmod 0700 ", "0755"}},
		"another trust domain": {stopped, func(_ *testing.T, p *place) {
			p.yaml = strings.Replace(p.yaml, "trust_domain: "+trustDomain, "trust_domain: other.test", 1)
		}, "", exitFailure, []string{`trust domain "process.test", not "other.test"`, "name another folder"}},
		"another member's name": {stopped, func(_ *testing.T, p *place) {
			p.yaml = strings.Replace(p.yaml, "name: ca-1", "name: ca-2", 1)
		}, "", exitFailure, []string{`belongs to member "ca-1", not "ca-2"`, "name another folder"}},

		"truncated state": {stopped, func(t *testing.T, p *place) { change(t, p.data("state/state.db"), half) }, "", ok,
			[]string{"discarding the state", "state.db"}},
		"empty state": {stopped, func(t *testing.T, p *place) { change(t, p.data("state/state.db"), func([]byte) []byte { return nil }) }, "", ok,
			[]string{"discarding the state", "state.db"}},
		"flipped bit in the state": {stopped, func(t *testing.T, p *place) { change(t, p.data("state/state.db"), flip(9000)) }, "", ok,
			[]string{"discarding the state", "checksum"}},
		"no state": {stopped, func(t *testing.T, p *place) { removeAll(t, p.data("state")) }, "", ok, nil},
		"damaged header of the state": {stopped, func(t *testing.T, p *place) { change(t, p.data("state/format.json"), half) }, "", exitUsage,
			[]string{"state/format.json", "damaged", "remove the folder's contents"}},

		"flipped byte in the log": {stopped, func(t *testing.T, p *place) {
			change(t, p.data("raft/log.db"), func(b []byte) []byte { return bytes.ReplaceAll(b, []byte("entry-1"), []byte("entry-7")) })
		}, "", exitFailure, []string{"raft/log.db", "log entry ", "checksum does not match", "join it again"}},
		"flipped byte in the log, state lost": {killed, func(t *testing.T, p *place) {
			change(t, p.data("raft/log.db"), func(b []byte) []byte { return bytes.ReplaceAll(b, []byte("entry-1"), []byte("entry-7")) })
		}, "", exitFailure, []string{"raft/log.db", "log entry ", "checksum does not match", "join it again"}},
		"truncated log": {stopped, func(t *testing.T, p *place) {
			change(t, p.data("raft/log.db"), func(b []byte) []byte { return b[:bytes.LastIndex(b, []byte("entry-1"))] })
		}, "", exitFailure, []string{"raft/log.db", "damaged on disk", "join it again"}},
		"empty log": {stopped, func(t *testing.T, p *place) { change(t, p.data("raft/log.db"), func([]byte) []byte { return nil }) }, "", exitUsage,
			[]string{"raft/log.db is missing or empty", "join it again"}},
		"the log of another folder": {stopped, func(t *testing.T, p *place) { removeAll(t, p.data("raft")) }, "", exitUsage,
			[]string{"raft/log.db is missing or empty", "join it again"}},

		"truncated key-encryption key": {stopped, func(t *testing.T, p *place) { change(t, p.data("kek"), half) }, "", exitFailure,
			[]string{"/kek", "32 bytes", "restore it"}},
		"no key-encryption key": {stopped, func(t *testing.T, p *place) { removeAll(t, p.data("kek")) }, "", exitFailure,
			[]string{"/kek", "no such file", "restore that key"}},
		"another member's key-encryption key": {stopped, func(t *testing.T, p *place) {
			other, err := os.ReadFile(filepath.Join(killed, "kek"))
			if err != nil {
				t.Fatal(err)
			}
			writeFile(t, p.data("kek"), other)
		}, "", exitFailure, []string{"/keyring", "/kek does not open it", "restore that key"}},
		"loose key-encryption key": {stopped, func(t *testing.T, p *place) { chmod(t, p.data("kek"), 0o644) }, "", exitFailure, []string{"chmod 0600 ", "/kek"}},
		"truncated keyring":        {stopped, func(t *testing.T, p *place) { change(t, p.data("keyring"), half) }, "", exitFailure, []string{"/keyring", "damaged"}},
		"changed keyring": {stopped, func(t *testing.T, p *place) {
			change(t, p.data("keyring"), func(b []byte) []byte {
				i := bytes.Index(b, []byte(`"wrapped":"`)) + 20
				b[i] = map[bool]byte{true: 'B', false: 'A'}[b[i] == 'A'] // still base64
				return b
			})
		}, "", exitFailure, []string{"/keyring", "does not open it"}},
		"no keyring": {stopped, func(t *testing.T, p *place) { removeAll(t, p.data("keyring")) }, "", exitFailure, []string{"/keyring", "no such file"}},

		"damaged member.json": {stopped, func(t *testing.T, p *place) { change(t, p.data("member.json"), half) }, "", exitUsage, []string{"member.json is damaged", "restore it"}},
		"no member.json": {stopped, func(t *testing.T, p *place) { removeAll(t, p.data("member.json")) }, "", exitFailure,
			[]string{"member.json does not", "incomplete"}},
		"damaged authorities.json": {stopped, func(t *testing.T, p *place) { change(t, p.data("authorities.json"), half) }, "", exitUsage,
			[]string{"authorities.json is damaged", "remove it"}},
		"no authorities.json": {stopped, func(t *testing.T, p *place) { removeAll(t, p.data("authorities.json")) }, "", ok, nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newPlace(t, "ca-1", c.data)
			if c.prepare != nil {
				c.prepare(t, p)
			}
			if c.code != ok {
				p.notStarted(t, c.more, c.code, c.says...)
				return
			}
			ctx := testContext(t) // its own: it may have waited long for its turn
			p.start(t, ctx, c.more)
			got := p.entries(t, ctx)
			for i := range 3 {
				if id := fmt.Sprintf("spiffe://%s/entry-%d", trustDomain, i); got[id] == "" {
					t.Errorf("%s is lost: there are %v", id, got)
				}
			}
			log, err := os.ReadFile(filepath.Join(p.Member.Dir, "log"))
			if err != nil {
				t.Fatal(err)
			}
			for _, want := range c.says {
				if !strings.Contains(string(log), want) {
					t.Errorf("%q is not in its log", want)
				}
			}
		})
	}
}

func chmod(t *testing.T, path string, mode os.FileMode) {
	t.Helper()
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
}

func removeAll(t *testing.T, path string) {
	t.Helper()
	if err := os.RemoveAll(path); err != nil {
		t.Fatal(err)
	}
}

// TestStartWhatIsTaken starts processes on what another one uses.
func TestStartWhatIsTaken(t *testing.T) {
	t.Parallel()
	w := worldOf(t, 1, "")
	a := w.agent()
	live := w.Members[0]
	data := filepath.Join(live.Dir, "data")

	t.Run("the port", func(t *testing.T) {
		p := newPlace(t, "ca-2", "")
		p.yaml = strings.Replace(p.yaml, "listen: "+p.Address, "listen: "+live.Address, 1)
		p.notStarted(t, "", exitFailure, "listen: "+live.Address, "address already in use", "name another")
		if _, err := os.Stat(p.data("")); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("it made its data folder: %v", err)
		}
	})
	t.Run("the health port", func(t *testing.T) {
		p := newPlace(t, "ca-2", "")
		p.yaml = strings.Replace(p.yaml, "health: "+p.Health, "health: "+live.Health, 1)
		p.notStarted(t, "", exitFailure, "health: "+live.Health, "address already in use", "name another")
	})
	t.Run("the data folder", func(t *testing.T) {
		p := newPlace(t, "ca-1", "")
		p.yaml = strings.Replace(p.yaml, "data_dir: "+p.data(""), "data_dir: "+data, 1)
		p.notStarted(t, "", exitFailure, "data_dir", "another process uses folder "+data)
	})
	t.Run("the admin socket", func(t *testing.T) {
		p := newPlace(t, "ca-2", "")
		p.yaml = strings.Replace(p.yaml, "admin_socket: "+p.Socket, "admin_socket: "+live.Socket, 1)
		p.notStarted(t, "", exitFailure, "another process serves "+live.Socket)
		if _, err := live.Admin(w.ctx, bin, "status"); err != nil {
			t.Errorf("the socket's owner lost it: %v", err)
		}
	})
	t.Run("a dead process's admin socket", func(t *testing.T) {
		p := newPlace(t, "ca-2", "")
		stale(t, p.Socket)
		p.start(t, w.ctx, "")
		p.entries(t, w.ctx)
	})
	t.Run("a file in the admin socket's place", func(t *testing.T) {
		p := newPlace(t, "ca-2", "")
		writeFile(t, p.Socket, []byte("precious"))
		p.notStarted(t, "", exitFailure, p.Socket, "is not a socket", "move it away")
		if b, err := os.ReadFile(p.Socket); err != nil || string(b) != "precious" {
			t.Errorf("the file is gone: %q, %v", b, err)
		}
	})
	t.Run("the agent's socket", func(t *testing.T) {
		p := newPlace(t, "", "")
		token := w.admin("token", "create", "--agent")
		p.agentRefused(t, token, func(y string) string { return strings.Replace(y, p.agentSocket(), a.Socket, 1) }, exitFailure,
			"another process listens on the Workload API socket "+a.Socket)
		if _, err := net.Dial("unix", a.Socket); err != nil {
			t.Errorf("the socket's owner lost it: %v", err)
		}
		// The token was not spent on a start that could not succeed.
		stale(t, p.agentSocket())
		b := p.agentStarts(t, w.ctx, token)
		b.Stop()
		if _, err := os.Stat(p.agentSocket()); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the agent left its socket: %v", err)
		}
	})
	t.Run("the agent's health port", func(t *testing.T) {
		p := newPlace(t, "", "")
		p.agentRefused(t, w.admin("token", "create", "--agent"), func(y string) string { return strings.Replace(y, p.Health, a.Health, 1) }, exitFailure,
			"health: "+a.Health, "address already in use")
		if _, err := os.Stat(p.agentSocket()); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the agent left its socket: %v", err)
		}
	})
	t.Run("the agent's state folder", func(t *testing.T) {
		dir := cluster.StateDir(w.Dir, a.Name)
		if dir == "none" {
			t.Skip("there is no /dev/shm: this machine offers no tmpfs to test with")
		}
		p := newPlace(t, "", "")
		p.agentRefused(t, w.admin("token", "create", "--agent"), func(y string) string { return strings.Replace(y, "state_dir: none", "state_dir: "+dir, 1) }, exitFailure,
			"another process uses folder "+dir)
	})
	t.Run("a state folder on a disk", func(t *testing.T) {
		p := newPlace(t, "", "")
		dir := filepath.Join(p.Member.Dir, "state")
		if onTmpfs(t, p.Member.Dir) {
			t.Skip("the temporary folder is a tmpfs here: there is no disk to test with")
		}
		p.agentRefused(t, w.admin("token", "create", "--agent"), func(y string) string { return strings.Replace(y, "state_dir: none", "state_dir: "+dir, 1) }, exitUsage,
			dir, "not on a tmpfs", "/run")
	})
}

func onTmpfs(t *testing.T, dir string) bool {
	t.Helper()
	var st syscall.Statfs_t
	if err := syscall.Statfs(dir, &st); err != nil {
		t.Fatal(err)
	}
	return st.Type == 0x01021994 // TMPFS_MAGIC
}

// stale leaves a socket that nobody listens on.
func stale(t *testing.T, path string) {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
}

func (p *place) agentSocket() string { return filepath.Join(p.Member.Dir, "agent.sock") }

// agentFile writes an agent's configuration and join token.
func (p *place) agentFile(t *testing.T, token string, edit func(string) string) string {
	t.Helper()
	join, file := filepath.Join(p.Member.Dir, "agent-join"), filepath.Join(p.Member.Dir, "agent.yaml")
	writeFile(t, join, []byte(token))
	yaml := fmt.Sprintf("version: 1\ntrust_domain: %s\nsocket: %s\nstate_dir: none\nhealth: %s\nattest: {join_token_file: %s}\n", trustDomain, p.agentSocket(), p.Health, join)
	if edit != nil {
		yaml = edit(yaml)
	}
	writeFile(t, file, []byte(yaml))
	return file
}

func (p *place) agentRefused(t *testing.T, token string, edit func(string) string, code int, words ...string) string {
	t.Helper()
	said := p.refused(t, code, words, "countersign-agent", "run", "-c", p.agentFile(t, token, edit))
	if parsed, err := node.ParseToken(token); err == nil && strings.Contains(said, parsed.Secret) {
		t.Errorf("it said the token's secret: %s", said)
	}
	return said
}

// agentStarts runs an agent until it is ready.
func (p *place) agentStarts(t *testing.T, ctx context.Context, token string) *cluster.Process {
	t.Helper()
	var out bytes.Buffer
	proc, err := p.Cluster.Start("agent", nil, &out, filepath.Join(bin, "countersign-agent"), "run", "-c", p.agentFile(t, token, nil))
	if err != nil {
		t.Fatal(err)
	}
	untilReady(t, ctx, proc, p.Health)
	return proc
}

// TestStartConfiguration shows that every fault of a file is said at once, and nothing is done.
func TestStartConfiguration(t *testing.T) {
	t.Parallel()
	long := filepath.Join(os.TempDir(), strings.Repeat("long", 30), "x.sock")
	for name, c := range map[string]struct {
		more string
		edit func(*place)
		says []string
	}{
		"an unknown field":                   {"listn: 127.0.0.1:1\n", nil, []string{"line 8", "listn"}},
		"two faults at once":                 {"x509_ttl: 1s\njwt_ttl: 48h\n", nil, []string{"x509_ttl is 1s", "jwt_ttl is 48h"}},
		"a fault of form and one of content": {"listn: 127.0.0.1:1\nx509_ttl: 1s\n", nil, []string{"listn", "x509_ttl is 1s"}},
		"a version of the future":            {"", func(p *place) { p.yaml = strings.Replace(p.yaml, "version: 1", "version: 9", 1) }, []string{"version 9 is newer"}},
		"a socket's path too long":           {"", func(p *place) { p.yaml = strings.Replace(p.yaml, p.Socket, long, 1) }, []string{"admin socket", "107", "choose a shorter one"}},
		"an x509pop CA without certificates": {"x509pop: {ca_file: /dev/null}\n", nil, []string{"/dev/null", "is not a regular file"}},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPlace(t, "ca-1", "")
			if c.edit != nil {
				c.edit(p)
			}
			p.notStarted(t, c.more, exitUsage, c.says...)
			if _, err := os.Stat(p.data("")); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("it made its data folder: %v", err)
			}
		})
	}
	t.Run("no file", func(t *testing.T) {
		p := newPlace(t, "ca-1", "")
		p.refused(t, exitFailure, []string{"reading the configuration", "/absent.yaml"}, "countersign", "server", "run", "-c", "/absent.yaml")
		p.refused(t, exitFailure, []string{"reading the configuration", "/absent.yaml"}, "countersign-agent", "run", "-c", "/absent.yaml")
	})
	token, err := node.FormatToken(node.Token{Addresses: []string{"127.0.0.1:1"}, Pin: "sha256:" + strings.Repeat("00", 32), Secret: first(node.NewSecret()), Purpose: "agent"})
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		edit func(p *place, yaml string) string
		says []string
	}{
		"the agent's unknown field":   {func(_ *place, y string) string { return y + "sokcet: /x\n" }, []string{"line 7", "sokcet"}},
		"two faults of the agent's":   {func(_ *place, y string) string { return y + "key_type: dsa\nservers: [nowhere]\n" }, []string{"key_type \"dsa\"", "servers \"nowhere\""}},
		"the agent's socket too long": {func(p *place, y string) string { return strings.Replace(y, p.agentSocket(), long, 1) }, []string{"Workload API socket", "107", "choose a shorter one"}},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPlace(t, "", "")
			p.agentRefused(t, token, func(y string) string { return c.edit(p, y) }, exitUsage, c.says...)
		})
	}
}

func first[A, B any](a A, _ B) A { return a }

// TestNoCoreFiles: neither program leaves its memory on disk when it dies.
func TestNoCoreFiles(t *testing.T) {
	w := worldOf(t, 1, "")
	a := w.agent()
	for name, pid := range map[string]int{"member": w.Members[0].PID(), "agent": a.PID()} {
		limits, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", pid))
		if err != nil {
			t.Fatal(err)
		}
		found := false
		for line := range strings.Lines(string(limits)) {
			if rest, ok := strings.CutPrefix(line, "Max core file size"); ok {
				found = true
				if f := strings.Fields(rest); len(f) < 2 || f[0] != "0" || f[1] != "0" {
					t.Errorf("%s: core file size %v", name, f)
				}
			}
		}
		if !found {
			t.Errorf("%s: no core file limit in %s", name, limits)
		}
	}
}
