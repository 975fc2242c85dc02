package controller

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/tools/events"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	"countersign.io/countersign/api"
	adminv1 "countersign.io/countersign/api/admin/v1"
	"countersign.io/countersign/controller/v1alpha1"
	"countersign.io/countersign/identity"
)

// fakeMember is a member's admin API, as far as the controller asks it.
type fakeMember struct {
	adminv1.AdminClient // what is not here is not asked
	entries             map[string]*adminv1.Entry
	clusters            map[string]*adminv1.KubeCluster
	fault               error // of every call
	denied              error // of every change
	local               error // of listing the kube clusters, as it comes: not by the wire
	changes             int
	now                 time.Time
}

func (f *fakeMember) change() error {
	if err := firstOf(f.fault, f.denied); err != nil {
		return api.ToStatus(err)
	}
	f.changes++
	return nil
}

func firstOf(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

func (f *fakeMember) ListEntries(context.Context, *adminv1.ListRequest, ...grpc.CallOption) (*adminv1.ListEntriesResponse, error) {
	out := &adminv1.ListEntriesResponse{}
	for _, id := range slices.Sorted(maps.Keys(f.entries)) {
		out.Entries = append(out.Entries, clonedEntry(f.entries[id]))
	}
	return out, api.ToStatus(f.fault)
}

func clonedEntry(e *adminv1.Entry) *adminv1.Entry { return proto.Clone(e).(*adminv1.Entry) }

func (f *fakeMember) CreateEntry(_ context.Context, e *adminv1.Entry, _ ...grpc.CallOption) (*adminv1.Entry, error) {
	if err := f.change(); err != nil {
		return nil, err
	}
	kept := clonedEntry(e)
	kept.Id, kept.Revision, kept.CreatedAt = fmt.Sprintf("e%d", f.changes), 1, api.TimeToWire(f.now)
	f.entries[kept.Id] = kept
	return clonedEntry(kept), nil
}

func (f *fakeMember) UpdateEntry(_ context.Context, e *adminv1.Entry, _ ...grpc.CallOption) (*adminv1.Entry, error) {
	old := f.entries[e.Id]
	if old == nil {
		return nil, api.ToStatus(identity.ErrNotFound)
	}
	if err := f.change(); err != nil {
		return nil, err
	}
	kept := clonedEntry(e)
	kept.Revision, kept.CreatedAt = old.Revision+1, old.CreatedAt
	f.entries[kept.Id] = kept
	return clonedEntry(kept), nil
}

func (f *fakeMember) DeleteEntry(_ context.Context, r *adminv1.NameRequest, _ ...grpc.CallOption) (*adminv1.Empty, error) {
	if f.entries[r.Name] == nil {
		return nil, api.ToStatus(identity.ErrNotFound)
	}
	if err := f.change(); err != nil {
		return nil, err
	}
	delete(f.entries, r.Name)
	return &adminv1.Empty{}, nil
}

func (f *fakeMember) ListKubeClusters(context.Context, *adminv1.ListRequest, ...grpc.CallOption) (*adminv1.ListKubeClustersResponse, error) {
	if f.local != nil {
		return nil, f.local
	}
	out := &adminv1.ListKubeClustersResponse{}
	for _, name := range slices.Sorted(maps.Keys(f.clusters)) {
		out.KubeClusters = append(out.KubeClusters, proto.Clone(f.clusters[name]).(*adminv1.KubeCluster))
	}
	return out, api.ToStatus(f.fault)
}

func (f *fakeMember) AddKubeCluster(_ context.Context, k *adminv1.KubeCluster, _ ...grpc.CallOption) (*adminv1.KubeCluster, error) {
	switch {
	case strings.Contains(string(k.Jwks), "garbage"):
		return nil, api.ToStatus(fmt.Errorf("%w: the JWKS is not one", identity.ErrInvalid))
	case (f.clusters[k.Name] != nil) != k.Replace:
		return nil, api.ToStatus(identity.ErrExists)
	}
	if err := f.change(); err != nil {
		return nil, err
	}
	kept := api.KubeClusterToWire(api.KubeClusterFromWire(k))
	kept.Revision = uint64(f.changes)
	f.clusters[k.Name] = kept
	return kept, nil
}

func (f *fakeMember) DeleteKubeCluster(_ context.Context, r *adminv1.NameRequest, _ ...grpc.CallOption) (*adminv1.Empty, error) {
	if err := f.change(); err != nil {
		return nil, err
	}
	delete(f.clusters, r.Name)
	return &adminv1.Empty{}, nil
}

// fakeFederation is the other service.
type fakeFederation struct {
	adminv1.FederationClient
	member *fakeMember
	all    map[string]*adminv1.FederationRelationship
	pinned int // bundles
}

func (f *fakeFederation) ListFederations(context.Context, *adminv1.Empty, ...grpc.CallOption) (*adminv1.ListFederationsResponse, error) {
	out := &adminv1.ListFederationsResponse{}
	for _, td := range slices.Sorted(maps.Keys(f.all)) {
		out.Federations = append(out.Federations, f.all[td])
	}
	return out, api.ToStatus(f.member.fault)
}

func (f *fakeFederation) GetFederation(_ context.Context, r *adminv1.NameRequest, _ ...grpc.CallOption) (*adminv1.FederationRelationship, error) {
	if f.member.fault != nil {
		return nil, api.ToStatus(f.member.fault)
	}
	if f.all[r.Name] == nil {
		return nil, api.ToStatus(identity.ErrNotFound)
	}
	return proto.Clone(f.all[r.Name]).(*adminv1.FederationRelationship), nil
}

func (f *fakeFederation) put(r *adminv1.PutFederationRequest, revision uint64) (*adminv1.FederationRelationship, error) {
	if err := f.member.change(); err != nil {
		return nil, err
	}
	kept := &adminv1.FederationRelationship{TrustDomain: r.TrustDomain, Url: r.Url, Profile: r.Profile, EndpointId: r.EndpointId, ManagedBy: r.ManagedBy, Revision: revision}
	if old := f.all[r.TrustDomain]; old != nil {
		kept.Sequence, kept.Status = old.Sequence, old.Status
	}
	if r.Bundle != nil {
		f.pinned++
		kept.Sequence = r.Bundle.Sequence
	}
	f.all[r.TrustDomain] = kept
	return proto.Clone(kept).(*adminv1.FederationRelationship), nil
}

func (f *fakeFederation) CreateFederation(_ context.Context, r *adminv1.PutFederationRequest, _ ...grpc.CallOption) (*adminv1.FederationRelationship, error) {
	return f.put(r, 1)
}

func (f *fakeFederation) UpdateFederation(_ context.Context, r *adminv1.PutFederationRequest, _ ...grpc.CallOption) (*adminv1.FederationRelationship, error) {
	old := f.all[r.TrustDomain]
	if old == nil || old.Revision != r.Revision {
		return nil, api.ToStatus(fmt.Errorf("%w: read it again", identity.ErrPrecondition))
	}
	return f.put(r, old.Revision+1)
}

func (f *fakeFederation) DeleteFederation(_ context.Context, r *adminv1.DeleteFederationRequest, _ ...grpc.CallOption) (*adminv1.DeleteFederationResponse, error) {
	if err := f.member.change(); err != nil {
		return nil, err
	}
	delete(f.all, r.TrustDomain)
	return &adminv1.DeleteFederationResponse{}, nil
}

// kubeWorld is an API server that is none, a member that is none, and the followers between them.
type kubeWorld struct {
	t      *testing.T
	c      client.Client
	member *fakeMember
	fed    *fakeFederation
	events *events.FakeRecorder
	now    time.Time
	behind bool // what the controllers keep of resources: nothing

	identities  *follower[*v1alpha1.WorkloadIdentity]
	federations *follower[*v1alpha1.FederatedTrustDomain]
	clusters    *follower[*v1alpha1.KubeCluster]
}

// born is when the objects of these tests are made, unless they say otherwise.
func born() time.Time { return time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC) }

func newKubeWorld(t *testing.T) *kubeWorld {
	t.Helper()
	w := &kubeWorld{t: t, member: &fakeMember{entries: map[string]*adminv1.Entry{}, now: born().Add(time.Minute), clusters: map[string]*adminv1.KubeCluster{
		"main": {Name: "main", Issuer: "https://main", Audience: "countersign", Kubeconfig: "/etc/main", TokenReview: true, DefaultId: identity.DefaultKubeID},
	}}}
	w.fed = &fakeFederation{member: w.member, all: map[string]*adminv1.FederationRelationship{}}
	w.events = events.NewFakeRecorder(100)
	w.c = fake.NewClientBuilder().WithScheme(Scheme()).
		WithStatusSubresource(&v1alpha1.WorkloadIdentity{}, &v1alpha1.FederatedTrustDomain{}, &v1alpha1.KubeCluster{}).
		WithObjects(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop", Labels: map[string]string{"team": "red"}}},
			&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "web-1", Labels: map[string]string{"app": "web"}}},
			&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "db-1", Labels: map[string]string{"app": "db"}}}).Build()
	cfg := &Config{
		TrustDomain: spiffeid.RequireTrustDomainFromString("example.org"), Cluster: "main", Admin: w.member, Federation: w.fed, Resync: defaultResync,
		Log: slog.New(slog.NewTextHandler(io.Discard, nil)),
		ParseBundle: func(td spiffeid.TrustDomain, raw []byte) (*identity.Bundle, error) {
			if !strings.HasPrefix(string(raw), "bundle ") {
				return nil, fmt.Errorf("%w: it is not a bundle", identity.ErrInvalid)
			}
			return &identity.Bundle{TrustDomain: td, Sequence: uint64(len(raw))}, nil
		},
	}
	cached := interceptor.NewClient(w.c.(client.WithWatch), interceptor.Funcs{
		Get: func(ctx context.Context, c client.WithWatch, key client.ObjectKey, obj client.Object, opts ...client.GetOption) error {
			if w.behind {
				return apierrors.NewNotFound(schema.GroupResource{Group: v1alpha1.Group}, key.Name)
			}
			return c.Get(ctx, key, obj, opts...)
		},
	})
	// A mirror that is old at once: nobody tells it of changes.
	w.identities = followIdentities(cached, w.c, w.events, cfg.Resync, &identities{cfg: cfg, client: w.c, reader: w.c, entries: newMirror(w.member, false, 0)})
	w.federations = followFederations(cached, w.c, w.events, statusEvery, &federations{cfg})
	w.clusters = followClusters(cached, w.c, w.events, cfg.Resync, &clusters{cfg})
	w.now = born()
	for _, words := range []*wording{w.identities.words, w.federations.words, w.clusters.words} {
		words.now = func() time.Time { return w.now }
	}
	return w
}

// follow has one resource looked at.
func (w *kubeWorld) follow(obj client.Object) (ctrl.Result, error) {
	w.t.Helper()
	req := requestFor(obj.GetName())
	var res ctrl.Result
	var err error
	switch obj.(type) {
	case *v1alpha1.WorkloadIdentity:
		res, err = w.identities.Reconcile(w.t.Context(), req)
	case *v1alpha1.FederatedTrustDomain:
		res, err = w.federations.Reconcile(w.t.Context(), req)
	case *v1alpha1.KubeCluster:
		res, err = w.clusters.Reconcile(w.t.Context(), req)
	default:
		w.t.Fatalf("a %T", obj)
	}
	if gerr := w.c.Get(w.t.Context(), client.ObjectKeyFromObject(obj), obj); client.IgnoreNotFound(gerr) != nil {
		w.t.Fatal(gerr)
	} else if gerr != nil {
		obj.SetUID("gone")
	}
	return res, err
}

func (w *kubeWorld) create(obj client.Object) {
	w.t.Helper()
	obj.SetCreationTimestamp(metav1.NewTime(born()))
	if err := w.c.Create(w.t.Context(), obj); err != nil {
		w.t.Fatal(err)
	}
}

func (w *kubeWorld) update(obj client.Object) {
	w.t.Helper()
	if err := w.c.Update(w.t.Context(), obj); err != nil {
		w.t.Fatal(err)
	}
}

func (w *kubeWorld) delete(obj client.Object) {
	w.t.Helper()
	if err := w.c.Delete(w.t.Context(), obj); err != nil {
		w.t.Fatal(err)
	}
}

func (w *kubeWorld) there(obj client.Object) bool {
	w.t.Helper()
	err := w.c.Get(w.t.Context(), client.ObjectKeyFromObject(obj), obj)
	if err != nil && !apierrors.IsNotFound(err) {
		w.t.Fatal(err)
	}
	return err == nil
}

func statusOf(obj client.Object) *v1alpha1.Status {
	switch o := obj.(type) {
	case *v1alpha1.WorkloadIdentity:
		return &o.Status.Status
	case *v1alpha1.FederatedTrustDomain:
		return &o.Status.Status
	case *v1alpha1.KubeCluster:
		return &o.Status
	}
	return nil
}

// settles has a resource looked at, and wants that reason in its condition.
func (w *kubeWorld) settles(obj client.Object, reason string, says ...string) {
	w.t.Helper()
	res, err := w.follow(obj)
	st := statusOf(obj)
	c := meta.FindStatusCondition(st.Conditions, conditionReady)
	if c == nil {
		w.t.Fatalf("%s has no condition: %v", obj.GetName(), err)
	}
	good := reason == reasonReady
	if c.Reason != reason || (c.Status == metav1.ConditionTrue) != good || (st.LastError == "") != good {
		w.t.Errorf("%s: Ready=%s, %s: %s; last error %q; want %s", obj.GetName(), c.Status, c.Reason, c.Message, st.LastError, reason)
	}
	for _, want := range says {
		if !strings.Contains(c.Message, want) {
			w.t.Errorf("%s: the condition does not say %q: %s", obj.GetName(), want, c.Message)
		}
	}
	// What waiting may mend is tried again soon, by an error, the rest with the next round.
	if again := reason == reasonFailed && !strings.Contains(c.Message, errStale.Error()); again != (err != nil) || !again && res.RequeueAfter == 0 {
		w.t.Errorf("%s, %s: looked at again after %v, error %v", obj.GetName(), reason, res.RequeueAfter, err)
	}
}

// lets has a resource looked at that was deleted, and wants it gone.
func (w *kubeWorld) lets(obj client.Object) {
	w.t.Helper()
	if _, err := w.follow(obj); err != nil {
		w.t.Fatal(err)
	}
	if w.there(obj) {
		w.t.Errorf("%s is still there: %v", obj.GetName(), obj.GetFinalizers())
	}
}

// said are the events so far.
func (w *kubeWorld) said() (out []string) {
	for {
		select {
		case e := <-w.events.Events:
			out = append(out, e)
		default:
			return out
		}
	}
}
