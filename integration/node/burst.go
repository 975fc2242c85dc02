package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// Burst is many pods that are started at once, each with a volume of the CSI driver's.
type Burst struct {
	Namespace  string // of its own
	Count      int
	Image      string // has the command pod (integration/pod), in its root
	Attributes string // of the volumes, as a YAML map
	// Alone has the same pods without the product: an empty volume, in which the program serves an SVID to itself. It is what the
	// machine, the kubelet and the program take by themselves.
	Alone bool
}

// Took is how long one of them took.
type Took struct {
	Asked time.Duration // from the request for all of them until the program had its first SVID
	Began time.Duration // from the program's start until then
	// Refused is how often the kubelet was told to try again, which it puts off longer each time.
	Refused int
}

// Burst starts the pods and tells of each how long it took to have its first SVID. Then it removes them.
func (n *Node) Burst(ctx context.Context, b Burst) (took []Took, err error) {
	command, volume := "follow", "csi: {driver: csi.countersign.io, readOnly: true, volumeAttributes: "+b.Attributes+"}"
	if b.Alone {
		command, volume = "alone", "emptyDir: {}"
	}
	manifest := fmt.Sprintf(`
apiVersion: v1
kind: Namespace
metadata: {name: %[1]s}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: burst, namespace: %[1]s}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: burst, namespace: %[1]s}
spec:
  replicas: %[2]d
  selector: {matchLabels: {app: burst}}
  template:
    metadata: {labels: {app: burst}}
    spec:
      serviceAccountName: burst
      automountServiceAccountToken: false
      enableServiceLinks: false
      terminationGracePeriodSeconds: 1
      securityContext: {runAsUser: 1000, runAsGroup: 1000, fsGroup: 1000, runAsNonRoot: true, seccompProfile: {type: RuntimeDefault}}
      containers:
      - name: main
        image: %[3]s
        imagePullPolicy: Never
        command: [/pod, %[4]s, "unix:///run/countersign/agent.sock"]
        securityContext: {allowPrivilegeEscalation: false, readOnlyRootFilesystem: true, capabilities: {drop: [ALL]}}
        volumeMounts: [{name: identity, mountPath: /run/countersign, readOnly: %[5]t}]
      volumes: [{name: identity, %[6]s}]
`, b.Namespace, b.Count, b.Image, command, !b.Alone, volume)
	asked := time.Now()
	if err := n.Apply(ctx, manifest); err != nil {
		return nil, err
	}
	defer func() {
		err = errors.Join(err, n.Do(ctx, http.MethodDelete, "/api/v1/namespaces/"+b.Namespace, nil, nil),
			n.pollFor(ctx, 8*time.Minute, "the end of "+b.Namespace, func() error {
				err := n.Do(ctx, http.MethodGet, "/api/v1/namespaces/"+b.Namespace, nil, nil)
				if Missing(err) {
					return nil
				}
				return errors.Join(err, errors.New("it is still there"))
			}))
	}()
	var pods []corev1.Pod
	tick := time.NewTicker(2 * time.Second) // the node has enough to do
	defer tick.Stop()
	for running := 0; running < b.Count; {
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("waiting for %d pods: %w: %d run", b.Count, ctx.Err(), running)
		case <-tick.C:
		}
		if pods, err = n.Pods(ctx, b.Namespace, "app=burst"); err != nil {
			return nil, err
		}
		running = 0
		for _, p := range pods {
			if p.Status.Phase == corev1.PodRunning {
				running++
			}
		}
	}
	for i := range pods {
		start, had, err := n.firstSVID(ctx, &pods[i])
		if err != nil {
			return nil, err
		}
		events, err := n.Events(ctx, b.Namespace, pods[i].Name)
		if err != nil {
			return nil, err
		}
		events = slices.DeleteFunc(events, func(e string) bool { return !strings.HasPrefix(e, "FailedMount: ") })
		took = append(took, Took{Asked: had.Sub(asked), Began: had.Sub(start), Refused: len(events)})
	}
	return took, nil
}

// firstSVID reads what a pod has written of itself.
func (n *Node) firstSVID(ctx context.Context, p *corev1.Pod) (start, had time.Time, err error) {
	out, err := n.Output(ctx, p, "main")
	if err != nil {
		return start, had, err
	}
	defer out.Close()
	err = out.Wait(ctx, "the first SVID of "+p.Name, func(lines []string) bool {
		for _, l := range lines {
			var seen struct {
				Time  time.Time
				Event string
			}
			if json.NewDecoder(strings.NewReader(l)).Decode(&seen) != nil {
				continue
			}
			switch seen.Event {
			case "start":
				start = seen.Time
			case "svid":
				had = seen.Time
				return true
			}
		}
		return false
	})
	return start, had, err
}
