//go:build integration

package integration

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"countersign.io/countersign/integration/node"
)

// appImage has the static programs that play applications; its entry is a program by its path.
const appImage = "node.test/app:1"

// nodes are those that this process has started; TestMain ends them.
var nodes struct {
	sync.Mutex
	all []*node.Node
}

func together() error { return nil } // a whole Kubernetes keeps the cores busy

func closeNodes() {
	nodes.Lock()
	defer nodes.Unlock()
	for _, n := range nodes.all {
		if err := errors.Join(n.Close(), os.RemoveAll(n.Dir())); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
	}
	nodes.all = nil
}

// sharedNode is the node that tests share that do not harm it: bringing one up takes 10 to 20 s. A test has namespaces of its own.
var sharedNode = sync.OnceValues(func() (*node.Node, error) { return startNode() })

// kubernetes is the shared node, for one test, whose end it tells the reason of a failure.
func kubernetes(t *testing.T) (context.Context, *node.Node) {
	t.Helper()
	needRoot(t)
	if _, err := os.Stat("kube/bin/debs/usr/bin/containerd"); err != nil {
		t.Skipf("%v: make integration unpacks it", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	t.Cleanup(cancel)
	began := time.Now()
	n, err := sharedNode()
	if err != nil {
		t.Fatal(err)
	}
	if took := time.Since(began); took > time.Second {
		t.Logf("Kubernetes ready after %.1f s", took.Seconds())
	}
	t.Cleanup(func() {
		if t.Failed() {
			for _, d := range []string{"kubelet", "api"} {
				t.Logf("--- %s\n%s", d, n.Log(d))
			}
		}
	})
	return ctx, n
}

func startNode() (n *node.Node, err error) {
	programs, err := static()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Minute)
	defer cancel()
	dir, err := os.MkdirTemp("", "cs-n-")
	if err != nil {
		return nil, err
	}
	kube, err := filepath.Abs("kube/bin")
	if err != nil {
		return nil, err
	}
	sandbox, err := filepath.Abs("gvisor/bin")
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(filepath.Join(sandbox, "containerd-shim-runsc-v1")); err != nil {
		sandbox = "" // one test misses it, and says so
	}
	n, err = node.Start(ctx, node.Config{
		Dir: dir, Bin: kube, Debs: filepath.Join(kube, "debs"), Hold: filepath.Join(programs, "hold"), Pause: filepath.Join(programs, "pod"),
		Sandbox: sandbox, Issuer: kubeIssuer,
	})
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	nodes.Lock()
	nodes.all = append(nodes.all, n)
	nodes.Unlock()
	app := node.Image{Name: appImage}
	for _, p := range []string{"pod", "other", "workload", "countersign-agent"} {
		app.Programs = append(app.Programs, filepath.Join(programs, p))
	}
	return n, n.Build(ctx, app)
}

// TestNode shows that the node is a Kubernetes: pods run, have tokens and names, and end.
func TestNode(t *testing.T) {
	ctx, n := kubernetes(t)
	manifest := `
apiVersion: v1
kind: Namespace
metadata: {name: first}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: first}
spec: {clusterIP: None, selector: {app: web}, ports: [{port: 80}]}
---
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: web, namespace: first}
spec:
  replicas: 2
  serviceName: web
  podManagementPolicy: Parallel
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      terminationGracePeriodSeconds: 1
      containers: [{name: main, image: "` + appImage + `", imagePullPolicy: Never, command: [/pod, pause]}]
`
	began := time.Now()
	if err := n.Apply(ctx, manifest); err != nil {
		t.Fatal(err)
	}
	pods, err := n.WaitReady(ctx, "first", "app=web", 2)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("two pods ready after %v", time.Since(began).Round(time.Millisecond))
	var want []string
	for _, p := range pods {
		want = append(want, p.Status.PodIP)
	}
	slices.Sort(want)
	// The endpoints follow the pods, later when the controllers have only just found their API server again.
	for end := time.Now().Add(time.Minute); ; time.Sleep(time.Second) {
		out, err := n.Exec(ctx, "first", "web-0", "", "/pod", "resolve", "web.first", "web-0.web.first.svc.cluster.local", "kubernetes.default.svc")
		lines := strings.Split(strings.TrimSpace(out), "\n")
		if err == nil && len(lines) == 3 && lines[0] == strings.Join(want, " ") && strings.Contains(lines[0], lines[1]) && lines[2] == node.APIService {
			break
		}
		if time.Now().After(end) {
			t.Errorf("names: got %q, %v; want %v first", lines, err, want)
			break
		}
	}
	if err := n.Delete(ctx, manifest); err != nil {
		t.Fatal(err)
	}
	if err := n.WaitGone(ctx, "/api/v1/namespaces", "first"); err != nil {
		t.Fatal(err)
	}
}
