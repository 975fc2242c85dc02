//go:build integration

package integration

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"countersign.io/countersign/integration/node"
)

// The RuntimeClasses of gVisor, as more of a pod's spec.
const (
	boxed       = "  runtimeClassName: gvisor\n"
	boxedClosed = "  runtimeClassName: gvisor-closed\n"
)

// inSandboxes is onStage with the RuntimeClasses; without gVisor the test is skipped.
func inSandboxes(t *testing.T) *play {
	t.Helper()
	p := onStage(t)
	if err := p.n.TrySandbox(p.ctx); errors.Is(err, node.ErrNoSandbox) {
		t.Skip(err)
	} else if err != nil {
		t.Fatal(err)
	}
	for name, handler := range map[string]string{"gvisor": node.RunscOpen, "gvisor-closed": node.RunscClosed} {
		p.apply("apiVersion: node.k8s.io/v1\nkind: RuntimeClass\nmetadata: {name: " + name + "}\nhandler: " + handler + "\n")
	}
	return p
}

// exec runs a program that writes a line in a pod's container. It is run again if it failed, as it does where it reads files while they are
// replaced, or if what it wrote was lost on the way, as happens with short programs.
func (r *running) exec(argv ...string) string {
	r.p.t.Helper()
	for try := 1; ; try++ {
		out, err := r.p.n.Exec(r.p.ctx, r.p.ns, r.pod.Name, "main", argv...)
		if out = strings.TrimSpace(out); err == nil && out != "" {
			return out
		}
		r.p.t.Logf("pod %s: %s: %q, %v", r.pod.Name, strings.Join(argv, " "), out, err)
		if try == 10 {
			r.p.t.Fatalf("pod %s: %s fails, or says nothing, each time", r.pod.Name, strings.Join(argv, " "))
		}
	}
}

// boxed fails unless the pod sees another kernel than the node's.
func (r *running) boxed() {
	r.p.t.Helper()
	release, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		r.p.t.Fatal(err)
	}
	got := r.exec("/pod", "kernel")
	if strings.Contains(got, strings.TrimSpace(string(release))) {
		r.p.t.Fatalf("pod %s sees the node's kernel %q: it is in no sandbox", r.pod.Name, got)
	}
	r.p.t.Logf("pod %s sees kernel %q", r.pod.Name, got)
}

// files waits until the files of a volume are another SVID than before, and returns which.
func (r *running) files(account, before string) (serial string) {
	r.p.t.Helper()
	want := fmt.Sprintf("spiffe://%s/ns/%s/sa/%s", kubeDomain, r.p.ns, account)
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(200 * time.Millisecond) {
		got := strings.Fields(r.exec("/pod", "files", "/run/countersign"))
		if len(got) < 4 || got[0] != "files" || got[1] != want {
			r.p.t.Fatalf("pod %s: its files say %q, want an SVID of %s", r.pod.Name, got, want)
		}
		if got[2] != before {
			return got[2]
		}
		if time.Now().After(deadline) {
			r.p.t.Fatalf("pod %s: its files are SVID %s still", r.pod.Name, before)
		}
	}
}

// seesProcess reports whether a process with this last argument is to be seen from outside of the pod.
func seesProcess(t *testing.T, last string) bool {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil || len(files) == 0 {
		t.Fatal("no processes at all: ", err)
	}
	for _, f := range files {
		if data, err := os.ReadFile(f); err == nil && strings.HasSuffix(string(data), "\x00"+last+"\x00") {
			return true
		}
	}
	return false
}

// TestStageSandboxed has pods in gVisor, of whose processes the node sees none, their identity by the volume: by its socket where runsc
// lets them connect to it, and by its files wherever it is.
func TestStageSandboxed(t *testing.T) {
	p := inSandboxes(t)
	p.account("web")
	p.account("other")
	withFiles := strings.ReplaceAll(volume, "readOnly: true", `readOnly: true, volumeAttributes: {files: "true"}`)
	start := func(name, account, class string) *running {
		return p.start(name, p.podManifest(name, account, withFiles, volumeMounts, class, "/pod", "follow", "unix:///run/countersign/agent.sock", p.ns+name))
	}
	plain, open, closed := start("plain", "web", ""), start("open", "web", boxed), start("closed", "other", boxedClosed)
	open.boxed()
	first := open.identity()
	plain.identity()
	if !seesProcess(t, p.ns+"plain") || seesProcess(t, p.ns+"open") {
		t.Error("the node sees a process in the sandbox, or none outside of it")
	}
	open.until("a renewal", 0, func(g glimpse) bool { return g.Event == "svid" && g.Serial != first.Serial })
	open.files("web", open.files("web", ""))

	closed.boxed()
	g := closed.until("a refusal", 0, func(g glimpse) bool { return g.Event != "start" })
	if g.Event != "error" || !strings.Contains(g.Error, "connection refused") {
		t.Errorf("where runsc lets nobody connect: got %+v, want a refused connection", g)
	}
	closed.files("other", closed.files("other", ""))
	for _, g := range closed.seen() {
		if g.Event == "svid" {
			t.Errorf("where runsc lets nobody connect: got %+v", g)
		}
	}
}

// TestStageSandboxedShared has the node's socket take runsc's process that connects for a pod in gVisor for that pod, by the pod's own token,
// and never for a process of the node's.
func TestStageSandboxedShared(t *testing.T) {
	p := inSandboxes(t)
	p.account("web")
	p.start("web", p.podManifest("web", "web", shared, sharedMounts, boxed, "/pod", "follow")).identity()
	none := p.start("none", p.podManifest("none", "web", "\n  volumes: [{name: agent, hostPath: {path: /run/countersign, type: Directory}}]\n",
		`[{name: agent, mountPath: /run/countersign, readOnly: true}]`, boxed, "/pod", "follow"))
	g := none.until("a refusal", 0, func(g glimpse) bool { return g.Event != "start" })
	if g.Event != "error" || !strings.Contains(g.Error, "PermissionDenied") || !strings.Contains(g.Error, "has no token") {
		t.Errorf("a pod in gVisor without a token: got %+v, want PermissionDenied and the reason", g)
	}
}

// TestStageSandboxedSidecar has a pod in gVisor its identity from a sidecar, where the annotations of docs/KUBERNETES.md have its
// containers share the volume's sockets.
func TestStageSandboxedSidecar(t *testing.T) {
	p := inSandboxes(t)
	p.withBundle()
	p.account("web")
	volumes := strings.ReplaceAll(aloneVolumes, "AUDIENCE", "countersign")
	manifest := p.podManifest("web", "web", volumes, "[{name: identity, mountPath: /run/countersign}]", boxedClosed+sidecarOf(),
		"/pod", "follow", "unix:///run/countersign/pod/agent.sock")
	labels := "labels: {app: web}"
	if !strings.Contains(manifest, labels) {
		t.Fatal("the manifest has other labels")
	}
	r := p.start("web", strings.Replace(manifest, labels, labels+
		", annotations: {dev.gvisor.spec.mount.identity.type: tmpfs, dev.gvisor.spec.mount.identity.share: pod}", 1))
	first := r.identity()
	r.until("a renewal", 0, func(g glimpse) bool { return g.Event == "svid" && g.Serial != first.Serial })
}
