package backup

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"countersign.io/countersign/identity"
)

// File is a file that comes to its name whole, or not at all.
type File struct {
	*os.File
	path    string
	replace bool
}

// Create makes a file (mode 0600) that Commit gives its name. Until then it is ".NAME.*.tmp" in the same folder, as a
// crash would leave it. Unless replace is set, a file of that name is refused, now and at Commit, with identity.ErrExists.
func Create(path string, replace bool) (*File, error) {
	if _, err := os.Lstat(path); !replace && !errors.Is(err, fs.ErrNotExist) {
		if err != nil {
			return nil, fmt.Errorf("making %s: %w", path, err)
		}
		return nil, exists(path)
	}
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*.tmp") // 0600
	if err != nil {
		return nil, fmt.Errorf("making %s: %w", path, err)
	}
	return &File{File: f, path: path, replace: replace}, nil
}

func exists(path string) error {
	return fmt.Errorf("%w: %s: name another file, or say --force to replace it", identity.ErrExists, path)
}

// Abort removes an unfinished file; after Commit it does nothing.
func (f *File) Abort() {
	if f.File != nil {
		f.Close()
		os.Remove(f.Name())
		f.File = nil
	}
}

// Commit makes the content durable and gives it its name. When it returns nil, a crash leaves the file.
func (f *File) Commit() error {
	defer f.Abort()
	if err := f.Sync(); err != nil {
		return fmt.Errorf("writing %s: syncing: %w", f.path, err)
	}
	if err := f.rename(); err != nil {
		return err
	}
	f.Close() // synced: it has nothing to say
	f.File = nil
	d, err := os.Open(filepath.Dir(f.path))
	if err != nil {
		return fmt.Errorf("syncing the folder of %s: %w", f.path, err)
	}
	defer d.Close()
	if err := d.Sync(); err != nil {
		return fmt.Errorf("syncing the folder of %s: %w", f.path, err)
	}
	return nil
}

func (f *File) rename() error {
	if f.replace {
		return os.Rename(f.Name(), f.path)
	}
	err := unix.Renameat2(unix.AT_FDCWD, f.Name(), unix.AT_FDCWD, f.path, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) { // a file system without it
		if err = os.Link(f.Name(), f.path); err == nil {
			return os.Remove(f.Name())
		}
	}
	if errors.Is(err, fs.ErrExist) {
		return exists(f.path)
	}
	if err != nil {
		return fmt.Errorf("naming %s: %w", f.path, err)
	}
	return nil
}
