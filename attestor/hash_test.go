package attestor

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestHasher(t *testing.T) {
	path := filepath.Join(t.TempDir(), "exe")
	writeFile(t, path, []byte("one"))
	handle := func() int {
		fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(fd) })
		return fd
	}
	var log bytes.Buffer
	now := time.Now()
	h, err := newHasher(1<<10, func() time.Time { return now }, slog.New(slog.NewTextHandler(&log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	check := func(what, content string, cached int) {
		t.Helper()
		want := sha256.Sum256([]byte(content))
		if got, err := h.sum(handle()); err != nil || got != hex.EncodeToString(want[:]) {
			t.Errorf("%s: got %q, %v", what, got, err)
		}
		if h.cache.Len() != cached {
			t.Errorf("%s: %d hashes are kept, want %d", what, h.cache.Len(), cached)
		}
	}
	check("a file that may still change without a trace", "one", 0)
	now = now.Add(time.Minute)
	check("a settled file", "one", 1)
	v, err := versionOf(handle())
	if err != nil {
		t.Fatal(err)
	}
	h.cache.Add(v, strings.Repeat("0", 64)) // shows that the file is not read again
	if got, err := h.sum(handle()); err != nil || got != strings.Repeat("0", 64) {
		t.Errorf("the kept hash was not used: %q, %v", got, err)
	}
	// A FUSE file system that shows the very same numbers.
	h.fileSystem = func(int) (int64, error) { return unix.FUSE_SUPER_MAGIC, nil }
	if got, err := h.sum(handle()); got != "" || !errors.Is(err, errUnhashed) {
		t.Errorf("on FUSE: got %q, %v", got, err)
	}
	h.fileSystem = fileSystemOf
	writeFile(t, path, []byte("another content"))
	now = now.Add(time.Minute)
	check("a changed file", "another content", 2)

	writeFile(t, path, make([]byte, 1<<10))
	now = now.Add(time.Minute)
	check("at the limit", strings.Repeat("\x00", 1<<10), 3)
	if err := os.Truncate(path, 1<<10+1); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if got, err := h.sum(handle()); got != "" || !errors.Is(err, errUnhashed) {
			t.Errorf("over the limit: got %q, %v", got, err)
		}
	}
	if n := strings.Count(log.String(), "too large"); n != 1 {
		t.Errorf("said %d times that it is too large, want once: %s", n, log.String())
	}
}

// In an attestation the limit costs the selector and nothing else.
func TestAttestTooLargeToHash(t *testing.T) {
	a := newAttestor(t, Config{SHA256: true, MaxHashBytes: 1, Locate: at(Place{})})
	w, err := a.Attest(t.Context(), startCaller(t, callerOptions{}).peer())
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range w.Evidence.Selectors {
		if s.Name() == "unix:sha256" {
			t.Errorf("got %s", s)
		}
	}
}
