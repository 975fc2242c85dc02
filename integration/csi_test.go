//go:build integration

package integration

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	csispec "github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"

	"countersign.io/countersign/attestor"
	"countersign.io/countersign/integration/cluster"
)

// csiNode plays the kubelet towards the CSI driver of a real agent, which mounts for real.
type csiNode struct {
	*world
	dir   string // KUBELET_DIR is dir/kubelet
	agent *cluster.Agent
}

// newCSINode starts a member and an agent with the driver, for whose registration the kubelet is played.
func newCSINode(t *testing.T) *csiNode {
	t.Helper()
	needRoot(t)
	dir, err := os.MkdirTemp("", "cs-csi-")
	if err != nil {
		t.Fatal(err)
	}
	n := &csiNode{dir: dir, world: newWorld(t, 1, shortTTL)}
	if err := errors.Join(os.MkdirAll(n.kubelet("plugins_registry"), 0o755), os.Mkdir(filepath.Join(dir, "run"), 0o755)); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", filepath.Join(dir, "run"), "tmpfs", 0, "mode=755"); err != nil {
		t.Skipf("needs to mount: %v", err)
	}
	t.Cleanup(func() { // after the agent's end, which is newWorld's
		left, _ := os.ReadFile("/proc/self/mountinfo")
		for line := range strings.Lines(string(left)) {
			if at := strings.Fields(line)[4]; strings.HasPrefix(at, dir+"/") {
				_ = unix.Unmount(at, unix.MNT_DETACH)
			}
		}
		os.RemoveAll(dir)
	})
	n.AgentYAML = fmt.Sprintf("csi:\n  socket: %s\n  registration_dir: %s\n  kubelet_dir: %s\n  dir: %s\n  node: node-1\n",
		n.socket(), n.kubelet("plugins_registry"), n.kubelet(""), filepath.Join(dir, "run", "csi"))
	t.Cleanup(func() { // before newWorld's, so that the mounts are free
		if n.agent != nil && n.agent.Process != nil {
			n.agent.Process.Kill()
		}
	})
	n.starting(func() error {
		var err error
		n.agent, err = n.StartAgent(n.ctx, "test/node-1")
		return err
	})
	return n
}

func (n *csiNode) kubelet(rest string) string { return filepath.Join(n.dir, "kubelet", rest) }
func (n *csiNode) socket() string             { return n.kubelet("plugins/csi.countersign.io/csi.sock") }

// starting runs what starts an agent, which is ready once the kubelet has registered its driver.
func (n *csiNode) starting(start func() error) {
	n.t.Helper()
	ctx, stop := context.WithCancel(n.ctx)
	defer stop()
	go func() {
		cc := n.dial(n.kubelet("plugins_registry/csi.countersign.io-reg.sock"))
		defer cc.Close()
		c := registration.NewRegistrationClient(cc)
		for ctx.Err() == nil {
			info, err := c.GetInfo(ctx, &registration.InfoRequest{}, grpc.WaitForReady(true))
			if err == nil && info.Endpoint == n.socket() {
				_, _ = c.NotifyRegistrationStatus(ctx, &registration.RegistrationStatus{PluginRegistered: true})
			}
			select { // the socket found may have been that of the process before
			case <-ctx.Done():
			case <-time.After(100 * time.Millisecond):
			}
		}
	}()
	if err := start(); err != nil {
		n.t.Fatal(err)
	}
}

func (n *csiNode) dial(path string) *grpc.ClientConn {
	cc, err := grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		n.t.Fatal(err)
	}
	return cc
}

// csiPod is a pod with a volume called identity.
type csiPod struct {
	n *csiNode
	attestor.Claims
	req *csispec.NodePublishVolumeRequest
}

func (n *csiNode) pod(account string, attributes ...string) *csiPod {
	n.t.Helper()
	token, err := n.iss.Token("shop", account, "node-1")
	if err != nil {
		n.t.Fatal(err)
	}
	c, err := attestor.ReadClaims([]byte(token))
	if err != nil {
		n.t.Fatal(err)
	}
	tokens, _ := json.Marshal(map[string]any{"countersign": map[string]any{"token": token, "expirationTimestamp": time.Now().Add(time.Hour)}})
	p := &csiPod{n: n, Claims: c, req: &csispec.NodePublishVolumeRequest{
		VolumeId:   fmt.Sprintf("csi-%x", sha256.Sum256([]byte(c.PodUID+"identity"))),
		TargetPath: n.kubelet("pods/" + c.PodUID + "/volumes/kubernetes.io~csi/identity/mount"),
		Readonly:   true,
		VolumeCapability: &csispec.VolumeCapability{
			AccessType: &csispec.VolumeCapability_Mount{Mount: &csispec.VolumeCapability_MountVolume{}},
			AccessMode: &csispec.VolumeCapability_AccessMode{Mode: csispec.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
		},
		VolumeContext: map[string]string{
			"csi.storage.k8s.io/ephemeral": "true", "csi.storage.k8s.io/pod.uid": c.PodUID, "csi.storage.k8s.io/pod.name": c.PodName,
			"csi.storage.k8s.io/pod.namespace": c.Namespace, "csi.storage.k8s.io/serviceAccount.name": c.ServiceAccount,
			"csi.storage.k8s.io/serviceAccount.tokens": string(tokens),
		},
	}}
	for i := 0; i < len(attributes); i += 2 {
		p.req.VolumeContext[attributes[i]] = attributes[i+1]
	}
	if err := os.MkdirAll(filepath.Dir(p.req.TargetPath), 0o750); err != nil {
		n.t.Fatal(err)
	}
	return p
}

func (p *csiPod) publish() error {
	cc := p.n.dial(p.n.socket())
	defer cc.Close()
	_, err := csispec.NewNodeClient(cc).NodePublishVolume(p.n.ctx, p.req)
	return err
}

func (p *csiPod) unpublish() error {
	cc := p.n.dial(p.n.socket())
	defer cc.Close()
	_, err := csispec.NewNodeClient(cc).NodeUnpublishVolume(p.n.ctx, &csispec.NodeUnpublishVolumeRequest{VolumeId: p.req.VolumeId, TargetPath: p.req.TargetPath})
	return err
}

// file is one of the volume's, as the pod sees it.
func (p *csiPod) file(name string) string { return filepath.Join(p.req.TargetPath, name) }

// x509 asks on the volume's socket, by way of the mount.
func (p *csiPod) x509() (*workloadapi.X509Context, error) {
	ctx, cancel := context.WithTimeout(p.n.ctx, 20*time.Second)
	defer cancel()
	// A path as long as the kubelet's does not fit into a socket's address: a pod has a short one.
	link := filepath.Join(p.n.dir, p.PodUID[:8])
	if err := os.Symlink(p.req.TargetPath, link); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, err
	}
	return workloadapi.FetchX509Context(ctx, workloadapi.WithAddr("unix://"+filepath.Join(link, "agent.sock")))
}

func (p *csiPod) wantID() {
	p.n.t.Helper()
	x, err := p.x509()
	if err != nil {
		p.n.t.Fatal(err)
	}
	if want := "spiffe://" + trustDomain + "/ns/shop/sa/" + p.ServiceAccount; x.DefaultSVID().ID.String() != want {
		p.n.t.Fatalf("got %s, want %s", x.DefaultSVID().ID, want)
	}
}

// mounts are those at or below the volume's target.
func (p *csiPod) mounts() (n int) {
	p.n.t.Helper()
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		p.n.t.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		if strings.HasPrefix(strings.Fields(line)[4], p.req.TargetPath) {
			n++
		}
	}
	return n
}

// TestCSI: two pods, told apart by their volumes alone; what is mounted is read-only; a kill of the agent loses nobody's socket.
func TestCSI(t *testing.T) {
	n := newCSINode(t)
	web, db := n.pod("web", "files", "true", "jwtAudiences", "billing"), n.pod("db")
	for _, p := range []*csiPod{web, db} {
		if err := p.publish(); err != nil {
			t.Fatal(err)
		}
		p.wantID()
		var st unix.Statfs_t
		if err := unix.Statfs(p.req.TargetPath, &st); err != nil {
			t.Fatal(err)
		}
		if want := int64(unix.ST_RDONLY | unix.ST_NOSUID | unix.ST_NODEV | unix.ST_NOEXEC); st.Flags&want != want || st.Type != unix.TMPFS_MAGIC {
			t.Errorf("mounted with %#x", st.Flags)
		}
		if err := os.WriteFile(p.file("x"), nil, 0o600); !errors.Is(err, unix.EROFS) {
			t.Errorf("writing to the volume: %v", err)
		}
		if err := os.Remove(p.file("agent.sock")); !errors.Is(err, unix.EROFS) {
			t.Errorf("removing the socket: %v", err)
		}
	}
	if token, err := os.ReadFile(web.file("jwt-billing")); err != nil || strings.Count(string(token), ".") != 2 {
		t.Errorf("the JWT-SVID: %v", err)
	}
	svid := func() string {
		at, err := os.OpenRoot(web.file("..data"))
		if err != nil {
			t.Fatal(err)
		}
		defer at.Close()
		cert, err1 := at.ReadFile("svid.pem")
		key, err2 := at.ReadFile("key.pem")
		if _, err := tls.X509KeyPair(cert, key); err != nil && !errors.Is(errors.Join(err1, err2), os.ErrNotExist) {
			t.Fatal(err)
		}
		return string(cert)
	}
	renewed := func() {
		t.Helper()
		before := svid()
		for tick := time.NewTicker(50 * time.Millisecond); svid() == before; {
			select {
			case <-tick.C:
			case <-n.ctx.Done():
				t.Fatal("the files are not renewed")
			}
		}
	}
	renewed()
	if err := db.publish(); err != nil || db.mounts() != 1 { // requiresRepublish
		t.Errorf("%d mounts, %v", db.mounts(), err)
	}

	n.agent.Process.Kill()
	n.starting(func() error { return n.RestartAgent(n.ctx, n.agent) })
	web.wantID() // before the kubelet has called, in the same mounts, from what is on tmpfs
	db.wantID()
	if err := errors.Join(web.publish(), db.publish()); err != nil {
		t.Fatal(err)
	}
	renewed()
	for _, p := range []*csiPod{web, db} {
		for range 2 {
			if err := p.unpublish(); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := os.Lstat(p.req.TargetPath); !errors.Is(err, os.ErrNotExist) || p.mounts() != 0 {
			t.Errorf("the target is left: %d mounts, %v", p.mounts(), err)
		}
	}
	for _, dir := range []string{"volumes", "records"} {
		if left, err := os.ReadDir(filepath.Join(n.dir, "run", "csi", dir)); err != nil || len(left) > 0 {
			t.Errorf("left in %s: %v, %v", dir, left, err)
		}
	}
	log, err := os.ReadFile(filepath.Join(n.agent.Dir, "log"))
	if err != nil || strings.Contains(string(log), "eyJ") {
		t.Errorf("a token is in the agent's log: %v", err)
	}
}

// TestCSIPlanted: symlinks and mounts where the kubelet's folders should be.
func TestCSIPlanted(t *testing.T) {
	n := newCSINode(t)
	elsewhere := filepath.Join(n.dir, "elsewhere")
	if err := os.MkdirAll(filepath.Join(elsewhere, "mount"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, plant := range map[string]func(p *csiPod) error{
		"in the volume's place": func(p *csiPod) error {
			at := filepath.Dir(p.req.TargetPath)
			return errors.Join(os.Remove(at), os.Symlink(elsewhere, at))
		},
		"in the target's place": func(p *csiPod) error { return os.Symlink(elsewhere, p.req.TargetPath) },
		"in the pod's place": func(p *csiPod) error {
			at := n.kubelet("pods/" + p.PodUID)
			return errors.Join(os.Rename(at, at+"-moved"), os.Symlink(at+"-moved", at))
		},
	} {
		p := n.pod("web")
		if err := plant(p); err != nil {
			t.Fatal(err)
		}
		if err := p.publish(); status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "symlink") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if left, err := os.ReadDir(filepath.Join(elsewhere, "mount")); err != nil || len(left) > 0 {
		t.Errorf("something is mounted elsewhere: %v, %v", left, err)
	}
	// A pod whose folder is gone is no error to unpublish, and one that was mounted over is freed of both.
	p := n.pod("web")
	if err := p.publish(); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", p.req.TargetPath, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	if err := p.unpublish(); err != nil || p.mounts() != 0 {
		t.Errorf("%d mounts, %v", p.mounts(), err)
	}
	if err := os.RemoveAll(n.kubelet("pods/" + p.PodUID)); err != nil {
		t.Fatal(err)
	}
	if err := p.unpublish(); err != nil {
		t.Error(err)
	}
	// A token that no member takes: the pod does not start, and is told why.
	forged := n.pod("web")
	tokens := forged.req.VolumeContext["csi.storage.k8s.io/serviceAccount.tokens"]
	i := strings.LastIndexByte(tokens, '.')
	forged.req.VolumeContext["csi.storage.k8s.io/serviceAccount.tokens"] = tokens[:i+1] + "AAAA" + tokens[i+5:]
	if err := forged.publish(); status.Code(err) != codes.PermissionDenied && status.Code(err) != codes.Unauthenticated {
		t.Errorf("a forged token: %v", err)
	}
	if forged.mounts() != 0 {
		t.Error("it is mounted")
	}
}

// TestCSIForged: a call of another user than root is not answered, even where the modes would let it.
func TestCSIForged(t *testing.T) {
	n := newCSINode(t)
	// As another user: the thread that has become one ends with its goroutine.
	call := func(uid uintptr) error {
		done := make(chan error, 1)
		go func() {
			runtime.LockOSThread()
			if _, _, errno := syscall.RawSyscall(syscall.SYS_SETRESUID, uid, uid, uid); errno != 0 {
				done <- fmt.Errorf("becoming user %d: %v", uid, errno)
				return
			}
			fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err == nil {
				defer unix.Close(fd)
				err = unix.Connect(fd, &unix.SockaddrUnix{Name: n.socket()})
			}
			if err == nil {
				var got int // the server's settings, where it serves
				if got, err = unix.Read(fd, make([]byte, 16)); err == nil && got == 0 {
					err = io.EOF
				}
			}
			done <- err
		}()
		return <-done
	}
	if err := call(0); err != nil {
		t.Errorf("root: %v", err)
	}
	if err := call(65534); !errors.Is(err, unix.EACCES) {
		t.Errorf("with the modes as they are: %v", err)
	}
	for path := filepath.Dir(n.socket()); path != filepath.Dir(n.dir); path = filepath.Dir(path) {
		if err := os.Chmod(path, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(n.socket(), 0o777); err != nil {
		t.Fatal(err)
	}
	if err := call(65534); !errors.Is(err, io.EOF) && !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("with the modes wide open: %v", err)
	}
}

// TestCSIKilled kills the agent while it mounts and unmounts for many pods, at another moment each time. Every pod gets its identity from
// the kubelet's same call again, none that has one loses it, and nothing is left in the end.
func TestCSIKilled(t *testing.T) {
	n := newCSINode(t)
	const pods, rounds = 16, 5
	all := make([]*csiPod, pods)
	for i := range all {
		attributes := []string{"wait", "true"}
		if i%3 == 0 {
			attributes = []string{"files", "true"}
		}
		all[i] = n.pod(fmt.Sprintf("app-%d", i), attributes...)
	}
	for round := range rounds {
		// Half of the calls mount, the others unmount what the round before has mounted; the kill is after some of the answers.
		done := make(chan error, pods)
		for i, p := range all {
			go func() {
				if (i+round)%2 == 0 {
					done <- p.publish()
				} else {
					done <- p.unpublish()
				}
			}()
		}
		for range round * pods / rounds {
			<-done
		}
		n.agent.Process.Kill()
		for range pods - round*pods/rounds {
			<-done
		}
		n.starting(func() error { return n.RestartAgent(n.ctx, n.agent) })
		for i, p := range all {
			if (i+round)%2 == 0 {
				if p.mounts() > 0 { // it may be running: its socket answers before the kubelet calls, though what was signed in the last moment may be lost
					if _, err := p.x509(); err != nil && !strings.Contains(err.Error(), "has not handed over the pod's token") {
						t.Fatalf("round %d, pod %d: %v", round, i, err)
					}
				}
				if err := p.publish(); err != nil {
					t.Fatalf("round %d, pod %d: %v", round, i, err)
				}
				p.wantID()
			} else if err := p.unpublish(); err != nil {
				t.Fatalf("round %d, pod %d: %v", round, i, err)
			}
			if got := p.mounts(); got != (i+round+1)%2 {
				t.Fatalf("round %d, pod %d: %d mounts", round, i, got)
			}
		}
	}
	for _, p := range all {
		if err := p.unpublish(); err != nil || p.mounts() > 0 {
			t.Errorf("%d mounts, %v", p.mounts(), err)
		}
	}
	for _, dir := range []string{"volumes", "records"} {
		if left, err := os.ReadDir(filepath.Join(n.dir, "run", "csi", dir)); err != nil || len(left) > 0 {
			t.Errorf("left in %s: %v, %v", dir, left, err)
		}
	}
}
