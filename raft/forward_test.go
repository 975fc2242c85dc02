package raft

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync"
	"testing"
	"time"
)

// raw is a hand-made connection to a member.
func raw(t *testing.T, m *member, bytes ...[]byte) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", m.address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(patience))
	for _, b := range bytes {
		if _, err := conn.Write(b); err != nil {
			t.Fatal(err)
		}
	}
	return conn
}

// TestGarbageToServer: whatever comes in on a connection, it is closed, said in the log, and nothing else happens.
func TestGarbageToServer(t *testing.T) {
	t.Parallel()
	logged := &syncBuffer{}
	c := newCluster(t, 1, func(c *Config) { c.Log = slog.New(slog.NewTextHandler(logged, nil)) })
	m := c.members[0]
	c.propose(m, "before")
	ping, err := appendFrame(nil, frame{kind: kindPing, id: 5})
	if err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		send []byte
		hang bool // half-close instead of waiting for the member to close
		log  string
	}{
		"unknown first byte": {send: []byte("X"), log: "unknown byte"},
		"http":               {send: []byte("GET / HTTP/1.1\r\n\r\n"), log: "unknown byte"},
		"raft garbage":       {send: []byte("R\xffgarbage"), log: "raft: "},
		"bad version":        {send: append([]byte("F"), header(9, 1, 1, 0)...), log: "frame version 9"},
		"bad kind":           {send: append([]byte("F"), header(1, 99, 1, 0)...), log: "frame kind 0x63"},
		"an answer":          {send: append([]byte("F"), header(1, 0x81, 1, 0)...), log: "an answer where a request was due"},
		"oversize":           {send: append([]byte("F"), header(1, 1, 1, 1<<31)...), log: "frame payload of 2147483648 bytes"},
		"truncated header":   {send: append([]byte("F"), header(1, 1, 1, 0)[:6]...), hang: true, log: "reading frame header"},
		"truncated payload":  {send: append(append([]byte("F"), header(1, 1, 1, 100)...), "only this"...), hang: true, log: "reading frame payload"},
		"nothing":            {send: nil, hang: true},
	} {
		conn := raw(t, m, tc.send)
		if tc.hang {
			conn.(*net.TCPConn).CloseWrite()
		}
		if b, err := io.ReadAll(conn); len(b) > 0 || err != nil && !strings.Contains(err.Error(), "reset") {
			t.Errorf("%s: read %q, %v", name, b, err)
		}
		eventually(t, name+" is in the log", func() bool { return strings.Contains(logged.String(), tc.log) })
	}
	// A truncated command is not carried out, a whole one is, and a ping is answered.
	conn := raw(t, m, []byte("F"), ping)
	if f, err := readFrame(conn); err != nil || f.kind != kindPong || f.id != 5 {
		t.Errorf("ping: %v, %v", f, err)
	}
	c.propose(m, "after")
	if got := m.machine.all(); len(got) != 2 {
		t.Errorf("state %q", got)
	}
}

// TestRefusedRequests: well-formed frames with nonsense in them.
func TestRefusedRequests(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1, nil)
	m := c.members[0]
	c.propose(m, "x")
	l, err := m.connect(within(t), peerAddress{m.name, m.address})
	if err != nil {
		t.Fatal(err)
	}
	for _, req := range []request{{kindAdd, nil}, {kindAdd, []byte("no address")}, {kindAdd, []byte("\x00addr")}, {kindAdd, []byte("id\x00")}, {kindRemove, []byte("m1")}} {
		if _, err := l.ask(within(t), req); !errors.Is(err, ErrRefused) {
			t.Errorf("%d %q: %v", req.kind, req.payload, err)
		}
	}
	if a, err := l.ask(within(t), request{kind: kindStatus}); err != nil || a.index != m.AppliedIndex() {
		t.Errorf("status: %v, %v", a, err)
	}
	if len(m.Members()) != 1 {
		t.Errorf("members %v", m.Members())
	}
}

// fakeLeader accepts one forwarding connection and hands it to serve.
func fakeLeader(t *testing.T, serve func(net.Conn)) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		if _, err := io.ReadFull(conn, make([]byte, 1)); err == nil {
			serve(conn)
		}
	}()
	return l.Addr().String()
}

// TestGarbageToClient: once a request was sent, everything but a proper answer is an unknown outcome.
func TestGarbageToClient(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1, nil)
	m := c.members[0]
	answer := func(f frame) []byte { b, _ := appendFrame(nil, f); return b }
	for name, tc := range map[string]struct {
		reply func(id uint64) []byte
		hang  bool
		want  error
	}{
		"closed":             {want: ErrUnknownOutcome},
		"silent":             {hang: true, want: ErrUnknownOutcome}, // found out by unanswered pings
		"garbage":            {reply: func(uint64) []byte { return []byte("HTTP/1.1 400 Bad Request\r\n") }, hang: true, want: ErrUnknownOutcome},
		"oversize":           {reply: func(id uint64) []byte { return header(1, 0x81, id, 1<<30) }, hang: true, want: ErrUnknownOutcome},
		"truncated":          {reply: func(id uint64) []byte { return header(1, 0x81, id, 100) }, want: ErrUnknownOutcome},
		"short answer":       {reply: func(id uint64) []byte { return answer(frame{kindOK, id, []byte("abc")}) }, want: errFrame},
		"a request":          {reply: func(id uint64) []byte { return answer(frame{kindPropose, id, nil}) }, want: ErrUnknownOutcome},
		"says unknown":       {reply: func(id uint64) []byte { return answer(frame{kindUnknown, id, []byte("why")}) }, want: ErrUnknownOutcome},
		"says not executed":  {reply: func(id uint64) []byte { return answer(frame{kindNotExecuted, id, []byte("why")}) }, want: errNotExecuted},
		"says refused":       {reply: func(id uint64) []byte { return answer(frame{kindRefused, id, []byte("why")}) }, want: ErrRefused},
		"another's answer":   {reply: func(id uint64) []byte { return answer(frame{kindOK, id + 7, make([]byte, 8)}) }, want: ErrUnknownOutcome},
		"two answers, right": {reply: func(id uint64) []byte { b := answer(frame{kindOK, id, make([]byte, 8)}); return append(b, b...) }},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			address := fakeLeader(t, func(conn net.Conn) {
				f, err := readFrame(conn)
				for err == nil && f.kind == kindPing {
					f, err = readFrame(conn)
				}
				if err != nil {
					return
				}
				if tc.reply != nil {
					conn.Write(tc.reply(f.id))
				}
				if tc.hang {
					io.Copy(io.Discard, conn)
				}
			})
			l, err := m.connect(within(t), peerAddress{"", address})
			if err != nil {
				t.Fatal(err)
			}
			_, err = l.ask(within(t), request{kindPropose, []byte("x")})
			if !errors.Is(err, tc.want) || tc.want == nil && err != nil {
				t.Fatalf("%v, want %v", err, tc.want)
			}
			if errors.Is(err, errNotExecuted) && tc.want != errNotExecuted {
				t.Fatalf("%v would be tried again", err)
			}
		})
	}
}

// TestCallerGivesUp: the caller's context ends while the leader works; the connection serves others on.
func TestCallerGivesUp(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3, nil)
	f, leader := c.follower(), c.leader()
	c.propose(f, "warm")
	gate := make(chan struct{})
	leader.machine.mu.Lock()
	leader.machine.gate = gate
	leader.machine.mu.Unlock()
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		_, err := f.Propose(ctx, []byte("given up"))
		if !errors.Is(err, ErrUnknownOutcome) || !errors.Is(err, context.Canceled) {
			t.Errorf("forwarded: %v", err)
		}
	})
	wg.Go(func() {
		_, err := leader.Propose(ctx, []byte("given up too"))
		if !errors.Is(err, ErrUnknownOutcome) || !errors.Is(err, context.Canceled) {
			t.Errorf("local: %v", err)
		}
	})
	eventually(t, "both are committed", func() bool { return f.machine.has("given up") == 1 && f.machine.has("given up too") == 1 })
	cancel()
	wg.Wait()
	leader.machine.mu.Lock()
	leader.machine.gate = nil
	leader.machine.mu.Unlock()
	close(gate)
	c.propose(f, "next")
	c.same("warm", "given up", "given up too", "next")
}

// TestLeaderChangesMidFlight: the leader is cut off while it works on a forwarded write. The caller learns
// that the outcome is unknown, and whatever it is, the write is there at most once.
func TestLeaderChangesMidFlight(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3, nil)
	f, old := c.follower(), c.leader()
	c.propose(f, "warm")
	gate := make(chan struct{})
	old.machine.mu.Lock()
	old.machine.gate = gate
	old.machine.mu.Unlock()
	result := make(chan error, 1)
	go func() {
		_, err := f.Propose(within(t), []byte("in flight"))
		result <- err
	}()
	eventually(t, "it is committed", func() bool { return f.machine.has("in flight") == 1 })
	c.isolate(old, true)
	if err := <-result; !errors.Is(err, ErrUnknownOutcome) {
		t.Fatalf("in flight: %v", err)
	}
	c.propose(f, "under the next leader")
	old.machine.mu.Lock()
	old.machine.gate = nil
	old.machine.mu.Unlock()
	close(gate)
	c.isolate(old, false)
	c.same("warm", "in flight", "under the next leader")
}

// TestDeposedLeader: a leader without a quorum answers neither yes nor no.
func TestDeposedLeader(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3, nil)
	old := c.leader()
	c.propose(old, "warm")
	c.isolate(old, true)
	_, err := old.Propose(within(t), []byte("lost"))
	switch {
	case errors.Is(err, ErrUnknownOutcome): // taken while it still thought that it led
	case errors.Is(err, ErrNoLeader):
	default:
		t.Fatalf("without a quorum: %v", err)
	}
	c.propose(c.others(old)[0], "won")
	c.isolate(old, false)
	c.propose(old, "healed")
	c.same("warm", "won", "healed")
	if n := old.machine.has("lost"); n > 1 {
		t.Errorf("carried out %d times", n)
	}
}

// TestManyOnOneLink: one connection carries many requests at once, also beyond what one member works on, and
// large ones; each gets its own answer.
func TestManyOnOneLink(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3, nil)
	f := c.follower()
	var wg sync.WaitGroup
	for i := range 1500 {
		wg.Go(func() {
			cmd := fmt.Sprintf("%d", i)
			if i%500 == 0 {
				cmd += strings.Repeat("x", 1<<20)
			}
			got, err := f.Propose(within(t), []byte(cmd))
			if errors.Is(err, ErrUnknownOutcome) {
				return
			}
			if err != nil || string(got) != "done:"+cmd {
				t.Errorf("%d: %.20q, %v", i, got, err)
			}
		})
	}
	wg.Wait()
}

// TestFollowerLearnsAtOnce: with raft's own word on commits a minute away, the others still apply a lone
// write. A connection that breaks just then falls back to raft's word, so one write in some must show it.
func TestFollowerLearnsAtOnce(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3, func(c *Config) { c.commitTimeout = time.Minute })
	for i := range 10 {
		cmd := fmt.Sprint(i)
		c.propose(c.leader(), cmd)
		learned := time.NewTimer(3 * time.Second)
		tick := time.NewTicker(time.Millisecond)
		for waiting := true; waiting; {
			seen := 0
			for _, m := range c.members {
				seen += m.machine.has(cmd)
			}
			if seen == 3 {
				return
			}
			select {
			case <-tick.C:
			case <-learned.C:
				waiting = false
			}
		}
	}
	t.Fatal("no lone write reached the other members")
}

// TestClosing: requests that come to a member while it closes are refused or answered, never left hanging.
func TestClosing(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3, nil)
	m := c.leader()
	var wg sync.WaitGroup
	for i := range 50 {
		wg.Go(func() {
			for j := 0; ; j++ {
				_, err := m.Propose(within(t), fmt.Appendf(nil, "%d-%d", i, j))
				if errors.Is(err, ErrClosed) {
					return
				}
				if err != nil && !errors.Is(err, ErrUnknownOutcome) {
					t.Errorf("while closing: %v", err)
					return
				}
			}
		})
	}
	eventually(t, "some writes", func() bool { return len(m.machine.all()) > 100 })
	if err := m.Close(); err != nil {
		t.Error(err)
	}
	wg.Wait()
}

// TestGoodbye: a link that was told goodbye takes nothing new, gives what is under way its answer, and closes.
func TestGoodbye(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1, nil)
	closed := make(chan error, 1)
	answer := make(chan struct{})
	address := fakeLeader(t, func(conn net.Conn) {
		f, err := readFrame(conn)
		for err == nil && f.kind == kindPing {
			f, err = readFrame(conn)
		}
		bye, _ := appendFrame(nil, frame{kind: kindGoodbye})
		conn.Write(bye)
		<-answer
		ok, _ := appendFrame(nil, frame{kindOK, f.id, make([]byte, 8)})
		conn.Write(ok)
		for err == nil {
			_, err = readFrame(conn)
		}
		closed <- err
	})
	l, err := c.members[0].connect(within(t), peerAddress{"", address})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() {
		_, err := l.ask(within(t), request{kindPropose, []byte("x")})
		done <- err
	}()
	eventually(t, "the link is retired", l.dead)
	if _, err := l.ask(within(t), request{kindPropose, []byte("y")}); !errors.Is(err, errNotExecuted) {
		t.Errorf("after goodbye: %v", err)
	}
	close(answer)
	if err := <-done; err != nil {
		t.Errorf("under way: %v", err)
	}
	if err := <-closed; err != io.EOF {
		t.Errorf("closed with %v", err)
	}
}
