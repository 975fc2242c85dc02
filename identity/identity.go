// Package identity holds the values that every layer of Countersign shares: selectors, entries,
// evidence, issuances, authorities, bundles and the sentinel errors. It is pure: no I/O, no clock,
// no wire format. A value that came through one of its Parse or Check functions can be trusted to be
// well formed; nothing here says that it is true.
package identity

import (
	"crypto"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Limits at every edge. They are part of the contract with clients: raising one is compatible,
// lowering one is not.
const (
	MaxTokenBytes     = 16 << 10 // a service account token; real ones are 1 to 2 KiB
	MaxPublicKeyBytes = 1 << 10  // a PKIX public key; RSA-4096 is 550 bytes
	MaxSelectors      = 64       // of one entry or one workload
	MaxSelectorBytes  = 512
	MaxDNSNames       = 32
	MaxManagedBy      = 512
	MaxHintBytes      = 1024 // SPIFFE Workload API section 8
	MaxAudiences      = 32
	MaxAudienceBytes  = 512
	MaxBatch          = 50 // X.509 requests in one call
	MaxX509TTL        = 24 * time.Hour
	MaxJWTTL          = 24 * time.Hour
	MinTTL            = 5 * time.Second
	DefaultX509TTL    = time.Hour
	DefaultJWTTL      = 5 * time.Minute
)

// ReservedPath is the first path segment of the IDs that Countersign gives to its own parts. No entry
// and no template can yield an ID below it.
const ReservedPath = "countersign"

// MemberID is the SPIFFE ID of a member of the CA cluster. The name must be a valid path segment.
func MemberID(td spiffeid.TrustDomain, name string) (spiffeid.ID, error) {
	return spiffeid.FromSegments(td, ReservedPath, "member", name)
}

// AgentID is the SPIFFE ID of a node agent: how it was attested and a name unique within that kind.
func AgentID(td spiffeid.TrustDomain, kind string, name ...string) (spiffeid.ID, error) {
	return spiffeid.FromSegments(td, append([]string{ReservedPath, "agent", kind}, name...)...)
}

// Role says what an SVID's ID may do towards a member.
type Role int

// The roles; anything that is not the cluster's own is a workload.
const (
	RoleWorkload Role = iota
	RoleMember
	RoleAgent
)

// RoleOf derives the role from the reserved part of the ID.
func RoleOf(id spiffeid.ID) Role {
	switch {
	case hasPrefix(id.Path(), "/"+ReservedPath+"/member/"):
		return RoleMember
	case hasPrefix(id.Path(), "/"+ReservedPath+"/agent/"):
		return RoleAgent
	}
	return RoleWorkload
}

func hasPrefix(s, p string) bool { return len(s) > len(p) && s[:len(p)] == p }

// Entry says who gets which SPIFFE ID. All selectors must be among the workload's. Zero TTLs mean the
// defaults of the trust domain.
type Entry struct {
	ID            string        `json:"id"`
	Selectors     []Selector    `json:"selectors"` // sorted, unique
	SPIFFEID      string        `json:"spiffe_id"` // a Template
	X509TTL       time.Duration `json:"x509_ttl,omitempty"`
	JWTTTL        time.Duration `json:"jwt_ttl,omitempty"`
	DNSNames      []string      `json:"dns_names,omitempty"` // each a Template
	Hint          string        `json:"hint,omitempty"`
	FederatesWith []string      `json:"federates_with,omitempty"` // trust domain names
	Admin         bool          `json:"admin,omitempty"`          // see Power
	AdminRole     AdminRole     `json:"admin_role,omitempty"`
	PowerSince    time.Time     `json:"power_since,omitzero"` // the state's: since when its SPIFFE ID has at least that power by it
	// Downstream: whoever has this identity may ask for a certificate authority below ours, as a CA cluster of the same
	// trust domain does. Its SPIFFE ID has no placeholders.
	Downstream bool      `json:"downstream,omitempty"`
	ExpiresAt  time.Time `json:"expires_at,omitzero"`
	CreatedAt  time.Time `json:"created_at,omitzero"`
	// ManagedBy is what made it and keeps it as it is, such as workloadidentity/main/web; empty: an operator did. From level 2 on.
	ManagedBy string `json:"managed_by,omitempty"`
	Revision  uint64 `json:"revision,omitempty"` // of the last change
}

// Expired reports whether the entry has ended at now.
func (e *Entry) Expired(now time.Time) bool {
	return !e.ExpiresAt.IsZero() && !now.Before(e.ExpiresAt)
}

// DefaultKubeID is the template of the identity that a pod has without any entry.
const DefaultKubeID = "/ns/{k8s:ns}/sa/{k8s:sa}"

// KubeCluster is a Kubernetes cluster whose pods and node agents may be attested.
type KubeCluster struct {
	Name     string `json:"name"`
	Issuer   string `json:"issuer"`   // the exact iss of its tokens
	Audience string `json:"audience"` // what our tokens must be bound to
	// JWKS is a JSON Web Key Set held offline; JWKSURL is where to fetch one. At the most one is set.
	JWKS    []byte `json:"jwks,omitempty"`
	JWKSURL string `json:"jwks_url,omitempty"`
	CAPEM   []byte `json:"ca_pem,omitempty"` // trusted for JWKSURL; empty: the system's roots
	// Kubeconfig is a path on each member's disk, or "in-cluster": credentials for TokenReview and for
	// watching pods. Empty: no TokenReview.
	Kubeconfig  string `json:"kubeconfig,omitempty"`
	TokenReview bool   `json:"token_review,omitempty"` // ask the API server about every token
	// AgentAccounts are the "namespace/serviceaccount" names whose pods may be node agents.
	AgentAccounts []string `json:"agent_accounts,omitempty"`
	// DefaultID is the path template for pods that no entry matches; empty: none.
	DefaultID string `json:"default_id,omitempty"`
	ManagedBy string `json:"managed_by,omitempty"` // as of an entry
	Revision  uint64 `json:"revision,omitempty"`
}

// Agent is the record of an attested node agent.
type Agent struct {
	ID          string     `json:"id"`   // SPIFFE ID
	Kind        string     `json:"kind"` // join_token, kube, x509pop
	Selectors   []Selector `json:"selectors,omitempty"`
	KubeCluster string     `json:"kube_cluster,omitempty"` // the node it may speak for; empty: no pods
	KubeNode    string     `json:"kube_node,omitempty"`
	// KubeAccount is the "namespace/serviceaccount" that it was attested as, by its pod's token: it is an agent for as long as
	// the cluster allows the account. Empty: attested otherwise, or on record since before accounts were kept.
	KubeAccount string    `json:"kube_account,omitempty"`
	AttestedAt  time.Time `json:"attested_at,omitzero"`
	// FirstAt is when it was attested first, if it was again since: the process before may have handed out what this one does
	// not know of. It is kept from level 2 on.
	FirstAt  time.Time `json:"first_at,omitzero"`
	Banned   bool      `json:"banned,omitempty"`
	Revision uint64    `json:"revision,omitempty"`
}

// JoinToken is what the cluster remembers of a one-time join secret: never the secret.
type JoinToken struct {
	ID          string    `json:"id"`
	Hash        []byte    `json:"hash"` // SHA-256 of the secret, 32 bytes
	Purpose     string    `json:"purpose"`
	KubeCluster string    `json:"kube_cluster,omitempty"` // of an agent: the node the operator vouches for
	KubeNode    string    `json:"kube_node,omitempty"`
	ExpiresAt   time.Time `json:"expires_at"`
	UsedAt      time.Time `json:"used_at,omitzero"`
}

// What a join token admits.
const (
	JoinAgent  = "agent"
	JoinServer = "server"
)

// Member is a server of the CA cluster as agents and operators see it.
type Member struct {
	ID      string `json:"id"`      // a path segment, see MemberID
	Address string `json:"address"` // host:port, one port for members, agents and admins
}

// AuthorityKind is what an authority signs.
type AuthorityKind string

// The kinds of authority.
const (
	AuthorityX509 AuthorityKind = "x509"
	AuthorityJWT  AuthorityKind = "jwt"
)

// AuthorityState is where an authority stands in its life: docs/ROTATION.md. Only an active one signs.
type AuthorityState string

// The states in order. A tainted authority is given up: what it signed is replaced at once, and trusted until then. A
// revoked one is in the bundle no longer, and its key is gone; the record stays until its end, for operators to see.
const (
	AuthorityPrepared AuthorityState = "prepared"
	AuthorityActive   AuthorityState = "active"
	AuthorityRetiring AuthorityState = "retiring"
	AuthorityTainted  AuthorityState = "tainted"
	AuthorityRevoked  AuthorityState = "revoked"
)

// Vouched reports whether an authority in this state is in the bundle.
func (s AuthorityState) Vouched() bool {
	switch s {
	case AuthorityPrepared, AuthorityActive, AuthorityRetiring, AuthorityTainted:
		return true
	}
	return false
}

// Authority is a signing key that the trust domain vouches for, as replicated.
type Authority struct {
	ID        string         `json:"id"` // x509: hex of the certificate's subject key ID; jwt: the kid
	Kind      AuthorityKind  `json:"kind"`
	State     AuthorityState `json:"state"`
	Cert      []byte         `json:"cert,omitempty"` // x509: DER, self-signed
	PublicKey []byte         `json:"public_key"`     // PKIX DER
	SealedKey []byte         `json:"sealed_key"`     // PKCS #8 DER, sealed; see AuthorityAD. Empty: the key is at KeyURI
	NotBefore time.Time      `json:"not_before"`
	NotAfter  time.Time      `json:"not_after"`
	Revision  uint64         `json:"revision,omitempty"`

	// KeyURI names the key in a KMS or an HSM that every member can use, without a PIN or any other secret.
	KeyURI string `json:"key_uri,omitempty"`
	// Of an x509 authority below an upstream: what leads from Cert to the upstream's roots, without them (DER), and
	// those roots (DER), which are in the bundle instead of Cert. Upstream says whose it is, for operators.
	Chain    [][]byte `json:"chain,omitempty"`
	Roots    [][]byte `json:"roots,omitempty"`
	Upstream string   `json:"upstream,omitempty"`

	// When it got into each state, by the clock of whoever proposed that; zero: it did not, or before this was kept.
	PreparedAt  time.Time `json:"prepared_at,omitzero"`
	ActivatedAt time.Time `json:"activated_at,omitzero"`
	RetiredAt   time.Time `json:"retired_at,omitzero"`
	TaintedAt   time.Time `json:"tainted_at,omitzero"`
	RevokedAt   time.Time `json:"revoked_at,omitzero"`
	// Sequence is the bundle's from which on it was in there; zero: since before this was kept.
	Sequence uint64 `json:"sequence,omitempty"`
	// Vouched leads from the keys of earlier roots to this one's (DER), the newest first: for those who have pinned them.
	Vouched [][]byte `json:"vouched,omitempty"`
	// Spread is how long the replacing of what a tainted one signed is to take, so that nothing falls over.
	Spread time.Duration `json:"spread,omitempty"`
}

// JWTKey is a JWT key of the same trust domain that another of its clusters signs with: one above ours, or below.
type JWTKey struct {
	ID        string    `json:"id"`         // the kid
	PublicKey []byte    `json:"public_key"` // PKIX DER
	NotAfter  time.Time `json:"not_after"`
}

// Foreign is what the bundle has from another cluster of the same trust domain, by source: "upstream", or the SPIFFE ID
// of a cluster below.
type Foreign struct {
	Source   string   `json:"source"`
	X509     [][]byte `json:"x509,omitempty"` // DER roots; only an upstream's
	JWT      []JWTKey `json:"jwt,omitempty"`
	Revision uint64   `json:"revision,omitempty"`
}

// Above is what an upstream vouches for. Sequence and Ending are another Countersign's.
type Above struct {
	Foreign
	Sequence uint64   // of its bundle
	Ending   []Ending // its authorities that sign no longer
}

// Below is what a cluster tells the one above it.
type Below struct {
	Keys  []JWTKey // all that it signs JWT-SVIDs with
	Acked uint64   // the sequence of the bundle from above that everyone in the cluster has
	Uses  []string // IDs of the x509 authorities above that anything live in the cluster is under; sorted
}

// SourceUpstream is the Source of what the cluster above vouches for.
const SourceUpstream = "upstream"

// SealState is where a data key of the seal stands.
type SealState string

// The states in order. A pending key seals nothing: the members fetch it. The active one seals; there is one. Retired
// ones still open what was sealed under them.
const (
	SealPending SealState = "pending"
	SealActive  SealState = "active"
	SealRetired SealState = "retired"
)

// SealTerm is what the cluster remembers of a data key of the seal: never the key.
type SealTerm struct {
	Number    uint32    `json:"number"`
	KeyID     []byte    `json:"key_id"` // see seal.Keyring.KeyID
	State     SealState `json:"state"`
	Holders   []string  `json:"holders,omitempty"` // members that said, while it was pending, that they keep it; sorted
	CreatedAt time.Time `json:"created_at"`
	Revision  uint64    `json:"revision,omitempty"`
}

// AuthorityAD is the additional data that binds a sealed authority key to its place, so that ciphertext
// moved to another authority or trust domain does not open.
func AuthorityAD(td spiffeid.TrustDomain, kind AuthorityKind, id string) []byte {
	return []byte("countersign/1|" + td.Name() + "|authority|" + string(kind) + "|" + id)
}

// Bundle is what one trust domain vouches for (SPIFFE Trust Domain and Bundle, section 4).
type Bundle struct {
	TrustDomain spiffeid.TrustDomain
	Sequence    uint64
	RefreshHint time.Duration
	X509        [][]byte          // DER certificates
	JWT         map[string][]byte // kid -> PKIX DER
	// Ending are the authorities, own trust domain's only, that sign no longer: sorted by ID.
	Ending []Ending `json:",omitempty"`
}

// Ending is an authority that is still trusted and signs no longer.
type Ending struct {
	ID      string
	Tainted bool
	Spread  time.Duration // see Authority.Spread
}

// Evidence is what a caller shows for a workload.
type Evidence struct {
	// Selectors are what an agent saw with its own eyes (unix:, systemd:). They are its word alone: an
	// entry must name agents that may speak it.
	Selectors []Selector
	// Token is the pod's own service account token, audience-bound; empty for a plain process.
	Token []byte
}

// Issuance is one certificate to be signed: decided, not yet signed.
type Issuance struct {
	ID        spiffeid.ID
	PublicKey crypto.PublicKey
	DNSNames  []string
	TTL       time.Duration // zero: the default of the trust domain
}

// X509SVID is an issued X.509-SVID with, at the agent only, its private key.
type X509SVID struct {
	EntryID       string
	EntryRevision uint64
	ID            spiffeid.ID
	Chain         [][]byte // DER, leaf first, without the root
	Key           []byte   // PKCS #8 DER; empty at a member
	Hint          string
	NotBefore     time.Time
	NotAfter      time.Time
	FederatesWith []spiffeid.TrustDomain
	Authority     string // ID of the x509 authority that it is under; empty at a member
}

// JWTSVID is an issued JWT-SVID.
type JWTSVID struct {
	ID        spiffeid.ID
	Token     string
	Hint      string
	IssuedAt  time.Time
	ExpiresAt time.Time
}

// Update is the full state that one workload is to see: what the Workload API sends.
type Update struct {
	SVIDs []X509SVID // the first is the default; empty means that no identity is left
	// Bundles holds the own trust domain's bundle and those that the SVIDs' entries federate with. It may be nil
	// only together with an empty SVIDs.
	Bundles map[spiffeid.TrustDomain]*Bundle
}

// Change is one change of the replicated state, told to watchers in order.
type Change struct {
	Revision uint64
	// Reset: the state was replaced whole (a snapshot was installed, or the watcher fell behind): read all again.
	Reset bool
	// An entry: created (Old nil), updated, or deleted (New nil).
	OldEntry, NewEntry *Entry
	// An agent's record; AgentGone says that it was banned or evicted and its streams must end.
	Agent     *Agent
	AgentGone bool
	// KubeCluster is the name of one that was put or deleted.
	KubeCluster string
	Bundle      bool // authorities, or what other clusters of the trust domain publish, and so the bundle, changed
	Members     bool
	Seal        bool // the seal's terms changed
	Level       bool // what commands the members may propose changed
	Rotation    bool // a rotation began, or moved on
	// Federation is the trust domain of a relationship that was put or deleted, or whose bundle changed.
	Federation string
}
