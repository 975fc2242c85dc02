package store

import (
	"cmp"
	"maps"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.etcd.io/bbolt"

	"countersign.io/countersign/identity"
)

// view is the decoded state that reads are answered from. Its maps change under Store.mu; the values they hold
// never do.
type view struct {
	revision    uint64
	level       uint32
	entries     map[string]*entryRecord
	index       *matchIndex
	facts       *factIndex
	agents      map[string]*identity.Agent
	bannedNodes map[kubeNode]struct{}        // those that a banned agent speaks for; a ban is for good, so this only grows
	downstream  map[string][]*entryRecord    // by SPIFFE ID, those that are; the slices never change
	admins      map[string][]*identity.Entry // by SPIFFE ID, those that give power; the slices never change
	kube        map[string]*identity.KubeCluster
	*vouched
	members []*identity.Member
	seal    []*identity.SealTerm
	rotate  []*identity.Rotation

	federations map[string]*federation // by trust domain
}

type kubeNode struct{ cluster, name string }

func loadView(tx *bbolt.Tx, td spiffeid.TrustDomain) (*view, error) {
	t := state{tx}
	v := &view{
		revision: t.counter(metaApplied), entries: make(map[string]*entryRecord), index: newMatchIndex(), facts: newFactIndex(),
		agents: make(map[string]*identity.Agent), bannedNodes: make(map[kubeNode]struct{}), kube: make(map[string]*identity.KubeCluster),
		downstream: make(map[string][]*entryRecord), admins: make(map[string][]*identity.Entry), federations: make(map[string]*federation),
	}
	var err error
	if v.level, err = t.level(); err != nil {
		return nil, err
	}
	entries, err := all[entryRecord](t, kindEntry)
	if err != nil {
		return nil, err
	}
	for _, r := range entries {
		v.putEntry(r)
	}
	agents, err := all[identity.Agent](t, kindAgent)
	if err != nil {
		return nil, err
	}
	for _, a := range agents {
		v.putAgent(a)
	}
	kube, err := all[identity.KubeCluster](t, kindKubeCluster)
	if err != nil {
		return nil, err
	}
	for _, k := range kube {
		v.kube[k.Name] = k
	}
	if v.vouched, err = loadVouched(t, td, v.level); err != nil {
		return nil, err
	}
	if v.members, err = all[identity.Member](t, kindMember); err != nil {
		return nil, err
	}
	if v.seal, err = all[identity.SealTerm](t, kindSealTerm); err != nil {
		return nil, err
	}
	if v.rotate, err = all[identity.Rotation](t, kindRotation); err != nil {
		return nil, err
	}
	federations, err := all[identity.Federation](t, kindFederation)
	for _, f := range federations {
		v.federations[f.TrustDomain] = newFederation(f)
	}
	return v, err
}

func (v *view) putEntry(r *entryRecord) {
	v.removeEntry(r.ID)
	v.entries[r.ID] = r
	v.index.insert(r)
	v.facts.insert(r)
	if r.Downstream {
		v.downstream[r.SPIFFEID] = append(slices.Clone(v.downstream[r.SPIFFEID]), r)
	}
	if r.Power() != "" {
		v.admins[r.SPIFFEID] = append(slices.Clone(v.admins[r.SPIFFEID]), &r.Entry)
	}
}

func (v *view) removeEntry(id string) {
	old := v.entries[id]
	if old == nil {
		return
	}
	delete(v.entries, id)
	v.index.remove(id)
	v.facts.remove(old)
	if old.Downstream {
		without(v.downstream, old.SPIFFEID, func(r *entryRecord) bool { return r.ID == id })
	}
	if old.Power() != "" {
		without(v.admins, old.SPIFFEID, func(e *identity.Entry) bool { return e.ID == id })
	}
}

// without takes what goes out of a slice that readers may have.
func without[T any](m map[string][]T, key string, goes func(T) bool) {
	if rest := slices.DeleteFunc(slices.Clone(m[key]), goes); len(rest) > 0 {
		m[key] = rest
	} else {
		delete(m, key)
	}
}

func (v *view) putAgent(a *identity.Agent) {
	v.agents[a.ID] = a
	if a.Banned && a.KubeNode != "" {
		v.bannedNodes[kubeNode{a.KubeCluster, a.KubeNode}] = struct{}{}
	}
}

// apply makes a change visible and says what a watcher is to hear of it.
func (v *view) apply(c change) identity.Change {
	out := identity.Change{Revision: c.revision, Agent: c.agent, AgentGone: c.agentGone, Bundle: c.vouched != nil && c.level == 0,
		Members: c.membersChanged, Seal: c.sealChanged, Level: c.level != 0, Rotation: c.rotations != nil}
	switch {
	case c.putEntry != nil:
		if old := v.entries[c.putEntry.ID]; old != nil {
			out.OldEntry = &old.Entry
		}
		out.NewEntry = &c.putEntry.Entry
		v.putEntry(c.putEntry)
	case c.deleteEntry != "":
		if old := v.entries[c.deleteEntry]; old != nil {
			out.OldEntry = &old.Entry
		}
		v.removeEntry(c.deleteEntry)
	case c.agent != nil && c.agentGone && !c.agent.Banned:
		delete(v.agents, c.agent.ID)
	case c.agent != nil:
		v.putAgent(c.agent)
	case c.putKube != nil:
		out.KubeCluster = c.putKube.Name
		v.kube[c.putKube.Name] = c.putKube
	case c.deleteKube != "":
		out.KubeCluster = c.deleteKube
		delete(v.kube, c.deleteKube)
	case c.putFederation != nil:
		out.Federation = c.putFederation.TrustDomain
		v.federations[c.putFederation.TrustDomain] = newFederation(c.putFederation)
	case c.deleteFederation != "":
		out.Federation = c.deleteFederation
		delete(v.federations, c.deleteFederation)
	case c.level != 0:
		v.level, v.vouched = c.level, c.vouched
	case c.vouched != nil:
		v.vouched = c.vouched
	case c.membersChanged:
		v.members = c.members
	case c.sealChanged:
		v.seal = c.seal
	case c.rotations != nil:
		v.rotate = c.rotations
	}
	return out
}

// Revision is the log index of the last applied command.
func (s *Store) Revision() uint64 {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.view.revision
}

// Entry returns the entry with the ID.
func (s *Store) Entry(id string) (*identity.Entry, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if r := s.view.entries[id]; r != nil {
		return &r.Entry, true
	}
	return nil, false
}

// Match returns the entries whose selectors are all among sel, the earliest created first: that one is the
// workload's default. Expired ones are among them until they are swept: see Entry.Expired.
func (s *Store) Match(sel []identity.Selector) []*identity.Entry {
	if !slices.IsSorted(sel) {
		sel = identity.SortSelectors(slices.Clone(sel))
	}
	s.mu.RLock()
	found := s.view.index.match(sel)
	s.mu.RUnlock()
	slices.SortFunc(found, func(a, b *entryRecord) int { return cmp.Compare(a.Created, b.Created) })
	out := make([]*identity.Entry, len(found))
	for i, r := range found {
		out[i] = &r.Entry
	}
	return out
}

// DownstreamIDs returns the SPIFFE IDs that downstream entries have, sorted.
func (s *Store) DownstreamIDs() []string {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return slices.Sorted(maps.Keys(s.view.downstream))
}

// Downstream returns the downstream entry with exactly this SPIFFE ID; of several the one that lasts longest. It may have
// expired and not be swept yet: see Entry.Expired.
func (s *Store) Downstream(id string) (*identity.Entry, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	var best *entryRecord
	for _, r := range s.view.downstream[id] {
		if best == nil || lasts(r, best) {
			best = r
		}
	}
	if best == nil {
		return nil, false
	}
	return &best.Entry, true
}

// AdminEntries returns the entries that make an admin of whoever has exactly this SPIFFE ID, in a slice that never changes. Some
// may have expired and not be swept yet: see Entry.Expired.
func (s *Store) AdminEntries(id string) []*identity.Entry {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.view.admins[id]
}

// lasts orders by expiry, never being the last, and then by age.
func lasts(r, than *entryRecord) bool {
	switch {
	case r.ExpiresAt.Equal(than.ExpiresAt):
		return r.Created < than.Created
	case r.ExpiresAt.IsZero() || than.ExpiresAt.IsZero():
		return r.ExpiresAt.IsZero()
	}
	return r.ExpiresAt.After(than.ExpiresAt)
}

// JoinToken returns what the cluster remembers of the join secret with that SHA-256, used and expired ones too until they
// are swept. It admits nobody: that is AdmitAgent and UseJoinToken.
func (s *Store) JoinToken(hash []byte) (identity.JoinToken, bool) {
	var out identity.JoinToken
	found := false
	err := s.db.View(func(tx *bbolt.Tx) error {
		j, err := get[identity.JoinToken](state{tx}, kindJoinToken, string(hash))
		if j != nil {
			out, found = *j, true
		}
		return err
	})
	return out, found && err == nil
}

// Agent returns the record of the agent with the SPIFFE ID, banned or not.
func (s *Store) Agent(id string) (*identity.Agent, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	a, ok := s.view.agents[id]
	return a, ok
}

// NodeBanned reports whether an agent that speaks for the Kubernetes node is banned.
func (s *Store) NodeBanned(cluster, node string) bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	_, ok := s.view.bannedNodes[kubeNode{cluster, node}]
	return ok
}

// KubeCluster returns the registration of that name.
func (s *Store) KubeCluster(name string) (*identity.KubeCluster, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	k, ok := s.view.kube[name]
	return k, ok
}

// KubeClusters returns all registrations by name.
func (s *Store) KubeClusters() []identity.KubeCluster {
	s.mu.RLock()
	out := make([]identity.KubeCluster, 0, len(s.view.kube))
	for _, k := range s.view.kube {
		out = append(out, *k)
	}
	s.mu.RUnlock()
	slices.SortFunc(out, func(a, b identity.KubeCluster) int { return cmp.Compare(a.Name, b.Name) })
	return out
}

// Authorities returns all authorities, in whatever state, ordered by kind and ID.
func (s *Store) Authorities() []identity.Authority {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return values(s.view.authorities)
}

// Rotations returns the rotation of each kind that is under way, or was the last.
func (s *Store) Rotations() []identity.Rotation {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return values(s.view.rotate)
}

// Bundle is what the trust domain vouches for; its sequence is 0 while there are no authorities yet.
func (s *Store) Bundle() *identity.Bundle {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.view.bundle
}

// Members returns the members as registered, by ID.
func (s *Store) Members() []identity.Member {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return values(s.view.members)
}

// Counts is how many records of a kind there are.
type Counts struct{ Entries, Agents, Banned int }

// Counts counts; the time that it takes goes by the number of agents.
func (s *Store) Counts() Counts {
	s.mu.RLock()
	defer s.mu.RUnlock()
	c := Counts{Entries: len(s.view.entries), Agents: len(s.view.agents)}
	for _, a := range s.view.agents {
		if a.Banned {
			c.Banned++
		}
	}
	return c
}

func values[T any](in []*T) []T {
	out := make([]T, len(in))
	for i, v := range in {
		out[i] = *v
	}
	return out
}

// DefaultPage is the page size of listings that ask for none.
const DefaultPage = 500

// Entries returns up to limit entries (0: DefaultPage) in the order of their IDs, after the given one, and the ID to
// go on after; it is empty at the end. Going through the pages gives every entry that was there all the time exactly
// once, whatever is created and deleted meanwhile.
func (s *Store) Entries(after string, limit int) (page []*identity.Entry, next string) {
	keys, next := s.keys(kindEntry, after, limit)
	s.mu.RLock()
	defer s.mu.RUnlock()
	for _, k := range keys {
		if r := s.view.entries[k]; r != nil {
			page = append(page, &r.Entry)
		}
	}
	return page, next
}

// Agents is as Entries, for agents, banned ones too.
func (s *Store) Agents(after string, limit int) (page []*identity.Agent, next string) {
	keys, next := s.keys(kindAgent, after, limit)
	s.mu.RLock()
	defer s.mu.RUnlock()
	for _, k := range keys {
		if a := s.view.agents[k]; a != nil {
			page = append(page, a)
		}
	}
	return page, next
}

// keys lists from the file, which keeps its keys in order. A command that is being applied may be in the file and not
// yet in the view, or the other way round; the listing then has the view's word.
func (s *Store) keys(k kind, after string, limit int) (page []string, next string) {
	if limit <= 0 {
		limit = DefaultPage
	}
	err := s.db.View(func(tx *bbolt.Tx) error {
		c := state{tx}.table(k).Cursor()
		key, _ := c.Seek([]byte(after))
		if string(key) == after && after != "" {
			key, _ = c.Next()
		}
		for ; key != nil && len(page) < limit; key, _ = c.Next() {
			page = append(page, string(key))
		}
		if key != nil {
			next = page[len(page)-1]
		}
		return nil
	})
	if err != nil { // closed
		return nil, ""
	}
	return page, next
}
