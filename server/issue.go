package server

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"countersign.io/countersign/api"
	workloadv1 "countersign.io/countersign/api/workload/v1"
	"countersign.io/countersign/attestor/kube"
	"countersign.io/countersign/audit"
	"countersign.io/countersign/ca"
	"countersign.io/countersign/identity"
)

// This file is the issuing walk, the one way from evidence to an SVID of a workload:
//
//	1  can this member decide and sign?              Ready
//	2  who asks?                                     the rule table (rules.go): an agent with a live record, or a guest
//	3  is the request within bounds?                 checkBatch, checkAudience, limits.issue
//	4  what is proven?                               prove: the token is verified, its node is the agent's
//	5  which identities is that?                     entitled: entries, or the kube cluster's default
//	6  can each be signed as it stands?              ca.PrepareX509, ca.PrepareJWT: no key has been touched so far
//	7  is it on record?                              Audit.Record: all that is about to be signed, or nothing is
//	8  sign                                          Issue
//
// Nothing but that record is written anywhere: a member without a quorum walks the same way. What is decided rests on this
// member's own state, whose revision is in the answer.

const (
	// maxIdentities bounds what one workload can be entitled to: each costs a signature.
	maxIdentities = 64
	// batchWidth is how many requests of a batch are worked on at a time: a token may wait for an API server.
	batchWidth = 8
	// answerShare is how much of a caller's time its batch may take, in percent.
	answerShare = 75
)

// workloadService serves issuance.
type workloadService struct {
	workloadv1.UnimplementedWorkloadServer
	*Server
}

// IssueX509 signs X.509-SVIDs, each request on its own: one that fails does not fail the others.
func (s workloadService) IssueX509(ctx context.Context, req *workloadv1.IssueX509Request) (*workloadv1.IssueX509Response, error) {
	if err := s.Ready(); err != nil {
		return nil, err
	}
	who := callOf(ctx)
	if err := checkBatch(len(req.Requests), who); err != nil {
		return nil, err
	}
	if err := s.limits.issue(who, len(req.Requests)); err != nil {
		return nil, err
	}
	resp := &workloadv1.IssueX509Response{Revision: s.cfg.State.Revision()}
	// The chain is sent once for the batch. A batch during which the issuer was renewed is done again.
	for range 2 {
		results, chain, mixed := s.issueBatch(ctx, who, req.Requests)
		if mixed {
			continue
		}
		resp.Results, resp.IssuerChain = results, chain
		resp.Federated = s.federatedFor(who, results)
		if who.kind == guest {
			if e := results[0].Error; e != nil { // one request, and nobody who would look into results
				return nil, reported{status.Error(codes.Code(e.Code), e.Message)}
			}
			resp.Bundle = api.BundleToWire(s.cfg.State.Bundle())
		}
		return resp, nil
	}
	return nil, errRenewed
}

func (s *Server) issueBatch(ctx context.Context, who call, reqs []*workloadv1.X509Request) (results []*workloadv1.X509Result, chain [][]byte, mixed bool) {
	recordCtx := ctx // the time that a batch may take is for its evidence: that it is up is no reason not to record
	if end, ok := ctx.Deadline(); ok {
		// Tokens that an API server says nothing about must not cost the whole batch its answer.
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Until(end)*answerShare/100)
		defer cancel()
	}
	walks := make([]*walk, len(reqs))
	var g errgroup.Group
	g.SetLimit(batchWidth)
	for i, r := range reqs {
		g.Go(func() error {
			walks[i] = s.prepareX509(ctx, who, r)
			return nil
		})
	}
	g.Wait()
	s.recordBatch(recordCtx, who, walks)
	for _, w := range walks {
		g.Go(func() error {
			s.signX509(recordCtx, w)
			return nil
		})
	}
	g.Wait()
	results = make([]*workloadv1.X509Result, len(reqs))
	for i, w := range walks {
		results[i] = w.res
		switch c := w.chain; {
		case c == nil:
		case chain == nil:
			chain = c
		default:
			mixed = mixed || !slices.EqualFunc(chain, c, slices.Equal[[]byte])
		}
	}
	if mixed {
		for _, w := range walks {
			if w.res.Error == nil {
				w.withdraw(s, errRenewed)
			}
		}
	}
	return results, chain, mixed
}

var errRenewed = fmt.Errorf("%w: this member's issuer is being renewed: try again", identity.ErrUnavailable)

// walk is one request of a batch on its way: one workload, one public key, all its identities or none.
type walk struct {
	res      *workloadv1.X509Result
	caller   caller
	grants   []grant
	prepared []*ca.PreparedX509
	events   []audit.Event // one for each SVID that is about to be signed
	workload []string
	chain    [][]byte // above the leaves
}

// fail ends a walk without anything.
func (s *Server) fail(ctx context.Context, w *walk, err error) {
	st := status.Convert(s.report(w.caller, workloadv1.Workload_IssueX509_FullMethodName, err))
	w.res = &workloadv1.X509Result{Selectors: w.res.Selectors, Error: &workloadv1.Error{Code: uint32(st.Code()), Message: st.Message()}}
	w.prepared = nil
	var subjects []string
	for _, g := range w.grants {
		subjects = append(subjects, g.id.String())
	}
	s.refused(ctx, audit.IssueX509, err, subjects, w.workload)
}

// withdraw records that what was recorded as issued is not to be had: each SVID, by its serial number.
func (w *walk) withdraw(s *Server, err error) {
	for _, e := range w.events {
		s.failed(e, err)
	}
}

// prepareX509 walks up to the signature.
func (s *Server) prepareX509(ctx context.Context, who call, req *workloadv1.X509Request) *walk {
	w := &walk{res: &workloadv1.X509Result{}, caller: who.caller}
	fail := func(err error) *walk {
		s.fail(ctx, w, err)
		return w
	}
	key, err := ca.ParsePublicKey(req.GetPublicKey())
	if err != nil {
		return fail(err)
	}
	sel, err := s.prove(ctx, who, req.GetEvidence())
	if err != nil {
		return fail(err)
	}
	w.res.Selectors, w.workload = api.SelectorsToWire(identity.WithoutFacts(sel)), workloadOf(sel) // agents need not know labels
	now := s.cfg.Now()
	grants, unusable, err := s.entitled(sel, now)
	if err != nil {
		return fail(err)
	}
	if unusable != nil {
		s.cfg.Log.Warn("an entry that matches a workload cannot be used for it", "error", unusable, "selectors", sel)
	}
	w.grants = grants
	rev := s.cfg.State.Revision()
	w.prepared = make([]*ca.PreparedX509, len(grants))
	w.events = make([]audit.Event, len(grants))
	for i, g := range grants {
		p, err := s.cfg.CA.PrepareX509(identity.Issuance{ID: g.id, PublicKey: key, DNSNames: g.dns, TTL: clamp(g.entry.X509TTL, s.cfg.X509TTL, g.entry, now)})
		if err != nil {
			return fail(fmt.Errorf("preparing the SVID of entry %s: %w", g.entry.ID, err))
		}
		e := s.event(ctx, audit.IssueX509, audit.OK)
		e.Subjects, e.Workload, e.Entry, e.EntryRevision, e.Revision = []string{g.id.String()}, w.workload, g.entry.ID, g.entry.Revision, rev
		e.Serial, e.NotAfter = p.Serial(), p.NotAfter()
		w.prepared[i], w.events[i] = p, e
		if who.kind == agent { // it tells what it has, once it has it
			s.issued.send(p.Authority(), now)
		} else if err := s.issued.note(p.Authority(), p.NotAfter(), now); err != nil {
			return fail(err)
		}
	}
	return w
}

// recordBatch records all that is about to be signed, at once. What cannot be recorded is not signed.
func (s *Server) recordBatch(ctx context.Context, who call, walks []*walk) {
	var events []audit.Event
	more := 0 // than one for each request, which were counted
	for _, w := range walks {
		if w.res.Error == nil {
			events = append(events, w.events...)
			more += len(w.events) - 1
		}
	}
	err := s.limits.issue(who, more)
	if err == nil {
		err = s.cfg.Audit.Record(ctx, events...)
	}
	if err == nil {
		return
	}
	for _, w := range walks {
		if w.res.Error == nil {
			w.events = nil
			s.fail(ctx, w, err)
		}
	}
}

// signX509 signs what was recorded.
func (s *Server) signX509(ctx context.Context, w *walk) {
	if w.res.Error != nil {
		return
	}
	fail := func(err error) {
		w.withdraw(s, err)
		w.chain = nil
		s.fail(ctx, w, err)
	}
	svids := make([]*workloadv1.X509SVID, len(w.grants))
	for i, g := range w.grants {
		svid, err := w.prepared[i].Issue()
		if err != nil {
			fail(fmt.Errorf("issuing %s: %w", g.id, err))
			return
		}
		if w.chain == nil {
			w.chain = svid.Chain[1:]
		} else if !slices.EqualFunc(w.chain, svid.Chain[1:], slices.Equal[[]byte]) {
			fail(errRenewed)
			return
		}
		svids[i] = &workloadv1.X509SVID{
			EntryId: g.entry.ID, EntryRevision: g.entry.Revision, SpiffeId: g.id.String(), Leaf: svid.Chain[0],
			Hint: g.entry.Hint, FederatesWith: g.entry.FederatesWith,
			NotBefore: timestamppb.New(svid.NotBefore), NotAfter: timestamppb.New(svid.NotAfter),
		}
	}
	w.res.Svids = svids
}

// IssueJWT signs JWT-SVIDs for one workload.
func (s workloadService) IssueJWT(ctx context.Context, req *workloadv1.IssueJWTRequest) (*workloadv1.IssueJWTResponse, error) {
	if err := s.Ready(); err != nil {
		return nil, err
	}
	who := callOf(ctx)
	if err := checkAudience(req.Audience); err != nil {
		return nil, err
	}
	if err := s.limits.issue(who, 1); err != nil {
		return nil, err
	}
	resp := &workloadv1.IssueJWTResponse{Revision: s.cfg.State.Revision()}
	sel, err := s.prove(ctx, who, req.Evidence)
	if err != nil {
		return nil, err
	}
	now := s.cfg.Now()
	grants, _, err := s.entitled(sel, now)
	if err != nil {
		return nil, err
	}
	if req.SpiffeId != "" {
		grants = slices.DeleteFunc(grants, func(g grant) bool { return g.id.String() != req.SpiffeId })
		if len(grants) == 0 {
			return nil, fmt.Errorf("%w: the workload is not entitled to %q", identity.ErrDenied, req.SpiffeId)
		}
	}
	prepared := make([]*ca.PreparedJWT, len(grants))
	events := make([]audit.Event, len(grants))
	workload := workloadOf(sel)
	for i, g := range grants {
		if prepared[i], err = s.cfg.CA.PrepareJWT(g.id, req.Audience, clamp(g.entry.JWTTTL, s.cfg.JWTTTL, g.entry, now)); err != nil {
			return nil, fmt.Errorf("preparing the JWT-SVID of entry %s: %w", g.entry.ID, err)
		}
		e := s.event(ctx, audit.IssueJWT, audit.OK)
		e.Subjects, e.Workload, e.Entry, e.EntryRevision, e.Revision = []string{g.id.String()}, workload, g.entry.ID, g.entry.Revision, resp.Revision
		e.Audience, e.NotAfter, e.Details = req.Audience, prepared[i].ExpiresAt(), audit.Details{{Key: "kid", Value: prepared[i].KeyID()}}
		events[i] = e
		if err := s.issued.note(prepared[i].KeyID(), prepared[i].ExpiresAt(), now); err != nil {
			return nil, err
		}
	}
	if err := s.limits.issue(who, len(grants)-1); err != nil {
		return nil, err
	}
	if err := s.cfg.Audit.Record(ctx, events...); err != nil {
		return nil, err
	}
	for i, g := range grants {
		svid, err := prepared[i].Issue()
		if err != nil {
			for _, e := range events { // none of them is handed out
				s.failed(e, err)
			}
			return nil, fmt.Errorf("issuing %s: %w", g.id, err)
		}
		resp.Svids = append(resp.Svids, &workloadv1.JWTSVID{
			EntryId: g.entry.ID, EntryRevision: g.entry.Revision, SpiffeId: g.id.String(), Token: svid.Token, Hint: g.entry.Hint,
			IssuedAt: timestamppb.New(svid.IssuedAt), ExpiresAt: timestamppb.New(svid.ExpiresAt),
		})
	}
	if who.kind == guest {
		resp.Bundle = api.BundleToWire(s.cfg.State.Bundle())
	}
	return resp, nil
}

func checkBatch(n int, who call) error {
	switch {
	case n == 0:
		return fmt.Errorf("%w: no requests", identity.ErrInvalid)
	case n > identity.MaxBatch:
		return fmt.Errorf("%w: %d requests: at the most %d in one call", identity.ErrInvalid, n, identity.MaxBatch)
	case n > 1 && who.kind == guest:
		return fmt.Errorf("%w: %d requests: a caller without a certificate asks for itself only, with exactly one", identity.ErrInvalid, n)
	}
	return nil
}

func checkAudience(aud []string) error {
	if len(aud) == 0 || len(aud) > identity.MaxAudiences {
		return fmt.Errorf("%w: %d audiences: want 1 to %d", identity.ErrInvalid, len(aud), identity.MaxAudiences)
	}
	for _, a := range aud {
		if a == "" || len(a) > identity.MaxAudienceBytes {
			return fmt.Errorf("%w: an audience of %d bytes: want 1 to %d", identity.ErrInvalid, len(a), identity.MaxAudienceBytes)
		}
	}
	return nil
}

// prove turns evidence into selectors, sorted: what the token proves, what the API server says of its pod, what the agent may say on
// its own, and what is known of the agent. Nothing else counts.
func (s *Server) prove(ctx context.Context, who call, ev *workloadv1.Evidence) ([]identity.Selector, error) {
	seen, err := identity.ParseSelectors(ev.GetSelectors())
	if err != nil {
		return nil, err
	}
	token := ev.GetToken()
	var pod *kube.Claims
	if who.kind == guest {
		if len(seen) > 0 || token == "" {
			return nil, fmt.Errorf("%w: a caller without a certificate shows its pod's service account token and nothing else", identity.ErrUnauthenticated)
		}
	} else if len(seen) == 0 && token == "" {
		return nil, fmt.Errorf("%w: no evidence: neither selectors nor a token", identity.ErrInvalid)
	}
	for _, sel := range seen {
		if sel.Proven() {
			return nil, fmt.Errorf("%w: selector %q cannot be asserted, only proven: agents only say unix: and systemd: ones", identity.ErrDenied, sel)
		}
	}
	if token != "" {
		if len(token) > identity.MaxTokenBytes {
			return nil, fmt.Errorf("%w: a token of %d bytes: at the most %d", identity.ErrInvalid, len(token), identity.MaxTokenBytes)
		}
		claims, err := s.verify(ctx, who.kind, []byte(token))
		if err != nil {
			return nil, fmt.Errorf("verifying the pod's token: %w", err)
		}
		if who.agent != nil {
			if err := sameNode(who.agent, claims.Cluster, claims.NodeName, claims.Namespace, claims.PodName); err != nil {
				return nil, err
			}
		} else if s.cfg.State.NodeBanned(claims.Cluster, claims.NodeName) {
			// Who owns a banned agent's node has its pods' tokens, and must not come with them by this way either.
			return nil, fmt.Errorf("%w: the agent of node %q of kube cluster %q is banned, and so are the node's pods without an agent", identity.ErrDenied, claims.NodeName, claims.Cluster)
		}
		seen, pod = append(seen, claims.Selectors()...), claims
	}
	if who.agent != nil {
		seen = append(seen, who.agent.Selectors...)
	}
	seen = identity.SortSelectors(seen)
	if pod == nil {
		return seen, nil
	}
	return s.withFacts(ctx, who, pod, seen)
}

const (
	// maxTurns is how many tokens of strangers are verified at once, and turnWait how long one waits for its turn.
	maxTurns = 64
	turnWait = time.Second
)

// verify asks what a token proves. Who has proved nothing waits for his turn: a token, even one that he made up, may cost a
// question to an API server, and how many it may be asked is shared with the agents.
func (s *Server) verify(ctx context.Context, who kind, token []byte) (*kube.Claims, error) {
	if who != agent {
		release, err := s.turn(ctx)
		if err != nil {
			return nil, err
		}
		defer release()
	}
	claims, err := s.cfg.Pods.Verify(ctx, token)
	if err != nil && !s.verifierCurrent() {
		return nil, fmt.Errorf("%w: this member is taking up a change of the kube clusters: try again, or another member", identity.ErrUnavailable)
	}
	if err != nil && who != agent {
		err = &withheld{err, "verifying the service account token: " + kube.Reason(err)}
	}
	return claims, err
}

// turn waits for the turn of one who has proved nothing; release ends it.
func (s *Server) turn(ctx context.Context) (release func(), err error) {
	limit := time.NewTimer(turnWait)
	defer limit.Stop()
	select {
	case s.turns <- struct{}{}:
		return func() { <-s.turns }, nil
	case <-limit.C:
		return nil, fmt.Errorf("%w: too many tokens of callers without a certificate are being verified: try again, or another member", identity.ErrUnavailable)
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// sameNode keeps a token from being used anywhere but on the node that its pod runs on: promise 1.
func sameNode(a *identity.Agent, cluster, node, namespace, pod string) error {
	if a.KubeNode == "" {
		return fmt.Errorf("%w: agent %s was attested without a Kubernetes node, so it cannot speak for pods: attest it with its pod's own token (attest.kube), or make its join token with the node (countersign token create --agent --kube-node %s/NODE)", identity.ErrDenied, a.ID, cluster)
	}
	if a.KubeCluster != cluster || a.KubeNode != node {
		return fmt.Errorf("%w: pod %s/%s runs on node %q of kube cluster %q, but agent %s speaks for node %q of kube cluster %q", identity.ErrDenied, namespace, pod, node, cluster, a.ID, a.KubeNode, a.KubeCluster)
	}
	return nil
}

// grant is one identity that a workload is entitled to.
type grant struct {
	entry *identity.Entry
	id    spiffeid.ID
	dns   []string
}

// DefaultEntryID is the entry ID of the identity that a kube cluster's pods have without any entry.
func DefaultEntryID(cluster string) string { return "default:" + cluster }

// entitled are the identities of a workload with these selectors (sorted), the default one first; an error that
// says why if there is none. An entry that cannot be filled in for this workload is left out as long as
// another can. The sync hub asks the same function, so that what it compares is what would be issued.
func (s *Server) entitled(sel []identity.Selector, now time.Time) (grants []grant, unusable, err error) {
	cluster, known := s.clusterOf(sel)
	if !known {
		return nil, nil, fmt.Errorf("%w: kube cluster %q is not registered", identity.ErrDenied, cluster)
	}
	entries := slices.DeleteFunc(s.cfg.State.Match(sel), func(e *identity.Entry) bool {
		return e.Expired(now) || cluster != "" && processesOnly(e)
	})
	if len(entries) == 0 {
		if d := s.defaultEntry(cluster); d != nil {
			entries = append(entries, d)
		}
	}
	if len(entries) == 0 {
		return nil, nil, fmt.Errorf("%w: no entry matches the workload; it has %v", identity.ErrDenied, sel)
	}
	if len(entries) > maxIdentities {
		return nil, nil, fmt.Errorf("%w: %d entries match the workload: at the most %d", identity.ErrPrecondition, len(entries), maxIdentities)
	}
	for _, e := range entries {
		g, err := s.fill(e, sel)
		if err != nil {
			unusable = errors.Join(unusable, fmt.Errorf("entry %s: %w", e.ID, err))
			continue
		}
		grants = append(grants, g)
	}
	if len(grants) == 0 {
		return nil, nil, unusable
	}
	return grants, unusable, nil
}

// processesOnly reports whether an entry is for plain processes: it takes an agent's word and names nothing that a pod
// has proven. A pod must not match it: its user IDs and paths are what its own image says, so any image could be the host's daemon.
func processesOnly(e *identity.Entry) bool {
	word := false
	for _, s := range e.Selectors {
		if strings.HasPrefix(string(s), "k8s:") {
			return false
		}
		word = word || !s.Proven()
	}
	return word
}

// clamp is the lifetime that an SVID is asked for: an entry that expires takes what was issued by it along, to within
// the least lifetime there is.
func clamp(ttl, standard time.Duration, e *identity.Entry, now time.Time) time.Duration {
	if e.ExpiresAt.IsZero() {
		return ttl
	}
	if ttl == 0 {
		ttl = standard
	}
	return max(min(ttl, e.ExpiresAt.Sub(now)), identity.MinTTL)
}

// clusterOf is the kube cluster of a pod, "" of anything else, and whether it is registered.
func (s *Server) clusterOf(sel []identity.Selector) (name string, known bool) {
	for _, x := range sel {
		if x.Name() == "k8s:cluster" {
			_, known = s.cfg.State.KubeCluster(x.Value())
			return x.Value(), known
		}
	}
	return "", true
}

func (s *Server) defaultEntry(cluster string) *identity.Entry {
	if cluster == "" {
		return nil
	}
	k, ok := s.cfg.State.KubeCluster(cluster)
	if !ok || k.DefaultID == "" {
		return nil
	}
	return &identity.Entry{ID: DefaultEntryID(cluster), SPIFFEID: s.cfg.TrustDomain.IDString() + k.DefaultID, Revision: k.Revision}
}

func (s *Server) fill(e *identity.Entry, sel []identity.Selector) (grant, error) {
	g := grant{entry: e}
	t, err := identity.ParseTemplate(e.SPIFFEID)
	if err != nil {
		return g, err
	}
	if g.id, err = t.ExpandID(s.cfg.TrustDomain, sel); err != nil {
		return g, err
	}
	// Who has that ID may have a certificate authority signed: no template leads there, and no entry for other workloads.
	if !e.Downstream && s.cfg.Outside != nil {
		if d, ok := s.cfg.Outside.Downstream(g.id.String()); ok {
			return g, fmt.Errorf("%w: %s is the ID of a cluster below (entry %s), which only a downstream entry gives", identity.ErrDenied, g.id, d.ID)
		}
	}
	if err := s.mayGive(e, g.id); err != nil {
		return g, err
	}
	for _, n := range e.DNSNames {
		t, err := identity.ParseTemplate(n)
		if err != nil {
			return g, err
		}
		name, err := t.Expand(sel)
		if err != nil {
			return g, err
		}
		if err := identity.ParseDNSName(name); err != nil {
			return g, err
		}
		g.dns = append(g.dns, name)
	}
	return g, nil
}
