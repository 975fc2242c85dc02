package integration

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"countersign.io/countersign/integration/cluster"
)

// shaking has a workload at each of two agents shake hands with the other's all the time, until stop is called.
func shaking(t *testing.T, ctx context.Context, a, b *cluster.Agent) (stop func() (handshakes int)) {
	t.Helper()
	var sources [2]*workloadapi.X509Source
	for i, agent := range []*cluster.Agent{a, b} {
		s, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr(agent.Endpoint())))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { s.Close() })
		sources[i] = s
	}
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	n := 0
	var listeners [2]net.Listener
	for i, s := range sources {
		l, err := tls.Listen("tcp", "127.0.0.1:0", tlsconfig.MTLSServerConfig(s, s, tlsconfig.AuthorizeAny()))
		if err != nil {
			t.Fatal(err)
		}
		context.AfterFunc(ctx, func() { l.Close() })
		listeners[i] = l
		wg.Go(func() {
			for {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
				_, _ = io.Copy(conn, io.LimitReader(conn, 4))
				conn.Close()
			}
		})
	}
	wg.Go(func() {
		for ; pause(ctx, 20*time.Millisecond); n++ {
			from, to := sources[n%2], listeners[1-n%2]
			err := ping(to.Addr().String(), tlsconfig.MTLSClientConfig(from, from, tlsconfig.AuthorizeAny()))
			if err != nil && ctx.Err() == nil {
				t.Errorf("handshake %d failed: %v", n, err)
				return
			}
		}
	})
	return func() int {
		cancel()
		wg.Wait()
		return n
	}
}

func ping(addr string, conf *tls.Config) error {
	conn, err := tls.DialWithDialer(&net.Dialer{Timeout: 10 * time.Second}, "tcp", addr, conf)
	if err != nil {
		return err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := conn.Write([]byte("ping")); err != nil {
		return err
	}
	_, err = io.ReadFull(conn, make([]byte, 4))
	return err
}

// TestRotationNested rotates the cluster above another one: that one is waited for, replaces its own authority, and no handshake
// between workloads of the two fails. Then the authority above is compromised.
func TestRotationNested(t *testing.T) {
	t.Parallel()
	above := newWorld(t, 1, shortLives)
	aboveAgent := above.agent()
	id := "spiffe://" + trustDomain + "/below"
	above.createEntry(append(uidSelectors(), "--id", id, "--downstream")...)
	below := newWorld(t, 1, shortLives+fmt.Sprintf("ca:\n  upstream:\n    countersign:\n      servers: [%s]\n      socket: %s\n", above.Members[0].Address, aboveAgent.Socket))
	below.createEntry(append(uidSelectors(), "--id", "spiffe://"+trustDomain+"/workload")...)
	belowAgent := below.agent()
	stop := shaking(t, below.ctx, aboveAgent, belowAgent)

	up, down := &rotation{world: above}, &rotation{world: below}
	root, lower := up.state(), down.state().in("x509", "active")[0]
	for _, args := range [][]string{{"bundle", "rotate", "--taint"}, {"authority", "taint", "--now"}} {
		above.admin(args...)
		up.reaches("x509", "the cluster above is done", phase("done"))
		after := up.state()
		if len(after.Bundle.X509Authorities) != 1 || after.Bundle.X509Authorities[0] == root.Bundle.X509Authorities[0] {
			t.Errorf("the bundle above: %+v", after.Bundle)
		}
		down.reaches("x509", "the cluster below is done", phase("done"))
		s := down.state()
		if active := s.in("x509", "active"); len(active) != 1 || active[0] == lower {
			t.Errorf("the authorities below: %+v", s.Authorities)
		}
		below.eventually("the bundle below is the one above", func() error {
			if s = down.state(); len(s.Bundle.X509Authorities) != 1 || s.Bundle.X509Authorities[0] != after.Bundle.X509Authorities[0] {
				return fmt.Errorf("%d roots", len(s.Bundle.X509Authorities))
			}
			return nil
		})
		root, lower = after, s.in("x509", "active")[0]
	}
	t.Logf("%d handshakes", stop())
}
