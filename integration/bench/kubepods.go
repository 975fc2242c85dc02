package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"countersign.io/countersign/integration/node"
)

const kubePodsKey = "kube-pods"

// kubePods starts 200 pods at once on a real node of Kubernetes, with members, agent and all on the same cores. It needs root and
// what make integration builds; without them the row says so, and nothing else suffers.
func (b *bench) kubePods(ctx context.Context) (failed bool) {
	if !b.only.MatchString(kubePodsKey) {
		return false
	}
	kube := filepath.Join(b.root, "integration", "kube", "bin")
	r := b.result(kubePodsKey)
	if _, err := os.Stat(filepath.Join(kube, "debs")); err != nil || os.Getuid() != 0 {
		r.err = errors.New("it needs root, and what make integration builds")
		return false
	}
	b.say("starting Kubernetes, measuring %s", kubePodsKey)
	if err := b.measureKubePods(ctx, kube, r); err != nil {
		b.fail([]group{{keys: []string{kubePodsKey}}}, err)
		return true
	}
	return false
}

func (b *bench) measureKubePods(ctx context.Context, kube string, r *result) error {
	ctx, cancel := context.WithTimeout(ctx, 40*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "go", "build", "-o", b.bin+"/", "./integration/pod", "./integration/node/hold")
	cmd.Dir = b.root
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("building: %w\n%s", err, out)
	}
	dir, err := os.MkdirTemp("", "cs-k-") // short: sockets live in it
	if err != nil {
		return fmt.Errorf("making a folder: %w", err)
	}
	defer os.RemoveAll(dir)
	n, err := node.Start(ctx, node.Config{
		Dir: dir, Bin: kube, Debs: filepath.Join(kube, "debs"), Hold: filepath.Join(b.bin, "hold"), Pause: filepath.Join(b.bin, "pod"),
	})
	if err != nil {
		return err
	}
	defer n.Close()
	const app = "node.test/app:1"
	if err := n.Build(ctx, node.Image{Name: app, Programs: []string{filepath.Join(b.bin, "pod")}}); err != nil {
		return err
	}
	if err := n.Install(ctx, node.Installation{
		Countersign: filepath.Join(b.bin, "countersign"), Programs: b.bin, TrustDomain: trustDomain, Members: 3,
	}); err != nil {
		return err
	}
	count := b.n(200, 20)
	var alone spread // the same pods without the product
	for _, c := range []struct {
		name, what string
		burst      node.Burst
	}{
		{"KubePodsAlone", "the same pods without the product", node.Burst{Alone: true}},
		{"KubePods", "the SVID is there before the program", node.Burst{Attributes: `{}`}},
		{"KubePodsNoWait", "where it need not be there at the start", node.Burst{Attributes: `{wait: "false"}`}},
	} {
		c.burst.Namespace, c.burst.Count, c.burst.Image = "burst", count, app
		began := time.Now()
		took, err := n.Burst(ctx, c.burst)
		if err != nil {
			return err
		}
		var ran, asked []float64
		refused := 0
		for _, d := range took {
			refused += d.Refused
			ran, asked = append(ran, ms(d.Began)), append(asked, ms(d.Asked))
		}
		p, whole := spreadOf(ran), spreadOf(asked)
		b.sample(c.name, count, p.p50, "p50-ms", p.p99, "p99-ms", p.max, "max-ms", whole.p50, "asked-p50-ms", whole.p99, "asked-p99-ms")
		r.note("%s: program's start to first SVID p50 %.0f ms, p99 %.0f ms (fastest %.1f, slowest %.0f, of %d pods); from the request for all of them p50 %.1f s, p99 %.1f s; %d mounts were put off; all had come and gone after %.0f s",
			c.what, p.p50, p.p99, p.min, p.max, count, whole.p50/1000, whole.p99/1000, refused, time.Since(began).Seconds())
		if c.burst.Alone {
			alone = p
			continue
		}
		r.add(check{got: p.p99 - alone.p99, bar: 250, moonshot: 50}, "%s: p50 %.0f ms, p99 %.0f ms, of which %.0f and %.0f without the product",
			c.what, p.p50, p.p99, alone.p50, alone.p99)
	}
	return nil
}
