package store

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"countersign.io/countersign/identity"
)

// The index finds what comparing with every entry finds, through inserts, updates and deletes.
func TestIndexAgreesWithBruteForce(t *testing.T) {
	for seed := range uint64(8) {
		rnd := rand.New(rand.NewPCG(seed, 2))
		x, all := newMatchIndex(), map[string]*entryRecord{}
		pick := func(from, to int) []identity.Selector {
			var s []identity.Selector
			for range from + rnd.IntN(to-from+1) {
				// a few selectors are common, many are rare
				s = append(s, identity.Selector(fmt.Sprint("k8s:ns:", int(rnd.ExpFloat64()*6))))
			}
			return identity.SortSelectors(s)
		}
		for step := range 4000 {
			id := fmt.Sprint(rnd.IntN(600))
			x.remove(id)
			delete(all, id)
			if rnd.IntN(3) > 0 {
				r := &entryRecord{Created: uint64(step), Entry: identity.Entry{ID: id, Selectors: pick(1, 5)}}
				x.insert(r)
				all[id] = r
			}
			if step%40 != 0 {
				continue
			}
			own := pick(0, 12)
			var want, got []string
			for _, r := range all {
				if identity.Subset(r.Selectors, own) {
					want = append(want, r.ID)
				}
			}
			for _, r := range x.match(own) {
				got = append(got, r.ID)
			}
			slices.Sort(want)
			slices.Sort(got)
			if !slices.Equal(got, want) {
				t.Fatalf("seed %d, step %d: %v matches %v, want %v", seed, step, own, got, want)
			}
			if n := x.check(t, &x.root); n != len(all) {
				t.Fatalf("the index has %d entries, want %d", n, len(all))
			}
		}
		for id := range all {
			x.remove(id)
		}
		if len(x.home) != 0 || len(x.root.kids) != 0 || x.root.size != 0 {
			t.Error("an empty index holds something")
		}
	}
}

// How entries are laid out in practice: each namespace and service account, and the worst case for an index over single
// selectors, where every one of them is common.
func layouts() map[string]func(n int) (entries []*entryRecord, workload []identity.Selector) {
	make := func(i int, selectors ...string) *entryRecord {
		return &entryRecord{Created: uint64(i), Entry: identity.Entry{ID: fmt.Sprint(i), Selectors: sel(selectors...)}}
	}
	workload := func(more ...string) []identity.Selector {
		return sel(append(more, "k8s:cluster:prod", "k8s:pod-name:web-0", "k8s:pod-uid:7", "k8s:node-name:n1", "agent:kind:kube", "agent:kube-cluster:prod",
			"agent:kube-node:n1", "unix:uid:1000", "unix:gid:1000", "unix:path:/web")...)
	}
	return map[string]func(int) ([]*entryRecord, []identity.Selector){
		"accounts": func(n int) (out []*entryRecord, w []identity.Selector) {
			for i := range n {
				out = append(out, make(i, "k8s:cluster:prod", fmt.Sprint("k8s:ns:", i%50), fmt.Sprint("k8s:sa:", i)))
			}
			return out, workload("k8s:ns:17", "k8s:sa:517")
		},
		"grid": func(n int) (out []*entryRecord, w []identity.Selector) {
			side := 1
			for side*side < n {
				side++
			}
			for i := range n {
				out = append(out, make(i, "k8s:cluster:prod", fmt.Sprint("k8s:ns:", i%side), fmt.Sprint("k8s:sa:", i/side)))
			}
			return out, workload("k8s:ns:3", "k8s:sa:4")
		},
	}
}

// The cost of a look-up, counted instead of timed, does not grow with the entries.
func TestMatchWorkIsBounded(t *testing.T) {
	for name, layout := range layouts() {
		for _, n := range []int{1_000, 100_000} {
			entries, workload := layout(n)
			x := newMatchIndex()
			for _, r := range entries {
				x.insert(r)
			}
			compared, visited := 0, 0
			var walk func(*node)
			walk = func(n *node) {
				visited++
				compared += len(n.own)
				for _, s := range workload {
					if kid := n.kids[s]; kid != nil {
						walk(kid)
					}
				}
			}
			walk(&x.root)
			if found := x.match(workload); len(found) != 1 || compared > 4*crowded || visited > len(workload) {
				t.Errorf("%s of %d: %d found, %d entries compared, %d nodes visited", name, n, len(found), compared, visited)
			}
		}
	}
}

func BenchmarkMatch(b *testing.B) {
	for name, layout := range layouts() {
		for _, n := range []int{1_000, 10_000, 100_000} {
			b.Run(fmt.Sprintf("layout=%s/entries=%d", name, n), func(b *testing.B) {
				entries, workload := layout(n)
				s := &Store{view: &view{entries: map[string]*entryRecord{}, index: newMatchIndex(), facts: newFactIndex()}}
				for _, r := range entries {
					s.view.putEntry(r)
				}
				b.ReportAllocs()
				for b.Loop() {
					if len(s.Match(workload)) != 1 {
						b.Fatal("no match")
					}
				}
			})
		}
	}
}
