package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"countersign.io/countersign/integration/cluster"
	"countersign.io/countersign/internal/hsm/hsmtest"
)

// TestRotationInToken replaces an authority whose key is in a PKCS#11 token (SoftHSM, for real) by one with another key there. It
// is refused while ca.key names the same key, and nothing signs with the new one before every member can.
func TestRotationInToken(t *testing.T) {
	if hsmtest.Module() == "" {
		t.Skip("SoftHSM is not installed (softhsm2-util and libsofthsm2.so): no PKCS#11 token to test with")
	}
	dir := t.TempDir()
	conf, err := hsmtest.Configure(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("SOFTHSM2_CONF", conf)
	tok, err := hsmtest.Make()
	if err != nil {
		t.Fatal(err)
	}
	tok.PINFile = filepath.Join(dir, "pin")
	if err := os.WriteFile(tok.PINFile, []byte(tok.PIN), 0o600); err != nil {
		t.Fatal(err)
	}
	was, is := tok.URI("ca-2030"), tok.URI("ca-2031")
	r := newRotation(t, shortLives+fmt.Sprintf("ca:\n  key: %q\n", was))
	old := r.state().in("x509", "active")[0]
	for _, args := range [][]string{{"bundle", "rotate"}, {"bundle", "prepare"}, {"authority", "taint", "--now"}} {
		if _, err := r.Admin(r.ctx, args...); err == nil || !strings.Contains(err.Error(), "ca.old_keys") {
			t.Errorf("%v with the same key: %v", args, err)
		}
	}
	moved := func(m *cluster.Member) {
		t.Helper()
		yaml := filepath.Join(m.Dir, "server.yaml")
		text, err := os.ReadFile(yaml)
		if err != nil {
			t.Fatal(err)
		}
		from, to := fmt.Sprintf("key: %q\n", was), fmt.Sprintf("key: %q\n  old_keys: [%q]\n", is, was)
		if !strings.Contains(string(text), from) {
			t.Fatalf("no ca.key in %s", text)
		}
		if err := os.WriteFile(yaml, []byte(strings.Replace(string(text), from, to, 1)), 0o600); err != nil {
			t.Fatal(err)
		}
		m.Kill()
		if err := r.RestartMember(r.ctx, m); err != nil {
			t.Fatal(err)
		}
	}
	late := r.Leader(r.ctx)
	if late == nil {
		t.Fatal("no leader")
	}
	for _, m := range r.Members {
		if m != late {
			moved(m)
		}
	}
	// Whoever leads: the one that knows the old key only can neither make the new authority nor sign under it.
	r.admin("bundle", "rotate") // at whichever member knows the new key
	r.reaches("x509", "it waits for the member that has not the new key", func(s rotationStatus) bool {
		said := s.Problem
		for _, w := range s.Gate.Waiting {
			said += w.Because
		}
		return s.Phase == "prepare" && strings.Contains(said, "ca.old_keys") || s.Phase == "activate" && strings.Contains(said, "could not sign under it")
	})
	if s := r.state(); s.in("x509", "active")[0] != old {
		t.Error("the new one signs already")
	}
	r.shaken()
	moved(late)
	r.reaches("x509", "the rotation ends", phase("done"))
	r.shaken()
	list := r.admin("authority", "list")
	if !strings.Contains(list, is) || strings.Contains(list, tok.PIN) {
		t.Errorf("the authorities: %s", list)
	}
	if s := r.state(); len(s.in("x509", "revoked")) != 1 || len(s.Bundle.X509Authorities) != 1 || s.in("x509", "active")[0] == old {
		t.Errorf("%+v", s)
	}
}
