package server

import (
	"context"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	adminv1 "countersign.io/countersign/api/admin/v1"
	"countersign.io/countersign/identity"
)

// A preview says no exactly where the change would, and changes nothing.
func TestPreviewsAreAsTheChanges(t *testing.T) {
	health := []MemberHealth{memberSays("m1", nil), memberSays("m2", nil), memberSays("m3", nil)}
	w := newWorld(t, func(c *Config) {
		c.Cluster.Health = func(context.Context) ([]MemberHealth, error) { return health, nil }
	}).start(t)
	w.registerCluster(t)
	a, _ := w.agent(t, "a1", "node-1")
	conn := dialWith(t, w.socket, insecure.NewCredentials())
	change, preview := adminv1.NewAdminClient(conn), adminv1.NewPreviewClient(conn)
	plain := w.createEntry(t, &adminv1.Entry{Selectors: []string{"k8s:ns:a"}, SpiffeId: "spiffe://example.org/a"})
	boss := w.createEntry(t, &adminv1.Entry{Selectors: []string{"k8s:ns:b"}, SpiffeId: "spiffe://example.org/b", AdminRole: "reader"})
	ctx := testContext(t)
	edited := func(e *adminv1.Entry, f func(*adminv1.Entry)) *adminv1.Entry {
		c := proto.CloneOf(e)
		f(c)
		return c
	}
	jwks, _ := w.state.KubeCluster(cluster)
	kube := func(f func(*adminv1.KubeCluster)) *adminv1.KubeCluster {
		k := &adminv1.KubeCluster{Name: "c2", Issuer: "https://two", Audience: "countersign", Jwks: jwks.JWKS, DefaultId: "/two/{k8s:ns}/{k8s:sa}"}
		if f != nil {
			f(k)
		}
		return k
	}
	entry := func(method string, e *adminv1.Entry) [2]func() (*adminv1.PreviewResponse, error) {
		if method == "create" {
			return [2]func() (*adminv1.PreviewResponse, error){
				func() (*adminv1.PreviewResponse, error) { return preview.CreateEntry(ctx, e) },
				func() (*adminv1.PreviewResponse, error) { _, err := change.CreateEntry(ctx, e); return nil, err },
			}
		}
		return [2]func() (*adminv1.PreviewResponse, error){
			func() (*adminv1.PreviewResponse, error) { return preview.UpdateEntry(ctx, e) },
			func() (*adminv1.PreviewResponse, error) { _, err := change.UpdateEntry(ctx, e); return nil, err },
		}
	}
	name := func(n string, p func(context.Context, *adminv1.NameRequest) (*adminv1.PreviewResponse, error), c func(context.Context, *adminv1.NameRequest) error) [2]func() (*adminv1.PreviewResponse, error) {
		r := &adminv1.NameRequest{Name: n}
		return [2]func() (*adminv1.PreviewResponse, error){
			func() (*adminv1.PreviewResponse, error) { return p(ctx, r) },
			func() (*adminv1.PreviewResponse, error) { return nil, c(ctx, r) },
		}
	}
	deleteEntry := func(n string) [2]func() (*adminv1.PreviewResponse, error) {
		return name(n, func(ctx context.Context, r *adminv1.NameRequest) (*adminv1.PreviewResponse, error) {
			return preview.DeleteEntry(ctx, r)
		},
			func(ctx context.Context, r *adminv1.NameRequest) error {
				_, err := change.DeleteEntry(ctx, r)
				return err
			})
	}
	addKube := func(k *adminv1.KubeCluster) [2]func() (*adminv1.PreviewResponse, error) {
		return [2]func() (*adminv1.PreviewResponse, error){
			func() (*adminv1.PreviewResponse, error) { return preview.AddKubeCluster(ctx, k) },
			func() (*adminv1.PreviewResponse, error) { _, err := change.AddKubeCluster(ctx, k); return nil, err },
		}
	}
	ban := func(n string) [2]func() (*adminv1.PreviewResponse, error) {
		return name(n, func(ctx context.Context, r *adminv1.NameRequest) (*adminv1.PreviewResponse, error) {
			return preview.BanAgent(ctx, r)
		},
			func(ctx context.Context, r *adminv1.NameRequest) error { _, err := change.BanAgent(ctx, r); return err })
	}
	evict := func(n string) [2]func() (*adminv1.PreviewResponse, error) {
		return name(n, func(ctx context.Context, r *adminv1.NameRequest) (*adminv1.PreviewResponse, error) {
			return preview.EvictAgent(ctx, r)
		},
			func(ctx context.Context, r *adminv1.NameRequest) error {
				_, err := change.EvictAgent(ctx, r)
				return err
			})
	}
	deleteKube := func(n string) [2]func() (*adminv1.PreviewResponse, error) {
		return name(n, func(ctx context.Context, r *adminv1.NameRequest) (*adminv1.PreviewResponse, error) {
			return preview.DeleteKubeCluster(ctx, r)
		},
			func(ctx context.Context, r *adminv1.NameRequest) error {
				_, err := change.DeleteKubeCluster(ctx, r)
				return err
			})
	}
	remove := func(n string) [2]func() (*adminv1.PreviewResponse, error) {
		return name(n, func(ctx context.Context, r *adminv1.NameRequest) (*adminv1.PreviewResponse, error) {
			return preview.RemoveMember(ctx, r)
		},
			func(ctx context.Context, r *adminv1.NameRequest) error {
				_, err := change.RemoveMember(ctx, r)
				return err
			})
	}
	// In this order: the changes are made.
	for _, row := range []struct {
		what string
		do   [2]func() (*adminv1.PreviewResponse, error)
		says string // by the preview, where the change is made
	}{
		{"a new entry", entry("create", &adminv1.Entry{Selectors: []string{"k8s:ns:c"}, SpiffeId: "spiffe://example.org/c"}), "get spiffe://example.org/c"},
		{"one with power", entry("create", &adminv1.Entry{Selectors: []string{"k8s:ns:d"}, SpiffeId: "spiffe://example.org/d", Admin: true, Downstream: true}), "becomes an admin with the role security"},
		{"one that is there", entry("create", &adminv1.Entry{Selectors: []string{"k8s:ns:a"}, SpiffeId: "spiffe://example.org/a"}), ""},
		{"one with an ID", entry("create", &adminv1.Entry{Id: "x", Selectors: []string{"k8s:ns:a"}, SpiffeId: "spiffe://example.org/x"}), ""},
		{"one that is wrong", entry("create", &adminv1.Entry{SpiffeId: "spiffe://example.org/x"}), ""},
		{"an update", entry("update", edited(plain, func(e *adminv1.Entry) { e.Hint = "h"; e.DnsNames = []string{"a.b"} })), "would change: dns_names, hint"},
		{"one of before", entry("update", edited(plain, func(e *adminv1.Entry) { e.Hint, e.Revision = "i", 1 })), ""},
		{"of nothing", entry("update", edited(plain, func(e *adminv1.Entry) { e.Id = "none" })), ""},
		{"taking power away", entry("update", edited(boss, func(e *adminv1.Entry) { e.AdminRole = "" })), "no longer an admin with the role reader"},
		{"an end", deleteEntry(plain.Id), "would be deleted"},
		{"an end of nothing", deleteEntry("none"), ""},
		{"a kube cluster", addKube(kube(nil)), "is believed about its pods"},
		{"again", addKube(kube(nil)), ""},
		{"in its place", addKube(kube(func(k *adminv1.KubeCluster) { k.Replace = true })), "would be replaced"},
		{"one without keys", addKube(kube(func(k *adminv1.KubeCluster) { k.Jwks = []byte("{") })), ""},
		{"the end of one", deleteKube("c2"), "would be forgotten"},
		{"the end of none", deleteKube("c9"), ""},
		{"a ban", ban(a.ID), "shut out for good"},
		{"a ban of nobody", ban("spiffe://example.org/countersign/agent/join/none"), ""},
		{"an eviction", evict("spiffe://example.org/countersign/agent/join/none"), ""},
		{"a removal", remove("m3"), "could fail"},
		{"one of nobody", remove("m9"), ""},
	} {
		before := w.state.Revision()
		res, perr := row.do[0]()
		if after := w.state.Revision(); after != before {
			t.Errorf("%s: the preview changed the state", row.what)
		}
		_, cerr := row.do[1]()
		if status.Code(perr) != status.Code(cerr) {
			t.Errorf("%s: the preview says %v, the change %v", row.what, perr, cerr)
		}
		if (row.says == "") != (cerr != nil) {
			t.Errorf("%s: %v", row.what, cerr)
		}
		if all := strings.Join(res.GetEffects(), "\n"); !strings.Contains(all, row.says) {
			t.Errorf("%s: %q is not in %q", row.what, row.says, all)
		}
	}
	// It needs the same as the change: see TestOperatorsCannotRise.
	op := adminv1.NewPreviewClient(w.asConn(t, identity.AdminOperator))
	_, err := op.CreateEntry(ctx, &adminv1.Entry{Selectors: []string{"k8s:ns:z"}, SpiffeId: "spiffe://example.org/z", Admin: true})
	wantCode(t, err, codes.PermissionDenied, "needs the role security")
	// A level that some member holds back.
	w.state.mu.Lock()
	w.state.level = 1
	w.state.mu.Unlock()
	_, err = preview.CreateEntry(ctx, &adminv1.Entry{Selectors: []string{"k8s:ns:z"}, SpiffeId: "spiffe://example.org/z", AdminRole: "reader"})
	wantCode(t, err, codes.FailedPrecondition)
	_, err = preview.RotateSeal(ctx, &adminv1.Empty{})
	wantCode(t, err, codes.FailedPrecondition)
}

// What a change would touch is counted.
func TestPreviewsCountWorkloads(t *testing.T) {
	w := newWorld(t).start(t)
	e := w.createEntry(t, &adminv1.Entry{Selectors: []string{"k8s:ns:a"}, SpiffeId: "spiffe://example.org/a"})
	a, _ := w.agent(t, "a1", "node-1")
	s, err := w.srv.hub.open(a.ID, "test")
	if err != nil {
		t.Fatal(err)
	}
	defer w.srv.hub.remove(s)
	for i := range uint64(3) {
		if err := w.srv.hub.set(s, i, []identity.Selector{"k8s:ns:a"}, []held{{e.Id, e.Revision}}); err != nil {
			t.Fatal(err)
		}
	}
	c := adminv1.NewPreviewClient(dialWith(t, w.socket, insecure.NewCredentials()))
	ctx := testContext(t)
	for what, call := range map[string]func() (*adminv1.PreviewResponse, error){
		"3 workloads that agents serve at this member have an SVID by it": func() (*adminv1.PreviewResponse, error) {
			return c.DeleteEntry(ctx, &adminv1.NameRequest{Name: e.Id})
		},
		"3 workloads that agents serve at this member have these selectors": func() (*adminv1.PreviewResponse, error) {
			return c.CreateEntry(ctx, &adminv1.Entry{Selectors: []string{"k8s:ns:a"}, SpiffeId: "spiffe://example.org/other"})
		},
		"serves 3 workloads": func() (*adminv1.PreviewResponse, error) {
			return c.EvictAgent(ctx, &adminv1.NameRequest{Name: a.ID})
		},
	} {
		res, err := call()
		if err != nil || !strings.Contains(strings.Join(res.Effects, "\n"), what) {
			t.Errorf("%q: %v, %v", what, res, err)
		}
	}
}
