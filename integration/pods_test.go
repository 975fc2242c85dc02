//go:build integration

package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"countersign.io/countersign/integration/cluster"
)

// podWorld is a member that verifies pods in every way, and an agent that attests real processes in real pods.
func podWorld(t *testing.T) (*kubeAPI, *world, *kubelet) {
	t.Helper()
	k := newKubeAPI(t)
	w := newWorld(t, 1, shortTTL)
	register(w, "--jwks-file", k.jwks(), "--token-review", "--kubeconfig", k.kubeconfig("member", mayReview(), mayWatch()))
	a, err := w.StartAgent(w.ctx, "kube/node-1")
	if err != nil {
		t.Fatal(err)
	}
	return k, w, newKubelet(t, w.ctx, w.Cluster, a.Socket)
}

// TestPodsTalk lets two pods of different runtimes talk mutual TLS through rotations, while the kubelet renews their tokens.
func TestPodsTalk(t *testing.T) {
	k, w, n := podWorld(t)
	addr, err := cluster.FreeAddress()
	if err != nil {
		t.Fatal(err)
	}
	id := func(account string) string { return "spiffe://" + trustDomain + "/ns/shop/sa/" + account }
	type running struct {
		pod kubePod
		in  *sandbox
		log *eventLog
	}
	start := func(account, driver string, args ...string) running {
		p := k.pod("shop", account, account, "node-1")
		r := running{p, n.sandbox(p.uid, driver, k.token(p, "countersign")), newEventLog()}
		r.in.start(r.log, "workload", args...)
		r.log.wait(t, w.ctx, "the SVID of "+account, func(e *eventLog) bool { return e.svids >= 1 })
		return r
	}
	server := start("backend", "cgroupfs", "-listen", addr, "-peer", id("frontend"))
	client := start("frontend", "systemd", "-dial", addr, "-peer", id("backend"), "-interval", "10ms")
	renewals := 0
	for tick := time.NewTicker(200 * time.Millisecond); ; <-tick.C {
		server.in.put(k.token(server.pod, "countersign"))
		client.in.put(k.token(client.pod, "countersign"))
		renewals++
		client.log.mu.Lock()
		handshakes, rotations := client.log.ok, client.log.svids-1
		client.log.mu.Unlock()
		if handshakes >= 500 && rotations >= 5 {
			t.Logf("%d handshakes, %d rotations, %d renewals of the token", handshakes, rotations, renewals)
			tick.Stop()
			break
		}
		if w.ctx.Err() != nil {
			t.Fatalf("%d handshakes, %d rotations: %v", handshakes, rotations, client.log.errors())
		}
	}
	if client.log.failures() > 0 {
		t.Errorf("%d handshakes failed: %v", client.log.failures(), client.log.errors())
	}
}

// TestPodsTokenReplaced shows that each renewal reads the token that is there then.
func TestPodsTokenReplaced(t *testing.T) {
	k, w, n := podWorld(t)
	p, q := k.pod("shop", "one", "one", "node-1"), k.pod("shop", "two", "two", "node-1")
	in := n.sandbox(p.uid, "systemd", k.token(p, "countersign"))
	out := in.watch()
	svids := func(n int) func([]string) bool {
		return func(l []string) bool { return count(l, "/ns/shop/sa/one ") >= n }
	}
	out.wait(t, w.ctx, "the first SVID", svids(1))
	in.put(k.token(p, "countersign"))
	out.wait(t, w.ctx, "SVIDs by the renewed token", svids(3))
	in.put(k.token(q, "countersign"))
	out.wait(t, w.ctx, "the end, with another pod's token in place", func(l []string) bool { return contains(l, "permission denied") })
	if contains(out.all(), "/sa/two") {
		t.Errorf("the pod was taken for the other: %s", out.tail(5))
	}
	before := count(out.all(), "/ns/shop/sa/one ")
	in.put(k.token(p, "countersign"))
	out.wait(t, w.ctx, "an SVID again, with the pod's own token back", svids(before+1))
	before = count(out.all(), "permission denied")
	if err := os.Remove(in.volume("token")); err != nil {
		t.Fatal(err)
	}
	out.wait(t, w.ctx, "the end, without a token", func(l []string) bool { return count(l, "permission denied") > before })
}

// TestPodsRefused has everything in the token's place that must not be read, and callers that are not whom they seem.
func TestPodsRefused(t *testing.T) {
	k, w, n := podWorld(t)
	mine, other := k.pod("shop", "mine", "mine", "node-1"), k.pod("shop", "other", "other", "node-1")
	token, others := k.token(mine, "countersign"), k.token(other, "countersign")
	granted := "identity spiffe://" + trustDomain + "/ns/shop/sa/mine"

	// The host's file holds the right token: whoever follows a link to it gets the identity, and fails the test.
	host := filepath.Join(w.Dir, "stolen")
	if err := os.WriteFile(host, []byte(token), 0o644); err != nil {
		t.Fatal(err)
	}
	write := func(text string) func(path string) error {
		return func(path string) error { return os.WriteFile(path, []byte(text), 0o644) }
	}
	link := func(to string) func(path string) error {
		return func(path string) error { return os.Symlink(to, path) }
	}
	special := func(mode uint32, dev uint64) func(path string) error {
		return func(path string) error { return unix.Mknod(path, mode|0o666, int(dev)) }
	}
	for _, c := range []struct {
		name   string
		driver string
		make   func(path string) error
		proc   bool
		ok     bool
		says   string
	}{
		{name: "its own token", make: write(token), ok: true},
		{name: "a link within its own root", make: link(tokenVolume + "/real"), ok: true},
		{name: "outside of the pod's control group", driver: "none", make: write(token), says: "no entry"},
		{name: "another pod's token", make: write(others), says: "but the token in its root is of pod"},
		{name: "nothing", make: func(string) error { return nil }, says: "no token"},
		{name: "an empty file", make: write(""), says: "empty"},
		{name: "a megabyte", make: write(strings.Repeat("a", 1<<20)), says: "at the most"},
		{name: "no token", make: write("not a token"), says: "no service account token"},
		{name: "a FIFO", make: special(unix.S_IFIFO, 0), says: "FIFO"},
		{name: "a device", make: special(unix.S_IFCHR, unix.Mkdev(1, 5)), says: "device"},
		{name: "a folder", make: func(path string) error { return os.Mkdir(path, 0o755) }, says: "directory"},
		{name: "a link to the host", make: link(host), says: "no token"},
		{name: "a link up and out", make: link(strings.Repeat("../", 20) + host), says: "no token"},
		{name: "a link to the host by way of /proc", make: link(fmt.Sprintf("/proc/%d/root%s", os.Getpid(), host)), proc: true, says: "too many levels of symbolic links"},
		{name: "a link to the host by way of process 1", make: link("/proc/1/root" + host), proc: true}, // some machines hide it even from root
		{name: "a link to itself", make: link("token"), says: "too many levels of symbolic links"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.driver == "" {
				c.driver = "cgroupfs"
			}
			in := n.sandbox(mine.uid, c.driver, "")
			in.proc = c.proc
			if err := write(token)(in.volume("real")); err != nil {
				t.Fatal(err)
			}
			if err := c.make(in.volume("token")); err != nil {
				t.Fatal(err)
			}
			out := in.ask()
			switch {
			case c.ok && out != granted:
				t.Errorf("got %q, want %q", out, granted)
			case !c.ok && (!strings.HasPrefix(out, "refused PermissionDenied") || !strings.Contains(out, c.says)):
				t.Errorf("got %q, want PermissionDenied and %q", out, c.says)
			}
			if strings.Contains(out, token) || strings.Contains(out, others) {
				t.Error("a token is in the answer")
			}
		})
	}
	t.Run("a control group of its own that imitates another pod's", func(t *testing.T) {
		in := n.sandbox(other.uid, "systemd", token)
		for i, c := range in.cgroups {
			in.cgroups[i] = filepath.Join(c, "kubepods", "besteffort", "pod"+mine.uid, random(32))
			if err := os.MkdirAll(in.cgroups[i], 0o755); err != nil {
				t.Fatal(err)
			}
		}
		if out := in.ask(); !strings.HasPrefix(out, "refused PermissionDenied") || !strings.Contains(out, "the caller is in pod "+other.uid) {
			t.Errorf("got %q", out)
		}
	})
	for then, want := range map[string]string{
		"stay": granted,
		"exec": "refused PermissionDenied",
		"exit": "refused PermissionDenied",
	} {
		t.Run("a caller that would "+then, func(t *testing.T) {
			out := n.sandbox(mine.uid, "systemd", token).connect(then)
			t.Log(out)
			if !strings.HasPrefix(out, want) {
				t.Errorf("got %q, want %q", out, want)
			}
		})
	}
	data, err := os.ReadFile(filepath.Join(w.Dir, "agent-1", "log"))
	if err != nil {
		t.Fatal(err)
	}
	for _, tok := range []string{token, others} {
		if strings.Contains(string(data), tok) || strings.Contains(string(data), tok[strings.LastIndex(tok, ".")+1:]) {
			t.Error("a token is in the agent's log")
		}
	}
}
