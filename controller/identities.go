package controller

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"countersign.io/countersign/api"
	adminv1 "countersign.io/countersign/api/admin/v1"
	"countersign.io/countersign/controller/v1alpha1"
	"countersign.io/countersign/identity"
)

// identities makes entries of WorkloadIdentities: one for each choice of labels, however many pods there are.
type identities struct {
	cfg     *Config
	client  client.Client
	reader  client.Reader // of pods and namespaces, which are not kept
	entries *mirror
}

func (r *identities) owner(name string) string {
	return "workloadidentity/" + r.cfg.Cluster + "/" + name
}

// ours reports whether an entry is some WorkloadIdentity's of this cluster.
func (r *identities) ours(owner string) bool { return strings.HasPrefix(owner, r.owner("")) }

func (r *identities) end(ctx context.Context, name string) error {
	if err := r.entries.fresh(ctx); err != nil {
		return err
	}
	return r.make(ctx, r.owner(name), nil)
}

func (r *identities) put(ctx context.Context, w *v1alpha1.WorkloadIdentity) (string, error) {
	if err := r.entries.fresh(ctx); err != nil {
		return "", asked(err)
	}
	kube, err := r.shapes(ctx)
	if err != nil {
		return "", asked(err)
	}
	want, err := r.entriesOf(ctx, w, kube)
	switch reason, _ := outcome(err); {
	case err == nil:
		err = r.make(ctx, r.owner(w.Name), want)
	case reason == reasonRefused || reason == reasonConflict: // what it was allowed before, it is not now
		err = errors.Join(err, r.make(ctx, r.owner(w.Name), nil))
	}
	w.Status.Entries, w.Status.PodsMatched = nil, 0
	for _, e := range r.entries.of(r.owner(w.Name)) {
		w.Status.Entries = append(w.Status.Entries, e.ID)
	}
	if err == nil {
		if w.Status.PodsMatched, err = r.count(ctx, w); err != nil {
			err = fmt.Errorf("%w: counting the pods: %v", identity.ErrUnavailable, err)
		}
	}
	return fmt.Sprintf("pods that match have %s, by %d entries", w.Spec.SPIFFEIDTemplate, len(w.Status.Entries)), err
}

// entriesOf is what a resource asks for, once all was checked. It asks no member: what it refuses is the resource's own fault.
func (r *identities) entriesOf(ctx context.Context, w *v1alpha1.WorkloadIdentity, kube shapes) ([]*adminv1.Entry, error) {
	pods, err := terms(identity.SelectorPodLabel, identity.SelectorPodLabelKey, w.Spec.PodSelector)
	if err != nil {
		return nil, fmt.Errorf("podSelector: %w", err)
	}
	namespaces, err := terms(identity.SelectorNSLabel, identity.SelectorNSLabelKey, w.Spec.NamespaceSelector)
	if err != nil {
		return nil, fmt.Errorf("namespaceSelector: %w", err)
	}
	all := append(namespaces, pods...)
	sets, err := selectorSets(r.cfg.Cluster, all)
	if err != nil {
		return nil, err
	}
	if !kube.sees && slices.ContainsFunc(sets, asksLabels) {
		return nil, fmt.Errorf("%w: the members cannot tell labels of this cluster's pods, and pods that could match would get no identity at all: kube cluster %s is registered without --kubeconfig (countersign kube add --replace --kubeconfig), or select namespaces by %s alone", identity.ErrPrecondition, r.cfg.Cluster, nameLabel)
	}
	pinned := pinnedTo(all)
	if err := checkShape(w.Spec.SPIFFEIDTemplate, pinned, kube.own, kube.others); err != nil {
		return nil, err
	}
	for _, n := range w.Spec.DNSNames {
		if err := checkDNS(n, pinned); err != nil {
			return nil, err
		}
	}
	var out []*adminv1.Entry
	for _, set := range sets {
		e := &adminv1.Entry{
			Selectors: selectorTexts(set), SpiffeId: w.Spec.SPIFFEIDTemplate, DnsNames: w.Spec.DNSNames, Hint: w.Spec.Hint,
			FederatesWith: w.Spec.FederatesWith, ManagedBy: r.owner(w.Name),
		}
		if d := w.Spec.X509TTL; d != nil {
			e.X509Ttl = durationpb.New(d.Duration)
		}
		if d := w.Spec.JWTTTL; d != nil {
			e.JwtTtl = durationpb.New(d.Duration)
		}
		entry, err := api.EntryFromWire(e)
		if err != nil {
			return nil, err
		}
		if err := identity.CheckEntry(r.cfg.TrustDomain, entry); err != nil {
			return nil, err
		}
		out = append(out, e)
	}
	return out, r.conflict(ctx, w, kube.own)
}

// asksLabels reports whether somebody has to be asked about a pod's or a namespace's labels.
func asksLabels(set []identity.Selector) bool {
	return slices.ContainsFunc(set, func(s identity.Selector) bool {
		return slices.Contains([]string{identity.SelectorPodLabel, identity.SelectorPodLabelKey, identity.SelectorNSLabel, identity.SelectorNSLabelKey}, s.Name())
	})
}

// shapes are the default IDs of this kube cluster's pods, and those of others'. sees says whether the members see this one's pods.
type shapes struct {
	own, others []string
	sees        bool
}

func (r *identities) shapes(ctx context.Context) (shapes, error) {
	out := shapes{own: []string{identity.DefaultKubeID}}
	known := false
	for page := (&adminv1.ListRequest{PageSize: 1000}); ; {
		res, err := r.cfg.Admin.ListKubeClusters(ctx, page)
		if err != nil {
			return shapes{}, fmt.Errorf("listing the kube clusters: %w", api.FromStatus(err))
		}
		for _, k := range res.KubeClusters {
			if k.Name == r.cfg.Cluster {
				known, out.sees = true, k.Kubeconfig != ""
			}
			switch {
			case k.DefaultId == "":
			case k.Name == r.cfg.Cluster:
				out.own = append(out.own, k.DefaultId)
			default:
				out.others = append(out.others, k.DefaultId)
			}
		}
		if page.PageToken = res.NextPageToken; page.PageToken != "" {
			continue
		}
		if !known {
			return shapes{}, fmt.Errorf("%w: kube cluster %s, whose resource this is, is not registered (countersign kube add)", identity.ErrPrecondition, r.cfg.Cluster)
		}
		return out, nil
	}
}

// conflict refuses an ID that somebody else could have, who was first: another resource, or an entry that none of ours made. An ID that
// says whose it is cannot be somebody else's, whoever gives it.
func (r *identities) conflict(ctx context.Context, w *v1alpha1.WorkloadIdentity, own []string) error {
	path := pathOf(w.Spec.SPIFFEIDTemplate)
	harmless := slices.ContainsFunc(own, func(shape string) bool {
		s := pathOf("spiffe://x" + shape)
		return ownOnly(s) && len(path) == len(s) && slices.Equal(path, s)
	})
	for _, e := range r.entries.overlapping(w.Spec.SPIFFEIDTemplate, r.ours) {
		powerful := e.Power() != "" || e.Downstream
		if powerful || !harmless && !e.CreatedAt.After(w.CreationTimestamp.Time.Add(time.Second)) { // a resource's time has whole seconds
			who := "made by an operator"
			if e.ManagedBy != "" {
				who = "of " + e.ManagedBy
			}
			return fmt.Errorf("%w: entry %s, %s, gives %s to others: choose another ID, or delete that entry", errConflict, e.ID, who, e.SPIFFEID)
		}
	}
	if harmless {
		return nil
	}
	all := &v1alpha1.WorkloadIdentityList{}
	if err := r.client.List(ctx, all); err != nil {
		return fmt.Errorf("%w: listing the WorkloadIdentities: %v", identity.ErrUnavailable, err)
	}
	for i := range all.Items {
		o := &all.Items[i]
		if o.Name != w.Name && o.DeletionTimestamp.IsZero() && older(o, w) && overlap(o.Spec.SPIFFEIDTemplate, w.Spec.SPIFFEIDTemplate) {
			return fmt.Errorf("%w: WorkloadIdentity %s, which is older, asks for %s: choose another ID, or delete that one", errConflict, o.Name, o.Spec.SPIFFEIDTemplate)
		}
	}
	return nil
}

func older(a, b *v1alpha1.WorkloadIdentity) bool {
	if !a.CreationTimestamp.Equal(&b.CreationTimestamp) {
		return a.CreationTimestamp.Before(&b.CreationTimestamp)
	}
	return a.Name < b.Name
}

// make brings the entries of an owner to what is wanted: what is there and right stays, whoever made it so.
func (r *identities) make(ctx context.Context, owner string, want []*adminv1.Entry) error {
	have := r.entries.of(owner)
	var errs []error
	for _, e := range want {
		i := slices.IndexFunc(have, func(h *identity.Entry) bool { return slices.Equal(selectorTexts(h.Selectors), e.Selectors) })
		if i < 0 {
			continue
		}
		old := api.EntryToWire(have[i])
		e.Id = old.Id
		have = slices.Delete(have, i, i+1)
		if same(old, e) {
			continue
		}
		errs = append(errs, r.update(ctx, e))
	}
	for _, e := range want {
		switch {
		case e.Id != "":
		case len(have) > 0: // one that has other selectors now: a pod that matches both loses nothing in between
			e.Id = have[0].ID
			have = have[1:]
			errs = append(errs, r.update(ctx, e))
		default:
			res, err := r.cfg.Admin.CreateEntry(ctx, e)
			errs = append(errs, r.take(res, err, "creating an entry"))
		}
	}
	for _, e := range have {
		_, err := r.cfg.Admin.DeleteEntry(ctx, &adminv1.NameRequest{Name: e.ID})
		if err = api.FromStatus(err); err != nil && !errors.Is(err, identity.ErrNotFound) {
			errs = append(errs, fmt.Errorf("deleting entry %s: %w", e.ID, err))
			continue
		}
		r.entries.unmade(e.ID)
	}
	return errors.Join(errs...)
}

func (r *identities) update(ctx context.Context, e *adminv1.Entry) error {
	res, err := r.cfg.Admin.UpdateEntry(ctx, e)
	return r.take(res, err, "updating entry "+e.Id)
}

// take puts what was answered into the mirror.
func (r *identities) take(e *adminv1.Entry, err error, doing string) error {
	if err != nil {
		return fmt.Errorf("%s: %w", doing, api.FromStatus(err))
	}
	entry, err := api.EntryFromWire(e)
	if err != nil {
		return fmt.Errorf("%s: %w", doing, err)
	}
	entry.CreatedAt = api.TimeFromWire(e.CreatedAt)
	r.entries.made(entry)
	return nil
}

// same compares all that a resource says of an entry.
func same(have, want *adminv1.Entry) bool {
	h := proto.Clone(have).(*adminv1.Entry)
	h.Revision, h.CreatedAt, h.Warnings = want.Revision, want.CreatedAt, want.Warnings
	return proto.Equal(h, want)
}

// maxCounted bounds what is counted of one resource's pods.
const maxCounted = 50_000

// count is how many pods match now. It asks the API server for names only.
func (r *identities) count(ctx context.Context, w *v1alpha1.WorkloadIdentity) (int64, error) {
	pods, err := selectorOf(w.Spec.PodSelector)
	if err != nil {
		return 0, err
	}
	if w.Spec.NamespaceSelector == nil {
		return r.countIn(ctx, "", pods)
	}
	namespaces, err := selectorOf(w.Spec.NamespaceSelector)
	if err != nil {
		return 0, err
	}
	var total int64
	err = r.pages(ctx, "Namespace", "", namespaces, func(names []metav1.PartialObjectMetadata) error {
		for i := range names {
			n, err := r.countIn(ctx, names[i].Name, pods)
			if total += n; err != nil || total > maxCounted {
				return err
			}
		}
		return nil
	})
	return total, err
}

func (r *identities) countIn(ctx context.Context, namespace string, pods labels.Selector) (int64, error) {
	var n int64
	err := r.pages(ctx, "Pod", namespace, pods, func(page []metav1.PartialObjectMetadata) error {
		n += int64(len(page))
		return nil
	})
	return n, err
}

func (r *identities) pages(ctx context.Context, kind, namespace string, sel labels.Selector, f func([]metav1.PartialObjectMetadata) error) error {
	seen := 0
	for token := ""; ; {
		list := &metav1.PartialObjectMetadataList{}
		list.SetGroupVersionKind(corev1.SchemeGroupVersion.WithKind(kind + "List"))
		err := r.reader.List(ctx, list, &client.ListOptions{Namespace: namespace, LabelSelector: sel, Limit: 500, Continue: token})
		if err != nil {
			return err
		}
		if err := f(list.Items); err != nil {
			return err
		}
		seen += len(list.Items)
		if token = list.Continue; token == "" || seen > maxCounted {
			return nil
		}
	}
}

func selectorOf(s *metav1.LabelSelector) (labels.Selector, error) {
	if s == nil {
		return labels.Everything(), nil
	}
	return metav1.LabelSelectorAsSelector(s)
}
