package integration

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"countersign.io/countersign/identity"
	"countersign.io/countersign/integration/cluster"
	"countersign.io/countersign/internal/hsm/hsmtest"
)

// sealStatus is what "seal status -o json" says.
type sealStatus struct {
	Terms []struct {
		Number uint32 `json:"number"`
		State  string `json:"state"`
		KeyID  string `json:"key_id"`
		Values string `json:"values"`
	} `json:"terms"`
	Members   []sealMember `json:"members"`
	Values    string       `json:"values"` // of none, empty
	ValuesOld string       `json:"values_old"`
}

type sealMember struct {
	ID      string   `json:"id"`
	KEK     string   `json:"kek"`
	Terms   []uint32 `json:"terms"`
	Problem string   `json:"problem"`
}

func (w *world) sealStatus(m *cluster.Member) sealStatus {
	w.t.Helper()
	out, err := m.Admin(w.ctx, w.Bin, "seal", "status", "-o", "json")
	if err != nil {
		w.t.Fatal(err)
	}
	var s sealStatus
	if err := json.Unmarshal([]byte(out), &s); err != nil {
		w.t.Fatalf("%v: %s", err, out)
	}
	return s
}

// active is the term that seals; 0 before there is one on record.
func (s sealStatus) active() uint32 {
	for _, t := range s.Terms {
		if t.State == "active" {
			return t.Number
		}
	}
	return 0
}

func (w *world) untilSeal(what string, ok func(sealStatus) bool, on ...*cluster.Member) {
	w.t.Helper()
	for _, m := range on {
		last := ""
		w.untilSeen(what+" on "+m.Name, func() bool {
			out, err := m.Admin(w.ctx, w.Bin, "seal", "status", "-o", "json")
			var s sealStatus
			if last = out; err != nil {
				last = err.Error()
			}
			done := err == nil && json.Unmarshal([]byte(out), &s) == nil && ok(s)
			return done
		}, &last)
	}
}

// untilSeen waits for what must happen, and says what was last seen if it does not.
func (w *world) untilSeen(what string, ok func() bool, last *string) {
	w.t.Helper()
	for end := time.Now().Add(90 * time.Second); !ok(); time.Sleep(100 * time.Millisecond) {
		if time.Now().After(end) {
			w.t.Fatalf("never happened: %s; last: %s", what, *last)
		}
	}
}

func recorded(s sealStatus) bool { return s.active() == 1 && s.ValuesOld == "" && len(s.Members) >= 1 }

func activeIs(n uint32) func(sealStatus) bool {
	return func(s sealStatus) bool { return s.active() == n && s.ValuesOld == "" && s.Values != "" }
}

// TestSealRotation rotates on a running cluster: on the leader, on another, with a member down, and with the leader
// killed in the middle; agents and members that start again never lack a key.
func TestSealRotation(t *testing.T) {
	w := newWorld(t, 3, "")
	w.untilSeal("the first data key is on record", func(s sealStatus) bool { return recorded(s) && len(s.Members) == 3 }, w.Members...)
	leader := w.Leader(w.ctx)
	if leader == nil {
		t.Fatal("no leader")
	}
	follower := w.Members[slices.IndexFunc(w.Members, func(m *cluster.Member) bool { return m != leader })]

	for i, m := range []*cluster.Member{leader, follower} {
		out, err := m.Admin(w.ctx, w.Bin, "seal", "rotate")
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(out, "data key") || !strings.Contains(out, "done") {
			t.Errorf("rotating on %s said:\n%s", m.Name, out)
		}
		w.untilSeal("everything is sealed anew", activeIs(uint32(2+i)), w.Members...)
	}

	// A member that is down is waited for; it catches up by itself.
	third := w.Members[slices.IndexFunc(w.Members, func(m *cluster.Member) bool { return m != leader && m != follower })]
	third.Kill()
	done := make(chan string, 1)
	go func() {
		out, err := leader.Admin(w.ctx, w.Bin, "seal", "rotate")
		done <- fmt.Sprint(out, err)
	}()
	w.untilSeal("the third data key waits", func(s sealStatus) bool {
		return len(s.Terms) == 4 && s.Terms[3].State == "pending" && s.active() == 3
	}, leader, follower)
	if out, err := follower.Admin(w.ctx, w.Bin, "seal", "rotate", "--timeout", "1s"); err == nil || !strings.Contains(err.Error(), "goes on by itself") {
		t.Errorf("a watcher that gives up: %s, %v", out, err)
	}
	select {
	case out := <-done:
		t.Errorf("rotated without %s: %s", third.Name, out)
	default:
	}
	if err := w.RestartMember(w.ctx, third); err != nil {
		t.Fatal(err)
	}
	if out := <-done; !strings.Contains(out, "waiting for "+third.Name) || !strings.Contains(out, "done") {
		t.Errorf("rotating with %s down said:\n%s", third.Name, out)
	}
	w.untilSeal("the one that was down has all keys", activeIs(4), w.Members...)

	// The leader dies once the key is on record; the next one ends what it began, once the member that is down is back.
	follower.Kill()
	cmd := exec.CommandContext(w.ctx, filepath.Join(w.Bin, "countersign"), "seal", "rotate", "--socket", third.Socket)
	pipe, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(pipe)
	for lines.Scan() && !strings.Contains(lines.Text(), "distribute") {
	}
	w.untilSeal("the fifth data key waits", func(s sealStatus) bool { return len(s.Terms) == 5 && s.Terms[4].State == "pending" }, third)
	dead := w.Leader(w.ctx)
	if dead == nil {
		t.Fatal("no leader")
	}
	dead.Kill()
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	for _, m := range []*cluster.Member{dead, follower} {
		if err := w.RestartMember(w.ctx, m); err != nil {
			t.Fatal(err)
		}
	}
	w.untilSeal("the next leader ends the rotation", activeIs(5), w.Members...)

	// All start again, from snapshots, logs and what they keep: nothing is lost.
	for _, m := range w.Members {
		m.Kill()
	}
	for _, m := range w.Members {
		go func() { _ = w.RestartMember(w.ctx, m) }()
	}
	w.untilSeal("all are back", func(s sealStatus) bool {
		return activeIs(5)(s) && len(s.Members) == 3 && !slices.ContainsFunc(s.Members, func(m sealMember) bool { return len(m.Terms) != 5 })
	}, w.Members...)
}

// TestSealKeyChanges moves a member's keyring from one key-encryption key to another, and refuses a wrong one.
func TestSealKeyChanges(t *testing.T) {
	w := newWorld(t, 1, "")
	m := w.Members[0]
	conf := filepath.Join(m.Dir, "server.yaml")
	before, err := os.ReadFile(conf)
	if err != nil {
		t.Fatal(err)
	}
	key := filepath.Join(m.Dir, "other-kek")
	old := filepath.Join(m.Dir, "data", "kek")
	with := func(yaml string) {
		if err := os.WriteFile(conf, append(slices.Clone(before), yaml...), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	m.Kill()
	with("seal:\n  key: file:" + key + "\n  old_keys: [\"file:" + old + "\"]\n")
	if err := w.RestartMember(w.ctx, m); err != nil {
		t.Fatal(err)
	}
	if s := w.sealStatus(m); s.Members[0].KEK != "file:"+key {
		t.Errorf("the key is said to be %q", s.Members[0].KEK)
	}
	// The old key is of no use any more.
	m.Kill()
	if err := os.Remove(old); err != nil {
		t.Fatal(err)
	}
	with("seal:\n  key: file:" + key + "\n")
	if err := w.RestartMember(w.ctx, m); err != nil {
		t.Fatal(err)
	}
	if out, err := m.Admin(w.ctx, w.Bin, "seal", "rewrap"); err != nil || !strings.Contains(out, "rewrap") || !strings.Contains(out, "done") {
		t.Errorf("rewrap: %s, %v", out, err)
	}
	m.Kill()
	with("")
	out, err := exec.CommandContext(w.ctx, filepath.Join(w.Bin, "countersign"), "server", "run", "-c", conf).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "kek") {
		t.Errorf("started with a key that is gone: %s", out)
	}
	if _, err := os.Stat(old); err == nil {
		t.Error("a key was made where there is a keyring that it does not open")
	}
}

// TestSealInToken keeps key-encryption keys and the x509 authority's key in a PKCS#11 token (SoftHSM, for real): nothing of the
// authority's key is in the cluster, each fault of the token is told plainly, and none loses anything.
func TestSealInToken(t *testing.T) {
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
	pin := func(text string, mode os.FileMode) {
		t.Helper()
		_ = os.Remove(tok.PINFile)
		if text == "" {
			return
		}
		if err := os.WriteFile(tok.PINFile, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(tok.PINFile, mode); err != nil {
			t.Fatal(err)
		}
	}
	pin(tok.PIN, 0o600)
	w := newWorld(t, 3, fmt.Sprintf("seal:\n  key: %q\nca:\n  key: %q\n", tok.URI("kek"), tok.URI("ca")))
	var list struct {
		Authorities []struct {
			Kind, Key, State string
		} `json:"authorities"`
	}
	if err := json.Unmarshal([]byte(w.admin("authority", "list", "-o", "json")), &list); err != nil {
		t.Fatal(err)
	}
	for _, x := range list.Authorities {
		if want := map[string]string{"x509": tok.URI("ca"), "jwt": "sealed"}[x.Kind]; x.Key != want {
			t.Errorf("the key of the %s authority is at %q, want %q", x.Kind, x.Key, want)
		}
	}
	w.untilSeal("only the JWT key is sealed", func(s sealStatus) bool { return s.active() == 1 && s.Values == "1" }, w.Members...)
	w.admin("seal", "rotate")
	w.untilSeal("the rotation went through the token", func(s sealStatus) bool { return s.active() == 2 && s.ValuesOld == "" }, w.Members...)
	for _, m := range w.sealStatus(w.Members[0]).Members {
		if !strings.HasPrefix(m.KEK, "pkcs11:token=") || strings.Contains(m.KEK, tok.PIN) {
			t.Errorf("%s names its key-encryption key as %q", m.ID, m.KEK)
		}
	}

	// What is wrong with a token is said, never the PIN, and nothing is lost.
	m := w.Members[2]
	m.Kill()
	yaml := filepath.Join(m.Dir, "server.yaml")
	good, err := os.ReadFile(yaml)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		prepare func()
		from    string
		to      string
		says    string
	}{
		"no PIN file":      {func() { pin("", 0) }, "", "", "PIN cannot be read"},
		"others read it":   {func() { pin(tok.PIN, 0o644) }, "", "", "chmod"},
		"a wrong PIN":      {func() { pin("9999-wrong", 0o600) }, "", "", "is refused by token"},
		"no pin-source":    {nil, "&pin-source=" + tok.PINFile, "", "add pin-source=/path"},
		"an absent token":  {nil, "token=" + tok.Label, "token=nobody", "shows no token \"nobody\""},
		"an absent module": {nil, tok.Module, "/nonexistent/m.so", "/nonexistent/m.so"},
		"an absent key":    {nil, "object=kek", "object=gone", "the token has no such key"},
		"a key pair":       {nil, "object=kek", "object=ca", "is a key pair"},
	} {
		pin(tok.PIN, 0o600)
		if c.prepare != nil {
			c.prepare()
		}
		text := string(good)
		if c.from != "" {
			text = strings.ReplaceAll(text, c.from, c.to)
		}
		if err := os.WriteFile(yaml, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(w.ctx, time.Minute)
		out, err := exec.CommandContext(ctx, filepath.Join(w.Bin, "countersign"), "server", "run", "-c", yaml).CombinedOutput()
		cancel()
		if err == nil || !strings.Contains(string(out), c.says) || strings.Contains(string(out), tok.PIN) || strings.Contains(string(out), "9999-wrong") {
			t.Errorf("%s: %v: want a refusal saying %q:\n%s", name, err, c.says, out)
		}
	}
	pin(tok.PIN, 0o600)
	if err := os.WriteFile(yaml, good, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := w.RestartMember(w.ctx, m); err != nil {
		t.Fatal(err)
	}
	w.untilSeal("it is back", func(s sealStatus) bool { return s.active() == 2 && s.Values == "1" }, m)

	// Nothing sealed of the authority's key is anywhere: the record says where it is, and has no ciphertext.
	for _, x := range w.Members {
		raw, err := os.ReadFile(filepath.Join(x.Dir, "data", "authorities.json"))
		if err != nil {
			t.Fatal(err)
		}
		var f struct{ Authorities []identity.Authority }
		if err := json.Unmarshal(raw, &f); err != nil || len(f.Authorities) != 2 {
			t.Fatalf("%d authorities, %v", len(f.Authorities), err)
		}
		for _, a := range f.Authorities {
			if a.Kind == identity.AuthorityX509 && (len(a.SealedKey) > 0 || a.KeyURI == "") {
				t.Errorf("%s has a sealed key of %d bytes, at %q", a.ID, len(a.SealedKey), a.KeyURI)
			}
		}
	}
}
