package raft

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	hraft "github.com/hashicorp/raft"
)

const (
	maxServed   = 1024             // requests under way on one connection
	serveIdle   = time.Minute      // without even a ping
	serveWithin = 30 * time.Second // after which a request's asker is told that the outcome is unknown
)

// served is the other end of a link.
type served struct {
	n    *Node
	conn net.Conn
	peer string // who asks, "" if not known

	write sync.Mutex
}

// serve answers the requests of another member until the connection ends.
func (n *Node) serve(conn net.Conn) {
	s := &served{n: n, conn: conn, peer: n.peer(conn)}
	ctx, cancel := context.WithCancel(n.ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	defer conn.Close()
	n.serving.add()
	defer n.serving.done()
	wg.Go(func() {
		select {
		case <-n.goodbye:
			s.reply(frame{kind: kindGoodbye}) // the other side closes when it has its answers
		case <-ctx.Done():
		}
	})
	slots := make(chan struct{}, maxServed)
	r := bufio.NewReader(conn)
	for {
		conn.SetReadDeadline(time.Now().Add(serveIdle))
		f, err := readFrame(r)
		if err != nil {
			if errors.Is(err, errFrame) || errors.Is(err, io.ErrUnexpectedEOF) {
				n.log.Warn("closing a member's connection: its request makes no sense", "remote", conn.RemoteAddr(), "error", err)
			}
			return
		}
		if f.kind.since() > n.cfg.protocol {
			return
		}
		switch f.kind {
		case kindPing:
			pong := frame{kind: kindPong, id: f.id}
			if n.cfg.protocol > 1 {
				pong.payload = []byte{byte(n.cfg.protocol)}
			}
			err = s.reply(pong)
		case kindTerm:
			err = s.reply(frame{kind: kindOK, id: f.id, payload: answer{index: n.raft.CurrentTerm()}.payload()})
		case kindPropose, kindBarrier, kindAdd, kindRemove, kindStatus, kindReadIndex, kindTransfer:
			if f.kind == kindStatus && (len(f.payload) == 0 || n.cfg.protocol == 1) {
				err = s.reply(frame{kind: kindOK, id: f.id, payload: answer{index: n.fsm.appliedIndex()}.payload()})
				break
			}
			select {
			case slots <- struct{}{}:
				n.inflight.add() // until the answer is on its way: Close waits for that
				wg.Go(func() {
					defer n.inflight.done()
					defer func() { <-slots }()
					s.handle(ctx, f)
				})
			default:
				// Never block here: pings behind this request would go unanswered.
				err = s.reply(frame{kindNotExecuted, f.id, []byte("too many requests are under way")})
			}
		default:
			n.log.Warn("closing a member's connection: an answer where a request was due", "remote", conn.RemoteAddr(), "kind", byte(f.kind))
			return
		}
		if err != nil {
			return
		}
	}
}

// stranger tells whether the authenticated asker is none of the members, as far as the leader knows: a member
// that was removed still has its certificate for a while.
func (n *Node) stranger(peer string) bool {
	return peer != "" && n.raft.State() == hraft.Leader && !slices.ContainsFunc(n.Members(), func(m Member) bool { return m.ID == peer })
}

// handle carries out one request. It is not passed on again: a member that no longer leads says so.
func (s *served) handle(ctx context.Context, f frame) {
	ctx, cancel := context.WithTimeout(ctx, serveWithin)
	defer cancel()
	var a answer
	err := fmt.Errorf("%w: this member is closing", errNotExecuted)
	switch {
	case f.kind == kindStatus:
		a, err = s.n.tell(ctx, s.peer, f.payload), nil
	case s.n.closing.Load():
	case s.n.stranger(s.peer):
		err = fmt.Errorf("%w: %q is not a member of this cluster, or no longer", ErrRefused, s.peer)
	default:
		a, err = s.n.carryOut(ctx, request{f.kind, f.payload})
	}
	out := frame{id: f.id}
	switch {
	case err == nil && len(a.result) > MaxCommand:
		out.kind, out.payload = kindUnknown, fmt.Appendf(nil, "it was carried out as entry %d; its result of %d bytes is too large to send", a.index, len(a.result))
	case err == nil:
		out.kind, out.payload = kindOK, a.payload()
	case errors.Is(err, errNotExecuted):
		out.kind, out.payload = kindNotExecuted, []byte(err.Error())
	case errors.Is(err, ErrRefused):
		out.kind, out.payload = kindRefused, []byte(strings.TrimPrefix(err.Error(), ErrRefused.Error()+": "))
	default:
		out.kind, out.payload = kindUnknown, []byte(err.Error())
	}
	if err := s.reply(out); err != nil {
		s.conn.Close() // the asker must not wait for an answer that will not come
	}
}

func (s *served) reply(f frame) error {
	b, err := appendFrame(make([]byte, 0, frameHeader+len(f.payload)), f)
	if err != nil {
		return err
	}
	s.write.Lock()
	defer s.write.Unlock()
	s.conn.SetWriteDeadline(time.Now().Add(s.n.cfg.RPCTimeout))
	_, err = s.conn.Write(b)
	return err
}
