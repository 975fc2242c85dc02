package workloadapi

import (
	"errors"
	"fmt"
	"testing"

	"google.golang.org/grpc"
)

// slowStream passes each message to the test, and the test's answer back. Its first one it takes at once, like
// gRPC.
type slowStream struct {
	grpc.ServerStream
	first   bool
	sending chan string
	done    chan error
}

func (s *slowStream) SendMsg(m any) error {
	if !s.first {
		s.first = true
		return nil
	}
	s.sending <- string(m.(*message).data)
	return <-s.done
}

func say(s string) *message { return &message{data: []byte(s), digest: digest{1, s[0]}} }

func TestPushNeverWaits(t *testing.T) {
	s := &slowStream{sending: make(chan string), done: make(chan error)}
	p := &pusher{stream: s}
	push := func(all ...string) {
		t.Helper()
		for _, m := range all {
			if err := p.push(say(m)); err != nil {
				t.Fatal(err)
			}
		}
	}
	want := func(m string) {
		t.Helper()
		if got := <-s.sending; got != m {
			t.Fatalf("%s is sent, not %s", got, m)
		}
	}
	push("a", "a", "b")
	want("b")
	push("c", "d", "e") // while b is stuck: only the newest follows
	s.done <- nil
	want("e")
	push("f", "e") // back to what is being sent: nothing follows
	s.done <- nil
	push("g")
	want("g")
	push("h")
	s.done <- errors.New("gone")
	eventually(t, "the error is seen", func() bool { return p.push(say("i")) != nil })
	select {
	case m := <-s.sending:
		t.Errorf("%s is sent after an error", m)
	default:
	}
}

func TestPushFirstFails(t *testing.T) {
	p := &pusher{stream: failing{}}
	p.push(say("a"))
	if err := p.push(say("b")); err == nil {
		t.Error("no error")
	}
}

type failing struct{ grpc.ServerStream }

func (failing) SendMsg(any) error { return fmt.Errorf("gone") }
