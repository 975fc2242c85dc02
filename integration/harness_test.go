// Package integration tests real processes from the outside. The tests here need neither root nor network and run with
// "make test"; those under the build tag "integration" need both and run with "make integration".
package integration

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"countersign.io/countersign/integration/cluster"
	"countersign.io/countersign/integration/issuer"
)

const trustDomain = "process.test"

// bin is where TestMain built the binaries; set once, before any test runs.
var bin string

func TestMain(m *testing.M) { os.Exit(testMain(m)) }

func testMain(m *testing.M) int {
	dir, err := os.MkdirTemp("", "cs-bin-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	root, err := filepath.Abs("..")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	if err := cluster.Build(context.Background(), root, dir, raceEnabled); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	bin = dir
	defer closeNodes()
	// A child built with the race detector would sleep a second at its end.
	if err := errors.Join(os.Setenv("GORACE", "atexit_sleep_ms=0"), together()); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

// world is a cluster with a made-up kube cluster registered.
type world struct {
	*cluster.Cluster
	t   *testing.T
	ctx context.Context
	iss *issuer.Issuer
}

// newWorld starts members and registers the kube cluster "test".
func newWorld(t *testing.T, members int, serverYAML string) *world {
	t.Helper()
	return newWorldOf(t, bin, members, serverYAML)
}

// newWorldOf is newWorld of the binaries in a folder.
func newWorldOf(t *testing.T, bin string, members int, serverYAML string, edits ...func(*cluster.Cluster)) *world {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 8*time.Minute)
	t.Cleanup(cancel)
	dir, err := os.MkdirTemp("", "cs-") // short: sockets live in it
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, ctx: ctx, Cluster: &cluster.Cluster{Dir: dir, Bin: bin, TrustDomain: trustDomain, ServerYAML: serverYAML}}
	for _, edit := range edits {
		edit(w.Cluster)
	}
	t.Cleanup(func() {
		w.Close()
		if t.Failed() {
			w.logs()
		}
		os.RemoveAll(dir)
	})
	for range members {
		if _, err := w.StartMember(ctx); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.AllVote(ctx); err != nil {
		t.Fatal(err)
	}
	if w.iss, err = issuer.New(dir); err != nil {
		t.Fatal(err)
	}
	w.admin("kube", "add", "test", "--issuer", w.iss.URL, "--jwks-file", w.iss.JWKSFile)
	return w
}

func (w *world) logs() {
	files, _ := filepath.Glob(filepath.Join(w.Dir, "*", "log"))
	for _, f := range files {
		if data, err := os.ReadFile(f); err == nil {
			lines := strings.Split(strings.TrimSpace(string(data)), "\n")
			w.t.Logf("--- %s\n%s", f, strings.Join(lines[max(0, len(lines)-40):], "\n"))
		}
	}
}

func (w *world) admin(args ...string) string {
	w.t.Helper()
	out, err := w.Admin(w.ctx, args...)
	if err != nil {
		w.t.Fatal(err)
	}
	return out
}

// createEntry returns the new entry's ID.
func (w *world) createEntry(args ...string) string {
	w.t.Helper()
	var e struct{ ID string }
	if err := json.Unmarshal([]byte(w.admin(append([]string{"entry", "create", "-o", "json"}, args...)...)), &e); err != nil || e.ID == "" {
		w.t.Fatalf("no entry ID: %v", err)
	}
	return e.ID
}

func (w *world) agent(flags ...string) *cluster.Agent {
	w.t.Helper()
	a, err := w.StartAgent(w.ctx, "test/node-1", append([]string{"--insecure-dev-pods", w.iss.Tokens}, flags...)...)
	if err != nil {
		w.t.Fatal(err)
	}
	return a
}

func (w *world) token(sa, node string) string {
	w.t.Helper()
	tok, err := w.iss.Token("shop", sa, node)
	if err != nil {
		w.t.Fatal(err)
	}
	return tok
}

// uidSelectors are selectors of this test's own process on any agent that joined by token.
func uidSelectors() []string {
	return []string{"-s", fmt.Sprintf("unix:uid:%d", os.Getuid()), "-s", "agent:kind:join_token"}
}

// stream is an open FetchX509SVID of this process.
type stream struct {
	updates chan []string // SPIFFE IDs, sorted as served
	errs    chan error
}

func (s *stream) OnX509ContextUpdate(x *workloadapi.X509Context) {
	var ids []string
	for _, v := range x.SVIDs {
		ids = append(ids, v.ID.String())
	}
	s.updates <- ids
}

func (s *stream) OnX509ContextWatchError(err error) {
	select {
	case s.errs <- err:
	default:
	}
}

func (w *world) watch(a *cluster.Agent) *stream {
	w.t.Helper()
	ctx, cancel := context.WithCancel(w.ctx)
	w.t.Cleanup(cancel)
	s := &stream{updates: make(chan []string, 64), errs: make(chan error, 64)}
	go func() { _ = workloadapi.WatchX509Context(ctx, s, workloadapi.WithAddr(a.Endpoint())) }()
	return s
}

// until takes updates until one satisfies ok.
func (w *world) until(s *stream, what string, ok func(ids []string) bool) {
	w.t.Helper()
	for {
		select {
		case ids := <-s.updates:
			if ok(ids) {
				return
			}
		case <-w.ctx.Done():
			w.t.Fatalf("waiting for %s: %v", what, w.ctx.Err())
		}
	}
}

// eventually asks again and again, for what no push tells.
func (w *world) eventually(what string, ok func() error) {
	w.t.Helper()
	deadline := time.Now().Add(time.Minute)
	for {
		err := ok()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			w.t.Fatalf("%s: %v", what, err)
		}
		select {
		case <-w.ctx.Done():
			w.t.Fatalf("%s: %v: %v", what, w.ctx.Err(), err)
		case <-time.After(200 * time.Millisecond):
		}
	}
}
