package api

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	adminv1 "countersign.io/countersign/api/admin/v1"
	workloadv1 "countersign.io/countersign/api/workload/v1"
	"countersign.io/countersign/identity"
)

// ALPN protocol names that tell apart what shares the one TLS port. gRPC itself is "h2".
const (
	ALPNRaft = "countersign-raft/1"
	// ALPNAdmin is gRPC for an admin who shows an SVID: see docs/ADMIN.md.
	ALPNAdmin = "countersign-admin/1"
)

// BundleToWire converts a bundle.
func BundleToWire(b *identity.Bundle) *workloadv1.Bundle {
	if b == nil {
		return nil
	}
	out := &workloadv1.Bundle{
		TrustDomain:        b.TrustDomain.Name(),
		Sequence:           b.Sequence,
		RefreshHintSeconds: int64(b.RefreshHint / time.Second),
		X509Authorities:    b.X509,
	}
	for kid, key := range b.JWT {
		out.JwtAuthorities = append(out.JwtAuthorities, &workloadv1.JWTKey{Kid: kid, PublicKey: key})
	}
	ending := b.Ending
	if len(ending) > maxEnding { // a bundle that is refused would be worse than what agents find out at the next one
		ending = slices.Clone(ending)
		slices.SortStableFunc(ending, func(a, b identity.Ending) int { return cmp.Compare(rank(a), rank(b)) })
		ending = ending[:maxEnding]
	}
	for _, e := range ending {
		out.Ending = append(out.Ending, &workloadv1.Bundle_Ending{Id: e.ID, Tainted: e.Tainted, SpreadMs: e.Spread.Milliseconds()})
	}
	return out
}

// rank puts the tainted ones first.
func rank(e identity.Ending) int {
	if e.Tainted {
		return 0
	}
	return 1
}

// maxEnding bounds what a bundle says of authorities that end.
const maxEnding = 64

// BundleFromWire converts a bundle; a malformed trust domain is refused.
func BundleFromWire(b *workloadv1.Bundle) (*identity.Bundle, error) {
	if b == nil {
		return nil, fmt.Errorf("%w: no bundle in the message", identity.ErrInvalid)
	}
	td, err := spiffeid.TrustDomainFromString(b.TrustDomain)
	if err != nil {
		return nil, fmt.Errorf("%w: bundle of trust domain %q: %v", identity.ErrInvalid, b.TrustDomain, err)
	}
	out := &identity.Bundle{
		TrustDomain: td,
		Sequence:    b.Sequence,
		RefreshHint: time.Duration(b.RefreshHintSeconds) * time.Second,
		X509:        b.X509Authorities,
		JWT:         make(map[string][]byte, len(b.JwtAuthorities)),
	}
	for _, k := range b.JwtAuthorities {
		out.JWT[k.Kid] = k.PublicKey
	}
	if len(b.Ending) > maxEnding {
		return nil, fmt.Errorf("%w: bundle of trust domain %q: %d authorities that end: at the most %d", identity.ErrInvalid, b.TrustDomain, len(b.Ending), maxEnding)
	}
	for _, e := range b.Ending {
		spread := time.Duration(min(max(e.GetSpreadMs(), 0), time.Hour.Milliseconds())) * time.Millisecond
		out.Ending = append(out.Ending, identity.Ending{ID: e.GetId(), Tainted: e.GetTainted(), Spread: spread})
	}
	return out, nil
}

// X509SVIDFromWire converts an issued SVID; issuer is the response's issuer chain.
func X509SVIDFromWire(s *workloadv1.X509SVID, issuer [][]byte) (identity.X509SVID, error) {
	id, err := spiffeid.FromString(s.SpiffeId)
	if err != nil {
		return identity.X509SVID{}, fmt.Errorf("%w: SVID: %v", identity.ErrInvalid, err)
	}
	out := identity.X509SVID{
		EntryID: s.EntryId, EntryRevision: s.EntryRevision, ID: id,
		Chain: append([][]byte{s.Leaf}, issuer...), Hint: s.Hint,
		NotBefore: s.NotBefore.AsTime(), NotAfter: s.NotAfter.AsTime(),
	}
	for _, f := range s.FederatesWith {
		td, err := spiffeid.TrustDomainFromString(f)
		if err != nil {
			return identity.X509SVID{}, fmt.Errorf("%w: SVID %s federates with %q: %v", identity.ErrInvalid, id, f, err)
		}
		out.FederatesWith = append(out.FederatesWith, td)
	}
	return out, nil
}

// EntryToWire converts an entry.
func EntryToWire(e *identity.Entry) *adminv1.Entry {
	out := &adminv1.Entry{
		Id: e.ID, SpiffeId: e.SPIFFEID, DnsNames: e.DNSNames, Hint: e.Hint, FederatesWith: e.FederatesWith,
		Admin: e.Admin, AdminRole: string(e.AdminRole), Downstream: e.Downstream, Revision: e.Revision, Selectors: SelectorsToWire(e.Selectors),
		ExpiresAt: TimeToWire(e.ExpiresAt), CreatedAt: TimeToWire(e.CreatedAt), ManagedBy: e.ManagedBy,
	}
	if e.X509TTL != 0 {
		out.X509Ttl = durationpb.New(e.X509TTL)
	}
	if e.JWTTTL != 0 {
		out.JwtTtl = durationpb.New(e.JWTTTL)
	}
	return out
}

// EntryFromWire converts an entry and parses its selectors; identity.CheckEntry says the rest.
func EntryFromWire(e *adminv1.Entry) (*identity.Entry, error) {
	sel, err := identity.ParseSelectors(e.Selectors)
	if err != nil {
		return nil, err
	}
	return &identity.Entry{
		ID: e.Id, Selectors: sel, SPIFFEID: e.SpiffeId, X509TTL: e.X509Ttl.AsDuration(), JWTTTL: e.JwtTtl.AsDuration(),
		DNSNames: e.DnsNames, Hint: e.Hint, FederatesWith: e.FederatesWith, Admin: e.Admin, AdminRole: identity.AdminRole(e.AdminRole), Downstream: e.Downstream,
		ExpiresAt: TimeFromWire(e.ExpiresAt), Revision: e.Revision, ManagedBy: e.ManagedBy,
	}, nil
}

// KubeClusterToWire converts a registration.
func KubeClusterToWire(k *identity.KubeCluster) *adminv1.KubeCluster {
	return &adminv1.KubeCluster{
		Name: k.Name, Issuer: k.Issuer, Audience: k.Audience, Jwks: k.JWKS, JwksUrl: k.JWKSURL, CaPem: k.CAPEM,
		Kubeconfig: k.Kubeconfig, TokenReview: k.TokenReview, AgentAccounts: k.AgentAccounts,
		DefaultId: k.DefaultID, NoDefaultId: k.DefaultID == "", Revision: k.Revision, ManagedBy: k.ManagedBy,
	}
}

// KubeClusterFromWire converts a registration; an absent default ID is the usual one unless it is switched off.
func KubeClusterFromWire(k *adminv1.KubeCluster) *identity.KubeCluster {
	out := &identity.KubeCluster{
		Name: k.Name, Issuer: k.Issuer, Audience: k.Audience, JWKS: k.Jwks, JWKSURL: k.JwksUrl, CAPEM: k.CaPem,
		Kubeconfig: k.Kubeconfig, TokenReview: k.TokenReview, AgentAccounts: k.AgentAccounts, DefaultID: k.DefaultId, ManagedBy: k.ManagedBy,
	}
	if out.DefaultID == "" && !k.NoDefaultId {
		out.DefaultID = identity.DefaultKubeID
	}
	return out
}

// AgentToWire converts the replicated part of an agent's record.
func AgentToWire(a *identity.Agent) *adminv1.Agent {
	return &adminv1.Agent{
		Id: a.ID, Kind: a.Kind, Selectors: SelectorsToWire(a.Selectors), KubeCluster: a.KubeCluster, KubeNode: a.KubeNode,
		AttestedAt: TimeToWire(a.AttestedAt), Banned: a.Banned, Revision: a.Revision,
	}
}

// SelectorsToWire converts selectors.
func SelectorsToWire(in []identity.Selector) []string {
	out := make([]string, len(in))
	for i, s := range in {
		out[i] = string(s)
	}
	return out
}

// TimeToWire and TimeFromWire keep the zero time absent.
func TimeToWire(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

// TimeFromWire is the inverse of TimeToWire.
func TimeFromWire(t *timestamppb.Timestamp) time.Time {
	if t == nil {
		return time.Time{}
	}
	return t.AsTime()
}
