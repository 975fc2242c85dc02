package agent

import (
	"context"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"countersign.io/countersign/attestor"
	"countersign.io/countersign/identity"
)

// volumeCaller uses a pod's volume, whose newest token is token's; empty: none has been handed over.
func volumeCaller(token *atomic.Value) attestor.Func {
	return func(context.Context) (*attestor.Workload, error) {
		return &attestor.Workload{Key: attestor.VolumeKey("pod-1", "csi-1"), PodUID: "pod-1", Evidence: identity.Evidence{Token: []byte(token.Load().(string))}}, nil
	}
}

// TestVolume: what is held for a volume is served without its token, over a restart too; nothing new is, and no member is asked without one.
func TestVolume(t *testing.T) {
	c := newCluster(t)
	c.member("a")
	c.grant("web", web())
	c.grant("web-2", web())
	cfg := c.config()
	cfg.StateDir = memoryDir(t)
	var token atomic.Value
	token.Store("")
	a := run(t, cfg)
	eventually(t, "connected", func() bool { return a.Ready() == nil })
	currentErr(t, a.Agent, volumeCaller(&token), identity.ErrUnavailable)
	if n := asked(c, ""); n != 0 {
		t.Fatalf("a member was asked %d times without a token", n)
	}
	token.Store("web")
	w := watchUpdates(t, a.Agent, volumeCaller(&token))
	before := w.next()
	// Another token of the same pod is the same volume: no question for a caller that comes with it, and the next renewal shows it.
	token.Store("web-2")
	current(t, a.Agent, volumeCaller(&token))
	if n := asked(c, "web-2"); n != 0 {
		t.Errorf("asked anew for a new token: %d times", n)
	}
	renew := func(a *Agent) {
		a.cache.mu.Lock()
		defer a.cache.mu.Unlock()
		a.cache.schedule(a.cache.byKey[attestor.VolumeKey("pod-1", "csi-1")], time.Now())
	}
	renew(a.Agent)
	if after := w.next(); after == before || asked(c, "web-2") != 1 {
		t.Errorf("not renewed with the newest token: %d", asked(c, "web-2"))
	}
	// A process cannot come to have the volume's key by what it shows, and a token does not lead to it.
	currentErr(t, a.Agent, callerLike("pod-1", "web-3"), identity.ErrDenied)
	file := a.state.svid(attestor.VolumeKey("pod-1", "csi-1"))
	eventually(t, "it is kept", func() bool { _, err := os.Stat(file); return err == nil })
	a.halt()

	token.Store("")
	b := run(t, cfg)
	eventually(t, "connected", func() bool { return b.Ready() == nil })
	w = watchUpdates(t, b.Agent, volumeCaller(&token))
	if got := w.next(); got.SVIDs[0].ID != before.SVIDs[0].ID {
		t.Errorf("restored %v", got.SVIDs[0].ID)
	}
	if _, err := b.FetchJWT(t.Context(), volumeCaller(&token), []string{"db"}, spiffeid.ID{}); err == nil {
		t.Error("a JWT-SVID without a token")
	}
	renew(b.Agent) // due, and nothing to renew it with: what is live stays
	current(t, b.Agent, volumeCaller(&token))
	w.quiet()
	if n := asked(c, ""); n != 0 {
		t.Errorf("a member was asked %d times without a token", n)
	}
	token.Store("web")
	renew(b.Agent)
	w.next()
	b.Forget(attestor.VolumeKey("pod-1", "csi-1"))
	w.end(identity.ErrDenied)
	eventually(t, "nothing is kept", func() bool { _, err := os.Stat(file); return os.IsNotExist(err) })
	b.Forget("nothing")
}

// TestVolumeRefused: a token that a member refuses ends what is held.
func TestVolumeRefused(t *testing.T) {
	c := newCluster(t)
	c.member("a")
	c.grant("web", web())
	a := run(t, c.config())
	var token atomic.Value
	token.Store("web")
	w := watchUpdates(t, a.Agent, volumeCaller(&token))
	w.next()
	token.Store("of a pod that is gone")
	a.cache.mu.Lock()
	a.cache.schedule(a.cache.byKey[attestor.VolumeKey("pod-1", "csi-1")], time.Now())
	a.cache.mu.Unlock()
	w.end(identity.ErrDenied)
	currentErr(t, a.Agent, volumeCaller(&token), identity.ErrDenied)
}
