package workloadapi

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"countersign.io/countersign/attestor"
	"countersign.io/countersign/identity"
)

// evidenceAge is for how long evidence collected on a connection serves to recognise its caller. It is bounded
// because evidence goes stale while the process lives: the kubelet replaces a pod's token.
const evidenceAge = 30 * time.Second

// evidence is what a connection's caller has shown last. It is wiped after evidenceAge, and with the
// connection.
type evidence struct {
	collecting chan struct{} // holds a token while the first evidence is collected: the other calls wait for it

	mu       sync.Mutex
	workload *attestor.Workload // nil: none that is young enough
	expire   *time.Timer
	closed   bool
}

// copy is for a caller that will wipe it; nil when there is none.
func (e *evidence) copy() *attestor.Workload {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.workload == nil {
		return nil
	}
	w := *e.workload
	w.Evidence.Token = bytes.Clone(w.Evidence.Token)
	return &w
}

func (e *evidence) has() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.workload != nil
}

// keep takes the workload over.
func (e *evidence) keep(w *attestor.Workload) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.drop()
	if e.closed {
		w.Wipe()
		return
	}
	e.workload = w
	e.expire = time.AfterFunc(evidenceAge, func() {
		e.mu.Lock()
		defer e.mu.Unlock()
		if e.workload == w {
			e.drop()
		}
	})
}

func (e *evidence) close() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.closed = true
	e.drop()
}

func (e *evidence) drop() {
	if e.workload != nil {
		e.expire.Stop()
		e.workload.Wipe()
		e.workload = nil
	}
}

// attest makes sure that the connection's caller has been attested and is the same process still, and returns
// how to attest it again: see Source.
func (s *Server) attest(ctx context.Context) (attestor.Func, error) {
	c, ok := connOf(ctx)
	if !ok {
		return nil, fmt.Errorf("%w: the call has no caller", identity.ErrUnauthenticated)
	}
	if c.own != nil { // its evidence costs nothing, and the newest is the best
		return c.collect, nil
	}
	if err := c.recognise(ctx); err != nil {
		return nil, err
	}
	var asked atomic.Bool
	return func(ctx context.Context) (*attestor.Workload, error) {
		if !asked.Swap(true) {
			if w := c.evidence.copy(); w != nil {
				return w, nil
			}
		}
		return c.collect(ctx)
	}, nil
}

// sameCaller reports an error unless the caller is the process that connected, and runs what it ran then.
func sameCaller(ctx context.Context) error {
	c, ok := connOf(ctx)
	if !ok {
		return fmt.Errorf("%w: the call has no caller", identity.ErrUnauthenticated)
	}
	return c.unchanged()
}

// recognise is on the path of every call.
func (c *conn) recognise(ctx context.Context) error {
	if c.evidence.has() {
		return c.unchanged()
	}
	select {
	case c.evidence.collecting <- struct{}{}:
		defer func() { <-c.evidence.collecting }()
	case <-ctx.Done():
		return fmt.Errorf("%w: waiting for an attestation under way: %v", identity.ErrUnavailable, ctx.Err())
	}
	if c.evidence.has() { // the call that went before has done it
		return c.unchanged()
	}
	w, err := c.collect(ctx)
	if err != nil {
		return err
	}
	c.evidence.keep(w)
	return nil
}

// collect attests the caller anew.
func (c *conn) collect(ctx context.Context) (*attestor.Workload, error) {
	ctx, cancel := context.WithTimeout(ctx, c.server.callTimeout)
	defer cancel()
	if c.own != nil {
		return c.own.collect(ctx)
	}
	w, err := c.server.attestor.Attest(ctx, c.peer.Load())
	if err != nil {
		return nil, fmt.Errorf("attesting the caller: %w", err)
	}
	if w == nil {
		return nil, errors.New("attesting the caller: the attestor returned nothing")
	}
	if w.PodUID != "" {
		if err := c.server.admit.inPod(c, w.PodUID); err != nil {
			w.Wipe()
			return nil, err
		}
	}
	return w, nil
}
