// Package files keeps a folder of an identity's files for programs that read files.
//
// A certificate must never be seen with another one's key, so they change together,
// as in a Kubernetes volume: each generation is a folder of its own, ..data is a link to the newest, and svid.pem and the others are
// links through that. The generation before stays until the next. Whoever reads several files opens the folder ..data once, or is told to read again when all are there.
package files

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"countersign.io/countersign/identity"
	"countersign.io/countersign/internal/durable"
)

const (
	dataLink   = "..data"
	generation = "..at-" // and a random end
)

// File is one of a generation. Its name has no slash and does not begin with a dot.
type File struct {
	Name string
	Data []byte
	Mode os.FileMode
	GID  int // of its group; 0: as it comes
}

// Publish makes files the newest generation in dir. A crash leaves the one before, and a folder that the next call removes.
func Publish(dir string, files []File) (err error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("making the folder: %w", err)
	}
	for _, f := range files { // what a person put there is not ours to replace
		if info, err := os.Lstat(filepath.Join(dir, f.Name)); err == nil && info.Mode().Type() != fs.ModeSymlink {
			return fmt.Errorf("%w: %s is there and is no link of ours: move it away, or name another folder", identity.ErrExists, filepath.Join(dir, f.Name))
		}
	}
	at, err := os.MkdirTemp(dir, generation)
	if err != nil {
		return fmt.Errorf("making a folder for the files: %w", err)
	}
	defer func() {
		if err != nil {
			os.RemoveAll(at)
		}
	}()
	if err := os.Chmod(at, 0o755); err != nil { // the key is 0600
		return err
	}
	for _, f := range files {
		if err := durable.WriteFile(filepath.Join(at, f.Name), f.Data, f.Mode); err != nil {
			return err
		}
		if f.GID != 0 { // nobody finds it before the link below
			if err := os.Lchown(filepath.Join(at, f.Name), -1, f.GID); err != nil {
				return fmt.Errorf("giving %s to its group: %w", f.Name, err)
			}
		}
	}
	before, err := os.Readlink(filepath.Join(dir, dataLink))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("reading the link to the newest files: %w", err)
	}
	if err := relink(filepath.Join(dir, dataLink), filepath.Base(at)); err != nil {
		return err
	}
	for _, f := range files {
		if err := relink(filepath.Join(dir, f.Name), filepath.Join(dataLink, f.Name)); err != nil {
			return err
		}
	}
	return removeOld(dir, filepath.Base(at), before) // who is reading the one before may end
}

// relink replaces a link, whole.
func relink(path, target string) error {
	if old, err := os.Readlink(path); err == nil && old == target {
		return nil
	}
	next := path + ".next"
	if err := os.Remove(next); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("linking %s: %w", path, err)
	}
	if err := os.Symlink(target, next); err != nil {
		return fmt.Errorf("linking %s: %w", path, err)
	}
	if err := os.Rename(next, path); err != nil {
		return fmt.Errorf("linking %s: %w", path, err)
	}
	return nil
}

// removeOld takes older generations away, keys and all.
func removeOld(dir string, kept ...string) error {
	names, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("looking for older files: %w", err)
	}
	var errs []error
	for _, n := range names {
		if strings.HasPrefix(n.Name(), generation) && !slices.Contains(kept, n.Name()) && n.IsDir() {
			errs = append(errs, os.RemoveAll(filepath.Join(dir, n.Name())))
		}
	}
	return errors.Join(errs...)
}
