package workloadapi

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"

	"countersign.io/countersign/identity"
)

// maxPath is what sockaddr_un holds besides the final zero.
const maxPath = 107

// socket is a bound Unix socket that takes its file away when it closes, and only its own: by then another
// agent may have put its socket there.
type socket struct {
	*net.UnixListener
	path  string
	file  os.FileInfo
	close func() error
}

// listen binds the socket. It replaces the socket file of a process that has died, and nothing else.
func listen(path string, mode os.FileMode) (*socket, error) {
	if err := checkPath(path); err != nil {
		return nil, err
	}
	if err := clearStale(path); err != nil {
		return nil, err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if errors.Is(err, unix.EADDRINUSE) { // somebody was quicker since clearStale
		return nil, fmt.Errorf("%w: binding the Workload API socket: %v", identity.ErrExists, err)
	}
	if err != nil {
		return nil, fmt.Errorf("binding the Workload API socket: %w", err)
	}
	l.SetUnlinkOnClose(false)
	s := &socket{UnixListener: l, path: path}
	s.close = sync.OnceValue(func() error { return errors.Join(s.UnixListener.Close(), s.remove()) })
	if s.file, err = os.Lstat(path); err == nil {
		err = os.Chmod(path, mode)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("setting the permissions of the Workload API socket: %w", err), s.close())
	}
	return s, nil
}

func (s *socket) Close() error { return s.close() }

func (s *socket) remove() error {
	now, err := os.Lstat(s.path)
	// The time too, because the inode number of a file removed is free for the next one.
	if errors.Is(err, fs.ErrNotExist) || err == nil && (s.file == nil || !os.SameFile(now, s.file) || !now.ModTime().Equal(s.file.ModTime())) {
		return nil
	}
	if err != nil {
		return err
	}
	return os.Remove(s.path)
}

// checkPath checks the path and makes its folder. Who may rename in the folder can put its own socket in our
// place and play the Workload API to everybody, so a folder that others may write to is refused.
func checkPath(path string) error {
	if !filepath.IsAbs(path) {
		return fmt.Errorf("%w: Workload API socket %q: the path must be absolute, because clients are given it as a URI", identity.ErrInvalid, path)
	}
	if len(path) > maxPath {
		return fmt.Errorf("%w: Workload API socket %q: the path has %d bytes, and Unix sockets allow %d: choose a shorter one", identity.ErrInvalid, path, len(path), maxPath)
	}
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("making the folder of the Workload API socket: %w", err)
	}
	info, err := os.Stat(dir)
	if err != nil {
		return fmt.Errorf("looking at the folder of the Workload API socket: %w", err)
	}
	if info.Mode().Perm()&0o022 != 0 && info.Mode()&os.ModeSticky == 0 {
		return fmt.Errorf("%w: folder %s of the Workload API socket can be written to by others, who could put their own socket there: chmod go-w %s", identity.ErrInvalid, dir, dir)
	}
	return nil
}

// clearStale removes a socket on which nobody listens any more.
func clearStale(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("looking at the Workload API socket: %w", err)
	}
	if info.Mode().Type() != os.ModeSocket {
		return fmt.Errorf("%w: %s is there and is not a socket (%s): move it away or choose another path", identity.ErrInvalid, path, info.Mode().Type())
	}
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
	if err == nil {
		c.Close()
		return fmt.Errorf("%w: another process listens on the Workload API socket %s: stop it or choose another path", identity.ErrExists, path)
	}
	if !errors.Is(err, unix.ECONNREFUSED) { // a full queue, another type of socket, no permission: not ours to remove
		return fmt.Errorf("%w: the Workload API socket %s seems to be in use: %v: stop who uses it or choose another path", identity.ErrExists, path, err)
	}
	if err := os.Remove(path); err != nil {
		return fmt.Errorf("removing the stale Workload API socket: %w", err)
	}
	return nil
}
