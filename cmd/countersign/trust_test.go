package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	adminv1 "countersign.io/countersign/api/admin/v1"
	"countersign.io/countersign/config"
	"countersign.io/countersign/identity"
)

func waitingGate(n int) *adminv1.Gate {
	g := &adminv1.Gate{Ready: 3, Total: uint32(3 + n), Open: n == 0}
	for i := range n {
		g.Waiting = append(g.Waiting, &adminv1.Gate_Waiting{Name: fmt.Sprint("node-", i), Because: "it is away"})
	}
	return g
}

// TestRotationLine: one line says how a rotation stands, and does not grow with the fleet.
func TestRotationLine(t *testing.T) {
	until := timestamppb.New(time.Date(2030, 1, 1, 12, 0, 0, 0, time.UTC))
	many := waitingGate(7)
	many.More = 20000
	for _, c := range []struct {
		r    *adminv1.Rotation
		want string
	}{
		{&adminv1.Rotation{Kind: "x509", Phase: "prepare"}, "x509 prepare"},
		{&adminv1.Rotation{Kind: "x509", Phase: "prepare", Problem: "no leader"}, "x509 prepare; no leader"},
		{&adminv1.Rotation{Kind: "jwt", Phase: "activate", Gate: waitingGate(0)}, "jwt activate 3/3"},
		{&adminv1.Rotation{Kind: "jwt", Phase: "activate", Gate: waitingGate(1)}, "jwt activate 3/4; waits for node-0: it is away"},
		{&adminv1.Rotation{Kind: "x509", Phase: "revoke", Gate: &adminv1.Gate{Ready: 1, Total: 2, Svids: 17, Waiting: []*adminv1.Gate_Waiting{{Name: "m2", Because: "it lasts", Until: until}}}},
			"x509 revoke 1/2, 17 SVIDs under the old authority; waits for m2: it lasts (until " + timeCell(until) + ")"},
		{&adminv1.Rotation{Kind: "x509", Phase: "activate", Gate: many},
			"x509 activate 3/10; waits for node-0: it is away; waits for node-1: it is away; waits for node-2: it is away; waits for node-3: it is away; waits for node-4: it is away; and 20002 more"},
	} {
		if got := rotationLine(c.r); got != c.want {
			t.Errorf("%q\nwant %q", got, c.want)
		}
	}
}

func TestRotationPicture(t *testing.T) {
	full, none := strings.Repeat("#", 30), strings.Repeat(".", 30)
	half := strings.Repeat("#", 15) + strings.Repeat(".", 15)
	more := waitingGate(6)
	for _, c := range []struct {
		r    *adminv1.Rotation
		want []string
	}{
		{&adminv1.Rotation{Phase: "prepare"}, []string{"prepare   [" + none + "] ", "activate  [" + none + "] ", "revoke    [" + none + "] "}},
		{&adminv1.Rotation{Phase: "activate", Gate: waitingGate(3), Problem: "no leader"}, []string{
			"prepare   [" + full + "] done", "activate  [" + half + "] 3 of 6", "revoke    [" + none + "] ",
			"  waits for node-0: it is away", "  waits for node-1: it is away", "  waits for node-2: it is away", "  no leader"}},
		{&adminv1.Rotation{Phase: "revoke", Gate: &adminv1.Gate{Ready: 0, Total: 0, Svids: 4}}, []string{"prepare   [" + full + "] done", "activate  [" + full + "] done", "revoke    [" + none + "] "}},
		{&adminv1.Rotation{Phase: "done"}, []string{"prepare   [" + full + "] done", "activate  [" + full + "] done", "revoke    [" + full + "] done"}},
		{&adminv1.Rotation{Phase: "activate", Gate: more}, []string{"prepare   [" + full + "] done", "activate  [" + strings.Repeat("#", 10) + strings.Repeat(".", 20) + "] 3 of 9", "revoke    [" + none + "] ",
			"  waits for node-0: it is away", "  waits for node-1: it is away", "  waits for node-2: it is away", "  waits for node-3: it is away", "  waits for node-4: it is away", "  and 1 more"}},
	} {
		if got := rotationPicture(c.r); strings.Join(got, "\n") != strings.Join(c.want, "\n") {
			t.Errorf("%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(c.want, "\n"))
		}
	}
}

// TestRotationProgress: where there is no terminal, a line for each change, and no more.
func TestRotationProgress(t *testing.T) {
	var out bytes.Buffer
	p := newRotationProgress(&out)
	r := &adminv1.Rotation{Kind: "x509", Phase: "activate", Gate: waitingGate(1)}
	for range 3 {
		p.show(r)
	}
	p.note("asking again")
	p.show(&adminv1.Rotation{Kind: "x509", Phase: "done"})
	p.end()
	if got, want := out.String(), "x509 activate 3/4; waits for node-0: it is away\nasking again\nx509 done\n"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	// On one, the picture before is taken off first.
	out.Reset()
	p = &rotationProgress{w: &out, bar: true}
	p.show(r)
	p.show(r)
	if got := out.String(); strings.Count(got, "\x1b[4A\x1b[J") != 1 || strings.Count(got, "node-0") != 2 {
		t.Errorf("%q", got)
	}
}

func TestRotationTable(t *testing.T) {
	at := timestamppb.New(time.Date(2030, 1, 1, 12, 0, 0, 0, time.UTC))
	r := &adminv1.Rotation{
		Kind: "x509", Phase: "activate", NewAuthority: "bb", OldAuthority: "aa", Why: "by uid 0", StartedAt: at, PhaseAt: at, NotBefore: at, Deadline: at,
		Ignore: []string{"m2", "m3"}, Problem: "no leader", DryRun: true, Gate: waitingGate(1),
	}
	r.Gate.Svids, r.Gate.More = 9, 2
	var rows []string
	for _, row := range rotationTable(r).Rows {
		rows = append(rows, strings.Join(row, "="))
	}
	got := strings.Join(rows, "\n")
	for _, want := range []string{
		"phase=activate (everyone is to trust it before it signs)", "new authority=bb", "old authority=aa", "dry run=nothing was changed", "signs at the earliest=", "goes on at the latest=",
		"does not wait for=m2 m3", "problem=no leader", "ready=3 of 4", "SVIDs under the old one=9", "waits for=node-0: it is away", "waits for=2 more",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in\n%s", want, got)
		}
	}
	bare := fmt.Sprint(rotationTable(&adminv1.Rotation{Kind: "jwt", Phase: "prepare"}).Rows)
	for _, not := range []string{"dry run", "signs at", "goes on", "does not wait", "problem", "ready"} {
		if strings.Contains(bare, not) {
			t.Errorf("%q in %s", not, bare)
		}
	}
	for _, phase := range []identity.RotationPhase{identity.RotationPrepare, identity.RotationActivate, identity.RotationRevoke, identity.RotationDone, identity.RotationRolledBack} {
		if phaseWords(string(phase)) == "?" {
			t.Errorf("no words for the phase %s", phase)
		}
	}
}

// TestTrustCommands: what is refused before anybody is asked.
func TestTrustCommands(t *testing.T) {
	for line, want := range map[string]string{
		"bundle status --watch":           "name the --kind",
		"bundle change":                   "say what to change",
		"bundle rotate extra":             "unknown command",
		"bundle activate one two":         "at most 1 arg",
		"bundle rotate --ack-deadline 1y": "invalid argument",
	} {
		code, _, errs := command(append(strings.Fields(line), "--socket", filepath.Join(t.TempDir(), "none"))...)
		if code == 0 || !strings.Contains(errs, want) {
			t.Errorf("%s: %d, %q; want %q", line, code, errs, want)
		}
	}
}

// TestIssuedFile: what is damaged is not believed.
func TestIssuedFile(t *testing.T) {
	d := &dataDir{path: t.TempDir()}
	if err := os.Chmod(d.path, 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := d.loadIssued(); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("of nothing: %v", err)
	}
	at := time.Date(2030, 1, 1, 12, 0, 0, 5, time.UTC)
	for _, until := range []map[string]time.Time{{}, {"": at}, {"aa": at, "bb": at.Add(time.Hour)}} {
		if err := d.saveIssued(until); err != nil {
			t.Fatal(err)
		}
		got, err := d.loadIssued()
		if err != nil || got == nil || fmt.Sprint(got) != fmt.Sprint(until) {
			t.Errorf("%v, %v; want %v", got, err, until)
		}
	}
	good, err := os.ReadFile(d.file("issued.json"))
	if err != nil {
		t.Fatal(err)
	}
	damaged := func(what string, data []byte) {
		t.Helper()
		if err := os.WriteFile(d.file("issued.json"), data, 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := d.loadIssued(); err == nil || got != nil {
			t.Errorf("%s was taken: %v", what, got)
		}
	}
	for i := range good {
		if bad := bytes.Clone(good); bad[i] >= '0' && bad[i] <= '9' {
			bad[i] = '0' + (bad[i]-'0'+1)%10
			damaged(fmt.Sprint("byte ", i), bad)
		}
		damaged(fmt.Sprint("cut off at ", i), good[:i])
	}
	damaged("another version", bytes.Replace(good, []byte(`"version":1`), []byte(`"version":2`), 1))
	if err := os.WriteFile(d.file("issued.json"), good, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(d.file("issued.json"), 0o666); err != nil {
		t.Fatal(err)
	}
	if _, err := d.loadIssued(); err == nil {
		t.Error("a file that others can write was taken")
	}
}

// TestKeyFor: a member's own way to a key is ca.key or one of ca.old_keys, and no other.
func TestKeyFor(t *testing.T) {
	uri := func(object string) string { return "pkcs11:token=t;object=" + object + "?module-path=/lib/m.so" }
	m := &member{c: &config.Server{CA: config.CA{Key: uri("new"), OldKeys: []string{uri("old"), uri("older")}}}}
	for object, own := range map[string]string{"new": uri("new"), "old": uri("old"), "older": uri("older")} {
		// Another member's module may be elsewhere.
		got, err := m.keyFor(&identity.Authority{Kind: identity.AuthorityX509, ID: "aa", KeyURI: "pkcs11:token=t;object=" + object + "?module-path=/usr/lib/m.so"})
		if err != nil || got != own {
			t.Errorf("%s: %q, %v", object, got, err)
		}
	}
	if got, err := m.keyFor(&identity.Authority{Kind: identity.AuthorityX509, ID: "aa", KeyURI: uri("another")}); err == nil || got != "" || !strings.Contains(err.Error(), "ca.old_keys") {
		t.Errorf("%q, %v", got, err)
	}
	if m.newX509Key()(uri("new")) || !m.newX509Key()(uri("old")) || m.newX509Key()("") {
		t.Error("which key is another one")
	}
	if (&member{c: &config.Server{}}).newX509Key() != nil {
		t.Error("without ca.key there is another key")
	}
}
