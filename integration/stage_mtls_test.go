//go:build integration

package integration

import (
	"fmt"
	"testing"

	"countersign.io/countersign/integration/node"
)

// talk is two pods that shake hands all the time, and what the client has written.
type talk struct {
	p   *play
	out *node.Output
	log *eventLog
	at  int // lines that log has taken
}

// talking starts them, with CSI volumes; neither holds a token, a key or anything else from outside.
func (p *play) talking() *talk {
	p.t.Helper()
	p.account("backend")
	p.account("frontend")
	id := func(account string) string { return fmt.Sprintf("spiffe://%s/ns/%s/sa/%s", kubeDomain, p.ns, account) }
	server := p.start("backend", p.podManifest("backend", "backend", volume, volumeMounts, "", "/workload", "-listen", ":8443", "-peer", id("frontend")))
	to := p.get(server.pod.Name).Status.PodIP + ":8443"
	client := p.start("frontend", p.podManifest("frontend", "frontend", volume, volumeMounts, "", "/workload", "-dial", to, "-peer", id("backend"), "-interval", "20ms"))
	return &talk{p: p, out: client.out, log: newEventLog()}
}

// shaken waits for so many more handshakes; none may have failed ever.
func (k *talk) shaken(more int) {
	k.p.t.Helper()
	before := -1
	if err := k.out.Wait(k.p.ctx, "handshakes", func(lines []string) bool {
		for _, l := range lines[k.at:] {
			fmt.Fprintln(k.log, l)
		}
		k.at = len(lines)
		if before < 0 {
			before = k.log.ok
		}
		return k.log.ok >= before+more || k.log.bad > 0
	}); err != nil {
		k.p.t.Fatal(err)
	}
	if k.log.bad > 0 || len(k.log.errs) > 0 {
		k.p.t.Errorf("%d handshakes failed: %v", k.log.bad, k.log.errs)
	}
}

// TestStageRotation has pods with CSI volumes talk mutual TLS while the trust domain's root is replaced.
func TestStageRotation(t *testing.T) {
	p := onStage(t)
	k := p.talking()
	k.shaken(50)
	if out, err := p.admin(p.ctx, "bundle", "rotate", "--watch"); err != nil {
		t.Fatal(p.explain(p.ctx, fmt.Errorf("%w: %s", err, out)))
	}
	k.shaken(100)
	t.Logf("%d handshakes, %d SVIDs of the client, none failed", k.log.ok, k.log.svids)
}
