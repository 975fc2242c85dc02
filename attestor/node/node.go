// Package node is node attestation, both halves: how an agent proves at first contact which node it is, and
// what the cluster then records about it. There are three kinds: a join secret, spent once and written down
// by an operator; the service account token of the agent's own pod (verified by package attestor/kube, whose
// answer is all that arrives here); and x509pop, a certificate that the node already has together with a
// proof of its key. The package holds no state and asks nobody: that a secret is spent once is the store's
// word, and that an agent is not banned is the server's.
package node

import (
	"fmt"
	"regexp"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"countersign.io/countersign/identity"
)

// The kinds of node attestation, as in identity.Agent.Kind and the selector agent:kind.
const (
	KindJoin    = "join_token"
	KindKube    = "kube"
	KindX509Pop = "x509pop"
)

// The kinds' segments in an agent's SPIFFE ID.
const (
	segmentJoin    = "join"
	segmentKube    = "kube"
	segmentX509Pop = "x509pop"
)

// Reattestable reports whether an agent of the kind can prove itself again after a restart without an operator:
// a join secret is spent, the other evidence stays with the node.
func Reattestable(kind string) bool { return kind == KindKube || kind == KindX509Pop }

// JoinAgent is the record of the agent that spent the join token: ID /countersign/agent/join/TOKENID, and the
// Kubernetes node that the operator vouched for, if any. The caller has spent the token.
func JoinAgent(td spiffeid.TrustDomain, t identity.JoinToken, now time.Time) (identity.Agent, error) {
	if t.Purpose != identity.JoinAgent {
		return identity.Agent{}, fmt.Errorf("%w: join token %q is for a %s, not for an agent: make one with countersign token create", identity.ErrDenied, t.ID, t.Purpose)
	}
	return record(td, KindJoin, t.KubeCluster, t.KubeNode, "", now, segmentJoin, t.ID)
}

// KubeAgent is the record of the agent that runs as a pod on the node of the kube cluster: ID
// /countersign/agent/kube/CLUSTER/NODE, so a replaced agent pod is the same agent. The caller has verified the
// pod's token and that its service account may be an agent.
func KubeAgent(td spiffeid.TrustDomain, cluster, kubeNode string, now time.Time) (identity.Agent, error) {
	return record(td, KindKube, cluster, kubeNode, "", now, segmentKube, cluster, kubeNode)
}

// X509PopAgent is the record of the agent that proved the key of a certificate: ID
// /countersign/agent/x509pop/FINGERPRINT, with cn and fingerprint as VerifyX509Pop returned them. cluster is the
// kube cluster whose nodes hold such certificates, as the member is configured; empty: the agents serve no pods.
// The agent may speak for the Kubernetes node that the common name names, and only if that is one DNS label:
// nothing else in a certificate's subject was meant as a node name.
func X509PopAgent(td spiffeid.TrustDomain, cluster, cn, fingerprint string, now time.Time) (identity.Agent, error) {
	kubeNode := ""
	if cluster != "" && NodeNameFromCN(cn) != "" {
		kubeNode = NodeNameFromCN(cn)
	} else {
		cluster = ""
	}
	if _, err := identity.ParseSelector("agent:x509-cn:" + cn); err != nil {
		cn = ""
	}
	return record(td, KindX509Pop, cluster, kubeNode, cn, now, segmentX509Pop, fingerprint)
}

var dnsLabel = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?$`) // and at the most 63 bytes: to count them here costs agents memory

// NodeNameFromCN is the node that a certificate's common name names: the common name itself if it is one
// lower-case DNS label (RFC 1123, at the most 63 bytes), else empty.
func NodeNameFromCN(cn string) string {
	if len(cn) > 63 || !dnsLabel.MatchString(cn) {
		return ""
	}
	return cn
}

func record(td spiffeid.TrustDomain, kind, cluster, kubeNode, cn string, now time.Time, segments ...string) (identity.Agent, error) {
	id, err := identity.AgentID(td, segments[0], segments[1:]...)
	if err != nil {
		return identity.Agent{}, fmt.Errorf("%w: naming the %s agent %q: %v", identity.ErrInvalid, kind, segments[1:], err)
	}
	if (cluster == "") != (kubeNode == "") {
		return identity.Agent{}, fmt.Errorf("%w: naming the %s agent %s: kube cluster %q and node %q: give both or neither", identity.ErrInvalid, kind, id, cluster, kubeNode)
	}
	raw := []string{"agent:id:" + id.String(), "agent:kind:" + kind}
	if cluster != "" {
		raw = append(raw, "agent:kube-cluster:"+cluster, "agent:kube-node:"+kubeNode)
	}
	if cn != "" {
		raw = append(raw, "agent:x509-cn:"+cn)
	}
	sel, err := identity.ParseSelectors(raw)
	if err != nil {
		return identity.Agent{}, fmt.Errorf("naming the %s agent %s: %w", kind, id, err)
	}
	return identity.Agent{ID: id.String(), Kind: kind, Selectors: sel, KubeCluster: cluster, KubeNode: kubeNode, AttestedAt: now}, nil
}
