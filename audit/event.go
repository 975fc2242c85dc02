package audit

import (
	"bytes"
	"encoding/json"
	"slices"
	"time"
)

// Action is what was done, or asked for. The words before the dot are the part of the member that it happened in.
type Action string

// What members record of their callers. Operators' calls are "admin." and the method, such as admin.create_entry.
const (
	IssueX509       Action = "issue.x509"
	IssueJWT        Action = "issue.jwt"
	IssueDownstream Action = "issue.downstream" // an authority of a cluster below
	MintX509        Action = "mint.x509"        // by an admin's decision, without evidence
	MintJWT         Action = "mint.jwt"
	PublishKeys     Action = "downstream.publish_keys"
	AttestNode      Action = "agent.attest"
	RenewAgent      Action = "agent.renew"
	SyncAgent       Action = "agent.sync"
	FollowPod       Action = "pod.follow"
	JoinMember      Action = "member.join"
	GiveKeyring     Action = "member.keyring" // the seal's data keys, to a member
	ReportUses      Action = "member.report"
	Call            Action = "call" // of a method that nobody has a rule for
)

// What members record of themselves.
const (
	AuthorityCreate Action = "authority.create"
	AuthorityChange Action = "authority.change"
	BundleChange    Action = "bundle.change"
	RotationChange  Action = "rotation.change"
	MemberChange    Action = "member.change"
	SealChange      Action = "seal.change"

	FederationTake   Action = "federation.take"   // a bundle that was fetched, before it is kept
	FederationChange Action = "federation.change" // a relationship, or its bundle, as every member sees it
)

// What the log records of itself.
const (
	LogOpened     Action = "audit.opened"     // first of each run
	LogClosed     Action = "audit.closed"     // last of a run that ended well
	LogCheckpoint Action = "audit.checkpoint" // signs the record before it, and so all before
	LogWithdrawn  Action = "audit.withdrawn"  // whoever asked for these records had given up: what they announce was not done
	LogFull       Action = "audit.full"       // the disk is full: decisions are refused
	LogFailed     Action = "audit.failed"     // a sink does not take records
	LogRecovered  Action = "audit.recovered"  // it does again
	LogRemoved    Action = "audit.removed"    // retention takes files away
)

// Outcome is how it went.
type Outcome string

// The outcomes. A decision is recorded as OK before it takes effect; where it then fails, a second record of the same request
// says so.
const (
	Attempted Outcome = "attempted" // an operator's change, before it is made
	OK        Outcome = "ok"
	Refused   Outcome = "refused" // it was not the caller's to have
	Failed    Outcome = "failed"  // it could not be done
)

// Who is the one who asked. What is empty is not known.
type Who struct {
	Kind    string `json:"kind,omitempty"`   // guest, workload, agent, member, operator (on the socket), admin (by an SVID); self: the member
	ID      string `json:"id,omitempty"`     // SPIFFE ID
	Serial  string `json:"serial,omitempty"` // of the certificate that it showed, in hex
	Address string `json:"addr,omitempty"`   // host:port of its connection
	UID     string `json:"uid,omitempty"`    // of an operator, in decimal
	Role    string `json:"role,omitempty"`   // of an admin, at that time
}

// proven reports whether the caller is someone we know: what those send is bounded by who they are.
func (w *Who) proven() bool { return w.Kind != "guest" && w.Kind != "workload" && w.Kind != "" }

// Detail is one more thing to know about an event.
type Detail struct{ Key, Value string }

// Details are sorted by key in a record.
type Details []Detail

// Get returns a detail's value; empty if there is none.
func (d Details) Get(key string) string {
	for _, x := range d {
		if x.Key == key {
			return x.Value
		}
	}
	return ""
}

// UnmarshalJSON reads the object that the details are in a record.
func (d *Details) UnmarshalJSON(raw []byte) error {
	var m map[string]string
	dec := json.NewDecoder(bytes.NewReader(raw))
	if err := dec.Decode(&m); err != nil {
		return err
	}
	*d = nil
	for k, v := range m {
		*d = append(*d, Detail{k, v})
	}
	d.sort()
	return nil
}

func (d Details) sort() { slices.SortFunc(d, byKey) }

// Event is one thing that happened. No field may hold a token, a key, a PIN or another secret, in any form: where two records
// are to be recognised as being about one secret, a keyed hash is for the caller to make.
//
// Texts may be of any bytes: what is not UTF-8 is replaced, what does not print is escaped, and what is too long is cut.
type Event struct {
	Action        Action    `json:"action"`
	Outcome       Outcome   `json:"outcome"`
	RequestID     string    `json:"request,omitempty"` // of the call; its caller is told it too
	Who           Who       `json:"who,omitzero"`
	Subjects      []string  `json:"on,omitempty"` // SPIFFE IDs, entries, agents, clusters: at the most 8 are kept
	Workload      []string  `json:"workload,omitempty"`
	Entry         string    `json:"entry,omitempty"` // the rule that it was given by
	EntryRevision uint64    `json:"entry_revision,omitempty"`
	Revision      uint64    `json:"revision,omitempty"` // of the state: that was decided by, or that the change made
	Serial        string    `json:"serial,omitempty"`   // of the certificate issued, in hex
	NotAfter      time.Time `json:"not_after,omitzero"` // of what was issued
	Audience      []string  `json:"audience,omitempty"` // of a JWT-SVID
	Count         uint64    `json:"count,omitempty"`    // how many events this one stands for; 0: itself
	Reason        string    `json:"reason,omitempty"`
	Details       Details   `json:"details,omitempty"`
	Time          time.Time `json:"time"` // zero: when it is recorded
}

// Checkpoint is this member's signature over the record before it, and so over all before that.
type Checkpoint struct {
	Signature []byte   `json:"sig"`   // ECDSA or RSA, SHA-256, over what SignedBytes returns
	Chain     [][]byte `json:"chain"` // DER: the member's X.509-SVID and what leads to the trust bundle
}

// Record is one line of the log.
type Record struct {
	Version int    `json:"v"`
	Seq     uint64 `json:"seq"`  // from 1, without a gap
	Prev    string `json:"prev"` // hex of the SHA-256 of the line before, without its end; zeros in the first
	Member  string `json:"member"`
	Event
	Checkpoint *Checkpoint `json:"checkpoint,omitempty"`
}
