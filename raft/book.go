package raft

import (
	"cmp"
	"slices"
	"sync"
)

// What the book holds at the most: a member's addresses, and members.
const (
	maxCandidates = 8
	maxBook       = 64
)

// peerAddress is where a member was.
type peerAddress struct {
	ID      string `json:"id"`
	Address string `json:"address"`
}

// book knows where each member may be. All of it is hints: a connection is made to a member, not to an address
// (Config.Dial), so a wrong hint costs one failed attempt, after which the next is tried. So nothing here needs
// an order of events, and a lie about another member cannot hide it.
type book struct {
	self string

	mu      sync.Mutex
	entries map[string][]string // by member, never empty; what is tried first comes first
	changed bool                // since it was last saved
}

func newBook(self string) *book { return &book{self: self, entries: map[string][]string{}} }

// where is the address to try for a member that the configuration has at fallback.
func (b *book) where(id, fallback string) string {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.addLocked(id, fallback)
	if known := b.entries[id]; len(known) > 0 {
		return known[0]
	}
	return fallback
}

// heard notes an address that somebody else, or the configuration, has of a member.
func (b *book) heard(id, address string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.addLocked(id, address)
}

func (b *book) addLocked(id, address string) {
	known := b.entries[id]
	if id == b.self || !validAddress(id, address) || slices.Contains(known, address) || len(known) == 0 && len(b.entries) >= maxBook {
		return
	}
	if len(known) == maxCandidates {
		known = known[:maxCandidates-1] // the first is where it was last found: it stays
	}
	b.entries[id] = append(known, address)
	b.changed = true
}

// found notes that a member is at the address: it was reached there, or said so itself.
func (b *book) found(id, address string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.addLocked(id, address)
	known := b.entries[id]
	if i := slices.Index(known, address); i > 0 {
		copy(known[1:], known[:i])
		known[0] = address
		b.changed = true
	}
}

// failed notes that a member could not be reached at the address: next time another is tried.
func (b *book) failed(id, address string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if known := b.entries[id]; len(known) > 1 && known[0] == address {
		copy(known, known[1:])
		known[len(known)-1] = address
	}
}

// first is the address of each member that is tried first, by id.
func (b *book) first() []peerAddress {
	b.mu.Lock()
	defer b.mu.Unlock()
	out := make([]peerAddress, 0, len(b.entries))
	for id, known := range b.entries {
		out = append(out, peerAddress{id, known[0]})
	}
	slices.SortFunc(out, func(x, y peerAddress) int { return cmp.Compare(x.ID, y.ID) })
	return out
}

// retain forgets all members but the named ones.
func (b *book) retain(ids map[string]bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for id := range b.entries {
		if !ids[id] {
			delete(b.entries, id)
			b.changed = true
		}
	}
}

// validAddress tells whether an id and an address are such as AddMember takes, and can be kept in the book.
func validAddress(id, address string) bool {
	if id == "" || address == "" || len(id)+len(address) > 1024 {
		return false
	}
	for _, s := range []string{id, address} {
		for i := range len(s) {
			if s[i] < ' ' || s[i] == 0x7f {
				return false
			}
		}
	}
	return true
}
