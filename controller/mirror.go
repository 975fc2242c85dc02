package controller

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"countersign.io/countersign/api"
	adminv1 "countersign.io/countersign/api/admin/v1"
	"countersign.io/countersign/identity"
)

// mirror is what there is of entries: those that a resource made, and the IDs of all others. It is read by the admin API, and then
// follows what a Watch tells, or is read again when it is older than it may be.
type mirror struct {
	admin adminv1.AdminClient
	every time.Duration // without a Watch
	told  bool          // by a Watch

	mu      sync.Mutex
	read    time.Time // zero: to be read again
	changes uint64    // that were told, so that a reading that they overtook is not taken for new
	byID    map[string]*identity.Entry
	byOwner map[string]map[string]*identity.Entry // ManagedBy -> ID
	// heads are the entries by the first segment of their path, which tells most IDs apart; "" those that begin with a placeholder
	heads map[string]map[string]*identity.Entry
}

func newMirror(admin adminv1.AdminClient, told bool, every time.Duration) *mirror {
	m := &mirror{admin: admin, every: every, told: told}
	m.clear()
	return m
}

func (m *mirror) clear() {
	m.byID, m.byOwner, m.heads = map[string]*identity.Entry{}, map[string]map[string]*identity.Entry{}, map[string]map[string]*identity.Entry{}
}

func head(template string) string {
	if path := pathOf(template); len(path) > 0 && !strings.Contains(path[0], "{") {
		return path[0]
	}
	return ""
}

func (m *mirror) put(e *identity.Entry) {
	m.drop(e.ID)
	m.byID[e.ID] = e
	add := func(to map[string]map[string]*identity.Entry, key string) {
		if to[key] == nil {
			to[key] = map[string]*identity.Entry{}
		}
		to[key][e.ID] = e
	}
	add(m.byOwner, e.ManagedBy)
	add(m.heads, head(e.SPIFFEID))
}

func (m *mirror) drop(id string) {
	old := m.byID[id]
	if old == nil {
		return
	}
	delete(m.byID, id)
	for from, key := range map[*map[string]map[string]*identity.Entry]string{&m.byOwner: old.ManagedBy, &m.heads: head(old.SPIFFEID)} {
		if delete((*from)[key], id); len((*from)[key]) == 0 {
			delete(*from, key)
		}
	}
}

// take follows changes of the state. It returns the owners of entries that changed, and whether others' did, or all may have.
func (m *mirror) take(changes []identity.Change) (owners []string, others bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, c := range changes {
		if c.Reset {
			m.read, others = time.Time{}, true
		}
		if c.OldEntry == nil && c.NewEntry == nil {
			continue
		}
		m.changes++
		if c.OldEntry != nil {
			m.drop(c.OldEntry.ID)
		}
		if c.NewEntry != nil {
			m.put(c.NewEntry)
		}
		for _, e := range []*identity.Entry{c.OldEntry, c.NewEntry} {
			if e != nil && e.ManagedBy != "" {
				owners = append(owners, e.ManagedBy)
			}
			others = others || e != nil && e.ManagedBy == ""
		}
	}
	return owners, others
}

// fresh reads the entries if what is known of them may be old.
func (m *mirror) fresh(ctx context.Context) error {
	for range 5 {
		m.mu.Lock()
		good := !m.read.IsZero() && (m.told || time.Since(m.read) < m.every)
		before := m.changes
		m.mu.Unlock()
		if good {
			return nil
		}
		all, err := m.list(ctx)
		if err != nil {
			return err
		}
		m.mu.Lock()
		if m.changes == before {
			m.clear()
			for _, e := range all {
				m.put(e)
			}
			m.read = time.Now()
		}
		m.mu.Unlock()
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.read.IsZero() {
		return fmt.Errorf("%w: the entries change faster than they can be read", identity.ErrUnavailable)
	}
	return nil
}

func (m *mirror) list(ctx context.Context) ([]*identity.Entry, error) {
	var out []*identity.Entry
	for page := (&adminv1.ListRequest{PageSize: 1000}); ; {
		res, err := m.admin.ListEntries(ctx, page)
		if err != nil {
			return nil, fmt.Errorf("listing the entries: %w", api.FromStatus(err))
		}
		for _, w := range res.Entries {
			e, err := api.EntryFromWire(w)
			if err != nil {
				return nil, fmt.Errorf("listing the entries: entry %s: %w", w.Id, err)
			}
			e.CreatedAt = api.TimeFromWire(w.CreatedAt)
			out = append(out, e)
		}
		if page.PageToken = res.NextPageToken; page.PageToken == "" {
			return out, nil
		}
	}
}

// of are the entries of an owner, by ID.
func (m *mirror) of(owner string) []*identity.Entry {
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []*identity.Entry
	for _, e := range m.byOwner[owner] {
		out = append(out, e)
	}
	slices.SortFunc(out, func(a, b *identity.Entry) int { return strings.Compare(a.ID, b.ID) })
	return out
}

// made takes up what this controller has just done itself: a Watch may tell it a moment later.
func (m *mirror) made(e *identity.Entry) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.changes++
	m.put(e)
}

func (m *mirror) unmade(id string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.changes++
	m.drop(id)
}

// overlapping are the entries that no WorkloadIdentity of this cluster made and that could give an ID that the template gives too,
// the oldest first.
func (m *mirror) overlapping(template string, ours func(owner string) bool) []*identity.Entry {
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []*identity.Entry
	for _, h := range []string{head(template), ""} {
		for _, e := range m.heads[h] {
			if !ours(e.ManagedBy) && overlap(e.SPIFFEID, template) {
				out = append(out, e)
			}
		}
		if h == "" {
			break
		}
	}
	slices.SortFunc(out, func(a, b *identity.Entry) int { return a.CreatedAt.Compare(b.CreatedAt) })
	return out
}
