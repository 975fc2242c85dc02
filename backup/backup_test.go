package backup

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"countersign.io/countersign/identity"
	"countersign.io/countersign/seal"
)

func kek(t testing.TB) seal.KEK {
	t.Helper()
	k, err := seal.OpenFileKEK(filepath.Join(t.TempDir(), "kek"))
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func keyring(t testing.TB) *seal.Keyring {
	t.Helper()
	k, err := seal.NewKeyring()
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func header() Header {
	return Header{TrustDomain: "example.org", Member: "ca-1", Version: "1.2.3", Level: 2, CreatedAt: time.Unix(1_800_000_000, 0).UTC(), Revision: 77, Confirmed: true}
}

// payload is n bytes that do not repeat.
func payload(n int) []byte {
	r, out := rand.New(rand.NewPCG(1, uint64(n))), make([]byte, n)
	for i := range out {
		out[i] = byte(r.Uint32())
	}
	return out
}

func save(t testing.TB, k seal.KEK, ring *seal.Keyring, state []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := Save(context.Background(), &b, k, header(), ring, int64(len(state)), func(w io.Writer) error { _, err := w.Write(state); return err }); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// read reads a backup to its end.
func read(k seal.KEK, r io.Reader) (*Backup, []byte, error) {
	b, err := Open(context.Background(), r, k, spiffeid.TrustDomain{})
	if err != nil {
		return nil, nil, err
	}
	state, err := io.ReadAll(b.State)
	return b, state, err
}

func TestSaveOpen(t *testing.T) {
	k, ring := kek(t), keyring(t)
	plain := ring.Plain()
	first := chunkBytes - 4 - len(plain) // what fits beside the keyring
	for _, n := range []int{0, 1, first - 1, first, first + 1, first + chunkBytes, first + chunkBytes + 1, 5 * chunkBytes} {
		state := payload(n)
		file := save(t, k, ring, state)
		for name, r := range map[string]io.Reader{"whole": bytes.NewReader(file), "byte by byte": iotest.OneByteReader(bytes.NewReader(file)), "with the error": iotest.DataErrReader(bytes.NewReader(file))} {
			b, got, err := read(k, r)
			if err != nil || !bytes.Equal(got, state) || !bytes.Equal(b.Keyring.Plain(), plain) {
				t.Fatalf("%d bytes, %s: %v, %d bytes", n, name, err, len(got))
			}
			want := header()
			want.Format, want.Key, want.Size = Format, k.URI(), int64(4+len(plain)+n)
			if b.Header != want {
				t.Errorf("header %+v, want %+v", b.Header, want)
			}
		}
		h, chunks, err := ReadHeader(bytes.NewReader(file))
		if err != nil || h.FileSize(chunks) != int64(len(file)) || h.TrustDomain != "example.org" {
			t.Errorf("%d bytes: without a key: %+v, %v; the file has %d bytes, not %d", n, h, err, len(file), h.FileSize(chunks))
		}
		if bytes.Contains(file, plain[9:]) || n > 64 && bytes.Contains(file, state[:32]) {
			t.Error("the plaintext is in the file")
		}
	}
}

// damaged wants an error that names where.
func damaged(t *testing.T, err error) *DamageError {
	t.Helper()
	var d *DamageError
	if !errors.As(err, &d) || !errors.Is(err, identity.ErrInvalid) {
		t.Fatalf("%v: want a *DamageError", err)
	}
	if !strings.Contains(err.Error(), "byte") || d.To < d.From {
		t.Fatalf("%v: it names no byte", err)
	}
	return d
}

// TestEveryFlipIsFound changes each byte of a backup in turn: none goes unseen, and the error names a range that has it.
func TestEveryFlipIsFound(t *testing.T) {
	k := kek(t)
	file := save(t, k, keyring(t), payload(2*chunkBytes-1000))
	_, chunks, err := ReadHeader(bytes.NewReader(file))
	if err != nil {
		t.Fatal(err)
	}
	bits := []byte{0x01, 0x80, 0xff}
	for i := range file {
		bad := bytes.Clone(file)
		bad[i] ^= bits[i%len(bits)]
		b, state, err := read(k, bytes.NewReader(bad))
		if err == nil {
			t.Fatalf("byte %d of %d: nobody saw it", i, len(file))
		}
		d := damaged(t, err)
		// A header's length that is wrong leads elsewhere: there the range begins with it.
		if at := int64(i); d.From > at || at >= d.To {
			t.Fatalf("byte %d: the error says %v", i, err)
		}
		if i < int(chunks) && b != nil {
			t.Fatalf("byte %d of the header: it opened", i)
		}
		if len(state) > 0 && int64(len(state)) > int64(i) {
			t.Fatalf("byte %d: %d bytes of state came out", i, len(state))
		}
		if i < int(chunks) {
			if _, _, err := ReadHeader(bytes.NewReader(bad)); err == nil {
				t.Fatalf("byte %d of the header: unseen without a key", i)
			}
		}
	}
}

// TestEveryEndIsFound ends the file at each byte.
func TestEveryEndIsFound(t *testing.T) {
	k := kek(t)
	file := save(t, k, keyring(t), payload(2*chunkBytes+5))
	for n := range file {
		if n > 2000 && n%97 != 0 && n < len(file)-100 && (n < 16<<10 || n > 18<<10) {
			continue
		}
		_, _, err := read(k, bytes.NewReader(file[:n]))
		if d := damaged(t, err); d.From != int64(n) || d.To != int64(n) {
			t.Fatalf("ended at %d: %v", n, err)
		}
	}
	for _, more := range [][]byte{{0}, file, payload(3 * chunkBytes)} {
		_, state, err := read(k, bytes.NewReader(append(bytes.Clone(file), more...)))
		if d := damaged(t, err); d.From != int64(len(file)) {
			t.Errorf("%d bytes more: %v (%d bytes of state)", len(more), err, len(state))
		}
	}
}

// TestSplicing moves, doubles and drops whole chunks, and takes them from another backup of the same cluster.
func TestSplicing(t *testing.T) {
	k, ring := kek(t), keyring(t)
	state := payload(4 * chunkBytes)
	file, other := save(t, k, ring, state), save(t, k, ring, state)
	_, at, err := ReadHeader(bytes.NewReader(file))
	if err != nil {
		t.Fatal(err)
	}
	if len(file) != len(other) {
		t.Fatal("two backups of one state differ in length")
	}
	chunk := func(f []byte, i int) []byte {
		from := int(at) + i*(chunkBytes+tagBytes)
		return f[from:min(len(f), from+chunkBytes+tagBytes)]
	}
	build := func(parts ...[]byte) []byte { return append(bytes.Clone(file[:at]), bytes.Join(parts, nil)...) }
	for name, bad := range map[string][]byte{
		"two exchanged":             build(chunk(file, 1), chunk(file, 0), chunk(file, 2), chunk(file, 3), chunk(file, 4)),
		"one doubled":               build(chunk(file, 0), chunk(file, 1), chunk(file, 1), chunk(file, 3), chunk(file, 4)),
		"one dropped":               build(chunk(file, 0), chunk(file, 2), chunk(file, 3), chunk(file, 4)),
		"one from another":          build(chunk(file, 0), chunk(other, 1), chunk(file, 2), chunk(file, 3), chunk(file, 4)),
		"the last from another":     build(chunk(file, 0), chunk(file, 1), chunk(file, 2), chunk(file, 3), chunk(other, 4)),
		"all from another":          append(bytes.Clone(file[:at]), other[at:]...),
		"the key from another":      append(bytes.Clone(other[:at]), file[at:]...),
		"the last one missing":      build(chunk(file, 0), chunk(file, 1), chunk(file, 2), chunk(file, 3)),
		"a last one in the middle":  build(chunk(file, 0), chunk(file, 4), chunk(file, 2), chunk(file, 3), chunk(file, 4)),
		"the last one twice":        build(chunk(file, 0), chunk(file, 1), chunk(file, 2), chunk(file, 3), chunk(file, 4), chunk(file, 4)),
		"nothing after the header":  build(),
		"only the last one is left": build(chunk(file, 4)),
	} {
		_, _, err := read(k, bytes.NewReader(bad))
		if err == nil {
			t.Fatalf("%s: nobody saw it", name)
		}
		damaged(t, err)
	}
}

// A header that somebody wrote anew, with checksums that match, does not open.
func TestForgedHeader(t *testing.T) {
	k := kek(t)
	file := save(t, k, keyring(t), payload(100))
	_, at, err := ReadHeader(bytes.NewReader(file))
	if err != nil {
		t.Fatal(err)
	}
	n := int(binary.BigEndian.Uint32(file[len(magic):]))
	raw := file[len(magic)+4:][:n]
	rest := file[len(magic)+4+n+sumBytes:]
	forge := func(edit func(string) string) []byte {
		h := []byte(edit(string(raw)))
		out := append([]byte(magic), binary.BigEndian.AppendUint32(nil, uint32(len(h)))...)
		out = append(out, h...)
		out = append(out, sum(out)...)
		return append(out, rest...)
	}
	if same := forge(func(s string) string { return s }); !bytes.Equal(same, file) {
		t.Fatal("forging changes what it should not")
	}
	for name, edit := range map[string]func(string) string{
		"another trust domain": func(s string) string { return strings.Replace(s, "example.org", "example.com", 1) },
		"another date":         func(s string) string { return strings.Replace(s, `"created_at":"2027`, `"created_at":"2028`, 1) },
		"another revision":     func(s string) string { return strings.Replace(s, `"revision":77`, `"revision":78`, 1) },
		"another space":        func(s string) string { return strings.Replace(s, `"revision":77`, `"revision": 77`, 1) },
	} {
		bad := forge(edit)
		if bytes.Equal(bad, file) {
			t.Fatalf("%s: not forged", name)
		}
		if _, _, err := read(k, bytes.NewReader(bad)); !errors.Is(err, seal.ErrOpen) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, edit := range map[string]func(string) string{
		"an unknown field":  func(s string) string { return strings.Replace(s, `"revision"`, `"x":1,"revision"`, 1) },
		"no trust domain":   func(s string) string { return strings.Replace(s, "example.org", "", 1) },
		"a bad domain":      func(s string) string { return strings.Replace(s, "example.org", "EXAMPLE", 1) },
		"two documents":     func(s string) string { return s + "{}" },
		"not JSON":          func(s string) string { return s[1:] },
		"no size":           func(s string) string { return strings.Replace(s, `"size":`, `"size":-`, 1) },
		"an earlier format": func(s string) string { return strings.Replace(s, `"format":1`, `"format":0`, 1) },
	} {
		_, _, err := ReadHeader(bytes.NewReader(forge(edit)))
		if err == nil {
			t.Fatalf("%s: accepted", name)
		}
		damaged(t, err)
	}
	newer := forge(func(s string) string { return strings.Replace(s, `"format":1`, `"format":2,"more":true`, 1) })
	if _, _, err := ReadHeader(bytes.NewReader(newer)); !errors.Is(err, identity.ErrPrecondition) || !strings.Contains(err.Error(), "format 2") {
		t.Errorf("a newer format: %v", err)
	}
	_ = at
}

func TestOpenRefuses(t *testing.T) {
	k := kek(t)
	file := save(t, k, keyring(t), payload(100))
	ctx := context.Background()
	if _, err := Open(ctx, bytes.NewReader(file), k, spiffeid.RequireTrustDomainFromString("other.org")); !errors.Is(err, identity.ErrPrecondition) || !strings.Contains(err.Error(), `"example.org", not "other.org"`) {
		t.Errorf("another trust domain: %v", err)
	}
	other := kek(t)
	if _, err := Open(ctx, bytes.NewReader(file), other, spiffeid.TrustDomain{}); !errors.Is(err, seal.ErrOpen) || !strings.Contains(err.Error(), k.URI()) || !strings.Contains(err.Error(), other.URI()) {
		t.Errorf("another key: %v; want both keys named", err)
	}
	down := errors.New("the PIN is missing")
	if _, err := Open(ctx, bytes.NewReader(file), failingKEK{k, down}, spiffeid.TrustDomain{}); !errors.Is(err, down) || errors.Is(err, seal.ErrOpen) || strings.Contains(err.Error(), "does not open it") {
		t.Errorf("a key that cannot be used: %v", err)
	}
	for name, b := range map[string][]byte{"empty": nil, "text": []byte("hello\n"), "a long text": bytes.Repeat([]byte("hello\n"), 10000)} {
		_, err := Open(ctx, bytes.NewReader(b), k, spiffeid.TrustDomain{})
		if d := damaged(t, err); d.From != 0 {
			t.Errorf("%s: %v", name, err)
		}
	}
	broken := io.MultiReader(bytes.NewReader(file[:len(file)-10]), iotest.ErrReader(errors.New("the disk fails")))
	if _, _, err := read(k, broken); err == nil || !strings.Contains(err.Error(), "the disk fails") || errors.As(err, new(*DamageError)) {
		t.Errorf("a failing disk: %v", err)
	}
}

// failingKEK is one that cannot be asked.
type failingKEK struct {
	seal.KEK
	err error
}

func (f failingKEK) Unwrap(context.Context, []byte, []byte) ([]byte, error) { return nil, f.err }

func TestSaveFails(t *testing.T) {
	k, ring, ctx := kek(t), keyring(t), context.Background()
	writeN := func(n int) func(io.Writer) error {
		return func(w io.Writer) error { _, err := w.Write(payload(n)); return err }
	}
	if err := Save(ctx, io.Discard, k, header(), ring, 10, writeN(9)); !errors.Is(err, errLength) {
		t.Errorf("too short: %v", err)
	}
	if err := Save(ctx, io.Discard, k, header(), ring, 10, writeN(11)); !errors.Is(err, errLength) {
		t.Errorf("too long: %v", err)
	}
	full := errors.New("no space left on device")
	for n := range 5 {
		w := &failing{after: n, err: full}
		err := Save(ctx, w, k, header(), ring, 3*chunkBytes, writeN(3*chunkBytes))
		if !errors.Is(err, full) {
			t.Errorf("write %d fails: %v", n, err)
		}
	}
	for name, h := range map[string]Header{"no member": {TrustDomain: "example.org", CreatedAt: time.Now()}, "no trust domain": {Member: "ca-1", CreatedAt: time.Now()}, "no time": {TrustDomain: "example.org", Member: "ca-1"}} {
		if err := Save(ctx, io.Discard, k, h, ring, 1, writeN(1)); !errors.Is(err, identity.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

type failing struct {
	after int
	err   error
}

func (f *failing) Write(p []byte) (int, error) {
	if f.after--; f.after < 0 {
		return 0, f.err
	}
	return len(p), nil
}

// TestMemory: a large backup takes no more memory than a small one.
func TestMemory(t *testing.T) {
	k, ring := kek(t), keyring(t)
	const n = 64 << 20
	r, w := io.Pipe()
	go func() {
		block := payload(1 << 20)
		w.CloseWithError(Save(context.Background(), w, k, header(), ring, n, func(w io.Writer) error {
			for range n / len(block) {
				if _, err := w.Write(block); err != nil {
					return err
				}
			}
			return nil
		}))
	}()
	b, err := Open(context.Background(), r, k, spiffeid.TrustDomain{})
	if err != nil {
		t.Fatal(err)
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	got, err := io.Copy(io.Discard, b.State)
	runtime.ReadMemStats(&after)
	if err != nil || got != n {
		t.Fatalf("%d bytes, %v", got, err)
	}
	if a := after.TotalAlloc - before.TotalAlloc; a > 8<<20 {
		t.Errorf("%d bytes allocated for %d", a, n)
	}
}

func TestFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "b")
	names := func() (out []string) {
		list, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range list {
			out = append(out, e.Name())
		}
		return out
	}
	put := func(replace bool, content string) error {
		f, err := Create(path, replace)
		if err != nil {
			return err
		}
		defer f.Abort()
		if _, err := f.WriteString(content); err != nil {
			return err
		}
		if n := names(); len(n) == 0 || !strings.HasPrefix(n[0], ".b.") {
			t.Errorf("while it is written: %v", n)
		}
		return f.Commit()
	}
	if err := put(false, "one"); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	if err := put(false, "two"); !errors.Is(err, identity.ErrExists) {
		t.Errorf("over another: %v", err)
	}
	if err := put(true, "three"); err != nil {
		t.Error(err)
	}
	f, err := Create(filepath.Join(dir, "c"), false)
	if err != nil {
		t.Fatal(err)
	}
	// Somebody else's comes in between.
	if err := os.WriteFile(filepath.Join(dir, "c"), []byte("theirs"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := f.Commit(); !errors.Is(err, identity.ErrExists) {
		t.Errorf("over one that came in between: %v", err)
	}
	if f, err = Create(filepath.Join(dir, "d"), false); err != nil {
		t.Fatal(err)
	}
	f.Abort()
	f.Abort()
	if got := strings.Join(names(), " "); got != "b c" {
		t.Errorf("the folder holds %s", got)
	}
	for name, want := range map[string]string{"b": "three", "c": "theirs"} {
		if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(got) != want {
			t.Errorf("%s holds %q, %v", name, got, err)
		}
	}
	if _, err := Create(filepath.Join(dir, "absent", "b"), false); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("in an absent folder: %v", err)
	}
}

func TestHeaderIsReadable(t *testing.T) {
	file := save(t, kek(t), keyring(t), nil)
	n := int(binary.BigEndian.Uint32(file[len(magic):]))
	var h map[string]any
	if err := json.Unmarshal(file[len(magic)+4:][:n], &h); err != nil {
		t.Fatal(err)
	}
	for _, field := range []string{"format", "trust_domain", "member", "version", "level", "created_at", "revision", "confirmed", "size", "key"} {
		if _, ok := h[field]; !ok {
			t.Errorf("%s is not in %v", field, h)
		}
	}
}
