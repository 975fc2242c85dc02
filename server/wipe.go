package server

import (
	"context"
	"sync"

	"google.golang.org/grpc/stats"
)

// wiper clears what answers held once their calls have ended: an interceptor returns before its answer is encoded. gRPC's and
// TLS's own buffers are out of reach.
type wiper struct{}

type wipeKey struct{}

type wipeList struct {
	mu      sync.Mutex
	secrets [][]byte
}

// wipeAfter has a secret cleared when the call has ended, however it ends. Outside of a call nothing happens.
func wipeAfter(ctx context.Context, secret []byte) {
	if l, ok := ctx.Value(wipeKey{}).(*wipeList); ok {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.secrets = append(l.secrets, secret)
	}
}

// TagRPC gives each call a list.
func (wiper) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context {
	return context.WithValue(ctx, wipeKey{}, &wipeList{})
}

// HandleRPC clears at the end, which comes after the answer was sent, or was not.
func (wiper) HandleRPC(ctx context.Context, s stats.RPCStats) {
	l, ok := ctx.Value(wipeKey{}).(*wipeList)
	if _, end := s.(*stats.End); !end || !ok {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, secret := range l.secrets {
		clear(secret)
	}
}

// TagConn adds nothing.
func (wiper) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }

// HandleConn does nothing.
func (wiper) HandleConn(context.Context, stats.ConnStats) {}
