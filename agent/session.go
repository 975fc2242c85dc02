package agent

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	grpcbackoff "google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"countersign.io/countersign/api"
	nodev1 "countersign.io/countersign/api/node/v1"
	"countersign.io/countersign/identity"
)

const (
	watchChunk = 500 // workloads in one message
	maxMembers = 64
)

// errHung ends a call to a member that does not even answer a probe.
var errHung = fmt.Errorf("%w: the member hangs: it did not answer a probe", identity.ErrUnavailable)

// session is one connection to one member with its Sync stream.
type session struct {
	addr        string
	conn        *grpc.ClientConn
	connectedAs *ownSVID
	stream      grpc.BidiStreamingClient[nodev1.SyncRequest, nodev1.SyncResponse]
	cancel      context.CancelCauseFunc // ends the stream
	first       *nodev1.SyncResponse    // the state, until it is adopted

	wake chan struct{} // cap 1: there is something to send
	done chan struct{} // closed when the stream has ended
	why  error         // set before done is closed
	once sync.Once
	wg   sync.WaitGroup // the stream's goroutines

	ackMu    sync.Mutex
	acks     bool   // there is something to acknowledge
	revision uint64 // of the last push

	calls   int  // owned by link.mu
	retired bool // owned by link.mu

	probeTimeout func() time.Duration // see link.hung
}

// dial makes a connection that nothing has used yet; patience is how long it may take to be made. reached, unless nil, is set once
// there is a host at the address.
func (a *Agent) dial(addr string, tlsConfig *tls.Config, patience time.Duration, reached *atomic.Bool) (*grpc.ClientConn, error) {
	dial := a.cfg.Dial
	if dial == nil {
		// A dead host is noticed by the kernel; the process on it by gRPC's keep-alive.
		d := &net.Dialer{KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 5 * time.Second, Interval: 2 * time.Second, Count: 3}}
		dial = func(ctx context.Context, addr string) (net.Conn, error) { return d.DialContext(ctx, "tcp", addr) }
	}
	if via := dial; reached != nil {
		dial = func(ctx context.Context, addr string) (net.Conn, error) {
			c, err := via(ctx, addr)
			if err == nil {
				reached.Store(true)
			}
			return c, err
		}
	}
	conn, err := grpc.NewClient("passthrough:///"+addr,
		grpc.WithTransportCredentials(credentials.NewTLS(tlsConfig)),
		grpc.WithContextDialer(dial),
		grpc.WithDisableServiceConfig(),
		grpc.WithIdleTimeout(0),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: grpcbackoff.DefaultConfig, MinConnectTimeout: patience}),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: min(patience, 2*attemptTimeout)}),
	)
	if err != nil {
		return nil, fmt.Errorf("connecting to %s: %w: %v", addr, identity.ErrInvalid, err)
	}
	return conn, nil
}

// open connects to a member as the agent and waits for its state.
func (a *Agent) open(ctx context.Context, addr string, patience time.Duration) (*session, error) {
	ctx, stop := context.WithTimeout(ctx, patience)
	defer stop()
	own := a.own.Load()
	verify, show := func() contact { return contact{td: a.trustDomain(), trust: a.trust.Load()} }, func() *ownSVID { return own }
	if a.cfg.Pod != nil {
		verify, show = a.podContact, nil
	}
	conn, err := a.dial(addr, clientTLS(verify, show, nil), patience, nil)
	if err != nil {
		return nil, err
	}
	s := &session{addr: addr, conn: conn, connectedAs: own, probeTimeout: a.link.probeTimeout, wake: make(chan struct{}, 1), done: make(chan struct{})}
	// The stream outlives the attempt, but not an attempt that fails.
	var sctx context.Context
	sctx, s.cancel = context.WithCancelCause(context.WithoutCancel(ctx))
	attempt := context.AfterFunc(ctx, func() { s.cancel(context.Cause(ctx)) })
	if s.first, err = s.hello(sctx, a); err == nil && !attempt() {
		err = fmt.Errorf("%w: %w", identity.ErrUnavailable, ctx.Err())
	}
	if err != nil {
		attempt()
		s.close()
		if ctx.Err() != nil {
			err = fmt.Errorf("%w: no answer within %v: %w", identity.ErrUnavailable, patience, err)
		}
		return nil, err
	}
	return s, nil
}

func (s *session) hello(ctx context.Context, a *Agent) (*nodev1.SyncResponse, error) {
	hello := &nodev1.Hello{Version: a.cfg.Version, KubeNode: a.cfg.KubeNode}
	open := nodev1.NewNodeClient(s.conn).Sync
	if a.cfg.Pod != nil {
		token, err := a.podToken()
		if err != nil {
			return nil, err
		}
		hello.Token, open = token, nodev1.NewNodeClient(s.conn).Follow
	}
	var err error
	if s.stream, err = open(ctx); err != nil {
		return nil, api.FromStatus(err)
	}
	_ = s.stream.Send(&nodev1.SyncRequest{Message: &nodev1.SyncRequest_Hello{Hello: hello}}) // Recv has the reason of a failure
	m, err := s.stream.Recv()
	if err != nil {
		return nil, api.FromStatus(err)
	}
	if m.GetState().GetBundles() == nil || m.GetState().GetMembers() == nil {
		return nil, fmt.Errorf("%w: its first message is not the full state", errAnswer)
	}
	return m, nil
}

// start runs the stream until it ends.
func (s *session) start(a *Agent) {
	s.wg.Go(func() { s.end(a.receive(s)) })
	s.wg.Go(func() { s.end(a.send(s)) })
}

// end records the first reason and stops the stream. It does not wait.
func (s *session) end(err error) {
	s.once.Do(func() {
		if err == nil {
			err = fmt.Errorf("%w: the stream has ended", identity.ErrUnavailable)
		}
		s.why = err
		s.cancel(err)
		close(s.done)
	})
}

func (s *session) err() error { <-s.done; return s.why }

// stopSync ends the stream and waits for its goroutines; calls under way go on.
func (s *session) stopSync() {
	s.end(fmt.Errorf("%w: the connection was replaced", identity.ErrUnavailable))
	s.wg.Wait()
}

// try runs one call. A member that hangs is told from one that takes its time (it may be asking an API server) by a probe
// beside the call: any answer will do.
func (s *session) try(ctx context.Context, f func(context.Context, *session) error) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	ctx, hung := context.WithCancelCause(ctx)
	defer hung(nil)
	defer time.AfterFunc(probeAfter, func() { s.probe(ctx, hung) }).Stop()
	err := f(ctx, s)
	if cause := context.Cause(ctx); err != nil && errors.Is(cause, errHung) {
		return cause
	}
	return err
}

// probe asks the member for its health until ctx ends, and calls hung when it does not answer.
func (s *session) probe(ctx context.Context, hung context.CancelCauseFunc) {
	for ctx.Err() == nil {
		pctx, cancel := context.WithTimeout(ctx, s.probeTimeout())
		_, err := healthv1.NewHealthClient(s.conn).Check(pctx, &healthv1.HealthCheckRequest{})
		cancel()
		if ctx.Err() == nil && status.Code(err) == codes.DeadlineExceeded {
			hung(errHung)
			return
		}
		sleep(ctx, probeEvery)
	}
}

func (s *session) close() {
	s.cancel(nil)
	s.conn.Close()
}

func (a *Agent) receive(s *session) error {
	for {
		m, err := s.stream.Recv()
		if err != nil {
			return api.FromStatus(err)
		}
		if err := a.handle(s, m); err != nil {
			return fmt.Errorf("applying a push: %w", err)
		}
	}
}

// handle applies one push. It does not block on anything but memory: what takes longer is scheduled.
func (a *Agent) handle(s *session, m *nodev1.SyncResponse) error {
	switch {
	case m.GetState() != nil:
		if b := m.GetState().GetBundles(); b != nil {
			stale, err := a.takeBundles(b)
			if err != nil {
				return fmt.Errorf("%w: %w", errAnswer, err)
			}
			if stale {
				a.log.Warn("the member lags: keeping the newer bundle", "member", s.addr, "sequence", b.GetOwn().GetSequence())
			}
		}
		if mem := m.GetState().GetMembers(); mem != nil {
			a.takeMembers(mem.Addresses)
		}
	case m.GetChanged() != nil:
		c := m.GetChanged()
		a.cache.ended(c.Ended)
		a.cache.changed(c.Handles, m.Revision, time.Now())
	}
	a.link.mu.Lock()
	a.link.revision = m.Revision
	a.link.mu.Unlock()
	s.ackMu.Lock()
	s.acks, s.revision = true, m.Revision
	s.ackMu.Unlock()
	wake(s.wake)
	return nil
}

// takeMembers replaces the members known; addresses that cannot be one are left out.
func (a *Agent) takeMembers(addrs []string) {
	var good []string
	for _, addr := range addrs {
		if _, _, err := net.SplitHostPort(addr); err != nil || len(good) == maxMembers || slices.Contains(good, addr) {
			a.log.Warn("not taking a member's address", "address", addr)
			continue
		}
		good = append(good, addr)
	}
	if old := a.members.Load(); len(good) == 0 || old != nil && slices.Equal(*old, good) {
		return
	}
	a.members.Store(&good)
	if a.state != nil {
		a.cache.markTrust()
	}
}

// send tells the member which workloads the agent serves, and what it has applied. An Ack of a Changed says that none of the
// SVIDs named is handed to a new caller any more.
func (a *Agent) send(s *session) error {
	for {
		select {
		case <-s.done:
			return nil
		case <-s.wake:
		}
		for {
			w := a.cache.takeWatch(watchChunk)
			if w == nil {
				break
			}
			if err := s.stream.Send(&nodev1.SyncRequest{Message: &nodev1.SyncRequest_Watch{Watch: w}}); err != nil {
				return s.sendFailed()
			}
		}
		s.ackMu.Lock()
		acks, revision := s.acks, s.revision
		s.acks = false
		s.ackMu.Unlock()
		if uses := a.cache.takeUses(); !acks && !uses {
			continue
		}
		ack := &nodev1.Ack{Revision: revision, BundleSequence: a.trust.Load().own.Sequence, Tells: true}
		var since time.Time
		if ack.Uses, since = a.cache.listUses(a.own.Load(), time.Now()); !since.IsZero() {
			ack.Since = timestamppb.New(since)
		}
		if len(ack.Uses) > maxUses {
			ack.Uses, ack.Tells = nil, false
		}
		if err := s.stream.Send(&nodev1.SyncRequest{Message: &nodev1.SyncRequest_Ack{Ack: ack}}); err != nil {
			return s.sendFailed()
		}
	}
}

// sendFailed leaves the reason to receive, which gets the status of the stream; it comes right after.
func (s *session) sendFailed() error {
	<-s.done
	return nil
}

func wake(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
