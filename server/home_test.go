package server

import (
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"google.golang.org/grpc/codes"

	memberv1 "countersign.io/countersign/api/member/v1"
	"countersign.io/countersign/attestor/kube"
	"countersign.io/countersign/audit"
	"countersign.io/countersign/identity"
)

// fakeHome is a kube cluster with one ConfigMap, and pods whose tokens are "good for NAME".
type fakeHome struct {
	mu        sync.Mutex
	published *kube.PublishedBundle
	down      error
	asked     int
	created   int
}

func (f *fakeHome) set(g func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	g()
}

func (f *fakeHome) VerifyMember(_ context.Context, token []byte, name string) (*kube.Claims, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.asked++
	switch pod, ok := strings.CutPrefix(string(token), "good for "); {
	case f.down != nil:
		return nil, f.down
	case !ok:
		return nil, fmt.Errorf("%w: the secret reason", identity.ErrUnauthenticated)
	case pod != name:
		return nil, fmt.Errorf("%w: pod %s asks to be %s", identity.ErrDenied, pod, name)
	default:
		return &kube.Claims{Cluster: "main", Namespace: "ns", ServiceAccount: "countersign", PodName: pod, PodUID: "uid-of-" + pod, NodeName: "node-1"}, nil
	}
}

func (f *fakeHome) Issuer(context.Context) (string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return issuer, f.down
}

func (f *fakeHome) Bundle(context.Context) (*kube.PublishedBundle, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.down == nil && f.published == nil {
		return nil, fmt.Errorf("no ConfigMap: %w", identity.ErrNotFound)
	}
	return f.published, f.down
}

func (f *fakeHome) CreateBundle(_ context.Context, b kube.PublishedBundle) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.published != nil {
		return identity.ErrExists
	}
	f.created++
	f.published = &b
	return nil
}

func (f *fakeHome) ConfigMapName() string { return "ns/countersign-bundle" }

func pemData(b *identity.Bundle) (map[string]string, error) {
	var out strings.Builder
	for _, der := range b.X509 {
		if err := pem.Encode(&out, &pem.Block{Type: "CERTIFICATE", Bytes: der}); err != nil {
			return nil, err
		}
	}
	return map[string]string{kube.BundlePEM: out.String()}, nil
}

// at makes the world live in a kube cluster.
func (f *fakeHome) at(edits ...func(*Home)) func(*Config) {
	return func(c *Config) {
		c.Home = Home{API: f, Cluster: "main", Kubeconfig: "in-cluster", AgentAccounts: []string{"ns/countersign-agent"}, Forms: true, Data: pemData}
		for _, e := range edits {
			e(&c.Home)
		}
	}
}

func TestJoinByPod(t *testing.T) {
	f := &fakeHome{}
	w := newWorld(t, f.at()).start(t)
	ctx := testContext(t)
	c := memberv1.NewMemberClient(w.dial(t, nil))
	req := func(token, id string) *memberv1.JoinRequest {
		return &memberv1.JoinRequest{PodToken: token, Id: id, Address: "sts-1.svc:8443", Level: 2}
	}
	_, err := c.Join(ctx, req("bad", "sts-1"))
	wantCode(t, err, codes.Unauthenticated, "verifying the pod's token", "see the member's log")
	if strings.Contains(err.Error(), "the secret reason") || !strings.Contains(w.log.String(), "the secret reason") {
		t.Errorf("a stranger is told too much, or the log too little: %v", err)
	}
	_, err = c.Join(ctx, req("good for sts-2", "sts-1"))
	wantCode(t, err, codes.PermissionDenied, "pod sts-2 asks to be sts-1")
	both := req("good for sts-1", "sts-1")
	both.Secret = "x"
	_, err = c.Join(ctx, both)
	wantCode(t, err, codes.InvalidArgument, "give one")
	old := req("good for sts-1", "sts-1")
	old.Level = 1
	_, err = c.Join(ctx, old)
	wantCode(t, err, codes.FailedPrecondition, "level")
	f.set(func() { f.down = fmt.Errorf("%w: the API server at secret.host", identity.ErrUnavailable) })
	_, err = c.Join(ctx, req("good for sts-1", "sts-1"))
	wantCode(t, err, codes.Unavailable)
	if strings.Contains(err.Error(), "secret.host") {
		t.Errorf("a stranger is told where the API server is: %v", err)
	}
	f.set(func() { f.down = nil })
	if len(w.added) != 0 || len(w.audit.find(audit.JoinMember, audit.OK)) != 0 || len(w.audit.find(audit.JoinMember, audit.Attempted)) != 0 {
		t.Fatal("somebody was admitted")
	}

	resp, err := c.Join(ctx, req("good for sts-1", "sts-1"))
	if err != nil || string(resp.Keyring) != "the keyring" {
		t.Fatalf("%v, %v", resp, err)
	}
	if m := <-w.added; m.ID != "sts-1" || m.Address != "sts-1.svc:8443" {
		t.Fatalf("added %v", m)
	}
	events := w.audit.find(audit.JoinMember, audit.OK)
	if len(events) != 1 || events[0].Details.Get("pod") != "ns/sts-1" || events[0].Details.Get("pod_uid") != "uid-of-sts-1" || events[0].Details.Get("account") != "countersign" {
		t.Fatalf("recorded: %+v", events)
	}
	// Its join broke off: it has no vote, so it may try again; elsewhere, or once it votes, a blank volume is not that member.
	if _, err := c.Join(ctx, req("good for sts-1", "sts-1")); err != nil {
		t.Errorf("again: %v", err)
	}
	<-w.added
	moved := req("good for sts-1", "sts-1")
	moved.Address = "elsewhere:8443"
	_, err = c.Join(ctx, moved)
	wantCode(t, err, codes.AlreadyExists)
	w.promoted.Store(true)
	_, err = c.Join(ctx, req("good for sts-1", "sts-1"))
	wantCode(t, err, codes.AlreadyExists, "countersign cluster remove sts-1", "volume is blank")
	if len(w.added) != 0 {
		t.Error("a member that votes was admitted again")
	}
	if text := w.audit.text() + w.log.String(); strings.Contains(text, "good for sts-1") {
		t.Error("a token is in the log or the records")
	}
}

// TestJoinByPodIsOff: without a StatefulSet a token is nothing, and nobody is asked about it.
func TestJoinByPodIsOff(t *testing.T) {
	f := &fakeHome{}
	for name, edit := range map[string]func(*Config){"no kube cluster": func(*Config) {}, "no StatefulSet": f.at(func(h *Home) { h.Forms = false })} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, edit).start(t)
			_, err := memberv1.NewMemberClient(w.dial(t, nil)).Join(testContext(t), &memberv1.JoinRequest{PodToken: "good for sts-1", Id: "sts-1", Address: "a:1", Level: 2})
			wantCode(t, err, codes.FailedPrecondition, "kubernetes.stateful_set")
			if len(w.added) != 0 || f.asked != 0 {
				t.Error("it was admitted, or asked about")
			}
		})
	}
}

// TestClaim: who begins a cluster serves nobody until the ConfigMap is known to be its own.
func TestClaim(t *testing.T) {
	f := &fakeHome{down: fmt.Errorf("%w: the API server sleeps", identity.ErrUnavailable)}
	var claimed atomic.Bool
	w := newWorld(t, f.at(func(h *Home) {
		h.Unclaimed = func() bool { return !claimed.Load() }
		h.Claim = func() error { claimed.Store(true); return nil }
		h.Rival = func(err error) { t.Errorf("no rival, and yet: %v", err) }
	}))
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- w.srv.RunLeader(ctx) }()
	// The API server is down after the cluster was begun, as after a crash between the two.
	eventually(t, "it says why it waits", func() bool { err := w.srv.unclaimed(); return err != nil && strings.Contains(err.Error(), "sleeps") })
	if f.created != 0 || claimed.Load() {
		t.Fatal("it claimed")
	}
	f.set(func() { f.down = nil })
	eventually(t, "it claims", claimed.Load)
	if err := w.srv.unclaimed(); err != nil {
		t.Error(err)
	}
	f.mu.Lock()
	if f.created != 1 || f.published.TrustDomain != "example.org" || !strings.Contains(f.published.Data[kube.BundlePEM], "CERTIFICATE") {
		t.Errorf("published %+v", f.published)
	}
	f.mu.Unlock()
	cancel()
	<-done
}

// TestRival: a ConfigMap of another cluster ends a member that began one and has served nobody, and is a thing to see to for others.
func TestRival(t *testing.T) {
	other := newWorld(t).start(t)
	data, err := pemData(other.state.Bundle())
	if err != nil {
		t.Fatal(err)
	}
	for name, published := range map[string]*kube.PublishedBundle{
		"another cluster's":      {TrustDomain: "example.org", Data: data},
		"another trust domain's": {TrustDomain: "other.org"},
		"empty":                  {},
	} {
		for _, unclaimed := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, unclaimed %v", name, unclaimed), func(t *testing.T) {
				f := &fakeHome{published: published}
				rival := make(chan error, 100)
				w := newWorld(t, f.at(func(h *Home) {
					h.Unclaimed = func() bool { return unclaimed }
					h.Claim = func() error { return errors.New("it claimed") }
					h.Rival = func(err error) { rival <- err }
				}))
				ctx, cancel := context.WithCancel(context.Background())
				done := make(chan error, 1)
				go func() { done <- w.srv.RunLeader(ctx) }()
				defer func() { cancel(); <-done }()
				if !unclaimed {
					eventually(t, "operators are told", func() bool { return strings.Contains(strings.Join(w.srv.Degraded(), " "), "ns/countersign-bundle") })
					if len(rival) != 0 || w.srv.unclaimed() != nil {
						t.Error("a cluster that serves was ended")
					}
					return
				}
				if err := <-rival; !errors.Is(err, identity.ErrExists) || !strings.Contains(err.Error(), "kubectl -n ns delete configmap countersign-bundle") {
					t.Errorf("%v", err)
				}
				if w.srv.unclaimed() == nil {
					t.Error("it serves")
				}
			})
		}
	}
}

func TestRegisterHome(t *testing.T) {
	f := &fakeHome{}
	w := newWorld(t, f.at()).start(t)
	eventually(t, "the kube cluster is registered", func() bool { _, ok := w.state.KubeCluster("main"); return ok })
	k, _ := w.state.KubeCluster("main")
	if k.Issuer != issuer || k.Audience != "countersign" || !k.TokenReview || k.Kubeconfig != "in-cluster" || k.DefaultID != identity.DefaultKubeID || strings.Join(k.AgentAccounts, " ") != "ns/countersign-agent" {
		t.Errorf("registered: %+v", k)
	}
	eventually(t, "it is recorded", func() bool { return len(w.audit.find("admin.add_kube_cluster", audit.OK)) > 0 })
	for _, outcome := range []audit.Outcome{audit.Attempted, audit.OK} {
		if e := w.audit.find("admin.add_kube_cluster", outcome); len(e) != 1 || e[0].Who.Kind != "self" || strings.Join(e[0].Subjects, " ") != "main" {
			t.Errorf("%s: %+v", outcome, e)
		}
	}
}

// TestRegisterHomeLeavesAlone: what an operator registered stays, and what it lacks is said.
func TestRegisterHomeLeavesAlone(t *testing.T) {
	f := &fakeHome{}
	w := newWorld(t, f.at())
	mine := identity.KubeCluster{Name: "main", Issuer: "https://mine", Audience: "mine", JWKSURL: "https://mine/keys"}
	if _, err := w.state.PutKubeCluster(context.Background(), mine, false); err != nil {
		t.Fatal(err)
	}
	w.start(t)
	eventually(t, "what is missing is said", func() bool {
		return strings.Contains(w.log.String(), "kube add --replace --agent-account") && strings.Contains(w.log.String(), "ns/countersign-agent")
	})
	if k, _ := w.state.KubeCluster("main"); k.Issuer != "https://mine" || k.TokenReview || len(k.AgentAccounts) != 0 {
		t.Errorf("changed: %+v", k)
	}
	if n := len(w.audit.find("admin.add_kube_cluster", audit.Attempted)); n != 0 {
		t.Errorf("%d attempts", n)
	}
}

// TestRegisterHomeNeedsItsRecord: as for operators, what cannot be recorded is not done.
func TestRegisterHomeNeedsItsRecord(t *testing.T) {
	w := newWorld(t, (&fakeHome{}).at())
	w.audit.set(func() { w.audit.deaf = errAuditDown })
	if err := w.srv.registerHome(context.Background()); !errors.Is(err, identity.ErrUnavailable) {
		t.Errorf("%v", err)
	}
	if _, ok := w.state.KubeCluster("main"); ok {
		t.Error("registered without a record")
	}
	// One whose usual default ID another cluster has needs an operator's word.
	w.audit.set(func() { w.audit.deaf = nil })
	if _, err := w.state.PutKubeCluster(context.Background(), identity.KubeCluster{Name: "east", Issuer: "https://east", Audience: "x", JWKSURL: "https://east/keys", DefaultID: identity.DefaultKubeID}, false); err != nil {
		t.Fatal(err)
	}
	if err := w.srv.registerHome(context.Background()); !errors.Is(err, identity.ErrPrecondition) {
		t.Errorf("%v", err)
	}
	if e := w.audit.find("admin.add_kube_cluster", audit.Refused); len(e) != 1 {
		t.Errorf("recorded: %+v", e)
	}
}
