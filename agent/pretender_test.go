package agent

import (
	"context"
	"os"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"countersign.io/countersign/attestor"
	"countersign.io/countersign/identity"
)

// callerLike looks like the workload of one token and shows another.
func callerLike(key, token string) attestor.Func {
	return func(ctx context.Context) (*attestor.Workload, error) {
		w, err := caller(token)(ctx)
		w.Key = "key of " + key
		return w, err
	}
}

// A process that can give its cgroup a pod's name can make up a token that names the pod, too: the agent cannot verify
// one. It must not get what is held for the pod, and its refusal must not be the pod's.
func TestPretenderGetsNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t)
		c.memoryMember("a")
		c.grant("web", web())
		a := run(t, c.config())
		w := watchUpdates(t, a.Agent, caller("web"))
		w.next()
		pretender := callerLike("web", "forged")
		for range 3 {
			currentErr(t, a.Agent, pretender, identity.ErrDenied)
			watchUpdates(t, a.Agent, pretender).end(identity.ErrDenied)
			if _, err := a.FetchJWT(t.Context(), pretender, []string{"db"}, spiffeid.ID{}); err == nil {
				t.Fatal("the pretender got a JWT-SVID")
			}
		}
		w.quiet()
		before := asked(c, "web")
		current(t, a.Agent, caller("web"))
		if n := asked(c, "web"); n != before {
			t.Errorf("the pod's identity was asked for anew")
		}
		if n, _ := a.cache.counts(); n != 1 {
			t.Errorf("%d workloads in the cache", n)
		}
		// When nobody can verify anything, only what was verified counts.
		c.away()
		synctest.Wait()
		currentErr(t, a.Agent, pretender, identity.ErrUnavailable)
		current(t, a.Agent, caller("web"))
		w.quiet()
	})
}

// The kubelet replaces a pod's token: from the next renewal on, the new one finds the identity, over a restart too.
func TestIdentityFollowsThePodsToken(t *testing.T) {
	c := newCluster(t)
	c.member("a")
	c.grant("web", web())
	c.grant("web-2", web())
	cfg := c.config()
	cfg.StateDir = memoryDir(t)
	a := run(t, cfg)
	var replaced atomic.Bool
	pod := func(ctx context.Context) (*attestor.Workload, error) {
		if replaced.Load() {
			return callerLike("web", "web-2")(ctx)
		}
		return caller("web")(ctx)
	}
	w := watchUpdates(t, a.Agent, pod)
	w.next()
	replaced.Store(true)
	a.cache.mu.Lock()
	a.cache.schedule(a.cache.byKey[cacheKey("key of web", []byte("web"))], time.Now())
	a.cache.mu.Unlock()
	w.next()
	if n := asked(c, "web-2"); n != 1 {
		t.Fatalf("renewed with the new token %d times", n)
	}
	current(t, a.Agent, callerLike("web", "web-2"))
	if n := asked(c, "web-2"); n != 1 {
		t.Errorf("the new token does not find what it was renewed with: asked %d times", n)
	}
	file := func(token string) string { return a.state.svid(cacheKey("key of web", []byte(token))) }
	eventually(t, "the files follow", func() bool {
		_, oldGone := os.Stat(file("web"))
		_, newThere := os.Stat(file("web-2"))
		return os.IsNotExist(oldGone) && newThere == nil
	})
}
