package integration

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"

	adminv1 "countersign.io/countersign/api/admin/v1"
	"countersign.io/countersign/integration/cluster"
)

// writing creates entries through every member, and remembers what was acknowledged.
type writing struct {
	mu    sync.Mutex
	acked []string // IDs
	stop  context.CancelFunc
	wg    sync.WaitGroup
}

func write(t *testing.T, w *world) *writing {
	t.Helper()
	ctx, cancel := context.WithCancel(w.ctx)
	wr := &writing{stop: cancel}
	for _, m := range w.Members {
		c, closeConn, err := m.AdminConn()
		if err != nil {
			t.Fatal(err)
		}
		wr.wg.Go(func() {
			defer closeConn()
			for i := 0; ctx.Err() == nil; i++ {
				e, err := c.CreateEntry(ctx, &adminv1.Entry{SpiffeId: fmt.Sprintf("spiffe://%s/load/%s/%d", trustDomain, m.Name, i), Selectors: []string{fmt.Sprintf("k8s:ns:%s-%d", m.Name, i)}})
				if err != nil {
					continue // not acknowledged: the members are being killed
				}
				wr.mu.Lock()
				wr.acked = append(wr.acked, e.Id)
				wr.mu.Unlock()
			}
		})
	}
	t.Cleanup(wr.end)
	return wr
}

func (w *writing) end() { w.stop(); w.wg.Wait() }

func (w *writing) so() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.acked)
}

// untilWritten waits for so many more.
func (w *writing) untilWritten(t *testing.T, ctx context.Context, more int) {
	t.Helper()
	for want := len(w.so()) + more; len(w.so()) < want; time.Sleep(5 * time.Millisecond) {
		if ctx.Err() != nil {
			t.Fatalf("%d entries written, waiting for %d", len(w.so()), want)
		}
	}
}

type inspected struct {
	Header struct {
		Member    string
		Revision  uint64
		Confirmed bool
	}
	State struct {
		Entries, Agents, Authorities, Members int
		Revision                              uint64
	}
}

// TestBackupAndRestore saves a cluster of three under writes, loses it, and brings it back: one member from the backup, the others
// by joining it. The agent goes on without being touched.
func TestBackupAndRestore(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	raw := make([]byte, 32)
	rand.Read(raw)
	writeFile(t, filepath.Join(dir, "kek"), raw)
	key, scheduled := "file:"+filepath.Join(dir, "kek"), filepath.Join(dir, "scheduled")
	w := worldOf(t, 3, fmt.Sprintf("backup: {dir: %s, every: 1m, keep: 2, key: '%s'}\n", scheduled, key))
	a := w.agent()
	w.createEntry(append(uidSelectors(), "--id", "spiffe://"+trustDomain+"/one")...)
	one := func(ids []string) bool { return slices.Equal(ids, []string{"spiffe://" + trustDomain + "/one"}) }
	s := w.watch(a)
	w.until(s, "an identity", one)
	serials := map[string][]byte{}
	note := func() {
		x, err := workloadapi.FetchX509Context(w.ctx, workloadapi.WithAddr(a.Endpoint()))
		if err != nil {
			t.Fatal(err)
		}
		for _, svid := range x.SVIDs {
			cert := svid.Certificates[0]
			serial := cert.SerialNumber.String()
			if was, ok := serials[serial]; ok && !bytes.Equal(was, cert.Raw) {
				t.Errorf("serial %s is of two certificates", serial)
			}
			serials[serial] = cert.Raw
		}
	}
	note()

	// Saved under writes, from a member that does not lead.
	unspent := w.admin("token", "create", "--agent", "--ttl", "1h")
	load := write(t, w)
	load.untilWritten(t, w.ctx, 50)
	leader := w.Leader(w.ctx)
	from := w.Members[slices.IndexFunc(w.Members, func(m *cluster.Member) bool { return m != leader })]
	file := filepath.Join(dir, "backup")
	before := load.so()
	if _, err := from.Admin(w.ctx, bin, "backup", "save", file); err != nil {
		t.Fatal(err)
	}
	load.untilWritten(t, w.ctx, 50)
	conf := filepath.Join(w.Members[0].Dir, "server.yaml")
	if _, err := from.Admin(w.ctx, bin, "backup", "restore", file, "-c", conf); err == nil || !strings.Contains(err.Error(), "not empty") {
		t.Errorf("restored onto a running member: %v", err)
	}
	var in inspected
	parseJSON(t, w.admin("backup", "inspect", file, "--key", key, "-o", "json"), &in)
	if in.Header.Member != from.Name || !in.Header.Confirmed || in.State.Entries < len(before) || in.State.Agents != 1 || in.State.Authorities != 2 {
		t.Errorf("the backup has %+v: %d entries were acknowledged before", in, len(before))
	}
	for _, m := range w.Members { // each member makes its own, too
		w.eventually("the scheduled backup of "+m.Name, func() error {
			files, err := filepath.Glob(filepath.Join(scheduled, "countersign-"+m.Name+"-*.backup"))
			if err == nil && len(files) == 0 {
				err = fmt.Errorf("there is none")
			}
			if err == nil {
				_, err = w.Admin(w.ctx, "backup", "inspect", files[0], "--key", key)
			}
			return err
		})
	}

	for _, m := range w.Members {
		m.Kill()
	}
	load.end()
	after := load.so()
	if len(after) < len(before)+50 {
		t.Fatalf("only %d writes after the backup", len(after)-len(before))
	}
	for _, m := range w.Members {
		if err := os.Rename(filepath.Join(m.Dir, "data"), filepath.Join(m.Dir, "lost")); err != nil {
			t.Fatal(err)
		}
	}
	first := w.Members[0]
	out, err := first.Admin(w.ctx, bin, "backup", "restore", file, "-c", conf)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("restore says:\n%s", out)
	if err := w.RestartMember(w.ctx, first); err != nil {
		t.Fatal(err)
	}
	for _, m := range w.Members[1:] {
		token, err := first.Admin(w.ctx, bin, "token", "create", "--server")
		if err != nil {
			t.Fatal(err)
		}
		writeFile(t, filepath.Join(m.Dir, "join"), []byte(token))
		if err := w.RestartMember(w.ctx, m); err != nil {
			t.Fatal(err)
		}
		untilVoter(t, w, m.Name)
	}

	checkRestored(t, w, first, before, after, in.State.Entries)
	newPlace(t, "", "").agentRefused(t, strings.TrimSpace(unspent), nil, exitFailure, "was used at")
	// The agent never stopped, and its identity of before goes on: it gets what changes now.
	w.createEntry(append(uidSelectors(), "--id", "spiffe://"+trustDomain+"/two")...)
	w.until(s, "an identity given after the restore", func(ids []string) bool { return len(ids) == 2 })
	note()
	if len(serials) < 2 {
		t.Errorf("%d serials of two certificates", len(serials))
	}
	select {
	case err := <-s.errs:
		t.Errorf("the stream ended in between: %v", err)
	default:
	}
}

// checkRestored compares what the restored cluster has with what was acknowledged.
func checkRestored(t *testing.T, w *world, first *cluster.Member, before, after []string, entries int) {
	t.Helper()
	c, closeConn, err := first.AdminConn()
	if err != nil {
		t.Fatal(err)
	}
	defer closeConn()
	have := map[string]bool{}
	for page := (&adminv1.ListRequest{PageSize: 1000}); ; {
		res, err := c.ListEntries(w.ctx, page)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range res.Entries {
			have[e.Id] = true
		}
		if page.PageToken = res.NextPageToken; page.PageToken == "" {
			break
		}
	}
	if len(have) != entries {
		t.Errorf("%d entries, the backup has %d", len(have), entries)
	}
	for _, id := range before {
		if !have[id] {
			t.Fatalf("entry %s was acknowledged before the backup, and is lost", id)
		}
	}
	if have[after[len(after)-1]] {
		t.Error("an entry made after the backup is there")
	}
	var st struct {
		Revision       json.Number `json:"revision"`
		BundleSequence json.Number `json:"bundle_sequence"`
	}
	out, err := first.Admin(w.ctx, bin, "status", "-o", "json")
	if err != nil {
		t.Fatal(err)
	}
	parseJSON(t, out, &st)
	if rev, err := st.Revision.Int64(); err != nil || rev < 1<<32 {
		t.Errorf("it goes on at revision %v: %v", st.Revision, err)
	}
	if seq, err := st.BundleSequence.Int64(); err != nil || seq < 1_700_000_000 {
		t.Errorf("it goes on at bundle sequence %v: %v", st.BundleSequence, err)
	}
}

// TestBackupsThatFail: a member whose scheduled backups cannot be written issues all the same, and says so.
func TestBackupsThatFail(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "absent", "backups")
	w := worldOf(t, 1, fmt.Sprintf("backup: {dir: %s, every: 1m}\n", dir))
	w.eventually("the status says it", func() error {
		var st struct {
			Issuing  bool
			Degraded []string
		}
		parseJSON(t, w.admin("status", "-o", "json"), &st)
		if !st.Issuing {
			return fmt.Errorf("it does not issue")
		}
		if said := strings.Join(st.Degraded, "\n"); !strings.Contains(said, "the last scheduled backup failed") || !strings.Contains(said, "backup.dir") {
			return fmt.Errorf("it says %q", said)
		}
		return nil
	})
	// One that an operator makes has nothing to do with the folder. It is not replaced, and not written half.
	file := filepath.Join(t.TempDir(), "backup")
	w.admin("backup", "save", file)
	if out, err := w.Admin(w.ctx, "backup", "save", file); err == nil || !strings.Contains(err.Error(), "--force") {
		t.Errorf("over another: %s, %v", out, err)
	}
	w.admin("backup", "save", file, "--force")
	if info, err := os.Stat(file); err != nil || info.Mode() != 0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	if _, err := w.Admin(w.ctx, "backup", "save", filepath.Join(dir, "b")); err == nil {
		t.Error("saved into an absent folder")
	}
	w.Members[0].Kill()
	if _, err := w.Members[0].Admin(w.ctx, bin, "backup", "save", file+"2"); err == nil || !strings.Contains(err.Error(), "is it running?") {
		t.Errorf("of a dead member: %v", err)
	}
	if list, err := os.ReadDir(filepath.Dir(file)); err != nil || len(list) != 1 {
		t.Errorf("left behind: %v, %v", list, err)
	}
}
