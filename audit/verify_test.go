package audit

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// signedLog is a log of 15 issuances with checkpoints every 5 records, in one file.
func signedLog(t testing.TB) (all [][]byte, s *testSigner) {
	t.Helper()
	dir := privateDir(t)
	s = newSigner(t, "m1")
	l := start(t, dir, func(c *Config) { c.Sign, c.CheckpointRecords = s.sign, 5 })
	for range 3 {
		record(t, l.Log, 5)
	}
	if err := l.stop(); err != nil {
		t.Fatal(err)
	}
	return lines(t, dir), s
}

func verify(t testing.TB, all [][]byte, c VerifyConfig) Report {
	t.Helper()
	v := NewVerifier(c)
	if err := v.Read("log", bytes.NewReader(bytes.Join(all, nil))); err != nil {
		t.Fatal(err)
	}
	return v.Done()
}

// rechain gives lines from i on the hashes of what is before them, as somebody would who owns the disk.
func rechain(t testing.TB, all [][]byte, i int) {
	t.Helper()
	for ; i < len(all); i++ {
		r, err := Parse(all[i])
		if err != nil {
			t.Fatal(err)
		}
		prev, _ := parseHash(Hash(all[i-1]))
		all[i] = append(appendBody(appendPrefix(nil, r.Seq, &prev), r.Member, &r.Event, r.Checkpoint), '\n')
	}
}

// TestTampering: each kind, at each record that it can be seen at, is named.
func TestTampering(t *testing.T) {
	good, s := signedLog(t)
	c := VerifyConfig{Roots: s.roots, TrustDomain: spiffeid.RequireTrustDomainFromString("example.org"), Whole: true}
	if rep := verify(t, good, c); len(rep.Faults) > 0 || rep.Checkpoints < 3 {
		t.Fatalf("%+v", rep)
	}
	isCheckpoint := func(i int) bool { return bytes.Contains(good[i], []byte(`"audit.checkpoint"`)) }
	last := len(good) - 1
	edit := func(line []byte) []byte { return bytes.Replace(line, []byte(`"ok"`), []byte(`"no"`), 1) }
	for i := range good {
		seq := uint64(i + 1)
		for _, tc := range []struct {
			name string
			do   func([][]byte) [][]byte
			kind FaultKind
			line int
			seq  uint64
		}{
			{"altered", func(a [][]byte) [][]byte { a[i] = edit(a[i]); return a }, Altered, i + 1, seq},
			{"made unreadable", func(a [][]byte) [][]byte { a[i] = append(slices.Clone(a[i][1:]), '\n'); return a }, Altered, i + 1, seq},
			{"dropped", func(a [][]byte) [][]byte { return slices.Delete(a, i, i+1) }, Dropped, i + 1, seq},
			{"repeated", func(a [][]byte) [][]byte { return slices.Insert(a, i, a[i]) }, Inserted, i + 2, seq},
			{"moved back", func(a [][]byte) [][]byte { a[i], a[i-1] = a[i-1], a[i]; return a }, Reordered, i + 1, seq - 1},
			{"altered and chained anew", func(a [][]byte) [][]byte { a[i] = edit(a[i]); rechain(t, a, i+1); return a }, BadSigning, 0, 0},
		} {
			switch {
			case tc.kind == Reordered && i == 0, tc.kind == Dropped && i == 0, tc.kind == Dropped && i == last:
				continue // nothing is before it; the front and the end are below
			case tc.kind == Altered && tc.name == "altered" && i == last:
				tc.kind = BadSigning // the last checkpoint's outcome is not signed by it, but it is the last line: nothing can tell
				continue
			case tc.kind == BadSigning && i == last:
				continue
			}
			rep := verify(t, tc.do(slices.Clone(good)), c)
			if len(rep.Faults) == 0 {
				t.Errorf("%s record %d: nothing is found", tc.name, seq)
				continue
			}
			f := rep.Faults[0]
			if f.Kind != tc.kind || tc.line > 0 && f.Line != tc.line || tc.seq > 0 && f.Seq != tc.seq {
				t.Errorf("%s record %d: %s", tc.name, seq, f)
			}
			if !isCheckpoint(i) && i < last-1 && (f.Covered == 0) && tc.kind != BadSigning {
				t.Errorf("%s record %d: a checkpoint behind it covers it: %s", tc.name, seq, f)
			}
			if len(rep.Faults) > 2 && tc.kind != BadSigning {
				t.Errorf("%s record %d: %d faults: %v", tc.name, seq, len(rep.Faults), rep.Faults)
			}
		}
	}
}

// TestTamperingWithTheEnds: the front is told by what retention said, the end only by somebody who knows more.
func TestTamperingWithTheEnds(t *testing.T) {
	good, s := signedLog(t)
	c := VerifyConfig{Roots: s.roots, Whole: true}
	rep := verify(t, good[5:], c)
	if len(rep.Faults) != 1 || rep.Faults[0].Kind != Dropped || rep.Faults[0].Seq != 1 || rep.Faults[0].To != 5 {
		t.Errorf("the front dropped: %v", rep.Faults)
	}
	if rep := verify(t, good[5:], VerifyConfig{Roots: s.roots}); len(rep.Faults) != 0 || rep.First != 6 {
		t.Errorf("a part of a log: %v", rep.Faults)
	}
	// Cut at the end: what is left behind the last checkpoint is said to be unsigned.
	cut := slices.IndexFunc(good[15:], func(l []byte) bool { return bytes.Contains(l, []byte("audit.checkpoint")) }) + 15
	if rep := verify(t, good[:cut], c); len(rep.Faults) != 0 || rep.Unsigned == 0 {
		t.Errorf("cut before a checkpoint: %+v", rep)
	}
	// In the middle of a line.
	half := slices.Clone(good)
	half[len(half)-1] = half[len(half)-1][:20]
	if rep := verify(t, half, c); rep.Torn != 20 || len(rep.Faults) != 0 {
		t.Errorf("torn: %+v", rep)
	}
}

func TestOthersLines(t *testing.T) {
	good, s := signedLog(t)
	other, o := signedLog(t)
	mixed := append(slices.Clone(good), other...)
	if rep := verify(t, mixed, VerifyConfig{Roots: s.roots}); len(rep.Faults) == 0 || rep.Faults[0].Kind != Restarted || rep.Faults[0].Line != len(good)+1 {
		t.Errorf("a log that begins anew: %v", rep.Faults)
	}
	// Signed by a stranger.
	if rep := verify(t, good, VerifyConfig{Roots: o.roots}); rep.Checkpoints != 0 || len(rep.Faults) == 0 || rep.Faults[0].Kind != BadSigning {
		t.Errorf("another bundle: %v", rep.Faults)
	}
	if rep := verify(t, good, VerifyConfig{Roots: s.roots, TrustDomain: spiffeid.RequireTrustDomainFromString("other.org")}); rep.Checkpoints != 0 {
		t.Errorf("another trust domain: %+v", rep)
	}
	// Another member's SVID signs a log that says that it is m1's.
	dir := privateDir(t)
	imposter := newSigner(t, "m2")
	l := start(t, dir, func(c *Config) { c.Sign = imposter.sign })
	record(t, l.Log, 3)
	l.stop()
	if rep := verify(t, lines(t, dir), VerifyConfig{Roots: imposter.roots}); len(rep.Faults) != 1 || !strings.Contains(rep.Faults[0].Detail, "m2") {
		t.Errorf("another member's signature: %v", rep.Faults)
	}
	// One line of another member.
	foreign := slices.Clone(good)
	foreign[4] = bytes.Replace(foreign[4], []byte(`"member":"m1"`), []byte(`"member":"m2"`), 1)
	if rep := verify(t, foreign, VerifyConfig{Roots: s.roots}); !slices.ContainsFunc(rep.Faults, func(f Fault) bool { return f.Kind == Foreign && f.Seq == 5 }) {
		t.Errorf("another member's line: %v", rep.Faults)
	}
}

// TestCollected: a collector may have lines twice, and runs without files.
func TestCollected(t *testing.T) {
	good, s := signedLog(t)
	twice := slices.Insert(slices.Clone(good), 7, good[7])
	twice = append(twice, good...)
	if rep := verify(t, twice, VerifyConfig{Roots: s.roots, Collected: true}); len(rep.Faults) != 0 {
		t.Errorf("%v", rep.Faults)
	}
	if rep := verify(t, slices.Delete(slices.Clone(good), 7, 8), VerifyConfig{Roots: s.roots, Collected: true}); len(rep.Faults) == 0 {
		t.Error("a dropped record")
	}
}

func TestManyFaultsAreBounded(t *testing.T) {
	v := NewVerifier(VerifyConfig{})
	for i := range 10000 {
		v.Line("x", i+1, fmt.Appendf(nil, "junk %d", i))
	}
	if r := v.Done(); len(r.Faults) != maxFaults || r.More != 10000-maxFaults {
		t.Fatalf("%d faults, %d more", len(r.Faults), r.More)
	}
}

func TestVerifyDirTornInTheMiddle(t *testing.T) {
	dir := privateDir(t)
	l := start(t, dir, func(c *Config) { c.MaxSize = MaxLine })
	record(t, l.Log, 250)
	l.stop()
	files, _ := listFiles(dir)
	path := filepath.Join(dir, fileName(files[0]))
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, raw[:len(raw)-10], 0o600); err != nil {
		t.Fatal(err)
	}
	rep, err := VerifyDir(dir, VerifyConfig{})
	if err != nil || len(rep.Faults) != 1 || rep.Faults[0].File != fileName(files[0]) || rep.Faults[0].Seq != files[1]-1 {
		t.Fatalf("%+v %v", rep.Faults, err)
	}
	if _, err := VerifyDir(filepath.Join(dir, "absent"), VerifyConfig{}); err == nil {
		t.Error("an absent folder is verified")
	}
	if _, err := VerifyFiles([]string{filepath.Join(dir, "absent")}, VerifyConfig{}); err == nil {
		t.Error("an absent file is verified")
	}
}
