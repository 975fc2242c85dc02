//go:build integration

package integration

import (
	"bufio"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"countersign.io/countersign/backup"
	"countersign.io/countersign/identity"
	"countersign.io/countersign/seal"
)

// TestRestoreOfALargeState measures a restore: of 16 MiB, or of as many as COUNTERSIGN_RESTORE_MIB says.
func TestRestoreOfALargeState(t *testing.T) {
	mib := int64(16)
	if v := os.Getenv("COUNTERSIGN_RESTORE_MIB"); v != "" {
		var err error
		if mib, err = strconv.ParseInt(v, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	p := newPlace(t, "ca-1", "")
	key := filepath.Join(p.Member.Dir, "key")
	raw := make([]byte, 32)
	rand.Read(raw)
	writeFile(t, key, raw)
	p.configure(t, "backup: {key: 'file:"+key+"'}\n")
	file := filepath.Join(p.Member.Dir, "backup")
	entries, size := largeBackup(t, file, "file:"+key, mib<<20)

	measure := func(what string, f func() error) {
		t.Helper()
		from, cpu := time.Now(), childrenCPU(t)
		if err := f(); err != nil {
			t.Fatal(err)
		}
		d := time.Since(from).Seconds()
		t.Logf("%-44s %6.1f s  %6.0f MiB/s  %5.1f s of CPU in commands", what, d, float64(size)/(1<<20)/d, childrenCPU(t)-cpu)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	conf := filepath.Join(p.Member.Dir, "server.yaml")
	t.Logf("state of %d entries, backup of %d bytes", entries, size)
	measure("restore (verified, then written)", func() error {
		_, err := p.Member.Admin(ctx, bin, "backup", "restore", file, "-c", conf)
		return err
	})
	measure("first start, until it issues", func() error {
		if p.RestartMember(ctx, p.Member) != nil { // it waits a minute, and this one may take longer
			untilReady(t, ctx, p.Process, p.Health)
		}
		return nil
	})
	measure("backup save of the running member", func() error {
		_, err := p.Member.Admin(ctx, bin, "backup", "save", file+"2")
		return err
	})
	measure("inspect (every byte and record verified)", func() error {
		out, err := p.Member.Admin(ctx, bin, "backup", "inspect", file, "-c", conf)
		if err == nil && !strings.Contains(out, fmt.Sprintf("%d entries", entries)) {
			err = fmt.Errorf("it says: %s", out)
		}
		return err
	})
	if out, err := p.Member.Admin(ctx, bin, "backup", "inspect", file+"2", "-c", conf, "-o", "json"); err != nil {
		t.Error(err)
	} else {
		var in inspected
		if parseJSON(t, out, &in); in.State.Entries != entries {
			t.Errorf("%d entries, want %d", in.State.Entries, entries)
		}
	}
}

// childrenCPU is what children that have ended used, in seconds.
func childrenCPU(t *testing.T) float64 {
	t.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_CHILDREN, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano()).Seconds()
}

// largeBackup writes a backup of a state of about so many bytes, and returns its entries and its size. The snapshot is put
// together here, as store/snapshot.go describes it: letting a store make a GiB of entries takes longer than restoring it.
func largeBackup(t *testing.T, file, key string, size int64) (entries int, fileSize int64) {
	t.Helper()
	entries = int(size / 4096) // of about 4 KiB each
	kek, err := seal.OpenKEK(context.Background(), key, seal.Options{MustExist: true})
	if err != nil {
		t.Fatal(err)
	}
	ring, err := seal.NewKeyring()
	if err != nil {
		t.Fatal(err)
	}
	counted := &countingWriter{}
	if err := largeState(counted, entries); err != nil {
		t.Fatal(err)
	}
	f, err := backup.Create(file, false)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Abort()
	h := backup.Header{TrustDomain: trustDomain, Member: "ca-0", CreatedAt: time.Now(), Revision: uint64(entries), Level: 1}
	if err := backup.Save(context.Background(), f, kek, h, ring, counted.n, func(w io.Writer) error { return largeState(w, entries) }); err != nil {
		t.Fatal(err)
	}
	if err := f.Commit(); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(file)
	if err != nil {
		t.Fatal(err)
	}
	return entries, info.Size()
}

type countingWriter struct{ n int64 }

func (c *countingWriter) Write(p []byte) (int, error) { c.n += int64(len(p)); return len(p), nil }

func largeState(w io.Writer, entries int) error {
	hash := sha256.New()
	b := bufio.NewWriterSize(io.MultiWriter(w, hash), 1<<20)
	block := func(p []byte) {
		b.Write(binary.BigEndian.AppendUint32(p, crc32.Checksum(p, crc32.MakeTable(crc32.Castagnoli))))
	}
	b.Write(binary.BigEndian.AppendUint32([]byte("cs-state"), 1))
	head := append(binary.BigEndian.AppendUint32(nil, uint32(len(trustDomain))), trustDomain...)
	block(binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(head, uint64(entries)), 1)) // revision, bundle sequence
	var names []string
	for i := range 30 {
		names = append(names, fmt.Sprintf("service-%02d.%s.%s.internal", i, strings.Repeat("a-long-label", 4), strings.Repeat("another-label", 4)))
	}
	for i := range entries {
		value, err := json.Marshal(struct {
			Created uint64 `json:"created"`
			identity.Entry
		}{uint64(i + 1), identity.Entry{
			ID: fmt.Sprintf("entry-%08d", i), SPIFFEID: fmt.Sprintf("spiffe://%s/w/%d", trustDomain, i), DNSNames: names,
			Selectors: []identity.Selector{identity.Selector(fmt.Sprintf("k8s:ns:n%d", i))}, Revision: uint64(i + 1),
		}})
		if err != nil {
			return err
		}
		key := fmt.Sprintf("entry-%08d", i)
		p := binary.BigEndian.AppendUint16([]byte{1}, uint16(len(key))) // 1 is the kind of entries
		p = binary.BigEndian.AppendUint32(p, uint32(len(value)))
		block(append(append(p, key...), value...))
	}
	b.Write([]byte{0})
	if err := b.Flush(); err != nil {
		return err
	}
	_, err := w.Write(hash.Sum(nil))
	return err
}
