package store

import (
	"testing"

	"countersign.io/countersign/identity"
)

// TestFactIndex: which facts are named, and of which pods, follows the entries as they come, change and go.
func TestFactIndex(t *testing.T) {
	v := &view{entries: map[string]*entryRecord{}, index: newMatchIndex(), facts: newFactIndex()}
	s := &Store{view: v}
	rec := func(id string, selectors ...string) *entryRecord {
		return &entryRecord{Entry: identity.Entry{ID: id, Selectors: sel(selectors...)}}
	}
	pod := sel("k8s:cluster:main", "k8s:ns:prod", "k8s:sa:web")
	if s.FactsMatter(pod) || len(s.Interests()) != 0 {
		t.Error("an empty state names facts")
	}
	v.putEntry(rec("plain", "k8s:cluster:main", "k8s:ns:prod"))
	if s.FactsMatter(pod) || len(s.Interests()) != 0 {
		t.Error("an entry without facts names some")
	}
	v.putEntry(rec("a", "k8s:cluster:main", "k8s:ns:prod", "k8s:pod-label:app:web"))
	v.putEntry(rec("b", "k8s:cluster:main", "k8s:ns:dev", "k8s:pod-label-key:app", "k8s:ns-label:env:x", "k8s:pod-owner:Job:j"))
	v.putEntry(rec("c", "k8s:cluster:other", "k8s:pod-label:team:x"))
	for _, tc := range []struct {
		sel  []identity.Selector
		want bool
	}{
		{pod, true}, {sel("k8s:cluster:main", "k8s:ns:dev"), true}, {sel("k8s:cluster:main", "k8s:ns:test"), false},
		{sel("k8s:cluster:other", "k8s:ns:test"), true}, {sel("k8s:cluster:third", "k8s:ns:prod"), false},
	} {
		if got := s.FactsMatter(tc.sel); got != tc.want {
			t.Errorf("%v: %t", tc.sel, got)
		}
	}
	if len(s.Match(sel("k8s:cluster:main", "k8s:ns:prod"))) != 1 {
		t.Error("an entry matches without its label")
	}
	i := s.Interests()
	if m := i["main"]; len(i) != 2 || len(m.PodLabels) != 1 || m.PodLabels[0] != "app" || len(m.NamespaceLabels) != 1 || !m.Owners {
		t.Errorf("interests %v", i)
	}
	v.putEntry(rec("b", "k8s:cluster:main", "k8s:ns:dev", "k8s:ns-label:env:x"))
	v.removeEntry("a")
	if m := s.Interests()["main"]; len(m.PodLabels) != 0 || len(m.NamespaceLabels) != 1 || m.Owners || s.FactsMatter(pod) {
		t.Errorf("interest %v", m)
	}
	v.removeEntry("b")
	v.removeEntry("c")
	if len(s.Interests()) != 0 || len(v.facts.possible.home) != 0 || v.facts.possible.root.size != 0 {
		t.Error("an empty state names facts")
	}
}
