package server

import (
	"context"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	adminv1 "countersign.io/countersign/api/admin/v1"
	memberv1 "countersign.io/countersign/api/member/v1"
	"countersign.io/countersign/identity"
)

// countedTokens counts the writes of tokens that are to be spent.
type countedTokens struct {
	TokenWriter
	n atomic.Int64
}

func (c *countedTokens) UseJoinToken(ctx context.Context, now time.Time, hash []byte, purpose string) (identity.JoinToken, error) {
	c.n.Add(1)
	return c.TokenWriter.UseJoinToken(ctx, now, hash, purpose)
}

// A secret that somebody made up costs no write.
func TestUnknownTokensAreNotWritten(t *testing.T) {
	var c *countedTokens
	w := newWorld(t, func(cfg *Config) {
		c = &countedTokens{TokenWriter: cfg.Writes.TokenWriter}
		cfg.Writes.TokenWriter = c
	}).start(t)
	for _, level := range []uint32{1, 2} {
		w.state.mu.Lock()
		w.state.level = level
		w.state.mu.Unlock()
		secret := w.joinToken(t, &adminv1.CreateTokenRequest{Purpose: "agent"}).Secret
		for hash := range w.state.tokens { // it is forgotten
			w.state.mu.Lock()
			delete(w.state.tokens, hash)
			w.state.mu.Unlock()
		}
		_, pub := newKey(t)
		_, err := attest(t, w.dial(t, nil), byJoin(secret, pub))
		wantCode(t, err, codes.Unauthenticated, "no such join token")
		_, err = memberv1.NewMemberClient(w.dial(t, nil)).Join(testContext(t), &memberv1.JoinRequest{Secret: secret, Id: "m2", Address: "10.0.0.2:8443", Level: 2})
		wantCode(t, err, codes.Unauthenticated, "no such join token")
	}
	if n := c.n.Load(); n != 0 {
		t.Errorf("%d writes", n)
	}
}
