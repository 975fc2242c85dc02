package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"countersign.io/countersign/cmd/internal/cli"
	"countersign.io/countersign/config"
)

// installation is a member's files as a package would lay them out, with nothing wrong but the key beside the data.
func installation(t *testing.T, more string) *localConfig {
	t.Helper()
	dir := t.TempDir()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for name, mode := range map[string]os.FileMode{"data": 0o700, "data/audit": 0o700, "run": 0o755, "backup": 0o700} {
		must(os.MkdirAll(filepath.Join(dir, name), 0o700))
		must(os.Chmod(filepath.Join(dir, name), mode))
	}
	for name, mode := range map[string]os.FileMode{"server.yaml": 0o644, "data/kek": 0o600, "data/keyring": 0o600, "data/member.json": 0o600, "run/admin.sock": 0o600, "join": 0o600, "token": 0o600} {
		must(os.WriteFile(filepath.Join(dir, name), nil, 0o600))
		must(os.Chmod(filepath.Join(dir, name), mode))
	}
	c, err := config.ParseServer("x", fmt.Appendf(nil, "version: 1\ntrust_domain: example.org\nname: m1\ndata_dir: %s/data\nadmin_socket: %s/run/admin.sock\nbackup: {dir: %s/backup}\njoin_token_file: %s/join\nseal: {vault: {address: 'https://v', token_file: %s/token}}\n%s",
		dir, dir, dir, dir, dir, more))
	must(err)
	return &localConfig{filepath.Join(dir, "server.yaml"), c}
}

func TestCheckFiles(t *testing.T) {
	found := func(c *localConfig) (out []string) {
		r := &checkReport{}
		examineFiles(r, c)
		dir := filepath.Dir(c.path)
		for _, f := range r.Findings {
			if f.Todo == "" {
				t.Errorf("%v says not what to do", f)
			}
			out = append(out, f.Severity+" "+f.Check+" "+strings.TrimPrefix(strings.TrimPrefix(f.Where, dir), "/"))
		}
		slices.Sort(out)
		return out
	}
	const beside = "warning kek-here data/kek"
	if got := found(installation(t, "")); !slices.Equal(got, []string{beside}) {
		t.Errorf("found %q", got)
	}
	for name, mode := range map[string]os.FileMode{
		"server.yaml": 0o664, "data": 0o750, "data/keyring": 0o640, "data/kek": 0o604, "data/member.json": 0o602, "data/audit": 0o701, "run": 0o777, "run/admin.sock": 0o666,
		"backup": 0o770, "join": 0o644, "token": 0o440,
	} {
		c := installation(t, "")
		if err := os.Chmod(filepath.Join(filepath.Dir(c.path), name), mode); err != nil {
			t.Fatal(err)
		}
		if got := found(c); !slices.Equal(got, slices.Sorted(slices.Values([]string{beside, "error files " + name}))) {
			t.Errorf("%s with %#o: found %q", name, mode, got)
		}
	}
	// A folder that everybody may write to and nobody may take another's file out of is no danger.
	c := installation(t, "")
	if err := os.Chmod(filepath.Join(filepath.Dir(c.path), "run"), 0o777|os.ModeSticky); err != nil {
		t.Fatal(err)
	}
	if got := found(c); len(got) != 1 {
		t.Errorf("found %q", got)
	}
	// A key elsewhere is nobody's business here.
	c = installation(t, "")
	c.Seal.Key, c.Backup.Key = "pkcs11:token=x", "pkcs11:token=x"
	if got := found(c); len(got) != 0 {
		t.Errorf("found %q", got)
	}
}

func TestCheckClock(t *testing.T) {
	at := time.Now()
	for told, want := range map[time.Duration]string{
		0: "", time.Second: "", 500 * time.Millisecond: "", -time.Second: "",
		4 * time.Second: "warning", -4 * time.Second: "warning", time.Minute: "error", -time.Hour: "error",
	} {
		r := &checkReport{}
		compareClocks(r, at, at.Add(told), at.Add(time.Second))
		got := ""
		if len(r.Findings) > 0 {
			got = r.Findings[0].Severity
			if behind := strings.Contains(r.Findings[0].What, "behind"); behind != (told > 0) {
				t.Errorf("%v: %s", told, r.Findings[0].What)
			}
		}
		if got != want {
			t.Errorf("%v: %q, want %q", told, got, want)
		}
	}
}

func TestCheckOrderAndVerdict(t *testing.T) {
	r := &checkReport{}
	r.find(isNotice, "members", "a", "x", "y")
	r.find(isWarning, "kek", "b", "x", "y")
	r.find(isError, "clock", "c", "x", "y")
	r.find(isWarning, "backups", "d", "x", "y")
	r.order([]string{"kek"})
	var got []string
	for _, f := range r.Findings {
		got = append(got, f.Check)
	}
	if !slices.Equal(got, []string{"clock", "backups", "members"}) || r.Ignored != 1 {
		t.Errorf("%v, %d ignored", got, r.Ignored)
	}
	if err := r.verdict(); cli.ExitCode(err) != cli.ExitFailure || !strings.Contains(err.Error(), "1 errors and 1 warnings") {
		t.Errorf("got %v", err)
	}
	r.order([]string{"clock", "backups"})
	if err := r.verdict(); err != nil {
		t.Errorf("a notice is no reason: %v", err)
	}
}

// Without a member what can be seen from here is told, and then that there is none.
func TestCheckWithoutAMember(t *testing.T) {
	t.Setenv("COUNTERSIGN_ADMIN_SOCKET", filepath.Join(t.TempDir(), "none"))
	c := installation(t, "")
	text := fmt.Sprintf("version: 1\ntrust_domain: example.org\nname: m1\ndata_dir: %s\nadmin_socket: %s\n", c.DataDir, c.AdminSocket)
	if err := os.WriteFile(c.path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Join(c.DataDir, "keyring"), 0o644); err != nil {
		t.Fatal(err)
	}
	code, out, errOut := command("check", "-c", c.path)
	if code != cli.ExitUnavailable || !strings.Contains(out, "keyring") || !strings.Contains(errOut, "is it running?") {
		t.Errorf("exit code %d: %s%s", code, out, errOut)
	}
	if code, _, errOut := command("check", "-c", c.path+".no"); code != cli.ExitUsage || errOut == "" {
		t.Errorf("exit code %d: %s", code, errOut)
	}
}
