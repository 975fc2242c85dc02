package audit

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"
)

const patience = time.Minute // for what must happen; never what a test waits for when all is well

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never happened: %s", what)
		}
	}
}

// testSigner is a member's key and certificate, and the bundle that it leads to.
type testSigner struct {
	key   *ecdsa.PrivateKey
	chain [][]byte
	roots *x509.CertPool
	err   error
}

func newSigner(t testing.TB, member string) *testSigner {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	rootKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(err)
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "root"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	rootDER, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, rootKey.Public(), rootKey)
	must(err)
	root, err := x509.ParseCertificate(rootDER)
	must(err)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(err)
	uri, err := url.Parse("spiffe://example.org/countersign/member/" + member)
	must(err)
	leaf := &x509.Certificate{
		SerialNumber: big.NewInt(2), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), URIs: []*url.URL{uri},
		KeyUsage: x509.KeyUsageDigitalSignature,
	}
	der, err := x509.CreateCertificate(rand.Reader, leaf, root, key.Public(), rootKey)
	must(err)
	s := &testSigner{key: key, chain: [][]byte{der}, roots: x509.NewCertPool()}
	s.roots.AddCert(root)
	return s
}

func (s *testSigner) sign(data []byte) ([]byte, [][]byte, error) {
	if s.err != nil {
		return nil, nil, s.err
	}
	h := sha256.Sum256(data)
	sig, err := s.key.Sign(rand.Reader, h[:], crypto.SHA256)
	return sig, s.chain, err
}

// running is a Log that runs until stop, or until the test ends.
type running struct {
	*Log
	dir  string
	stop func() error
}

func privateDir(t testing.TB) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "audit")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}

// start opens and runs a log; edits may change its configuration.
func start(t testing.TB, dir string, edits ...func(*Config)) *running {
	t.Helper()
	r := startAnyhow(t, dir, edits...)
	eventually(t, "the log is ready", func() bool { return r.Ready() == nil })
	return r
}

func startAnyhow(t testing.TB, dir string, edits ...func(*Config)) *running {
	t.Helper()
	c := Config{Member: "m1", Dir: dir, Reserve: MaxLine, Deadline: time.Minute, mostWait: 200 * time.Millisecond} // whatever else the machine is at
	for _, e := range edits {
		e(&c)
	}
	l, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- l.Run(ctx) }()
	r := &running{Log: l, dir: dir, stop: sync.OnceValue(func() error { cancel(); return <-done })}
	t.Cleanup(func() { r.stop() })
	return r
}

func event(i int) Event {
	return Event{
		Action: IssueX509, Outcome: OK, RequestID: fmt.Sprintf("q-%d", i), Subjects: []string{fmt.Sprintf("spiffe://example.org/w/%d", i)}, Entry: "E1", EntryRevision: 3,
		Revision: 9, Serial: "0af1", NotAfter: time.Unix(1800000000, 0), Who: Who{Kind: "agent", ID: "spiffe://example.org/countersign/agent/kube/c/n", Serial: "ff", Address: "10.0.0.1:999"},
		Workload: []string{"k8s:ns:prod", "k8s:pod-name:web-0"}, Details: Details{{"b", "2"}, {"a", "1"}},
	}
}

// record records n events, a few at a time.
func record(t testing.TB, l *Log, n int) {
	t.Helper()
	for i := 0; i < n; i += 10 {
		var events []Event
		for k := i; k < min(i+10, n); k++ {
			events = append(events, event(k))
		}
		if err := l.Record(context.Background(), events...); err != nil {
			t.Fatal(err)
		}
	}
}

// lines are all lines of a folder's files, by file.
func lines(t testing.TB, dir string) (out [][]byte) {
	t.Helper()
	files, err := listFiles(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		raw, err := os.ReadFile(filepath.Join(dir, fileName(f)))
		if err != nil {
			t.Fatal(err)
		}
		for _, l := range bytes.SplitAfter(raw, []byte{'\n'}) {
			if len(l) > 0 {
				out = append(out, l)
			}
		}
	}
	return out
}

// durable are the records of an action that a running log has: its files may be in the middle of a write, or go.
func (r *running) durable(t testing.TB, a Action) (out []*Record) {
	t.Helper()
	if err := r.Query(context.Background(), Query{Filter: Filter{Actions: []Action{a}}}, func(line []byte) error {
		rec, err := Parse(line)
		out = append(out, rec)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return out
}

func records(t testing.TB, dir string) (out []*Record) {
	t.Helper()
	for _, l := range lines(t, dir) {
		r, err := Parse(l)
		if err != nil {
			t.Fatalf("%s: %v", l, err)
		}
		out = append(out, r)
	}
	return out
}

// find returns the records of an action.
func find(t testing.TB, dir string, a Action) (out []*Record) {
	t.Helper()
	for _, r := range records(t, dir) {
		if r.Action == a {
			out = append(out, r)
		}
	}
	return out
}

func wantClean(t testing.TB, dir string, s *testSigner) Report {
	t.Helper()
	c := VerifyConfig{}
	if s != nil {
		c.Roots = s.roots
	}
	r, err := VerifyDir(dir, c)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range r.Faults {
		t.Errorf("%s", f)
	}
	return r
}
