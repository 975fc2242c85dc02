package audit

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"golang.org/x/sys/unix"

	"countersign.io/countersign/identity"
)

// FaultKind is what is wrong with a log.
type FaultKind string

// The kinds.
const (
	Altered    FaultKind = "altered"    // it is not what was written
	Dropped    FaultKind = "dropped"    // it is not there
	Reordered  FaultKind = "reordered"  // it is behind one that came later
	Inserted   FaultKind = "inserted"   // it is there twice, or has no place in the chain
	Restarted  FaultKind = "restarted"  // the log begins anew: what was before is not vouched for
	BadSigning FaultKind = "signature"  // a checkpoint's signature does not fit what it is to sign
	Foreign    FaultKind = "foreign"    // it is another member's
	Unreadable FaultKind = "unreadable" // a file cannot be read, or was set aside as damaged
)

// Fault is one thing that is wrong.
type Fault struct {
	File    string    `json:"file"`
	Line    int       `json:"line"`             // from 1; 0: the file as a whole
	Seq     uint64    `json:"seq"`              // of the first record concerned
	To      uint64    `json:"to,omitempty"`     // of the last, if there are several
	Kind    FaultKind `json:"kind"`             //
	Detail  string    `json:"detail,omitempty"` //
	Covered uint64    `json:"covered_by"`       // the first checkpoint with a good signature behind it; 0: none covers it
}

// String is the fault in a sentence.
func (f Fault) String() string {
	what := fmt.Sprintf("record %d", f.Seq)
	if f.To > f.Seq {
		what = fmt.Sprintf("records %d to %d", f.Seq, f.To)
	}
	s := fmt.Sprintf("%s, line %d: %s %s", f.File, f.Line, what, f.Kind)
	if f.Detail != "" {
		s += ": " + f.Detail
	}
	if f.Covered > 0 {
		return s + fmt.Sprintf(" (checkpoint %d covers it)", f.Covered)
	}
	return s + " (no checkpoint covers it)"
}

// Report is what a Verifier found.
type Report struct {
	Member      string    `json:"member"`
	Records     uint64    `json:"records"`
	First       uint64    `json:"first"`
	Last        uint64    `json:"last"`
	Begins      time.Time `json:"begins,omitzero"`
	Ends        time.Time `json:"ends,omitzero"`
	Checkpoints uint64    `json:"checkpoints"` // with a good signature; all of them if signatures are not checked
	Signed      uint64    `json:"signed"`      // the newest record that a checkpoint covers
	Unsigned    uint64    `json:"unsigned"`    // records behind it: whoever has the disk could have changed or cut those
	Removed     uint64    `json:"removed"`     // retention took away the records up to this one
	Torn        int       `json:"torn"`        // bytes of a last line without an end: a crash, or a write under way
	Faults      []Fault   `json:"faults"`      // in the order of the lines; at the most 100
	More        uint64    `json:"more_faults"` // beyond those
}

const maxFaults = 100

// VerifyConfig says what a Verifier goes by.
type VerifyConfig struct {
	// Roots is the trust bundle: what the checkpoints' certificates must lead to. nil: signatures are not checked.
	Roots *x509.CertPool
	// TrustDomain is that of the members; the zero one: any.
	TrustDomain spiffeid.TrustDomain
	// Whole says that the lines are all that a member has: records may be missing from the front only as far as its retention
	// has taken them away.
	Whole bool
	// Collected says that the lines are from a collector, which may have some twice and of several runs without files.
	Collected bool
}

// Verifier checks lines in the order in which they are given.
type Verifier struct {
	c VerifyConfig
	r Report

	begun bool
	last  place // of the record that the next one must follow
	hash  [sha256.Size]byte
	// junk: the last line was no record, so that what it was cannot be said.
	junk bool
	// doubt is the fault that the next line decides: whether the record before, or what this one says of it, was altered.
	doubt int
	gaps  []gap
	good  []uint64 // checkpoints
}

// place is where a record is.
type place struct {
	file string
	line int
	seq  uint64
}

// gap are records that were missing when a later one came: they may come yet.
type gap struct {
	span
	fault int
}

// NewVerifier makes a Verifier that has seen nothing.
func NewVerifier(c VerifyConfig) *Verifier { return &Verifier{c: c, doubt: -1} }

func (v *Verifier) fault(f Fault) int {
	if len(v.r.Faults) == maxFaults {
		v.r.More++
		return -1
	}
	v.r.Faults = append(v.r.Faults, f)
	return len(v.r.Faults) - 1
}

// Read checks all lines of r. The error is of reading.
func (v *Verifier) Read(file string, r io.Reader) error {
	_, err := v.read(file, r, spot{})
	return err
}

// spot is how far a file was read: bytes and lines of it.
type spot struct {
	offset int64
	lines  int
}

// read goes on from a spot, and returns the end of the last line that has one.
func (v *Verifier) read(file string, r io.Reader, at spot) (spot, error) {
	in := bufio.NewReaderSize(r, MaxLine)
	v.r.Torn = 0
	for {
		line, err := in.ReadSlice('\n')
		size := len(line)
		switch {
		case errors.Is(err, io.EOF):
			v.r.Torn = size
			return at, nil
		case errors.Is(err, bufio.ErrBufferFull):
			for errors.Is(err, bufio.ErrBufferFull) {
				line, err = in.ReadSlice('\n')
				size += len(line)
			}
			v.Line(file, at.lines+1, nil)
		case err != nil:
			return at, fmt.Errorf("reading %s: %w", file, err)
		default:
			v.Line(file, at.lines+1, line[:size-1])
		}
		at.offset, at.lines = at.offset+int64(size), at.lines+1
	}
}

// Line checks the next line, given without its end.
func (v *Verifier) Line(file string, n int, line []byte) {
	at := place{file: file, line: n, seq: v.last.seq + 1}
	r, err := Parse(line)
	if err != nil {
		v.fault(Fault{File: file, Line: n, Seq: at.seq, Kind: Altered, Detail: err.Error()})
		v.junk, v.doubt = true, -1
		return
	}
	hash := sha256.Sum256(line)
	prev, _ := parseHash(r.Prev)
	at.seq = r.Seq
	v.r.Records++
	if v.r.Begins.IsZero() {
		v.r.Begins, v.r.Member = r.Time, r.Member
	}
	v.r.Ends = r.Time
	if r.Member != v.r.Member {
		v.fault(Fault{File: file, Line: n, Seq: r.Seq, Kind: Foreign, Detail: fmt.Sprintf("it is of member %q, the log of %q", r.Member, v.r.Member)})
	}
	if !v.follows(at, prev, hash) {
		return
	}
	v.begun, v.junk, v.last, v.hash = true, false, at, hash
	v.r.Last = max(v.r.Last, r.Seq)
	if r.Action == LogRemoved {
		if upTo, err := strconv.ParseUint(r.Details.Get("up_to"), 10, 64); err == nil {
			v.r.Removed = max(v.r.Removed, upTo)
		}
	}
	if r.Checkpoint != nil {
		v.checkpoint(at, r)
	}
}

// follows checks a record's place in the chain; it reports whether the chain goes on from it.
func (v *Verifier) follows(at place, prev, hash [sha256.Size]byte) bool {
	zero := [sha256.Size]byte{}
	here := Fault{File: at.file, Line: at.line, Seq: at.seq}
	next := v.last.seq + 1
	doubt := v.doubt
	v.doubt = -1
	switch {
	case !v.begun:
		v.r.First = at.seq
		if v.junk && at.seq > 1 {
			v.r.First = at.seq - 1
		}
		if at.seq == 1 && prev != zero {
			here.Kind, here.Detail = Altered, "the first record follows another"
			v.fault(here)
		}
	case at.seq+1 == v.r.First && at.seq < next:
		here.Kind, here.Detail = Reordered, fmt.Sprintf("record %d is before it", v.last.seq)
		v.r.First = at.seq
		v.fault(here)
		return false
	case at.seq == 1 && prev == zero && hash != v.hash:
		if !v.c.Collected {
			here.Kind, here.Detail = Restarted, fmt.Sprintf("the log begins anew behind record %d", v.last.seq)
			v.fault(here)
		}
	case v.junk && (at.seq == next || at.seq == next+1): // the line between was named already
	case at.seq == next && prev == v.hash:
	case at.seq == next && doubt >= 0:
		f := &v.r.Faults[doubt]
		f.To, f.Detail = v.last.seq, "one of these was altered, or both"
	case at.seq == next:
		v.doubt = v.fault(Fault{File: v.last.file, Line: v.last.line, Seq: v.last.seq, Kind: Altered, Detail: "the record behind it has another hash of it"})
	case at.seq > next:
		f := v.fault(Fault{File: at.file, Line: at.line, Seq: next, To: at.seq - 1, Kind: Dropped, Detail: fmt.Sprintf("record %d is here", at.seq)})
		if len(v.gaps) < maxFaults {
			v.gaps = append(v.gaps, gap{span{next, at.seq - 1}, f})
		}
	default:
		v.late(here, hash)
		return false
	}
	return true
}

// late is for a record with the number of one that should have come before, or has.
func (v *Verifier) late(f Fault, hash [sha256.Size]byte) {
	for i, g := range v.gaps {
		if f.Seq < g.first || f.Seq > g.last {
			continue
		}
		f.Kind, f.Detail = Reordered, fmt.Sprintf("record %d is before it", v.last.seq)
		if g.fault >= 0 && g.first == g.last {
			v.r.Faults[g.fault] = f // it is not missing, then
			v.gaps = slices.Delete(v.gaps, i, i+1)
		} else {
			v.fault(f)
		}
		return
	}
	if v.c.Collected && hash == v.hash {
		v.r.Records--
		return
	}
	f.Kind, f.Detail = Inserted, fmt.Sprintf("record %d is before it", v.last.seq)
	v.fault(f)
}

func (v *Verifier) checkpoint(at place, r *Record) {
	if v.c.Roots != nil {
		if err := v.signature(r); err != nil {
			detail := err.Error() + ": something since the checkpoint before was altered and chained anew, or this checkpoint was"
			v.fault(Fault{File: at.file, Line: at.line, Seq: at.seq, Kind: BadSigning, Detail: detail})
			return
		}
	}
	v.r.Checkpoints++
	v.r.Signed = at.seq - 1
	v.good = append(v.good, at.seq)
}

// signature verifies a checkpoint as of its own time: certificates are short-lived.
func (v *Verifier) signature(r *Record) error {
	var certs []*x509.Certificate
	between := x509.NewCertPool()
	for i, der := range r.Checkpoint.Chain {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return fmt.Errorf("its chain cannot be read: %v", err)
		}
		certs = append(certs, c)
		if i > 0 {
			between.AddCert(c)
		}
	}
	if len(certs) == 0 {
		return errors.New("it has no chain")
	}
	leaf := certs[0]
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: v.c.Roots, Intermediates: between, CurrentTime: r.Time, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
		return fmt.Errorf("its chain does not lead to the trust bundle: %v", err)
	}
	id, err := x509svid.IDFromCert(leaf)
	if err != nil {
		return err
	}
	want, err := identity.MemberID(id.TrustDomain(), r.Member)
	if err != nil || id != want || !v.c.TrustDomain.IsZero() && id.TrustDomain() != v.c.TrustDomain {
		return fmt.Errorf("it is signed by %s, not by member %q of the trust domain", id, r.Member)
	}
	alg := x509.ECDSAWithSHA256
	if leaf.PublicKeyAlgorithm == x509.RSA {
		alg = x509.SHA256WithRSA
	}
	if err := leaf.CheckSignature(alg, SignedBytes(r.Member, r.Seq, r.Prev), r.Checkpoint.Signature); err != nil {
		return errors.New("the signature is not of what is before it")
	}
	return nil
}

// Done ends the check.
func (v *Verifier) Done() Report {
	r := v.r
	if v.c.Whole && v.begun && r.First > 1 && r.Removed < r.First-1 {
		f := Fault{Line: 1, Seq: r.Removed + 1, To: r.First - 1, Kind: Dropped, Detail: "the log does not say that its retention took them away"}
		r.Faults = append([]Fault{f}, r.Faults...)
	}
	for i := range r.Faults {
		f := &r.Faults[i]
		if n := slices.IndexFunc(v.good, func(seq uint64) bool { return seq > f.Seq }); n >= 0 {
			f.Covered = v.good[n]
		}
	}
	if r.Last > r.Signed {
		r.Unsigned = r.Last - r.Signed
		if r.Signed > 0 {
			r.Unsigned-- // the checkpoint itself
		}
	}
	return r
}

// VerifyDir checks the files of a member's folder, which may be in use.
func VerifyDir(dir string, c VerifyConfig) (Report, error) {
	c.Whole = true
	v := NewVerifier(c)
	var newest uint64 // file that was the last when it was read, up to at
	var at spot
	for next := uint64(1); ; {
		files, err := listFiles(dir)
		if err != nil {
			return Report{}, fmt.Errorf("verifying %s: %w", dir, err)
		}
		files = slices.DeleteFunc(files, func(first uint64) bool { return first < next })
		if len(files) == 0 || len(files) == 1 && files[0] == newest {
			break // or the member has begun another one meanwhile, and before that written more into this one
		}
		if next = files[0]; next != newest {
			at = spot{}
		}
		at, err = v.file(filepath.Join(dir, fileName(next)), at, len(files) == 1)
		if err != nil && !errors.Is(err, fs.ErrNotExist) { // which retention took away meanwhile
			return Report{}, err
		}
		if newest = next; len(files) > 1 {
			next++
		}
	}
	if names, err := os.ReadDir(dir); err == nil {
		for _, n := range names {
			if strings.HasSuffix(n.Name(), fileSuffix+damagedSuffix) {
				v.fault(Fault{File: n.Name(), Kind: Unreadable, Detail: "the member found it damaged and set it aside"})
			}
		}
	}
	return v.Done(), nil
}

// VerifyFiles checks files, in the order of their records.
func VerifyFiles(paths []string, c VerifyConfig) (Report, error) {
	v := NewVerifier(c)
	for i, path := range paths {
		if _, err := v.file(path, spot{}, i == len(paths)-1); err != nil {
			return Report{}, err
		}
	}
	return v.Done(), nil
}

func (v *Verifier) file(path string, at spot, last bool) (spot, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return at, fmt.Errorf("verifying the log: %w", err)
	}
	defer f.Close()
	var lines io.Reader = f
	if info, err := f.Stat(); err == nil && info.Mode().IsRegular() {
		end, err := dataEnd(f)
		if err != nil {
			return at, fmt.Errorf("verifying the log: %w", err)
		}
		lines = io.NewSectionReader(f, at.offset, max(0, end-at.offset))
	}
	name := filepath.Base(path)
	if at, err = v.read(name, lines, at); err != nil {
		return at, err
	}
	if v.r.Torn > 0 && !last {
		v.fault(Fault{File: name, Seq: v.last.seq + 1, Kind: Altered, Detail: "the file ends in the middle of a line, and there is another behind it"})
		v.junk = true
	}
	return at, nil
}

// Hash is the hex of a line's hash, as the record behind it has it.
func Hash(line []byte) string {
	h := sha256.Sum256(bytes.TrimSuffix(line, []byte{'\n'}))
	return hex.EncodeToString(h[:])
}
