// Command pod starts a program as the kubelet and a container runtime start a container: in control groups of the pod's,
// with a root of its own, as an ordinary user. It also plays callers that misbehave. For tests, as root.
//
//	pod -cgroup DIR ... -root DIR -mount FROM:TO ... [-proc] -- PROGRAM ARGS
//	pod connect SOCKET stay|exec|exit     (see caller.go)
//	pod follow [SOCKET]                   (see follow.go)
//	pod alone SOCKET                      follows an SVID of its own making (see alone.go)
//	pod files FOLDER                      says what the SVID in svid.pem, key.pem and bundle.pem is, and of which mode the key is
//	pod plant FOLDER                      tries to change a folder that is not its to change, and says what it could
//	pod dial SOCKET                       tries to connect to a socket that is not its to use, and says whether it could
//	pod kernel                            says which kernel it sees
//	pod resolve NAME ...                  prints the addresses of each name in a line
//	pod pause                             waits to be ended, as the container does that keeps a pod's namespaces
package main

import (
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// user is whom containers run as: not root, as most policies want it.
const user = 65532

func main() {
	var err error
	switch arg(1) {
	case "pause":
		end := make(chan os.Signal, 1)
		signal.Notify(end, syscall.SIGTERM, syscall.SIGINT)
		<-end
	case "follow":
		err = follow(arg(2))
	case "alone":
		err = alone(arg(2))
	case "files":
		err = files(arg(2))
	case "plant":
		plant(arg(2))
	case "dial":
		dial(arg(2))
	case "kernel":
		var u unix.Utsname
		err = unix.Uname(&u)
		fmt.Println(unix.ByteSliceToString(u.Release[:]), unix.ByteSliceToString(u.Version[:]))
	case "resolve":
		err = resolve(os.Args[2:])
	case "connect":
		err = connect(arg(2), arg(3))
	case "call":
		err = call(arg(2))
	default:
		err = enter(os.Args[1:])
	}
	if err != nil {
		fmt.Println("pod:", err)
		os.Exit(1)
	}
}

func arg(i int) string {
	if i < len(os.Args) {
		return os.Args[i]
	}
	return ""
}

// list is a flag that may be given many times.
type list []string

func (l *list) String() string     { return strings.Join(*l, " ") }
func (l *list) Set(s string) error { *l = append(*l, s); return nil }

func resolve(names []string) error {
	for _, name := range names {
		addrs, err := net.LookupHost(name)
		if err != nil {
			return err
		}
		slices.Sort(addrs)
		fmt.Println(strings.Join(addrs, " "))
	}
	return nil
}

func enter(args []string) error {
	var cgroups, mounts list
	f := flag.NewFlagSet("pod", flag.ExitOnError)
	f.Var(&cgroups, "cgroup", "a control group's folder")
	f.Var(&mounts, "mount", "FROM:TO, a file or folder of the host's bound into the root")
	root := f.String("root", "", "an empty folder: where to build the root; what is built is seen by the program alone")
	proc := f.Bool("proc", false, "mount the host's processes, as hostPID does")
	_ = f.Parse(args)
	if f.NArg() == 0 || *root == "" {
		return errors.New("want -root DIR and a program")
	}
	for _, c := range cgroups {
		if err := os.WriteFile(filepath.Join(c, "cgroup.procs"), []byte(strconv.Itoa(os.Getpid())), 0); err != nil {
			return fmt.Errorf("entering the control group: %w", err)
		}
	}
	// Namespaces and the root belong to a thread; the program that this one executes takes over this one's.
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS); err != nil {
		return fmt.Errorf("making namespaces: %w", err)
	}
	if err := build(*root, mounts, *proc); err != nil {
		return err
	}
	if err := errors.Join(syscall.Setgroups(nil), syscall.Setresgid(user, user, user), syscall.Setresuid(user, user, user)); err != nil {
		return fmt.Errorf("becoming user %d: %w", user, err)
	}
	// A change of user lifts it, and nobody shall be left behind.
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0); err != nil {
		return fmt.Errorf("tying the program's life to its parent's: %w", err)
	}
	if err := unix.Exec(f.Arg(0), f.Args(), os.Environ()); err != nil {
		return fmt.Errorf("executing %s: %w", f.Arg(0), err)
	}
	return nil
}

// build makes root the root: a tmpfs with nothing in it but the mounts, and nothing of the host's behind it.
func build(root string, mounts []string, proc bool) error {
	if err := errors.Join(
		unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""),
		unix.Mount("tmpfs", root, "tmpfs", unix.MS_NOSUID, "mode=755,size=16m"),
		os.MkdirAll(filepath.Join(root, "tmp"), 0o755),
		os.Chmod(filepath.Join(root, "tmp"), 0o777),
	); err != nil {
		return fmt.Errorf("making the root: %w", err)
	}
	for _, m := range mounts {
		from, to, _ := strings.Cut(m, ":")
		if err := bind(from, filepath.Join(root, to)); err != nil {
			return fmt.Errorf("mounting %s: %w", m, err)
		}
	}
	if proc {
		to := filepath.Join(root, "proc")
		if err := errors.Join(os.MkdirAll(to, 0o755), unix.Mount("proc", to, "proc", 0, "")); err != nil {
			return fmt.Errorf("mounting /proc: %w", err)
		}
	}
	if err := errors.Join(os.Chdir(root), unix.PivotRoot(".", "."), unix.Unmount(".", unix.MNT_DETACH), os.Chdir("/")); err != nil {
		return fmt.Errorf("entering the root: %w", err)
	}
	return nil
}

func bind(from, to string) error {
	info, err := os.Stat(from)
	if err != nil {
		return err
	}
	if info.IsDir() {
		err = os.MkdirAll(to, 0o755)
	} else if err = os.MkdirAll(filepath.Dir(to), 0o755); err == nil {
		err = os.WriteFile(to, nil, 0o644)
	}
	if err != nil {
		return err
	}
	return unix.Mount(from, to, "", unix.MS_BIND|unix.MS_REC, "")
}
