package csi

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	csispec "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"

	"countersign.io/countersign/identity"
)

func TestVolume(t *testing.T) {
	w := newWorld(t)
	n := w.start()
	one, two := w.request(1), w.request(2)
	for _, r := range []*csispec.NodePublishVolumeRequest{one, two} {
		if err := n.publish(r); err != nil {
			t.Fatal(err)
		}
	}
	// The same caller is two pods: it is the socket that says which.
	n.wantID(one, 1)
	n.wantID(two, 2)
	// Republished: the newest token is what evidence is renewed with, and nothing is mounted again.
	one.VolumeContext[tokensKey] = tokens("countersign", token(uidOf(1), "second"))
	if err := n.publish(one); err != nil {
		t.Fatal(err)
	}
	n.wantID(one, 1)
	if got := w.source.shown(); got[len(got)-1] != token(uidOf(1), "second") || w.mounts.binds != 2 {
		t.Errorf("the last token shown is not the newest, or %d mounts", w.mounts.binds)
	}
	for range 2 { // idempotent
		if err := n.unpublish(one); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := n.x509(one); err == nil {
		t.Error("the socket of a volume that is gone answers")
	}
	n.wantID(two, 2)
	if err := n.unpublish(two); err != nil {
		t.Fatal(err)
	}
	w.wantNothing()
	if n.d.Volumes() != 0 {
		t.Error("volumes are left")
	}
}

// TestUnpublishEndsStreams: who has a stream open when its volume goes loses it.
func TestUnpublishEndsStreams(t *testing.T) {
	w := newWorld(t)
	n := w.start()
	r := w.request(1)
	if err := n.publish(r); err != nil {
		t.Fatal(err)
	}
	stream := n.stream(r)
	if _, err := stream.Recv(); err != nil {
		t.Fatal(err)
	}
	if err := n.unpublish(r); err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); err == nil {
		t.Error("the stream goes on")
	}
}

func TestTokenInSecrets(t *testing.T) {
	w := newWorld(t)
	n := w.start()
	r := w.request(1)
	r.Secrets = map[string]string{tokensKey: r.VolumeContext[tokensKey]}
	wantCode(t, n.publish(r), codes.InvalidArgument, "both in the volume context and in the secrets")
	delete(r.VolumeContext, tokensKey)
	if err := n.publish(r); err != nil {
		t.Fatal(err)
	}
	n.wantID(r, 1)
	r.Secrets["password"] = "hunter2"
	wantCode(t, n.publish(r), codes.InvalidArgument, "no secrets", "password")
}

func TestRefusals(t *testing.T) {
	w := newWorld(t)
	n := w.start()
	type request = csispec.NodePublishVolumeRequest
	context := func(key, value string) func(*request) {
		return func(r *request) { r.VolumeContext[key] = value }
	}
	claims := func(change func(kube map[string]any)) func(*request) {
		return context(tokensKey, tokens("countersign", token(uidOf(1), "x", func(c map[string]any) { change(c["kubernetes.io"].(map[string]any)) })))
	}
	target := func(rest string) func(*request) {
		return func(r *request) { r.TargetPath = w.kubelet() + rest }
	}
	in := "/pods/" + uidOf(1) + "/volumes/kubernetes.io~csi/identity/mount"
	mount := func(change func(*csispec.VolumeCapability_MountVolume)) func(*request) {
		return func(r *request) { change(r.VolumeCapability.GetMount()) }
	}
	for name, c := range map[string]struct {
		change func(*request)
		code   codes.Code
		text   string
	}{
		"no volume ID":           {func(r *request) { r.VolumeId = "" }, codes.InvalidArgument, "volume ID is missing"},
		"volume ID with a path":  {func(r *request) { r.VolumeId = "../../etc" }, codes.InvalidArgument, "not well formed"},
		"volume ID too long":     {func(r *request) { r.VolumeId = strings.Repeat("a", 129) }, codes.InvalidArgument, "not well formed"},
		"no target":              {func(r *request) { r.TargetPath = "" }, codes.InvalidArgument, "target path is missing"},
		"target elsewhere":       {func(r *request) { r.TargetPath = "/etc" + in }, codes.InvalidArgument, "target path"},
		"target with dots":       {target("/pods/../pods/" + uidOf(1) + "/volumes/kubernetes.io~csi/identity/mount"), codes.InvalidArgument, "target path"},
		"target of a volume ..":  {target("/pods/" + uidOf(1) + "/volumes/kubernetes.io~csi/../mount"), codes.InvalidArgument, "target path"},
		"target with a slash":    {target(in + "/"), codes.InvalidArgument, "target path"},
		"target one deeper":      {target(in + "/mount"), codes.InvalidArgument, "target path"},
		"target of another kind": {target("/pods/" + uidOf(1) + "/volumes/kubernetes.io~secret/identity/mount"), codes.InvalidArgument, "target path"},
		"target not a mount":     {target("/pods/" + uidOf(1) + "/volumes/kubernetes.io~csi/identity/other"), codes.InvalidArgument, "target path"},
		"target of another pod":  {target("/pods/" + uidOf(2) + "/volumes/kubernetes.io~csi/identity/mount"), codes.InvalidArgument, "target path is of pod"},
		"target of a bad pod":    {target("/pods/x/volumes/kubernetes.io~csi/identity/mount"), codes.InvalidArgument, "target path"},
		"no capability":          {func(r *request) { r.VolumeCapability = nil }, codes.InvalidArgument, "capability is missing"},
		"a block device":         {func(r *request) { r.VolumeCapability.AccessType = &csispec.VolumeCapability_Block{} }, codes.InvalidArgument, "access type"},
		"many nodes": {func(r *request) {
			r.VolumeCapability.AccessMode.Mode = csispec.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER
		}, codes.InvalidArgument, "access mode"},
		"no access mode":          {func(r *request) { r.VolumeCapability.AccessMode = nil }, codes.InvalidArgument, "access mode"},
		"a file system":           {mount(func(m *csispec.VolumeCapability_MountVolume) { m.FsType = "ext4" }), codes.InvalidArgument, "fsType"},
		"mount flags":             {mount(func(m *csispec.VolumeCapability_MountVolume) { m.MountFlags = []string{"exec"} }), codes.InvalidArgument, "mount flags"},
		"a group by name":         {mount(func(m *csispec.VolumeCapability_MountVolume) { m.VolumeMountGroup = "wheel" }), codes.InvalidArgument, "no group's number"},
		"a group below zero":      {mount(func(m *csispec.VolumeCapability_MountVolume) { m.VolumeMountGroup = "-1" }), codes.InvalidArgument, "no group's number"},
		"a group too high":        {mount(func(m *csispec.VolumeCapability_MountVolume) { m.VolumeMountGroup = "4294967295" }), codes.InvalidArgument, "no group's number"},
		"a staging path":          {func(r *request) { r.StagingTargetPath = "/x" }, codes.InvalidArgument, "persistent volume"},
		"a publish context":       {func(r *request) { r.PublishContext = map[string]string{"a": "b"} }, codes.InvalidArgument, "persistent volume"},
		"writable":                {func(r *request) { r.Readonly = false }, codes.InvalidArgument, "readOnly: true"},
		"persistent":              {context(ephemeralKey, "false"), codes.InvalidArgument, "only inline volumes"},
		"no ephemeral":            {func(r *request) { delete(r.VolumeContext, ephemeralKey) }, codes.InvalidArgument, "only inline volumes"},
		"no pod info":             {func(r *request) { delete(r.VolumeContext, podUIDKey) }, codes.InvalidArgument, "podInfoOnMount"},
		"no service account":      {func(r *request) { delete(r.VolumeContext, podAccountKey) }, codes.InvalidArgument, "podInfoOnMount"},
		"a bad UID":               {context(podUIDKey, "../.."), codes.InvalidArgument, "pod.uid"},
		"a bad name":              {context(podNameKey, "Web"), codes.InvalidArgument, "pod.name"},
		"a bad namespace":         {context(podNamespaceKey, "a.b"), codes.InvalidArgument, "pod.namespace"},
		"a bad service account":   {context(podAccountKey, "a b"), codes.InvalidArgument, "serviceAccount.name"},
		"an unknown attribute":    {context("fiels", "true"), codes.InvalidArgument, `unknown volume attributes "fiels"`},
		"the wrong case":          {context("Files", "true"), codes.InvalidArgument, `"Files"`},
		"files maybe":             {context("files", "yes"), codes.InvalidArgument, "volume attribute files"},
		"wait maybe":              {context("wait", ""), codes.InvalidArgument, "volume attribute wait"},
		"JWTs without files":      {context("jwtAudiences", "a"), codes.InvalidArgument, "needs files"},
		"JWTs and no files":       {func(r *request) { context("jwtAudiences", "a")(r); context("files", "false")(r) }, codes.InvalidArgument, "needs files"},
		"no token":                {func(r *request) { delete(r.VolumeContext, tokensKey) }, codes.InvalidArgument, "tokenRequests"},
		"an empty token":          {context(tokensKey, ""), codes.InvalidArgument, "not a JSON object"},
		"another audience's":      {context(tokensKey, tokens("vault", token(uidOf(1), "x"))), codes.InvalidArgument, `for "vault", and none is for "countersign"`},
		"an audience in the name": {context(tokensKey, tokens("countersign", token(uidOf(1), "x", func(c map[string]any) { c["aud"] = []string{"vault"} }))), codes.Unauthenticated, "not for the audience"},
		"no JWT":                  {context(tokensKey, tokens("countersign", "secret")), codes.Unauthenticated, "no service account token"},
		"another pod's":           {context(tokensKey, tokens("countersign", token(uidOf(2), "x"))), codes.Unauthenticated, "pod UID"},
		"another name's":          {claims(func(k map[string]any) { k["pod"].(map[string]any)["name"] = "db" }), codes.Unauthenticated, "another pod's: its pod is"},
		"another namespace's":     {claims(func(k map[string]any) { k["namespace"] = "bank" }), codes.Unauthenticated, "namespace"},
		"another account's":       {claims(func(k map[string]any) { k["serviceaccount"].(map[string]any)["name"] = "root" }), codes.Unauthenticated, "service account"},
		"bound to no pod":         {claims(func(k map[string]any) { delete(k, "pod") }), codes.Unauthenticated, "not bound to a pod"},
		"too many values": {func(r *request) {
			for i := range 65 {
				r.VolumeContext[fmt.Sprint(i)] = ""
			}
		}, codes.InvalidArgument, "at the most 64"},
	} {
		t.Run(name, func(t *testing.T) {
			r := w.request(1)
			c.change(r)
			err := n.publish(r)
			wantCode(t, err, c.code, c.text)
			if strings.Contains(err.Error(), "secret.") || strings.Contains(err.Error(), "e30.") {
				t.Errorf("a token is in the error: %v", err)
			}
		})
	}
	w.wantNothing()
	if got := w.source.shown(); len(got) > 0 {
		t.Errorf("%d tokens left the driver", len(got))
	}
	// And with nothing changed it is taken; a key that a newer kubelet may add does no harm.
	if err := n.publish(w.request(1, kubeletKeys+"new", "x")); err != nil {
		t.Fatal(err)
	}
	// A volume cannot become another one.
	wantCode(t, n.publish(w.request(1, "files", "true")), codes.AlreadyExists)
	other := w.request(2)
	other.VolumeId = w.request(1).VolumeId
	wantCode(t, n.publish(other), codes.AlreadyExists)
	wantCode(t, n.unpublish(other), codes.InvalidArgument, "elsewhere")
	n.wantID(w.request(1), 1)
	for _, r := range []*request{{}, {VolumeId: "x"}, {VolumeId: "x", TargetPath: "/etc"}} {
		wantCode(t, n.unpublish(r), codes.InvalidArgument)
	}
}

// TestNotRoot: whoever is not root gets no answer, on either socket.
func TestNotRoot(t *testing.T) {
	w := newWorld(t)
	w.uid = func(net.Conn) (uint32, error) { return 1000, nil }
	n := w.start()
	wantCode(t, n.publish(w.request(1)), codes.Unavailable)
	_, err := registration.NewRegistrationClient(dial(t, filepath.Join(w.dir, "reg", Name+"-reg.sock"))).GetInfo(n.ctx(), &registration.InfoRequest{})
	wantCode(t, err, codes.Unavailable)
	w.wantNothing()
	for _, p := range []string{filepath.Join(w.dir, "plugin", "csi.sock"), filepath.Join(w.dir, "reg", Name+"-reg.sock")} {
		if info, err := os.Stat(p); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", p, info.Mode(), err)
		}
	}
	if info, err := os.Stat(filepath.Join(w.dir, "plugin")); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the socket's folder: %v, %v", info.Mode(), err)
	}
}

func TestRegistration(t *testing.T) {
	w := newWorld(t)
	n := w.start()
	if err := n.d.Ready(); !errors.Is(err, identity.ErrUnavailable) {
		t.Errorf("before the kubelet came: %v", err)
	}
	c := registration.NewRegistrationClient(dial(t, filepath.Join(w.dir, "reg", Name+"-reg.sock")))
	info, err := c.GetInfo(n.ctx(), &registration.InfoRequest{})
	if err != nil || info.Type != registration.CSIPlugin || info.Name != Name || info.Endpoint != n.d.cfg.Socket || !slices.Equal(info.SupportedVersions, []string{"1.0.0"}) {
		t.Errorf("%v, %v", info, err)
	}
	if _, err := c.NotifyRegistrationStatus(n.ctx(), &registration.RegistrationStatus{Error: "no such node"}); err != nil {
		t.Fatal(err)
	}
	if err := n.d.Ready(); err == nil || !strings.Contains(err.Error(), "no such node") {
		t.Errorf("refused: %v", err)
	}
	if _, err := c.NotifyRegistrationStatus(n.ctx(), &registration.RegistrationStatus{PluginRegistered: true}); err != nil {
		t.Fatal(err)
	}
	if err := n.d.Ready(); err != nil {
		t.Error(err)
	}
}

func TestWait(t *testing.T) {
	w := newWorld(t)
	n := w.start(func(d *Driver) { d.waitLimit = 100 * time.Millisecond })
	w.source.set(uidOf(1), fmt.Errorf("%w: no entry matches", identity.ErrDenied))
	w.source.set(uidOf(2), fmt.Errorf("%w: no member answers", identity.ErrUnavailable))
	wantCode(t, n.publish(w.request(1)), codes.PermissionDenied, "no entry matches")
	wantCode(t, n.publish(w.request(2)), codes.Unavailable, "no member answers", "wait:")
	w.wantNothing()
	// At once, on demand.
	if err := n.publish(w.request(2, "wait", "false")); err != nil {
		t.Fatal(err)
	}
	if _, err := n.x509(w.request(2)); err == nil {
		t.Error("an identity from nowhere")
	}
	w.source.set(uidOf(2), nil)
	n.wantID(w.request(2), 2)
	w.source.set(uidOf(1), nil)
	if err := n.publish(w.request(1)); err != nil {
		t.Fatal(err)
	}
	// A pod that may be running has its token replaced without waiting for anything.
	w.source.set(uidOf(1), fmt.Errorf("%w: no member answers", identity.ErrUnavailable))
	if err := n.publish(w.request(1)); err != nil {
		t.Fatal(err)
	}
}

// TestAskedAhead: where a pod need not wait, its identity is obtained all the same before its program asks; and that ends with the volume.
func TestAskedAhead(t *testing.T) {
	w := newWorld(t)
	n := w.start(func(d *Driver) { d.waitLimit = time.Hour })
	shown := len(w.source.shown())
	if err := n.publish(w.request(1, "wait", "false")); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is asked for", func() bool { return len(w.source.shown()) > shown })
	w.source.set(uidOf(2), fmt.Errorf("%w: no member answers", identity.ErrUnavailable))
	if err := n.publish(w.request(2, "wait", "false")); err != nil {
		t.Fatal(err)
	}
	if err := n.unpublish(w.request(2)); err != nil { // waits for what asks; the volume's token is wiped by now
		t.Fatal(err)
	}
	w.source.set(uidOf(3), fmt.Errorf("%w: no entry matches", identity.ErrDenied))
	if err := n.publish(w.request(3, "wait", "false")); err != nil {
		t.Fatal(err)
	}
}

// TestMountFails: an error leaves nothing behind.
func TestMountFails(t *testing.T) {
	w := newWorld(t)
	n := w.start()
	w.mounts.bindErr = errors.New("no such device")
	wantCode(t, n.publish(w.request(1, "files", "true")), codes.Internal, "no such device")
	w.wantNothing()
	w.mounts.bindErr = nil
	if err := n.publish(w.request(1)); err != nil {
		t.Fatal(err)
	}
	n.wantID(w.request(1), 1)
}

// TestNothingTold: with everything logged, no token is in the log, in a record or in any other file.
func TestNothingTold(t *testing.T) {
	w := newWorld(t)
	n := w.start()
	r := w.request(1)
	if err := n.publish(r); err != nil {
		t.Fatal(err)
	}
	n.wantID(r, 1)
	w.source.set(uidOf(2), fmt.Errorf("%w: no entry matches", identity.ErrDenied))
	wantCode(t, n.publish(w.request(2)), codes.PermissionDenied)
	other := w.request(3)
	other.VolumeContext[tokensKey] = tokens("countersign", token(uidOf(4), "x"))
	wantCode(t, n.publish(other), codes.Unauthenticated)
	mark := "c2lnfirst" // the end of each token
	if log := w.log.String(); strings.Contains(log, mark) || strings.Contains(log, "e30.") || log == "" {
		t.Errorf("the log has a token, or nothing: %s", log)
	}
	err := filepath.WalkDir(w.dir, func(path string, e os.DirEntry, err error) error {
		if err == nil && e.Type().IsRegular() {
			if data, err := os.ReadFile(path); err != nil || strings.Contains(string(data), mark) {
				t.Errorf("%s has a token: %v", path, err)
			}
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// TestTokenWiped: the bytes of a token that is replaced, or whose volume goes, are zero.
func TestTokenWiped(t *testing.T) {
	v := newVolume(&wanted{ID: "x", Pod: pod{UID: uidOf(1)}})
	first, second, third := []byte("first"), []byte("second"), []byte("third")
	v.take(first)
	v.take(second)
	if string(first) != "\x00\x00\x00\x00\x00" || string(second) != "second" {
		t.Errorf("%q, %q", first, second)
	}
	if err := v.close(); err != nil {
		t.Fatal(err)
	}
	v.take(third)
	if strings.Trim(string(second)+string(third), "\x00") != "" {
		t.Errorf("%q, %q", second, third)
	}
	if _, err := v.attest(t.Context()); !errors.Is(err, identity.ErrDenied) {
		t.Errorf("a volume that is gone: %v", err)
	}
}

// TestIdleBytes logs what an idle volume costs, token included.
func TestIdleBytes(t *testing.T) {
	w := newWorld(t)
	n := w.start()
	eventually(t, "the driver answers", func() bool { _, err := n.node().NodeGetInfo(w.ctx(), nil); return err == nil })
	measure := func() int64 {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc + m.StackInuse)
	}
	const volumes = 200
	before := measure()
	for i := range volumes {
		want, token, err := n.d.parsePublish(w.request(i, "wait", "false"))
		if err == nil {
			err = n.d.publish(w.ctx(), want, token)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	per := (measure() - before) / volumes
	t.Logf("%d bytes for each idle volume (heap and stacks)", per)
	if per > 64<<10 {
		t.Errorf("%d bytes for each idle volume", per)
	}
}
