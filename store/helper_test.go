package store

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.etcd.io/bbolt"

	"countersign.io/countersign/identity"
	"countersign.io/countersign/raft"
)

var (
	td  = spiffeid.RequireTrustDomainFromString("example.org")
	now = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
)

// directLog commits every command at once, on one store.
type directLog struct {
	s     *Store
	mu    sync.Mutex
	index uint64
	cmds  []raft.Entry
	err   error // what Propose fails with
}

func (l *directLog) Propose(_ context.Context, cmd []byte) ([]byte, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err != nil {
		return nil, l.err
	}
	l.index++
	e := raft.Entry{Index: l.index, Term: 1, Data: cmd}
	l.cmds = append(l.cmds, e)
	res := l.s.ApplyBatch([]raft.Entry{e})
	if len(res) != 1 {
		return nil, errors.New("the machine stopped")
	}
	return res[0], nil
}

func openAt(t testing.TB, dir string) *Store {
	t.Helper()
	s, err := Open(Config{Dir: dir, TrustDomain: td})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func stateDir(t testing.TB) string { return filepath.Join(t.TempDir(), "state") }

func newStore(t testing.TB) (*Store, *Writer, *directLog) {
	t.Helper()
	s := openAt(t, stateDir(t))
	l := &directLog{s: s}
	return s, s.Writer(l), l
}

func sel(in ...string) []identity.Selector {
	out := make([]identity.Selector, len(in))
	for i, s := range in {
		out[i] = identity.Selector(s)
	}
	return identity.SortSelectors(out)
}

func entryFor(id, path string, selectors ...string) identity.Entry {
	return identity.Entry{ID: id, SPIFFEID: "spiffe://example.org" + path, Selectors: sel(selectors...)}
}

func hashOf(s string) []byte { h := sha256.Sum256([]byte(s)); return h[:] }

func token(id, purpose string, expires time.Time) identity.JoinToken {
	return identity.JoinToken{ID: id, Hash: hashOf(id), Purpose: purpose, ExpiresAt: expires}
}

func agent(name string) identity.Agent {
	return identity.Agent{ID: "spiffe://example.org/countersign/agent/join/" + name, Kind: "join_token", AttestedAt: now, Selectors: sel("agent:kind:join")}
}

func authority(kind identity.AuthorityKind, id string) identity.Authority {
	a := identity.Authority{ID: id, Kind: kind, State: identity.AuthorityActive, PublicKey: []byte("public " + id), SealedKey: []byte("sealed"), NotBefore: now, NotAfter: now.Add(time.Hour)}
	if kind == identity.AuthorityX509 {
		a.Cert = []byte("cert " + id)
	}
	return a
}

func cluster(name string) identity.KubeCluster {
	return identity.KubeCluster{Name: name, Issuer: "https://" + name, Audience: "countersign", JWKS: []byte(`{"keys":[]}`), DefaultID: identity.DefaultKubeID}
}

func must[T any](t testing.TB) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// wantErr checks the sentinel and that the message says what a person needs.
func wantErr(t testing.TB, err, sentinel error, words ...string) {
	t.Helper()
	if !errors.Is(err, sentinel) {
		t.Fatalf("got error %v, want one that wraps %q", err, sentinel)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("error %q does not mention %q", err, w)
		}
	}
	if strings.Count(err.Error(), sentinel.Error()) > 1 && !strings.Contains(err.Error(), "\n") {
		t.Errorf("error %q names its kind twice", err)
	}
}

// snapshotHeaderBytes is where the first record of a snapshot of example.org begins.
const snapshotHeaderBytes = 8 + 4 + 4 + len("example.org") + 8 + 8 + 4

func snapshotOf(t testing.TB, s *Store) []byte {
	t.Helper()
	snap, err := s.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	defer snap.Release()
	var b bytes.Buffer
	n, err := snap.WriteTo(&b)
	if err != nil || n != int64(b.Len()) {
		t.Fatalf("WriteTo: %d of %d bytes, %v", n, b.Len(), err)
	}
	return b.Bytes()
}

// checkConsistent compares all that is derived with what it is derived from.
func checkConsistent(t testing.TB, s *Store) {
	t.Helper()
	err := s.db.View(func(tx *bbolt.Tx) error {
		v, err := loadView(tx, td)
		if err != nil {
			return err
		}
		s.mu.RLock()
		defer s.mu.RUnlock()
		have := s.view
		for _, c := range []struct {
			name       string
			have, want any
		}{
			{"revision", have.revision, v.revision}, {"entries", have.entries, v.entries}, {"agents", have.agents, v.agents}, {"banned nodes", have.bannedNodes, v.bannedNodes},
			{"kube clusters", have.kube, v.kube}, {"bundle", have.bundle, v.bundle},
			{"authorities", values(have.authorities), values(v.authorities)}, {"members", values(have.members), values(v.members)},
			{"level", have.level, v.level}, {"downstream entries", downstreamIDs(have), downstreamIDs(v)},
			{"admin entries", adminIDs(have), adminIDs(v)},
			{"federations", have.federations, v.federations},
			{"foreign keys", values(have.foreign), values(v.foreign)}, {"seal terms", values(have.seal), values(v.seal)},
		} {
			if !reflect.DeepEqual(c.have, c.want) {
				t.Errorf("%s in memory: %+v\nin the file: %+v", c.name, c.have, c.want)
			}
		}
		// The derived buckets are what loading every record anew would make.
		count := func(name string) int { return tx.Bucket([]byte(name)).Stats().KeyN }
		expiring := 0
		for _, r := range v.entries {
			if owner := (state{tx}).ruleOwner(&r.Entry); owner != r.ID {
				t.Errorf("rule of entry %s is owned by %q", r.ID, owner)
			}
			if !r.ExpiresAt.IsZero() {
				expiring++
			}
		}
		tokens := count("join_tokens")
		if got := [3]int{count(bucketRules), count(bucketTokenIDs), count(bucketExpiry)}; got != [3]int{len(v.entries), tokens, expiring + tokens} {
			t.Errorf("derived buckets have %v records: %d entries (%d expire), %d tokens", got, len(v.entries), expiring, tokens)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	s.view.index.check(t, &s.view.index.root)
}

func downstreamIDs(v *view) map[string][]string {
	out := make(map[string][]string)
	for id, entries := range v.downstream {
		for _, r := range entries {
			out[id] = append(out[id], r.ID)
		}
		slices.Sort(out[id])
	}
	return out
}

func adminIDs(v *view) map[string][]string {
	out := make(map[string][]string)
	for id, entries := range v.admins {
		for _, e := range entries {
			out[id] = append(out[id], e.ID+" "+string(e.Power()))
		}
		slices.Sort(out[id])
	}
	return out
}

// check walks the index: sizes add up and every entry hangs below its own selectors.
func (x *matchIndex) check(t testing.TB, n *node) int {
	t.Helper()
	size := len(n.own)
	for s, kid := range n.kids {
		if kid.parent != n || kid.via != s || kid.size == 0 {
			t.Errorf("node below %s is not linked right", s)
		}
		size += x.check(t, kid)
	}
	if size != n.size {
		t.Errorf("node below %q says it has %d entries, and has %d", n.via, n.size, size)
	}
	for _, r := range n.own {
		if x.home[r.ID] != n {
			t.Errorf("entry %s is not where the index says", r.ID)
		}
		for p := n; p.parent != nil; p = p.parent {
			if !identity.Subset([]identity.Selector{p.via}, r.Selectors) {
				t.Errorf("entry %s hangs below %s, which is not its own", r.ID, p.via)
			}
		}
	}
	return size
}
