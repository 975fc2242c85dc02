package server

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"countersign.io/countersign/attestor/kube"
	"countersign.io/countersign/identity"
)

// fakeState keeps the state in maps, and does what the contracts in state.go say.
type fakeState struct {
	td spiffeid.TrustDomain

	mu          sync.Mutex
	revision    uint64
	entries     map[string]*identity.Entry
	created     map[string]uint64
	clusters    map[string]*identity.KubeCluster
	agentsByID  map[string]*identity.Agent
	tokens      map[string]*identity.JoinToken // by hash
	authorities []identity.Authority
	foreign     map[string]identity.Foreign
	members     []identity.Member
	bundle      *identity.Bundle
	watchers    []chan []identity.Change
	rotations   map[identity.AuthorityKind]identity.Rotation
	down        error                     // what writes answer
	fault       func() (lost, late error) // of the next write: before it is done, and after
	swept       int
	level       uint32 // 0: 2
	admitted    int    // agents, each with its token in one write
}

func newFakeState(td spiffeid.TrustDomain) *fakeState {
	return &fakeState{
		td: td, entries: map[string]*identity.Entry{}, created: map[string]uint64{}, clusters: map[string]*identity.KubeCluster{},
		agentsByID: map[string]*identity.Agent{}, tokens: map[string]*identity.JoinToken{},
		bundle: &identity.Bundle{TrustDomain: td}, revision: 1,
	}
}

func (f *fakeState) Match(sel []identity.Selector) []*identity.Entry {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []*identity.Entry
	for _, e := range f.entries {
		if identity.Subset(e.Selectors, sel) {
			out = append(out, e)
		}
	}
	slices.SortFunc(out, func(a, b *identity.Entry) int { return cmp.Compare(f.created[a.ID], f.created[b.ID]) })
	return out
}

func (f *fakeState) FactsMatter(sel []identity.Selector) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, e := range f.entries {
		if rest := identity.WithoutFacts(e.Selectors); len(rest) < len(e.Selectors) && identity.Subset(rest, sel) {
			return true
		}
	}
	return false
}

func (f *fakeState) Interests() map[string]identity.Interest {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := map[string]identity.Interest{}
	for _, e := range f.entries {
		for _, s := range e.Selectors {
			if k := s.LabelKey(); k != "" {
				i := out[identity.KubeClusterOf(e.Selectors)]
				i.PodLabels = append(i.PodLabels, k)
				out[identity.KubeClusterOf(e.Selectors)] = i
			}
		}
	}
	return out
}

func (f *fakeState) Entry(id string) (*identity.Entry, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	e, ok := f.entries[id]
	return e, ok
}

func (f *fakeState) AdminEntries(id string) []*identity.Entry {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []*identity.Entry
	for _, e := range f.entries {
		if e.Power() != "" && e.SPIFFEID == id {
			out = append(out, e)
		}
	}
	return out
}

func page[T any](m map[string]*T, after string, limit int) ([]*T, string) {
	var out []*T
	for _, k := range slices.Sorted(maps.Keys(m)) {
		if k <= after {
			continue
		}
		if len(out) == limit {
			return out, after
		}
		out, after = append(out, m[k]), k
	}
	return out, ""
}

func (f *fakeState) Entries(after string, limit int) ([]*identity.Entry, string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return page(f.entries, after, limit)
}

func (f *fakeState) Agents(after string, limit int) ([]*identity.Agent, string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return page(f.agentsByID, after, limit)
}

func (f *fakeState) KubeCluster(name string) (*identity.KubeCluster, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	k, ok := f.clusters[name]
	return k, ok
}

func (f *fakeState) KubeClusters() []identity.KubeCluster {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []identity.KubeCluster
	for _, k := range f.clusters {
		out = append(out, *k)
	}
	return out
}

func (f *fakeState) Agent(id string) (*identity.Agent, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	a, ok := f.agentsByID[id]
	return a, ok
}

func (f *fakeState) NodeBanned(cluster, node string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, a := range f.agentsByID {
		if a.Banned && a.KubeNode != "" && a.KubeCluster == cluster && a.KubeNode == node {
			return true
		}
	}
	return false
}

func (f *fakeState) Authorities() []identity.Authority {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.authorities)
}

func (f *fakeState) Bundle() *identity.Bundle {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.bundle
}

func (f *fakeState) Members() []identity.Member {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.members)
}

func (f *fakeState) Revision() uint64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.revision
}

func (f *fakeState) Watch(ctx context.Context, fn func([]identity.Change)) error {
	ch := make(chan []identity.Change, 1<<16)
	f.mu.Lock()
	ch <- []identity.Change{{Reset: true, Revision: f.revision}}
	f.watchers = append(f.watchers, ch)
	f.mu.Unlock()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case c := <-ch:
			fn(c)
		}
	}
}

// write changes the state and tells the watchers.
func (f *fakeState) write(do func(rev uint64) (identity.Change, error)) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.down != nil {
		return f.down
	}
	var lost, late error
	if f.fault != nil {
		lost, late = f.fault()
	}
	if lost != nil {
		return lost
	}
	c, err := do(f.revision + 1)
	if err != nil {
		return err
	}
	f.revision++
	c.Revision = f.revision
	for _, ch := range f.watchers {
		ch <- []identity.Change{c}
	}
	return late
}

func (f *fakeState) CreateEntry(_ context.Context, now time.Time, e identity.Entry) (identity.Entry, error) {
	err := f.write(func(rev uint64) (identity.Change, error) {
		for _, o := range f.entries {
			if o.SPIFFEID == e.SPIFFEID && slices.Equal(o.Selectors, e.Selectors) {
				return identity.Change{}, fmt.Errorf("%w: entry %s says the same", identity.ErrExists, o.ID)
			}
		}
		e.CreatedAt, e.Revision = now, rev
		f.entries[e.ID], f.created[e.ID] = &e, rev
		return identity.Change{NewEntry: &e}, nil
	})
	return e, err
}

func (f *fakeState) UpdateEntry(_ context.Context, _ time.Time, e identity.Entry, ifRevision uint64) (identity.Entry, error) {
	err := f.write(func(rev uint64) (identity.Change, error) {
		old, ok := f.entries[e.ID]
		if !ok {
			return identity.Change{}, fmt.Errorf("%w: entry %q", identity.ErrNotFound, e.ID)
		}
		if ifRevision != 0 && ifRevision != old.Revision {
			return identity.Change{}, fmt.Errorf("%w: entry %q is at revision %d", identity.ErrPrecondition, e.ID, old.Revision)
		}
		e.CreatedAt, e.Revision = old.CreatedAt, rev
		f.entries[e.ID] = &e
		return identity.Change{OldEntry: old, NewEntry: &e}, nil
	})
	return e, err
}

func (f *fakeState) DeleteEntry(_ context.Context, id string) error {
	return f.write(func(uint64) (identity.Change, error) {
		old, ok := f.entries[id]
		if !ok {
			return identity.Change{}, fmt.Errorf("%w: entry %q", identity.ErrNotFound, id)
		}
		delete(f.entries, id)
		return identity.Change{OldEntry: old}, nil
	})
}

func (f *fakeState) PutKubeCluster(_ context.Context, k identity.KubeCluster, replace bool) (identity.KubeCluster, error) {
	err := f.write(func(rev uint64) (identity.Change, error) {
		if _, ok := f.clusters[k.Name]; ok && !replace {
			return identity.Change{}, fmt.Errorf("%w: kube cluster %q", identity.ErrExists, k.Name)
		}
		k.Revision = rev
		f.clusters[k.Name] = &k
		return identity.Change{KubeCluster: k.Name}, nil
	})
	return k, err
}

func (f *fakeState) DeleteKubeCluster(_ context.Context, name string) error {
	return f.write(func(uint64) (identity.Change, error) {
		if _, ok := f.clusters[name]; !ok {
			return identity.Change{}, fmt.Errorf("%w: kube cluster %q", identity.ErrNotFound, name)
		}
		delete(f.clusters, name)
		return identity.Change{KubeCluster: name}, nil
	})
}

func (f *fakeState) CreateJoinToken(_ context.Context, t identity.JoinToken) error {
	return f.write(func(uint64) (identity.Change, error) {
		f.tokens[string(t.Hash)] = &t
		return identity.Change{}, nil
	})
}

func (f *fakeState) UseJoinToken(_ context.Context, now time.Time, hash []byte, purpose string) (identity.JoinToken, error) {
	var out identity.JoinToken
	err := f.write(func(uint64) (identity.Change, error) {
		t, ok := f.tokens[string(hash)]
		switch {
		case !ok:
			return identity.Change{}, fmt.Errorf("%w: no such join token", identity.ErrUnauthenticated)
		case t.Purpose != purpose:
			return identity.Change{}, fmt.Errorf("%w: the token is for a %s", identity.ErrDenied, t.Purpose)
		case !t.UsedAt.IsZero():
			return identity.Change{}, fmt.Errorf("%w: the token was used", identity.ErrPrecondition)
		case !now.Before(t.ExpiresAt):
			return identity.Change{}, fmt.Errorf("%w: the token expired", identity.ErrUnauthenticated)
		}
		t.UsedAt = now
		out = *t
		return identity.Change{}, nil
	})
	return out, err
}

func (f *fakeState) PutAgent(_ context.Context, a identity.Agent) (identity.Agent, error) {
	err := f.write(func(rev uint64) (identity.Change, error) {
		if old, ok := f.agentsByID[a.ID]; ok && old.Banned {
			return identity.Change{}, fmt.Errorf("%w: agent %s is banned", identity.ErrDenied, a.ID)
		}
		a.Revision = rev
		f.agentsByID[a.ID] = &a
		return identity.Change{Agent: &a}, nil
	})
	return a, err
}

func (f *fakeState) BanAgent(_ context.Context, id string) error {
	return f.write(func(rev uint64) (identity.Change, error) {
		old, ok := f.agentsByID[id]
		if !ok {
			return identity.Change{}, fmt.Errorf("%w: agent %q", identity.ErrNotFound, id)
		}
		a := *old
		a.Banned, a.Revision = true, rev
		f.agentsByID[id] = &a
		return identity.Change{Agent: &a, AgentGone: true}, nil
	})
}

func (f *fakeState) EvictAgent(_ context.Context, id string) error {
	return f.write(func(uint64) (identity.Change, error) {
		a, ok := f.agentsByID[id]
		if !ok {
			return identity.Change{}, fmt.Errorf("%w: agent %q", identity.ErrNotFound, id)
		}
		delete(f.agentsByID, id)
		return identity.Change{Agent: a, AgentGone: true}, nil
	})
}

func (f *fakeState) CreateAuthority(_ context.Context, a identity.Authority) (identity.Authority, error) {
	err := f.write(func(rev uint64) (identity.Change, error) {
		for _, o := range f.authorities {
			if o.Kind == a.Kind && o.State == identity.AuthorityActive {
				a = o
				return identity.Change{}, nil
			}
		}
		a.Revision = rev
		f.authorities = append(f.authorities, a)
		f.rebundle()
		return identity.Change{Bundle: true}, nil
	})
	return a, err
}

func (f *fakeState) RemoveMember(_ context.Context, id string) error {
	return f.write(func(uint64) (identity.Change, error) {
		n := len(f.members)
		f.members = slices.DeleteFunc(slices.Clone(f.members), func(o identity.Member) bool { return o.ID == id })
		if len(f.members) == n {
			return identity.Change{}, fmt.Errorf("%w: member %q", identity.ErrNotFound, id)
		}
		return identity.Change{Members: true}, nil
	})
}

func (f *fakeState) Level() uint32 {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.level == 0 {
		return 2
	}
	return f.level
}

func (f *fakeState) SetLevel(_ context.Context, level uint32) error {
	return f.write(func(uint64) (identity.Change, error) {
		f.level = max(f.level, level)
		return identity.Change{Level: true}, nil
	})
}

func (f *fakeState) JoinToken(hash []byte) (identity.JoinToken, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if t, ok := f.tokens[string(hash)]; ok {
		return *t, true
	}
	return identity.JoinToken{}, false
}

func (f *fakeState) AdmitAgent(ctx context.Context, now time.Time, hash []byte, a identity.Agent) (identity.Agent, error) {
	f.mu.Lock()
	f.admitted++
	f.mu.Unlock()
	if _, err := f.UseJoinToken(ctx, now, hash, identity.JoinAgent); err != nil {
		return identity.Agent{}, err
	}
	return f.PutAgent(ctx, a)
}

func (f *fakeState) PutMember(_ context.Context, m identity.Member) error {
	return f.write(func(uint64) (identity.Change, error) {
		f.members = append(slices.DeleteFunc(slices.Clone(f.members), func(o identity.Member) bool { return o.ID == m.ID }), m)
		return identity.Change{Members: true}, nil
	})
}

func (f *fakeState) Sweep(context.Context, time.Time) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.swept++
	return f.down
}

// testPods is the real verifier; that a pod is gone, and what labels one has, is said by the test.
type testPods struct {
	*kube.Verifier
	tell  chan func(kube.Events)
	facts *testFacts
}

// testFacts are what stands for an API server's word, of every pod.
type testFacts struct {
	mu       sync.Mutex
	known    []identity.Selector // nil: this member cannot tell by itself
	asked    func() ([]identity.Selector, error)
	interest map[string]identity.Interest
}

func (p testPods) SetInterest(in map[string]identity.Interest) {
	p.facts.mu.Lock()
	defer p.facts.mu.Unlock()
	p.facts.interest = in
}

func (p testPods) KnownFacts(string, string, string) ([]identity.Selector, bool) {
	p.facts.mu.Lock()
	defer p.facts.mu.Unlock()
	return p.facts.known, p.facts.known != nil
}

func (p testPods) Facts(ctx context.Context, c *kube.Claims) ([]identity.Selector, error) {
	if known, ok := p.KnownFacts(c.Cluster, c.Namespace, c.PodUID); ok {
		return known, nil
	}
	p.facts.mu.Lock()
	defer p.facts.mu.Unlock()
	if p.facts.asked == nil {
		return nil, fmt.Errorf("%w: the API server at 10.0.0.1 is away", identity.ErrUnavailable)
	}
	return p.facts.asked()
}

// setFacts changes what is known of all pods; none means that it cannot be told.
func (p testPods) setFacts(sel ...identity.Selector) {
	p.facts.mu.Lock()
	defer p.facts.mu.Unlock()
	p.facts.known = sel
}

func (p testPods) Run(ctx context.Context, tell kube.Events) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case f := <-p.tell:
			f(tell)
		}
	}
}

func (p testPods) end(t *testing.T, cluster, podUID string) {
	t.Helper()
	p.tell <- func(tell kube.Events) { tell.Gone(cluster, podUID) }
}

func (p testPods) change(t *testing.T, cluster, namespace, podUID string) {
	t.Helper()
	p.tell <- func(tell kube.Events) { tell.Changed(cluster, namespace, podUID) }
}
