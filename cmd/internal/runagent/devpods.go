package runagent

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"path/filepath"
	"strings"

	"countersign.io/countersign/attestor"
	"countersign.io/countersign/cmd/internal/cli"
	"countersign.io/countersign/identity"
)

// devPodVariable names, in a process's environment, the token of the pod that it plays.
const devPodVariable = "COUNTERSIGN_DEV_POD="

// devPods lets processes play pods where there is no kubelet: a caller is the pod whose token its environment names, if that
// token lies in dir. The token is still verified by the members as any other is. It proves nothing about the caller, which is why
// the flag that leads here says insecure.
func devPods(dir string) func(*attestor.Peer) (attestor.Place, error) {
	return func(p *attestor.Peer) (attestor.Place, error) {
		environ, err := cli.ReadFile(fmt.Sprintf("/proc/%d/environ", p.PID()), 1<<20)
		if err != nil {
			return attestor.Place{}, fmt.Errorf("%w: reading the caller's environment: %v", identity.ErrUnavailable, err)
		}
		for v := range bytes.SplitSeq(environ, []byte{0}) {
			path, ok := strings.CutPrefix(string(v), devPodVariable)
			if !ok {
				continue
			}
			if filepath.Dir(path) != filepath.Clean(dir) {
				return attestor.Place{}, fmt.Errorf("%w: %s%s is not in %s", identity.ErrDenied, devPodVariable, path, dir)
			}
			uid, err := podUID(path)
			if err != nil {
				return attestor.Place{}, err
			}
			return attestor.Place{PodUID: uid, TokenPath: path}, nil
		}
		return attestor.Place{}, nil
	}
}

// podUID reads, without believing it, which pod a token is bound to: without a kubelet there is no cgroup to tell.
func podUID(path string) (string, error) {
	token, err := cli.ReadFile(path, identity.MaxTokenBytes)
	if err != nil {
		return "", fmt.Errorf("%w: reading the development token: %v", identity.ErrDenied, err)
	}
	defer clear(token)
	uid, err := parsePodUID(token)
	if err != nil {
		return "", fmt.Errorf("reading the development token %s: %w", path, err)
	}
	return uid, nil
}

// parsePodUID finds the pod's UID in a JWT's claims. Its errors show nothing of the token.
func parsePodUID(token []byte) (string, error) {
	parts := bytes.Split(bytes.TrimSpace(token), []byte("."))
	if len(parts) != 3 {
		return "", fmt.Errorf("%w: it is not a JWT", identity.ErrUnauthenticated)
	}
	var claims struct {
		Kube struct {
			Pod struct {
				UID string `json:"uid"`
			} `json:"pod"`
		} `json:"kubernetes.io"`
	}
	payload, err := base64.RawURLEncoding.DecodeString(string(parts[1]))
	if err != nil || json.Unmarshal(payload, &claims) != nil || claims.Kube.Pod.UID == "" {
		return "", fmt.Errorf("%w: it names no pod", identity.ErrUnauthenticated)
	}
	return claims.Kube.Pod.UID, nil
}
