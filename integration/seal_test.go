package integration

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"countersign.io/countersign/integration/cluster"
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
