package integration

import (
	"context"
	"errors"
	"io"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	workloadv1 "countersign.io/countersign/api/workload/v1"
	"countersign.io/countersign/integration/cluster"
)

// TestWalk follows the main walk and its ends: a caller without an identity, its entry, a second one, their end.
func TestWalk(t *testing.T) {
	w := newWorld(t, 3, "")
	a := w.agent()
	ask := func() error {
		ctx, cancel := context.WithTimeout(w.ctx, 20*time.Second)
		defer cancel()
		c, err := workloadapi.New(ctx, workloadapi.WithAddr(a.Endpoint()))
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.FetchX509Context(ctx)
		return err
	}
	if err := ask(); status.Code(err) != codes.PermissionDenied {
		t.Fatalf("without an entry: got %v, want PermissionDenied", err)
	}
	first := w.createEntry(append(uidSelectors(), "--id", "spiffe://"+trustDomain+"/one", "--dns", "one.test")...)
	if err := ask(); err != nil {
		t.Fatalf("with an entry: %v", err)
	}
	s := w.watch(a)
	w.until(s, "the first identity", func(ids []string) bool { return slices.Equal(ids, []string{"spiffe://" + trustDomain + "/one"}) })
	second := w.createEntry(append(uidSelectors(), "--id", "spiffe://"+trustDomain+"/two", "--hint", "second")...)
	w.until(s, "the second identity, pushed", func(ids []string) bool { return len(ids) == 2 })
	w.admin("entry", "delete", second)
	w.until(s, "the second identity's end, pushed", func(ids []string) bool { return len(ids) == 1 })

	jwts(t, w, a)

	w.admin("entry", "delete", first)
	select {
	case err := <-s.errs:
		if status.Code(err) != codes.PermissionDenied {
			t.Errorf("the stream ended with %v, want PermissionDenied", err)
		}
	case <-w.ctx.Done():
		t.Error("losing the last identity did not end the stream")
	}
	if err := ask(); status.Code(err) != codes.PermissionDenied {
		t.Errorf("after the entry's end: got %v, want PermissionDenied", err)
	}
	if out, err := w.Admin(w.ctx, "entry", "show", first); err == nil {
		t.Errorf("a deleted entry is still there: %s", out)
	}
}

// jwts takes a JWT-SVID and validates it, for the right audience and a wrong one.
func jwts(t *testing.T, w *world, a *cluster.Agent) {
	t.Helper()
	c, err := workloadapi.New(w.ctx, workloadapi.WithAddr(a.Endpoint()))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	svid, err := c.FetchJWTSVID(w.ctx, jwtsvid.Params{Audience: "reports"})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := c.ValidateJWTSVID(w.ctx, svid.Marshal(), "reports"); err != nil || got.ID != svid.ID {
		t.Errorf("validating: %v", err)
	}
	if _, err := c.ValidateJWTSVID(w.ctx, svid.Marshal(), "others"); status.Code(err) != codes.InvalidArgument {
		t.Errorf("validating for another audience: got %v, want InvalidArgument", err)
	}
	bundles, err := c.FetchJWTBundles(w.ctx)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := jwtsvid.ParseAndValidate(svid.Marshal(), bundles, []string{"reports"}); err != nil {
		t.Errorf("go-spiffe refuses our token: %v", err)
	}
}

// TestPodsOfOtherNodes shows what an agent cannot get: a pod of another node, and anything once it is banned.
func TestPodsOfOtherNodes(t *testing.T) {
	w := newWorld(t, 1, "")
	mine, err := w.NewClient(w.ctx, "test/node-1")
	if err != nil {
		t.Fatal(err)
	}
	other, err := w.NewClient(w.ctx, "test/node-2")
	if err != nil {
		t.Fatal(err)
	}
	nodeless, err := w.NewClient(w.ctx, "")
	if err != nil {
		t.Fatal(err)
	}
	_, public, err := cluster.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	token := w.token("web", "node-1")
	issue := func(c *cluster.Client) error {
		conn, err := c.Dial(w.Members[0].Address)
		if err != nil {
			return err
		}
		defer conn.Close()
		_, err = cluster.Issue(w.ctx, workloadv1.NewWorkloadClient(conn), token, public)
		return err
	}
	if err := issue(mine); err != nil {
		t.Fatalf("the pod's own node: %v", err)
	}
	for name, c := range map[string]*cluster.Client{"another node": other, "an agent without a node": nodeless} {
		if err := issue(c); err == nil || strings.Contains(err.Error(), token) {
			t.Errorf("replayed through %s: got %v", name, err)
		}
	}
	w.admin("agent", "ban", mine.ID)
	if err := issue(mine); status.Code(err) != codes.PermissionDenied {
		t.Errorf("a banned agent: got %v, want PermissionDenied", err)
	}
}

// TestDirect is a pod without an agent.
func TestDirect(t *testing.T) {
	w := newWorld(t, 1, "")
	file, err := w.iss.Pod("shop", "lonely", "node-9")
	if err != nil {
		t.Fatal(err)
	}
	var b struct {
		CAPin string `json:"ca_pin"`
	}
	parseJSON(t, w.admin("bundle", "show", "-o", "json"), &b)
	run := func(pin string) (string, error) {
		out, err := exec.CommandContext(w.ctx, filepath.Join(bin, "countersign-agent"), "fetch", "x509", "--direct", "--server", w.Members[0].Address, "--ca-pin", pin, "--token-path", file).CombinedOutput()
		return string(out), err
	}
	out, err := run(b.CAPin)
	if err != nil || !strings.Contains(out, "spiffe://"+trustDomain+"/ns/shop/sa/lonely") {
		t.Errorf("%v: %s", err, out)
	}
	wrong := "sha256:" + strings.Repeat("00", 32)
	var exit *exec.ExitError
	if out, err := run(wrong); !errors.As(err, &exit) || !strings.Contains(out, "pin") {
		t.Errorf("a wrong pin: got %v: %s", err, out)
	}
}

// TestDemoWorkloads runs the two test workloads through rotations with no failed handshake.
func TestDemoWorkloads(t *testing.T) {
	w := newWorld(t, 1, "x509_ttl: 6s\nmax_staleness: 1m\n")
	a := w.agent()
	addr, err := cluster.FreeAddress()
	if err != nil {
		t.Fatal(err)
	}
	id := func(sa string) string { return "spiffe://" + trustDomain + "/ns/shop/sa/" + sa }
	start := func(sa string, args ...string) *eventLog {
		token, err := w.iss.Pod("shop", sa, "node-1")
		if err != nil {
			t.Fatal(err)
		}
		log := newEventLog()
		argv := append([]string{filepath.Join(bin, "workload")}, args...)
		if _, err := w.Start(sa, []string{"SPIFFE_ENDPOINT_SOCKET=" + a.Endpoint(), "COUNTERSIGN_DEV_POD=" + token}, io.Writer(log), argv...); err != nil {
			t.Fatal(err)
		}
		return log
	}
	server := start("backend", "-listen", addr, "-peer", id("frontend"))
	server.wait(t, w.ctx, "the backend's SVID", func(e *eventLog) bool { return e.svids >= 1 })
	client := start("frontend", "-dial", addr, "-peer", id("backend"), "-interval", "20ms")
	for _, l := range []*eventLog{server, client} {
		l.wait(t, w.ctx, "four rotations", func(e *eventLog) bool { return e.svids >= 5 })
	}
	client.wait(t, w.ctx, "handshakes", func(e *eventLog) bool { return e.ok >= 100 })
	if client.failures() > 0 {
		t.Errorf("%d handshakes failed: %v", client.failures(), client.errors())
	}
}
