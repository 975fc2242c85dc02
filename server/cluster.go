package server

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"net"
	"strings"
	"time"
	"unicode"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	adminv1 "countersign.io/countersign/api/admin/v1"
	"countersign.io/countersign/identity"
)

// Cluster is what the member knows of the CA cluster's inner life, as functions, because this package must not
// know how the members agree. Those with an error must wrap identity.ErrUnavailable when there is no leader to decide,
// and identity.ErrPrecondition for what the leader refuses.
type Cluster struct {
	// Staleness is the time since a leader was last heard: 0 on the leader, very large if none was since the start.
	Staleness func() time.Duration
	// Members are the current members and what each is.
	Members func() []MemberStatus
	// Health asks every member how it stands. It must work without a leader, and take a few seconds at the most.
	Health func(ctx context.Context) ([]MemberHealth, error)
	// AddMember admits a member. It must not wait for the new member: that one knows nothing before it has the answer.
	// One that is there already with that address is left as it is.
	AddMember func(ctx context.Context, id, address string) error
	// RemoveMember takes a member out of those that agree.
	RemoveMember func(ctx context.Context, id string) error
	// TransferLeader makes another member lead, the named one or, for "", any; it returns once that one does.
	TransferLeader func(ctx context.Context, id string) error
	// ReadBarrier returns once this member's State has every write that was acknowledged anywhere before the call.
	ReadBarrier func(ctx context.Context) error
	// Removed is closed when this member has learnt that it is a member no longer; nil: never.
	Removed <-chan struct{}
}

// MemberStatus is one member as the cluster's inner life sees it.
type MemberStatus struct {
	ID, Address   string
	Voter, Leader bool
}

// MemberHealth is what a member answered when it was asked how it stands.
type MemberHealth struct {
	MemberStatus
	Reachable bool
	Problem   string // why not
	// LastContact is how long ago the member heard the leader; of the leader 0.
	LastContact time.Duration
	// Applied and Commit are how far its state, and the log that it knows to be agreed on, reach.
	Applied, Commit uint64
	Info            []byte // see MemberInfo; empty: of a version that tells nothing of itself
}

// MemberInfo is what a member tells the others of itself.
type MemberInfo struct {
	Version           string    `json:"version"`
	Level             uint32    `json:"level"` // the highest that it knows
	StartedAt         time.Time `json:"started_at,omitzero"`
	DiskFree          uint64    `json:"disk_free,omitempty"` // bytes, where its data is
	DiskTotal         uint64    `json:"disk_total,omitempty"`
	Issuing           bool      `json:"issuing"`
	NotIssuingBecause string    `json:"not_issuing_because,omitempty"`
	KEK               string    `json:"kek,omitempty"` // the URI of its key-encryption key
	SealTerms         []uint32  `json:"seal_terms,omitempty"`
	Now               time.Time `json:"now,omitzero"`           // by its clock, as it tells this
	BackupEvery       int64     `json:"backup_every,omitempty"` // seconds between its scheduled backups; 0: it makes none
	BackupAt          time.Time `json:"backup_at,omitzero"`     // of the newest; zero: none
	Admins            string    `json:"admins,omitempty"`       // see AdminsHash
}

const (
	// maxInfo bounds an encoded MemberInfo.
	maxInfo = 4 << 10
	// maxInfoText and maxInfoTerms bound its parts, so that it stays below: JSON makes six bytes of some characters.
	maxInfoText  = 256
	maxInfoTerms = 128
)

// Marshal encodes what a member tells, in 4 KiB at the most: long texts are cut, and of many terms the oldest left out.
func (i MemberInfo) Marshal() ([]byte, error) {
	i.bound()
	raw, err := json.Marshal(i)
	if err != nil {
		return nil, fmt.Errorf("encoding what this member tells of itself: %w", err)
	}
	return raw, nil
}

// ParseMemberInfo reads what another member tells. What it does not know, a newer version's, it ignores; of a member that
// tells nothing, one of an older version, it knows that its level is 1.
func ParseMemberInfo(raw []byte) (MemberInfo, error) {
	i := MemberInfo{Level: 1}
	if len(raw) == 0 {
		return i, nil
	}
	if len(raw) > maxInfo {
		return i, fmt.Errorf("%w: a member tells %d bytes of itself: at the most %d", identity.ErrInvalid, len(raw), maxInfo)
	}
	if err := json.Unmarshal(raw, &i); err != nil {
		return MemberInfo{Level: 1}, fmt.Errorf("%w: reading what a member tells of itself: %v", identity.ErrInvalid, err)
	}
	i.Level = max(i.Level, 1)
	i.bound()
	return i, nil
}

func (i *MemberInfo) bound() {
	i.Version, i.NotIssuingBecause, i.KEK = infoText(i.Version), infoText(i.NotIssuingBecause), infoText(i.KEK)
	i.SealTerms = i.SealTerms[max(0, len(i.SealTerms)-maxInfoTerms):]
	if len(i.Admins) > adminsHashBytes {
		i.Admins = ""
	}
	i.BackupEvery = min(max(i.BackupEvery, 0), int64(10*365*24*time.Hour/time.Second))
}

// infoText is a text that may be shown on a terminal: one line, of a bounded length.
func infoText(s string) string {
	s = strings.Map(func(r rune) rune {
		if r == unicode.ReplacementChar || !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, s)
	if len(s) <= maxInfoText {
		return s
	}
	return strings.ToValidUTF8(s[:maxInfoText-3], "") + "..."
}

// PeerMember is the name of the member at the other end of a connection: of one that came through a Listener, or was dialled
// with MemberTLS. It is empty if that is no member of the trust domain.
func PeerMember(td spiffeid.TrustDomain, c net.Conn) string {
	var id spiffeid.ID
	switch c := c.(type) {
	case *conn:
		id = c.caller.id
	case *tls.Conn:
		certs := c.ConnectionState().PeerCertificates
		if len(certs) == 0 {
			return ""
		}
		var err error
		if id, err = x509svid.IDFromCert(certs[0]); err != nil {
			return ""
		}
	}
	if id.TrustDomain() != td || identity.RoleOf(id) != identity.RoleMember {
		return ""
	}
	name := id.Path()[strings.LastIndexByte(id.Path(), '/')+1:]
	if m, err := identity.MemberID(td, name); err != nil || m != id {
		return ""
	}
	return name
}

// MetadataStale, set to "true" in a call's metadata, asks for what this member knows, without a leader: it may be of the past.
const MetadataStale = "countersign-stale"

// statusWait is how long what tells of the cluster's state waits for a leader, before it tells of a cluster without one.
const statusWait = time.Second

// readBarrier makes an operator's read linearizable: it shows every write that was acknowledged before, on any member.
func (s *Server) readBarrier(ctx context.Context, method string) error {
	switch method {
	case adminv1.Admin_ListKubeClusters_FullMethodName,
		adminv1.Admin_GetEntry_FullMethodName,
		adminv1.Admin_ListEntries_FullMethodName,
		adminv1.Admin_ListAgents_FullMethodName,
		adminv1.Admin_GetAgent_FullMethodName,
		adminv1.Admin_GetBundle_FullMethodName,
		adminv1.Admin_ListAuthorities_FullMethodName,
		adminv1.Admin_SealStatus_FullMethodName,
		adminv1.Federation_ListFederations_FullMethodName,
		adminv1.Federation_GetFederation_FullMethodName,
		adminv1.Federation_DescribeEndpoint_FullMethodName,
		adminv1.Preview_CreateEntry_FullMethodName,
		adminv1.Preview_UpdateEntry_FullMethodName,
		adminv1.Preview_DeleteEntry_FullMethodName,
		adminv1.Preview_AddKubeCluster_FullMethodName,
		adminv1.Preview_DeleteKubeCluster_FullMethodName,
		adminv1.Preview_BanAgent_FullMethodName,
		adminv1.Preview_EvictAgent_FullMethodName,
		adminv1.Preview_RemoveMember_FullMethodName,
		adminv1.Preview_RotateSeal_FullMethodName:
		if wantsStale(ctx) {
			return nil
		}
		if err := s.cfg.Cluster.ReadBarrier(ctx); err != nil {
			return fmt.Errorf("asking the leader whether this member knows all (--stale shows what it knows): %w", err)
		}
	case adminv1.Admin_CreateToken_FullMethodName,
		adminv1.Admin_AddKubeCluster_FullMethodName,
		adminv1.Federation_CreateFederation_FullMethodName,
		adminv1.Federation_UpdateFederation_FullMethodName,
		adminv1.Federation_DeleteFederation_FullMethodName,
		adminv1.Federation_RefreshFederation_FullMethodName:
		// These look at what is there before they write: what another member acknowledged a moment ago must be.
		if err := s.cfg.Cluster.ReadBarrier(ctx); err != nil {
			return fmt.Errorf("asking the leader whether this member knows all: %w", err)
		}
	case adminv1.Admin_Status_FullMethodName,
		adminv1.Admin_ClusterStatus_FullMethodName,
		adminv1.Checkup_Examine_FullMethodName:
		// These are asked when there is no leader: what they answer says so.
		ctx, cancel := context.WithTimeout(ctx, statusWait)
		defer cancel()
		_ = s.cfg.Cluster.ReadBarrier(ctx)
	}
	return nil
}
