package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc/codes"

	"countersign.io/countersign/api"
	workloadv1 "countersign.io/countersign/api/workload/v1"
	"countersign.io/countersign/identity"
)

// issueRequest is one workload waiting for SVIDs.
type issueRequest struct {
	w        *workload
	f        *flight
	cacheKey string // of the workload with this evidence
	evidence identity.Evidence
	key      keyPair
}

// issued is a member's verified answer for one workload: its SVIDs, or err.
type issued struct {
	svids     []identity.X509SVID
	selectors []string
	revision  uint64
	err       error
}

// issueQueue holds what is waiting. Workers take all there is, up to a batch: batches grow with the load and cost no
// delay without it.
type issueQueue struct {
	mu      sync.Mutex
	waiting []*issueRequest
	stopped bool
	wake    chan struct{}
}

func (q *issueQueue) init() { q.wake = make(chan struct{}, issueWorkers) }

func (q *issueQueue) put(r *issueRequest) bool {
	q.mu.Lock()
	ok := !q.stopped
	if ok {
		q.waiting = append(q.waiting, r)
	}
	q.mu.Unlock()
	wake(q.wake)
	return ok
}

func (q *issueQueue) take() []*issueRequest {
	q.mu.Lock()
	defer q.mu.Unlock()
	n := min(len(q.waiting), identity.MaxBatch)
	batch := slices.Clone(q.waiting[:n])
	q.waiting = slices.Delete(q.waiting, 0, n)
	if len(q.waiting) == 0 {
		q.waiting = nil // a burst's array is not kept
	}
	return batch
}

func (q *issueQueue) stop() []*issueRequest {
	q.mu.Lock()
	defer q.mu.Unlock()
	out := q.waiting
	q.waiting, q.stopped = nil, true
	return out
}

// launch makes a key for the workload and queues the question. It returns before the answer; the flight has that.
func (a *Agent) launch(ctx context.Context, w *workload, f *flight, ev identity.Evidence) {
	var key keyPair
	err := tokenNeeded(w.who, ev.Token)
	if err == nil {
		key, err = a.newKey(ctx)
	}
	r := &issueRequest{w: w, f: f, cacheKey: cacheKey(w.who, ev.Token), evidence: cloneEvidence(ev), key: key}
	q := &a.processes
	if len(ev.Token) > 0 {
		q = &a.pods
	}
	if err == nil && !q.put(r) {
		err = fmt.Errorf("%w: the agent is stopping", identity.ErrUnavailable)
	}
	if err != nil {
		a.finish(r, &issued{err: err}, nil)
	}
}

// newKey waits its turn, for as long as somebody asks: callers who come and go must leave no work behind.
func (a *Agent) newKey(ctx context.Context) (keyPair, error) {
	select {
	case a.keygen <- struct{}{}:
		defer func() { <-a.keygen }()
		return a.cfg.KeyType.makePair()
	case <-ctx.Done():
		return keyPair{}, fmt.Errorf("%w: waiting to make a key: %w", identity.ErrUnavailable, ctx.Err())
	}
}

// finish hands the answer, or the reason why there is none, to the cache.
func (a *Agent) finish(r *issueRequest, res *issued, err error) {
	if res == nil {
		res = &issued{err: err}
	}
	clear(r.evidence.Token)
	a.burst.answered()
	a.cache.settle(r.w, r.f, r.cacheKey, res, time.Now())
}

func (a *Agent) runIssuer(ctx context.Context, q *issueQueue) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-q.wake:
		}
		for batch := q.take(); len(batch) > 0; batch = q.take() {
			if a.cfg.Pod == nil {
				a.issueBatch(ctx, batch)
				continue
			}
			for _, r := range batch { // a member answers a pod one at a time
				a.issueBatch(ctx, []*issueRequest{r})
			}
		}
	}
}

func (a *Agent) issueBatch(ctx context.Context, batch []*issueRequest) {
	var results []issued
	err := a.call(ctx, func(ctx context.Context, s *session) (err error) {
		results, err = a.issueAt(ctx, s, batch)
		return err
	})
	switch {
	case err == nil:
		for i, r := range batch {
			a.finish(r, &results[i], nil)
		}
	case len(batch) > 1 && a.link.why() == nil && ctx.Err() == nil && !errors.Is(err, identity.ErrExhausted):
		// A member is there and did not take the batch: one odd request in it must not be the others' loss.
		a.log.Warn("a batch was not served: asking one by one", "requests", len(batch), "error", err)
		for _, r := range batch {
			a.issueBatch(ctx, []*issueRequest{r})
		}
	default:
		for _, r := range batch {
			a.finish(r, nil, err)
		}
	}
}

// issueAt asks one member and verifies all that it answers.
func (a *Agent) issueAt(ctx context.Context, s *session, batch []*issueRequest) ([]issued, error) {
	req := &workloadv1.IssueX509Request{Requests: make([]*workloadv1.X509Request, len(batch))}
	for i, r := range batch {
		req.Requests[i] = &workloadv1.X509Request{Evidence: evidenceToWire(r.evidence), PublicKey: r.key.public}
	}
	resp, err := workloadv1.NewWorkloadClient(s.conn).IssueX509(ctx, req)
	if err = api.FromStatus(err); err != nil && a.cfg.Pod != nil && !transient(err) {
		return []issued{{err: err}}, nil // a pod is told by the call's status what agents are told in a result
	}
	if err != nil {
		return nil, fmt.Errorf("asking for X.509-SVIDs: %w", err)
	}
	if len(resp.Results) != len(batch) {
		return nil, fmt.Errorf("asking for X.509-SVIDs: %w: %d results for %d requests", errAnswer, len(resp.Results), len(batch))
	}
	if err := a.addFederated(resp.Federated); err != nil {
		return nil, fmt.Errorf("asking for X.509-SVIDs: %w", err)
	}
	t, now := a.trust.Load(), time.Now()
	issuer := a.cache.intern(resp.IssuerChain)
	out := make([]issued, len(batch))
	for i, r := range batch {
		if out[i], err = takeResult(t, resp.Results[i], issuer, resp.Revision, r.key, now); err != nil {
			return nil, fmt.Errorf("asking for X.509-SVIDs: %w", err)
		}
	}
	return out, nil
}

func evidenceToWire(ev identity.Evidence) *workloadv1.Evidence {
	return &workloadv1.Evidence{Selectors: api.SelectorsToWire(ev.Selectors), Token: string(ev.Token)}
}

// cloneEvidence is for a question that outlives its asker, who wipes the token when he goes.
func cloneEvidence(ev identity.Evidence) identity.Evidence {
	return identity.Evidence{Selectors: ev.Selectors, Token: slices.Clone(ev.Token)}
}

// checkEvidence keeps out of a batch what a member would refuse the whole batch for.
func checkEvidence(ev *identity.Evidence) error {
	if len(ev.Token) > identity.MaxTokenBytes || len(ev.Selectors) > identity.MaxSelectors {
		return fmt.Errorf("%w: the caller's evidence is too large: a token of %d bytes (at the most %d) and %d selectors (at the most %d)",
			identity.ErrDenied, len(ev.Token), identity.MaxTokenBytes, len(ev.Selectors), identity.MaxSelectors)
	}
	return nil
}

// takeResult verifies the answer to one request. What the member decided is in issued; the error is about the answer.
func takeResult(t *trust, r *workloadv1.X509Result, issuer [][]byte, revision uint64, key keyPair, now time.Time) (issued, error) {
	out := issued{revision: revision}
	if e := r.GetError(); e != nil {
		if out.err = api.FromCode(codes.Code(e.Code), e.Message); out.err == nil {
			return out, fmt.Errorf("%w: an error without a code", errAnswer)
		}
		return out, nil
	}
	if len(r.GetSvids()) == 0 {
		out.err = fmt.Errorf("%w: the member answered with no identity", identity.ErrDenied)
		return out, nil
	}
	out.selectors = r.Selectors
	for _, s := range r.Svids {
		svid, err := api.X509SVIDFromWire(s, issuer)
		if err != nil {
			return out, fmt.Errorf("%w: %w", errAnswer, err)
		}
		if err := t.checkWorkload(&svid, key, now); err != nil {
			return out, err
		}
		out.svids = append(out.svids, svid)
	}
	return out, nil
}

// checkWorkload verifies an SVID for a workload and completes it from the certificate, whose times are what counts.
func (t *trust) checkWorkload(s *identity.X509SVID, key keyPair, now time.Time) error {
	got, err := t.verifySVID(s.Chain, key.public, now)
	if err != nil {
		return err
	}
	if got.id != s.ID {
		return fmt.Errorf("%w: a certificate of %s was announced as one of %s", errAnswer, got.id, s.ID)
	}
	if _, err := identity.ParseWorkloadID(t.td, got.id.String()); err != nil {
		return fmt.Errorf("%w: %w", errAnswer, err)
	}
	if len(s.Hint) > identity.MaxHintBytes {
		return fmt.Errorf("%w: a hint of %d bytes", errAnswer, len(s.Hint))
	}
	s.Key, s.NotBefore, s.NotAfter, s.Authority = key.private, got.leaf.NotBefore, got.leaf.NotAfter, got.authority
	return nil
}
