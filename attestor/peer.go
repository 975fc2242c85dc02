package attestor

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"

	"countersign.io/countersign/identity"
)

// ErrPeerChanged says that the process at the other end of the connection has exited, or has executed
// another program, since it connected. No later call on that connection can succeed: close it. A caller
// that is still there connects again.
var ErrPeerChanged = fmt.Errorf("%w: the caller is no longer the process that connected: connect again", identity.ErrDenied)

// maxProcFile bounds what is read of one file below /proc/PID.
const maxProcFile = 64 << 10

// Peer is the process that connected, held so that its PID cannot come to mean another one. It keeps two
// file descriptors open until Close. All methods may be called concurrently, also with Close.
//
// A Peer says who connected. A process may hand its connection on to others that it trusts; they then speak
// with its identity, as if they had asked it to speak for them.
type Peer struct {
	pid      int
	uid, gid uint32
	exe      fileID

	mu    sync.RWMutex // shared while a descriptor is in use, exclusive in Close
	pidfd int          // -1 once closed
	// dir is /proc/PID, opened while pidfd proved that the PID was still the caller's. The kernel ties it to
	// that process: once it is gone, reads through dir fail and never reach a later owner of the PID.
	dir int
}

// fileID tells files apart. An inode number is not reused while a process runs from it, so a process whose
// executable has another fileID than before has executed something else.
type fileID struct {
	major, minor uint32
	inode        uint64
}

// PeerFromConn pins the process that connected: with SO_PEERPIDFD, which no reuse of the PID can fool, or
// on a kernel before 6.5 with pidfd_open, where only a PID reused between connect and this call by a process
// of the same user could pass for the caller. It never waits on a file system that the caller controls.
//
// Errors wrap ErrPeerChanged when the caller has exited already, else identity.ErrUnavailable.
func PeerFromConn(conn *net.UnixConn) (*Peer, error) {
	return pin(conn, peerPIDFD)
}

// peerPIDFD asks the socket for a pidfd of its peer.
func peerPIDFD(fd int) (int, error) {
	return unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PEERPIDFD)
}

func pin(conn *net.UnixConn, pidfdOf func(fd int) (int, error)) (*Peer, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("%w: reading the caller's socket: %v", identity.ErrUnavailable, err)
	}
	var cred *unix.Ucred
	pidfd, pidfdErr := -1, error(nil)
	ctlErr := raw.Control(func(fd uintptr) {
		if cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			pidfd, pidfdErr = pidfdOf(int(fd))
		}
	})
	if err = errors.Join(ctlErr, err); err != nil {
		return nil, fmt.Errorf("%w: reading the caller's credentials: %v", identity.ErrUnavailable, err)
	}
	p := &Peer{pid: int(cred.Pid), uid: cred.Uid, gid: cred.Gid, pidfd: -1, dir: -1}
	switch {
	case pidfdErr == nil:
		unix.CloseOnExec(pidfd)
		p.pidfd = pidfd
	case errors.Is(pidfdErr, unix.ENOPROTOOPT): // before 6.5
	default: // ESRCH or EINVAL: there is no such process any more
		return nil, fmt.Errorf("pinning process %d: %v: %w", p.pid, pidfdErr, ErrPeerChanged)
	}
	if err := p.open(); err != nil {
		p.Close()
		return nil, err
	}
	return p, nil
}

// open takes hold of /proc/PID and notes what must not change.
func (p *Peer) open() error {
	if p.pid <= 0 {
		return fmt.Errorf("%w: the caller's PID is not visible here: run the agent in the host's PID namespace (hostPID: true)", identity.ErrUnavailable)
	}
	// A /proc of another PID namespace would show another process under this PID.
	if self, err := os.Readlink("/proc/self"); err != nil || self != strconv.Itoa(os.Getpid()) {
		return fmt.Errorf("%w: /proc is not of the agent's own PID namespace (/proc/self is %q): mount a fresh one", identity.ErrUnavailable, self)
	}
	dir, err := unix.Open("/proc/"+strconv.Itoa(p.pid), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return p.procError("opening its /proc folder", err)
	}
	p.dir = dir
	if p.pidfd < 0 {
		if err := p.openPIDFD(); err != nil {
			return err
		}
	}
	if err := p.alive(); err != nil { // from here on dir is surely the caller's
		return err
	}
	if p.exe, err = p.exeID(); err != nil {
		return err
	}
	return nil
}

// openPIDFD is for kernels without SO_PEERPIDFD. The PID may have been reused since connect: a process of
// another user is refused here, and dir and pidfd are shown to be the same process.
func (p *Peer) openPIDFD() error {
	before, err := p.startTime()
	if err != nil {
		return err
	}
	if p.pidfd, err = unix.PidfdOpen(p.pid, 0); err != nil {
		return p.procError("opening a pidfd (needs Linux 5.3)", err)
	}
	after, err := p.startTime() // fails when the process behind dir has ended
	if err != nil {
		return err
	}
	status, err := p.readFile("status")
	if err != nil {
		return err
	}
	if uid, err := parseStatusUID(status); err != nil || uid != p.uid || before != after {
		return fmt.Errorf("process %d is not the one that connected: %w", p.pid, ErrPeerChanged)
	}
	return nil
}

// PID is the caller's process ID, for logs: to act on it, use the other methods.
func (p *Peer) PID() int { return p.pid }

// UID is the effective user ID that the caller had when it connected, in the agent's user namespace.
func (p *Peer) UID() uint32 { return p.uid }

// GID is the effective group ID that the caller had when it connected, in the agent's user namespace.
func (p *Peer) GID() uint32 { return p.gid }

// Alive reports an error wrapping ErrPeerChanged once the caller has exited, reaped or not. It costs one
// system call.
func (p *Peer) Alive() error {
	p.mu.RLock()
	defer p.mu.RUnlock()
	return p.alive()
}

// Unchanged is Alive, and further that the caller still runs the executable it ran when it was pinned: the
// cheap check to make before each use of what was attested. It costs two system calls, about 3 microseconds,
// opens no file that the caller controls, and never blocks. Executing the very same file again is no change.
// The start time is not compared: no other process can come behind the descriptors, and reading it would
// cost more with each thread that the caller makes.
func (p *Peer) Unchanged() error {
	p.mu.RLock()
	defer p.mu.RUnlock()
	if err := p.alive(); err != nil {
		return err
	}
	exe, err := p.exeID()
	if err != nil {
		return err
	}
	if exe != p.exe {
		return fmt.Errorf("process %d has executed another program: %w", p.pid, ErrPeerChanged)
	}
	return nil
}

// Close lets the process go. Later calls fail with ErrPeerChanged.
func (p *Peer) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	var errs []error
	for _, fd := range []*int{&p.dir, &p.pidfd} {
		if *fd >= 0 {
			errs = append(errs, unix.Close(*fd))
			*fd = -1
		}
	}
	return errors.Join(errs...)
}

// alive polls the pidfd: it becomes readable when the last thread exits. A signal 0 would still reach a
// process that nobody has reaped.
func (p *Peer) alive() error {
	if p.pidfd < 0 {
		return fmt.Errorf("using a closed peer: %w", ErrPeerChanged)
	}
	fds := []unix.PollFd{{Fd: int32(p.pidfd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, 0)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return fmt.Errorf("%w: polling the pidfd of process %d: %v", identity.ErrUnavailable, p.pid, err)
		case n != 0:
			return fmt.Errorf("process %d has exited: %w", p.pid, ErrPeerChanged)
		}
		return nil
	}
}

func (p *Peer) startTime() (uint64, error) {
	stat, err := p.readFile("stat")
	if err != nil {
		return 0, err
	}
	start, err := parseStartTime(stat)
	if err != nil {
		return 0, fmt.Errorf("%w: process %d: %v", identity.ErrUnavailable, p.pid, err)
	}
	return start, nil
}

func (p *Peer) exeID() (fileID, error) {
	id, err := statID(p.dir, "exe", 0)
	if err != nil {
		return fileID{}, p.procError("looking at its executable", err)
	}
	return id, nil
}

// statID never asks a file server (AT_STATX_DONT_SYNC): on a FUSE or network file system the caller could
// make that last for ever.
func statID(dir int, name string, flags int) (fileID, error) {
	var st unix.Statx_t
	if err := unix.Statx(dir, name, flags|unix.AT_STATX_DONT_SYNC, unix.STATX_INO, &st); err != nil {
		return fileID{}, err
	}
	return fileID{st.Dev_major, st.Dev_minor, st.Ino}, nil
}

// handle opens a file of the process's /proc folder without opening what it stands for (O_PATH), to be
// closed by the caller.
func (p *Peer) handle(name string, flags int) (int, error) {
	p.mu.RLock()
	defer p.mu.RUnlock()
	if p.dir < 0 {
		return -1, fmt.Errorf("using a closed peer: %w", ErrPeerChanged)
	}
	fd, err := unix.Openat(p.dir, name, unix.O_PATH|unix.O_CLOEXEC|flags, 0)
	if err != nil {
		return -1, p.procError("opening its "+name, err)
	}
	return fd, nil
}

// exePath is the path of the executable as the process's own mount namespace names it.
func (p *Peer) exePath() (string, error) {
	p.mu.RLock()
	defer p.mu.RUnlock()
	if p.dir < 0 {
		return "", fmt.Errorf("using a closed peer: %w", ErrPeerChanged)
	}
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(p.dir, "exe", buf)
	if err != nil {
		return "", p.procError("reading the path of its executable", err)
	}
	return string(buf[:n]), nil
}

// cgroups is the content of the process's cgroup file.
func (p *Peer) cgroups() ([]byte, error) {
	p.mu.RLock()
	defer p.mu.RUnlock()
	return p.readFile("cgroup")
}

// exiting is about the first thread alone, by a file whose cost does not grow with the threads that the caller makes.
func (p *Peer) exiting() (bool, error) {
	p.mu.RLock()
	defer p.mu.RUnlock()
	stat, err := p.readFile("task/" + strconv.Itoa(p.pid) + "/stat")
	if err != nil {
		return false, err
	}
	gone, err := exiting(stat)
	if err != nil {
		return false, fmt.Errorf("%w: process %d: %v", identity.ErrUnavailable, p.pid, err)
	}
	return gone, nil
}

// readFile reads one of the small files that the kernel makes up. The caller holds mu.
func (p *Peer) readFile(name string) ([]byte, error) {
	if p.dir < 0 {
		return nil, fmt.Errorf("using a closed peer: %w", ErrPeerChanged)
	}
	fd, err := unix.Openat(p.dir, name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, p.procError("opening its "+name, err)
	}
	defer unix.Close(fd)
	buf := make([]byte, 0, 1<<10)
	for {
		if len(buf) == cap(buf) {
			if len(buf) >= maxProcFile {
				return nil, fmt.Errorf("%w: process %d: its %s is larger than %d bytes", identity.ErrUnauthenticated, p.pid, name, maxProcFile)
			}
			buf = append(make([]byte, 0, 4*cap(buf)), buf...)
		}
		n, err := unix.Read(fd, buf[len(buf):cap(buf)])
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return nil, p.procError("reading its "+name, err)
		case n == 0:
			return buf, nil
		default:
			buf = buf[:len(buf)+n]
		}
	}
}

// procError says why /proc refused: the process has ended, or the agent may not look.
func (p *Peer) procError(doing string, err error) error {
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ESRCH):
		return fmt.Errorf("process %d: %s: %v: %w", p.pid, doing, err, ErrPeerChanged)
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return fmt.Errorf("%w: process %d of user %d: %s: %v: the agent must run as root, or as that user for a process that can be traced",
			identity.ErrUnavailable, p.pid, p.uid, doing, err)
	}
	return fmt.Errorf("%w: process %d: %s: %v", identity.ErrUnavailable, p.pid, doing, err)
}
