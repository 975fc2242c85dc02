package store

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"countersign.io/countersign/identity"
)

// Summary is what a snapshot holds.
type Summary struct {
	TrustDomain string
	Revision    uint64 // the log index that it is the state of
	Sequence    uint64 // of the bundle
	Level       uint32 // see Level
	Bytes       int64  // of the snapshot

	Entries      int
	KubeClusters int
	JoinTokens   int
	Agents       int
	Banned       int // of the agents
	Authorities  int
	Members      int
	SealTerms    int
	Foreign      int
	Federations  int
}

// Inspect reads a snapshot to its end and verifies it, in memory that does not grow with it; an error names the byte. Two things
// only Restore finds: two entries that duplicate each other and two join tokens of one ID, which no store writes.
func Inspect(r io.Reader) (Summary, error) {
	in := newSnapshotReader(r)
	h, err := in.header()
	if err != nil {
		return Summary{}, fmt.Errorf("inspecting a snapshot: %w", err)
	}
	s := newSummarizer(h)
	if err := in.each(func(k kind, key string, value []byte) error { _, err := s.add(k, key, value); return err }); err != nil {
		return Summary{}, fmt.Errorf("inspecting a snapshot: %w", err)
	}
	out, err := s.done(in.off)
	if err != nil {
		return Summary{}, fmt.Errorf("inspecting a snapshot: %w", err)
	}
	return out, nil
}

// RewriteOptions say how a snapshot becomes the beginning of a restored cluster.
type RewriteOptions struct {
	// Now is the restorer's clock: the bundle's sequence goes on above it in Unix seconds, which is above whatever the
	// cluster gave since the snapshot, at less than one change a second.
	Now time.Time
	// Revision is the one that the state gets; 0: the snapshot's own. One below that is refused.
	Revision uint64
	// TrustDomain refuses a snapshot of another one; the zero value takes any.
	TrustDomain spiffeid.TrustDomain
}

// Rewrite copies a snapshot with another revision, a bundle sequence that was never given, and every join token spent: one that
// was used after the snapshot was taken must not admit again. All else stays. It verifies what it reads as Inspect does; after
// an error what it wrote is no snapshot, and is to be thrown away. The Summary is of what it wrote.
func Rewrite(w io.Writer, r io.Reader, o RewriteOptions) (Summary, error) {
	s, err := rewrite(w, r, o)
	if err != nil {
		return Summary{}, fmt.Errorf("rewriting a snapshot: %w", err)
	}
	return s, nil
}

func rewrite(w io.Writer, r io.Reader, o RewriteOptions) (Summary, error) {
	if o.Now.Unix() <= 0 || storable(o.Now.UTC()) != nil {
		return Summary{}, fmt.Errorf("%w: the time of the restore is %s: set this machine's clock", identity.ErrInvalid, o.Now.Format(time.RFC3339))
	}
	in := newSnapshotReader(r)
	h, err := in.header()
	if err != nil {
		return Summary{}, err
	}
	if !o.TrustDomain.IsZero() && h.trustDomain != o.TrustDomain.Name() {
		return Summary{}, fmt.Errorf("%w: the snapshot is of trust domain %q, not %q", identity.ErrInvalid, h.trustDomain, o.TrustDomain.Name())
	}
	if o.Revision != 0 && o.Revision < h.revision {
		return Summary{}, fmt.Errorf("%w: revision %d is below the snapshot's own, %d", identity.ErrInvalid, o.Revision, h.revision)
	}
	if h.sequence == math.MaxUint64 {
		return Summary{}, fmt.Errorf("%w: the snapshot has the last bundle sequence there is", identity.ErrInvalid)
	}
	s := newSummarizer(h) // checks records by the old revision
	h.revision, h.sequence = max(h.revision, o.Revision), max(h.sequence+1, uint64(o.Now.Unix()))
	b := bufio.NewWriterSize(w, 1<<16)
	out := newSnapshotWriter(b)
	out.header(h.trustDomain, h.revision, h.sequence)
	err = in.each(func(k kind, key string, value []byte) error {
		v, err := s.add(k, key, value)
		if err != nil {
			return err
		}
		if j, ok := v.(*identity.JoinToken); ok && j.UsedAt.IsZero() {
			j.UsedAt = o.Now.UTC()
			if value, err = json.Marshal(j); err != nil {
				return err
			}
		}
		out.record(k, []byte(key), value)
		return out.err
	})
	if out.err != nil {
		return Summary{}, fmt.Errorf("writing at offset %d: %w", out.n, out.err)
	}
	if err != nil {
		return Summary{}, err
	}
	if _, err := s.done(0); err != nil {
		return Summary{}, err
	}
	out.trailer()
	if out.err == nil {
		out.err = b.Flush()
	}
	if out.err != nil {
		return Summary{}, fmt.Errorf("writing at offset %d: %w", out.n, out.err)
	}
	s.Revision, s.Sequence = h.revision, h.sequence
	return s.done(out.n)
}

// summarizer checks and counts records.
type summarizer struct {
	Summary
	recordChecker
}

func newSummarizer(h snapshotHeader) *summarizer {
	return &summarizer{Summary: Summary{TrustDomain: h.trustDomain, Revision: h.revision, Sequence: h.sequence}}
}

func (s *summarizer) add(k kind, key string, value []byte) (any, error) {
	v, err := s.decode(k, key, value)
	if err != nil {
		return nil, err
	}
	var revision uint64
	switch r := v.(type) {
	case *entryRecord:
		s.Entries++
		revision = max(r.Created, r.Revision)
	case *identity.KubeCluster:
		s.KubeClusters++
		revision = r.Revision
	case *identity.JoinToken:
		s.JoinTokens++
	case *identity.Agent:
		s.Agents++
		if r.Banned {
			s.Banned++
		}
		revision = r.Revision
	case *identity.Authority:
		s.Authorities++
		revision = r.Revision
	case *identity.Member:
		s.Members++
	case *identity.SealTerm:
		s.SealTerms++
		revision = r.Revision
	case *identity.Foreign:
		s.Foreign++
		revision = r.Revision
	case *identity.Rotation:
		revision = r.Revision
	case *identity.Federation:
		s.Federations++
		revision = r.Revision
		if r.Bundle != nil {
			revision = max(revision, r.Bundle.Revision)
		}
	}
	if revision > s.Revision {
		return nil, fmt.Errorf("a record of revision %d in a state of revision %d", revision, s.Revision)
	}
	return v, nil
}

func (s *summarizer) done(bytes int64) (Summary, error) {
	s.Summary.Level, s.Bytes = max(s.recordChecker.level, 1), bytes
	return s.Summary, s.end()
}
