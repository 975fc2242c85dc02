package server

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"countersign.io/countersign/identity"
)

// maxSocketPath is what fits into sockaddr_un (unix(7)), with its final NUL.
const maxSocketPath = 107

// ListenAdmin opens the operators' Unix socket at an absolute path, for this process's user alone (0600); root may
// always. The folder must exist. A socket that a dead process left there is replaced; one that answers is not.
func ListenAdmin(path string) (net.Listener, error) {
	if len(path) > maxSocketPath {
		return nil, fmt.Errorf("opening the admin socket: %w: %q has %d bytes, more than the %d that a socket's path may have: choose a shorter one", identity.ErrInvalid, path, len(path), maxSocketPath)
	}
	if err := checkFolder(filepath.Dir(path)); err != nil {
		return nil, fmt.Errorf("opening the admin socket: %w", err)
	}
	if err := removeStale(path); err != nil {
		return nil, fmt.Errorf("opening the admin socket: %w", err)
	}
	// The mask is the process's: another thread's file would come out too strict for a moment, never too open.
	old := unix.Umask(0o177)
	l, err := net.Listen("unix", path)
	unix.Umask(old)
	if err != nil {
		return nil, fmt.Errorf("opening the admin socket: %w", err)
	}
	return l, nil
}

// checkFolder refuses a folder that others may write to. They could put a socket of their own into the place of ours, and tell
// operators a CA pin of theirs.
func checkFolder(dir string) error {
	st, err := os.Stat(dir)
	if err != nil {
		return err
	}
	if st.Mode().Perm()&0o022 != 0 && st.Mode()&fs.ModeSticky == 0 {
		return fmt.Errorf("%w: folder %s can be written to by others, who could put a socket of their own there: chmod go-w %s", identity.ErrInvalid, dir, dir)
	}
	return nil
}

func removeStale(path string) error {
	st, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if st.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("%w: %s is there and is not a socket: move it away, or set another admin_socket", identity.ErrExists, path)
	}
	c, err := net.DialTimeout("unix", path, 5*time.Second)
	if err == nil {
		c.Close()
		return fmt.Errorf("%w: another process serves %s: is the server running already?", identity.ErrExists, path)
	}
	if !errors.Is(err, unix.ECONNREFUSED) {
		return fmt.Errorf("asking whether anybody serves %s: %w", path, err)
	}
	return os.Remove(path)
}
