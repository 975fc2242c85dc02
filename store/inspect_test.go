package store

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"reflect"
	"runtime"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"countersign.io/countersign/identity"
)

var restoreTime = time.Date(2026, 11, 5, 8, 0, 0, 0, time.FixedZone("", 3600))

func TestInspect(t *testing.T) {
	s := openAt(t, stateDir(t))
	s.ApplyBatch(randomCommands(rand.New(rand.NewPCG(3, 1)), 1500))
	raw := snapshotOf(t, s)
	got, err := Inspect(iotest.HalfReader(bytes.NewReader(raw)))
	if err != nil {
		t.Fatal(err)
	}
	entries, _ := s.Entries("", 1000)
	agents, _ := s.Agents("", 1000)
	banned := 0
	for _, a := range agents {
		if a.Banned {
			banned++
		}
	}
	want := Summary{
		TrustDomain: "example.org", Revision: s.Revision(), Sequence: s.Bundle().Sequence, Level: 2, Bytes: int64(len(raw)),
		Entries: len(entries), KubeClusters: len(s.KubeClusters()), JoinTokens: got.JoinTokens, Agents: len(agents), Banned: banned, Authorities: len(s.Authorities()),
		Members: len(s.Members()), SealTerms: len(s.SealTerms()), Foreign: len(s.Foreign()), Federations: len(s.Federations()),
	}
	if got != want || got.JoinTokens == 0 || got.SealTerms == 0 || got.Agents == 0 || got.Federations == 0 {
		t.Errorf("got %+v\nwant %+v", got, want)
	}
	empty := openAt(t, stateDir(t))
	if got, err := Inspect(bytes.NewReader(snapshotOf(t, empty))); err != nil || got != (Summary{TrustDomain: "example.org", Level: 1, Bytes: int64(len(snapshotOf(t, empty)))}) {
		t.Errorf("of nothing: %+v, %v", got, err)
	}
}

// Every flipped byte and every cut is found, and nothing is rewritten from it.
func TestInspectFindsDamage(t *testing.T) {
	src, w, _ := newStore2(t)
	must[identity.Entry](t)(w.CreateEntry(t.Context(), now, entryFor("e", "/e", "k8s:ns:x")))
	if err := w.CreateJoinToken(t.Context(), token("t", identity.JoinAgent, now)); err != nil {
		t.Fatal(err)
	}
	good := snapshotOf(t, src)
	check := func(what string, raw []byte) {
		t.Helper()
		_, err := Inspect(bytes.NewReader(raw))
		var b bytes.Buffer
		_, rewriteErr := Rewrite(&b, bytes.NewReader(raw), RewriteOptions{Now: restoreTime})
		for _, err := range []error{err, rewriteErr} {
			if !errors.Is(err, identity.ErrInvalid) || !strings.Contains(err.Error(), "offset") && !strings.Contains(err.Error(), "format") {
				t.Fatalf("%s: %v", what, err)
			}
		}
		if _, err := Inspect(&b); err == nil {
			t.Fatalf("%s: what was written is a snapshot", what)
		}
	}
	for i := range good {
		bad := bytes.Clone(good)
		bad[i] ^= 1 << (i % 8)
		check(fmt.Sprint("a flipped bit in byte ", i), bad)
		check(fmt.Sprint("cut at ", i), good[:i])
	}
	check("more at the end", append(bytes.Clone(good), 0))
	bad := bytes.Clone(good)
	bad[snapshotHeaderBytes+20] ^= 1
	_, err := Inspect(bytes.NewReader(bad))
	wantErr(t, err, identity.ErrInvalid, fmt.Sprintf("damaged at offset %d", snapshotHeaderBytes))
	_, err = Inspect(bytes.NewReader(writeSnapshot(record{kindMember, "m", `{"id":"n","address":"h:1"}`})))
	wantErr(t, err, identity.ErrInvalid, `has the key "m"`, "damaged at offset ")
	_, err = Inspect(bytes.NewReader(writeSnapshot(record{kindAgent, "a", `{"id":"a","kind":"kube","revision":8}`})))
	wantErr(t, err, identity.ErrInvalid, "revision 8 in a state of revision 7")
	if _, err := Inspect(iotest.TimeoutReader(bytes.NewReader(good))); !errors.Is(err, iotest.ErrTimeout) {
		t.Errorf("a reader's error came back as %v", err)
	}
}

func TestRewrite(t *testing.T) {
	s := openAt(t, stateDir(t))
	s.ApplyBatch(randomCommands(rand.New(rand.NewPCG(3, 1)), 1500))
	w := s.Writer(&directLog{s: s, index: s.Revision()})
	fresh, used := token("fresh", identity.JoinAgent, now.Add(1e16)), token("used", identity.JoinAgent, now.Add(1e16))
	for _, j := range []identity.JoinToken{fresh, used} {
		if err := w.CreateJoinToken(t.Context(), j); err != nil {
			t.Fatal(err)
		}
	}
	must[identity.JoinToken](t)(w.UseJoinToken(t.Context(), now, used.Hash, identity.JoinAgent))
	raw := snapshotOf(t, s)
	before, err := Inspect(bytes.NewReader(raw))
	if err != nil {
		t.Fatal(err)
	}
	for _, revision := range []uint64{0, before.Revision, before.Revision + 1000} {
		var b bytes.Buffer
		sum, err := Rewrite(&b, bytes.NewReader(raw), RewriteOptions{Now: restoreTime, Revision: revision, TrustDomain: td})
		if err != nil {
			t.Fatal(err)
		}
		want := before
		want.Revision, want.Sequence, want.Bytes = max(revision, before.Revision), uint64(restoreTime.Unix()), int64(b.Len())
		if again, err := Inspect(bytes.NewReader(b.Bytes())); err != nil || sum != want || again != want {
			t.Fatalf("%v\ngot  %+v\nsays %+v\nwant %+v", err, again, sum, want)
		}
		n := openAt(t, stateDir(t))
		if err := n.Restore(&b); err != nil {
			t.Fatal(err)
		}
		checkConsistent(t, n)
		if index, _ := n.AppliedIndex(); index != want.Revision || n.Bundle().Sequence != want.Sequence {
			t.Errorf("restored at %d, bundle %d", index, n.Bundle().Sequence)
		}
		for _, same := range []func(*Store) any{
			func(s *Store) any { page, _ := s.Entries("", 1000); return page }, func(s *Store) any { page, _ := s.Agents("", 1000); return page },
			func(s *Store) any { return s.KubeClusters() }, func(s *Store) any { return s.Authorities() }, func(s *Store) any { return s.Members() },
			func(s *Store) any { return s.SealTerms() }, func(s *Store) any { return s.Foreign() }, func(s *Store) any { return s.Level() }, func(s *Store) any { return s.Rotations() },
		} {
			if !reflect.DeepEqual(same(n), same(s)) {
				t.Errorf("restored %+v\nof %+v", same(n), same(s))
			}
		}
		w := n.Writer(&directLog{s: n, index: n.Revision()})
		_, err = w.AdmitAgent(t.Context(), now, fresh.Hash, agent("thief"))
		wantErr(t, err, identity.ErrPrecondition, "was used at 2026-11-05T07:00:00Z")
		_, err = w.AdmitAgent(t.Context(), now, used.Hash, agent("thief"))
		wantErr(t, err, identity.ErrPrecondition, "was used at 2026-03-01T12:00:00Z")
		must[identity.Authority](t)(w.PrepareAuthority(t.Context(), now, prepared(identity.AuthorityX509, "after")))
		if n.Bundle().Sequence != want.Sequence+1 {
			t.Errorf("the bundle goes on at %d", n.Bundle().Sequence)
		}
	}
}

func TestRewriteSequence(t *testing.T) {
	for old, want := range map[uint64]uint64{1: uint64(restoreTime.Unix()), uint64(restoreTime.Unix()): uint64(restoreTime.Unix()) + 1, 1 << 60: 1<<60 + 1} {
		var in, out bytes.Buffer
		sw := newSnapshotWriter(&in)
		sw.header("example.org", 5, old)
		sw.trailer()
		if got, err := Rewrite(&out, &in, RewriteOptions{Now: restoreTime}); err != nil || got.Sequence != want {
			t.Errorf("after %d comes %d, %v; want %d", old, got.Sequence, err, want)
		}
	}
}

func TestRewriteRefuses(t *testing.T) {
	raw := snapshotOf(t, filled(t))
	sum, err := Inspect(bytes.NewReader(raw))
	if err != nil {
		t.Fatal(err)
	}
	var last bytes.Buffer
	sw := newSnapshotWriter(&last)
	sw.header("example.org", 5, math.MaxUint64)
	sw.trailer()
	for _, c := range []struct {
		name string
		in   []byte
		o    RewriteOptions
		want string
	}{
		{"another trust domain", raw, RewriteOptions{Now: restoreTime, TrustDomain: spiffeid.RequireTrustDomainFromString("other.org")}, `of trust domain "example.org", not "other.org"`},
		{"a revision that was there", raw, RewriteOptions{Now: restoreTime, Revision: sum.Revision - 1}, "below the snapshot's own"},
		{"no clock", raw, RewriteOptions{}, "clock"},
		{"a clock beyond time", raw, RewriteOptions{Now: time.Unix(1<<40, 0)}, "clock"},
		{"the last sequence", last.Bytes(), RewriteOptions{Now: restoreTime}, "last bundle sequence"},
		{"level 1 with more", writeSnapshot(record{kindForeign, "upstream", `{"source":"upstream"}`}), RewriteOptions{Now: restoreTime}, "level 1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var b bytes.Buffer
			_, err := Rewrite(&b, bytes.NewReader(c.in), c.o)
			wantErr(t, err, identity.ErrInvalid, c.want)
			if _, err := Inspect(&b); err == nil {
				t.Error("what was written is a snapshot")
			}
		})
	}
	full := errors.New("disk full")
	_, err = Rewrite(writerFunc(func([]byte) (int, error) { return 0, full }), bytes.NewReader(raw), RewriteOptions{Now: restoreTime})
	if !errors.Is(err, full) || errors.Is(err, identity.ErrInvalid) || !strings.Contains(err.Error(), "offset") {
		t.Errorf("got %v", err)
	}
}

// manyTokens streams a snapshot of n join tokens and holds none of them.
func manyTokens(n int) io.Reader {
	r, w := io.Pipe()
	go func() {
		out := newSnapshotWriter(w)
		out.header("example.org", 7, 1)
		for i := range n {
			hash := binary.BigEndian.AppendUint64(make([]byte, sha256.Size-8), uint64(i))
			out.record(kindJoinToken, hash, fmt.Appendf(nil, `{"id":"t%d","hash":%q,"purpose":"agent","expires_at":"2026-01-01T00:00:00Z"}`, i, base64.StdEncoding.EncodeToString(hash)))
		}
		out.trailer()
		w.CloseWithError(out.err)
	}()
	return r
}

// What a snapshot takes in memory does not depend on its length.
func TestInspectAndRewriteStream(t *testing.T) {
	peak := func(n int, f func(io.Reader) (Summary, error)) uint64 {
		var high, m runtime.MemStats
		sum, err := f(readerFunc(func(r io.Reader) func([]byte) (int, error) {
			calls := 0
			return func(p []byte) (int, error) {
				if calls++; calls%16384 == 0 {
					runtime.GC()
					if runtime.ReadMemStats(&m); m.HeapAlloc > high.HeapAlloc {
						high = m
					}
				}
				return r.Read(p)
			}
		}(manyTokens(n))))
		if err != nil || sum.JoinTokens != n {
			t.Fatalf("%+v, %v", sum, err)
		}
		return high.HeapAlloc
	}
	for name, f := range map[string]func(io.Reader) (Summary, error){
		"inspect": Inspect,
		"rewrite": func(r io.Reader) (Summary, error) { return Rewrite(io.Discard, r, RewriteOptions{Now: restoreTime}) },
	} {
		few, many := peak(4_000, f), peak(40_000, f)
		if many > few+few/2+(1<<20) { // ten times the records, 6 MB more
			t.Errorf("%s: %d bytes in use, and %d with ten times the records", name, few, many)
		}
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }
