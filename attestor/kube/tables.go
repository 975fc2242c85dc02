package kube

import (
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// podTable keeps of a pod its UID, and the facts that entries name.
type podTable struct {
	a    *apiServer
	want *interest
	tell Events
	next map[string]*facts
	end  map[string]time.Time
	size int
}

func (t *podTable) begin() {
	t.next, t.end, t.size = make(map[string]*facts), make(map[string]time.Time), 0
}

func (t *podTable) listed(m *metav1.PartialObjectMetadata) {
	id := string(m.UID)
	if !uid.MatchString(id) {
		return
	}
	f := podFacts(m, t.want)
	if t.size += f.bytes(); t.size > maxFactBytes {
		t.size -= f.bytes()
		f = nil
	}
	t.next[id] = f
	if at, ok := endOf(m); ok {
		t.end[id] = at
	}
}

func (t *podTable) len() int { return len(t.next) }

func (t *podTable) commit() {
	gone, changed := t.a.pods.replace(t.next, t.end, t.size, t.a.cfg.Now())
	t.next, t.end = nil, nil
	for _, id := range gone {
		t.tell.Gone(t.a.cluster, id)
	}
	for _, id := range changed {
		t.tell.Changed(t.a.cluster, "", id)
	}
}

func (t *podTable) put(m *metav1.PartialObjectMetadata) {
	if id := string(m.UID); uid.MatchString(id) && t.a.pods.add(m, podFacts(m, t.want)) {
		t.tell.Changed(t.a.cluster, m.Namespace, id)
	}
}

func (t *podTable) drop(m *metav1.PartialObjectMetadata) {
	if id := string(m.UID); uid.MatchString(id) {
		t.a.pods.remove(id)
		t.tell.Gone(t.a.cluster, id)
	}
}

func (t *podTable) setState(watching bool, fault error) bool {
	return t.a.pods.setState(watching, fault, t.a.cfg.Now())
}

// objectTable is what namespaceTable and replicaSetTable have in common.
type objectTable struct {
	seen  map[string]struct{}
	fault string
}

func (t *objectTable) begin() { t.seen = make(map[string]struct{}) }

func (t *objectTable) len() int { return len(t.seen) }

// isNews reports whether the fault is another than the last.
func (t *objectTable) isNews(fault error) bool {
	text := ""
	if fault != nil {
		text = fault.Error()
	}
	is := text != "" && text != t.fault
	t.fault = text
	return is
}

// namespaceTable keeps of a namespace the labels that entries name, by its name.
type namespaceTable struct {
	objectTable
	a    *apiServer
	want *interest
	tell Events
	news []string // of lists, until one is whole
}

func (t *namespaceTable) listed(m *metav1.PartialObjectMetadata) {
	t.seen[m.Name] = struct{}{}
	if t.keep(m) {
		t.news = append(t.news, m.Name)
	}
}

// commit tells only now: before a first list is whole, nothing of it counts.
func (t *namespaceTable) commit() {
	t.a.namespaces.keepOnly(t.seen, t.a.cfg.Now())
	for _, name := range t.news {
		t.tell.Changed(t.a.cluster, name, "")
	}
	t.news = nil
}

// keep reports whether it is news.
func (t *namespaceTable) keep(m *metav1.PartialObjectMetadata) bool {
	f := namespaceFacts(m, t.want)
	old, _ := t.a.namespaces.put(m.Name, f)
	return !f.equal(old)
}

func (t *namespaceTable) put(m *metav1.PartialObjectMetadata) {
	if t.keep(m) {
		t.tell.Changed(t.a.cluster, m.Name, "")
	}
}

func (t *namespaceTable) drop(m *metav1.PartialObjectMetadata) { t.a.namespaces.remove(m.Name) }

func (t *namespaceTable) setState(watching bool, fault error) bool {
	t.a.namespaces.setState(watching, t.a.cfg.Now())
	return t.isNews(fault)
}

// replicaSetTable keeps of a ReplicaSet its controller, by its UID. It tells of the pods only where one was looked up before its
// ReplicaSet was known, or the ReplicaSet was orphaned or adopted: a new one has no pods yet.
type replicaSetTable struct {
	objectTable
	a    *apiServer
	want *interest
	tell Events
	news map[string]struct{} // of lists, until one is whole
}

func (t *replicaSetTable) listed(m *metav1.PartialObjectMetadata) {
	t.seen[string(m.UID)] = struct{}{}
	if t.keep(m) {
		t.news[string(m.UID)] = struct{}{}
	}
}

func (t *replicaSetTable) commit() {
	t.a.replicaSets.keepOnly(t.seen, t.a.cfg.Now())
	t.tellOf(t.news)
	clear(t.news)
}

// keep reports whether pods may be concerned.
func (t *replicaSetTable) keep(m *metav1.PartialObjectMetadata) bool {
	id := string(m.UID)
	if !uid.MatchString(id) {
		return false
	}
	f := replicaSetFacts(m, t.want)
	old, awaited := t.a.replicaSets.put(id, f)
	return awaited || old != nil && old.owner != f.owner
}

func (t *replicaSetTable) tellOf(sets map[string]struct{}) {
	if len(sets) == 0 {
		return
	}
	for _, pod := range t.a.pods.owned(sets) {
		t.tell.Changed(t.a.cluster, "", pod)
	}
}

func (t *replicaSetTable) put(m *metav1.PartialObjectMetadata) {
	if t.keep(m) {
		t.tellOf(map[string]struct{}{string(m.UID): {}})
	}
}

func (t *replicaSetTable) drop(m *metav1.PartialObjectMetadata) {
	t.a.replicaSets.remove(string(m.UID))
}

func (t *replicaSetTable) setState(watching bool, fault error) bool {
	t.a.replicaSets.setState(watching, t.a.cfg.Now())
	return t.isNews(fault)
}
