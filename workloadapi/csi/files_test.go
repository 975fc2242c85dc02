package csi

import (
	"crypto/tls"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	csispec "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"countersign.io/countersign/identity"
)

// read returns a file of a volume, as a pod would.
func (n *node) read(r *csispec.NodePublishVolumeRequest, name string) string {
	n.t.Helper()
	data, err := os.ReadFile(filepath.Join(n.folder(r), name))
	if err != nil {
		n.t.Fatal(err)
	}
	return string(data)
}

func (n *node) mode(r *csispec.NodePublishVolumeRequest, name string) os.FileMode {
	n.t.Helper()
	info, err := os.Stat(filepath.Join(n.folder(r), name))
	if err != nil {
		n.t.Fatal(err)
	}
	return info.Mode().Perm()
}

func TestFiles(t *testing.T) {
	w := newWorld(t)
	n := w.start()
	r := w.request(1, "files", "true", "jwtAudiences", "billing,vault=https://vault.example.org/v1")
	r.VolumeCapability.GetMount().VolumeMountGroup = fmt.Sprint(os.Getegid())
	if err := n.publish(r); err != nil {
		t.Fatal(err)
	}
	// All there when the pod starts.
	pair := func() {
		t.Helper()
		if _, err := tls.X509KeyPair([]byte(n.read(r, "svid.pem")), []byte(n.read(r, "key.pem"))); err != nil {
			t.Fatal(err)
		}
	}
	pair()
	for _, b := range []string{"bundle.pem", "bundle-partner.test.pem"} {
		if !strings.HasPrefix(n.read(r, b), "-----BEGIN CERTIFICATE-----") {
			t.Errorf("%s: %q", b, n.read(r, b))
		}
	}
	if one, two := n.read(r, "jwt-billing"), n.read(r, "jwt-vault"); one != "jwt 1 for billing" || two != "jwt 2 for https://vault.example.org/v1" {
		t.Errorf("%q, %q", one, two)
	}
	for _, secret := range []string{"key.pem", "jwt-billing"} {
		if m := n.mode(r, secret); m != 0o640 {
			t.Errorf("%s: %v", secret, m)
		}
	}
	if m := n.mode(r, "svid.pem"); m != 0o644 {
		t.Error(m)
	}
	n.wantID(r, 1) // and the socket beside them

	before := n.read(r, "svid.pem")
	w.source.set(uidOf(1), nil) // renewed
	eventually(t, "the files are renewed", func() bool { return n.read(r, "svid.pem") != before })
	pair()
	// The identity is withdrawn: what is there stays, and a new one is taken.
	before = n.read(r, "svid.pem")
	w.source.set(uidOf(1), fmt.Errorf("%w: the entry is gone", identity.ErrDenied))
	eventually(t, "it is told", func() bool { return strings.Contains(w.log.String(), "the entry is gone") })
	if n.read(r, "svid.pem") != before {
		t.Error("the files changed")
	}
	w.source.set(uidOf(1), nil)
	eventually(t, "the files are renewed", func() bool { return n.read(r, "svid.pem") != before })

	// A restart takes them up, without a token.
	if err := n.stop(); err != nil {
		t.Fatal(err)
	}
	n = w.start()
	eventually(t, "the volume is served again", func() bool { return n.d.Volumes() == 1 })
	before = n.read(r, "svid.pem")
	w.source.set(uidOf(1), nil)
	eventually(t, "the files are renewed", func() bool { return n.read(r, "svid.pem") != before })
	// The key is zeroes before it is gone: a link of ours to the same file shows it.
	if err := os.Link(filepath.Join(n.folder(r), "..data", "key.pem"), filepath.Join(w.dir, "held")); err != nil {
		t.Fatal(err)
	}
	if err := n.unpublish(r); err != nil {
		t.Fatal(err)
	}
	if data, err := os.ReadFile(filepath.Join(w.dir, "held")); err != nil || strings.Trim(string(data), "\x00") != "" {
		t.Errorf("the key was not wiped: %d bytes, %v", len(data), err)
	}
	w.wantNothing()
}

// TestFilesWithoutGroup: a pod whose user is not root and that has no fsGroup can read them, as it can connect to the socket.
func TestFilesWithoutGroup(t *testing.T) {
	w := newWorld(t)
	n := w.start()
	r := w.request(1, "files", "true")
	if err := n.publish(r); err != nil {
		t.Fatal(err)
	}
	if k, s := n.mode(r, "key.pem"), n.mode(r, socketName); k != 0o644 || s != 0o777 {
		t.Errorf("%v, %v", k, s)
	}
	// Nobody else comes as far as that.
	for _, dir := range []string{"v", "v/volumes", "v/records"} {
		if info, err := os.Stat(filepath.Join(w.dir, dir)); err != nil || info.Mode().Perm() != 0o700 {
			t.Errorf("%s: %v, %v", dir, info.Mode(), err)
		}
	}
}

// TestJWTRenewed: at half of its life.
func TestJWTRenewed(t *testing.T) {
	w := newWorld(t)
	var mu sync.Mutex
	at := time.Now()
	now := func() time.Time { mu.Lock(); defer mu.Unlock(); return at }
	w.source.now = now
	n := w.start(func(d *Driver) { d.now = now })
	r := w.request(1, "files", "true", "jwtAudiences", "billing")
	if err := n.publish(r); err != nil {
		t.Fatal(err)
	}
	w.source.set(uidOf(1), nil)
	w.source.set(uidOf(1), nil)
	if got := n.read(r, "jwt-billing"); got != "jwt 1 for billing" {
		t.Errorf("renewed early: %q", got)
	}
	mu.Lock()
	at = at.Add(31 * time.Minute)
	mu.Unlock()
	w.source.set(uidOf(1), nil) // or the timer
	eventually(t, "it is renewed", func() bool { return n.read(r, "jwt-billing") == "jwt 2 for billing" })
	// One that cannot be renewed does not hold up the rest.
	w.source.mu.Lock()
	w.source.jwtErr = fmt.Errorf("%w: no member answers", identity.ErrUnavailable)
	w.source.mu.Unlock()
	mu.Lock()
	at = at.Add(31 * time.Minute)
	mu.Unlock()
	before := n.read(r, "svid.pem")
	w.source.set(uidOf(1), nil)
	eventually(t, "the others are renewed", func() bool { return n.read(r, "svid.pem") != before })
	if got := n.read(r, "jwt-billing"); got != "jwt 2 for billing" {
		t.Errorf("%q", got)
	}
}

// TestFilesWait: a pod that wants files does not start without one of them.
func TestFilesWait(t *testing.T) {
	w := newWorld(t)
	w.source.jwtErr = fmt.Errorf("%w: no member answers", identity.ErrUnavailable)
	n := w.start(func(d *Driver) { d.waitLimit = 200 * time.Millisecond })
	r := w.request(1, "files", "true", "jwtAudiences", "billing")
	wantCode(t, n.publish(r), codes.Unavailable, "the volume's files", "no member answers")
	w.wantNothing()
	r.VolumeContext["wait"] = "false"
	if err := n.publish(r); err != nil {
		t.Fatal(err)
	}
	w.source.mu.Lock()
	w.source.jwtErr = nil
	w.source.mu.Unlock()
	eventually(t, "the files come later", func() bool { _, err := os.Stat(filepath.Join(n.folder(r), "jwt-billing")); return err == nil })
}

// TestFilesPoked: a newer token is tried at once, however long the pause after the last failure would be.
func TestFilesPoked(t *testing.T) {
	w := newWorld(t)
	w.source.set(uidOf(1), fmt.Errorf("%w: the token has ended", identity.ErrDenied))
	n := w.start(func(d *Driver) { d.retry = time.Hour })
	r := w.request(1, "files", "true", "wait", "false", "jwtAudiences", "billing")
	if err := n.publish(r); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is refused", func() bool { return strings.Contains(w.log.String(), "the token has ended") })
	w.source.mu.Lock()
	w.source.denied = map[string]error{} // nobody is told
	w.source.jwtErr = fmt.Errorf("%w: no member for JWTs", identity.ErrUnavailable)
	w.source.mu.Unlock()
	if err := n.publish(r); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the JWT fails", func() bool { return strings.Contains(w.log.String(), "no member for JWTs") })
	w.source.mu.Lock()
	w.source.jwtErr = nil
	w.source.mu.Unlock()
	eventually(t, "the files are there", func() bool {
		if err := n.publish(r); err != nil {
			t.Fatal(err)
		}
		_, err := os.Stat(filepath.Join(n.folder(r), "jwt-billing"))
		return err == nil
	})
}

func TestParseJWTs(t *testing.T) {
	got, err := parseJWTs("a,b=c=d,x.y_z-1=https://e/?f=%2c")
	want := []jwtFile{{"a", "a"}, {"b", "c=d"}, {"x.y_z-1", "https://e/?f=%2c"}}
	if err != nil || fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("%v, %v", got, err)
	}
	for _, bad := range []string{"", ",", "a,", "a,a", "a=b,a=c", "https://a", "a b", "a=b c", "../x=y", ".x", "a/b=c", "=a", "a=", "a=\n", "ä", strings.Repeat("x", 64),
		"a=" + strings.Repeat("x", 513), "1,2,3,4,5,6,7,8,9"} {
		if got, err := parseJWTs(bad); err == nil {
			t.Errorf("%q: %v", bad, got)
		}
	}
}
