package kube

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"
	"unique"

	lru "github.com/hashicorp/golang-lru/v2"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"countersign.io/countersign/identity"
)

// Facts are what an API server says of a pod that its token does not: labels of the pod and of its namespace, and its owner. They are
// known from the watch, and asked for where the watch does not know yet. Nothing is kept of them but what entries name
// (identity.Interest), and nothing at all while none does.

const (
	// maxLabels bounds the labels of one pod or namespace that entries name.
	maxLabels = identity.MaxSelectors / 2
	// maxFactBytes bounds the texts of one kind of object in one cluster. An object beyond is asked for each time.
	maxFactBytes = 128 << 20
	// factsLast is for how long facts count after the watch ended without a successor: as long as the tokens that the kubelets
	// had then. A member that cannot reach an API server for longer must not go by labels that nobody may remember.
	factsLast = time.Hour
	// maxAwaited bounds the ReplicaSets that pods name and the watch has yet to tell of.
	maxAwaited = 10_000
)

// interest is identity.Interest as it is used. It is immutable.
type interest struct {
	pods, namespaces map[string]struct{} // keys of labels
	owners           bool
}

func newInterest(i identity.Interest) *interest {
	if i.Empty() {
		return nil
	}
	set := func(keys []string) map[string]struct{} {
		out := make(map[string]struct{}, len(keys))
		for _, k := range keys {
			out[k] = struct{}{}
		}
		return out
	}
	return &interest{pods: set(i.PodLabels), namespaces: set(i.NamespaceLabels), owners: i.Owners}
}

func (i *interest) equal(o *interest) bool {
	return i == o || i != nil && o != nil && i.owners == o.owners && maps.Equal(i.pods, o.pods) && maps.Equal(i.namespaces, o.namespaces)
}

// labels are those of one object that entries name.
type labels struct {
	all  []label // sorted by key
	many bool    // there are more than are kept
}

type label struct{ key, value unique.Handle[string] }

func gather(in map[string]string, keys map[string]struct{}) labels {
	var out labels
	for _, k := range slices.Sorted(maps.Keys(keys)) {
		v, ok := in[k]
		switch {
		case !ok:
		case len(out.all) == maxLabels:
			return labels{many: true}
		default:
			out.all = append(out.all, label{unique.Make(k), unique.Make(v)})
		}
	}
	return out
}

func (l labels) equal(o labels) bool { return l.many == o.many && slices.Equal(l.all, o.all) }

func (l labels) bytes() int {
	n := 0
	for _, x := range l.all {
		n += len(x.key.Value()) + len(x.value.Value())
	}
	return n
}

func (l labels) selectors(label, key string) []identity.Selector {
	var out []identity.Selector
	for _, x := range l.all {
		out = append(out, identity.Selector(label+":"+x.key.Value()+":"+x.value.Value()), identity.Selector(key+":"+x.key.Value()))
	}
	return out
}

// owner is who controls an object; the zero value: nobody.
type owner struct{ kind, name, uid unique.Handle[string] }

func (o owner) none() bool { return o == owner{} }

// builtin are the API groups of Kubernetes' own controllers. Somebody else's kind of the same name must not pass for one.
func builtin(kind string) (apiVersion string) {
	switch kind {
	case "ReplicaSet", "Deployment", "StatefulSet", "DaemonSet":
		return "apps/v1"
	case "Job", "CronJob":
		return "batch/v1"
	case "ReplicationController", "Node", "Pod", "Service":
		return "v1"
	}
	return ""
}

// controllerOf is the object's one controller, where it says so in a form that a selector can have.
func controllerOf(m *metav1.PartialObjectMetadata) owner {
	ref := metav1.GetControllerOfNoCopy(m)
	if ref == nil {
		return owner{}
	}
	if v := builtin(ref.Kind); v != "" && v != ref.APIVersion {
		return owner{}
	}
	if _, err := identity.ParseSelector(identity.SelectorPodOwner + ":" + ref.Kind + ":" + ref.Name); err != nil || !uid.MatchString(string(ref.UID)) {
		return owner{}
	}
	return owner{unique.Make(ref.Kind), unique.Make(ref.Name), unique.Make(string(ref.UID))}
}

func (o owner) selector() identity.Selector {
	return identity.Selector(identity.SelectorPodOwner + ":" + o.kind.Value() + ":" + o.name.Value())
}

// facts are what is kept of one object. They are immutable.
type facts struct {
	under *interest // when they were gathered: others know nothing of what another names
	labels
	owner owner
}

func (f *facts) equal(o *facts) bool {
	return f == o || f != nil && o != nil && f.under == o.under && f.owner == o.owner && f.labels.equal(o.labels)
}

func (f *facts) bytes() int {
	if f == nil {
		return 0
	}
	return 64 + f.labels.bytes() + 48*len(f.all)
}

// objectSet is what is known of one kind of object beside the pods: of namespaces by name, of ReplicaSets by UID.
type objectSet struct {
	mu      sync.RWMutex
	all     map[string]*facts
	size    int
	fresh   freshness
	awaited map[string]struct{} // keys that were looked up in vain
}

// freshness is when the API server was heard of last.
type freshness struct {
	watching bool
	heard    time.Time // when the last watch ended, or the last list was read; zero: never
}

func (f *freshness) set(watching bool, now time.Time) {
	if f.watching && !watching {
		f.heard = now
	}
	f.watching = watching
}

func (f *freshness) good(now time.Time) bool {
	return f.watching || !f.heard.IsZero() && now.Sub(f.heard) < factsLast
}

// get returns nil where it cannot be told.
func (s *objectSet) get(key string, under *interest, now time.Time) *facts {
	s.mu.Lock()
	defer s.mu.Unlock()
	f := s.all[key]
	if f == nil || f.under != under || !s.fresh.good(now) {
		if len(s.awaited) < maxAwaited {
			if s.awaited == nil {
				s.awaited = make(map[string]struct{})
			}
			s.awaited[key] = struct{}{}
		}
		return nil
	}
	return f
}

// put returns what was known before, and whether somebody looked for it in vain.
func (s *objectSet) put(key string, f *facts) (old *facts, awaited bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	old = s.all[key]
	_, awaited = s.awaited[key]
	delete(s.awaited, key)
	if s.size += f.bytes() - old.bytes(); s.size > maxFactBytes {
		s.size -= f.bytes()
		delete(s.all, key)
	} else {
		s.all[key] = f
	}
	return old, awaited
}

func (s *objectSet) remove(key string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.size -= s.all[key].bytes()
	delete(s.all, key)
}

// keepOnly drops what a full list did not have.
func (s *objectSet) keepOnly(listed map[string]struct{}, now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fresh.heard = now
	for key, f := range s.all {
		if _, ok := listed[key]; !ok {
			s.size -= f.bytes()
			delete(s.all, key)
		}
	}
}

func (s *objectSet) clear() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.all, s.size, s.awaited, s.fresh = make(map[string]*facts), 0, nil, freshness{}
}

func (s *objectSet) setState(watching bool, now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fresh.set(watching, now)
}

// SetInterest says which facts of which kube cluster entries name. What is known of an unchanged cluster stays.
func (v *Verifier) SetInterest(in map[string]identity.Interest) {
	v.setMu.Lock()
	defer v.setMu.Unlock()
	v.interests = in
	for _, c := range v.clusters.Load().all {
		if c.api != nil {
			c.api.setInterest(newInterest(in[c.Name]))
		}
	}
}

// setInterest has the watches begin anew, since what was gathered says nothing of what is named now.
func (a *apiServer) setInterest(i *interest) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.wants.Load().equal(i) {
		return
	}
	a.wants.Store(i)
	close(a.wantsOther)
	a.wantsOther = make(chan struct{})
}

// wanted is what entries name, and a channel that is closed when they name something else.
func (a *apiServer) wanted() (*interest, <-chan struct{}) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.wants.Load(), a.wantsOther
}

// KnownFacts are the facts of a pod as selectors, from what this member knows by itself; false: it cannot tell.
func (v *Verifier) KnownFacts(cluster, namespace, podUID string) ([]identity.Selector, bool) {
	for _, c := range v.clusters.Load().all {
		if c.Name == cluster && c.api != nil {
			sel, err := c.api.facts(context.Background(), &Claims{Cluster: cluster, Namespace: namespace, PodUID: podUID}, nil)
			return sel, err == nil
		}
	}
	return nil, false
}

// Facts are the facts of the pod that the claims describe, as selectors: those that entries name, and no others. What the watch does
// not know is asked for. An error wraps identity.ErrUnavailable where nobody can tell, identity.ErrUnauthenticated where the pod is
// gone.
func (v *Verifier) Facts(ctx context.Context, claims *Claims) ([]identity.Selector, error) {
	for _, c := range v.clusters.Load().all {
		if c.Name != claims.Cluster {
			continue
		}
		if c.api == nil {
			return nil, fmt.Errorf("%w: an entry for labels or owners could match a pod of kube cluster %q, which is registered without a kubeconfig, so that nobody can ask for them: register it with one, or delete the entry", identity.ErrUnavailable, c.Name)
		}
		client, err := c.api.client()
		if client == nil {
			client = &apiClient{fault: err}
		}
		return c.api.facts(ctx, claims, client)
	}
	return nil, fmt.Errorf("%w: kube cluster %q is registered no longer", identity.ErrUnavailable, claims.Cluster)
}

// facts asks nobody without a client; an error then says that it is not known.
func (a *apiServer) facts(ctx context.Context, c *Claims, client *apiClient) ([]identity.Selector, error) {
	want, now := a.wants.Load(), a.cfg.Now()
	if want == nil {
		// Entries name facts that this member has yet to be told of.
		return nil, fmt.Errorf("%w: this member is taking up an entry for labels or owners: try again, or another member", identity.ErrUnavailable)
	}
	ctx, cancel := context.WithTimeout(ctx, a.cfg.RequestTimeout)
	defer cancel()
	pod := a.pods.facts(c.PodUID, want, now)
	if pod == nil {
		m, err := a.askObject(ctx, client, "pods", c.Namespace, c.PodName)
		if apierrors.IsNotFound(err) || err == nil && string(m.UID) != c.PodUID {
			a.pods.remove(c.PodUID)
			return nil, errGone(c)
		}
		if err != nil {
			return nil, a.untold(client, "a pod", "list on pods", err)
		}
		pod = podFacts(m, want)
	}
	out := pod.selectors(identity.SelectorPodLabel, identity.SelectorPodLabelKey)
	many := pod.many
	if len(want.namespaces) > 0 {
		ns := a.namespaces.get(c.Namespace, want, now)
		if ns == nil {
			m, err := a.askObject(ctx, client, "namespaces", "", c.Namespace)
			if err != nil {
				return nil, a.untold(client, "a namespace", "get, list and watch on namespaces", err)
			}
			ns = namespaceFacts(m, want)
		}
		many = many || ns.many
		out = append(out, ns.selectors(identity.SelectorNSLabel, identity.SelectorNSLabelKey)...)
	}
	if many {
		return nil, fmt.Errorf("%w: pod %s/%s or its namespace has more than %d labels that entries name", identity.ErrPrecondition, c.Namespace, c.PodName, maxLabels)
	}
	if want.owners && !pod.owner.none() {
		owners, err := a.owners(ctx, c.Namespace, pod.owner, want, client)
		if err != nil {
			return nil, err
		}
		out = append(out, owners...)
	}
	return identity.SortSelectors(out), nil
}

// owners are a pod's controller and, of a ReplicaSet, its own: by what the ReplicaSet says, not by its name. A ReplicaSet that is
// not there, or another by now, is nobody's.
func (a *apiServer) owners(ctx context.Context, namespace string, o owner, want *interest, client *apiClient) ([]identity.Selector, error) {
	if o.kind.Value() != "ReplicaSet" {
		return []identity.Selector{o.selector()}, nil
	}
	set := a.replicaSets.get(o.uid.Value(), want, a.cfg.Now())
	if set == nil {
		m, err := a.askObject(ctx, client, "replicasets", namespace, o.name.Value())
		if apierrors.IsNotFound(err) || err == nil && string(m.UID) != o.uid.Value() {
			return nil, nil
		}
		if err != nil {
			return nil, a.untold(client, "a ReplicaSet", "get, list and watch on replicasets.apps", err)
		}
		set = replicaSetFacts(m, want)
	}
	out := []identity.Selector{o.selector()}
	if !set.owner.none() {
		out = append(out, set.owner.selector())
	}
	return out, nil
}

// askObject asks for one object; a pod that has finished is as one that is not there.
func (a *apiServer) askObject(ctx context.Context, client *apiClient, resource, namespace, name string) (*metav1.PartialObjectMetadata, error) {
	switch {
	case client == nil:
		return nil, identity.ErrUnavailable
	case client.fault != nil:
		return nil, client.fault
	}
	of := resources()[resource]
	r := client.meta.Resource(of)
	switch {
	case resource == "pods":
		list, err := r.Namespace(namespace).List(ctx, metav1.ListOptions{FieldSelector: "metadata.name=" + name + "," + unfinished})
		if err != nil {
			return nil, err
		}
		if len(list.Items) != 1 || list.Items[0].Name != name {
			return nil, apierrors.NewNotFound(of.GroupResource(), name)
		}
		return &list.Items[0], nil
	case namespace == "":
		return r.Get(ctx, name, metav1.GetOptions{})
	}
	return r.Namespace(namespace).Get(ctx, name, metav1.GetOptions{})
}

func (a *apiServer) untold(client *apiClient, what, right string, err error) error {
	if client == nil || client.fault != nil {
		return err
	}
	return fmt.Errorf("an entry for labels or owners could match: %w", a.failure(client, "asking for the labels or the owner of "+what, right, err, ""))
}

func podFacts(m *metav1.PartialObjectMetadata, want *interest) *facts {
	if want == nil {
		return nil
	}
	f := &facts{under: want, labels: gather(m.Labels, want.pods)}
	if want.owners {
		f.owner = controllerOf(m)
	}
	return f
}

func namespaceFacts(m *metav1.PartialObjectMetadata, want *interest) *facts {
	return &facts{under: want, labels: gather(m.Labels, want.namespaces)}
}

func replicaSetFacts(m *metav1.PartialObjectMetadata, want *interest) *facts {
	return &facts{under: want, owner: controllerOf(m)}
}

// podSet is what is known of a cluster's pods.
type podSet struct {
	mu   sync.RWMutex
	live map[string]*facts // by UID; nil before the first list, and nil of a pod that nothing more is kept of
	// when a pod's tokens end that was asked to end and is still there: its node may be lost, and nobody confirm its end
	ending map[string]time.Time
	size   int
	fault  error
	fresh  freshness
	gone   *lru.Cache[string, struct{}]
}

func newPodSet(tombstones int) *podSet {
	gone, _ := lru.New[string, struct{}](max(tombstones, 1)) // fails for a size below 1 only
	return &podSet{gone: gone, ending: make(map[string]time.Time)}
}

// isGone reports whether the pod was seen to go or finish, or should have ended a while ago.
func (p *podSet) isGone(uid string, now time.Time) bool {
	if p.gone.Contains(uid) {
		return true
	}
	p.mu.RLock()
	defer p.mu.RUnlock()
	at, ok := p.ending[uid]
	return ok && !now.Before(at)
}

// endOf is when the tokens of a pod that is being deleted are no longer good: a minute after its grace period, as the API server
// itself has it. ok is false of a pod that goes on.
func endOf(m *metav1.PartialObjectMetadata) (at time.Time, ok bool) {
	if m.DeletionTimestamp == nil {
		return time.Time{}, false
	}
	return m.DeletionTimestamp.Add(endLeeway), true
}

// suspect reports whether the pods are being watched and this one is not among them.
func (p *podSet) suspect(uid string) bool {
	p.mu.RLock()
	defer p.mu.RUnlock()
	_, live := p.live[uid]
	return p.fresh.watching && !live
}

func (p *podSet) status() (watching bool, pods int, fault error) {
	p.mu.RLock()
	defer p.mu.RUnlock()
	return p.fresh.watching, len(p.live), p.fault
}

// facts returns nil where it cannot be told.
func (p *podSet) facts(uid string, under *interest, now time.Time) *facts {
	p.mu.RLock()
	defer p.mu.RUnlock()
	if f := p.live[uid]; f != nil && f.under == under && p.fresh.good(now) {
		return f
	}
	return nil
}

// owned are the UIDs of the pods that one of the ReplicaSets controls.
func (p *podSet) owned(by map[string]struct{}) []string {
	p.mu.RLock()
	defer p.mu.RUnlock()
	var out []string
	for id, f := range p.live {
		if f == nil || f.owner.none() {
			continue
		}
		if _, ok := by[f.owner.uid.Value()]; ok {
			out = append(out, id)
		}
	}
	return out
}

// replace takes a full list and returns the UIDs that are no longer there, and those of which other things are known.
func (p *podSet) replace(live map[string]*facts, ending map[string]time.Time, size int, now time.Time) (gone, changed []string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for uid := range p.live {
		if _, ok := live[uid]; !ok {
			p.gone.Add(uid, struct{}{})
			gone = append(gone, uid)
		}
	}
	for uid, f := range live {
		if f != nil && !f.equal(p.live[uid]) {
			changed = append(changed, uid)
		}
	}
	// A UID comes back only when the cluster was restored from a backup.
	for _, uid := range p.gone.Keys() {
		if _, ok := live[uid]; ok {
			p.gone.Remove(uid)
		}
	}
	p.live, p.ending, p.size, p.fresh.heard = live, ending, size, now
	return gone, changed
}

// add reports whether what is known of the pod changed.
func (p *podSet) add(m *metav1.PartialObjectMetadata, f *facts) bool {
	uid := string(m.UID)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.gone.Remove(uid)
	old, there := p.live[uid]
	if !there && len(p.live) >= maxPods { // the API server is asked about one that is left out
		return false
	}
	if at, ok := endOf(m); ok {
		p.ending[uid] = at
	}
	if p.size += f.bytes() - old.bytes(); p.size > maxFactBytes {
		p.size -= f.bytes()
		f = nil
	}
	p.live[uid] = f
	return !f.equal(old)
}

func (p *podSet) remove(uid string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.size -= p.live[uid].bytes()
	delete(p.live, uid)
	delete(p.ending, uid)
	p.gone.Add(uid, struct{}{})
}

// setState reports whether the fault is news.
func (p *podSet) setState(watching bool, fault error, now time.Time) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	news := fault != nil && (p.fault == nil || p.fault.Error() != fault.Error())
	p.fresh.set(watching, now)
	p.fault = fault
	return news
}
