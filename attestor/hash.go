package attestor

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"golang.org/x/sys/unix"
)

const (
	hashCacheSize = 1024 // executables
	// A file whose last change is more recent than this when it is hashed could be changed again without its
	// time stamps showing it, so its hash is not kept.
	hashSettled = 2 * time.Second
)

var errUnhashed = errors.New("the executable is not hashed")

// version is one content of one file, as far as the kernel tells. Users cannot set the change time.
type version struct {
	file         fileID
	size         uint64
	mtime, ctime unix.StatxTimestamp
}

// hasher gives the SHA-256 of executables and remembers it per version.
type hasher struct {
	limit int64 // bytes
	now   func() time.Time
	log   *slog.Logger
	cache *lru.Cache[version, string] // "" for one that is over the limit

	fileSystem func(handle int) (int64, error) // the kind; only a test gives another than fileSystemOf
}

func newHasher(limit int64, now func() time.Time, log *slog.Logger) (*hasher, error) {
	cache, err := lru.New[version, string](hashCacheSize)
	if err != nil {
		return nil, fmt.Errorf("making the cache of hashes: %w", err)
	}
	return &hasher{limit: limit, now: now, log: log, cache: cache, fileSystem: fileSystemOf}, nil
}

// sum gives the hash, in hex, of the executable that an O_PATH descriptor stands for.
func (h *hasher) sum(handle int) (string, error) {
	// Before the cache: whoever serves a FUSE file system chooses inode numbers, sizes and times, and the device number of one
	// that is gone is given again, so that another's version could be imitated.
	kind, err := h.fileSystem(handle)
	if err != nil {
		return "", fmt.Errorf("hashing an executable: %w", err)
	}
	if kind == unix.FUSE_SUPER_MAGIC { // who can show one content to run and another to hash as well
		return "", errUnhashed
	}
	v, err := versionOf(handle)
	if err != nil {
		return "", fmt.Errorf("hashing an executable: %w", err)
	}
	if sum, ok := h.cache.Get(v); ok {
		return known(sum)
	}
	if v.size > uint64(h.limit) {
		h.cache.Add(v, "")
		h.log.Warn("executable is too large to hash: its processes get no unix:sha256 selector", "bytes", v.size, "limit", h.limit)
		return known("")
	}
	started := h.now()
	sum, err := h.read(handle)
	if err != nil {
		return "", fmt.Errorf("hashing an executable: %w", err)
	}
	if after, err := versionOf(handle); err != nil || after != v {
		return "", fmt.Errorf("hashing an executable: it changed meanwhile")
	}
	if started.Sub(time.Unix(v.ctime.Sec, int64(v.ctime.Nsec))) > hashSettled {
		h.cache.Add(v, sum)
	}
	return sum, nil
}

func known(sum string) (string, error) {
	if sum == "" {
		return "", errUnhashed
	}
	return sum, nil
}

func (h *hasher) read(handle int) (string, error) {
	fd, err := reopen(handle)
	if err != nil {
		return "", err
	}
	f := os.NewFile(uintptr(fd), "exe")
	defer f.Close()
	sum := sha256.New()
	n, err := io.Copy(sum, io.LimitReader(f, h.limit+1))
	if err != nil {
		return "", err
	}
	if n > h.limit {
		return "", errUnhashed
	}
	return hex.EncodeToString(sum.Sum(nil)), nil
}

func fileSystemOf(handle int) (int64, error) {
	var fs unix.Statfs_t
	err := unix.Fstatfs(handle, &fs)
	return int64(fs.Type), err
}

func versionOf(handle int) (version, error) {
	var st unix.Statx_t
	if err := unix.Statx(handle, "", unix.AT_EMPTY_PATH, unix.STATX_BASIC_STATS, &st); err != nil {
		return version{}, err
	}
	return version{fileID{st.Dev_major, st.Dev_minor, st.Ino}, st.Size, st.Mtime, st.Ctime}, nil
}
