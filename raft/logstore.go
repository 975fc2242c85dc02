package raft

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"runtime/debug"
	"strconv"
	"sync"
	"time"

	hraft "github.com/hashicorp/raft"
	bolt "go.etcd.io/bbolt"
)

// ErrForeign is wrapped when a folder holds another member's log.
var ErrForeign = errors.New("folder of another member")

const logFormat = "1"

// deleteBatch bounds how long compaction keeps an append waiting.
const deleteBatch = 1024

// logStore keeps raft's log, term and vote in one bbolt file, each write synced before it returns. The log
// may have a gap (a follower that got a snapshot keeps older entries for a while), always below a snapshot.
//
// After a crash the file holds each write whole or not at all: bbolt writes the pages, syncs, then a
// checksummed meta page. A record that does not fit its checksum is therefore damage, never a torn write
// that may be dropped, and the store refuses to open.
type logStore struct {
	db *bolt.DB

	mu      sync.Mutex
	first   uint64 // 0 when empty
	last    uint64
	term    uint64 // of the last entry
	command uint64 // index of the last command in the log, 0 if none

	runFrom uint64 // as found on opening: from here to the last entry there is no gap
}

var (
	_ hraft.LogStore    = (*logStore)(nil)
	_ hraft.StableStore = (*logStore)(nil)
)

func bucketLog() []byte    { return []byte("log") }
func bucketStable() []byte { return []byte("stable") }
func bucketMeta() []byte   { return []byte("meta") }

// openLogStore opens or makes the log of the named member and checks every record in it.
func openLogStore(path, member string) (s *logStore, err error) {
	// bbolt panics on a damaged page, and reading a truncated file's map is a fault: both become errors here.
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			s, err = nil, fmt.Errorf("reading %s: %v: %w; remove this member and join it again with an empty folder", path, p, ErrCorrupt)
		}
	}()
	if err := checkPages(path, string(bucketLog()), string(bucketMeta()), string(bucketStable())); err != nil {
		return nil, fmt.Errorf("checking %s: %w; remove this member and join it again with an empty folder", path, err)
	}
	db, err := bolt.Open(path, 0o600, &bolt.Options{
		Timeout:      time.Second, // our own lock is held already
		FreelistType: bolt.FreelistMapType,
		// Not NoFreelistSync: rebuilding the free list reads the file in a goroutine of bbolt's, where a
		// fault in a truncated file ends the process.
		NoStatistics: true,
	})
	if err != nil {
		return nil, fmt.Errorf("opening %s: %w", path, err)
	}
	s = &logStore{db: db}
	if err := s.load(member); err != nil {
		db.Close()
		return nil, fmt.Errorf("reading %s: %w", path, err)
	}
	return s, nil
}

func (s *logStore) load(member string) error {
	err := s.db.Update(func(tx *bolt.Tx) error {
		for _, name := range [][]byte{bucketLog(), bucketStable()} {
			if _, err := tx.CreateBucketIfNotExists(name); err != nil {
				return err
			}
		}
		meta, err := tx.CreateBucketIfNotExists(bucketMeta())
		if err != nil {
			return err
		}
		return checkMeta(meta, member)
	})
	if err != nil {
		return err
	}
	return s.db.View(func(tx *bolt.Tx) error {
		var l hraft.Log
		err := tx.Bucket(bucketLog()).ForEach(func(k, v []byte) error {
			if len(k) != 8 {
				return fmt.Errorf("log key %x: %w", k, ErrCorrupt)
			}
			if err := parseRecord(binary.BigEndian.Uint64(k), v, &l); err != nil {
				return fmt.Errorf("%w; remove this member and join it again with an empty folder", err)
			}
			if l.Index != s.last+1 || s.runFrom == 0 {
				s.runFrom = l.Index
			}
			s.noteLocked(&l)
			return nil
		})
		if err != nil {
			return err
		}
		return tx.Bucket(bucketStable()).ForEach(func(k, v []byte) error {
			_, err := parseStable(k, v)
			return err
		})
	})
}

// checkMeta writes whose log this is into a new file, and compares it with an old one's.
func checkMeta(meta *bolt.Bucket, member string) error {
	err := meta.ForEach(func(k, _ []byte) error {
		if string(k) != "format" && string(k) != "member" {
			return fmt.Errorf("meta key %q: %w", k, ErrCorrupt)
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, f := range []struct{ key, want string }{{"format", logFormat}, {"member", member}} {
		got := meta.Get([]byte(f.key))
		switch {
		case got == nil:
			if err := meta.Put([]byte(f.key), []byte(f.want)); err != nil {
				return err
			}
		case string(got) == f.want:
		case f.key == "format":
			return fmt.Errorf("the log has format %q, this program reads format %s; run the newer program", got, logFormat)
		default:
			return fmt.Errorf("the log is that of member %q, this is member %q; give each member its own data folder: %w", got, member, ErrForeign)
		}
	}
	return nil
}

// noteLocked takes a stored entry into account. Entries come in order.
func (s *logStore) noteLocked(l *hraft.Log) {
	if s.first == 0 {
		s.first = l.Index
	}
	s.last, s.term = l.Index, l.Term
	if l.Type == hraft.LogCommand {
		s.command = l.Index
	}
}

func (s *logStore) Close() error {
	if err := s.db.Close(); err != nil {
		return fmt.Errorf("closing raft log: %w", err)
	}
	return nil
}

// FirstIndex implements hraft.LogStore.
func (s *logStore) FirstIndex() (uint64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.first, nil
}

// LastIndex implements hraft.LogStore.
func (s *logStore) LastIndex() (uint64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.last, nil
}

// lastCommand is the index of the newest command in the log, 0 if it holds none.
func (s *logStore) lastCommand() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.command
}

// typeOf is the type of the entry at index; ok is false if there is none.
func (s *logStore) typeOf(b *bolt.Bucket, index uint64) (t hraft.LogType, ok bool) {
	v := b.Get(indexKey(index))
	if len(v) < recordFixed {
		return 0, false
	}
	return hraft.LogType(v[1]), true
}

// commandUpTo is the index of the newest command in the log that is not above the given index, 0 if it has none.
func (s *logStore) commandUpTo(index uint64) (command uint64, err error) {
	if newest := s.lastCommand(); newest <= index {
		return newest, nil
	}
	err = s.db.View(func(tx *bolt.Tx) error {
		b := tx.Bucket(bucketLog())
		for i := index; i > 0; i-- { // mostly one step: under load nearly every entry is a command
			t, ok := s.typeOf(b, i)
			if !ok {
				return nil
			}
			if t == hraft.LogCommand {
				command = i
				return nil
			}
		}
		return nil
	})
	return command, err
}

// lastTerm is the term of the last entry, or other if the log is empty.
func (s *logStore) lastTerm(other uint64) uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.last == 0 {
		return other
	}
	return s.term
}

// GetLog implements hraft.LogStore.
func (s *logStore) GetLog(index uint64, l *hraft.Log) error {
	return s.db.View(func(tx *bolt.Tx) error {
		v := tx.Bucket(bucketLog()).Get(indexKey(index))
		if v == nil {
			return hraft.ErrLogNotFound // raft compares with ==
		}
		return parseRecord(index, v, l)
	})
}

// StoreLog implements hraft.LogStore.
func (s *logStore) StoreLog(l *hraft.Log) error { return s.StoreLogs([]*hraft.Log{l}) }

// StoreLogs implements hraft.LogStore: all of them or none, on disk when it returns.
func (s *logStore) StoreLogs(logs []*hraft.Log) error {
	err := s.db.Update(func(tx *bolt.Tx) error {
		b := tx.Bucket(bucketLog())
		b.FillPercent = 1 // keys only grow: full pages, half the writes
		for _, l := range logs {
			v, err := marshalRecord(l)
			if err != nil {
				return err
			}
			if err := b.Put(indexKey(l.Index), v); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("storing log entries: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range logs {
		s.noteLocked(l)
	}
	return nil
}

// DeleteRange implements hraft.LogStore; both ends are included. Compaction deletes from the front, in
// steps, so that appends get in between: a crash leaves a shorter front. A conflicting end goes in one step:
// a crash must not leave a hole.
func (s *logStore) DeleteRange(from, to uint64) error {
	first, _ := s.FirstIndex()
	step := uint64(deleteBatch)
	if from > first {
		step = to - from + 1
	}
	for from <= to {
		end := min(to, from+step-1)
		if err := s.deleteOnce(from, end); err != nil {
			return fmt.Errorf("deleting log entries %d to %d: %w", from, end, err)
		}
		from = end + 1
	}
	return nil
}

func (s *logStore) deleteOnce(from, to uint64) error {
	var first, last, term, command uint64
	err := s.db.Update(func(tx *bolt.Tx) error {
		c := tx.Bucket(bucketLog()).Cursor()
		start, end := indexKey(from), indexKey(to)
		for k, _ := c.Seek(start); k != nil && bytes.Compare(k, end) <= 0; k, _ = c.Seek(start) {
			if err := c.Delete(); err != nil {
				return err
			}
		}
		k, _ := c.First()
		if k == nil {
			return nil // and bbolt's Last would look for ever for an entry in front of pages that are all empty
		}
		first = binary.BigEndian.Uint64(k)
		k, v := c.Last()
		last = binary.BigEndian.Uint64(k)
		if len(v) >= recordFixed {
			term = binary.BigEndian.Uint64(v[2:10])
		}
		// Backwards to the newest command: mostly one step, at most the uncommitted end of the log.
		for ; k != nil && command == 0; k, v = c.Prev() {
			if len(v) > 1 && hraft.LogType(v[1]) == hraft.LogCommand {
				command = binary.BigEndian.Uint64(k)
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.first, s.last, s.term, s.command = first, last, term, command
	return nil
}

// Set implements hraft.StableStore.
func (s *logStore) Set(key, val []byte) error {
	err := s.db.Update(func(tx *bolt.Tx) error {
		return tx.Bucket(bucketStable()).Put(key, marshalStable(key, val))
	})
	if err != nil {
		return fmt.Errorf("storing raft's %q: %w", key, err)
	}
	return nil
}

// Get implements hraft.StableStore: nil when there is no such key.
func (s *logStore) Get(key []byte) (val []byte, err error) {
	err = s.db.View(func(tx *bolt.Tx) error {
		v := tx.Bucket(bucketStable()).Get(key)
		if v == nil {
			return nil
		}
		val, err = parseStable(key, v)
		return err
	})
	return val, err
}

// SetUint64 implements hraft.StableStore.
func (s *logStore) SetUint64(key []byte, val uint64) error {
	return s.Set(key, strconv.AppendUint(nil, val, 10))
}

// GetUint64 implements hraft.StableStore: 0 when there is no such key.
func (s *logStore) GetUint64(key []byte) (uint64, error) {
	v, err := s.Get(key)
	if err != nil || v == nil {
		return 0, err
	}
	n, err := strconv.ParseUint(string(v), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("raft's %q is %q, not a number: %w", key, v, ErrCorrupt)
	}
	return n, nil
}

// forgetBareTerm clears term 1 from a store that holds nothing else.
func (s *logStore) forgetBareTerm() error {
	term, err := s.GetUint64([]byte("CurrentTerm"))
	if err != nil {
		return err
	}
	vote, err := s.GetUint64([]byte("LastVoteTerm"))
	if err != nil {
		return err
	}
	if last, _ := s.LastIndex(); term != 1 || vote != 0 || last != 0 {
		return nil
	}
	return s.SetUint64([]byte("CurrentTerm"), 0)
}
