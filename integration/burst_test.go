//go:build integration

package integration

import (
	"cmp"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"

	"countersign.io/countersign/integration/node"
)

// TestStagePodsAtOnce starts some pods at once. As many as a node carries, 200, are measured by make bench -only kube-pods, which
// takes minutes; COUNTERSIGN_PODS=200 has them here.
func TestStagePodsAtOnce(t *testing.T) {
	count := 20
	if n, err := strconv.Atoi(os.Getenv("COUNTERSIGN_PODS")); err == nil {
		count = n
	}
	p := onStage(t)
	began := time.Now()
	took, err := p.n.Burst(p.ctx, node.Burst{Namespace: p.ns + "-burst", Count: count, Image: appImage, Attributes: `{wait: "false"}`})
	if err != nil {
		t.Fatal(err)
	}
	slices.SortFunc(took, func(a, b node.Took) int { return cmp.Compare(a.Began, b.Began) })
	t.Logf("%d pods (of the 200 that make bench measures), come and gone in %.0f s: start to first SVID p50 %v, slowest %v",
		count, time.Since(began).Seconds(), took[len(took)/2].Began.Round(time.Millisecond), took[len(took)-1].Began.Round(time.Millisecond))
}
