// Package csi is a driver of the Container Storage Interface for inline volumes of pods, as the kubelet calls it: Identity and Node
// services, and the kubelet's plugin registration, on Unix sockets that only root may call.
//
// A volume is a folder in memory with a Workload API socket, agent.sock, mounted read-only into one pod. The volume is the identity:
// whoever connects there is that pod, whatever processes its sandbox hides, where the sandbox lets a connection out at all: gVisor does if
// it is told to, a virtual machine (Kata) never does, and its pods have the files. What proves the identity to a member is
// the pod's own token, which the kubelet hands over when it mounts the volume and again before the token ends (CSIDriver: tokenRequests,
// requiresRepublish). No token is written anywhere, and none is in a log or an error.
//
// Each volume has a record beside its folder, so that a restart of the agent takes its sockets up again in the same folders. What a crash
// left half done is taken away at the start, or put right by the kubelet's next call, which is the same one again.
package csi

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	csispec "github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"

	"countersign.io/countersign/identity"
	"countersign.io/countersign/internal/durable"
	"countersign.io/countersign/workloadapi"
)

// Name is the driver's, in the CSIDriver object and in pods.
const Name = "csi.countersign.io"

const (
	maxVolumes      = 4096             // on one node; the kubelet's limit of pods is far below
	maxRequestBytes = 512 << 10        // tokens of several audiences, and room
	waitLimit       = 20 * time.Second // for an identity, in one call: the kubelet shows an error and asks again
	replyTime       = time.Second      // of a call's deadline, left to tell why
	drainTimeout    = 3 * time.Second
	staticVersion   = "1.0.0" // of the CSI that the kubelet is told: it looks at the major number
)

// Config of a Driver. All but Log, Forget and Version are required.
type Config struct {
	Socket          string // of the driver; the kubelet finds it under the same path
	RegistrationDir string // the kubelet's, watched by it
	KubeletDir      string // the kubelet's --root-dir, as it writes it in target paths
	Dir             string // of the volumes; on a tmpfs
	Node            string // name of the node
	Audience        string // of the pods' tokens
	Version         string
	Source          workloadapi.Source
	Forget          func(key string)    // has the source drop what it holds for a volume that is gone
	API             *workloadapi.Server // serves the volumes' sockets
	Log             *slog.Logger
}

// Driver serves the kubelet.
type Driver struct {
	csispec.UnimplementedIdentityServer
	csispec.UnimplementedNodeServer
	registration.UnimplementedRegistrationServer

	cfg  Config
	log  *slog.Logger
	dir  *folder
	unlk func() error // gives the folder's lock back
	csi  net.Listener
	reg  net.Listener

	mu      sync.Mutex
	volumes map[string]*volume  // by ID
	busy    map[string]struct{} // IDs that a call is about
	told    error               // by the kubelet: why it did not take the driver; nil once it did

	// Only tests change these.
	mounts    mounts
	waitLimit time.Duration
	retry     time.Duration // of files
	now       func() time.Time
	step      func(name string) error // between the steps of a publication
}

// hooks are what tests have instead of root and a tmpfs.
type hooks struct {
	memory func(string) (bool, error)
	caller func(net.Conn) (uint32, error)
	mounts mounts
}

// New checks the configuration, takes the folder's lock and binds both sockets. Errors wrap identity.ErrInvalid where the configuration is wrong. Close undoes it.
func New(c Config) (*Driver, error) {
	return newDriver(c, hooks{memory: durable.OnMemory, caller: peerUID, mounts: kernel{c.KubeletDir}})
}

func newDriver(c Config, h hooks) (*Driver, error) {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Forget == nil {
		c.Forget = func(string) {}
	}
	if c.Version == "" {
		c.Version = "dev"
	}
	d := &Driver{cfg: c, log: c.Log, volumes: map[string]*volume{}, busy: map[string]struct{}{}, mounts: h.mounts,
		waitLimit: waitLimit, retry: retryFirst, now: time.Now, step: func(string) error { return nil },
		told: fmt.Errorf("%w: the kubelet has not registered the CSI driver yet: does it watch %s?", identity.ErrUnavailable, c.RegistrationDir)}
	if err := d.check(); err != nil {
		return nil, err
	}
	var err error
	if d.dir, err = openDir(c.Dir, h.memory); err != nil {
		return nil, err
	}
	lock, err := d.dir.lock()
	if err != nil {
		return nil, fmt.Errorf("opening csi.dir: %w", err)
	}
	d.unlk = sync.OnceValue(lock.Close)
	if err := d.listen(h.caller); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

func (d *Driver) check() error {
	c := &d.cfg
	if c.Source == nil || c.API == nil {
		return fmt.Errorf("%w: the CSI driver needs a source and a Workload API server", identity.ErrInvalid)
	}
	for _, f := range []struct{ name, path string }{
		{"csi.socket", c.Socket}, {"csi.registration_dir", c.RegistrationDir}, {"csi.kubelet_dir", c.KubeletDir}, {"csi.dir", c.Dir},
	} {
		if !filepath.IsAbs(f.path) || filepath.Clean(f.path) != f.path {
			return fmt.Errorf("%w: %s %q: want an absolute path, written plainly", identity.ErrInvalid, f.name, f.path)
		}
	}
	if !isName(c.Node) {
		return fmt.Errorf("%w: csi.node %q: want the node's name, such as from the environment variable NODE_NAME", identity.ErrInvalid, c.Node)
	}
	if c.Audience == "" || len(c.Audience) > identity.MaxAudienceBytes {
		return fmt.Errorf("%w: csi.audience %q: want 1 to %d bytes", identity.ErrInvalid, c.Audience, identity.MaxAudienceBytes)
	}
	return nil
}

// listen binds the sockets: the kubelet calls as soon as it sees the second.
func (d *Driver) listen(caller func(net.Conn) (uint32, error)) error {
	if err := ownFolder(filepath.Dir(d.cfg.Socket)); err != nil {
		return fmt.Errorf("opening the folder of csi.socket: %w", err)
	}
	l, err := workloadapi.Listen(d.cfg.Socket, 0o600)
	if err != nil {
		return fmt.Errorf("opening csi.socket: %w", err)
	}
	d.csi = &rootOnly{l, caller, d.log}
	if l, err = workloadapi.Listen(filepath.Join(d.cfg.RegistrationDir, Name+"-reg.sock"), 0o600); err != nil {
		return fmt.Errorf("opening the socket in csi.registration_dir: %w", err)
	}
	d.reg = &rootOnly{l, caller, d.log}
	return nil
}

// Run takes up the volumes of an earlier process and serves the kubelet until ctx ends, which is no error. The volumes stay.
func (d *Driver) Run(ctx context.Context) error {
	defer d.Close()
	if err := d.restore(); err != nil {
		return err
	}
	node, plugin := d.server(), d.server()
	csispec.RegisterIdentityServer(node, d)
	csispec.RegisterNodeServer(node, d)
	registration.RegisterRegistrationServer(plugin, d)
	g, ctx := errgroup.WithContext(ctx)
	for _, s := range []struct {
		server *grpc.Server
		on     net.Listener
		what   string
	}{{node, d.csi, "the CSI driver"}, {plugin, d.reg, "the kubelet's registration"}} {
		g.Go(func() error {
			if err := s.server.Serve(s.on); err != nil && ctx.Err() == nil {
				return fmt.Errorf("serving %s: %w", s.what, err)
			}
			return nil
		})
		g.Go(func() error {
			<-ctx.Done()
			drained := make(chan struct{})
			go func() { s.server.GracefulStop(); close(drained) }()
			select {
			case <-drained:
			case <-time.After(drainTimeout):
				s.server.Stop()
			}
			return nil
		})
	}
	return g.Wait()
}

// Close ends everything and leaves the volumes for the next process. It is harmless after Run.
func (d *Driver) Close() error {
	var errs []error
	for _, l := range []net.Listener{d.csi, d.reg} {
		if l != nil {
			if err := l.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
				errs = append(errs, err)
			}
		}
	}
	d.mu.Lock()
	volumes := d.volumes
	d.volumes = map[string]*volume{}
	d.mu.Unlock()
	for _, v := range volumes {
		if err := v.close(); err != nil && !errors.Is(err, net.ErrClosed) {
			errs = append(errs, err)
		}
	}
	return errors.Join(append(errs, d.unlk())...)
}

// Ready is nil once the kubelet has taken the driver. Otherwise pods cannot be given a volume, and it says why.
func (d *Driver) Ready() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.told
}

// Volumes is how many are mounted.
func (d *Driver) Volumes() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.volumes)
}

// restore takes up what an earlier process left: a volume that is still mounted is served again, and all else is removed.
func (d *Driver) restore() error {
	kept := func(path string, err error) {
		d.log.Error("a volume's record cannot be read: its pod has no identity until the kubelet asks again", "path", path, "error", err)
	}
	all, err := d.dir.read(kept)
	if err != nil {
		return err
	}
	for _, w := range all {
		name := nameOf(w.ID)
		at, err := d.mounts.look(d.dir.volume(name), w.place())
		if err != nil { // not known, so nothing is taken from a pod that may be running
			d.log.Error("cannot see whether a volume is mounted: serving it", "volume", w.ID, "error", err)
			at = ours
		}
		if at != ours {
			if err := errors.Join(d.mounts.unbind(w.place()), d.dir.remove(name)); err != nil {
				d.log.Error("could not remove a volume whose pod is gone", "volume", w.ID, "error", err)
			}
			continue
		}
		v := newVolume(w)
		if err := d.serve(v); err != nil {
			d.log.Error("could not take a volume up again: its pod has no identity until the kubelet asks again", "volume", w.ID, "error", err)
			_ = v.close()
			continue
		}
		d.mu.Lock()
		d.volumes[w.ID] = v
		d.mu.Unlock()
	}
	orphans, err := d.dir.orphans()
	if err != nil {
		return err
	}
	for _, name := range orphans {
		if err := d.dir.remove(name); err != nil {
			d.log.Error("could not remove a folder that is no volume's", "path", d.dir.volume(name), "error", err)
		}
	}
	if n := d.Volumes(); n > 0 {
		d.log.Info("took up the volumes from before the restart", "volumes", n)
	}
	return nil
}

// serve makes the folder of a volume and opens its socket.
func (d *Driver) serve(v *volume) error {
	name := nameOf(v.ID)
	if err := d.dir.make(name); err != nil {
		return err
	}
	if err := d.step("folder"); err != nil {
		return err
	}
	socket, err := d.cfg.API.Open(filepath.Join(d.dir.volume(name), socketName), os.FileMode(0o777), v.Pod.Namespace+"/"+v.Pod.Name+" "+v.ID, v.attest)
	if err != nil {
		return err
	}
	v.socket = socket
	if err := d.step("socket"); err != nil {
		return err
	}
	if v.Files {
		v.files = &keeper{v: v, dir: d.dir.volume(name), source: d.cfg.Source, log: d.log, now: d.now, retry: d.retry}
		v.files.start()
	}
	return nil
}
