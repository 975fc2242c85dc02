package server

import (
	"context"
	"crypto"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"

	"countersign.io/countersign/api"
	nodev1 "countersign.io/countersign/api/node/v1"
	"countersign.io/countersign/attestor/node"
	"countersign.io/countersign/audit"
	"countersign.io/countersign/ca"
	"countersign.io/countersign/identity"
)

const (
	// maxVersion bounds a version string that a stranger sends.
	maxVersion = 128
	// attestTime is how long a whole attestation may take, including a question to an API server and a write.
	attestTime = 30 * time.Second
	// refreshTime is how long the new record of an agent that is known already may take: without a leader, the old
	// record has to do.
	refreshTime = 2 * time.Second
)

// nodeService serves agents in their own matters.
type nodeService struct {
	nodev1.UnimplementedNodeServer
	*Server
}

// Attest proves a node: evidence in, the agent's SVID out.
func (s nodeService) Attest(stream grpc.BidiStreamingServer[nodev1.AttestRequest, nodev1.AttestResponse]) (err error) {
	ctx, cancel := context.WithTimeout(stream.Context(), attestTime)
	defer cancel()
	// Nothing is spent or asked for before it is clear that this member could answer.
	if err := s.Ready(); err != nil {
		return err
	}
	req, err := stream.Recv()
	if err != nil {
		return err
	}
	begin := req.GetBegin()
	if begin == nil {
		return fmt.Errorf("%w: an Attest stream starts with Begin", identity.ErrInvalid)
	}
	defer func() { s.stats.attest(begin, err) }()
	key, err := ca.ParsePublicKey(begin.PublicKey) // before a one-time secret is spent on it
	if err != nil {
		return err
	}
	var record identity.Agent
	var recorded bool
	switch e := begin.Evidence.(type) {
	case *nodev1.AttestRequest_Begin_JoinToken:
		record, recorded, err = s.attestJoin(ctx, e.JoinToken)
	case *nodev1.AttestRequest_Begin_KubeToken:
		record, err = s.attestKube(ctx, e.KubeToken, begin.KubeCluster)
	case *nodev1.AttestRequest_Begin_X509Pop:
		record, err = s.attestX509Pop(stream, e.X509Pop.GetChain(), begin.PublicKey)
	default:
		err = fmt.Errorf("%w: no evidence: want a join token, a Kubernetes token or an x509pop chain", identity.ErrInvalid)
	}
	if err != nil {
		return fmt.Errorf("attesting the node: %w", err)
	}
	if !recorded {
		if err := s.admitting(ctx, &record); err != nil {
			return err
		}
		if err := s.keepRecord(ctx, record); err != nil {
			return fmt.Errorf("recording agent %s: %w", record.ID, err)
		}
	}
	svid, err := s.agentSVID(ctx, audit.AttestNode, &record, key)
	if err != nil {
		return err
	}
	svid.Reattestable = node.Reattestable(record.Kind)
	s.cfg.Log.Info("agent attested", "agent", record.ID, "kind", record.Kind, "kube_cluster", record.KubeCluster, "kube_node", record.KubeNode)
	return stream.Send(&nodev1.AttestResponse{Step: &nodev1.AttestResponse_Svid{Svid: svid}})
}

// attestJoin uses up the token. From level 2 on it puts the record in the same write, so that no crash leaves a token that is
// spent for nothing.
func (s *Server) attestJoin(ctx context.Context, secret string) (_ identity.Agent, recorded bool, err error) {
	if err := node.CheckSecret(secret); err != nil {
		return identity.Agent{}, false, err
	}
	now, hash := s.cfg.Now(), node.HashSecret(secret)
	token, ok := s.cfg.State.JoinToken(hash)
	if !ok { // this member may not have heard of it yet
		if err := s.cfg.Cluster.ReadBarrier(ctx); err != nil {
			return identity.Agent{}, false, err
		}
		if token, ok = s.cfg.State.JoinToken(hash); !ok {
			return identity.Agent{}, false, errNoToken
		}
	}
	if s.cfg.State.Level() >= 2 {
		a, err := node.JoinAgent(s.cfg.TrustDomain, token, now)
		if err != nil {
			return identity.Agent{}, false, err
		}
		if err := s.admitting(ctx, &a, audit.Detail{Key: "join_token", Value: token.ID}); err != nil {
			return identity.Agent{}, false, err
		}
		a, err = s.cfg.Writes.AdmitAgent(ctx, now, hash, a)
		return a, true, err
	}
	if token, err = s.cfg.Writes.UseJoinToken(ctx, now, hash, identity.JoinAgent); err != nil {
		return identity.Agent{}, false, err
	}
	a, err := node.JoinAgent(s.cfg.TrustDomain, token, now)
	return a, false, err
}

// admitting records that a node has proven itself, before the state says so. Who proves nothing gets no record by this.
func (s *Server) admitting(ctx context.Context, a *identity.Agent, details ...audit.Detail) error {
	return s.audit(ctx, audit.Event{
		Action: audit.AttestNode, Outcome: audit.Attempted, Subjects: []string{a.ID}, Revision: s.cfg.State.Revision(),
		Details: append(append(audit.Details{{Key: "kind", Value: a.Kind}}, nodeOf(a)...), details...),
	})
}

func (s *Server) attestKube(ctx context.Context, token, cluster string) (identity.Agent, error) {
	if len(token) == 0 || len(token) > identity.MaxTokenBytes {
		return identity.Agent{}, fmt.Errorf("%w: a token of %d bytes: want 1 to %d", identity.ErrInvalid, len(token), identity.MaxTokenBytes)
	}
	claims, err := s.verify(ctx, guest, []byte(token)) // whatever else it is: any may call
	if err != nil {
		return identity.Agent{}, err
	}
	if cluster != "" && cluster != claims.Cluster {
		return identity.Agent{}, fmt.Errorf("%w: the token is of kube cluster %q, not %q", identity.ErrDenied, claims.Cluster, cluster)
	}
	k, ok := s.cfg.State.KubeCluster(claims.Cluster)
	if !ok {
		return identity.Agent{}, fmt.Errorf("%w: kube cluster %q is not registered", identity.ErrDenied, claims.Cluster)
	}
	account := claims.Namespace + "/" + claims.ServiceAccount
	if !slices.Contains(k.AgentAccounts, account) {
		return identity.Agent{}, fmt.Errorf("%w: pods of service account %s may not be agents of kube cluster %q: allow it with countersign kube add --replace --agent-account %s", identity.ErrDenied, account, k.Name, account)
	}
	record, err := node.KubeAgent(s.cfg.TrustDomain, claims.Cluster, claims.NodeName, s.cfg.Now())
	record.KubeAccount = account
	return record, err
}

func (s *Server) attestX509Pop(stream grpc.BidiStreamingServer[nodev1.AttestRequest, nodev1.AttestResponse], chain [][]byte, publicKey []byte) (identity.Agent, error) {
	if s.cfg.X509PopRoots == nil {
		return identity.Agent{}, fmt.Errorf("%w: this member is not configured for x509pop: set x509pop.ca_file", identity.ErrPrecondition)
	}
	// A chain that leads nowhere is refused before the stranger gets anything to sign.
	if _, err := node.VerifyX509PopChain(chain, s.cfg.X509PopRoots, s.cfg.Now()); err != nil {
		return identity.Agent{}, err
	}
	challenge := node.Challenge()
	if err := stream.Send(&nodev1.AttestResponse{Step: &nodev1.AttestResponse_Challenge{Challenge: challenge}}); err != nil {
		return identity.Agent{}, err
	}
	req, err := stream.Recv()
	if err != nil {
		return identity.Agent{}, err
	}
	now := s.cfg.Now()
	cn, fingerprint, err := node.VerifyX509Pop(chain, s.cfg.X509PopRoots, challenge, publicKey, req.GetProof(), now)
	if err != nil {
		return identity.Agent{}, err
	}
	return node.X509PopAgent(s.cfg.TrustDomain, s.cfg.X509PopKubeCluster, cn, fingerprint, now)
}

// keepRecord writes the agent's record. Where the same record is there already, an agent that restarts while the
// cluster has no leader is let in by it.
func (s *Server) keepRecord(ctx context.Context, a identity.Agent) error {
	old, ok := s.cfg.State.Agent(a.ID)
	if ok && old.Banned {
		return fmt.Errorf("%w: agent %s is banned", identity.ErrDenied, a.ID)
	}
	// Evidence of another kind, which a banned agent's node may well have, does not let it in again; an operator's token does.
	if a.Kind != node.KindJoin && a.KubeNode != "" && s.cfg.State.NodeBanned(a.KubeCluster, a.KubeNode) {
		return fmt.Errorf("%w: an agent of node %q of kube cluster %q is banned: if the node is to be trusted again, make a join token for it (countersign token create --agent --kube-node %s/%s)", identity.ErrDenied, a.KubeNode, a.KubeCluster, a.KubeCluster, a.KubeNode)
	}
	// A record from before accounts were kept is not a reason to need a leader.
	sameAccount := ok && (old.KubeAccount == "" || old.KubeAccount == a.KubeAccount)
	known := sameAccount && old.Kind == a.Kind && old.KubeCluster == a.KubeCluster && old.KubeNode == a.KubeNode && slices.Equal(old.Selectors, a.Selectors)
	if known {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, refreshTime)
		defer cancel()
	}
	_, err := s.cfg.Writes.PutAgent(ctx, a)
	if err != nil && known && noLeader(err) {
		s.cfg.Log.Warn("no leader to record an agent's attestation: its record from before stands", "agent", a.ID, "error", err)
		return nil
	}
	return err
}

// Renew signs a new SVID for the calling agent.
func (s nodeService) Renew(ctx context.Context, req *nodev1.RenewRequest) (*nodev1.AgentSVID, error) {
	if err := s.Ready(); err != nil {
		return nil, err
	}
	key, err := ca.ParsePublicKey(req.PublicKey)
	if err != nil {
		return nil, err
	}
	who := callOf(ctx)
	svid, err := s.agentSVID(ctx, audit.RenewAgent, who.agent, key)
	if err != nil {
		return nil, err
	}
	svid.Reattestable = node.Reattestable(who.agent.Kind)
	return svid, nil
}

func (s *Server) agentSVID(ctx context.Context, action audit.Action, a *identity.Agent, key crypto.PublicKey) (*nodev1.AgentSVID, error) {
	id, err := spiffeid.FromString(a.ID)
	if err != nil {
		return nil, fmt.Errorf("reading the agent's record: %w", err)
	}
	prepared, err := s.cfg.CA.PrepareX509(identity.Issuance{ID: id, PublicKey: key})
	if err != nil {
		return nil, fmt.Errorf("preparing the agent's SVID: %w", err)
	}
	s.issued.send(prepared.Authority(), s.cfg.Now())
	e := s.event(ctx, action, audit.OK)
	e.Subjects, e.Serial, e.NotAfter, e.Revision = []string{a.ID}, prepared.Serial(), prepared.NotAfter(), s.cfg.State.Revision()
	e.Details = append(audit.Details{{Key: "kind", Value: a.Kind}}, nodeOf(a)...)
	if err := s.cfg.Audit.Record(ctx, e); err != nil {
		return nil, err
	}
	svid, err := prepared.Issue()
	if err != nil {
		s.failed(e, err)
		return nil, fmt.Errorf("issuing %s: %w", id, err)
	}
	return &nodev1.AgentSVID{SpiffeId: id.String(), Chain: svid.Chain, Bundle: api.BundleToWire(s.cfg.State.Bundle())}, nil
}

// nodeOf is what an agent may speak for, as records say it.
func nodeOf(a *identity.Agent) audit.Details {
	if a.KubeNode == "" {
		return nil
	}
	return audit.Details{{Key: "kube_node", Value: a.KubeCluster + "/" + a.KubeNode}}
}
