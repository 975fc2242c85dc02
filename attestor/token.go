package attestor

import (
	"errors"
	"fmt"
	"strconv"

	"golang.org/x/sys/unix"

	"countersign.io/countersign/identity"
)

// readToken reads the pod's token at path, resolved inside the folder that root stands for as if that were
// the root of the file system: the kubelet's symlinks (token -> ..data/token -> ..TIMESTAMP/token) work, and
// no link, absolute or with .., leads out of it (openat2 with RESOLVE_IN_ROOT, Linux 5.6). The pod rules what
// is there: nothing but a regular file of a token's size is opened for reading, since opening a device or a
// FIFO can have effects or wait for ever.
//
// The bytes belong to the caller, who zeroes them. Errors wrap identity.ErrDenied where there is no token,
// identity.ErrUnauthenticated where something else is in its place, and identity.ErrUnavailable where
// trying again is right.
func readToken(root int, path string) ([]byte, error) {
	fd, err := unix.Openat2(root, path, &unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	})
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR):
		return nil, fmt.Errorf("%w: the pod has no token at %s: give it a projected serviceAccountToken volume with the cluster's audience there", identity.ErrDenied, path)
	case errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EPERM):
		return nil, fmt.Errorf("%w: opening %s in the caller's root: %v: openat2 is missing (needs Linux 5.6, and a seccomp profile that allows it)", identity.ErrUnavailable, path, err)
	case errors.Is(err, unix.EAGAIN): // a rename or mount happened meanwhile
		return nil, fmt.Errorf("%w: opening %s in the caller's root: it changed meanwhile: try again", identity.ErrUnavailable, path)
	case err != nil:
		return nil, fmt.Errorf("%w: opening %s in the caller's root: %v", identity.ErrUnauthenticated, path, err)
	}
	defer unix.Close(fd)
	token, err := readRegular(fd, identity.MaxTokenBytes)
	if err != nil {
		return nil, fmt.Errorf("reading the token at %s in the caller's root: %w", path, err)
	}
	return token, nil
}

// readRegular reads the whole file that an O_PATH descriptor stands for, of 1 to limit bytes, and refuses
// one that changes meanwhile. A file that is replaced by renaming, as the kubelet does, is read as it was;
// of one that is being written in place a part may be read, and then its signature does not verify.
func readRegular(handle, limit int) ([]byte, error) {
	var before, after unix.Stat_t
	if err := unix.Fstat(handle, &before); err != nil {
		return nil, fmt.Errorf("%w: %v", identity.ErrUnavailable, err)
	}
	switch {
	case before.Mode&unix.S_IFMT != unix.S_IFREG:
		return nil, fmt.Errorf("%w: it is a %s, not a regular file", identity.ErrUnauthenticated, fileType(before.Mode))
	case before.Size == 0:
		return nil, fmt.Errorf("%w: it is empty", identity.ErrUnauthenticated)
	case before.Size > int64(limit):
		return nil, fmt.Errorf("%w: it has %d bytes: at the most %d", identity.ErrUnauthenticated, before.Size, limit)
	}
	fd, err := reopen(handle)
	if err != nil {
		return nil, fmt.Errorf("%w: %v", identity.ErrUnauthenticated, err)
	}
	defer unix.Close(fd)
	buf, n := make([]byte, before.Size+1), 0 // one more, to notice growth
	for n < len(buf) {
		m, err := unix.Read(fd, buf[n:])
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			clear(buf)
			return nil, fmt.Errorf("%w: %v", identity.ErrUnavailable, err)
		}
		if m == 0 {
			break
		}
		n += m
	}
	// Not the change time, which is set as well when the kubelet puts another file in this one's place.
	if err := unix.Fstat(fd, &after); err != nil || int64(n) != before.Size || after.Size != before.Size || after.Mtim != before.Mtim {
		clear(buf)
		return nil, fmt.Errorf("%w: it changed while it was read: try again", identity.ErrUnavailable)
	}
	return buf[:n], nil
}

// reopen opens for reading what an O_PATH descriptor stands for; no path is walked again.
func reopen(handle int) (int, error) {
	return unix.Open("/proc/self/fd/"+strconv.Itoa(handle), unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
}

func fileType(mode uint32) string {
	switch mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return "directory"
	case unix.S_IFIFO:
		return "FIFO"
	case unix.S_IFSOCK:
		return "socket"
	case unix.S_IFCHR, unix.S_IFBLK:
		return "device"
	}
	return "special file"
}

// tokenPodUID gives the UID of the pod that a service account token says it is bound to, see ReadClaims.
func tokenPodUID(token []byte) (string, error) {
	c, err := ReadClaims(token)
	if err != nil {
		return "", fmt.Errorf("the file at the token's path: %w", err)
	}
	return c.PodUID, nil
}
