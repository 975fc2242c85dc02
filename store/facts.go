package store

import (
	"maps"
	"slices"

	"countersign.io/countersign/identity"
)

// factIndex knows of the entries with facts (labels, owners) which pods they could concern, and what there is to be known of those.
type factIndex struct {
	possible *matchIndex         // by their other selectors
	uses     map[string]*factUse // by kube cluster
}

// factUse counts the entries that name each label and an owner.
type factUse struct {
	podLabels, nsLabels map[string]int
	owners              int
}

func newFactIndex() *factIndex {
	return &factIndex{possible: newMatchIndex(), uses: make(map[string]*factUse)}
}

func (x *factIndex) insert(r *entryRecord) {
	rest := identity.WithoutFacts(r.Selectors)
	if len(rest) == len(r.Selectors) {
		return
	}
	x.possible.insert(&entryRecord{Created: r.Created, Entry: identity.Entry{ID: r.ID, Selectors: rest}})
	x.count(&r.Entry, 1)
}

func (x *factIndex) remove(r *entryRecord) {
	if len(identity.WithoutFacts(r.Selectors)) == len(r.Selectors) {
		return
	}
	x.possible.remove(r.ID)
	x.count(&r.Entry, -1)
}

func (x *factIndex) count(e *identity.Entry, by int) {
	cluster := identity.KubeClusterOf(e.Selectors)
	u := x.uses[cluster]
	if u == nil {
		u = &factUse{podLabels: make(map[string]int), nsLabels: make(map[string]int)}
		x.uses[cluster] = u
	}
	add := func(m map[string]int, key string) {
		if m[key] += by; m[key] == 0 {
			delete(m, key)
		}
	}
	for _, s := range e.Selectors {
		switch s.Name() {
		case identity.SelectorPodLabel, identity.SelectorPodLabelKey:
			add(u.podLabels, s.LabelKey())
		case identity.SelectorNSLabel, identity.SelectorNSLabelKey:
			add(u.nsLabels, s.LabelKey())
		case identity.SelectorPodOwner:
			u.owners += by
		}
	}
	if len(u.podLabels) == 0 && len(u.nsLabels) == 0 && u.owners == 0 {
		delete(x.uses, cluster)
	}
}

// FactsMatter reports whether an entry could match a workload with these selectors, if its labels or owner were known.
func (s *Store) FactsMatter(sel []identity.Selector) bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.view.facts.possible.root.any(sel)
}

// Interests are which facts entries name, by kube cluster; of a cluster without any there is none.
func (s *Store) Interests() map[string]identity.Interest {
	s.mu.RLock()
	defer s.mu.RUnlock()
	out := make(map[string]identity.Interest, len(s.view.facts.uses))
	for cluster, u := range s.view.facts.uses {
		out[cluster] = identity.Interest{
			PodLabels: slices.Sorted(maps.Keys(u.podLabels)), NamespaceLabels: slices.Sorted(maps.Keys(u.nsLabels)), Owners: u.owners > 0,
		}
	}
	return out
}
