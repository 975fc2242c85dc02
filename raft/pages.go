package raft

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"io/fs"
	"os"
	"slices"
)

// bbolt checks its meta pages, and takes the rest of the file on trust. The records have sums of their own, so a
// flip in one is noticed when it is read; what would not be is a flip in what leads to the records: a count that
// is one less, a child that is another page, a free page that is not free (and is overwritten later), or a meta
// page that does not fit, for which bbolt takes the one before, and with it forgets the last write. So Open walks
// the file before bbolt sees it and checks that all of it is as bbolt writes it, with no page out of place.

const (
	pageHeader  = 16 // id 8, flags 2, count 2, overflow 4
	pageElement = 16 // leaf: flags 4, pos 4, ksize 4, vsize 4; branch: pos 4, ksize 4, child 8
	metaSize    = 64 // magic 4, version 4, page size 4, flags 4, root 8, sequence 8, free list 8, end 8, txid 8, checksum 8

	pageBranch   = 0x01
	pageLeaf     = 0x02
	pageMeta     = 0x04
	pageFreelist = 0x10

	boltMagic   = 0xED0CDAED
	boltVersion = 2

	maxDepth = 64 // of a tree of pages; four are a very large log
)

// pages is a walk over a bbolt file that nobody has open.
type pages struct {
	r    io.ReaderAt
	size uint64 // of a page
	end  uint64 // one more than the last page
	used []bool // pages that were reached
	last []byte // the last key that was reached, in the bucket at hand
}

// checkPages checks the structure of the bbolt file at path. An absent or empty file is fine: bbolt makes it. Its
// buckets must be the named ones, or none.
func checkPages(path string, buckets ...string) error {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil || info.Size() == 0 {
		return err
	}
	p := &pages{r: f}
	if err := p.walk(uint64(info.Size()), buckets); err != nil {
		return fmt.Errorf("%w: %w", err, ErrCorrupt)
	}
	return nil
}

// bad says what is wrong with a page.
func bad(page uint64, format string, args ...any) error {
	return fmt.Errorf("page %d: %s", page, fmt.Sprintf(format, args...))
}

type metaPage struct{ pageSize, root, freelist, end, txid uint64 }

func (p *pages) walk(fileSize uint64, buckets []string) error {
	m, err := p.metas(fileSize)
	if err != nil {
		return err
	}
	if m.end > fileSize/p.size {
		return fmt.Errorf("the file has %d bytes, its pages need %d: it was cut off", fileSize, m.end*p.size)
	}
	p.end, p.used = m.end, make([]bool, m.end)
	p.used[0], p.used[1] = true, true
	free, err := p.freelist(m.freelist)
	if err != nil {
		return err
	}
	names := []string{}
	err = p.tree(m.root, nil, nil, 0, func(page uint64, flags uint32, key, val []byte) error {
		if flags != 1 || len(val) < 16 {
			return bad(page, "%q is not a bucket", key)
		}
		names = append(names, string(key))
		return nil
	})
	if err != nil {
		return err
	}
	slices.Sort(buckets)
	if len(names) > 0 && !slices.Equal(names, buckets) {
		return fmt.Errorf("it has the buckets %q instead of %q", names, buckets)
	}
	// The roots of the buckets are read only now: a walk remembers one last key.
	err = p.again(m.root, 0, func(page uint64, val []byte) error { return p.bucket(page, val) })
	if err != nil {
		return err
	}
	for _, id := range free {
		if id < 2 || id >= p.end || p.used[id] {
			return bad(id, "it is in use, or outside of the file, and on the list of free pages")
		}
		p.used[id] = true
	}
	if i := slices.Index(p.used, false); i >= 0 {
		return bad(uint64(i), "nothing leads to it, and it is not free")
	}
	return nil
}

// metas reads both meta pages and returns the newer.
func (p *pages) metas(fileSize uint64) (metaPage, error) {
	first, err := p.meta(0, 0)
	if err != nil {
		return metaPage{}, err
	}
	if p.size = first.pageSize; p.size < 512 || p.size > 1<<16 || p.size&(p.size-1) != 0 || fileSize < 4*p.size {
		return metaPage{}, bad(0, "pages of %d bytes in a file of %d", p.size, fileSize)
	}
	second, err := p.meta(1, p.size)
	if err != nil {
		return metaPage{}, err
	}
	older, newer := first, second
	if older.txid > newer.txid {
		older, newer = newer, older
	}
	if second.pageSize != p.size || newer.txid != older.txid+1 || first.txid%2 != 0 {
		return metaPage{}, bad(1, "the transactions %d and %d do not follow each other", first.txid, second.txid)
	}
	if newer.end < 4 {
		return metaPage{}, bad(newer.txid%2, "the file has %d pages", newer.end)
	}
	return newer, nil
}

// meta reads a meta page. It fits into one sector of the disk, which is written whole or not at all: so also after
// a crash both must be right.
func (p *pages) meta(id, at uint64) (metaPage, error) {
	b := make([]byte, pageHeader+metaSize)
	if _, err := p.r.ReadAt(b, int64(at)); err != nil {
		return metaPage{}, bad(id, "reading it: %v", err)
	}
	u32, u64 := binary.NativeEndian.Uint32, binary.NativeEndian.Uint64
	if u64(b) != id || binary.NativeEndian.Uint16(b[8:]) != pageMeta {
		return metaPage{}, bad(id, "it is not the meta page that belongs there")
	}
	b = b[pageHeader:]
	h := fnv.New64a()
	h.Write(b[:metaSize-8])
	if u32(b) != boltMagic || u32(b[4:]) != boltVersion || h.Sum64() != u64(b[metaSize-8:]) {
		return metaPage{}, bad(id, "the checksum of the meta page does not match")
	}
	return metaPage{pageSize: uint64(u32(b[8:])), root: u64(b[16:]), freelist: u64(b[32:]), end: u64(b[40:]), txid: u64(b[48:])}, nil
}

// page reads a page with what overflows from it, once.
func (p *pages) page(id uint64, claim bool) ([]byte, error) {
	if id < 2 || id >= p.end {
		return nil, bad(id, "the file has pages 2 to %d", p.end-1)
	}
	var h [pageHeader]byte
	if _, err := p.r.ReadAt(h[:], int64(id*p.size)); err != nil {
		return nil, bad(id, "reading it: %v", err)
	}
	if got := binary.NativeEndian.Uint64(h[:]); got != id {
		return nil, bad(id, "it says that it is page %d", got)
	}
	n := uint64(binary.NativeEndian.Uint32(h[12:])) + 1
	if n > p.end-id {
		return nil, bad(id, "it goes on for %d pages, beyond the end of the file", n)
	}
	for i := id; claim && i < id+n; i++ {
		if p.used[i] {
			return nil, bad(i, "two places lead to it")
		}
		p.used[i] = true
	}
	b := make([]byte, n*p.size)
	if _, err := p.r.ReadAt(b, int64(id*p.size)); err != nil {
		return nil, bad(id, "reading it: %v", err)
	}
	return b, nil
}

func (p *pages) freelist(id uint64) ([]uint64, error) {
	b, err := p.page(id, true)
	if err != nil {
		return nil, err
	}
	if flags := binary.NativeEndian.Uint16(b[8:]); flags != pageFreelist {
		return nil, bad(id, "flags %#x where the list of free pages belongs", flags)
	}
	n, b := uint64(binary.NativeEndian.Uint16(b[10:])), b[pageHeader:]
	if n == 0xFFFF {
		n, b = binary.NativeEndian.Uint64(b), b[8:]
	}
	if n > uint64(len(b)/8) {
		return nil, bad(id, "%d free pages do not fit into the list", n)
	}
	out := make([]uint64, n)
	for i := range out {
		out[i] = binary.NativeEndian.Uint64(b[8*i:])
	}
	return out, nil
}

// element is one of a page.
type element struct {
	flags    uint32
	child    uint64
	key, val []byte
}

// elements takes a leaf or branch page apart. All of the space from the first element to the last byte of the last
// value must be accounted for, so that no count and no length can be another than it was.
func elements(id uint64, b []byte) (leaf bool, out []element, end int, err error) {
	if len(b) < pageHeader {
		return false, nil, 0, bad(id, "%d bytes", len(b))
	}
	u32 := func(at int) uint64 { return uint64(binary.NativeEndian.Uint32(b[at:])) }
	switch flags := binary.NativeEndian.Uint16(b[8:]); flags {
	case pageLeaf:
		leaf = true
	case pageBranch:
	default:
		return false, nil, 0, bad(id, "flags %#x where entries belong", flags)
	}
	n := int(binary.NativeEndian.Uint16(b[10:]))
	at := uint64(pageHeader + n*pageElement)
	if at > uint64(len(b)) || !leaf && n == 0 {
		return false, nil, 0, bad(id, "%d entries", n)
	}
	out = make([]element, n)
	for i := range out {
		e := pageHeader + i*pageElement
		pos, ksize, vsize := u32(e), u32(e+4), uint64(0)
		if leaf {
			out[i].flags = uint32(u32(e))
			pos, ksize, vsize = u32(e+4), u32(e+8), u32(e+12)
		} else {
			out[i].child = binary.NativeEndian.Uint64(b[e+8:])
		}
		if uint64(e)+pos != at || ksize == 0 || at+ksize+vsize > uint64(len(b)) {
			return false, nil, 0, bad(id, "entry %d of %d is not where it belongs", i, n)
		}
		out[i].key, out[i].val = b[at:at+ksize], b[at+ksize:at+ksize+vsize]
		at += ksize + vsize
	}
	return leaf, out, int(at), nil
}

// tree walks a tree of pages. Its keys must grow, and be at least from; under a branch also below the next one's.
func (p *pages) tree(id uint64, from, below []byte, depth int, entry func(page uint64, flags uint32, key, val []byte) error) error {
	if depth == 0 {
		p.last = nil
	}
	if depth > maxDepth {
		return bad(id, "more than %d pages deep", maxDepth)
	}
	b, err := p.page(id, true)
	if err != nil {
		return err
	}
	leaf, all, _, err := elements(id, b)
	if err != nil {
		return err
	}
	if depth > 0 && len(all) == 0 {
		return bad(id, "no entries")
	}
	for i, e := range all {
		if bytes.Compare(e.key, from) < 0 || below != nil && bytes.Compare(e.key, below) >= 0 {
			return bad(id, "the key of entry %d of %d is out of order", i, len(all))
		}
		if !leaf {
			next := below
			if i+1 < len(all) {
				next = all[i+1].key
			}
			if err := p.tree(e.child, e.key, next, depth+1, entry); err != nil {
				return err
			}
			continue
		}
		if p.last != nil && bytes.Compare(e.key, p.last) <= 0 {
			return bad(id, "the key of entry %d of %d is out of order", i, len(all))
		}
		p.last = e.key
		if err := entry(id, e.flags, e.key, e.val); err != nil {
			return err
		}
	}
	return nil
}

// again visits the entries of a tree that was walked.
func (p *pages) again(id uint64, depth int, entry func(page uint64, val []byte) error) error {
	b, err := p.page(id, false)
	if err != nil {
		return err
	}
	leaf, all, _, err := elements(id, b)
	if err != nil {
		return err
	}
	for _, e := range all {
		if leaf {
			err = entry(id, e.val)
		} else {
			err = p.again(e.child, depth+1, entry)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// bucket walks a bucket: its value is the page of its root, or 0 and, behind it, a small page itself.
func (p *pages) bucket(page uint64, val []byte) error {
	plain := func(page uint64, flags uint32, key, _ []byte) error {
		if flags != 0 {
			return bad(page, "entry %x has flags %#x", key, flags)
		}
		return nil
	}
	if root := binary.NativeEndian.Uint64(val); root != 0 {
		if len(val) != 16 {
			return bad(page, "a bucket of %d bytes", len(val))
		}
		return p.tree(root, nil, nil, 0, plain)
	}
	leaf, all, end, err := elements(page, val[16:])
	if err != nil {
		return err
	}
	if !leaf || end != len(val)-16 {
		return bad(page, "a bucket in it has %d bytes, and uses %d", len(val)-16, end)
	}
	var last []byte
	for _, e := range all {
		if last != nil && bytes.Compare(e.key, last) <= 0 {
			return bad(page, "the keys of a bucket in it are out of order")
		}
		if err := plain(page, e.flags, e.key, e.val); err != nil {
			return err
		}
		last = e.key
	}
	return nil
}
