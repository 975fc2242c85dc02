package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"countersign.io/countersign/backup"
	"countersign.io/countersign/ca"
	"countersign.io/countersign/config"
	"countersign.io/countersign/identity"
	"countersign.io/countersign/internal/durable"
	"countersign.io/countersign/seal"
	"countersign.io/countersign/store"
)

// backupConfig is a member's on loopback, in a short folder of its own, with its keys outside of its data.
func backupConfig(t *testing.T) *config.Server {
	t.Helper()
	dir, err := os.MkdirTemp("", "cs-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	var addrs []any
	for range 2 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		addrs = append(addrs, l.Addr().String())
	}
	c, err := config.ParseServer("test", fmt.Appendf(nil, "version: 1\ntrust_domain: example.org\nname: ca-1\nlisten: %s\nhealth: %s\ndata_dir: %s/data\nadmin_socket: %s/a.sock\nseal: {key: 'file:%s/kek'}\n",
		append(addrs, dir, dir, dir)...))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func (m *member) testDir() string { return filepath.Dir(m.c.DataDir) }

// startMember runs a member in this process until stop is called.
func startMember(t *testing.T, c *config.Server) (m *member, w *store.Writer, stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	m = newMember(c, slog.New(slog.DiscardHandler))
	ready, done := make(chan struct{}), make(chan error, 1)
	go func() { done <- m.serve(ctx, func() { close(ready) }) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	select {
	case <-ready:
	case err := <-done:
		done <- nil
		t.Fatalf("the member ended: %v", err)
	case <-time.After(time.Minute):
		t.Fatal("the member is not ready")
	}
	for deadline := time.Now().Add(time.Minute); m.store.Level() < store.Level; {
		if time.Now().After(deadline) {
			t.Fatalf("the cluster stays at level %d", m.store.Level())
		}
		time.Sleep(5 * time.Millisecond)
	}
	return m, m.store.Writer(m.node), stop
}

func (m *member) saveTo(t *testing.T, path string) {
	t.Helper()
	f, err := backup.Create(path, false)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Abort()
	if err := m.saveBackup(context.Background(), f); err != nil {
		t.Fatal(err)
	}
	if err := f.Commit(); err != nil {
		t.Fatal(err)
	}
}

func inCommand() *cobra.Command {
	cmd := &cobra.Command{}
	cmd.SetContext(context.Background())
	cmd.SetErr(io.Discard)
	return cmd
}

func entry(n int) identity.Entry {
	return identity.Entry{ID: fmt.Sprintf("e%06d", n), SPIFFEID: fmt.Sprintf("spiffe://example.org/w/%d", n), Selectors: []identity.Selector{identity.Selector(fmt.Sprintf("k8s:ns:n%d", n))}}
}

func token(name string) identity.JoinToken {
	h := sha256.Sum256([]byte(name))
	return identity.JoinToken{ID: name, Hash: h[:], Purpose: identity.JoinAgent, ExpiresAt: time.Now().Add(time.Hour).UTC().Truncate(time.Second)}
}

// past is what a cluster has given and must not give again.
type past struct {
	serials            map[string]bool
	revision, sequence uint64
}

// live lets the member do what leaves traces: writes, changes of the bundle, certificates.
func (p *past) live(t *testing.T, m *member, w *store.Writer, from int) {
	t.Helper()
	ctx := context.Background()
	if r, s := m.store.Revision(), m.store.Bundle().Sequence; r < p.revision || s < p.sequence {
		t.Errorf("it goes on at revision %d and sequence %d: %d and %d were given before", r, s, p.revision, p.sequence)
	}
	for i := range 20 {
		e, err := w.CreateEntry(ctx, time.Now(), entry(from+i))
		if err != nil {
			t.Fatal(err)
		}
		if e.Revision <= p.revision {
			t.Errorf("revision %d was given again", e.Revision)
		}
		p.revision = e.Revision
	}
	for range 3 {
		a, _, err := ca.NewX509Authority(m.td, time.Hour, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		a.State = identity.AuthorityPrepared
		a.SealedKey = []byte("of no use: it is never activated")
		if _, err := w.PrepareAuthority(ctx, time.Now(), a); err != nil {
			t.Fatal(err)
		}
		s := m.store.Bundle().Sequence
		if s <= p.sequence {
			t.Errorf("bundle sequence %d was given again", s)
		}
		p.sequence = s
	}
	p.revision = m.store.Revision()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for range 200 {
		prepared, err := m.ca.PrepareX509(identity.Issuance{ID: spiffeid.RequireFromString("spiffe://example.org/x"), PublicKey: key.Public()})
		if err != nil {
			t.Fatal(err)
		}
		svid, err := prepared.Issue()
		if err != nil {
			t.Fatal(err)
		}
		p.note(t, svid.Chain)
	}
}

func (p *past) note(t *testing.T, chain [][]byte) {
	t.Helper()
	for i, der := range chain {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		serial := cert.SerialNumber.String()
		if i == 0 && p.serials[serial] {
			t.Errorf("serial %s was given twice", serial)
		}
		// 63 bits and fewer are a counter's, or a bad draw's that comes once in 2^63.
		if cert.SerialNumber.BitLen() < 64 {
			t.Errorf("serial %s has %d bits: RFC 5280 and we want it random", serial, cert.SerialNumber.BitLen())
		}
		p.serials[serial] = true
	}
}

// TestRestoreReusesNothing loses a cluster that went on after its backup, restores it, lets it go on, and does so again from the
// same file: no serial, revision, bundle sequence or one-time token comes twice.
func TestRestoreReusesNothing(t *testing.T) {
	c := backupConfig(t)
	ctx := context.Background()
	m, w, stop := startMember(t, c)
	p := &past{serials: map[string]bool{}}
	p.live(t, m, w, 0)
	used, unused := token("used"), token("unused")
	for _, k := range []identity.JoinToken{used, unused} {
		if err := w.CreateJoinToken(ctx, k); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := w.UseJoinToken(ctx, time.Now(), used.Hash, identity.JoinAgent); err != nil {
		t.Fatal(err)
	}
	agents := []identity.Agent{{ID: "spiffe://example.org/countersign/agent/join/a", Kind: "join_token"}, {ID: "spiffe://example.org/countersign/agent/join/b", Kind: "join_token"}}
	for _, a := range agents {
		if _, err := w.PutAgent(ctx, a); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.BanAgent(ctx, agents[1].ID); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(m.testDir(), "backup")
	m.saveTo(t, file)

	// The cluster goes on, spends the other token too, and bans the other agent.
	p.live(t, m, w, 100)
	if _, err := w.UseJoinToken(ctx, time.Now(), unused.Hash, identity.JoinAgent); err != nil {
		t.Fatal(err)
	}
	if err := w.BanAgent(ctx, agents[0].ID); err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	for round := range 2 {
		p.revision, p.sequence = m.store.Revision(), m.store.Bundle().Sequence
		stop()
		if err := os.Rename(c.DataDir, fmt.Sprintf("%s.lost%d", c.DataDir, round)); err != nil {
			t.Fatal(err)
		}
		// A bundle's sequence is new as long as it changes less than once a second; here it changed three times at once.
		now = now.Add(time.Minute)
		res, err := restoreBackup(inCommand(), c, file, now)
		if err != nil {
			t.Fatal(err)
		}
		if s := res.Backup.State; s.Agents != 2 || s.Banned != 1 || s.JoinTokens != 2 || s.Entries != 20 {
			t.Errorf("the report says %+v", s)
		}
		if steps := strings.Join(res.Next, "\n"); !strings.Contains(steps, "2 agents, 1 of them banned") || !strings.Contains(steps, "token create --server") || !strings.Contains(steps, "no member of the lost cluster") {
			t.Errorf("next steps: %s", steps)
		}
		m, w, stop = startMember(t, c)
		if r, s := m.store.Revision(), m.store.Bundle().Sequence; r <= p.revision || s <= p.sequence || r < 1<<32 {
			t.Errorf("round %d: it goes on at revision %d and sequence %d: %d and %d were given before", round, r, s, p.revision, p.sequence)
		}
		for _, k := range []identity.JoinToken{used, unused} {
			if _, err := w.UseJoinToken(ctx, time.Now(), k.Hash, identity.JoinAgent); !errors.Is(err, identity.ErrPrecondition) {
				t.Errorf("round %d: token %s: %v", round, k.ID, err)
			}
		}
		if _, ok := m.store.Entry(entry(0).ID); !ok {
			t.Error("an entry of the backup is not there")
		}
		if _, ok := m.store.Entry(entry(100).ID); ok {
			t.Error("an entry of after the backup is there")
		}
		if a, ok := m.store.Agent(agents[1].ID); !ok || !a.Banned {
			t.Error("a ban of before the backup is lost")
		}
		if a, ok := m.store.Agent(agents[0].ID); !ok || a.Banned {
			t.Error("a ban of after the backup is there: the report says that it is not")
		}
		p.live(t, m, w, 200+100*round)
	}
	if len(p.serials) < 800 {
		t.Errorf("only %d serials", len(p.serials))
	}
	// It restarts as any member does.
	revision := m.store.Revision()
	stop()
	if m, _, _ = startMember(t, c); m.store.Revision() < revision {
		t.Errorf("after a restart it is at revision %d, before at %d", m.store.Revision(), revision)
	}
}

// TestSaveUnderWrites: each backup is the state at one moment, at which all that was acknowledged before its beginning is there.
func TestSaveUnderWrites(t *testing.T) {
	c := backupConfig(t)
	m, w, _ := startMember(t, c)
	ctx, cancel := context.WithCancel(context.Background())
	var mu sync.Mutex
	var revisions []uint64 // of entry 0, 1, ..., once acknowledged
	written := make(chan struct{}, 1)
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := 0; ctx.Err() == nil; i++ {
			e, err := w.CreateEntry(context.Background(), time.Now(), entry(i))
			if err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			revisions = append(revisions, e.Revision)
			mu.Unlock()
			select {
			case written <- struct{}{}:
			default:
			}
		}
	})
	defer wg.Wait()
	defer cancel()
	type taken struct {
		acked int
		sum   store.Summary
	}
	var all []taken
	for i := range 20 {
		select { // each backup begins after another write, while the next is on its way
		case <-written:
		case <-time.After(time.Minute):
			t.Fatal("no write in a minute")
		}
		mu.Lock()
		acked := len(revisions)
		mu.Unlock()
		file := filepath.Join(m.testDir(), fmt.Sprint("b", i))
		m.saveTo(t, file)
		f, err := os.Open(file)
		if err != nil {
			t.Fatal(err)
		}
		sum, err := verifyBackup(inCommand(), c, f, m.td)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, taken{acked, sum})
	}
	cancel()
	wg.Wait()
	for i, b := range all {
		have := 0
		for _, r := range revisions {
			if r <= b.sum.Revision {
				have++
			}
		}
		if b.sum.Entries != have || have < b.acked {
			t.Errorf("backup %d of revision %d has %d entries: want the %d up to there, and %d were acknowledged before", i, b.sum.Revision, b.sum.Entries, have, b.acked)
		}
	}
	if all[0].sum.Entries == all[len(all)-1].sum.Entries {
		t.Error("the first backup and the last have the same entries: nothing was written meanwhile")
	}
}

// made is a backup of a cluster that is gone.
func made(t *testing.T) (c *config.Server, file string) {
	t.Helper()
	c = backupConfig(t)
	m, w, stop := startMember(t, c)
	for i := range 3 {
		if _, err := w.CreateEntry(context.Background(), time.Now(), entry(i)); err != nil {
			t.Fatal(err)
		}
	}
	file = filepath.Join(m.testDir(), "backup")
	m.saveTo(t, file)
	stop()
	if err := os.RemoveAll(c.DataDir); err != nil {
		t.Fatal(err)
	}
	return c, file
}

func TestRestoreRefuses(t *testing.T) {
	c, file := made(t)
	dir := filepath.Dir(file)
	good, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	kek, err := seal.OpenKEK(context.Background(), c.Backup.Key, seal.Options{MustExist: true})
	if err != nil {
		t.Fatal(err)
	}
	made := func(h backup.Header, state string) []byte {
		ring, err := seal.NewKeyring()
		if err != nil {
			t.Fatal(err)
		}
		var b bytes.Buffer
		h.Member, h.CreatedAt = "ca-1", time.Now()
		if err := backup.Save(context.Background(), &b, kek, h, ring, int64(len(state)), func(w io.Writer) error { _, err := io.WriteString(w, state); return err }); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}
	other := filepath.Join(dir, "other")
	if _, err := seal.OpenFileKEK(other); err != nil {
		t.Fatal(err)
	}
	noPIN := "pkcs11:token=t;object=o?module-path=/absent.so&pin-source=" + dir + "/nopin"
	for name, tc := range map[string]struct {
		file  []byte
		edit  func(*config.Server)
		is    error
		words []string
	}{
		"a flipped byte":            {flipped(good, len(good)-100), nil, identity.ErrInvalid, []string{"damaged in bytes", "take another one"}},
		"a flipped byte of header":  {flipped(good, 60), nil, identity.ErrInvalid, []string{"damaged in bytes 19 to "}},
		"cut off":                   {good[:len(good)-1], nil, identity.ErrInvalid, []string{fmt.Sprintf("at byte %d", len(good)-1), "lacks the 1 bytes"}},
		"with more behind":          {append(bytes.Clone(good), 0), nil, identity.ErrInvalid, []string{fmt.Sprintf("at byte %d", len(good))}},
		"empty":                     {nil, nil, identity.ErrInvalid, []string{"at byte 0", "empty"}},
		"not a backup":              {[]byte("SQLite format 3\x00 and so on"), nil, identity.ErrInvalid, []string{"at byte 0", "begins with"}},
		"another trust domain":      {good, func(c *config.Server) { c.TrustDomain = "other.org" }, identity.ErrPrecondition, []string{`"example.org"`, `"other.org"`}},
		"another domain within":     {made(backup.Header{TrustDomain: "example.org"}, otherState(t)), nil, identity.ErrInvalid, []string{"other.org"}},
		"a newer level":             {made(backup.Header{TrustDomain: "example.org", Level: store.Level + 1, Version: "9.9"}, "x"), nil, identity.ErrPrecondition, []string{"level 3", "9.9"}},
		"no state":                  {made(backup.Header{TrustDomain: "example.org"}, "this is no state"), nil, identity.ErrInvalid, []string{"state"}},
		"another key":               {good, func(c *config.Server) { c.Backup.Key = "file:" + other }, seal.ErrOpen, []string{kek.URI(), other, "--key"}},
		"a key that is not there":   {good, func(c *config.Server) { c.Backup.Key = "file:" + dir + "/absent" }, identity.ErrPrecondition, []string{"absent", "--key"}},
		"a token without its PIN":   {good, func(c *config.Server) { c.Backup.Key = noPIN }, nil, []string{"pkcs11:", "nopin"}},
		"a kind of key that is not": {good, func(c *config.Server) { c.Backup.Key = "gpg:me" }, seal.ErrKEK, []string{"gpg"}},
	} {
		t.Run(name, func(t *testing.T) {
			conf := *c
			if tc.edit != nil {
				tc.edit(&conf)
			}
			bad := filepath.Join(t.TempDir(), "bad")
			if err := os.WriteFile(bad, tc.file, 0o600); err != nil {
				t.Fatal(err)
			}
			_, err := restoreBackup(inCommand(), &conf, bad, time.Now())
			if err == nil {
				t.Fatal("restored")
			}
			if tc.is != nil && !errors.Is(err, tc.is) {
				t.Errorf("%v: want %v", err, tc.is)
			}
			for _, w := range tc.words {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("%v: want it to say %q", err, w)
				}
			}
			if _, err := os.Stat(c.DataDir); !errors.Is(err, fs.ErrNotExist) {
				t.Error("it wrote into data_dir")
			}
			if _, err := os.Stat(dir + "/absent"); err == nil {
				t.Error("it made a key")
			}
		})
	}
	if _, err := restoreBackup(inCommand(), c, dir, time.Now()); !errors.Is(err, identity.ErrInvalid) || !strings.Contains(err.Error(), "not a regular file") {
		t.Errorf("a folder: %v", err)
	}
	if _, err := restoreBackup(inCommand(), c, dir+"/nothing", time.Now()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
}

func flipped(b []byte, at int) []byte {
	out := bytes.Clone(b)
	out[at] ^= 0x10
	return out
}

// otherState is the snapshot of an empty state of another trust domain.
func otherState(t *testing.T) string {
	t.Helper()
	s, err := store.Open(store.Config{Dir: filepath.Join(t.TempDir(), "state"), TrustDomain: spiffeid.RequireTrustDomainFromString("other.org")})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	snap, err := s.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	defer snap.Release()
	var b bytes.Buffer
	if _, err := snap.WriteTo(&b); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// TestRestoreFolder: what is in data_dir stays there.
func TestRestoreFolder(t *testing.T) {
	c, file := made(t)
	restore := func() error { _, err := restoreBackup(inCommand(), c, file, time.Now()); return err }
	if err := os.Mkdir(c.DataDir, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"something", "member.json", "raft", "audit"} {
		other := filepath.Join(c.DataDir, name)
		if err := os.WriteFile(other, []byte("theirs"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := restore(); !errors.Is(err, identity.ErrPrecondition) || !strings.Contains(err.Error(), "not empty ("+name+")") {
			t.Errorf("%s: %v", name, err)
		}
		if got, err := os.ReadFile(other); err != nil || string(got) != "theirs" {
			t.Errorf("%s is now %q, %v", name, got, err)
		}
		if err := os.Remove(other); err != nil {
			t.Fatal(err)
		}
	}
	// A process on the folder that has not written anything yet.
	lock, err := durable.Lock(filepath.Join(c.DataDir, "lock"))
	if err != nil {
		t.Fatal(err)
	}
	if err := restore(); !errors.Is(err, durable.ErrLocked) {
		t.Errorf("in use: %v", err)
	}
	lock.Close()
	if err := os.Chmod(c.DataDir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := restore(); !errors.Is(err, durable.ErrLoose) {
		t.Errorf("a folder that others may read: %v", err)
	}
	if err := os.Chmod(c.DataDir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := restore(); err != nil {
		t.Errorf("an empty folder: %v", err)
	}
	if err := restore(); !errors.Is(err, identity.ErrPrecondition) {
		t.Errorf("a second time: %v", err)
	}
}

// A seal key that cannot be used is found before anything is written.
func TestRestoreSealKey(t *testing.T) {
	c, file := made(t)
	c.Seal.Key = "pkcs11:token=t;object=o?module-path=/absent.so&pin-source=/absent.pin"
	if _, err := restoreBackup(inCommand(), c, file, time.Now()); !errors.Is(err, identity.ErrPrecondition) || !strings.Contains(err.Error(), "seal.key") {
		t.Errorf("%v", err)
	}
	if list, err := os.ReadDir(c.DataDir); err != nil || len(list) != 1 || list[0].Name() != "lock" {
		t.Errorf("it left %v, %v", list, err)
	}
	c.Seal.Key = "file:" + filepath.Join(c.DataDir, "kek") // made there, as at a first start
	if _, err := restoreBackup(inCommand(), c, file, time.Now()); err != nil {
		t.Error(err)
	}
	startMember(t, c)
	for uri, want := range map[string]bool{c.Seal.Key: true, "file://" + c.DataDir + "/kek": true, c.Backup.Key: false, "transit:a/b": false} {
		if inFolder(uri, c.DataDir) != want {
			t.Errorf("%s in %s: want %t", uri, c.DataDir, want)
		}
	}
}

// TestRestoreCrashes leaves the folder as a crash after each step would: no member begins anything there, and restoring again
// makes it whole.
func TestRestoreCrashes(t *testing.T) {
	c, file := made(t)
	steps := []string{"lock", restoringFile, "raft.restoring", "raft", "keyring", "member.json"}
	for n := range steps {
		if err := os.RemoveAll(c.DataDir); err != nil {
			t.Fatal(err)
		}
		if _, err := restoreBackup(inCommand(), c, file, time.Now()); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(filepath.Join(c.DataDir, restoringFile)); !errors.Is(err, fs.ErrNotExist) {
			t.Fatalf("%s is still there: %v", restoringFile, err)
		}
		if err := os.WriteFile(filepath.Join(c.DataDir, restoringFile), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		done := steps[:n+1]
		if last := done[n]; last == "raft.restoring" {
			if err := os.Rename(filepath.Join(c.DataDir, "raft"), filepath.Join(c.DataDir, last)); err != nil {
				t.Fatal(err)
			}
		}
		for _, name := range steps[n+1:] {
			if err := os.RemoveAll(filepath.Join(c.DataDir, name)); err != nil {
				t.Fatal(err)
			}
		}
		err := openClose(t, c)
		switch done[n] {
		case "lock": // nothing was begun: a member that is started here begins anew, as on any empty folder
			if err := os.RemoveAll(c.DataDir); err != nil {
				t.Fatal(err)
			}
		case "member.json":
			if err != nil {
				t.Errorf("after %v: %v", done, err)
			}
			continue
		default:
			if !errors.Is(err, identity.ErrPrecondition) || !strings.Contains(err.Error(), "a restore of a backup broke off") {
				t.Errorf("after %v a member starts with %v", done, err)
			}
		}
		if _, err := restoreBackup(inCommand(), c, file, time.Now()); err != nil {
			t.Errorf("again after %v: %v", done, err)
		}
		if list, err := os.ReadDir(c.DataDir); err != nil || slices.ContainsFunc(list, func(e fs.DirEntry) bool {
			return strings.HasPrefix(e.Name(), "rest") || strings.HasSuffix(e.Name(), "restoring")
		}) {
			t.Errorf("after %v and again: %v, %v", done, list, err)
		}
	}
	startMember(t, c)
}

// TestRestoreOfAChangingFile: what was verified is read again, and that reading counts too.
func TestRestoreOfAChangingFile(t *testing.T) {
	c, file := made(t)
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	td := spiffeid.RequireTrustDomainFromString(c.TrustDomain)
	sum, err := verifyBackup(inCommand(), c, f, td)
	if err != nil {
		t.Fatal(err)
	}
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte{1, 2, 3}, info.Size()-50); err != nil {
		t.Fatal(err)
	}
	d := &dataDir{path: c.DataDir, td: td}
	var damage *backup.DamageError
	if _, err := d.restore(context.Background(), c, io.Discard, f, sum, time.Now()); !errors.As(err, &damage) {
		t.Errorf("restored with %v", err)
	}
	if err := openClose(t, c); !errors.Is(err, identity.ErrPrecondition) {
		t.Errorf("a member starts there with %v", err)
	}
}

func TestInspect(t *testing.T) {
	c, file := made(t)
	conf := filepath.Join(filepath.Dir(file), "server.yaml")
	if err := os.WriteFile(conf, fmt.Appendf(nil, "version: 1\ntrust_domain: example.org\nname: ca-1\nadvertise: ca-1:1\ndata_dir: %s\nbackup: {key: '%s'}\n", c.DataDir, c.Backup.Key), 0o600); err != nil {
		t.Fatal(err)
	}
	code, out, errOut := command("backup", "inspect", file)
	if code != 0 || !strings.Contains(out, "example.org") || !strings.Contains(out, c.Backup.Key[5:]) || strings.Contains(out, "verified") {
		t.Errorf("without a key: %d %s %s", code, out, errOut)
	}
	for _, args := range [][]string{{"--key", c.Backup.Key}, {"-c", conf}} {
		code, out, errOut = command(append([]string{"backup", "inspect", file, "-o", "json"}, args...)...)
		var r report
		if err := json.Unmarshal([]byte(out), &r); code != 0 || err != nil || r.State == nil || r.State.Entries != 3 || r.State.TrustDomain != "example.org" || r.Header.Member != "ca-1" || !r.Header.Confirmed {
			t.Errorf("%v: %d %s %s: %v", args, code, out, errOut, err)
		}
	}
	raw, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	bad := filepath.Join(t.TempDir(), "bad")
	for name, b := range map[string][]byte{"cut off": raw[:len(raw)/2], "another file": []byte("hello"), "empty": nil} {
		if err := os.WriteFile(bad, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if code, _, errOut := command("backup", "inspect", bad); code != 2 || !strings.Contains(errOut, "at byte") || !strings.Contains(errOut, bad) {
			t.Errorf("%s: %d %s", name, code, errOut)
		}
	}
	if err := os.WriteFile(bad, flipped(raw, len(raw)-1), 0o600); err != nil {
		t.Fatal(err)
	}
	if code, _, errOut := command("backup", "inspect", bad, "--key", c.Backup.Key); code != 2 || !strings.Contains(errOut, "damaged in bytes") {
		t.Errorf("flipped: %d %s", code, errOut)
	}
}

func TestProgress(t *testing.T) {
	var b bytes.Buffer
	p := newProgress(&b, "saving")
	p.at(1, 100)
	p.end()
	if b.Len() > 0 {
		t.Errorf("at once: %q", b.String())
	}
	p.last = p.last.Add(-time.Hour)
	p.at(50<<20, 100<<20)
	p.end()
	if got := b.String(); !strings.HasPrefix(got, "saving: 50.0 MiB of 100.0 MiB, ") || strings.Count(got, "\n") != 1 || strings.ContainsAny(got, "\r\x1b") {
		t.Errorf("in a pipe: %q", got)
	}
	b.Reset()
	p.bar, p.last = true, p.last.Add(-time.Hour)
	p.at(50<<20, 100<<20)
	p.end()
	if got := b.String(); !strings.Contains(got, "[###############...............]  50%") || !strings.HasSuffix(got, "\n") {
		t.Errorf("on a terminal: %q", got)
	}
}
