package server

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"countersign.io/countersign/api"
	adminv1 "countersign.io/countersign/api/admin/v1"
	"countersign.io/countersign/attestor/kube"
	"countersign.io/countersign/attestor/node"
	"countersign.io/countersign/audit"
	"countersign.io/countersign/identity"
)

const (
	defaultTokenTTL = 10 * time.Minute
	maxTokenTTL     = 24 * time.Hour
	defaultPage     = 500
	maxPage         = 1000
)

// adminService serves operators. Whoever reaches it is one: see rules.go.
type adminService struct {
	adminv1.UnimplementedAdminServer
	*Server
}

// CreateToken makes a one-time join token. The secret is in the answer and nowhere else: the state keeps its hash.
func (s adminService) CreateToken(ctx context.Context, req *adminv1.CreateTokenRequest) (*adminv1.CreateTokenResponse, error) {
	ttl := req.Ttl.AsDuration()
	if req.Ttl == nil || ttl == 0 {
		ttl = defaultTokenTTL
	}
	if ttl < time.Second || ttl > maxTokenTTL {
		return nil, fmt.Errorf("%w: token TTL %v: want 1s to %v", identity.ErrInvalid, ttl, maxTokenTTL)
	}
	if err := s.checkTokenNode(req); err != nil {
		return nil, err
	}
	pin, err := s.caPin()
	if err != nil {
		return nil, err
	}
	secret, hash := node.NewSecret()
	token := identity.JoinToken{
		ID: newID(), Hash: hash, Purpose: req.Purpose, KubeCluster: req.KubeCluster, KubeNode: req.KubeNode,
		ExpiresAt: s.cfg.Now().Add(ttl).UTC().Truncate(time.Second),
	}
	addresses := s.addresses()
	text, err := node.FormatToken(node.Token{Addresses: addresses[:min(len(addresses), node.MaxAddresses)], Pin: pin, Secret: secret, Purpose: req.Purpose})
	if err != nil {
		return nil, err
	}
	if err := s.cfg.Writes.CreateJoinToken(ctx, token); err != nil {
		return nil, fmt.Errorf("creating the join token: %w", err)
	}
	about(ctx, token.ID, audit.Detail{Key: "expires_at", Value: token.ExpiresAt.Format(time.RFC3339)})
	s.cfg.Log.Info("join token created", "token", token.ID, "purpose", token.Purpose, "kube_cluster", token.KubeCluster, "kube_node", token.KubeNode, "expires_at", token.ExpiresAt)
	return &adminv1.CreateTokenResponse{Token: text, ExpiresAt: api.TimeToWire(token.ExpiresAt)}, nil
}

func (s *Server) checkTokenNode(req *adminv1.CreateTokenRequest) error {
	if req.Purpose != identity.JoinAgent && req.Purpose != identity.JoinServer {
		return fmt.Errorf("%w: token purpose %q: want %s or %s", identity.ErrInvalid, req.Purpose, identity.JoinAgent, identity.JoinServer)
	}
	if req.KubeCluster == "" && req.KubeNode == "" {
		return nil
	}
	if req.Purpose != identity.JoinAgent {
		return fmt.Errorf("%w: a Kubernetes node is for an agent's token only", identity.ErrInvalid)
	}
	if req.KubeCluster == "" || req.KubeNode == "" {
		return fmt.Errorf("%w: name both the kube cluster and the node, or neither", identity.ErrInvalid)
	}
	if _, ok := s.cfg.State.KubeCluster(req.KubeCluster); !ok {
		return fmt.Errorf("%w: kube cluster %q: register it first (countersign kube add)", identity.ErrNotFound, req.KubeCluster)
	}
	return nil
}

// caPin is the pin of the root that the members' certificates chain to.
func (s *Server) caPin() (string, error) {
	for _, a := range s.cfg.State.Authorities() {
		if a.Kind != identity.AuthorityX509 || a.State != identity.AuthorityActive {
			continue
		}
		key, err := anchorKey(&a)
		if err != nil {
			return "", err
		}
		return node.Pin(key), nil
	}
	return "", fmt.Errorf("%w: the trust domain has no x509 authority yet: try again in a moment", identity.ErrUnavailable)
}

// newID is the ID of an entry or a join token: 26 letters and digits, 130 random bits.
func newID() string { return rand.Text() }

// AddKubeCluster registers a kube cluster.
func (s adminService) AddKubeCluster(ctx context.Context, req *adminv1.KubeCluster) (*adminv1.KubeCluster, error) {
	k, err := s.kubeFromWire(req)
	if err != nil {
		return nil, err
	}
	if old, ok := s.cfg.State.KubeCluster(k.Name); ok && k.ManagedBy == "" {
		k.ManagedBy = old.ManagedBy
	}
	kept, err := s.cfg.Writes.PutKubeCluster(ctx, *k, req.Replace)
	if err != nil {
		return nil, fmt.Errorf("registering kube cluster %q: %w", k.Name, err)
	}
	s.cfg.Log.Info("kube cluster registered", "kube_cluster", k.Name, "issuer", identity.RedactURL(k.Issuer), "replaced", req.Replace)
	return api.KubeClusterToWire(&kept), nil
}

// kubeFromWire makes all checks but whether there is one of that name.
func (s *Server) kubeFromWire(req *adminv1.KubeCluster) (*identity.KubeCluster, error) {
	k := api.KubeClusterFromWire(req)
	if err := identity.CheckKubeCluster(s.cfg.TrustDomain, k); err != nil {
		return nil, err
	}
	if err := s.checkUsable(*k); err != nil {
		return nil, err
	}
	if req.DefaultId != "" {
		return k, nil
	}
	return k, s.checkOwnDefault(k)
}

// checkOwnDefault keeps a cluster from being given the same identities as another by nobody's decision: who rules the one
// would have those of the other. An operator who wants that says so, with a default ID.
func (s *Server) checkOwnDefault(k *identity.KubeCluster) error {
	if k.DefaultID == "" {
		return nil
	}
	for _, o := range s.cfg.State.KubeClusters() {
		if o.Name != k.Name && o.DefaultID == k.DefaultID {
			return fmt.Errorf("%w: kube cluster %q has the usual default ID (%s) already: the pods of %q would get the same identities. Give it IDs of its own, such as --default-id '/%s%s', or none (--no-default-id); if the two are to be one, say --default-id '%s'",
				identity.ErrPrecondition, o.Name, o.DefaultID, k.Name, k.Name, k.DefaultID, k.DefaultID)
		}
	}
	return nil
}

// checkUsable tries the registration on a verifier of its own, next to the others, so that a JWKS that nobody can read or
// an issuer that two clusters share is said now and to whom it concerns. What can heal, such as a kubeconfig that
// is not there yet, is no reason to refuse.
func (s *Server) checkUsable(k identity.KubeCluster) error {
	v, err := kube.New(kube.Config{Log: s.cfg.Log, Now: s.cfg.Now})
	if err != nil {
		return err
	}
	others := slices.DeleteFunc(s.cfg.State.KubeClusters(), func(o identity.KubeCluster) bool { return o.Name == k.Name })
	if err := v.SetClusters([]identity.KubeCluster{k}); errors.Is(err, identity.ErrInvalid) {
		return err
	}
	if v.SetClusters(others) != nil {
		return nil // there is a fault already: it would be taken for this one's
	}
	if err := v.SetClusters(append(others, k)); errors.Is(err, identity.ErrInvalid) {
		return err
	}
	return nil
}

// ListKubeClusters lists all on one page: there are few.
func (s adminService) ListKubeClusters(context.Context, *adminv1.ListRequest) (*adminv1.ListKubeClustersResponse, error) {
	resp := &adminv1.ListKubeClustersResponse{}
	for _, k := range s.cfg.State.KubeClusters() {
		resp.KubeClusters = append(resp.KubeClusters, api.KubeClusterToWire(&k))
	}
	return resp, nil
}

// DeleteKubeCluster ends the identities of its pods.
func (s adminService) DeleteKubeCluster(ctx context.Context, req *adminv1.NameRequest) (*adminv1.Empty, error) {
	if err := s.cfg.Writes.DeleteKubeCluster(ctx, req.Name); err != nil {
		return nil, fmt.Errorf("deleting kube cluster %q: %w", req.Name, err)
	}
	s.cfg.Log.Info("kube cluster deleted", "kube_cluster", req.Name)
	return &adminv1.Empty{}, nil
}

// CreateEntry creates an entry under an ID of the server's making.
func (s adminService) CreateEntry(ctx context.Context, req *adminv1.Entry) (*adminv1.Entry, error) {
	if req.Id != "" {
		return nil, fmt.Errorf("%w: entry ID %q: leave it out, the server makes it", identity.ErrInvalid, req.Id)
	}
	e, err := s.entryFromWire(req)
	if err != nil {
		return nil, err
	}
	e.ID, e.Revision = newID(), 0
	kept, err := s.cfg.Writes.CreateEntry(ctx, s.cfg.Now(), *e)
	if err != nil {
		return nil, fmt.Errorf("creating the entry: %w", err)
	}
	s.cfg.Log.Info("entry created", "entry", kept.ID, "spiffe_id", kept.SPIFFEID, "selectors", kept.Selectors)
	return s.entryToWire(&kept), nil
}

// UpdateEntry replaces an entry.
func (s adminService) UpdateEntry(ctx context.Context, req *adminv1.Entry) (*adminv1.Entry, error) {
	if req.Id == "" {
		return nil, fmt.Errorf("%w: which entry? give its ID", identity.ErrInvalid)
	}
	e, err := s.entryFromWire(req)
	if err != nil {
		return nil, err
	}
	if old, ok := s.cfg.State.Entry(req.Id); ok && e.ManagedBy == "" {
		e.ManagedBy = old.ManagedBy // who does not say by what it is managed does not mean that it is no longer
	}
	kept, err := s.cfg.Writes.UpdateEntry(ctx, s.cfg.Now(), *e, req.Revision)
	if err != nil {
		return nil, fmt.Errorf("updating entry %q: %w", req.Id, err)
	}
	s.cfg.Log.Info("entry updated", "entry", kept.ID, "spiffe_id", kept.SPIFFEID, "selectors", kept.Selectors)
	return s.entryToWire(&kept), nil
}

// entryToWire says as well what of an entry has no effect: it may come to have one, so it is no fault.
func (s *Server) entryToWire(e *identity.Entry) *adminv1.Entry {
	out := api.EntryToWire(e)
	out.Warnings = s.unfederated(e)
	if e.ManagedBy != "" {
		out.Warnings = append(out.Warnings, "it is managed by "+e.ManagedBy+", which puts it back as it was: change that instead")
	}
	return out
}

func (s *Server) entryFromWire(req *adminv1.Entry) (*identity.Entry, error) {
	e, err := api.EntryFromWire(req)
	if err != nil {
		return nil, err
	}
	if err := identity.CheckEntry(s.cfg.TrustDomain, e); err != nil {
		return nil, err
	}
	if e.Expired(s.cfg.Now()) {
		return nil, fmt.Errorf("%w: the entry would have expired at %s already", identity.ErrInvalid, e.ExpiresAt.UTC().Format(time.RFC3339))
	}
	return e, nil
}

// DeleteEntry deletes an entry.
func (s adminService) DeleteEntry(ctx context.Context, req *adminv1.NameRequest) (*adminv1.Empty, error) {
	if err := s.cfg.Writes.DeleteEntry(ctx, req.Name); err != nil {
		return nil, fmt.Errorf("deleting entry %q: %w", req.Name, err)
	}
	s.cfg.Log.Info("entry deleted", "entry", req.Name)
	return &adminv1.Empty{}, nil
}

// GetEntry returns one entry.
func (s adminService) GetEntry(_ context.Context, req *adminv1.NameRequest) (*adminv1.Entry, error) {
	e, ok := s.cfg.State.Entry(req.Name)
	if !ok {
		return nil, fmt.Errorf("%w: entry %q", identity.ErrNotFound, req.Name)
	}
	return s.entryToWire(e), nil
}

// ListEntries lists entries by ID.
func (s adminService) ListEntries(_ context.Context, req *adminv1.ListRequest) (*adminv1.ListEntriesResponse, error) {
	limit, err := pageSize(req)
	if err != nil {
		return nil, err
	}
	entries, next := s.cfg.State.Entries(req.PageToken, limit)
	resp := &adminv1.ListEntriesResponse{NextPageToken: next}
	for _, e := range entries {
		resp.Entries = append(resp.Entries, api.EntryToWire(e))
	}
	return resp, nil
}

func pageSize(req *adminv1.ListRequest) (int, error) {
	switch n := req.PageSize; {
	case n == 0:
		return defaultPage, nil
	case n > maxPage:
		return 0, fmt.Errorf("%w: page size %d: at the most %d", identity.ErrInvalid, n, maxPage)
	default:
		return int(n), nil
	}
}

// ListAgents lists agents by SPIFFE ID.
func (s adminService) ListAgents(_ context.Context, req *adminv1.ListRequest) (*adminv1.ListAgentsResponse, error) {
	limit, err := pageSize(req)
	if err != nil {
		return nil, err
	}
	agents, next := s.cfg.State.Agents(req.PageToken, limit)
	resp := &adminv1.ListAgentsResponse{NextPageToken: next}
	for _, a := range agents {
		resp.Agents = append(resp.Agents, s.agentToWire(a))
	}
	return resp, nil
}

// GetAgent returns one agent's record and what this member knows of its stream.
func (s adminService) GetAgent(_ context.Context, req *adminv1.NameRequest) (*adminv1.Agent, error) {
	a, ok := s.cfg.State.Agent(req.Name)
	if !ok {
		return nil, fmt.Errorf("%w: agent %q", identity.ErrNotFound, req.Name)
	}
	return s.agentToWire(a), nil
}

func (s *Server) agentToWire(a *identity.Agent) *adminv1.Agent {
	out, st := api.AgentToWire(a), s.hub.status(a.ID)
	out.Connected, out.Version, out.Workloads = st.connected, st.version, uint32(st.workloads)
	out.AckedRevision, out.AckedBundleSequence = st.revision, st.seq
	return out
}

// BanAgent keeps an agent out for good.
func (s adminService) BanAgent(ctx context.Context, req *adminv1.NameRequest) (*adminv1.Empty, error) {
	if err := s.cfg.Writes.BanAgent(ctx, req.Name); err != nil {
		return nil, fmt.Errorf("banning agent %q: %w", req.Name, err)
	}
	s.cfg.Log.Info("agent banned", "agent", req.Name)
	return &adminv1.Empty{}, nil
}

// EvictAgent makes an agent attest again.
func (s adminService) EvictAgent(ctx context.Context, req *adminv1.NameRequest) (*adminv1.Empty, error) {
	if err := s.cfg.Writes.EvictAgent(ctx, req.Name); err != nil {
		return nil, fmt.Errorf("evicting agent %q: %w", req.Name, err)
	}
	s.cfg.Log.Info("agent evicted", "agent", req.Name)
	return &adminv1.Empty{}, nil
}

// GetBundle returns the trust domain's bundle and the CA pin.
func (s adminService) GetBundle(context.Context, *adminv1.Empty) (*adminv1.BundleResponse, error) {
	pin, err := s.caPin()
	if err != nil {
		return nil, err
	}
	return &adminv1.BundleResponse{Bundle: api.BundleToWire(s.cfg.State.Bundle()), CaPin: pin}, nil
}

// Status says how this member stands.
func (s adminService) Status(context.Context, *adminv1.Empty) (*adminv1.StatusResponse, error) {
	resp := &adminv1.StatusResponse{
		TrustDomain: s.cfg.TrustDomain.Name(), MemberId: s.cfg.MemberID, Version: s.cfg.Version,
		Revision: s.cfg.State.Revision(), Issuing: true, AgentsConnected: uint32(s.hub.agents()),
		BundleSequence: s.cfg.State.Bundle().Sequence, Staleness: durationpb.New(s.cfg.Cluster.Staleness()), Degraded: s.Degraded(),
	}
	if err := s.Ready(); err != nil {
		resp.Issuing, resp.NotIssuingBecause = false, err.Error()
	}
	for _, m := range s.cfg.Cluster.Members() {
		if m.Leader {
			resp.LeaderId = m.ID
		}
		resp.Members = append(resp.Members, &adminv1.StatusResponse_MemberStatus{Id: m.ID, Address: m.Address, Voter: m.Voter, Leader: m.Leader})
	}
	return resp, nil
}
