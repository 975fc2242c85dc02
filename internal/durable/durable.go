// Package durable holds what it takes to trust a local file: writes that survive a power cut, folders and
// files nobody else on the machine can read, and the lock that keeps a second process out. It knows nothing
// of what the bytes mean.
package durable

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

var (
	// ErrLocked is wrapped by Lock when another process holds the lock.
	ErrLocked = errors.New("locked by another process")
	// ErrLoose is wrapped when a file or folder can be read or changed by others than its owner.
	ErrLoose = errors.New("loose permissions")
	// ErrTooLarge is wrapped by ReadPrivateFile when a file is larger than its caller allows.
	ErrTooLarge = errors.New("file too large")
)

// WriteFile replaces the file at path with data, all or nothing: after a crash at any moment the path holds
// either the old bytes or the new ones, and once WriteFile has returned nil, the new ones.
//
// A crash before the rename leaves a file ".NAME.*.tmp" beside it, which nothing reads.
func WriteFile(path string, data []byte, perm os.FileMode) (err error) {
	dir := filepath.Dir(path)
	// CreateTemp makes the file 0600: a secret is never readable by others, not even before the chmod.
	tmp, err := os.CreateTemp(dir, "."+filepath.Base(path)+".*.tmp")
	if err != nil {
		return fmt.Errorf("writing %s: making a temporary file: %w", path, err)
	}
	defer func() {
		if err != nil {
			tmp.Close()
			os.Remove(tmp.Name())
		}
	}()
	if _, err = tmp.Write(data); err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	if err = tmp.Chmod(perm); err != nil {
		return fmt.Errorf("writing %s: setting its mode: %w", path, err)
	}
	if err = tmp.Sync(); err != nil {
		return fmt.Errorf("writing %s: syncing: %w", path, err)
	}
	if err = tmp.Close(); err != nil {
		return fmt.Errorf("writing %s: closing: %w", path, err)
	}
	if err = os.Rename(tmp.Name(), path); err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	return syncDir(dir)
}

// syncDir makes the names in a folder durable: without it a power cut can undo a rename.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("syncing folder %s: %w", dir, err)
	}
	defer d.Close()
	if err := d.Sync(); err != nil {
		return fmt.Errorf("syncing folder %s: %w", dir, err)
	}
	return nil
}

// PrivateDir makes the folder at path with mode 0700, or checks the one that is there: it must be a real
// folder (no symlink), belong to this process's user or root, and give nothing to group or others. The
// folder above it must exist.
func PrivateDir(path string) error {
	err := os.Mkdir(path, 0o700)
	switch {
	case err == nil:
		return syncDir(filepath.Dir(path))
	case !errors.Is(err, fs.ErrExist):
		return fmt.Errorf("making private folder: %w", err)
	}
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return fmt.Errorf("checking private folder %s: %w", path, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return fmt.Errorf("checking private folder %s: it is not a folder; move it away: %w", path, fs.ErrInvalid)
	}
	return checkPrivate(path, &st, "chmod 0700")
}

// OnMemory reports whether a folder is on a file system that is never written to a disk (but for swap).
func OnMemory(path string) (bool, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return false, fmt.Errorf("asking for the file system of %s: %w", path, err)
	}
	return st.Type == unix.TMPFS_MAGIC || st.Type == unix.RAMFS_MAGIC, nil
}

// checkPrivate refuses what others could read or change.
func checkPrivate(path string, st *unix.Stat_t, fix string) error {
	if uid := os.Geteuid(); st.Uid != 0 && int64(st.Uid) != int64(uid) {
		return fmt.Errorf("checking %s: it belongs to uid %d, not to this process's uid %d; run: chown %d %s: %w",
			path, st.Uid, uid, uid, path, ErrLoose)
	}
	if mode := st.Mode & 0o777; mode&0o077 != 0 {
		return fmt.Errorf("checking %s: mode %04o lets other users in; run: %s %s: %w", path, mode, fix, path, ErrLoose)
	}
	return nil
}

// ReadPrivateFile reads a regular file of at most max bytes that only its owner (this process's user or root)
// can read or change. It never blocks on a FIFO or device, and does not follow a symlink in the last element
// of path. The error of an absent file wraps fs.ErrNotExist.
func ReadPrivateFile(path string, max int64) ([]byte, error) {
	// O_NONBLOCK: opening a FIFO returns, and the check of the opened file refuses it.
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("reading private file: %w", &fs.PathError{Op: "open", Path: path, Err: err})
	}
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	// The checks are of the opened file, not of the path: what is checked is what is read.
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, fmt.Errorf("reading private file %s: %w", path, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, fmt.Errorf("reading private file %s: it is not a regular file: %w", path, fs.ErrInvalid)
	}
	if err := checkPrivate(path, &st, "chmod 0600"); err != nil {
		return nil, err
	}
	data, err := io.ReadAll(io.LimitReader(f, max+1))
	if err != nil {
		return nil, fmt.Errorf("reading private file %s: %w", path, err)
	}
	if int64(len(data)) > max {
		clear(data)
		return nil, fmt.Errorf("reading private file %s: it has more than %d bytes: %w", path, max, ErrTooLarge)
	}
	return data, nil
}

// Lock takes the lock file at path, making it with mode 0600 if absent, and holds it until the Closer is
// closed or the process ends, however it ends. When another process holds it, the error wraps ErrLocked.
// The file stays: removing it would let two processes lock two different files of one name.
func Lock(path string) (io.Closer, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("taking lock: %w", err)
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		f.Close()
		return nil, fmt.Errorf("taking lock %s: another process uses folder %s; stop it first: %w", path, filepath.Dir(path), ErrLocked)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("taking lock %s: %w", path, err)
	}
	return f, nil
}
