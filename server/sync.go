package server

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"google.golang.org/grpc"

	"countersign.io/countersign/api"
	nodev1 "countersign.io/countersign/api/node/v1"
	"countersign.io/countersign/identity"
)

const (
	// maxHandles is how many handles go into one message.
	maxHandles = 4096
	// maxEntryID is more than any entry's ID has, also of a kube cluster's default.
	maxEntryID = 128
)

// hello is what a stream of that name begins with, on a member that can serve it.
func (s *Server) hello(stream grpc.BidiStreamingServer[nodev1.SyncRequest, nodev1.SyncResponse], name string) (*nodev1.Hello, error) {
	if err := s.Ready(); err != nil {
		return nil, err
	}
	first, err := stream.Recv()
	if err != nil {
		return nil, err
	}
	hello := first.GetHello()
	if hello == nil || len(hello.Version) > maxVersion {
		return nil, fmt.Errorf("%w: a %s stream starts with Hello, with a version of at the most %d bytes", identity.ErrInvalid, name, maxVersion)
	}
	return hello, nil
}

// Sync is an agent's one stream. It ends when the agent is banned or evicted, when the SVID of its connection
// expires, and when this member cannot issue: the agent is then better off at another.
func (s nodeService) Sync(stream grpc.BidiStreamingServer[nodev1.SyncRequest, nodev1.SyncResponse]) error {
	who := callOf(stream.Context())
	hello, err := s.hello(stream, "Sync")
	if err != nil {
		return err
	}
	sess, err := s.hub.open(who.agent.ID, hello.Version)
	if err != nil {
		return err
	}
	defer s.hub.remove(sess)
	// Asked once more now that the hub knows the session: a ban between the two would have ended nothing.
	if _, err := s.liveAgent(who.caller); err != nil {
		return err
	}
	s.cfg.Log.Info("agent connected", "agent", who.agent.ID, "version", hello.Version, "address", who.addr)
	defer s.cfg.Log.Info("agent disconnected", "agent", who.agent.ID, "address", who.addr)

	return s.converse(stream, sess, who.expires.Sub(s.cfg.Now()),
		fmt.Errorf("%w: the SVID that this connection was made with has expired: connect anew with a renewed one", identity.ErrUnauthenticated))
}

// converse listens and pushes until either fails, the session is ended, or lasts is over, which is then why it ends. Reading and writing
// each have a goroutine of their own, so that neither a silent nor a stuck agent keeps the
// stream from ending. Both end with the stream, which ends when the caller of this function returns.
func (s *Server) converse(stream grpc.BidiStreamingServer[nodev1.SyncRequest, nodev1.SyncResponse], sess *session, lasts time.Duration, over error) error {
	failed := make(chan error, 2)
	go func() { failed <- s.listen(stream, sess) }()
	go func() { failed <- s.push(stream, sess) }()
	expired := time.NewTimer(lasts)
	defer expired.Stop()
	select {
	case err := <-failed:
		return err
	case <-sess.done:
		return sess.endError()
	case <-expired.C:
		return over
	case <-stream.Context().Done():
		return stream.Context().Err()
	}
}

// listen takes what the agent says until it hangs up.
func (s *Server) listen(stream grpc.BidiStreamingServer[nodev1.SyncRequest, nodev1.SyncResponse], sess *session) error {
	for {
		req, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		switch m := req.Message.(type) {
		case *nodev1.SyncRequest_Watch:
			if err := s.watch(sess, m.Watch); err != nil {
				return err
			}
		case *nodev1.SyncRequest_Ack:
			if err := s.takeAck(sess, m.Ack); err != nil {
				return err
			}
		default:
			return fmt.Errorf("%w: unexpected message on a Sync stream: after Hello come Watch and Ack", identity.ErrInvalid)
		}
	}
}

func (s *Server) takeAck(sess *session, a *nodev1.Ack) error {
	if len(a.GetUses()) > maxUses {
		return fmt.Errorf("%w: an Ack with %d authorities: at the most %d", identity.ErrInvalid, len(a.GetUses()), maxUses)
	}
	u := uses{tells: a.GetTells(), by: make(map[string]use, len(a.GetUses())), since: api.TimeFromWire(a.GetSince())}
	for _, x := range a.GetUses() {
		if len(x.GetAuthority()) > maxKeyID {
			return fmt.Errorf("%w: an Ack with an authority's ID of %d bytes: at the most %d", identity.ErrInvalid, len(x.GetAuthority()), maxKeyID)
		}
		u.by[x.GetAuthority()] = use{svids: x.GetSvids(), until: api.TimeFromWire(x.GetUntil())}
	}
	// What it has handed out comes first: whoever sees that it has the bundle must see that too.
	sess.use(u)
	seq := a.GetBundleSequence()
	if seq > s.cfg.State.Bundle().Sequence {
		// It has one from a member that is ahead, and acknowledges what this one sends next; or one that the cluster has lost, and
		// then the number says nothing about what is in it.
		seq = 0
	}
	sess.ack(a.GetRevision(), seq)
	return nil
}

func (s *Server) watch(sess *session, w *nodev1.Watch) error {
	for _, handle := range w.GetUnset() {
		s.hub.unset(sess, handle)
	}
	for _, wl := range w.GetSet() {
		if len(wl.Selectors) > maxWatchSelectors || len(wl.Entries) > maxIdentities {
			return fmt.Errorf("%w: workload %d has %d selectors and %d entries: at the most %d and %d", identity.ErrInvalid, wl.Handle, len(wl.Selectors), len(wl.Entries), maxWatchSelectors, maxIdentities)
		}
		sel := make([]identity.Selector, len(wl.Selectors))
		for i, x := range wl.Selectors {
			var err error
			if sel[i], err = identity.ParseSelector(x); err != nil {
				return err
			}
		}
		if sess.proven != nil { // a pod without an agent: what its token proves, not what it says
			sel = sess.proven
		}
		holds := make([]held, len(wl.Entries))
		for i, e := range wl.Entries {
			if len(e.GetId()) > maxEntryID {
				return fmt.Errorf("%w: workload %d has an entry ID of %d bytes: at the most %d", identity.ErrInvalid, wl.Handle, len(e.GetId()), maxEntryID)
			}
			holds[i] = held{id: e.GetId(), revision: e.GetRevision()}
		}
		if err := s.hub.set(sess, wl.Handle, identity.SortSelectors(identity.WithoutFacts(sel)), holds); err != nil {
			return err
		}
	}
	return nil
}

// push sends what is in the mailbox, as it is when it is sent.
func (s *Server) push(stream grpc.BidiStreamingServer[nodev1.SyncRequest, nodev1.SyncResponse], sess *session) error {
	for {
		select {
		case <-sess.wake:
		case <-sess.done:
			return sess.endError()
		case <-stream.Context().Done():
			return stream.Context().Err()
		}
		m := sess.take()
		// The revision is read before what it vouches for: it may be too low, never too high.
		revision := s.cfg.State.Revision()
		if m.bundles || m.members {
			state := &nodev1.State{}
			var with []string
			if m.bundles {
				state.Bundles = &nodev1.State_Bundles{Own: api.BundleToWire(s.cfg.State.Bundle())}
				state.Bundles.FederatesWith = s.hub.federatedWith(sess)
				state.Bundles.Federated, with = s.federatedToWire(state.Bundles.FederatesWith)
			}
			if m.members {
				state.Members = &nodev1.State_Members{Addresses: s.addresses()}
			}
			if err := stream.Send(&nodev1.SyncResponse{Revision: revision, Message: &nodev1.SyncResponse_State{State: state}}); err != nil {
				return err
			}
			if m.bundles {
				sess.nowSent(with)
			}
		}
		// What has ended is said first: it must not be asked for again.
		for chunk := range slices.Chunk(handles(m.ended), maxHandles) {
			if err := stream.Send(changed(revision, nil, chunk)); err != nil {
				return err
			}
		}
		for chunk := range slices.Chunk(handles(m.changed), maxHandles) {
			if err := stream.Send(changed(revision, chunk, nil)); err != nil {
				return err
			}
		}
	}
}

func changed(revision uint64, handles, ended []uint64) *nodev1.SyncResponse {
	return &nodev1.SyncResponse{Revision: revision, Message: &nodev1.SyncResponse_Changed{Changed: &nodev1.Changed{Handles: handles, Ended: ended}}}
}

// addresses are where agents reach the members.
func (s *Server) addresses() []string {
	members := s.cfg.State.Members()
	out := make([]string, len(members))
	for i, m := range members {
		out[i] = m.Address
	}
	return out
}
