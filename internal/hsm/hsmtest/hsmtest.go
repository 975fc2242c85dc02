// Package hsmtest makes SoftHSM tokens for tests: a real PKCS#11 module, with keys in files.
package hsmtest

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// tokens is how many tokens Run makes. A process of SoftHSM's does not see those that others make later.
const tokens = 8

// Run runs a package's tests with a folder of SoftHSM's own, with tokens for New; call it from TestMain. SoftHSM reads where
// its tokens are once in a process.
func Run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "softhsm")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	conf, err := Configure(dir)
	if err != nil {
		panic(err)
	}
	if err := os.Setenv("SOFTHSM2_CONF", conf); err != nil {
		panic(err)
	}
	if Module() != "" {
		for range tokens {
			t, err := Make()
			if err == nil {
				err = os.WriteFile(filepath.Join(dir, t.Label+".free"), []byte(t.PIN), 0o600)
			}
			if err != nil {
				panic(err)
			}
		}
	}
	return m.Run()
}

// Configure makes a folder for tokens in dir and returns the file to be named as SOFTHSM2_CONF.
func Configure(dir string) (conf string, err error) {
	if err := os.MkdirAll(filepath.Join(dir, "tokens"), 0o700); err != nil {
		return "", err
	}
	conf = filepath.Join(dir, "softhsm2.conf")
	text := "directories.tokendir = " + filepath.Join(dir, "tokens") + "\nobjectstore.backend = file\nlog.level = ERROR\nslots.removable = false\n"
	return conf, os.WriteFile(conf, []byte(text), 0o600)
}

// Token is a token with a user's PIN.
type Token struct {
	Module, Label, PIN, PINFile string
}

// Make makes a token where SOFTHSM2_CONF says.
func Make() (Token, error) {
	random := make([]byte, 6)
	rand.Read(random)
	t := Token{Module: Module(), Label: "t-" + hex.EncodeToString(random)}
	rand.Read(random)
	t.PIN = "4711-" + hex.EncodeToString(random)
	out, err := exec.Command("softhsm2-util", "--init-token", "--free", "--label", t.Label, "--so-pin", "officer-"+t.Label, "--pin", t.PIN, "--module", t.Module).CombinedOutput()
	if err != nil {
		err = fmt.Errorf("making a token: %w: %s", err, out)
	}
	return t, err
}

// New takes a token of Run's that no other test has, and skips the test where SoftHSM is not installed.
func New(t testing.TB) Token {
	t.Helper()
	if Module() == "" {
		t.Skip("SoftHSM is not installed (softhsm2-util and libsofthsm2.so): no PKCS#11 token to test with")
	}
	free, err := filepath.Glob(filepath.Join(filepath.Dir(os.Getenv("SOFTHSM2_CONF")), "*.free"))
	if err != nil || len(free) == 0 {
		t.Fatalf("no token is left (Run makes %d), %v", tokens, err)
	}
	pin, err := os.ReadFile(free[0])
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(free[0]); err != nil {
		t.Fatal(err)
	}
	tok := Token{Module: Module(), Label: strings.TrimSuffix(filepath.Base(free[0]), ".free"), PIN: string(pin)}
	tok.PINFile = filepath.Join(t.TempDir(), "pin")
	if err := os.WriteFile(tok.PINFile, []byte(tok.PIN+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return tok
}

// Module is the path of SoftHSM's module; empty if it is not installed.
func Module() string {
	if _, err := exec.LookPath("softhsm2-util"); err != nil {
		return ""
	}
	for _, p := range []string{"/usr/lib/softhsm/libsofthsm2.so", "/usr/lib64/softhsm/libsofthsm2.so", "/usr/lib64/pkcs11/libsofthsm2.so"} {
		if _, err := os.Stat(p); err == nil {
			return p
		}
	}
	return ""
}

// URI names a key of the token by its label.
func (t Token) URI(object string) string {
	return "pkcs11:token=" + t.Label + ";object=" + object + "?module-path=" + t.Module + "&pin-source=" + t.PINFile
}
