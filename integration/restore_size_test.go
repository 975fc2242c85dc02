//go:build integration

package integration

import (
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"countersign.io/countersign/backup"
	"countersign.io/countersign/identity"
	"countersign.io/countersign/raft"
	"countersign.io/countersign/seal"
	"countersign.io/countersign/store"
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
		from := time.Now()
		if err := f(); err != nil {
			t.Fatal(err)
		}
		d := time.Since(from).Seconds()
		t.Logf("%-44s %6.1f s  %6.0f MiB/s", what, d, float64(size)/(1<<20)/d)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	conf := filepath.Join(p.Member.Dir, "server.yaml")
	t.Logf("state of %d entries, backup of %d bytes", entries, size)
	measure("inspect (every byte and record verified)", func() error {
		out, err := p.Member.Admin(ctx, bin, "backup", "inspect", file, "-c", conf)
		if err == nil && !strings.Contains(out, fmt.Sprintf("%d entries", entries)) {
			err = fmt.Errorf("it says: %s", out)
		}
		return err
	})
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
	if got := p.count(t, ctx); got != entries {
		t.Errorf("%d entries, want %d", got, entries)
	}
}

// count asks the member's own backup: listing so many takes its time.
func (p *place) count(t *testing.T, ctx context.Context) int {
	t.Helper()
	out, err := p.Member.Admin(ctx, bin, "backup", "inspect", filepath.Join(p.Member.Dir, "backup2"), "-c", filepath.Join(p.Member.Dir, "server.yaml"), "-o", "json")
	if err != nil {
		t.Fatal(err)
	}
	var in inspected
	parseJSON(t, out, &in)
	return in.State.Entries
}

// largeBackup writes a backup of a state of about so many bytes, and returns its entries and its size.
func largeBackup(t *testing.T, file, key string, bytes int64) (entries int, size int64) {
	t.Helper()
	td := spiffeid.RequireTrustDomainFromString(trustDomain)
	s, err := store.Open(store.Config{Dir: filepath.Join(t.TempDir(), "state"), TrustDomain: td})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	log := &directLog{s: s, in: make(chan proposal)}
	go log.run()
	defer close(log.in)
	w := s.Writer(log)
	entries = int(bytes / 4096) // of about 4 KiB each
	var names []string
	for i := range identity.MaxDNSNames {
		names = append(names, fmt.Sprintf("service-%02d.%s.%s.internal", i, strings.Repeat("a-long-label", 4), strings.Repeat("another-label", 4)))
	}
	next := make(chan int)
	var wg sync.WaitGroup
	for range 64 {
		wg.Go(func() {
			for i := range next {
				e := identity.Entry{
					ID: fmt.Sprintf("entry-%08d", i), SPIFFEID: fmt.Sprintf("spiffe://%s/w/%d", trustDomain, i), DNSNames: names[:30],
					Selectors: []identity.Selector{identity.Selector(fmt.Sprintf("k8s:ns:n%d", i))},
				}
				if _, err := w.CreateEntry(context.Background(), time.Now(), e); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for i := range entries {
		next <- i
	}
	close(next)
	wg.Wait()
	kek, err := seal.OpenKEK(context.Background(), key, seal.Options{MustExist: true})
	if err != nil {
		t.Fatal(err)
	}
	ring, err := seal.NewKeyring()
	if err != nil {
		t.Fatal(err)
	}
	snap, err := s.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	defer snap.Release()
	n, err := snap.WriteTo(io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	f, err := backup.Create(file, false)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Abort()
	h := backup.Header{TrustDomain: trustDomain, Member: "ca-0", CreatedAt: time.Now(), Revision: s.Revision(), Level: 1}
	if err := backup.Save(context.Background(), f, kek, h, ring, n, func(w io.Writer) error { _, err := snap.WriteTo(w); return err }); err != nil {
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

// directLog applies what is proposed to a store, without members.
type directLog struct {
	s  *store.Store
	in chan proposal
}

type proposal struct {
	cmd    []byte
	answer chan []byte
}

// Propose implements store.Log.
func (l *directLog) Propose(_ context.Context, cmd []byte) ([]byte, error) {
	p := proposal{cmd, make(chan []byte, 1)}
	l.in <- p
	return <-p.answer, nil
}

func (l *directLog) run() {
	index := uint64(0)
	for p := range l.in {
		batch := []proposal{p}
		for more := true; more && len(batch) < 64; {
			select {
			case p, ok := <-l.in:
				if more = ok; ok {
					batch = append(batch, p)
				}
			default:
				more = false
			}
		}
		var entries []raft.Entry
		for _, p := range batch {
			index++
			entries = append(entries, raft.Entry{Index: index, Term: 1, Data: p.cmd})
		}
		for i, answer := range l.s.ApplyBatch(entries) {
			batch[i].answer <- answer
		}
	}
}
