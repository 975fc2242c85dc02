package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
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
}

// Burst starts the pods and tells of each how long its program ran until it had its first SVID. Then it removes them.
func (n *Node) Burst(ctx context.Context, b Burst) (took []time.Duration, err error) {
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
        command: [/pod, follow, "unix:///run/countersign/agent.sock"]
        securityContext: {allowPrivilegeEscalation: false, readOnlyRootFilesystem: true, capabilities: {drop: [ALL]}}
        volumeMounts: [{name: identity, mountPath: /run/countersign, readOnly: true}]
      volumes: [{name: identity, csi: {driver: csi.countersign.io, readOnly: true, volumeAttributes: %[4]s}}]
`, b.Namespace, b.Count, b.Image, b.Attributes)
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
		d, err := n.firstSVID(ctx, &pods[i])
		if err != nil {
			return nil, err
		}
		took = append(took, d)
	}
	return took, nil
}

// firstSVID reads what a pod has written of itself.
func (n *Node) firstSVID(ctx context.Context, p *corev1.Pod) (took time.Duration, err error) {
	out, err := n.Output(ctx, p, "main")
	if err != nil {
		return 0, err
	}
	defer out.Close()
	err = out.Wait(ctx, "the first SVID of "+p.Name, func(lines []string) bool {
		var start time.Time
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
				took = seen.Time.Sub(start)
				return true
			}
		}
		return false
	})
	return took, err
}
