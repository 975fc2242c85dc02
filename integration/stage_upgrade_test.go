//go:build integration

package integration

import (
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"

	"countersign.io/countersign/integration/node"
)

const namespaced = "/namespaces/countersign/"

// rolled waits until the members and the agent are what was applied last, and ready.
func (p *play) rolled(what string) {
	p.t.Helper()
	began := time.Now()
	members := func(s *appsv1.StatefulSet) bool {
		u := &s.Status
		return u.ObservedGeneration >= s.Generation && u.UpdatedReplicas == *s.Spec.Replicas && u.AvailableReplicas == *s.Spec.Replicas && u.CurrentRevision == u.UpdateRevision
	}
	if err := node.WaitFor(p.ctx, p.n, "/apis/apps/v1"+namespaced+"statefulsets", "countersign", what+": the members", members); err != nil {
		p.t.Fatal(p.explain(p.ctx, err))
	}
	agents := func(d *appsv1.DaemonSet) bool {
		u := &d.Status
		return u.ObservedGeneration >= d.Generation && u.UpdatedNumberScheduled == u.DesiredNumberScheduled && u.NumberAvailable == u.DesiredNumberScheduled
	}
	if err := node.WaitFor(p.ctx, p.n, "/apis/apps/v1"+namespaced+"daemonsets", "countersign-agent", what+": the agent", agents); err != nil {
		p.t.Fatal(p.explain(p.ctx, err))
	}
	p.t.Logf("%s: took %v", what, since(began))
}

// install applies the chart as the stage did, with more arguments.
func (p *play) install(more ...string) {
	p.t.Helper()
	manifest, err := p.installed.Render(p.ctx, more...)
	if err != nil {
		p.t.Fatal(err)
	}
	p.apply(manifest)
}

// realImages are those of make image, on the node.
func (p *play) realImages(tag string) {
	p.t.Helper()
	dir := p.t.TempDir()
	cmd := exec.CommandContext(p.ctx, "go", "run", ".", "-root", "../..", "-out", dir, "-version", tag, "-repo", "node.test", "-arch", "amd64")
	cmd.Dir = "../deploy/image"
	if out, err := cmd.CombinedOutput(); err != nil {
		p.t.Fatalf("making the images: %v: %s", err, out)
	}
	if err := p.n.Import(p.ctx, filepath.Join(dir, "countersign.tar"), filepath.Join(dir, "countersign-agent.tar")); err != nil {
		p.t.Fatal(err)
	}
}

// TestStageUpgrade upgrades members and agent to the images of make image, tries one that does not exist, and rolls back, while pods
// shake hands all the time: none fails. Their SVIDs last 2 min, renewed after one: longer than an agent is away on a machine that has
// other things to do, shorter than all of this.
func TestStageUpgrade(t *testing.T) {
	p := onStage(t)
	p.realImages("real")
	for _, account := range []string{"backend", "frontend"} {
		id := fmt.Sprintf("spiffe://%s/ns/%s/sa/%s", kubeDomain, p.ns, account)
		if out, err := p.admin(p.ctx, "entry", "create", "-s", "k8s:ns:"+p.ns, "-s", "k8s:sa:"+account, "--id", id, "--x509-ttl", "2m"); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	k := p.talking()
	k.shaken(50)
	t.Cleanup(func() { // for the tests that follow
		if t.Failed() {
			p.ctx = context.Background()
			p.install()
			p.rolled("putting the stage back")
		}
	})

	p.install("--set", "image.tag=real")
	p.rolled("the upgrade")
	k.shaken(50)
	if out, err := p.admin(p.ctx, "cluster", "status"); err != nil || strings.Count(out, "real") < members {
		t.Errorf("after the upgrade: %v: %s", err, out)
	}
	p.account("late")
	p.follow("late", "late", "").identity()
	p.testPod()

	// What does not start stops the upgrade at the first member.
	p.install("--set", "image.tag=real", "--set", "members.image=node.test/missing:1", "--set", "image.pullPolicy=Never")
	stuck := func(pod *corev1.Pod) bool {
		for _, s := range pod.Status.ContainerStatuses {
			if w := s.State.Waiting; w != nil && s.Image == "node.test/missing:1" && w.Reason == "ErrImageNeverPull" {
				return true
			}
		}
		return false
	}
	if err := node.WaitFor(p.ctx, p.n, "/api/v1"+namespaced+"pods", "countersign-2", "the upgrade is stuck", stuck); err != nil {
		t.Fatal(p.explain(p.ctx, err))
	}
	k.shaken(500)
	for _, name := range []string{"countersign-0", "countersign-1"} {
		var pod corev1.Pod
		if err := p.n.Do(p.ctx, "GET", "/api/v1"+namespaced+"pods/"+name, nil, &pod); err != nil {
			t.Fatal(err)
		}
		if !node.PodReady(&pod) || pod.Spec.Containers[0].Image != "node.test/countersign:real" {
			t.Errorf("%s, during an upgrade that is stuck: image %s, ready %v", name, pod.Spec.Containers[0].Image, node.PodReady(&pod))
		}
	}

	p.install()
	p.rolled("the roll back")
	k.shaken(50)
	if k.log.svids < 2 {
		t.Error("the client's SVID was never renewed: this test tells nothing")
	}
	t.Logf("%d handshakes, %d SVIDs of the client, %d failed", k.log.ok, k.log.svids, k.log.bad)
}

// testPod runs what helm test runs.
func (p *play) testPod() {
	p.t.Helper()
	manifest, err := p.installed.Render(p.ctx, "--set", "image.tag=real", "--test")
	if err != nil {
		p.t.Fatal(err)
	}
	p.apply(manifest)
	var pod corev1.Pod
	if err := node.WaitFor(p.ctx, p.n, "/api/v1"+namespaced+"pods", "countersign-test", "the test's pod ends", func(o *corev1.Pod) bool {
		pod = *o
		return o.Status.Phase == corev1.PodSucceeded || o.Status.Phase == corev1.PodFailed
	}); err != nil {
		p.t.Fatal(err)
	}
	out, err := p.n.Logs(p.ctx, "countersign", "countersign-test", "fetch")
	if want := fmt.Sprintf("spiffe://%s/ns/countersign/sa/default", kubeDomain); err != nil || pod.Status.Phase != corev1.PodSucceeded || !strings.Contains(out, want) {
		p.t.Errorf("the test's pod %s, want %s: %v: %s", pod.Status.Phase, want, err, out)
	}
	if err := p.n.Delete(p.ctx, manifest); err != nil {
		p.t.Error(err)
	}
}
