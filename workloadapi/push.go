package workloadapi

import (
	"sync"

	"google.golang.org/grpc"
)

// pusher sends a stream's messages without ever making the Source wait for the reader: while one message is
// stuck in flow control only the newest of those that follow is kept. An idle stream costs no goroutine, one
// that is never read costs one, and that ends with the call: gRPC interrupts a send when the handler returns.
type pusher struct {
	stream grpc.ServerStream

	mu   sync.Mutex
	last digest   // of the message sent last; zero before the first
	busy bool     // a send is under way
	next *message // to be sent after it
	err  error    // of a send; final
}

// push sends the message, now or after the one under way, unless it says what the last one said.
func (p *pusher) push(m *message) error {
	p.mu.Lock()
	first := p.last == digest{}
	switch {
	case p.err != nil:
		defer p.mu.Unlock()
		return p.err
	case p.busy:
		p.next = m
		p.mu.Unlock()
		return nil
	case m.digest == p.last:
		p.mu.Unlock()
		return nil
	}
	p.busy, p.last = true, m.digest
	p.mu.Unlock()
	if !first {
		go p.run(m)
		return nil
	}
	// gRPC takes a stream's first message, of whatever size, without waiting for the reader.
	if next := p.sent(m, p.stream.SendMsg(m)); next != nil {
		go p.run(next)
	}
	return nil
}

func (p *pusher) run(m *message) {
	for m != nil {
		m = p.sent(m, p.stream.SendMsg(m))
	}
}

// sent notes how a send ended and returns what is to be sent next.
func (p *pusher) sent(m *message, err error) *message {
	p.mu.Lock()
	defer p.mu.Unlock()
	next := p.next
	p.next, p.busy = nil, false
	if p.err = err; err != nil || next == nil || next.digest == m.digest {
		return nil
	}
	p.busy, p.last = true, next.digest
	return next
}
