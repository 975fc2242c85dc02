package csi

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"

	"countersign.io/countersign/identity"
)

// TestRestart: a pod's socket is in the same folder after a restart, and answers before the kubelet has called again.
func TestRestart(t *testing.T) {
	w := newWorld(t)
	n := w.start()
	kept, gone, unmounted := w.request(1), w.request(2), w.request(3)
	for i := range 3 {
		if err := n.publish(w.request(i + 1)); err != nil {
			t.Fatal(err)
		}
	}
	before, err := os.Stat(n.folder(kept))
	if err != nil {
		t.Fatal(err)
	}
	if err := n.stop(); err != nil {
		t.Fatal(err)
	}
	if w.mounts.count() != 3 {
		t.Error("stopping unmounted something")
	}
	// While the agent was away one pod was deleted, and one volume unmounted.
	delete(w.mounts.at, place{uidOf(2), "identity"})
	delete(w.mounts.at, place{uidOf(3), "identity"})
	w.source.tokens = nil

	n = w.start()
	eventually(t, "the volume is served again", func() bool { return n.d.Volumes() == 1 })
	n.wantID(kept, 1)
	if after, err := os.Stat(n.folder(kept)); err != nil || !os.SameFile(before, after) {
		t.Errorf("another folder, which the pod does not see: %v", err)
	}
	if got := w.source.shown(); len(got) > 0 {
		t.Error("a token outlived the process that had it")
	}
	for _, r := range []string{gone.VolumeId, unmounted.VolumeId} {
		if _, err := os.Stat(n.d.dir.volume(nameOf(r))); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the folder of a volume that is gone: %v", err)
		}
	}
	if err := n.publish(kept); err != nil { // requiresRepublish
		t.Fatal(err)
	}
	n.wantID(kept, 1)
	if got := w.source.shown(); len(got) == 0 || w.mounts.binds != 3 {
		t.Errorf("the token is not taken, or it was mounted again: %d", w.mounts.binds)
	}
	for _, r := range []string{gone.VolumeId, unmounted.VolumeId} { // the kubelet need not know
		req := w.request(2)
		req.VolumeId = r
		if err := n.unpublish(req); err != nil {
			t.Error(err)
		}
	}
	if err := n.unpublish(kept); err != nil {
		t.Fatal(err)
	}
	w.wantNothing()
}

// TestUnpublishAfterRestart: a volume may end while the agent does not know of it.
func TestUnpublishAfterRestart(t *testing.T) {
	w := newWorld(t)
	n := w.start()
	r := w.request(1)
	if err := n.publish(r); err != nil {
		t.Fatal(err)
	}
	if err := n.stop(); err != nil {
		t.Fatal(err)
	}
	// Its record cannot be read: as of a newer version that was rolled back.
	path := filepath.Join(w.dir, "v", "records", nameOf(r.VolumeId)+".json")
	data := must(os.ReadFile(path))
	newer := strings.Replace(string(data), `"version":1`, `"version":2`, 1)
	if newer == string(data) {
		t.Fatal("no version in the record")
	}
	if err := os.WriteFile(path, []byte(newer), 0o600); err != nil {
		t.Fatal(err)
	}
	n = w.start()
	eventually(t, "the record is told about", func() bool { return strings.Contains(w.log.String(), "it has version 2") })
	if _, err := os.Stat(n.folder(r)); err != nil || w.mounts.count() != 1 {
		t.Fatalf("a pod's folder was taken away: %v", err)
	}
	if err := n.publish(r); err != nil { // the kubelet's next call heals it, in the same folder
		t.Fatal(err)
	}
	n.wantID(r, 1)
	if w.mounts.binds != 1 {
		t.Error("mounted again")
	}
	if err := n.stop(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(newer), 0o600); err != nil {
		t.Fatal(err)
	}
	n = w.start()
	if err := n.unpublish(r); err != nil {
		t.Fatal(err)
	}
	w.wantNothing()
}

// killed is what a step panics with in place of a kill -9: nothing that would clean up runs.
type killed struct{}

// TestKilled: whatever step a kill comes after, the next process has either the whole volume or nothing of it, and the kubelet's same call
// again gives the pod its identity.
func TestKilled(t *testing.T) {
	for _, at := range []string{"record", "folder", "socket", "mount"} {
		t.Run(at, func(t *testing.T) {
			w := newWorld(t)
			d, api := w.make()
			d.step = func(name string) error {
				if name == at {
					panic(killed{})
				}
				return nil
			}
			r := w.request(1, "files", "true")
			func() {
				defer func() {
					if r := recover(); r != (killed{}) {
						t.Fatalf("never came to step %s: %v", at, r)
					}
				}()
				wanted, token, err := d.parsePublish(r)
				if err == nil {
					err = d.publish(w.ctx(), wanted, token)
				}
				t.Fatal(err)
			}()
			// What the kernel does to a process that is killed: its sockets and locks are gone, its files and mounts are not.
			folder := d.dir.volume(nameOf(r.VolumeId))
			if err := errors.Join(d.unlk(), d.csi.Close(), d.reg.Close(), api.Close()); err != nil {
				t.Fatal(err)
			}
			n := w.start()
			eventually(t, "the driver answers", func() bool { _, err := n.node().NodeGetInfo(w.ctx(), nil); return err == nil })
			if at == "mount" {
				n.wantID(r, 1)
			} else if _, err := os.Lstat(folder); !errors.Is(err, os.ErrNotExist) || n.d.Volumes() != 0 {
				t.Errorf("half a volume is left: %v", err)
			}
			if err := n.publish(r); err != nil {
				t.Fatal(err)
			}
			n.wantID(r, 1)
			if err := n.unpublish(r); err != nil {
				t.Fatal(err)
			}
			w.wantNothing()
		})
	}
}

// TestStepFails: an error in place of the kill is told, and leaves nothing.
func TestStepFails(t *testing.T) {
	for _, at := range []string{"record", "folder", "socket", "mount"} {
		w := newWorld(t)
		n := w.start(func(d *Driver) {
			d.step = func(name string) error {
				if name == at {
					return fmt.Errorf("no space left at %s", at)
				}
				return nil
			}
		})
		wantCode(t, n.publish(w.request(1, "files", "true")), codes.Internal, "no space left at "+at)
		w.wantNothing()
	}
}

// TestLeftovers: what is nobody's is removed at the start, and no symlink is followed on the way.
func TestLeftovers(t *testing.T) {
	w := newWorld(t)
	n := w.start()
	if err := n.stop(); err != nil {
		t.Fatal(err)
	}
	outside := filepath.Join(w.dir, "key.pem")
	if err := os.WriteFile(outside, []byte("somebody else's key"), 0o600); err != nil {
		t.Fatal(err)
	}
	orphan := filepath.Join(w.dir, "v", "volumes", strings.Repeat("ab", 16))
	for _, err := range []error{
		os.Mkdir(orphan, 0o755), os.Symlink(outside, filepath.Join(orphan, "key.pem")), os.Symlink(w.dir, filepath.Join(orphan, "..at-1")),
		os.Symlink(w.dir, filepath.Join(w.dir, "v", "volumes", strings.Repeat("cd", 16))),
		os.WriteFile(filepath.Join(w.dir, "v", "records", ".x.json.1.tmp"), []byte("half"), 0o600),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	n = w.start()
	eventually(t, "the driver answers", func() bool { _, err := n.node().NodeGetInfo(w.ctx(), nil); return err == nil })
	w.wantNothing()
	if data, err := os.ReadFile(outside); err != nil || string(data) != "somebody else's key" {
		t.Errorf("a symlink was followed: %q, %v", data, err)
	}
}

func TestFolderRefused(t *testing.T) {
	w := newWorld(t)
	_, api := w.make()
	t.Cleanup(func() { api.Close() })
	disk := func(string) (bool, error) { return false, nil }
	memory := func(string) (bool, error) { return true, nil }
	loose := filepath.Join(w.dir, "loose")
	if err := errors.Join(os.Mkdir(loose, 0o755), os.Chmod(loose, 0o777), os.Symlink(w.dir, filepath.Join(w.dir, "link"))); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		change func(*Config)
		memory func(string) (bool, error)
		text   string
	}{
		"on a disk":           {func(c *Config) { c.Dir = filepath.Join(w.dir, "x") }, disk, "not on a tmpfs"},
		"of another agent":    {func(c *Config) {}, memory, "another process"},
		"writable by others":  {func(c *Config) { c.Dir = loose }, memory, "lets other users in"},
		"a link":              {func(c *Config) { c.Dir = filepath.Join(w.dir, "link") }, memory, "not a folder"},
		"too long":            {func(c *Config) { c.Dir = "/" + strings.Repeat("a", 60) }, memory, "shorter"},
		"relative":            {func(c *Config) { c.Dir = "x" }, memory, "absolute"},
		"a kubelet's with ..": {func(c *Config) { c.KubeletDir = "/var/lib/../kubelet" }, memory, "plainly"},
		"no node":             {func(c *Config) { c.Node = "" }, memory, "NODE_NAME"},
		"no audience":         {func(c *Config) { c.Audience = "" }, memory, "audience"},
		"no source":           {func(c *Config) { c.Source = nil }, memory, "source"},
		"socket in a loose":   {func(c *Config) { c.Dir = filepath.Join(w.dir, "y"); c.Socket = filepath.Join(loose, "csi.sock") }, memory, "lets other users in"},
		"registration nowhere": {func(c *Config) {
			c.Dir = filepath.Join(w.dir, "z")
			c.RegistrationDir = filepath.Join(w.dir, "link", "agent.sock")
		}, memory, "registration_dir"},
	} {
		conf := w.config(api)
		conf.Socket = filepath.Join(w.dir, "p2", "csi.sock")
		c.change(&conf)
		_, err := newDriver(conf, hooks{memory: c.memory, caller: w.uid, mounts: w.mounts})
		if err == nil || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := parseRecord([]byte(`{"version":1} {}`)); !errors.Is(err, identity.ErrInvalid) {
		t.Error(err)
	}
}
