package csi

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	csispec "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"countersign.io/countersign/attestor"
	"countersign.io/countersign/identity"
)

// NodePublishVolume gives a pod its volume, or a volume that is there its newest token. It may be called again at any time, and does what is
// left to do.
func (d *Driver) NodePublishVolume(ctx context.Context, req *csispec.NodePublishVolumeRequest) (*csispec.NodePublishVolumeResponse, error) {
	w, token, err := d.parsePublish(req)
	if err != nil {
		return nil, err
	}
	done, err := d.begin(w.ID)
	if err != nil {
		clear(token)
		return nil, err
	}
	defer done()
	if err := d.publish(ctx, w, token); err != nil {
		d.log.Warn("a pod's volume could not be mounted", "namespace", w.Pod.Namespace, "pod", w.Pod.Name, "volume", w.Volume, "error", err)
		return nil, err
	}
	return &csispec.NodePublishVolumeResponse{}, nil
}

// begin keeps a second call about a volume away.
func (d *Driver) begin(id string) (done func(), err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, busy := d.busy[id]; busy {
		return nil, status.Errorf(codes.Aborted, "a call about volume %s is under way: try again", id)
	}
	d.busy[id] = struct{}{}
	return func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		delete(d.busy, id)
	}, nil
}

func (d *Driver) find(id string) (v *volume, n int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.volumes[id], len(d.volumes)
}

// publish takes the token over. What it began is taken back on an error, as the kubelet expects of an error that is final; but not from
// a pod that may be running.
func (d *Driver) publish(ctx context.Context, w *wanted, token []byte) error {
	name := nameOf(w.ID)
	v, n := d.find(w.ID)
	isNew := v == nil
	if !isNew {
		if !v.same(w) {
			clear(token)
			return fmt.Errorf("%w: volume %s is mounted with other attributes, or for another pod", identity.ErrExists, w.ID)
		}
		v.take(token)
	} else {
		if n >= maxVolumes {
			clear(token)
			return fmt.Errorf("%w: %d volumes are mounted on this node: no more are", identity.ErrExhausted, n)
		}
		v = newVolume(w)
		v.take(token)
	}
	at, err := d.mounts.look(d.dir.volume(name), w.place())
	if err != nil {
		if isNew {
			_ = v.close()
		}
		return err
	}
	if at == ours && v.socket != nil {
		if v.files != nil {
			v.files.poke()
		}
		return nil // a newer token for a pod that may be running: it waits for nothing
	}
	if err := d.mount(ctx, v, at); err != nil {
		d.mu.Lock()
		delete(d.volumes, v.ID)
		d.mu.Unlock()
		if at == ours { // its record could not be read at the start: the folder stays the pod's, and this is tried again
			return errors.Join(err, v.close())
		}
		return errors.Join(err, d.drop(v))
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.volumes[v.ID] = v
	return nil
}

// mount does all that a volume needs, in an order in which a crash after any step leaves what restore takes away or what the next call
// completes.
func (d *Driver) mount(ctx context.Context, v *volume, at seen) error {
	wait, cancel := context.WithTimeout(ctx, d.waitLimit)
	defer cancel()
	if end, ok := ctx.Deadline(); ok {
		var cancel context.CancelFunc
		wait, cancel = context.WithDeadline(wait, end.Add(-replyTime))
		defer cancel()
	}
	if v.Wait {
		if err := d.await(wait, v); err != nil {
			return err
		}
	} else if v.asking == nil {
		d.ask(v)
	}
	if err := d.dir.write(&v.wanted); err != nil {
		return err
	}
	if err := d.step("record"); err != nil {
		return err
	}
	if v.socket == nil {
		if err := d.serve(v); err != nil {
			return err
		}
	}
	if v.Wait && v.files != nil {
		if err := v.files.wait(wait); err != nil {
			return err
		}
	}
	if at == ours {
		return nil
	}
	if at == other { // of a folder that is no longer there
		if err := d.mounts.unbind(v.place()); err != nil {
			return err
		}
	}
	if err := d.mounts.bind(d.dir.volume(nameOf(v.ID)), v.place()); err != nil {
		return err
	}
	return d.step("mount")
}

// ask has a pod's identity obtained while its containers are being made. What comes of it is told to whoever connects.
func (d *Driver) ask(v *volume) {
	ctx, cancel := context.WithTimeout(context.Background(), d.waitLimit)
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer cancel()
		_ = d.await(ctx, v)
	}()
	v.mu.Lock()
	defer v.mu.Unlock()
	v.asking = func() { cancel(); <-done }
}

// await returns once the pod has an identity. A refusal is told at once, anything else when ctx ends.
func (d *Driver) await(ctx context.Context, v *volume) error {
	var last error
	for pause := 50 * time.Millisecond; ; pause = min(2*pause, time.Second) {
		_, err := d.cfg.Source.Current(ctx, v.attest)
		if err == nil {
			return nil
		}
		ended := ctx.Err() != nil
		if !ended && !errors.Is(err, identity.ErrUnavailable) && !errors.Is(err, identity.ErrExhausted) {
			return fmt.Errorf("the pod is given no identity: %w", err)
		}
		if !ended || last == nil {
			last = err
		}
		if ended || !sleep(ctx, pause) {
			return fmt.Errorf("%w: the pod has no identity yet: %w (wait: \"false\" would start it all the same)", identity.ErrUnavailable, last)
		}
	}
}

// drop takes a volume away that is not mounted, or is to be no longer.
func (d *Driver) drop(v *volume) error {
	err := v.close()
	if errors.Is(err, net.ErrClosed) {
		err = nil
	}
	d.cfg.Forget(attestor.VolumeKey(v.Pod.UID, v.ID))
	return errors.Join(err, d.mounts.unbind(v.place()), d.dir.remove(nameOf(v.ID)))
}

// NodeUnpublishVolume takes a volume from its pod, whatever there is of it.
func (d *Driver) NodeUnpublishVolume(_ context.Context, req *csispec.NodeUnpublishVolumeRequest) (*csispec.NodeUnpublishVolumeResponse, error) {
	id := req.GetVolumeId()
	if err := checkVolumeID(id); err != nil {
		return nil, err
	}
	at, err := d.parseTarget(req.GetTargetPath())
	if err != nil {
		return nil, err
	}
	done, err := d.begin(id)
	if err != nil {
		return nil, err
	}
	defer done()
	d.mu.Lock()
	v := d.volumes[id]
	if v != nil && v.place() != at {
		d.mu.Unlock()
		return nil, fmt.Errorf("%w: volume %s is mounted elsewhere than at that target path", identity.ErrInvalid, id)
	}
	delete(d.volumes, id)
	d.mu.Unlock()
	if v == nil { // of an earlier process, or none at all
		v = &volume{wanted: wanted{ID: id, Pod: pod{UID: at.podUID}, Volume: at.volume}}
	}
	if err := d.drop(v); err != nil {
		return nil, fmt.Errorf("unmounting volume %s: %w", id, err)
	}
	return &csispec.NodeUnpublishVolumeResponse{}, nil
}

// NodeGetCapabilities says that the files' group is set here, so that the kubelet does not try to on what is read-only.
func (d *Driver) NodeGetCapabilities(context.Context, *csispec.NodeGetCapabilitiesRequest) (*csispec.NodeGetCapabilitiesResponse, error) {
	return &csispec.NodeGetCapabilitiesResponse{Capabilities: []*csispec.NodeServiceCapability{{
		Type: &csispec.NodeServiceCapability_Rpc{Rpc: &csispec.NodeServiceCapability_RPC{Type: csispec.NodeServiceCapability_RPC_VOLUME_MOUNT_GROUP}},
	}}}, nil
}

// NodeGetInfo names the node.
func (d *Driver) NodeGetInfo(context.Context, *csispec.NodeGetInfoRequest) (*csispec.NodeGetInfoResponse, error) {
	return &csispec.NodeGetInfoResponse{NodeId: d.cfg.Node}, nil
}

// GetPluginInfo names the driver.
func (d *Driver) GetPluginInfo(context.Context, *csispec.GetPluginInfoRequest) (*csispec.GetPluginInfoResponse, error) {
	return &csispec.GetPluginInfoResponse{Name: Name, VendorVersion: d.cfg.Version}, nil
}

// GetPluginCapabilities says that there are none: there is no controller.
func (d *Driver) GetPluginCapabilities(context.Context, *csispec.GetPluginCapabilitiesRequest) (*csispec.GetPluginCapabilitiesResponse, error) {
	return &csispec.GetPluginCapabilitiesResponse{}, nil
}

// Probe answers: whether the agent can get identities is told by its own health.
func (d *Driver) Probe(context.Context, *csispec.ProbeRequest) (*csispec.ProbeResponse, error) {
	return &csispec.ProbeResponse{}, nil
}
