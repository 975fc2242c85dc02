package csi

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"countersign.io/countersign/attestor"
	"countersign.io/countersign/identity"
	"countersign.io/countersign/internal/durable"
)

// volume is one that is served.
type volume struct {
	wanted
	key    string // attestor.Workload.Key
	socket io.Closer
	files  *keeper // nil without files

	mu     sync.Mutex
	asking func() // ends what Driver.ask began; nil: nothing
	token  []byte // the newest; nil: none since the agent started
	closed bool
}

func newVolume(w *wanted) *volume {
	return &volume{wanted: *w, key: attestor.VolumeKey(w.Pod.UID, w.ID)}
}

// attest says who uses the volume's socket: its pod, whoever calls.
func (v *volume) attest(context.Context) (*attestor.Workload, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.closed {
		return nil, fmt.Errorf("%w: the volume has been unmounted", identity.ErrDenied)
	}
	return &attestor.Workload{Key: v.key, PodUID: v.Pod.UID, Evidence: identity.Evidence{Token: bytes.Clone(v.token)}}, nil
}

// take puts a newer token in the place of the one before, which is wiped. The volume owns it.
func (v *volume) take(token []byte) {
	v.mu.Lock()
	defer v.mu.Unlock()
	clear(v.token)
	if v.token = token; v.closed {
		clear(token)
		v.token = nil
	}
}

// close ends the socket and the files' renewal, and wipes the token. It may be called again.
func (v *volume) close() error {
	v.mu.Lock()
	v.closed = true
	clear(v.token)
	v.token = nil
	asking := v.asking
	v.mu.Unlock()
	if asking != nil {
		asking()
	}
	if v.files != nil {
		v.files.stop()
	}
	if v.socket == nil {
		return nil
	}
	return v.socket.Close()
}

// folder is where volumes lie, on memory:
//
//	lock            held while an agent runs
//	volumes/HEX/    what a pod sees: agent.sock, and files
//	records/HEX.json  whose it is
//
// HEX is a hash of the volume ID. A record is written before its folder is made and removed after it: what has no record is nobody's.
type folder struct{ path string }

const (
	recordVersion = 1
	maxRecord     = 64 << 10
	socketName    = "agent.sock"
	maxDirBytes   = 107 - len("/volumes/") - 2*16 - len("/"+socketName) // of folder.path: what a socket's address has room for
)

// record is a volume over a restart of the agent. It holds no token.
type record struct {
	Version int `json:"version"`
	wanted
}

func openDir(path string, memory func(string) (bool, error)) (*folder, error) {
	if len(path) > maxDirBytes {
		return nil, fmt.Errorf("%w: csi.dir %s has %d bytes, and the addresses of sockets in it allow %d: choose a shorter one", identity.ErrInvalid, path, len(path), maxDirBytes)
	}
	if err := ownFolder(path); err != nil {
		return nil, fmt.Errorf("opening csi.dir: %w", err)
	}
	ok, err := memory(path)
	if err != nil {
		return nil, fmt.Errorf("opening csi.dir: %w", err)
	}
	if !ok {
		return nil, fmt.Errorf("opening csi.dir: %w: %s is not on a tmpfs, and keys are not written to a disk: use a folder below /run", identity.ErrInvalid, path)
	}
	d := &folder{path}
	for _, p := range []string{d.volumes(), d.records()} {
		if err := durable.PrivateDir(p); err != nil {
			return nil, fmt.Errorf("opening csi.dir: %w: %w", identity.ErrInvalid, err)
		}
	}
	return d, nil
}

// ownFolder makes a folder that nobody else may enter. One that the kubelet has made for a hostPath lets others read: that is
// taken back.
func ownFolder(path string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	info, err := os.Lstat(path)
	if err == nil && info.IsDir() && info.Mode().Perm()&0o022 == 0 && info.Mode().Perm()&0o055 != 0 {
		if err := os.Chmod(path, 0o700); err != nil {
			return err
		}
	}
	if err := durable.PrivateDir(path); err != nil {
		return fmt.Errorf("%w: %w", identity.ErrInvalid, err)
	}
	return nil
}

func (d *folder) volumes() string               { return filepath.Join(d.path, "volumes") }
func (d *folder) records() string               { return filepath.Join(d.path, "records") }
func (d *folder) lock() (io.Closer, error)      { return durable.Lock(filepath.Join(d.path, "lock")) }
func (d *folder) volume(name string) string     { return filepath.Join(d.volumes(), name) }
func (d *folder) recordFile(name string) string { return filepath.Join(d.records(), name+".json") }

// nameOf is what a volume's folder and record are called.
func nameOf(id string) string {
	h := sha256.Sum256([]byte(id))
	return hex.EncodeToString(h[:16])
}

// write writes a volume's record.
func (d *folder) write(w *wanted) error {
	data, err := json.Marshal(record{recordVersion, *w})
	if err == nil {
		err = durable.WriteFile(d.recordFile(nameOf(w.ID)), data, 0o600)
	}
	if err != nil {
		return fmt.Errorf("writing the volume's record: %w", err)
	}
	return nil
}

// parseRecord is a strict parse: what a request would be refused for is refused here too.
func parseRecord(data []byte) (*wanted, error) {
	var r record
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(&r); err != nil {
		return nil, fmt.Errorf("%w: %v", identity.ErrInvalid, err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("%w: there is more after its end", identity.ErrInvalid)
	}
	if r.Version != recordVersion {
		return nil, fmt.Errorf("%w: it has version %d: this agent reads %d", identity.ErrInvalid, r.Version, recordVersion)
	}
	if err := r.check(); err != nil {
		return nil, err
	}
	return &r.wanted, nil
}

// read reads every record. What cannot be read is told to bad and left: the kubelet's next call on that volume puts it right.
func (d *folder) read(bad func(path string, err error)) ([]*wanted, error) {
	entries, err := os.ReadDir(d.records())
	if err != nil {
		return nil, fmt.Errorf("reading the volumes' records: %w", err)
	}
	var out []*wanted
	for _, e := range entries {
		path := filepath.Join(d.records(), e.Name())
		name, ok := strings.CutSuffix(e.Name(), ".json")
		if !ok {
			if strings.HasPrefix(e.Name(), ".") && strings.HasSuffix(e.Name(), ".tmp") { // of a write that a crash ended
				if err := os.Remove(path); err != nil {
					bad(path, err)
				}
			}
			continue
		}
		data, err := durable.ReadPrivateFile(path, maxRecord)
		if err != nil {
			bad(path, err)
			continue
		}
		w, err := parseRecord(data)
		if err == nil && nameOf(w.ID) != name {
			err = fmt.Errorf("%w: it is not under the name of its volume", identity.ErrInvalid)
		}
		if err != nil {
			bad(path, err)
			continue
		}
		out = append(out, w)
	}
	return out, nil
}

// orphans are folders without a record.
func (d *folder) orphans() ([]string, error) {
	entries, err := os.ReadDir(d.volumes())
	if err != nil {
		return nil, fmt.Errorf("reading the volumes: %w", err)
	}
	var out []string
	for _, e := range entries {
		if _, err := os.Lstat(d.recordFile(e.Name())); errors.Is(err, fs.ErrNotExist) {
			out = append(out, e.Name())
		}
	}
	return out, nil
}

// make makes a volume's folder, or takes the one that is there.
func (d *folder) make(name string) error {
	err := os.Mkdir(d.volume(name), 0o755)
	if err == nil {
		err = os.Chmod(d.volume(name), 0o755) // whatever the umask
	} else if errors.Is(err, fs.ErrExist) {
		var info fs.FileInfo
		if info, err = os.Lstat(d.volume(name)); err == nil && !info.IsDir() {
			err = fmt.Errorf("%w: it is not a folder", identity.ErrInvalid)
		}
	}
	if err != nil {
		return fmt.Errorf("making the volume's folder: %w", err)
	}
	return nil
}

// remove takes a volume's folder away, having wiped the keys in it, and then its record. What is not there is no error. No symlink that
// may have been planted in the folder is followed out of it.
func (d *folder) remove(name string) error {
	root, err := os.OpenRoot(d.volumes())
	if err != nil {
		return fmt.Errorf("removing the volume: %w", err)
	}
	defer root.Close()
	if v, err := root.OpenRoot(name); err == nil {
		wipe(v)
		v.Close()
	}
	if err := root.RemoveAll(name); err != nil {
		return fmt.Errorf("removing the volume: %w", err)
	}
	if err := os.Remove(d.recordFile(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("removing the volume's record: %w", err)
	}
	return nil
}

// wipe overwrites the secrets that the files of a volume hold. The folder goes at once after it, so what cannot be wiped is left to that.
func wipe(v *os.Root) {
	_ = fs.WalkDir(v.FS(), ".", func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() || !isSecret(e.Name()) {
			return nil
		}
		f, err := v.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			return nil
		}
		defer f.Close()
		if info, err := f.Stat(); err == nil && info.Mode().IsRegular() && info.Size() <= maxRecord {
			_, _ = f.Write(make([]byte, info.Size()))
		}
		return nil
	})
}
