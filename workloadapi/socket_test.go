package workloadapi

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"countersign.io/countersign/identity"
)

func shortDir(t *testing.T) string {
	t.Helper()
	dir := must(os.MkdirTemp("", "wl"))
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func newAt(path string, change ...func(*Config)) (*Server, error) {
	c := Config{Path: path, Source: newSource(), Attestor: &fakeAttestor{}}
	for _, f := range change {
		f(&c)
	}
	return New(c)
}

func TestNewRefuses(t *testing.T) {
	dir := shortDir(t)
	file := filepath.Join(dir, "file")
	os.WriteFile(file, []byte("keep me"), 0o600)
	link := filepath.Join(dir, "link")
	os.Symlink(file, link)
	fifo := filepath.Join(dir, "fifo")
	unix.Mkfifo(fifo, 0o600)
	used := filepath.Join(dir, "used")
	listener := must(net.Listen("unix", used))
	defer listener.Close()
	datagrams := filepath.Join(dir, "datagrams")
	packet := must(net.ListenPacket("unixgram", datagrams))
	defer packet.Close()
	open := filepath.Join(dir, "open")
	os.Mkdir(open, 0o700)
	os.Chmod(open, 0o777)
	long := filepath.Join(dir, strings.Repeat("x", maxPath-len(dir)))
	for name, tc := range map[string]struct {
		path string
		want error
		says string
	}{
		"no path":         {"", identity.ErrInvalid, "absolute"},
		"relative path":   {"agent.sock", identity.ErrInvalid, "absolute"},
		"path too long":   {long, identity.ErrInvalid, "allow 107"},
		"a file":          {file, identity.ErrInvalid, "not a socket"},
		"a link":          {link, identity.ErrInvalid, "not a socket"},
		"a FIFO":          {fifo, identity.ErrInvalid, "not a socket"},
		"a folder":        {dir, identity.ErrInvalid, "not a socket"},
		"in use":          {used, identity.ErrExists, "another process listens"},
		"datagrams":       {datagrams, identity.ErrExists, "in use"},
		"anyone's folder": {filepath.Join(open, "s"), identity.ErrInvalid, "chmod"},
	} {
		s, err := newAt(tc.path)
		if err == nil {
			s.Close()
			t.Errorf("%s: accepted", name)
			continue
		}
		if !errors.Is(err, tc.want) || !strings.Contains(err.Error(), tc.says) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if data, err := os.ReadFile(file); err != nil || string(data) != "keep me" {
		t.Errorf("a file in the way was touched: %q, %v", data, err)
	}
	if c, err := net.Dial("unix", used); err != nil {
		t.Errorf("a socket in use was touched: %v", err)
	} else {
		c.Close()
	}
	for name, change := range map[string]func(*Config){
		"no source":      func(c *Config) { c.Source = nil },
		"no attestor":    func(c *Config) { c.Attestor = nil },
		"negative limit": func(c *Config) { c.Limits.User.Streams = -1 },
	} {
		if _, err := newAt(filepath.Join(dir, "s"), change); !errors.Is(err, identity.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestSocketFile(t *testing.T) {
	dir := shortDir(t)
	path := filepath.Join(dir, "sub", "agent.sock")
	s, err := newAt(path)
	if err != nil {
		t.Fatal(err)
	}
	if info := must(os.Stat(path)); info.Mode() != os.ModeSocket|0o777 {
		t.Errorf("the socket's mode is %v", info.Mode())
	}
	if info := must(os.Stat(filepath.Dir(path))); info.Mode().Perm() != 0o755 {
		t.Errorf("the folder's mode is %v", info.Mode())
	}
	if s.Address() != "unix://"+path {
		t.Errorf("address %s", s.Address())
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("after Close: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Errorf("closing twice: %v", err)
	}
	longest := filepath.Join(dir, strings.Repeat("x", maxPath-len(dir)-1))
	s, err = newAt(longest, func(c *Config) { c.Mode = 0o660 })
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if info := must(os.Stat(longest)); info.Mode().Perm() != 0o660 {
		t.Errorf("the socket's mode is %v", info.Mode())
	}
}

// A killed agent leaves its socket file behind; the next one replaces it. An agent that ends late must not take
// its successor's away.
func TestSocketReplaced(t *testing.T) {
	path := filepath.Join(shortDir(t), "agent.sock")
	old, err := newAt(path)
	if err != nil {
		t.Fatal(err)
	}
	old.listener.socket.UnixListener.Close() // as a kill would: the file stays
	s, err := newAt(path)
	if err != nil {
		t.Fatalf("replacing a stale socket: %v", err)
	}
	defer s.Close()
	old.Close()
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("the late end of the first agent: %v", err)
	}
}

func TestRunEndsWithItsSocket(t *testing.T) {
	s, err := newAt(filepath.Join(shortDir(t), "agent.sock"))
	if err != nil {
		t.Fatal(err)
	}
	s.listener.socket.UnixListener.Close()
	if err := s.Run(context.Background()); err == nil {
		t.Error("Run did not tell that its socket is broken")
	}
}
