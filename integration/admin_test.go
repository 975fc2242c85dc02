package integration

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"countersign.io/countersign/integration/cluster"
)

// ran is a command that ended.
type ran struct {
	code      int
	out, errs string
}

// countersign runs a command as an operator on another machine does: with no admin socket at hand.
func (w *world) countersign(env []string, args ...string) ran {
	w.t.Helper()
	var out, errs bytes.Buffer
	cmd := exec.CommandContext(w.ctx, filepath.Join(bin, "countersign"), args...)
	cmd.Env = append([]string{"HOME=" + w.Dir, "PATH=" + os.Getenv("PATH"), "GORACE=" + os.Getenv("GORACE")}, env...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		w.t.Fatal(err)
	}
	return ran{cmd.ProcessState.ExitCode(), out.String(), errs.String()}
}

// adminEntry makes an admin of this test's processes on one agent.
func (w *world) adminEntry(a *cluster.Agent, id, role string) string {
	w.t.Helper()
	var list struct{ Agents []struct{ ID string } }
	if err := json.Unmarshal([]byte(w.admin("agent", "list", "-o", "json")), &list); err != nil || len(list.Agents) != 1 {
		w.t.Fatalf("%d agents, %v", len(list.Agents), err)
	}
	return w.createEntry("-s", fmt.Sprintf("unix:uid:%d", os.Getuid()), "-s", "agent:id:"+list.Agents[0].ID, "--id", id, "--admin-role", role)
}

// TestRemoteAdmin: a workload whose entry makes it an operator administers the cluster from where it is, and no longer than the entry is there.
func TestRemoteAdmin(t *testing.T) {
	w := newWorld(t, 3, "")
	a := w.agent()
	id := "spiffe://" + trustDomain + "/ops/alice"
	entry := w.adminEntry(a, id, "operator")
	servers := w.Members[1].Address + "," + w.Members[2].Address
	as := func(args ...string) ran {
		return w.countersign([]string{"SPIFFE_ENDPOINT_SOCKET=" + a.Endpoint()}, append(args, "--member", servers)...)
	}
	ok := func(args ...string) string {
		t.Helper()
		r := as(args...)
		if r.code != 0 {
			t.Fatalf("%v: exit code %d: %s", args, r.code, r.errs)
		}
		return r.out
	}
	refused := func(why string, args ...string) {
		t.Helper()
		if r := as(args...); r.code != 4 || !strings.Contains(r.errs, why) || !strings.Contains(r.errs, "request ID") {
			t.Errorf("%v: exit code %d: %s", args, r.code, r.errs)
		}
	}
	w.eventually("the agent gives the admin's SVID", func() error {
		if r := as("status"); r.code != 0 {
			return errors.New(r.errs)
		}
		return nil
	})
	// Reads and writes by the same commands as on the socket.
	if out := ok("entry", "list", "-o", "json"); !strings.Contains(out, entry) {
		t.Errorf("the list lacks its own entry: %s", out)
	}
	ok("cluster", "status")
	ok("status", "--as", id)
	if r := as("status", "--as", id+"x"); r.code != 3 || !strings.Contains(r.errs, id) {
		t.Errorf("as somebody else: exit code %d: %s", r.code, r.errs)
	}
	var made struct{ ID string }
	if err := json.Unmarshal([]byte(ok("entry", "create", "-s", "k8s:ns:shop", "--id", "spiffe://"+trustDomain+"/shop", "-o", "json")), &made); err != nil {
		t.Fatal(err)
	}
	w.admin("entry", "show", made.ID)
	if tok := ok("token", "create", "--agent"); len(tok) < 40 {
		t.Errorf("token %q", tok)
	}
	// The shell offers what is there, from afar too.
	if r := w.countersign([]string{"SPIFFE_ENDPOINT_SOCKET=" + a.Endpoint()}, "__complete", "entry", "show", "--member", servers, ""); !strings.Contains(r.out, made.ID) {
		t.Errorf("completing an entry's name: %s%s", r.out, r.errs)
	}
	if out, err := exec.CommandContext(w.ctx, filepath.Join(bin, "countersign-agent"), "__complete", "fetch", "jwt", "--endpoint", a.Endpoint(), "--id", "").Output(); err != nil || !strings.Contains(string(out), id) {
		t.Errorf("completing an identity: %s, %v", out, err)
	}
	// What would happen is said, and does not.
	if out := ok("entry", "delete", made.ID, "--dry-run"); !strings.Contains(out, "would be deleted") || !strings.Contains(out, "nothing was changed") {
		t.Errorf("a dry run says %s", out)
	}
	ok("entry", "show", made.ID)
	if r := as("entry", "delete", "none", "--dry-run"); r.code != 3 {
		t.Errorf("a dry run on nothing: exit code %d: %s", r.code, r.errs)
	}
	refused("needs the role security", "entry", "create", "-s", "k8s:ns:mine", "--id", "spiffe://"+trustDomain+"/mine", "--admin", "--dry-run")
	refused("needs the role security", "seal", "rotate", "--dry-run")
	if out := w.admin("seal", "rotate", "--dry-run"); !strings.Contains(out, "data key 2 would be made") {
		t.Errorf("a dry run says %s", out)
	}
	if out := w.admin("cluster", "remove", "ca-3", "--dry-run", "-o", "json"); !strings.Contains(out, `"effects"`) {
		t.Errorf("a dry run says %s", out)
	}
	// What is for higher roles.
	for _, args := range [][]string{
		{"seal", "rotate"}, {"token", "create", "--server"}, {"cluster", "remove", "ca-3"}, {"backup", "save", filepath.Join(w.Dir, "stolen")},
		{"kube", "add", "evil", "--issuer", w.iss.URL, "--jwks-file", w.iss.JWKSFile, "--default-id", "/evil/{k8s:ns}/{k8s:sa}"},
		{"entry", "create", "-s", "k8s:ns:mine", "--id", "spiffe://" + trustDomain + "/mine", "--admin"},
		{"entry", "update", entry, "--admin-role", "security"},
		{"x509", "mint", "--id", id, "--write", filepath.Join(w.Dir, "self")},
	} {
		refused("needs the role security", args...)
	}
	for _, name := range []string{"stolen", "self"} {
		if _, err := os.Stat(filepath.Join(w.Dir, name)); err == nil {
			t.Errorf("%s is there", name)
		}
	}
	// A minted SVID is a way in for who has the role, from files.
	reader := "spiffe://" + trustDomain + "/ops/bob"
	w.admin("entry", "create", "-s", "k8s:ns:nobody", "--id", reader, "--admin-role", "reader")
	dir := filepath.Join(w.Dir, "bob")
	w.admin("x509", "mint", "--id", reader, "--write", dir, "--ttl", "10m")
	bob := func(args ...string) ran {
		return w.countersign([]string{"COUNTERSIGN_MEMBER=" + w.Members[0].Address}, append(args, "--svid", dir)...)
	}
	if r := bob("agent", "list"); r.code != 0 {
		t.Errorf("a reader with files: exit code %d: %s", r.code, r.errs)
	}
	if r := bob("agent", "list", "--member", w.Members[1].Address, "--svid-bundle", filepath.Join(dir, "svid.pem")); r.code != 4 {
		t.Errorf("a member that the bundle does not vouch for: exit code %d: %s", r.code, r.errs)
	}
	if r := bob("token", "create", "--agent"); r.code != 4 || !strings.Contains(r.errs, "needs the role operator") {
		t.Errorf("a reader writes: exit code %d: %s", r.code, r.errs)
	}
	if err := os.Chmod(filepath.Join(dir, "key.pem"), 0o644); err != nil {
		t.Fatal(err)
	}
	if r := bob("agent", "list"); r.code != 2 || !strings.Contains(r.errs, "key.pem") {
		t.Errorf("a key that others can read: exit code %d: %s", r.code, r.errs)
	}
	// Each call is on record at the member that it was made to: who, with which certificate, as what, and how it ended.
	out, err := w.Members[1].Admin(w.ctx, bin, "audit", "query", "--who", id, "-o", "json")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`"action":"admin.create_entry","outcome":"attempted"`, `"action":"admin.rotate_seal","outcome":"refused"`, `"kind":"admin"`, `"role":"operator"`, `"serial":"`} {
		if !strings.Contains(out, want) {
			t.Errorf("the records lack %s: %.2000s", want, out)
		}
	}
	// The entry is all that the power hangs on.
	w.admin("entry", "delete", entry)
	if r := as("status"); r.code != 4 {
		t.Errorf("without the entry: exit code %d: %s", r.code, r.errs)
	}
}

// A minted SVID outlasts its entry, its power does not: the certificate is valid, and nobody any more.
func TestRemoteAdminLosesPower(t *testing.T) {
	w := newWorld(t, 1, "")
	id := "spiffe://" + trustDomain + "/ops/carol"
	entry := w.createEntry("-s", "k8s:ns:nobody", "--id", id, "--admin-role", "security")
	dir := filepath.Join(w.Dir, "carol")
	w.admin("x509", "mint", "--id", id, "--write", dir)
	carol := func(args ...string) ran {
		return w.countersign(nil, append(args, "--svid", dir, "--member", w.Members[0].Address)...)
	}
	if r := carol("seal", "rotate", "-o", "json"); r.code != 0 {
		t.Fatalf("exit code %d: %s", r.code, r.errs)
	}
	if r := carol("backup", "save", filepath.Join(w.Dir, "backup")); r.code != 0 {
		t.Fatalf("exit code %d: %s", r.code, r.errs)
	}
	follow := exec.CommandContext(w.ctx, filepath.Join(bin, "countersign"), "audit", "tail", "-f", "--svid", dir, "--member", w.Members[0].Address)
	var errs bytes.Buffer
	follow.Stderr = &errs
	lines, err := follow.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := follow.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := lines.Read(make([]byte, 1)); err != nil { // it follows
		t.Fatal(err)
	}
	go func() {
		for b := make([]byte, 4096); ; {
			if _, err := lines.Read(b); err != nil {
				return
			}
		}
	}()
	w.admin("entry", "delete", entry)
	if r := carol("status"); r.code != 4 || !strings.Contains(r.errs, "is no admin") {
		t.Errorf("without the entry: exit code %d: %s", r.code, r.errs)
	}
	if err := follow.Wait(); err == nil || !strings.Contains(errs.String(), "is no admin") {
		t.Errorf("the stream ended with %v: %s", err, errs.String())
	}
	// As a member or as an agent nobody is let in: their SVIDs are never admins'.
	client, err := w.NewClient(w.ctx, "")
	if err != nil {
		t.Fatal(err)
	}
	if r := w.countersign(nil, "entry", "create", "-s", "k8s:ns:x", "--id", client.ID, "--admin", "--socket", w.Members[0].Socket); r.code != 2 {
		t.Errorf("an agent as an admin: exit code %d: %s", r.code, r.errs)
	}
}

// TestCheck: what is wrong with a running installation is found, from the machine of a member and from elsewhere.
func TestCheck(t *testing.T) {
	w := newWorld(t, 3, "admin: {ids: [{id: spiffe://"+trustDomain+"/ops/dora, role: reader}]}\n")
	w.createEntry("-s", "k8s:ns:nobody", "--id", "spiffe://"+trustDomain+"/ops/dora")
	dir := filepath.Join(w.Dir, "dora")
	w.admin("x509", "mint", "--id", "spiffe://"+trustDomain+"/ops/dora", "--write", dir)
	type finding struct{ Severity, Check, Where, What, Todo string }
	// check wants an exit code and findings; on a starved machine members lose sight of each other for a moment, which check rightly says.
	check := func(code int, want func([]finding) bool, args ...string) {
		t.Helper()
		w.eventually(fmt.Sprintf("check %v ends with %d", args, code), func() error {
			r := w.countersign(nil, append([]string{"check", "-o", "json"}, args...)...)
			var rep struct{ Findings []finding }
			if err := json.Unmarshal([]byte(r.out), &rep); err != nil || r.code != code || !want(rep.Findings) {
				return fmt.Errorf("exit code %d, %v: %s%s", r.code, err, r.out, r.errs)
			}
			return nil
		})
	}
	has := func(fs []finding, check, where string) bool {
		for _, f := range fs {
			if f.Check == check && strings.Contains(f.Where, where) && f.Todo != "" {
				return true
			}
		}
		return false
	}
	m := w.Members[0]
	here := []string{"--socket", m.Socket, "-c", filepath.Join(m.Dir, "server.yaml")}
	there := []string{"--member", m.Address, "--svid", dir, "--timeout", "60s"}
	with := func(args []string, more ...string) []string { return append(append([]string{}, args...), more...) }
	// A cluster made for a test has its keys in files and no backups, on whatever disk there is; else nothing is wrong with it.
	const known = "--ignore=kek,backups,disk"
	check(0, func(fs []finding) bool { return len(fs) == 0 }, with(there, known)...)
	check(1, func(fs []finding) bool {
		return has(fs, "kek", "ca-2") && has(fs, "kek-here", "kek") && has(fs, "backups", "cluster")
	}, here...)
	if err := os.Chmod(filepath.Join(m.Dir, "data", "keyring"), 0o644); err != nil {
		t.Fatal(err)
	}
	w.Members[2].Kill()
	check(1, func(fs []finding) bool { return has(fs, "members", "ca-3") && has(fs, "members", "cluster") }, with(there, known)...)
	check(1, func(fs []finding) bool { return has(fs, "files", "keyring") && has(fs, "members", "ca-3") }, with(here, known)...)
	// The table is for people.
	if r := w.countersign(nil, append([]string{"check"}, there...)...); r.code != 1 || !strings.Contains(r.out, "WHAT TO DO") {
		t.Errorf("exit code %d: %s%s", r.code, r.out, r.errs)
	}
}
