package node

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"countersign.io/countersign/identity"
)

func TestAgentRecords(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("example.org")
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	fp := strings.Repeat("ab", 32)
	joinToken := identity.JoinToken{ID: "tok-1", Purpose: identity.JoinAgent}
	vouched := identity.JoinToken{ID: "tok-2", Purpose: identity.JoinAgent, KubeCluster: "east", KubeNode: "node-1.local"}
	for name, row := range map[string]struct {
		make          func() (identity.Agent, error)
		kind, id      string
		cluster, node string
		more          []identity.Selector
	}{
		"join":              {func() (identity.Agent, error) { return JoinAgent(td, joinToken, now) }, "join_token", "join/tok-1", "", "", nil},
		"join with node":    {func() (identity.Agent, error) { return JoinAgent(td, vouched, now) }, "join_token", "join/tok-2", "east", "node-1.local", nil},
		"kube":              {func() (identity.Agent, error) { return KubeAgent(td, "east", "node-1", now) }, "kube", "kube/east/node-1", "east", "node-1", nil},
		"x509pop":           {func() (identity.Agent, error) { return X509PopAgent(td, "", "node-1", fp, now) }, "x509pop", "x509pop/" + fp, "", "", []identity.Selector{"agent:x509-cn:node-1"}},
		"x509pop with node": {func() (identity.Agent, error) { return X509PopAgent(td, "east", "node-1", fp, now) }, "x509pop", "x509pop/" + fp, "east", "node-1", []identity.Selector{"agent:x509-cn:node-1"}},
		"CN is no label":    {func() (identity.Agent, error) { return X509PopAgent(td, "east", "system:node:node-1", fp, now) }, "x509pop", "x509pop/" + fp, "", "", []identity.Selector{"agent:x509-cn:system:node:node-1"}},
		"CN is empty":       {func() (identity.Agent, error) { return X509PopAgent(td, "east", "", fp, now) }, "x509pop", "x509pop/" + fp, "", "", nil},
		"CN with controls":  {func() (identity.Agent, error) { return X509PopAgent(td, "east", "a\nb", fp, now) }, "x509pop", "x509pop/" + fp, "", "", nil},
	} {
		t.Run(name, func(t *testing.T) {
			a, err := row.make()
			if err != nil {
				t.Fatal(err)
			}
			id := "spiffe://example.org/countersign/agent/" + row.id
			if a.ID != id || a.Kind != row.kind || a.KubeCluster != row.cluster || a.KubeNode != row.node || !a.AttestedAt.Equal(now) || a.Banned {
				t.Errorf("record %+v", a)
			}
			want := append([]identity.Selector{identity.Selector("agent:id:" + id), identity.Selector("agent:kind:" + row.kind)}, row.more...)
			if row.node != "" {
				want = append(want, identity.Selector("agent:kube-cluster:"+row.cluster), identity.Selector("agent:kube-node:"+row.node))
			}
			if !slices.Equal(a.Selectors, identity.SortSelectors(want)) {
				t.Errorf("selectors %v, want %v", a.Selectors, want)
			}
			for _, s := range a.Selectors {
				if !s.Proven() {
					t.Errorf("%s is not proven", s)
				}
			}
			if pid, err := spiffeid.FromString(a.ID); err != nil || identity.RoleOf(pid) != identity.RoleAgent {
				t.Errorf("ID %s is not an agent's: %v", a.ID, err)
			}
		})
	}
}

func TestAgentRecordsRefuse(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("example.org")
	for name, make := range map[string]func() (identity.Agent, error){
		"a server's token": func() (identity.Agent, error) {
			return JoinAgent(td, identity.JoinToken{ID: "a", Purpose: identity.JoinServer}, time.Time{})
		},
		"a token without ID": func() (identity.Agent, error) {
			return JoinAgent(td, identity.JoinToken{Purpose: identity.JoinAgent}, time.Time{})
		},
		"a node without cluster": func() (identity.Agent, error) {
			return JoinAgent(td, identity.JoinToken{ID: "a", Purpose: identity.JoinAgent, KubeNode: "n"}, time.Time{})
		},
		"a node with a slash": func() (identity.Agent, error) { return KubeAgent(td, "east", "../member/ca-1", time.Time{}) },
		"no node":             func() (identity.Agent, error) { return KubeAgent(td, "east", "", time.Time{}) },
		"no cluster":          func() (identity.Agent, error) { return KubeAgent(td, "", "node-1", time.Time{}) },
		"no fingerprint":      func() (identity.Agent, error) { return X509PopAgent(td, "", "cn", "", time.Time{}) },
		"dots":                func() (identity.Agent, error) { return KubeAgent(td, "east", "..", time.Time{}) },
	} {
		if a, err := make(); err == nil || a.ID != "" || !errors.Is(err, identity.ErrInvalid) && !errors.Is(err, identity.ErrDenied) {
			t.Errorf("%s: %+v, %v", name, a, err)
		}
	}
}

func TestNodeNameFromCN(t *testing.T) {
	for cn, want := range map[string]string{
		"node-1": "node-1", "n": "n", "": "", "Node": "", "a.b": "", "-a": "", "a-": "", "a_b": "", "a/b": "", "a\n": "",
		strings.Repeat("a", 63): strings.Repeat("a", 63), strings.Repeat("a", 64): "",
	} {
		if got := NodeNameFromCN(cn); got != want {
			t.Errorf("NodeNameFromCN(%q) = %q, want %q", cn, got, want)
		}
	}
}

func TestReattestable(t *testing.T) {
	for kind, want := range map[string]bool{KindJoin: false, KindKube: true, KindX509Pop: true, "": false} {
		if Reattestable(kind) != want {
			t.Errorf("Reattestable(%q) = %v", kind, !want)
		}
	}
}
