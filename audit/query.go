package audit

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"countersign.io/countersign/identity"
)

// Filter selects records. What is empty selects all.
type Filter struct {
	Since, Until time.Time // Until is not included
	Actions      []Action  // one that ends with "." selects all that begin with it
	Outcome      Outcome
	Who          string // a part of the ID, serial, uid or address of who did it
	Subject      string // a part of what it was done to, of the entry, or of the request
}

// empty reports whether every line is selected, without looking into it.
func (f *Filter) empty() bool {
	return f.Since.IsZero() && f.Until.IsZero() && len(f.Actions) == 0 && f.Outcome == "" && f.Who == "" && f.Subject == ""
}

// Match reports whether the filter selects a record.
func (f *Filter) Match(r *Record) bool {
	if !f.Since.IsZero() && r.Time.Before(f.Since) || !f.Until.IsZero() && !r.Time.Before(f.Until) {
		return false
	}
	if len(f.Actions) > 0 && !slices.ContainsFunc(f.Actions, func(a Action) bool {
		return r.Action == a || strings.HasSuffix(string(a), ".") && strings.HasPrefix(string(r.Action), string(a))
	}) {
		return false
	}
	if f.Outcome != "" && r.Outcome != f.Outcome {
		return false
	}
	part := func(of string) func(string) bool { return func(s string) bool { return strings.Contains(s, of) } }
	if f.Who != "" && !slices.ContainsFunc([]string{r.Who.ID, r.Who.Serial, r.Who.Address, r.Who.UID, r.Who.Kind}, part(f.Who)) {
		return false
	}
	return f.Subject == "" || slices.ContainsFunc(r.Subjects, part(f.Subject)) || slices.ContainsFunc(r.Workload, part(f.Subject)) ||
		slices.ContainsFunc([]string{r.Entry, r.Serial, r.RequestID}, part(f.Subject))
}

// Query is what Log.Query is asked.
type Query struct {
	Filter
	Tail   int  // only the newest so many, at the most 10,000; 0: all
	Follow bool // go on with what is recorded from now on
}

// MaxTail bounds Query.Tail.
const MaxTail = 10000

// slack is how far records in a file may be before the time of the file's first: clocks are set.
const slack = time.Hour

// Query calls f with the selected lines of this member's files (without their end), in order, until there are no more, or,
// following, until ctx ends. It reads what is durable only, and holds up nobody however slow f is; files that retention takes
// away meanwhile are passed over. Lines that are no records, by damage, are given if the filter is empty.
func (l *Log) Query(ctx context.Context, q Query, f func(line []byte) error) error {
	if l.files == nil {
		return fmt.Errorf("%w: this member keeps no audit files (audit.file.off): ask where its records are sent", identity.ErrPrecondition)
	}
	if q.Tail < 0 || q.Tail > MaxTail {
		return fmt.Errorf("%w: the newest %d records: at the most %d", identity.ErrInvalid, q.Tail, MaxTail)
	}
	r := &reader{l: l, filter: &q.Filter, ctx: ctx}
	l.mu.Lock()
	r.more = l.durable
	l.mu.Unlock()
	r.current, r.size = l.files.end()
	var err error
	if q.Tail > 0 {
		err = r.tail(q.Tail, f)
	} else {
		err = r.all(f)
	}
	if err == nil && q.Follow {
		err = r.follow(f)
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return err
}

// reader reads along with the writer. current and size are how far there is something to read, as last seen.
type reader struct {
	l       *Log
	ctx     context.Context
	filter  *Filter
	more    <-chan struct{} // closed when there is more than that
	current uint64
	size    int64
	at      uint64 // the file that follow goes on in
	offset  int64
}

// list are the files to read, the current one last.
func (r *reader) list() ([]uint64, error) {
	all, err := listFiles(r.l.files.dir)
	if err != nil {
		return nil, err
	}
	all = slices.DeleteFunc(all, func(first uint64) bool { return first > r.current })
	return all, nil
}

func (r *reader) all(f func([]byte) error) error {
	files, err := r.list()
	if err != nil {
		return err
	}
	for i, first := range files {
		if !r.filter.Since.IsZero() && i+1 < len(files) {
			if t, ok := r.begins(files[i+1]); ok && t.Add(slack).Before(r.filter.Since) {
				continue
			}
		}
		if err := r.read(first, f); err != nil {
			return err
		}
	}
	r.at, r.offset = r.current, r.size
	return nil
}

// begins is the time of a file's first record.
func (r *reader) begins(first uint64) (t time.Time, ok bool) {
	file, err := os.Open(r.l.files.path(first))
	if err != nil {
		return t, false
	}
	defer file.Close()
	line, err := bufio.NewReaderSize(file, MaxLine).ReadSlice('\n')
	if err != nil {
		return t, false
	}
	rec, err := Parse(line)
	if err != nil {
		return t, false
	}
	return rec.Time, true
}

// tail reads from the newest file back until there are n lines.
func (r *reader) tail(n int, f func([]byte) error) error {
	files, err := r.list()
	if err != nil {
		return err
	}
	var newest [][]byte
	for i := len(files) - 1; i >= 0 && len(newest) < n; i-- {
		want := n - len(newest)
		var of [][]byte
		if err := r.read(files[i], func(line []byte) error {
			if of = append(of, bytes.Clone(line)); len(of) >= 2*want {
				of = append(of[:0], of[len(of)-want:]...)
			}
			return nil
		}); err != nil {
			return err
		}
		newest = append(of[max(0, len(of)-want):len(of):len(of)], newest...)
	}
	for _, line := range newest {
		if err := f(line); err != nil {
			return err
		}
	}
	r.at, r.offset = r.current, r.size
	return nil
}

// read reads one file: to its end, or the current one as far as it is durable.
func (r *reader) read(first uint64, f func([]byte) error) error {
	limit := int64(-1)
	if first == r.current {
		limit = r.size
	}
	_, err := r.readFrom(first, 0, limit, f)
	return err
}

// readFrom returns how far it came.
func (r *reader) readFrom(first uint64, offset, limit int64, f func([]byte) error) (int64, error) {
	file, err := os.OpenFile(r.l.files.path(first), os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return offset, nil // retention was faster
	}
	if err != nil {
		return offset, err
	}
	defer file.Close()
	if _, err = file.Seek(offset, io.SeekStart); err != nil {
		return offset, err
	}
	if limit < 0 {
		if limit, err = dataEnd(file); err != nil {
			return offset, err
		}
	}
	in := bufio.NewReaderSize(io.LimitReader(file, limit-offset), MaxLine)
	for {
		if r.ctx.Err() != nil {
			return offset, r.ctx.Err()
		}
		line, err := in.ReadSlice('\n')
		if errors.Is(err, bufio.ErrBufferFull) {
			return offset, fmt.Errorf("%w: %s holds a line that is no record: run countersign audit verify", identity.ErrInvalid, filepath.Base(file.Name()))
		}
		if err != nil {
			if errors.Is(err, io.EOF) {
				return offset, nil
			}
			return offset, err
		}
		offset += int64(len(line))
		if err := r.pass(line[:len(line)-1], f); err != nil {
			return offset, err
		}
	}
}

func (r *reader) pass(line []byte, f func([]byte) error) error {
	if !r.filter.empty() {
		rec, err := Parse(line)
		if err != nil || !r.filter.Match(rec) {
			return nil
		}
	}
	return f(line)
}

// follow goes on from where the others ended.
func (r *reader) follow(f func([]byte) error) error {
	for {
		select {
		case <-r.ctx.Done():
			return r.ctx.Err()
		case <-r.more:
		}
		r.l.mu.Lock()
		r.more = r.l.durable
		r.l.mu.Unlock()
		r.current, r.size = r.l.files.end()
		files, err := r.list()
		if err != nil {
			return err
		}
		for _, first := range files {
			if first < r.at {
				continue
			}
			from := int64(0)
			if first == r.at {
				from = r.offset
			}
			limit := int64(-1)
			if first == r.current {
				limit = r.size
			}
			end, err := r.readFrom(first, from, limit, f)
			if err != nil {
				return err
			}
			r.at, r.offset = first, end
		}
	}
}
