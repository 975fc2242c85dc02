package audit

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"countersign.io/countersign/internal/durable"
)

// A file is named by the first record in it, so that names are in the order of the records.
const (
	filePrefix  = "audit-"
	fileSuffix  = ".jsonl"
	reserveName = "reserve"
	// damagedSuffix is of a file that could not be continued under its name.
	damagedSuffix = ".damaged"
	// margin is what must be free beside the reserve before a full disk counts as mended.
	margin = 1 << 20
)

// head is where the chain ends: the newest record's number, and its hash.
type head struct {
	seq  uint64
	hash [sha256.Size]byte
}

// disk is what can go wrong on a disk; tests make it.
type disk interface {
	io.WriterAt
	Sync() error
	Truncate(size int64) error
	Allocate(size int64) error // room for so many bytes from the start, read as zeros where nothing is written
	Close() error
}

type osFile struct{ *os.File }

// Sync leaves out what nobody reads, such as the time of the change.
func (f osFile) Sync() error { return unix.Fdatasync(int(f.Fd())) }

// Allocate writes the zeros where the file system cannot do without.
func (f osFile) Allocate(size int64) error {
	err := unix.Fallocate(int(f.Fd()), 0, 0, size)
	if errors.Is(err, unix.EOPNOTSUPP) {
		_, err = io.CopyN(f.File, zeros{}, size)
	}
	return err
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// files is the log on disk: a folder of its own.
//
// The current file ends in zeros, written ahead: with its size and its blocks known to the file system, a sync is one write and one
// flush of the disk, where it were a commit of the journal too, half as much again of CPU and of waiting, behind all that others have
// written. The zeros are no part of the log, and are cut when the file is full, when the log is closed, and at a start.
//
// What a crash leaves: zeros, a last line without an end, or records that nobody was told of. The first two are cut at the next
// start, the last are kept: they announce what may not have been done, never the other way round.
type files struct {
	dir              string
	maxSize, reserve int64
	open             func(path string, flag int) (disk, error)
	lock             io.Closer

	// The writer's.
	f     disk
	room  int64     // bytes of the file, zeros and all
	ahead int       // how many zeros were written last
	wrote time.Time // when
	lost  error     // the file must be opened anew

	mu    sync.Mutex
	first uint64 // record in the current file, its name
	size  int64  // of it, as far as it is durable
}

// found is what was on the disk at a start.
type found struct {
	head
	cut     int64 // bytes of a line without an end
	cutHash string
	cutFile string
	damage  string // what cannot be continued, and was left as it is
}

func openFiles(c *Config) (*files, found, error) {
	s := &files{dir: c.Dir, maxSize: c.MaxSize, reserve: c.Reserve, open: c.open}
	if s.open == nil {
		s.open = openOS
	}
	if err := durable.PrivateDir(s.dir); err != nil {
		return nil, found{}, err
	}
	var err error
	if s.lock, err = durable.Lock(filepath.Join(s.dir, "lock")); err != nil {
		return nil, found{}, err
	}
	at, err := s.recover()
	if err != nil {
		s.lock.Close()
		return nil, found{}, err
	}
	return s, at, nil
}

func openOS(path string, flag int) (disk, error) {
	f, err := os.OpenFile(path, flag|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && (!info.Mode().IsRegular() || info.Mode().Perm()&0o077 != 0) {
		err = fmt.Errorf("%s: it must be a regular file that its owner alone can read (chmod 0600): %w", path, durable.ErrLoose)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return osFile{f}, nil
}

func fileName(first uint64) string { return fmt.Sprintf("%s%020d%s", filePrefix, first, fileSuffix) }

func (s *files) path(first uint64) string { return filepath.Join(s.dir, fileName(first)) }

// listFiles returns the numbers of the first records of a folder's files, in order.
func listFiles(dir string) ([]uint64, error) {
	names, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var out []uint64
	for _, n := range names {
		digits, ok := strings.CutPrefix(n.Name(), filePrefix)
		if digits, ok2 := strings.CutSuffix(digits, fileSuffix); ok && ok2 && len(digits) == 20 {
			if first, err := strconv.ParseUint(digits, 10, 64); err == nil && first > 0 {
				out = append(out, first)
			}
		}
	}
	slices.Sort(out)
	return out, nil
}

// recover finds where the chain ends, cuts a line without an end, and goes on in the newest file, unless that is damaged: then
// it stays as it is, for verify to tell, and a new one is begun.
func (s *files) recover() (found, error) {
	all, err := listFiles(s.dir)
	if err != nil {
		return found{}, err
	}
	var at found
	for i := len(all) - 1; i >= 0; i-- {
		last := i == len(all)-1
		h, whole, err := s.scan(all[i], last, &at)
		if err != nil {
			return found{}, err
		}
		if last && at.damage == "" {
			s.first, s.size = all[i], whole
		}
		if h.seq > 0 {
			at.head = h
			break
		}
		// Nothing in it: a crash right after it was begun. The chain ends in the one before.
	}
	if s.first == 0 {
		s.first = at.seq + 1
		if slices.Contains(all, s.first) {
			// Damaged from its first line on: its name is needed, and what is in it is kept for whoever looks into it.
			if err := os.Rename(s.path(s.first), s.path(s.first)+damagedSuffix); err != nil {
				return found{}, err
			}
		}
	}
	if s.f, err = s.open(s.path(s.first), os.O_WRONLY|os.O_CREATE); err != nil {
		return found{}, err
	}
	if err := errors.Join(s.trim(), syncDir(s.dir)); err != nil {
		s.f.Close()
		return found{}, err
	}
	return at, nil
}

// trim cuts what is behind the records.
func (s *files) trim() error {
	if err := s.f.Truncate(s.size); err != nil {
		return err
	}
	s.room = s.size
	return s.f.Sync()
}

// scan reads a file to its end: the last record in it, and how much of it are whole lines.
func (s *files) scan(first uint64, last bool, at *found) (h head, whole int64, err error) {
	f, err := os.OpenFile(s.path(first), os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return h, 0, err
	}
	defer f.Close()
	end, err := dataEnd(f)
	if err != nil {
		return h, 0, err
	}
	r := bufio.NewReaderSize(io.LimitReader(f, end), MaxLine)
	for n := 1; ; n++ {
		line, err := r.ReadSlice('\n')
		if errors.Is(err, io.EOF) && len(line) == 0 {
			return h, whole, nil
		}
		var seq uint64
		ok := false
		if err == nil {
			seq, _, ok = parsePrefix(bytes.TrimSuffix(line, []byte{'\n'}))
			ok = ok && bytes.IndexByte(line, 0) < 0
		}
		if !ok {
			// What comes after cannot be told apart any more.
			if last {
				err = at.rest(f, first, n, whole, end)
			}
			return h, whole, err
		}
		h.seq, h.hash = seq, sha256.Sum256(line[:len(line)-1])
		whole += int64(len(line))
	}
}

// sector is what a disk writes whole, or not at all.
const sector = 512

// rest judges what is in the newest file behind the last whole line: the remains of a group that a crash kept from becoming
// durable, or damage. A group that spans sectors may lack the first of them, where the zeros are still.
func (at *found) rest(f io.ReaderAt, first uint64, n int, whole, end int64) error {
	damage := fmt.Sprintf("%s, line %d", fileName(first), n)
	if end-whole > maxBytes {
		at.damage = damage
		return nil
	}
	b := make([]byte, end-whole)
	if _, err := f.ReadAt(b, whole); err != nil {
		return err
	}
	hole := int64(len(b) - len(bytes.TrimLeft(b, "\x00")))
	if bytes.IndexByte(b, '\n') >= 0 && (hole == 0 || (whole+hole)%sector != 0) {
		at.damage = damage
		return nil
	}
	sum := sha256.Sum256(b)
	at.cut, at.cutHash, at.cutFile = end-whole, hex.EncodeToString(sum[:]), fileName(first)
	return nil
}

// dataEnd is where the zeros at the end of a file begin. What is before it has been written, also where a writer is at it: it
// writes from front to back.
func dataEnd(f *os.File) (int64, error) {
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	end := info.Size()
	for b := make([]byte, MaxLine); end > 0; {
		part := b[:min(end, MaxLine)]
		if _, err := f.ReadAt(part, end-int64(len(part))); err != nil && !errors.Is(err, io.EOF) {
			return 0, err
		}
		if used := len(bytes.TrimRight(part, "\x00")); used > 0 {
			return end - int64(len(part)-used), nil
		}
		end -= int64(len(part))
	}
	return 0, nil
}

// ahead is how many zeros are written at once, at the least. Whoever waits for that waits for a commit of the file system's journal, some
// milliseconds: while they are used up within a second, it is twice as many each time, up to mostAhead, so that it is one
// record in thousands. A group of more than a quarter of that pays for its own commit.
const (
	ahead     = 256 << 10
	mostAhead = 4 << 20
)

// append writes lines and makes them durable. On an error, none of them is part of the log.
func (s *files) append(lines []byte) error {
	if s.lost != nil {
		return s.lost
	}
	_, err := s.f.WriteAt(lines, s.size)
	if end := s.size + int64(len(lines)); err == nil && end > s.room {
		s.room = end
		err = s.writeAhead(len(lines))
	}
	if err == nil {
		err = s.f.Sync()
	}
	if err != nil {
		s.lost = err // reopen cuts what may have been written
		return err
	}
	s.mu.Lock()
	s.size += int64(len(lines))
	s.mu.Unlock()
	return nil
}

// writeAhead is not to fail for want of room: the lines have theirs.
func (s *files) writeAhead(group int) error {
	now := time.Now()
	if s.ahead = 2 * s.ahead; now.Sub(s.wrote) > time.Second {
		s.ahead = ahead
	}
	if s.ahead, s.wrote = min(s.ahead, mostAhead), now; group > s.ahead/4 {
		return nil
	}
	n, err := s.f.WriteAt(make([]byte, max(0, min(int64(s.ahead), s.maxSize-s.room))), s.room)
	s.room += int64(n)
	if isFull(err) {
		return nil
	}
	return err
}

// reopen takes the file back to what is durable after a failed append.
func (s *files) reopen() error {
	if s.lost == nil {
		return nil
	}
	if s.f != nil {
		s.f.Close() // its error says nothing new
		s.f = nil
	}
	f, err := s.open(s.path(s.first), os.O_WRONLY|os.O_CREATE)
	if err != nil {
		return err
	}
	s.f = f
	if err := s.trim(); err != nil {
		return err
	}
	s.lost = nil
	return nil
}

// rotate begins a file with record next. If it cannot, the old one goes on.
func (s *files) rotate(next uint64) error {
	if s.lost != nil {
		return s.lost
	}
	if err := s.trim(); err != nil {
		return err
	}
	f, err := s.open(s.path(next), os.O_WRONLY|os.O_CREATE|os.O_EXCL)
	if err != nil {
		return err
	}
	if err := syncDir(s.dir); err != nil {
		f.Close()
		os.Remove(s.path(next))
		return err
	}
	s.f.Close() // all in it is durable
	s.f, s.room = f, 0
	s.mu.Lock()
	s.first, s.size = next, 0
	s.mu.Unlock()
	return nil
}

// end is the current file, and how much of it may be read.
func (s *files) end() (first uint64, size int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.first, s.size
}

// takeReserve holds space back on the disk, and fails unless there is some beside it.
func (s *files) takeReserve() error {
	path := filepath.Join(s.dir, reserveName)
	if info, err := os.Lstat(path); err == nil && info.Size() == s.reserve {
		return nil
	}
	f, err := s.open(path, os.O_WRONLY|os.O_CREATE)
	if err != nil {
		return err
	}
	defer f.Close()
	if err = f.Allocate(s.reserve + margin); err == nil {
		err = f.Truncate(s.reserve)
	}
	if err == nil {
		err = f.Sync()
	}
	if err != nil {
		os.Remove(path)
		return fmt.Errorf("holding back %d bytes: %w", s.reserve, err)
	}
	return nil
}

func (s *files) freeReserve() { os.Remove(filepath.Join(s.dir, reserveName)) }

// fileSystem is the size of the one that holds dir; 0 where it says none.
func fileSystem(dir string) (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, err
	}
	return int64(min(st.Blocks, math.MaxInt64/uint64(max(st.Frsize, 1)))) * int64(st.Frsize), nil
}

// expired are the files that retention takes away: the oldest, never the current one, and for their size (0: no bound) not the one before it
// either. upTo is the last record in them.
func (s *files) expired(now time.Time, keep time.Duration, keepBytes int64) (names []string, upTo uint64) {
	all, err := listFiles(s.dir)
	if err != nil {
		return nil, 0
	}
	current, total := s.end()
	var infos []fs.FileInfo
	for _, first := range all {
		if first >= current {
			break
		}
		info, err := os.Lstat(s.path(first))
		if err != nil {
			return nil, 0
		}
		infos = append(infos, info)
		total += info.Size()
	}
	for i, info := range infos {
		if now.Sub(info.ModTime()) <= keep && (keepBytes == 0 || total <= keepBytes || i == len(infos)-1) {
			break
		}
		total -= info.Size()
		names = append(names, info.Name())
		upTo = current - 1
		if i+1 < len(infos) {
			upTo = all[i+1] - 1
		}
	}
	return names, upTo
}

func (s *files) close() error {
	var err error
	if s.f != nil {
		if s.lost == nil {
			err = s.f.Truncate(s.size) // a crash that undoes it leaves zeros
		}
		err = errors.Join(err, s.f.Close())
	}
	return errors.Join(err, s.lock.Close())
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
