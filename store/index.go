package store

import (
	"slices"

	"countersign.io/countersign/identity"
)

// matchIndex finds the entries whose selectors are all among a workload's, without looking at the others.
//
// It is a tree. An entry hangs below selectors of its own: at the root below the one that has the fewest entries
// at that time, and where a node gets crowded, below a second one, and so on. A look-up follows the workload's
// selectors only, so that its cost depends on how many those are (and on how many entries match), not on how many
// entries there are: not even when each selector alone is common, as namespaces x service accounts are.
type matchIndex struct {
	root node
	home map[string]*node // entry ID -> where it hangs
}

type node struct {
	parent *node
	via    identity.Selector // below the parent
	size   int               // entries here and below
	own    []*entryRecord
	kids   map[identity.Selector]*node // nil until the node is crowded; always there at the root
}

// crowded is how many entries a node holds before it spreads them: comparing a few entries is cheaper than
// looking up every selector of the workload.
const crowded = 16

func newMatchIndex() *matchIndex {
	return &matchIndex{root: node{kids: make(map[identity.Selector]*node)}, home: make(map[string]*node)}
}

func (x *matchIndex) insert(r *entryRecord) { x.place(&x.root, r) }

func (x *matchIndex) place(n *node, r *entryRecord) {
	for {
		n.size++
		next := n.choose(r)
		if next == nil {
			break
		}
		n = next
	}
	n.own = append(n.own, r)
	x.home[r.ID] = n
	if n.kids == nil && len(n.own) > crowded {
		crowd := n.own
		n.own, n.kids = nil, make(map[identity.Selector]*node)
		n.size -= len(crowd)
		for _, r := range crowd {
			x.place(n, r)
		}
	}
}

// choose is the node below n that an entry goes to: below the selector with the fewest entries. It is nil when n is
// the place: n is not crowded, or the way to n has all the entry's selectors already.
func (n *node) choose(r *entryRecord) *node {
	if n.kids == nil {
		return nil
	}
	var best *node
	for _, s := range r.Selectors {
		if n.below(s) {
			continue
		}
		kid := n.kids[s]
		if kid == nil {
			kid = &node{parent: n, via: s}
			n.kids[s] = kid
			return kid
		}
		if best == nil || kid.size < best.size {
			best = kid
		}
	}
	return best
}

func (n *node) below(s identity.Selector) bool {
	for ; n.parent != nil; n = n.parent {
		if n.via == s {
			return true
		}
	}
	return false
}

func (x *matchIndex) remove(id string) {
	n := x.home[id]
	if n == nil {
		return
	}
	delete(x.home, id)
	n.own = slices.DeleteFunc(n.own, func(r *entryRecord) bool { return r.ID == id })
	for ; n != nil; n = n.parent {
		n.size--
		if n.size == 0 && n.parent != nil {
			delete(n.parent.kids, n.via)
		}
	}
}

// match expects sorted selectors.
func (x *matchIndex) match(sel []identity.Selector) []*entryRecord {
	var out []*entryRecord
	x.root.match(sel, &out)
	return out
}

func (n *node) match(sel []identity.Selector, out *[]*entryRecord) {
	for _, r := range n.own {
		if identity.Subset(r.Selectors, sel) {
			*out = append(*out, r)
		}
	}
	if len(n.kids) == 0 {
		return
	}
	for _, s := range sel {
		if kid := n.kids[s]; kid != nil {
			kid.match(sel, out)
		}
	}
}

// any reports whether match would find anything.
func (n *node) any(sel []identity.Selector) bool {
	for _, r := range n.own {
		if identity.Subset(r.Selectors, sel) {
			return true
		}
	}
	if len(n.kids) > 0 {
		for _, s := range sel {
			if kid := n.kids[s]; kid != nil && kid.any(sel) {
				return true
			}
		}
	}
	return false
}
