package history

import (
	"fmt"
	"slices"
	"sync"
)

// Ledger keeps account of entries that are made once and perhaps deleted again. All methods can be called concurrently.
type Ledger struct {
	mu      sync.Mutex // guards what follows
	made    map[string]string
	gone    map[string]bool
	refused map[string]string
	unknown int
}

// NewLedger is an empty one.
func NewLedger() *Ledger {
	return &Ledger{made: map[string]string{}, gone: map[string]bool{}, refused: map[string]string{}}
}

// Made notes an acknowledged entry, by what it is for, and its ID.
func (l *Ledger) Made(name, id string) { l.set(func() { l.made[name] = id }) }

// Refused notes that an entry was not made, and was said not to be.
func (l *Ledger) Refused(name, why string) { l.set(func() { l.refused[name] = why }) }

// Deleted notes that an entry's deletion was acknowledged.
func (l *Ledger) Deleted(name string) { l.set(func() { delete(l.made, name); l.gone[name] = true }) }

// Unsure notes that an entry may be there, or not.
func (l *Ledger) Unsure(name string) { l.set(func() { delete(l.made, name); l.unknown++ }) }

func (l *Ledger) set(f func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	f()
}

// Acknowledged is the number of acknowledged writes; Unknown that of lost answers.
func (l *Ledger) Acknowledged() (n int) {
	l.set(func() { n = len(l.made) + 2*len(l.gone) })
	return n
}

// Unknown is the number of writes whose answer is lost.
func (l *Ledger) Unknown() (n int) {
	l.set(func() { n = l.unknown })
	return n
}

// Compare says what a member, once it has heard of all writes, has otherwise than it was told: lost are acknowledged writes.
func (l *Ledger) Compare(there map[string]string) (lost, wrong []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for name, id := range l.made {
		if there[name] != id {
			lost = append(lost, fmt.Sprintf("%s was made as %s, and is %q", name, id, there[name]))
		}
	}
	for name := range l.gone {
		if there[name] != "" {
			lost = append(lost, name+" was deleted, and is there")
		}
	}
	for name, why := range l.refused {
		if there[name] != "" {
			wrong = append(wrong, fmt.Sprintf("%s is there, though it was refused: %s", name, why))
		}
	}
	slices.Sort(lost)
	slices.Sort(wrong)
	return lost, wrong
}

// Serials knows every serial number that was seen, and whose it is. All methods can be called concurrently.
type Serials struct {
	mu    sync.Mutex // guards what follows
	seen  map[string]string
	twice []string
}

// NewSerials is an empty one.
func NewSerials() *Serials { return &Serials{seen: map[string]string{}} }

// Add notes a credential: its issuer and serial number (or a JWT's ID), its bytes, and who gave it. The same bytes may come
// again.
func (s *Serials) Add(serial, credential, from string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if old, ok := s.seen[serial]; ok && old != credential {
		s.twice = append(s.twice, fmt.Sprintf("serial %s came again from %s", serial, from))
	}
	s.seen[serial] = credential
}

// Len is the number of different serials.
func (s *Serials) Len() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.seen)
}

// Twice lists the serials that came for two credentials.
func (s *Serials) Twice() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.twice)
}

// Authority is a signing key as some member sees it.
type Authority struct{ ID, Kind, State string }

// OneActive says what is wrong with a member's authorities: there is at the most one active of each kind.
func OneActive(list []Authority) error {
	active := map[string]string{}
	for _, a := range list {
		if a.State != "active" {
			continue
		}
		if other, ok := active[a.Kind]; ok {
			return fmt.Errorf("two %s authorities are active: %s and %s", a.Kind, other, a.ID)
		}
		active[a.Kind] = a.ID
	}
	return nil
}
