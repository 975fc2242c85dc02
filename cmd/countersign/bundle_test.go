package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/go-jose/go-jose/v4"

	"countersign.io/countersign/cmd/internal/cli"
)

// TestBundleCommands keeps another trust domain's bundle by hand.
func TestBundleCommands(t *testing.T) {
	s, partner := newSide(t, "one.test", ""), newSide(t, "two.test", "")
	dir := t.TempDir()
	save := func(name, content string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	spiffe, _ := partner.run(0, "", "bundle", "show", "--format", "spiffe")
	pem, _ := partner.run(0, "", "bundle", "show", "--format", "pem")
	file := save("two.json", spiffe)

	out, _ := s.run(0, "", "bundle", "show", "one.test", "--format", "jwks")
	var set jose.JSONWebKeySet
	if err := json.Unmarshal([]byte(out), &set); err != nil || len(set.Keys) != 1 || set.Keys[0].Use != "sig" || set.Keys[0].KeyID == "" || !set.Keys[0].Valid() {
		t.Errorf("the JWKS: %v: %s", err, out)
	}
	if out, _ := s.run(0, "", "bundle", "count"); out != "1" {
		t.Errorf("%s bundles", out)
	}
	// Nothing is federated with yet.
	s.run(cli.ExitNotFound, "", "bundle", "set", "two.test", "--file", file)
	s.run(cli.ExitNotFound, "", "bundle", "show", "two.test")
	s.run(cli.ExitNotFound, "", "bundle", "delete", "two.test")

	// An endpoint that nobody serves: what is pinned is what there is.
	s.run(0, "", "federation", "create", "two.test", "--profile", "https_web", "--url", "https://127.0.0.1:1/")
	if _, e := s.run(cli.ExitNotFound, "", "bundle", "show", "two.test"); !strings.Contains(e, "federation show") {
		t.Errorf("without a bundle: %s", e)
	}
	if out, _ := s.run(0, "", "bundle", "set", "two.test", "--file", file, "--dry-run"); !strings.Contains(out, "nothing was changed") {
		t.Errorf("a dry run: %s", out)
	}
	if out, _ := s.run(0, "", "bundle", "count"); out != "1" {
		t.Errorf("%s bundles after a dry run", out)
	}
	s.run(0, "", "bundle", "set", "two.test", "--file", file)
	if out, _ := s.run(0, "", "bundle", "show", "two.test", "--format", "pem"); out != pem {
		t.Errorf("pinned %s, want %s", out, pem)
	}
	if out, _ := s.run(0, "", "bundle", "set", "two.test", "--file", file); !strings.Contains(out, "jwt authority") {
		t.Errorf("again: %s", out)
	}
	out, _ = s.run(0, "", "bundle", "set", "two.test", "--format", "pem", "--file", save("two.pem", pem))
	if !strings.Contains(out, "jwt authority") {
		t.Errorf("the JWT keys went with the PEM file: %s", out)
	}
	if out, _ := s.run(0, "", "bundle", "list"); !strings.Contains(out, "two.test") || !strings.Contains(out, "pinned") || !strings.Contains(out, "own") {
		t.Errorf("the list: %s", out)
	}
	for _, format := range []string{"json", "yaml"} {
		if out, _ := s.run(0, "", "bundle", "list", "-o", format); !strings.Contains(out, "two.test") {
			t.Errorf("as %s: %s", format, out)
		}
	}
	for what, bad := range map[string][]string{
		"garbage":             {"--file", save("garbage", "{")},
		"nothing":             {"--file", save("nothing", ""), "--format", "pem"},
		"a leaf's PEM":        {"--file", save("text", pem+"\nhello\n"), "--format", "pem"},
		"an unknown format":   {"--file", file, "--format", "der"},
		"no file":             {},
		"a file that is gone": {"--file", filepath.Join(dir, "none")},
	} {
		if _, e := s.run(cli.ExitUsage, "", append([]string{"bundle", "set", "two.test"}, bad...)...); e == "" {
			t.Errorf("%s: no error", what)
		}
	}
	if out, _ := s.run(0, "", "bundle", "show", "two.test", "--format", "pem"); out != pem {
		t.Error("what was refused changed something")
	}
	s.run(0, "", "bundle", "delete", "two.test", "--dry-run")
	s.run(0, "", "bundle", "delete", "two.test")
	s.run(cli.ExitNotFound, "", "bundle", "show", "two.test")
}
