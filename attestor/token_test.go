package attestor

import (
	"bytes"
	"encoding/base64"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"countersign.io/countersign/identity"
)

const tokenAt = "/run/token"

// openRoot stands for a caller's root.
func openRoot(t *testing.T, dir string) int {
	t.Helper()
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if _, err := unix.Openat2(fd, ".", &unix.OpenHow{Flags: unix.O_PATH, Resolve: unix.RESOLVE_IN_ROOT}); errors.Is(err, unix.ENOSYS) {
		t.Skip("needs Linux 5.6")
	}
	return fd
}

func TestReadToken(t *testing.T) {
	good := podToken(t, podA)
	for _, c := range []struct {
		name string
		make func(t *testing.T, root string)
		want []byte
		err  error
		says string
	}{
		{"file", func(t *testing.T, root string) { writeFile(t, root+tokenAt, good) }, good, nil, ""},
		{"as the kubelet projects it", func(t *testing.T, root string) {
			writeFile(t, root+"/run/..2026_07_01_10_00_00.123/token", good)
			symlink(t, "..2026_07_01_10_00_00.123", root+"/run/..data")
			symlink(t, "..data/token", root+tokenAt)
		}, good, nil, ""},
		{"absolute symlink inside the root", func(t *testing.T, root string) {
			writeFile(t, root+"/else/where", good)
			symlink(t, "/else/where", root+tokenAt)
		}, good, nil, ""},
		{"/var/run is a symlink", func(t *testing.T, root string) {
			writeFile(t, root+"/really/token", good)
			symlink(t, "/really", root+"/run")
		}, good, nil, ""},
		{"at the limit", func(t *testing.T, root string) {
			writeFile(t, root+tokenAt, bytes.Repeat([]byte("a"), identity.MaxTokenBytes))
		}, bytes.Repeat([]byte("a"), identity.MaxTokenBytes), nil, ""},

		{"no file", func(t *testing.T, root string) {}, nil, identity.ErrDenied, "no token"},
		{"no folder", func(t *testing.T, root string) { writeFile(t, root+"/run", nil) }, nil, identity.ErrDenied, "no token"},
		{"dangling symlink", func(t *testing.T, root string) { symlink(t, "gone", root+tokenAt) }, nil, identity.ErrDenied, "no token"},
		{"empty", func(t *testing.T, root string) { writeFile(t, root+tokenAt, nil) }, nil, identity.ErrUnauthenticated, "empty"},
		{"over the limit", func(t *testing.T, root string) {
			writeFile(t, root+tokenAt, bytes.Repeat([]byte("a"), identity.MaxTokenBytes+1))
		}, nil, identity.ErrUnauthenticated, "at the most"},
		{"1 TiB with holes", func(t *testing.T, root string) {
			writeFile(t, root+tokenAt, nil)
			if err := os.Truncate(root+tokenAt, 1<<40); err != nil {
				t.Skip(err)
			}
		}, nil, identity.ErrUnauthenticated, "at the most"},
		{"directory", func(t *testing.T, root string) {
			if err := os.MkdirAll(root+tokenAt, 0o755); err != nil {
				t.Fatal(err)
			}
		}, nil, identity.ErrUnauthenticated, "directory"},
		{"FIFO without a writer", func(t *testing.T, root string) { makeNode(t, root+tokenAt, unix.S_IFIFO, 0) }, nil, identity.ErrUnauthenticated, "FIFO"},
		{"symlink to a FIFO", func(t *testing.T, root string) {
			makeNode(t, root+"/run/fifo", unix.S_IFIFO, 0)
			symlink(t, "fifo", root+tokenAt)
		}, nil, identity.ErrUnauthenticated, "FIFO"},
		{"device", func(t *testing.T, root string) { makeNode(t, root+tokenAt, unix.S_IFCHR, unix.Mkdev(1, 5)) }, nil, identity.ErrUnauthenticated, "device"},
		{"socket", func(t *testing.T, root string) {
			if err := os.Mkdir(root+"/run", 0o755); err != nil {
				t.Fatal(err)
			}
			l, err := net.ListenUnix("unix", &net.UnixAddr{Name: root + tokenAt})
			if err != nil {
				t.Skip(err)
			}
			t.Cleanup(func() { l.Close() })
		}, nil, identity.ErrUnauthenticated, "socket"},
		{"symlink to itself", func(t *testing.T, root string) { symlink(t, "token", root+tokenAt) }, nil, identity.ErrUnauthenticated, "symbolic links"},
	} {
		t.Run(c.name, func(t *testing.T) {
			root := shortDir(t)
			c.make(t, root)
			got, err := readToken(openRoot(t, root), tokenAt)
			if !bytes.Equal(got, c.want) || !errors.Is(err, c.err) || err != nil && !strings.Contains(err.Error(), c.says) {
				t.Errorf("got %d bytes, %v; want %d bytes, %v with %q", len(got), err, len(c.want), c.err, c.says)
			}
		})
	}
}

// What stands outside of the caller's root, under a name that leads there from the host.
func TestReadTokenStaysInside(t *testing.T) {
	inside, outside := podToken(t, podA), podToken(t, podB)
	host := shortDir(t)
	writeFile(t, host+"/secret", outside)
	for name, target := range map[string]string{
		"absolute symlink": host + "/secret",
		"dot-dot symlink":  strings.Repeat("../", 40) + strings.TrimPrefix(host, "/") + "/secret",
		"beside the root":  "../../secret",
	} {
		for _, present := range []bool{false, true} {
			root := filepath.Join(host, "root")
			t.Run(name, func(t *testing.T) {
				defer os.RemoveAll(root)
				symlink(t, target, root+tokenAt)
				if present { // the same name exists inside: that one is meant
					writeFile(t, root+host+"/secret", inside)
					writeFile(t, root+"/secret", inside)
				}
				got, err := readToken(openRoot(t, root), tokenAt)
				if bytes.Equal(got, outside) {
					t.Fatal("the link led out of the root")
				}
				if present && !bytes.Equal(got, inside) || !present && !errors.Is(err, identity.ErrDenied) {
					t.Errorf("present %v: got %d bytes, %v", present, len(got), err)
				}
			})
		}
	}
}

// Things that every root with a /dev and a /proc has.
func TestReadTokenFromWholeRoot(t *testing.T) {
	root := openRoot(t, "/")
	dir := shortDir(t)
	secret, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer secret.Close()
	for name, c := range map[string]struct{ target, says string }{
		"device":                {"/dev/zero", "device"},
		"kernel's file":         {"/proc/version", "empty"},
		"magic link to a root":  {"/proc/self/root/etc/hostname", "symbolic links"},
		"magic link to an open": {"/proc/self/fd/0", "symbolic links"},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(dir, strings.ReplaceAll(name, " ", "-"))
			symlink(t, c.target, path)
			got, err := readToken(root, path)
			if !errors.Is(err, identity.ErrUnauthenticated) || !strings.Contains(err.Error(), c.says) || got != nil {
				t.Errorf("got %d bytes, %v; want an error with %q", len(got), err, c.says)
			}
		})
	}
}

// The token is swapped all the time. By renaming: one token whole is read. In place: that, or an error,
// or the part of one that was there already, never some of both.
func TestReadTokenSwapped(t *testing.T) {
	short, long := bytes.Repeat([]byte("s"), 1000), bytes.Repeat([]byte("l"), 9000)
	for name, swap := range map[string]func(dir string, data []byte) error{
		"renamed": func(dir string, data []byte) error {
			if err := os.WriteFile(dir+"/run/new", data, 0o600); err != nil {
				return err
			}
			return os.Rename(dir+"/run/new", dir+tokenAt)
		},
		"rewritten": func(dir string, data []byte) error { return os.WriteFile(dir+tokenAt, data, 0o600) },
		"link moved": func(dir string, data []byte) error {
			writeTo := dir + "/run/" + string(data[:1])
			if err := os.WriteFile(writeTo+".new", data, 0o600); err != nil {
				return err
			}
			os.Remove(dir + "/run/link")
			return errors.Join(os.Rename(writeTo+".new", writeTo),
				os.Symlink(filepath.Base(writeTo), dir+"/run/link"), os.Rename(dir+"/run/link", dir+tokenAt))
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := shortDir(t)
			writeFile(t, dir+tokenAt, short)
			var stop atomic.Bool
			done := make(chan error)
			go func() {
				var err error
				for !stop.Load() && err == nil {
					err = errors.Join(swap(dir, long), swap(dir, short))
				}
				done <- err
			}()
			root := openRoot(t, dir)
			for range 3000 {
				got, err := readToken(root, tokenAt)
				switch {
				case bytes.Equal(got, short), bytes.Equal(got, long):
				case err == nil && (name != "rewritten" || bytes.Count(got, got[:1]) != len(got)):
					t.Fatalf("got %d bytes that are neither token", len(got))
				case err == nil:
				case name != "rewritten":
					t.Fatal(err)
				case !errors.Is(err, identity.ErrUnavailable) && !errors.Is(err, identity.ErrUnauthenticated):
					t.Fatal(err)
				}
			}
			stop.Store(true)
			if err := <-done; err != nil {
				t.Fatal(err)
			}
			if got, err := readToken(root, tokenAt); !bytes.Equal(got, short) {
				t.Errorf("when all is over: got %d bytes, %v", len(got), err)
			}
		})
	}
}

func TestTokenPodUID(t *testing.T) {
	b64 := base64.RawURLEncoding.EncodeToString
	jws := func(claims string) string { return "e30." + b64([]byte(claims)) + ".AAAA" }
	if uid, err := tokenPodUID(podToken(t, podA)); err != nil || uid != podA {
		t.Errorf("got %q, %v", uid, err)
	}
	for name, token := range map[string]string{
		"empty":                  "",
		"one part":               "abc",
		"two parts":              "e30.e30",
		"four parts":             jws(`{"kubernetes.io":{"pod":{"uid":"x"}}}`) + ".AAAA",
		"five parts":             "a.b.c.d.e",
		"padding":                "e30." + base64.URLEncoding.EncodeToString([]byte(`{"kubernetes.io":{"pod":{"uid":"x"}}} `)) + ".AAAA",
		"not base64url":          "e30.e/30.AAAA",
		"space within":           jws(`{"kubernetes.io":{"pod":{"uid":"x"}}}`) + " x",
		"newline in the payload": "e30.e\n30.AAAA",
		"not JSON":               jws(`secretclaim`),
		"an array":               jws(`[]`),
		"null":                   jws(`null`),
		"not Kubernetes":         jws(`{"sub":"secretclaim"}`),
		"not a pod's":            jws(`{"kubernetes.io":{"namespace":"default","serviceaccount":{"name":"a","uid":"secretclaim"}}}`),
		"pod is a string":        jws(`{"kubernetes.io":{"pod":"secretclaim"}}`),
		"UID is a number":        jws(`{"kubernetes.io":{"pod":{"uid":7}}}`),
		"UID is empty":           jws(`{"kubernetes.io":{"pod":{"uid":""}}}`),
		"names in other case":    jws(`{"Kubernetes.IO":{"Pod":{"UID":"secretclaim"}}}`),
		"data after":             jws(`{"kubernetes.io":{"pod":{"uid":"x"}}}{}`),
		"too long":               jws(`{"kubernetes.io":{"pod":{"uid":"x"}}}`) + strings.Repeat("A", identity.MaxTokenBytes),
	} {
		uid, err := tokenPodUID([]byte(token))
		if !errors.Is(err, identity.ErrUnauthenticated) || uid != "" {
			t.Errorf("%s: got %q, %v", name, uid, err)
		} else if strings.Contains(err.Error(), "secretclaim") {
			t.Errorf("%s: the error shows the token: %v", name, err)
		}
	}
}

func makeNode(t *testing.T, path string, mode uint32, dev uint64) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mknod(path, mode|0o644, int(dev)); err != nil {
		if mode == unix.S_IFIFO {
			t.Fatal(err)
		}
		t.Skipf("making a device needs root: %v", err)
	}
}

// shortDir is like t.TempDir with a path short enough for sockets.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "root")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}
