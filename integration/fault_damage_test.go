//go:build integration

package integration

import (
	"context"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	adminv1 "countersign.io/countersign/api/admin/v1"
	"countersign.io/countersign/integration/cluster"
)

// damage is one way to spoil a file.
type damage struct {
	name  string
	spoil func([]byte) []byte
}

// damages are those of a file of that content: flipped bits all over it, most of them where there is something, and what
// is left of it when its end was not written, or was written to.
func damages(data []byte, rnd *rand.Rand) []damage {
	var out []damage
	var full []int
	for i, b := range data {
		if b != 0 {
			full = append(full, i)
		}
	}
	at := map[int]bool{0: true, len(data) - 1: true}
	for range min(7, len(full)) {
		at[full[rnd.IntN(len(full))]] = true
	}
	at[rnd.IntN(len(data))] = true
	for i := range at {
		bit := byte(1) << rnd.IntN(8)
		out = append(out, damage{fmt.Sprintf("bit %#02x of byte %d", bit, i), func(b []byte) []byte { b[i] ^= bit; return b }})
	}
	for _, n := range []int{1, 100, 4096, len(data) / 2, len(data)} {
		if n <= len(data) {
			out = append(out, damage{fmt.Sprintf("%d bytes short", n), func(b []byte) []byte { return b[:len(b)-n] }})
		}
	}
	garbage := make([]byte, 100)
	for i := range garbage {
		garbage[i] = byte(rnd.Uint32())
	}
	return append(out, damage{"garbage at its end", func(b []byte) []byte { return append(b, garbage...) }})
}

// witness is what a member serves: entries, kube clusters and the bundle, as text.
func witness(ctx context.Context, m *cluster.Member) (string, error) {
	c, done, err := m.AdminConn()
	if err != nil {
		return "", err
	}
	defer done()
	var out strings.Builder
	entries, err := c.ListEntries(ctx, &adminv1.ListRequest{})
	if err != nil {
		return "", err
	}
	kubes, err := c.ListKubeClusters(ctx, &adminv1.ListRequest{})
	if err != nil {
		return "", err
	}
	bundle, err := c.GetBundle(ctx, &adminv1.Empty{})
	if err != nil {
		return "", err
	}
	for _, m := range []proto.Message{entries, kubes, bundle} {
		text, err := protojson.Marshal(m)
		if err != nil {
			return "", err
		}
		// protojson varies its spaces on purpose
		fmt.Fprintln(&out, strings.ReplaceAll(string(text), " ", ""))
	}
	return out.String(), nil
}

// veteran makes the folder of a cluster of one that has entries, snapshots, and was killed or stopped; and says what it served.
func veteran(t *testing.T, ctx context.Context, kill bool) (data, served string) {
	t.Helper()
	p := newPlace(t, "ca-1", "")
	program, err := hooked()
	if err != nil {
		t.Fatal(err)
	}
	p.Member.Bin, p.Member.Env = program, []string{"COUNTERSIGN_FAULT_SNAPSHOTS=20 20 200ms"}
	p.start(t, ctx, "")
	c := adminOf(t, p.Member)
	snapshots := func() int {
		found, _ := filepath.Glob(p.data("raft/snapshots/*[0-9]"))
		return len(found)
	}
	deadline := time.Now().Add(time.Minute)
	for i := 0; i < 60 || snapshots() < 2; i++ {
		e := &adminv1.Entry{SpiffeId: fmt.Sprintf("spiffe://%s/entry-%d", trustDomain, i), Selectors: []string{fmt.Sprint("unix:uid:", i), "agent:kind:join_token"}}
		if _, err := c.CreateEntry(ctx, e); err != nil {
			t.Fatal(err)
		}
		if time.Now().After(deadline) {
			t.Fatal("no snapshot was taken")
		}
	}
	if served, err = witness(ctx, p.Member); err != nil {
		t.Fatal(err)
	}
	if kill {
		p.Kill()
	} else {
		p.Stop()
	}
	return p.data(""), served
}

// TestFaultDamage spoils each file of a member's folder in many ways while the member is down. Whatever it was, the member then
// either comes up and serves exactly what it served, or does not and names the file.
func TestFaultDamage(t *testing.T) {
	needRoot(t)
	ctx, cancel := context.WithTimeout(context.Background(), 12*time.Minute)
	t.Cleanup(cancel)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	for _, end := range []string{"stopped", "killed"} {
		data, served := veteran(t, ctx, end == "killed")
		var files []string
		err := filepath.WalkDir(data, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.Type().IsRegular() {
				if info, err := d.Info(); err == nil && info.Size() > 0 {
					files = append(files, path[len(data)+1:])
				}
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		var mu sync.Mutex
		tried, healed, named := 0, 0, 0
		t.Run(end, func(t *testing.T) {
			for i, file := range files {
				if end == "killed" && (strings.Contains(file, "key") || strings.Contains(file, "member.json")) {
					continue // as after a stop
				}
				t.Run(strings.ReplaceAll(file, "/", "_"), func(t *testing.T) {
					t.Parallel()
					content, err := os.ReadFile(filepath.Join(data, file))
					if err != nil {
						t.Fatal(err)
					}
					work := make(chan damage)
					var lanes sync.WaitGroup
					for range 3 { // a start is mostly waiting
						p := newPlace(t, "ca-1", "")
						lanes.Go(func() {
							for d := range work {
								began := time.Now()
								up := p.tryDamaged(t, ctx, data, file, served, d)
								if took := time.Since(began); took > 8*time.Second {
									t.Logf("%s, %s took %v", file, d.name, took)
								}
								mu.Lock()
								tried++
								if up {
									healed++
								} else {
									named++
								}
								mu.Unlock()
							}
						})
					}
					for _, d := range damages(content, rand.New(rand.NewPCG(seed, uint64(i)))) {
						work <- d
					}
					close(work)
					lanes.Wait()
				})
			}
		})
		report(t, fmt.Sprintf("each of %d files of a member that was %s damaged in turn, %d times in all (a bit flipped, the end torn off, garbage added)", len(files), end, tried),
			fmt.Sprintf("%d times it came up and served the same", healed), fmt.Sprintf("%d times it did not start and named the file", named))
	}
}

// tryDamaged starts a member on a copy of a folder with one spoilt file.
func (p *place) tryDamaged(t *testing.T, ctx context.Context, data, file, served string, d damage) (up bool) {
	t.Helper()
	if err := os.RemoveAll(p.data("")); err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(p.data(""), os.DirFS(data)); err != nil {
		t.Fatal(err)
	}
	// CopyFS keeps no modes
	err := filepath.WalkDir(p.data(""), func(path string, e fs.DirEntry, err error) error {
		if err == nil && e.IsDir() {
			return os.Chmod(path, 0o700)
		}
		if err == nil {
			return os.Chmod(path, 0o600)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	change(t, p.data(file), d.spoil)
	log := filepath.Join(p.Member.Dir, "log")
	writeFile(t, log, nil)
	p.configure(t, "")
	if err := p.LaunchMember(p.Member); err != nil {
		t.Fatal(err)
	}
	if err := p.WaitReady(ctx, p.Member); err == nil {
		got, err := witness(ctx, p.Member)
		if err != nil || got != served {
			t.Errorf("%s, %s: it came up and serves something else (%v):\n%s\nnot\n%s", file, d.name, err, got, served)
		}
		p.Kill()
		return true
	}
	said, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	if !p.Exited() {
		t.Errorf("%s, %s: it neither starts nor ends: %s", file, d.name, said)
		p.Kill()
		return false
	}
	if p.Code() <= 0 {
		t.Errorf("%s, %s: exit code %d: %s", file, d.name, p.Code(), said)
	}
	last := string(said)
	if i := strings.LastIndex(last, "\ncountersign: "); i >= 0 {
		last = last[i+1:]
	}
	name := filepath.Base(file)
	if strings.Contains(file, "snapshots/") {
		name = filepath.Base(filepath.Dir(file)) // a snapshot is a folder
	}
	if !strings.Contains(last, name) {
		t.Errorf("%s, %s: it does not name the file: %s", file, d.name, last)
	}
	return false
}
