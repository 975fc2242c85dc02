package server

import (
	"context"
	"time"

	"countersign.io/countersign/attestor/kube"
	"countersign.io/countersign/identity"
)

// State is what the member knows: its own copy of the replicated state. One value usually implements all its
// parts. Every method must be safe for concurrent use, must not block on the network, and must return values
// that nobody changes afterwards.
type State struct {
	EntryReader
	Registry
	Trust
	Admission
}

// EntryReader reads entries, found by what a workload is.
type EntryReader interface {
	// Match returns the entries whose selectors are all among sel (sorted), the oldest first, in a slice that is the
	// caller's. Expired ones may be among them. The cost must not depend on how many entries there are.
	Match(sel []identity.Selector) []*identity.Entry
	// Entry returns one by its ID.
	Entry(id string) (*identity.Entry, bool)
	// Entries returns up to limit entries with IDs above after, and the after of the next page; "" ends.
	Entries(after string, limit int) (entries []*identity.Entry, next string)
	// AdminEntries returns the entries that give power (identity.Entry.Power) to exactly this SPIFFE ID. It is asked at every
	// issuance.
	AdminEntries(id string) []*identity.Entry
	// FactsMatter reports whether an entry could match a workload with these selectors (sorted) if its labels or its owner were
	// known. It is asked at every issuance.
	FactsMatter(sel []identity.Selector) bool
	// Interests are which labels and owners entries name, by kube cluster.
	Interests() map[string]identity.Interest
}

// Registry is who may speak: kube clusters and agents.
type Registry interface {
	KubeCluster(name string) (*identity.KubeCluster, bool)
	KubeClusters() []identity.KubeCluster
	Agent(id string) (*identity.Agent, bool)
	Agents(after string, limit int) (agents []*identity.Agent, next string)
	// NodeBanned reports whether any banned agent speaks for the Kubernetes node. It is asked for every agentless call.
	NodeBanned(cluster, node string) bool
}

// Trust is what the trust domain vouches for, and who serves it.
type Trust interface {
	Authorities() []identity.Authority
	// Bundle returns the current bundle; never nil. The same pointer means the same content.
	Bundle() *identity.Bundle
	Members() []identity.Member
	// Revision grows with every change.
	Revision() uint64
	// Watch calls f with a Reset at once and then with every change, in order, and only once the reads above show it.
	// It returns when ctx ends.
	Watch(ctx context.Context, f func([]identity.Change)) error
}

// Admission is what decides who may come in.
type Admission interface {
	// Level is what commands the members may propose: see docs/OPERATIONS.md.
	Level() uint32
	// JoinToken returns the token whose secret has this hash, used or not.
	JoinToken(hash []byte) (identity.JoinToken, bool)
}

// Writes are the commands. A method must return only after this member's own State shows the change, and must
// wrap identity.ErrUnavailable when there is no leader to decide.
type Writes struct {
	EntryWriter
	KubeWriter
	TokenWriter
	AgentWriter
	ClusterWriter
}

// EntryWriter changes entries.
type EntryWriter interface {
	CreateEntry(ctx context.Context, now time.Time, e identity.Entry) (identity.Entry, error)
	// UpdateEntry must refuse with identity.ErrPrecondition if ifRevision is not 0 and not the entry's.
	UpdateEntry(ctx context.Context, now time.Time, e identity.Entry, ifRevision uint64) (identity.Entry, error)
	DeleteEntry(ctx context.Context, id string) error
}

// KubeWriter changes the registered kube clusters.
type KubeWriter interface {
	PutKubeCluster(ctx context.Context, k identity.KubeCluster, replace bool) (identity.KubeCluster, error)
	DeleteKubeCluster(ctx context.Context, name string) error
}

// TokenWriter keeps join tokens.
type TokenWriter interface {
	CreateJoinToken(ctx context.Context, t identity.JoinToken) error
	// UseJoinToken must succeed at the most once for a hash, before its expiry, for its purpose.
	UseJoinToken(ctx context.Context, now time.Time, hash []byte, purpose string) (identity.JoinToken, error)
}

// AgentWriter changes agents' records.
type AgentWriter interface {
	// PutAgent must refuse a banned agent with identity.ErrDenied.
	PutAgent(ctx context.Context, a identity.Agent) (identity.Agent, error)
	BanAgent(ctx context.Context, id string) error
	EvictAgent(ctx context.Context, id string) error
	// AdmitAgent uses up an agent's join token, as UseJoinToken does, and puts the agent's record, both or neither. It needs
	// level 2.
	AdmitAgent(ctx context.Context, now time.Time, hash []byte, a identity.Agent) (identity.Agent, error)
}

// ClusterWriter changes what the members share.
type ClusterWriter interface {
	// CreateAuthority must return the active authority of that kind if there is one, whoever made it.
	CreateAuthority(ctx context.Context, a identity.Authority) (identity.Authority, error)
	PutMember(ctx context.Context, m identity.Member) error
	// RemoveMember must wrap identity.ErrNotFound if there is none.
	RemoveMember(ctx context.Context, id string) error
	// SetLevel must only ever raise the level.
	SetLevel(ctx context.Context, level uint32) error
	// Sweep drops what has expired.
	Sweep(ctx context.Context, now time.Time) error
}

// Pods verifies pods' tokens. *kube.Verifier does.
type Pods interface {
	// Verify must accept only a token that its kube cluster signed for our audience, that is valid now and bound to
	// a pod on a node; its errors must wrap identity.ErrUnauthenticated, or ErrUnavailable when it cannot tell.
	Verify(ctx context.Context, token []byte) (*kube.Claims, error)
	SetClusters([]identity.KubeCluster) error
	// SetInterest says which facts of pods entries name, by kube cluster.
	SetInterest(map[string]identity.Interest)
	// Facts are those of a pod as selectors. Its errors are as Verify's: it must wrap identity.ErrUnavailable when it cannot tell.
	Facts(ctx context.Context, pod *kube.Claims) ([]identity.Selector, error)
	// KnownFacts are the same as this member knows by itself; false: it cannot tell. It must not block.
	KnownFacts(cluster, namespace, podUID string) ([]identity.Selector, bool)
	// Run tells of each pod that ended, and of each of which other facts are known, until ctx ends.
	Run(ctx context.Context, tell kube.Events) error
}
