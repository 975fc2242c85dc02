package attestor

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"countersign.io/countersign/identity"
)

// sight is what an inspection found; empty strings are what it did not find.
type sight struct {
	token       []byte
	user, group string
	sha256      string
	onHost      bool // the agent's host has the caller's executable at the same path
	err         error
}

// inspect does what may wait: it touches file systems that the caller has a say in, and user databases. It
// does so on a goroutine of its own, which the kernel may hold beyond ctx; see gate. A token that comes too
// late is zeroed.
func (a *Attestor) inspect(ctx context.Context, p *Peer, place Place, path string) (sight, error) {
	ctx, cancel := context.WithTimeout(ctx, a.cfg.Timeout)
	defer cancel()
	// The user too: another's process that gives its cgroup the pod's name must not be in the pod's way.
	name := fmt.Sprintf("pod %s uid %d", place.PodUID, p.uid)
	if place.PodUID == "" {
		name = fmt.Sprintf("uid %d on %d:%d", p.uid, p.exe.major, p.exe.minor)
	}
	busy := func() (sight, error) {
		return sight{}, fmt.Errorf("%w: looking into the caller's file system takes too long (%s): %w", identity.ErrUnavailable, name, context.Cause(ctx))
	}
	if a.gate.enter(ctx, name) != nil {
		return busy()
	}
	root, exe, err := handles(p, place)
	if err != nil {
		a.gate.leave(name)
		return sight{}, err
	}
	result := make(chan sight) // unbuffered: either it is taken, or the goroutine still owns the token
	go func() {
		defer a.gate.leave(name)
		defer closeFD(root)
		defer closeFD(exe)
		s := a.look(p, place, path, root, exe)
		select {
		case result <- s:
		case <-ctx.Done():
			clear(s.token)
		}
	}()
	select {
	case s := <-result:
		return s, s.err
	case <-ctx.Done():
		return busy()
	}
}

// handles opens the caller's root, for a pod, and its executable, without touching a file system. The
// executable must be the one that was pinned.
func handles(p *Peer, place Place) (root, exe int, err error) {
	root = -1
	if exe, err = p.handle("exe", 0); err != nil {
		return -1, -1, err
	}
	id, err := statID(exe, "", unix.AT_EMPTY_PATH)
	if err == nil && id != p.exe {
		err = ErrPeerChanged
	}
	if err == nil && place.PodUID != "" {
		root, err = p.handle("root", unix.O_DIRECTORY)
	}
	if err != nil {
		closeFD(exe)
		return -1, -1, fmt.Errorf("opening the executable and root of process %d: %w", p.pid, err)
	}
	return root, exe, nil
}

func (a *Attestor) look(p *Peer, place Place, path string, root, exe int) (s sight) {
	if place.PodUID != "" {
		tokenPath := a.cfg.TokenPath
		if place.TokenPath != "" {
			tokenPath = place.TokenPath
		}
		token, err := readToken(root, tokenPath)
		if err != nil {
			return sight{err: err}
		}
		s.token = trimSpace(token)
	} else {
		s.user, s.group = a.names.user(p.uid), a.names.group(p.gid)
		s.onHost = onHost(path, p.exe)
	}
	if a.cfg.SHA256 {
		sum, err := a.hasher.sum(exe)
		if err != nil && !errors.Is(err, errUnhashed) {
			a.cfg.Log.Warn("hashing an executable failed: its process gets no unix:sha256 selector", "pid", p.pid, "error", err)
		}
		s.sha256 = sum
	}
	return s
}

// onHost reports whether the host has this very file at path. The host's root is that of process 1; an agent
// without the privilege to look there takes its own.
func onHost(path string, id fileID) bool {
	root, err := unix.Open("/proc/1/root", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		if root, err = unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err != nil {
			return false
		}
	}
	defer unix.Close(root)
	fd, err := unix.Openat2(root, path, &unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_SYMLINKS,
	})
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	there, err := statID(fd, "", unix.AT_EMPTY_PATH)
	return err == nil && there == id
}

// trimSpace cuts white space at the end in place, such as the newline that an editor leaves.
func trimSpace(token []byte) []byte {
	for len(token) > 0 {
		switch token[len(token)-1] {
		case '\n', '\r', ' ', '\t':
			token = token[:len(token)-1]
		default:
			return token
		}
	}
	return token
}

func closeFD(fd int) {
	if fd >= 0 {
		unix.Close(fd)
	}
}
