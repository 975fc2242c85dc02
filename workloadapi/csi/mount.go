package csi

import (
	"errors"
	"fmt"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"

	"countersign.io/countersign/identity"
)

// place is where the kubelet wants a volume: KUBELET_DIR/pods/UID/volumes/kubernetes.io~csi/NAME/mount.
type place struct{ podUID, volume string }

// parent is the folder that the kubelet makes, below its own.
func (p place) parent() string {
	return filepath.Join("pods", p.podUID, "volumes", "kubernetes.io~csi", p.volume)
}

// seen is what is found at a place.
type seen int

const (
	nothing seen = iota // no mount, or no folder
	ours                // the folder asked for
	other               // another mount
)

// mounts is what takes root.
type mounts interface {
	// look tells what is mounted at a place.
	look(folder string, p place) (seen, error)
	// bind mounts the folder at the place, read-only, nosuid, nodev and noexec from the first moment. What it makes on the way it takes
	// back when it fails.
	bind(folder string, p place) error
	// unbind takes away every mount at the place, and the folder that bind made. Where there is none, that is no error.
	unbind(p place) error
}

// kernel mounts for real. No path below the kubelet's folder is followed through a symlink: what is found is held by a descriptor, and
// that is what is mounted on.
type kernel struct{ kubeletDir string }

const (
	mountName  = "mount"
	maxStacked = 16 // mounts one upon another at a place
)

// parent opens the folder that the kubelet has made for a volume. The error of an absent one wraps unix.ENOENT.
func (k kernel) parent(p place) (int, error) {
	// The kubelet's own folder may be a link, as an administrator likes it.
	base, err := unix.Open(k.kubeletDir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("opening the kubelet's folder %s: %w", k.kubeletDir, err)
	}
	defer unix.Close(base)
	return openFolder(base, p.parent())
}

// openFolder opens a folder below another, with no symlink on the way.
func openFolder(base int, path string) (int, error) {
	for try := 0; ; try++ {
		fd, err := unix.Openat2(base, path, &unix.OpenHow{
			Flags:   unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC,
			Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS,
		})
		switch {
		case errors.Is(err, unix.EAGAIN) && try < 10: // something was renamed meanwhile
			continue
		case errors.Is(err, unix.ELOOP):
			return -1, fmt.Errorf("%w: there is a symlink on the way to %s, and none belongs there: %w", identity.ErrInvalid, path, err)
		case errors.Is(err, unix.ENOSYS):
			return -1, fmt.Errorf("%w: opening %s: openat2 is missing: this needs Linux 5.12, and a seccomp profile that allows it: %w", identity.ErrUnavailable, path, err)
		case err != nil:
			return -1, fmt.Errorf("opening %s: %w", path, err)
		}
		return fd, nil
	}
}

func (k kernel) look(folder string, p place) (seen, error) {
	parent, err := k.parent(p)
	if errors.Is(err, unix.ENOENT) {
		return nothing, nil
	}
	if err != nil {
		return nothing, err
	}
	defer unix.Close(parent)
	fd, err := openFolder(parent, mountName)
	if errors.Is(err, unix.ENOENT) {
		return nothing, nil
	}
	if err != nil {
		return nothing, err
	}
	defer unix.Close(fd)
	at, root, err := stat(fd, "")
	if err != nil || !root {
		return nothing, err
	}
	of, _, err := stat(unix.AT_FDCWD, folder)
	if errors.Is(err, unix.ENOENT) {
		return other, nil
	}
	if err != nil {
		return nothing, err
	}
	if at != of {
		return other, nil
	}
	return ours, nil
}

// file tells files apart.
type file struct {
	major, minor uint32
	inode        uint64
}

// stat looks at a path, or at an open descriptor, and says whether it is the root of a mount.
func stat(fd int, path string) (file, bool, error) {
	var st unix.Statx_t
	if err := unix.Statx(fd, path, unix.AT_EMPTY_PATH|unix.AT_SYMLINK_NOFOLLOW, unix.STATX_INO, &st); err != nil {
		return file{}, false, fmt.Errorf("looking at the volume: %w", err)
	}
	if st.Attributes_mask&unix.STATX_ATTR_MOUNT_ROOT == 0 {
		return file{}, false, fmt.Errorf("%w: the kernel does not say what is a mount: this needs Linux 5.12", identity.ErrUnavailable)
	}
	return file{st.Dev_major, st.Dev_minor, st.Ino}, st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0, nil
}

func (k kernel) bind(folder string, p place) (err error) {
	parent, err := k.parent(p)
	if err != nil {
		return err
	}
	defer unix.Close(parent)
	err = unix.Mkdirat(parent, mountName, 0o750)
	if err == nil {
		defer func() {
			if err != nil {
				err = errors.Join(err, unix.Unlinkat(parent, mountName, unix.AT_REMOVEDIR))
			}
		}()
	} else if !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("making the target folder: %w", err)
	}
	target, err := openFolder(parent, mountName)
	if err != nil {
		return err
	}
	defer unix.Close(target)
	source, err := unix.OpenTree(unix.AT_FDCWD, folder, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_SYMLINK_NOFOLLOW)
	if err != nil {
		return mountError("taking the volume's folder", err)
	}
	defer unix.Close(source)
	// Before anybody can reach it.
	err = unix.MountSetattr(source, "", unix.AT_EMPTY_PATH, &unix.MountAttr{
		Attr_set:    unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC,
		Propagation: unix.MS_PRIVATE,
	})
	if err != nil {
		return mountError("making the volume read-only", err)
	}
	if err := unix.MoveMount(source, "", target, "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH); err != nil {
		return mountError("mounting the volume", err)
	}
	return nil
}

func mountError(what string, err error) error {
	switch {
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("%w: %s: the agent needs CAP_SYS_ADMIN (a privileged container), and the kubelet's folder with mountPropagation Bidirectional: %w", identity.ErrUnavailable, what, err)
	case errors.Is(err, unix.ENOSYS):
		return fmt.Errorf("%w: %s: this needs Linux 5.12, and a seccomp profile that allows it: %w", identity.ErrUnavailable, what, err)
	}
	return fmt.Errorf("%s: %w", what, err)
}

func (k kernel) unbind(p place) error {
	parent, err := k.parent(p)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(parent)
	for range maxStacked {
		more, err := unmountOne(parent)
		if err != nil {
			return err
		}
		if !more {
			if err := unix.Unlinkat(parent, mountName, unix.AT_REMOVEDIR); err != nil && !errors.Is(err, unix.ENOENT) {
				return fmt.Errorf("removing the target folder: %w", err)
			}
			return nil
		}
	}
	return fmt.Errorf("%w: more than %d mounts at the target: somebody keeps mounting there", identity.ErrUnavailable, maxStacked)
}

// unmountOne takes the topmost mount away; more is false when there was none.
func unmountOne(parent int) (more bool, err error) {
	fd, err := openFolder(parent, mountName)
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer unix.Close(fd)
	_, root, err := stat(fd, "")
	if err != nil || !root {
		return false, err
	}
	// Detached, because fd holds it and a container that is slow to end may: nobody new reaches it.
	if err := unix.Unmount("/proc/self/fd/"+strconv.Itoa(fd), unix.MNT_DETACH); err != nil {
		return false, mountError("unmounting the volume", err)
	}
	return true, nil
}
