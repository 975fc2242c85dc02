package attestor

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"countersign.io/countersign/identity"
)

func newAttestor(t *testing.T, cfg Config) *Attestor {
	t.Helper()
	a, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// at has every caller run in one place.
func at(p Place) func(*Peer) (Place, error) { return func(*Peer) (Place, error) { return p, nil } }

func TestNewChecks(t *testing.T) {
	for _, cfg := range []Config{{TokenPath: "run/token"}, {MaxHashBytes: -1}, {Timeout: -1}} {
		if _, err := New(cfg); !errors.Is(err, identity.ErrInvalid) {
			t.Errorf("%+v: got %v", cfg, err)
		}
	}
}

func TestAttestProcess(t *testing.T) {
	uid, gid := strconv.Itoa(os.Geteuid()), strconv.Itoa(os.Getegid())
	binary := copyBinary(t, filepath.Join(t.TempDir(), "app"))
	data, err := os.ReadFile(binary)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(data)
	want := []identity.Selector{"systemd:unit:app.service", identity.Selector("unix:gid:" + gid),
		identity.Selector("unix:path:" + binary), identity.Selector("unix:sha256:" + hex.EncodeToString(sum[:])), identity.Selector("unix:uid:" + uid)}
	if u, err := user.LookupId(uid); err == nil {
		want = append(want, identity.Selector("unix:user:"+u.Username))
	}
	if g, err := user.LookupGroupId(gid); err == nil {
		want = append(want, identity.Selector("unix:group:"+g.Name))
	}
	identity.SortSelectors(want)

	a := newAttestor(t, Config{SHA256: true, Systemd: true, Locate: at(Place{Unit: "app.service"})})
	c := startCaller(t, callerOptions{binary: binary})
	p := c.peer()
	w, err := a.Attest(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(w.Evidence.Selectors, want) || w.Evidence.Token != nil || w.PodUID != "" {
		t.Errorf("got %+v\nwant selectors %v", w, want)
	}
	again, err := a.Attest(t.Context(), startCaller(t, callerOptions{binary: binary}).peer())
	if err != nil || again.Key != w.Key || len(w.Key) != 64 {
		t.Errorf("another process of the same kind: key %q, %v; want %q", again.Key, err, w.Key)
	}

	// What is opt-in is not there unless asked for.
	plain, err := newAttestor(t, Config{Locate: at(Place{Unit: "app.service"})}).Attest(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range plain.Evidence.Selectors {
		if s.Name() == "unix:sha256" || s.Name() == "systemd:unit" {
			t.Errorf("got %s without asking", s)
		}
	}
	if plain.Key == w.Key {
		t.Error("two sets of selectors have one key")
	}
}

// The test's own process, wherever it runs: the real cgroup file is read.
func TestAttestWithRealCgroups(t *testing.T) {
	p := startCaller(t, callerOptions{}).peer()
	data, err := p.cgroups()
	if err != nil {
		t.Fatal(err)
	}
	place, err := parseCgroups(data)
	if err != nil || place.PodUID != "" {
		t.Skipf("the tests run in a pod or beside one: %+v, %v", place, err)
	}
	if _, err := newAttestor(t, Config{}).Attest(t.Context(), p); err != nil {
		t.Error(err)
	}
}

// In a mount namespace of its own, a process can have anything at a trusted program's path.
func TestAttestPathOfAnotherMountNamespace(t *testing.T) {
	dir := t.TempDir()
	trusted := filepath.Join(dir, "trusted")
	writeFile(t, trusted, []byte("the host's program"))
	evil := copyBinary(t, filepath.Join(dir, "evil"))

	c := startCaller(t, callerOptions{namespaces: true, later: true})
	c.do("bind %s %s", evil, trusted)
	c.do("exec %s", trusted)
	c.connect()
	p := c.peer()
	if path, err := p.exePath(); err != nil || path != trusted {
		t.Fatalf("the imitation runs as %q, %v", path, err)
	}
	w, err := newAttestor(t, Config{Locate: at(Place{})}).Attest(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range w.Evidence.Selectors {
		if s.Name() == "unix:path" {
			t.Errorf("the imitation got %s", s)
		}
	}
}

func TestAttestReplacedBinary(t *testing.T) {
	binary := copyBinary(t, filepath.Join(t.TempDir(), "app"))
	p := startCaller(t, callerOptions{binary: binary}).peer()
	if err := os.Remove(binary); err != nil {
		t.Fatal(err)
	}
	copyBinary(t, binary) // another file now
	w, err := newAttestor(t, Config{Locate: at(Place{})}).Attest(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	if i := slices.IndexFunc(w.Evidence.Selectors, func(s identity.Selector) bool { return s.Name() == "unix:path" }); i >= 0 {
		t.Errorf("got %s for a file that is gone", w.Evidence.Selectors[i])
	}
}

// podCaller runs in a root of its own, which make furnishes.
func podCaller(t *testing.T, make func(root string)) *Peer {
	t.Helper()
	root := shortDir(t)
	make(root)
	c := startCaller(t, callerOptions{namespaces: true})
	c.do("chroot %s", root)
	return c.peer()
}

func TestAttestPod(t *testing.T) {
	token := podToken(t, podA)
	p := podCaller(t, func(root string) { // as the kubelet projects it
		dir := filepath.Join(root, filepath.Dir(DefaultTokenPath))
		writeFile(t, dir+"/..2026_07_01_10_00_00.123/token", append(slices.Clone(token), '\n'))
		symlink(t, "..2026_07_01_10_00_00.123", dir+"/..data")
		symlink(t, "..data/token", dir+"/token")
	})
	a := newAttestor(t, Config{Systemd: true, Locate: at(Place{PodUID: podA, ContainerID: ctrA, Unit: "x.scope"})})
	w, err := a.Attest(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(w.Evidence.Token, token) || w.PodUID != podA || w.ContainerID != ctrA {
		t.Errorf("got pod %s, container %s, a token of %d bytes", w.PodUID, w.ContainerID, len(w.Evidence.Token))
	}
	want := []identity.Selector{identity.Selector("unix:gid:" + strconv.Itoa(os.Getegid())),
		identity.Selector("unix:path:" + testBinary(t)), identity.Selector("unix:uid:" + strconv.Itoa(os.Geteuid()))}
	if !slices.Equal(w.Evidence.Selectors, want) {
		t.Errorf("got %v, want %v", w.Evidence.Selectors, want)
	}
	held := w.Evidence.Token
	w.Wipe()
	if w.Evidence.Token != nil || !bytes.Equal(held, make([]byte, len(held))) {
		t.Error("the token is still there after Wipe")
	}
	other, err := newAttestor(t, Config{Locate: at(Place{PodUID: podA, ContainerID: ctrB})}).Attest(t.Context(), p)
	if err != nil || other.Key == w.Key {
		t.Errorf("two containers have one key, %v", err)
	}
}

func TestAttestPodRefuses(t *testing.T) {
	host := shortDir(t)
	writeFile(t, host+"/token", podToken(t, podA))
	const path = "/run/token"
	for _, c := range []struct {
		name string
		make func(root string)
		err  error
		says string
	}{
		{"no token", func(string) {}, identity.ErrDenied, "no token"},
		{"token of another pod", func(root string) { writeFile(t, root+path, podToken(t, podB)) }, identity.ErrUnauthenticated, podB},
		{"symlink to another pod's token", func(root string) {
			writeFile(t, root+"/shared/token", podToken(t, podB))
			symlink(t, "/shared/token", root+path)
		}, identity.ErrUnauthenticated, podB},
		{"symlink to the host", func(root string) { symlink(t, host+"/token", root+path) }, identity.ErrDenied, "no token"},
		{"dot-dot to the host", func(root string) {
			symlink(t, "../../../../../../../../"+host+"/token", root+path)
		}, identity.ErrDenied, "no token"},
		{"FIFO", func(root string) { makeNode(t, root+path, unix.S_IFIFO, 0) }, identity.ErrUnauthenticated, "FIFO"},
		{"1 MiB", func(root string) { writeFile(t, root+path, make([]byte, 1<<20)) }, identity.ErrUnauthenticated, "at the most"},
		{"no token in it", func(root string) { writeFile(t, root+path, []byte("secretcontent")) }, identity.ErrUnauthenticated, "no service account token"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var log bytes.Buffer
			a := newAttestor(t, Config{TokenPath: path, Locate: at(Place{PodUID: podA}),
				Log: slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))})
			w, err := a.Attest(t.Context(), podCaller(t, c.make))
			if w != nil || !errors.Is(err, c.err) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("got %v, %v; want %v with %q", w, err, c.err, c.says)
			}
			if strings.Contains(log.String()+err.Error(), "secretcontent") {
				t.Errorf("a token was shown: %v, %s", err, log.String())
			}
		})
	}
}

// Locate is called after the first look at the process and before the evidence is read: what happens in it
// happens in the middle of an attestation.
func TestAttestWhileTheCallerChanges(t *testing.T) {
	token := podToken(t, podA)
	tokenFile := filepath.Join(shortDir(t), "token")
	writeFile(t, tokenFile, token)
	other := copyBinary(t, filepath.Join(t.TempDir(), "other"))
	places := map[string]Place{"process": {}, "pod": {PodUID: podA, TokenPath: tokenFile}}
	for kind, place := range places {
		for name, happen := range map[string]func(c *caller){
			"executes":         func(c *caller) { c.do("exec %s", other) },
			"exits":            func(c *caller) { c.exit(false) },
			"exits, is reaped": func(c *caller) { c.exit(true) },
		} {
			t.Run(kind+" "+name, func(t *testing.T) {
				c := startCaller(t, callerOptions{})
				a := newAttestor(t, Config{Locate: func(*Peer) (Place, error) { happen(c); return place, nil }})
				w, err := a.Attest(t.Context(), c.peer())
				if w != nil {
					t.Errorf("got %+v", w)
				}
				wantChanged(t, "Attest", err)
			})
		}
		t.Run(kind+" stays", func(t *testing.T) {
			w, err := newAttestor(t, Config{Locate: at(place)}).Attest(t.Context(), startCaller(t, callerOptions{}).peer())
			if err != nil || place.PodUID != "" && !bytes.Equal(w.Evidence.Token, token) {
				t.Errorf("got %+v, %v", w, err)
			}
		})
	}
}

// The last look at the process comes after the evidence was read. A clock that is asked for the age of a
// hash serves to change the caller at that time.
func TestAttestChangesAtTheEnd(t *testing.T) {
	c := startCaller(t, callerOptions{})
	p := c.peer()
	other := copyBinary(t, filepath.Join(t.TempDir(), "other"))
	asked := 0
	a := newAttestor(t, Config{SHA256: true, Locate: at(Place{}), Now: func() time.Time {
		if asked++; asked == 3 { // user, group, hash
			c.do("exec %s", other)
		}
		return time.Now()
	}})
	w, err := a.Attest(t.Context(), p)
	if w != nil || asked < 3 {
		t.Errorf("got %+v; the clock was asked %d times", w, asked)
	}
	wantChanged(t, "Attest", err)
}

func TestAttestRefusesContradiction(t *testing.T) {
	a := newAttestor(t, Config{Locate: func(*Peer) (Place, error) {
		return parseCgroups([]byte("2:memory:/kubepods/pod" + podA + "\n1:pids:/kubepods/pod" + podB + "\n"))
	}})
	if w, err := a.Attest(t.Context(), startCaller(t, callerOptions{}).peer()); w != nil || !errors.Is(err, identity.ErrUnauthenticated) {
		t.Errorf("got %+v, %v", w, err)
	}
}

// A pod whose file system hangs holds up itself and nobody else.
func TestAttestWhileAnotherHangs(t *testing.T) {
	tokenFile := filepath.Join(shortDir(t), "token")
	writeFile(t, tokenFile, podToken(t, podA))
	pod := Place{PodUID: podA, TokenPath: tokenFile}
	a := newAttestor(t, Config{Locate: func(p *Peer) (Place, error) { return pod, nil }, Timeout: 50 * time.Millisecond})
	p := startCaller(t, callerOptions{}).peer()
	gateName := fmt.Sprintf("pod %s uid %d", podA, os.Geteuid())
	if err := a.gate.enter(t.Context(), gateName); err != nil { // as one that hangs does
		t.Fatal(err)
	}
	if w, err := a.Attest(t.Context(), p); w != nil || !errors.Is(err, identity.ErrUnavailable) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the same pod: got %v, %v", w, err)
	}
	a.cfg.Timeout = time.Minute
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if w, err := a.Attest(ctx, p); w != nil || !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: got %v, %v", w, err)
	}
	pod.PodUID = "" // another
	if _, err := a.Attest(t.Context(), p); err != nil {
		t.Errorf("another caller: %v", err)
	}
	pod.PodUID = podA
	if err := a.gate.enter(t.Context(), fmt.Sprintf("pod %s uid %d", podA, os.Geteuid()+1)); err != nil { // who only looks like the pod
		t.Errorf("another user's: %v", err)
	}
	pod.PodUID = podA
	a.gate.leave(gateName)
	if _, err := a.Attest(t.Context(), p); err != nil {
		t.Errorf("after it went on: %v", err)
	}
}

func TestAttestManyAtOnce(t *testing.T) {
	tokenFile := filepath.Join(shortDir(t), "token")
	writeFile(t, tokenFile, podToken(t, podA))
	a := newAttestor(t, Config{SHA256: true, Locate: at(Place{PodUID: podA, TokenPath: tokenFile})})
	p := startCaller(t, callerOptions{}).peer()
	errs := make(chan error)
	for range 50 {
		go func() {
			w, err := a.Attest(t.Context(), p)
			if err == nil {
				w.Wipe()
			}
			errs <- err
		}()
	}
	for range 50 {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	a.gate.mu.Lock()
	defer a.gate.mu.Unlock()
	if len(a.gate.busy) > 1 { // the last one may still be on its way out
		t.Errorf("%d left in the gate", len(a.gate.busy))
	}
}

func BenchmarkAttestProcess(b *testing.B) { benchmarkAttest(b, Place{}) }

func BenchmarkAttestPod(b *testing.B) {
	path := filepath.Join(b.TempDir(), "token")
	if err := os.WriteFile(path, podToken(b, podA), 0o600); err != nil {
		b.Fatal(err)
	}
	benchmarkAttest(b, Place{PodUID: podA, ContainerID: ctrA, TokenPath: path})
}

func benchmarkAttest(b *testing.B, place Place) {
	a, err := New(Config{Locate: func(p *Peer) (Place, error) { _, err := byCgroups(p); return place, err }})
	if err != nil {
		b.Fatal(err)
	}
	fd, err := unix.PidfdOpen(os.Getpid(), 0)
	if err != nil {
		b.Skip(err)
	}
	p := &Peer{pid: os.Getpid(), uid: uint32(os.Geteuid()), gid: uint32(os.Getegid()), pidfd: fd, dir: -1}
	defer p.Close()
	if err := p.open(); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		w, err := a.Attest(b.Context(), p)
		if err != nil {
			b.Fatal(err)
		}
		w.Wipe()
	}
}
