package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
)

// playPod is one pod: it connects to the agent's socket, takes its first X.509-SVID, and says how many nanoseconds that took.
func playPod(ctx context.Context, stdout io.Writer) error {
	ctx, cancel := context.WithTimeout(asWorkload(ctx), 30*time.Second)
	defer cancel()
	begin := time.Now()
	conn, client, err := workloadAPI(os.Getenv("SPIFFE_ENDPOINT_SOCKET"))
	if err != nil {
		return err
	}
	defer conn.Close()
	stream, err := client.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
	if err != nil {
		return err
	}
	m, err := stream.Recv()
	if err != nil {
		return fmt.Errorf("taking the first SVID: %w", err)
	}
	took := time.Since(begin)
	if len(m.Svids) != 1 || m.Svids[0].SpiffeId != os.Getenv("BENCH_WANT") {
		return fmt.Errorf("got another identity than %s", os.Getenv("BENCH_WANT"))
	}
	_, err = fmt.Fprintln(stdout, took.Nanoseconds())
	return err
}

// firstSVID starts new pods, one after the other. None has an entry: the kube cluster's default identity is theirs.
func (b *bench) firstSVID(ctx context.Context, s *stage) error {
	a, err := s.nodeAgent(ctx)
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("finding this program: %w", err)
	}
	var samples []float64
	warm, n := 5, b.n(200, 50)
	for i := range warm + n {
		name := fmt.Sprintf("new-%d", i)
		token, err := s.iss.Pod("shop", name, "node-1")
		if err != nil {
			return err
		}
		var out bytes.Buffer
		p, err := s.c.Start(name, []string{"SPIFFE_ENDPOINT_SOCKET=" + a.Endpoint(), "COUNTERSIGN_DEV_POD=" + token,
			"BENCH_WANT=spiffe://" + trustDomain + "/ns/shop/sa/" + name}, &out, self, "play-pod")
		if err != nil {
			return err
		}
		select {
		case <-p.Done():
		case <-ctx.Done():
			return ctx.Err()
		}
		took, err := strconv.ParseInt(strings.TrimSpace(out.String()), 10, 64)
		if p.Code() != 0 || err != nil {
			return fmt.Errorf("pod %s: %s", name, out.String())
		}
		if i >= warm {
			samples = append(samples, ms(time.Duration(took)))
		}
	}
	p, r := spreadOf(samples), b.result("first-svid")
	b.sample("PodFirstSVID", n, p.p50, "p50-ms", p.p99, "p99-ms", p.max, "max-ms")
	r.add(check{got: p.p50, bar: 10, moonshot: 4}, "p50 %.1f ms", p.p50)
	r.add(check{got: p.p99, bar: 50}, "p99 %.1f ms", p.p99)
	r.note("fastest %.1f ms, slowest %.1f ms of %d pods", p.min, p.max, n)
	return nil
}
