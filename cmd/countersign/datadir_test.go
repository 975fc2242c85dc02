package main

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"countersign.io/countersign/config"
	"countersign.io/countersign/identity"
	"countersign.io/countersign/internal/durable"
)

func serverConfig(dir string) *config.Server {
	return &config.Server{TrustDomain: "example.org", Name: "ca-1", DataDir: filepath.Join(dir, "data")}
}

func openClose(t *testing.T, c *config.Server) error {
	t.Helper()
	d, err := openDataDir(context.Background(), c, nil)
	if err != nil {
		return err
	}
	return d.Close()
}

// TestDataDirCrashes leaves a bootstrap's folder as a crash after each file would, and opens it again.
func TestDataDirCrashes(t *testing.T) {
	files := []string{"lock", "kek", "keyring", "member.json"} // in the order of their writing
	for n := range len(files) + 1 {
		c := serverConfig(t.TempDir())
		if err := openClose(t, c); err != nil {
			t.Fatal(err)
		}
		for _, f := range files[n:] {
			if err := os.Remove(filepath.Join(c.DataDir, f)); err != nil {
				t.Fatal(err)
			}
		}
		if err := openClose(t, c); err != nil {
			t.Errorf("a crash after %v: %v", files[:n], err)
		}
	}
}

// TestDataDirIncomplete: a member's log or state without its name is not begun anew.
func TestDataDirIncomplete(t *testing.T) {
	for _, kept := range []string{"raft", "state"} {
		c := serverConfig(t.TempDir())
		if err := os.MkdirAll(filepath.Join(c.DataDir, kept), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(c.DataDir, 0o700); err != nil {
			t.Fatal(err)
		}
		err := openClose(t, c)
		if !errors.Is(err, identity.ErrPrecondition) || !strings.Contains(err.Error(), "incomplete") {
			t.Errorf("%s: %v", kept, err)
		}
		if _, err := os.Stat(filepath.Join(c.DataDir, "keyring")); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: it made a keyring: %v", kept, err)
		}
	}
}

func TestDataDirLocked(t *testing.T) {
	c := serverConfig(t.TempDir())
	d, err := openDataDir(context.Background(), c, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := openClose(t, c); !errors.Is(err, durable.ErrLocked) {
		t.Errorf("opened twice: %v", err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if err := openClose(t, c); err != nil {
		t.Errorf("after its owner's end: %v", err)
	}
	c.Name = "ca-2"
	if err := openClose(t, c); !errors.Is(err, identity.ErrPrecondition) || !strings.Contains(err.Error(), `belongs to member "ca-1"`) {
		t.Errorf("another's: %v", err)
	}
	c.Name = "ca-1" // a refused start let the folder go
	if err := openClose(t, c); err != nil {
		t.Error(err)
	}
}

func TestAuthoritiesFile(t *testing.T) {
	c := serverConfig(t.TempDir())
	d, err := openDataDir(context.Background(), c, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if got, err := d.loadAuthorities(); err != nil || got != nil {
		t.Errorf("before there are any: %v, %v", got, err)
	}
	if err := d.saveAuthorities([]identity.Authority{{ID: "a1", Kind: identity.AuthorityX509}}); err != nil {
		t.Fatal(err)
	}
	if got, err := d.loadAuthorities(); err != nil || len(got) != 1 || got[0].ID != "a1" {
		t.Errorf("%v, %v", got, err)
	}
	for _, bad := range []string{"", "{", `{"version":2}`, `[]`} {
		if err := os.WriteFile(d.file("authorities.json"), []byte(bad), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := d.loadAuthorities(); !errors.Is(err, identity.ErrInvalid) || !strings.Contains(err.Error(), "authorities.json is damaged or of a newer release") {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

// FuzzMemberFile: whatever lies there, only this member's own file is accepted.
func FuzzMemberFile(f *testing.F) {
	if seeds, err := filepath.Glob("testdata/fuzz/FuzzMemberFile/*"); err != nil || len(seeds) < 3 {
		f.Fatalf("found %d seeds: %v", len(seeds), err)
	}
	c := serverConfig("/absent")
	f.Fuzz(func(t *testing.T, raw []byte) {
		d := &dataDir{path: c.DataDir, td: spiffeid.RequireTrustDomainFromString(c.TrustDomain)}
		err := d.check(raw, c)
		if err != nil {
			if !errors.Is(err, identity.ErrInvalid) && !errors.Is(err, identity.ErrPrecondition) {
				t.Errorf("%q: %v", raw, err)
			}
			return
		}
		var m memberFile
		if json.Unmarshal(raw, &m) != nil || m.Version != 1 || m.TrustDomain != c.TrustDomain || m.Name != c.Name {
			t.Errorf("%q is accepted", raw)
		}
	})
}

// TestLogGone: a member that ran does not begin anew because its log is gone.
func TestLogGone(t *testing.T) {
	for name, left := range map[string]string{
		"a cluster that it began":       "authorities.json",
		"members that it knew":          "raft/peers.json",
		"a snapshot":                    "raft/snapshots/2-10-1/meta.json",
		"nothing: it never came so far": "",
	} {
		for _, log := range []string{"missing", "empty", "there"} {
			d := &dataDir{path: t.TempDir(), member: memberFile{Bootstrap: true}}
			write := func(file, content string) {
				if err := os.MkdirAll(filepath.Dir(d.file(file)), 0o700); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(d.file(file), []byte(content), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if left != "" {
				write(left, "{}")
			}
			switch log {
			case "empty":
				write("raft/log.db", "")
			case "there":
				write("raft/log.db", "x")
			}
			err := d.checkLog()
			if bad := log != "there" && left != ""; bad != (err != nil) || bad && (!errors.Is(err, identity.ErrInvalid) || !strings.Contains(err.Error(), "log.db")) {
				t.Errorf("%s, log %s: %v", name, log, err)
			}
		}
	}
}
