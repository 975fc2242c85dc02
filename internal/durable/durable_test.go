package durable

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

func TestWriteFileReplaces(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "key")
	for _, want := range []string{"first", "second, longer", ""} {
		if err := WriteFile(path, []byte(want), 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(path)
		if err != nil || string(got) != want {
			t.Fatalf("read %q, %v; want %q", got, err, want)
		}
		info, err := os.Stat(path)
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Fatalf("mode %v, %v; want 0600", info.Mode(), err)
		}
	}
	onlyFile(t, dir, "key")
}

// TestWriteFileFails: what cannot be written leaves the old bytes and nothing beside them.
func TestWriteFileFails(t *testing.T) {
	dir := t.TempDir()
	if err := WriteFile(filepath.Join(dir, "absent", "key"), nil, 0o600); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("into an absent folder: %v", err)
	}
	// The rename fails: the target is a folder.
	target := filepath.Join(dir, "key")
	if err := os.Mkdir(target, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := WriteFile(target, []byte("x"), 0o600); err == nil {
		t.Fatal("replaced a folder")
	}
	onlyFile(t, dir, "key")
}

func onlyFile(t *testing.T, dir, name string) {
	t.Helper()
	names, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	if len(names) != 1 || names[0].Name() != name {
		t.Fatalf("folder holds %v, want only %s", names, name)
	}
}

func TestPrivateDir(t *testing.T) {
	base := t.TempDir()
	path := filepath.Join(base, "data")
	for range 2 { // made, then found
		if err := PrivateDir(path); err != nil {
			t.Fatal(err)
		}
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o700 {
		t.Fatalf("mode %v, %v", info.Mode(), err)
	}
	for _, mode := range []os.FileMode{0o710, 0o701, 0o755, 0o770} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		err := PrivateDir(path)
		if !errors.Is(err, ErrLoose) || !strings.Contains(err.Error(), "chmod 0700 "+path) {
			t.Errorf("mode %v: %v", mode, err)
		}
	}
	if err := os.Chmod(path, 0o700); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(base, "link")
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	if err := PrivateDir(link); !errors.Is(err, fs.ErrInvalid) {
		t.Errorf("symlink: %v", err)
	}
	file := filepath.Join(base, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := PrivateDir(file); !errors.Is(err, fs.ErrInvalid) {
		t.Errorf("file: %v", err)
	}
	if err := PrivateDir(filepath.Join(base, "a", "b")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no parent: %v", err)
	}
}

func TestPrivateDirOfAnotherUser(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to give a folder away")
	}
	path := filepath.Join(t.TempDir(), "data")
	if err := os.Mkdir(path, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(path, 12345, 12345); err != nil {
		t.Fatal(err)
	}
	if err := PrivateDir(path); !errors.Is(err, ErrLoose) || !strings.Contains(err.Error(), "chown 0 "+path) {
		t.Fatalf("another user's folder: %v", err)
	}
}

func TestReadPrivateFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "key")
	want := bytes.Repeat([]byte{7}, 32)
	if err := WriteFile(path, want, 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := ReadPrivateFile(path, 32)
	if err != nil || !bytes.Equal(got, want) {
		t.Fatalf("read %x, %v", got, err)
	}
	if _, err := ReadPrivateFile(path, 31); !errors.Is(err, ErrTooLarge) {
		t.Errorf("too large: %v", err)
	}
	if _, err := ReadPrivateFile(filepath.Join(dir, "absent"), 32); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("absent: %v", err)
	}
	if _, err := ReadPrivateFile(dir, 32); !errors.Is(err, fs.ErrInvalid) {
		t.Errorf("folder: %v", err)
	}
	fifo := filepath.Join(dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadPrivateFile(fifo, 32); !errors.Is(err, fs.ErrInvalid) {
		t.Errorf("fifo: %v", err)
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadPrivateFile(link, 32); err == nil {
		t.Error("followed a symlink")
	}
	for _, mode := range []os.FileMode{0o640, 0o604, 0o620, 0o644} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		if _, err := ReadPrivateFile(path, 32); !errors.Is(err, ErrLoose) || !strings.Contains(err.Error(), "chmod 0600 "+path) {
			t.Errorf("mode %v: %v", mode, err)
		}
	}
}

func TestLock(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	held, err := Lock(path)
	if err != nil {
		t.Fatal(err)
	}
	// flock is per open file: a second open in this process stands for another process.
	if _, err := Lock(path); !errors.Is(err, ErrLocked) {
		t.Fatalf("second lock: %v", err)
	}
	if err := held.Close(); err != nil {
		t.Fatal(err)
	}
	again, err := Lock(path)
	if err != nil {
		t.Fatalf("after release: %v", err)
	}
	again.Close()
	if _, err := Lock(filepath.Join(path, "below", "a", "file")); err == nil {
		t.Fatal("locked below a file")
	}
}

// TestLockOfDeadProcess: the lock of a killed process is free at once.
func TestLockOfDeadProcess(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	if os.Getenv("DURABLE_TEST_LOCK") != "" {
		if _, err := Lock(os.Getenv("DURABLE_TEST_LOCK")); err != nil {
			t.Fatal(err)
		}
		os.Stdout.WriteString("held\n")
		select {}
	}
	cmd := exec.Command(os.Args[0], "-test.run=^TestLockOfDeadProcess$")
	cmd.Env = append(os.Environ(), "DURABLE_TEST_LOCK="+path)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := out.Read(make([]byte, 5)); err != nil {
		t.Fatal(err)
	}
	if _, err := Lock(path); !errors.Is(err, ErrLocked) {
		t.Errorf("while the other process lives: %v", err)
	}
	cmd.Process.Kill()
	cmd.Wait()
	again, err := Lock(path)
	if err != nil {
		t.Fatalf("after the other process was killed: %v", err)
	}
	again.Close()
}
